"""LIBERO and LIBERO-Plus behind the gymnasium interface of robots/tabletop.py: the benchmark of the paper (arXiv 2511.15605), fast and reproducible.

What is here
1. `Libero`: one gymnasium environment for any task of a suite. Physics and camera are apart: `advance(action)` steps without an image,
   `render()` gives the image the stock environment would have given, bit for bit. Another task is another simulator, built in place of
   the old one, so memory does not grow with the number of tasks.
2. `make_suite`: some or all tasks of a suite, in the form in which vla_srpo.py and eval.py take them.
3. `bench`: speed and exactness beside the stock environment.
robots/libero_files.py finds the package, its assets, tasks and initial states; the scripted demonstrator is in robots/libero_expert.py.

Left out on purpose: wrist camera, proprioception and rewards other than success (the paper's policy uses none of them).

    python -m robots.libero --suite libero_object                       # speed and exactness beside the stock environment
"""
import argparse
import atexit
import os
import sys
import time
import types
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np

from robots.tabletop import make_renderer
from robots.libero_files import SUITES, Task, initial_states, prepare, tasks
from robots.rollouts import Suite

PROTOCOLS = {"openvla-oft": {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400},
             "simplevla": dict.fromkeys((*SUITES, "libero_90"), 512)}           # env steps after settling; SRPO's published code: 512 too
SPLITS = {"train": range(0, 50, 2), "heldout": range(1, 50, 2), "all": range(50)}       # official initial states, by number
SPLIT_NAMES = {"train": "25 training initial states (even numbers)", "heldout": "25 held-out initial states (odd numbers)",
               "all": "all 50 initial states, trained and evaluated on alike: the papers' own protocol"}
SETTLE = 10                     # no-op steps before the policy acts: objects drop from a little above the table
NO_OP = np.array([0, 0, 0, 0, 0, 0, -1.0])
SUBSTEPS = 25                   # of 2 ms: 20 Hz control
CAMERA_SUBSTEP = 23             # the stock image shows the scene before this one, 4 ms before the step ends (robosuite's sampling clock)
CELL = 0.005                    # metres; fast: visual meshes are thinned to one vertex per cell


# The environment

def thin_meshes(model, cell: float = CELL) -> None:
    """Cluster the vertices of visual meshes on a grid of `cell` metres and drop the faces that vanish, in place. Meshes that take part in
    contacts stay as they are, so the physics does not change."""
    solid = set(model.geom_dataid[(model.geom_contype | model.geom_conaffinity) != 0])
    for i in set(range(model.nmesh)) - solid:
        vertices = model.mesh_vert[model.mesh_vertadr[i]:][:model.mesh_vertnum[i]]                      # (V, 3)
        cells = np.floor((vertices - vertices.min(0)) / cell).astype(np.int64) @ (1, 1 << 20, 1 << 40)  # (V,) one number per cell
        _, first, inverse = np.unique(cells, return_index=True, return_inverse=True)
        start, count = model.mesh_faceadr[i], model.mesh_facenum[i]
        faces = first[inverse][model.mesh_face[start:start + count]]                                    # (F, 3)
        a, b, c = faces.T
        kept = np.flatnonzero((a != b) & (b != c) & (a != c))
        kept = kept[np.sort(np.unique(np.sort(faces[kept], 1) @ (1, 1 << 20, 1 << 40), return_index=True)[1])]
        for array in (model.mesh_facenormal, model.mesh_facetexcoord):
            array[start:start + len(kept)] = array[start:start + count][kept]
        model.mesh_face[start:start + len(kept)], model.mesh_facenum[i] = faces[kept], len(kept)


