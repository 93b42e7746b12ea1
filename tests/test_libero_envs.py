"""libero_envs.py against the stock LIBERO environment, and, where LIBERO or its assets are absent, against stand-in files."""
import ctypes.util
import importlib.metadata
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import libero_envs
from libero_envs import (NO_OP, SETTLE, SPLITS, Libero, find_assets, find_package, initial_states, main, make_suite, prepare, tasks,
                         thin_meshes, write_config)
from libero_expert import Expert
from rollouts import Start

ROOT = Path(libero_envs.__file__).parent
INSTALLED = all(importlib.util.find_spec(name) for name in ("libero", "robosuite", "bddl"))
needs_libero = pytest.mark.skipif(not INSTALLED, reason="LIBERO is not installed (pip install --no-deps -r requirements-libero.txt)")
needs_assets = pytest.mark.skipif(not INSTALLED or not os.environ.get("LIBERO_ASSETS"),
                                  reason="LIBERO_ASSETS is not set, or LIBERO is not installed: nothing to simulate")


def package(folder: Path, plus: bool = False) -> Path:
    """A stand-in for an installed LIBERO (or a copy of LIBERO-Plus) in `folder`: the files that are read before anything is simulated."""
    root = folder / "libero/libero"
    for name in ("benchmark", "bddl_files/libero_spatial", "init_files/libero_spatial"):
        (root / name).mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "benchmark/libero_suite_task_map.py").write_text("libero_task_map = " + repr(
        {"libero_spatial": ["pick_up_the_bowl", "pick_up_the_plate"], "libero_10": ["KITCHEN_SCENE10_turn_on_the_stove"]}))
    if plus:
        base = "KITCHEN_SCENE3_turn_on_the_stove"
        rows = {"libero_spatial": [("pick_up_the_bowl_view_0_10_100_-5_0_initstate_3", "Camera Viewpoints"),
                                   ("pick_up_the_bowl_light_12", "Light Conditions"), ("pick_up_the_bowl_tb_4", "Background Textures"),
                                   ("pick_up_the_bowl_add_13", "Objects Layout"), ("pick_up_the_bowl_level2_sample0", "Objects Layout"),
                                   ("pick_up_the_bowl_language_7", "Language Instructions")],
                "libero_10": [(f"{base}_view_0_0_100_0_0_initstate_0_noise_6", "Sensor Noise"), (f"{base}_table_2", "background textures")]}
        listed = {suite: [{"id": i, "name": name, "category": category} for i, (name, category) in enumerate(each, 1)]
                  for suite, each in rows.items()}
        (root / "benchmark/task_classification.json").write_text(json.dumps(listed))
        (root / "bddl_files/libero_spatial/pick_up_the_bowl_language_7.bddl").write_text(
            "(define (problem x)\n  (:language Grab  the dark\n bowl)\n)")
    return root


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in LIBERO, the only one on the path."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("LIBERO_PLUS_PATH", raising=False)
    tasks.cache_clear()
    yield package(tmp_path)
    tasks.cache_clear()


# Without LIBERO: files and errors

def test_splits_never_overlap():
    train, heldout = set(SPLITS["train"]), set(SPLITS["heldout"])
    assert not train & heldout and train | heldout == set(SPLITS["all"]) == set(range(50)) and len(train) == 25
    assert "papers' own protocol" in libero_envs.SPLIT_NAMES["all"]


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
    for name in libero_envs.ASSET_FOLDERS:
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
    for name in libero_envs.ASSET_FOLDERS:
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
    found = {d: tasks(f"libero_plus:{d}", str(tmp_path / "plus")) for d in libero_envs.DIMENSIONS}
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
    env = Libero("libero_plus:light", split="heldout", plus=str(tmp_path / "plus"))
    assert list(env.states_of("heldout")) == [0]                                    # one trial per task


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
    old = libero_envs.older_numpy()
    read = old.fromstring(b"\x01\x02", old.uint8)
    read[0] = 7                                                                     # a copy, as it was
    assert read.tolist() == [7, 2] and old.empty(2, dtype=old.float_).dtype == np.float64 and old.random is np.random


