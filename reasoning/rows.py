"""The rows of reflection-aware SRPO (arXiv 2506.01713): questions on pictures, and their answers.

1. `read_rows` reads JSONL, parquet or a dataset of the hub and decodes every picture once.
2. `PROMPTS`: how a model is asked. Their roles are the paper's, their words ours.
3. `usable` drops the rows that are too long for a model, so that training meets none of them.
4. What is refused goes to rejected.jsonl with the reason (`Rejections`); the others go on.

Fine-tuning needs rows with a `target`, the response to imitate; reasoning/teacher.py makes them.
Left out: videos, and several turns.
"""
import hashlib
import io
import json
import math
import os
import re
import reprlib
import stat
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from plumbing.files import Journal
from plumbing.flags import printable
from reasoning.answers import default_verify

COLUMNS = {"query": "empty question", "image": "no image", "answer": "no answer",   # if it is bad
           "content": "no text", "target": "no text"}
MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 1280 * 28 * 28    # 4 to 1280 of Qwen2.5-VL's image tokens
MAX_ASPECT = 200                # Qwen's image processors refuse longer pictures
MAX_DECODED, LARGE = 2**26, 2**24       # pixels: more are refused; more are decoded one at a time
SURROGATE = re.compile(r"[\ud800-\udfff]")      # half a character, which no tokenizer takes
_one_large = Lock()
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)      # ours comes first


@dataclass
class Row:
    """images: paths or encoded bytes; sizes: (width, height) of each. content: a worked solution.
    id: a hash of question, answer and images. source: "file:line"."""
    id: str
    query: str
    images: list[str | bytes]
    answer: str
    content: str | None = None
    target: str | None = None
    source: str = ""
    sizes: list[tuple[int, int]] = field(default_factory=list)


class Number(str):
    """A number of a JSON file, as it is written there."""


# Reading

def read_rows(source: str | Path, image_folder: str | Path | None = None,
              columns: Iterable[str] = ()) -> tuple[list[Row], dict[str, str]]:
    """Rows of a JSONL file, a parquet file or folder of them, or a dataset of the hub ("org/name",
    "org/name:split"), and {"file:line": "kind: detail"}, why others were refused.

    A row has `query`, `image` (a path from image_folder, default the source's own folder; or
    {"bytes", "path"} as the hub stores them; or a list of either), `answer`, perhaps `content` and
    `target`. columns: other names, ["query=problem"]. OSError, ValueError or RuntimeError if the
    source as a whole cannot be read or holds no good row."""
    path, names = Path(source), {name: name for name in COLUMNS}
    folder = Path(image_folder or (path if path.is_dir() else path.parent))
    for pair in columns:
        name, _, column = pair.partition("=")
        if name not in COLUMNS or not column:
            raise ValueError(f"--columns {pair}: it takes NAME=COLUMN, where NAME is one of "
                             f"{', '.join(COLUMNS)}")
        names[name] = column

    def read(record: tuple[str, dict | bytes]) -> tuple[str, Row | str]:
        try:
            row = _row(*record, folder, names)
            row.sizes = [load_image(row, i).size for i in range(len(row.images))]
            return row.source, row
        except ValueError as error:
            return record[0], one_line(error)

    rows, rejected = {}, {}
    with ThreadPoolExecutor() as pool:          # Pillow decodes outside the interpreter lock
        for where, row in tqdm(pool.map(read, raw_rows(source)), "reading rows", disable=None):
            if isinstance(row, str):
                rejected[where] = row
            elif (first := rows.setdefault(row.id, row)) is not row:
                rejected[where] = f"duplicate: the same as {first.source}"
    if not rows:
        why = ": ".join(next(iter(rejected.items()), ["it is empty"]))
        raise ValueError(f"{source}: no good row; {why}")
    return list(rows.values()), rejected


