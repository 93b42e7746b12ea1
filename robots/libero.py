"""LIBERO and LIBERO-Plus behind gymnasium: SRPO-VLA's benchmark (arXiv 2511.15605), fast and
reproducible.

1. `Libero`: an environment for any task of a suite. Physics and camera are apart: `advance(action)`
   steps without an image, `render()` gives the image that the stock environment would have given,
   bit for bit. Another task is another simulator, built in place of the old one.
2. `suite`: some or all tasks of a suite, as training and evaluation take them.

robots/libero_files.py finds the package and its files, robots/libero_expert.py demonstrates. Left
out: wrist camera, proprioception, rewards other than success; the paper's policy uses none of them.

    python -m studies.libero_speed          # speed and exactness beside the stock environment
"""
import atexit
import os
import types
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import gymnasium
import numpy as np

from robots import libero_files as files
from robots.suite import Suite, SuiteOptions
from robots.tabletop import make_renderer

PROTOCOLS = {       # env steps of an episode at most, after settling
    "openvla-oft": {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300,
                    "libero_10": 520, "libero_90": 400},
    "simplevla": dict.fromkeys((*files.SUITES, "libero_90"), 512)}      # SRPO's code: 512 too
SPLITS = {"train": range(0, 50, 2), "heldout": range(1, 50, 2), "all": range(50)}
SPLIT_NAMES = {     # of the 50 official initial states of a task
    "train": "25 training initial states (even numbers)",
    "heldout": "25 held-out initial states (odd numbers)",
    "all": "all 50 initial states, trained and evaluated on alike: the papers' own protocol"}
PLUS_NAME = "LIBERO-Plus, one trial per task"
SETTLE = 10             # no-op steps before the policy acts: objects drop from above the table
NO_OP = np.array([0, 0, 0, 0, 0, 0, -1.0])
SUBSTEPS = 25           # of 2 ms: 20 Hz control
CAMERA_SUBSTEP = 23     # the stock image shows the scene before it: robosuite's sampling clock
CELL = 0.005            # metres; fast pixels: visual meshes keep one vertex per cell


