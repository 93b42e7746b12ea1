"""The policy: OpenVLA-OFT (two vision towers, a projector, Llama-2), as SRPO-VLA fine-tunes it.

1. A camera frame passes through two ViTs (DINOv2 and SigLIP); their patch features are joined on
   channels and an MLP projects each patch to one Llama embedding.
2. Llama reads  BOS | 256 patches per image | rest of the prompt | 56 zero vectors | </s>  with
   bidirectional attention; one pass gives the logits of all action tokens: 8 future steps x 7
   dimensions, 256 bins each.
3. Bins become numbers in [-1, 1], and those become actions by the quantiles of the demonstrations.
4. The published evaluation's image pipeline (rotate, JPEG, lanczos3, crop) is Pillow and PyTorch.

Modules carry the names of the published checkpoints' tensors, so these load as they are. Left out:
proprioception, FiLM, diffusion and L1-regression heads (no checkpoint of the paper uses them);
generation and its cache; timm, torchvision, tensorflow.
"""
import io
import json
import os
import shutil
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
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
# DINO's and SigLIP's mean and std, in bf16 as the published models saw them
FILES = {"preprocessor_config.json": json.dumps({"tvf_normalize_params": [
    {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]},
    {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}]}, indent=2).encode() + b"\n"}
TINY = {"model_type": "openvla",
        "text_config": {"vocab_size": 32064, "pad_token_id": PAD, "hidden_size": 32,
                        "intermediate_size": 88, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "num_key_value_heads": 4},
        "norm_stats": {"unit": {"action": {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 7,
                                           "mask": [True] * 6 + [False]}}}}


# Actions: bins <-> numbers, shared by every policy here

def action_stats(norm_stats: dict, unnorm_key: str) -> dict:
    """The q01, q99 and perhaps mask of one data set's actions. ValueError for an unknown key, or
    numbers that no action can be decoded with."""
    if unnorm_key not in norm_stats:
        raise ValueError(f"unnorm_key {unnorm_key!r} has no action statistics; this model knows: "
                         f"{', '.join(sorted(norm_stats)) or 'none'}")
    with suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
        low, high, _ = numbers = _quantiles(stats := norm_stats[unnorm_key]["action"])
        good = numbers.shape == (3, ACTION_DIM) and (np.abs(numbers) < 1e300).all()
        if good and (low <= high).all():
            return stats
    raise ValueError(f"{unnorm_key!r} has no q01, q99 and mask of an action, {ACTION_DIM} "
                     "finite numbers each, q01 below q99; give the checkpoint's own")


def _quantiles(stats: dict) -> np.ndarray:
    """q01, q99 and mask, (3, 7) float64; without a mask all dimensions are scaled."""
    mask = stats.get("mask", [True] * ACTION_DIM)
    return np.array([stats["q01"], stats["q99"], mask], np.float64)


def decode_actions(bins, stats: dict) -> np.ndarray:
    """Bins 0..255 (columns of the logits), (B, 56) or (B, 8, 7) -> un-normalised actions (B, 8, 7)
    float64. Where stats' mask is False (the gripper) the number in [-1, 1] is passed on as it is. A
    lower bin is a HIGHER number: OpenVLA counts bins down from the end of the vocabulary.

    >>> stats = {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    >>> decode_actions(np.array([[255, 128, 127, 1, 0, 64, 64]]), stats).round(3).tolist()
    [[[0.002, 0.5, 0.504, 0.998, 0.998, 0.751, 0.502]]]
    """
    bins = np.asarray(bins.cpu() if torch.is_tensor(bins) else bins)
    assert bins.dtype.kind in "iu" and bins.min() >= 0 and bins.max() < BINS, (
        f"bins must be integers in 0..{BINS - 1}, got {bins.dtype}; token ids are + {FIRST_BIN}")
    bins = bins.reshape(len(bins), -1, ACTION_DIM)                              # (B, chunk, 7)
    edges = np.linspace(-1, 1, BINS)
    centres = (edges[:-1] + edges[1:]) / 2                      # (255,): one fewer than tokens
    unit = centres[np.clip(BINS - 1 - bins, 0, BINS - 2)]       # index 32000 - token - 1, clipped
    low, high, mask = _quantiles(stats)
    return np.where(mask, 0.5 * (unit + 1) * (high - low + 1e-8) + low, unit)   # (B, chunk, 7)


