"""robots/tabletop.py against gymnasium's checker and hand-made scenes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy.spatial.distance import cdist

from robots import evaluate, find_suite, simulator
from robots import tabletop as envs
from robots.rollouts import run_chunk
from robots.suite import Start, SuiteOptions
from robots.tabletop import Expert, Tabletop

ROOT = Path(__file__).parents[2]
mujoco = simulator.load_mujoco()  # envs sets MUJOCO_GL before mujoco is imported
STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])  # stay where you are, gripper open


def physics(env) -> np.ndarray:
    """Everything the next step of physics depends on."""
    state = np.empty(mujoco.mj_stateSize(env.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(env.model, env.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    return np.concatenate([state, env.goal])


def at(start: Start, **settings) -> Tabletop:
    env = Tabletop(**settings)
    env.reset(options=vars(start))
    return env


def actions_of_expert(start: Start) -> np.ndarray:
    env, actions, ended = at(start), [], False
    expert = Expert(env)
    while not ended:
        actions.append(expert())
        ended = env.advance(actions[-1])
    assert env.success
    return np.array(actions)


# One table


@pytest.mark.filterwarnings("ignore:.*(different from the unwrapped|alternative render modes)")
def test_gymnasiums_checker():
    check_env(Tabletop())


def test_same_start_same_trajectory():
    """Bit for bit: on another table, on a used table, and with other tables stepped in between."""
    rng = np.random.default_rng(0)
    actions, start = rng.uniform(-1, 1, (30, 7)), Start(2, 17, "heldout")
    used, other, trajectories = at(Start(1, 3)), at(Start(0, 0)), []
    for action in rng.uniform(-1, 1, (11, 7)):
        used.advance(action)
    for env in (Tabletop(split="heldout"), used):
        images, states = [env.reset(options=vars(start))[0]["image"]], [physics(env)]
        for action in actions:
            images.append(env.step(action)[0]["image"])
            states.append(physics(env))
            other.advance(rng.uniform(-1, 1, 7))
        trajectories.append((np.array(images), np.array(states)))
    for a, b in zip(*trajectories):
        np.testing.assert_array_equal(a, b)
    images, states = trajectories[0]
    assert images.std(0).max() > 0 and len(np.unique(states, axis=0)) == 31  # something did move


def test_reset_draws_from_its_seed():
    drawn = [
        [
            tuple(Tabletop().reset(seed=seed)[1][key] for key in ("task", "index"))
            for seed in range(12)
        ]
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 6
    _, info = Tabletop().reset(options={"task": "put the blue cube on the green plate", "index": 3})
    assert info == {
        "task": 2,
        "instruction": "put the blue cube on the green plate",
        "index": 3,
        "split": "train",
        "success": False,
    }


def test_initial_states_are_disjoint():
    """Measured on the scene: objects lie within the jitter, and no two of a task's 100 initial
    states are alike."""
    env = Tabletop(size=16)
    for task, instruction in enumerate(envs.TASKS["tabletop"]):
        places = np.empty((2, 50, 4, 2))
        for k, split in enumerate(("train", "heldout")):
            for index in range(50):
                env.reset(options={"task": task, "index": index, "split": split})
                places[k, index] = [
                    env.data.body(name).xpos[:2] for name in ("red", "blue", "green", "yellow")
                ]
        jitter = places - np.array(
            [envs.LAYOUT[name] for name in ("red", "blue", "green", "yellow")]
        )
        assert (
            0.9 * envs.JITTER < np.abs(jitter).max() <= envs.JITTER + 1e-9
            and 0.02 <= envs.JITTER <= 0.03
        ), instruction
        apart = cdist(*[places.reshape(100, 8)] * 2)
        assert apart[~np.eye(100, dtype=bool)].min() > 1e-6
        overlap = cdist(places[..., :2, :].reshape(200, 2), places[..., 2:, :].reshape(200, 2))
        assert overlap.min() > envs.SUCCESS_RADIUS  # nothing is solved at the start


def test_expert_solves_every_task():
    env = Tabletop()
    for split in ("train", "heldout"):
        for task in range(len(envs.TASKS["tabletop"])):
            for index in (0, 11, 23, 37, 49):
                env.reset(options={"task": task, "index": index, "split": split})
                expert, ended, closed = Expert(env), False, 0
                while not ended:
                    action = expert()
                    ended = env.advance(action)
                    closed += action[6] > 0
                    assert not (env.success and action[6] > 0), (
                        "success while the gripper still holds the cube"
                    )
                assert env.success and env.steps < env.horizon and closed > 5, (split, task, index)


def place(
    env: Tabletop,
    offset,
    height: float = 0.028,
    cube: str = "",
    plate: str = "",
    fingers: float = envs.FINGER_OPEN,
) -> bool:
    """Put a cube by hand at an offset (metres) from a plate's centre; is the task solved?"""
    cube, plate = (given or own for given, own in zip((cube, plate), next(iter(env.pairs.items()))))
    env.data.joint(cube).qpos[:2] = env.data.body(plate).xpos[:2] + offset
    env.data.joint(cube).qpos[2] = height
    env.data.joint("left").qpos[0] = env.data.joint("right").qpos[0] = fingers
    mujoco.mj_forward(env.model, env.data)
    return env.solved()


