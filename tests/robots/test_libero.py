"""robots/libero.py against the stock LIBERO environment; without LIBERO, on stand-in files."""

import importlib.metadata
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy.spatial.distance import cdist

import robots
from robots import libero
from robots.libero import NO_OP, SETTLE, SPLITS, Libero, suite, thin_meshes
from robots.libero_expert import Expert
from robots.libero_files import find_plus, initial_states, mujoco_note, prepare, tasks
from robots.rollouts import run_chunk
from robots.suite import Start, SuiteOptions
from studies import libero_speed
from tests.conftest import needs_assets, package, run_bare

# Without LIBERO


def test_splits_never_overlap():
    train, heldout = set(SPLITS["train"]), set(SPLITS["heldout"])
    assert not train & heldout and len(train) == 25
    assert train | heldout == set(SPLITS["all"]) == set(range(50))
    assert "papers' own protocol" in libero.SPLIT_NAMES["all"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"suite": "libero_objects"},
            "unknown suite 'libero_objects'; there are libero_spatial.*camera",
        ),
        ({"suite": "libero_plus:colour"}, "unknown suite 'libero_plus:colour'"),
        ({"suite": "libero_plus:camera:libero_9"}, "unknown suite .*libero_plus:DIMENSION:SUITE"),
        ({"suite": "libero_plus"}, "unknown suite 'libero_plus'"),
        (
            {"task": 2},
            "unknown task 2; libero_spatial has 0..1: pick up the bowl; pick up the plate",
        ),
        ({"task": "fly"}, "unknown task 'fly'"),
        ({"split": "test"}, "split='test': use 'train', 'heldout', 'all'"),
        ({"protocol": "lerobot"}, "protocol='lerobot': use 'openvla-oft' or 'simplevla'"),
        ({"size": 4}, "size=4"),
    ],
)
def test_bad_settings(installed, arguments, message):
    with pytest.raises(ValueError, match=message):
        Libero(**{"suite": "libero_spatial"} | arguments)


def test_bad_reset(installed):
    env = Libero("libero_spatial")
    with pytest.raises(ValueError, match="index=25: the train initial states are numbered 0..24"):
        env.reset(options={"task": 0, "index": 25})
    with pytest.raises(ValueError, match="unknown task -1"):
        env.reset(options={"task": -1})
    with pytest.raises(ValueError, match="pick_up_the_bowl.pruned_init holds no initial states"):
        env.reset(options={"task": "pick up the bowl", "index": 49, "split": "all"})


def test_suites_for_the_scripts(tmp_path, installed):
    simplevla = SuiteOptions(protocol="simplevla")
    found = suite("libero_spatial", (1,), simplevla)
    assert found.tasks == (1,) and found.by_task and found.slow
    assert found.instructions == ("pick up the bowl", "pick up the plate")
    assert found.states == {"train": 25, "heldout": 25, "all": 50}
    assert found.split_names == libero.SPLIT_NAMES and found.evaluated == ("heldout",)
    assert "horizon 512 (simplevla), 10 settling" in found.protocol
    assert [s.index for s in found.starts("heldout", 3)] == [0, 1, 2]
    assert len(found.starts("all")) == 50 and found.labels == ()
    made = pickle.loads(pickle.dumps(found.make))(size=32, horizon=found.horizon)  # as workers do
    assert (made.suite, made.size) == ("libero_spatial", 32)
    assert made.options == SuiteOptions(protocol="simplevla", horizon=None)
    shorter = suite("libero_spatial", options=SuiteOptions(horizon=99))
    assert "horizon 99, 10" in shorter.protocol and shorter.horizon == 99
    assert robots.find_suite("libero_spatial", (1,), simplevla).tasks == (1,)
    with pytest.raises(ValueError, match="unknown task 7"):
        suite("libero_spatial", (0, 7))
    with pytest.raises(ValueError, match="--tasks 0 1 0: each once"):
        robots.find_suite("libero_spatial", (0, 1, 0))


def test_suites_of_libero_plus(tmp_path, capsys, installed):
    package(tmp_path / "plus", plus=True)
    options = SuiteOptions(plus=str(tmp_path / "plus"))
    with pytest.raises(ValueError, match="light: 1 of 1 .* own assets; put .*libero/libero/assets"):
        suite("libero_plus:light", options=options)
    layout = suite("libero_plus:layout", options=options)
    assert "1 of 2 tasks need LIBERO-Plus's own assets, and are left" in capsys.readouterr().err
    assert [layout.instructions[task] for task in layout.tasks] == ["pick up the bowl"]
    with pytest.raises(ValueError, match="layout: 1 of 1 tasks need"):
        suite("libero_plus:layout", (1 - layout.tasks[0],), options)
    (tmp_path / "plus/libero/libero/assets/new_objects").mkdir(parents=True)
    plus = suite("libero_plus:background", options=options)
    assert plus.states == {"all": 1} and plus.labels == ("libero_spatial", "libero_10")
    assert plus.evaluated == ("all",) and "one trial per task" in plus.split_names["all"]
    assert plus.instructions == ("pick up the bowl", "turn on the stove")
    assert plus.protocol.startswith("horizon 520")
    with pytest.raises(ValueError, match="--split train: libero_plus:background has all"):
        plus.starts("train")  # it is for evaluation
    light = Libero("libero_plus:light", split="heldout", plus=str(tmp_path / "plus"))
    assert list(light.states_of("heldout")) == [0]  # one trial per task
    with pytest.raises(ValueError, match="libero_plus:camera:libero_10 has no tasks in this copy"):
        suite("libero_plus:camera:libero_10", options=options)