def encode_actions(actions, stats: dict) -> Tensor:
    """Actions (..., 7) in the data set's units, clipped to [q01, q99] -> bins 0..255 (..., 7) long.
    The inverse of `decode_actions` up to half a bin; bin 0 is only reached at +1."""
    actions = np.asarray(actions, np.float64)
    assert actions.shape[-1:] == (ACTION_DIM,) and np.isfinite(actions).all(), (
        f"actions must be finite numbers (..., {ACTION_DIM}), got shape {actions.shape}")
    low, high, mask = _quantiles(stats)
    unit = np.where(mask, 2 * (actions - low) / (high - low + 1e-8) - 1, actions)
    return torch.from_numpy(BINS - np.digitize(unit.clip(-1, 1), np.linspace(-1, 1, BINS)))


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
    """Camera frame uint8 (H, W, 3), as LIBERO renders it (upside down; rotate=False if upright) ->
    uint8 (224, 224, 3)."""
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3, (
        f"frame must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
    return centre_crop(resize(jpeg_round_trip(frame[::-1, ::-1] if rotate else frame)))


def jpeg_round_trip(frame: np.ndarray) -> np.ndarray:
    """Through JPEG (quality 95, 4:2:0), as the training images were stored."""
    buffer, image = io.BytesIO(), Image.fromarray(np.ascontiguousarray(frame))
    image.save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    return np.asarray(Image.open(buffer).convert("RGB"))


def resize(frame: np.ndarray) -> np.ndarray:
    """Lanczos with radius 3 and antialiasing to (224, 224, 3): within a rounding of tf's resize."""
    return np.asarray(Image.fromarray(frame).resize((IMAGE, IMAGE), Image.LANCZOS))


def centre_crop(frame: np.ndarray) -> np.ndarray:
    """The central 0.9 of the AREA, bilinear back to (224, 224, 3); training cropped at random."""
    image, side = torch.tensor(frame).permute(2, 0, 1)[None].double(), 0.9 ** 0.5
    grid = F.affine_grid(side * torch.eye(2, 3).double()[None], image.shape, align_corners=True)
    out = F.grid_sample(image, grid, align_corners=True)[0].permute(1, 2, 0)    # (224, 224, 3)
    return (out * (255.5 / 255)).clamp(0, 255).byte().numpy()       # tensorflow's rounding


# Vision towers

class Block(GradientCheckpointingLayer):
    """A pre-norm transformer block; DINOv2 scales both residual branches, SigLIP does not."""

    def __init__(self, width: int, mlp: int, layer_scale: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width),
                                   "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})
        self.ls1, self.ls2 = (nn.ParameterDict({"scale_factor": torch.ones(width)})
                              if layer_scale else {"scale_factor": 1} for _ in range(2))

    def forward(self, x):                                               # (B, tokens, width)
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # (B, heads, tokens, width/heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = self.attn["proj"](mixed.transpose(1, 2).flatten(2))     # (B, tokens, width)
        x = x + self.ls1["scale_factor"] * mixed
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))                 # exact GELU
        return x + self.ls2["scale_factor"] * self.mlp["fc2"](hidden)


