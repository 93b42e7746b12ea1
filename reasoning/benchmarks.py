r"""Benchmarks for SRPO-MLLM (arXiv 2506.01713): MathVista, MathVerse, MathVision, MMMU-Pro.

    python eval.py reasoning --model Qwen/Qwen2.5-VL-7B-Instruct --prompt untagged \
        --benchmark mathvision --data MathVision/ --out out/base

1. `BENCHMARKS`: the published files, in a folder (hub snapshot or GitHub clone) or from the hub,
   and how their rows are read.
2. `evaluate` asks each question once, greedily, and saves every response as it comes.
3. `is_right` scores by rule, and what cannot be read is wrong: the benchmarks' own scorers have a
   language model judge, take the nearest option or draw a letter, so ours may read lower.

Left out: the paper's other benchmarks, and MathVerse's Text Only version, which has no image and no
part in its overall score. File names and columns follow the dataset cards and the benchmarks' code.
Not verified: MathVision's card (its columns are from code that reads it), and where MathVerse's
images.zip puts its folders (see `decode`).
"""
import argparse
import ast
import json
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from tqdm import tqdm

from plumbing.files import Journal, read_json, write_json
from plumbing.flags import add_flags
from plumbing.plots import wilson
from reasoning import rows
from reasoning.answers import LETTERS, default_verify, extract, option_letter, quantity, tidy
from reasoning.flags import EngineSettings, check_engine

# Those of training, and one for models that know no tags
FORMS = rows.PROMPTS | {"untagged": lambda query: f"{query}\n\nThink step by step, then give the "
                                                  r"final answer in \boxed{}."}
KINDS = {"choice": "The answer is the letter of the right option.",
         "integer": "The answer is an integer.",
         "float": "The answer is a number, to {} decimal place(s).",
         "list": "The answer is a list, such as [1, 2].",
         "expression": "The answer is a number or an expression."}
# The paper's accuracies in percent, on whole sets. Its prompts, its scoring and whether its
# MathVision is the whole test set are not verified.
MODELS = "Qwen2.5-VL-7B", "SRPO-7B", "Qwen2.5-VL-32B", "SRPO-32B"
PAPER = {"mathvista": (68.2, 75.8, 74.7, 78.5), "mathverse": (46.3, 55.8, 48.5, 58.9),
         "mathvision": (25.1, 32.9, 38.4, 39.6), "mmmu-pro": (36.9, 42.3, 49.5, 51.3)}


@dataclass
class Question:
    """answer: of kind "choice" the option's letter. options: their texts from A on, [] if unknown;
    shown: the prompt lists them, else the image does. images: cells as published, parquet's
    {"bytes", "path"} or JSON's path. precision: decimals of a "float". labels: its subsets.
    ValueError if what should be text is none, or its answer cannot be right."""
    id: str
    text: str
    answer: str
    kind: str
    images: list[dict | str | None]
    options: list[str]
    labels: list[str]
    shown: bool = True
    precision: int | None = None
    unit: str = ""

    def __post_init__(self):
        for text in (self.id, self.text, self.answer, self.unit, *self.options, *self.labels):
            if not isinstance(text, str) or rows.SURROGATE.search(text):
                raise ValueError(f"{reprlib.repr(text)} is no text, or holds half a character")
        letters = [*LETTERS[:len(self.options) or 10]]
        if not self.answer.strip() or self.kind == "choice" and self.answer not in letters:
            raise ValueError(f"its answer is {self.answer!r}")


@dataclass
class Outcome:
    """A line of <benchmark>.jsonl. right is None for a row that could not be asked (see error): no
    part of any score. The first answer is read where the prompt asks for two."""
    id: str
    labels: list[str] = field(default_factory=list)
    gold: str = ""
    prompt: str = ""
    response: str = ""
    answer: str | None = None
    right: bool | None = None
    first_answer: str | None = None
    first_right: bool | None = None
    truncated: bool = False
    tokens: int = 0
    error: str = ""


# A benchmark's rows, their answers numbers no more; any error makes a row unusable

