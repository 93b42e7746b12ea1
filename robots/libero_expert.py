"""A scripted demonstrator for libero_object and libero_spatial, and the demonstrations it leaves: supervised data without a download.

What is here
1. `Expert`: reads the simulator's state, which no policy sees, and plays `in basket` and `bowl on plate` tasks.
2. `demonstrate` and `demos`: noisy episodes saved as image, instruction and action, with the action statistics of a checkpoint.
3. `measure`: its success from every official initial state.

Left out on purpose: libero_goal, libero_10 and libero_90, whose tasks have drawers, knobs and several goals; use LIBERO's own
demonstrations there.

    python -m robots.libero_expert measure --suite libero_object --out expert.json
    python -m robots.libero_expert demos --suite libero_object --tasks 0 1 2 --per-task 10 --out demos.npz
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from robots.libero import PROTOCOLS, SPLIT_NAMES, SPLITS, Libero


class Expert:
    """Scripted demonstrator for `in basket` and `bowl on plate` tasks of a `Libero` that was just reset: hover, descend, close, lift, carry,
    lower, open; a grasp that slips is tried again elsewhere. It reads the simulator's state. `noise`: standard deviation of what is added to
    the arm's actions while nothing is near. It changes slowly and comes in bursts, so that the hand is centimetres off for a while and the
    data show the way back; noise drawn anew at each step averages out before the arm has moved.
    """

    def __init__(self, env: Libero, noise: float = 0.0, rng: np.random.Generator | None = None):
        goal = env.env.parsed_problem["goal_state"]
        if len(goal) != 1 or goal[0][0] not in ("in", "on") or "basket" not in goal[0][2] and "plate" not in goal[0][2]:
            raise ValueError(f"the expert plays libero_object and libero_spatial; it does not know how to {env.instruction}")
        self.env, self.noise, self.rng, self.drift = env, noise, rng or np.random.default_rng(), np.zeros(4)
        self.item, self.into = goal[0][1], goal[0][0] == "in"
        self.target = env.env.obj_body_id[goal[0][2].removesuffix("_contain_region")]
        self.body, self.phase, self.wait, self.attempt, self.height = env.env.obj_body_id[self.item], 0, 0, 0, 0.0
        self.sides = sorted((np.pi / 2, -np.pi / 2, np.pi, 0), key=self.crowded)

    def crowded(self, side: float) -> float:
        """How little room the outer finger has at this side of the bowl: metres by which its neighbours stick up; far out the arm jams."""
        env, centre, out = self.env, self.env.data.xpos[self.body], np.array([np.cos(side), np.sin(side), 0])
        drops = [env.mujoco.mj_ray(env.model, env.data, centre + reach * out + [0, 0, 0.3], np.array([0, 0, -1.0]),
                                   np.array([1, 0, 0, 0, 0, 0], np.uint8), 1, self.body, np.zeros(1, np.int32))
                 for reach in np.arange(0.055, 0.12, 0.003)]
        return round(max(0.3 - min(drops), 0), 2) + 0.01 * (centre[0] + 0.045 * out[0] > 0.1)

    def grasp(self) -> tuple[np.ndarray, float]:
        """Where to put the fingers (3,), metres, and the direction in which they close, radians."""
        model, data = self.env.model, self.env.data
        if not self.into:                                       # the rim of the bowl, 4.5 cm from its centre
            angle = self.sides[self.attempt % 4]
            return data.xpos[self.body] + [0.045 * np.cos(angle), 0.045 * np.sin(angle), 0.018], angle
        turn = data.xmat[self.body].reshape(3, 3)
        corners = []
        for name in self.env.env.get_object(self.item).contact_geoms:
            geom = model.geom(name).id
            local = model.geom_aabb[geom, :3] + model.geom_aabb[geom, 3:] * np.stack(np.meshgrid(*[(-1, 1)] * 3), -1).reshape(-1, 3)
            corners.append((data.geom_xpos[geom] + local @ data.geom_xmat[geom].reshape(3, 3).T - data.xpos[self.body]) @ turn)
        low, high = np.min(np.vstack(corners), 0), np.max(np.vstack(corners), 0)
        up = np.argmax(np.abs(turn[2]))
        short, long = sorted((axis for axis in range(3) if axis != up), key=lambda axis: high[axis] - low[axis])
        point = data.xpos[self.body] + turn @ ((low + high) / 2) + turn[:, long] * 0.025 * (0, 1, -1, 0.5)[self.attempt % 4]
        point[2] += 0.02 * (high[up] - low[up] > 0.09)
        return point, np.arctan2(turn[1, short], turn[0, short])

    def __call__(self) -> np.ndarray:
        """Next action, float64 (7,); `intended` is the same without the noise."""
        env, data = self.env, self.env.data
        hand, item, target = data.site_xpos[env.env.robots[0].eef_site_id], data.xpos[self.body], data.xpos[self.target]
        point, direction = self.grasp()
        gap = data.body("gripper0_leftfinger").xpos - data.body("gripper0_rightfinger").xpos
        turn = (direction - np.arctan2(gap[1], gap[0]) + np.pi / 2) % np.pi - np.pi / 2     # fingers may be swapped
        goal, grip, gain, free = hand.copy(), -1.0, 12.0, False
        if self.phase == 0:                                     # hover
            goal, free = point + [0, 0, 0.12 if self.into else 0.10], True
            if np.linalg.norm(hand[:2] - point[:2]) < 0.008 and abs(turn) < 0.1:
                self.phase, self.wait = 1, 60
        if self.phase == 1:                                     # descend
            above, self.wait = hand[2] - point[2], self.wait - 1
            stopped, self.height = abs(hand[2] - self.height) < 0.001, hand[2]
            goal, gain, free = point - [0, 0, 0.02], 18.0, 1.0 if above > 0.05 else 0.5 if above > 0.015 else 0.0
            if above > 0.015 and np.linalg.norm(hand[:2] - point[:2]) > 0.01:       # first over it, then down
                goal[2] = max(hand[2] - 0.005, point[2])
            elif above < 0.004 or stopped and above < 0.03 or self.wait < 0:
                self.phase, self.wait = 2, 8
            elif self.wait < 20 and above > 0.03:               # something is in the way
                self.phase, self.attempt = 0, self.attempt + 1
        if self.phase == 2:                                     # close
            goal, grip, self.wait = hand, 1.0, self.wait - 1
            if self.wait < 0:
                self.phase, self.offset, self.wait = 3, hand - item, 40
                self.height = target[2] + 0.26 if self.into else max(item[2], target[2]) + 0.2
        if self.phase == 3:                                     # lift
            goal, grip, free, self.wait = np.array([*hand[:2], self.height]), 1.0, True, self.wait - 1
            if hand[2] > self.height - 0.02 or self.wait < 0:
                self.phase, self.wait = 4, 60
        if self.phase in (4, 5) and np.linalg.norm(hand - item - self.offset) > 0.05:        # it slipped out
            self.phase, self.attempt = 0, self.attempt + 1
        if self.phase == 4:                                     # carry
            goal, grip, free, self.wait = np.array([*(target + self.offset)[:2], self.height]), 1.0, True, self.wait - 1
            if np.linalg.norm(hand[:2] - goal[:2]) < 0.015 or self.wait < 0:
                self.phase, self.wait = 5, 40
        if self.phase == 5:                                     # lower
            goal, grip, self.wait = target + self.offset + [0, 0, 0.10 if self.into else 0.02], 1.0, self.wait - 1
            if hand[2] < goal[2] + 0.01 or self.wait < 0:
                self.phase, self.wait = 6, 8
        if self.phase == 6:                                     # open
            goal, self.wait = hand, self.wait - 1
            if self.wait < 0:
                self.phase, self.wait = 7, 30
        if self.phase == 7:                                     # rise, and begin again if that was not it
            goal, self.wait = hand + [0, 0, 0.05], self.wait - 1
            if self.wait < 0:
                self.phase, self.attempt = 0, self.attempt + 1
        action = np.zeros(7)
        action[:3] = (goal - hand) * [gain, gain, 12.0]
        action[5] = np.clip(2 * turn, -0.5, 0.5) * (self.phase < 2)
        action[6] = grip
        self.intended = action.clip(-1, 1)
        self.drift = 0.9 * self.drift + self.noise * 0.19 ** 0.5 * self.rng.standard_normal(4)      # standard deviation: noise
        action[[0, 1, 2, 5]] += self.drift * [1, 1, 1, 0.3] * free * (self.env.steps % 30 < 15)
        return action.clip(-1, 1)


# Data

def dataset_statistics(actions: np.ndarray, key: str, episodes: int) -> dict:
    """Env actions (S, 7) -> {key: {"action": ...}}, the layout of a checkpoint's dataset_statistics.json: the gripper there is 1 open,
    0 closed and masked out of the normalisation."""
    actions = np.concatenate([actions[:, :6], (1 - actions[:, 6:]) / 2], 1).astype(np.float64)
    parts = {"mean": actions.mean(0), "std": actions.std(0), "max": actions.max(0), "min": actions.min(0),
             "q01": np.quantile(actions, 0.01, 0), "q99": np.quantile(actions, 0.99, 0)}
    return {key: {"action": {name: part.tolist() for name, part in parts.items()} | {"mask": [True] * 6 + [False]},
                  "num_transitions": len(actions), "num_trajectories": episodes}}


def write_whole(path: Path, content) -> None:
    """A dict as JSON, or a dict of arrays as npz, by the suffix. An interrupted run leaves the old file or the new one, never half of it."""
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "wb") as file:
        np.savez_compressed(file, **content) if path.suffix == ".npz" else file.write(json.dumps(content, indent=1).encode())
    os.replace(draft, path)


def demonstrate(env: Libero, start: dict, noise: float = 0.0, seed: int = 0, every: int = 0) -> tuple[Expert, dict[str, np.ndarray]]:
    """One episode -> the expert, and its arrays: images uint8 (F, size, size, 3) before every `every`-th action (0: none), actions float32
    (S, 7) as the environment took them, intended float32 (S, 7): the same without the noise, task, state."""
    env.reset(options=start | {"image": False})
    expert, ended = Expert(env, noise, np.random.default_rng([seed, *start.values()])), False
    images, actions, intended = [], [], []
    while not ended:
        if every and len(actions) % every == 0:
            images.append(env.render())
        actions.append(expert())
        intended.append(expert.intended)
        ended = env.advance(actions[-1])
    return expert, {"images": np.array(images), "actions": np.array(actions, np.float32), "intended": np.array(intended, np.float32),
                    "task": np.array(env.task), "state": np.array(env.state)}


def collect(env: Libero, tasks: list[int], per_task: int, folder: Path, noise: float = 0.3, seed: int = 0,
            every: int = 1) -> list[dict[str, np.ndarray]]:
    """`per_task` clean successes (no second grasp) of each task from the environment's split -> episodes as from `demonstrate`. One file per
    attempt in `folder`: what is there already is not played again. RuntimeError where the expert hardly ever succeeds."""
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[dict] = []
    for number, task in enumerate(tasks, 1):
        for attempt in itertools.count():
            if len(kept) == number * per_task:
                break
            if attempt == 20 + 5 * per_task:
                raise RuntimeError(f"the expert succeeds too rarely at task {task}; leave it out of --tasks, or make the noise smaller")
            part = folder / f"{task}-{attempt}.npz"
            if not part.exists():
                start = {"task": task, "index": attempt % len(env.states_of(env.split)), "attempt": attempt}
                expert, episode = demonstrate(env, start, noise, seed, every)
                clean = env.success and not expert.attempt
                write_whole(part, episode if clean else {})
                print(f"task {task}, initial state {env.state}: {'kept' if clean else 'dropped'} after {env.steps} steps", flush=True)
            with np.load(part) as episode:
                kept += [dict(episode)] if "actions" in episode else []
    return kept


# Commands

def demos(env: Libero, args) -> None:
    """Demonstrations with noise in hover, lift and carry, saved as a dataset -> args.out, an npz:
    images uint8 (F, size, size, 3): what was seen before every `--every`-th action; actions, intended float32 (S, 7), with and without the
    noise; frames, starts int64 (E + 1,): episode e is images[frames[e]:frames[e + 1]] and actions[starts[e]:starts[e + 1]]; task, state
    int64 (E,); instructions (tasks,). Action statistics are written beside, as OUT.dataset_statistics.json."""
    out = Path(args.out)
    if out.exists() or out.suffix != ".npz":
        raise ValueError(f"--out {out} " + ("exists; choose another, or delete it" if out.exists() else "must end in .npz"))
    settings = json.dumps({k: getattr(args, k) for k in ("suite", "size", "split", "every", "noise", "fast", "seed", "protocol")})
    parts = Path(f"{out}.{hashlib.sha256(settings.encode()).hexdigest()[:8]}.parts")    # an interrupted run goes on from them
    kept = collect(env, args.tasks, args.per_task, parts, args.noise, args.seed, args.every)
    joined = {k: np.concatenate([episode[k] for episode in kept]) for k in ("images", "actions", "intended")}
    frames, starts = (np.cumsum([0] + [len(episode[k]) for episode in kept]) for k in ("images", "actions"))
    write_whole(Path(f"{out}.dataset_statistics.json"), dataset_statistics(joined["actions"], f"{args.suite}_no_noops", len(kept)))
    write_whole(out, joined | {"frames": frames, "starts": starts, "instructions": [t.instruction for t in env.tasks]}
                | {k: np.stack([episode[k] for episode in kept]) for k in ("task", "state")})
    shutil.rmtree(parts)
    print(f"wrote {out}, {len(kept)} episodes, {starts[-1]} actions, {frames[-1]} images, and {out}.dataset_statistics.json")


def measure(env: Libero, args) -> None:
    """The expert once from every initial state of the split -> args.out, JSON; a second run goes on where the first stopped."""
    out, settings = Path(args.out), {k: getattr(args, k) for k in ("suite", "split", "noise", "seed", "protocol")}
    try:
        result = json.loads(out.read_text()) if out.exists() else {"settings": settings, "episodes": []}
    except ValueError as error:
        raise ValueError(f"{out} is not JSON ({error}); delete it, or choose another --out") from None
    if not isinstance(result, dict) or not isinstance(result.get("episodes"), list):
        raise ValueError(f"{out} is not what this command writes; choose another --out")
    if result.get("settings") != settings:
        raise ValueError(f"{out} was begun with {result.get('settings')}; repeat these settings, or choose another --out")
    for task in args.tasks:
        for index, state in enumerate(env.states_of(args.split)[:args.states]):
            if not any((e["task"], e["state"]) == (task, state) for e in result["episodes"]):
                expert, _ = demonstrate(env, {"task": task, "index": index}, args.noise, args.seed)
                result["episodes"].append({"task": task, "state": state, "success": env.success, "steps": env.steps,
                                           "grasps": expert.attempt + 1})
                write_whole(out, result)
        own = [e for e in result["episodes"] if e["task"] == task]
        print(f"{sum(e['success'] for e in own):3d}/{len(own)}  {np.mean([e['steps'] for e in own]):4.0f} steps  "
              f"{env.tasks[task].instruction}; failed from {[e['state'] for e in own if not e['success']]}", flush=True)
    print(f"{sum(e['success'] for e in result['episodes'])}/{len(result['episodes'])}, the first {args.states} of {SPLIT_NAMES[args.split]}, "
          f"{args.protocol}; wrote {out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="LIBERO's scripted expert: success, demonstrations", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (measure, demos):
        p = commands.add_parser(run.__name__, help=run.__doc__.split(" -> ")[0].split("\n")[0], allow_abbrev=False)
        p.set_defaults(run=run)
        add = p.add_argument
        add("--suite", default="libero_object", choices=["libero_object", "libero_spatial"])
        add("--tasks", type=int, nargs="+", help="task numbers (default: all)")
        add("--split", default="all" if run is measure else "train", choices=list(SPLITS), help="; ".join(SPLIT_NAMES.values()))
        add("--protocol", default="openvla-oft", choices=list(PROTOCOLS), help="whose horizons")
        add("--assets", default="", help="folder of LIBERO's assets (default: LIBERO_ASSETS, else from the hub)")
        add("--seed", type=int, default=0, help="of the expert's noise")
        add("--noise", type=float, default=0.0 if run is measure else 0.3, help="of the expert, for diversity")
        add("--out", default="expert.json" if run is measure else "demos.npz", help="file to write")
        if run is measure:
            add("--states", type=int, default=50, help="initial states per task, at most")
        else:
            add("--per-task", type=int, default=10, help="episodes to keep per task")
            add("--every", type=int, default=1, help="an image before every so many actions")
            add("--size", type=int, default=128, help="pixels")
            add("--fast-sim", dest="fast", action="store_true", help="other pixels, same physics, faster")
    try:
        for each in (parser, *commands.choices.values()):
            each.error = lambda message: (_ for _ in ()).throw(ValueError(message))
        args = parser.parse_args(argv)
        for name in {"per_task", "every", "states"} & set(vars(args)):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
        if not 0 <= args.noise < math.inf:
            raise ValueError(f"--noise must be 0 or more and finite, got {args.noise}")
        if args.run is measure and not Path(args.out).absolute().parent.is_dir():
            raise ValueError(f"--out {args.out}: there is no such folder; make it, or choose another")
        if len(set(args.tasks or ())) < len(args.tasks or ()):
            raise ValueError(f"--tasks {' '.join(map(str, args.tasks))}: each once")
        env = Libero(args.suite, split=args.split, size=getattr(args, "size", 128), protocol=args.protocol, fast=getattr(args, "fast", False),
                     assets=args.assets)
        args.tasks = [env.task_id(task) for task in args.tasks or range(len(env.tasks))]
        args.run(env, args)
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last episode", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
