"""The offline variant of SRPO-VLA (arXiv 2511.15605, eq. 15): logged trajectories instead of
rollouts, advantage-weighted regression instead of the clipped step. No code of it is public.

1. Read the trajectories; what cannot be used is set aside and counted (robots/trajectories.py).
2. Progress R_t of each, along its video, by a frozen world model.               [VLA 2] to [VLA 4]
3. What a chunk of actions gained, R_t - R_{t-1}, standardised over all trajectories.      [VLA 15]
4. Fine-tune on the logged actions, each weighted with exp(A / temperature).

Ours, where the paper says nothing: the temperature, the bound on weights, an increment for each
chunk of 8 actions. Baselines are other weights (`--weights`), not other code.

    python vla_srpo.py offline --data FOLDER_OR_ID --steps 6
    python -m studies.offline --out out/offline         # records trajectories, compares the weights
"""
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import grpo
from plumbing import plots, ranks
from plumbing.files import Journal
from plumbing.update import Update
from rewards import cluster
from robots import evaluate
from robots import policy as policies
from robots.openvla import ACTION_DIM, ACTION_TOKENS, from_env_actions
from robots.suite import Suite
from robots.trajectories import Loaders, find


@dataclass
class Logged:
    """A trajectory that can be trained on; its video is read when it is needed."""
    name: str
    task: int
    success: bool
    at: np.ndarray          # int (K + 1,), as `Trajectory.at`
    frames: np.ndarray      # uint8 (K, 1, side, side, 3), what the policy sees
    bins: Tensor            # (K, 56) int64, the logged actions
    mask: Tensor            # (K, 56) bool, those that ran


# 1. What there is

def read(loaders: Loaders, policy, key: str, suite: Suite) -> tuple[list[Logged], dict[str, str]]:
    """The usable ones of tasks that are played; by name why each other one is not."""
    texts, played = suite.instructions, {suite.instructions[task] for task in suite.tasks}
    logged, rejected, side = [], {}, policy.camera
    for name, load in tqdm(loaders.items(), "reading", disable=None):
        try:
            trajectory = load()
            if trajectory.instruction not in played:
                raise ValueError(f"no task that is played: {trajectory.instruction!r:.80}")
            if trajectory.images.shape[1:3] != (side, side):
                height, width = trajectory.images.shape[1:3]
                raise ValueError(f"images are {height}x{width}, the policy's camera has "
                                 f"{side}x{side}")
        except (ValueError, OSError) as error:
            rejected[name] = str(error)
            continue
        actions, executed = trajectory.chunks()
        steps = torch.arange(ACTION_TOKENS) // ACTION_DIM                       # (56,)
        logged.append(Logged(
            name, texts.index(trajectory.instruction), trajectory.success, trajectory.at,
            policy.frames(trajectory.images[trajectory.at[:-1]]),
            policy.encode(from_env_actions(actions), key).flatten(1),
            steps < torch.from_numpy(executed)[:, None]))
    return logged, rejected


# 2. Progress along a video

def reference(latents: np.ndarray, won: np.ndarray, i: int, curves: str) -> np.ndarray | None:
    """What the video of trajectory i is compared with: latents (C, D). won: numbers of its task's
    successes. ours: the mean of the OTHER successes; paper: the nearest of all clusters' centres,
    and None, itself, for a success. ValueError if there is no such success."""
    if curves == "paper" and i in won:
        return None
    others = won[won != i]
    if not len(others):
        raise ValueError("no other success of its task to be compared with")
    if curves == "ours":
        return latents[others].mean(0, keepdims=True)
    labels = cluster(latents[won])                                              # [VLA 3]
    return np.stack([latents[won[labels == c]].mean(0) for c in range(labels.max() + 1)]
                    or list(latents[won]))


