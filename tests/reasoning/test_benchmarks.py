"""reasoning/benchmarks.py on small files of the published schemas (real parquet, real PNG bytes)
and a scripted model."""
import argparse
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from reasoning import benchmarks, qwen
from reasoning import rows as data
from reasoning.answers import extract
from reasoning.benchmarks import BENCHMARKS, Outcome, Question, is_right
from reasoning.rows import MAX_PIXELS
from tests.conftest import lines

ROOT = Path(__file__).parents[2]


def png(color=(200, 30, 30), size=(8, 6)) -> bytes:
    return encoded(Image.new("RGB", size, color))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def cell(content: bytes | None = None, path: str | None = None) -> dict:
    return {"bytes": content, "path": path}


# The columns of the dataset cards; images are what `datasets` stores for an Image feature
IMAGE = {"bytes": "binary", "path": "string"}


def texts(names: str) -> dict:
    return dict.fromkeys(names.split(), "string")


MATHVISTA = texts("pid question image unit answer question_type answer_type query") | {
    "decoded_image": IMAGE, "choices": ["string"], "precision": "float64",
    "metadata": texts("category context grade language source split task") | {
        "img_height": "int64", "img_width": "int64", "skills": ["string"]}}
MATHVERSE = texts("sample_index problem_index problem_version question answer question_type "
                  "query_wo query_cot question_for_eval") | {
    "image": IMAGE, "metadata": texts("split source subject subfield")}
MATHVISION = texts("id question image answer solution subject") | {
    "options": ["string"], "decoded_image": IMAGE, "level": "int64"}
MMMU_STANDARD = texts("id question options explanation img_type answer topic_difficulty "
                      "subject") | {f"image_{i}": IMAGE for i in range(1, 8)}
MMMU_VISION = texts("id options answer subject") | {"image": IMAGE}


def write_parquet(path: Path, columns: dict, rows: list[dict]) -> Path:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    def arrow(kind):
        if isinstance(kind, dict):
            return pa.struct([(name, arrow(inner)) for name, inner in kind.items()])
        return pa.list_(arrow(kind[0])) if isinstance(kind, list) else getattr(pa, kind)()
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, arrow(kind)) for name, kind in columns.items()])
    table = pa.Table.from_pylist(rows, schema=schema)
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def vista(pid: str, answer, *, choices=None, kind="integer", precision=None, unit=None, image=None,
          task="math word problem", skills=("arithmetic reasoning",)) -> dict:
    return {"pid": pid, "question": f"Question {pid}?", "image": f"images/{pid}.jpg",
            "decoded_image": image or cell(png(), f"{pid}.jpg"), "choices": choices, "unit": unit,
            "precision": precision, "answer": answer,
            "question_type": "multi_choice" if choices else "free_form",
            "answer_type": "text" if choices else kind, "query": "Hint: ...",
            "metadata": {"task": task, "skills": list(skills), "split": "testmini",
                         "img_width": 8, "img_height": 6}}


def verse(index: str, answer, question: str, version="Text Lite", full=None,
          kind="multi-choice") -> dict:
    return {"sample_index": index, "problem_index": "1", "problem_version": version,
            "question": question, "image": cell(png()), "answer": answer, "question_type": kind,
            "question_for_eval": full or question,
            "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry",
                         "subfield": "Angle"}}


def vision(id: str, answer, options=(), question="How many?\n<image1>", level=2) -> dict:
    return {"id": id, "question": question, "options": list(options), "image": f"images/{id}.jpg",
            "decoded_image": cell(png()), "answer": answer, "solution": None, "level": level,
            "subject": "counting"}


def mmmu(id: str, question: str, options: list[str], answer: str, images: dict) -> dict:
    return {"id": id, "question": question, "options": str(options), "answer": answer,
            "subject": "History",
            **{f"image_{i}": cell(images[i]) if i in images else None for i in range(1, 8)}}


def read(name: str, folder: Path) -> list:
    files = benchmarks.find_files(str(folder), BENCHMARKS[name])[1]
    return list(benchmarks.read_questions(files, BENCHMARKS[name]))


