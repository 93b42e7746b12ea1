"""The small policy's supervised fine-tuning: a scripted expert's demonstrations, and a TinyVLA that imitates them.

SRPO-VLA (arXiv 2511.15605) starts from policies fine-tuned on one demonstration a task; a policy of 0.4 M parameters from random weights needs
a few more. What it sees is the camera's image and the instruction, what it learns are the next 8 actions as 56 tokens of 256 bins.
Left out: fine-tuning OpenVLA-OFT; the published checkpoints are that.

    python -m studies.demonstrate --out out/tiny_vla                        # how weights/tiny_vla was made: 43 s of CPU time
    python -m studies.demonstrate --suite libero_object --tasks 0 1 2 --fast_sim --size 128 --crop 8 8 96 --demos 20 --steps 2000 --out out/libero_sft
"""
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch: idle threads sleep, or they would fight the simulator for cores

import numpy as np
import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from robots import tabletop as envs
import eval as evaluation
import grpo
from plumbing import run as job
from robots import libero as libero_envs
from robots import libero_expert
from robots import openvla as vla
from plumbing.run import flag
from robots.tiny_vla import TinyVLA


@dataclass
class Settings:
    suite: str = flag("tabletop", "tabletop, libero_object or libero_spatial: those there is an expert for",
                      choices=["tabletop", "libero_object", "libero_spatial"])
    tasks: list[int] = flag([], "LIBERO: task numbers (default: all)")
    demos: int = flag(6, "demonstrations per task, from its training initial states")
    split: str = flag("disjoint", "LIBERO; disjoint: from one half of the initial states; all: from all 50", choices=["disjoint", "all"])
    size: int = flag(64, "LIBERO: pixels of the camera images")
    crop: list[int] = flag([], "LIBERO: top, left and side of the square of the image that the policy looks at (default: all of it)")
    fast_sim: bool = flag(False, "LIBERO: other pixels, same physics, faster")
    assets: str = flag("", "LIBERO: folder of its assets (default: LIBERO_ASSETS, else from the hub)")
    steps: int = flag(800, "updates of 64 chunks")
    lr: float = flag(2e-3, "learning rate, cosine")
    seed: int = flag(0, "of weights and batches")
    threads: int = flag(2, "torch threads; 0: all cores")
    out: str = flag("", "new folder for the policy")


def demonstrations(per_task: int, noise: float = 0.1, seed: int = 0) -> dict[str, np.ndarray]:
    """The scripted expert on the first training initial states: at every step the image and the next 8 actions.

    Noise disturbs what is executed, the labels stay clean, so the policy also sees how to come back from small errors.
    -> {"image": uint8 (N, 64, 64, 3), "task": int64 (N,), "actions": float64 (N, 8, 7) in LIBERO's convention}
    """
    env, rng = envs.Tabletop(), np.random.default_rng(seed)
    data = {"image": [], "task": [], "actions": []}
    for task in range(len(envs.TASKS)):
        for index in range(per_task):
            image = env.reset(options={"task": task, "index": index % envs.N_STATES})[0]["image"]
            expert, actions, ended = envs.Expert(env), [], False
            while not ended:
                actions.append(expert())
                data["image"].append(image), data["task"].append(task)
                ended = env.advance((actions[-1] + noise * np.array([*rng.standard_normal(3), 0, 0, 0, 0])).clip(-1, 1))
                image = env.render()
            rest = [np.array([0, 0, 0, 0, 0, 0, -1.0])] * envs.CHUNK                # after success: stand still, open
            data["actions"] += [np.stack((actions + rest)[t:t + envs.CHUNK]) for t in range(len(actions))]
    return {name: np.stack(rows) for name, rows in data.items()}


def libero_demonstrations(s: Settings, tasks: tuple[int, ...], every: int = 2) -> dict[str, np.ndarray]:
    """The same from LIBERO's scripted expert, a frame every `every` steps: noisy execution, clean labels. Episodes are kept in
    cache/demos and never played twice."""
    env = libero_envs.Libero(s.suite, split="train" if s.split == "disjoint" else "all", size=s.size, fast=s.fast_sim, assets=s.assets)
    folder = Path("cache/demos") / f"{s.suite}-{env.split}-{s.size}px{'-fast' * s.fast_sim}-every{every}"
    data = {"image": [], "task": [], "actions": []}
    for episode in libero_expert.collect(env, list(tasks), s.demos, folder, every=every):
        actions = np.concatenate([episode["intended"], np.tile([0, 0, 0, 0, 0, 0, -1.0], (envs.CHUNK, 1))])
        data["image"] += list(episode["images"])
        data["task"] += [int(episode["task"])] * len(episode["images"])
        data["actions"] += [actions[t * every:t * every + envs.CHUNK] for t in range(len(episode["images"]))]
    env.close()
    return {name: np.stack(rows) for name, rows in data.items()}


