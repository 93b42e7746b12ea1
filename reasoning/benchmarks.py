r"""Multimodal reasoning benchmarks for SRPO-MLLM (arXiv 2506.01713): MathVista, MathVerse, MathVision, MMMU-Pro.

    python eval.py reasoning --model out/policy --benchmark mathvista mathverse --out out/reasoning
    python eval.py reasoning --model Qwen/Qwen2.5-VL-7B-Instruct --prompt plain --benchmark mathvision --data MathVision/ --out out/base

Reads the published files from a folder (hub snapshot or GitHub clone) or the hub, asks every question once, greedily, saves each
response as it comes (the same command goes on where it stopped) and scores by rule. What cannot be read is wrong: the benchmarks' own
scorers have a language model extract or judge the answer, take the option nearest in spelling, or draw a letter, so ours may read lower.
Left out: the paper's other benchmarks, and MathVerse's Text Only version, which has no image and no part in its overall score.
File names and columns follow the dataset cards and the benchmarks' code. Not verified: MathVision's card (its columns are from code that
reads it), and where MathVerse's images.zip puts its folders (images are looked up in the folder, images/, data/ and data/images/).
"""
import argparse
import ast
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from reasoning.answers import LETTERS, extract, option_letter, quantity, same, tidy
from reasoning.rows import MAX_PIXELS, fit_image, open_image, reflection_prompt

FORMS = {"reflection": reflection_prompt,       # the prompt that training uses
         "plain": lambda query: f"{query}\n\nThink step by step, then give the final answer in \\boxed{{}}."}
KINDS = {"choice": "The answer is the letter of the right option.", "integer": "The answer is an integer.",
         "float": "The answer is a number, to {} decimal place(s).", "list": "The answer is a list, such as [1, 2].",
         "expression": "The answer is a number or an expression."}
# Rows of the paper's results (accuracy in percent, see Benchmark.paper). Its prompts, its scoring and whether its MathVision is the whole
# test set are not verified.
PAPER = "Qwen2.5-VL-7B", "SRPO-7B", "Qwen2.5-VL-32B", "SRPO-32B"


@dataclass
class Question:
    """answer: a letter for kind "choice"; other kinds: "integer", "float" (rounded to `precision` decimals), "list", "expression".
    images: cells as published, parquet's {"bytes", "path"} or JSON's path. options: texts from (A) on, [] if unknown; shown: the prompt
    lists them, else the image does."""
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


@dataclass
class Outcome:
    """A line of <benchmark>.jsonl. right is None for a row that could not be asked (see error): no part of any score.
    answer, first_answer: as extracted; the first is read with the reflection prompt only."""
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


# Reading: a function per benchmark, row -> Question. ValueError: this row is unusable. KeyError: these are not the benchmark's columns.
def read_mathvista(row: dict) -> Question:
    answer, options, kind = str(row["answer"] or ""), list(row["choices"] or []), row["answer_type"]
    if row["question_type"] == "multi_choice":
        if answer not in options:
            raise ValueError(f"its answer {answer!r} is none of its choices")
        answer, kind = LETTERS[options.index(answer)], "choice"         # published as the text of the option
    labels = [f"task: {row['metadata']['task']}", *(f"skill: {s}" for s in row["metadata"]["skills"])]
    return Question(row["pid"], row["question"], answer, kind if kind in KINDS else "expression",
                    [row.get("decoded_image") or row["image"]], options, labels,
                    precision=None if row["precision"] is None else int(row["precision"]), unit=row["unit"] or "")


def read_mathverse(row: dict) -> Question:
    """Options follow "Choices:" in the text, one a line, "A:40°". Vision Only has no text; there question_for_eval, the column for
    judges, tells the scorer (not the model) what the options are."""
    stem, shown, _ = row["question"].partition("Choices:")
    listed = (row.get("question_for_eval") or row["question"]).partition("Choices:")[2]
    lines = re.findall(r"^\s*\(?([A-J])\s*[:.)]\s*(.*?)\s*$", listed, re.M)
    options = [text for _, text in lines] if "".join(letter for letter, _ in lines) == LETTERS[:len(lines)] else []
    return Question(row["sample_index"], (stem if options else row["question"]).strip(), str(row["answer"] or ""),
                    "choice" if row["question_type"] == "multi-choice" else "expression", [row["image"]], options,
                    [f"version: {row['problem_version']}", f"subject: {row['metadata']['subject']}"], shown=bool(shown))