def read_mathvista(row: dict) -> Question:
    answer, kind = row["answer"], row["answer_type"]
    options = [*map(rows.in_full, row["choices"] or [])]
    if row["question_type"] == "multi_choice":
        if answer not in options:
            raise ValueError(f"its answer {answer!r} is none of its choices")
        answer, kind = LETTERS[options.index(answer)], "choice"     # published as the option's text
    labels = [f"task: {row['metadata']['task']}",
              *(f"skill: {skill}" for skill in row["metadata"]["skills"])]
    return Question(str(row["pid"]), row["question"], answer, kind if kind in KINDS else
                    "expression", [row.get("decoded_image") or row["image"]], options, labels,
                    precision=None if row["precision"] is None else int(row["precision"]),
                    unit=row["unit"] or "")


def read_mathverse(row: dict) -> Question:
    """Options follow "Choices:" in the text, one a line, "A:40°". Vision Only has no text; there
    question_for_eval, the column for judges, tells the scorer, not the model, the options."""
    stem, shown, _ = row["question"].partition("Choices:")
    _, _, listed = (row.get("question_for_eval") or row["question"]).partition("Choices:")
    found = re.findall(r"^[^\S\n]*\(?([A-J])[^\S\n]*[:.)](.*)", listed, re.MULTILINE)
    options = [option.strip() for _, option in found]
    if "".join(letter for letter, _ in found) != LETTERS[:len(found)] or not all(options):
        options = []
    return Question(str(row["sample_index"]), (stem if options else row["question"]).strip(),
                    row["answer"], "choice" if row["question_type"] == "multi-choice" else
                    "expression", [row["image"]], options,
                    [f"version: {row['problem_version']}",
                     f"subject: {row['metadata']['subject']}"], shown=bool(shown))


def read_mathvision(row: dict) -> Question:
    """One picture holds all that the text calls <image1>, <image2>... Some rows without options
    have a letter as their answer."""
    answer, options = row["answer"], [*map(rows.in_full, row["options"] or [])]
    kind = "choice" if options or answer in [*"ABCDE"] else "expression"
    return Question(str(row["id"]), row["question"], answer, kind,
                    [row.get("decoded_image") or row["image"]], options,
                    [f"level: {row['level']}", f"subject: {row['subject']}"])


def read_mmmu_pro(row: dict) -> Question:
    """options is a Python list as text. Standard: "<image 3>" in question and options is column
    image_3, and columns may have gaps. Vision: a screenshot."""
    options = [str(option) for option in ast.literal_eval(row["options"])]
    id, answer, labels = str(row["id"]), row["answer"], [f"subject: {row['subject']}"]
    if "question" not in row:
        return Question(id, "", answer, "choice", [row["image"]], options, labels, shown=False)
    columns = [i for i in range(1, 8) if row[f"image_{i}"]]
    named = {*map(int, re.findall(r"<image (\d+)>", row["question"] + row["options"]))}
    if missing := named - {*columns}:
        raise ValueError(f"it speaks of <image {min(missing)}>, which is empty")
    renumber = partial(re.sub, r"<image (\d+)>",
                       lambda match: f"<image {columns.index(int(match[1])) + 1}>")
    return Question(id, renumber(row["question"]), answer, "choice",
                    [row[f"image_{i}"] for i in columns], [*map(renumber, options)], labels)


@dataclass
class Benchmark:
    """size: questions of the whole set. hub: dataset id. files: patterns, in the folder or its
    data/; the first found counts."""
    read: Callable[[dict], Question]
    size: int
    hub: str
    files: list[str]


BENCHMARKS = {name: Benchmark(*of) for name, *of in (
    ("mathvista", read_mathvista, 1000, "AI4Math/MathVista",
     ["testmini-*.parquet", "testmini.json"]),
    ("mathverse", read_mathverse, 3940, "AI4Math/MathVerse", ["testmini.parquet", "testmini.json"]),
    ("mathvision", read_mathvision, 3040, "MathLLMs/MathVision", ["test-*.parquet", "test.jsonl"]),
    ("mathvision-testmini", read_mathvision, 304, "MathLLMs/MathVision",
     ["testmini-*.parquet", "testmini.jsonl"]),
    ("mmmu-pro-standard", read_mmmu_pro, 1730, "MMMU/MMMU_Pro",
     ["standard (10 options)/test-*.parquet"]),
    ("mmmu-pro-vision", read_mmmu_pro, 1730, "MMMU/MMMU_Pro", ["vision/test-*.parquet"]))}
HALVES = "mmmu-pro-standard", "mmmu-pro-vision"     # the overall score is their mean
SIZES = {name: benchmark.size for name, benchmark in BENCHMARKS.items()} | {"mmmu-pro": 3460}


