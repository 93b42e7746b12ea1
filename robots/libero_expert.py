"""A scripted demonstrator for libero_object and libero_spatial, and the demonstrations it leaves:
supervised data without a download.

1. `Expert` reads the simulator's state, which no policy sees.
2. `collect`: noisy episodes, kept one by one, for studies/demonstrate.py.
3. `measure`: its success from every official initial state.
Left out: libero_goal, libero_10, libero_90, whose tasks have drawers, knobs and several goals.

    python -m robots.libero_expert measure --suite libero_object --out expert.jsonl
"""
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from plumbing.files import Journal
from plumbing.flags import flag, require, script
from robots import find_suite
from robots.libero import PROTOCOLS, SPLIT_NAMES, SPLITS, Libero
from robots.suite import SuiteOptions
from robots.trajectories import Trajectory, read_npz, save


class Move(NamedTuple):
    goal: np.ndarray            # (3,) metres, where the hand shall go
    grip: float = -1.0          # -1 opens, 1 closes
    gain: float = 12.0          # of the horizontal part
    free: float = 0.0           # how much noise is harmless
    turns: bool = False         # fingers across the grasp


class Expert:
    """Scripted demonstrator for `in basket` and `bowl on plate` tasks of a `Libero` that was just
    reset; a grasp that slips is tried again elsewhere (`attempt` counts). `noise`: standard
    deviation of what is added to the arm's actions while nothing is near. It changes slowly and
    comes in bursts, so that the hand is centimetres off for a while and the data show the way
    back; noise drawn anew at each step averages out before the arm has moved."""

    def __init__(self, env: Libero, noise: float = 0.0, rng: np.random.Generator | None = None):
        goal = env.env.parsed_problem["goal_state"]
        if len(goal) != 1 or goal[0][0] not in ("in", "on") or not any(
                place in goal[0][2] for place in ("basket", "plate")):
            raise ValueError("the expert plays libero_object and libero_spatial; it does not know "
                             f"how to {env.instruction}")
        relation, self.item, place = goal[0]
        self.env, self.noise, self.drift = env, noise, np.zeros(4)
        self.rng, self.into = rng or np.random.default_rng(), relation == "in"
        self.body = env.env.obj_body_id[self.item]
        self.target_body = env.env.obj_body_id[place.removesuffix("_contain_region")]
        self.attempt, self.moves = 0, self.plan()
        self.sides = sorted((np.pi / 2, -np.pi / 2, np.pi, 0), key=self.crowded)

    def __call__(self) -> np.ndarray:
        """Next action, float64 (7,); `intended` is the same without the noise."""
        data = self.env.data
        self.hand = data.site_xpos[self.env.env.robots[0].eef_site_id]
        self.at, self.target = data.xpos[self.body], data.xpos[self.target_body]
        self.point, direction = self.grasp()
        gap = data.body("gripper0_leftfinger").xpos - data.body("gripper0_rightfinger").xpos
        turn = direction - np.arctan2(gap[1], gap[0])
        self.turn = (turn + np.pi / 2) % np.pi - np.pi / 2      # fingers may be swapped
        self.off = np.linalg.norm(self.hand[:2] - self.point[:2])
        move, action = next(self.moves), np.zeros(7)
        action[:3] = (move.goal - self.hand) * [move.gain, move.gain, 12.0]
        action[5] = np.clip(2 * self.turn, -0.5, 0.5) * move.turns
        action[6] = move.grip
        self.intended = action.clip(-1, 1)
        fresh = self.noise * 0.19 ** 0.5 * self.rng.standard_normal(4)
        self.drift = 0.9 * self.drift + fresh                   # standard deviation: noise
        burst = move.free * (self.env.steps % 30 < 15)
        action[[0, 1, 2, 5]] += self.drift * [1, 1, 1, 0.3] * burst
        return action.clip(-1, 1)

    def plan(self) -> Iterator[Move]:
        """One move per env step; begun again where it failed. A new attempt is counted with the
        last move of the old one, so that the next call aims anew."""
        while True:
            if (yield from self.pick()):
                yield from self.place()

    def pick(self) -> Iterator[Move]:
        """Hover over the grasp, descend, close; False if something was in the way."""
        while self.off >= 0.008 or abs(self.turn) >= 0.1:                       # hover
            yield Move(self.point + [0, 0, 0.12 if self.into else 0.10], free=1.0, turns=True)
        before = math.inf
        for left in itertools.count(59, -1):                                    # descend
            above, stopped = self.hand[2] - self.point[2], abs(self.hand[2] - before) < 0.001
            goal, before = self.point - [0, 0, 0.02], self.hand[2]
            move = Move(goal, gain=18.0, turns=True,
                        free=1.0 if above > 0.05 else 0.5 if above > 0.015 else 0.0)
            if above > 0.015 and self.off > 0.01:               # first over it, then down
                goal[2] = max(self.hand[2] - 0.005, self.point[2])
            elif above < 0.004 or stopped and above < 0.03 or left < 0:
                break
            elif left < 20 and above > 0.03:                    # something is in the way
                self.attempt += 1
                yield move
                return False
            yield move
        for left in range(8):                                                   # close
            yield Move(self.hand, 1.0, free=0.0 if left else move.free)
        return True

    def place(self) -> Iterator[Move]:
        """Lift, carry over the target, lower, open, rise; ends where the item slips out."""
        offset, low = self.hand - self.at, 0.10 if self.into else 0.02
        height = self.target[2] + 0.26 if self.into else max(self.at[2], self.target[2]) + 0.2
        for _ in range(40):                                                     # lift
            if self.hand[2] > height - 0.02:
                break
            yield Move(np.array([*self.hand[:2], height]), 1.0, free=1.0)
        lost = Move(np.array([*self.hand[:2], height]), 1.0, free=1.0, turns=True)
        for _ in range(60):                                                     # carry
            if self.slipped(offset):
                return (yield lost)
            goal = np.array([*(self.target + offset)[:2], height])
            if np.linalg.norm(self.hand[:2] - goal[:2]) < 0.015:
                break
            yield Move(goal, 1.0, free=1.0)
            lost = Move(self.hand, turns=True)
        for lowered in range(41):                                               # lower
            if self.slipped(offset):
                return (yield Move(self.hand, turns=True))
            goal = self.target + offset + [0, 0, low]
            if lowered == 40 or self.hand[2] < goal[2] + 0.01:
                break
            yield Move(goal, 1.0, free=float(not lowered))
        for left in range(8):                                                   # open
            yield Move(self.hand, -1.0 if left else 1.0, free=float(not (left or lowered)))
        for left in range(30, -1, -1):                                          # rise
            self.attempt += not left
            yield Move(self.hand + [0, 0, 0.05], turns=not left)

    def slipped(self, offset: np.ndarray) -> bool:
        slipped = bool(np.linalg.norm(self.hand - self.at - offset) > 0.05)
        self.attempt += slipped
        return slipped

    def crowded(self, side: float) -> float:
        """How little room the outer finger has at this side of the bowl: metres by which its
        neighbours stick up; far out the arm jams."""
        env, centre = self.env, self.env.data.xpos[self.body]
        out = np.array([np.cos(side), np.sin(side), 0])
        groups, hit = np.array([1, 0, 0, 0, 0, 0], np.uint8), np.zeros(1, np.int32)
        drops = [env.mujoco.mj_ray(env.model, env.data, centre + reach * out + [0, 0, 0.3],
                                   np.array([0, 0, -1.0]), groups, 1, self.body, hit)
                 for reach in np.arange(0.055, 0.12, 0.003)]
        return round(max(0.3 - min(drops), 0), 2) + 0.01 * (centre[0] + 0.045 * out[0] > 0.1)

    def grasp(self) -> tuple[np.ndarray, float]:
        """Where to put the fingers (3,), metres, and the direction in which they close, radians."""
        model, data, centre = self.env.model, self.env.data, self.env.data.xpos[self.body]
        if not self.into:                       # the rim of the bowl, 4.5 cm from its centre
            angle = self.sides[self.attempt % 4]
            return centre + [0.045 * np.cos(angle), 0.045 * np.sin(angle), 0.018], angle
        turn, corners = data.xmat[self.body].reshape(3, 3), []
        signs = np.stack(np.meshgrid(*[(-1, 1)] * 3), -1).reshape(-1, 3)
        for name in self.env.env.get_object(self.item).contact_geoms:
            geom = model.geom(name).id
            local = model.geom_aabb[geom, :3] + model.geom_aabb[geom, 3:] * signs
            world = data.geom_xpos[geom] + local @ data.geom_xmat[geom].reshape(3, 3).T
            corners.append((world - centre) @ turn)
        low, high = np.min(np.vstack(corners), 0), np.max(np.vstack(corners), 0)
        up = np.argmax(np.abs(turn[2]))
        short, long = sorted({0, 1, 2} - {up}, key=lambda axis: high[axis] - low[axis])
        slide = 0.025 * (0, 1, -1, 0.5)[self.attempt % 4]
        point = centre + turn @ ((low + high) / 2) + turn[:, long] * slide
        point[2] += 0.02 * (high[up] - low[up] > 0.09)
        return point, np.arctan2(turn[1, short], turn[0, short])