def read_mathvision(row: dict) -> Question:
    """One picture holds all that the text calls <image1>, <image2>... Some rows without options have a letter as their answer."""
    answer, options = str(row["answer"] or ""), list(row["options"] or [])
    kind = "choice" if options or answer in list("ABCDE") else "expression"
    return Question(str(row["id"]), row["question"], answer, kind, [row.get("decoded_image") or row["image"]], options,
                    [f"level: {row['level']}", f"subject: {row['subject']}"])


def read_mmmu_pro(row: dict) -> Question:
    """options is a Python list as text. Standard: "<image 3>" in question and options is column image_3. Vision: a screenshot."""
    options, labels = [str(option) for option in ast.literal_eval(row["options"])], [f"subject: {row['subject']}"]
    if "question" not in row:
        return Question(row["id"], "", row["answer"] or "", "choice", [row["image"]], options, labels, shown=False)
    columns = [i for i in range(1, 8) if row[f"image_{i}"]]
    if missing := {*map(int, re.findall(r"<image (\d+)>", row["question"] + row["options"]))} - {*columns}:
        raise ValueError(f"it speaks of <image {min(missing)}>, which is empty")
    renumber = partial(re.sub, r"<image (\d+)>", lambda match: f"<image {columns.index(int(match[1])) + 1}>")      # columns may have gaps
    return Question(row["id"], renumber(row["question"]), row["answer"] or "", "choice", [row[f"image_{i}"] for i in columns],
                    [renumber(option) for option in options], labels)


@dataclass
class Benchmark:
    """hub: dataset id. files: patterns, in the folder or its data/; the first found counts. size: of the whole set. paper: what the paper
    reports on the whole set for the models PAPER."""
    hub: str
    files: list[str]
    read: Callable[[dict], Question]
    size: int
    paper: tuple = ()


BENCHMARKS = {
    "mathvista": Benchmark("AI4Math/MathVista", ["testmini-*.parquet", "testmini.json"], read_mathvista, 1000, (68.2, 75.8, 74.7, 78.5)),
    "mathverse": Benchmark("AI4Math/MathVerse", ["testmini.parquet", "testmini.json"], read_mathverse, 3940, (46.3, 55.8, 48.5, 58.9)),
    "mathvision": Benchmark("MathLLMs/MathVision", ["test-*.parquet", "test.jsonl"], read_mathvision, 3040, (25.1, 32.9, 38.4, 39.6)),
    "mathvision-testmini": Benchmark("MathLLMs/MathVision", ["testmini-*.parquet", "testmini.jsonl"], read_mathvision, 304),
    # MMMU-Pro's overall score is the mean of these two: the paper's figure compares with neither alone.
    "mmmu-pro-standard": Benchmark("MMMU/MMMU_Pro", ["standard (10 options)/test-*.parquet"], read_mmmu_pro, 1730),
    "mmmu-pro-vision": Benchmark("MMMU/MMMU_Pro", ["vision/test-*.parquet"], read_mmmu_pro, 1730)}
MMMU_PRO = 3460, (36.9, 42.3, 49.5, 51.3)


def find_files(data: str, benchmark: Benchmark) -> tuple[Path, list[Path]]:
    """The folder `data`, downloaded if that is a hub id, and the files of questions in it. Raises FileNotFoundError."""
    folder = Path(data)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download  # comes with transformers
            folder = Path(snapshot_download(data, repo_type="dataset", allow_patterns=[benchmark.files[0], "data/" + benchmark.files[0]]))
        except Exception as error:      # offline, gated, no such id: each has a class of its own
            raise FileNotFoundError(f"{data} is no folder, and the hub does not give it ({type(error).__name__}): "
                                    f"download {benchmark.hub} and pass its folder as --data") from None
    for pattern in benchmark.files:
        if files := sorted(folder.glob(pattern)) or sorted(folder.glob("data/" + pattern)):
            return folder, files
    raise FileNotFoundError(f"{folder} has no {' or '.join(benchmark.files)}, here or in data/: is it a copy of {benchmark.hub}?")


