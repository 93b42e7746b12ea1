"""The policy: OpenVLA-OFT (two vision towers, a projector, Llama-2), as SRPO-VLA fine-tunes it.

1. A camera frame passes through two ViTs (DINOv2 and SigLIP); their patch features are joined on
   channels and an MLP projects each patch to one Llama embedding.
2. Llama reads  BOS | 256 patches per image | rest of the prompt | 56 zero vectors | </s>  with
   bidirectional attention; one pass gives the logits of all action tokens: 8 future steps x 7
   dimensions, 256 bins each.
3. Bins become numbers in [-1, 1], and those become actions by the quantiles of the demonstrations.
4. The published evaluation's image pipeline (rotate, JPEG, lanczos3, crop) is Pillow and numpy.

Modules carry the names of the published checkpoints' tensors, so these load as they are. Left out:
proprioception, FiLM, diffusion and L1-regression heads (no checkpoint of the paper uses them);
generation and its cache; timm, torchvision, tensorflow.

    python -m robots.openvla                            # a tiny random OpenVLA: frame -> actions
    python -m robots.openvla --checkpoint FOLDER_OR_ID  # the same with a checkpoint
"""
import argparse
import io
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

CHUNK, ACTION_DIM, BINS = 8, 7, 256             # a chunk is 8 steps x 7 dimensions = 56 tokens
ACTION_TOKENS = CHUNK * ACTION_DIM
FIRST_BIN = 32000 - BINS                        # tokens 31744..31999, the least used, are the bins
BOS, EOS, PAD, SPACE = 1, 2, 32000, 29871       # a prompt ends with a lone space; actions follow
IMAGE, PATCH, HEADS = 224, 14, 16               # both towers: 224 px, 14 px patches, 16 heads
PATCHES = (IMAGE // PATCH) ** 2
TOWERS = ("featurizer", "fused_featurizer")     # DINO, SigLIP
CAMERA = 256                                    # pixels that it is shown, as published
# DINO's and SigLIP's mean and std, rounded to bf16 as the published models saw them; a checkpoint
# brings its own
PREPROCESSOR = {"tvf_normalize_params": [
    {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]},
    {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}]}
TINY = {"model_type": "openvla",
        "text_config": {"vocab_size": 32064, "pad_token_id": PAD, "hidden_size": 32,
                        "intermediate_size": 88, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "num_key_value_heads": 4},
        "norm_stats": {"unit": {"action": {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 7,
                                           "mask": [True] * 6 + [False]}}}}


# Actions: bins <-> numbers, shared by every policy here

def action_stats(norm_stats: dict, unnorm_key: str) -> dict:
    """The q01, q99 and mask of one data set's actions. ValueError, one line: an unknown key, or
    numbers that no action can be decoded with."""
    if unnorm_key not in norm_stats:
        raise ValueError(f"unnorm_key {unnorm_key!r} has no action statistics; this model knows: "
                         f"{', '.join(sorted(norm_stats)) or 'none'}")
    entry = norm_stats[unnorm_key]
    stats = entry.get("action") if isinstance(entry, dict) else None
    if not isinstance(stats, dict):
        raise ValueError(f"{unnorm_key!r} has no statistics of an action; copy it again")
    for name, default in (("q01", None), ("q99", None), ("mask", [True] * ACTION_DIM)):
        numbers = stats.get(name, default)
        if (not isinstance(numbers, list) or len(numbers) != ACTION_DIM
                or not all(isinstance(x, (int, float)) and abs(x) < 1e300 for x in numbers)):
            raise ValueError(f"{unnorm_key!r} needs {name}, {ACTION_DIM} finite numbers, and has "
                             f"{str(numbers)[:60]}; give the checkpoint's own statistics")
    if any(low > high for low, high in zip(stats["q01"], stats["q99"])):
        raise ValueError(f"{unnorm_key!r} has a q01 above its q99; copy it again")
    return stats


