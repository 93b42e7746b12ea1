"""GPU memory, RAM and disk that a run of vla_srpo.py or reflection_srpo.py needs, by arithmetic.

1. Sizes come from config.json and the headers of the safetensors files: no weight is read.
2. Weights, gradients and optimiser state are counted tensor by tensor, as the flags make them: full or LoRA, bf16 or fp32, over N ranks.
3. Activations are what autograd keeps of a micro-batch: block by block, or with gradient checkpointing each block's input and one block.
4. The peak is the largest of three phases: rollout and its rewards (whole weights, KV cache, then the world model), the reference's pass (KL),
   and update (gradients, activations, logits).
5. If that is more than is free, the flags that make it fit are found by trying them.

Left out: the allocator's fragmentation and the libraries' own buffers, for which 5% is added; the simulator's memory.
plumbing/plan.py says what comes out.
"""
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from robots import libero as libero_envs
from robots import openvla as checkpoints
from robots import openvla as vla
from robots import tabletop as envs

GiB = 2**30
MARGIN = 1.05
PROMPT_TOKENS = 32      # of an OpenVLA instruction, about
# What may be changed to save memory, the least costly first; each is tried on top of the ones before
SAVINGS = {"vla": [{"gradient_checkpointing": True}, {"clips": 4}, {"clips": 1}, {"micro_batch": 8}, {"micro_batch": 1}, {"average": 0.0}, {"average": 0.0, "dtype": "bfloat16"},
                   {"offload_optimizer": True}, {"lora_rank": 32}],
           "vlm": [{"gradient_checkpointing": True}, {"micro_tokens": 4096}, {"rollout_batch": 16}, {"micro_tokens": 1}, {"dtype": "bfloat16"},
                   {"offload_optimizer": True}, {"lora_rank": 32}]}


@dataclass
class Needs:
    """Bytes on each GPU (CPU without one)."""
    weights: float          # this rank's shard
    gathered: float         # the rest of the weights, while all are whole for the rollouts
    working: float          # whole weights of a block or two, and of the root, in the update of several ranks
    gradients: float
    optimizer: float
    copies: float           # running average; on a CPU also the reference
    reference: float        # while it is there, for its pass; else it waits on the CPU
    activations: float
    logits: float           # of the completions: forward, copy, gradient
    kv_cache: float
    forward: float          # what a block of the language model works with in the rollout, for all prompts at once
    world_model: float      # its weights
    encoding: float         # what a pass of it works with, after the rollout

    @property
    def rollout(self) -> float:
        working = max(self.gathered + self.kv_cache + self.forward, self.encoding)
        return MARGIN * (self.weights + self.optimizer + self.copies + self.world_model + working)

    @property
    def update(self) -> float:
        return MARGIN * (self.weights + self.working + self.gradients + self.optimizer + self.copies + self.activations + self.logits + self.world_model)

    @property
    def scoring(self) -> float:
        """The pass of the reference, with what that of the rollout works with."""
        if not self.reference:
            return 0.0
        return MARGIN * (self.weights + self.gathered + self.optimizer + self.copies + self.reference + self.forward + self.logits / 3 + self.world_model)

    @property
    def peak(self) -> float:
        return max(self.rollout, self.scoring, self.update)


def read_checkpoint(path: str | Path) -> tuple[Path, dict, dict[str, tuple[int, ...]]]:
    """(folder, config.json, shape of every tensor), from the headers; of a hub id no weights are downloaded. Errors as checkpoints.read_headers'."""
    folder = checkpoints.local_folder(path, weights=False)
    try:
        shapes = {name: shape for name, (_, shape) in checkpoints.read_headers(folder).items()}
    except FileNotFoundError:
        if Path(path).is_dir():
            raise
        from huggingface_hub import (
            get_safetensors_metadata,  # a hub id whose weights are not in the cache
        )
        try:
            files = get_safetensors_metadata(str(path)).files_metadata.values()
        except Exception as error:                                                      # no network, no such file: the hub's errors have no common class
            raise FileNotFoundError(f"the hub did not give the tensors' shapes of {path}: {' '.join(str(error).split())[:200]}") from None
        shapes = {name: tuple(tensor.shape) for file in files for name, tensor in file.tensors.items()}
    return folder, checkpoints.read_json(folder / "config.json"), shapes


# Counting

