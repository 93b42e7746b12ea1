"""robots/libero_files.py against LIBERO's own lists, and, where LIBERO or its assets are absent, against stand-in files."""
import ctypes.util
import importlib.metadata
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from robots import libero_files
from tests.conftest import needs_assets, needs_libero, package, run_bare
from robots.libero_files import find_assets, find_package, initial_states, prepare, tasks, write_config

ROOT = Path(__file__).parents[2]


def test_config_is_written_once_and_asks_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")
    folder = write_config(tmp_path / "pack age", tmp_path / "assets")
    lines = dict(line.split(": ", 1) for line in (folder / "config.yaml").read_text().splitlines())
    assert {key: json.loads(value) for key, value in lines.items()} == {
        "benchmark_root": f"{tmp_path}/pack age", "bddl_files": f"{tmp_path}/pack age/bddl_files",
        "init_states": f"{tmp_path}/pack age/init_files", "datasets": f"{tmp_path}/datasets", "assets": f"{tmp_path}/assets"}
    assert folder.is_relative_to(tmp_path / "cache") and os.environ["LIBERO_CONFIG_PATH"] == str(folder)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")
    assert write_config(tmp_path / "other", tmp_path / "assets") != folder          # another package, another config
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.yaml").write_text("the user's")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "own"))
    assert write_config(tmp_path, tmp_path) == tmp_path / "own" and (tmp_path / "own/config.yaml").read_text() == "the user's"


def test_which_package(tmp_path, monkeypatch, installed):
    assert find_package() == installed
    package(tmp_path / "b")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "b"), str(tmp_path)])
    with pytest.raises(RuntimeError, match=f"two LIBERO packages.*{tmp_path} and {tmp_path}/b.*pip uninstall"):
        find_package()
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RuntimeError, match="not installed; run: pip install --no-deps -r requirements-libero.txt"):
        find_package()
    plus = package(tmp_path / "plus", plus=True)
    assert find_package(str(tmp_path / "plus")) == find_package(str(plus)) == plus
    with pytest.raises(RuntimeError, match=f"{tmp_path}/b holds no LIBERO-Plus.*LIBERO_PLUS_PATH"):
        find_package(str(tmp_path / "b"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "plus")])
    with pytest.raises(RuntimeError, match="not installed, only LIBERO-Plus; run"):
        find_package()


def test_which_assets(tmp_path, monkeypatch, installed):
    for name in libero_files.ASSET_FOLDERS:
        (tmp_path / "whole" / name).mkdir(parents=True)
        (installed / "assets" / name).mkdir(parents=True)
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path))
    assert find_assets(installed, str(tmp_path / "whole")) == tmp_path / "whole"
    with pytest.raises(RuntimeError, match=f"{tmp_path} are not whole, articulated_objects/ is missing; set LIBERO_ASSETS or --assets"):
        find_assets(installed)
    monkeypatch.delenv("LIBERO_ASSETS")
    assert find_assets(installed) == installed / "assets"
    (installed / "assets/textures").rmdir()
    with pytest.raises(RuntimeError, match="not whole, textures/ is missing"):
        find_assets(installed)
    other = package(tmp_path / "other")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    (tmp_path / "home/.cache/libero").mkdir(parents=True)
    (tmp_path / "home/.cache/libero/assets").symlink_to(tmp_path / "whole")         # where hf-libero puts a download
    assert find_assets(other) == tmp_path / "whole"
    plus = package(tmp_path / "plus", plus=True)
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path / "whole"))
    assert find_assets(plus) == tmp_path / "whole"
    for name in libero_files.ASSET_FOLDERS:
        (plus / "assets" / name).mkdir(parents=True)
    assert find_assets(plus) == plus / "assets"                                     # LIBERO-Plus's own hold more than LIBERO's


@pytest.mark.parametrize("version", ["3.10.0", "4.0.1", "3.1.6"])
def test_wrong_mujoco(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=f"mujoco {version} is installed.*pip install mujoco==3.8.1"):
        prepare.__wrapped__()


