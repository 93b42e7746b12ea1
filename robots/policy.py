"""What any policy must do, and what is done with one: asked for actions, trained on what it did.

A policy is a torch module with
    model_type, camera, half_on_gpu      name in config.json; pixels of the camera images it wants;
                                         whether it is evaluated in bf16 on a GPU, as published
    config, norm_stats, files            of its checkpoint; action statistics by data set
    frames(images)                       uint8 (B, S, S, 3) -> uint8 (B, 1, side, side, 3), once
    pixel_values(frames)                 -> what forward takes
    prompt_ids(instructions)             -> (ids, mask), both (B, L)
    forward(ids, mask, pixels)           -> logits (B, 56, 256): 8 steps x 7 dimensions, 256 bins
    decode(bins, key), encode(actions, key)     bins <-> the data set's units
    set_gradient_checkpointing(on)       ValueError if it has none
    from_pretrained(path, dtype, device), save_pretrained(path, state_dict)
    described(folder, shapes)            without weights, on the meta device; ValueError
robots/openvla.py and robots/tiny_vla.py are two; a third is a class and a line in robots.POLICIES.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import grpo
from plumbing import ranks
from robots import policy_class
from robots.openvla import ACTION_DIM, ACTION_TOKENS, local_folder, read_json, to_env_actions
from robots.suite import Episode


def load_policy(path: str | Path, dtype: torch.dtype | None = torch.float32, device: str = ""):
    """A checkpoint folder or hub id -> the policy its config.json names; dtype None: as it is
    evaluated."""
    folder = local_folder(path)
    kind = policy_class(read_json(folder / "config.json").get("model_type"))
    device = ranks.device(device)
    if dtype is None:
        half = kind.half_on_gpu and device.startswith("cuda")
        dtype = torch.bfloat16 if half else torch.float32
    return kind.from_pretrained(folder, dtype, device)


def find_key(norm_stats: dict, suite: str) -> str:
    """The statistics a checkpoint has for a suite: `SUITE_no_noops` or `SUITE`; for LIBERO-Plus the
    only ones there are. ValueError."""
    only = norm_stats if len(norm_stats) == 1 and "plus" in suite else ()
    for key in (f"{suite}_no_noops", suite, *only):
        if key in norm_stats:
            return key
    known = ", ".join(sorted(norm_stats)) or "nothing"
    raise ValueError(f"the policy has action statistics for {known}, not for {suite}; choose a "
                     "checkpoint for it (eval.py: or name one of these by --key)")


# Acting: act(images uint8 (B, S, S, 3), instructions) -> (actions (B, 8, 7), B records)

def greedy(policy, key: str):
    """The most likely bin of every token; records are None."""
    def act(images: np.ndarray, instructions: list[str]):
        with torch.no_grad():
            inputs = policy.prompt_ids(instructions), policy.pixel_values(policy.frames(images))
            bins = policy(*inputs[0], inputs[1]).argmax(-1)                     # (B, 56)
        return to_env_actions(policy.decode(bins, key)), [None] * len(bins)
    return act


@dataclass
class Call:
    """What training needs of a policy call."""
    frame: np.ndarray       # uint8 (1, side, side, 3), of `frames`
    bins: Tensor            # (56,) int64
    logp: Tensor            # (56,) float32
    entropy: float          # mean over the tokens


def sampler(policy, temperature: float, key: str):
    """Every token is sampled from softmax(logits / temperature); a record is a `Call`."""
    def act(images: np.ndarray, instructions: list[str]):
        frames = policy.frames(images)
        with torch.no_grad():
            logits = policy(*policy.prompt_ids(instructions), policy.pixel_values(frames))
            bins = grpo.sample_tokens(logits, temperature)                          # (B, 56)
            logp, entropy = grpo.token_logprobs(logits, bins, temperature)
        calls = map(Call, frames, bins.cpu(), logp.cpu(), entropy.mean(1).tolist())
        return to_env_actions(policy.decode(bins, key)), list(calls)
    return act


# Training

@dataclass
class Batch:
    """The N executed chunks (policy calls) of a step's rollouts that have an advantage. Where none
    has it holds a row without valid tokens, whose pass another rank's update needs; `rows` is 0."""
    frames: Tensor          # (N, 1, side, side, 3) uint8
    instructions: list[str]
    bins: Tensor            # (N, 56) int64
    logp: Tensor            # (N, 56) float32, under the policy and temperature of sampling
    mask: Tensor            # (N, 56) bool: tokens of actions that ran before the episode ended
    advantage: Tensor       # (N,) float32
    trajectory: Tensor      # (N,) int64, the rollout a chunk belongs to

    @property
    def rows(self) -> int:
        return len(self.bins) if bool(self.mask.any()) else 0


def collate(episodes: list[Episode], advantages: Tensor, instructions: tuple[str, ...]) -> Batch:
    """Rollouts and their advantages (N,) -> the rows to train on. Old log-probabilities are those
    of sampling. code: it recomputes them."""
    chosen = [(i, e, j) for i, e in enumerate(episodes) if advantages[i] != 0
              for j in range(len(e.executed))]
    rows = chosen or [(0, episodes[0], 0)]
    calls = [e.calls[j] for _, e, j in rows]
    executed = torch.tensor([e.executed[j] for _, e, j in rows])
    steps = torch.arange(ACTION_TOKENS) // ACTION_DIM                           # (56,)
    return Batch(frames=torch.from_numpy(np.stack([call.frame for call in calls])),
                 instructions=[instructions[e.start.task] for _, e, _ in rows],
                 bins=torch.stack([call.bins for call in calls]),
                 logp=torch.stack([call.logp for call in calls]),
                 mask=(steps < executed[:, None]) & bool(chosen),
                 advantage=torch.stack([advantages[i] for i, _, _ in rows]),
                 trajectory=torch.tensor([i for i, _, _ in rows]))


def logprobs(policy, batch: Batch, part: Tensor, temperature: float) -> Tensor:
    """Of the bins of some rows, (B, 56) float32."""
    prompts = policy.prompt_ids([batch.instructions[i] for i in part])
    logits = policy(*prompts, policy.pixel_values(batch.frames[part]))          # (B, 56, 256)
    return grpo.token_logprobs(logits, batch.bins[part].to(logits.device), temperature)[0]
