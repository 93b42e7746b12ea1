"""The policy: OpenVLA-OFT (two vision towers, a projector, Llama-2) as SRPO-VLA (arXiv 2511.15605) fine-tunes it.

1. A camera frame passes through two ViTs (DINOv2 and SigLIP); their patch features are joined on channels and an MLP
   projects each patch to one Llama embedding.
2. Llama reads  BOS | 256 patches per image | rest of the prompt | 56 zero vectors | </s>  with bidirectional attention.
3. One forward pass gives the logits of all 56 action tokens: 8 future steps x 7 dimensions, 256 bins each.
4. Bins become numbers in [-1, 1], and those become actions by the quantiles of the demonstrations.
5. The image pipeline of the published evaluation (rotate, JPEG, lanczos3, crop) is done with Pillow and numpy.

robots/tiny_vla.py has the same interface in 0.4 M parameters: the policy of vla_srpo.py's main job.

Modules carry the names of the published checkpoints' tensors, so these load as they are, with no key mapping.
Left out: proprioception, FiLM, diffusion and L1-regression heads (no checkpoint of the paper uses them); generation and
its cache (all action tokens come out of one pass); timm, torchvision, tensorflow.

    python -m robots.openvla                              # a tiny random OpenVLA in memory: one frame -> 8 x 7 actions
    python -m robots.openvla --checkpoint FOLDER_OR_ID    # the same with a checkpoint (hub ids are downloaded)
"""

import argparse
import io
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

CHUNK, ACTION_DIM, BINS = 8, 7, 256             # a chunk is 8 steps x 7 dimensions = 56 tokens
ACTION_TOKENS = CHUNK * ACTION_DIM
FIRST_BIN = 32000 - BINS                        # tokens 31744..31999, the least used ones, are the bins
BOS, EOS, PAD, SPACE = 1, 2, 32000, 29871       # the prompt ends with 29871, a lone space; actions start there
IMAGE, PATCH, HEADS = 224, 14, 16               # both towers: 224 px, 14 px patches, 16 heads
PATCHES = (IMAGE // PATCH) ** 2
# DINO's and SigLIP's mean and std, rounded to bf16 as the published models saw them; a checkpoint brings its own.
PREPROCESSOR = {"tvf_normalize_params": [
    {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]},
    {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}]}
