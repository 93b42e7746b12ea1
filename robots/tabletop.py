"""The built-in simulator behind gymnasium: a LIBERO-like tabletop in MuJoCo, a scripted expert.

1. `Tabletop`: a gripper on a gantry, two cubes, two plates, one camera. Four tasks named by an
   instruction, each with 50 training and 50 held-out initial states that never overlap. Actions of
   7 numbers in [-1, 1] with LIBERO's meaning: (dx, dy, dz, droll, dpitch, dyaw, gripper).
2. `Expert`: the scripted demonstrator (reads the simulator's state, which no policy sees).
3. `suite`: the tasks as training and evaluation take them.

Left out: domain randomisation, proprioception and wrist camera (the paper's policy sees one
agent-view image and the instruction).

    python -m robots.tabletop                       # speed, the expert at work, a GIF
    python -m robots.tabletop --gif expert.gif --episodes 50
"""
import argparse
import atexit
import gc
import os
import sys
import time
from contextlib import contextmanager, suppress
from functools import cache

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from robots.suite import CHUNK, Suite, SuiteOptions

# What MUJOCO_GL may be; where it is unset, mujoco takes the first itself, but on Linux
BACKENDS = {"linux": ("egl", "osmesa", "glfw"), "darwin": ("cgl", "glfw"), "win32": ("wgl", "glfw")}
if sys.platform == "linux":
    os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL") or "egl"      # headless
os.environ.setdefault("LP_NUM_THREADS", "1")        # Mesa's threads get in the workers' way

CUBES, PLATES = ("red", "blue"), ("green", "yellow")
TASKS = tuple(f"put the {cube} cube on the {plate} plate" for cube in CUBES for plate in PLATES)
N_STATES = 50                   # initial states per task and split, as in LIBERO
HORIZON = 56                    # env steps (2.8 s at 20 Hz); the expert needs about 32
SUBSTEPS, TIMESTEP = 8, 0.00625  # 20 Hz control
STEP = 0.04                     # metres the hand's set point moves for an action of 1
TURN = 0.1                      # radians, likewise
SUCCESS_RADIUS = 0.05           # metres between the centres of cube and plate (its radius is 0.065)
LAYOUT = {"red": (0.08, -0.09), "blue": (0.08, 0.09),       # metres
          "green": (-0.08, -0.10), "yellow": (-0.08, 0.10)}
JITTER = 0.02                   # metres, uniform, per object and axis
HOME = np.array([0.0, 0.0, 0.14])
LOW, HIGH = np.array([-0.2, -0.2, 0.005]), np.array([0.2, 0.2, 0.2])
FINGER_OPEN = 0.044             # metres from the middle, each finger
FINGER_STEP = 0.01              # metres a finger's set point moves per env step

RGB = {"red": "0.85 0.1 0.1", "blue": "0.1 0.2 0.9",
       "green": "0.1 0.65 0.2", "yellow": "0.95 0.8 0.1"}
XML = f"""
<mujoco model="tabletop">
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="pyramidal" iterations="20"
          ls_iterations="10"/>
  <size memory="512K"/>
  <visual><quality shadowsize="0" offsamples="0"/><map znear="0.05" zfar="20"/>
    <headlight ambient="0.5 0.5 0.5" diffuse="0.4 0.4 0.4" specular="0 0 0"/>
    <global offwidth="256" offheight="256"/></visual>
  <default>
    <geom solref="0.01 1" friction="1.2" condim="3"/>
    <default class="seen"><geom contype="0" conaffinity="0"/></default>
  </default>
  <worldbody>
    <light pos="0.3 -0.3 1" dir="-0.3 0.3 -1" castshadow="false" diffuse="0.4 0.4 0.4"/>
    <camera name="agentview" pos="0.50 0 0.54" xyaxes="0 1 0 -0.72 0 0.69" fovy="34"/>
    <geom name="table" type="box" size="0.6 0.6 0.02" pos="-0.2 0 -0.02" rgba="0.75 0.72 0.68 1"/>
    {"".join(f'''<body name="{c}" pos="0 0 0.02"><freejoint name="{c}"/>
      <geom name="{c}" type="box" size="0.02 0.02 0.02" mass="0.05" rgba="{RGB[c]} 1"/></body>'''
             for c in CUBES)}
    {"".join(f'''<body name="{p}" mocap="true" pos="0 0 0.004">
      <geom name="{p}" type="cylinder" size="0.065 0.004" rgba="{RGB[p]} 1"/></body>'''
             for p in PLATES)}
    <body name="hand" gravcomp="1">
      {"".join(f'<joint name="{j}" type="{kind}" axis="{axis}"/>' for kind, joints in (
          ("slide", ("x", "y", "z")), ("hinge", ("roll", "pitch", "yaw")))
          for j, axis in zip(joints, ("1 0 0", "0 1 0", "0 0 1")))}
      <geom class="seen" type="box" size="0.02 0.055 0.012" pos="0 0 0.065" mass="0.4"
            rgba="0.25 0.25 0.28 1"/>
      <geom class="seen" type="cylinder" size="0.02 0.06" pos="0 0 0.13" mass="0.1"
            rgba="0.9 0.9 0.9 1"/>
      {"".join(f'''<body name="{n}" gravcomp="1">
        <joint name="{n}" type="slide" axis="0 {s} 0" range="0 {FINGER_OPEN}" damping="2"/>
        <geom name="{n}" type="box" size="0.015 0.006 0.03" pos="0 {s * 0.006} 0.025" mass="0.05"
              rgba="0.15 0.15 0.15 1"/></body>''' for n, s in (("left", 1), ("right", -1)))}
    </body>
  </worldbody>
  <contact><exclude body1="left" body2="right"/></contact>
  <actuator>
    {"".join(f'<position joint="{j}" kp="1500" dampratio="1"/>' for j in "xyz")}
    {"".join(f'<position joint="{j}" kp="8" dampratio="1"/>' for j in ("roll", "pitch", "yaw"))}
    {"".join(f'<position joint="{n}" kp="300" dampratio="1" forcerange="-6 6"/>'
             for n in ("left", "right"))}
  </actuator>
</mujoco>"""