# Data

def demonstrate(env: Libero, start: dict, noise: float = 0.0, seed: int = 0,
                every: int = 0) -> tuple[Expert, list, list]:
    """One episode -> the expert, images uint8 (size, size, 3) before every `every`-th action (0:
    none), and the actions (7,) without the noise that the environment took them with."""
    env.reset(options=start | {"image": False})
    expert, ended = Expert(env, noise, np.random.default_rng([seed, *start.values()])), False
    images, intended = [], []
    while not ended:
        if every and len(intended) % every == 0:
            images.append(env.render())
        action = expert()
        intended.append(expert.intended)
        ended = env.advance(action)
    return expert, images, intended


def collect(env: Libero, tasks: Sequence[int], per_task: int, folder: Path, every: int,
            noise: float = 0.3) -> list[Trajectory]:
    """`per_task` clean successes (no second grasp) of each task from the environment's split.
    `folder` has a file for each attempt, which is not played again: an interrupted command goes on,
    and a second process waits and finds them there. RuntimeError where the expert hardly succeeds,
    ValueError for a damaged file."""
    kept: list[Trajectory] = []
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for number, task in enumerate(tasks, 1):
            for attempt in range(20 + 5 * per_task):
                if len(kept) < number * per_task:
                    file = folder / f"{task}-{attempt}.npz"
                    if not file.exists():
                        attempt_once(env, task, attempt, file, every, noise)
                    try:
                        episode = read_npz(file)
                    except ValueError as error:
                        raise ValueError(f"{file} is damaged ({error}); delete it to have it "
                                         "played again") from None
                    kept += [episode] * episode.success
            if len(kept) < number * per_task:
                raise RuntimeError(f"the expert succeeds too rarely at task {task}; leave it out "
                                   "of --tasks, or make the noise smaller")
    return kept


