"""The update of both papers (arXiv 2506.01713, 2511.15605): clipped steps over a step's rows, on one rank or many.

1. Each epoch the rows of all ranks, numbered by rank, are shuffled and cut into minibatches: where a row is computed changes nothing.
2. A rank sends its rows of a minibatch through in micro-batches; who has fewer fills up with passes that count for nothing (plumbing/ranks.py).
3. A minibatch with a non-finite loss or gradient is skipped and counted. With a target KL the updates end when the policy has moved that far.

SRPO-VLA passes once over its rows; further epochs and the target KL are ours. What the rows are, their log-probabilities and the loss's normaliser
come from vla_srpo.py and reflection_srpo.py; the loss is grpo.py's.
"""
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

import grpo
from plumbing import ranks as parallel


def check_update(s, groups: str) -> None:
    """ValueError, one line, for settings of either script that no update can be made with. groups: the name of the one that counts them."""
    if not s.clip_low < 1:
        raise ValueError(f"--clip_low must be below 1, got {s.clip_low}")
    if getattr(s, groups) < parallel.world_size():
        raise ValueError(f"--{groups} {getattr(s, groups)} for {parallel.world_size()} ranks: each needs one")
    if s.offload_optimizer and parallel.world_size() > 1:
        raise ValueError("--offload_optimizer is for one process; ranks divide the optimiser's state among them already")


def clipped_updates(model, optimizer, rows: int, epochs: int, minibatch: int, micro_batches: Callable[[torch.Tensor], list[Sequence[int]]],
                    normalizer: Callable[[torch.Tensor], float], loss: Callable, max_norm: float, target_kl: float = 0.0) -> dict:
    """Statistics over all updates: means, the largest ratio, and how many there were and were skipped.

    rows: of this rank, may be 0. minibatch: of all ranks' rows, an update each; 0: all in one. micro_batches(rows int64 (n,) of this rank) ->
    some of their numbers at a time. normalizer(rows int64 (n,) of all ranks) -> what `loss` divides by. loss(part, normalizer) -> (loss, statistics)
    as `grpo.policy_loss`; part None: this rank only fills up, with a loss whose gradient is 0."""
    counts = parallel.gather([rows])
    first, total, stats, norms, skipped = sum(counts[:parallel.rank()]), sum(counts), [], [], 0
    for chosen in (part for _ in range(epochs) for part in parallel.permutation(total).split(minibatch or total)):
        divisor, seen = normalizer(chosen), []
        mine = chosen[(chosen >= first) & (chosen < first + rows)] - first
        for part in parallel.even(micro_batches(mine) if len(mine) else []):
            value, stat = loss(part, divisor)
            (value * parallel.world_size()).backward()                  # ranks' gradients are averaged
            seen += [{name: float(x) for name, x in stat.items()}] * (part is not None)
        stats.append(grpo.merge_stats(parallel.gather(seen)))
        if target_kl and stats[-1]["old_kl"] > target_kl:
            optimizer.zero_grad()
            break
        norm, stepped = grpo.clip_and_step(optimizer, model, max_norm) if math.isfinite(stats[-1]["loss"]) else (math.nan, False)
        if stepped:
            norms.append(norm)
        else:
            optimizer.zero_grad()
            skipped += 1
    means = {name: float(np.mean([x[name] for x in stats])) for name in stats[0] if name not in ("tokens", "ratio_max")}
    return means | {"ratio_max": max(x["ratio_max"] for x in stats), "updates": len(norms), "skipped": skipped,
                    "grad_norm": float(np.mean(norms)) if norms else 0.0}
