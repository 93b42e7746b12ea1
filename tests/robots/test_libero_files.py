"""robots/libero_files.py against LIBERO's own lists, and, where LIBERO or its assets are absent,
against stand-in files; damaged files; pickles that mean harm."""

import ctypes.util
import importlib.metadata
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
import yaml

from robots import libero_files
from robots.libero_files import (
    find_assets,
    find_package,
    initial_states,
    make_task,
    prepare,
    tasks,
    write_config,
)
from tests.conftest import needs_assets, needs_libero, package, run_bare

ROOT = Path(__file__).parents[2]


def test_config_asks_nothing_and_mends_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")
    folder = write_config(tmp_path / "pack age", tmp_path / "assets")
    content = {
        "benchmark_root": f"{tmp_path}/pack age",
        "bddl_files": f"{tmp_path}/pack age/bddl_files",
        "init_states": f"{tmp_path}/pack age/init_files",
        "datasets": f"{tmp_path}/datasets",
        "assets": f"{tmp_path}/assets",
    }
    assert yaml.safe_load((folder / "config.yaml").read_text()) == content
    assert folder.is_relative_to(tmp_path / "cache")
    assert os.environ["LIBERO_CONFIG_PATH"] == str(folder)
    assert write_config(tmp_path / "other", tmp_path / "assets") != folder
    (folder / "config.yaml").write_text("benchmark_root: [")  # damaged: written anew
    assert write_config(tmp_path / "pack age", tmp_path / "assets") == folder
    assert yaml.safe_load((folder / "config.yaml").read_text()) == content
    (tmp_path / "own").mkdir()  # the user's is left alone
    (tmp_path / "own/config.yaml").write_text("the user's")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "own"))
    assert write_config(tmp_path / "pack age", tmp_path / "assets") == folder
    assert (tmp_path / "own/config.yaml").read_text() == "the user's"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        write_config(tmp_path, tmp_path)


def test_which_package(tmp_path, monkeypatch, installed):
    assert find_package() == installed
    package(tmp_path / "b")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        RuntimeError, match="not installed; run: pip install --no-deps -r requirements-libero.txt"
    ):
        find_package()
    plus = package(tmp_path / "plus", plus=True)
    assert find_package(str(tmp_path / "plus")) == find_package(str(plus)) == plus
    with pytest.raises(RuntimeError, match=f"{tmp_path}/b holds no LIBERO-Plus.*LIBERO_PLUS_PATH"):
        find_package(str(tmp_path / "b"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "plus")])
    with pytest.raises(RuntimeError, match="LIBERO is not installed; run"):
        find_package()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "plus"), str(tmp_path / "b")])
    assert find_package() == tmp_path / "b/libero/libero"  # LIBERO-Plus alone is given by --plus


def test_which_assets(tmp_path, monkeypatch, installed):
    for name in libero_files.ASSET_FOLDERS:
        (tmp_path / "whole" / name).mkdir(parents=True)
        (installed / "assets" / name).mkdir(parents=True)
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path))
    assert find_assets(installed, str(tmp_path / "whole")) == tmp_path / "whole"
    with pytest.raises(
        RuntimeError,
        match=f"{tmp_path} are not whole, articulated_objects/ is missing; .*LIBERO_ASSETS or --a",
    ):
        find_assets(installed)
    monkeypatch.delenv("LIBERO_ASSETS")
    assert find_assets(installed) == installed / "assets"
    (installed / "assets/textures").rmdir()
    with pytest.raises(RuntimeError, match="not whole, textures/ is missing"):
        find_assets(installed)
    other = package(tmp_path / "other")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    (tmp_path / "home/.cache/libero").mkdir(parents=True)
    (tmp_path / "home/.cache/libero/assets").symlink_to(
        tmp_path / "whole"
    )  # where hf-libero puts a download
    assert find_assets(other) == tmp_path / "whole"
    for name in libero_files.ASSET_FOLDERS:
        (tmp_path / libero_files.ASSET_PACKAGE / name).mkdir(parents=True)
    assert find_assets(other) == tmp_path / libero_files.ASSET_PACKAGE  # by setup.sh --libero
    plus = package(tmp_path / "plus", plus=True)
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path / "whole"))
    assert find_assets(plus) == tmp_path / "whole"
    for name in libero_files.ASSET_FOLDERS:
        (plus / "assets" / name).mkdir(parents=True)
    assert find_assets(plus) == plus / "assets"  # LIBERO-Plus's own hold more than LIBERO's