def decode_actions(bins, stats: dict) -> np.ndarray:
    """Bins 0..255 (columns of the logits), (B, 56) or (B, 8, 7) -> un-normalised actions (B, 8, 7)
    float64.

    stats holds q01, q99 and mask, 7 each: where mask is False (the gripper) the number in [-1, 1]
    is passed on as it is. A lower bin is a HIGHER number, because OpenVLA counts bins down from the
    end of the vocabulary:

    >>> stats = {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    >>> decode_actions(np.array([[255, 128, 127, 1, 0, 64, 64]]), stats).round(3).tolist()
    [[[0.002, 0.5, 0.504, 0.998, 0.998, 0.751, 0.502]]]
    """
    bins = np.asarray(bins.cpu() if torch.is_tensor(bins) else bins)
    if bins.dtype.kind not in "iu" or not bins.size or bins.min() < 0 or bins.max() >= BINS:
        seen = f"{bins.dtype} in {bins.min()}..{bins.max()}" if bins.size else "nothing"
        raise ValueError(f"bins must be integers in 0..{BINS - 1}, got {seen}; token ids are bins "
                         f"+ {FIRST_BIN}")
    bins = bins.reshape(len(bins), -1, ACTION_DIM)                              # (B, chunk, 7)
    edges = np.linspace(-1, 1, BINS)
    centres = (edges[:-1] + edges[1:]) / 2                      # (255,): one fewer than tokens
    unit = centres[np.clip(BINS - 1 - bins, 0, BINS - 2)]       # index 32000 - token - 1, clipped
    low, high, mask = _quantiles(stats)
    return np.where(mask, 0.5 * (unit + 1) * (high - low + 1e-8) + low, unit)   # (B, chunk, 7)


def encode_actions(actions, stats: dict) -> torch.Tensor:
    """Actions (..., 7) in the data set's units -> bins 0..255 (..., 7) long: the targets of
    supervised fine-tuning. The inverse of `decode_actions` up to half a bin; outside [q01, q99] is
    clipped; bin 0 is only reached at +1."""
    actions = np.asarray(actions, np.float64)
    finite = np.isfinite(actions).all()
    if actions.shape[-1:] != (ACTION_DIM,) or not finite:
        raise ValueError(f"actions must be finite numbers of shape (..., {ACTION_DIM}), got shape "
                         f"{actions.shape}{'' if finite else ' with NaN or inf'}")
    low, high, mask = _quantiles(stats)
    unit = np.where(mask, 2 * (actions - low) / (high - low + 1e-8) - 1, actions)
    return torch.from_numpy(BINS - np.digitize(unit.clip(-1, 1), np.linspace(-1, 1, BINS)))


def _quantiles(stats: dict):
    low, high = np.asarray(stats["q01"], np.float64), np.asarray(stats["q99"], np.float64)
    return low, high, np.asarray(stats.get("mask", np.ones(len(low))), bool)


def to_env_actions(actions: np.ndarray) -> np.ndarray:
    """The data's gripper (0 closed .. 1 open) -> LIBERO's (-1 open, +1 close); the other 6 of
    (..., 7) stay.

    >>> to_env_actions(np.array([[.1, 0, 0, 0, 0, 0, 0.9], [.1, 0, 0, 0, 0, 0, 0.1]]))[:, 6]
    array([-1.,  1.])
    """
    gripper = -np.sign(2 * actions[..., 6:] - 1)        # [0, 1] -> [-1, 1], sign, invert
    return np.concatenate([actions[..., :6], gripper], axis=-1)


def from_env_actions(actions: np.ndarray) -> np.ndarray:
    """LIBERO's gripper (-1 open, +1 close) -> the data's (1 open, 0 closed), for `encode`."""
    return np.concatenate([actions[..., :6], (1 - actions[..., 6:]) / 2], axis=-1)


# Images: one camera frame -> what the published evaluation feeds the model

def preprocess(frame: np.ndarray, rotate: bool = True) -> np.ndarray:
    """Camera frame (H, W, 3) uint8, as LIBERO renders it -> (224, 224, 3) uint8; store frames in
    this form (150 KB). rotate=False for frames that are upright already."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"frame must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}; use "
                         "0..255, channels last")
    upright = frame[::-1, ::-1] if rotate else frame    # LIBERO renders upside down
    return centre_crop(resize(jpeg_round_trip(upright)))


def jpeg_round_trip(frame: np.ndarray) -> np.ndarray:
    """Through JPEG (quality 95, 4:2:0), as the training images were stored."""
    buffer, image = io.BytesIO(), Image.fromarray(np.ascontiguousarray(frame))
    image.save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    return np.asarray(Image.open(buffer).convert("RGB"))


def resize(frame: np.ndarray) -> np.ndarray:
    """Lanczos with radius 3 and antialiasing to (224, 224, 3): within a rounding of tf's resize."""
    return np.asarray(Image.fromarray(frame).resize((IMAGE, IMAGE), Image.LANCZOS))