class Libero(gymnasium.Env):
    """Any task of a suite. Observation {"image": uint8 (size, size, 3)}: the agent's view, rotated by 180 degrees as OpenVLA's data are;
    action float (7,) in [-1, 1]: (dx, dy, dz, droll, dpitch, dyaw, gripper), +-1 = 5 cm or 0.5 rad, gripper -1 opens, +1 closes;
    reward 1 on success.

    reset(options={"task": int or instruction, "index": int, "split": ...}) chooses the initial state; task and split default to the
    constructor's, what is then left out is drawn from `seed`. `index` counts within the split: 0..24, or 0..49 for "all". Two more options:
    "hard" as below for this reset only, and "image": False for no observation.
    info: task, instruction, index, split, state (official number), protocol (in words), success. An episode ends at success (terminated) or
    after `horizon` env steps (truncated; the protocol's unless given), the 10 settling steps not counted.

    hard: build the simulator anew at each reset as the stock environment does; seconds slower, and the same to the last bit (test_libero_envs.py).
    fast: fewer triangles, cheaper antialiasing, no reflections: other pixels, same physics; not for policies trained on stock images.
    The simulator is built at the first reset, in whichever process that happens. `advance` and `render` are for action chunks.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, suite: str = "libero_object", task: int | str | None = None, split: str = "train", size: int = 128,
                 protocol: str = "openvla-oft", horizon: int | None = None, fast: bool = False, hard: bool = False, assets: str = "",
                 plus: str = "", render_mode: str | None = "rgb_array"):
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol={protocol!r}: use {' or '.join(map(repr, PROTOCOLS))}")
        if not 16 <= size <= 1024:
            raise ValueError(f"size={size}: the camera makes images of 16 to 1024 pixels")
        plus = plus or os.environ.get("LIBERO_PLUS_PATH", "")
        self.suite, self.tasks, self.split, self.size, self.render_mode = suite, tasks(suite, plus), split, size, render_mode
        self.plus = plus if suite.startswith("libero_plus") else ""
        self.protocol, self.fixed_horizon, self.fast, self.hard, self.assets = protocol, horizon, fast, hard, assets
        self.fixed_task = None if task is None else self.task_id(task)
        self.states_of(split)                       # refuses an unknown split here rather than at the first reset
        self.built, self.wrapper, self.renderer = None, None, None
        self.observation_space = gymnasium.spaces.Dict({"image": gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)})
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32)

    def task_id(self, task) -> int:
        """Number of a task given by number or (for LIBERO) instruction."""
        instructions = [t.instruction for t in self.tasks]
        if isinstance(task, str) and task in instructions:
            return instructions.index(task)
        if isinstance(task, (int, np.integer)) and 0 <= task < len(self.tasks):
            return int(task)
        raise ValueError(f"unknown task {task!r}; {self.suite} has 0..{len(self.tasks) - 1}: " + "; ".join(instructions[:10]))

    def states_of(self, split: str) -> range:
        """Official numbers of a split's initial states. LIBERO-Plus: one trial per task, whatever the split."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: use {', '.join(map(repr, SPLITS))}")
        return range(1) if self.plus else SPLITS[split]

    def _build(self, task: Task) -> None:
        """The simulator of one task in place of the one there is."""
        control_env = prepare(self.assets, self.plus)
        self.close()
        import mujoco
        from robosuite.utils.errors import RandomizationError
        wrapper, tries = None, 100
        try:
            while wrapper is None:
                tries -= 1
                with suppress(RandomizationError) if tries else nullcontext():          # objects did not fit
                    wrapper = control_env(task.bddl, use_camera_obs=False, has_offscreen_renderer=False, hard_reset=False, ignore_done=True)
        except (OSError, ValueError, AssertionError, SyntaxError, RandomizationError) as e:         # SyntaxError: XML that is cut off
            raise RuntimeError(f"LIBERO cannot build {task.name}: {' '.join(str(e).split())[:300]}; "
                               f"set LIBERO_ASSETS or --assets to a complete copy of its assets") from None
        self.mujoco, self.wrapper, self.env, self.sim, self.built = mujoco, wrapper, wrapper.env, wrapper.env.sim, task
        self.model, self.data = self.sim.model._model, self.sim.data._data
        # The stock environment's first reset builds the model again and adds to these without emptying the list: each draws twice. What they draw
        # (how far a drawer is open) the initial state overrides; the fixtures' places are drawn after them.
        self.env.object_property_initializers *= 2
        self.shown = mujoco.MjData(self.model)                  # the scene as the camera last saw it
        self.pixels = 2 * self.size if self.fast else self.size         # fast: averaged down instead of antialiased
        self.model.vis.global_.offwidth = self.model.vis.global_.offheight = self.pixels
        if self.fast:
            self.model.vis.quality.offsamples, self.model.mat_reflectance[:] = 0, 0
            thin_meshes(self.model)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = options or {}
        task, index, split = options.get("task", self.fixed_task), options.get("index"), options.get("split", self.split)
        numbers = self.states_of(split)
        task = int(self.np_random.integers(len(self.tasks))) if task is None else self.task_id(task)
        index = int(self.np_random.integers(len(numbers))) if index is None else int(index)
        if not 0 <= index < len(numbers):
            raise ValueError(f"index={index}: the {split} initial states are numbered 0..{len(numbers) - 1}")
        self.task, self.index, self.used_split, self.state = task, index, split, numbers[index]
        self.instruction, self.steps, self.success = self.tasks[task].instruction, 0, False
        self.horizon = self.fixed_horizon or PROTOCOLS[self.protocol][self.tasks[task].suite]
        states = initial_states(self.tasks[task].states)
        if self.built != self.tasks[task] or options.get("hard", self.hard):
            self._build(self.tasks[task])
        # Fixtures (cabinet, stove) are placed by numpy's global generator, within a centimetre, in every reset. Seeded by the state's
        # number, an episode does not depend on those before it. Papers' code: seeded once per task, so that it does.
        from robosuite.utils.errors import RandomizationError
        held, placed = np.random.get_state(), False
        np.random.seed(self.state)
        while not placed:
            try:
                placed = self.env.reset() is not None
            except RandomizationError:                          # objects did not fit; the stock wrapper tries for ever after ANY exception
                pass
        np.random.set_state(held)
        for robot in self.env.robots:                           # the one thing that a soft reset forgets
            robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)
        self.wrapper.set_init_state(states[self.state])
        self._see()
        for _ in range(SETTLE):
            self._simulate(NO_OP)
        return self.observe() if options.get("image", True) else {}, self._info()

    def _see(self) -> None:
        self.seen = self.data.qpos.copy(), self.model.site_rgba.copy()          # a stove's glow is a site

    def _simulate(self, action: np.ndarray) -> None:
        """One env step: what robosuite's step does to the physics, to the last bit. There each substep is mj_forward twice, mj_step and every
        sensor; mj_step1, control and mj_step2 compute the same once."""
        mujoco, model, data, env, sim = self.mujoco, self.model, self.data, self.env, self.sim
        sim.forward = lambda: None                              # the controller asks for what mj_step1 has just computed
        try:
            for k in range(SUBSTEPS):
                if k == CAMERA_SUBSTEP:
                    self._see()
                mujoco.mj_step1(model, data)
                env._pre_action(action, k == 0)
                mujoco.mj_step2(model, data)
        finally:
            del sim.forward
        env._post_process()

    def advance(self, action) -> bool:
        """One env step of physics, no image. Returns True when the episode has ended."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers, got shape {action.shape}: {action}")
        self._simulate(action.clip(-1, 1))
        self.steps += 1
        self.success = bool(self.env._check_success())
        return self.success or self.steps >= self.horizon

    def step(self, action):
        ended = self.advance(action)
        return self.observe(), float(self.success), self.success, ended and not self.success, self._info()

    def observe(self) -> dict:
        return {"image": self.render()}

    def render(self) -> np.ndarray:
        """uint8 (size, size, 3): the stock environment's `agentview_image` after the same actions, rotated by 180 degrees."""
        mujoco, model, shown = self.mujoco, self.model, self.shown
        if self.renderer is None:
            self.renderer = make_renderer(mujoco, model, self.pixels)
            self.option = mujoco.MjvOption()
            self.option.geomgroup[0] = 0                        # collision geometry
            atexit.register(self.close)                         # before mujoco shuts OpenGL down: later, Python would print a traceback
        shown.qpos[:], now = self.seen[0], model.site_rgba.copy()
        for compute in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            compute(model, shown)
        model.site_rgba[:] = self.seen[1]
        self.renderer.update_scene(shown, "agentview", self.option)
        model.site_rgba[:] = now
        image = self.renderer.render()[:, ::-1]                 # row 0 on top, and mirrored: OpenGL's order turned by 180 degrees
        if self.fast:
            image = image.reshape(self.size, 2, self.size, 2, 3).mean((1, 3)).round().astype(np.uint8)
        if getattr(self.wrapper, "noise", 0):                   # LIBERO-Plus spoils images in the wrapper's step: lend it this one
            held = np.random.get_state()
            np.random.seed([self.task, self.state, self.steps])     # code: never seeded there
            stand_in = types.SimpleNamespace(noise=self.wrapper.noise, env=types.SimpleNamespace(
                step=lambda _: ({"agentview_image": image[::-1, ::-1]}, 0, False, {})))
            image = np.asarray(type(self.wrapper).step(stand_in, None)[0]["agentview_image"], np.uint8)[::-1, ::-1]
            np.random.set_state(held)
        return np.ascontiguousarray(image)

    def _info(self) -> dict:
        states = "LIBERO-Plus, one trial per task" if self.plus else SPLIT_NAMES[self.used_split]
        return {"task": self.task, "instruction": self.instruction, "index": self.index, "split": self.used_split, "state": self.state,
                "protocol": f"{self.suite}, {states}, horizon {self.horizon}, {SETTLE} settling steps" + ", fast pixels" * self.fast,
                "success": self.success}

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
            atexit.unregister(self.close)
        if self.wrapper is not None:
            self.wrapper.close()
        self.built = self.wrapper = self.renderer = self.env = self.sim = self.model = self.data = self.shown = None