@pytest.mark.parametrize("arguments, message", [
    ({"suite": "libero_objects"}, "unknown suite 'libero_objects'; there are libero_spatial.*camera"),
    ({"suite": "libero_plus:colour"}, "unknown suite 'libero_plus:colour'"),
    ({"suite": "libero_plus:camera:libero_9"}, "unknown suite .*libero_plus:DIMENSION:SUITE"),
    ({"suite": "libero_plus"}, "unknown suite 'libero_plus'"),
    ({"task": 2}, "unknown task 2; libero_spatial has 0..1: pick up the bowl; pick up the plate"),
    ({"task": "fly"}, "unknown task 'fly'"),
    ({"split": "test"}, "split='test': use 'train', 'heldout', 'all'"),
    ({"protocol": "lerobot"}, "protocol='lerobot': use 'openvla-oft' or 'simplevla'"),
    ({"size": 4}, "size=4")])
def test_bad_settings(installed, arguments, message):
    with pytest.raises(ValueError, match=message):
        Libero(**{"suite": "libero_spatial"} | arguments)


def test_bad_reset(installed):
    env = Libero("libero_spatial")
    with pytest.raises(ValueError, match="index=25: the train initial states are numbered 0..24"):
        env.reset(options={"task": 0, "index": 25})
    with pytest.raises(ValueError, match="unknown task -1"):
        env.reset(options={"task": -1})
    with pytest.raises(RuntimeError, match="pick_up_the_bowl.pruned_init holds no initial states"):
        env.reset(options={"task": "pick up the bowl", "index": 49, "split": "all"})


def run(file: str, *command, **environment) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("LIBERO_ASSETS", "LIBERO_CONFIG_PATH", "LIBERO_PLUS_PATH")}
    return subprocess.run([sys.executable, ROOT / file, *command], env=kept | environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=120)


def test_suites_for_the_scripts(tmp_path, installed):
    suite = make_suite("libero_spatial", (1,), protocol="simplevla")
    assert suite.tasks == (1,) and suite.instructions == ("pick up the bowl", "pick up the plate") and suite.by_task
    assert suite.states == {"train": 25, "heldout": 25, "all": 50} and "horizon 512 (simplevla), 10 settling" in suite.protocol
    assert [s.index for s in suite.starts("heldout", 3)] == [0, 1, 2] and len(suite.starts("all")) == 50 and suite.labels == ()
    made = pickle.loads(pickle.dumps(suite.make))(size=32, horizon=suite.horizon)         # as the workers get it
    assert (made.suite, made.size, made.protocol, made.fixed_horizon) == ("libero_spatial", 32, "simplevla", None)
    assert "horizon 99, 10" in make_suite("libero_spatial", horizon=99).protocol
    package(tmp_path / "plus", plus=True)
    plus = make_suite("libero_plus:background", plus=str(tmp_path / "plus"))
    assert plus.states["all"] == 1 and plus.labels == ("libero_spatial", "libero_10")
    assert plus.instructions == ("pick up the bowl", "turn on the stove") and plus.protocol.startswith("horizon 520")
    with pytest.raises(ValueError, match="unknown task 7"):
        make_suite("libero_spatial", (0, 7))
    with pytest.raises(ValueError, match="libero_plus:camera:libero_10 has no tasks in this copy"):
        make_suite("libero_plus:camera:libero_10", plus=str(tmp_path / "plus"))