def centre_crop(frame: np.ndarray) -> np.ndarray:
    """The central 0.9 of the AREA, bilinear back to (224, 224, 3): training used random crops of
    that area."""
    side = 0.9 ** 0.5
    at = (IMAGE - 1) * ((1 - side) / 2 + side * np.arange(IMAGE) / (IMAGE - 1))     # (224,) pixels
    low = at.astype(int)
    weight = (at - low)[:, None, None]
    rows = frame[low] * (1 - weight) + frame[low + 1] * weight                  # (224, 224, 3)
    out = rows[:, low] * (1 - weight[:, 0]) + rows[:, low + 1] * weight[:, 0]
    return (out * (255.5 / 255)).clip(0, 255).astype(np.uint8)      # tensorflow's rounding


# Vision towers

class Block(GradientCheckpointingLayer):
    """A pre-norm transformer block; DINOv2 scales both residual branches by a learned vector,
    SigLIP does not."""

    def __init__(self, width: int, mlp: int, layer_scale: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width),
                                   "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})
        self.ls1, self.ls2 = (LayerScale(width) if layer_scale else nn.Identity()
                              for _ in range(2))

    def forward(self, x):                                               # (B, tokens, width)
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # (B, heads, tokens, width/heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).flatten(2)                        # (B, tokens, width)
        x = x + self.ls1(self.attn["proj"](mixed))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))                 # exact GELU
        return x + self.ls2(self.mlp["fc2"](hidden))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale_factor


class Tower(nn.Module):
    """DINOv2 (CLS and 4 register tokens, LayerScale) or SigLIP: (B, 3, 224, 224) -> (B, 256, w).

    The features are those of the SECOND-TO-LAST block, without the final norm. The last block, the
    norm and SigLIP's pooling are in the checkpoints, so they are kept here to be saved again, but
    never run and never trained."""

    def __init__(self, width: int, depth: int, mlp: int, dino: bool):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, PATCHES, width))    # patches only
        self.blocks = nn.ModuleList(Block(width, mlp, layer_scale=dino) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dino, unused = dino, [self.blocks[-1], self.norm]
        if dino:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.reg_token = nn.Parameter(0.02 * torch.randn(1, 4, width))
        else:
            self.attn_pool = nn.ModuleDict({
                "q": nn.Linear(width, width), "kv": nn.Linear(width, 2 * width),
                "proj": nn.Linear(width, width), "norm": nn.LayerNorm(width),
                "mlp": nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})})
            latent = nn.Parameter(torch.zeros(1, 1, width))
            self.attn_pool.register_parameter("latent", latent)
            unused.append(self.attn_pool)
        for module in unused:
            module.requires_grad_(False)

    def forward(self, pixels):
        patches = self.patch_embed["proj"](pixels)
        x = patches.flatten(2).transpose(1, 2) + self.pos_embed                 # (B, 256, width)
        if self.dino:
            prefix = torch.cat([self.cls_token, self.reg_token], 1).expand(len(x), -1, -1)
            x = torch.cat([prefix, x], 1)                                   # (B, 5 + 256, width)
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, -PATCHES:]                                              # prefix dropped


# The whole policy