def backend() -> str:
    """What MUJOCO_GL asks for, or the system's own. RuntimeError for what this system lacks."""
    known = BACKENDS.get(sys.platform, BACKENDS["linux"])
    name = os.environ.get("MUJOCO_GL") or known[0]
    if name not in known:
        raise RuntimeError(f"MUJOCO_GL={name} is unknown; set it to one of {', '.join(known)}")
    return name


def gl_help() -> str:
    """How to mend OpenGL on this system."""
    if sys.platform != "linux":
        return "unset MUJOCO_GL, and run it where somebody is logged in to the desktop"
    packages = "libosmesa6" if backend() == "osmesa" else "libegl1 libgl1-mesa-dri libopengl0"
    return f"run: apt-get install -y --no-install-recommends {packages}"


def _no_opengl(problem: Exception) -> RuntimeError:
    return RuntimeError(f"no OpenGL with MUJOCO_GL={backend()} ({type(problem).__name__}); "
                        f"{gl_help()}")


def load_mujoco():
    """Import mujoco; the many ways in which a machine can lack OpenGL are one line with the fix."""
    backend()
    try:
        import mujoco
        return mujoco
    except (AttributeError, ImportError, OSError, RuntimeError) as e:
        raise _no_opengl(e) from None


@contextmanager
def _silently():
    """Half-made renderers complain as they are deleted; here nobody listens."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def make_renderer(mujoco, model, size: int):
    """mujoco.Renderer for square images of `size` pixels; RuntimeError, one line, where OpenGL does
    not work."""
    with _silently():
        try:
            return mujoco.Renderer(model, size, size)
        except (AttributeError, ImportError, OSError, RuntimeError, mujoco.FatalError) as e:
            problem = _no_opengl(e)
        gc.collect()
    raise problem


@cache
def initial_states(split: str) -> np.ndarray:
    """Jitter of every object in every initial state: (tasks, 50, 4 objects, 2) float64, metres. A
    function of the split alone."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r}: use 'train' or 'heldout'")
    rng = np.random.default_rng([2511, 15605, split == "heldout"])
    return rng.uniform(-JITTER, JITTER, (len(TASKS), N_STATES, len(LAYOUT), 2))


class Scene:
    """The MuJoCo model and the renderers: one per process, shared by all its tables (contexts do
    not survive fork)."""

    def __init__(self):
        self.mujoco, self.renderers = load_mujoco(), {}
        self.model = self.mujoco.MjModel.from_xml_string(XML)

    @staticmethod
    @cache
    def of(pid: int) -> "Scene":
        return Scene()

    def render(self, data, size: int) -> np.ndarray:
        """uint8 (size, size, 3) from the agent's camera."""
        if size not in self.renderers:
            self.renderers[size] = make_renderer(self.mujoco, self.model, size)
            # Closed before mujoco shuts OpenGL down, which it registered just now: later, Python
            # would print a traceback
            atexit.register(self.close)
        self.renderers[size].update_scene(data, camera="agentview")
        return self.renderers[size].render()

    def close(self) -> None:
        with _silently():
            while self.renderers:
                with suppress(Exception):       # another simulator has shut OpenGL down already
                    self.renderers.popitem()[1].close()


