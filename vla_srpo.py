"""SRPO for vision-language-action policies (arXiv 2511.15605): failures are paid by how near their video comes to success.

One step, numbered as in the code of `train`:
  1. From each of P initial states play G rollouts with the current policy, sampling every action token at a temperature.
  2. A frozen world model turns each rollout's video into one latent. Successes earn 1; a failure earns up to alpha < 1 by
     its distance to the nearest cluster of this batch's successes of the same task (rewards.py).
  3. Advantages are normalised within the G rollouts of an initial state; groups whose rewards are all equal say nothing
     and are dropped.
  4. A clipped policy-gradient update over the executed tokens, a few passes in minibatches, stopped early if the policy
     has moved too far (grpo.py).
Before that the policy is fine-tuned on a few demonstrations (studies/demonstrate.py); that one is shipped in weights/.

Beyond the paper, for a policy of 0.4 M parameters: what is evaluated is a running average of the weights, the temperature falls during
the run, two passes over a step's rollouts, fewer groups. Left out: a value network, entropy bonus, dynamic sampling (refilling dropped groups), asynchronous rollouts.
Paper and published code differ; where they do, the line says so. `--reward binary` is plain GRPO on 0/1 rewards.

    python vla_srpo.py --steps 200                               # the main job: about 10 minutes on two CPU cores
    python vla_srpo.py --steps 200 --reward binary --seed 1      # plain GRPO, to compare with
    python vla_srpo.py --resume out/srpo                         # go on after Ctrl-C, a crash or a power cut
    python vla_srpo.py --paper --suite libero_object --model Haozhan72/Openvla-oft-SFT-libero-object-traj1     # the paper's run, 7B on one 141 GB GPU
    torchrun --nproc-per-node 8 vla_srpo.py --paper ...          # the same on 8 GPUs: plumbing/ranks.py
    python vla_srpo.py --suite libero_object --tasks 0 1 2 --fast_sim --model out/libero_sft --groups 8 --horizon 200     # LIBERO itself
"""
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch: idle threads sleep, or they would fight the simulator for cores

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from robots import tabletop as envs
import eval as evaluation
import grpo
from plumbing import run as job
from robots import libero as libero_envs
from robots import libero_files
from plumbing import ranks as parallel
from plumbing import plan
from robots import policy as policies
import rewards
from robots import rollouts
import world_model
from plumbing.run import flag
from plumbing.update import check_update, clipped_updates

WEIGHTS = Path(__file__).parent / "weights"