@pytest.mark.parametrize("version", ["3.10.0", "4.0.1", "3.1.6"])
def test_wrong_mujoco(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=f"mujoco {version} is.*pip install mujoco==3.3.2"):
        prepare.__wrapped__()


def test_mujoco_note(monkeypatch):
    """Of any but the version that published checkpoints and the initial states expect."""
    for version, noted in (("3.3.2", False), ("3.8.1", True), ("3.3.3", True), ("3.2.7", True)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, v=version: v)
        note = libero_files.mujoco_note()
        assert bool(note) == noted and (not noted or f"MuJoCo {version}, but" in note)
        assert not noted or "expect 3.3.2" in note and "\n" not in note

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert libero_files.mujoco_note() is None
    with pytest.raises(RuntimeError, match="mujoco is not installed; run: bash setup.sh"):
        prepare.__wrapped__()


def test_wrong_gl(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(RuntimeError, match="MUJOCO_GL=glfw.*egl or osmesa"):
        prepare.__wrapped__()


# Importing LIBERO-Plus


@pytest.fixture
def plus_stand_in(tmp_path, monkeypatch):
    """A LIBERO-Plus that imports what the real one does; what is imported goes afterwards."""
    root = package(tmp_path / "plus", plus=True)
    for name in libero_files.ASSET_FOLDERS:
        (root / "assets" / name).mkdir(parents=True)
    (root / "envs").mkdir()
    (root / "envs/__init__.py").write_text("from .venv import Venv")
    (root / "envs/venv.py").write_text("import gym\nclass Venv(gym.Env): pass")
    (root / "envs/env_wrapper.py").write_text("import numpy as np\nclass ControlEnv: pass")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")
    monkeypatch.setattr(libero_files, "mujoco_version", lambda: "3.3.2")
    before = {k: sys.modules.pop(k) for k in list(sys.modules) if re.match(r"(libero|gym)\b", k)}
    yield root
    for name in [k for k in sys.modules if re.match(r"(libero|gym)\b", k)]:
        del sys.modules[name]
    sys.modules.update(before)


def test_gym_is_gymnasium(plus_stand_in, monkeypatch):
    """LIBERO-Plus imports gym, of which gymnasium is the successor; one that is there is left."""
    plus = str(plus_stand_in)
    wrapper = sys.modules[prepare.__wrapped__(plus=plus).__module__]
    assert issubclass(sys.modules["libero.libero.envs.venv"].Venv, gymnasium.Env)
    assert wrapper.np.float_ is np.float64  # an older numpy, too
    for name in [k for k in sys.modules if re.match(r"(libero|gym)\b", k)]:
        del sys.modules[name]
    (plus_stand_in.parents[1] / "gym.py").write_text("class Env: pass")
    monkeypatch.syspath_prepend(str(plus_stand_in.parents[1]))
    prepare.__wrapped__(plus=plus)
    assert not issubclass(sys.modules["libero.libero.envs.venv"].Venv, gymnasium.Env)


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "import skimage.filters.none",
            "LIBERO-Plus needs the package skimage; run: pip install scikit-image",
        ),
        ("import wand.api", "LIBERO-Plus needs the package wand; run: pip install wand"),
        ("import easydict_x", "LIBERO-Plus needs the package easydict_x; run: bash setup.sh"),
        (
            "raise ImportError('MagickWand shared library not found.\\nTry')",
            "MagickWand shared library not found. Try.; run: apt-get install -y libmagickwand-dev",
        ),
        ("raise AttributeError('no eglQueryString')", "if that is OpenGL, run: "),
    ],
)
def test_what_is_missing_is_named(plus_stand_in, monkeypatch, line, message):
    for name in ("skimage", "wand"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setenv("MUJOCO_GL", "egl")
    (plus_stand_in / "envs/env_wrapper.py").write_text(line)
    with pytest.raises(RuntimeError, match=message) as caught:
        prepare.__wrapped__(plus=str(plus_stand_in))
    assert "\n" not in str(caught.value)


# Initial states


def zipped(path: Path, data: bytes) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return str(path)


def test_initial_states_are_read_without_running_code(tmp_path):
    states, path = np.random.default_rng(0).standard_normal((50, 11)), tmp_path / "a.pruned_init"
    torch.save(states, path)  # how LIBERO wrote them
    np.testing.assert_array_equal(initial_states(str(path)), states)
    torch.save(states[0], tmp_path / "one")
    np.testing.assert_array_equal(initial_states(str(tmp_path / "one")), states[:1])
    with pytest.raises(ValueError, match="absent holds no initial states"):
        initial_states(str(tmp_path / "absent"))


# numpy.ndarray((2,), "O", b"A" * 16): two objects at the address 0x4141414141414141
CRASH = b"cnumpy\nndarray\n(I2\ntS'O'\nS'" + b"A" * 16 + b"'\ntR."


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(os.getcwd),
        CRASH,
        b"(" + CRASH,
        b"",
        b".",
        b"N.",
        b"I5\n.",
        b"(" * 10**6 + b".",
        b"\x80\x02r\xff\xff\xff\x7f.",  # memo number 2**31: 32 GB
        b"\x80\x05\x96\xff\xff\xff\xff\x07\x00\x00\x00.",  # a bytearray of 32 GB
        pickle.dumps(np.zeros((50, 11)), 2)[:200],
        pickle.dumps(np.array([{}, {}]), 2),
        *(
            pickle.dumps(x, 2)
            for x in (
                np.zeros((50, 11), np.float32),
                np.zeros((5, 5, 5)),
                np.zeros((0, 11)),
                np.zeros(()),
                np.asfortranarray(np.ones((5, 7))),
                np.zeros((50, 11), ">f8"),
                [1.0, 2.0],
                np.full((2, 3), np.nan),
                np.full((2, 3), np.inf),
            )
        ),
    ],
)
def test_bad_initial_states(tmp_path, content):
    path = zipped(tmp_path / "bad", content)
    with pytest.raises(ValueError, match="bad holds no initial states.*libero.txt") as caught:
        initial_states(path)
    assert "\n" not in str(caught.value)


