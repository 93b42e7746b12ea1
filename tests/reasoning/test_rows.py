"""reasoning/rows.py: rows and pictures that are good, and those that are not."""
import io
import json
import os
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


def test_good_and_bad_rows(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.jpg")
    Image.new("RGB", (400, 2)).save(tmp_path / "strip.png")
    picture = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(picture[:len(picture) // 2])
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
        good | {"answer": "NaN"},
        good | {"answer": "\\boxed{7"}]
    raw = [record if isinstance(record, bytes) else
           (record if isinstance(record, str) else json.dumps(record)).encode()
           for record in records]
    file = tmp_path / "rows.jsonl"              # a byte order mark, a blank line
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join(raw[:4]) + b"\n\n" + b"\n".join(raw[4:]))
    rows, rejected = read_rows(file)
    assert [(r.source, r.query, len(r.images), r.answer, r.content) for r in rows] == [
        ("rows.jsonl:1", "q", 1, "7", None),
        ("rows.jsonl:2", "q", 1, "7.5", "worked"),
        ("rows.jsonl:3", "q", 2, "7", None),
        ("rows.jsonl:4", "How many?", 1, "7", None)]
    expected = {
        6: "broken JSON line: ",
        7: "broken JSON line: an object is needed, not list",
        8: "broken JSON line: ",
        9: "empty question: `query` is ''",
        10: "no answer: `answer` is nan",
        11: "no answer: `answer` is True",
        12: "no answer: `answer` is ' '",
        13: "no image: `image` is None; the row's columns are query, answer",
        14: "no image: ",
        15: "no image: ",
        16: f"missing image: {tmp_path}/none.png",
        17: f"corrupt image: {tmp_path}/cut.jpg: ",
        18: f"corrupt image: {tmp_path}/text.png: ",
        19: f"corrupt image: {tmp_path}/strip.png: 400 x 2",
        20: "corrupt image: ",
        21: "duplicate: the same as rows.jsonl:1",
        22: "half a character: `query` holds '\\ud800' alone",
        23: "unreadable ground truth: 'NaN'",
        24: "unreadable ground truth: '\\\\boxed{7'"}
    assert list(rejected) == [f"rows.jsonl:{line}" for line in expected]
    for line, reason in expected.items():
        said = rejected[f"rows.jsonl:{line}"]
        assert said.startswith(reason) and "\n" not in said, line


def test_ids_follow_the_content_not_the_place(tmp_path):
    first, _ = read_rows(write_rows(tmp_path, 3))
    (tmp_path / "sub").mkdir()
    turned = reversed((tmp_path / "rows.jsonl").read_text().splitlines())
    (tmp_path / "sub" / "other.jsonl").write_text("\n".join(turned))
    again, _ = read_rows(tmp_path / "sub" / "other.jsonl", tmp_path)
    assert [row.id for row in again] == [row.id for row in first][::-1]
    assert len({row.id for row in first}) == 3
    assert [data.load_image(row).getpixel((0, 0))[0] for row in again] == [2, 1, 0]
    why = ("rows.jsonl: no good row; rows.jsonl:1: empty question: `problem` is None; the row's "
           "columns are query, image, answer")
    with pytest.raises(ValueError, match=why):
        read_rows(tmp_path / "rows.jsonl", columns=["query=problem"])
    for pair in ("problem", "question=problem", "query="):
        with pytest.raises(ValueError, match=f"^--columns {pair}: it takes NAME=COLUMN, "):
            read_rows(tmp_path / "rows.jsonl", columns=[pair])
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
    seen = load(clear, "clear.png")
    assert seen.getpixel((0, 0)) == (0, 0, 0) and seen.getpixel((1, 1)) == (255, 255, 255)
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
    fitted = data.fit_image(image, 200_000)
    assert 3136 <= fitted.width * fitted.height <= 200_000
    scale = np.array(fitted.size) / np.array(size)  # (2,) the same but for whole pixels
    assert abs(size[0] * scale[1] - fitted.width) <= scale[1] * size[0] / fitted.height + 1
    assert (fitted is image) == (3136 <= size[0] * size[1] <= 200_000)


@needs("pyarrow")
def test_parquet_holds_what_jsonl_holds(tmp_path):
    import pyarrow
    from pyarrow import parquet

    def write(name: str, rows: list[tuple[str, bytes, int]]) -> None:
        table = [{"problem": query, "images": [{"bytes": picture, "path": None}], "answer": answer}
                 for query, picture, answer in rows]
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / name)

    rows, _ = read_rows(write_rows(tmp_path, 5))
    same = [(row.query, (tmp_path / f"{i}.png").read_bytes(), i) for i, row in enumerate(rows)]
    write("shards/a.parquet", same[:3])
    write("shards/b.parquet", same[3:])
    write("shards/c.parquet", [("q", b"no picture", 1)])
    write("shards/sub/c.parquet", [("q", b"no picture", 1)])
    read, rejected = read_rows(tmp_path / "shards", columns=["query=problem", "image=images"])
    assert [r.source for r in read] == [f"a.parquet:{i}" for i in (1, 2, 3)] + [
        "b.parquet:1", "b.parquet:2"]
    for a, b in zip(rows, read, strict=True):
        assert (a.query, a.answer) == (b.query, b.answer)
        assert data.load_image(a).tobytes() == data.load_image(b).tobytes()
    assert list(rejected) == ["c.parquet:1", "sub/c.parquet:1"]
    for reason in rejected.values():
        assert reason.startswith("corrupt image: image 1: cannot")
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
    table = [{"query": f"Row {i}", "image": {"bytes": picture, "path": f"{i}.png"},
              "answer": str(i)} for i, picture in enumerate(pictures)]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "rows.parquet")
    text = datasets.Value("string")
    features = datasets.Features({"query": text, "image": datasets.Image(), "answer": text})
    dataset = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "rows.parquet"), split="train", features=features,
        cache_dir=str(tmp_path / "cache"))
    assert isinstance(dataset[0]["image"], Image.Image)     # decoded, without care
    asked = []
    monkeypatch.setattr(datasets, "load_dataset",           # the download alone
                        lambda name, split: asked.append((name, split)) or dataset)
    rows, _ = read_rows("some/where:test")
    assert asked == [("some/where", "test")]
    assert [row.images for row in rows] == [[picture] for picture in pictures]