def test_the_protocol_names_mujoco(installed, monkeypatch):
    """It is in what is printed and in what an evaluation's journal is begun with."""
    for version in ("3.3.2", "3.8.1"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, v=version: v)
        words = suite("libero_spatial").protocol
        assert words.endswith(f"10 settling steps, {mujoco_note() or 'MuJoCo 3.3.2'}")
        assert version in words and ("expect 3.3.2" in words) == (version != "3.3.2")


def test_bad_flags(installed, capsys):
    for command, message in (
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--suite libero_x", "unknown suite 'libero_x'"),
        ("--tsak 1", "unrecognized arguments: --tsak"),
        ("--size x", "invalid int value: 'x'"),
        ("--suite libero_spatial --task 9", "unknown task 9; libero_spatial has 0..1"),
    ):
        assert libero_speed.main(command.split()) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_no_torch_in_a_worker():
    """What a simulator's process imports: torch alone would be half a gigabyte in each."""
    code = "import sys, robots.libero; print('torch' in sys.modules, 'mujoco' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


# Without LIBERO: functions


def test_thin_meshes_keeps_the_shape_and_the_collisions():
    """A finely tessellated sheet, once seen and once solid: the seen one loses triangles, no vertex
    moves further than its cell is wide."""
    mujoco = pytest.importorskip("mujoco")
    flat = np.meshgrid(*[np.arange(21) * 0.002] * 2, indexing="ij")
    grid = np.stack([*flat, np.zeros((21, 21))], -1).reshape(-1, 3)
    grid[:, 2] = 0.01 * np.sin(100 * grid[:, 0])
    corner = (np.arange(20)[:, None] * 21 + np.arange(20)).reshape(-1, 1)
    faces = np.concatenate([corner + [0, 21, 1], corner + [21, 22, 1]])
    at, of = (" ".join(map(str, array.ravel())) for array in (grid, faces))
    text = f'vertex="{at}" face="{of}" inertia="shell"'
    model = mujoco.MjModel.from_xml_string(f"""<mujoco>
        <asset><mesh name="seen" {text}/><mesh name="solid" {text}/></asset>
        <worldbody><geom type="mesh" mesh="seen" contype="0" conaffinity="0"/>
        <geom type="mesh" mesh="solid"/></worldbody></mujoco>""")
    before, vertices = model.mesh_face.copy(), model.mesh_vert.copy()
    thin_meshes(model, 0.005)
    seen, solid = (slice(a, a + n) for a, n in zip(model.mesh_faceadr, model.mesh_facenum))
    np.testing.assert_array_equal(model.mesh_face[solid], before[solid])
    np.testing.assert_array_equal(model.mesh_vert, vertices)
    after = model.mesh_face[seen]
    assert 60 < len(after) < len(before) / 2 / 4
    assert len(set(map(tuple, np.sort(after, 1)))) == len(after)
    assert all(len(set(face)) == 3 for face in after.tolist())
    apart = cdist(vertices[:len(grid)], vertices[np.unique(after)])
    assert apart.min(1).max() < 0.005 * np.sqrt(3)


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


@pytest.mark.slow
@needs_assets
def test_gymnasiums_checker():
    env = Libero("libero_object", task=0, size=16, fast=True)
    check_env(env, skip_render_check=True)
    env.close()


