"""SRPO for vision-language-action policies (arXiv 2511.15605): a failure is paid by how
near its video comes to success.

One step, numbered as in `train`:
  1. From each of P initial states play G rollouts with the current policy; every action
     token is sampled.
  2. A frozen world model turns each rollout's video into one latent. A success earns
     1, a failure up to alpha, by its distance to the nearest cluster of this batch's
     successes.
  3. Advantages compare each rollout with the others of its own initial state.
  4. Clipped policy gradient over the tokens of actions that ran.
Before that the policy is fine-tuned on a few demonstrations (studies/demonstrate.py).

Ours, for 0.4 M parameters: evaluated is a running average of the weights, the
temperature falls, two passes over a step's rollouts, fewer groups; `--paper` undoes it.
`offline` instead learns from logged trajectories (robots/offline.py).
Left out: a value network, an entropy bonus, refilling of dropped groups.

    python vla_srpo.py --steps 200                      # 6 to 22 minutes on two cores
    python vla_srpo.py --steps 200 --reward binary      # plain GRPO
    python vla_srpo.py offline --data FOLDER --steps 6  # the paper's offline variant
    python vla_srpo.py --resume out/srpo                # go on after an interruption
    python vla_srpo.py --paper --suite libero_object \\
        --model Haozhan72/Openvla-oft-SFT-libero-object-traj1   # 7B, one H200
    torchrun --nproc-per-node 8 vla_srpo.py --paper ...     # the same on 8 GPUs
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from plumbing.flags import RunSettings, at_once, check_run, flag, require
from robots.flags import OfflineSettings, SuiteSettings, check_offline, check_suite

WEIGHTS = Path(__file__).parent / "weights"


@dataclass
class Settings(SuiteSettings, OfflineSettings, RunSettings):
    steps: int = flag(200, "RL steps")
    until: float = flag(0.0, "end when a held-out evaluation reaches this; 0: never")
    reward: str = flag("srpo", "srpo: failures earn progress; binary: 0/1, plain GRPO; "
                               "official: the published code's formula",
                       choices=["srpo", "binary", "official"])
    alpha: float = flag(0.3, "bound on what a failure earns (paper: 0.8 best of 0..1)")
    groups: int = flag(32, "P: initial states per step (paper: 64)")
    group_size: int = flag(8, "G: rollouts per initial state (paper: 8)")
    temperature: float = flag(1.6, "of sampling and of log-probabilities (code: 1.6)")
    temperature_end: float = flag(0.6, "the temperature falls to this, so that what is "
                                       "trained comes near the greedy policy")
    lr: float = flag(5e-4, "learning rate: 10 steps of warmup, then linearly down "
                           "(paper: 5e-6 at 7B)")
    lr_end: float = flag(0.3, "towards this fraction of it at the end")
    epochs: int = flag(2, "passes over a step's rollouts (paper: 1)")
    minibatch: int = flag(256, "action chunks per update")
    micro_batch: int = flag(256, "action chunks per forward pass; same gradient")
    clip_low: float = flag(0.2, "the ratio is clipped below 1 - this")
    clip_high: float = flag(0.28, "and above 1 + this (code: 0.2 and 0.28)")
    target_kl: float = flag(0.02, "end a step's updates when KL(old || new) per token "
                                  "exceeds this; 0: never")
    beta: float = flag(0.0, "weight of the KL to the starting policy (code: left out)")
    average: float = flag(0.97, "evaluated and saved is a running average of the "
                          "weights, its decay rising to this; 0: the last weights")
    std_scale: bool = flag(True, "divide advantages by the group's standard deviation")
    keep: str = flag("signal", "groups to train on; signal: rewards differ; mixed: "
                     "success rate within 0.1..0.9, others go before shaping (code)",
                     choices=["signal", "mixed"])
    references: int = flag(0, "successes of earlier steps kept per task, to measure "
                              "failures by beside the batch's; 0: none (paper)")
    model: str = flag(str(WEIGHTS / "tiny_vla"), "starting policy: folder or hub id")
    world_model: str = flag(str(WEIGHTS / "vjepa_tiny"), "V-JEPA 2: folder or hub id; "
                            "pixels: mean frames instead of latents, a baseline; "
                            "oracle: the tabletop's true progress, the ceiling")
    pool: str = flag("clip", "a latent is the mean over a clip's tokens (code); place: "
                     "over time, for every patch or pixel; max: and the largest",
                     choices=["clip", "place", "max"])
    clips: int = flag(32, "videos that the world model encodes at a time")
    video_every: int = flag(8, "env steps between the frames that the world model "
                            "sees; 8: those the policy sees anyway; 1: all (code)",
                            choices=[1, 2, 4, 8])
    split: str = flag("disjoint", "disjoint: trained on one half of the initial "
                      "states, evaluated on the other; all: on all of LIBERO's (code)",
                      choices=["disjoint", "all"])


# The paper's settings for OpenVLA-OFT, and what lets 7B fit one GPU of 139 GiB
PAPER = dict(
    alpha=0.8, groups=64, temperature_end=1.6, lr=5e-6, lr_end=1.0, epochs=1,
    minibatch=1024, micro_batch=16, target_kl=0.0, average=0.0, video_every=1,
    suite="libero_object", protocol="simplevla", split="all", save_every=10,
    dtype="bfloat16", gradient_checkpointing=True,
    world_model="facebook/vjepa2-vitg-fpc64-384")
# May change on resume: they cost memory or time, and change no more than rounding
FREE = {"resume", "workers", "threads", "eval_every", "save_every", "assets",
        "micro_batch", "clips", "gradient_checkpointing", "offload_optimizer"}


def check(s: Settings) -> None:
    """ValueError, one line, for a setting out of range; derives the output folder."""
    check_run(s, "groups")
    check_suite(s)
    check_offline(s)
    require(s, dict(steps=1, minibatch=1, micro_batch=1, clips=1, target_kl=0,
                    lr_end=0, references=0), ("temperature_end",))
    for name, high in dict(average=0.9999, until=1, alpha=1).items():
        if not 0 <= (value := getattr(s, name)) <= high:
            raise ValueError(f"--{name} must lie in [0, {high}], got {value}")
    if s.average and s.dtype == "bfloat16":
        raise ValueError(f"--average {s.average} with bfloat16: in steps this small "
                         "the average would not move; give --average 0")
    if s.references and s.reward != "srpo":
        raise ValueError(f"--references is for --reward srpo, not {s.reward}")
    if s.world_model == "oracle" and not s.suite.startswith("tabletop"):
        raise ValueError(f"--world_model oracle: only the tabletop, not {s.suite}")
    s.out = s.out or f"out/{s.stage or s.reward}"


READING = dict(paper=PAPER, words=("offline",), about=__doc__.split("\n\n")[0])
if __name__ == "__main__":      # before torch is imported: --help takes no seconds
    at_once(Settings, check, **READING)

from dataclasses import replace

import numpy as np
import torch

import grpo
import rewards
from plumbing import adapters, plots, ranks
from plumbing.run import Run, launch
from plumbing.update import Update
from robots import evaluate, offline, published_reward
from robots import policy as policies
from robots.parts import Parts, prepare, reference_logprobs
from robots.planned import job
from robots.references import Oracle
from robots.rollouts import play

# Step 2: latents (N, D), success (N,), task ids (N,), alpha -> rewards (N,), the record
REWARDS = {"srpo": rewards.progress_reward,
           "official": published_reward.progress_reward}


def score(run: Run, episodes: list, encoder, memory=None) -> tuple[np.ndarray, object]:
    """Reward of all ranks' rollouts, float64 (N,); the record, None for 0/1 rewards."""
    s, success = run.s, np.array(run.gather([e.success for e in episodes]))
    if encoder is None:
        return success.astype(float), None
    oracle = isinstance(encoder, Oracle)        # a latent per ROLLOUT:
    latents = encoder.encode(episodes if oracle else [e.clip for e in episodes])
    latents = np.stack(run.gather(list(latents.numpy())))                   # (N, D)
    task = np.array(run.gather([e.start.task for e in episodes]))           # (N,)
    kept = kept_by_rate(success, s)
    shaped, record = REWARDS[s.reward](
        latents[kept], success[kept], task[kept], alpha=s.alpha,
        earlier=memory and memory.latents())
    if memory:
        memory.add(latents[success], task[success])
    reward, distances = success.astype(float), np.full(len(success), np.nan)
    reward[kept], distances[kept] = shaped, record.distances
    return reward, replace(record, distances=distances)


