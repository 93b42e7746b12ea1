"""reasoning/rows.py: rows and pictures that are good, and those that are not."""
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
import tracemalloc
import warnings
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reasoning import arrows, qwen
from reasoning import rows as data
from reasoning.rows import Rejections, Row, read_rows, usable
from tests.conftest import lines, needs, write_rows

ROOT = Path(__file__).parents[2]


def test_good_and_bad_rows(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.jpg")
    Image.new("RGB", (400, 2)).save(tmp_path / "strip.png")
    picture = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(picture[: len(picture) // 2])
    (tmp_path / "text.png").write_text("no picture")
    good = {"query": "q", "image": "a.png", "answer": "7"}
    records = [
        good,
        good | {"answer": 7.5, "content": "worked"},
        good | {"image": ["a.png", "b.jpg"]},
        good | {"query": "<image>\nHow many?"},
        '{"query": "q", "image"',
        "[1]",
        b'\xff{"query"}',
        good | {"query": "<image> "},
        good | {"answer": float("nan")},
        good | {"answer": True},
        good | {"answer": " "},
        {"query": "q", "answer": "7"},
        good | {"image": []},
        good | {"image": ["a.png", ""]},
        good | {"image": "none.png"},
        good | {"image": "cut.jpg"},
        good | {"image": "text.png"},
        good | {"image": "strip.png"},
        good | {"image": "a\0.png"},
        good,
        good | {"query": "\ud800"},
    ]
    raw = [
        r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode()
        for r in records
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join(raw[:4]) + b"\n\n" + b"\n".join(raw[4:])
    )  # a byte order mark, a blank line
    rows, rejected = read_rows(file)
    assert [(r.source, r.query, len(r.images), r.answer, r.content) for r in rows] == [
        ("rows.jsonl:1", "q", 1, "7", None),
        ("rows.jsonl:2", "q", 1, "7.5", "worked"),
        ("rows.jsonl:3", "q", 2, "7", None),
        ("rows.jsonl:4", "How many?", 1, "7", None),
    ]
    reasons = {item.source.removeprefix("rows.jsonl:"): item.reason for item in rejected}
    expected = {
        "6": "broken JSON line: ",
        "7": "broken JSON line: an object is needed, not list",
        "8": "broken JSON line: ",
        "9": "empty question: `query` is ''",
        "10": "no answer: `answer` is nan",
        "11": "no answer: `answer` is True",
        "12": "no answer: `answer` is ' '",
        "13": "no image: `image` is None; the row's columns are query, answer",
        "14": "no image: ",
        "15": "no image: ",
        "16": f"missing image: {tmp_path}/none.png",
        "17": f"corrupt image: {tmp_path}/cut.jpg: ",
        "18": f"corrupt image: {tmp_path}/text.png: ",
        "19": f"corrupt image: {tmp_path}/strip.png: 400 x 2",
        "20": "corrupt image: ",
        "21": "duplicate: the same as rows.jsonl:1",
        "22": "half a character: `query` holds '\\ud800' alone",
    }
    assert set(reasons) == set(expected)
    for line, reason in expected.items():
        assert reasons[line].startswith(reason) and "\n" not in reasons[line], line


def test_ids_follow_the_content_not_the_place(tmp_path):
    first, _ = read_rows(write_rows(tmp_path, 3))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.jsonl").write_text(
        "\n".join(reversed((tmp_path / "rows.jsonl").read_text().splitlines()))
    )
    again, _ = read_rows(tmp_path / "sub" / "other.jsonl", tmp_path)
    assert [row.id for row in again] == [row.id for row in first][::-1] and len(
        {row.id for row in first}
    ) == 3
    assert [data.load_image(row).getpixel((0, 0))[0] for row in again] == [2, 1, 0]
    with pytest.raises(
        ValueError,
        match=r"rows.jsonl: no good row; rows.jsonl:1: empty question: `problem` is None; the "
        "row's columns are query, image, answer",
    ):
        read_rows(tmp_path / "rows.jsonl", columns={"query": "problem"})
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: no good row; it is empty"):
        read_rows(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="none.jsonl does not exist"):
        read_rows(tmp_path / "none.jsonl")


def test_images_become_upright_rgb_on_white(tmp_path):
    def load(image: Image.Image, name: str, **more) -> Image.Image:
        image.save(tmp_path / name, **more)
        picture = data.load_image(Row("", "", [str(tmp_path / name)], ""))
        assert picture.mode == "RGB"
        return picture

    clear = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 0, 255))
    assert [load(clear, "clear.png").getpixel(xy) for xy in ((0, 0), (1, 1))] == [
        (0, 0, 0),
        (255, 255, 255),
    ]
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert load(palette, "palette.png", transparency=1).getpixel((0, 0)) == (255, 255, 255)
    assert load(Image.new("L", (4, 2), 7), "grey.png").getpixel((0, 0)) == (7, 7, 7)
    assert load(Image.new("CMYK", (4, 2)), "cmyk.jpg").size == (4, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert load(Image.new("RGB", (8, 4)), "turned.jpg", exif=exif).size == (4, 8)


@pytest.mark.parametrize("size", [(8, 8), (1, 150), (640, 480), (1999, 1003), (5000, 30), (3, 500)])
def test_fit_image(size):
    image = Image.new("RGB", size)
    fitted = data.fit_image(image, 3136, 200_000)
    assert 3136 <= fitted.width * fitted.height <= 200_000
    scale = np.array(fitted.size) / np.array(size)  # (2,) the same but for whole pixels
    assert abs(size[0] * scale[1] - fitted.width) <= scale[1] * size[0] / fitted.height + 1
    assert (fitted is image) == (3136 <= size[0] * size[1] <= 200_000)


@needs("pyarrow")
def test_parquet_holds_what_jsonl_holds(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows, _ = read_rows(write_rows(tmp_path, 5))
    pictures = [(tmp_path / f"{i}.png").read_bytes() for i in range(5)]
    (tmp_path / "shards").mkdir()
    for name, part in (("a", range(3)), ("b", range(3, 5))):
        table = [
            {
                "problem": rows[i].query,
                "images": [{"bytes": pictures[i], "path": None}],
                "answer": i,
            }
            for i in part
        ]
        parquet.write_table(
            pyarrow.Table.from_pylist(table), tmp_path / "shards" / f"{name}.parquet"
        )
    broken = [{"problem": "q", "images": [{"bytes": b"no picture", "path": None}], "answer": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(broken), tmp_path / "shards" / "c.parquet")
    read, rejected = read_rows(tmp_path / "shards", columns={"query": "problem", "image": "images"})
    assert [r.source for r in read] == [
        "a.parquet:1",
        "a.parquet:2",
        "a.parquet:3",
        "b.parquet:1",
        "b.parquet:2",
    ]
    for a, b in zip(rows, read, strict=True):
        assert (a.query, a.answer) == (b.query, b.answer) and data.load_image(
            a
        ).tobytes() == data.load_image(b).tobytes()
    assert [item.reason.partition(": cannot")[0] for item in rejected] == ["corrupt image: image 1"]
    (tmp_path / "no.parquet").write_text("text")
    with pytest.raises(ValueError, match="no.parquet cannot be read"):
        read_rows(tmp_path / "no.parquet")


@needs("datasets")
def test_dataset_of_the_hub_stays_encoded(tmp_path, monkeypatch):
    import datasets
    import pyarrow
    from pyarrow import parquet

    write_rows(tmp_path, 3)
    pictures = [(tmp_path / f"{i}.png").read_bytes() for i in range(3)]
    table = [
        {"query": f"Row {i}", "image": {"bytes": pictures[i], "path": f"{i}.png"}, "answer": str(i)}
        for i in range(3)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "rows.parquet")
    features = datasets.Features(
        {
            "query": datasets.Value("string"),
            "image": datasets.Image(),
            "answer": datasets.Value("string"),
        }
    )
    dataset = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "rows.parquet"),
        split="train",
        features=features,
        cache_dir=str(tmp_path / "cache"),
    )
    assert isinstance(dataset[0]["image"], Image.Image)  # what reading it without care would decode
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: asked.append((name, split)) or dataset
    )  # the download alone
    rows, _ = read_rows("some/where:test")
    assert asked == [("some/where", "test")] and [row.images for row in rows] == [
        [picture] for picture in pictures
    ]