def progress(encoder, loaders: Loaders, logged: list[Logged], curves: str, folder: Path
             ) -> dict[str, np.ndarray]:
    """By name R (K + 1,) before each chunk and at the end, where there is a reference. Each is
    written into `folder` as it is known, and read there the next time; the file's name says of
    which encoder, curves and trajectories it is."""
    made_of = [curves, type(encoder).__name__, encoder.pool, str(encoder.config),
               [(x.name, x.task, x.success, zlib.crc32(x.frames.tobytes())) for x in logged]]
    name = evaluate.fingerprint_of(encoder.model, json.dumps(made_of).encode())
    journal = Journal(folder / f"progress-{name}.jsonl", {"curves": curves})
    done = {row["name"]: row["R"] for row in journal.rows}
    todo = [(i, x) for i, x in enumerate(logged) if x.name not in done]
    latents = np.concatenate([
        encoder.encode([loaders[x.name]().images for x in logged[i:i + encoder.batch_size]]).numpy()
        for i in tqdm(range(0, len(logged), encoder.batch_size), "latents", disable=None)
    ]) if todo else None                                                        # (N, D)
    success, task = (np.array([getattr(x, name) for x in logged]) for name in ("success", "task"))
    for i, x in tqdm(todo, "progress", disable=None):
        try:
            towards = reference(latents, np.flatnonzero(success & (task == x.task)), i, curves)
        except ValueError:
            done[x.name] = None
            journal.add({"name": x.name, "R": None})
            continue
        images = loaders[x.name]().images
        if curves == "paper":
            ends, r = encoder.paper_progress(images, towards)
        else:
            seen, r = encoder.progress(images, towards, max(1, int(x.at[1] - x.at[0])))
            ends = seen - 1
        # Before the first window nothing is known: no gain
        done[x.name] = np.interp(x.at, ends, r)
        journal.add({"name": x.name, "R": done[x.name]})
    journal.close()
    return {name: np.array(r) for name, r in done.items() if r is not None}


# 3. From progress to weights

def advantages(gains: list[np.ndarray]) -> list[np.ndarray]:
    """[VLA 15] A = (D - mean) / std over all trajectories' D; 0 where all are equal.

    >>> [a.round(2).tolist() for a in advantages([np.array([0.0, 1.0]), np.array([0.5])])]
    [[-1.22, 1.22], [0.0]]
    """
    everything = np.concatenate(gains)
    std = everything.std()
    return [(d - everything.mean()) / std if std > 1e-9 else np.zeros_like(d) for d in gains]


def rabc(gains: list[np.ndarray], kappa: float = 0.01) -> list[np.ndarray]:
    """LeRobot's RA-BC (arXiv 2509.25358, eqs. 8 and 9): 1 for a gain above kappa, 0 for a loss, in
    between a ramp over the mean +- 2 std."""
    everything = np.concatenate(gains)
    low, width = max(everything.mean(), 0.0) - 2 * everything.std(), 4 * everything.std() + 1e-6
    return [np.where(d > kappa, 1.0, np.where(d < 0, 0.0, ((d - low) / width).clip(0, 1)))
            for d in gains]


def weights(logged: list[Logged], curves: dict[str, np.ndarray], s) -> list[np.ndarray]:
    """Weight (K,) of each trajectory's chunks; 1 for one whose progress is not known."""
    if s.weights in ("all", "successes"):
        return [np.full(len(x.bins), float(s.weights == "all" or x.success)) for x in logged]
    if s.weights == "outcome":          # of a trajectory, as its return: one for all its chunks
        gains = {x.name: np.array([float(x.success)]) for x in logged}
    else:
        gains = {x.name: np.diff(curves[x.name]) for x in logged if x.name in curves}   # [VLA 15]
    if not gains:
        raise ValueError("no task has two successes: there is no progress to learn from; give "
                         "--weights successes, or more trajectories")
    # paper: temperature, form and bound of the weights are not given; these are AWR's
    found = rabc(list(gains.values())) if s.weights == "rabc" else [
        np.exp((a / s.awr_temperature).clip(max=np.log(s.max_weight)))
        for a in advantages(list(gains.values()))]
    by_name = dict(zip(gains, found, strict=True))
    return [by_name.get(x.name, 1.0) * np.ones(len(x.bins)) for x in logged]


# 4. The fine-tuning

