"""The checkpoints of a run: what it needs to go on.

Each rank writes its own shards as safetensors, which are rows of what is whole: any number of ranks
reads them. A kill at any moment leaves the previous checkpoint or the new one, in FOLDER or
FOLDER.old.
"""
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
    path, failed = Path(path), []
    if path.exists() and not (path / "state.json").is_file():
        raise ValueError(f"{path} exists and is not a checkpoint folder; choose another --out")
    with whole(path) if ranks.rank() == 0 else nullcontext() as draft:
        if ranks.rank() == 0:
            draft.mkdir()
            (draft / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False))
        draft = ranks.first(lambda: draft)
        try:
            save_file(_own(tensors | optimizers.optimizer_tensors(optimizer)),
                      draft / f"{ranks.rank():05}.safetensors")
        except (OSError, SafetensorError) as error:
            failed.append(str(error))
        for failure in ranks.gather(failed):            # all ranks' files are there, or all raise
            raise OSError(failure)
    ranks.barrier()


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's rows on the CPU, and on the first rank what is not divided, each with memory of
    its own: safetensors refuses what is shared."""
    plain = {name: ranks.local(x).detach().cpu().contiguous() for name, x in tensors.items()
             if ranks.rank() == 0 or ranks.local(x) is not x}
    owners = set({x.untyped_storage().data_ptr(): name for name, x in plain.items()}.values())
    return {name: x if name in owners else x.clone() for name, x in plain.items()}


@torch.no_grad()
def load(path: str | Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Fill `tensors` and the optimiser's state from a checkpoint of any number of ranks; every rank
    must call it, and holds one tensor at a time whole.

    ValueError, one line that names the folder or file, if it is damaged or another model's."""
    path, holders = find(path), {}                      # a tensor's name -> the files with its rows
    try:
        for file in sorted(path.glob("*.safetensors")):
            try:
                opened = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file.name} is truncated or corrupt: {error}") from None
            for name in opened.keys():
                holders.setdefault(name, []).append(opened)
        for name, x in tensors.items():
            found = _whole(name, holders[name]) if name in holders else None
            if found is None or (found.shape, found.dtype) != (x.shape, x.dtype):
                raise ValueError(f"{name} is not {tuple(x.shape)} of {x.dtype}: it is another "
                                 "model's, or a rank's file is missing")
            x.copy_(ranks.divided(found, x))
        optimizers.load_optimizer_tensors(optimizer, (
            (name, _whole(name, files)) for name, files in holders.items()
            if name.startswith("optimizer.")))
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded ({error}); use another checkpoint") from None


def _whole(name: str, files: list) -> Tensor:
    """A tensor put together of the ranks' rows; ValueError if it cannot be, or is not finite."""
    try:
        parts = [file.get_tensor(name) for file in files]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{name} is corrupt: {error}".splitlines()[0]) from None
    if not x.isfinite().all():
        raise ValueError(f"{name} holds a number that is not finite")
    return x
