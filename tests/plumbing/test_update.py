"""plumbing/update.py against a naive loop over its minibatches. What the scripts make of it: their own tests and, on two ranks, test_parallel.py."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plumbing import ranks as parallel
from plumbing.update import check_update, clipped_updates

ROWS = 7


@pytest.fixture
def problem():
    """A line through seven points, one row each, and the loss of some rows as grpo.policy_loss gives it."""
    torch.manual_seed(0)
    x, y, model = torch.randn(ROWS, 3), torch.randn(ROWS), torch.nn.Linear(3, 1)
    calls = []

    def loss(part, normalizer):
        calls.append((list(map(int, part)), normalizer))
        value = (model(x[part]).squeeze(1) - y[part]).square().sum() / normalizer
        one = torch.tensor(1.0)
        return value, dict(loss=value.detach(), old_kl=one * len(calls), clip_low=one * 0, tokens=one * len(part), ratio_max=one * len(calls))
    return SimpleNamespace(x=x, y=y, model=model, loss=loss, calls=calls, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def work(p, minibatch=3, epochs=2, max_norm=100.0, **more) -> dict:
    torch.manual_seed(1)
    return clipped_updates(p.model, p.optimizer, ROWS, epochs, minibatch, lambda rows: list(rows.split(2)), lambda rows: 10.0 * len(rows), p.loss, max_norm, **more)


@pytest.mark.parametrize("minibatch, max_norm", [(3, 100.0), (3, 0.05), (0, 100.0), (1, 100.0)])
def test_a_naive_loop_takes_the_same_steps(problem, minibatch, max_norm):
    weight, bias = (p.detach().clone().double() for p in problem.model.parameters())
    torch.manual_seed(1)
    losses, norms = [], []
    for order in (torch.randperm(ROWS).tolist() for _ in range(2)):
        size = minibatch or ROWS
        for rows in (order[i:i + size] for i in range(0, ROWS, size)):
            gw, gb, total = torch.zeros_like(weight), torch.zeros_like(bias), 0.0
            for i in rows:
                error = (problem.x[i].double() * weight[0]).sum() + bias[0] - problem.y[i]
                total += float(error ** 2) / (10 * len(rows))
                gw[0] += 2 * error * problem.x[i] / (10 * len(rows))
                gb += 2 * error / (10 * len(rows))
            norm = float((gw.square().sum() + gb.square().sum()).sqrt())
            weight, bias = (p - 0.1 * g * min(1.0, max_norm / norm) for p, g in ((weight, gw), (bias, gb)))
            losses.append(total)
            norms.append(norm)
    stats = work(problem, minibatch, max_norm=max_norm)
    for got, wanted in zip(problem.model.parameters(), (weight, bias)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    assert stats["updates"] == len(losses) and stats["skipped"] == 0
    np.testing.assert_allclose([stats["loss"], stats["grad_norm"]], [np.mean(losses), np.mean(norms)], rtol=1e-5)
    assert stats["ratio_max"] == len(problem.calls) and all(len(part) <= 2 for part, _ in problem.calls)
    assert sorted(i for part, _ in problem.calls for i in part) == sorted([*range(ROWS)] * 2)          # every row once in an epoch


def test_the_update_that_passes_the_target_kl_is_not_made(problem):
    """The stand-in's KL is the number of its call: minibatches of 3 rows are calls 1 and 2, 3 and 4, 5."""
    stats = work(problem, target_kl=3.0)
    assert stats["updates"] == 1 and stats["skipped"] == 0 and len(problem.calls) == 4
    assert all(p.grad is None for p in problem.model.parameters())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_minibatch_that_is_not_finite_leaves_the_weights(problem, where):
    if where == "loss":
        problem.y[4] = float("nan")
    else:
        problem.model.weight.register_hook(lambda g: g * (float("nan") if len(problem.calls) == 1 else 1))
    stats = work(problem, epochs=1)
    assert (stats["updates"], stats["skipped"]) == (2, 1)
    assert all(p.isfinite().all() for p in problem.model.parameters())


@pytest.mark.parametrize("groups", ["groups", "prompts"])
@pytest.mark.parametrize("changes, ranks, words", [
    (dict(clip_low=1.0), 1, "--clip_low must be below 1, got 1.0"),
    (dict(count=3), 4, "--{} 3 for 4 ranks: each needs one"),
    (dict(offload_optimizer=True), 2, "--offload_optimizer is for one process"),
])
def test_settings_that_no_update_can_be_made_with(groups, changes, ranks, words, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: ranks)
    values = dict(clip_low=0.2, offload_optimizer=False, count=8)
    settings = lambda changes: SimpleNamespace(**{groups if name == "count" else name: value for name, value in (values | changes).items()})
    check_update(settings({}), groups)
    with pytest.raises(ValueError) as error:
        check_update(settings(changes), groups)
    assert words.format(groups) in str(error.value) and "\n" not in str(error.value)