def attempt_once(env: Libero, task: int, attempt: int, file: Path, every: int,
                 noise: float) -> None:
    """An episode -> its file, as a success only if it is a clean one."""
    start = {"task": task, "index": attempt % len(env.states_of(env.split)), "attempt": attempt}
    expert, images, intended = demonstrate(env, start, noise, every=every)
    clean = env.success and not expert.attempt
    save(file, Trajectory(env.instruction, clean, np.array(images), np.float32(intended), every))
    print(f"task {task}, initial state {env.state}: {'kept' if clean else 'dropped'} after "
          f"{env.steps} steps", flush=True)


# Command

@dataclass
class Settings:
    suite: str = flag("libero_object", "whose tasks", choices=["libero_object", "libero_spatial"])
    tasks: list[int] = flag([], "task numbers (all if none is given)")
    split: str = flag("all", "; ".join(SPLIT_NAMES.values()), choices=list(SPLITS))
    protocol: str = flag("openvla-oft", "whose horizons", choices=list(PROTOCOLS))
    assets: str = flag("", "folder of LIBERO's assets (LIBERO_ASSETS, else from the hub)")
    noise: float = flag(0.0, "of the expert, for diversity")
    seed: int = flag(0, "of the noise")
    states: int = flag(50, "initial states per task, at most")
    out: str = flag("expert.jsonl", "a line for each episode")


def measure(s: Settings) -> None:
    """The expert once from every initial state of the split -> s.out, a journal."""
    require(s, dict(states=1, seed=0, noise=0))
    chosen = find_suite(s.suite, tuple(s.tasks), SuiteOptions(protocol=s.protocol, assets=s.assets))
    env, tasks = chosen.make(split=s.split), chosen.tasks
    env.reset(options={"task": tasks[0], "index": 0, "image": False})   # fails before it writes
    free = ("tasks", "states", "assets", "out")
    journal = Journal(s.out, {k: v for k, v in vars(s).items() if k not in free},
                      keep=lambda row: {"task", "state", "success", "steps"} <= row.keys())
    rows = {(row["task"], row["state"]): row for row in journal.rows}
    for task in tasks:
        states = env.states_of(s.split)[:s.states]
        for index, state in enumerate(states):
            if (task, state) not in rows:
                expert = demonstrate(env, {"task": task, "index": index}, s.noise, s.seed)[0]
                rows[task, state] = {"task": task, "state": state, "success": env.success,
                                     "steps": env.steps, "grasps": expert.attempt + 1}
                journal.add(rows[task, state])
        own = [rows[task, state] for state in states]
        failed = [row["state"] for row in own if not row["success"]]
        steps = np.mean([row["steps"] for row in own])
        print(f"{len(own) - len(failed):3d}/{len(own)}  {steps:4.0f} steps  "
              f"{env.instructions[task]}; failed from {failed}", flush=True)
    print(f"{sum(row['success'] for row in rows.values())}/{len(rows)}, the first {s.states} of "
          f"{SPLIT_NAMES[s.split]}, {s.protocol}; wrote {s.out}")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return script(Settings, measure, "[measure] " + __doc__)(argv[argv[:1] == ["measure"]:])


if __name__ == "__main__":
    sys.exit(main())
