"""What the simulators share: an environment whose physics and camera are apart, because a policy
looks once in 8 steps, and OpenGL without a screen."""
import atexit
import gc
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

# What MUJOCO_GL may be; where it is unset, mujoco takes the first itself, but on Linux
BACKENDS = {"linux": ("egl", "osmesa", "glfw"), "darwin": ("cgl", "glfw"), "win32": ("wgl", "glfw")}
if sys.platform == "linux":
    os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL") or "egl"      # headless
os.environ.setdefault("LP_NUM_THREADS", "0")        # Mesa's threads get in the workers' way


class Simulator(gymnasium.Env):
    """A gripper and its tasks. Observation {"image": uint8 (size, size, 3)}; action float (7,) in
    [-1, 1]: (dx, dy, dz, droll, dpitch, dyaw, gripper), which -1 opens and 1 closes; reward 1 on
    success. An episode ends at success (terminated) or after `horizon` env steps (truncated).

    reset(options={"task": int or instruction, "index": int, "split": str}) chooses the initial
    state, by its index in the split; task and split default to the constructor's, what is then left
    out is drawn from `seed`. "image": False returns no observation. info: task (number),
    instruction, index, split, success.

    A simulator has `horizon`, begin(state, options), which puts the scene of self.task into that
    initial state, simulate(action), one env step of physics, solved(), and render(), the image."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    largest = 256           # image, pixels
    progress = np.nan       # of this episode, 0 .. 1; of who knows it

    def __init__(self, name: str, instructions: Sequence[str], states: dict[str, Sequence[int]],
                 split: str, size: int):
        """states: numbers of the initial states in each split."""
        if not 16 <= size <= self.largest:
            raise ValueError(f"size={size}: the camera makes images of 16 to {self.largest} pixels")
        self.name, self.instructions, self.states = name, tuple(instructions), states
        self.split, self.size, self.fixed_task, self.render_mode = split, size, None, "rgb_array"
        self.states_of(split)                   # refuses an unknown split now
        self.observation_space = Dict({"image": Box(0, 255, (size, size, 3), np.uint8)})
        self.action_space = Box(-1.0, 1.0, (7,), np.float32)

    def states_of(self, split: str) -> Sequence[int]:
        if split not in self.states:
            raise ValueError(f"split={split!r}: use {', '.join(map(repr, self.states))}")
        return self.states[split]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = {"task": self.fixed_task, "index": None, "split": self.split} | (options or {})
        task, index, split = options["task"], options["index"], options["split"]
        numbers = self.states_of(split)
        task = self.np_random.integers(len(self.instructions)) if task is None else task
        index = int(self.np_random.integers(len(numbers)) if index is None else index)
        if not 0 <= index < len(numbers):
            raise ValueError(f"index={index}: the {split} initial states are numbered "
                             f"0..{len(numbers) - 1}")
        self.task = task_number(task, self.name, self.instructions)
        self.instruction, self.index, self.used_split = self.instructions[self.task], index, split
        self.steps, self.success = 0, False
        self.begin(numbers[index], options)
        return self.observe() if options.get("image", True) else {}, self.info()

    def advance(self, action) -> bool:
        """One env step of physics, no image. Returns True when the episode has ended."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers, got shape {action.shape}: {action}")
        self.simulate(action.clip(-1, 1))
        self.steps += 1
        self.success = self.solved()
        return self.success or self.steps >= self.horizon

    def step(self, action):
        ended = self.advance(action)
        return (self.observe(), float(self.success), self.success, ended and not self.success,
                self.info())

    def observe(self) -> dict:
        return {"image": self.render()}

    def info(self) -> dict:
        return {"task": self.task, "instruction": self.instruction, "index": self.index,
                "split": self.used_split, "success": self.success}


def task_number(task, suite: str, instructions: Sequence[str]) -> int:
    """Of a task given by number or instruction."""
    if task in instructions:
        return instructions.index(task)
    if isinstance(task, (int, np.integer)) and 0 <= task < len(instructions):
        return int(task)
    raise ValueError(f"unknown task {task!r}; {suite} has 0..{len(instructions) - 1}: "
                     + "; ".join(instructions[:10]))


# OpenGL

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


def with_opengl(make: Callable):
    """make(); RuntimeError, one line with the fix, where OpenGL does not work."""
    name = backend()
    # Half-made renderers complain as they are deleted; here nobody listens
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        return make()
    except Exception as error:          # a machine can lack it in many ways
        kind = type(error).__name__
    finally:
        gc.collect()
        sys.unraisablehook = hook
    raise RuntimeError(f"no OpenGL with MUJOCO_GL={name} ({kind}); {gl_help()}")


def load_mujoco():
    return with_opengl(partial(import_module, "mujoco"))


def make_renderer(mujoco, model, size: int):
    """mujoco.Renderer for square images of `size` pixels. It is closed before mujoco shuts OpenGL
    down, as it registers in its first one: later, Python would print a traceback."""
    renderer = with_opengl(partial(mujoco.Renderer, model, size, size))
    atexit.register(_close, weakref.ref(renderer))
    return renderer


def _close(renderer: weakref.ref) -> None:
    try:
        if renderer():
            renderer().close()
    except Exception:                   # robosuite's own renderer has shut OpenGL down already
        sys.unraisablehook = lambda _: None
