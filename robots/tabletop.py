"""The built-in simulator: a LIBERO-like tabletop in MuJoCo, a scripted expert.

1. `Tabletop`: a gripper on a gantry, two cubes, two plates, one camera. Suite tabletop: four tasks
   to put a cube on a plate; tabletop_long: four to put both. Each is named by an instruction, and
   has 50 training and 50 held-out initial states that never overlap.
2. `Expert`: the scripted demonstrator (reads the simulator's state, which no policy sees).
3. `suite`: the tasks as training and evaluation take them.

Left out: domain randomisation, proprioception and wrist camera (the paper's policy sees one
agent-view image and the instruction).

    python -m robots.tabletop               # env steps per second
"""
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from plumbing.flags import flag, require, script
from robots.simulator import Simulator, load_mujoco, make_renderer, task_number
from robots.suite import CHUNK, Suite, SuiteOptions

CUBES, PLATES = ("red", "blue"), ("green", "yellow")
# What lies where at the end, by task number
GOALS = {"tabletop": [{cube: plate} for cube in CUBES for plate in PLATES],
         "tabletop_long": [{"red": first, "blue": second} for first in PLATES
                           for second in PLATES]}
TASKS = {suite: tuple("put " + " and ".join(f"the {cube} cube on the {plate} plate"
                                            for cube, plate in goal.items()) for goal in goals)
         for suite, goals in GOALS.items()}
N_STATES = 50                   # initial states per task and split, as in LIBERO
# Env steps, at 20 Hz; the expert needs about 32 and 73
HORIZON = {"tabletop": 56, "tabletop_long": 104}
SUBSTEPS, TIMESTEP = 8, 0.00625  # 20 Hz control
STEP = 0.04                     # metres the hand's set point moves for an action of 1
SCALE = np.array([STEP] * 3 + [0.1] * 3)        # and turns, radians
SUCCESS_RADIUS = 0.05           # metres between the centres of cube and plate (its radius is 0.065)
LAYOUT = {"red": (0.08, -0.09), "blue": (0.08, 0.09),       # metres
          "green": (-0.08, -0.10), "yellow": (-0.08, 0.10)}
JITTER = 0.02                   # metres, uniform, per object and axis
HOME = (0.0, 0.0, 0.14)
LOW, HIGH = np.array([-0.2, -0.2, 0.005, *[-1.5] * 3]), np.array([0.2, 0.2, 0.2, *[1.5] * 3])
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


@cache
def initial_states(split: str) -> np.ndarray:
    """Jitter of every object in every initial state: (tasks, 50, 4 objects, 2) float64, metres. A
    function of the split alone."""
    rng = np.random.default_rng([2511, 15605, split == "heldout"])
    return rng.uniform(-JITTER, JITTER, (len(GOALS["tabletop"]), N_STATES, len(LAYOUT), 2))


@cache
def scene(process: int) -> tuple:
    """mujoco, its model, and what makes a renderer by size, once: one of each per process, shared
    by all its tables (contexts do not survive fork)."""
    mujoco = load_mujoco()
    model = mujoco.MjModel.from_xml_string(XML)
    return mujoco, model, cache(partial(make_renderer, mujoco, model))


class Tabletop(Simulator):
    """Pick a cube, put it on a plate; of tabletop_long, both cubes."""

    def __init__(self, split: str = "train", size: int = 64, horizon: int | None = None,
                 suite: str = "tabletop"):
        states = dict.fromkeys(("train", "heldout"), range(N_STATES))
        super().__init__(suite, TASKS[suite], states, split, size)
        self.mujoco, self.model, self.renderer = scene(os.getpid())
        self.data, self.horizon = self.mujoco.MjData(self.model), horizon or HORIZON[suite]
        self.body = {name: self.data.body(name) for name in ("hand", *LAYOUT)}      # views

    def begin(self, state: int, options: dict) -> None:
        data, self.pairs = self.data, GOALS[self.name][self.task]
        self.mujoco.mj_resetData(self.model, data)
        xy = np.array([*LAYOUT.values()]) + initial_states(self.used_split)[self.task, state]
        data.qpos[:14].reshape(2, 7)[:, :2] = xy[:2]      # of the cubes, which come first
        data.mocap_pos[:, :2] = xy[2:]                    # of the plates
        self.goal = np.array([*HOME, 0.0, 0.0, 0.0])      # set point of the hand: metres, radians
        data.ctrl[:] = [*self.goal, FINGER_OPEN, FINGER_OPEN]
        data.qpos[-len(data.ctrl):] = data.ctrl           # the hand's joints are the last
        self.mujoco.mj_forward(self.model, data)
        self.far = self.distances()
        self.best = [[0.0] * 3 for _ in self.pairs]

    def distances(self) -> list[tuple[float, float]]:
        """Metres from the hand to each cube, and from that to its plate."""
        at = {name: body.xpos.tolist() for name, body in self.body.items()}
        return [(math.dist(at["hand"], at[cube]), math.dist(at[cube], at[plate]))
                for cube, plate in self.pairs.items()]

    def note_progress(self) -> None:        # plain numbers: it runs at every env step
        for cube, best, now, far in zip(self.pairs, self.best, self.distances(), self.far):
            reach, place = (1 - x / x0 for x, x0 in zip(now, far))
            lift = (self.body[cube].xpos.item(2) - 0.02) / 0.05
            place *= lift > 0.3                         # pushed along the table it is no nearer
            best[:] = (max(b, min(x, 1.0)) for b, x in zip(best, (reach, lift, place)))

    @property
    def progress(self) -> float:
        """How far the episode came at best: the mean of reach, lift and place over its cubes, each
        0 .. 1; 1 for a success. No policy sees it: the oracle (--world_model oracle) does."""
        return 1.0 if self.success else float(np.mean(self.best))

    def simulate(self, action: np.ndarray) -> None:
        self.goal = np.minimum(np.maximum(self.goal + SCALE * action[:6], LOW), HIGH)
        self.data.ctrl[:6] = self.goal
        finger = self.data.ctrl[6] - FINGER_STEP * np.sign(action[6])
        self.data.ctrl[6:] = min(max(finger, 0), FINGER_OPEN)
        self.mujoco.mj_step(self.model, self.data, SUBSTEPS)
        self.note_progress()

    def solved(self) -> bool:
        """The fingers are open, and each cube lies still, on its plate."""
        at, (left, right) = self.body, self.data.qpos[-2:].tolist()
        return left + right > 0.055 and all(
            0.02 < at[cube].xpos[2] < 0.035
            and np.linalg.norm(at[cube].xpos[:2] - at[plate].xpos[:2]) <= SUCCESS_RADIUS
            and np.linalg.norm(at[cube].cvel[3:]) < 0.05 for cube, plate in self.pairs.items())

    def render(self, size: int | None = None) -> np.ndarray:
        """uint8 (size, size, 3) from the agent's camera; the policy's size if none is given."""
        renderer = self.renderer(size or self.size)
        renderer.update_scene(self.data, camera="agentview")
        return renderer.render()