TINY = {"model_type": "openvla",
        "text_config": {"vocab_size": 32064, "pad_token_id": PAD, "hidden_size": 32, "intermediate_size": 88,
                        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
        "norm_stats": {"unit": {"action": {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}}}


# Actions: bins <-> numbers, shared by every policy here

def action_stats(norm_stats: dict, unnorm_key: str) -> dict:
    """The q01, q99 and mask of one data set's actions; an unknown key is a ValueError that lists the known ones."""
    if unnorm_key not in norm_stats:
        known = ", ".join(sorted(norm_stats)) or "none"
        raise ValueError(f"unnorm_key {unnorm_key!r} has no action statistics; this model knows: {known}")
    return norm_stats[unnorm_key]["action"]


def decode_actions(bins, stats: dict) -> np.ndarray:
    """Bins 0..255 (columns of the logits), (B, 56) or (B, 8, 7) -> un-normalised actions (B, 8, 7) float64.

    stats holds q01, q99 and mask, 7 each: where mask is False (the gripper) the number in [-1, 1] is passed on as it is.
    A lower bin is a HIGHER number, because OpenVLA counts bins down from the end of the vocabulary:

    >>> stats = {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    >>> decode_actions(np.array([[255, 128, 127, 1, 0, 64, 64]]), stats).round(3).tolist()
    [[[0.002, 0.5, 0.504, 0.998, 0.998, 0.751, 0.502]]]
    """
    bins = np.asarray(bins.cpu() if torch.is_tensor(bins) else bins)
    if not np.issubdtype(bins.dtype, np.integer) or bins.size == 0 or bins.min() < 0 or bins.max() >= BINS:
        seen = f"{bins.dtype} in {bins.min()}..{bins.max()}" if bins.size else "nothing"
        raise ValueError(f"bins must be integers in 0..{BINS - 1}, got {seen}; token ids are bins + {FIRST_BIN}")
    bins = bins.reshape(len(bins), -1, ACTION_DIM)                                  # (B, chunk, 7)
    edges = np.linspace(-1, 1, BINS)
    centres = (edges[:-1] + edges[1:]) / 2                                          # (255,): one fewer than tokens
    unit = centres[np.clip(BINS - 1 - bins, 0, BINS - 2)]                           # index 32000 - token - 1, clipped
    low, high, mask = _quantiles(stats)
    return np.where(mask, 0.5 * (unit + 1) * (high - low + 1e-8) + low, unit)       # (B, chunk, 7)


def encode_actions(actions, stats: dict) -> torch.Tensor:
    """Actions (..., 7) in the data set's units -> bins 0..255 (..., 7) long: the targets of supervised fine-tuning.

    The inverse of `decode_actions` up to half a bin; outside [q01, q99] is clipped; bin 0 is only reached at +1."""
    actions = np.asarray(actions, np.float64)
    if actions.shape[-1:] != (ACTION_DIM,) or not np.isfinite(actions).all():
        raise ValueError(f"actions must be finite numbers of shape (..., {ACTION_DIM}), got shape {actions.shape}"
                         + ("" if np.isfinite(actions).all() else " with NaN or inf"))
    low, high, mask = _quantiles(stats)
    unit = np.where(mask, 2 * (actions - low) / (high - low + 1e-8) - 1, actions)
    return torch.from_numpy(BINS - np.digitize(unit.clip(-1, 1), np.linspace(-1, 1, BINS)))


def _quantiles(stats: dict):
    low, high = np.asarray(stats["q01"], np.float64), np.asarray(stats["q99"], np.float64)
    return low, high, np.asarray(stats.get("mask", np.ones(len(low))), bool)


def to_env_actions(actions: np.ndarray) -> np.ndarray:
    """The data's gripper (0 closed .. 1 open) -> LIBERO's (-1 open, +1 close); the other 6 of (..., 7) stay.

    >>> to_env_actions(np.array([[.1, 0, 0, 0, 0, 0, 0.996], [.1, 0, 0, 0, 0, 0, 0.004]]))[:, 6].tolist()
    [-1.0, 1.0]
    """
    gripper = -np.sign(2 * actions[..., 6:] - 1)                    # [0, 1] -> [-1, 1], sign, invert
    return np.concatenate([actions[..., :6], gripper], axis=-1)


def from_env_actions(actions: np.ndarray) -> np.ndarray:
    """LIBERO's gripper (-1 open, +1 close) -> the data's (1 open, 0 closed): demonstrations need it before `encode`."""
    return np.concatenate([actions[..., :6], (1 - actions[..., 6:]) / 2], axis=-1)


# Images: one camera frame -> what the published evaluation feeds the model

def preprocess(frame: np.ndarray, rotate: bool = True) -> np.ndarray:
    """Camera frame (H, W, 3) uint8, as LIBERO renders it -> (224, 224, 3) uint8; store frames in this form (150 KB).
    rotate=False for frames that are upright already, as those of robots/libero.py are."""
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"frame must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}; use 0..255, channels last")
    return centre_crop(resize(jpeg_round_trip(frame[::-1, ::-1] if rotate else frame)))     # LIBERO renders upside down


def jpeg_round_trip(frame: np.ndarray) -> np.ndarray:
    """The training images were stored as JPEG, so the evaluation's pass through JPEG too (quality 95, 4:2:0)."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    return np.asarray(Image.open(buffer).convert("RGB"))


def resize(frame: np.ndarray) -> np.ndarray:
    """Lanczos with radius 3 and antialiasing to (224, 224, 3): within a rounding of tf.image.resize."""
    return np.asarray(Image.fromarray(frame).resize((IMAGE, IMAGE), Image.LANCZOS))


def centre_crop(frame: np.ndarray) -> np.ndarray:
    """The central 0.9 of the AREA, bilinear back to (224, 224, 3): training used random crops of that area."""
    side = 0.9 ** 0.5
    at = (IMAGE - 1) * ((1 - side) / 2 + side * np.arange(IMAGE) / (IMAGE - 1))     # (224,) positions in pixels
    low = at.astype(int)
    weight = (at - low)[:, None, None]
    rows = frame[low] * (1 - weight) + frame[low + 1] * weight                      # (224, 224, 3)
    out = rows[:, low] * (1 - weight[:, 0]) + rows[:, low + 1] * weight[:, 0]
    return (out * (255.5 / 255)).clip(0, 255).astype(np.uint8)                      # tensorflow's rounding to uint8


# Vision towers

class Block(GradientCheckpointingLayer):
    """A pre-norm transformer block; DINOv2 scales both residual branches by a learned vector, SigLIP does not."""

    def __init__(self, width: int, mlp: int, layer_scale: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})
        self.ls1, self.ls2 = (LayerScale(width), LayerScale(width)) if layer_scale else (nn.Identity(), nn.Identity())

    def forward(self, x):                                                           # (B, tokens, width)
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, HEADS, -1))         # (B, tokens, 3, heads, width/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                        # (B, heads, tokens, width/heads)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, tokens, width)
        x = x + self.ls1(self.attn["proj"](mixed))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))    # exact GELU


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale_factor


class Tower(nn.Module):
    """DINOv2 (CLS and 4 register tokens, LayerScale) or SigLIP: (B, 3, 224, 224) -> (B, 256, width).

    The features are those of the SECOND-TO-LAST block, without the final norm. The last block, the norm and SigLIP's
    pooling are in the checkpoints, so they are kept here to be saved again, but never run and never trained."""

    def __init__(self, width: int, depth: int, mlp: int, dino: bool):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, PATCHES, width))        # for the patches only
        self.blocks = nn.ModuleList(Block(width, mlp, layer_scale=dino) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dino, unused = dino, [self.blocks[-1], self.norm]
        if dino:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.reg_token = nn.Parameter(0.02 * torch.randn(1, 4, width))
        else:
            self.attn_pool = nn.ModuleDict({
                "q": nn.Linear(width, width), "kv": nn.Linear(width, 2 * width), "proj": nn.Linear(width, width),
                "norm": nn.LayerNorm(width),
                "mlp": nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})})
            self.attn_pool.register_parameter("latent", nn.Parameter(torch.zeros(1, 1, width)))
            unused.append(self.attn_pool)
        for module in unused:
            module.requires_grad_(False)

    def forward(self, pixels):
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed    # (B, 256, width)
        if self.dino:
            prefix = torch.cat([self.cls_token, self.reg_token], 1).expand(len(x), -1, -1)
            x = torch.cat([prefix, x], 1)                                           # (B, 5 + 256, width)
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, -PATCHES:]                                                      # prefix tokens dropped


# The whole policy

class OpenVLA(nn.Module):
    """OpenVLA-OFT. `from_pretrained` loads a checkpoint, `OpenVLA(TINY, (32, 3, 128), (48, 4, 192))` is a random one.

    config: config.json as a dict (text_config and norm_stats are used); dino, siglip: (width, depth, mlp) of the towers,
    widths multiples of 16; preprocessor: preprocessor_config.json; files: a checkpoint's other small files, by name."""

    def __init__(self, config: dict, dino: tuple[int, int, int], siglip: tuple[int, int, int],
                 preprocessor: dict = PREPROCESSOR, files: dict[str, bytes] | None = None):
        super().__init__()
        for file, content, key in (("config.json", config, "text_config"),
                                   ("preprocessor_config.json", preprocessor, "tvf_normalize_params")):
            if key not in content:
                keys = ", ".join(content) or "nothing"
                raise ValueError(f"{file} has no {key}, only {keys}; give an OpenVLA checkpoint")
        self.config, self.preprocessor, self.files = config, preprocessor, files or {}
        self.tokenizer = None                                   # made of files at its first use
        self.norm_stats = config.get("norm_stats", {})
        both, llama = dino[0] + siglip[0], LlamaConfig(**config["text_config"])
        self.vision_backbone = nn.ModuleDict({"featurizer": Tower(*dino, dino=True),
                                              "fused_featurizer": Tower(*siglip, dino=False)})
        self.projector = nn.ModuleDict({"fc1": nn.Linear(both, 4 * both), "fc2": nn.Linear(4 * both, llama.hidden_size),
                                        "fc3": nn.Linear(llama.hidden_size, llama.hidden_size)})
        self.language_model = LlamaForCausalLM(llama)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits of the action tokens, (B, 56, 256) float32: 8 steps x 7 dimensions; column c is token 31744 + c.

        input_ids, attention_mask: (B, L), RIGHT-padded prompts that end with 29871, see `prompt_ids`; pixel_values:
        (B, 6 * images, 224, 224), see the method. ValueError where shapes disagree or the padding is on the left."""
        _check_inputs(input_ids, attention_mask, pixel_values)
        length = attention_mask.sum(1, keepdim=True)                                # (B, 1) tokens of each prompt
        # Text: the prompt, 56 zero vectors as placeholders for the action tokens, the stop token, and padding last.
        position = torch.arange(input_ids.shape[1] + ACTION_TOKENS + 1, device=input_ids.device)[None]  # (1, L + 57)
        stop = length + ACTION_TOKENS
        ids = F.pad(input_ids, (0, ACTION_TOKENS + 1), value=PAD).masked_fill(position == stop, EOS)
        placeholder = (position >= length) & (position < stop)                      # (B, L + 57)
        llama = self.language_model.model
        text = llama.embed_tokens(ids).masked_fill(placeholder[..., None], 0)       # (B, L + 57, d)
        patches = self.project(self.vision_features(pixel_values.to(text.dtype)))   # (B, 256 * images, d)
        sequence = torch.cat([text[:, :1], patches, text[:, 1:]], 1)                # BOS first, then the images
        keep = torch.cat([(position <= stop)[:, :1].expand(-1, patches.shape[1]), position <= stop], 1)
        hidden = llama(inputs_embeds=sequence, attention_mask=keep.long(), is_causal=False, use_cache=False)[0]
        # Token t is read one position before its own placeholder: at 29871 and the first 55 placeholders.
        at = patches.shape[1] + length - 1 + torch.arange(ACTION_TOKENS, device=ids.device)         # (B, 56)
        hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))   # (B, 56, d)
        rows = self.language_model.lm_head.weight[FIRST_BIN:FIRST_BIN + BINS]       # (256, d) of the 32064 rows
        return F.linear(hidden.float(), rows.float())           # code differs: a bf16 model has bf16 logits

    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 6n, 224, 224) -> both towers' patches joined on channels, (B, 256n, dino width + siglip width)."""
        images = pixel_values.unflatten(1, (-1, 6)).flatten(0, 1)                   # (B * n, 6, 224, 224)
        dino, siglip = self.vision_backbone["featurizer"], self.vision_backbone["fused_featurizer"]
        features = torch.cat([dino(images[:, :3]), siglip(images[:, 3:])], -1)      # (B * n, 256, width)
        return features.unflatten(0, (len(pixel_values), -1)).flatten(1, 2)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(B, patches, dino + siglip width) -> (B, patches, d): the patches as Llama's embeddings."""
        fc1, fc2, fc3 = self.projector["fc1"], self.projector["fc2"], self.projector["fc3"]
        return fc3(F.gelu(fc2(F.gelu(fc1(features)))))

    def pixel_values(self, frames) -> torch.Tensor:
        """Preprocessed frames uint8 (B, n, 224, 224, 3) -> (B, 6n, 224, 224), in the model's dtype and on its device.

        Each of the n images of a sample appears twice: channels 0-2 normalised for DINO, 3-5 for SigLIP."""
        frames = torch.as_tensor(frames)
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[2:] != (IMAGE, IMAGE, 3):
            raise ValueError(f"frames must be uint8 (B, images, {IMAGE}, {IMAGE}, 3), got {frames.dtype} "
                             f"{tuple(frames.shape)}; pass each through preprocess() and stack")
        weight = self.projector["fc1"].weight
        image = frames.to(weight.device).permute(0, 1, 4, 2, 3).float() / 255       # (B, n, 3, 224, 224)
        both = []
        for norm in self.preprocessor["tvf_normalize_params"]:
            mean, std = (torch.tensor(norm[k], device=weight.device).view(3, 1, 1) for k in ("mean", "std"))
            both.append((image - mean) / std)
        return torch.cat(both, 2).flatten(1, 2).to(weight.dtype)                    # (B, 6n, 224, 224)

    def prompt_ids(self, instructions: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Instructions -> right-padded input_ids and attention_mask (B, L) on the model's device, for `forward`.

        Uses the checkpoint's tokenizer.json: FileNotFoundError if it has none, ValueError if it is another model's."""
        if "tokenizer.json" not in self.files:
            raise FileNotFoundError("prompt_ids needs tokenizer.json; copy it into the checkpoint from the original one")
        from plumbing import checkpoint as checkpoints                      # here and below, because that file needs this one, and the model alone can do without it
        self.tokenizer = self.tokenizer or checkpoints.read_tokenizer(self.files["tokenizer.json"])
        rows = []
        for task in [instructions] if isinstance(instructions, str) else instructions:
            prompt = f"In: What action should the robot take to {task.lower()}?\nOut:"
            rows.append(torch.tensor([BOS, *self.tokenizer.encode(prompt, add_special_tokens=False).ids, SPACE]))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        device = self.projector["fc1"].weight.device
        return ids.to(device), mask.to(device)

    def decode(self, bins, unnorm_key: str) -> np.ndarray:
        """Bins 0..255, (B, 56) or (B, 8, 7) -> un-normalised actions (B, 8, 7) float64; then see `to_env_actions`."""
        return decode_actions(bins, action_stats(self.norm_stats, unnorm_key))

    def encode(self, actions, unnorm_key: str) -> torch.Tensor:
        """Actions (..., 7) in the data's units (see `from_env_actions`) -> bins (..., 7), the inverse of `decode`."""
        return encode_actions(actions, action_stats(self.norm_stats, unnorm_key))

    def set_gradient_checkpointing(self, on: bool = True) -> None:
        """Recompute each block of Llama AND of both towers in the backward pass; acts in train mode only."""
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):       # transformers' own switch; Block has it too
                module.gradient_checkpointing = on
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def _apply(self, fn, recurse=True):
        """`.to(bfloat16)` and the like would round the rotary frequencies (logits off by 2.6e-3): make them anew."""
        super()._apply(fn, recurse)
        return self._make_rotary()

    def _make_rotary(self):
        llama = self.language_model.model
        llama.rotary_emb = type(llama.rotary_emb)(llama.config).to(self.projector["fc1"].weight.device)
        return self

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32,
                        device: str | torch.device | None = None) -> "OpenVLA":
        """A checkpoint folder or hub id, with one model.safetensors or shards and an index -> the model, on device.

        FileNotFoundError: no such folder, config or shard. ValueError: truncated file, or tensors that are missing,
        unknown or mis-shaped. All of it is checked from the headers, before any weight is read."""
        from plumbing import checkpoint as checkpoints
        folder = checkpoints.local_folder(path)
        config, preprocessor = checkpoints.read_json(folder / "config.json"), checkpoints.read_json(folder / "preprocessor_config.json")
        tensors = checkpoints.read_headers(folder)
        found = {name: shape for name, (_, shape) in tensors.items()}
        sizes = [checkpoints.tower_size(found, f"vision_backbone.{tower}", folder) for tower in ("featurizer", "fused_featurizer")]
        files = {f.name: f.read_bytes() for f in folder.iterdir()
                 if f.suffix in (".json", ".py", ".model") and not f.name.endswith(".index.json")}
        with torch.device("meta"):                      # no memory yet: the tensors of the file become the parameters
            model = cls(config, *sizes, preprocessor=preprocessor, files=files)
        model.norm_stats = checkpoints.action_statistics(folder)
        if wrong := checkpoints.misfits(config, found, folder):
            raise ValueError(wrong[0])
        for file in sorted({file for file, _ in tensors.values()}):
            with safe_open(file, "pt", device=str(device or "cpu")) as shard:
                part = {name: shard.get_tensor(name).to(dtype) for name in shard.keys()}
            model.load_state_dict(part, strict=False, assign=True)
        return model._make_rotary()                     # rotary frequencies: in no file, and fp32 whatever the dtype

    def save_pretrained(self, path: str | Path, state_dict: dict | None = None) -> None:
        """Write the checkpoint in the published layout and the model's dtype; it appears complete or not at all.

        ValueError if path exists and is not empty. state_dict: the gathered one of a sharded (FSDP) model."""
        from plumbing import checkpoint as checkpoints
        checkpoints.write_folder(Path(path), {"config.json": self.config, "preprocessor_config.json": self.preprocessor,
                                              "dataset_statistics.json": self.norm_stats}, self.files,
                                 self.state_dict() if state_dict is None else state_dict)