class Libero(gymnasium.Env):
    """Any task of a suite. Observation {"image": uint8 (size, size, 3)}: the agent's view, rotated
    by 180 degrees as OpenVLA's data are. Action float (7,) in [-1, 1]: (dx, dy, dz, droll, dpitch,
    dyaw, gripper), +-1 = 5 cm or 0.5 rad, gripper -1 opens, +1 closes. Reward 1 on success.

    reset(options={"task": int or instruction, "index": int, "split": ...}) chooses the initial
    state; task and split default to the constructor's, what is then left out is drawn from `seed`.
    `index` counts within the split: 0..24, or 0..49 for "all". Also "hard": bool, for this reset,
    and "image": False for no observation. info: task, instruction, index, split, state (official
    number), success. An episode ends at success (terminated) or after `horizon` env steps
    (truncated), the 10 settling steps not counted.

    options are SuiteOptions'. hard: build the simulator anew at each reset as the stock environment
    does; seconds slower, the same to the last bit. fast: fewer triangles, cheaper antialiasing, no
    reflections: other pixels, same physics. horizon 0: the protocol's. The simulator is built at
    the first reset, in whichever process that happens."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, suite: str = "libero_object", task: int | str | None = None,
                 split: str = "train", size: int = 128, render_mode: str | None = "rgb_array",
                 **options):
        self.options = SuiteOptions(**options)
        if self.options.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.options.protocol!r}: use "
                             f"{' or '.join(map(repr, PROTOCOLS))}")
        if not 16 <= size <= 1024:
            raise ValueError(f"size={size}: the camera makes images of 16 to 1024 pixels")
        plus = self.options.plus or os.environ.get("LIBERO_PLUS_PATH", "")
        self.plus = plus if suite.startswith("libero_plus") else ""
        self.suite, self.tasks = suite, files.tasks(suite, plus)
        self.split, self.size, self.render_mode = split, size, render_mode
        self.fixed_task = None if task is None else self.task_id(task)
        self.states_of(split)                   # refuses an unknown split now
        self.built = self.wrapper = self.renderer = None
        image = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict({"image": image})
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32)

    def task_id(self, task) -> int:
        """Number of a task given by number or (for LIBERO) instruction."""
        instructions = [t.instruction for t in self.tasks]
        if isinstance(task, str) and task in instructions:
            return instructions.index(task)
        if isinstance(task, (int, np.integer)) and 0 <= task < len(self.tasks):
            return int(task)
        raise ValueError(f"unknown task {task!r}; {self.suite} has 0..{len(self.tasks) - 1}: "
                         + "; ".join(instructions[:10]))

    def states_of(self, split: str) -> range:
        """Official numbers of a split's initial states. LIBERO-Plus: one, whatever the split."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: use {', '.join(map(repr, SPLITS))}")
        return range(1) if self.plus else SPLITS[split]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        chosen = {"task": self.fixed_task, "index": None, "split": self.split,
                  "hard": self.options.hard, "image": True} | (options or {})
        task, index, numbers = chosen["task"], chosen["index"], self.states_of(chosen["split"])
        task = self.np_random.integers(len(self.tasks)) if task is None else task
        index = int(self.np_random.integers(len(numbers)) if index is None else index)
        if not 0 <= index < len(numbers):
            raise ValueError(f"index={index}: the {chosen['split']} initial states are numbered "
                             f"0..{len(numbers) - 1}")
        self.task, self.index, self.used_split = self.task_id(task), index, chosen["split"]
        self.state, task = numbers[index], self.tasks[self.task]
        self.instruction, self.steps, self.success = task.instruction, 0, False
        self.horizon = self.options.horizon or PROTOCOLS[self.options.protocol][task.suite]
        states = files.initial_states(task.states)
        if self.built != task or chosen["hard"]:
            self._build(task)
        if states.shape[1] != 1 + self.model.nq + self.model.nv or self.state >= len(states):
            raise ValueError(f"{task.states} is not this task's: initial states of shape "
                             f"{states.shape}; {files.ANEW}")
        # Fixtures (cabinet, stove) are placed by numpy's global generator, within a centimetre, in
        # every reset. Seeded by the state's number, an episode does not depend on those before it.
        # code: seeded once per task, so that it does.
        held = np.random.get_state()
        np.random.seed(self.state)
        placed(self.env.reset)
        np.random.set_state(held)
        for robot in self.env.robots:           # the one thing that a soft reset forgets
            robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)
        self.wrapper.set_init_state(states[self.state])
        self._see()
        for _ in range(SETTLE):
            self._simulate(NO_OP)
        return self.observe() if chosen["image"] else {}, self._info()

    def _build(self, task: files.Task) -> None:
        """The simulator of one task in place of the one there is."""
        control_env = files.prepare(self.options.assets, self.plus)
        self.close()
        import mujoco
        make = partial(control_env, task.bddl, use_camera_obs=False, has_offscreen_renderer=False,
                       hard_reset=False, ignore_done=True)
        try:
            self.wrapper = placed(make)
        except (OSError, ValueError, AssertionError, SyntaxError) as e:     # SyntaxError: half XML
            raise RuntimeError(f"LIBERO cannot build {task.name}: {' '.join(str(e).split())[:300]}"
                               "; set LIBERO_ASSETS or --assets to a complete copy of its assets"
                               + ", or link that into LIBERO-Plus as libero/libero/assets"
                               * bool(self.plus)) from None
        self.mujoco, self.built = mujoco, task
        self.env, self.sim = self.wrapper.env, self.wrapper.sim
        self.model, self.data = self.sim.model._model, self.sim.data._data
        # The stock environment's first reset builds the model again and adds to these without
        # emptying the list: each draws twice. What they draw (how far a drawer is open) the initial
        # state overrides; the fixtures' places are drawn after them.
        self.env.object_property_initializers *= 2
        self.sim.reset = self._as_new
        self.shown = mujoco.MjData(self.model)                  # the scene as last seen
        fast, view = self.options.fast, self.model.vis
        self.pixels = self.size * (1 + fast)                    # averaged, not antialiased
        view.global_.offwidth = view.global_.offheight = self.pixels
        if fast:
            view.quality.offsamples, self.model.mat_reflectance[:] = 0, 0
            thin_meshes(self.model)

    def _see(self) -> None:
        self.seen = self.data.qpos.copy(), self.model.site_rgba.copy()      # a stove's glow: a site

    def _simulate(self, action: np.ndarray) -> None:
        """One env step: what robosuite's step does to the physics, to the last bit. There each
        substep is mj_forward twice, mj_step and every sensor; here positions and velocities are
        computed once."""
        self.sim.forward = self._forward                        # the controller calls it
        try:
            for k in range(SUBSTEPS):
                if k == CAMERA_SUBSTEP:
                    self._see()
                self.mujoco.mj_step1(self.model, self.data)
                self._forward()
                self.env._pre_action(action, k == 0)
                self.mujoco.mj_step2(self.model, self.data)
        finally:
            del self.sim.forward
        self.env._post_process()

    def _forward(self) -> None:
        """What mj_forward does after mj_step1; up to MuJoCo 3.3.2 the solver starts next from what
        it finds here."""
        for stage in ("Actuation", "Acceleration", "Constraint"):
            getattr(self.mujoco, f"mj_fwd{stage}")(self.model, self.data)

    def _as_new(self) -> None:
        """In place of a simulator's reset what the stock environment's new one begins with:
        fixtures at the origin, and the solver's first solution there."""
        for fixture in self.env.fixtures_dict.values():
            body = self.model.body(fixture.root_body).id
            self.model.body_pos[body], self.model.body_quat[body] = 0, (1, 0, 0, 0)
        self.mujoco.mj_resetData(self.model, self.data)
        self.mujoco.mj_forward(self.model, self.data)

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
        return (self.observe(), float(self.success), self.success, ended and not self.success,
                self._info())

    def observe(self) -> dict:
        return {"image": self.render()}

    def render(self) -> np.ndarray:
        """uint8 (size, size, 3): the stock environment's `agentview_image` after the same actions,
        rotated by 180 degrees."""
        mujoco, model, shown = self.mujoco, self.model, self.shown
        if self.renderer is None:
            self.renderer = make_renderer(mujoco, model, self.pixels)
            self.view = mujoco.MjvOption()
            self.view.geomgroup[0] = 0                          # collision geometry
            atexit.register(self.close)                         # before mujoco ends OpenGL
        shown.qpos[:], now = self.seen[0], model.site_rgba.copy()
        for compute in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            compute(model, shown)
        model.site_rgba[:] = self.seen[1]
        self.renderer.update_scene(shown, "agentview", self.view)
        model.site_rgba[:] = now
        image = self.renderer.render()[:, ::-1]                 # OpenGL's row order and a mirror
        if self.options.fast:
            blocks = image.reshape(self.size, 2, self.size, 2, 3)
            image = blocks.mean((1, 3)).round().astype(np.uint8)
        if getattr(self.wrapper, "noise", 0):
            image = self._spoiled(image)
        return np.ascontiguousarray(image)

    def _spoiled(self, image: np.ndarray) -> np.ndarray:
        """LIBERO-Plus spoils images in its wrapper's step: lend it one that returns this image."""
        observation = {"agentview_image": image[::-1, ::-1]}, 0, False, {}
        wrapper = types.SimpleNamespace(noise=self.wrapper.noise,
                                        env=types.SimpleNamespace(step=lambda _: observation))
        held = np.random.get_state()
        np.random.seed([self.task, self.state, self.steps])     # code: never seeded there
        spoiled = type(self.wrapper).step(wrapper, None)[0]["agentview_image"]
        np.random.set_state(held)
        return np.asarray(spoiled, np.uint8)[::-1, ::-1]

    def _info(self) -> dict:
        return {"task": self.task, "instruction": self.instruction, "index": self.index,
                "split": self.used_split, "state": self.state, "success": self.success}

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
            atexit.unregister(self.close)
        if self.wrapper is not None:
            self.wrapper.close()
        self.built = self.wrapper = self.renderer = self.env = self.sim = None
        self.model = self.data = self.shown = None