class OpenVLA(nn.Module):
    """OpenVLA-OFT. `from_pretrained` loads a checkpoint; OpenVLA(TINY, (32, 3, 128), (48, 4, 192))
    is a random one.

    config: config.json as a dict (text_config and norm_stats are used); dino, siglip: (width,
    depth, mlp) of the towers, widths multiples of 16; preprocessor: preprocessor_config.json;
    files: a checkpoint's other small files, by name."""
    model_type, camera, half_on_gpu = "openvla", CAMERA, True

    def __init__(self, config: dict, dino: tuple[int, int, int], siglip: tuple[int, int, int],
                 preprocessor: dict = PREPROCESSOR, files: dict[str, bytes] | None = None):
        super().__init__()
        self.config, self.preprocessor, self.files = config, preprocessor, files or {}
        self.norm_stats = config.get("norm_stats", {})
        self.tokenizer = None                                   # made of files at its first use
        both, llama = dino[0] + siglip[0], LlamaConfig(**config["text_config"])
        self.vision_backbone = nn.ModuleDict({"featurizer": Tower(*dino, dino=True),
                                              "fused_featurizer": Tower(*siglip, dino=False)})
        self.projector = nn.ModuleDict({
            "fc1": nn.Linear(both, 4 * both), "fc2": nn.Linear(4 * both, llama.hidden_size),
            "fc3": nn.Linear(llama.hidden_size, llama.hidden_size)})
        self.language_model = LlamaForCausalLM(llama)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        """Logits of the action tokens, (B, 56, 256) float32: 8 steps x 7 dimensions; column c is
        token 31744 + c.

        input_ids, attention_mask: (B, L), RIGHT-padded prompts that end with 29871, see
        `prompt_ids`; pixel_values: (B, 6 * images, 224, 224). ValueError where shapes disagree or
        the padding is on the left."""
        _check_inputs(input_ids, attention_mask, pixel_values)
        length = attention_mask.sum(1, keepdim=True)                # (B, 1) tokens of each prompt
        # Text: the prompt, 56 zero vectors as placeholders for the action tokens, the stop token,
        # and padding last
        end = input_ids.shape[1] + ACTION_TOKENS + 1
        position = torch.arange(end, device=input_ids.device)[None]             # (1, L + 57)
        stop = length + ACTION_TOKENS
        ids = F.pad(input_ids, (0, ACTION_TOKENS + 1), value=PAD)
        ids = ids.masked_fill(position == stop, EOS)
        placeholder = (position >= length) & (position < stop)                  # (B, L + 57)
        llama = self.language_model.model
        text = llama.embed_tokens(ids).masked_fill(placeholder[..., None], 0)   # (B, L + 57, d)
        patches = self.project(self.vision_features(pixel_values.to(text.dtype)))
        sequence = torch.cat([text[:, :1], patches, text[:, 1:]], 1)        # BOS, then the images
        valid = position <= stop                                                # (B, L + 57)
        keep = torch.cat([valid[:, :1].expand(-1, patches.shape[1]), valid], 1)
        hidden = llama(inputs_embeds=sequence, attention_mask=keep.long(), is_causal=False,
                       use_cache=False)[0]
        # Token t is read one position before its own placeholder: at 29871 and the first 55 of them
        tokens = torch.arange(ACTION_TOKENS, device=ids.device)
        at = patches.shape[1] + length - 1 + tokens                             # (B, 56)
        hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))   # (B, 56, d)
        rows = self.language_model.lm_head.weight[FIRST_BIN:FIRST_BIN + BINS]   # (256, d)
        return F.linear(hidden.float(), rows.float())           # code: a bf16 model has bf16 logits

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 6n, 224, 224) -> both towers' patches joined on channels, (B, 256n, widths)."""
        images = pixel_values.unflatten(1, (-1, 6)).flatten(0, 1)           # (B * n, 6, 224, 224)
        dino, siglip = (self.vision_backbone[name] for name in TOWERS)
        features = torch.cat([dino(images[:, :3]), siglip(images[:, 3:])], -1)  # (B * n, 256, w)
        return features.unflatten(0, (len(pixel_values), -1)).flatten(1, 2)

    def project(self, features: Tensor) -> Tensor:
        """(B, patches, dino + siglip width) -> (B, patches, d): Llama's embeddings of them."""
        fc1, fc2, fc3 = (self.projector[name] for name in ("fc1", "fc2", "fc3"))
        return fc3(F.gelu(fc2(F.gelu(fc1(features)))))

    def frames(self, images: np.ndarray) -> np.ndarray:
        """Upright camera images uint8 (B, S, S, 3) -> (B, 1, 224, 224, 3), `preprocess`ed."""
        return np.stack([preprocess(image, rotate=False) for image in images])[:, None]

    def pixel_values(self, frames) -> Tensor:
        """Preprocessed frames uint8 (B, n, 224, 224, 3) -> (B, 6n, 224, 224), in the model's dtype
        and on its device. Each of the n images of a sample appears twice: channels 0-2 normalised
        for DINO, 3-5 for SigLIP."""
        frames = torch.as_tensor(frames)
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[2:] != (IMAGE, IMAGE, 3):
            raise ValueError(f"frames must be uint8 (B, images, {IMAGE}, {IMAGE}, 3), got "
                             f"{frames.dtype} {tuple(frames.shape)}; pass each through "
                             "preprocess() and stack")
        weight = self.projector["fc1"].weight
        image = frames.to(weight.device).permute(0, 1, 4, 2, 3).float() / 255   # (B, n, 3, ..)
        both = []
        for norm in self.preprocessor["tvf_normalize_params"]:
            mean, std = (torch.tensor(norm[k], device=weight.device).view(3, 1, 1)
                         for k in ("mean", "std"))
            both.append((image - mean) / std)
        return torch.cat(both, 2).flatten(1, 2).to(weight.dtype)            # (B, 6n, 224, 224)

    def prompt_ids(self, instructions: str | list[str]) -> tuple[Tensor, Tensor]:
        """Instructions -> right-padded input_ids and attention_mask (B, L) on the model's device.
        FileNotFoundError if the checkpoint has no tokenizer.json."""
        if "tokenizer.json" not in self.files:
            raise FileNotFoundError("prompt_ids needs tokenizer.json; copy it into the checkpoint "
                                    "from the original one")
        self.tokenizer = self.tokenizer or read_tokenizer(self.files["tokenizer.json"])
        rows = []
        for task in [instructions] if isinstance(instructions, str) else instructions:
            prompt = f"In: What action should the robot take to {task.lower()}?\nOut:"
            words = self.tokenizer.encode(prompt, add_special_tokens=False).ids
            rows.append(torch.tensor([BOS, *words, SPACE]))
        ids, mask = (nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=padding)
                     for part, padding in ((rows, PAD), ([torch.ones_like(r) for r in rows], 0)))
        device = self.projector["fc1"].weight.device
        return ids.to(device), mask.to(device)

    def decode(self, bins, unnorm_key: str) -> np.ndarray:
        """Bins 0..255, (B, 56) or (B, 8, 7) -> un-normalised actions (B, 8, 7) float64; then see
        `to_env_actions`."""
        return decode_actions(bins, action_stats(self.norm_stats, unnorm_key))

    def encode(self, actions, unnorm_key: str) -> Tensor:
        """Actions (..., 7) in the data's units (see `from_env_actions`) -> bins (..., 7)."""
        return encode_actions(actions, action_stats(self.norm_stats, unnorm_key))

    def set_gradient_checkpointing(self, on: bool = True) -> None:
        """Recompute each block of Llama AND of both towers in the backward pass; in train mode."""
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):   # transformers' own; Block has it too
                module.gradient_checkpointing = on
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def _apply(self, fn, recurse=True):
        """`.to(bfloat16)` and the like would round the rotary frequencies (logits off by 2.6e-3):
        make them anew."""
        super()._apply(fn, recurse)
        return self._make_rotary()

    def _make_rotary(self):
        llama, device = self.language_model.model, self.projector["fc1"].weight.device
        llama.rotary_emb = type(llama.rotary_emb)(llama.config).to(device)
        return self

    @classmethod
    def described(cls, folder: Path, shapes: dict | None = None) -> "OpenVLA":
        """The model of a checkpoint folder without its weights, on the meta device, by config.json
        and the tensors' shapes (those of their headers), which alone tell the towers' sizes.
        FileNotFoundError, ValueError: one line, where a file is missing, damaged, or does not fit
        the others."""
        config = read_json(folder / "config.json", "text_config")
        pixels = read_json(folder / "preprocessor_config.json", "tvf_normalize_params")
        shapes = shapes or {name: shape for name, (_, shape) in read_headers(folder).items()}
        sizes = [tower_size(shapes, f"vision_backbone.{tower}", folder) for tower in TOWERS]
        rows = (*shapes.get("language_model.lm_head.weight", ()), 0)[0]
        if rows < FIRST_BIN + BINS:
            raise ValueError(f"{folder}: the head has {rows} rows, the action tokens end at "
                             f"{FIRST_BIN + BINS}; give an OpenVLA-OFT checkpoint with them")
        files = {f.name: f.read_bytes() for f in folder.iterdir()
                 if f.suffix in (".json", ".py", ".model") and not f.name.endswith(".index.json")}
        try:
            _check_config(config["text_config"], pixels["tvf_normalize_params"], shapes)
            with torch.device("meta"):
                model = cls(config, *sizes, preprocessor=pixels, files=files)
        except Exception as error:          # whatever transformers makes of a damaged text_config
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise ValueError(f"{folder}/config.json or preprocessor_config.json does not describe "
                             f"an OpenVLA ({reason}); copy them again") from None
        wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        wrong = [name for name in {**wanted, **shapes} if shapes.get(name) != wanted.get(name)]
        if wrong:
            raise ValueError(f"{folder}: {len(wrong)} tensors are not OpenVLA's; the first, "
                             f"{wrong[0]}, has shape {shapes.get(wrong[0], 'missing')} and should "
                             f"be {wanted.get(wrong[0], 'absent')}; give a complete checkpoint "
                             "whose config.json fits")
        if "tokenizer.json" in files:
            model.tokenizer = read_tokenizer(files["tokenizer.json"], folder)
        model.norm_stats = action_statistics(folder)
        return model

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device | None = None) -> "OpenVLA":
        """A checkpoint folder or hub id, with one model.safetensors or shards and an index. Errors
        are those of `described`, before any weight is read, and of `read_weights`."""
        folder = local_folder(path)
        model = cls.described(folder)
        for file in sorted({file for file, _ in read_headers(folder).values()}):
            part = read_weights(file, dtype, device)
            model.load_state_dict(part, strict=False, assign=True)
        return model._make_rotary()         # in no file, and fp32 whatever the dtype

    def save_pretrained(self, path: str | Path, state_dict: dict | None = None) -> None:
        """Write the checkpoint in the published layout and the model's dtype; it appears complete
        or not at all. ValueError if path exists and is not empty. state_dict: the gathered one of a
        sharded (FSDP) model."""
        jsons = {"config.json": self.config, "preprocessor_config.json": self.preprocessor,
                 "dataset_statistics.json": self.norm_stats}
        state = self.state_dict() if state_dict is None else state_dict
        write_folder(Path(path), jsons, self.files, state)

    @classmethod
    def problems(cls, folder: Path, shapes: dict | None = None) -> list[str]:
        """What would stop a run with this checkpoint, a line each; shapes as for `described`."""
        found, names = [], sorted(file.name for file in folder.iterdir())
        if "tokenizer.json" not in names:
            found.append(f"{folder} has no tokenizer.json; copy it from the original checkpoint")
        found += [f"{folder} holds {name}, a regression head: RL needs the checkpoint with "
                  "discrete action tokens" for name in names if "action_head" in name]
        try:
            cls.described(folder, shapes)
        except (ValueError, OSError) as error:
            found.append(str(error))
        return found