def find_files(data: str, benchmark: Benchmark) -> tuple[Path, list[Path]]:
    """The folder `data`, or a download of that hub id; its question files. FileNotFoundError."""
    folder = Path(data)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download
            wanted = [place + benchmark.files[0] for place in ("", "data/")]
            folder = Path(snapshot_download(data, repo_type="dataset", allow_patterns=wanted))
        except Exception as error:      # offline, gated, no such id: each has a class of its own
            raise FileNotFoundError(
                f"{data} is no folder, and the hub does not give it ({type(error).__name__}): "
                f"download {benchmark.hub} and pass its folder as --data") from None
    for pattern in benchmark.files:
        if files := sorted(folder.glob(pattern)) or sorted(folder.glob("data/" + pattern)):
            return folder, files
    raise FileNotFoundError(f"{folder} has no {' or '.join(benchmark.files)}, here or in data/: "
                            f"is it a copy of {benchmark.hub}?")


def read_questions(files: list[Path], benchmark: Benchmark) -> Iterator[Question | Outcome]:
    """Every row's question, or an Outcome, named FILE:ROW, that says what is wrong with the row.
    Raises ValueError for a file that cannot be read."""
    for where, row in (record for file in files for record in records(file)):
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
            yield benchmark.read(row | {"answer": rows.in_full(row["answer"])})
        except KeyError as error:
            yield Outcome(where, error=f"it has no field {error}")
        except Exception as error:          # no JSON, other types, no Python list, too deep, ..
            yield Outcome(where, error=rows.one_line(error) or type(error).__name__)


def records(file: Path) -> Iterator[tuple[str, dict | bytes]]:
    """("file:row", the row or its line of JSON)."""
    try:
        if file.suffix == ".json":          # a list of rows, or a dict of rows by id
            content = json.loads(file.read_bytes())
            listed = list(content.values() if isinstance(content, dict) else content)
            yield from ((f"{file.name}:{number}", row) for number, row in enumerate(listed, 1))
        else:
            yield from rows.raw_rows(file)
    except (ValueError, TypeError, OSError, RecursionError) as error:
        reason = rows.one_line(error).removeprefix(f"{file} cannot be read: ")
        raise ValueError(f"{file} cannot be read ({reason}): download it again") from None


def decode(cell: dict | str | None, folder: Path, max_pixels: int) -> Image.Image:
    """The RGB image of a cell as training sees it; a path leads there from the folder, its images/,
    data/ or data/images/. Raises ValueError."""
    image, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, cell)
    places = [str(folder / place / str(name)) for place in ("", "images", "data", "data/images")]
    image = image or name and next(filter(os.path.isfile, places), None)
    if not image:
        raise ValueError(f"there is no image {name} in {folder}" if name else "it has no image")
    return rows.fit_image(rows.open_image(image, name or "its image"), max_pixels)


def build_prompt(question: Question, form: str) -> str:
    """The text beside the images; form: a key of FORMS."""
    options = [f"({letter}) {option}" for letter, option in zip(LETTERS, question.options)]
    hidden = "question and its options are" if options and not question.shown else "question is"
    text = question.text or f"The {hidden} in the image."
    unit = f" (Unit: {question.unit})" if question.unit else ""
    query = "\n".join([text + unit, *(options if question.shown else []),
                       KINDS[question.kind].format(question.precision)])
    # Brackets: models have special tokens like <image>
    return FORMS[form](re.sub(r"<image ?(\d+)>", r"[image \1]", query))


# Scoring

def is_right(question: Question, answer: str | None) -> bool:
    """Whether the extracted answer is right; False for whatever cannot be read."""
    if not answer or not answer.strip():
        return False
    if question.kind == "choice":       # two options may have one text
        gold = option_letter(question.answer, question.options)
        return option_letter(answer, question.options) == gold
    if question.kind == "list":
        try:
            given, gold = (ast.literal_eval(text if text.startswith("[") else f"[{text}]")
                           for text in map(tidy, (answer, question.answer)))
            return all(default_verify(str(a), str(b)) for a, b in zip(given, gold, strict=True))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return False
    if question.kind == "float" and question.precision is not None and (read := quantity(answer)):
        # MathVista rounds to the truth's decimals. Its code also truncates for integers; not ours.
        answer = f"{round(float(read[0]), question.precision)} {read[1]}"
    return bool(default_verify(answer, question.answer))


# Running

