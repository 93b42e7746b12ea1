"""LIBERO and LIBERO-Plus behind gymnasium: SRPO-VLA's benchmark (arXiv 2511.15605), fast and
reproducible.

1. `Libero`: any task of a suite, stepped without images; `render()` gives the one that the stock
   environment would have given, bit for bit. Another task is another simulator, built in place of
   the old one.
2. `suite`: some or all tasks of a suite, as training and evaluation take them.

robots/libero_files.py finds the package and its files, robots/libero_expert.py demonstrates. Left
out: wrist camera, proprioception, rewards other than success; the paper's policy uses none of them.

    python -m studies.libero_speed          # speed and exactness beside the stock environment
"""
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np

from robots import libero_files as files
from robots.simulator import Simulator, make_renderer, task_number
from robots.suite import Suite, SuiteOptions

PROTOCOLS = {       # env steps of an episode at most, after settling
    "openvla-oft": {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300,
                    "libero_10": 520, "libero_90": 400},
    "simplevla": dict.fromkeys((*files.SUITES, "libero_90"), 512)}      # SRPO's code: 512 too
SPLITS = {"train": range(0, 50, 2), "heldout": range(1, 50, 2), "all": range(50)}
SPLIT_NAMES = {     # of the 50 official initial states of a task
    "train": "25 training initial states (even numbers)",
    "heldout": "25 held-out initial states (odd numbers)",
    "all": "all 50 initial states, trained and evaluated on alike: the papers' own protocol"}
SETTLE = 10             # no-op steps before the policy acts: objects drop from above the table
NO_OP = np.array([0, 0, 0, 0, 0, 0, -1.0])
SUBSTEPS = 25           # of 2 ms: 20 Hz control
CAMERA_SUBSTEP = 23     # the stock image shows the scene before it: robosuite's sampling clock


class Libero(Simulator):
    """Any task of a suite, seen as OpenVLA's data are: the agent's view, rotated by 180 degrees. An
    action of 1 is 5 cm or 0.5 rad. The simulator is built at the first reset, in whichever process
    that happens; the settling steps do not count.

    task: what reset starts if it is not told. options: SuiteOptions'; hard builds the simulator
    anew at each reset as the stock environment does, seconds slower, the same to the last bit
    (reset(options={"hard": True}): this time); fast: fewer triangles, cheaper antialiasing, no
    reflections, same physics. info, too: state, the official number."""
    largest = 1024

    def __init__(self, suite: str = "libero_object", task: int | str | None = None,
                 split: str = "train", size: int = 128, **options):
        self.options = SuiteOptions(**options)
        if self.options.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.options.protocol!r}: use "
                             f"{' or '.join(map(repr, PROTOCOLS))}")
        self.plus = files.find_plus(self.options.plus) if suite.startswith("libero_plus") else ""
        self.suite, self.tasks = suite, files.tasks(suite, self.plus)
        # LIBERO-Plus: one trial per task, whatever the split
        states = dict.fromkeys(SPLITS, range(1)) if self.plus else SPLITS
        super().__init__(suite, [t.instruction for t in self.tasks], states, split, size)
        if task is not None:
            self.fixed_task = task_number(task, suite, self.instructions)
        self.built = self.wrapper = self.renderer = None

    def begin(self, state: int, options: dict) -> None:
        self.state, task = state, self.tasks[self.task]
        self.horizon = self.options.horizon or PROTOCOLS[self.options.protocol][task.suite]
        states = files.initial_states(task.states)
        if self.built != task or options.get("hard", self.options.hard):
            self._build(task)
        if states.shape[1] != 1 + self.model.nq + self.model.nv or state >= len(states):
            raise ValueError(f"{task.states} is not this task's: initial states of shape "
                             f"{states.shape}; {files.ANEW}")
        # Fixtures (cabinet, stove) are placed by numpy's global generator, within a centimetre, in
        # every reset. Seeded by the state's number, an episode does not depend on those before it.
        # code: seeded once per task, so that it does.
        with seeded(state):
            placed(self.env.reset)
        for robot in self.env.robots:           # the one thing that a soft reset forgets
            robot.gripper.current_action = np.zeros_like(robot.gripper.current_action)
        self.wrapper.set_init_state(states[state])
        self._see()
        for _ in range(SETTLE):
            self.simulate(NO_OP)

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
        self.shown.qpos[:] = self.data.qpos
        self.glow = self.model.site_rgba.copy()                 # a stove's

    def simulate(self, action: np.ndarray) -> None:
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
        fixtures at the origin, the solver's first solutions there, a second for its renderer."""
        for fixture in self.env.fixtures_dict.values():
            body = self.model.body(fixture.root_body).id
            self.model.body_pos[body], self.model.body_quat[body] = 0, (1, 0, 0, 0)
        self.mujoco.mj_resetData(self.model, self.data)
        for _ in range(2):
            self.mujoco.mj_forward(self.model, self.data)

    def solved(self) -> bool:
        return bool(self.env._check_success())

    def render(self) -> np.ndarray:
        """uint8 (size, size, 3): the stock environment's `agentview_image` after the same actions,
        rotated by 180 degrees."""
        mujoco, model, shown = self.mujoco, self.model, self.shown
        if self.renderer is None:
            self.renderer = make_renderer(mujoco, model, self.pixels)
            self.view = mujoco.MjvOption()
            self.view.geomgroup[0] = 0                          # collision geometry
        for compute in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            compute(model, shown)
        now = model.site_rgba.copy()
        model.site_rgba[:] = self.glow
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
        try:
            with seeded([self.task, self.state, self.steps]):   # code: never seeded there
                spoiled = type(self.wrapper).step(wrapper, None)[0]["agentview_image"]
        except ValueError:                                      # its fog is 256 pixels wide
            raise ValueError(f"LIBERO-Plus's noise is for images of 256 pixels, not {self.size}"
                             ) from None
        return np.asarray(spoiled, np.uint8)[::-1, ::-1]

    def info(self) -> dict:
        return super().info() | {"state": self.state}

    def close(self) -> None:
        for part in filter(None, (self.renderer, self.wrapper)):
            part.close()
        self.built = self.wrapper = self.renderer = self.env = self.sim = None
        self.model = self.data = self.shown = None