def prepare(run, parts) -> policies.Batch:
    """This rank's rows, each with its weight as the advantage; a line of what there is, and a
    picture of the curves."""
    s, instructions = run.s, parts.suite.instructions
    folder, loaders = find(s.data, s.camera)
    logged, rejected = read(loaders, parts.policy, parts.key, parts.suite)
    if run.first_rank and rejected:
        journal = Journal(run.out / "rejected.jsonl", keep=lambda row: False)
        for name, reason in rejected.items():
            journal.add({"name": name, "reason": reason})
        journal.close()
    common = "".join(f"; {n} x {reason}" for reason, n in Counter(rejected.values()).most_common(3))
    said = f"{len(rejected)} of {len(loaders)} trajectories cannot be used{common}"
    if len(logged) < ranks.world_size():
        raise ValueError(f"--data {s.data}: {said}; each rank needs one")
    curves = {} if parts.encoder is None else ranks.first(
        lambda: progress(parts.encoder, loaders, logged, s.curves, folder))
    given = weights(logged, curves, s)
    everything = np.concatenate(given)
    if not everything.any():
        raise ValueError(f"--weights {s.weights}: no chunk has a weight; {said}")
    run.say(f"{len(logged)} trajectories, {sum(x.success for x in logged)} successes, "
            f"{len(everything)} chunks; {said}" + (
                f"; no progress is known of {len(logged) - len(curves)}" if curves else "")
            + f"\nweights: mean {everything.mean():.2f}, largest {everything.max():.2f}; as much "
            f"as {everything.sum()**2 / (everything**2).sum() / len(everything):.0%} of the chunks")
    if curves and run.first_rank:
        drawn: dict[str, list] = {}
        for x in (x for x in logged if x.name in curves):
            drawn.setdefault(instructions[x.task], []).append((x.success, x.at, curves[x.name]))
        plots.draw_progress(drawn, run.out / "progress.png")
    rows = [(x, k, w) for x, some in run.mine(list(zip(logged, given, strict=True)))
            for k, w in enumerate(some) if w > 0] or [(logged[0], 0, 0.0)]
    return policies.Batch(
        frames=torch.from_numpy(np.stack([x.frames[k] for x, k, _ in rows])),
        instructions=[instructions[x.task] for x, _, _ in rows],
        bins=torch.stack([x.bins[k] for x, k, _ in rows]), logp=torch.zeros(0),
        mask=torch.stack([x.mask[k] & bool(w) for x, k, w in rows]),
        advantage=torch.tensor([float(w) for _, _, w in rows]), trajectory=torch.zeros(0))


def train(run, parts, before: dict, batch: policies.Batch) -> None:
    """Steps, each --epochs passes over all that is logged; else as vla_srpo's."""
    s, policy, optimizer = run.s, parts.policy, parts.optimizer
    for step in run.steps(s.steps, zero={"heldout": before["success"]}):
        optimizer.param_groups[0]["lr"] = s.lr * (1 - (1 - s.lr_end) * (step - 1) / s.steps)
        update = Update(policy, optimizer, grpo.merge_stats, s.max_norm)
        tokens = sum(run.gather([int(batch.mask.sum())]))
        for chosen in update.minibatches(batch.rows, s.epochs, s.minibatch):
            normalizer = tokens * len(chosen) / update.rows
            for part in update.micro_batches(chosen, torch.split, s.micro_batch):
                logp = policies.logprobs(policy, batch, part, 1.0)              # (B, 56)
                weight, mask = (x[part].to(logp.device) for x in (batch.advantage, batch.mask))
                # At ratio 1 the policy gradient with weights for advantages is the gradient of
                # the weighted cross-entropy
                loss, stats = grpo.policy_loss(logp, None, weight, mask, normalizer=normalizer)
                nll = -(logp.detach() * mask).sum() / mask.sum().clamp(min=1)
                update.backward(loss, stats | {"nll": nll})
            update.step()
        if parts.average is not None:
            parts.average.update_parameters(policy)
        run.lap("update")
        row = update.summary() | {"lr": optimizer.param_groups[0]["lr"], "tokens": tokens}
        run.log(row | evaluate.when_due(run, parts), f"nll {row.get('nll', 0):.3f} a token")
