"""Oracles for grpo.py: naive loops, autograd, cases by hand."""

import math

import pytest
import torch

import grpo


def batch(rows=6, length=5, seed=0):
    """Random log-probs near old ones (fp64), per-row advantages and a ragged mask."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, length, generator=g, dtype=torch.float64) * 3
    logp = old + 0.3 * torch.randn(rows, length, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (rows,), generator=g)
    mask = torch.arange(length)[None] < lengths[:, None]
    return logp.requires_grad_(), old, torch.randn(rows, generator=g, dtype=torch.float64), mask


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# advantages


def test_what_underflow_leaves_is_no_signal():
    rewards = torch.tensor([[4e-45, 7e-40, 0.0, 1e-7], [0.0, 0.0, 0.0, 1e-4]])
    assert (grpo.group_advantages(rewards) != 0).any(1).tolist() == [False, True]


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_equal_a_naive_loop(scale):
    rewards = torch.rand(5, 7, dtype=torch.float64)
    got = grpo.group_advantages(rewards, scale=scale, eps=1e-3)
    for p, group in enumerate(rewards.tolist()):
        mean = sum(group) / 7
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 7)
        expected = [(r - mean) / (std + 1e-3) if scale else r - mean for r in group]
        assert got[p].tolist() == pytest.approx(expected, abs=1e-12)


def test_equal_rewards_give_exactly_zero():
    rounded = 0
    for value in (0.1, 0.7, 0.3, 1e6 + 0.3):
        for size in (3, 7, 11, 13):
            rewards = torch.full((2, size), value)
            rounded += bool((rewards - rewards.mean(1, keepdim=True)).any())
            assert (grpo.group_advantages(rewards, eps=0.0) == 0).all()
            assert (grpo.group_advantages(rewards, scale=False) == 0).all()
    assert rounded > 0  # the case that a test of std, or none, gets wrong was among them


def test_two_valued_rewards_give_binary_advantages():
    binary = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]])
    shaped = torch.tensor([[1.0, 0.3, 0.3, 1.0, 0.3]])
    torch.testing.assert_close(
        grpo.group_advantages(binary), grpo.group_advantages(shaped), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("scale", [True, False])
def test_advantages_of_any_dtype_are_those_of_fp32(dtype, scale):
    """Thirds are no bf16 numbers: a mean that was rounded to bf16 would be off by 1e-3, and one of
    integers does not exist."""
    rewards = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]]).to(dtype)
    got = grpo.group_advantages(rewards, scale=scale)
    assert got.dtype == torch.float32 and rewards.dtype == dtype
    assert torch.equal(got, grpo.group_advantages(rewards.float(), scale=scale))
    third = math.sqrt(0.5) if scale else 1 / 3  # std of 1, 0, 0: sqrt(2) / 3
    expected = torch.tensor([[2 * third, -third, -third], [third, third, -2 * third]])
    torch.testing.assert_close(got[:2], expected, atol=1e-5, rtol=0)
    assert (got[2:] == 0).all()


def test_advantages_of_fp64_stay_fp64():
    rewards = torch.tensor([[1.0, 1.0 + 1e-5, 1.0]], dtype=torch.float64)
    got = grpo.group_advantages(rewards, eps=0.0)
    assert got.dtype == torch.float64
    assert got[0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(2), -math.sqrt(0.5)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bf16_rewards_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=f"^rewards must be finite, got {value}: check"):
        grpo.group_advantages(torch.tensor([[0.0, value]], dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "rewards", [torch.rand(4, 1), torch.rand(4), torch.tensor([[0.0, math.nan]])]
)
def test_bad_rewards_raise_one_line(rewards):
    with pytest.raises(ValueError, match="rewards must be") as e:
        grpo.group_advantages(rewards)
    assert "\n" not in str(e.value)


# log-probabilities


@pytest.mark.parametrize("chunk", [1, 33, 2**24])
def test_token_logprobs_equal_log_softmax_with_gradient(monkeypatch, chunk):
    monkeypatch.setattr(grpo, "CHUNK_ELEMENTS", chunk)
    logits = torch.randn(2, 5, 11, dtype=torch.float64).mul(4).requires_grad_()
    tokens = torch.randint(11, (2, 5))
    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    logq = torch.log_softmax(logits / 1.6, -1)
    logp, entropy = logq.gather(-1, tokens[..., None]).squeeze(-1), -(logq.exp() * logq).sum(-1)
    (grad,) = torch.autograd.grad((a * logp + b * entropy).sum(), logits)
    got_logp, got_entropy = grpo.token_logprobs(logits, tokens, 1.6)
    (got_grad,) = torch.autograd.grad((a * got_logp + b * got_entropy).sum(), logits)
    for got, expected in ((got_logp, logp), (got_entropy, entropy), (got_grad, grad)):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda z: grpo.token_logprobs(z, tokens, 1.6), logits)


def test_token_logprobs_of_bf16_logits_do_fp32_maths():
    logits = (torch.randn(3, 4, 1000) * 5).bfloat16().requires_grad_()
    tokens = torch.randint(1000, (3, 4))
    exact = logits.detach().double().requires_grad_()
    logq = torch.log_softmax(exact / 0.7, -1)
    expected, entropy = logq.gather(-1, tokens[..., None]).squeeze(-1), -(logq.exp() * logq).sum(-1)
    (expected + entropy).sum().backward()
    got, got_entropy = grpo.token_logprobs(logits, tokens, 0.7)
    (got + got_entropy).sum().backward()
    assert got.dtype == got_entropy.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        got.double(), expected, atol=1e-5, rtol=1e-5
    )  # log-softmax in bf16 is off by 1e-2
    torch.testing.assert_close(got_entropy.double(), entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logits.grad.double(), exact.grad, atol=1e-6, rtol=2**-8
    )  # one rounding to bf16


def test_token_logprobs_save_no_fp32_copy_for_the_backward():
    logits = torch.randn(8, 1000).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grpo.token_logprobs(logits, torch.zeros(8, dtype=torch.int64))
    assert max(t.numel() for t in saved if t.dtype == torch.float32) == 8
    assert [t.data_ptr() for t in saved if t.numel() == 8000] == [logits.data_ptr()]


def test_token_logprobs_allow_forbidden_tokens():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    logp, entropy = grpo.token_logprobs(logits, torch.tensor([0]))
    (logp + entropy).sum().backward()
    assert entropy.item() == pytest.approx(math.log(2)) and logits.grad.tolist() == [
        [0.5, -0.5, 0.0]
    ]


@pytest.mark.parametrize("shape, temperature", [((2, 4), 1.0), ((2, 3), 0.0), ((2, 3), math.nan)])
def test_token_logprobs_reject(shape, temperature):
    with pytest.raises(ValueError, match="must be|tokens, .* logits"):
        grpo.token_logprobs(
            torch.zeros(2, 3, 5), torch.zeros(shape, dtype=torch.int64), temperature
        )


# the loss


@pytest.mark.parametrize("on_policy", [True, False])
def test_at_ratio_one_the_gradient_is_reinforce(on_policy):
    logp, _, adv, mask = batch()
    loss, stats = grpo.policy_loss(logp, None if on_policy else logp.detach().clone(), adv, mask)
    (grad,) = torch.autograd.grad(loss, logp)
    (reinforce,) = torch.autograd.grad(-(logp * adv[:, None] * mask).sum() / mask.sum(), logp)
    torch.testing.assert_close(grad, reinforce, atol=1e-12, rtol=1e-12)
    assert (
        stats["ratio_max"] == 1 and stats["old_kl"] == stats["clip_low"] == stats["clip_high"] == 0
    )


@pytest.mark.parametrize(
    "ratio, adv, loss, slope, low, high",
    [
        (1.5, +2.0, -2.56, 0.0, 0, 1),  # already raised enough: 1.28 * 2, no gradient
        (1.2, +2.0, -2.40, -2.4, 0, 0),  # inside the wider upper clip
        (0.5, +2.0, -1.00, -1.0, 0, 0),  # a good token made rarer: never clipped
        (0.5, -2.0, +1.60, 0.0, 1, 0),  # already lowered enough: 0.8 * 2, no gradient
        (1.5, -2.0, +3.00, +3.0, 0, 0),  # a bad token made likelier: never clipped
    ],
)
def test_clip_by_hand(ratio, adv, loss, slope, low, high):
    logp = torch.tensor([[math.log(0.3 * ratio)]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[math.log(0.3)]], dtype=torch.float64)
    got, stats = grpo.policy_loss(logp, old, torch.tensor([adv]), torch.ones(1, 1))
    got.backward()
    assert got.item() == pytest.approx(loss) and logp.grad.item() == pytest.approx(
        slope
    )  # d(rho A)/dlogp = rho A
    assert (stats["clip_low"], stats["clip_high"]) == (low, high)
    assert stats["ratio_max"].item() == pytest.approx(ratio)
    assert stats["old_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))


def test_k3_kl_by_hand():
    logp = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log().requires_grad_()
    ref = torch.tensor([[0.25, 0.25]], dtype=torch.float64).log()
    loss, stats = grpo.policy_loss(
        logp, None, torch.zeros(1), torch.ones(1, 2), ref_logp=ref, beta=0.1
    )
    k3 = 0.5 - math.log(0.5) - 1  # second token: 0
    assert stats["ref_kl"].item() == pytest.approx(k3 / 2) and loss.item() == pytest.approx(
        0.1 * k3 / 2
    )
    loss.backward()
    assert logp.grad.tolist()[0] == pytest.approx(
        [0.1 * (1 - 0.5) / 2, 0.0]
    )  # d k3 / dlogp = 1 - ref/pi
    watched, stats = grpo.policy_loss(
        logp, None, torch.zeros(1), torch.ones(1, 2), ref_logp=ref
    )  # beta 0: only measured
    assert watched.item() == 0 and stats["ref_kl"].item() == pytest.approx(k3 / 2)


def test_extreme_log_ratios_stay_finite():
    logp = torch.tensor([[-1.0, -900.0]], requires_grad=True)
    loss, stats = grpo.policy_loss(
        logp,
        torch.tensor([[-900.0, -1.0]]),
        torch.tensor([-1.0]),
        torch.ones(1, 2),
        ref_logp=torch.tensor([[-900.0, -1.0]]),
        beta=0.1,
    )
    loss.backward()
    assert (
        torch.isfinite(loss)
        and torch.isfinite(logp.grad).all()
        and all(torch.isfinite(v) for v in stats.values())
    )


def how(aggregate: str, mask: torch.Tensor, trajectory=None) -> dict:
    """The whole batch's arguments of `policy_loss`."""
    if aggregate in ("token", "constant"):
        return dict(normalizer=float(mask.sum()) if aggregate == "token" else len(mask) * 9.0)
    weight = grpo.row_weights(mask, trajectory if aggregate == "trajectory" else None)
    return dict(row_weight=weight, normalizer=float((mask * weight[:, None]).sum()))


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_aggregates_equal_a_naive_loop(aggregate):
    """Loss and gradient."""
    logp, old, adv, mask = batch()
    per_row = []
    for b in range(len(adv)):
        terms = []
        for t in range(mask.shape[1]):
            if mask[b, t]:
                rho = (logp[b, t] - old[b, t]).exp()
                terms.append(-torch.minimum(rho * adv[b], rho.clamp(0.8, 1.28) * adv[b]))
        per_row.append(terms)
    expected = {
        "token": sum(map(sum, per_row)) / sum(map(len, per_row)),
        "sequence": sum(sum(r) / len(r) for r in per_row) / len(per_row),
        "constant": sum(map(sum, per_row)) / (len(per_row) * 9),
    }[aggregate]
    options = how(aggregate, mask)
    if aggregate != "constant":
        del options["normalizer"]  # it is what the weights add up to
    loss, _ = grpo.policy_loss(logp, old, adv, mask, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, logp)[0] for x in (loss, expected)), atol=0, rtol=1e-6)
    adv = adv[:, None].expand_as(logp)
    per_token, _ = grpo.policy_loss(logp, old, adv, mask, **options)
    assert per_token.item() == loss.item()