@pytest.mark.parametrize("task", range(4))
def test_success_predicate(task):
    cube, plate = envs.TASKS["tabletop"][task].split()[2], envs.TASKS["tabletop"][task].split()[-2]
    other_cube, other_plate = (
        {"red": "blue", "blue": "red"}[cube],
        {"green": "yellow", "yellow": "green"}[plate],
    )

    def fresh():
        env = at(Start(task, 5))
        assert not env.solved()
        return env

    assert place(fresh(), (0, 0), cube=cube, plate=plate)
    assert place(
        fresh(), (0.6 * envs.SUCCESS_RADIUS, -0.6 * envs.SUCCESS_RADIUS), cube=cube, plate=plate
    )  # off centre
    for wrong in (
        dict(plate=other_plate),
        dict(cube=other_cube),
        dict(offset=(1.1 * envs.SUCCESS_RADIUS, 0)),
        dict(offset=(0, -0.09), height=0.02),
        dict(height=0.06),
        dict(height=0.12),
        dict(fingers=0.02),
    ):
        # not: another plate, another cube, on the rim, beside it, held above it, on it but gripped
        assert not place(fresh(), **{"offset": (0, 0), "cube": cube, "plate": plate} | wrong), wrong
    env = fresh()
    place(env, (0, 0))
    env.data.joint(cube).qvel[0] = 0.3  # sliding across it
    mujoco.mj_forward(env.model, env.data)
    assert not env.solved()
    env = fresh()
    place(env, (0, 0), height=0.04)  # dropped from 12 mm above, it comes to rest
    outcomes = [env.step(STILL)[1:4] for _ in range(8)]
    assert (1.0, True, False) in outcomes
    env = fresh()  # the same beside the plate never counts
    place(env, (0, 0.09 if plate == "yellow" else -0.08), height=0.03)
    assert [env.step(STILL)[1:4] for _ in range(8)] == [(0.0, False, False)] * 8


# Chunks


def test_chunk_is_its_single_steps(monkeypatch):
    start, rendered, render = Start(3, 8), [], Tabletop.render
    monkeypatch.setattr(Tabletop, "render", lambda *args: rendered.append(1) or render(*args))
    actions = np.random.default_rng(1).uniform(-1, 1, (3, 8, 7))
    single, chunked = at(start), Tabletop()
    rendered.clear()
    chunked.reset(options=vars(start))
    for n, chunk in enumerate(actions, 1):
        image, *rest, progress = run_chunk(chunked, chunk)
        assert len(rendered) == 1 + n  # one for reset, one per chunk
        for action in chunk:
            single.advance(action)
        np.testing.assert_array_equal(physics(single), physics(chunked))
        np.testing.assert_array_equal(render(single), image)
        assert rest == [8, False, False, []] and progress == single.progress


def test_chunk_stops_at_success_and_horizon():
    start = next(
        s for s in (Start(1, i) for i in range(50)) if len(actions_of_expert(s)) % 8 not in (0, 7)
    )
    actions = actions_of_expert(start)
    whole, rest = divmod(len(actions), 8)
    padded = np.concatenate([actions, np.ones((8 - rest, 7))]).reshape(
        -1, 8, 7
    )  # would knock the cube about
    single, chunked = at(start), at(start)
    ends = [run_chunk(chunked, chunk) for chunk in padded]
    for action in actions:
        single.advance(action)
    assert [e[1:4] for e in ends] == [(8, False, False)] * whole + [(rest, True, True)]
    np.testing.assert_array_equal(physics(single), physics(chunked))
    np.testing.assert_array_equal(single.render(), ends[-1][0])
    short = at(start, horizon=11)
    ends = [run_chunk(short, np.tile(STILL, (8, 1))) for _ in range(2)]
    assert [e[1:4] for e in ends] == [(8, False, False), (3, False, True)]


# Bad input and a machine without OpenGL