class Tower(nn.Module):
    """DINOv2 (CLS and 4 register tokens, LayerScale) or SigLIP: (B, 3, 224, 224) -> (B, 256, w).

    The features are those of the SECOND-TO-LAST block. What follows it, and SigLIP's pooling, is in
    the checkpoints: kept to be saved again, never run and never trained."""

    def __init__(self, width: int, depth: int, mlp: int, dino: bool):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, PATCHES, width))    # patches only
        self.blocks = nn.ModuleList(Block(width, mlp, layer_scale=dino) for _ in range(depth))
        self.blocks[-1].requires_grad_(False)
        self.norm = nn.LayerNorm(width, eps=1e-6).requires_grad_(False)
        self.dino = dino
        if dino:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.reg_token = nn.Parameter(0.02 * torch.randn(1, 4, width))
        else:
            self.attn_pool = nn.ModuleDict({
                "q": nn.Linear(width, width), "kv": nn.Linear(width, 2 * width),
                "proj": nn.Linear(width, width), "norm": nn.LayerNorm(width),
                "mlp": nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})})
            self.attn_pool.latent = nn.Parameter(torch.zeros(1, 1, width))
            self.attn_pool.requires_grad_(False)

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
    """`from_pretrained` loads a checkpoint; OpenVLA(TINY, (32, 3, 128), (48, 4, 192)) is a random
    one. config: config.json, of which text_config and norm_stats are used; dino, siglip: (width,
    depth, mlp) of the towers, widths multiples of 16; files: a checkpoint's other small files, by
    name, of which preprocessor_config.json is used."""
    model_type, camera, half_on_gpu = "openvla", 256, True      # pixels of the published camera

    def __init__(self, config: dict, dino: tuple[int, int, int], siglip: tuple[int, int, int],
                 files: dict[str, bytes] = FILES):
        super().__init__()
        self.config, self.files, self.tokenizer = config, files, None
        self.pixel_norms = json.loads(files["preprocessor_config.json"])["tvf_normalize_params"]
        self.norm_stats = config.get("norm_stats", {})
        both, llama = dino[0] + siglip[0], LlamaConfig(**config["text_config"])
        self.vision_backbone = nn.ModuleDict({"featurizer": Tower(*dino, dino=True),
                                              "fused_featurizer": Tower(*siglip, dino=False)})
        self.projector = nn.Sequential(OrderedDict(             # to Llama's embeddings
            fc1=nn.Linear(both, 4 * both), gelu1=nn.GELU(),
            fc2=nn.Linear(4 * both, llama.hidden_size), gelu2=nn.GELU(),
            fc3=nn.Linear(llama.hidden_size, llama.hidden_size)))
        self.language_model = LlamaForCausalLM(llama)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L), RIGHT-padded, of `prompt_ids`; pixel_values
        (B, 6 * images, 224, 224) -> logits of the action tokens, (B, 56, 256) float32; column c is
        token 31744 + c."""
        mask, length = attention_mask.bool(), attention_mask.sum(1, keepdim=True)       # (B, 1)
        assert mask[:, 0].all() and not (mask[:, 1:] & ~mask[:, :-1]).any(), (
            "prompts are padded on the RIGHT here: attention_mask must be ones, then zeros")
        # Text: the prompt, 56 zero vectors in place of the action tokens, the stop token, padding
        stop = length + ACTION_TOKENS
        ids = F.pad(input_ids, (0, ACTION_TOKENS + 1), value=PAD).scatter(1, stop, EOS)
        position = torch.arange(ids.shape[1], device=ids.device)[None]          # (1, L + 57)
        placeholder = (position >= length) & (position < stop)                  # (B, L + 57)
        llama = self.language_model.model
        text = llama.embed_tokens(ids).masked_fill(placeholder[..., None], 0)   # (B, L + 57, d)
        patches = self.projector(self.vision_features(pixel_values.to(text.dtype)))     # (B, .., d)
        sequence = torch.cat([text[:, :1], patches, text[:, 1:]], 1)        # BOS, then the images
        keep = F.pad((position <= stop).long(), (patches.shape[1], 0), value=1)     # all of them
        hidden = llama(inputs_embeds=sequence, attention_mask=keep, is_causal=False,
                       use_cache=False)[0]
        # Token t is read one position before its own placeholder: at 29871 and the first 55 of them
        at = patches.shape[1] + length - 1 + position[:, :ACTION_TOKENS]        # (B, 56)
        hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))   # (B, 56, d)
        rows = self.language_model.lm_head.weight[FIRST_BIN:FIRST_BIN + BINS]   # (256, d)
        return F.linear(hidden.float(), rows.float())           # code: a bf16 model has bf16 logits

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 6n, 224, 224) -> both towers' patches joined on channels, (B, 256n, widths)."""
        images = pixel_values.unflatten(1, (-1, 6)).flatten(0, 1)           # (B * n, 6, 224, 224)
        dino, siglip = (self.vision_backbone[name] for name in TOWERS)
        features = torch.cat([dino(images[:, :3]), siglip(images[:, 3:])], -1)  # (B * n, 256, w)
        return features.unflatten(0, (len(pixel_values), -1)).flatten(1, 2)

    def frames(self, images: np.ndarray) -> np.ndarray:
        """Upright camera images uint8 (B, S, S, 3) -> (B, 1, 224, 224, 3), `preprocess`ed."""
        return np.stack([preprocess(image, rotate=False) for image in images])[:, None]

    def pixel_values(self, frames) -> Tensor:
        """Preprocessed frames uint8 (B, n, 224, 224, 3) -> (B, 6n, 224, 224) of the weights' dtype:
        each image normalised for DINO (3 channels), then for SigLIP."""
        frames = torch.as_tensor(frames)
        assert frames.dtype == torch.uint8 and frames.shape[2:] == (IMAGE, IMAGE, 3), (
            f"frames must be uint8 (B, images, {IMAGE}, {IMAGE}, 3), as `frames` makes them, got "
            f"{frames.dtype} {tuple(frames.shape)}")
        weight = self.projector.fc1.weight
        image = frames.to(weight.device).permute(0, 1, 4, 2, 3).float() / 255   # (B, n, 3, ..)
        mean, std = (torch.tensor([norm[k] for norm in self.pixel_norms], device=weight.device)
                     .view(6, 1, 1) for k in ("mean", "std"))
        both = (image.repeat(1, 1, 2, 1, 1) - mean) / std                       # (B, n, 6, ..)
        return both.flatten(1, 2).to(weight.dtype)                          # (B, 6n, 224, 224)

    def prompt_ids(self, instructions: str | list[str]) -> tuple[Tensor, Tensor]:
        """Instructions -> right-padded input_ids and attention_mask, (B, L) int64 each. ValueError
        if the checkpoint has no tokenizer.json."""
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer.json; copy it from the original one")
        rows = []
        for task in [instructions] if isinstance(instructions, str) else instructions:
            prompt = f"In: What action should the robot take to {task.lower()}?\nOut:"
            words = self.tokenizer.encode(prompt, add_special_tokens=False).ids
            rows.append(torch.tensor([BOS, *words, SPACE]))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        ids = ids.to(self.projector.fc1.weight.device)
        return ids, (ids != PAD).long()

    def decode(self, bins, unnorm_key: str) -> np.ndarray:
        """`decode_actions`; then see `to_env_actions`."""
        return decode_actions(bins, action_stats(self.norm_stats, unnorm_key))

    def encode(self, actions, unnorm_key: str) -> Tensor:
        """`encode_actions`, of the data's units: see `from_env_actions`."""
        return encode_actions(actions, action_stats(self.norm_stats, unnorm_key))

    def set_gradient_checkpointing(self, on: bool = True) -> None:
        """Recompute each block of Llama AND of both towers in the backward pass; in train mode."""
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):   # transformers' own; Block has it too
                module.gradient_checkpointing = on
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def _apply(self, fn, recurse=True):
        """`.to(bfloat16)` would round the rotary frequencies (logits off by 2.6e-3): made anew."""
        super()._apply(fn, recurse)
        llama, device = self.language_model.model, self.projector.fc1.weight.device
        llama.rotary_emb = type(llama.rotary_emb)(llama.config).to(device)
        return self

    @classmethod
    def described(cls, folder: Path, shapes: dict | None = None) -> "OpenVLA":
        """The model of a checkpoint folder on the meta device, without weights: by config.json and
        the tensors' shapes (default: `read_shapes`), which alone tell the towers' sizes.
        ValueError, one line, where a file is missing, damaged, or does not fit the others, or a
        regression head makes the actions."""
        if heads := sorted(folder.glob("*action_head*")):
            raise ValueError(f"{heads[0]} is a regression head; give the checkpoint with discrete "
                             "action tokens")
        config = read_json(folder / "config.json")
        pixels = read_json(folder / "preprocessor_config.json")
        shapes, norm_stats = shapes or read_shapes(folder), action_statistics(folder)
        files = {f.name: f.read_bytes() for f in folder.iterdir()
                 if f.suffix in (".json", ".py", ".model") and not f.name.endswith(".index.json")}
        try:
            _check_config(config["text_config"], pixels["tvf_normalize_params"], shapes)
            sizes = [_tower_size(shapes, f"vision_backbone.{name}") for name in TOWERS]
            with torch.device("meta"):
                model = cls(config, *sizes, files)
        except Exception as error:          # whatever transformers makes of a damaged text_config
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise ValueError(f"{folder}: config.json, preprocessor_config.json and weights do not "
                             f"describe an OpenVLA ({reason}); copy them again") from None
        check_shapes(model, shapes, folder)
        model.norm_stats = norm_stats
        if "tokenizer.json" in files:
            model.tokenizer = read_tokenizer(files["tokenizer.json"], folder / "tokenizer.json")
        return model

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device | None = None) -> "OpenVLA":
        """A checkpoint folder or hub id. Errors are those of `described`, before any weight is
        read, and of `read_weights`."""
        folder = local_folder(path)
        model = cls.described(folder)
        for file in weight_files(folder):
            model.load_state_dict(read_weights(file, dtype, device), strict=False, assign=True)
        return model._apply(lambda x: x)    # makes what is in no file

    def save_pretrained(self, path: str | Path, state_dict: dict | None = None) -> None:
        """A checkpoint in the published layout and the model's dtype; errors are `write_folder`'s.
        state_dict: the gathered one of a sharded (FSDP) model."""
        jsons = {"config.json": self.config, "dataset_statistics.json": self.norm_stats}
        write_folder(Path(path), jsons, self.files, state_dict or self.state_dict())