def kept_by_rate(success: np.ndarray, s: Settings) -> np.ndarray:
    """bool (N,): rollouts of the groups that --keep mixed keeps; else all are kept."""
    rate = success.reshape(-1, s.group_size).mean(1)
    return np.repeat((rate >= 0.1) & (rate <= 0.9) | (s.keep != "mixed"), s.group_size)


def train(run: Run, parts: Parts, before: dict) -> None:
    """The RL steps; the last evaluation is after.json in the run's folder."""
    s, policy, suite, optimizer = run.s, parts.policy, parts.suite, parts.optimizer
    pool = suite.starts("train" if s.split == "disjoint" else "all")
    for step in run.steps(s.steps, zero={"heldout": before["success"]}):
        done = (step - 1) / max(s.steps - 1, 1)
        temperature = s.temperature + (s.temperature_end - s.temperature) * done
        optimizer.param_groups[0]["lr"] = (
            s.lr * min(1, step / 10) * (1 - (1 - s.lr_end) * (step - 1) / s.steps))

        # 1. Play G rollouts from each of P initial states                       [VLA 1]
        states = run.rng.choice(len(pool), s.groups, replace=s.groups > len(pool))
        starts = [pool[i] for i in run.mine(states) for _ in range(s.group_size)]
        act = policies.sampler(policy, temperature, parts.key)
        clip = {}           # the frames of a rollout that the world model will see
        if parts.encoder is not None and s.world_model != "oracle":
            clip = {"every": s.video_every, "clip": parts.encoder.seen}
        with ranks.whole_weights(policy):
            played = play(act, parts.workers, starts, suite, **clip)
        run.lap("rollout")

        # 2. A success earns 1, a failure at most alpha: how near?    [VLA 2] to [VLA 5]
        reward, record = score(run, played, parts.encoder, parts.memory)
        run.lap("reward")

        # 3. Advantages, each rollout beside the others of its group    [VLA 6] [VLA 9]
        by_group = torch.tensor(reward, dtype=torch.float32).view(-1, s.group_size)
        advantages = grpo.group_advantages(by_group, scale=s.std_scale)     # (P, G)
        success = np.array(run.gather([e.success for e in played]))
        advantages *= torch.from_numpy(kept_by_rate(success, s)).view_as(advantages)
        advantage = torch.stack(run.mine(advantages)).flatten()     # of this rank's
        batch = policies.collate(played, advantage, suite.instructions)

        # 4. Clipped policy gradient over tokens of actions that ran    [VLA 7] [VLA 8]
        update = Update(policy, optimizer, grpo.merge_stats, s.max_norm, s.target_kl)
        weight = grpo.row_weights(batch.mask, batch.trajectory)             # (N,)
        count = float((batch.mask * weight[:, None]).sum())     # 1 for each rollout
        rollouts = sum(run.gather([count] if batch.rows else []))   # with an advantage
        ref = reference_logprobs(parts, batch, s, temperature)              # (N, 56)
        for chosen in update.minibatches(batch.rows, s.epochs, s.minibatch):
            # Mean over a rollout's tokens, then over rollouts; its expectation over
            # minibatches is the whole batch's gradient
            normalizer = rollouts * len(chosen) / update.rows
            for part in update.micro_batches(chosen, torch.split, s.micro_batch):
                logp = policies.logprobs(policy, batch, part, temperature)  # (B, 56)
                old, adv, mask, of_rollout = (x[part].to(logp.device) for x in (
                    batch.logp, batch.advantage, batch.mask, weight))
                loss, stats = grpo.policy_loss(
                    logp, old, adv, mask, beta=s.beta,
                    ref_logp=None if ref is None else ref[part],
                    clip=(s.clip_low, s.clip_high), row_weight=of_rollout,
                    normalizer=normalizer)
                update.backward(loss, stats)
            update.step()
        if parts.average is not None:
            parts.average.update_parameters(policy)
        run.lap("update")

        row = evaluate.measured(run.gather, played, reward, advantages, record)
        row |= update.summary() | {
            "lr": optimizer.param_groups[0]["lr"], "temperature": temperature,
            "tokens": sum(run.gather([int(batch.mask.sum())])),
            "workers_replaced": parts.workers.replaced} | evaluate.when_due(run, parts)
        run.log(row, f"success {row['success']:5.1%}  reward {row['reward']:.3f}  "
                     f"groups used {row['groups_used']:2d}/{s.groups}, both outcomes "
                     f"{s.groups - row['groups_failed'] - row['groups_solved']}  "
                     f"kl {row.get('old_kl', 0):.4f}  entropy {row['entropy']:.2f}")
        if step % 25 == 1:
            i = int(run.rng.integers(len(played)))
            run.say("  sample: " + evaluate.describe(
                i, played, reward, advantage, record, suite))


