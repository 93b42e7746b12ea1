"""A training job on the command line: flags, an output folder, its metrics and checkpoints, and going on after an interruption.

What is here, all of it the same for both scripts
1. `flag`, `parse`, `require`, `command`: settings are one dataclass; whatever is wrong is one line on stderr and exit code 2.
2. `begin`: a new output folder, or --resume of one, whose settings are taken over. No run is ever overwritten.
3. `MetricsLog`: a line of JSON for each step, which a killed run keeps.
4. `save_checkpoint`, `load_checkpoint`: a folder that is complete at every moment; plumbing/ranks.py has the same for several ranks.
5. `ctrl_c`: a first Ctrl-C lets the step finish.
"""
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import HfArgumentParser


# Flags

def flag(default, text: str, **more):
    """A dataclass field that HfArgumentParser makes a flag of; `default` may be a list."""
    value = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**value, metadata={"help": text, **more})


def require(s, at_least: dict[str, float], positive: tuple[str, ...] = (), why: dict[str, str] = {}) -> None:
    """ValueError, one line, for a setting out of range or not finite; `why`: more to say of some of them."""
    for name, low in at_least.items():
        if not low <= getattr(s, name) < math.inf:
            raise ValueError(f"--{name} must be at least {low}, got {getattr(s, name)}" + (f": {why[name]}" if name in why else ""))
    for name in positive:
        if not 0 < getattr(s, name) < math.inf:
            raise ValueError(f"--{name} must be positive and finite, got {getattr(s, name)}")