def test_wrong_gl(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(RuntimeError, match="MUJOCO_GL=glfw.*egl or osmesa"):
        prepare.__wrapped__()


def test_initial_states_are_read_without_running_code(tmp_path):
    states, path = np.random.default_rng(0).standard_normal((50, 11)), tmp_path / "a.pruned_init"
    torch.save(states, path)                                                        # how LIBERO wrote them
    np.testing.assert_array_equal(initial_states(str(path)), states)
    torch.save(states[0], tmp_path / "one")
    assert initial_states(str(tmp_path / "one")).shape == (1, 11)
    for name, content in (("evil", pickle.dumps(os.getcwd)), ("torn", pickle.dumps(states)[:200])):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", content)
        with pytest.raises(RuntimeError, match=f"{name} holds no initial states.*requirements-libero.txt"):
            initial_states(str(tmp_path / name))
    with pytest.raises(RuntimeError, match="absent holds no initial states"):
        initial_states(str(tmp_path / "absent"))


def test_tasks_of_a_suite(installed):
    assert [t.instruction for t in tasks("libero_spatial")] == ["pick up the bowl", "pick up the plate"]
    assert tasks("libero_10")[0].instruction == "turn on the stove"
    assert tasks("libero_spatial")[0].bddl == f"{installed}/bddl_files/libero_spatial/pick_up_the_bowl.bddl"


def test_libero_plus(tmp_path, installed):
    package(tmp_path / "plus", plus=True)
    found = {d: tasks(f"libero_plus:{d}", str(tmp_path / "plus")) for d in libero_files.DIMENSIONS}
    assert {d: len(each) for d, each in found.items()} == {"camera": 1, "robot": 0, "language": 1, "light": 1, "background": 2, "noise": 1,
                                                           "layout": 2}
    assert {t.instruction for d in ("camera", "light", "layout") for t in found[d]} == {"pick up the bowl"}
    assert found["language"][0].instruction == "grab the dark bowl"
    assert [t.instruction for t in found["background"]] == ["pick up the bowl", "turn on the stove"]
    assert found["noise"][0].instruction == "turn on the stove" and found["noise"][0].suite == "libero_10"
    files = {t.states for d in ("camera", "light", "language") for t in found[d]}
    assert files == {f"{tmp_path}/plus/libero/libero/init_files/libero_spatial/pick_up_the_bowl.pruned_init"}
    assert found["layout"][0].states.endswith("init_files/libero_newobj/libero_spatial/pick_up_the_bowl_add_13.pruned_init")
    one = {d: tasks(f"libero_plus:{d}:libero_10", str(tmp_path / "plus")) for d in ("background", "camera")}
    assert [t.suite for t in one["background"]] == ["libero_10"] and one["camera"] == ()


def test_libero_plus_missing_or_broken(tmp_path, installed):
    with pytest.raises(RuntimeError, match="LIBERO-Plus is not here; clone it.*--plus or LIBERO_PLUS_PATH"):
        tasks("libero_plus:camera")
    root = package(tmp_path / "plus", plus=True)
    (root / "bddl_files/libero_spatial/pick_up_the_bowl_language_7.bddl").unlink()
    with pytest.raises(RuntimeError, match="language_7.bddl has no"):
        tasks("libero_plus:language", str(tmp_path / "plus"))
    (root / "benchmark/task_classification.json").write_text("{")
    with pytest.raises(RuntimeError, match="task_classification.json is not LIBERO-Plus's list"):
        tasks("libero_plus:camera", str(tmp_path / "plus"))


def test_numpy_for_libero_plus():
    """Its fog asks for float_, its motion blur for a binary fromstring, and both for much that is still there."""
    old = libero_files.older_numpy()
    read = old.fromstring(b"\x01\x02", old.uint8)
    read[0] = 7                                                                     # a copy, as it was
    assert read.tolist() == [7, 2] and old.empty(2, dtype=old.float_).dtype == np.float64 and old.random is np.random


@needs_libero
def test_one_line_without_assets(tmp_path):
    if (find_package() / "assets").is_dir():
        pytest.skip("this LIBERO has its assets inside")
    done = run_bare("robots.libero", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: LIBERO's assets cannot be had from the hub") and done.stderr.count("\n") == 1
    assert "LIBERO_ASSETS or --assets" in done.stderr


@needs_assets
def test_one_line_without_opengl(tmp_path):
    if ctypes.util.find_library("OSMesa"):
        pytest.skip("libosmesa6 is installed: nothing is missing")
    done = run_bare("robots.libero_expert", "measure", "--out", str(tmp_path / "e.json"), LIBERO_ASSETS=os.environ["LIBERO_ASSETS"], XDG_CACHE_HOME=str(tmp_path),
               MUJOCO_GL="osmesa")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: importing LIBERO failed") and "run: apt-get install -y --no-install-recommends libosmesa6" in done.stderr


@needs_assets
def test_tasks_and_states_are_the_official_ones():
    prepare()
    from libero.libero import benchmark
    for suite in (*libero_files.SUITES, "libero_90"):
        official = benchmark.get_benchmark(suite)()
        assert [(t.name, t.instruction) for t in tasks(suite)] == [(t.name, t.language) for t in official.tasks]
        assert [t.bddl for t in tasks(suite)] == [official.get_task_bddl_file_path(i) for i in range(len(official.tasks))]
        np.testing.assert_array_equal(initial_states(tasks(suite)[3].states), official.get_task_init_states(3))