def raw_rows(source: str | Path) -> Iterator[tuple[str, dict | bytes]]:
    """("file:line", what stands there: a line of JSON, or parquet's columns)."""
    path, source = Path(source), str(source)
    local = path.is_file() or path.is_dir()
    if not local and (path.exists() or path.suffix in (".jsonl", ".json", ".parquet")
                      or source.count("/") != 1):
        raise FileNotFoundError(f"{source} does not exist, or is no file and no folder")
    if path.is_file() and path.suffix != ".parquet":
        with path.open("rb") as file:
            if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", file.peek(99)):
                raise ValueError(f"{source} is a JSON array; rows are JSON lines, one object each: "
                                 "jq -c '.[]' makes them")
            yield from ((f"{printable(path.name)}:{number}", line)
                        for number, line in enumerate(file, 1) if line.strip())
        return
    try:
        if local:
            from pyarrow.parquet import ParquetFile
            folder = path if path.is_dir() else path.parent
            files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
            tables = ((str(file.relative_to(folder)), ParquetFile(file).iter_batches(64))
                      for file in files)
        else:
            from datasets import load_dataset
            name, _, split = source.partition(":")
            dataset = load_dataset(name, split=split or "train")
            tables = [(source, dataset.with_format("arrow").iter(64))]      # images stay encoded
        for name, batches in tables:
            records = (record for batch in batches for record in _wide(batch).to_pylist())
            yield from ((f"{printable(name)}:{n}", record) for n, record in enumerate(records, 1))
    except ImportError as error:
        kind = "parquet" if local else "no file; to read it as a dataset of the hub"
        raise RuntimeError(f"{source} is {kind}: pip install {error.name}") from None
    except Exception as error:          # what pyarrow and datasets raise has no common class
        raise ValueError(f"{source} cannot be read: {one_line(error)}") from None


def _wide(batch):
    """An Arrow table or batch, its 32-bit floats as they print: 0.1, not 0.10000000149011612."""
    for i, column in enumerate(batch.schema):
        if str(column.type) == "float":
            batch = batch.set_column(i, column.name, batch.column(i).cast("string").cast("double"))
    return batch


def _row(where: str, record: dict | bytes, folder: Path, names: dict[str, str]) -> Row:
    try:
        if isinstance(record, bytes):
            record = json.loads(record, parse_int=Number, parse_float=Number)
        if not isinstance(record, dict):
            raise ValueError(f"an object is needed, not {type(record).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON line: {error}") from None
    row = {name: record.get(names[name]) for name in COLUMNS}
    if type(row["query"]) is str:       # chat templates place images themselves
        row["query"] = row["query"].replace("<image>", "").strip()
    row["answer"] = in_full(row["answer"])
    images = row["image"] if isinstance(row["image"], list) and row["image"] else [row["image"]]
    images = [x.get("bytes") or x.get("path") if isinstance(x, dict) else x for x in images]
    for name, value in row.items():
        parts, kinds = (images, (str, bytes)) if name == "image" else ([value], (str,))
        optional = COLUMNS[name] == "no text"
        if not (optional and value is None) and not all(
                type(part) in kinds and (part.strip() or optional) for part in parts):
            raise ValueError(f"{COLUMNS[name]}: `{names[name]}` is {reprlib.repr(value)}; "
                             f"the row's columns are {', '.join(record)}")
        for half in SURROGATE.findall("".join(part for part in parts if isinstance(part, str))):
            raise ValueError(f"half a character: `{names[name]}` holds {ascii(half)} alone")
    query, answer = row["query"], row["answer"]
    if default_verify(answer, answer) is None:
        raise ValueError(f"unreadable ground truth: {answer[:80]!r}")
    hashed = (x.encode() if isinstance(x, str) else x for x in (query, answer, *images))
    images = [str((folder / x).absolute()) if isinstance(x, str) else x for x in images]
    return Row(hashlib.sha1(b"\0".join(hashed)).hexdigest()[:16], query, images, answer.strip(),
               row["content"] or None, row["target"] or None, where)