@needs_libero
def test_one_line_without_assets(tmp_path):
    if (find_package() / "assets").is_dir():
        pytest.skip("this LIBERO has its assets inside")
    done = run("libero_envs.py", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: LIBERO's assets cannot be had from the hub") and done.stderr.count("\n") == 1
    assert "LIBERO_ASSETS or --assets" in done.stderr


def test_bad_flags(installed, capsys):
    for command, message in (("--steps 0", "must be 1 or more"), ("--suite libero_x", "unknown suite 'libero_x'"),
                             ("--tsak 1", "unrecognized arguments: --tsak"), ("--size x", "invalid int value: 'x'"),
                             ("--suite libero_spatial --task 9", "unknown task 9; libero_spatial has 0..1")):
        assert main(command.split()) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and message in said


# Without LIBERO: functions

def test_thin_meshes_keeps_the_shape_and_the_collisions():
    """A finely tessellated sheet, once seen and once solid: the seen one loses triangles, no vertex moves further than its cell is wide."""
    mujoco = pytest.importorskip("mujoco")
    grid = np.stack([*np.meshgrid(*[np.arange(21) * 0.002] * 2, indexing="ij"), np.zeros((21, 21))], -1).reshape(-1, 3)
    grid[:, 2] = 0.01 * np.sin(100 * grid[:, 0])
    corner = (np.arange(20)[:, None] * 21 + np.arange(20)).reshape(-1, 1)
    faces = np.concatenate([corner + [0, 21, 1], corner + [21, 22, 1]])
    text = f'vertex="{" ".join(map(str, grid.ravel()))}" face="{" ".join(map(str, faces.ravel()))}" inertia="shell"'
    model = mujoco.MjModel.from_xml_string(f"""<mujoco><asset><mesh name="seen" {text}/><mesh name="solid" {text}/></asset><worldbody>
        <geom type="mesh" mesh="seen" contype="0" conaffinity="0"/><geom type="mesh" mesh="solid"/></worldbody></mujoco>""")
    before, vertices = model.mesh_face.copy(), model.mesh_vert.copy()
    thin_meshes(model, 0.005)
    seen, solid = (slice(a, a + n) for a, n in zip(model.mesh_faceadr, model.mesh_facenum))
    np.testing.assert_array_equal(model.mesh_face[solid], before[solid])
    np.testing.assert_array_equal(model.mesh_vert, vertices)
    after = model.mesh_face[seen]
    assert 60 < len(after) < len(before) / 2 / 4 and len(set(map(tuple, np.sort(after, 1)))) == len(after)
    assert all(len(set(face)) == 3 for face in after.tolist())
    used = vertices[np.unique(after)]
    assert np.linalg.norm(vertices[:len(grid), None] - used[None], axis=-1).min(1).max() < 0.005 * np.sqrt(3)


# With LIBERO and its assets

@pytest.fixture(scope="module")
def env():
    env = Libero("libero_object", size=64)
    yield env
    env.close()


def play(env: Libero, actions, **start) -> tuple[np.ndarray, np.ndarray]:
    """Images before and after the actions, and the whole trajectory of qpos and qvel."""
    images, states = [env.reset(options=start)[0]["image"]], []
    for action in actions:
        env.advance(action)
        states.append(np.concatenate([env.data.qpos, env.data.qvel]))
    return np.array([*images, env.render()]), np.array(states)


def expert_actions(env: Libero, **start) -> np.ndarray:
    env.reset(options=start | {"image": False})
    expert, actions, ended = Expert(env), [], False
    while not ended:
        actions.append(expert())
        ended = env.advance(actions[-1])
    assert env.success and expert.attempt == 0, start
    return np.array(actions)


@needs_assets
def test_gymnasiums_checker():
    env = Libero("libero_object", task=0, size=16, fast=True)
    check_env(env, skip_render_check=True)
    env.close()


@needs_assets
def test_tasks_and_states_are_the_official_ones(env):
    env.reset(options={"task": 0, "index": 0, "image": False})
    from libero.libero import benchmark
    for suite in (*libero_envs.SUITES, "libero_90"):
        official = benchmark.get_benchmark(suite)()
        assert [(t.name, t.instruction) for t in tasks(suite)] == [(t.name, t.language) for t in official.tasks]
        assert [t.bddl for t in tasks(suite)] == [official.get_task_bddl_file_path(i) for i in range(len(official.tasks))]
        np.testing.assert_array_equal(initial_states(tasks(suite)[3].states), official.get_task_init_states(3))


@needs_assets
@pytest.mark.parametrize("suite, task", [("libero_object", 3), ("libero_spatial", 2)])
def test_expert_and_exactness(suite, task):
    """The expert solves the task; the stock environment, given its actions, goes through the same states to the last bit and shows the same
    images where both look; so does a second episode after others, in the same simulator and in one built anew."""
    env, start = Libero(suite, size=64, split="heldout"), {"task": task, "index": 7}
    actions = expert_actions(env, **start)
    images, states = play(env, actions, **start)
    assert env.success and env.state == 15 and "held-out" in env._info()["protocol"]
    envs = sys.modules[prepare().__module__]
    stock = envs.ControlEnv(env.tasks[task].bddl, use_camera_obs=False, has_offscreen_renderer=False)
    stock.seed(15)
    stock.reset()
    stock.set_init_state(initial_states(env.tasks[task].states)[15])
    for _ in range(SETTLE):
        stock.step(NO_OP)
    for i, action in enumerate(actions):
        _, reward, done, _ = stock.step(action)
        np.testing.assert_array_equal(np.concatenate([stock.sim.data.qpos, stock.sim.data.qvel]), states[i])
        assert done == (i == len(actions) - 1) == bool(reward)
    stock.close()

    stock = envs.OffScreenRenderEnv(bddl_file_name=env.tasks[task].bddl, camera_names=["agentview"], camera_heights=64, camera_widths=64)
    stock.seed(15)
    stock.reset()
    stock.set_init_state(initial_states(env.tasks[task].states)[15])
    for _ in range(SETTLE):
        observation = stock.step(NO_OP)[0]
    env.reset(options=start)
    for action in actions[:4]:
        np.testing.assert_array_equal(env.render(), observation["agentview_image"][::-1, ::-1])
        observation = stock.step(action)[0]
        env.advance(action)
    stock.close()

    env.reset(options={"task": 1, "index": 3})                                      # another task, and back
    soft, hard = play(env, actions[:30], **start), play(env, actions[:30], **start, hard=True)
    for again in (soft, hard):
        np.testing.assert_array_equal(again[1], states[:30])
        np.testing.assert_array_equal(again[0], soft[0])
    np.testing.assert_array_equal(soft[0][0], images[0])
    assert images.std(0).max() > 20 and np.abs(states[-1] - states[0]).max() > 0.1     # something did move
    env.close()


@needs_assets
@pytest.mark.parametrize("suite, task", [("libero_spatial", 4), ("libero_10", 9)])
def test_images_of_opened_fixtures(suite, task):
    """Where the task begins with something open, the stock environment's first reset draws more numbers before it places the fixtures."""
    env = Libero(suite, task, size=64)
    image = env.reset(options={"index": 3})[0]["image"]
    stock = sys.modules[prepare().__module__].OffScreenRenderEnv(bddl_file_name=env.tasks[task].bddl, camera_names=["agentview"], camera_heights=64,
                                                                camera_widths=64)
    stock.seed(env.state)
    stock.reset()
    stock.set_init_state(initial_states(env.tasks[task].states)[env.state])
    for _ in range(SETTLE):
        observation = stock.step(NO_OP)[0]
    np.testing.assert_array_equal(image, observation["agentview_image"][::-1, ::-1])
    stock.close()
    env.close()


@needs_assets
def test_a_killed_worker_is_replaced():
    suite, starts, chunk = make_suite("libero_object", (2,), fast=True), [Start(2, 4), Start(2, 9)], np.random.default_rng(2).uniform(-1, 1, (3, 8, 7))
    workers, images = suite.workers(2, 32), []
    try:
        for kill in (False, True):
            workers.reset(dict(enumerate(starts)))
            for step in range(3):
                if kill and step == 2:
                    workers.envs[1].processes[0].kill()
                images.append({t: image for t, (image, *_) in workers.step(dict.fromkeys(range(2), chunk[step])).items()})
        assert workers.replaced == 1
        for a, b in zip(images[:3], images[3:]):
            assert all(np.array_equal(a[t], b[t]) for t in range(2)) and not np.array_equal(a[0], a[1])
    finally:
        workers.close()


@needs_assets
def test_noise_of_libero_plus_repeats(env, monkeypatch):
    """Its wrapper's step spoils the image by numpy's global generator; the same moment is spoilt the same way, and nothing else is moved by it."""
    class Noisy:
        noise = 31

        def step(self, action):
            observation, *rest = self.env.step(action)
            return {"agentview_image": observation["agentview_image"] + np.random.randint(0, 9, (64, 64, 3))}, *rest

        def close(self):
            pass
    clean = env.reset(options={"task": 1, "index": 2})[0]["image"]
    own = env.wrapper
    monkeypatch.setattr(env, "wrapper", Noisy())
    np.random.seed(5)
    first, after = env.render(), np.random.random()
    np.random.seed(6)
    np.testing.assert_array_equal(env.render(), first)
    np.random.seed(5)
    assert after == np.random.random() and not np.array_equal(first, clean)
    env.advance(NO_OP)
    assert not np.array_equal(env.render() - clean, first - clean)
    env.wrapper = own


@needs_assets
def test_fast_changes_pixels_only(env):
    fast, start = Libero("libero_object", size=64, fast=True), {"task": 4, "index": 2}
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 7))
    (images, states), (quick, same) = play(env, actions, **start), play(fast, actions, **start)
    np.testing.assert_array_equal(states, same)
    assert fast.model.mesh_facenum.sum() < env.model.mesh_facenum.sum() / 2
    assert 0.1 < np.abs(images.astype(int) - quick).mean() < 6
    fast.close()