def _check_config(text: dict, norms: list, shapes: dict) -> None:
    """ValueError for what no shape shows: a Llama that is not Llama-2 but for its size, pixels that
    cannot be normalised; any other error for a damaged file."""
    llama, published = LlamaConfig(**text), LlamaConfig()
    same = ("hidden_act", "rope_parameters", "attention_dropout", "tie_word_embeddings")
    wrong = [name for name in same if getattr(llama, name) != getattr(published, name)]
    wrong += ["rms_norm_eps"] * (not 0 < llama.rms_norm_eps < 1e-4)
    wrong += ["vocab_size"] * (llama.vocab_size < FIRST_BIN + BINS)
    depth = sum(name.endswith(".input_layernorm.weight") for name in shapes)
    wrong += ["num_hidden_layers"] * (llama.num_hidden_layers != depth)    # before as many are made
    if wrong:
        raise ValueError(f"text_config: {', '.join(wrong)} not as Llama-2 or the weights have")
    numbers = torch.tensor([[norm["mean"], norm["std"]] for norm in norms])         # (2, 2, 3)
    if numbers.shape != (2, 2, 3) or not (numbers[:, 1] > 0.01).all() or not (numbers < 10).all():
        raise ValueError("tvf_normalize_params are not mean and std of 3 colours, for two towers")


