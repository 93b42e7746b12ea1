"""A policy, whichever it is, OpenVLA or TinyVLA: loaded, asked for actions, prepared for training, saved.

1. `load_policy`, `camera_size`, `policy_frames`, `find_key`: what depends on which of the two a checkpoint holds.
2. `greedy`, `sampler`: camera images and instructions -> actions for `rollouts.play`; the sampler remembers what training needs (`Call`).
3. `collate`, `logprobs`: episodes -> the rows to train on, and their log-probabilities.
4. `prepared`, `adapters_off`, `running_average`, `save_policy`: LoRA, checkpointing, the weights that are evaluated, a checkpoint with the adapters merged.
"""
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

from plumbing import checkpoint as checkpoints
from robots import tabletop as envs
import grpo
from plumbing import ranks as parallel
from robots import tiny_vla
from robots import openvla as vla
from robots.rollouts import Episode

CAMERA = 256            # pixels of the images that an OpenVLA is shown, as in the published evaluation


def load_policy(path: str | Path, dtype: torch.dtype = torch.float32, device=None):
    """A checkpoint folder or hub id -> the policy its config.json names: an OpenVLA or a TinyVLA. Errors are their `from_pretrained`'s."""
    folder = checkpoints.local_folder(path)
    tiny = checkpoints.read_json(folder / "config.json").get("model_type") == "tiny_vla"
    return (tiny_vla.TinyVLA if tiny else vla.OpenVLA).from_pretrained(folder, dtype, device)


def camera_size(policy) -> int:
    """Pixels of the camera images that a policy wants: OpenVLA's are rendered at 256 and resized."""
    return CAMERA if isinstance(policy, vla.OpenVLA) else policy.config["size"]


def policy_frames(policy, images: np.ndarray) -> np.ndarray:
    """Upright camera images uint8 (B, size, size, 3) -> frames for `pixel_values`, (B, 1, ...): OpenVLA's through `preprocess`."""
    return np.stack([vla.preprocess(image, rotate=False) for image in images])[:, None] if isinstance(policy, vla.OpenVLA) else images[:, None]


def find_key(norm_stats: dict, suite: str) -> str:
    """The statistics a checkpoint has for a suite: `SUITE_no_noops` or `SUITE`; for LIBERO-Plus the only ones there are. ValueError."""
    for key in (f"{suite}_no_noops", suite, *(norm_stats if len(norm_stats) == 1 and "plus" in suite else ())):
        if key in norm_stats:
            return key
    raise ValueError(f"the policy has action statistics for {', '.join(sorted(norm_stats)) or 'nothing'}, not for {suite}; "
                     f"choose a checkpoint for it (eval.py: or name one of these by --key)")


def greedy(policy, key: str):
    """The most likely bin of every token: act() of `rollouts.play`, camera images uint8 (B, size, size, 3) and B instructions -> actions of the
    environment, float64 (B, 8, 7), and B records, None here."""
    def act(images, instructions):
        with torch.no_grad():
            bins = policy(*policy.prompt_ids(instructions), policy.pixel_values(policy_frames(policy, images))).argmax(-1)
        return vla.to_env_actions(policy.decode(bins, key)), [None] * len(bins)
    return act


@dataclass
class Call:
    """What training needs of a policy call. frame: the image as the policy saw it, prepared once, uint8 (1, side, side, 3)."""
    frame: np.ndarray
    bins: torch.Tensor          # (56,) int64
    logp: torch.Tensor          # (56,) float32
    entropy: float              # mean over the tokens


def sampler(policy, temperature: float, key: str):
    """The same, but every token is sampled from softmax(logits / temperature), and a record is a `Call`."""
    def act(images: np.ndarray, instructions: list[str]):
        frames = policy_frames(policy, images)
        with torch.no_grad():
            logits = policy(*policy.prompt_ids(instructions), policy.pixel_values(frames))                  # (B, 56, 256)
            cumulative = (logits / temperature).softmax(-1).cumsum(-1)
            # inverse of the cumulative distribution: several times faster than torch.multinomial on a CPU
            u = torch.rand(*logits.shape[:2], 1, device=logits.device) * cumulative[..., -1:]
            bins = torch.searchsorted(cumulative, u).squeeze(-1).clamp(max=vla.BINS - 1)                # (B, 56)
            logp, entropy = grpo.token_logprobs(logits, bins, temperature)
        return vla.to_env_actions(policy.decode(bins, key)), list(map(Call, frames, bins.cpu(), logp.cpu(), entropy.mean(1).tolist()))
    return act


@dataclass
class Batch:
    """The executed chunks of one step's rollouts that have an advantage; a row is a policy call, N of them."""
    frames: torch.Tensor        # (N, 1, side, side, 3) uint8
    instructions: list[str]
    bins: torch.Tensor          # (N, 56) int64
    logp: torch.Tensor          # (N, 56) float32, under the policy and the temperature they were sampled at
    mask: torch.Tensor          # (N, 56) bool: tokens of actions that ran before the episode ended
    advantage: torch.Tensor     # (N,) float32
    trajectory: torch.Tensor    # (N,) int64, the rollout a chunk belongs to