def ask(batch: list[tuple[Question, list[Image.Image]]], form: str,
        complete: Callable) -> list[Outcome]:
    """Complete a batch and score it. A ValueError of `complete` (a prompt beyond the model's
    context) costs only the question at fault, which counts as wrong and truncated."""
    prompts, fault = [build_prompt(question, form) for question, _ in batch], ""
    try:
        responses = complete([images for _, images in batch], prompts)
    except ValueError as error:
        if len(batch) > 1:
            return [outcome for one in batch for outcome in ask([one], form, complete)]
        responses, fault = [SimpleNamespace(text="", truncated=True, tokens=0)], str(error)
    outcomes, twofold = [], form in ("reflection", "twice")
    for (q, _), prompt, r in zip(batch, prompts, responses, strict=True):
        head, tag, _ = r.text.partition("</answer>")    # a lone answer is both first and final
        answer, first = (extract(text, q.kind == "choice", r.truncated)
                         for text in (r.text, head + tag))
        outcomes.append(Outcome(
            q.id, q.labels, q.answer, prompt, r.text, answer, is_right(q, answer),
            first if twofold else None, is_right(q, first) if twofold else None,
            r.truncated, r.tokens, fault))
    return outcomes


def settings(s) -> dict:
    """What the runs that write one journal have in common."""
    # A model that was trained further under the same name is another model
    saved = [file.stat().st_mtime for file in Path(s.model).glob("*.safetensors")]
    return {"model": s.model, "weights_saved": max(saved, default=None), "dtype": s.dtype,
            "max_new_tokens": s.max_new_tokens, "max_pixels": s.max_pixels,
            "prompt": "plain, tagged" if s.prompt == "plain" else s.prompt,     # it was not before
            **({"engine": s.engine} if s.engine == "vllm" else {})}