def _tower_size(shapes: dict, tower: str) -> tuple[int, int, int]:
    """(width, depth, mlp); config.json does not tell them. KeyError: the tensor that is missing."""
    depth = sum(name.startswith(f"{tower}.blocks.") and name.endswith(".norm1.weight")
                for name in shapes)
    return (shapes[f"{tower}.patch_embed.proj.weight"][0], depth,
            shapes[f"{tower}.blocks.0.mlp.fc1.weight"][0])


# Checkpoint folders

def local_folder(path: str | Path, weights: bool = True) -> Path:
    """A folder as it is; what looks like a hub id (owner/name) is downloaded into the hub's own
    cache, its weights only if asked. FileNotFoundError if it is neither, or cannot be had."""
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


def read_json(file: Path) -> dict:
    """The object in a small file of a checkpoint. ValueError, one line, if there is none."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is missing or no valid JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; copy it again")
    return content


def action_statistics(folder: Path) -> dict:
    """Quantiles of the training data's actions, by data set: those of fine-tuning, else the
    config's. ValueError names file and key of what no action can be decoded with."""
    own, config = folder / "dataset_statistics.json", folder / "config.json"
    file = own if own.is_file() else config
    stats = read_json(file) if file == own else read_json(file).get("norm_stats")
    try:
        if not isinstance(stats, dict):
            raise ValueError("there are no action statistics, nor dataset_statistics.json")
        for key in stats:
            action_stats(stats, key)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return stats


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that an index names."""
    whole, index = (folder / f"model.safetensors{end}" for end in ("", ".index.json"))
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        return sorted({folder / str(name) for name in read_json(index)["weight_map"].values()})
    except (KeyError, AttributeError):
        raise ValueError(f"{index} has no weight_map of file names; copy it again") from None


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's, from the headers: a bad checkpoint fails before anything is loaded."""
    shapes = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape())
                           for name in tensors.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated, missing or not a safetensors file ({error}); "
                             "copy it again") from None
    return shapes


def check_shapes(model: nn.Module, shapes: dict, folder: Path) -> None:
    """ValueError if a checkpoint's tensors are not the model's, by name and shape."""
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    wrong = [name for name in {**wanted, **shapes} if shapes.get(name) != wanted.get(name)]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit config.json; the first, "
                         f"{wrong[0]}, has shape {shapes.get(wrong[0], 'missing')} and should be "
                         f"{wanted.get(wrong[0], 'absent')}; give a complete checkpoint")


def read_weights(file: Path, dtype: torch.dtype, device=None) -> dict[str, Tensor]:
    """A safetensors file's tensors. ValueError if one holds anything but finite numbers."""
    tensors = load_file(file, device=str(device or "cpu"))
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


def read_tokenizer(text: bytes, file: Path) -> Tokenizer:
    """tokenizer.json as it is: transformers 5 would rebuild Llama's by its own rules. ValueError if
    it is not Llama-2's, whose numbers are the rows of the embedding."""
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