def placed(make: Callable):
    """make(), again where objects that are placed at random do not fit; the stock environment
    tries for ever, after any exception."""
    from robosuite.utils.errors import RandomizationError
    for _ in range(100):
        with suppress(RandomizationError):
            return make()
    raise RuntimeError("LIBERO cannot place the objects of this task: 100 attempts failed")


def thin_meshes(model, cell: float = CELL) -> None:
    """Cluster the vertices of visual meshes on a grid of `cell` metres and drop the faces that
    vanish, in place. Meshes that take part in contacts, and so the physics, stay as they are."""
    solid = set(model.geom_dataid[(model.geom_contype | model.geom_conaffinity) != 0])
    weights = (1, 1 << 20, 1 << 40)             # three numbers as one, to be compared
    for i in set(range(model.nmesh)) - solid:
        vertices = model.mesh_vert[model.mesh_vertadr[i]:][:model.mesh_vertnum[i]]      # (V, 3)
        cells = np.floor((vertices - vertices.min(0)) / cell).astype(np.int64) @ weights
        _, first, cell_of = np.unique(cells, return_index=True, return_inverse=True)
        own = slice(model.mesh_faceadr[i], model.mesh_faceadr[i] + model.mesh_facenum[i])
        faces = first[cell_of][model.mesh_face[own]]                                    # (F, 3)
        a, b, c = faces.T
        kept = np.flatnonzero((a != b) & (b != c) & (a != c))
        same = np.unique(np.sort(faces[kept], 1) @ weights, return_index=True)[1]
        kept = kept[np.sort(same)]
        for array in (model.mesh_facenormal, model.mesh_facetexcoord):
            array[own][:len(kept)] = array[own][kept]
        model.mesh_face[own][:len(kept)], model.mesh_facenum[i] = faces[kept], len(kept)