MUTATE = """
import sys, zipfile
from pathlib import Path
import numpy as np
from robots.libero_files import initial_states
rng, folder = np.random.default_rng(int(sys.argv[2])), Path(sys.argv[1])
good = (folder / "good").read_bytes()
read = refused = 0
for i in range(200):
    data = bytearray(good)
    for _ in range(rng.integers(1, 4)):                 # mostly where the opcodes are
        at = rng.integers(200) if rng.random() < 0.8 else rng.integers(len(data))
        data[at] = rng.integers(256)
    if rng.random() < 0.1:
        data = data[:rng.integers(len(data))]
    path = folder / f"{sys.argv[2]}-{i}"
    if sys.argv[3] == "zipped":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", bytes(data))
    else:
        path.write_bytes(data)
    try:
        states = initial_states(str(path))
        assert states.dtype == np.float64 and states.ndim == 2 and np.isfinite(states).all()
        read += 1
    except ValueError as error:
        said = str(error)
        assert said.startswith(f"{path} holds no initial states (") and "\\n" not in said
        refused += 1
print(read, refused)
"""


@pytest.mark.parametrize("form", ["zipped", "plain"])
def test_mutated_initial_states(tmp_path, form):
    """400 of them, 200 pickles in whole archives and 200 archives: no signal ends the process, and
    each that is refused is one line that names the file."""
    states = np.random.default_rng(0).standard_normal((50, 11))
    if form == "zipped":
        (tmp_path / "good").write_bytes(pickle.dumps(states, 2))
    else:
        torch.save(states, tmp_path / "good")
    done = subprocess.run(
        [sys.executable, "-c", MUTATE, str(tmp_path), "1", form],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    read, refused = map(int, done.stdout.split())
    assert read + refused == 200 and refused > 100


# Tasks


def test_tasks_of_a_suite(installed):
    assert [t.instruction for t in tasks("libero_spatial")] == [
        "pick up the bowl",
        "pick up the plate",
    ]
    assert tasks("libero_10")[0].instruction == "turn on the stove"
    assert (
        tasks("libero_spatial")[0].bddl
        == f"{installed}/bddl_files/libero_spatial/pick_up_the_bowl.bddl"
    )


def test_libero_plus(tmp_path, installed):
    package(tmp_path / "plus", plus=True)
    found = {d: tasks(f"libero_plus:{d}", str(tmp_path / "plus")) for d in libero_files.DIMENSIONS}
    assert {d: len(each) for d, each in found.items()} == {
        "camera": 1,
        "robot": 0,
        "language": 1,
        "light": 1,
        "background": 2,
        "noise": 1,
        "layout": 2,
    }
    assert {t.instruction for d in ("camera", "light", "layout") for t in found[d]} == {
        "pick up the bowl"
    }
    assert found["language"][0].instruction == "grab the dark bowl"
    assert [t.instruction for t in found["background"]] == ["pick up the bowl", "turn on the stove"]
    assert (
        found["noise"][0].instruction == "turn on the stove"
        and found["noise"][0].suite == "libero_10"
    )
    files = {t.states for d in ("camera", "light", "language") for t in found[d]}
    assert files == {
        f"{tmp_path}/plus/libero/libero/init_files/libero_spatial/pick_up_the_bowl.pruned_init"
    }
    assert found["layout"][0].states.endswith(
        "init_files/libero_newobj/libero_spatial/pick_up_the_bowl_add_13.pruned_init"
    )
    one = {
        d: tasks(f"libero_plus:{d}:libero_10", str(tmp_path / "plus"))
        for d in ("background", "camera")
    }
    assert [t.suite for t in one["background"]] == ["libero_10"] and one["camera"] == ()


def test_libero_plus_missing_or_broken(tmp_path, installed):
    with pytest.raises(
        RuntimeError, match="LIBERO-Plus is not here; run: .*--libero-plus, .*or LIBERO_PLUS_PATH"
    ):
        tasks("libero_plus:camera")
    root = package(tmp_path / "plus", plus=True)
    (root / "bddl_files/libero_spatial/pick_up_the_bowl_language_7.bddl").unlink()
    with pytest.raises(RuntimeError, match="language_7.bddl has no"):
        tasks("libero_plus:language", str(tmp_path / "plus"))
    (root / "benchmark/libero_suite_task_map.py").write_text("libero_task_map = {")
    with pytest.raises(RuntimeError, match="task_map.py is not LIBERO-Plus's list"):
        tasks("libero_plus:camera", str(tmp_path / "plus"))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "libero_task_map = ",
        "libero_task_map = {",
        "libero_task_map = {'libero_spatial': 5}",
        "libero_task_map = {'libero_spatial': [1, 2]}",
        "libero_task_map = {'libero_goal': []}",
        "libero_task_map = __import__('os').getcwd()",
        "libero_task_map = [" + "[" * 5000,
        "\x00\xff",
    ],
)
def test_damaged_list_of_tasks(installed, content):
    file = installed / "benchmark/libero_suite_task_map.py"
    file.write_text(content, encoding="latin1")
    with pytest.raises(RuntimeError, match=f"{file} is not LIBERO's list of tasks.*libero.txt"):
        tasks("libero_spatial")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "libero_task_map = {",
        "libero_task_map = []",
        "libero_task_map = 5",
        "libero_task_map = None",
        "libero_task_map = {'libero_spatial': 5}",
        "libero_task_map = {'libero_spatial': [5]}",
        "libero_task_map = {'libero_spatial': ['a'], ",
        "libero_task_map = {'libero_spatial': ['a']}",
        "libero_task_map = " + "[" * 100_000,
        "\xff\xfe\x00",
    ],
)
def test_damaged_list_of_libero_plus(tmp_path, installed, content):
    file = package(tmp_path / "plus", plus=True) / "benchmark/libero_suite_task_map.py"
    file.write_text(content, encoding="latin1")
    with pytest.raises(RuntimeError, match=f"{file} is not LIBERO-Plus's list of tasks") as caught:
        tasks("libero_plus:camera", str(tmp_path / "plus"))
    assert "\n" not in str(caught.value)