@pytest.mark.slow
@needs_assets
@pytest.mark.parametrize("name, task", [("libero_object", 3), ("libero_spatial", 2)])
def test_expert_and_exactness(name, task):
    """The expert solves the task; the stock environment, given its actions, goes through the same
    states to the last bit and shows the same images where both look; so does a second episode after
    others, in the same simulator and in one built anew."""
    env, start = Libero(name, size=64, split="heldout"), {"task": task, "index": 7}
    actions = expert_actions(env, **start)
    images, states = play(env, actions, **start)
    assert env.success and env.state == 15
    # With its renderer, which moves the solver's start, though it renders nothing here
    stock = prepare()(env.tasks[task].bddl, use_camera_obs=False, has_offscreen_renderer=True)
    stock.seed(15)
    stock.reset()
    stock.set_init_state(initial_states(env.tasks[task].states)[15])
    for _ in range(SETTLE):
        stock.step(NO_OP)
    for i, action in enumerate(actions):
        _, reward, done, _ = stock.step(action)
        np.testing.assert_array_equal(
            np.concatenate([stock.sim.data.qpos, stock.sim.data.qvel]), states[i]
        )
        assert done == (i == len(actions) - 1) == bool(reward)
    stock.close()

    env.reset(options=start)
    # Rendered for the world model, they move nothing
    between = run_chunk(env, actions[:8], every=1)[4]
    np.testing.assert_array_equal(np.concatenate([env.data.qpos, env.data.qvel]), states[7])

    env.reset(options=start)
    theirs = libero_speed.stock(env)
    shown, observation = [], theirs.observation
    for action in actions[:4]:
        shown.append(env.render())
        np.testing.assert_array_equal(shown[-1], observation["agentview_image"][::-1, ::-1])
        observation = theirs.step(action)[0]
        env.advance(action)
    np.testing.assert_array_equal(between[:3], shown[1:])
    theirs.close()

    env.reset(options={"task": 1, "index": 3})  # another task, and back
    soft, hard = play(env, actions[:30], **start), play(env, actions[:30], **start, hard=True)
    for again in (soft, hard):
        np.testing.assert_array_equal(again[1], states[:30])
        np.testing.assert_array_equal(again[0], soft[0])
    np.testing.assert_array_equal(soft[0][0], images[0])
    assert images.std(0).max() > 20 and np.abs(states[-1] - states[0]).max() > 0.1     # it did move
    env.close()


@pytest.mark.slow
@needs_assets
@pytest.mark.parametrize("name, task", [("libero_spatial", 4), ("libero_10", 9)])
def test_images_of_opened_fixtures(name, task):
    """Where the task begins with something open, the stock environment's first reset draws more
    numbers before it places the fixtures."""
    env = Libero(name, task, size=64)
    image = env.reset(options={"index": 3})[0]["image"]
    theirs = libero_speed.stock(env)
    np.testing.assert_array_equal(image, theirs.observation["agentview_image"][::-1, ::-1])
    theirs.close()
    env.close()


@pytest.mark.slow
@needs_assets
def test_a_killed_worker_is_replaced():
    starts = [Start(2, 4), Start(2, 9)]
    chunk = np.random.default_rng(2).uniform(-1, 1, (3, 8, 7))
    workers, images = suite("libero_object", (2,), SuiteOptions(fast=True)).workers(2, 32), []
    try:
        for kill in (False, True):
            workers.reset(dict(enumerate(starts)))
            for step in range(3):
                if kill and step == 2:
                    workers.processes[1].kill()
                replies = workers.step(dict.fromkeys(range(2), chunk[step]))
                images.append({t: image for t, (image, *_) in replies.items()})
        assert workers.replaced == 1
        for a, b in zip(images[:3], images[3:], strict=True):
            assert all(np.array_equal(a[t], b[t]) for t in range(2))
            assert not np.array_equal(a[0], a[1])
    finally:
        workers.close()


@pytest.mark.slow
@needs_assets
@pytest.mark.skipif(not find_plus(), reason="LIBERO-Plus is not installed (setup.sh --libero-plus)")
@pytest.mark.parametrize("dimension", ["camera", "robot", "language", "noise", "layout"])
def test_libero_plus_plays(dimension):
    """Three tasks of each dimension that LIBERO's own meshes suffice for."""
    played = suite(f"libero_plus:{dimension}")
    assert len(played.tasks) > 600
    plus = played.make(size=256)
    for task in np.random.default_rng(3).choice(played.tasks, 3, replace=False).tolist():
        before = plus.reset(options={"task": task, "index": 0})[0]["image"]
        for _ in range(8):
            plus.advance(np.array([0, 0, 1.0, 0, 0, 0, -1]))
        after = plus.render()
        assert before.shape == (256, 256, 3) and before.std() > 10
        assert not np.array_equal(before, after)
    plus.close()


@pytest.mark.slow
@needs_assets
def test_noise_of_libero_plus_repeats(env, monkeypatch):
    """Its wrapper's step spoils the image by numpy's global generator; the same moment is spoilt
    the same way, and nothing else is moved by it."""

    class Noisy:
        noise = 31

        def step(self, action):
            observation, *rest = self.env.step(action)
            drawn = np.random.randint(0, 9, (64, 64, 3))
            return {"agentview_image": observation["agentview_image"] + drawn}, *rest

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