# Checks

def _check_inputs(input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> None:
    shape, mask = tuple(pixel_values.shape), attention_mask.bool()
    if input_ids.ndim != 2 or mask.shape != input_ids.shape:
        raise ValueError("input_ids and attention_mask must both be (B, L), got "
                         f"{tuple(input_ids.shape)} and {tuple(mask.shape)}")
    images = shape[1] if len(shape) == 4 else 0
    if not images or images % 6 or shape != (len(input_ids), images, IMAGE, IMAGE):
        raise ValueError(f"pixel_values must be ({len(input_ids)}, 6 * images, {IMAGE}, {IMAGE}), "
                         f"got {shape}; make them with pixel_values()")
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("attention_mask must be ones, then zeros: prompts are padded on the RIGHT "
                         "here; move each row's padding to its end")


def _check_config(text: dict, norms: list, shapes: dict) -> None:
    """Raises for what no shape shows: a Llama that is not Llama-2 but for its size, pixels that
    cannot be normalised; ValueError, or any other error for a damaged file."""
    llama, published = LlamaConfig(**text), LlamaConfig()
    for name in ("hidden_act", "rope_parameters", "attention_dropout", "tie_word_embeddings"):
        if getattr(llama, name) != getattr(published, name):
            raise ValueError(f"text_config: {name} {getattr(llama, name)} is not Llama-2's")
    if not 0 < llama.rms_norm_eps < 1e-4:
        raise ValueError(f"text_config: rms_norm_eps {llama.rms_norm_eps} is not Llama-2's")
    depth = len({name.split(".")[3] for name in shapes if ".model.layers." in name})
    if llama.num_hidden_layers != depth:            # before as many are made
        raise ValueError(f"text_config: {llama.num_hidden_layers} layers, {depth} in the weights")
    numbers = torch.tensor([[norm["mean"], norm["std"]] for norm in norms])         # (2, 2, 3)
    if numbers.shape != (2, 2, 3) or not (numbers[:, 1] > 0.01).all() or not (numbers < 10).all():
        raise ValueError("tvf_normalize_params are not mean and std of 3 colours, for two towers")


# Checkpoint folders, from here or the hub: headers before weights

def local_folder(path: str | Path, weights: bool = True) -> Path:
    """A folder as it is; anything that looks like a hub id (owner/name) is downloaded, with the
    hub's own cache, its weights only if asked. FileNotFoundError if it is neither, or the hub does
    not give it."""
    if Path(path).is_dir():
        return Path(path)
    owner, _, name = str(path).partition("/")
    if not owner or owner[0] in ".~" or not name or "/" in name or Path(path).exists():
        raise FileNotFoundError(f"{path} is neither a checkpoint folder nor a hub id (owner/name); "
                                "give one of them")
    from huggingface_hub import snapshot_download
    wanted = ["*.json", "*.jinja", "*.py", "tokenizer.model", *["*.safetensors"] * weights]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (OSError, ValueError) as error:              # the hub's errors derive from these two
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(f"{path} is not a folder here, and the hub did not give it "
                                f"({reason}); give the folder of a downloaded copy") from None


def read_json(file: Path, *needed: str) -> dict:
    """The object that a small file of a checkpoint holds. FileNotFoundError; ValueError if it holds
    anything else, or lacks a key."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; the folder is not a complete checkpoint")
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; copy it again")
    for key in needed:
        if key not in content:
            raise ValueError(f"{file} has no {key}, only {', '.join(content)[:200] or 'nothing'}; "
                             "give a checkpoint that has it")
    return content


def action_statistics(folder: Path) -> dict:
    """Quantiles of the training data's actions, by data set: those of fine-tuning, else the
    config's. ValueError names file and key of what no action can be decoded with."""
    file, config = folder / "dataset_statistics.json", folder / "config.json"
    if not file.is_file() and "norm_stats" in read_json(config):
        file, stats = config, read_json(config)["norm_stats"]
    else:
        stats = read_json(file)
    try:
        if not isinstance(stats, dict):
            raise ValueError("the statistics are no JSON object; copy it again")
        for key in stats:
            action_stats(stats, key)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return stats


def read_headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Every tensor's file and shape, from the headers only: a bad checkpoint fails before anything
    is loaded. FileNotFoundError: no weights, or a shard the index names is missing. ValueError: a
    shard or the index cannot be read."""
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file():
        index = folder / "model.safetensors.index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{folder} has neither model.safetensors nor {index.name}; "
                                    "give a folder of weights")
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(
                isinstance(name, str) and "/" not in name for name in shards.values()):
            raise ValueError(f"{index} has no weight_map of file names; copy it again")
        names = sorted(set(shards.values()))
    tensors = {}
    for file in (folder / name for name in names):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, though the index names it; copy that "
                                    "shard again")
        try:
            with safe_open(file, "pt") as shard:
                tensors |= {name: (file, tuple(shard.get_slice(name).get_shape()))
                            for name in shard.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or not a safetensors file ({error}); copy it "
                             "again") from None
    return tensors


def read_weights(file: Path, dtype: torch.dtype, device=None) -> dict[str, Tensor]:
    """A safetensors file's tensors. ValueError if one holds anything but finite numbers."""
    with safe_open(file, "pt", device=str(device or "cpu")) as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}
    for name, x in tensors.items():
        extremes = torch.stack(torch.aminmax(x)) if x.numel() else torch.zeros(2)   # NaN if any is
        if not x.is_floating_point() or not extremes.isfinite().all():
            raise ValueError(f"{file}: {name} holds what is no finite number; copy it again")
    return {name: x.to(dtype) for name, x in tensors.items()}