def fine_tune(data: dict[str, np.ndarray], steps: int, lr: float, seed: int = 0, key: str = "tabletop",
              instructions: tuple[str, ...] = envs.TASKS, crop: list[int] | None = None, **more) -> TinyVLA:
    """A TinyVLA from random weights, by cross-entropy on the demonstrations' action tokens; `key`: the name of their statistics, beside which
    `more` is kept."""
    torch.manual_seed(seed)
    actions = vla.from_env_actions(data["actions"])
    flat = actions.reshape(-1, 7)
    stats = {"q01": np.quantile(flat, 0.01, 0).tolist(), "q99": np.quantile(flat, 0.99, 0).tolist(),
             "mask": [True] * 6 + [False]}
    policy = TinyVLA({key: {"action": stats, **more}}, size=data["image"].shape[1], crop=crop)
    optimizer = grpo.make_optimizer(policy, lr)
    ids, mask = policy.prompt_ids(list(instructions))
    task, images = torch.from_numpy(data["task"]), torch.from_numpy(data["image"])
    bins = policy.encode(actions, key).flatten(1)                            # (N, 56)
    bar = tqdm(range(steps), desc="SFT", mininterval=1)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(len(bins), (64,))
        logits = policy(ids[task[rows]], mask[task[rows]], policy.pixel_values(images[rows][:, None]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), bins[rows].flatten())
        loss.backward()
        grpo.clip_and_step(optimizer, policy, 1.0)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return policy


def run(s: Settings) -> int:
    job.require(s, dict(demos=1, steps=1, threads=0, seed=0, size=16), ("lr",))
    side = s.crop[2] if len(s.crop) == 3 else s.size
    if s.size % 4 or side % 4 or len(s.crop) not in (0, 3) or min(s.crop, default=0) < 0 or max(s.crop[:2], default=0) + side > s.size or side < 4:
        raise ValueError(f"--size {s.size} --crop {' '.join(map(str, s.crop))}: both sides must be multiples of 4, and the crop lie within the image")
    if s.suite == "tabletop" and (s.tasks or s.crop or s.size != 64):
        raise ValueError("--tasks, --size and --crop are LIBERO's; give --suite")
    if not s.out or Path(s.out).exists() and any(Path(s.out).iterdir()):
        raise ValueError("--out must be a new folder for the policy" + (f"; {s.out} is not empty" if s.out else ""))
    job.make_folder(Path(s.out))                # now rather than after the work
    torch.set_num_threads(s.threads or os.cpu_count())
    torch.set_flush_denormal(True)              # CPU arithmetic on numbers below 1e-38 is many times slower, and they are noise
    if s.suite == "tabletop":
        policy, more = fine_tune(demonstrations(s.demos), s.steps, s.lr, s.seed, num_trajectories=s.demos * len(envs.TASKS)), ""
    else:
        suite = evaluation.find_suite(s.suite, s.tasks, fast=s.fast_sim, assets=s.assets)
        data = libero_demonstrations(s, suite.tasks)
        policy = fine_tune(data, s.steps, s.lr, s.seed, f"{s.suite}_no_noops", suite.instructions, s.crop or None,
                           num_trajectories=s.demos * len(suite.tasks), fast_sim=s.fast_sim, **{"split": "all"} if s.split == "all" else {})
        more = f" --suite {s.suite} --tasks {' '.join(map(str, suite.tasks))}" + " --fast-sim" * s.fast_sim + " --split all" * (s.split == "all")
    policy.save_pretrained(s.out)
    print(f"wrote {s.out}; measure it: python eval.py vla --checkpoint {s.out}{more}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = HfArgumentParser(Settings, description="Demonstrations and supervised fine-tuning of the small policy", allow_abbrev=False)
    return job.command(lambda: run(job.parse(parser, sys.argv[1:] if argv is None else argv)[0]))


if __name__ == "__main__":
    sys.exit(main())