def trained(shapes: dict[str, tuple[int, ...]], s) -> dict[str, int]:
    """Elements of each trained tensor by the model's tensor it belongs to: of the tensor, or of its two adapters."""
    unused = ["visual."] if getattr(s, "freeze_vision", False) else []
    for tower in {name.split(".blocks.")[0] for name in shapes if name.startswith("vision_backbone.")}:     # OpenVLA's last blocks are never run
        depth = len({name.split(".")[3] for name in shapes if name.startswith(f"{tower}.blocks.")})
        unused += [f"{tower}.blocks.{depth - 1}.", f"{tower}.norm.", f"{tower}.attn_pool."] if depth else []
    names = [name for name in shapes if not any(part in name for part in unused)]
    if not s.lora_rank:
        return {name: math.prod(shapes[name]) for name in names}
    if any("visual." in name for name in shapes):                                       # reflection_srpo.py: the language model's layers
        names = [name for name in names if re.search(r"\.(q|k|v|o|gate|up|down)_proj\.weight$", name) and "visual." not in name]
    return {name: s.lora_rank * sum(shapes[name]) for name in names
            if name.endswith(".weight") and len(shapes[name]) == 2 and not re.search("embed_tokens|lm_head|^words", name)}


@dataclass
class Stack:
    """Transformer blocks of one kind, and the rows of `length` tokens that a micro-batch sends through them.

    llama: RMSNorm, gated MLP, padding; qwen-vit: the same without padding, q, k and v cut from one tensor; vit: LayerNorm, GELU MLP; dino: that,
    with both branches scaled by a vector."""
    kind: str
    rows: float
    length: int
    width: int
    depth: int
    mlp: int
    lora: bool = False
    attention: int = 0      # llama: numbers of all query heads, which need not be the width

    def inputs(self, size: int) -> float:
        """Bytes of a block's input, `size` a number."""
        return self.rows * self.length * self.width * size

    def norm(self, size: int) -> float:
        """What an RMSNorm keeps: its input in fp32, the normalised value, the output."""
        return self.rows * self.length * self.width * (4 + 2 * size)

    def block(self, size: int) -> float:
        """What autograd keeps of one block with SDPA attention, k and v repeated to the query heads."""
        width, mlp = self.inputs(size), self.rows * self.length * self.mlp * size
        if self.kind == "llama":
            heads = self.rows * self.length * self.attention * size
            kept = 2 * self.norm(size) + 4 * heads + 4 * mlp + self.rows * self.length**2 * size        # the last is the additive mask
            if self.lora:                   # frozen norms do not keep the normalised value
                kept -= 2 * width
            if self.lora and size == 2:     # peft: an fp32 copy of each adapted layer's input, in place of the input
                kept += 2 * (5 * width + heads + mlp) - 2 * width - mlp
        elif self.kind == "qwen-vit":
            kept = 2 * self.norm(size) + 6 * width + 4 * mlp
        else:
            kept = (10 if self.kind == "dino" else 8) * width + 2 * mlp
            if self.lora and size == 2:
                kept += 2 * (3 * width + mlp) - 2 * width - mlp
        return kept


def stacks(config: dict, shapes: dict, s) -> list[Stack]:
    """Of the model, the language model last; none in a TinyVLA, whose activations are small."""
    if config["model_type"] == "tiny_vla":
        return []
    text = config.get("text_config") or config
    text = dict(width=text["hidden_size"], depth=text["num_hidden_layers"], mlp=text["intermediate_size"], attention=text["num_attention_heads"] * head_size(text))
    if config["model_type"] == "openvla":
        (w1, d1, m1), (w2, d2, m2) = (checkpoints.tower_size({n: (None, x) for n, x in shapes.items()}, f"vision_backbone.{tower}", Path(".")) for tower in ("featurizer", "fused_featurizer"))
        rows = min(s.micro_batch, s.minibatch)
        return [Stack("dino", rows, vla.PATCHES + 5, w1, d1 - 1, m1, s.lora_rank > 0), Stack("vit", rows, vla.PATCHES, w2, d2 - 1, m2, s.lora_rank > 0),
                Stack("llama", rows, vla.PATCHES + PROMPT_TOKENS + vla.ACTION_TOKENS + 1, **text, lora=s.lora_rank > 0)]
    language, vision = Stack("llama", sequences(s), longest(s)[0], **text, lora=s.lora_rank > 0), config["vision_config"]
    if s.freeze_vision or s.lora_rank:                                                  # nothing of the tower is kept
        return [language]
    merged = vision.get("spatial_merge_size", 2)**2                                     # patches of an image token
    pictures = min(s.max_prompt, s.max_pixels // (vision["patch_size"]**2 * merged))    # image tokens of a prompt, at most
    return [Stack("qwen-vit", sequences(s), pictures * merged, vision["hidden_size"], vision["depth"], vision["intermediate_size"]), language]


def head_size(text: dict) -> int:
    """Of one attention head, from the language model's part of config.json."""
    return text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]