@contextmanager
def seeded(seed):
    """numpy's global generator, for a moment; then it goes on as if nothing had been drawn."""
    held = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(held)


def placed(make: Callable):
    """make(), again where objects that are placed at random do not fit; the stock environment
    tries for ever, after any exception."""
    from robosuite.utils.errors import RandomizationError
    for _ in range(100):
        with suppress(RandomizationError):
            return make()
    raise RuntimeError("LIBERO cannot place the objects of this task: 100 attempts failed")


def thin_meshes(model, cell: float = 0.005) -> None:
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
    make = partial(Libero, name, **vars(options))
    env = make()
    if not env.tasks:
        raise ValueError(f"{name} has no tasks in this copy of LIBERO-Plus; choose another "
                         "dimension or suite")
    steps = options.horizon or max(PROTOCOLS[options.protocol][t.suite] for t in env.tasks)
    protocol = (f"horizon {steps}" + f" ({options.protocol})" * (not options.horizon)
                + f", {SETTLE} settling steps" + ", fast pixels" * options.fast
                + f", {files.mujoco_note() or 'MuJoCo ' + files.mujoco_version()}")
    asked = [task_number(task, name, env.instructions) for task in tasks or range(len(env.tasks))]
    chosen = tuple(number for number in asked if not env.tasks[number].own_assets)
    if lacking := len(asked) - len(chosen):
        told = f"{name}: {lacking} of {len(asked)} tasks need LIBERO-Plus's own assets"
        if not chosen:
            raise ValueError(f"{told}; put them into {files.find_package(env.plus)}/assets")
        print(f"note: {told}, and are left out", file=sys.stderr)
    kwargs = dict(horizon=options.horizon or None, by_task=True, protocol=protocol)
    if env.plus:
        return Suite(name, env.instructions, chosen, {"all": 1}, make,
                     {"all": "LIBERO-Plus, one trial per task"}, evaluated=("all",),
                     labels=tuple(t.suite for t in env.tasks), **kwargs)
    alike = len(set(env.instructions)) < len(env.tasks)
    labels = tuple(t.name.replace("_", " ") for t in env.tasks if alike)
    return Suite(name, env.instructions, chosen, {split: len(SPLITS[split]) for split in SPLITS},
                 make, SPLIT_NAMES, labels=labels, **kwargs)
