"""What vla_srpo.py does at its largest, for --plan (plumbing/plan.py)."""
import math
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, VJEPA2Config

import grpo
from plumbing import adapters
from plumbing.plan import META, Job
from robots import evaluate, find_suite, policy_class
from robots import policy as policies
from robots.openvla import ACTION_TOKENS, local_folder, read_json
from robots.parts import ready
from robots.suite import CHUNK

SAVINGS = ({"gradient_checkpointing": True}, {"clips": 4}, {"clips": 1}, {"micro_batch": 8},
           {"micro_batch": 1}, {"average": 0.0}, {"average": 0.0, "dtype": "bfloat16"},
           {"offload_optimizer": True}, {"lora_rank": 32})
INSTRUCTION = "put both the alphabet soup and the cream cheese box in the basket"


def job(s) -> Job:
    """ValueError if the checkpoint is no policy, or is not complete."""
    folder = local_folder(s.model, weights=False)
    kind = policy_class(read_json(folder / "config.json").get("model_type"))
    shapes = None if Path(s.model).is_dir() else hub_shapes(s.model)
    known, video = kind.described(folder, shapes), video_config(s)
    missing, suite, horizon = simulated(s)
    try:
        policies.find_key(known.norm_stats, s.suite)
    except ValueError as error:
        missing.append(f"{folder}: {error}")

    def model(s):
        policy = ready(kind.described(folder, shapes).to(getattr(torch, s.dtype)), s)
        if s.average:
            policy.beside = [adapters.running_average(policy, s.average)]
        return policy

    def logits(policy, rows: int):
        frames = policy.frames(np.zeros((rows, policy.camera, policy.camera, 3), np.uint8))
        return policy(*policy.prompt_ids([INSTRUCTION] * rows), policy.pixel_values(frames))

    def rollout(policy, s):
        return logits(policy, suite.count(s.workers, s.tables) if suite else s.tables or s.workers)

    def loss(policy, s):
        bins = torch.zeros(min(s.micro_batch, s.minibatch), ACTION_TOKENS, dtype=torch.long)
        logp = grpo.token_logprobs(logits(policy, len(bins)), bins)[0]
        return grpo.policy_loss(logp, logp.detach(), torch.ones(len(bins)), bins == 0, beta=s.beta,
                                ref_logp=logp.detach() if s.beta else None)[0]

    def encode(s):
        """As under autocast on a GPU: weights stay fp32, and so does the residual stream."""
        if video is None:
            return None
        half = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        with META:
            encoder = AutoModel.from_config(video, dtype=half).eval().requires_grad_(False)
            size, rest = sum(p.numel() for p in encoder.parameters()), 4 - half.itemsize
            side, steps = video.crop_size, video.frames_per_clip // video.tubelet_size
            weights = torch.empty(size * rest // 4)
            pixels = torch.empty(s.clips, video.frames_per_clip, 3, side, side)
            stream = torch.empty(s.clips, steps, (side // video.patch_size)**2 * video.hidden_size
                                 * rest // 4)
        encoder.encoder(pixels.to(half))
        del pixels, stream
        return encoder, weights

    def images(s) -> float:
        """If all rollouts last to the horizon: what the policy saw, twice once they are a batch,
        and what the world model will see."""
        seen = known.frames(np.zeros((1, known.camera, known.camera, 3), np.uint8)).nbytes
        clip = math.ceil(horizon / s.video_every) + 1
        clip = 0 if video is None else min(clip, video.frames_per_clip)
        return s.groups * s.group_size * (
            2 * math.ceil(horizon / CHUNK) * seen + clip * 3 * known.camera**2)
    return Job(str(folder), model, rollout, loss, encode, images, SAVINGS, missing)


def hub_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a hub id, without downloading any."""
    from huggingface_hub import get_safetensors_metadata
    try:
        files = get_safetensors_metadata(name).files_metadata.values()
    except Exception as error:          # no network, no such file: they have no common class
        raise FileNotFoundError(f"the hub did not give the tensors' shapes of {name}: "
                                f"{' '.join(str(error).split())[:200]}") from None
    return {name: tuple(x.shape) for file in files for name, x in file.tensors.items()}


def video_config(s) -> VJEPA2Config | None:
    """The world model's; None if there is none."""
    if s.reward == "binary" or s.world_model in ("pixels", "oracle"):
        return None
    where = local_folder(s.world_model, weights=False)
    config = read_json(where / "config.json")
    if config.get("model_type") != "vjepa2":
        raise ValueError(f"--world_model {where} is a {config.get('model_type')}; give a V-JEPA 2, "
                         "pixels or oracle")
    return VJEPA2Config(**config)


def simulated(s) -> tuple[list[str], object, int]:
    """Problems of the suite, its tasks, OpenGL and the assets; the suite, and its horizon."""
    try:
        suite = find_suite(s.suite, tuple(s.tasks), s.options())
        return [], suite, evaluate.try_suite(suite, "train").horizon
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return [str(error).splitlines()[0]], None, s.horizon or 520
