"""plumbing/update.py against a naive loop over its minibatches. What the scripts make of it: their
own tests and, on two ranks, test_ranks.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import grpo
from plumbing.update import Update

ROWS = 7


@pytest.fixture
def problem():
    """A line through seven points, one row each, and the loss of some rows as grpo.policy_loss
    gives it."""
    torch.manual_seed(0)
    x, y, model = torch.randn(ROWS, 3), torch.randn(ROWS), torch.nn.Linear(3, 1)
    calls = []

    def loss(part, normalizer):
        calls.append((list(map(int, part)), normalizer))
        value = (model(x[part]).squeeze(1) - y[part]).square().sum() / normalizer
        one = torch.tensor(1.0)
        return value, dict(
            loss=value.detach(),
            old_kl=one * len(calls),
            clip_low=one * 0,
            tokens=one * len(part),
            ratio_max=one * len(calls),
        )

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return SimpleNamespace(x=x, y=y, model=model, loss=loss, calls=calls, optimizer=optimizer)


def work(p, minibatch=3, epochs=2, max_norm=100.0, target_kl=0.0) -> dict:
    torch.manual_seed(1)
    update = Update(p.model, p.optimizer, grpo.merge_stats, max_norm, target_kl)
    for chosen in update.minibatches(ROWS, epochs, minibatch):
        assert update.rows == ROWS
        for part in update.micro_batches(chosen, torch.split, 2):
            update.backward(*p.loss(part, 10.0 * len(chosen)))
        update.step()
    return update.summary()


def test_the_rows_of_an_owner_stay_together(problem):
    """In minibatches of three: owners are shuffled, not their rows, and every row comes once."""
    update = Update(problem.model, problem.optimizer, grpo.merge_stats, 1.0)
    owner, seen = ["a", "a", "a", "b", "b", "b", "c"], set()
    for seed in range(20):
        torch.manual_seed(seed)
        order = torch.cat(list(update.minibatches(ROWS, 1, 3, owner))).tolist()
        assert sorted(order) == list(range(ROWS))
        names = [owner[i] for i in order]
        assert sum(a != b for a, b in zip(names, names[1:])) == 2
        seen.add(tuple(dict.fromkeys(names)))
    assert len(seen) == 6


@pytest.mark.parametrize("minibatch, max_norm", [(3, 100.0), (3, 0.05), (0, 100.0), (1, 100.0)])
def test_a_naive_loop_takes_the_same_steps(problem, minibatch, max_norm):
    weight, bias = (p.detach().clone().double() for p in problem.model.parameters())
    torch.manual_seed(1)
    losses, norms = [], []
    for order in (torch.randperm(ROWS).tolist() for _ in range(2)):
        size = minibatch or ROWS
        for rows in (order[i : i + size] for i in range(0, ROWS, size)):
            gw, gb, total = torch.zeros_like(weight), torch.zeros_like(bias), 0.0
            for i in rows:
                error = (problem.x[i].double() * weight[0]).sum() + bias[0] - problem.y[i]
                total += float(error**2) / (10 * len(rows))
                gw[0] += 2 * error * problem.x[i] / (10 * len(rows))
                gb += 2 * error / (10 * len(rows))
            norm = float((gw.square().sum() + gb.square().sum()).sqrt())
            scale = 0.1 * min(1.0, max_norm / norm)
            weight, bias = weight - scale * gw, bias - scale * gb
            losses.append(total)
            norms.append(norm)
    stats = work(problem, minibatch, max_norm=max_norm)
    for got, wanted in zip(problem.model.parameters(), (weight, bias), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    assert stats["updates"] == len(losses) and stats["skipped"] == 0
    np.testing.assert_allclose(
        [stats["loss"], stats["grad_norm"]], [np.mean(losses), np.mean(norms)], rtol=1e-5
    )
    assert stats["ratio_max"] == len(problem.calls) and "tokens" not in stats
    assert all(len(part) <= 2 for part, _ in problem.calls)
    each = sorted(i for part, _ in problem.calls for i in part)
    assert each == sorted([*range(ROWS)] * 2)  # every row once in an epoch


def test_one_minibatch_of_all_rows_keeps_their_order(problem):
    work(problem, minibatch=0, epochs=1)
    assert [part for part, _ in problem.calls] == [[0, 1], [2, 3], [4, 5], [6]]


def test_statistics_are_those_of_the_whole_minibatch(problem):
    """The stand-in's KL is the number of its call. Weighted by rows: calls 1 (two rows) and 2 (one)
    make 4/3, calls 3 and 4 10/3, call 5 alone 5."""
    stats = work(problem, epochs=1)
    assert stats["old_kl"] == pytest.approx((4 / 3 + 10 / 3 + 5) / 3)


def test_the_update_that_passes_the_target_kl_is_not_made(problem):
    """Minibatches of 3 rows are calls 1 and 2, 3 and 4, 5."""
    stats = work(problem, target_kl=3.0)
    assert stats["updates"] == 1 and stats["skipped"] == 0 and len(problem.calls) == 4
    assert all(p.grad is None for p in problem.model.parameters())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_minibatch_that_is_not_finite_leaves_the_weights(problem, where):
    if where == "loss":
        problem.y[4] = float("nan")
    else:
        problem.model.weight.register_hook(
            lambda g: g * (float("nan") if len(problem.calls) == 1 else 1)
        )
    stats = work(problem, epochs=1)
    assert (stats["updates"], stats["skipped"]) == (2, 1)
    assert all(p.isfinite().all() for p in problem.model.parameters())


def test_where_there_is_nothing_to_train_on_nothing_is_done(problem):
    update = Update(problem.model, problem.optimizer, grpo.merge_stats, 1.0)
    assert list(update.minibatches(0, 2, 3)) == []
    assert update.summary() == {"updates": 0, "skipped": 0} and update.rows == 0


def test_a_rank_without_rows_makes_passes_that_count_nothing(problem, monkeypatch):
    """The other rank of two has all seven rows, and three micro-batches of the minibatch."""
    from plumbing import ranks

    update = Update(problem.model, problem.optimizer, grpo.merge_stats, 1.0)
    others = {int: [(0, i) for i in range(ROWS)]}
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "gather", lambda mine: others[int] + mine)
    monkeypatch.setattr(ranks, "first", lambda make: make())
    before = [p.detach().clone() for p in problem.model.parameters()]
    (chosen,) = update.minibatches(0, 1, 0)
    others[int] = [3]
    parts = list(update.micro_batches(chosen, lambda rows: rows.split(2)))
    assert [part.tolist() for part in parts] == [[0]] * 3
    for part in update.micro_batches(chosen, lambda rows: rows.split(2)):
        update.backward(*problem.loss(part, 1.0))
    assert update.seen == []
    assert all((p.grad == 0).all() for p in problem.model.parameters())
    others[int] = [dict(loss=1.0, old_kl=0.5, clip_low=0.0, tokens=7.0, ratio_max=1.0)]
    update.step()
    assert update.summary()["old_kl"] == 0.5
    after = problem.model.parameters()
    assert all(torch.equal(p, q) for p, q in zip(after, before, strict=True))