def parse(parser: HfArgumentParser, argv: list[str]) -> tuple[object, object, set[str]]:
    """(settings, the parser's other flags, names of the flags given). ValueError, one line, where argparse would print its usage and exit."""
    def refuse(message: str):
        raise ValueError(message)
    parser.error = refuse
    s, *more, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)     # more: if there are such flags
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]}; see --help")
    return s, more[0] if more else None, {a[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for a in argv if a.startswith("--")}


def command(work: Callable[[], int]) -> int:
    """Exit code of work(): an error is a line on stderr and code 2, Ctrl-C is 130."""
    try:
        return work()
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; if the run had saved a checkpoint, go on with --resume FOLDER", file=sys.stderr)
        return 130


# The output folder

def begin(s, given: set[str], free: set[str], out: str) -> tuple[object, Path, dict | None]:
    """Settings, output folder, and with --resume the state of its checkpoint: then the settings are those of the run, but for the `free`
    ones, and ValueError if others given differ. `out`: the folder of a new run. Nothing is written."""
    if not s.resume:
        if "resume" in given:
            raise ValueError("--resume is empty; give the folder of a run")
        refuse_taken(Path(out))
        return s, Path(out), None
    if "out" in given:
        raise ValueError(f"--resume goes on in {s.resume}; drop --out")
    folder = Path(s.resume)
    state = read_state(folder / "checkpoint")
    saved = state.get("settings", {})
    if set(saved) != set(asdict(s)):
        raise ValueError(f"{folder}/checkpoint was written by another version of this script; start a new run with --out")
    for name in sorted(given - free):
        if getattr(s, name) != saved.get(name):
            raise ValueError(f"--{name} {getattr(s, name)} differs from the run's {saved.get(name)}; drop the flag, or start a new run with --out")
    return type(s)(**saved | {name: getattr(s, name) for name in given & free} | {"out": s.resume, "resume": s.resume}), folder, state


def refuse_taken(out: Path) -> None:
    """ValueError if a new run into this folder would overwrite one: its checkpoint, or metrics alone, as a record of it holds."""
    if any((out / name / "state.json").exists() for name in ("checkpoint", "checkpoint.old")):
        raise ValueError(f"{out} holds a run already; go on with --resume {out}, or choose another --out")
    metrics = out / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        raise ValueError(f"{metrics} is of another run; choose another --out")


def make_folder(out: Path) -> None:
    """ValueError, one line, if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".probe").touch()
        (out / ".probe").unlink(missing_ok=True)      # another rank may have been quicker
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written to ({error.strerror}); choose another folder") from None


# Metrics

def _jsonable(x):
    """Tensors and numpy values become numbers or lists; NaN and infinities, which JSON does not have, null."""
    if isinstance(x, dict):
        return {str(k): _jsonable(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_jsonable(v) for v in x]
    if isinstance(x, (Tensor, np.ndarray, np.generic)):
        return _jsonable(x.tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


class MetricsLog:
    """A JSON-lines file of metrics, each row flushed at once, so that a killed run keeps every finished row.

    With resume_step, rows of later steps (they will be done again) and a half-written last line are first removed. Raises
    ValueError if the file has rows and resume_step is None (nothing is overwritten) or a line before the last is no row.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        if lines and resume_step is None:
            raise ValueError(f"{path} already has {len(lines)} rows: resume that run or choose another folder")
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                if json.loads(line)["step"] <= resume_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError) as e:
                if number < len(lines):  # only the last line can be half-written
                    raise ValueError(f"{path} line {number} is not a metrics row: {line[:60]!r}; delete that line") from e
        if lines:
            tmp = path.with_name(path.name + ".tmp")
            tmp.write_text("".join(kept))
            _fsync(tmp)
            os.replace(tmp, path)
        self.file = open(path, "a")

    def append(self, row: dict) -> None:
        """Write one row, which must have an integer "step"."""
        if not isinstance(row.get("step"), int):
            raise ValueError(f"a metrics row needs an integer 'step', got {row.get('step')!r}")
        self.file.write(json.dumps(_jsonable(row), allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


# Checkpoints: a folder of model.safetensors, trainer.safetensors (optimiser) and state.json

def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save_checkpoint(path: str | Path, *, model_tensors: dict[str, Tensor], trainer_tensors: dict[str, Tensor],
                    state: dict) -> None:
    """Write a checkpoint folder, replacing the one at `path`. `state` is plain JSON: step, settings, ...

    Killed between any two operations, `load_checkpoint` finds a complete checkpoint, the previous or the new:
      1. <path>.tmp is written, and flushed to disk (path: previous)
      2. path is renamed to <path>.old (no path: load reads <path>.old)
      3. <path>.tmp is renamed to path (path: new)
      4. <path>.old is deleted, as are leftovers of a killed save: .tmp before 1, .old only while path is complete
    Raises ValueError, with nothing touched, if state is not JSON or path holds something other than a checkpoint.
    """
    path = Path(path).absolute()
    tmp = path.with_name(path.name + ".tmp")
    try:
        text = json.dumps(state, indent=1, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ValueError(f"checkpoint state must be plain finite JSON values: {e}") from e
    if path.exists() and not (path / "state.json").is_file():
        raise ValueError(f"{path} exists and is not a checkpoint folder: choose another path")
    if tmp.exists():
        shutil.rmtree(tmp)
    tmp.mkdir(parents=True)
    for name, tensors in (("model", model_tensors), ("trainer", trainer_tensors)):
        plain, seen = {}, set()
        for key, value in tensors.items():
            value = value.detach().cpu().contiguous()
            memory = value.untyped_storage().data_ptr()
            plain[key] = value.clone() if memory in seen else value  # tied weights: safetensors refuses shared memory
            seen.add(memory)
        try:
            save_file(plain, tmp / f"{name}.safetensors")
        except SafetensorError as e:
            raise OSError(f"{tmp} cannot be written ({e}); is the disk full? The checkpoint before it is whole") from None
    (tmp / "state.json").write_text(text)
    replace_folder(tmp, path)


def replace_folder(tmp: Path, path: Path) -> None:
    """Steps 2 to 4 of `save_checkpoint`, after flushing tmp to disk."""
    old = path.with_name(path.name + ".old")
    for part in (*sorted(tmp.iterdir()), tmp):
        _fsync(part)
    if path.exists():
        if old.exists():
            shutil.rmtree(old)
        os.rename(path, old)
    os.rename(tmp, path)
    _fsync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def find_checkpoint(path: str | Path) -> Path:
    """The newest complete checkpoint folder at `path`; FileNotFoundError if there is none."""
    path = Path(path).absolute()
    if not path.exists() and path.with_name(path.name + ".old").exists():
        path = path.with_name(path.name + ".old")  # killed between steps 2 and 3 of save_checkpoint
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {path}")
    return path


def read_state(path: str | Path) -> dict:
    """The `state` of a checkpoint folder alone; errors as `load_checkpoint`."""
    file = find_checkpoint(path) / "state.json"
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"checkpoint {file.parent} has no {file.name}: it is incomplete, use another one") from None
    except ValueError as e:
        raise ValueError(f"checkpoint file {file} is truncated or corrupt, use another checkpoint ({e})") from e


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(model_tensors, trainer_tensors, state) of a folder `save_checkpoint` wrote, tensors on the CPU.

    Raises FileNotFoundError if there is none; ValueError, naming the file, if one is missing, truncated or unreadable.
    """
    path, loaded = find_checkpoint(path), []
    for file in (path / "model.safetensors", path / "trainer.safetensors"):
        try:
            loaded.append(load_file(file))
        except FileNotFoundError:
            raise ValueError(f"checkpoint {path} has no {file.name}: it is incomplete, use another one") from None
        except SafetensorError as e:
            raise ValueError(f"checkpoint file {file} is truncated or corrupt, use another checkpoint ({e})") from e
    return (*loaded, read_state(path))


# Stopping

@contextmanager
def ctrl_c() -> Iterator[list]:
    """Within it, Ctrl-C makes the yielded list true instead of raising, so that a loop can finish its step and save. A second one raises."""
    interrupted: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def handler(*_):
        interrupted.append(1)
        signal.signal(signal.SIGINT, before)
        print("\nCtrl-C: finishing this step and saving; press again to stop at once", file=sys.stderr)

    signal.signal(signal.SIGINT, handler)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