class Tabletop(gymnasium.Env):
    """Pick a cube, put it on a plate. Observation {"image": uint8 (size, size, 3)}; action float
    (7,) in [-1, 1]; reward 1 on success.

    reset(options={"task": int or instruction, "index": 0..49, "split": ...}) chooses the initial
    state; what is left out is drawn from `seed` (split: the constructor's). info: task (int),
    instruction, index, success. An episode ends at success (terminated) or after `horizon` steps
    (truncated)."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, split: str = "train", size: int = 64, horizon: int = HORIZON,
                 render_mode: str | None = "rgb_array"):
        if size < 16 or size > 256:
            raise ValueError(f"size={size}: the camera makes images of 16 to 256 pixels")
        initial_states(split)       # refuses an unknown split here rather than at the first reset
        self.scene, self.size, self.horizon = Scene.of(os.getpid()), size, horizon
        self.split, self.render_mode = split, render_mode
        self.data = self.scene.mujoco.MjData(self.scene.model)
        self.observation_space = Dict({"image": Box(0, 255, (size, size, 3), np.uint8)})
        self.action_space = Box(-1.0, 1.0, (7,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        task, index = options.get("task"), options.get("index")
        split = options.get("split", self.split)
        task = int(self.np_random.integers(len(TASKS))) if task is None else task_id(task)
        index = int(self.np_random.integers(N_STATES)) if index is None else int(index)
        if not 0 <= index < N_STATES:
            raise ValueError(f"index={index}: initial states are numbered 0..{N_STATES - 1}")
        self.task, self.index, self.instruction = task, index, TASKS[task]
        self.steps, self.success = 0, False
        self.cube, self.plate = CUBES[task // len(PLATES)], PLATES[task % len(PLATES)]
        data, scene = self.data, self.scene
        scene.mujoco.mj_resetData(scene.model, data)
        for name, offset in zip(LAYOUT, initial_states(split)[task, index]):
            x, y = LAYOUT[name] + offset
            if name in CUBES:
                data.joint(name).qpos[:3] = x, y, 0.02
            else:
                data.mocap_pos[PLATES.index(name)] = x, y, 0.004
        fingers = (FINGER_OPEN, FINGER_OPEN)
        for joint, value in zip(("x", "y", "z", "left", "right"), (*HOME, *fingers)):
            data.joint(joint).qpos[0] = value
        self.goal = np.array([*HOME, 0.0, 0.0, 0.0])      # set point of the hand: metres, radians
        data.ctrl[:] = [*self.goal, FINGER_OPEN, FINGER_OPEN]
        scene.mujoco.mj_forward(scene.model, data)
        return self.observe(), self._info()

    def advance(self, action) -> bool:
        """One env step of physics, no image. Returns True when the episode has ended."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers, got shape {action.shape}: {action}")
        action = action.clip(-1, 1)
        self.goal[:3] = (self.goal[:3] + STEP * action[:3]).clip(LOW, HIGH)
        self.goal[3:] = (self.goal[3:] + TURN * action[3:6]).clip(-1.5, 1.5)
        self.data.ctrl[:6] = self.goal
        fingers = self.data.ctrl[6:] - FINGER_STEP * np.sign(action[6])     # LIBERO: -1 opens
        self.data.ctrl[6:] = fingers.clip(0, FINGER_OPEN)
        self.scene.mujoco.mj_step(self.scene.model, self.data, SUBSTEPS)
        self.steps += 1
        self.success = self.solved()
        return self.success or self.steps >= self.horizon

    def step(self, action):
        ended = self.advance(action)
        truncated = ended and not self.success
        return self.observe(), float(self.success), self.success, truncated, self._info()

    def solved(self) -> bool:
        """The named cube rests on the named plate and the fingers have let go."""
        cube, plate = self.data.body(self.cube), self.data.body(self.plate)
        away = np.linalg.norm(cube.xpos[:2] - plate.xpos[:2])
        if away > SUCCESS_RADIUS or not 0.02 < cube.xpos[2] < 0.035:
            return False
        gap = self.data.joint("left").qpos[0] + self.data.joint("right").qpos[0]
        return bool(gap > 0.055 and np.linalg.norm(cube.cvel[3:]) < 0.05)

    def observe(self) -> dict:
        return {"image": self.scene.render(self.data, self.size)}

    def render(self, size: int | None = None) -> np.ndarray:
        """uint8 (size, size, 3); the policy's size if none is given."""
        return self.scene.render(self.data, size or self.size)

    def _info(self) -> dict:
        return {"task": self.task, "instruction": self.instruction, "index": self.index,
                "success": self.success}


