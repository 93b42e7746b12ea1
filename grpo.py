"""GRPO: the optimiser that both papers called SRPO share (2506.01713 and 2511.15605).

  1. sample G responses to each of P prompts (or G rollouts from each of P initial
     states), score them
  2. advantage of a response = (its reward - its group's mean) / std  `group_advantages`
  3. log-probability of every sampled token, under the distribution it was sampled from
                                                                      `token_logprobs`
  4. loss = -min(ratio A, clip(ratio) A) + beta KL: the mean over tokens, or over those
     of each sequence, then over sequences                                 `policy_loss`
  5. one optimiser step, then sample again

Left out: a value network (the group's mean is the baseline), an entropy bonus (neither
paper has one; `token_logprobs` returns a differentiable entropy).

    python grpo.py              # a tiny Llama learns to copy 4 digits: half a minute
    python grpo.py --steps 50 --lr 3e-4 --samples 8 --seed 1
"""
import argparse
import time

import torch
from torch import Tensor, nn

# Stands in for logits of -inf where they are multiplied by a probability of 0
NEGATIVE = -1e30
# |log ratio| is clamped here before exp: e^10 = 2e4 is finite in any dtype; beyond it a
# token has no gradient, clip or not
LOG_RATIO_LIMIT = 10.0
# Logits `token_logprobs` handles at a time: 1 MB in fp32, which stays in a CPU core's
# cache; on a GPU 64 MB, enough to fill it
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 2**18, 2**24


# The algorithm