def read_questions(files: list[Path], benchmark: Benchmark) -> Iterator[Question | Outcome]:
    """Every row's question, or an Outcome that says what is wrong with the row. Raises ValueError for a file that cannot be read."""
    for file in files:
        try:
            if file.suffix == ".parquet":
                import pyarrow.parquet
                batches = pyarrow.parquet.ParquetFile(file).iter_batches(16)        # files of gigabytes: never all at once
                content = (row for batch in batches for row in batch.to_pylist())
            elif file.suffix == ".jsonl":
                content = file.read_text("utf-8").strip().split("\n")
            else:
                content = json.loads(file.read_text("utf-8"))
                content = content.values() if isinstance(content, dict) else content
        except ImportError:
            raise RuntimeError(f"{file} needs pyarrow: pip install pyarrow") from None
        except (ValueError, OSError) as error:      # pyarrow's ArrowInvalid is a ValueError
            raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]}): download it again") from None
        for number, row in enumerate(content, 1):
            where = f"{file.name} row {number}"
            try:
                question = benchmark.read(json.loads(row) if isinstance(row, str) else row)
                letters = LETTERS[:len(question.options) or 10]
                if not question.answer.strip() or (question.kind == "choice" and question.answer not in list(letters)):
                    raise ValueError(f"its answer is {question.answer!r}")
                yield question
            except KeyError as error:
                if file.suffix == ".parquet":       # then every row lacks it
                    raise ValueError(f"{file} has no column {error}: is it a copy of {benchmark.hub}?") from None
                yield Outcome(where, error=f"it has no field {error}")
            except (ValueError, TypeError, AttributeError, SyntaxError) as error:   # not JSON, a cell of another type, no Python list
                yield Outcome(where, error=str(error))


