"""The small policy's supervised fine-tuning: a scripted expert's demonstrations, and a TinyVLA that
imitates them.

SRPO-VLA (arXiv 2511.15605) starts from policies fine-tuned on one demonstration a task; a policy of
0.4 M parameters from random weights needs a few more. Left out: fine-tuning OpenVLA-OFT; the
published checkpoints are that.

    python -m studies.demonstrate --threads 1 --out out/tiny_vla        # weights/tiny_vla
    python -m studies.demonstrate --suite libero_object --tasks 0 1 2 --fast_sim --size 128 \\
        --crop 8 8 96 --demos 20 --steps 2000 --out out/libero_sft
"""
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.flags import flag, require, script
from robots import find_suite
from robots.suite import CHUNK, SuiteOptions
from robots.trajectories import Trajectory, save

STILL = [0.0, 0, 0, 0, 0, 0, -1]        # after success: no motion, an open gripper


@dataclass
class Settings:
    suite: str = flag("tabletop", "those there is an expert for",
                      choices=["tabletop", "tabletop_long", "libero_object", "libero_spatial"])
    tasks: list[int] = flag([], "LIBERO: task numbers (all if none is given)")
    fast_sim: bool = flag(False, "LIBERO: other pixels, same physics, faster")
    assets: str = flag("", "LIBERO: folder of its assets (LIBERO_ASSETS, else the package's, "
                           "else from the hub)")
    demos: int = flag(5, "demonstrations per task, from its training initial states")
    split: str = flag("disjoint", "LIBERO; disjoint: from half of the initial states; all: from "
                                  "all 50", choices=["disjoint", "all"])
    size: int = flag(64, "LIBERO: pixels of the camera images")
    crop: list[int] = flag([], "LIBERO: top, left and side of the square that the policy looks at")
    steps: int = flag(400, "updates of 64 chunks")
    lr: float = flag(2e-3, "learning rate, cosine")
    seed: int = flag(0, "of weights and batches")
    threads: int = flag(2, "torch threads; 0: all cores")
    record: str = flag("", "folder that gets the demonstrations, robots/trajectories.py")
    out: str = flag("", "new folder for the policy")


def tabletop_episodes(per_task: int, noise: float = 0.1, seed: int = 0,
                      suite: str = "tabletop") -> Iterator[Trajectory]:
    """The scripted expert on the first training initial states, an image at every step. Noise
    disturbs what is executed, the actions stay clean, so the policy also sees how to come back from
    small errors."""
    from robots.tabletop import N_STATES, Expert, Tabletop
    env, rng = Tabletop(suite=suite), np.random.default_rng(seed)
    for task in range(len(env.instructions)):
        for index in range(per_task):
            images = [env.reset(options={"task": task, "index": index % N_STATES})[0]["image"]]
            expert, actions, ended = Expert(env), [], False
            while not ended:
                actions.append(expert())
                disturbed = actions[-1] + noise * np.array([*rng.standard_normal(3), 0, 0, 0, 0])
                ended = env.advance(disturbed.clip(-1, 1))
                images.append(env.render())
            yield Trajectory(env.instruction, env.success, np.stack(images[:-1]),
                             np.stack(actions), every=1)


def libero_episodes(s: Settings, tasks: Sequence[int], every: int = 2) -> Iterator[Trajectory]:
    """The same of LIBERO's scripted expert, an image every `every` steps. Episodes are kept in
    cache/demos and never played twice."""
    from robots.libero import Libero
    from robots.libero_expert import collect
    split = "train" if s.split == "disjoint" else "all"
    env = Libero(s.suite, split=split, size=s.size, fast=s.fast_sim, assets=s.assets)
    name = f"{s.suite}/{split}-{s.size}px{'-fast' * s.fast_sim}-every{every}"
    yield from collect(env, tasks, s.demos, Path("cache/demos") / name, every)
    env.close()


def recorded(episodes: Iterable[Trajectory], folder: str) -> Iterator[Trajectory]:
    """Passes them on; each becomes a file of the folder, if one is named."""
    for number, episode in enumerate(episodes):
        if folder:
            save(Path(folder) / f"{number:04d}.npz", episode)
        yield episode