def write_folder(path: Path, jsons: dict[str, dict], files: dict[str, bytes], state: dict) -> None:
    """Files, JSON and weights into a new folder, under another name until it is complete.
    ValueError if there is one with something in it; OSError, one line, if the disk is full."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; nothing was overwritten, "
                         "choose another path")
    draft = path.with_name(f".{path.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)            # left behind by a killed run
    files = files | {name: json.dumps(x, indent=2).encode() + b"\n" for name, x in jsons.items()}
    try:
        draft.mkdir(parents=True)
        for name, content in files.items():
            (draft / name).write_bytes(content)
        save_file({name: tensor.contiguous() for name, tensor in state.items()},
                  draft / "model.safetensors", metadata={"format": "pt"})
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(f"{path} cannot be written ({error}); is the disk full?") from None


def read_tokenizer(text: bytes, folder: Path = Path()) -> Tokenizer:
    """tokenizer.json as it is (transformers 5 would rebuild Llama's by its own rules), without
    padding or truncation. ValueError if it is not Llama-2's: its words would be other embeddings'
    numbers, and the policy would see another instruction."""
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(text.decode())
        tokenizer.encode("In: What action?")        # fails if there is no <unk> for what it lacks
    except Exception as error:                      # the library raises nothing more special
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}); copy it "
                         "again from the original checkpoint") from None
    for word, number in (("<s>", BOS), ("</s>", EOS), ("▁", SPACE)):
        if (found := tokenizer.token_to_id(word)) != number:
            raise ValueError(f"{file} gives {word!r} the number {found}, OpenVLA's Llama-2 "
                             f"{number}; copy it from the original checkpoint")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tower_size(shapes: dict, prefix: str, folder: Path) -> tuple[int, int, int]:
    """(width, depth, mlp) of a tower; config.json does not tell them, the tensors do."""
    sizes = []
    for name in (f"{prefix}.patch_embed.proj.weight", f"{prefix}.blocks.0.mlp.fc1.weight"):
        if not shapes.get(name):
            raise ValueError(f"{folder} lacks the tensor {name}; give a checkpoint of OpenVLA with "
                             "two towers")
        sizes.append(shapes[name][0])
    start = f"{prefix}.blocks."
    depth = len({name[len(start):].split(".")[0] for name in shapes if name.startswith(start)})
    return sizes[0], depth, sizes[1]


def main(argv: list[str] | None = None) -> None:
    """Load or make a policy, print its sizes, and turn one random frame into a chunk of actions."""
    parser = argparse.ArgumentParser(description="one random frame through an OpenVLA-OFT policy")
    parser.add_argument("--checkpoint", help="folder or hub id; without it a tiny random one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--instruction", default="put the red cube on the green plate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    try:
        if args.checkpoint:
            model = OpenVLA.from_pretrained(args.checkpoint, dtype, args.device)
        else:
            model = OpenVLA(TINY, (32, 3, 128), (48, 4, 192)).to(args.device, dtype)
            for p in (p for p in model.parameters() if p.ndim == 2):
                nn.init.normal_(p, std=0.3)     # from 0.02 all tokens would come out alike
    except (OSError, ValueError, RuntimeError, AssertionError) as error:    # last: no CUDA
        raise SystemExit(f"error: {error}") from None
    for name, tower in model.vision_backbone.items():
        print(f"{name}: width {tower.norm.weight.numel()}, {len(tower.blocks)} blocks")
    sizes = [p.numel() for p in model.parameters()]
    print(f"{sum(sizes):,} parameters in {len(sizes)} tensors, {args.dtype} on {args.device}")
    ids = torch.tensor([[BOS, *torch.randint(3, 30000, (20,)).tolist(), SPACE]], device=args.device)
    prompt = ids, torch.ones_like(ids)
    if model.tokenizer:
        prompt = model.prompt_ids(args.instruction)
    else:
        print("no tokenizer in this checkpoint: a prompt of random tokens instead")
    frame = np.random.default_rng(args.seed).integers(0, 256, (256, 256, 3), np.uint8)
    with torch.no_grad():
        logits = model(*prompt, model.pixel_values(preprocess(frame)[None, None]))
    key = next(iter(model.norm_stats))
    actions = to_env_actions(model.decode(logits.argmax(-1), key))[0]
    print(f"greedy actions, 8 steps x (dx, dy, dz, droll, dpitch, dyaw, gripper), by {key!r}:")
    print(np.array2string(actions, precision=3, suppress_small=True))


if __name__ == "__main__":
    main()