@pytest.mark.slow
@needs_assets
def test_fast_changes_pixels_only(env):
    fast, start = Libero("libero_object", size=64, fast=True), {"task": 4, "index": 2}
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 7))
    (images, states), (quick, same) = play(env, actions, **start), play(fast, actions, **start)
    np.testing.assert_array_equal(states, same)
    assert fast.model.mesh_facenum.sum() < env.model.mesh_facenum.sum() / 2
    apart = np.abs(images.astype(int) - quick).mean()
    print(f"{apart:.2f} of 255 apart")
    assert 0.1 < apart < 6
    fast.close()


@pytest.mark.slow
@needs_assets
def test_episodes_end_and_bad_actions(env):
    brief = Libero("libero_object", size=16, horizon=2, split="all")
    _, info = brief.reset(options={"task": 3, "index": 49})
    assert info["state"] == 49 and not info["success"] and brief.horizon == 2
    assert info["instruction"] == tasks("libero_object")[3].instruction
    for bad in (np.zeros(6), np.zeros((1, 7)), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="action must be 7 finite numbers, got shape"):
            brief.step(bad)
    assert [brief.step(NO_OP)[2:4] for _ in range(2)] == [(False, False), (False, True)]
    brief.close()
    for protocol, horizon in (("openvla-oft", 280), ("simplevla", 512)):
        long = Libero("libero_object", protocol=protocol)
        long.reset(options={"task": 0, "index": 0, "image": False})
        assert long.horizon == horizon
        long.close()


@needs_assets
def test_states_of_another_task(env, monkeypatch):
    """Of the wrong width, or too few: one line that names the file."""
    monkeypatch.setattr(libero.files, "initial_states", lambda path: np.zeros((50, 79)))
    with pytest.raises(ValueError, match=r"soup.*pruned_init is not this task's.*\(50, 79\); run"):
        env.reset(options={"task": 0, "index": 0})
    width = 1 + env.model.nq + env.model.nv
    monkeypatch.setattr(libero.files, "initial_states", lambda path: np.zeros((3, width)))
    with pytest.raises(ValueError, match="pruned_init is not this task's"):
        env.reset(options={"task": 0, "index": 2})


@pytest.mark.slow
@needs_assets
def test_the_stored_physics_and_colours():
    """The bowl stays on the ramekin and the floor is light, as where the initial states were made;
    with another MuJoCo the suite says that they do not."""
    if mujoco_note():
        pytest.skip(mujoco_note())
    spatial = Libero("libero_spatial", task=5, split="all", size=64)
    spatial.reset(options={"index": 0, "image": False})
    bowl, ramekin = (spatial.data.body(f"{name}_1_main").xpos
                     for name in ("akita_black_bowl", "glazed_rim_porcelain_ramekin"))
    assert np.linalg.norm((bowl - ramekin)[:2]) < 0.02  # 1.45 cm; 3.72 in MuJoCo 3.8.1
    spatial.close()
    flat = Libero("libero_object", task=0, split="all", size=128)
    image = flat.reset(options={"index": 0})[0]["image"]
    assert 170 < image[96:].mean() < 182  # 176; 120 from 3.3.3 on
    flat.close()


@pytest.mark.slow
@needs_assets
def test_workers_equal_a_single_process():
    actions = np.random.default_rng(1).uniform(-1, 1, (3, 2, 7)).astype(np.float32)
    script = sys.modules["__main__"]
    # Workers need not import pytest's script
    file, script.__file__ = getattr(script, "__file__", None), None
    makers = [partial(Libero, "libero_object", task, size=32, fast=True) for task in (2, 5)]
    workers = gymnasium.vector.AsyncVectorEnv(makers, context="forkserver")
    script.__file__ = file
    try:
        observations, _ = workers.reset(options={"index": 11})
        theirs = [observations["image"].copy(),
                  *(workers.step(each)[0]["image"].copy() for each in actions)]
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
def test_incomplete_assets_name_the_file(tmp_path):
    """Every folder is there and one mesh is not."""
    whole = Path(os.environ["LIBERO_ASSETS"])
    for name in whole.iterdir():
        (tmp_path / name.name).symlink_to(name.resolve())
    (tmp_path / "stable_hope_objects").unlink()
    (tmp_path / "stable_hope_objects").mkdir()
    out = tmp_path / "e.json"

    def refused() -> str:
        done = run_bare("robots.libero_expert", "measure", "--tasks", "0", "--states", "1", "--out",
                        str(out), LIBERO_ASSETS=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: LIBERO cannot build") and not out.exists()
        return done.stderr
    said = refused()
    assert "stable_hope_objects" in said and "--assets" in said
    for file in (whole / "stable_hope_objects").rglob("*.xml"):
        copy = tmp_path / "stable_hope_objects" / file.parent.name / file.name
        copy.parent.mkdir(exist_ok=True)    # as git-lfs leaves it where it is not installed
        copy.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused()