def test_no_datasets_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RuntimeError,
        match="^there is no file some/where; to read it as a dataset of the hub: pip install "
        "datasets$",
    ):
        read_rows("some/where")


def test_check(tmp_path):
    write_rows(tmp_path, 2)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"query": "q", "image": "none.png", "answer": 1}\n')
    check = [sys.executable, "-m", "reasoning.rows", "check"]
    done = subprocess.run(
        [*check, tmp_path / "rows.jsonl", "--images", tmp_path], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == f"rows.jsonl:3: missing image: {tmp_path}/none.png\n2 of 3 rows are good\n"
    )
    done = subprocess.run(
        [*check, tmp_path / "rows.jsonl", "--columns", "query=problem"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert (
        "error: " in done.stderr
        and "`problem` is None; the row's columns are query, image, answer" in done.stderr
    )


# Rows of the kinds that public bug reports are about


def reasons_of(folder: Path, *written: str) -> list[str]:
    """Why rows written as these fields are refused; a good row stands after them."""
    good = '{"query": "good", "image": "a.png", "answer": "1"}'
    if not (folder / "a.png").exists():
        Image.new("RGB", (64, 64)).save(folder / "a.png")
    bad = ['{"query": "q", "image": "a.png", "answer": "1", ' + text + "}" for text in written]
    (folder / "rows.jsonl").write_text("\n".join([*bad, good]))
    rows, rejected = read_rows(folder / "rows.jsonl")
    assert [row.query for row in rows] == ["good"]
    assert all(item.reason.isprintable() and len(item.reason) < 310 for item in rejected)
    return [item.reason for item in rejected]


def test_numbers_are_kept_as_they_are_written(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    numbers = ["0.00001", "2.50", "1e16", "1E-7", "-0", "123456789012345678901234567890", "7"]
    refused = ["1" * 401, "1e999", "NaN", "-Infinity", "9" * 5000]
    row = '{"query": "q%d", "image": "a.png", "score": NaN, "answer": %s}'
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(row % pair for pair in enumerate(numbers + refused))
    )
    rows, rejected = read_rows(tmp_path / "rows.jsonl")
    assert [row.answer for row in rows] == numbers and type(rows[0].answer) is str
    assert [item.reason.partition(":")[0] for item in rejected] == ["no answer"] * 5
    assert reasons_of(tmp_path, '"query": 5', '"content": 5', '"target": [1]') == [
        "empty question: `query` is '5'; the row's columns are query, image, answer",
        "no text: `content` is '5'; the row's columns are query, image, answer, content",
        "no text: `target` is ['1']; the row's columns are query, image, answer, target",
    ]


@needs("pyarrow")
def test_numbers_in_columns(tmp_path):
    import pyarrow
    from pyarrow import parquet

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")

    def answers(column) -> list[str]:
        names = {"query": [f"q{i}" for i in range(len(column))], "image": ["a.png"] * len(column)}
        parquet.write_table(pyarrow.table(names | {"answer": column}), tmp_path / "t.parquet")
        rows, rejected = read_rows(tmp_path / "t.parquet")
        assert len(rows) + len(rejected) == len(column)
        return [row.answer for row in rows]

    decimals = [Decimal("0.0000001"), Decimal("7.5000000"), Decimal("-120.0000000")]
    assert answers(decimals) == ["0.0000001", "7.5000000", "-120.0000000"]
    floats = [0.00001, 1e16, 2.5, float("nan"), float("inf")]
    assert answers(floats) == ["0.00001", "10000000000000000", "2.5"]
    assert answers(pyarrow.array([2**64 - 1, 3], pyarrow.uint64())) == ["18446744073709551615", "3"]
    assert answers(pyarrow.array([0.1, 1e-5], pyarrow.float32())) == ["0.1", "0.00001"]


def test_nested_rows(tmp_path):
    for depth in (100, 900, 990, 2000, 100_000):
        nested = ["[" * depth, '{"query": ' + '{"a": ' * depth]
        nested += ['{"query": ' + "[" * depth + "]" * depth + ', "image": "a.png", "answer": "1"}']
        good = '{"query": "good", "image": "a.png", "answer": "1"}'
        Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
        (tmp_path / "rows.jsonl").write_text("\n".join([*nested, good]))
        rows, rejected = read_rows(tmp_path / "rows.jsonl")
        assert len(rows) == 1 and len(rejected) == 3, depth


def test_half_characters_and_terminal_escapes(tmp_path):
    half = [rf'"{name}": "a \ud83d b"' for name in data.COLUMNS]
    assert reasons_of(tmp_path, *half) == [
        rf"half a character: `{name}` holds '\ud83d' alone" for name in data.COLUMNS
    ]
    whole = {"query": "\U0001f600", "image": "a.png", "answer": "\u2220", "target": "\U0001f600"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(whole))     # in pairs of surrogates
    assert [(row.query, row.target) for row in read_rows(tmp_path / "rows.jsonl")[0]] == [
        (whole["query"], whole["target"])]
    escapes = ['"image": "\\u001b]0;owned\\u0007\\u202e.png"', '"answer": ["\\u001b[31m"]']
    for reason in reasons_of(tmp_path, *escapes, '"image": "%s.png"' % ("long" * 5000)):
        assert "\x1b" not in reason


def test_a_json_array_is_said_in_one_line(tmp_path):
    rows = [{"query": f"q{i}", "image": "a.png", "answer": "1"} for i in range(3)]
    for start, indent in (("", None), ("", 1), ("\ufeff\n", 4)):
        (tmp_path / "rows.json").write_text(start + json.dumps(rows, indent=indent))
        with pytest.raises(ValueError, match="rows.json is a JSON array; rows are JSON lines, one"):
            read_rows(tmp_path / "rows.json")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    paths = ("fifo.png", "folder.png", "/dev/zero")
    reasons = reasons_of(tmp_path, *(f'"image": "{path}"' for path in paths))
    assert [reason.rpartition(": ")[2] for reason in reasons] == ["it is no regular file"] * 3
    with pytest.raises(FileNotFoundError, match="does not exist, or is no file and no folder"):
        read_rows(tmp_path / "fifo.png")


# Pictures


def encoded(picture: Image.Image, kind: str) -> bytes:
    picture.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


RAMP = np.tile(np.arange(256), (64, 1))  # (64, 256), the grey levels wanted


@pytest.mark.parametrize(
    "name, array, kind",
    [
        ("16 bits", (RAMP * 257).astype(np.uint16), "PNG"),
        ("16 bits", (RAMP * 257).astype(np.uint16), "TIFF"),
        ("16 bits, big-endian", (RAMP * 257).astype(">u2"), "TIFF"),
        ("16 in 32 bits", (RAMP * 257).astype(np.int32), "TIFF"),
        ("8 in 32 bits", RAMP.astype(np.int32), "TIFF"),
        ("32 bits", (RAMP * 2**23).astype(np.int32), "TIFF"),
        ("signed", (RAMP * 100 - 9000).astype(np.int32), "TIFF"),
        ("0 to 1", (RAMP / 255).astype(np.float32), "TIFF"),
        ("0 to 255", RAMP.astype(np.float32), "TIFF"),
        ("0 to 65535", (RAMP * 257).astype(np.float32), "TIFF"),
        ("any floats", (RAMP * 1e6 - 7).astype(np.float32), "TIFF"),
    ],
)
def test_grey_of_more_than_8_bits(name, array, kind):
    seen = np.asarray(data.open_image(encoded(Image.fromarray(array), kind), name))
    assert seen.shape == (64, 256, 3) and (seen == RAMP[..., None]).all()


def test_grey_that_is_dark_or_flat_or_has_holes():
    def seen(array, kind):
        return np.asarray(data.open_image(encoded(Image.fromarray(array), kind), "x"))[..., 0]

    assert (seen(np.full((64, 64), 32768, np.uint16), "PNG") == 128).all()
    assert (seen((RAMP * 16).astype(np.uint16), "PNG") == np.rint(RAMP * 16 / 257)).all()
    assert (seen(np.zeros((64, 64), np.float32), "TIFF") == 0).all()
    holes = (RAMP / 255).astype(np.float32)
    holes[0, :3] = np.nan, np.inf, -np.inf
    assert (seen(holes, "TIFF")[1:] == RAMP[1:]).all() and (seen(holes, "TIFF")[0, :3] == 0).all()
    assert (seen(np.full((64, 64), -5, np.int32), "TIFF") == 0).all()


def test_strips(tmp_path):
    """Qwen's image processors refuse a side of more than 200 times the other, after our scaling."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor, rng, refused = Qwen2VLImageProcessorPil(), np.random.default_rng(0), 0
    sizes = [(19990, 100), (100, 19990), (19900, 100), (1, 199), (2, 400), (150, 1)]
    sizes += [(int(short * ratio), int(short)) for short, ratio in
              zip(rng.integers(1, 60, 100), rng.uniform(150, 205, 100), strict=True)]
    for size in sizes:
        try:
            fitted = data.fit_image(data.open_image(encoded(Image.new("1", size), "PNG"), "x"))
            processor.get_number_of_image_patches(fitted.height, fitted.width)
        except ValueError as error:
            assert "too long a strip" in str(error)
            refused += 1
    assert 10 < refused < 90
    with pytest.raises(ValueError, match="19990 x 100 pixels are too long a strip"):
        data.open_image(encoded(Image.new("1", (19990, 100)), "PNG"), "x")


def test_huge_pictures_are_refused_by_their_header_and_large_ones_take_turns(tmp_path, monkeypatch):
    huge = encoded(Image.new("1", (13000, 13000)), "PNG")
    row = {"query": "q", "answer": "1"}
    (tmp_path / "rows.jsonl").write_text("\n".join(
        json.dumps(row | {"query": f"q{i}", "image": f"{i}.png"}) for i in range(9)))
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(huge)
    Image.new("RGB", (64, 64)).save(tmp_path / "8.png")
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        tracemalloc.start()
        rows, rejected = read_rows(tmp_path / "rows.jsonl")
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()
    assert not said and len(rows) == 1
    assert {item.reason.partition(".png: ")[2] for item in rejected} == {
        "13000 x 13000 pixels are more than 67 million"}

    at_once, most = [], []

    def slow(picture):
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.02)
        at_once.pop()
        return picture.convert("RGB")

    monkeypatch.setattr(data, "_rgb", slow)
    rows, _ = read_rows(write_rows(tmp_path, 8))
    assert len(rows) == 8 and max(most) > 1
    monkeypatch.setattr(data, "LARGE", 100)
    most.clear()
    rows, _ = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 8 and max(most) == 1


# Rows that are too long


@dataclass
class Limits:
    prompt: str = "query"
    max_prompt: int = 60
    max_length: int = 4096
    max_new_tokens: int = 56
    max_pixels: int = data.MAX_PIXELS


def test_usable_rows(base, tmp_path, capsys):
    """A broken picture, a long question, a long target, an answer that cannot be read go, with the
    reason, once; the length is that of the real prompt."""
    processor, limits = qwen.Processor(base), Limits()
    good, broken, long, holder, target = arrows.dataset(5, 0, targets=True)
    broken.images, broken.sizes, long.query = [b"broken"], [], "from a1 go 6 " * 30
    holder.query, target.target = "from <|image_pad|> a2", "from " * 5000
    bad = data.Rejected("x:1", "x:1", "broken JSON line: 1")
    for _ in range(2):
        rejections = Rejections(tmp_path)
        rows = [broken, good, long, holder, target]
        assert usable(rows, [bad], processor, limits, rejections) == [good]
    written = lines(tmp_path / "rejected.jsonl")
    assert [line["id"] for line in written] == ["x:1", broken.id, long.id, holder.id, target.id]
    assert [line["reason"].partition(":")[0] for line in written] == [
        "broken JSON line", "corrupt image", "too long", "2 pictures, but the prompt holds"
    ][:3] + [written[3]["reason"].partition(":")[0], "too long"]
    assert "place holders" in written[3]["reason"] and "--max_length" in written[4]["reason"]
    assert capsys.readouterr().out.count("set aside in") == 5
    with pytest.raises(ValueError, match=r"none of 1 rows can be used; .*rejected.jsonl says why"):
        usable([broken], [], processor, limits, rejections)


@pytest.mark.parametrize("max_pixels", [data.MIN_PIXELS, 20_000, data.MAX_PIXELS])
def test_lengths_without_decoding(base, tmp_path, max_pixels, monkeypatch):
    """What `usable` counts from sizes is what the processor makes of the pictures."""
    processor, rng = qwen.Processor(base), np.random.default_rng(max_pixels)
    drawn = [tuple(rng.integers(9, 700, 2))]
    for sizes in ([(64, 64)], [(300, 200), (31, 47)], [(999, 10)], drawn):
        pictures = [Image.new("RGB", tuple(map(int, size))) for size in sizes]
        row = Row("i", "from a1 go 6 ?", [encoded(p, "PNG") for p in pictures], "a1",
                  sizes=[p.size for p in pictures])
        real = len(processor.prompt(
            [data.fit_image(p, max_pixels=max_pixels) for p in pictures], row.query).ids)
        with monkeypatch.context() as patch:
            patch.setattr(data, "open_image", pytest.fail)
            kept = usable([row], [], processor, Limits(max_prompt=real, max_pixels=max_pixels),
                          Rejections(tmp_path))
            assert kept == [row]
            with pytest.raises(ValueError, match="none of 1 rows"):
                usable([row], [], processor, Limits(max_prompt=real - 1, max_pixels=max_pixels),
                       Rejections(tmp_path))


def test_one_rank_writes_rejections(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    other = Rejections(tmp_path)
    other.add(Row("i", "q", [], "1", source="r:1"), "why")
    assert other.seen == {"i": "why"} and not (tmp_path / "rejected.jsonl").exists()
    monkeypatch.setenv("RANK", "0")
    Rejections(tmp_path).add(Row("i", "q", [], "1", source="r:1"), "why\n\x1b[31m")
    assert [line["reason"] for line in lines(tmp_path / "rejected.jsonl")] == [r"why \x1b[31m"]