NAMES = {  # of real tasks, one of each form: what they change
    "open_the_middle_drawer_of_the_cabinet": (
        "moved_level1_sample1",
        "moved_level3_sample12",
        "table_1",
        "tb_10",
        "light_45",
        "add_13",
        "view_0_0_100_0_0_initstate_17",
        "view_0_10_100_-5_0_initstate_0",
        "view_0_0_100_0_0_initstate_0_noise_35",
    ),
    "pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate": (
        "table_11",
        "level1_sample4",
        "light_1",
        "view_0_0_122_0_0_initstate_0",
    ),
    "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it": (
        "level1_sample4",
        "add_14",
        "tb_10",
        "light_7",
        "view_0_0_100_0_0_initstate_0_noise_1",
    ),
}


def test_names_of_libero_plus():
    for base, changes in NAMES.items():
        plain = make_task(Path("p"), "libero_goal", base)
        for change in changes:
            task = make_task(Path("p"), "libero_goal", f"{base}_{change}", "layout")
            assert task.instruction == plain.instruction, change
            own = re.search("add|level", change)  # states of its own, else the base task's
            assert task.states == (
                f"p/init_files/libero_newobj/libero_goal/{base}_{change}.pruned_init"
                if own
                else plain.states
            )


@needs_libero
def test_all_names_of_libero_plus():
    """The instruction of each of the 10,030 tasks but the language variants is its base task's."""
    if not os.environ.get("SRPO_SHARED"):
        pytest.skip("SRPO_SHARED is not set: no list of LIBERO-Plus's tasks to read")
    file = Path(os.environ["SRPO_SHARED"]) / "libero_plus/task_classification.json"
    bases = {t.name: t.instruction for suite in libero_files.SUITES for t in tasks(suite)}
    count = 0
    for suite, rows in json.loads(file.read_text()).items():
        for name in (row["name"] for row in rows if row["category"] != "Language Instructions"):
            base = max((b for b in bases if name.startswith(b + "_")), key=len)
            assert make_task(Path("p"), suite, name, "camera").instruction == bases[base], name
            count += 1
    assert count == 10_030 - 1537