@needs_assets
def test_episodes_end_and_bad_actions(env):
    brief = Libero("libero_object", size=16, horizon=2, split="all")
    _, info = brief.reset(options={"task": 3, "index": 49})
    assert (info["state"], info["instruction"], info["success"]) == (49, tasks("libero_object")[3].instruction, False)
    assert "papers' own protocol" in info["protocol"] and "horizon 2" in info["protocol"]
    for bad in (np.zeros(6), np.zeros((1, 7)), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="action must be 7 finite numbers, got shape"):
            brief.step(bad)
    assert [brief.step(NO_OP)[2:4] for _ in range(2)] == [(False, False), (False, True)]
    brief.close()
    assert [Libero(s, protocol=p).reset(options={"task": 0, "index": 0, "image": False})[1]["protocol"].split("horizon ")[1][:3]
            for s, p in (("libero_object", "openvla-oft"), ("libero_object", "simplevla"))] == ["280", "512"]


@needs_assets
def test_workers_equal_a_single_process():
    actions = np.random.default_rng(1).uniform(-1, 1, (3, 2, 7)).astype(np.float32)
    script = sys.modules["__main__"]
    file, script.__file__ = getattr(script, "__file__", None), None                 # workers need not import pytest's script
    makers = [partial(Libero, "libero_object", task, size=32, fast=True) for task in (2, 5)]
    workers = gymnasium.vector.AsyncVectorEnv(makers, context="forkserver")
    script.__file__ = file
    try:
        observations, _ = workers.reset(options={"index": 11})
        theirs = [observations["image"].copy(), *(workers.step(each)[0]["image"].copy() for each in actions)]
    finally:
        workers.close()
    env = Libero("libero_object", size=32, fast=True)
    for k, task in enumerate((2, 5)):
        observation, _ = env.reset(options={"task": task, "index": 11})
        for i, image in enumerate(theirs):
            np.testing.assert_array_equal(image[k], observation["image"])
            if i < len(actions):
                observation = env.step(actions[i, k])[0]
    env.close()