def evaluate(name: str, data: str, complete: Callable, s) -> list[Outcome]:
    """Ask a benchmark's first --limit questions and score them. Every outcome goes to
    OUT/<name>.jsonl at once; what is there is not asked again, but for rows with an error.

    complete(images, a list for each prompt; prompts) -> records with text, truncated, tokens. s:
    what `add_arguments` adds. Raises ValueError, FileNotFoundError, RuntimeError."""
    benchmark, asked, waiting = BENCHMARKS[name], [], []
    folder, files = find_files(data, benchmark)
    if not any(isinstance(item, Question) for item in read_questions(files, benchmark)):
        first = next(read_questions(files, benchmark), Outcome(files[0].name, error="it is empty"))
        raise ValueError(f"{folder} holds no question: {first.id}: {first.error}; is it a copy of "
                         f"{benchmark.hub}?")
    journal = Journal(Path(s.out) / f"{name}.jsonl", settings(s) | {"data": data},
                      keep=lambda row: row.keys() == vars(Outcome("")).keys() and not row["error"])
    done = {row["id"]: Outcome(**row) for row in journal.rows}

    def save(outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            done[outcome.id] = outcome
            journal.add(asdict(outcome))

    items = islice(read_questions(files, benchmark), s.limit)
    for item in tqdm(items, name, min(s.limit or benchmark.size, benchmark.size), unit="question"):
        asked.append(item.id)
        if isinstance(item, Outcome):
            save([item])
        elif item.id not in done:
            try:
                waiting.append((item, [decode(cell, folder, s.max_pixels) for cell in item.images]))
            except ValueError as error:
                save([Outcome(item.id, error=rows.one_line(error))])
        if len(waiting) == s.batch:
            save(ask(waiting, s.prompt, complete))
            waiting = []
    save(ask(waiting, s.prompt, complete) if waiting else [])
    journal.close()
    if all(done[id].error for id in asked):
        raise RuntimeError(f"{name}: none of its {len(asked)} rows can be asked; {asked[0]}: "
                           f"{done[asked[0]].error}")
    return [done[id] for id in dict.fromkeys(asked)]


# Results

def summarise(name: str, outcomes: list[Outcome]) -> dict:
    """Accuracy, overall and per label, with 95% intervals. Rows that could not be asked are counted
    apart; the paper's figures are given only beside the whole benchmark."""
    def score(chosen: list[Outcome]) -> dict:
        result = {"questions": len(chosen)}
        for key in ("right", "first_right"):
            if getattr(chosen[0], key) is not None:
                n = sum(getattr(outcome, key) for outcome in chosen)
                result[key] = {"accuracy": n / len(chosen), "interval": wilson(n, len(chosen))}
        return result

    scored = [o for o in outcomes if o.right is not None]
    labels = sorted({label for o in scored for label in o.labels})
    return {"all": score(scored),
            "subsets": {label: score([o for o in scored if label in o.labels]) for label in labels},
            "truncated": sum(o.truncated for o in scored),
            "without_answer": sum(o.answer is None for o in scored),
            "unread": [o.id for o in outcomes if o.right is None],
            "paper": dict(zip(MODELS, PAPER.get(name, ()))) if len(scored) == SIZES[name] else {}}


def table(results: dict[str, dict]) -> str:
    """{benchmark: result of `summarise`} -> an aligned text table, with the paper's figures."""
    width = max(32, *(len(label) + 2 for r in results.values() for label in r["subsets"]))

    def line(title: str, r: dict) -> str:
        return f"{title:{width}} {r['questions']:9}" + "".join(
            "  {:6.1%} [{:6.1%}, {:6.1%}]".format(r[key]["accuracy"], *r[key]["interval"])
            for key in ("right", "first_right") if key in r)

    first = any("first_right" in r["all"] for r in results.values())
    lines = [f"{'':{width}} questions  {'final answer':24}" + "  first answer" * first]
    for name, r in results.items():
        lines += [line(name, r["all"]),
                  *(line("  " + label, part) for label, part in r["subsets"].items()),
                  *(f"{'  the paper reports, ' + model:{width + 10}}  {percent:5.1f}%"
                    for model, percent in r["paper"].items()),
                  f"  {r['truncated']} truncated; "
                  f"{r['without_answer']} without an answer, which is wrong"]
        if n := len(r["unread"]):
            lines.append(f"  {n} rows could not be asked and do not count: "
                         + ", ".join(r["unread"][:5] + ["..."] * (n > 5)))
    return "\n".join(lines)


# Command line

def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="folder of a vision-language model, or hub id")
    add("--benchmark", nargs="+", required=True, choices=BENCHMARKS)
    add("--data", nargs="+", help="folder or hub id of each --benchmark, in the same order "
                                  "(default: from the hub)")
    add("--out", required=True, help="folder for <benchmark>.jsonl and result.json; the same "
                                     "command resumes")
    add("--prompt", default="reflection", choices=FORMS, help="untagged: knows no tags")
    add("--limit", type=int, help="only the first N questions of each benchmark")
    add("--batch", type=int, default=8)
    add("--max-new-tokens", type=int, default=2048)
    add("--max-pixels", type=int, default=rows.MAX_PIXELS,
        help="larger images are scaled down to this area, as in training")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--device", default="", help="default: cuda where there is one")
    add_flags(parser, EngineSettings, engine_memory=0.9)


def run(s: argparse.Namespace) -> int:
    """`eval.py reasoning`. Returns the exit code."""
    data = s.data or [BENCHMARKS[name].hub for name in s.benchmark]
    if len(data) != len(s.benchmark):
        raise ValueError(f"--data names {len(data)} folders for {len(s.benchmark)} benchmarks: "
                         "give one for each, in the same order")
    if min(s.batch, s.max_new_tokens, s.max_pixels, 1 if s.limit is None else s.limit) < 1:
        raise ValueError("--batch, --max-new-tokens, --max-pixels and --limit must be at least 1")
    check_engine(s)
    out, outcomes, results = Path(s.out), {}, {}
    path = out / "result.json"
    others = read_json(path) if path.exists() else {}
    from reasoning.engine import completer
    complete = completer(s, s.device)
    try:
        for name, source in zip(s.benchmark, data):
            outcomes[name] = evaluate(name, source, complete, s)
            results[name] = summarise(name, outcomes[name])
            if outcomes.keys() >= {*HALVES}:
                results["mmmu-pro"] = summarise("mmmu-pro", sum(map(outcomes.get, HALVES), []))
            asked = {"settings": settings(s) | {"limit": s.limit}}
            write_json(path, others | {name: asked | r for name, r in results.items()})
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was answered is in {out}: the same command goes on from there",
              file=sys.stderr)
        return 130
    print(f"\n{s.model}, {s.prompt} prompt, greedy; accuracy with 95% Wilson intervals\n"
          + table(results))
    print(f"wrote {path}, {', '.join(f'{out}/{name}.jsonl' for name in outcomes)}")
    return 0
