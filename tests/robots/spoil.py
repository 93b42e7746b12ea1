"""Seeded damage to a checkpoint folder, as disks, copies and editors do it."""

import json
import os
from pathlib import Path

import numpy as np

VALUES = (None, [], {}, "x", -1, 0, 1e308, 2**70, True, [None], {"a": []}, "\n", [[1.0] * 7], "nan")


def fault(call, *arguments) -> str:
    """The line that a call refuses its arguments with; none if it does not."""
    try:
        call(*arguments)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def read(file: Path):
    try:
        return json.loads(file.read_text())
    except (ValueError, OSError, RecursionError):
        return None


def places(value, path=()):
    """Every key and index of a JSON value, as paths."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def spoil(folder: Path, seed: int) -> str:
    """Change one file of the folder; says what was done, for a failing test."""
    rng = np.random.default_rng(seed)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    file = files[seed % len(files)]
    kinds = ["truncate", "flip", "whole", "nested"]
    kinds += ["value", "value", "drop"] * (file.suffix == ".json")
    kind = kinds[int(rng.integers(len(kinds)))]
    old, note = file.read_bytes(), ""
    if kind == "truncate":
        os.truncate(file, note := int(rng.integers(len(old))))
    elif kind == "flip":  # in the first part: headers, not the numbers of weights
        at, new = int(rng.integers(min(len(old), 4000))), bytearray(old)
        new[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(new))
        note = at
    elif kind == "whole":
        text = ["", "[]", "null", "{}", "3", '"x"', "\ufeff{}", "{}{}", "NaN"]
        file.write_text(note := text[int(rng.integers(len(text)))])
    elif kind == "nested":
        file.write_text("[" * 100000 if rng.random() < 0.5 else '{"a":' * 100000)
    else:
        content = json.loads(old)
        all_places = list(places(content))
        *path, last = note = all_places[int(rng.integers(len(all_places)))]
        holder = content
        for key in path:
            holder = holder[key]
        if kind == "drop":
            del holder[last]
        else:
            holder[last] = VALUES[int(rng.integers(len(VALUES)))]
            note = note, holder[last]
        file.write_text(json.dumps(content))
    return f"{file.name}: {kind} {note}"
