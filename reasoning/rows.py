"""The rows of reflection-aware SRPO (arXiv 2506.01713): questions on images with their answers, and how a model is asked them.

`read_rows` reads JSONL, parquet or a dataset of the hub, and decodes every image once; a row that is no use is rejected with the reason, the
others go on. Rows with a `target`, the response to imitate, are what fine-tuning needs; reasoning/teacher.py makes them.

    python -m reasoning.rows check rows.jsonl --images DIR          how many rows are good, and why the others are not
"""
import argparse
import hashlib
import importlib.util
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

COLUMNS = ("query", "image", "answer", "content", "target")
MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 1280 * 28 * 28  # 4 to 1280 of Qwen2.5-VL's image tokens
MAX_ASPECT = 200  # Qwen's image processors refuse longer images


# Rows
@dataclass
class Row:
    """images: paths or encoded bytes. content: a worked solution, if the data has one. target: the response to imitate, in rows
    read back from reflections.jsonl. id: a hash of question, answer and images. source: "file:line"."""
    id: str
    query: str
    images: list[str | bytes]
    answer: str
    content: str | None = None
    target: str | None = None
    source: str = ""


@dataclass
class Rejected:
    """reason: "kind: detail", counted by kind. response: the words of the model or the teacher at fault, if any."""
    id: str
    source: str
    reason: str
    response: str = ""


def read_rows(source: str | Path, image_folder: str | Path | None = None,
              columns: dict[str, str] | None = None) -> tuple[list[Row], list[Rejected]]:
    """Rows of a JSONL file, a parquet file or folder of them, or a dataset of the hub ("org/name", "org/name:split").

    A row has `query`, `image` (a path from image_folder, default the source's own folder; or {"bytes", "path"} as the hub
    stores them; or a list of either), `answer`, perhaps `content` and `target`. columns: other names, {"query": "problem"}.
    Every image is decoded once here, so that none fails in the middle of a long run; bytes stay in memory, encoded.
    Raises FileNotFoundError, ValueError or RuntimeError if the source as a whole cannot be read or holds no good row.
    """
    path, names = Path(source), {name: name for name in COLUMNS} | (columns or {})
    folder = Path(image_folder or (path if path.is_dir() else path.parent))

    def read(item: tuple[str, dict | bytes]) -> Row | Rejected:
        try:
            row = _row(*item, folder, names)
            for i in range(len(row.images)):
                load_image(row, i)
            return row
        except ValueError as error:
            return Rejected(item[0], item[0], str(error))

    rows, rejected = {}, []
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        for item in tqdm(pool.map(read, _records(str(source))), desc="reading rows", disable=None):
            if isinstance(item, Rejected):
                rejected.append(item)
            elif rows.setdefault(item.id, item) is not item:
                rejected.append(Rejected(item.source, item.source, f"duplicate: the same as {rows[item.id].source}"))
    if not rows:
        raise ValueError(f"{source}: no good row; " + (f"{rejected[0].source}: {rejected[0].reason}" if rejected else "it is empty"))
    return list(rows.values()), rejected


def _records(source: str) -> Iterator[tuple[str, dict | bytes]]:
    """("file:line", what stands there)."""
    path = Path(source)
    if not path.exists() and (path.suffix in (".jsonl", ".json", ".parquet") or source.count("/") != 1):
        raise FileNotFoundError(f"{source} does not exist")
    if path.is_file() and path.suffix != ".parquet":
        with path.open("rb") as file:
            yield from ((f"{path.name}:{n}", line) for n, line in enumerate(file, 1) if line.strip())
        return
    try:
        if path.exists():
            need("pyarrow", f"to read {source}")
            from pyarrow.parquet import ParquetFile
            files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
            tables = ((file.name, ParquetFile(file).iter_batches(64)) for file in files)
        else:
            need("datasets", f"there is no file {source}; to read it as a dataset of the hub")
            import datasets
            name, _, split = source.partition(":")
            dataset = datasets.load_dataset(name, split=split or "train")
            tables = [(source, dataset.with_format("arrow").iter(64))]  # in arrow format images stay encoded
        for name, batches in tables:
            yield from ((f"{name}:{n}", record) for n, record in enumerate((r for batch in batches for r in batch.to_pylist()), 1))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from None


def need(package: str, purpose: str) -> None:
    """RuntimeError, one line, if a package that is no requirement is not installed."""
    if importlib.util.find_spec(package) is None:
        raise RuntimeError(f"{purpose}: pip install {package}")