def group_advantages(rewards: Tensor, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """Rewards (P, G), a row per group, to advantages (P, G): (r - mean) / (std + eps);
    scale=False: r - mean (Dr. GRPO). [VLA 6] [VLA 9] [MLLM 3]

    fp64 stays fp64; bf16, integers and booleans become fp32. std is the population's.
    code: both frameworks take the sample's, so their advantages are sqrt((G-1)/G) times
    these; paper 2 prints eps inside the root, paper 1 none. Rewards within 1e-6 of each
    other get exactly 0. ValueError for a shape other than (P, G >= 2), or a reward that
    is not finite.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1] * 4]), eps=0.0)
    tensor([[ 1., -1., -1.,  1.],
            [ 0.,  0.,  0.,  0.]])
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (P, G >= 2), got {tuple(rewards.shape)}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    if len(bad := rewards[~rewards.isfinite()]):
        raise ValueError(f"rewards must be finite, got {bad[0]}: check their function")
    # [VLA 6] [VLA 9] [MLLM 3]: A = (r - mean) / std, of the group
    advantages = rewards - rewards.mean(dim=1, keepdim=True)                    # (P, G)
    if scale:
        std = rewards.std(dim=1, keepdim=True, unbiased=False)                  # (P, 1)
        advantages = advantages / (std + eps)
    # max - min, not std: the mean of equal floats can round, and the division would
    # make a signal of the rest
    spread = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True)
    return advantages.masked_fill(spread < 1e-6, 0.0)


class _TokenLogprobs(torch.autograd.Function):
    """By chunks of rows; kept for the backward: the logits, and a float a row."""

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float, rows: int):
        dtype = torch.promote_types(logits.dtype, torch.float32)    # (N, V), (N,)
        logp, entropy = (torch.empty(len(logits), dtype=dtype, device=logits.device)
                         for _ in range(2))
        for i in range(0, len(logits), rows):
            s = slice(i, i + rows)
            z = logits[s].to(dtype) / temperature                           # (rows, V)
            log_p = z.log_softmax(-1)
            logp[s] = log_p.gather(-1, tokens[s, None]).squeeze(-1)
            # -sum p log p, where 0 log 0 = 0
            entropy[s] = -(z.softmax(-1) * log_p.clamp_(min=NEGATIVE)).sum(-1)
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.set_materialize_grads(False)    # whoever ignores the entropy pays nothing
        ctx.temperature, ctx.rows = temperature, rows
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logp: Tensor | None, d_entropy: Tensor | None):
        logits, tokens, entropy = ctx.saved_tensors
        if d_logp is None:
            d_logp = torch.zeros_like(entropy)
        grad = torch.empty_like(logits)
        for i in range(0, len(logits), ctx.rows):
            s = slice(i, i + ctx.rows)
            z = logits[s].to(entropy.dtype) / ctx.temperature               # (rows, V)
            p = z.softmax(-1)
            g = p * -d_logp[s, None]                            # dlogp/dz = onehot - p
            g.scatter_add_(-1, tokens[s, None], d_logp[s, None])
            if d_entropy is not None:                           # dH/dz = -p (log p + H)
                log_p = z.log_softmax(-1).clamp_(min=NEGATIVE)
                g -= p * (log_p + entropy[s, None]) * d_entropy[s, None]
            grad[s] = g.div_(ctx.temperature)
        return grad, None, None, None


def token_logprobs(logits: Tensor, tokens: Tensor,
                   temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probability of `tokens`, entropy) in nats, both (...), under
    softmax(logits / temperature).

    logits (..., V) of any float dtype, tokens (...) int64. Results are fp32 (fp64 for
    fp64 logits) and exactly differentiable, yet neither pass keeps an fp32 copy of the
    logits: of 4096 tokens and 152k words it would be 2.5 GB. Padding must hold some
    valid token id and be masked later. temperature: that of sampling, or the ratio is
    not that of the policy that acted. ValueError for wrong shapes or temperature <= 0.

    >>> logits = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    >>> logp, entropy = token_logprobs(logits, torch.tensor([0, 0]))
    >>> logp.exp(), entropy
    (tensor([0.5000, 0.7500]), tensor([0.6931, 0.5623]))
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"{tuple(tokens.shape)} tokens, {tuple(logits.shape)} logits")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    vocab = logits.shape[-1]
    rows = max(1, (GPU_CHUNK_ELEMENTS if logits.is_cuda else CHUNK_ELEMENTS) // vocab)
    logp, entropy = _TokenLogprobs.apply(
        logits.reshape(-1, vocab), tokens.reshape(-1), float(temperature), rows)
    return logp.view(tokens.shape), entropy.view(tokens.shape)


def sample_tokens(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Ids (...) int64, drawn from softmax(logits / temperature) of logits (..., V).

    By inverting the distribution function: on a CPU several times faster than
    torch.multinomial, which draws V numbers for each token."""
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)      # (..., V)
    u = torch.rand(*logits.shape[:-1], 1, device=logits.device) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, u).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def row_weights(mask: Tensor, trajectory: Tensor | None = None) -> Tensor:
    """row_weight (B,) of `policy_loss` for a mean over each sequence: 1 / its tokens.

    mask (B, T) of the whole batch. A sequence is a row, or all rows of one number in
    trajectory (B,) int64: in SRPO-VLA a rollout is several action chunks.

    >>> mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    >>> row_weights(mask, torch.tensor([0, 0, 1])) * 6
    tensor([2., 2., 3.])
    """
    tokens = mask.bool().sum(1).float()                                         # (B,)
    if trajectory is not None:
        total = tokens.new_zeros(int(trajectory.max()) + 1)         # (trajectories,)
        tokens = total.index_add_(0, trajectory, tokens)[trajectory]
    return 1.0 / tokens.clamp(min=1.0)