def test_packages_that_not_everyone_has(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_text("")
    for source, why in (("some/where", "no file; to read it as a dataset of the hub: pip install "
                                       "datasets"),
                        (str(tmp_path / "a.parquet"), "parquet: pip install pyarrow")):
        with pytest.raises(RuntimeError, match=f"^{source} is {why}"):
            read_rows(source)


def test_a_missing_picture_and_a_missing_column_are_named(tmp_path):
    path = write_rows(tmp_path, 2)
    with path.open("a") as file:
        file.write('{"query": "q", "image": "none.png", "answer": 1}\n')
    rows, rejected = read_rows(path, tmp_path)
    assert len(rows) == 2
    assert rejected == {"rows.jsonl:3": f"missing image: {tmp_path}/none.png"}
    with pytest.raises(ValueError, match="`problem` is None; the row's columns are query, image, "
                                         "answer$"):
        read_rows(path, columns=["query=problem"])


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
    assert all(reason.isprintable() and len(reason) < 310 for reason in rejected.values())
    return list(rejected.values())


def test_numbers_are_kept_as_they_are_written(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    numbers = ["0.00001", "2.50", "1e16", "1E-7", "-0", "123456789012345678901234567890", "7"]
    refused = ["1" * 401, "1e999", "NaN", "-Infinity", "9" * 5000]
    row = '{"query": "q%d", "image": "a.png", "score": NaN, "answer": %s}'
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(row % pair for pair in enumerate(numbers + refused)))
    rows, rejected = read_rows(tmp_path / "rows.jsonl")
    assert [row.answer for row in rows] == numbers and type(rows[0].answer) is str
    assert [reason.partition(":")[0] for reason in rejected.values()] == ["no answer"] * 5
    assert reasons_of(tmp_path, '"query": 5', '"content": 5', '"target": [1]') == [
        "empty question: `query` is '5'; the row's columns are query, image, answer",
        "no text: `content` is '5'; the row's columns are query, image, answer, content",
        "no text: `target` is ['1']; the row's columns are query, image, answer, target"]


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
        rf"half a character: `{name}` holds '\ud83d' alone" for name in data.COLUMNS]
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


@pytest.mark.parametrize("name, array, kind", [
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
    ("any floats", (RAMP * 1e6 - 7).astype(np.float32), "TIFF")])
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
    assert {reason.partition(".png: ")[2] for reason in rejected.values()} == {
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
    """A long question, one with a place holder, a long target go, with the reason, once; the length
    is that of the real prompt."""
    processor, limits = qwen.Processor(base), Limits()
    good, long, holder, target = arrows.dataset(4, 0, target="teacher")
    long.query = "from a1 to " * 30
    holder.query, target.target = "from <|image_pad|> a2", "from " * 5000
    for _ in range(2):
        rejections, rows = Rejections(tmp_path), [good, long, holder, target]
        bad = {"x:1": "broken JSON line: 1"}
        assert usable(rows, bad, processor, limits, rejections) == [good]
    written = lines(tmp_path / "rejected.jsonl")
    assert [line["id"] for line in written] == ["x:1", long.id, holder.id, target.id]
    assert [line["source"] for line in written] == ["x:1"] + ["arrows"] * 3
    for line, words in zip(written, ("broken JSON line: 1", "too long: a prompt of",
                                     "place holders", "see --max_length"), strict=True):
        assert words in line["reason"] and line["response"] == ""
    assert capsys.readouterr().out.count("set aside in") == 4
    with pytest.raises(ValueError, match=r"none of 1 rows can be used; .*rejected.jsonl says why"):
        usable([long], {}, processor, limits, rejections)


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
            kept = usable([row], {}, processor, Limits(max_prompt=real, max_pixels=max_pixels),
                          Rejections(tmp_path))
            assert kept == [row]
            with pytest.raises(ValueError, match="none of 1 rows"):
                usable([row], {}, processor, Limits(max_prompt=real - 1, max_pixels=max_pixels),
                       Rejections(tmp_path))


def test_one_rank_writes_rejections(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    other = Rejections(tmp_path)
    other.add("i", "r:1", "why")
    assert other.seen == {"i": "why"} and not (tmp_path / "rejected.jsonl").exists()
    monkeypatch.setenv("RANK", "0")
    Rejections(tmp_path).add("i", "r:1", "why\n\x1b[31m", "said")
    [written] = lines(tmp_path / "rejected.jsonl")
    assert written == {"id": "i", "source": "r:1", "reason": r"why \x1b[31m", "response": "said"}
    assert Rejections(tmp_path).seen == {"i": r"why \x1b[31m"}