def suite(name: str, tasks: tuple[int, ...], options: SuiteOptions) -> Suite:
    """The built-in tasks, or some of them by number. ValueError for any other name or number."""
    if name != "tabletop":
        raise ValueError(f"unknown suite {name!r}; there is tabletop")
    return Suite(name, TASKS, tuple(map(task_id, tasks or range(len(TASKS)))),
                 {"train": N_STATES, "heldout": N_STATES}, Tabletop,
                 {"train": "training initial states", "heldout": "held-out initial states"},
                 HORIZON, tables=128, evaluated=("train", "heldout"), slow=False)


def task_id(task) -> int:
    """Number of a task given by number or instruction."""
    if task in TASKS:
        return TASKS.index(task)
    if isinstance(task, (int, np.integer)) and 0 <= task < len(TASKS):
        return int(task)
    raise ValueError(f"unknown task {task!r}; there are 0..{len(TASKS) - 1}: " + "; ".join(TASKS))


class Expert:
    """Scripted demonstrator: hover, descend, close, lift, carry, lower, open. It reads the state of
    a table that was just reset; `error` (metres) is the standard deviation of a mistake it makes
    about where cube and plate are, for failures."""

    def __init__(self, env: Tabletop, error: float = 0.0, rng: np.random.Generator | None = None):
        self.env, self.phase, self.calls = env, 0, 0
        self.mistake = error * (rng or np.random.default_rng()).standard_normal((2, 2))

    def __call__(self) -> np.ndarray:
        """Next action, float64 (7,)."""
        env, hand = self.env, self.env.data.body("hand").xpos
        cube, plate = (env.data.body(name).xpos[:2] + mistake
                       for name, mistake in zip((env.cube, env.plate), self.mistake))
        over_cube, over_plate = (np.linalg.norm(hand[:2] - at) for at in (cube, plate))
        ended = True
        while ended:
            self.calls += 1
            # Set point of the hand, gripper, does the next phase begin?
            goal, grip, ended = (
                ((*cube, 0.07), -1, over_cube < 0.008),                     # hover over the cube
                ((*cube, 0.008), -1, hand[2] < 0.014),                      # descend
                (env.goal[:3], 1, self.calls > 4),                          # close
                ((*hand[:2], 0.08), 1, hand[2] > 0.06),                     # lift
                ((*plate, 0.08), 1, over_plate < 0.012),                    # carry
                ((*plate, 0.02), 1, hand[2] < 0.028),                       # lower
                (env.goal[:3], 1 if self.calls == 1 else -1, self.calls > 4),   # rest, open
                ((*hand[:2], 0.12), -1, False))[self.phase]                 # rise
            if ended:
                self.phase, self.calls = self.phase + 1, 0
        action = np.zeros(7)
        action[:3] = ((np.array(goal) - env.goal[:3]) / STEP).clip(-0.5, 0.5)
        action[6] = grip
        return action


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--episodes", type=int, default=20, help="expert episodes per task")
    parser.add_argument("--gif", default="expert.gif", help="where to write one episode per task")
    args = parser.parse_args(argv)
    if args.episodes < 1:
        raise ValueError(f"--episodes must be at least 1, got {args.episodes}")
    env, rng, frames, n = Tabletop(size=128), np.random.default_rng(0), [], 480
    for every, name in ((n + 1, "no camera"), (CHUNK, f"a 128 px frame every {CHUNK} steps"),
                        (1, "a frame every step")):
        env.reset(options={"task": 0, "index": 0})
        began = time.perf_counter()
        for i in range(1, n + 1):
            env.advance(rng.uniform(-1, 1, 7))
            if i % every == 0:
                env.render()
        print(f"{n / (time.perf_counter() - began):7.0f} env steps per second on one core, {name}")
    for task, instruction in enumerate(TASKS):
        steps, wins = [], 0
        for index in range(args.episodes):
            env.reset(options={"task": task, "index": index % N_STATES})
            expert, ended = Expert(env), False
            while not ended:
                ended = env.advance(expert())
                if index == 0 and (env.steps % 2 == 0 or ended):
                    frames.append(env.render())
            steps.append(env.steps)
            wins += env.success
        print(f"{instruction}: expert solves {wins}/{args.episodes}, {np.mean(steps):.0f} steps")
    from robots.evaluate import save_gif  # here: it imports torch
    save_gif(args.gif, frames)
    print(f"wrote {args.gif}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