def work(run: Run) -> int:
    """The whole job: evaluation, training, evaluation, the policy in a folder."""
    s, out = run.s, run.out
    ranks.use_cores(s.threads)
    torch.set_flush_denormal(True)      # numbers below 1e-38 are noise, and slow
    parts = prepare(run)
    states = parts.suite.split_names[parts.split]
    print(f"{sum(p.numel() for p in parts.policy.parameters()):,} parameters, "
          f"{len(parts.suite.tasks)} tasks, {s.workers} simulator processes; "
          f"results go to {out}/{run.where()}\n{parts.suite.protocol}".rstrip())
    try:
        logged = [offline.prepare(run, parts)] if s.stage == "offline" else []
        before = run.once("before.json", lambda: evaluate.of_run(run, parts, "before"))
        print(f"before: {before['success']:.1%} of the {states} solved (greedy)")
        if run.fresh:
            evaluate.film_run(run, parts, "before.gif")
        (offline.train if logged else train)(run, parts, before, *logged)
        if run.finished:
            evaluate.film_run(run, parts, "after.gif")
            adapters.save_policy(parts.evaluated, out / "policy",
                                 parts.policy.save_pretrained)
    finally:
        parts.workers.close()
    if run.first_rank:
        plots.draw_curves({s.reward: [plots.read_metrics(out / "metrics.jsonl")]},
                          out / "curve.png")
    if not run.finished:
        return run.stopped()
    results = {"before": before, f"after {run.step} steps": run.read("after.json")}
    print(f"\n{states}, success, greedy, 95% Wilson intervals\n"
          + plots.success_table(results) + "\n" + run.times())
    print(f"{out}: metrics.jsonl, curve.png, GIFs, after.json, policy/, checkpoint/")
    return 0


def main(argv: list[str] | None = None) -> int:
    return launch(Settings, work, argv, check=check, free=FREE, job=job, **READING)


if __name__ == "__main__":
    sys.exit(main())