def suite(name: str, tasks: tuple[int, ...], options: SuiteOptions) -> Suite:
    """The built-in tasks, or some of them by number. ValueError for any other name or number."""
    if name not in TASKS:
        raise ValueError(f"unknown suite {name!r}; there are {' and '.join(TASKS)}")
    texts = TASKS[name]
    chosen = tuple(task_number(task, name, texts) for task in tasks or range(len(texts)))
    return Suite(name, texts, chosen, {"train": N_STATES, "heldout": N_STATES},
                 partial(Tabletop, suite=name),
                 {"train": "training initial states", "heldout": "held-out initial states"},
                 HORIZON[name], tables=128, evaluated=("train", "heldout"), slow=False)


class Expert:
    """Scripted demonstrator of a table that was just reset. `error` (metres) is the standard
    deviation of a mistake it makes about where cube and plate are, for failures."""

    def __init__(self, env: Tabletop, error: float = 0.0, rng: np.random.Generator | None = None):
        things = [thing for pair in env.pairs.items() for thing in pair]
        wrong = error * (rng or np.random.default_rng()).standard_normal((len(things), 2))
        self.env, self.moves = env, self.plan(dict(zip(things, wrong)))

    def plan(self, mistakes: dict[str, np.ndarray]) -> Iterator[tuple]:
        """The moves, one per env step: set point of the hand (x, y, z), metres, and gripper.
        mistakes: what is added to where it believes a thing to be, (2,) metres."""
        env, pairs = self.env, self.env.pairs
        crowded = len(pairs) > len(set(pairs.values()))         # two cubes on one plate
        hand = env.data.body("hand").xpos                       # a view: it moves

        def at(thing: str) -> np.ndarray:
            return env.data.body(thing).xpos[:2] + there[thing]

        for i, (cube, plate) in enumerate(pairs.items()):
            beside = np.array([0.027 * (1 - 2 * i) * crowded, 0.0])
            there = {cube: mistakes[cube], plate: mistakes[plate] + beside}
            while hand[2] <= 0.07:                              # rise from the last plate
                yield (*hand[:2], 0.12), -1
            while np.linalg.norm(hand[:2] - at(cube)) >= 0.008:     # hover over the cube
                yield (*at(cube), 0.07), -1
            while hand[2] >= 0.014:                             # descend
                yield (*at(cube), 0.008), -1
            for _ in range(4):                                  # close
                yield env.goal[:3], 1
            while hand[2] <= 0.06:                              # lift
                yield (*hand[:2], 0.08), 1
            while np.linalg.norm(hand[:2] - at(plate)) >= 0.012:    # carry
                yield (*at(plate), 0.08), 1
            while hand[2] >= 0.028:                             # lower
                yield (*at(plate), 0.02), 1
            for grip in (1, -1, -1, -1):                        # rest, open
                yield env.goal[:3], grip
        while True:                                             # rise
            yield (*hand[:2], 0.12), -1

    def __call__(self) -> np.ndarray:
        """Next action, float64 (7,)."""
        action, (goal, action[6]) = np.zeros(7), next(self.moves)
        action[:3] = ((np.array(goal) - self.env.goal[:3]) / STEP).clip(-0.5, 0.5)
        return action


# Command

@dataclass
class Settings:
    steps: int = flag(480, "env steps of each measurement")


def measure_speed(s: Settings) -> None:
    require(s, dict(steps=1))
    env, rng = Tabletop(size=128), np.random.default_rng(0)
    for every, name in ((s.steps + 1, "no camera"), (CHUNK, f"a 128 px frame every {CHUNK} steps"),
                        (1, "a frame every step")):
        env.reset(options={"task": 0, "index": 0})
        began = time.perf_counter()
        for i in range(1, s.steps + 1):
            env.advance(rng.uniform(-1, 1, 7))
            if i % every == 0:
                env.render()
        speed = s.steps / (time.perf_counter() - began)
        print(f"{speed:7.0f} env steps per second on one core, {name}")


main = script(Settings, measure_speed, __doc__)
if __name__ == "__main__":
    sys.exit(main())
