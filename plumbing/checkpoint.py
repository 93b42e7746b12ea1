"""A policy's checkpoint folder, from here or from the hub.

1. `local_folder`, `read_json`, `read_headers`: small files and the tensors' shapes, before any weight is loaded.
2. `write_folder`: a new folder, whole or not at all.
3. `read_tokenizer`, `misfits`, `tower_size`: whether it holds what an OpenVLA-OFT needs, said in one line if not.
"""
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from robots import openvla as vla


def local_folder(path: str | Path, weights: bool = True) -> Path:
    """A folder as it is; anything that looks like a hub id (owner/name) is downloaded, with the hub's own cache, its weights
    only if asked. FileNotFoundError if it is neither, or the hub does not give it."""
    if Path(path).is_dir():
        return Path(path)
    owner, _, name = str(path).partition("/")
    if not owner or owner.startswith((".", "~")) or not name or "/" in name or Path(path).exists():
        raise FileNotFoundError(f"{path} is neither a checkpoint folder nor a hub id (owner/name); give one of them")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.jinja", "*.py", "tokenizer.model", *["*.safetensors"] * weights]))
    except (OSError, ValueError) as error:              # the hub's errors derive from these two
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(f"{path} is not a folder here, and the hub did not give it ({reason}); give the folder of a downloaded copy") from None


def read_json(file: Path) -> dict:
    """The object that a small file of a checkpoint holds. FileNotFoundError; ValueError if it holds anything else."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; the folder is not a complete checkpoint")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; copy it again")
    return content


def action_statistics(folder: Path) -> dict:
    """Quantiles of the training data's actions, by data set: those of fine-tuning, else the config's. Errors as `read_json`'s."""
    file = folder / "dataset_statistics.json"
    return read_json(file) if file.is_file() else read_json(folder / "config.json").get("norm_stats", {})


def read_headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Every tensor's file and shape, from the headers only: a bad checkpoint fails before anything is loaded.
    FileNotFoundError: no weights, or a shard the index names is missing. ValueError: a shard or the index cannot be read."""
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file():
        index = folder / "model.safetensors.index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{folder} has neither model.safetensors nor {index.name}; give a folder of weights")
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    tensors = {}
    for file in (folder / name for name in names):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, though the index names it; copy that shard again")
        try:
            with safe_open(file, "pt") as shard:
                tensors |= {name: (file, tuple(shard.get_slice(name).get_shape())) for name in shard.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or not a safetensors file ({error}); copy it again") from None
    return tensors


def write_folder(path: Path, jsons: dict[str, dict], files: dict[str, bytes], state: dict) -> None:
    """Files, JSON and weights into a new folder, under another name until it is complete. ValueError if there is one with something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; nothing was overwritten, choose another path")
    partial_folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)           # left behind by a killed run
    partial_folder.mkdir(parents=True)
    for name, content in files.items():
        (partial_folder / name).write_bytes(content)
    for name, content in jsons.items():
        (partial_folder / name).write_text(json.dumps(content, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial_folder / "model.safetensors",
              metadata={"format": "pt"})
    os.replace(partial_folder, path)


# What an OpenVLA's must hold

def read_tokenizer(text: bytes) -> Tokenizer:
    """tokenizer.json as it is (transformers 5 would rebuild Llama's by its own rules), without padding or truncation. ValueError if it is not
    Llama-2's: its words would be other embeddings' numbers, and the policy would see another instruction."""
    try:
        tokenizer = Tokenizer.from_str(text.decode())
    except Exception as error:                          # the tokenizers library raises nothing more special
        raise ValueError(f"tokenizer.json cannot be read ({error}); copy it again from the original checkpoint") from None
    for word, number in (("<s>", vla.BOS), ("</s>", vla.EOS), ("▁", vla.SPACE)):
        if tokenizer.token_to_id(word) != number:
            raise ValueError(f"tokenizer.json gives {word!r} the number {tokenizer.token_to_id(word)}, OpenVLA's Llama-2 {number}; "
                             "copy it from the original checkpoint")
    tokenizer.no_padding(), tokenizer.no_truncation()
    return tokenizer


def misfits(config: dict, shapes: dict[str, tuple[int, ...]], folder: Path) -> list[str]:
    """A line if the tensors are not those of the OpenVLA that config.json describes, else none."""
    sizes = [tower_size(shapes, f"vision_backbone.{tower}", folder) for tower in ("featurizer", "fused_featurizer")]
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in vla.OpenVLA(config, *sizes).state_dict().items()}
    wrong = [name for name in {**wanted, **shapes} if shapes.get(name) != wanted.get(name)]
    if not wrong:
        return []
    return [f"{folder}: {len(wrong)} tensors are not OpenVLA's; the first, {wrong[0]}, has shape {shapes.get(wrong[0], 'missing')} and should be "
            f"{wanted.get(wrong[0], 'absent')}; give a complete checkpoint whose config.json fits"]


def tower_size(shapes: dict[str, tuple[int, ...]], prefix: str, folder: Path) -> tuple[int, int, int]:
    """(width, depth, mlp) of a tower; config.json does not tell them, the tensors do."""
    patch, mlp = f"{prefix}.patch_embed.proj.weight", f"{prefix}.blocks.0.mlp.fc1.weight"
    for name in (patch, mlp):
        if name not in shapes:
            raise ValueError(f"{folder} lacks the tensor {name}; give a checkpoint of OpenVLA with two towers")
    start = f"{prefix}.blocks."
    depth = 1 + max(int(name[len(start):].split(".")[0]) for name in shapes if name.startswith(start))
    return shapes[patch][0], depth, shapes[mlp][0]