def make_suite(name: str, numbers: tuple[int, ...] = (), protocol: str = "openvla-oft", horizon: int = 0, fast: bool = False, hard: bool = False,
               assets: str = "", plus: str = "") -> Suite:
    """A suite of LIBERO or LIBERO-Plus, or some of its tasks by number, for robots/rollouts.py's workers; horizon 0: the protocol's. Nothing is built
    yet. ValueError and RuntimeError as from `tasks` and `Libero`."""
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"--tasks {' '.join(map(str, numbers))}: each once")
    make = partial(Libero, name, protocol=protocol, fast=fast, hard=hard, assets=assets, plus=plus)
    env = make()
    if not env.tasks:
        raise ValueError(f"{name} has no tasks in this copy of LIBERO-Plus; choose another dimension or suite")
    instructions, steps = tuple(t.instruction for t in env.tasks), horizon or max(PROTOCOLS[protocol][t.suite] for t in env.tasks)
    labels = tuple(t.suite if env.plus else t.name.replace("_", " ") for t in env.tasks)        # instructions occur twice
    return Suite(name, instructions, tuple(map(env.task_id, numbers or range(len(env.tasks)))),
                 {split: len(env.states_of(split)) for split in SPLITS}, make, horizon or None, tables=0, by_task=True,
                 protocol=f"horizon {steps}" + f" ({protocol})" * (not horizon) + f", {SETTLE} settling steps" + ", fast pixels" * fast,
                 labels=labels if env.plus or len(set(instructions)) < len(instructions) else ())