@dataclass
class Settings:
    steps: int = flag(200, "RL steps")
    until: float = flag(0.0, "end before that when a held-out evaluation reaches this success rate; 0: never")
    reward: str = flag("srpo", "srpo: failures earn progress; binary: 0/1, plain GRPO", choices=["srpo", "binary"])
    variant: str = flag("paper", "progress reward of the paper or of its published code", choices=["paper", "official"])
    alpha: float = flag(0.3, "paper variant: bound on what a failure earns, below the 1 of a success (paper: 0.8 best of 0..1)")
    groups: int = flag(32, "P: initial states per step (paper: 64)")
    group_size: int = flag(8, "G: rollouts per initial state (paper: 8)")
    temperature: float = flag(1.6, "of sampling and of the log-probabilities alike (paper: 1.6)")
    temperature_end: float = flag(0.6, "the temperature falls linearly to this at the last step (paper: stays), so that what is trained "
                                       "comes near the greedy policy that is evaluated")
    lr: float = flag(5e-4, "AdamW's learning rate: 10 steps of warmup, then linearly down (paper: 5e-6 at 7B)")
    lr_end: float = flag(0.3, "towards this fraction of it at the end")
    epochs: int = flag(2, "passes over a step's rollouts (paper: 1)")
    minibatch: int = flag(256, "action chunks per update")
    micro_batch: int = flag(256, "action chunks per forward pass; smaller saves memory, same gradient (in bf16 to rounding)")
    clip_low: float = flag(0.2, "ratio is clipped below 1 - this")
    clip_high: float = flag(0.28, "and above 1 + this")
    target_kl: float = flag(0.02, "end a step's updates when KL(old || new) per token exceeds this; 0: never")
    beta: float = flag(0.0, "weight of the KL to the starting policy (the published code's loss leaves it out)")
    max_norm: float = flag(1.0, "gradient clipping")
    average: float = flag(0.97, "the policy that is evaluated and saved is a running average of the weights, its decay a step rising to this; "
                               "0: the last weights, and no second copy of them in memory (paper: 0)")
    std_scale: bool = flag(True, "divide advantages by the group's standard deviation (False: Dr. GRPO)")
    keep: str = flag("signal", "groups to train on; signal: rewards differ; mixed: success rate within 0.1..0.9, others are dropped before "
                               "rewards are shaped, as published",
                     choices=["signal", "mixed"])
    model: str = flag(str(WEIGHTS / "tiny_vla"), "starting policy: folder or hub id")
    world_model: str = flag(str(WEIGHTS / "vjepa_tiny"), "V-JEPA 2 encoder: folder or hub id; pixels: mean frames instead of latents, a baseline")
    clips: int = flag(32, "videos that the world model encodes at a time; fewer need less memory")
    dtype: str = flag("float32", "of the policy's weights; bfloat16 keeps fp32 master weights in the optimiser", choices=["float32", "bfloat16"])
    lora_rank: int = flag(0, "train LoRA adapters of this rank on all linear layers, the towers' too; 0: all weights")
    gradient_checkpointing: bool = flag(False, "OpenVLA: recompute activations in the backward pass: less memory, a third more time")
    offload_optimizer: bool = flag(False, "optimiser state and step on the CPU, for one process: 12 of 16 bytes a weight leave the GPU")
    seed: int = flag(0, "of initial states, sampling and minibatches")
    out: str = flag("", "output folder (default: out/REWARD)")
    resume: str = flag("", "folder of a run to go on with; its settings are taken over, others given must agree")
    eval_every: int = flag(20, "steps between held-out evaluations, greedy, all initial states; 0: only before and after")
    save_every: int = flag(5, "steps between checkpoints")
    workers: int = flag(2, "simulator processes")
    tables: int = flag(0, "parallel environments over all workers; 0: 128, or with LIBERO one per worker")
    threads: int = flag(2, "torch threads; 0: all cores")
    suite: str = flag("tabletop", "tabletop, " + ", ".join(libero_files.SUITES) + " or libero_90")
    tasks: list[int] = flag([], "task numbers (default: all)")
    split: str = flag("disjoint", "disjoint: trained on one half of the initial states, evaluated on the other; all: trained and evaluated on "
                                  "all 50 of LIBERO's, the papers' own protocol", choices=["disjoint", "all"])
    protocol: str = flag("openvla-oft", "LIBERO: whose horizons", choices=list(libero_envs.PROTOCOLS))
    horizon: int = flag(0, "LIBERO: env steps of an episode at most; 0: the protocol's")
    video_every: int = flag(8, "env steps between the frames of a rollout that the world model sees; 8: those the policy sees anyway, "
                               "1: all (paper), 8 times the rendering", choices=[1, 2, 4, 8])
    hard: bool = flag(False, "LIBERO: build the simulator anew at every reset, as the stock environment does; seconds each")
    fast_sim: bool = flag(False, "LIBERO: other pixels, same physics, faster; for policies trained so")
    assets: str = flag("", "LIBERO: folder of its assets (default: LIBERO_ASSETS, else from the hub)")


# The paper's settings for OpenVLA-OFT, where they differ from the small ones above, and what lets 7B fit one 141 GB GPU
PAPER = dict(alpha=0.8, groups=64, temperature_end=1.6, lr=5e-6, lr_end=1.0, epochs=1, minibatch=1024, micro_batch=16, target_kl=0.0, average=0.0,
             dtype="bfloat16", gradient_checkpointing=True, world_model="facebook/vjepa2-vitg-fpc64-384", video_every=1,
             suite="libero_object", protocol="simplevla", split="all", save_every=10)
# May change on resume; threads change the rounding, LIBERO's workers the draws
FREE = {"out", "resume", "workers", "threads", "eval_every", "save_every", "assets", "micro_batch", "clips", "gradient_checkpointing", "offload_optimizer"}