def collate(episodes: list[Episode], advantages: torch.Tensor, instructions: tuple[str, ...] = envs.TASKS) -> Batch:
    """Rollouts and their advantages (N,) -> the rows to train on. Old log-probabilities are those of sampling, because one
    model does both; the published code recomputes them."""
    rows = [(i, e, j) for i, e in enumerate(episodes) if advantages[i] != 0 for j in range(len(e.executed))]
    if not rows:
        empty = torch.empty(0, vla.ACTION_TOKENS)
        return Batch(empty, [], empty.long(), empty, empty.bool(), torch.empty(0), torch.empty(0, dtype=torch.long))
    executed = torch.tensor([e.executed[j] for _, e, j in rows])
    return Batch(frames=torch.from_numpy(np.stack([e.records[j].frame for _, e, j in rows])),
                 instructions=[instructions[e.start.task] for _, e, _ in rows],
                 bins=torch.stack([e.records[j].bins for _, e, j in rows]),
                 logp=torch.stack([e.records[j].logp for _, e, j in rows]),
                 mask=torch.arange(vla.ACTION_TOKENS) // vla.ACTION_DIM < executed[:, None],
                 advantage=torch.stack([advantages[i] for i, _, _ in rows]),
                 trajectory=torch.tensor([i for i, _, _ in rows]))


def logprobs(policy, batch: Batch, part: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of the bins of some rows, (B, 56) float32."""
    inputs = (*policy.prompt_ids([batch.instructions[i] for i in part]), policy.pixel_values(batch.frames[part]))
    logits = policy(*inputs)                                                                                    # (B, 56, 256)
    return grpo.token_logprobs(logits, batch.bins[part].to(logits.device), temperature)[0]


def prepared(policy, s):
    """A policy with the adapters and the checkpointing that a script's settings ask for: lora_rank, seed, gradient_checkpointing (ValueError for
    a TinyVLA, which settings.model names)."""
    if s.gradient_checkpointing:
        if not hasattr(policy, "set_gradient_checkpointing"):
            raise ValueError(f"--gradient_checkpointing is for OpenVLA; {s.model} is a TinyVLA, whose activations are small")
        policy.set_gradient_checkpointing()
    if s.lora_rank:
        from peft import LoraConfig, inject_adapter_in_model
        # All but the head, of which the policy reads rows, and what it never runs
        layers = [name for name, m in policy.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad and "lm_head" not in name]
        torch.manual_seed(s.seed)                               # the same adapters on every rank
        inject_adapter_in_model(LoraConfig(r=s.lora_rank, lora_alpha=2 * s.lora_rank, target_modules=layers), policy)
        for p in (p for p in policy.parameters() if p.requires_grad):
            p.data = p.data.float()
    return policy


@contextmanager
def adapters_off(policy):
    """Within it a policy with adapters is the one it started as."""
    layers = [m for m in policy.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def reference_logprobs(policy, reference, batch: Batch, s) -> torch.Tensor:
    """Of all rows under the starting policy, (N, 56), s.micro_batch at a time and at s.temperature: the policy with its adapters off, or a copy
    that waits on the CPU."""
    device = next(policy.parameters()).device
    with torch.no_grad(), parallel.gathered(policy), adapters_off(policy):
        model = policy if reference is None else reference.to(device)
        rows = [logprobs(model, batch, part, s.temperature) for part in torch.arange(len(batch.bins)).split(s.micro_batch)]
    if reference is not None:
        reference.to("cpu")
    return torch.cat(rows)


def running_average(decay: float):
    """For AveragedModel: an exponential average, over fewer steps at first, while the policy changes fast."""
    return lambda averages, weights, n: get_ema_multi_avg_fn(min(decay, (1 + int(n)) / (10 + int(n))))(averages, weights, n)


def kept(policy, average) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a checkpoint holds beside the optimiser: the weights that are trained, and their running average."""
    trained = parallel.trainable(policy)
    return trained, {} if average is None else {f"average.{name}": x for name, x in average.state_dict().items()
                                                if name == "n_averaged" or name.removeprefix("module.") in trained}


def save_policy(policy, out: Path) -> None:
    """`out`/policy, adapters merged into it; these alone, as peft writes them, in policy_adapter."""
    weights, adapters = parallel.whole_weights(policy), parallel.whole(parallel.trainable(policy)) if hasattr(policy, "peft_config") else {}
    if parallel.rank() == 0:
        shutil.rmtree(out / "policy", ignore_errors=True)
        policy.save_pretrained(out / "policy", weights)
        if adapters:
            policy.peft_config["default"].save_pretrained(out / "policy_adapter")
            save_file({f"base_model.model.{name.replace('.default.', '.')}": x for name, x in adapters.items()},
                      out / "policy_adapter" / "adapter_model.safetensors")