# Speed

def bench(env: Libero, args) -> None:
    """Env steps per second of one core, and exactness, beside the stock environment stepped through the same actions from the same state."""
    task, size, start = args.task, args.size, {"task": args.task, "index": 0}
    offscreen, rates = sys.modules[prepare(env.assets, env.plus).__module__].OffScreenRenderEnv, {}
    env.reset(options=start)
    actions = np.random.default_rng(0).uniform(-1, 1, (-(-args.steps // 10), 7)).repeat(10, 0)[:args.steps]     # the arm gets about

    def rate(name: str, step, base: str = "") -> None:
        began = time.process_time()
        for i, action in enumerate(actions, 1):
            step(i, action)
        rates[name] = len(actions) / (time.process_time() - began)
        print(f"{rates[name]:7.1f} env steps/s  {name}" + (f": {rates[name] / rates[base]:.1f}x" if base else ""), flush=True)

    def stock(name: str, **cameras) -> tuple[list, list]:
        theirs, images, places = offscreen(bddl_file_name=env.tasks[task].bddl, **cameras), [], []
        theirs.seed(env.state)
        theirs.reset()
        theirs.set_init_state(initial_states(env.tasks[task].states)[env.state])
        for _ in range(SETTLE):
            theirs.step(NO_OP)
        rate(name, lambda i, action: (images.append(theirs.step(action)[0]["agentview_image"][::-1, ::-1]),
                                      places.append(theirs.sim.data.qpos.copy())))
        theirs.close()
        return images, places

    print(f"{args.suite} task {task}, {len(actions)} steps, {size} px; per second of CPU time, so that other jobs matter little")
    base = f"stock, agent view every step, {size} px"
    images, places = stock(base, camera_names=["agentview"], camera_heights=size, camera_widths=size)
    stock("stock, both cameras every step, 256 px: what lerobot's LiberoEnv asks of it", camera_heights=256, camera_widths=256)
    try:
        from lerobot.envs.libero import LiberoEnv, _get_suite
        theirs = LiberoEnv(_get_suite(args.suite), task, args.suite)
        theirs.reset(seed=0)
        rate("lerobot's LiberoEnv", lambda i, action: theirs.step(action), base)
        theirs.close()
    except ImportError:
        print("      -              lerobot is not installed, so its LiberoEnv itself is left out")
    for fast in (False, True):
        env.fast, mine = fast, []
        for every, text in ((0, "no camera"), (8, "a frame every 8 steps"), (1, "a frame every step")):
            env.reset(options=start | {"hard": every == 0})
            rate(f"ours{', fast' * fast}, {text}", lambda i, action: (env.advance(action), mine.append(
                (env.render() if every and i % every == 0 else None, env.data.qpos.copy()))), base)
        frames, theirs = zip(*mine[-len(actions):])
        off = np.abs(np.array(frames, int) - images)
        print(f"                     pixels differ from stock by {off.mean():.2f} of 255 on average, {off.max()} at most; "
              f"qpos by {np.abs(np.array(theirs) - places).max():.1e}")
    for other in range(len(env.tasks)):
        began = time.perf_counter()
        env.reset(options={"task": other, "index": 0})
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
        print(f"                     task {other} built and reset in {time.perf_counter() - began:.1f} s, {memory:.2f} GB resident")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="LIBERO: speed and exactness beside the stock environment", allow_abbrev=False)
    add = parser.add_argument
    add("--suite", default="libero_object", help="|".join(SUITES) + "|libero_90")
    add("--task", type=int, default=0, help="task number")
    add("--size", type=int, default=128, help="pixels")
    add("--steps", type=int, default=120, help="env steps of each measurement")
    add("--assets", default="", help="folder of LIBERO's assets (default: LIBERO_ASSETS, else from the hub)")
    try:
        parser.error = lambda message: (_ for _ in ()).throw(ValueError(message))
        args = parser.parse_args(argv)
        if args.steps < 1:
            raise ValueError("--steps must be 1 or more")
        bench(Libero(args.suite, args.task, size=args.size, assets=args.assets), args)
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
