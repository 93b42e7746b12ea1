"""The checkpoints of a run: what it needs to go on.

One process writes safetensors; several write a folder of torch.distributed.checkpoint, each rank
its own shards, that any number of ranks reads. A kill at any moment leaves the previous checkpoint
or the new one, in FOLDER or FOLDER.old.
"""
import json
import pickle
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from plumbing import optimizer as optimizers
from plumbing import ranks
from plumbing.files import read_json, whole


def find(path: str | Path) -> Path:
    """The newest complete checkpoint folder at `path`; FileNotFoundError if there is none."""
    path = Path(path).absolute()
    for folder in (path, path.with_name(path.name + ".old")):   # of a kill between two renames
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no checkpoint folder at {path}")


def read_state(path: str | Path) -> dict:
    """The `state` that `save` was given: step, settings. Errors as `find` and `read_json`."""
    return read_json(find(path) / "state.json")


def save(path: str | Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer,
         state: dict) -> None:
    """Write a checkpoint folder in place of the one at `path`; every rank must call it.

    tensors: what is trained, and what else is kept, by name, DTensors among them; state: plain
    JSON. ValueError, nothing touched, if path holds something else than a checkpoint."""
    path, trainer = Path(path), optimizers.optimizer_tensors(optimizer)
    if path.exists() and not (path / "state.json").is_file():
        raise ValueError(f"{path} exists and is not a checkpoint folder; choose another --out")
    with whole(path) if ranks.rank() == 0 else nullcontext() as draft:
        if ranks.rank() == 0:
            draft.mkdir()
            (draft / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False))
        if ranks.world_size() == 1:
            save_file(_untied(tensors), draft / "model.safetensors")
            save_file(_untied(trainer), draft / "trainer.safetensors")
        else:
            draft = ranks.first(lambda: draft)
            try:
                dcp.save(tensors | trainer, checkpoint_id=draft)    # ends when all ranks' files do
            except CheckpointException as error:
                raise OSError(_cause(error)) from None
    ranks.barrier()


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, and each with memory of its own: safetensors refuses what is shared."""
    plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    owners = set({x.untyped_storage().data_ptr(): name for name, x in plain.items()}.values())
    return {name: x if name in owners else x.clone() for name, x in plain.items()}


@torch.no_grad()
def load(path: str | Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Fill `tensors` and the optimiser's state from a checkpoint of any number of ranks.

    ValueError, one line that names the folder or file, if it is damaged or another model's."""
    path = find(path)
    sharded = (path / ".metadata").exists()
    try:
        found = _read_shards(path, tensors, optimizer) if sharded else _read_files(path, tensors)
        for name, x in found.items():
            if not ranks.local(x).isfinite().all():
                raise ValueError(f"{name} holds a number that is not finite")
        for name, x in tensors.items():
            x.copy_(ranks.divided(found[name], x))
        optimizers.load_optimizer_tensors(optimizer, found)
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded ({error}); use another checkpoint") from None


def _read_files(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What one process wrote."""
    found: dict[str, Tensor] = {}
    for name in ("model.safetensors", "trainer.safetensors"):
        try:
            found |= load_file(path / name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} is missing, truncated or corrupt: {error}") from None
    _check({name: (x.shape, x.dtype) for name, x in found.items()}, tensors)
    return found


def _read_shards(path: Path, tensors: dict[str, Tensor], optimizer) -> dict[str, Tensor]:
    """What several ranks wrote: this rank's part of it, in `tensors` and new ones."""
    found = dict(tensors)
    try:
        with open(path / ".metadata", "rb") as file:
            entries = _Metadata(file).load().state_dict_metadata
        _check({name: (x.size, x.properties.dtype) for name, x in entries.items()}, tensors)
        for key in entries:
            if key.startswith("optimizer."):
                p = optimizers.parameter_of(optimizer, key)
                found[key] = torch.zeros((), dtype=torch.int64) if key.endswith(".step") else (
                    torch.zeros_like(p, dtype=torch.float32, device=optimizer.home(p)))
        dcp.load(found, checkpoint_id=path)
    except (Exception, CheckpointException) as error:       # a damaged pickle may raise any
        raise ValueError(_cause(error)) from None
    return found


def _check(found: dict[str, tuple], tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if found.get(name) != (x.shape, x.dtype):
            raise ValueError(f"{name} is not {tuple(x.shape)} of {x.dtype}: it is another model's")


class _Metadata(pickle.Unpickler):
    """torch.distributed.checkpoint's list of what the shards hold is a pickle: it may name what
    such a list is made of, and nothing that could run code."""

    def find_class(self, module: str, name: str):
        known = name in {
            "torch.distributed.checkpoint.metadata": (
                "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata",
                "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
            "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
            "torch.serialization": ("_get_layout",), "pathlib": ("PosixPath", "WindowsPath"),
            "torch": ("Size", "bfloat16", "float16", "float32", "float64", "int64"),
        }.get(module, ())
        if not known:
            raise pickle.UnpicklingError(f".metadata names {module}.{name}")
        return super().find_class(module, name)


def _cause(error: BaseException) -> str:
    """The first line of what went wrong on some rank."""
    cause = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
