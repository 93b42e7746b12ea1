"""reasoning/rows.py: rows and images that are good, and those that are not."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reasoning import rows as data
from tests.conftest import needs, write_rows
from reasoning.rows import Row, read_rows

ROOT = Path(__file__).parents[2]


def test_good_and_bad_rows(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.jpg")
    Image.new("RGB", (400, 2)).save(tmp_path / "strip.png")
    picture = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(picture[:len(picture) // 2])
    (tmp_path / "text.png").write_text("no picture")
    good = {"query": "q", "image": "a.png", "answer": "7"}
    records = [
        good, good | {"answer": 7.5, "content": "worked"}, good | {"image": ["a.png", "b.jpg"]}, good | {"query": "<image>\nHow many?"},
        '{"query": "q", "image"', "[1]", b'\xff{"query"}', good | {"query": "<image> "}, good | {"answer": float("nan")}, good | {"answer": True},
        good | {"answer": " "}, {"query": "q", "answer": "7"}, good | {"image": []}, good | {"image": ["a.png", ""]},
        good | {"image": "none.png"}, good | {"image": "cut.jpg"}, good | {"image": "text.png"}, good | {"image": "strip.png"},
        good | {"image": "a\0.png"}, good, good | {"query": "\ud800"}]
    raw = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join(raw[:4]) + b"\n\n" + b"\n".join(raw[4:]))   # a byte order mark, a blank line
    rows, rejected = read_rows(file)
    assert [(r.source, r.query, len(r.images), r.answer, r.content) for r in rows] == [
        ("rows.jsonl:1", "q", 1, "7", None), ("rows.jsonl:2", "q", 1, "7.5", "worked"), ("rows.jsonl:3", "q", 2, "7", None),
        ("rows.jsonl:4", "How many?", 1, "7", None)]
    reasons = {item.source.removeprefix("rows.jsonl:"): item.reason for item in rejected}
    expected = {
        "6": "broken JSON line: ", "7": "broken JSON line: an object is needed, not list", "8": "broken JSON line: ",
        "9": "empty question: `query` is ''", "10": "no answer: `answer` is None", "11": "no answer: `answer` is True",
        "12": "no answer: `answer` is ' '", "13": "no image: `image` is None; the row's columns are query, answer", "14": "no image: ",
        "15": "no image: ", "16": f"missing image: {tmp_path}/none.png", "17": f"corrupt image: {tmp_path}/cut.jpg: ",
        "18": f"corrupt image: {tmp_path}/text.png: ", "19": f"corrupt image: {tmp_path}/strip.png: 400 x 2", "20": "corrupt image: ",
        "21": "duplicate: the same as rows.jsonl:1", "22": "'utf-8' codec can't encode"}
    assert set(reasons) == set(expected)
    for line, reason in expected.items():
        assert reasons[line].startswith(reason) and "\n" not in reasons[line], line


def test_ids_follow_the_content_not_the_place(tmp_path):
    first, _ = read_rows(write_rows(tmp_path, 3))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.jsonl").write_text("\n".join(reversed((tmp_path / "rows.jsonl").read_text().splitlines())))
    again, _ = read_rows(tmp_path / "sub" / "other.jsonl", tmp_path)
    assert [row.id for row in again] == [row.id for row in first][::-1] and len({row.id for row in first}) == 3
    assert [data.load_image(row).getpixel((0, 0))[0] for row in again] == [2, 1, 0]
    with pytest.raises(ValueError, match=r"rows.jsonl: no good row; rows.jsonl:1: empty question: `problem` is None; the "
                                         "row's columns are query, image, answer"):
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
    assert [load(clear, "clear.png").getpixel(xy) for xy in ((0, 0), (1, 1))] == [(0, 0, 0), (255, 255, 255)]
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert load(palette, "palette.png", transparency=1).getpixel((0, 0)) == (255, 255, 255)
    assert load(Image.new("L", (4, 2), 7), "grey.png").getpixel((0, 0)) == (7, 7, 7)
    assert load(Image.new("CMYK", (4, 2)), "cmyk.jpg").size == (4, 2)
    exif = Image.Exif()
    exif[0x0112] = 6   # turn by 90 degrees
    assert load(Image.new("RGB", (8, 4)), "turned.jpg", exif=exif).size == (4, 8)


@pytest.mark.parametrize("size", [(8, 8), (1, 150), (640, 480), (1999, 1003), (5000, 30), (3, 500)])
def test_fit_image(size):
    image = Image.new("RGB", size)
    fitted = data.fit_image(image, 3136, 200_000)
    assert 3136 <= fitted.width * fitted.height <= 200_000
    scale = np.array(fitted.size) / np.array(size)                          # (2,) the same but for whole pixels
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
        table = [{"problem": rows[i].query, "images": [{"bytes": pictures[i], "path": None}], "answer": i} for i in part]
        parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "shards" / f"{name}.parquet")
    broken = [{"problem": "q", "images": [{"bytes": b"no picture", "path": None}], "answer": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(broken), tmp_path / "shards" / "c.parquet")
    read, rejected = read_rows(tmp_path / "shards", columns={"query": "problem", "image": "images"})
    assert [r.source for r in read] == ["a.parquet:1", "a.parquet:2", "a.parquet:3", "b.parquet:1", "b.parquet:2"]
    for a, b in zip(rows, read, strict=True):
        assert (a.query, a.answer) == (b.query, b.answer) and data.load_image(a).tobytes() == data.load_image(b).tobytes()
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
    table = [{"query": f"Row {i}", "image": {"bytes": pictures[i], "path": f"{i}.png"}, "answer": str(i)} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "rows.parquet")
    features = datasets.Features({"query": datasets.Value("string"), "image": datasets.Image(), "answer": datasets.Value("string")})
    dataset = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", features=features,
                                    cache_dir=str(tmp_path / "cache"))
    assert isinstance(dataset[0]["image"], Image.Image)                     # what reading it without care would decode
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or dataset)   # the download alone
    rows, _ = read_rows("some/where:test")
    assert asked == [("some/where", "test")] and [row.images for row in rows] == [[picture] for picture in pictures]


def test_no_datasets_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="^there is no file some/where; to read it as a dataset of the hub: pip install datasets$"):
        read_rows("some/where")


def test_check(tmp_path):
    write_rows(tmp_path, 2)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"query": "q", "image": "none.png", "answer": 1}\n')
    check = [sys.executable, "-m", "reasoning.rows", "check"]
    done = subprocess.run([*check, tmp_path / "rows.jsonl", "--images", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"rows.jsonl:3: missing image: {tmp_path}/none.png\n2 of 3 rows are good\n"
    done = subprocess.run([*check, tmp_path / "rows.jsonl", "--columns", "query=problem"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert "error: " in done.stderr and "`problem` is None; the row's columns are query, image, answer" in done.stderr
