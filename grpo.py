"""GRPO: the optimiser that both SRPO papers share (SRPO-MLLM = arXiv 2506.01713, SRPO-VLA = arXiv 2511.15605).

    1. sample G responses to each of P prompts (or G rollouts from each of P initial states), score them
    2. advantage of a response = (its reward - mean of its group) / std of its group             `group_advantages`
    3. log-probability of every sampled token under the distribution it was sampled from         `token_logprobs`
    4. loss = -min(ratio * A, clip(ratio) * A) + beta * KL to a reference, averaged over tokens  `policy_loss`
    5. one AdamW step (fp32 master weights when the model is bf16), then sample again            `clip_and_step`

Left out: a value network (the group's mean is the baseline, which is GRPO's point), an entropy bonus (neither paper
has one; `token_logprobs` returns a differentiable entropy to those who want it), sampling (each script has its own).

    python grpo.py                          # a tiny Llama learns to copy 4 digits from random weights: CPU, half a minute
    python grpo.py --steps 50 --lr 3e-4 --samples 8 --seed 1
    python -m pytest tests/test_grpo.py
"""
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

NEGATIVE = -1e30        # stands in for logits of -inf where they are multiplied by a probability of 0
LOG_RATIO_LIMIT = 10.0  # |log ratio| is clamped here before exp: e^10 = 2e4 is finite in any dtype; beyond it a token has no gradient, clip or not
CHUNK_ELEMENTS = 2**18  # logits `token_logprobs` handles at a time: 1 MB in fp32, which stays in a CPU core's cache
GPU_CHUNK_ELEMENTS = 2**24  # 64 MB: enough to fill a GPU


# The algorithm