def in_full(answer):
    """A finite number as text: JSON's as written, a column's without exponent."""
    if type(answer) not in (Number, int, float, Decimal):
        return answer
    text = str(answer) if type(answer) is Number else format(Decimal(str(answer)), "f")
    return text if math.isfinite(float(text)) else answer


def one_line(text: object) -> str:
    """Foreign text as it may be printed."""
    text = " ".join(str(text).split())
    return printable(text if len(text) <= 300 else text[:300] + " ...")


# Pictures

def load_image(row: Row, i: int = 0) -> Image.Image:
    return open_image(row.images[i], f"image {i + 1}")


def pictures(row: Row, max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    """A row's, as a model is shown them."""
    return [fit_image(load_image(row, i), max_pixels) for i in range(len(row.images))]


def open_image(image: str | bytes, name: str) -> Image.Image:
    """A path, or encoded bytes called `name`, decoded: RGB, upright, transparency made white.
    ValueError if it is missing, no regular file, corrupt, too large or too long a strip."""
    name = image if isinstance(image, str) else name
    try:
        if isinstance(image, str) and not stat.S_ISREG(os.stat(image).st_mode):
            raise ValueError("it is no regular file")
        with Image.open(image if isinstance(image, str) else io.BytesIO(image)) as picture:
            size, area = f"{picture.width} x {picture.height} pixels", math.prod(picture.size)
            if area > MAX_DECODED:
                raise ValueError(f"{size} are more than {MAX_DECODED / 1e6:.0f} million")
            if any(max(s) >= MAX_ASPECT * min(s) for s in (picture.size, fit_size(picture.size))):
                raise ValueError(f"{size} are too long a strip for Qwen's image processors")
            with _one_large if area > LARGE else nullcontext():
                return _rgb(picture)
    except FileNotFoundError:
        raise ValueError(f"missing image: {name}") from None
    except Exception as error:          # what Pillow raises on broken files has no common class
        raise ValueError(f"corrupt image: {name}: {error}") from None


def _rgb(picture: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode[0] in "IF":         # grey of 16 or 32 bits, which Pillow would clip at 255
        grey = np.nan_to_num(np.asarray(picture, np.float32), posinf=0, neginf=0)       # (H, W)
        ranges = {"I": (255, 65535), "F": (1, 255, 65535)}.get(picture.mode, (65535,))
        low, high = float(grey.min()), float(grey.max())
        if low >= 0:
            low, high = 0, next((top for top in ranges if high <= top), high)
        grey = (grey - low) * (255 / (high - low or 1))
        picture = Image.fromarray(np.rint(grey).astype(np.uint8))
    if picture.has_transparency_data:   # else black lines on nothing become black on black
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def fit_size(size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height), whole, scaled to an area of MIN_PIXELS to max_pixels; the aspect is kept."""
    area = math.prod(size)
    if MIN_PIXELS <= area <= max_pixels:
        return size
    rounded, wanted = (math.ceil, MIN_PIXELS) if area < MIN_PIXELS else (math.floor, max_pixels)
    return tuple(max(1, rounded(side * math.sqrt(wanted / area))) for side in size)


def fit_image(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image itself, or resized to `fit_size`."""
    size = fit_size(image.size, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


# Prompts

def first_prompt(query: str) -> str:
    """Asks for one attempt: think, then answer."""
    return (f"{query}\n\nStudy the image and reason step by step inside <think> and </think>. Then "
            "give the final answer inside <answer> and </answer>, like this:\n"
            "<think>your reasoning</think><answer>$\\boxed{your answer}$</answer>")


def reflection_prompt(query: str) -> str:
    """Asks for the whole pattern: the prompt of fine-tuning and of reinforcement learning."""
    return (f"{query}\n\nStudy the image and answer in two attempts with a reflection between "
            "them, exactly in this form and with nothing outside the tags:\n"
            "<think>reasoning, step by step</think><answer>$\\boxed{first answer}$</answer>"
            "<reflection>is the first attempt right? name its mistake, or what it could have left "
            "out</reflection><think>reasoning again, with the reflection in mind</think>"
            "<answer>$\\boxed{final answer}$</answer>")


def twice_prompt(query: str) -> str:
    """Asks for two attempts without a reflection between them: the paper's baseline."""
    return (f"{first_prompt(query)}\nThen look at it a second time, and once more give <think> and "
            "<answer>, whatever the first answer was.")


PROMPTS = {"query": str, "reflection": reflection_prompt,       # question -> what is asked
           "plain": first_prompt, "twice": twice_prompt}


# Refusing

def usable(rows: list[Row], rejected: dict[str, str], processor, limits,
           rejections: "Rejections") -> list[Row]:
    """Those of `read_rows`'s rows that a model can be trained on, by their text and their pictures'
    sizes; the others, and `rejected`, go to `rejections`. ValueError if no row is left.

    processor: a reasoning.qwen.Processor. limits: settings with prompt (a key of `PROMPTS`),
    max_pixels, and in tokens, those of images included, max_prompt, max_new_tokens, and max_length
    of prompt and target."""
    for where, reason in rejected.items():
        rejections.add(where, where, reason)
    look, blank, kept = processor.image_processor, Image.new("RGB", (64, 64)), []
    room = min(limits.max_prompt, processor.context - limits.max_new_tokens)
    whole = min(limits.max_length, processor.context)

    def tokens(size: tuple[int, int]) -> int:
        return look.get_number_of_image_patches(size[1], size[0], {}) // look.merge_size**2

    for row in tqdm(rows, desc="measuring rows", disable=None):
        try:
            text = PROMPTS[limits.prompt](row.query)
            n = len(processor.prompt([blank] * len(row.sizes), text).ids) + sum(
                tokens(fit_size(size, limits.max_pixels)) - tokens(blank.size)
                for size in row.sizes)
            if n > room:
                raise ValueError(f"too long: a prompt of {n} tokens, and there is room for {room}; "
                                 "see --max_new_tokens, --max_prompt, --max_pixels")
            if row.target and (n := n + len(processor.target(row.target))) > whole:
                raise ValueError(f"too long: prompt and target of {n} tokens, and there is room "
                                 f"for {whole}; see --max_length")
            kept.append(row)
        except ValueError as error:
            rejections.add(row.id, row.source, error)
    if not kept:
        raise ValueError(f"none of {len(rows)} rows can be used; {rejections.path} says why")
    return kept


class Rejections:
    """Rows that are no use, each once, in `folder`/rejected.jsonl; seen: their reasons by id.
    torchrun's ranks all refuse the same rows; the first alone reads and writes the file."""

    def __init__(self, folder: str | Path, loud: bool = True):
        self.path, self.loud, self.lock = Path(folder) / "rejected.jsonl", loud, Lock()
        self.first = os.environ.get("RANK", "0") == "0"
        self.journal = open_journal(self.path, id=str, reason=str) if (
            self.first and self.path.exists()) else None
        self.seen = {row["id"]: row["reason"] for row in self.journal.rows} if self.journal else {}

    def add(self, id: str, source: str, reason: object, response: str = "") -> None:
        """response: the model's or the teacher's, if that is at fault."""
        with self.lock:
            if id in self.seen:
                return
            self.seen[id] = reason = one_line(reason)
            if self.first:
                self.journal = self.journal or open_journal(self.path)
                self.journal.add(dict(id=id, source=source, reason=reason, response=response))
        if self.first and self.loud:
            tqdm.write(f"{source}: {reason}; set aside in {self.path}")


def open_journal(path: Path, **kinds: type) -> Journal:
    """Without the rows in which one of these is not of its type: damaged, they are done again."""
    return Journal(path, keep=lambda row: all(isinstance(row.get(name), kind)
                                              for name, kind in kinds.items()))