def activations(config: dict, shapes: dict, s, size: int) -> float:
    """What autograd keeps of a micro-batch; with gradient checkpointing the blocks' inputs, and the block that is being recomputed."""
    parts = stacks(config, shapes, s)
    if not parts:
        return 0.0
    total = parts[-1].norm(size)                                                        # the final norm
    if config["model_type"] == "openvla":
        both, d = parts[0].width + parts[1].width, parts[2].width
        total += parts[0].rows * vla.PATCHES * (9 * both + 2 * d) * size                # the projector
    if s.gradient_checkpointing:
        return total + sum(part.inputs(size) * part.depth for part in parts) + max(part.block(size) for part in parts)
    return total + sum(part.block(size) * part.depth for part in parts)


def longest(s) -> tuple[int, int]:
    """reflection_srpo.py: tokens of the longest row that its stage may train on, and those of its response if its prompt is as long as can be."""
    return (s.max_length, max(1, s.max_length - s.max_prompt)) if s.stage == "sft" else (s.max_prompt + s.max_new_tokens, s.max_new_tokens)


def sequences(s) -> float:
    """Longest rows of a micro-batch, of shorter ones there are more: one always goes."""
    return max(1.0, s.micro_tokens / longest(s)[0])


def completion_tokens(s) -> int:
    """Of a micro-batch at most: these reach the vocabulary. One row always goes, in fine-tuning one of nearly --max_length."""
    return max(int(sequences(s) * longest(s)[1]), s.max_length if s.stage == "sft" else 0)


def needs(s, config: dict, shapes: dict, ranks: int = 1, world_model: tuple[dict, int] | None = None) -> Needs:
    """Per GPU, for the settings of either script. world_model: config.json and number of parameters of a V-JEPA 2."""
    size, numbers = (2 if s.dtype == "bfloat16" else 4), {name: math.prod(shape) for name, shape in shapes.items()}
    train = trained(shapes, s)
    adapted = sum(train.values()) * 4 if s.lora_rank else 0                             # adapters are fp32
    weights = sum(numbers.values()) * size + adapted
    gradients = sum(train.values()) * (4 if s.lora_rank else size)
    master = 4 if (size == 2 and not s.lora_rank) else 0
    optimizer = 0 if s.offload_optimizer and torch.cuda.is_available() else sum(train.values()) * (8 + master)
    kv_cache = logits = 0.0
    prompts = (s.tables or (128 if s.suite == "tabletop" else s.workers)) if hasattr(s, "tables") else 0        # of a pass in the rollout
    if hasattr(s, "micro_tokens"):
        text = config.get("text_config") or config
        heads = text.get("num_key_value_heads") or text["num_attention_heads"]
        prompts = 0 if s.stage == "sft" else min(s.rollout_batch, math.ceil(s.prompts / ranks) * s.group_size)
        kv_cache = prompts * (s.max_prompt + s.max_new_tokens) * text["num_hidden_layers"] * 2 * heads * head_size(text) * size
        logits = 3 * completion_tokens(s) * text["vocab_size"] * size
    reference = sum(numbers.values()) * size if s.beta and not s.lora_rank else 0
    copies = (weights / ranks if getattr(s, "average", 0) else 0) + (0 if torch.cuda.is_available() else reference)
    parts, forward = stacks(config, shapes, s), 0.0
    if parts:
        length = s.max_prompt if hasattr(s, "micro_tokens") else parts[-1].length
        forward = prompts * length * (4 * parts[-1].mlp + 8 * parts[-1].width) * size
    blocks = sum(part.depth for part in parts) or 1
    root = sum(n for name, n in numbers.items() if not re.search(r"\.(blocks|layers)\.\d+\.", name)) * size
    working, one = 0.0, (weights - root) / blocks
    if ranks > 1:                                                                       # whole weights, and gradients before they are divided, also in fp32
        working = (root + 2 * one) * (1 - 1 / ranks) + (0 if s.lora_rank else (root + one) * (1 + 4 / size))
    encoder = encoder_bytes(*world_model, s.clips) if world_model else (0.0, 0.0)
    return Needs(weights / ranks, weights * (1 - 1 / ranks), working, gradients / ranks, optimizer / ranks, copies,
                 reference if torch.cuda.is_available() else 0, activations(config, shapes, s, size), logits, kv_cache, forward, *encoder)