def decode(cell: dict | str | None, folder: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB image, as training sees it (reasoning/rows.py). Raises ValueError."""
    content, name = (cell["bytes"], cell["path"]) if isinstance(cell, dict) else (None, cell)
    places = [folder / place / (name or "") for place in ("", "images", "data", "data/images")]
    content = content or next((path.read_bytes() for path in places if path.is_file()), None)
    if content is None:
        raise ValueError(f"there is no image {name} in {folder}" if name else "it has no image")
    return fit_image(open_image(content, name or "its image"), max_pixels=max_pixels)


def build_prompt(question: Question, form: str) -> str:
    """The text beside the images; form: a key of FORMS."""
    text = question.text or f"The question {'and its options are' if question.options and not question.shown else 'is'} in the image."
    options = [f"({letter}) {option}" for letter, option in zip(LETTERS, question.options)] if question.shown else []
    text += f" (Unit: {question.unit})" if question.unit else ""
    query = "\n".join([text, *options, KINDS[question.kind].format(question.precision)])
    return FORMS[form](re.sub(r"<image ?(\d+)>", r"[image \1]", query))      # brackets: models have special tokens like <image>


# Scoring
def is_right(question: Question, answer: str | None) -> bool:
    """Whether the extracted answer is right; False for whatever cannot be read."""
    if not answer or not answer.strip():
        return False
    if question.kind == "choice":
        return option_letter(answer, question.options) == question.answer
    if question.kind == "list":
        try:
            given, gold = (ast.literal_eval(text if text.startswith("[") else f"[{text}]") for text in map(tidy, (answer, question.answer)))
            return len(given) == len(gold) and all(same(str(a), str(b)) for a, b in zip(given, gold))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):      # a model may write any number of brackets
            return False
    if question.kind == "float" and question.precision is not None and (read := quantity(answer)):
        # MathVista rounds to the decimals of the truth. Its code also truncates what should be an integer; not so here.
        answer = f"{round(float(read[0]), question.precision)} {read[1]}"
    return same(answer, question.answer)


# Running
def write(path: Path, outcomes: Iterable[Outcome], mode: str = "a") -> Path:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(outcome), ensure_ascii=False) + "\n" for outcome in outcomes)
    return path


def resume(log: Path, settings: dict) -> dict[str, Outcome]:
    """Outcomes that a stopped run left; a half-written last line and rows with an error are dropped, to be tried again.
    Raises ValueError if that run had other settings."""
    beside, done = log.with_suffix(".settings.json"), {}
    if not log.exists():
        beside.write_text(json.dumps(settings, indent=1) + "\n")
        return done
    saved = json.loads(beside.read_text()) if beside.exists() else {}
    if changed := [f"{key} was {saved.get(key)!r}, is {value!r}" for key, value in settings.items() if saved.get(key) != value]:
        raise ValueError(f"{log} has responses of other settings ({'; '.join(changed)}): choose another --out")
    lines = log.read_text("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], 1):       # what follows the last newline is half a line
        try:
            outcome = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            raise ValueError(f"{log} line {number} is no response: delete that line, and its question will be asked again") from None
        done |= {} if outcome.error else {outcome.id: outcome}
    write(log.with_suffix(".tmp"), done.values(), "w").replace(log)
    return done


def ask(batch: list[tuple[Question, list[Image.Image]]], form: str, complete: Callable) -> list[Outcome]:
    """Complete a batch and score it. A ValueError of `complete` (a prompt beyond the model's context) costs only the question at fault:
    that one counts as wrong, flagged truncated."""
    outcomes = [Outcome(q.id, q.labels, q.answer, build_prompt(q, form)) for q, _ in batch]
    try:
        responses = complete([images for _, images in batch], [outcome.prompt for outcome in outcomes])
    except ValueError as error:
        if len(batch) > 1:
            return [outcome for one in batch for outcome in ask([one], form, complete)]
        first = False if form == "reflection" else None
        return [replace(outcomes[0], right=False, first_right=first, truncated=True, error=str(error))]
    for (question, _), outcome, r in zip(batch, outcomes, responses, strict=True):
        outcome.response, outcome.truncated, outcome.tokens = r.text, bool(r.truncated), int(r.tokens)
        outcome.answer = extract(r.text, question.kind == "choice", r.truncated)
        outcome.right = is_right(question, outcome.answer)
        if form == "reflection":
            head, tag, _ = r.text.partition("</answer>")        # a lone answer is both first and final
            outcome.first_answer = extract(head + tag, question.kind == "choice", r.truncated)
            outcome.first_right = is_right(question, outcome.first_answer)
    return outcomes


def evaluate(name: str, data: str, out: Path, complete: Callable, settings: dict, *, form: str = "reflection", batch: int = 8,
             limit: int | None = None, max_pixels: int = MAX_PIXELS) -> list[Outcome]:
    """Ask a benchmark's first `limit` questions and score them; every outcome goes to out/<name>.jsonl at once.

    complete(images: a list of RGB images per prompt, prompts) -> records with .text, .truncated, .tokens. Ids found in the file are not
    asked again; settings: what the run that wrote it must share. Raises ValueError, FileNotFoundError, RuntimeError.
    """
    benchmark, log, asked, waiting = BENCHMARKS[name], out / f"{name}.jsonl", [], []
    folder, files = find_files(data, benchmark)
    items = islice(read_questions(files, benchmark), limit)
    if (first := next(items, None)) is None:        # what is wrong with a whole file shows before anything is written
        raise ValueError(f"{files[0]} holds no questions: download it again")
    out.mkdir(parents=True, exist_ok=True)
    done = resume(log, settings | {"data": data, "prompt": form})

    def save(outcomes: list[Outcome]) -> None:
        done.update({outcome.id: outcome for outcome in outcomes})
        write(log, outcomes)

    for item in tqdm(chain([first], items), total=min(limit or benchmark.size, benchmark.size), desc=name, unit="question"):
        asked.append(item.id)
        if item.id in done:
            continue
        try:
            if isinstance(item, Question):
                waiting.append((item, [decode(image, folder, max_pixels) for image in item.images]))
            else:
                save([item])
        except ValueError as error:
            save([Outcome(item.id, error=str(error))])
        if len(waiting) == batch:
            save(ask(waiting, form, complete))
            waiting = []
    save(ask(waiting, form, complete) if waiting else [])
    if all(done[id].error for id in asked):
        raise RuntimeError(f"{name}: none of its {len(asked)} rows can be asked; {asked[0]}: {done[asked[0]].error}")
    return [done[id] for id in dict.fromkeys(asked)]


def summarise(outcomes: list[Outcome], size: int, paper: tuple = ()) -> dict:
    """Accuracy, overall and per label, with 95% intervals. Rows that could not be asked are counted apart; the paper's figures are given
    only beside all `size` questions."""
    from plumbing.plots import wilson

    def score(chosen: list[Outcome]) -> dict:
        result = {"questions": len(chosen)}
        for key in ("right", "first_right") if chosen[0].first_right is not None else ("right",):
            n = sum(getattr(o, key) for o in chosen)
            result[key] = {"accuracy": n / len(chosen), "interval": wilson(n, len(chosen))}
        return result

    scored = [o for o in outcomes if o.right is not None]
    labels = sorted({label for o in scored for label in o.labels})
    return {"all": score(scored), "subsets": {label: score([o for o in scored if label in o.labels]) for label in labels},
            "truncated": sum(o.truncated for o in scored), "without_answer": sum(o.answer is None for o in scored),
            "unread": [o.id for o in outcomes if o.right is None],
            "paper": dict(zip(PAPER, paper)) if len(scored) == size else {}}


def table(results: dict[str, dict]) -> str:
    """{benchmark: result of `summarise`} -> an aligned text table, the paper's figures under the sets they compare with."""
    width = max(32, *(len(label) + 2 for r in results.values() for label in r["subsets"]))

    def line(title: str, r: dict) -> str:
        scores = [(r[key]["accuracy"], *r[key]["interval"]) for key in ("right", "first_right") if key in r]
        return f"{title:{width}} {r['questions']:9}" + "".join(f"  {x:6.1%} [{low:6.1%}, {high:6.1%}]" for x, low, high in scores)

    first = any("first_right" in r["all"] for r in results.values())
    lines = [f"{'':{width}} questions  {'final answer':24}" + "  first answer" * first]
    for name, r in results.items():
        lines += [line(name, r["all"]), *(line("  " + label, part) for label, part in r["subsets"].items())]
        lines += [f"{'  the paper reports, ' + model:{width + 10}}  {percent:5.1f}%" for model, percent in r["paper"].items()]
        lines += [f"  {r['truncated']} truncated; {r['without_answer']} without an answer, which is wrong"]
        if r["unread"]:
            more = ", ..." if len(r["unread"]) > 5 else ""
            lines += [f"  {len(r['unread'])} rows could not be asked and do not count: {', '.join(r['unread'][:5])}{more}"]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a vision-language model, or hub id")
    parser.add_argument("--benchmark", nargs="+", required=True, choices=BENCHMARKS)
    parser.add_argument("--data", nargs="+", help="folder or hub id of each --benchmark, in the same order (default: from the hub)")
    parser.add_argument("--out", required=True, help="folder for <benchmark>.jsonl and result.json; the same command resumes")
    parser.add_argument("--prompt", default="reflection", choices=FORMS)
    parser.add_argument("--limit", type=int, help="only the first N questions of each benchmark")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger images are scaled down to this area, as in training")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", help="default: cuda where there is one")


def run(args: argparse.Namespace) -> None:
    import torch

    from reasoning import qwen as vlm
    data = args.data or [BENCHMARKS[name].hub for name in args.benchmark]
    if len(data) != len(args.benchmark):
        raise ValueError(f"--data names {len(data)} folders for {len(args.benchmark)} benchmarks: give one for each, in the same order")
    if min(args.batch, args.max_new_tokens, args.max_pixels, 1 if args.limit is None else args.limit) < 1:
        raise ValueError("--batch, --max-new-tokens, --max-pixels and --limit must be at least 1")
    verifier = importlib.util.find_spec("math_verify") is not None
    if not verifier:
        print("math-verify is not installed: only expressions written alike count as right (pip install math-verify)", file=sys.stderr)
    # A model that was trained further under the same name is another model.
    weights = max((file.stat().st_mtime for file in Path(args.model).glob("*.safetensors")), default=None)
    settings = {"model": args.model, "weights_saved": weights, "max_new_tokens": args.max_new_tokens, "max_pixels": args.max_pixels,
                "dtype": args.dtype, "math_verify": verifier}
    model, processor = vlm.load_vlm(args.model, dtype=getattr(torch, args.dtype),
                                    device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    complete = partial(vlm.complete, model, processor, max_new_tokens=args.max_new_tokens, temperature=0.0)
    out, outcomes, results = Path(args.out), {}, {}
    path = out / "result.json"

    def record(name: str, result: dict) -> None:
        results[name] = result
        saved = json.loads(path.read_text()) if path.exists() else {}
        saved[name] = {"settings": settings | {"prompt": args.prompt, "limit": args.limit}} | result
        path.write_text(json.dumps(saved, indent=1) + "\n")

    try:
        for name, source in zip(args.benchmark, data):
            outcomes[name] = evaluate(name, source, out, complete, settings, form=args.prompt, batch=args.batch, limit=args.limit,
                                      max_pixels=args.max_pixels)
            record(name, summarise(outcomes[name], BENCHMARKS[name].size, BENCHMARKS[name].paper))
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was answered is in {out}: the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    if {"mmmu-pro-standard", "mmmu-pro-vision"} <= outcomes.keys():     # of equal size, so their pool is their mean
        record("mmmu-pro", summarise(outcomes["mmmu-pro-standard"] + outcomes["mmmu-pro-vision"], *MMMU_PRO))
    print(f"\n{args.model}, {args.prompt} prompt, greedy; accuracy with 95% Wilson intervals\n{table(results)}")
    print(f"wrote {path} and {', '.join(f'{out}/{name}.jsonl' for name in outcomes)}")