def demonstrations(episodes: Iterable[Trajectory],
                   instructions: Sequence[str]) -> dict[str, np.ndarray]:
    """What is seen and the next 8 actions, a row for each image: {"image": uint8 (N, S, S, 3),
    "task": int64 (N,), "actions": float64 (N, 8, 7) in LIBERO's convention}."""
    data = {"image": [], "task": [], "actions": []}
    for e in episodes:
        padded = np.concatenate([e.actions, [STILL] * CHUNK])
        data["image"] += list(e.images)
        data["task"] += [instructions.index(e.instruction)] * len(e.images)
        data["actions"] += [padded[t * e.every:][:CHUNK] for t in range(len(e.images))]
    return {name: np.stack(rows) for name, rows in data.items()}


def fine_tune(data: dict, s: Settings, key: str, instructions: tuple[str, ...], **noted):
    """A TinyVLA from random weights, by cross-entropy on the demonstrations' action tokens.

    key: name of their statistics, beside which `noted` is kept."""
    import torch
    from tqdm import tqdm

    from plumbing.optimizer import clip_and_step, make_optimizer
    from robots.openvla import from_env_actions
    from robots.tiny_vla import TinyVLA
    torch.manual_seed(s.seed)
    actions = from_env_actions(data["actions"])
    low, high = (np.quantile(actions.reshape(-1, 7), q, 0).tolist() for q in (0.01, 0.99))
    stats = {"q01": low, "q99": high, "mask": [True] * 6 + [False]}
    policy = TinyVLA({key: {"action": stats, **noted}}, size=data["image"].shape[1],
                     crop=s.crop or None)
    optimizer = make_optimizer(policy, s.lr)
    ids, mask = policy.prompt_ids(list(instructions))
    task, images = torch.from_numpy(data["task"]), torch.from_numpy(data["image"])
    bins = policy.encode(actions, key).flatten(1)                           # (N, 56)
    for step in (bar := tqdm(range(s.steps), desc="SFT", mininterval=1)):
        rate = s.lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / s.steps))
        optimizer.param_groups[0]["lr"] = rate
        rows = torch.randint(len(bins), (64,))
        pixels = policy.pixel_values(images[rows][:, None])
        logits = policy(ids[task[rows]], mask[task[rows]], pixels)          # (64, 56, 256)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), bins[rows].flatten())
        loss.backward()
        clip_and_step(optimizer, policy, 1.0)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return policy


def run(s: Settings) -> None:
    require(s, dict(demos=1, steps=1, threads=0, seed=0, size=16), ("lr",))
    if len(s.crop) not in (0, 3):
        raise ValueError(f"--crop {' '.join(map(str, s.crop))}: give top, left and side")
    if s.suite.startswith("tabletop") and (s.tasks or s.crop or s.size != 64):
        raise ValueError("--tasks, --size and --crop are LIBERO's; give --suite")
    for name, folder in (("out", s.out), ("record", s.record or s.out)):
        if not folder or Path(folder).exists() and any(Path(folder).iterdir()):
            taken = f"; {folder} is not empty" if folder else ""
            raise ValueError(f"--{name} must be a new folder{taken}")
    import torch

    from plumbing import ranks
    from robots.tiny_vla import TinyVLA
    ranks.use_cores(s.threads)
    torch.set_flush_denormal(True)                      # numbers below 1e-38 are noise, and slow
    suite = find_suite(s.suite, tuple(s.tasks), SuiteOptions(fast=s.fast_sim, assets=s.assets))
    TinyVLA({}, size=s.size, crop=s.crop or None)       # is refused now rather than after the work,
    Path(s.out).mkdir(parents=True, exist_ok=True)      # as is a folder
    noted = {"num_trajectories": s.demos * len(suite.tasks)}
    if s.suite.startswith("tabletop"):
        episodes, key = tabletop_episodes(s.demos, suite=s.suite), s.suite
        more = f" --suite {s.suite}"
    else:
        episodes = libero_episodes(s, suite.tasks)
        key, everything = f"{s.suite}_no_noops", s.split == "all"
        noted |= {"fast_sim": s.fast_sim} | ({"split": "all"} if everything else {})
        more = (f" --suite {s.suite} --tasks {' '.join(map(str, suite.tasks))}"
                + " --fast_sim" * s.fast_sim + " --split all" * everything)
    data = demonstrations(recorded(episodes, s.record), suite.instructions)
    fine_tune(data, s, key, suite.instructions, **noted).save_pretrained(s.out)
    print(f"wrote {s.out}; measure it: python eval.py vla --checkpoint {s.out}{more}")


main = script(Settings, run, __doc__)
if __name__ == "__main__":
    sys.exit(main())