def decode(image, folder: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    return benchmarks.decode(image, folder, max_pixels)


# Reading

def test_mathvista(tmp_path):
    write_parquet(tmp_path / "data" / "testmini-00000-of-00001-7256.parquet", MATHVISTA, [
        vista("1", "1.2", kind="float", precision=1.0, unit="cm"),
        vista("2", "145°", choices=["135°", "140°", "145°"]),
        vista("3", "4", task="geometry problem solving",
              skills=["geometry reasoning", "algebraic reasoning"]),
        vista("4", "[0, 8]", kind="list")])
    write_parquet(tmp_path / "data" / "test-00000-of-00002-6b81.parquet", MATHVISTA,
                  [vista("99", "")])            # its answers are not public
    a, b, c, d = read("mathvista", tmp_path)
    assert (a.id, a.text, a.answer, a.kind, a.precision, a.unit, a.options) == (
        "1", "Question 1?", "1.2", "float", 1, "cm", [])
    assert (b.answer, b.kind, b.options) == ("C", "choice", ["135°", "140°", "145°"])
    assert c.labels == ["task: geometry problem solving", "skill: geometry reasoning",
                        "skill: algebraic reasoning"]
    assert (c.kind, d.kind, c.precision) == ("integer", "list", None)
    assert decode(a.images[0], tmp_path).getpixel((0, 0)) == (200, 30, 30)


def test_mathverse(tmp_path):
    text = "In triangle ABC angle A = 80, then angle CED is ()\n" \
           "Choices:\nA:40°\nB:60°\nC:120°\n" \
           "D:140°"
    write_parquet(tmp_path / "testmini.parquet", MATHVERSE, [
        verse("1", "D", text), verse("2", "D", "", "Vision Only", full=text),
        verse("3", "534 \\mathrm{cm}^2", "Find the area.", kind="free-form"),
        verse("4", "B", "Which?\nChoices:\nfirst\nsecond"),
        verse("5", "B", "Which?\nChoices:\n (A) one \n\n B ) two"),
        verse("6", "B", "Which?\nChoices:\nA:\nB:\nC:")])
    a, b, c, d, e, f = read("mathverse", tmp_path)
    assert a.text == "In triangle ABC angle A = 80, then angle CED is ()"
    assert (a.options, a.answer) == (["40°", "60°", "120°", "140°"], "D")
    assert (a.kind, a.shown) == ("choice", True)
    # Known to the scorer, not shown to the model
    assert (b.text, b.options, b.shown) == ("", a.options, False)
    assert a.labels == ["version: Text Lite", "subject: Plane Geometry"]
    assert b.labels[0] == "version: Vision Only"
    assert (c.kind, c.options, c.shown) == ("expression", [], False)
    # Options of no known form stay in the text
    assert (d.text, d.options, d.kind) == ("Which?\nChoices:\nfirst\nsecond", [], "choice")
    assert (e.text, e.options) == ("Which?", ["one", "two"])
    assert f.options == [] and not is_right(f, "A") and is_right(f, "B")


@pytest.mark.parametrize("line", [" " * 200_000, "A" + " " * 200_000, "A:" + " " * 200_000 + "x",
                                  "\n" * 200_000, "A:\n" * 100_000])
def test_option_lines_are_read_in_linear_time(line):
    began = time.process_time()
    BENCHMARKS["mathverse"].read(verse("1", "A", f"Which?\nChoices:\n{line}"))
    assert time.process_time() - began < 1


def test_mathvision(tmp_path):
    rows = [vision("4", "6"), vision("39", "A", ["red", "blue"]), vision("59", "C")]
    write_parquet(tmp_path / "data" / "test-00000-of-00001-3532.parquet", MATHVISION, rows)
    write_parquet(tmp_path / "data" / "testmini-00000-of-00001-f8ff.parquet", MATHVISION, rows[:1])
    a, b, c = read("mathvision", tmp_path)
    assert [(q.kind, q.options, q.answer) for q in (a, b, c)] == [
        ("expression", [], "6"), ("choice", ["red", "blue"], "A"), ("choice", [], "C")]
    assert a.labels == ["level: 2", "subject: counting"]
    assert [q.id for q in read("mathvision-testmini", tmp_path)] == ["4"]


def test_mmmu_pro(tmp_path):
    options = [f"option {i}" for i in range(9)] + ["<image 4>"]
    rows = [mmmu("test_History_1", "Compare <image 1> and <image 3>.", options, "J",
                 {i: png((i, 0, 0)) for i in (1, 3, 4)}),
            mmmu("test_History_2", "See <image 2>.", ["x", "y"], "A", {1: png()})]
    for part, row in enumerate(rows):
        write_parquet(tmp_path / "standard (10 options)" / f"test-0000{part}-of-00002.parquet",
                      MMMU_STANDARD, [row])
    a, b = read("mmmu-pro-standard", tmp_path)
    # The numbers the model sees the images under
    assert a.text == "Compare <image 1> and <image 2>." and a.options[9] == "<image 3>"
    assert [decode(i, tmp_path).getpixel((0, 0))[0] for i in a.images] == [1, 3, 4]
    assert isinstance(b, Outcome) and "<image 2>, which is empty" in b.error
    write_parquet(tmp_path / "vision" / "test-00000-of-00001.parquet", MMMU_VISION, [
        {"id": "test_History_1", "image": cell(png()), "options": str(options[:9]), "answer": "B",
         "subject": "Art"}])
    c, = read("mmmu-pro-vision", tmp_path)
    assert (c.text, c.shown, c.answer, len(c.options), c.labels) == (
        "", False, "B", 9, ["subject: Art"])


def test_json_layouts(tmp_path):
    """As the GitHub repositories have them: images beside, paths relative to one of several
    folders."""
    for place, name in (("vista/data/images", "1.jpg"),
                        ("verse/images/images_version_6", "image_1.png"),
                        ("vision/images", "4.jpg")):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (4, 4), (9, 9, 200)).save(tmp_path / place / name)
    row = {**vista("1", "4"), "precision": 1}
    row.pop("decoded_image")
    (tmp_path / "vista/data/testmini.json").write_text(json.dumps({"1": row}))
    row = verse("5", "14", "", "Vision Only", kind="free-form")
    row["image"] = "images_version_6/image_1.png"
    row.pop("question_for_eval")
    (tmp_path / "verse/testmini.json").write_text(json.dumps([row]))
    row = vision("4", "6", question="One\u2028line")
    row.pop("decoded_image")
    (tmp_path / "vision/data").mkdir()
    text = json.dumps(row, ensure_ascii=False) + "\n"
    (tmp_path / "vision/data/test.jsonl").write_text(text, "utf-8")
    for name, folder in (("mathvista", "vista"), ("mathverse", "verse"), ("mathvision", "vision")):
        question, = read(name, tmp_path / folder)
        assert isinstance(question, Question), question
        assert decode(question.images[0], tmp_path / folder).getpixel((0, 0))[2] > 150