# Checks

def _check_inputs(input_ids, attention_mask, pixel_values) -> None:
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError("input_ids and attention_mask must both be (B, L), got "
                         f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}")
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[0] != len(input_ids) or shape[1] == 0 or shape[1] % 6 or shape[2:] != (IMAGE, IMAGE):
        raise ValueError(f"pixel_values must be ({len(input_ids)}, 6 * images, {IMAGE}, {IMAGE}), got {shape}; "
                         "make them with pixel_values()")
    mask = attention_mask.bool()
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("attention_mask must be ones, then zeros: prompts are padded on the RIGHT here; "
                         "move each row's padding to its end")


def main() -> None:
    """Load or make a policy, print its sizes, and turn one random frame into a chunk of actions."""
    parser = argparse.ArgumentParser(description="one random frame through an OpenVLA-OFT policy")
    parser.add_argument("--checkpoint", help="folder or hub id of an OpenVLA; without it a tiny random one is made in memory")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--instruction", default="put the red cube on the green plate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    try:
        if args.checkpoint:
            model = OpenVLA.from_pretrained(args.checkpoint, dtype, args.device)
        else:
            model = OpenVLA(TINY, (32, 3, 128), (48, 4, 192)).to(args.device, dtype)
            for p in (p for p in model.parameters() if p.ndim == 2):
                nn.init.normal_(p, std=0.3)             # from the usual 0.02 all 56 tokens would come out alike
    except (FileNotFoundError, ValueError, RuntimeError, AssertionError) as error:         # the last: --device cuda without CUDA
        raise SystemExit(f"error: {error}") from None
    for name, tower in model.vision_backbone.items():
        fc1 = tower.blocks[0].mlp["fc1"]
        print(f"{name}: width {fc1.in_features}, {len(tower.blocks)} blocks, mlp {fc1.out_features}")
    llama = model.language_model.config
    print(f"language_model: width {llama.hidden_size}, {llama.num_hidden_layers} blocks, mlp {llama.intermediate_size}")
    sizes = [p.numel() for p in model.parameters()]
    print(f"{sum(sizes):,} parameters in {len(sizes)} tensors, {args.dtype} on {args.device}")
    if "tokenizer.json" in model.files:
        ids, mask = model.prompt_ids(args.instruction)
    else:
        print("no tokenizer in this checkpoint: a prompt of random tokens instead")
        ids = torch.tensor([[BOS, *torch.randint(3, 30000, (20,)).tolist(), SPACE]], device=args.device)
        mask = torch.ones_like(ids)
    frame = np.random.default_rng(args.seed).integers(0, 256, (256, 256, 3), np.uint8)
    with torch.no_grad():
        logits = model(ids, mask, model.pixel_values(preprocess(frame)[None, None]))        # (1, 56, 256)
    key = next(iter(model.norm_stats))
    print(f"greedy actions, 8 steps x (dx, dy, dz, droll, dpitch, dyaw, gripper), un-normalised by {key!r}:")
    print(np.array2string(to_env_actions(model.decode(logits.argmax(-1), key))[0], precision=3, suppress_small=True))


if __name__ == "__main__":
    main()