def suite(name: str, tasks: tuple[int, ...] = (), options: SuiteOptions | None = None) -> Suite:
    """A suite of LIBERO or LIBERO-Plus, or some of its tasks by number. Nothing is built yet.
    ValueError and RuntimeError as from `libero_files.tasks` and `Libero`."""
    options = options or SuiteOptions()
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--tasks {' '.join(map(str, tasks))}: each once")
    make = partial(Libero, name, **vars(options))
    env = make()
    if not env.tasks:
        raise ValueError(f"{name} has no tasks in this copy of LIBERO-Plus; choose another "
                         "dimension or suite")
    steps = options.horizon or max(PROTOCOLS[options.protocol][t.suite] for t in env.tasks)
    protocol = (f"horizon {steps}" + f" ({options.protocol})" * (not options.horizon)
                + f", {SETTLE} settling steps" + ", fast pixels" * options.fast
                + f", {files.mujoco_note() or 'MuJoCo ' + files.mujoco_version()}")
    instructions, labels = tuple(t.instruction for t in env.tasks), ()
    if env.plus:
        labels = tuple(t.suite for t in env.tasks)
    elif len(set(instructions)) < len(instructions):
        labels = tuple(t.name.replace("_", " ") for t in env.tasks)
    states = {"all": 1} if env.plus else {split: len(SPLITS[split]) for split in SPLITS}
    return Suite(name, instructions, tuple(map(env.task_id, tasks or range(len(env.tasks)))),
                 states, make, {"all": PLUS_NAME} if env.plus else SPLIT_NAMES,
                 horizon=options.horizon or None, by_task=True, protocol=protocol, labels=labels,
                 evaluated=("all",) if env.plus else ("heldout",))


if __name__ == "__main__":
    print("a library; its speed and exactness: python -m studies.libero_speed")