def check(s: Settings) -> None:
    """ValueError, one line, for a setting out of range."""
    job.require(s, dict(steps=1, groups=1, group_size=2, epochs=1, minibatch=1, micro_batch=1, clips=1, workers=1, tables=0, save_every=1, threads=0,
                        lora_rank=0, horizon=0, eval_every=0, seed=0, beta=0, target_kl=0, lr_end=0),
                ("temperature", "temperature_end", "lr", "max_norm", "clip_low", "clip_high"), {"group_size": "a group of one has no baseline"})
    if not 0 <= s.average < 1:
        raise ValueError(f"--average must lie in [0, 1), got {s.average}")
    if s.average and s.dtype == "bfloat16":
        raise ValueError(f"--average {s.average} with bfloat16: in steps this small the average would not move; give --average 0")
    if not 0 <= s.until <= 1:
        raise ValueError(f"--until must lie in [0, 1], got {s.until}")
    if not 0 <= s.alpha < 1:
        raise ValueError(f"--alpha must lie in [0, 1), got {s.alpha}: a failure must earn less than a success")
    if 0 < s.tables < s.workers:
        raise ValueError(f"--tables {s.tables} is less than --workers {s.workers}: each worker needs one")
    if s.suite == "tabletop" and s.workers > (s.tables or 128):
        raise ValueError(f"--workers {s.workers} for 128 tables: each worker needs one; set --tables")
    check_update(s, "groups")


def update(policy, reference, optimizer, batch: policies.Batch, s: Settings) -> dict:
    """`clipped_updates` over a step's batch. Loss (SRPO-VLA, and its code): mean over a rollout's valid tokens, then over rollouts.
    A rank whose one row has no valid token only fills up passes."""
    weight = grpo.trajectory_weights(batch.mask, batch.trajectory)                  # (N,)
    own = int(batch.mask.any(1).sum())
    total = sum(parallel.gather([own]))
    n_rollouts = sum(parallel.gather([grpo.loss_normalizer(batch.mask, "sequence", row_weight=weight) if own else 0.0]))
    device = next(policy.parameters()).device
    ref = policies.reference_logprobs(policy, reference, batch, s) if s.beta else None       # (N, 56)

    def loss(part, normalizer: float):
        counted, part = part is not None, torch.tensor([0]) if part is None else part
        old, adv, mask = (x[part].to(device) for x in (batch.logp, batch.advantage, batch.mask & counted))
        logp = policies.logprobs(policy, batch, part, s.temperature)
        return grpo.policy_loss(logp, old, adv, mask, ref_logp=None if ref is None else ref[part], clip=(s.clip_low, s.clip_high), beta=s.beta,
                                aggregate="sequence", row_weight=weight[part].to(device), normalizer=normalizer)
    return clipped_updates(policy, optimizer, own, s.epochs, s.minibatch, lambda rows: list(rows.split(s.micro_batch)),
                           lambda rows: n_rollouts * len(rows) / total, loss, s.max_norm, s.target_kl)     # expectation: the whole batch's gradient


def keep_seen(episode: rollouts.Episode, encoder) -> None:
    """Of a rollout that has ended, for `rollouts.play`: all frames but those that the world model will see go (512 at 256 pixels: 100 MB)."""
    episode.images = [] if encoder is None else list(encoder.seen(episode.video))
    episode.between = []