def _row(where: str, record: dict | bytes, folder: Path, names: dict[str, str]) -> Row:
    try:
        if not isinstance(record := json.loads(record) if isinstance(record, bytes) else record, dict):
            raise ValueError(f"an object is needed, not {type(record).__name__}")
        query, image, answer, content, target = (record.get(names[name]) for name in COLUMNS)
    except ValueError as error:
        raise ValueError(f"broken JSON line: {error}") from None
    if isinstance(query, str):
        query = query.replace("<image>", "").strip()  # chat templates place images themselves
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer) if math.isfinite(answer) else None
    images = [(item.get("bytes") or item.get("path")) if isinstance(item, dict) else item
              for item in (image if isinstance(image, list) and image else [image])]
    for kind, name, value, good in (("empty question", "query", query, isinstance(query, str) and query.strip()),
                                    ("no answer", "answer", answer, isinstance(answer, str) and answer.strip()),
                                    ("no image", "image", image, all(item and isinstance(item, (str, bytes)) for item in images)),
                                    ("no text", "content", content, isinstance(content, str | None)),
                                    ("no text", "target", target, isinstance(target, str | None))):
        if not good:
            raise ValueError(f"{kind}: `{names[name]}` is {value!r:.40}; the row's columns are {', '.join(record)}")
    digest = hashlib.sha1(b"\0".join(part.encode() if isinstance(part, str) else part for part in (query, answer, *images)))
    images = [str((folder / item).absolute()) if isinstance(item, str) else item for item in images]
    return Row(digest.hexdigest()[:16], query, images, answer.strip(), content or None, target or None, where)


def load_image(row: Row, i: int = 0) -> Image.Image:
    """`open_image` of the row's i-th image."""
    return open_image(row.images[i], f"image {i + 1}")


def open_image(image: str | bytes, name: str) -> Image.Image:
    """A path, or encoded bytes called `name`, decoded: RGB, upright, white where it was transparent. Raises ValueError if it cannot be."""
    name = image if isinstance(image, str) else name
    try:
        picture = ImageOps.exif_transpose(Image.open(image if isinstance(image, str) else io.BytesIO(image)))
        if picture.has_transparency_data:  # else black lines on nothing become black on black
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        if max(picture.size) >= MAX_ASPECT * min(picture.size):
            raise ValueError(f"{picture.width} x {picture.height} pixels are too long a strip for Qwen's image processors")
        return picture.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"missing image: {name}") from None
    except Exception as error:  # what Pillow raises on broken files has no common class
        raise ValueError(f"corrupt image: {name}: {error}") from None


def fit_image(image: Image.Image, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image scaled to an area within [min_pixels, max_pixels], its aspect kept but for whole pixels."""
    area = image.width * image.height
    if min_pixels <= area <= max_pixels:
        return image
    rounded, wanted = (math.ceil, min_pixels) if area < min_pixels else (math.floor, max_pixels)
    size = [max(1, rounded(side * math.sqrt(wanted / area))) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


# Prompts: the roles are the paper's, the words ours (the teacher's: reasoning/teacher.py)
def first_prompt(query: str) -> str:
    """Asks for one attempt: think, then answer."""
    return (f"{query}\n\nStudy the image and reason step by step inside <think> and </think>. Then give the final answer inside "
            "<answer> and </answer>, like this:\n<think>your reasoning</think><answer>$\\boxed{your answer}$</answer>")


def reflection_prompt(query: str) -> str:
    """Asks for the whole pattern: the prompt of fine-tuning and of reinforcement learning."""
    return (f"{query}\n\nStudy the image and answer in two attempts with a reflection between them, exactly in this form and with "
            "nothing outside the tags:\n<think>reasoning, step by step</think><answer>$\\boxed{first answer}$</answer>"
            "<reflection>is the first attempt right? name its mistake, or what it could have left out</reflection>"
            "<think>reasoning again, with the reflection in mind</think><answer>$\\boxed{final answer}$</answer>")


def read_lines(path: Path, *needed: str) -> list[dict]:
    """The objects of a JSONL file, [] if there is none. A last line that a crash cut off is dropped, from the file too. ValueError names
    a line that is broken or lacks a key `needed`."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[:data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(line))
            [lines[-1][name] for name in needed]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is broken ({type(error).__name__}: {error}); delete that line") from None
    return lines


# Command line
def add_row_arguments(parser: argparse.ArgumentParser, name: str, **more) -> None:
    parser.add_argument(name, help="JSONL file, parquet file or folder of them, or a dataset of the hub, org/name:split", **more)
    parser.add_argument("--images", help="folder the rows' image paths start from (default: the file's own)")
    parser.add_argument("--columns", nargs="*", default=[], metavar="NAME=COLUMN", help="other column names: query=problem image=images")


def column_names(pairs: list[str]) -> dict[str, str]:
    """["query=problem"] -> {"query": "problem"}. Raises ValueError for any other form or name."""
    names = dict(pair.partition("=")[::2] for pair in pairs)
    for name, column in names.items():
        if name not in COLUMNS or not column:
            raise ValueError(f"--columns {name}={column}: it takes NAME=COLUMN, where NAME is one of {', '.join(COLUMNS)}")
    return names


def read_given(args: argparse.Namespace) -> tuple[list[Row], list[Rejected]]:
    """`read_rows` by the flags of `add_row_arguments`."""
    return read_rows(args.rows, args.images, column_names(args.columns))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tell how many rows are good, and why the others are not")
    parser.add_argument("command", choices=["check"])
    add_row_arguments(parser, "rows")
    args = parser.parse_args(argv)
    try:
        rows, rejected = read_given(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for item in rejected:
        print(f"{item.source}: {item.reason}")
    print(f"{len(rows)} of {len(rows) + len(rejected)} rows are good")
    return 0


if __name__ == "__main__":
    sys.exit(main())