def test_every_task_of_the_package_is_there():
    """As its own classification has them: dimension, order, instruction, states, and for all but
    the changes that are made from the name a file."""
    if not libero_files.find_plus():
        pytest.skip("LIBERO-Plus is not installed (bash setup.sh --libero-plus)")
    found = {d: tasks(f"libero_plus:{d}") for d in libero_files.DIMENSIONS}
    assert {d: len(each) for d, each in found.items()} == dict(
        camera=1599, robot=1550, language=1537, light=1142, background=1076, noise=1601, layout=1525
    )
    bases = {t.name: t.instruction for suite in libero_files.SUITES for t in tasks(suite)}
    for dimension, each in found.items():
        for task in each if dimension != "language" else ():
            base = max((b for b in bases if task.name.startswith(b + "_")), key=len)
            assert task.instruction == bases[base], task.name
        assert all(task.instruction and Path(task.states).is_file() for task in each)
        whole = dimension in ("light", "background", "layout")
        assert all(Path(task.bddl).is_file() == whole for task in each)
    if shared := os.environ.get("SRPO_SHARED"):
        file = Path(shared) / "libero_plus/task_classification.json"
        classified = json.loads(file.read_text())
        categories = {
            "camera": "Camera Viewpoints",
            "robot": "Robot Initial States",
            "language": "Language Instructions",
            "light": "Light Conditions",
            "background": "Background Textures",
            "noise": "Sensor Noise",
            "layout": "Objects Layout",
        }
        for dimension, category in categories.items():
            assert [task.name for task in found[dimension]] == [
                row["name"]
                for suite in libero_files.SUITES
                for row in classified[suite]
                if row["category"].lower() == category.lower()
            ]


def test_numpy_for_libero_plus():
    """Its fog asks for float_, its motion blur for a binary fromstring, and both for much else."""
    old = libero_files.OLDER_NUMPY
    read = old.fromstring(b"\x01\x02", old.uint8)
    read[0] = 7  # a copy, as it was
    assert (
        read.tolist() == [7, 2]
        and old.empty(2, dtype=old.float_).dtype == np.float64
        and old.random is np.random
    )


@needs_libero
def test_one_line_without_assets(tmp_path, monkeypatch, installed):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setitem(
        sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=offline)
    )
    with pytest.raises(RuntimeError) as caught:
        find_assets(installed)
    said = str(caught.value)
    assert said.startswith(f"LIBERO's assets in {tmp_path}") and "\n" not in said
    assert "hub (ConnectionError); run: bash setup.sh --libero" in said


@needs_assets
def test_one_line_without_opengl(tmp_path):
    if ctypes.util.find_library("OSMesa"):
        pytest.skip("libosmesa6 is installed: nothing is missing")
    done = run_bare(
        "robots.libero_expert",
        "measure",
        "--out",
        str(tmp_path / "e.json"),
        LIBERO_ASSETS=os.environ["LIBERO_ASSETS"],
        XDG_CACHE_HOME=str(tmp_path),
        MUJOCO_GL="osmesa",
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (
        done.stderr.startswith("error: importing LIBERO failed")
        and "run: apt-get install -y --no-install-recommends libosmesa6" in done.stderr
    )


@needs_assets
def test_tasks_and_states_are_the_official_ones():
    prepare()
    from libero.libero import benchmark

    for suite in (*libero_files.SUITES, "libero_90"):
        official = benchmark.get_benchmark(suite)()
        assert [(t.name, t.instruction) for t in tasks(suite)] == [
            (t.name, t.language) for t in official.tasks
        ]
        assert [t.bddl for t in tasks(suite)] == [
            official.get_task_bddl_file_path(i) for i in range(len(official.tasks))
        ]
        np.testing.assert_array_equal(
            initial_states(tasks(suite)[3].states), official.get_task_init_states(3)
        )