def group_advantages(rewards: Tensor, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """Rewards (P, G), a row per group, to advantages (P, G): (r - mean) / (std + eps); scale=False: r - mean (Dr. GRPO).

    std is the population's (unbiased=False). Paper/code differ: the frameworks under both published codes call torch.std,
    the sample's, so their advantages are sqrt((G-1)/G) times these; SRPO-MLLM's code has eps 1e-9. A group of rewards
    within 1e-6 of each other gets exactly 0. Raises ValueError for a shape other than (P, G >= 2) and for non-finite rewards.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]]), eps=0.0)
    tensor([[ 1., -1., -1.,  1.],
            [ 0.,  0.,  0.,  0.]])
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (prompts, group size >= 2), got {tuple(rewards.shape)}: one has no baseline")
    if not torch.isfinite(rewards).all():
        bad = rewards[~torch.isfinite(rewards)][0].item()
        raise ValueError(f"rewards must be finite, got {bad}: check the reward function")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    if scale:
        advantages = advantages / (rewards.std(dim=1, keepdim=True, unbiased=False) + eps)
    # max - min and not std: the mean of equal floats can round, and the division would make a signal of the rest, as it would of what
    # bounded rewards that underflow leave
    no_signal = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True) < 1e-6  # (P, 1)
    return advantages.masked_fill(no_signal, 0.0)


class _TokenLogprobs(torch.autograd.Function):
    """Forward and backward by chunks of rows; kept for the backward: the logits as they came, and a float a row."""

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float, rows: int):  # (N, V), (N,)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logp, entropy = (torch.empty(len(logits), dtype=dtype, device=logits.device) for _ in range(2))
        for i in range(0, len(logits), rows):
            s = slice(i, i + rows)
            z = logits[s].to(dtype) / temperature                               # (rows, V)
            log_p = z.log_softmax(-1)
            logp[s] = log_p.gather(-1, tokens[s, None]).squeeze(-1)
            entropy[s] = -(z.softmax(-1) * log_p.clamp_(min=NEGATIVE)).sum(-1)  # -sum p log p, where 0 log 0 = 0
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.set_materialize_grads(False)                                        # whoever ignores the entropy pays nothing for it
        ctx.temperature, ctx.rows = temperature, rows
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logp: Tensor | None, d_entropy: Tensor | None):
        logits, tokens, entropy = ctx.saved_tensors
        if d_logp is None and d_entropy is None:
            return None, None, None, None
        grad = torch.empty_like(logits)
        for i in range(0, len(logits), ctx.rows):
            s = slice(i, i + ctx.rows)
            z = logits[s].to(entropy.dtype) / ctx.temperature                           # (rows, V)
            p = z.softmax(-1)
            g = torch.zeros_like(p) if d_logp is None else p * -d_logp[s, None]
            if d_logp is not None:                                                      # dlogp/dz = onehot - p
                g.scatter_add_(-1, tokens[s, None], d_logp[s, None])
            if d_entropy is not None:                                                   # dH/dz = -p (log p + H)
                g -= p * (z.log_softmax(-1).clamp_(min=NEGATIVE) + entropy[s, None]) * d_entropy[s, None]
            grad[s] = g.div_(ctx.temperature)
        return grad, None, None, None


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probability of `tokens`, entropy) in nats, both (...), under softmax(logits / temperature).

    logits (..., V) of any float dtype, tokens (...) int64. The results and the maths are fp32 (fp64 for fp64 logits) and
    exactly differentiable, yet neither pass keeps an fp32 copy of the logits: for one response of 4096 tokens and 152k
    words that would be 2.5 GB. Padding must hold some valid token id and be masked later. Give the temperature of
    sampling, or the ratio is not that of the policy that acted. Raises ValueError for wrong shapes or temperature <= 0.

    >>> logp, entropy = token_logprobs(torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]]), torch.tensor([0, 0]))
    >>> logp.exp(), entropy
    (tensor([0.5000, 0.7500]), tensor([0.6931, 0.5623]))
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"tokens must be {tuple(logits.shape[:-1])} for these logits, got {tuple(tokens.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: use the one the tokens were sampled at")
    vocab = logits.shape[-1]
    logp, entropy = _TokenLogprobs.apply(logits.reshape(-1, vocab), tokens.reshape(-1), float(temperature),
                                         max(1, (GPU_CHUNK_ELEMENTS if logits.is_cuda else CHUNK_ELEMENTS) // vocab))
    return logp.view(tokens.shape), entropy.view(tokens.shape)


def trajectory_weights(mask: Tensor, trajectory: Tensor) -> Tensor:
    """row_weight (B,) of `policy_loss` for sequences made of several rows: 1 / valid tokens of the row's trajectory.

    In SRPO-VLA a row is an action chunk and the sequence is the whole rollout. mask (B, T); trajectory (B,) int64 numbers
    each row's rollout. Compute it on the whole batch, before it is cut into micro-batches.

    >>> trajectory_weights(torch.tensor([[1, 1], [1, 0], [1, 1]]), torch.tensor([0, 0, 1])) * 6
    tensor([2., 2., 3.])
    """
    tokens = mask.bool().sum(1).float()                                                   # (B,)
    total = tokens.new_zeros(int(trajectory.max()) + 1).index_add_(0, trajectory, tokens)  # (trajectories,)
    return 1.0 / total[trajectory].clamp(min=1.0)


def _token_weights(mask: Tensor, aggregate: str, row_weight: Tensor | None) -> Tensor:
    """Weight (B, T) of each token in the batch's sum, before division by `loss_normalizer`."""
    if aggregate not in ("token", "sequence", "constant"):
        raise ValueError(f"aggregate must be 'token', 'sequence' or 'constant', got {aggregate!r}")
    if row_weight is not None and (aggregate != "sequence" or row_weight.shape != mask.shape[:1]):
        raise ValueError(f"row_weight must be {tuple(mask.shape[:1])} with aggregate='sequence', "
                         f"got {tuple(row_weight.shape)} with {aggregate!r}")
    weight = mask.bool().float()  # (B, T)
    if aggregate == "sequence":
        weight = weight * (1.0 / weight.sum(1).clamp(min=1.0) if row_weight is None else row_weight)[:, None]
    return weight


def loss_normalizer(mask: Tensor, aggregate: str = "token", constant_length: int | None = None,
                    row_weight: Tensor | None = None) -> float:
    """What a batch's summed token losses are divided by; with micro-batches, that of the WHOLE batch's mask (B, T).

    "token": valid tokens; "sequence": sequences with a valid token; "constant": B * constant_length. 1 if there are none.

    >>> mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    >>> loss_normalizer(mask, "token"), loss_normalizer(mask, "sequence"), loss_normalizer(mask, "constant", 4)
    (4.0, 2.0, 8.0)
    """
    weight = _token_weights(mask, aggregate, row_weight)
    if aggregate == "constant":
        if not constant_length or constant_length < 1:
            raise ValueError(f"constant_length must be >= 1 with aggregate='constant', got {constant_length}")
        return float(len(mask) * constant_length)
    return float(weight.sum()) or 1.0  # weights of 1 / (tokens of the sequence) add up to the number of sequences


def policy_loss(logp: Tensor, old_logp: Tensor | None, advantages: Tensor, mask: Tensor, *,
                ref_logp: Tensor | None = None, clip: tuple[float, float] = (0.2, 0.28), beta: float = 0.0,
                aggregate: str = "token", constant_length: int | None = None, normalizer: float | None = None,
                row_weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped GRPO loss of both papers: (loss to minimise, statistics).

    logp, old_logp, ref_logp, mask (B, T); advantages (B,) or (B, T). mask is true on sampled tokens; elsewhere anything
    may stand, even NaN. old_logp=None means one update a batch: ratio 1, gradient REINFORCE's, no second forward pass.
    clip (low, high): 0.28 is DAPO's clip-higher, used by SRPO-VLA; SRPO-MLLM's script clips at 0.2 on both sides.
    aggregate: "token", mean over all tokens (DAPO); "sequence", mean over each sequence, then over sequences (GRPO, and
    SRPO-VLA's code over whole rollouts: `trajectory_weights`); "constant", sum / (B * constant_length) (Dr. GRPO).
    Micro-batches: with normalizer = `loss_normalizer` of the whole batch, their losses add up to the whole batch's.

    Statistics are detached 0-d tensors: `loss` adds up like the loss, `tokens` is a count, `ratio_max` a maximum, others
    means over this call's valid tokens; `merge_stats` joins micro-batches. Raises ValueError for impossible arguments.

    >>> logp, old_logp = torch.tensor([[0.6, 0.2]]).log(), torch.tensor([[0.4, 0.2]]).log()
    >>> loss, stats = policy_loss(logp, old_logp, torch.tensor([1.0]), torch.ones(1, 2))
    >>> round(loss.item(), 2), stats["clip_high"].item()  # ratios 1.5, cut at 1.28, and 1: -(1.28 + 1) / 2
    (-1.14, 0.5)
    """
    for name, x in (("old_logp", old_logp), ("ref_logp", ref_logp), ("mask", mask)):
        if x is not None and x.shape != logp.shape:
            raise ValueError(f"{name} must have logp's shape {tuple(logp.shape)}, got {tuple(x.shape)}")
    if advantages.shape not in (logp.shape, logp.shape[:1]):
        raise ValueError(f"advantages must be (B,) or (B, T) for logp {tuple(logp.shape)}, got {tuple(advantages.shape)}")
    if beta > 0 and ref_logp is None:
        raise ValueError(f"beta={beta} needs ref_logp, the reference policy's log-probabilities; beta=0 needs none")
    weight = _token_weights(mask, aggregate, row_weight)  # (B, T)
    if normalizer is None:
        normalizer = loss_normalizer(mask, aggregate, constant_length, row_weight)
    padding = ~mask.bool()
    logp = logp.masked_fill(padding, 0.0)  # filled and not multiplied by 0: NaN * 0 is NaN
    old = logp.detach() if old_logp is None else old_logp.detach().masked_fill(padding, 0.0)
    adv = (advantages if advantages.dim() == 2 else advantages[:, None]).expand_as(logp).masked_fill(padding, 0.0)

    # The surrogate, the same in both papers: min(rho A, clip(rho, 1 - low, 1 + high) A) with rho = pi / pi_old
    log_ratio = (logp - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()                                                                # (B, T)
    token_loss = -torch.minimum(ratio * adv, ratio.clamp(1 - clip[0], 1 + clip[1]) * adv)  # (B, T)
    ref_kl = torch.zeros_like(logp)
    if ref_logp is not None:
        # beta * KL(pi || pi_ref) of both papers, as k3: e^d - d - 1 with d = log pi_ref - log pi, never negative.
        # Paper/code differ: SRPO-MLLM's script sets beta to 0, SRPO-VLA's code computes the KL and leaves it out.
        d = (ref_logp.detach().masked_fill(padding, 0.0) - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ref_kl = d.exp() - d - 1
        token_loss = token_loss + beta * ref_kl
    loss = (token_loss * weight).sum() / normalizer

    with torch.no_grad():
        valid = (~padding).float()
        means = {"ref_kl": ref_kl, "old_kl": ratio - log_ratio - 1,  # k3 of KL(pi_old || pi): the samples are pi_old's
                 "clip_low": ((ratio < 1 - clip[0]) & (adv < 0)).float(),  # tokens whose gradient the clip removes
                 "clip_high": ((ratio > 1 + clip[1]) & (adv > 0)).float()}
        stats = {k: (x * valid).sum() / valid.sum().clamp(min=1.0) for k, x in means.items()}
        stats |= {"loss": loss.detach(), "tokens": valid.sum(), "ratio_max": (ratio * valid).max()}
    return loss, stats


def merge_stats(micro_batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """A whole batch's statistics, as floats, from its micro-batches': sums, the maximum, and means weighted by tokens."""
    tokens = sum(float(s["tokens"]) for s in micro_batches)
    merged = {k: sum(float(s[k] * s["tokens"]) for s in micro_batches) / max(tokens, 1.0) for k in micro_batches[0]}
    return merged | {"loss": sum(float(s["loss"]) for s in micro_batches), "tokens": tokens,
                     "ratio_max": max(float(s["ratio_max"]) for s in micro_batches)}


# The update

class MasterAdamW(torch.optim.Optimizer):
    """AdamW with fp32 state whatever the parameters' dtype, and an fp32 master copy of each bf16 or fp16 parameter.

    At the papers' learning rates (1e-6, 5e-6) an Adam step is under half the gap between neighbouring bf16 numbers near a
    typical weight, so bf16 weights updated in place do not move. fp32 parameters are updated directly. Gradients are
    upcast one tensor at a time: 7.54B bf16 parameters take 7.54e9 * (2 + 2 + 4 + 8) bytes = 112 GiB. After the first step
    the masters are the model: whoever loads other weights must load the optimiser's state with them. offload: the state
    lives, and the step is computed, on the CPU; of those 112 GiB 28 stay on the GPU.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, offload: bool = False):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        self.offload = offload

    def home(self, p: Tensor) -> torch.device:
        """Where the state of a parameter lives."""
        return torch.device("cpu") if self.offload else p.device

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p]
                if not s:
                    s["step"] = torch.zeros((), dtype=torch.int64)
                    s["m"], s["v"] = (torch.zeros_like(p, dtype=torch.float32, device=self.home(p)) for _ in range(2))
                if "master" not in s and (p.dtype != torch.float32 or self.home(p) != p.device):    # the latter: also of a run resumed with offload
                    s["master"] = p.to(self.home(p), torch.float32)
                s["step"] += 1
                t, w, g = int(s["step"]), s.get("master", p), p.grad.to(self.home(p), torch.float32)
                s["m"].lerp_(g, 1 - beta1)
                s["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                w.mul_(1 - lr * group["weight_decay"])
                rms = s["v"].sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
                w.addcdiv_(s["m"], rms, value=-lr / (1 - beta1**t))
                if w is not p:
                    p.copy_(w)  # rounds to nearest


def make_optimizer(params_or_model: nn.Module | Iterable[Tensor], lr: float, weight_decay: float = 0.0,
                   betas: tuple[float, float] = (0.9, 0.999), offload: bool = False) -> MasterAdamW:
    """`MasterAdamW` over the trainable parameters of a model or list. ValueError if there are none, or lr is not >= 0."""
    params = params_or_model.parameters() if isinstance(params_or_model, nn.Module) else params_or_model
    params = [p for p in params if p.requires_grad]
    if not params:
        raise ValueError("nothing to optimise: no parameter has requires_grad=True")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr must be a finite number >= 0, got {lr}")
    return MasterAdamW(params, lr, weight_decay, betas, offload=offload)


@torch.no_grad()
def clip_and_step(optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float) -> tuple[float, bool]:
    """Scale the model's gradients to a global L2 norm <= max_norm, step, clear them: (norm before clipping, stepped).

    A non-finite norm (one NaN or inf anywhere) skips the step: weights and optimiser state stay as they were.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    # fp32 norms: clip_grad_norm_ would return that of bf16 gradients rounded to bf16
    norm = float(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]).norm()) if grads else 0.0
    stepped = math.isfinite(norm)
    if stepped:
        for g in grads if norm > max_norm else []:
            g.mul_(max_norm / norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, stepped


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as {"optimizer.<parameter index>.<name>": tensor}; lr and such are the run's settings."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {f"optimizer.{i}.{k}": v for i, p in enumerate(params) for k, v in optimizer.state.get(p, {}).items()}


def load_optimizer_tensors(optimizer: MasterAdamW, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, ignoring other keys; the tensors become the state where they are on its device, without a copy.
    ValueError, nothing changed, if they are another model's."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[Tensor, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith("optimizer."):
            continue
        _, index, name = key.split(".", 2)
        p = params[int(index)] if int(index) < len(params) else None
        if p is None or (value.dim() and value.shape != p.shape):
            here = "no such parameter" if p is None else f"a parameter {tuple(p.shape)}"
            raise ValueError(f"{key} is {tuple(value.shape)}, this model has {here}: the checkpoint is another model's")
        state.setdefault(p, {})[name] = value.to(optimizer.home(p) if value.dim() else "cpu")     # steps stay on the CPU
    optimizer.state.clear()
    optimizer.state.update(state)


# Demonstration. Tokens 0-9 are digits; 10, printed #, says "now copy". Prompt d d d d #, response 4 tokens, so no EOS.
DIGITS, COPY = 4, 10


@dataclass
class Settings:
    steps: int = field(default=200, metadata={"help": "GRPO steps"})
    prompts: int = field(default=16, metadata={"help": "prompts a step"})
    samples: int = field(default=16, metadata={"help": "group size: responses to each prompt, at least 2"})
    lr: float = field(default=1e-3, metadata={"help": "AdamW learning rate"})
    seed: int = field(default=0, metadata={"help": "seed of the weights, prompts and samples"})
    print_every: int = field(default=20, metadata={"help": "steps between printed lines"})

    def __post_init__(self):
        for name, low in (("steps", 0), ("prompts", 1), ("samples", 2), ("lr", 0), ("seed", 0), ("print_every", 1)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be at least {low}, got {getattr(self, name)}")


@torch.no_grad()
def respond(model: nn.Module, prompts: Tensor, greedy: bool = False) -> Tensor:
    """(B, 5) prompts to (B, 4) responses; a whole forward pass a token, for at 9 tokens a KV cache saves nothing."""
    ids = prompts
    for _ in range(DIGITS):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]  # (B, 11)
        token = logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(logits.softmax(-1), 1)
        ids = torch.cat([ids, token], dim=1)
    return ids[:, prompts.shape[1]:]


def train(settings: Settings) -> tuple[list[dict], float]:
    """GRPO from random weights: metrics of every step, and greedy exact match on 1000 prompts never trained on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=11, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=None, eos_token_id=None))
    optimizer = make_optimizer(model, settings.lr)
    numbers = torch.randperm(10**DIGITS)
    digits = torch.stack([numbers // 10**i % 10 for i in reversed(range(DIGITS))], dim=1)  # (10000, 4)
    digits = torch.cat([digits, torch.full((len(digits), 1), COPY)], dim=1)                # (10000, 5)
    fresh, trained = digits[:1000], digits[1000:]
    rows = []
    for step in range(1, settings.steps + 1):
        prompts = trained[torch.randint(len(trained), (settings.prompts,))]                # (P, 5)
        prompts = prompts.repeat_interleave(settings.samples, dim=0)                       # (P*G, 5)
        responses = respond(model, prompts)                                                # (P*G, 4)
        rewards = (responses == prompts[:, :DIGITS]).float().mean(1)                       # (P*G,) share of digits right
        rewards = rewards.view(-1, settings.samples)                                       # (P, G)
        advantages = group_advantages(rewards)                                             # (P, G)
        ids = torch.cat([prompts, responses], dim=1)[:, :-1]                               # (P*G, 8)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=DIGITS).logits       # (P*G, 4, 11)
        logp, entropy = token_logprobs(logits, responses)                                  # (P*G, 4)
        loss, stats = policy_loss(logp, None, advantages.flatten(), torch.ones_like(responses))
        loss.backward()
        norm, stepped = clip_and_step(optimizer, model, max_norm=1.0)
        row = {"step": step, "reward": rewards.mean().item(), "exact": (rewards == 1).float().mean().item(),
               "no_signal": (advantages == 0).all(1).float().mean().item(), "entropy": entropy.mean().item(),
               "grad_norm": norm, "stepped": stepped, **merge_stats([stats])}
        rows.append(row)
        if step == 1 or step % settings.print_every == 0:
            shown = ("reward", "exact", "entropy", "no_signal", "grad_norm")
            print(f"step {step:4d}  " + "  ".join(f"{k} {row[k]:.3f}" for k in shown))
            for i in (rewards[0].argmax().item(), rewards[0].argmin().item()):  # the first group's best and worst
                prompt, response = ("".join("0123456789#"[t] for t in x) for x in (prompts[0], responses[i]))
                print(f"           {prompt} {response}  reward {rewards[0, i]:.2f}  advantage {advantages[0, i]:+.2f}")
    exact = (respond(model, fresh, greedy=True) == fresh[:, :DIGITS]).all(1).float().mean().item()
    return rows, exact


def main(args: list[str] | None = None) -> int:
    from transformers import HfArgumentParser

    torch.set_num_threads(1)  # at this size threads cost more than they give
    try:
        settings, = HfArgumentParser(Settings).parse_args_into_dataclasses(args)
    except ValueError as e:
        print(f"grpo.py: error: {e}", file=sys.stderr)
        return 2
    print("settings:", json.dumps(asdict(settings)))
    start = time.perf_counter()
    _, exact = train(settings)
    print(f"greedy exact match {100 * exact:.1f}% on 1000 prompts never trained on, "
          f"after {settings.steps} steps and {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
