"""The updates of one RL step, of both papers: minibatches of all ranks' rows, each rank's part of
them in micro-batches, a clipped optimiser step for each minibatch.

1. Each epoch the rows of all ranks, numbered by rank, are shuffled and cut into minibatches: on
   which rank a row is computed changes nothing.
2. A rank sends its rows of a minibatch through in micro-batches. FSDP needs the same number of
   passes of every rank: who has fewer is given a row again, and what it yields counts nothing.
3. A minibatch with a non-finite loss or gradient is skipped and counted. With a target KL the
   updates end when the policy has moved that far.

The loops, the log-probabilities and the loss stand in the scripts: they are the lesson.
"""
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from plumbing import ranks
from plumbing.optimizer import clip_and_step


class Update:
    """for chosen in u.minibatches(...): for part in u.micro_batches(...): u.backward(loss, stats)
    and after each minibatch u.step(); u.summary() is for the log.

    merge: statistics of micro-batches -> of the minibatch (grpo.merge_stats)."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, merge: Callable,
                 max_norm: float, target_kl: float = 0.0):
        self.model, self.optimizer, self.merge = model, optimizer, merge
        self.max_norm, self.target_kl = max_norm, target_kl
        self.stats: list[dict] = []
        self.norms: list[float] = []
        self.skipped, self.rows = 0, 0

    def minibatches(self, rows: int, epochs: int, size: int,
                    owner: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Numbers of all ranks' rows, int64 (n,), an update each. rows: of this rank, may be 0;
        size: of all ranks' rows, 0: all in one, in order. owner: of each row; an owner's stay
        together, as far as size allows."""
        owners = ranks.gather([(ranks.rank(), i) for i in (owner or range(rows))[:rows]])
        start = sum(rank < ranks.rank() for rank, _ in owners)
        self.mine, self.rows, self.far = range(start, start + rows), len(owners), False
        for _ in range(epochs if self.rows else 0):
            # The first rank's draw: the ranks' own numbers have gone apart in the rollouts
            order = ranks.first(lambda: torch.randperm(self.rows) if size
                                else torch.arange(self.rows))
            place: dict = {}        # of an owner: where its first row comes
            for i in order.tolist():
                place.setdefault(owners[i], len(place))
            order = order[torch.tensor([place[owners[i]] for i in order]).argsort(stable=True)]
            for chosen in order.split(size or self.rows):
                self.seen: list[dict] = []
                yield chosen
                if self.far:
                    return

    def micro_batches(self, chosen: Tensor, split: Callable[..., Iterator[Sequence[int]]],
                      *how) -> Iterator[Sequence[int]]:
        """This rank's rows of a minibatch, some at a time, as split(rows, *how) divides them."""
        own = chosen[(chosen >= self.mine.start) & (chosen < self.mine.stop)] - self.mine.start
        parts = list(split(own, *how)) if len(own) else []
        most = max(ranks.gather([len(parts)]))
        for number in range(most):
            self.counts = number < len(parts)
            yield parts[number] if self.counts else (parts or [torch.tensor([0])])[0][:1]

    def backward(self, loss: Tensor, stats: dict) -> None:
        """Add a micro-batch's gradient: with the whole minibatch's normaliser they sum to its."""
        (loss * (ranks.world_size() * self.counts)).backward()      # FSDP averages over the ranks
        if self.counts:
            self.seen.append({name: float(x) for name, x in stats.items()})

    def step(self) -> None:
        """One optimiser step; none if the policy has moved too far, or a number is not finite."""
        self.stats.append(self.merge(ranks.gather(self.seen)))
        self.far = bool(self.target_kl) and self.stats[-1]["old_kl"] > self.target_kl
        if self.far:
            return self.optimizer.zero_grad()
        norm, stepped = math.nan, False
        if math.isfinite(self.stats[-1]["loss"]):
            norm, stepped = clip_and_step(self.optimizer, self.model, self.max_norm)
        if stepped:
            self.norms.append(norm)
        else:
            self.optimizer.zero_grad()
            self.skipped += 1

    def summary(self) -> dict:
        """Means of the statistics over the updates, the largest ratio, counts of updates."""
        counts = {"updates": len(self.norms), "skipped": self.skipped}
        if not self.stats:
            return counts
        return counts | {"grad_norm": float(np.mean(self.norms)) if self.norms else 0.0} | {
            name: float((max if name == "ratio_max" else np.mean)([x[name] for x in self.stats]))
            for name in self.stats[0] if name != "tokens"}