def test_numbers_as_answers(tmp_path):
    """Of JSON and of parquet, as text without exponent; 0 is an answer too."""
    rows = [vision(str(x), x) | {"decoded_image": None} for x in (0, 0.0, 1e-05, 1e16, -2.5)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [q.answer for q in read("mathvision", tmp_path)] == [
        "0", "0.0", "0.00001", "10000000000000000", "-2.5"]
    versed = [verse("1", 0, "How many?", kind="free-form") | {"image": "1.png"}]
    (tmp_path / "testmini.json").write_text(json.dumps(versed))
    assert read("mathverse", tmp_path)[0].answer == "0"
    (tmp_path / "testmini.json").write_text(json.dumps([
        vista("1", 0) | {"decoded_image": None}, vista("2", None) | {"decoded_image": None}]))
    zero, none = read("mathvista", tmp_path)
    assert zero.answer == "0" and "None is no text" in none.error
    (tmp_path / "testmini.json").write_text(json.dumps([vista("3", 1e-05, choices=[2, 1e-05])
                                                        | {"decoded_image": None}]))
    assert [(q.answer, q.options) for q in read("mathvista", tmp_path)] == [
        ("B", ["2", "0.00001"])]
    (tmp_path / "parquet").mkdir()
    for kind in ("float64", "float32"):
        write_parquet(tmp_path / "parquet" / "test-0.parquet", MATHVISION | {"answer": kind},
                      [vision("1", 1e-05), vision("2", 1e16), vision("3", 0.1), vision("4", 0.0)])
        assert [q.answer for q in read("mathvision", tmp_path / "parquet")] == [
            "0.00001", "10000000000000000", "0.1", "0.0"]


# Prompts

def test_images_are_those_of_training(tmp_path):
    """White where they are transparent, upright, within the pixel budget; grey of 16 bits and of
    floats in as many levels as there are."""
    clear, turned = Image.new("RGBA", (8, 6), (0, 0, 0, 0)), Image.new("RGB", (80, 40))
    clear.save(tmp_path / "clear.png")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert decode("clear.png", tmp_path).getpixel((0, 0)) == (255, 255, 255)
    picture = decode("turned.jpg", tmp_path)
    assert picture.width * 2 == pytest.approx(picture.height, abs=2)
    small = decode(cell(png(size=(900, 600))), tmp_path, max_pixels=60_000)
    assert small.size == (300, 200) and small.mode == "RGB"
    ramp = np.arange(65536).reshape(256, 256)
    for pixels, kind in ((ramp.astype(np.uint16), "PNG"), (ramp.astype(np.float32), "TIFF"),
                         (ramp.astype(np.int32), "TIFF")):
        grey = np.asarray(decode(cell(encoded(Image.fromarray(pixels), kind)), tmp_path))
        assert len(np.unique(grey)) == 256 and grey[128, 0].tolist() == [128] * 3


def question(kind="choice", answer="B", options=("40°", "60°"), **other) -> Question:
    given = {"id": "1", "text": "How big?", "answer": answer, "kind": kind, "images": [],
             "options": list(options), "labels": []}
    return Question(**given | other)


def test_prompts():
    ten = question(options=[f"{i} apples" for i in range(10)], text="See <image 1> and <image2>.")
    asked = benchmarks.build_prompt(ten, "untagged").split("\n")
    assert asked[0] == "See [image 1] and [image 2]."
    assert asked[1] == "(A) 0 apples" and asked[10] == "(J) 9 apples"
    assert "letter" in asked[11] and r"\boxed{}" in asked[-1]
    hidden = benchmarks.build_prompt(question(text="", shown=False), "reflection")
    assert "60°" not in hidden
    assert hidden.startswith("The question and its options are in the image.")
    number = question("float", "1.2", [], precision=1, unit="cm")
    number = benchmarks.build_prompt(number, "untagged")
    assert "How big? (Unit: cm)" in number and "to 1 decimal place" in number
    # The form that the prompt asks for is the form that the reward pays for
    import rewards
    form = "<think>" + benchmarks.FORMS["reflection"]("").partition("<think>")[2]
    assert rewards.reflection_reward(form, "final answer").format == 0.5
    # What training asks for can be asked for in evaluation
    import reflection_srpo
    [field] = [f for f in fields(reflection_srpo.Settings) if f.name == "prompt"]
    for name in field.metadata["choices"]:
        assert benchmarks.FORMS[name]("q") == data.PROMPTS[name]("q")


# Scoring

@pytest.mark.parametrize("kind, gold, right, wrong", [
    ("integer", "1000", ["1000", "1,000", "1000.0", "$1000$", "1000 g", "x = 1000"],
     ["1000.7", "100", "1000 or 2000", "10000", "none", "-1000"]),
    ("float", "1.2", ["1.2", "1.23", "1.16", "1.2 m", "6/5"],
     ["1.26", "1.1", "12", "1.2.3", "about"]),
    ("list", "[0, 8]", ["[0, 8]", "[0,8]", "0, 8", "[0.0, 8]"],
     ["[8, 0]", "[0]", "[0, 8, 9]", "0 8", "[" * 5000, "[0, [8]"]),
    ("expression", "534 \\mathrm{cm}^2",
     ["534", "534 cm^2", "534\\text{ cm}^2", "534 cm²", "534.0"],
     ["534 m^2", "534 cm", "543", "53.4"]),
    ("expression", "61", ["61", "61 apples", "n=61"],
     ["61 or 62", "It is 61, not 62", "sixty-one", "6 1", "3 + 58 is it not"]),
    ("expression", "3/4", ["0.75", "\\frac{3}{4}", "\\dfrac{3}{4}", "3/4"],
     ["0.7", "4/3", "3", "4"]),
    ("expression", "5.5", ["5.5", "5 1/2", "5\\frac{1}{2}", "11/2"],
     ["1 1/2", "1\\frac{1}{2}", "1\\dfrac12", "5 5"]),
    ("expression", "10000", ["10 000", "10,000"], ["10 00", "1 0000", "100 00"]),
    ("expression", "40°", ["40", "40^\\circ", "40 degrees", "∠ABC = 40°"],
     ["40%", "50", "140"]),
    ("expression", "0.00001", ["1e-05", "10^{-5}", "0.00001"], ["1e-5 or 2", "0.0001", "0"]),
    ("expression", "2√{3}", ["2\\sqrt{3}", "2√3", "\\sqrt{12}"],
     ["2\\sqrt{2}", "2", "3", "2 or 3"]),
    ("expression", "y=2x+1", ["y=2x+1", "y = 1 + 2x"], ["y=2x", "y=x+1", "2x+2"])])
def test_is_right(kind, gold, right, wrong):
    q = question(kind, gold, [], precision=1)
    assert [a for a in right if not is_right(q, a)] == []
    assert [a for a in wrong if is_right(q, a)] == []


def test_options_of_one_text_are_both_right():
    q = question(answer="C", options=("40", "60", "40"))
    assert [is_right(q, answer) for answer in ("A", "B", "C", "40", "60")] == [
        True, False, True, True, False]


def test_rounding_is_mathvistas():
    """Against its rule, round(float(answer), precision) == the truth, on numbers made for it."""
    rng = random.Random(0)
    for _ in range(300):
        precision, value = rng.choice([1, 2]), round(rng.uniform(-20, 20), 3)
        gold = str(round(rng.choice([value, value + 0.1, value + 0.01]), precision))
        expected = Fraction(str(round(value, precision))) == Fraction(gold)
        assert is_right(question("float", gold, [], precision=precision), str(value)) == expected


UNREADABLE = ["", " ", "?", "None", "null", "nan", "inf", "\\boxed{", "}{", "\\frac{1}{", "()",
              "$$", "[image 1]", "I cannot see the image.", "\\", "<answer>", "</answer>", "-",
              "°",
              "\\text{}", "=", "x=", "0x1F", "1e400", "9" * 5000, "(" * 3000, "\\sqrt{" * 200,
              "9" * 5000 + " 1/2", "[" + "9" * 5000 + "]"]


@pytest.mark.parametrize("kind, gold, options", [
    ("choice", "B", ("40", "60")), ("choice", "A", ()), ("integer", "3", ()), ("float", "3.0", ()),
    ("list", "[3]", ()), ("expression", "3", ()), ("expression", "x+1", ())])
def test_what_cannot_be_read_is_never_right(kind, gold, options):
    q, rng = question(kind, gold, options, precision=1), random.Random(1)
    noise = ["".join(rng.choice("xyz{}\\()$^_ .,;:") for _ in range(rng.randint(1, 30)))
             for _ in range(20)]
    forms = "{}", "<answer>{}</answer>", "\\boxed{{{}}}", "The answer is {}"
    responses = [form.format(text) for text in UNREADABLE + noise for form in forms]
    answers = {None, *UNREADABLE, *(extract(text, kind == "choice") for text in responses)}
    assert [answer for answer in answers if is_right(q, answer)] == []


# Running

@dataclass
class Completion:
    text: str
    truncated: bool = False
    tokens: int = 5


class Scripted:
    """A `complete` whose answer to the question with text "Question 7?" is script["7"]; counts what
    it was asked."""

    def __init__(self, script: dict, stop_after: int | None = None):
        self.script, self.stop_after, self.asked, self.images = script, stop_after, [], []

    def __call__(self, images, prompts):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        ids = [re.match(r"Question (\w+)\?", prompt)[1] for prompt in prompts]
        if any(self.script[id] == "too long" for id in ids):
            raise ValueError("prompt of 5000 tokens is longer than the context of 4096")
        self.asked += ids
        self.images += images
        return [r if isinstance(r, Completion) else Completion(r)
                for r in (self.script[id] for id in ids)]


def evaluate(name: str, data, out: Path, complete, **changes) -> list[Outcome]:
    parser = argparse.ArgumentParser()
    benchmarks.add_arguments(parser)
    s = parser.parse_args(["--model", "m", "--benchmark", name, "--out", str(out)])
    s.max_new_tokens = 64
    return benchmarks.evaluate(name, str(data), complete,
                               argparse.Namespace(**vars(s) | changes))


@pytest.fixture
def folder(tmp_path) -> Path:
    rows = [vista("1", "4", task="a"), vista("2", "60°", choices=["40°", "60°"], task="b"),
            vista("3", "4", task="b"),
            vista("4", "1.2", kind="float", precision=1.0, task="a",
                  image=cell(png((0, 0, 9)), "x.png")), vista("5", "7", task="a")]
    write_parquet(tmp_path / "hub/data/testmini-00000-of-00001-7256.parquet", MATHVISTA, rows)
    return tmp_path / "hub"


TWO = ("<think>a</think><answer>${}$</answer><reflection>b</reflection><think>c</think>"
       "<answer>${}$</answer>")
SCRIPT = {"1": TWO.format("\\boxed{4}", "\\boxed{4}"), "2": TWO.format("\\boxed{A}", "\\boxed{B}"),
          "3": TWO.format("\\boxed{4}", "\\boxed{5}"),
          "4": Completion("half a thought, 1.2", truncated=True, tokens=64),
          "5": "<answer>seven</answer>"}


def test_evaluate(tmp_path, folder):
    model = Scripted(SCRIPT)
    outcomes = evaluate("mathvista", folder, tmp_path / "out", model, batch=2)
    assert [(o.id, o.right, o.first_right) for o in outcomes] == [
        ("1", True, True), ("2", True, False), ("3", False, True), ("4", False, False),
        ("5", False, False)]
    assert model.asked == ["1", "2", "3", "4", "5"]
    assert all(image.mode == "RGB" for row in model.images for image in row)
    assert model.images[3][0].getpixel((0, 0)) == (0, 0, 9)
    head, *saved = lines(tmp_path / "out" / "mathvista.jsonl")
    assert head == {"model": "m", "weights_saved": None, "dtype": "bfloat16", "max_new_tokens": 64,
                    "max_pixels": MAX_PIXELS, "prompt": "reflection", "data": str(folder)}
    assert saved == [asdict(o) for o in outcomes]
    assert saved[1] | {"prompt": ""} == {
        "id": "2", "labels": ["task: b", "skill: arithmetic reasoning"], "gold": "B", "prompt": "",
        "response": SCRIPT["2"], "answer": "B", "right": True, "first_answer": "A",
        "first_right": False, "truncated": False, "tokens": 5, "error": ""}
    assert "(B) 60°" in saved[1]["prompt"]
    assert (saved[3]["truncated"], saved[3]["answer"], saved[3]["tokens"]) == (True, None, 64)
    r = benchmarks.summarise("mathvista", outcomes)
    assert r["all"]["questions"] == 5
    assert r["all"]["right"]["accuracy"] == r["all"]["first_right"]["accuracy"] == 0.4
    wilson = binomtest(2, 5).proportion_ci(method="wilson")
    assert r["all"]["right"]["interval"] == pytest.approx(tuple(wilson), abs=1e-4)
    subsets = {k: (s["questions"], s["right"]["accuracy"]) for k, s in r["subsets"].items()}
    assert subsets == {"task: a": (3, pytest.approx(1 / 3)), "task: b": (2, 0.5),
                       "skill: arithmetic reasoning": (5, 0.4)}
    assert (r["truncated"], r["without_answer"], r["unread"], r["paper"]) == (1, 1, [], {})


def test_plain_prompt_has_no_first_answer(tmp_path, folder):
    outcomes = evaluate("mathvista", folder, tmp_path / "out", Scripted(SCRIPT), prompt="plain",
                        limit=2)
    assert len(outcomes) == 2
    assert all(o.first_right is None and o.first_answer is None for o in outcomes)
    assert "first_right" not in benchmarks.summarise("mathvista", outcomes)["all"]
    assert "reflection" not in outcomes[0].prompt


def test_resume_after_an_interruption(tmp_path, folder):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate("mathvista", folder, out, Scripted(SCRIPT, stop_after=2), batch=2)
    log = out / "mathvista.jsonl"
    before = log.read_text()
    assert [row["id"] for row in lines(log)[1:]] == ["1", "2"]
    log.write_text(before + '{"id": "3", "labels": ["ta')          # killed while writing
    model = Scripted(SCRIPT)
    outcomes = evaluate("mathvista", folder, out, model, batch=2)
    assert model.asked == ["3", "4", "5"] and log.read_text().startswith(before)
    whole = evaluate("mathvista", folder, tmp_path / "whole", Scripted(SCRIPT), batch=2)
    assert outcomes == whole
    assert log.read_text() == (tmp_path / "whole" / "mathvista.jsonl").read_text()
    assert evaluate("mathvista", folder, out, None) == whole        # nothing left to ask
    assert evaluate("mathvista", folder, out, None, limit=2) == whole[:2]
    saved = log.read_text()
    for changed, message in ((dict(max_new_tokens=65), "max_new_tokens 64, not 65"),
                             (dict(prompt="plain"), "prompt 'reflection', not 'plain, tagged'")):
        with pytest.raises(ValueError, match=f"mathvista.jsonl was begun with {message}; repeat"):
            evaluate("mathvista", folder, out, None, **changed)
    log.write_text(saved + '{"id": "1"}\n')         # no outcome: asked again, were it not there
    assert evaluate("mathvista", folder, out, None) == whole and log.read_text() == saved
    log.write_text("garbage\n" + saved)
    with pytest.raises(ValueError, match="mathvista.jsonl line 1 is not a row.*delete that line"):
        evaluate("mathvista", folder, out, None)
    assert log.read_text() == "garbage\n" + saved


def test_faulty_rows_are_counted_and_named_and_tried_again(tmp_path):
    (tmp_path / "hub").mkdir()
    file, good = tmp_path / "hub" / "testmini.json", vista("1", "4")
    for id, content in (("1", png()), ("2", png()[:40]), ("3", png())):
        (tmp_path / "hub" / f"{id}.png").write_bytes(content)
    rows = [good | {"image": "1.png"}, vista("2", "4") | {"image": "2.png"},
            vista("3", "9", choices=["1", "2"]) | {"image": "3.png"},
            vista("4", "4") | {"image": "4.png"}, vista("5", "") | {"image": "1.png"},
            {"pid": "6"}, 7]
    for row in rows[:5]:
        row.pop("decoded_image")
    file.write_text(json.dumps(rows))
    model = Scripted({"1": "\\boxed{4}", "4": "\\boxed{4}"})
    outcomes = evaluate("mathvista", tmp_path / "hub", tmp_path / "out", model, batch=3)
    assert model.asked == ["1"] and [o.right for o in outcomes] == [True] + [None] * 6
    errors = {o.id: o.error for o in outcomes[1:]}
    assert list(errors) == ["2", "testmini.json:3", "4", "testmini.json:5", "testmini.json:6",
                            "testmini.json:7"]
    for words, error in zip(("corrupt image", "its answer '9' is none of its choices",
                             "there is no image 4.png", "its answer is ''",
                             "it has no field 'answer'", "'int' object"), errors.values()):
        assert words in error and "\n" not in error
    saved = lines(tmp_path / "out" / "mathvista.jsonl")[1:]
    assert {row["id"] for row in saved} == {o.id for o in outcomes}
    r = benchmarks.summarise("mathvista", outcomes)
    assert r["all"]["questions"] == 1 and r["unread"] == list(errors)
    assert ("6 rows could not be asked and do not count: 2, testmini.json:3, 4, testmini.json:5, "
            "testmini.json:6, ..." in benchmarks.table({"m": r}))
    (tmp_path / "hub" / "4.png").write_bytes(png())     # repaired: the same command asks it now
    again = evaluate("mathvista", tmp_path / "hub", tmp_path / "out", model, batch=3)
    assert model.asked == ["1", "4"]
    assert [o.right for o in again] == [True, None, None, True, None, None, None]
    assert len(lines(tmp_path / "out" / "mathvista.jsonl")) == 8


def test_a_damaged_row_costs_itself_alone(tmp_path):
    """Nothing in a line of JSON, or in a cell of parquet, stops the others."""
    (tmp_path / "images").mkdir()
    for id in ("1", "2"):
        (tmp_path / "images" / f"{id}.jpg").write_bytes(png())
    good = vision("1", "6", question="Question 1?") | {"decoded_image": None}
    damaged = [json.dumps(good)[:50], "[" * 100_000, "7", "[]", '"text"', "null",
               json.dumps(good)[:-1] + ', "level": ' + "[" * 100_000]
    damaged += [json.dumps(good | change) for change in (
        {"question": "half \ud83d"}, {"answer": "\ud83d"}, {"options": ["\ud83d", "b"]},
        {"subject": "\ud83d"}, {"question": 5}, {"question": None}, {"options": 5},
        {"options": [["a"]], "answer": "A"}, {"answer": True}, {"answer": float("nan")},
        {"answer": []}, {"answer": "B", "options": ["a"]})]
    unasked = [json.dumps(good | {"id": f"x{i}"} | change) for i, change in enumerate((
        {"image": "none.jpg"}, {"image": None}, {"image": "n" * 5000}, {"image": "\0"},
        {"image": "\ud83d"}, {"image": ["1.jpg"]}, {"image": 5}, {"image": {"bytes": 5}},
        {"image": {"path": None}}, {"image": "."}))]
    last = json.dumps(good | {"id": "2", "question": "Question 2?"})
    (tmp_path / "test.jsonl").write_text(
        "\n".join([json.dumps(good), *damaged, *unasked, last]) + "\n")
    model = Scripted({"1": "\\boxed{6}", "2": "\\boxed{5}"})
    outcomes = evaluate("mathvision", tmp_path, tmp_path / "out", model)
    assert {o.id: o.right for o in outcomes} == {
        "1": True, **{f"test.jsonl:{i + 2}": None for i in range(len(damaged))},
        **{f"x{i}": None for i in range(len(unasked))}, "2": False}
    assert all(o.error and "\n" not in o.error and len(o.error) < 400 for o in outcomes[1:-1])

    wild = ["[" * 100_000, "-" * 100_000 + "1", "", "f()", "5"]
    write_parquet(tmp_path / "vision" / "test-0.parquet", MMMU_VISION, [
        {"id": str(i), "image": cell(png()), "options": options, "answer": "A", "subject": "Art"}
        for i, options in enumerate([*wild, "['a', 'b']"])])
    *others, good = read("mmmu-pro-vision", tmp_path)
    assert isinstance(good, Question) and len(others) == len(wild)
    assert all(isinstance(other, Outcome) and other.error for other in others)


def test_a_prompt_beyond_the_context_costs_one_question(tmp_path, folder):
    model = Scripted(SCRIPT | {"3": "too long"})
    outcomes = evaluate("mathvista", folder, tmp_path / "out", model, batch=5)
    assert model.asked == ["1", "2", "4", "5"]
    assert [(o.id, o.truncated, o.right, o.first_right) for o in outcomes if o.error] == [
        ("3", True, False, False)]
    assert "longer than the context" in outcomes[2].error
    # It counts, as wrong
    assert benchmarks.summarise("mathvista", outcomes)["all"]["questions"] == 5
    with pytest.raises(RuntimeError, match="^mathvista: none of its 5 rows can be asked; 1: prompt "
                                           "of 5000 tokens"):
        evaluate("mathvista", folder, tmp_path / "other",
                 Scripted(dict.fromkeys(SCRIPT, "too long")))


def test_bad_files(tmp_path, folder, monkeypatch):
    def fails(name, data, error, message):
        with pytest.raises(error, match=message) as caught:
            evaluate(name, data, tmp_path / "out", None)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    fails("mathvista", tmp_path / "empty", FileNotFoundError,
          r"empty has no testmini-\*.parquet or testmini.json, here or in data/: is it a copy of "
          r"AI4Math/MathVista\?$")
    fails("mmmu-pro-vision", folder, FileNotFoundError, r"has no vision/test-\*.parquet")
    (tmp_path / "cut" / "data").mkdir(parents=True)
    content = next(folder.glob("data/*.parquet")).read_bytes()
    cut = tmp_path / "cut" / "data" / "testmini-0.parquet"
    cut.write_bytes(content[:500])
    message = r"testmini-0.parquet cannot be read \([^/]*\): download it again"
    fails("mathvista", tmp_path / "cut", ValueError, message)
    write_parquet(cut, MATHVISTA, [])
    fails("mathvista", tmp_path / "cut", ValueError, "testmini-0.parquet: it is empty")
    (folder / "testmini.parquet").write_bytes(content)      # another benchmark's
    fails("mathverse", folder, ValueError, "hub holds no question: testmini.parquet:1: it has no "
          r"field 'sample_index'; is it a copy of AI4Math/MathVerse\?")
    (tmp_path / "json").mkdir()
    for broken in ('[{"pid": ', "7", "[" * 100_000):
        (tmp_path / "json" / "testmini.json").write_text(broken)
        fails("mathvista", tmp_path / "json", ValueError, r"testmini.json cannot be read \(")

    import huggingface_hub
    asked = {}

    def download(repo, **how):
        asked.update(repo=repo, **how)
        if repo == "AI4Math/MathVista":
            return str(folder)
        raise ConnectionError("a long story")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    got = evaluate("mathvista", "AI4Math/MathVista", tmp_path / "hub-out", Scripted(SCRIPT))
    patterns = ["testmini-*.parquet", "data/testmini-*.parquet"]
    assert len(got) == 5 and asked == {
        "repo": "AI4Math/MathVista", "repo_type": "dataset", "allow_patterns": patterns}
    fails("mathvista", "no/such", FileNotFoundError,
          r"^no/such is no folder, and the hub does not give it \(ConnectionError\): download "
          "AI4Math/MathVista and pass its folder")


# Results

def outcome(right: bool, label: str, first: bool | None = None) -> Outcome:
    return Outcome(str(id(object())), [label], right=right, first_right=first, answer="x")


def test_table_and_the_papers_figures():
    outcomes = [outcome(i % 4 > 0, "version: Text Lite" if i % 2 else "version: Vision Only",
                        first=i % 3 > 0) for i in range(3940)]
    r = benchmarks.summarise("mathverse", outcomes)
    assert r["paper"] == {"Qwen2.5-VL-7B": 46.3, "SRPO-7B": 55.8, "Qwen2.5-VL-32B": 48.5,
                          "SRPO-32B": 58.9}
    part = benchmarks.summarise("mathverse", outcomes[1:])
    halves = benchmarks.summarise("mmmu-pro-vision", outcomes[:1730])
    assert part["paper"] == {} == halves["paper"]
    assert benchmarks.summarise("mmmu-pro", outcomes[:3460])["paper"]["SRPO-32B"] == 51.3
    text = benchmarks.table({"mathverse": r}).split("\n")
    assert "final answer" in text[0] and "first answer" in text[0]
    cells = {line[:32].strip(): [float(x) for x in re.findall(r"([\d.]+)%", line)]
             for line in text[1:8]}
    assert cells["mathverse"][0] == 75.0 and cells["mathverse"][3] == 66.6
    assert cells["version: Text Lite"][0] == 100
    paper = [line for line in text if "the paper reports" in line]
    assert [re.findall(r"reports, (\S+) +([\d.]+)%", line)[0] for line in paper] == [
        (m, str(p)) for m, p in r["paper"].items()]
    ends = [re.search(r"[\d.]+%", line).end() for line in text[1:8]]
    assert len(set(ends)) == 1                                      # one column of accuracies
    assert "the paper" not in benchmarks.table({"m": part})


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`eval.py reasoning`'s part of this module, with a scripted model in place of a Qwen."""
    loaded, model = [], Scripted(SCRIPT)

    def load_vlm(path, dtype, device):
        loaded.append((path, str(dtype), device))
        return "model", SimpleNamespace(prompt=lambda images, text: (images, text))

    def generate(vlm, processor, prompts, max_new_tokens, temperature):
        assert (vlm, temperature) == ("model", 0.0) and max_new_tokens >= 1
        return model(*zip(*prompts))
    monkeypatch.setattr(qwen, "load_vlm", load_vlm)
    monkeypatch.setattr(qwen, "generate", generate)
    parser = argparse.ArgumentParser()
    benchmarks.add_arguments(parser)

    def call(*arguments) -> int:
        return benchmarks.run(parser.parse_args([
            "--model", "m", "--out", str(tmp_path / "out"), "--device", "cpu",
            *map(str, arguments)]))
    call.model, call.loaded, call.out = model, loaded, tmp_path / "out"
    return call


def test_run(command, folder, capsys):
    assert command("--benchmark", "mathvista", "--data", folder, "--limit", 3,
                   "--max-new-tokens", 64) == 0
    assert command.loaded == [("m", "torch.bfloat16", "cpu")]
    assert command.model.asked == ["1", "2", "3"]
    printed = capsys.readouterr().out
    assert "66.7%" in printed and "the paper" not in printed and "greedy" in printed
    result = json.loads((command.out / "result.json").read_text())["mathvista"]
    assert result["all"]["questions"] == 3 and result["settings"] == {
        "model": "m", "weights_saved": None, "max_new_tokens": 64, "max_pixels": 1280 * 28 * 28,
        "dtype": "bfloat16", "prompt": "reflection", "limit": 3}
    # A larger limit asks the rest
    command("--benchmark", "mathvista", "--data", folder, "--max-new-tokens", 64)
    assert command.model.asked == ["1", "2", "3", "4", "5"]
    with pytest.raises(ValueError, match="max_new_tokens 64, not 65"):
        command("--benchmark", "mathvista", "--data", folder, "--max-new-tokens", 65)


def test_run_mmmu_pro_pools_its_halves(command, tmp_path, monkeypatch):
    row = {"id": "test_Art_1", "image": cell(png()), "options": "['x', 'y']", "answer": "B",
           "subject": "Art"}
    write_parquet(tmp_path / "hub" / "vision" / "test-0.parquet", MMMU_VISION, [row])
    write_parquet(tmp_path / "hub" / "standard (10 options)" / "test-0.parquet", MMMU_STANDARD,
                  [mmmu("test_Art_1", "Question 1? <image 1>", ["x", "y"], "A", {1: png()})])
    monkeypatch.setattr(qwen, "generate",
                        lambda *given: [Completion("\\boxed{B}") for _ in given[2]])
    command.out.mkdir()
    (command.out / "result.json").write_text('{"mathvista": {"kept": true}}')
    command("--benchmark", "mmmu-pro-standard", "mmmu-pro-vision", "--prompt", "plain",
            "--data", tmp_path / "hub", tmp_path / "hub")
    result = json.loads((command.out / "result.json").read_text())
    assert [result[name]["all"]["right"]["accuracy"] for name in (
        "mmmu-pro-standard", "mmmu-pro-vision", "mmmu-pro")] == [0, 1, 0.5]
    assert result["mathvista"] == {"kept": True}        # of an earlier command


def test_run_bad_input(command, folder, capsys):
    for arguments, message in (
            (["mathvista", "mathverse", "--data", folder], "--data names 1 folders for 2 benchm"),
            (["mathvista", "--data", folder, "--limit", 0], "must be at least 1"),
            (["mathvista", "--data", folder, "--batch", 0], "must be at least 1")):
        with pytest.raises(ValueError, match=message):
            command("--benchmark", *arguments)
    with pytest.raises(SystemExit):
        command("--benchmark", "gsm8k")
    assert "invalid choice: 'gsm8k'" in capsys.readouterr().err
    command.model.stop_after = 2
    assert command("--benchmark", "mathvista", "--data", folder, "--batch", 2) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert command.loaded == [("m", "torch.bfloat16", "cpu")]
    assert len(lines(command.out / "mathvista.jsonl")) == 3
    (command.out / "result.json").write_text("{")
    with pytest.raises(ValueError, match="result.json is truncated or corrupt"):
        command("--benchmark", "mathvista", "--data", folder)


@pytest.mark.slow
@pytest.mark.slow
def test_a_real_model_through_the_command_line(folder, tmp_path):
    """eval.py reasoning on a tiny Qwen2.5-VL with random weights: nothing is right, everything is
    saved, and a second call asks nothing."""
    from reasoning import arrows
    torch.manual_seed(1)            # of which depends whether a response ends within 5 tokens
    arrows.tiny_vlm(tmp_path / "model")
    command = [sys.executable, "eval.py", "reasoning", "--model", str(tmp_path / "model"),
               "--benchmark", "mathvista", "--data", str(folder), "--limit", "3",
               "--max-new-tokens", "5", "--dtype", "float32", "--out", str(tmp_path / "out")]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    outcomes = lines(tmp_path / "out" / "mathvista.jsonl")[1:]
    assert [(o["truncated"], o["tokens"], o["right"], o["error"]) for o in outcomes] == [
        (True, 5, False, "")] * 3
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["mathvista"]["all"]["right"]["accuracy"] == 0


def test_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "testmini-0.parquet").write_bytes(b"PAR1")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match="testmini-0.parquet .*: pip install pyarrow"):
        evaluate("mathvista", tmp_path, tmp_path / "out", None)