def test_rows_of_one_trajectory_share_its_mean():
    logp, old, adv, mask = batch()
    trajectory = torch.tensor([2, 0, 2, 1, 0, 2])
    adv = adv[trajectory]
    surrogate = -torch.minimum(
        (logp - old).exp() * adv[:, None], (logp - old).exp().clamp(0.8, 1.28) * adv[:, None]
    )
    expected = sum(surrogate[trajectory == i][mask[trajectory == i]].mean() for i in range(3)) / 3
    weight = grpo.row_weights(mask, trajectory)
    loss, _ = grpo.policy_loss(logp, old, adv, mask, row_weight=weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant", "trajectory"])
def test_micro_batching_changes_neither_gradient_nor_statistics(aggregate):
    logp, old, adv, mask = batch(rows=7)
    options = how(aggregate, mask, torch.tensor([0, 1, 0, 1, 2, 2, 0]))
    whole, stats = grpo.policy_loss(logp, old, adv, mask, ref_logp=old - 0.2, beta=0.1, **options)
    (expected,) = torch.autograd.grad(whole, logp)
    weight = options.pop("row_weight", None)
    parts = []
    grad = torch.zeros_like(logp)
    for s in (slice(0, 2), slice(2, 3), slice(3, 7)):
        part, part_stats = grpo.policy_loss(
            logp[s],
            old[s],
            adv[s],
            mask[s],
            ref_logp=old[s] - 0.2,
            beta=0.1,
            row_weight=None if weight is None else weight[s],
            **options,
        )
        grad += torch.autograd.grad(part, logp)[0]
        parts.append(part_stats)
    torch.testing.assert_close(grad, expected, atol=1e-8, rtol=1e-6)
    assert grpo.merge_stats(parts) == pytest.approx(
        {k: v.item() for k, v in stats.items()}, rel=1e-5
    )


def test_padding_may_hold_anything():
    logp, old, adv, mask = batch()
    clean, clean_stats = grpo.policy_loss(logp, old, adv, mask, ref_logp=old, beta=0.1)
    (expected,) = torch.autograd.grad(clean, logp)
    dirty = logp.detach().masked_fill(~mask, math.nan).requires_grad_()
    bad_adv = adv[:, None].expand_as(logp).masked_fill(~mask, math.inf)
    bad_old, bad_ref = old.masked_fill(~mask, -math.inf), old.masked_fill(~mask, math.nan)
    loss, stats = grpo.policy_loss(dirty, bad_old, bad_adv, mask, ref_logp=bad_ref, beta=0.1)
    loss.backward()
    assert (
        loss.item() == clean.item() and torch.equal(dirty.grad, expected) and stats == clean_stats
    )
    assert (expected[~mask] == 0).all() and (expected[mask] != 0).any()


def test_empty_mask_gives_zero():
    logp, old, adv, mask = batch()
    loss, stats = grpo.policy_loss(logp, old, adv, mask & False)
    assert loss.item() == 0 and all(v == 0 for v in stats.values())


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(beta=0.1), "needs ref_logp"),
        (dict(mask=torch.ones(6)), "mask is .6,., logp .6, 5."),
        (dict(ref_logp=torch.zeros(6, 4)), "ref_logp is"),
        (dict(row_weight=torch.ones(5)), "row_weight must be"),
        (dict(row_weight=torch.ones(6, 5)), "row_weight must be"),
        (dict(advantages=torch.zeros(5)), "advantages must be"),
    ],
)
def test_loss_rejects_in_one_line(change, match):
    logp, old, adv, mask = batch()
    arguments = dict(logp=logp, old_logp=old, advantages=adv, mask=mask) | change
    with pytest.raises(ValueError, match=match) as e:
        grpo.policy_loss(**arguments)
    assert "\n" not in str(e.value)


# the demonstration


@pytest.mark.slow
def test_demo_learns(capsys):
    rows, exact = grpo.train(steps=50, samples=8)
    reward = [r["reward"] for r in rows]
    assert sum(reward[:5]) / 5 < 0.13 and sum(reward[-5:]) / 5 > 0.16  # chance is 1/11
    assert len(rows) == 50 and rows[-1]["entropy"] < rows[0]["entropy"] and 0 <= exact < 1
    assert all(math.isfinite(r["loss"]) and 0 < r["grad_norm"] < math.inf for r in rows)
    assert "reward 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--samples", "1"],
        ["--steps", "-1"],
        ["--prompts", "0"],
        ["--lr", "nan"],
        ["--nonsense", "1"],
        ["--steps", "x"],
    ],
)
def test_bad_flags_are_one_line_and_code_2(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        grpo.main(flags)
    err = capsys.readouterr().err
    assert err.startswith("grpo.py: error: ") and err.count("\n") == 1