@needs_assets
def test_one_line_without_opengl(tmp_path):
    if ctypes.util.find_library("OSMesa"):
        pytest.skip("libosmesa6 is installed: nothing is missing")
    done = run("libero_expert.py", "measure", "--out", str(tmp_path / "e.json"), LIBERO_ASSETS=os.environ["LIBERO_ASSETS"], XDG_CACHE_HOME=str(tmp_path),
               MUJOCO_GL="osmesa")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: importing LIBERO failed") and "run: apt-get install -y --no-install-recommends libosmesa6" in done.stderr


@needs_assets
def test_incomplete_assets_name_the_file(tmp_path):
    """Every folder is there and one mesh is not."""
    whole = Path(os.environ["LIBERO_ASSETS"])
    for name in whole.iterdir():
        (tmp_path / name.name).symlink_to(name.resolve())
    (tmp_path / "stable_hope_objects").unlink()
    (tmp_path / "stable_hope_objects").mkdir()
    command = ["measure", "--tasks", "0", "--states", "1", "--out", str(tmp_path / "e.json")]
    done = run("libero_expert.py", *command, LIBERO_ASSETS=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: LIBERO cannot build"), done.stderr
    assert "stable_hope_objects" in done.stderr and "--assets" in done.stderr and not (tmp_path / "e.json").exists()
    for file in (whole / "stable_hope_objects").rglob("*"):
        if file.suffix == ".xml":                                                   # as git-lfs leaves it where it is not installed
            (tmp_path / "stable_hope_objects" / file.parent.name).mkdir(exist_ok=True)
            (tmp_path / "stable_hope_objects" / file.parent.name / file.name).write_text("version https://git-lfs.github.com/spec/v1\n")
    done = run("libero_expert.py", *command, LIBERO_ASSETS=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: LIBERO cannot build"), done.stderr