def test_bad_input_is_one_clear_line():
    env = Tabletop()
    env.reset(options={"task": 0, "index": 0})
    nan = np.full(7, np.nan)
    for call, words in [
        (lambda: env.step(np.zeros(6)), r"7 finite numbers, got shape \(6,\)"),
        (lambda: env.step(np.zeros((1, 7))), r"got shape \(1, 7\)"),
        (lambda: env.step(nan), "nan"),
        (lambda: env.step(np.array([0, 0, np.inf, 0, 0, 0, 0])), "inf"),
        (lambda: run_chunk(env, np.tile(nan, (8, 1))), "nan"),
        (lambda: run_chunk(env, np.zeros((7, 7))), r"shape \(8, 7\), got \(7, 7\)"),
        (lambda: run_chunk(env, np.zeros(7)), r"got \(7,\)"),
        (
            lambda: env.reset(options={"task": "open the drawer"}),
            "'open the drawer'.*put the red cube on the green plate",
        ),
        (lambda: env.reset(options={"task": 4}), "unknown task 4"),
        (lambda: env.reset(options={"task": -1}), "unknown task -1"),
        (lambda: env.reset(options={"index": 50}), r"index=50.*0\.\.49"),
        (lambda: env.reset(options={"index": -1}), "index=-1"),
        (lambda: env.reset(options={"split": "test"}), "split='test'.*'train', 'heldout'"),
        (lambda: Tabletop(split="val"), "split='val'"),
        (lambda: Tabletop(size=1024), "size=1024.*16 to 256"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    before = physics(env)
    with pytest.raises(ValueError):
        env.step(nan)
    np.testing.assert_array_equal(physics(env), before)  # a refused action moves nothing


@pytest.mark.parametrize("case", ["no libEGL", "no such device", "unknown MUJOCO_GL"])
def test_missing_gl_is_one_line(case, tmp_path, monkeypatch):
    (tmp_path / "libEGL.so.1").write_text("not a library")  # what the dynamic linker finds first
    (tmp_path / "libEGL.so").write_text("not a library")
    change = {
        "no libEGL": {"LD_LIBRARY_PATH": str(tmp_path), "MUJOCO_GL": "egl"},
        "no such device": {"MUJOCO_EGL_DEVICE_ID": "99", "MUJOCO_GL": "egl"},
        "unknown MUJOCO_GL": {"MUJOCO_GL": "bogus"},
    }[case]
    done = subprocess.run(
        [sys.executable, "-m", "robots.tabletop"],
        env=os.environ | change,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"MUJOCO_GL={change['MUJOCO_GL']}" in done.stderr
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert "libegl1" in simulator.gl_help() and (
        case == "unknown MUJOCO_GL" or simulator.gl_help() in done.stderr
    )
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert simulator.gl_help().removeprefix("run: ").split() == [
        "apt-get",
        "install",
        "-y",
        "--no-install-recommends",
        "libosmesa6",
    ]


@pytest.mark.parametrize(
    "script",
    [["studies.progress_curves", "--out", "x.png"], ["studies.train_world_model", "--out", "x"]],
)
def test_missing_gl_is_one_line_where_the_simulator_is_played(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", *script],
        env=os.environ | {"MUJOCO_GL": "bogus"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and "MUJOCO_GL=bogus" in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_gif(tmp_path):
    from PIL import Image

    frames = [np.full((16, 16, 3), value, np.uint8) for value in (0, 90, 200)]
    evaluate.save_gif(str(tmp_path / "x.gif"), frames)
    with Image.open(tmp_path / "x.gif") as gif:
        seen = []
        for k in range(gif.n_frames):
            gif.seek(k)
            seen.append(int(np.asarray(gif.convert("RGB"))[8, 8, 0]))
    np.testing.assert_allclose(seen, (0, 90, 200), atol=3)


@pytest.mark.slow
@pytest.mark.parametrize("system, name", [("linux", "egl"), ("darwin", "cgl"), ("win32", "wgl")])
def test_opengl_is_the_system_s_own(monkeypatch, system, name):
    """apt-get is no help on a Mac."""
    monkeypatch.setattr(sys, "platform", system)
    for unset in ("absent", "empty"):
        monkeypatch.setenv("MUJOCO_GL", "")
        if unset == "absent":
            monkeypatch.delenv("MUJOCO_GL")
        assert simulator.backend() == name
        assert ("apt-get" in simulator.gl_help()) == (system == "linux")
        assert simulator.load_mujoco() is mujoco
    assert system == "linux" or "unset MUJOCO_GL" in simulator.gl_help()
    known = {"linux": "egl, osmesa, glfw", "darwin": "cgl, glfw", "win32": "wgl, glfw"}[system]
    for own in known.split(", "):
        monkeypatch.setenv("MUJOCO_GL", own)
        assert simulator.backend() == own and simulator.load_mujoco() is mujoco
    for other in {"bogus", "egl", "cgl", "wgl"} - {name}:
        monkeypatch.setenv("MUJOCO_GL", other)
        words = f"^MUJOCO_GL={other} is unknown; set it to one of {known}$"
        with pytest.raises(RuntimeError, match=words):
            simulator.load_mujoco()


@pytest.mark.parametrize("system, setting", [("linux", "egl"), ("darwin", None), ("win32", None)])
def test_egl_is_the_default_on_linux_alone(system, setting):
    """Elsewhere mujoco chooses, because nothing is set."""
    code = (
        f"import gymnasium, os, sys; sys.platform = {system!r}; import robots.tabletop as t; "
        "print(repr(os.environ.get('MUJOCO_GL')), 'mujoco' in sys.modules)"
    )
    kept = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True)
    assert done.stdout.split() == [repr(setting), "False"], done.stderr


def test_a_renderer_that_fails_on_a_mac_is_one_line(monkeypatch):
    def broken(*args):
        raise RuntimeError("invalid CoreGraphics\nconnection")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(mujoco, "Renderer", broken)
    with pytest.raises(RuntimeError, match="MUJOCO_GL=cgl .*unset MUJOCO_GL") as caught:
        simulator.make_renderer(mujoco, None, 64)
    assert "\n" not in str(caught.value) and "apt-get" not in str(caught.value)


# As a suite


def test_the_suite():
    suite = find_suite("tabletop")
    assert (suite.name, suite.tasks) == ("tabletop", (0, 1, 2, 3))
    assert suite.horizon == envs.HORIZON["tabletop"]
    assert suite.states == {"train": 50, "heldout": 50} and not suite.slow and not suite.by_task
    assert suite.split_names.keys() == suite.states.keys() == set(suite.evaluated)
    assert find_suite("tabletop", (3, 1)).starts("heldout", 2) == [
        Start(task, index, "heldout") for task in (3, 1) for index in (0, 1)
    ]
    assert len(suite.starts("train")) == len(suite.starts("train", 99)) == 200
    with pytest.raises(ValueError, match="^--split all: tabletop has train, heldout$"):
        suite.starts("all")
    env = suite.make(size=32, horizon=5)
    assert env.reset(options=vars(Start(1, 2)))[0]["image"].shape == (32, 32, 3)
    for tasks, words in (((4,), "unknown task 4"), ((-1,), "unknown task"), ((1, 1), "each once")):
        with pytest.raises(ValueError, match=words) as caught:
            find_suite("tabletop", tasks, SuiteOptions())
        assert "\n" not in str(caught.value)


# Two cubes


def test_the_long_suite():
    suite = find_suite("tabletop_long")
    assert len(suite.instructions) == len(set(suite.instructions)) == 4 and suite.horizon == 104
    assert suite.instructions[1] == (
        "put the red cube on the green plate and the blue cube on the yellow plate"
    )
    with pytest.raises(ValueError, match="^unknown suite 'tabletop_short'; there are tabletop and"):
        find_suite("tabletop_short")


@pytest.mark.parametrize("task", range(4))
def test_the_expert_puts_both_cubes_and_progress_never_falls(task):
    env = Tabletop("heldout", suite="tabletop_long")
    env.reset(options={"task": task, "index": 7, "image": False})
    expert, seen, ended = Expert(env), [env.progress], False
    while not ended:
        assert not env.success
        ended = env.advance(expert())
        seen.append(env.progress)
    assert env.success and 60 < env.steps < 90
    assert seen[0] == 0 and seen[-1] == 1 and (np.diff(seen) >= 0).all()
    first_half = seen[len(seen) // 2 - 4]  # one of two cubes lies where it should
    assert 0.45 < first_half < 0.75


def test_progress_is_reach_lift_and_place():
    """By hand: halfway to the cube, then held 25 mm up over the plate. Pushed there along the
    table it is no nearer."""
    env = Tabletop()
    env.reset(options={"task": 0, "index": 0, "image": False})
    assert env.progress == 0
    cube, plate, hand = (env.data.body(name).xpos for name in ("red", "green", "hand"))
    start = hand.copy()
    hand[:] = (start + cube) / 2
    env.note_progress()
    assert env.progress == pytest.approx(0.5 / 3)
    cube[:2] = plate[:2]
    env.note_progress()
    assert env.progress < 0.5 / 3 + 0.1  # the reach to where the cube is now, and no place
    before = env.progress
    cube[2] = 0.02 + 0.025
    hand[:] = cube
    env.note_progress()
    place = 1 - (cube[2] - plate[2]) / env.far[0][1]
    assert env.progress == pytest.approx((1 + 0.5 + place) / 3)
    assert env.progress > before + 0.1
    hand[:] = start
    env.note_progress()
    assert env.progress == pytest.approx((1 + 0.5 + place) / 3)  # the best counts