def policy_loss(logp: Tensor, old_logp: Tensor | None, advantages: Tensor,
                mask: Tensor, *, ref_logp: Tensor | None = None,
                clip: tuple[float, float] = (0.2, 0.28), beta: float = 0.0,
                row_weight: Tensor | None = None, normalizer: float | None = None,
                ) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped GRPO loss of both papers: (loss to minimise, statistics).

    logp, old_logp, ref_logp, mask (B, T); advantages (B,) or (B, T). mask is true on
    sampled tokens; elsewhere anything may stand, even NaN. old_logp=None: one update a
    batch, at ratio 1. clip (low, high): 0.28 is DAPO's clip-higher, of SRPO-VLA's code;
    SRPO-MLLM's script has 0.2 on both sides.

    Token losses, times row_weight (B,) if there is one, are summed and divided by
    normalizer, if None by the sum of these weights. Without both: the mean over all
    tokens (DAPO). With `row_weights`: over each sequence, then over sequences (GRPO;
    SRPO-VLA's code over whole rollouts). normalizer = B * a constant length, without
    row_weight: Dr. GRPO. Given the whole batch's weights and normalizer, tokens or
    sequences, the losses of micro-batches add up to its own.

    Statistics are detached 0-d tensors for `merge_stats`: `loss` adds up, `tokens` is a
    count, `ratio_max` a maximum, others means over valid tokens. ValueError for
    impossible arguments.

    >>> logp = torch.tensor([[0.6, 0.2]]).log()
    >>> old_logp = torch.tensor([[0.4, 0.2]]).log()
    >>> loss, stats = policy_loss(logp, old_logp, torch.tensor([1.0]), torch.ones(1, 2))
    >>> # ratios 1.5, cut at 1.28, and 1: -(1.28 + 1) / 2
    >>> round(loss.item(), 2), stats["clip_high"].item()
    (-1.14, 0.5)
    """
    for name, x in (("old_logp", old_logp), ("ref_logp", ref_logp), ("mask", mask)):
        if x is not None and x.shape != logp.shape:
            raise ValueError(f"{name} is {tuple(x.shape)}, logp {tuple(logp.shape)}")
    if advantages.shape not in (logp.shape, logp.shape[:1]):
        raise ValueError(f"advantages must be (B,) or (B, T): {advantages.shape}")
    if row_weight is not None and row_weight.shape != logp.shape[:1]:
        raise ValueError(f"row_weight must be (B,), got {tuple(row_weight.shape)}")
    if beta > 0 and ref_logp is None:
        raise ValueError(f"beta={beta} needs ref_logp, of the reference policy")
    weight = mask.bool().float()                                                # (B, T)
    if row_weight is not None:
        weight = weight * row_weight[:, None]
    if normalizer is None:
        normalizer = float(weight.sum()) or 1.0
    padding = ~mask.bool()
    logp = logp.masked_fill(padding, 0.0)       # and not times 0: NaN * 0 is NaN
    old = logp if old_logp is None else old_logp.masked_fill(padding, 0.0)
    adv = advantages if advantages.dim() == 2 else advantages[:, None]
    adv = adv.expand_as(logp).masked_fill(padding, 0.0)

    log_ratio = (logp - old.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()                         # [VLA 6] rho = pi / pi_old, (B, T)
    # [VLA 7] [MLLM 2]: min(rho A, clip(rho, 1 - low, 1 + high) A)
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    token_loss = -torch.minimum(ratio * adv, clipped * adv)                     # (B, T)
    ref_kl = torch.zeros_like(logp)
    if ref_logp is not None:
        # [VLA 6] beta * KL(pi || pi_ref) as k3: e^d - d - 1, d = log pi_ref - log pi,
        # never negative. code: SRPO-MLLM's script sets beta to 0, SRPO-VLA's leaves it
        # out; paper 2 prints it with the sign of a reward
        d = ref_logp.detach().masked_fill(padding, 0.0) - logp
        d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ref_kl = d.exp() - d - 1
        token_loss = token_loss + beta * ref_kl
    loss = (token_loss * weight).sum() / normalizer         # [VLA 8] [MLLM 2]

    with torch.no_grad():
        valid = (~padding).float()
        means = {"ref_kl": ref_kl,
                 "old_kl": ratio - log_ratio - 1,  # k3 of KL(pi_old || pi)
                 # tokens whose gradient the clip removes
                 "clip_low": ((ratio < 1 - clip[0]) & (adv < 0)).float(),
                 "clip_high": ((ratio > 1 + clip[1]) & (adv > 0)).float()}
        count = valid.sum().clamp(min=1.0)
        stats = {name: (x * valid).sum() / count for name, x in means.items()}
        stats |= {"loss": loss.detach(), "tokens": valid.sum(),
                  "ratio_max": (ratio * valid).max()}
    return loss, stats


def merge_stats(micro_batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """A whole batch's statistics, as floats, from its micro-batches': sums, the
    maximum, and means weighted by tokens."""
    tokens = sum(float(s["tokens"]) for s in micro_batches)
    merged = {k: sum(float(s[k] * s["tokens"]) for s in micro_batches)
              / max(tokens, 1.0) for k in micro_batches[0]}
    return merged | {"loss": sum(float(s["loss"]) for s in micro_batches),
                     "tokens": tokens,
                     "ratio_max": max(float(s["ratio_max"]) for s in micro_batches)}


# Demonstration. Tokens 0-9 are digits; 10, printed #, says "now copy". A prompt is
# d d d d #, a response 4 tokens, so there is no end token.
DIGITS, COPY = 4, 10


@torch.no_grad()
def respond(model: nn.Module, prompts: Tensor, greedy: bool = False) -> Tensor:
    """(B, 5) prompts to (B, 4) responses; at 9 tokens a KV cache would save nothing."""
    ids = prompts
    for _ in range(DIGITS):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        token = (logits.argmax(-1, keepdim=True) if greedy
                 else torch.multinomial(logits.softmax(-1), 1))             # (B, 1)
        ids = torch.cat([ids, token], dim=1)
    return ids[:, prompts.shape[1]:]


def train(steps: int = 200, prompts: int = 16, samples: int = 16, lr: float = 1e-3,
          seed: int = 0) -> tuple[list[dict], float]:
    """GRPO from random weights, `samples` (G) of each of `prompts` (P) a step: every
    step's metrics, and greedy exact match on 1000 prompts never trained on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=11, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, bos_token_id=None,
        eos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    numbers = torch.randperm(10**DIGITS)[:, None]
    digits = torch.cat([numbers // 10**i % 10 for i in reversed(range(DIGITS))]
                       + [torch.full_like(numbers, COPY)], dim=1)           # (10000, 5)
    fresh, trained, rows = digits[:1000], digits[1000:], []
    for step in range(1, steps + 1):
        asked = trained[torch.randint(len(trained), (prompts,))]            # (P, 5)
        asked = asked.repeat_interleave(samples, dim=0)                     # (P*G, 5)
        responses = respond(model, asked)                                   # (P*G, 4)
        right = (responses == asked[:, :DIGITS]).float().mean(1)            # (P*G,)
        rewards = right.view(-1, samples)                                   # (P, G)
        advantages = group_advantages(rewards)                              # (P, G)

        ids = torch.cat([asked, responses], dim=1)[:, :-1]                  # (P*G, 8)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=DIGITS).logits
        logp, entropy = token_logprobs(logits, responses)                   # (P*G, 4)
        loss, stats = policy_loss(logp, None, advantages.flatten(),
                                  torch.ones_like(responses))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()

        rows.append({"step": step, "reward": rewards.mean().item(),
                     "exact": (rewards == 1).float().mean().item(),
                     "no_signal": (advantages == 0).all(1).float().mean().item(),
                     "entropy": entropy.mean().item(), "grad_norm": norm.item(),
                     **merge_stats([stats])})
        if step == 1 or step % 20 == 0:
            shown = ("reward", "exact", "entropy", "no_signal", "grad_norm")
            prompt, response = ("".join("0123456789#"[token] for token in x)
                                for x in (asked[0], responses[0]))
            print(f"step {step:4d}  "
                  + "  ".join(f"{k} {rows[-1][k]:.3f}" for k in shown)
                  + f"  {prompt} {response} earns {rewards[0, 0]:.2f}")
    answers = respond(model, fresh, greedy=True)
    return rows, (answers == fresh[:, :DIGITS]).all(1).float().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("grpo.py", usage=argparse.SUPPRESS,
                                     description="GRPO teaches a tiny Llama to copy.")
    for name, default in (("steps", 200), ("prompts", 16), ("samples", 16),
                          ("lr", 1e-3), ("seed", 0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args(argv)
    if args.steps < 0 or args.prompts < 1:
        parser.error("--steps must be at least 0 and --prompts at least 1")
    torch.set_num_threads(1)        # at this size threads cost more than they give
    start = time.perf_counter()
    try:
        _, exact = train(**vars(args))
    except ValueError as error:
        parser.error(str(error))
    print(f"greedy exact match {exact:.1%} on 1000 prompts never trained on, after "
          f"{args.steps} steps and {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