def score(episodes: list[rollouts.Episode], encoder, s: Settings) -> tuple[np.ndarray, rewards.ProgressRecord | None]:
    """Reward of each rollout of all ranks, float64 (N,), and the record of how it came about (None for 0/1 rewards)."""
    success = np.array(parallel.gather([e.success for e in episodes]))
    if s.reward == "binary":
        return success.astype(float), None
    encoded = [encoder.encode([e.video for e in episodes[i:i + s.clips]]).numpy() for i in range(0, len(episodes), s.clips)]
    latents = np.stack(parallel.gather([latent for part in encoded for latent in part]))                    # (N, D): one per ROLLOUT
    group, task = np.repeat(np.arange(len(success) // s.group_size), s.group_size), np.array(parallel.gather([e.start.task for e in episodes]))
    kept = mixed(success, s)
    if not kept.any():
        return success.astype(float), None
    shaped, record = rewards.progress_reward(latents[kept], success[kept], task[kept], variant=s.variant, alpha=s.alpha, group=group[kept])
    reward, distances = success.astype(float), np.full(len(success), np.nan)
    reward[kept], distances[kept] = shaped, record.distances
    return reward, replace(record, distances=distances)


def mixed(success: np.ndarray, s: Settings) -> np.ndarray:
    """bool (N,): the rollouts that --keep mixed does not drop; else all. Code: by the success rate, BEFORE the reward is shaped."""
    rate = success.reshape(-1, s.group_size).mean(1)
    return np.repeat((rate >= 0.1) & (rate <= 0.9) | (s.keep == "signal"), s.group_size)


def train(s: Settings, suite: rollouts.Suite, out: Path, step: int, policy, average, reference, encoder, optimizer, log: job.MetricsLog,
          workers: rollouts.Workers) -> tuple[int, dict | None]:
    """Steps `step` + 1 .. s.steps; stops early on Ctrl-C. Returns the last step done and the last held-out evaluation.
    average: running average of the policy's weights, or None; reference: starting policy, or None if beta is 0; encoder: world model, or None for 0/1 rewards."""
    key, (trained, evaluated, name) = policies.find_key(policy.norm_stats, suite.name), splits(s)
    result = None
    stop = False
    with job.ctrl_c() as interrupted, tqdm(total=s.steps, initial=step, desc=s.reward, unit="step", dynamic_ncols=True, mininterval=1,
                                            disable=parallel.rank() > 0) as bar:
        while step < s.steps and not stop:
            step += 1
            # Each step has its own random numbers, a function of (seed, step): so a resumed run repeats an uninterrupted one.
            rng = np.random.default_rng([s.seed, step])
            torch.manual_seed(int(rng.integers(2**62)) + parallel.rank())
            now = replace(s, temperature=s.temperature + (s.temperature_end - s.temperature) * (step - 1) / max(s.steps - 1, 1))
            optimizer.param_groups[0]["lr"] = s.lr * min(1, step / 10) * (1 - (1 - s.lr_end) * (step - 1) / s.steps)

            began = time.perf_counter()                                                 # 1. rollouts
            pool = suite.starts(trained)
            states = [pool[i] for i in rng.choice(len(pool), s.groups, replace=s.groups > len(pool))]
            starts = [state for state in parallel.share(states) for _ in range(s.group_size)]
            with parallel.gathered(policy):
                played = rollouts.play(policies.sampler(policy, now.temperature, key), workers, starts, partial(keep_seen, encoder=encoder), suite,
                                       s.video_every if s.reward == "srpo" else envs.CHUNK)
            rolled = time.perf_counter()

            reward, record = score(played, encoder, s)                                  # 2. rewards
            # Of all ranks, without what only their own updates need
            episodes = parallel.gather([replace(e, images=[], records=[call.entropy for call in e.records]) for e in played])
            first = sum(parallel.gather([len(played)])[:parallel.rank()])
            scored = time.perf_counter()

            by_group = torch.tensor(reward, dtype=torch.float32).view(s.groups, s.group_size)
            advantages = grpo.group_advantages(by_group, scale=s.std_scale)             # 3. advantages (P, G)
            rate = torch.tensor([e.success for e in episodes]).float().view(s.groups, s.group_size).mean(1)
            advantages *= torch.from_numpy(mixed(np.array([e.success for e in episodes]), s)).view_as(advantages)
            used = (advantages != 0).any(1)

            batch = policies.collate(played, advantages.flatten()[first:first + len(played)], suite.instructions)  # 4. update
            if not len(batch.mask):                 # this rank's part in the others' update: a row without a valid token
                batch = policies.Batch(**{name: x[:1] for name, x in vars(policies.collate(played[:1], torch.ones(1), suite.instructions)).items()})
                batch.mask[:] = False
            stats = update(policy, reference, optimizer, batch, now) if used.any() else {"updates": 0, "skipped": 0}
            tokens = sum(parallel.gather([int(batch.mask.sum())]))
            del played, batch                       # gigabytes of images at 7B, before the next rollouts bring theirs
            if average is not None:
                average.update_parameters(policy)
            if stats["skipped"]:
                tqdm.write(f"step {step}: {stats['skipped']} updates skipped, loss or gradient not finite")
            env_steps = sum(e.steps for e in episodes)
            row = {"step": step, "success": float(rate.mean()), "reward": float(reward.mean()),
                   "failure_reward": float(by_group.flatten()[[not e.success for e in episodes]].mean()) if rate.mean() < 1 else None,
                   "length": env_steps / len(episodes), "groups_used": int(used.sum()), "groups_failed": int((rate == 0).sum()),
                   "groups_solved": int((rate == 1).sum()), "entropy": float(np.mean([x for e in episodes for x in e.records])),
                   **stats, "lr": optimizer.param_groups[0]["lr"], "temperature": now.temperature, "env_steps": env_steps,
                   "tokens": tokens,
                   "workers_replaced": workers.replaced, "seconds_rollout": rolled - began, "seconds_reward": scored - rolled,
                   "seconds_update": time.perf_counter() - scored}
            if record is not None:
                row |= {"groups_changed": record.n_groups_changed, "clusters": sum(record.clusters.values()),
                        "noise": sum(record.noise.values()), "fallbacks": sum(map(bool, record.fallbacks.values()))}
            if step == s.steps or s.eval_every and step % s.eval_every == 0:
                gifs = out / "after" if suite.name != "tabletop" else None             # of the latest evaluation
                if gifs and parallel.rank() == 0:
                    shutil.rmtree(gifs, ignore_errors=True)
                result = evaluate(policy if average is None else average.module, workers, evaluated, key, suite, gifs)
                row["heldout"] = result["success"]
                stop = reached(s, result)
                tqdm.write(f"step {step:4d}  {name} success {result['success']:.1%} (greedy, {result['episodes']} episodes)")
            log.append(row)
            bar.set_postfix(success=f"{row['success']:.0%}", reward=f"{row['reward']:.2f}")
            bar.update()
            if step % 5 == 0 or step == 1:
                tqdm.write(f"step {step:4d}  success {row['success']:5.1%}  reward {row['reward']:.3f}  groups used {row['groups_used']:2d}"
                           f"/{s.groups}  kl {stats.get('old_kl', 0):.4f}  entropy {row['entropy']:.2f}  rollout {row['seconds_rollout']:.1f} s"
                           f"  reward {row['seconds_reward']:.1f} s  update {row['seconds_update']:.1f} s")
            if step % 25 == 1:
                tqdm.write("  sample: " + describe(suite, episodes, reward, advantages.flatten(), record, int(rng.integers(len(episodes)))))
            stop = stop or bool(parallel.gather(interrupted))                           # on any rank
            if step % s.save_every == 0 or step == s.steps or stop:
                save(out, s, step, policy, average, optimizer)
    return step, result


def reached(s: Settings, result: dict | None) -> bool:
    """Whether an evaluation is what --until waits for."""
    return result is not None and 0 < s.until <= result["success"]


def evaluate(policy, workers: rollouts.Workers, split: str, key: str, suite: rollouts.Suite, gifs: Path | None) -> dict:
    """`eval.evaluate_vla` on all initial states of a split; the first rank plays, the others wait."""
    with parallel.gathered(policy):
        return parallel.gather([evaluation.evaluate_vla(policy, workers, split, key, None, suite, gifs)] if parallel.rank() == 0 else [])[0]


def film(policy, starts: list[rollouts.Start], key: str, path: Path) -> None:
    """The same with `eval.film`."""
    with parallel.gathered(policy):
        if parallel.rank() == 0:
            evaluation.film(policy, starts, key, path)


def describe(suite, episodes, reward, advantages, record, i: int) -> str:
    """One rollout in a line: the next failure after the i-th, if there is one that was compared with successes."""
    distances = record.distances if record is not None else np.full(len(episodes), np.nan)
    order = [*range(i, len(episodes)), *range(i)]
    i = min(order, key=lambda j: (episodes[j].success, np.isnan(distances[j])))             # the first of the best
    e = episodes[i]
    distance = "" if np.isnan(distances[i]) else f", latent distance {distances[i]:.3f}"
    return (f"\"{suite.instructions[e.start.task]}\", initial state {e.start.index}: {'success' if e.success else 'failure'} after {e.steps} "
            f"steps{distance} -> reward {reward[i]:.3f}, advantage {advantages[i]:+.2f}")


def save(out: Path, s: Settings, step: int, policy, average, optimizer) -> None:
    weights, averaged = policies.kept(policy, average)
    parallel.save_checkpoint(out / "checkpoint", weights, optimizer, {"step": step, "settings": asdict(s)}, averaged)


def splits(s: Settings) -> tuple[str, str, str]:
    """Which initial states are trained on, which are evaluated on, and what to call these."""
    return ("train", "heldout", "held-out") if s.split == "disjoint" else ("all", "all", "training")


def run(s: Settings, given: set[str]) -> int:
    """The whole job; returns the exit code."""
    s, out, saved = job.begin(s, given, FREE, s.out or f"out/{s.reward}")
    check(s)
    step = saved["step"] if saved else 0
    if s.suite.startswith("libero_plus"):
        raise ValueError("libero_plus is for evaluation only: python eval.py vla --suite " + s.suite)
    if s.suite == "tabletop" and s.split == "all":
        raise ValueError("--split all is LIBERO's; the tabletop has 50 training and 50 held-out initial states per task")
    suite = evaluation.find_suite(s.suite, s.tasks, **dict(protocol=s.protocol, horizon=s.horizon, fast=s.fast_sim, hard=s.hard, assets=s.assets)
                                  if s.suite != "tabletop" else {})
    torch.set_num_threads(s.threads or os.cpu_count())
    torch.set_flush_denormal(True)          # CPU arithmetic on numbers below 1e-38 is many times slower, and they are noise
    print(plan.announced(s))
    evaluation.try_suite(suite, 64)         # OpenGL and assets, before minutes of loading
    logging.disable_progress_bar()          # transformers' own bar for loading weights
    policy = policies.prepared(policies.load_policy(s.model, getattr(torch, s.dtype), parallel.device()), s)
    reference = policies.load_policy(s.model, getattr(torch, s.dtype)) if s.beta > 0 and not s.lora_rank else None
    encoder = None
    if s.reward == "srpo":
        pixels = s.world_model == "pixels"
        encoder = world_model.WorldModel.from_pretrained(WEIGHTS / "vjepa_tiny" if pixels else s.world_model, batch_size=s.clips)
        encoder = world_model.PixelModel(encoder) if pixels else encoder
    key = policies.find_key(policy.norm_stats, suite.name)
    if s.split == "all":
        policy.norm_stats[key]["split"] = "all"                 # for who evaluates it
    if parallel.rank() == 0:
        evaluation.note_training(policy, key, s.fast_sim, [splits(s)[1]])
    job.make_folder(out)                    # whatever is wrong with the models or OpenGL has shown by now
    average = AveragedModel(policy, multi_avg_fn=policies.running_average(s.average)) if s.average else None
    optimizer = grpo.make_optimizer(parallel.shard(policy), s.lr, betas=(0.9, 0.99), offload=s.offload_optimizer)
    if average is not None:
        parallel.shard(average.module)
    if saved:
        weights, averaged = policies.kept(policy, average)
        parallel.load_checkpoint(out / "checkpoint", weights | averaged, optimizer)
    if parallel.rank() == 0:
        (out / "settings.json").write_text(json.dumps(asdict(replace(s, out="", resume="")), indent=1) + "\n")
    (_, heldout, name), began = splits(s), time.time()
    print("settings: " + "  ".join(f"{k}={v}" for k, v in asdict(s).items() if v not in ("", [])))
    if suite.protocol:
        print(f"{suite.name}: {'; '.join(libero_envs.SPLIT_NAMES[split] for split in dict.fromkeys(splits(s)[:2]))}; {suite.protocol}")
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, {len(suite.tasks)} tasks, {torch.get_num_threads()} torch threads, "
          f"{s.workers} simulator processes; results go to {out}/")
    workers = suite.workers(s.workers, policies.camera_size(policy), s.tables)
    try:
        builtin, film_starts = suite.name == "tabletop", suite.starts(heldout, 1)       # LIBERO's GIFs come out of its evaluations
        if step == 0:
            if parallel.rank() == 0:
                shutil.rmtree(out / "before", ignore_errors=True)       # of a run killed before its first checkpoint
            before = evaluate(policy, workers, heldout, key, suite, None if builtin else out / "before")
            if parallel.rank() == 0:
                (out / "before.json").write_text(json.dumps(before, indent=1))
            if builtin:
                film(policy, film_starts, key, out / "before.gif")
            save(out, s, 0, policy, average, optimizer)
            print(f"before: {before['success']:.1%} of the {name} initial states solved (greedy)")
        else:
            before = json.loads((out / "before.json").read_text())
            print(f"resumed after step {step}")
        log = parallel.metrics_log(out / "metrics.jsonl", step or -1)
        if step == 0:
            log.append({"step": 0, "heldout": before["success"]})
        done, after = step, json.loads((out / "after.json").read_text()) if saved and (out / "after.json").exists() else None
        heard = [row["heldout"] for row in evaluation.read_metrics(out / "metrics.jsonl") if "heldout" in row and 0 < row["step"] <= step] if step else []
        ended = bool(heard) and reached(s, {"success": heard[-1]})          # though it was killed between that evaluation and its end
        if not ended:
            done, after = train(s, suite, out, step, policy, average, reference, encoder, optimizer, log, workers)
        log.close()
        final = policy if average is None else average.module
        finished = done == s.steps or ended or reached(s, after)
        if finished:
            after = after or evaluate(final, workers, heldout, key, suite, None)        # a run that ended may be resumed too
            if builtin:
                film(final, film_starts, key, out / "after.gif")
            policies.save_policy(final, out)
        if parallel.rank():
            return 0 if finished else 130
        rows = evaluation.read_metrics(out / "metrics.jsonl")
        evaluation.draw_curves({s.reward: [rows]}, out / "curve.png")
        if not finished:
            print(f"stopped after step {done}; go on with: python vla_srpo.py --resume {out}")
            return 130
        (out / "after.json").write_text(json.dumps(after, indent=1))
    finally:
        workers.close()
    print(f"\n{name} success, greedy, 95% Wilson intervals\n" + evaluation.table({"before": before, f"after {done} steps": after}))
    trained = [r for r in rows if "seconds_rollout" in r]
    seconds = {part: np.mean([r[f"seconds_{part}"] for r in trained]) for part in ("rollout", "reward", "update")}
    print(f"{time.time() - began:.0f} s; per step: " + ", ".join(f"{part} {t:.2f} s" for part, t in seconds.items()))
    print("wrote " + ", ".join(f"{out}/{name}" for name in ("metrics.jsonl", "curve.png", *(
        ("before.gif", "after.gif") if builtin else ("before/", "after/")), "after.json", "policy/", "checkpoint/")))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = HfArgumentParser(Settings, description="SRPO for vision-language-action policies", allow_abbrev=False)
    parser.add_argument("--plan", action="store_true", help="only say what the flags need of the GPU, and what would stop the run")
    parser.add_argument("--paper", action="store_true", help="the paper's settings for OpenVLA-OFT, but for flags given; --model must be given")
    argv = sys.argv[1:] if argv is None else argv
    if "--paper" in argv:
        parser.set_defaults(**PAPER)

    def work() -> int:
        s, more, given = job.parse(parser, argv)
        given -= {"paper", "plan"}
        if more.paper and "model" not in given and not s.resume:
            raise ValueError("--paper needs --model: the folder or hub id of an OpenVLA-OFT")
        with plan.explained(s):
            parallel.start()
            if s.resume and more.plan:
                s, _, _ = job.begin(s, given, FREE, s.out)
            if not s.resume or more.plan:              # else `run` checks the settings of the run
                check(s)
            code = plan.show(s) if more.plan else run(s, given)
            parallel.stop()
            return code
    return job.command(work)


if __name__ == "__main__":
    sys.exit(main())