def encoder_bytes(config: dict, parameters: int, clips: int) -> tuple[float, float]:
    """(fp32 weights of a V-JEPA 2; the pixels, and the widest moment of a pass over `clips`: bf16, with norms in fp32)."""
    tokens = config["frames_per_clip"] // config["tubelet_size"] * (config["crop_size"] // config["patch_size"])**2
    pixels = 3 * config["frames_per_clip"] * config["crop_size"]**2
    return 4 * parameters, clips * (4 * pixels + tokens * config["hidden_size"] * (8 + 4 * config["mlp_ratio"]))


def host(s, config: dict, shapes: dict, ranks: int = 1, world_model: tuple[dict, int] | None = None) -> tuple[float, float]:
    """(RAM, disk) in bytes beside a GPU: the RAM of this rank's reference, offloaded optimiser, images of its rollouts and of the copy that is
    saved, without the simulator; the disk of two checkpoints, since the old one goes when the new one is whole, and of the policy."""
    size, numbers, train = (2 if s.dtype == "bfloat16" else 4), sum(map(math.prod, shapes.values())), sum(trained(shapes, s).values())
    state = train * (8 + (4 if size == 2 and not s.lora_rank else 0))
    checkpoint = state + train * (4 if s.lora_rank else size) * (2 if getattr(s, "average", 0) else 1)
    ram = (numbers * size if s.beta and not s.lora_rank else 0) + (state if s.offload_optimizer else 0) + max(checkpoint / ranks, numbers * size)
    return ram + images(s, config, world_model) / ranks, 2 * checkpoint + numbers * size


def images(s, config: dict, world_model: tuple[dict, int] | None) -> float:
    """Bytes of the images of a step's rollouts if all last to the horizon (LIBERO: --horizon, or the longest of its protocol's): what the policy
    saw, twice once they are a batch, and what the world model will see. Reasoning reads its pictures prompt by prompt."""
    if hasattr(s, "micro_tokens"):
        return 0.0
    steps = envs.HORIZON if s.suite == "tabletop" else s.horizon or max(libero_envs.PROTOCOLS[s.protocol].values())
    camera, policy = (vla.CAMERA, vla.IMAGE) if config["model_type"] == "openvla" else (config["size"],) * 2
    clip = min(math.ceil(steps / s.video_every) + 1, world_model[0]["frames_per_clip"] if world_model else math.inf)
    return s.groups * s.group_size * 3 * (2 * math.ceil(steps / envs.CHUNK) * policy**2 + clip * camera**2 * (s.reward == "srpo"))


def free_ram() -> float:
    """Bytes for each process of this machine."""
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_memory() -> tuple[float, str]:
    """(bytes, of what): free on this rank's GPU, or available RAM."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    return free_ram(), "RAM of the CPU"


def savings(s, given: tuple, free: float) -> tuple[dict, Needs]:
    """The settings to change so that it fits, none without need, and what is then needed; all that help if it never does. given: `needs`'
    other arguments."""
    def peak(changes: dict) -> float:
        return needs(replace(s, **changes), *given).peak
    changes: dict = {}
    for more in SAVINGS["vlm" if hasattr(s, "micro_tokens") else "vla"]:
        if peak(changes) <= free:
            break
        if "gradient_checkpointing" in more and given[0]["model_type"] == "tiny_vla":
            continue
        if "offload_optimizer" in more and (given[2] > 1 or not torch.cuda.is_available()
                                            or needs(replace(s, **changes), *given).optimizer > free_ram()):
            continue
        if peak(changes | more) < 0.99 * peak(changes):
            changes |= more
    for name in [name for name in changes if peak(changes) <= free]:
        if peak(without := {k: x for k, x in changes.items() if k != name}) <= free and not (without.get("dtype") and name == "average"):
            changes = without
    return changes, needs(replace(s, **changes), *given)
