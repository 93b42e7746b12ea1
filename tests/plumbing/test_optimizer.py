"""plumbing/optimizer.py against torch.optim.Adam, cases by hand, and the same steps elsewhere."""

import math

import pytest
import torch
from torch import nn

from plumbing import optimizer as optimizers


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# the update


def test_fp32_optimizer_equals_torch_adam():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    a = optimizers.make_optimizer(ours, lr=1e-2, betas=(0.8, 0.95))
    b = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.8, 0.95))
    for _ in range(20):
        x = torch.randn(8, 5)
        for model, opt in ((ours, a), (theirs, b)):
            opt.zero_grad()
            model(x).pow(2).sum().backward()
            opt.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-6)


def test_bf16_weights_move_only_with_fp32_masters():
    start = (
        torch.rand(1000) * 0.08 + 0.02
    ).bfloat16()  # typical weights: half a bf16 step is at least 3e-5
    ours, pure, wide = (
        nn.Parameter(start.clone()),
        nn.Parameter(start.clone()),
        nn.Parameter(start.float()),
    )
    a, c = (optimizers.make_optimizer(nn.ParameterList([p]), lr=5e-6) for p in (ours, wide))
    b = torch.optim.Adam([pure], lr=5e-6)
    for _ in range(100):
        for p, opt in ((ours, a), (pure, b), (wide, c)):
            p.grad = torch.ones_like(p)
            opt.step()
    assert torch.equal(pure, start)
    assert (ours != start).float().mean() > 0.9
    assert torch.equal(a.state[ours]["master"], wide) and torch.equal(ours, wide.bfloat16())


def test_clip_and_step_clips_to_the_norm():
    model = nn.Linear(3, 2)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    grads = [torch.randn_like(p) for p in model.parameters()]
    true_norm = math.sqrt(sum(g.square().sum().item() for g in grads))
    for max_norm, scale in ((0.5, 0.5 / true_norm), (100.0, 1.0)):
        for p, g, w in zip(model.parameters(), grads, before, strict=True):
            p.data.copy_(w)
            p.grad = g.clone()
        norm, stepped = optimizers.clip_and_step(opt, model, max_norm)
        assert stepped and norm == pytest.approx(true_norm)
        for p, g, w in zip(model.parameters(), grads, before, strict=True):
            torch.testing.assert_close(w - p, g * scale, atol=1e-6, rtol=1e-4)
            assert p.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradient_skips_the_step(value):
    model = nn.Linear(3, 2)
    opt = optimizers.make_optimizer(model, lr=1e-2)
    model(torch.ones(1, 3)).sum().backward()
    assert optimizers.clip_and_step(opt, model, 1.0)[1]
    weights = [p.detach().clone() for p in model.parameters()]
    moments = {k: v.clone() for k, v in optimizers.optimizer_tensors(opt).items()}
    model(torch.ones(1, 3)).sum().backward()
    model.weight.grad[0, 0] = value
    norm, stepped = optimizers.clip_and_step(opt, model, 1.0)
    assert not stepped and not math.isfinite(norm) and model.weight.grad is None
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(v, moments[k]) for k, v in optimizers.optimizer_tensors(opt).items())


def test_make_optimizer_rejects():
    with pytest.raises(ValueError, match="nothing to optimise"):
        optimizers.make_optimizer(nn.Linear(2, 2).requires_grad_(False), 1e-3)
    with pytest.raises(ValueError, match="lr must be"):
        optimizers.make_optimizer(nn.Linear(2, 2), -1.0)


def test_another_models_optimizer_state_is_refused():
    x, y = nn.Linear(4, 4), nn.Linear(4, 5)
    run, other = optimizers.make_optimizer(x, lr=1e-2), optimizers.make_optimizer(y, lr=1e-2)
    x(torch.ones(2, 4)).sum().backward()
    run.step()
    with pytest.raises(ValueError, match="another model's"):
        optimizers.load_optimizer_tensors(other, optimizers.optimizer_tensors(run).items())
    assert not other.state


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x.pop("optimizer.0.m"), "step, v: it is not complete"),
        (lambda x: x.update({"optimizer.0.n": x["optimizer.0.m"]}), "it is not complete"),
        (lambda x: x.update({"optimizer.2.m": x["optimizer.0.m"]}), "another model's"),
        (lambda x: x.update({"optimizer.-1.m": x["optimizer.0.m"]}), "another model's"),
        (lambda x: x.update({"optimizer.x.m": x["optimizer.0.m"]}), "another model's"),
        (lambda x: x.update({"optimizer.": x["optimizer.0.m"]}), "another model's"),
        (lambda x: x.update({"optimizer.1.v": x["optimizer.1.v"].bfloat16()}), "torch.bfloat16"),
        (lambda x: x.update({"optimizer.1.step": torch.tensor(1.0)}), "not torch.int64"),
        (lambda x: x.update({"optimizer.1.step": torch.ones(4)}), "not torch.int64"),
        (lambda x: x.update({"optimizer.1.v": torch.tensor(1.0)}), "another model's"),
        (lambda x: x["optimizer.1.v"].neg_(), "a number below 0"),
    ],
)
def test_a_damaged_optimizer_state_is_one_line_and_changes_nothing(change, words):
    model = nn.Linear(4, 4)
    optimizer = optimizers.make_optimizer(model, lr=1e-2)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    good = optimizers.optimizer_tensors(optimizer)
    tensors = {name: x.clone() for name, x in good.items()}
    change(tensors)
    with pytest.raises(ValueError) as error:
        optimizers.load_optimizer_tensors(optimizer, tensors.items())
    assert words in str(error.value) and "\n" not in str(error.value)
    assert all(x is good[name] for name, x in optimizers.optimizer_tensors(optimizer).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_optimiser_makes_the_same_steps(dtype, monkeypatch):
    """cpu:0 stands in for the other device: it is not `cpu`, so master, moments and step live apart
    from the parameter."""
    torch.manual_seed(0)
    here, away = nn.Linear(5, 3).to(dtype), nn.Linear(5, 3).to(dtype)
    away.load_state_dict(here.state_dict())
    a, b = (
        optimizers.make_optimizer(here, 1e-2),
        optimizers.make_optimizer(away, 1e-2, offload=True),
    )
    assert b.home(away.weight) == torch.device("cpu")
    monkeypatch.setattr(b, "home", lambda p: torch.device("cpu:0"))
    for _ in range(5):
        x = torch.randn(4, 5).to(dtype)
        for model, optimizer in ((here, a), (away, b)):
            model(x).float().square().sum().backward()
            optimizers.clip_and_step(optimizer, model, 1.0)
    assert torch.equal(here.weight, away.weight) and set(b.state[away.weight]) == {
        "step",
        "m",
        "v",
        "master",
    }
    resumed = nn.Linear(5, 3).to(dtype)  # a run without the flag goes on with it
    resumed.load_state_dict(here.state_dict())
    c = optimizers.make_optimizer(resumed, 1e-2, offload=True)
    optimizers.load_optimizer_tensors(
        c, [(name, x.clone()) for name, x in optimizers.optimizer_tensors(a).items()]
    )
    monkeypatch.setattr(c, "home", lambda p: torch.device("cpu:0"))
    for model, optimizer in ((here, a), (resumed, c)):
        model(x).float().square().sum().backward()
        optimizers.clip_and_step(optimizer, model, 1.0)
    assert torch.equal(here.weight, resumed.weight) and "master" in c.state[resumed.weight]
