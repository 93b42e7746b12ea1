"""Files that appear whole or not at all, and logs that are only appended to; without torch.

A `Journal` is the one form of everything that is written line by line and gone on with: metrics,
evaluations, a teacher's replies.
"""
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from plumbing.flags import jsonable


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path to write a file or a folder at, which takes the place of `path` when the block ends.

    Killed between any two operations, `path` or `path`.old is complete: the draft is flushed,
    `path` is renamed to `path`.old, the draft to `path`, and `path`.old is deleted. An error
    removes the draft and leaves `path` as it was; OSError, one line, if the disk is full."""
    path = Path(path).absolute()
    draft, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    _remove(draft)                                      # left behind by a kill
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        for part in (*sorted(draft.rglob("*")), draft):
            _flush(part)
        if path.is_dir():
            _remove(old)
            os.rename(path, old)
        os.replace(draft, path)
        _flush(path.parent)
        _remove(old)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written ({error}); is the disk full? "
                      "What was there before is whole") from None
    finally:
        _remove(draft)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():               # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, content) -> None:
    """JSON, whole or not at all; NaN and infinities become null."""
    with whole(path) as draft:
        draft.write_text(json.dumps(jsonable(content), indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict:
    """The object in a file. ValueError, one line that names it, if there is none."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; the folder is not complete") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); use another copy") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; use another copy")
    return content


class Journal:
    """JSON lines that are only ever appended to, each flushed at once: a kill costs at most the
    line it cuts, which is dropped at the next opening.

    settings: the first line of a new file; ValueError, naming the difference, if the file was begun
    with others. keep: rows that stay, of those that are there. `rows`: they, as they were read;
    `new`: nothing was there. ValueError names a whole line that is no JSON object."""

    def __init__(self, path: str | Path, settings: dict | None = None,
                 keep: Callable[[dict], bool] = lambda row: True):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = self.path.read_text(errors="replace") if self.path.exists() else ""
        rows, lines, self.new = [], found.split("\n"), not found
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif number < len(lines):       # what a kill has cut off is not ended by a newline
                raise ValueError(f"{self.path} line {number} is not a row: {line[:60]!r}; "
                                 "delete that line")
        head = [] if settings is None else [jsonable(settings)]
        if head and rows and (begun := rows.pop(0)) != head[0]:
            other = [f"{name} {begun.get(name)!r}, not {settings.get(name)!r}"
                     for name in begun | settings if begun.get(name) != head[0].get(name)]
            raise ValueError(f"{self.path} was begun with {', '.join(other)}; "
                             "repeat that, or choose another --out")
        self.rows = [row for row in rows if keep(row)]
        text = "".join(map(_line, (*head, *self.rows)))
        if text != found:
            with whole(self.path) as draft:
                draft.write_text(text)
        self.file = open(self.path, "a")

    def add(self, row: dict) -> None:
        self.file.write(_line(row))
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _line(row: dict) -> str:
    return json.dumps(jsonable(row), allow_nan=False) + "\n"
