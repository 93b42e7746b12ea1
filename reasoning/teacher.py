r"""Cold-start data for reflection-aware SRPO (arXiv 2506.01713, stage 1): questions on images become reflected responses.

  1. Read rows (reasoning/rows.py).
  2. The model to be trained answers each question once: <think>..</think><answer>..</answer>.
  3. A verifier compares that answer with the ground truth.
  4. A stronger teacher sees question, image, first response and ground truth and writes a reflection: a right response is to
     be tightened, a wrong one revised. The teacher is a server that speaks OpenAI's chat API, or the local model.
  5. First response, reflection and ground truth make one fine-tuning target, appended to OUT/reflections.jsonl at once.

The same command again goes on where the last one stopped. OUT holds settings.json, first_answers.jsonl, reflections.jsonl,
which `read_rows` reads back, target included, and rejected.jsonl; delete the last to try its rows once more.
Left out: the paper's quality filter by a text model; its criteria are not published.

    python -m reasoning.teacher --model Qwen/Qwen2.5-VL-7B-Instruct --rows rows.jsonl --images DIR --out OUT --teacher-url http://localhost:8000/v1 --teacher-model NAME
"""
import argparse
import base64
import io
import json
import math
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from reasoning import qwen as vlm
from reasoning.answers import default_verify
from plumbing.run import command
from reasoning.rows import MAX_PIXELS, Rejected, Row, add_row_arguments, first_prompt, fit_image, load_image, need, read_given, read_lines
from rewards import TAG

FORMS = ("paper", "release")
TRIES = 3  # the teacher is asked at most so often for a reply that can be read
PATIENCE = 8  # after so many rows in a row without a reply the fault is the teacher's, not the rows'
Generate = Callable[[list[Row], list[str]], list[str]]  # rows for their images, a prompt each -> a text each


# The teacher's prompt: its role is the paper's, the words ours
def teacher_prompt(row: Row, response: str, correct: bool, form: str = "paper") -> str:
    """Asks for JSON with a reflection on a first response and, in form "paper", the second think.

    Paper / code differ: the published code has one prompt, the paper an aim for right responses and one for wrong ones.
    """
    if correct:
        task = ("The attempt reaches the correct answer. Reflect on how to tighten it: which steps carry the answer, which are "
                "repeated or idle, and how a shorter reasoning would run.")
    else:
        task = ("The attempt reaches a wrong answer. Reflect on how to revise it: the first place where it goes wrong (something "
                "misread in the image, a false fact, a slip in the logic or the arithmetic) and what to do there instead.")
    fields = {"reflection": "the reflection, two to five sentences"}
    if form == "paper":
        fields["think"] = "the reasoning of a second attempt, which follows the reflection and arrives at the correct answer"
    solution = f"\n\nA worked solution:\n{row.content}" if row.content else ""
    return (f"Below are a question about the image, its correct answer, and a student's attempt.\n\nQuestion:\n{row.query}\n\n"
            f"Correct answer:\n{row.answer}{solution}\n\nAttempt:\n{response}\n\n{task}\n\nWrite in the first person, as the student "
            "rereading the attempt, and never mention that the correct answer or a solution was given. Use no tags such as <think> "
            f"or <answer>. Reply with one JSON object and nothing else:\n{json.dumps(fields)}")


# Fine-tuning targets
def split_first(response: str) -> tuple[str, str]:
    """(think, answer) of a first response. Raises ValueError if it is not <think>..</think><answer>..</answer> and no more."""
    match = re.fullmatch(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", response, re.DOTALL)
    if match is None or any(TAG.search(part) or not part.strip() for part in match.groups()):
        raise ValueError("first answer without tags: it must be <think>..</think><answer>..</answer>; was it cut off?")
    return match[1].strip(), match[2].strip()


def sft_target(first_response: str, reflection: str, second_think: str | None, answer: str, form: str = "paper") -> str:
    r"""The response to imitate: the model's own first attempt, the teacher's reflection, the ground truth in a box.

    form "paper": the pattern reinforcement learning demands. Paper / code differ: "release", the published code's targets,
    lack the second think (ignored here), so RL has to teach it. Raises ValueError if a part is missing.

    >>> sft_target("<think>3 + 4 = 8</think> <answer>8</answer>", "3 + 4 is 7.", None, "7", form="release")
    '<think>3 + 4 = 8</think><answer>8</answer><reflection>3 + 4 is 7.</reflection><answer>$\\boxed{7}$</answer>'
    """
    think, first = split_first(first_response)
    if form == "paper" and not second_think:
        raise ValueError("form paper needs a second think")
    second = f"<think>{second_think}</think>" if form == "paper" else ""
    if r"\boxed{" not in answer:
        answer = r"$\boxed{%s}$" % re.sub(r"^\$([^$]+)\$$", r"\1", answer)
    return f"<think>{think}</think><answer>{first}</answer><reflection>{reflection}</reflection>{second}<answer>{answer}</answer>"


# Teacher
class TeacherError(RuntimeError):
    """A row got no reply. down: nor will any other; refused: the server finds fault with this request."""
    def __init__(self, message: str, down: bool = False, refused: bool = False):
        super().__init__(message)
        self.down, self.refused = down, refused


class Teacher:
    """A model behind OpenAI's chat API at url, which mostly ends in /v1; callable from several threads, a request per row.

    Broken connections, time-outs (seconds, of one try), 429 and 5xx are tried again `retries` times with growing pauses, or
    when Retry-After says. Raises RuntimeError without the openai package or if nothing listens at url, TeacherError when a row
    gets no reply.
    """
    def __init__(self, url: str, model: str, key: str | None = None, *, retries: int = 5, timeout: float = 120, max_tokens: int = 8192):
        need("openai", "a teacher behind a URL needs the openai package")
        import openai
        self.url, self.model, self.timeout, self.max_tokens = url, model, timeout, max_tokens
        self.client = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=retries, timeout=timeout)
        try:  # now rather than after hours of first answers
            self.client.models.list()
        except openai.APIConnectionError as error:
            raise RuntimeError(f"teacher {url}: cannot be reached ({error.__cause__}); start it, or give another --teacher-url") from None
        except (openai.OpenAIError, ValueError):
            pass  # not every server lists its models

    def __call__(self, rows: list[Row], prompts: list[str]) -> list[str]:
        """A `Generate`, but of one row."""
        import openai
        [row], [prompt], content = rows, prompts, []
        for i in range(len(row.images)):
            fit_image(load_image(row, i)).save(buffer := io.BytesIO(), "JPEG", quality=95, subsampling=0)
            url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
        try:
            # No temperature, which reasoning models refuse, and no response_format, which small servers do not know.
            reply = self.client.chat.completions.create(model=self.model, messages=messages, max_completion_tokens=self.max_tokens)
            return [reply.choices[0].message.content or ""]
        except openai.APITimeoutError:
            raise TeacherError(f"no reply within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise TeacherError(f"cannot be reached ({error.__cause__})", down=True) from None
        except openai.APIStatusError as error:
            code, text = error.status_code, " ".join(error.response.text.split())[:300]
            hint = {401: " (is the key right?)", 403: " (is the key right?)", 404: " (are the URL and the model's name right?)"}
            raise TeacherError(f"HTTP {code}{hint.get(code, '')} {text}", down=code in hint, refused=code in (400, 413, 422)) from None
        except (openai.OpenAIError, ValueError, AttributeError, TypeError, IndexError):
            raise TeacherError("the reply is no chat completion; does the URL end in /v1?") from None


# \f, \b, \t, \r and \u are escapes in JSON, but a model that writes \frac or \times there forgot to double the backslash. A single
# one before two letters, or before what JSON does not escape, is taken for LaTeX; \n only in \ne, \neq, \nu, \neg, \nabla, \not.
LATEX = re.compile(r'(?<!\\)((?:\\\\)*)\\(?=[a-mo-tv-zA-Z][a-zA-Z]|n(?:eq?|u|eg|abla|ot)\b|u(?![0-9a-fA-F]{4})|[^"\\/bfnrtu])')


def parse_reply(text: str, form: str = "paper", content: str | None = None) -> tuple[str, str | None]:
    """(reflection, second think) from the last JSON in a teacher's reply, maybe fenced or after the teacher's own thoughts.

    content: the row's worked solution, which stands in for a second think left out. The think is None in form "release".
    Raises ValueError if there is no such JSON, a field is empty, or holds tags, which would break the pattern.
    """
    text, found, end = LATEX.sub(r"\1\\\\", text), {}, 0
    for match in re.finditer(r"\{", text):
        try:
            if match.start() >= end:
                value, end = json.JSONDecoder(strict=False).raw_decode(text, match.start())  # not strict: line breaks in strings
                found = value if "reflection" in value else found
        except ValueError:
            continue
    fields = {"reflection": found.get("reflection")} | ({"think": found.get("think") or content} if form == "paper" else {})
    for name, part in fields.items():
        if not isinstance(part, str) or not part.strip():
            raise ValueError(f"teacher's reply: no JSON with a {name}")
        if TAG.search(part):
            raise ValueError(f"teacher's reply: tags inside the {name}")
    return fields["reflection"].strip(), fields["think"].strip() if form == "paper" else None


# The pipeline
@dataclass
class Job:
    row: Row
    response: str
    correct: bool


def build(rows: list[Row], first_answers: Callable[[list[Row]], list[str]], teacher: Teacher | Generate, out: str | Path, *,
          form: str = "paper", verify: Callable[[str, str], bool | None] | None = None, right_share: float | None = None,
          batch: int = 8, in_flight: int = 8, rejected: Iterable[Rejected] = (), settings: dict | None = None) -> None:
    """Rows to out/reflections.jsonl, the others to out/rejected.jsonl, each line as soon as it is known.

    first_answers: a batch of rows -> responses to `first_prompt`. teacher: a `Teacher`, asked by in_flight threads, or a local
    model, asked in batches from another thread. verify: answers.default_verify if not given. right_share: cap on the share of
    right first answers among the rows sent to the teacher (paper: about 0.3); right ones beyond it are rejected as surplus.
    rejected: those of `read_rows`, to be saved too. settings: more for settings.json.
    Raises ValueError for bad settings or others than out was begun with; RuntimeError if the teacher is down or left rows
    without a reply: those are not rejected, the same call again tries them. Whatever stops a run, requests in flight are
    waited for and kept.
    """
    if form not in FORMS or not (right_share is None or 0 <= right_share < 1) or min(batch, in_flight) < 1:
        raise ValueError(f"form {form!r}, right share {right_share}, batch {batch}, in flight {in_flight}: "
                         f"the first must be one of {FORMS}, the second in [0, 1), the others at least 1")
    out, lock, stop, verify = Path(out), threading.Lock(), threading.Event(), verify or default_verify
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made ({error.strerror}); choose another folder") from None
    settings = (settings or {}) | {"form": form, "right_share": right_share}
    begun = (read_lines(out / "settings.json") or [settings])[0]
    for name in sorted(begun | settings):
        if begun.get(name) != settings.get(name):
            raise ValueError(f"{out} was begun with {name} {begun.get(name)!r}, not {settings.get(name)!r}; give that, or another --out")
    (out / "settings.json").write_text(json.dumps(settings) + "\n")
    kept = [line["id"] for line in read_lines(out / "reflections.jsonl", "id")]
    done = {*kept, *(line["id"] for line in read_lines(out / "rejected.jsonl", "id"))}
    first = {line["id"]: line["response"] for line in read_lines(out / "first_answers.jsonl", "id", "response")}

    def append(name: str, record: dict) -> None:
        with lock, (out / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def reject(item: Row | Rejected, reason: str, response: str = "") -> None:
        if item.id not in done:
            append("rejected", asdict(Rejected(item.id, item.source, reason, response)))
            done.add(item.id)

    def answered(chunk: list[Row]) -> list[tuple[Row, str]]:
        try:
            return list(zip(chunk, first_answers(chunk), strict=True))
        except ValueError as error:         # one of them is more than the model takes: which?
            if len(chunk) > 1:
                return [pair for row in chunk for pair in answered([row])]
            reject(chunk[0], f"cannot be asked: {error}")
            return []

    for item in rejected:
        reject(item, item.reason)
    new = [row for row in rows if row.id not in done and row.id not in first]
    for start in tqdm(range(0, len(new), batch), desc="first answers", disable=None):
        chunk = new[start:start + batch]
        for row, response in answered(chunk):
            append("first_answers", {"id": row.id, "response": response})
            first[row.id] = response
    jobs = []
    for row in rows:
        if row.id in first:  # rows done included, or what is left of a stopped run would be balanced by itself
            try:
                correct = verify(split_first(first[row.id])[1], row.answer)
                if correct is None:
                    raise ValueError(f"unreadable ground truth: the verifier makes nothing of {row.answer[:80]!r}")
                jobs.append(Job(row, first[row.id], correct))
            except ValueError as error:
                reject(row, str(error), first[row.id])
    if right_share is not None:
        right = [job for job in jobs if job.correct]
        for job in right[math.floor(right_share / (1 - right_share) * (len(jobs) - len(right)) + 1e-9):]:
            reject(job.row, f"surplus: right first answers make up {right_share:g} without it")

    silent, left = [], []  # failures since the last reply; rows without one

    def work(jobs: list[Job]) -> None:
        for attempt in range(1, TRIES + 1):
            if stop.is_set() or not jobs:
                return
            prompts = [teacher_prompt(job.row, job.response, job.correct, form) for job in jobs]
            try:
                texts = teacher([job.row for job in jobs], prompts)
                silent.clear()
            except TeacherError as error:  # comes of a server, so there is one job
                silent.append(error)
                if error.down or len(silent) >= PATIENCE:
                    stop.set()
                if error.refused and kept and not stop.is_set():    # before a reply, or so often, the fault may lie with the settings rather than with the row
                    return reject(jobs[0].row, f"refused by the teacher: {error}")
                left.append(f"{error}; no reply for {jobs[0].row.source}")
                return
            except ValueError as error:
                if isinstance(teacher, Teacher):
                    raise
                if len(jobs) == 1:          # more than the local model takes
                    return reject(jobs[0].row, f"the teacher cannot be asked: {error}")
                for job in jobs:
                    work([job])
                return
            again = []
            for job, text in zip(jobs, texts, strict=True):
                try:
                    append("reflections", _record(job, *parse_reply(text, form, job.row.content), form, out))
                    kept.append(job.row.id)
                except ValueError as error:
                    if attempt == TRIES:
                        reject(job.row, str(error), text)
                    again.append(job)
            jobs = again

    jobs = [job for job in jobs if job.row.id not in done]
    workers, size = (in_flight, 1) if isinstance(teacher, Teacher) else (1, batch)
    chunks = [jobs[start:start + size] for start in range(0, len(jobs), size)]
    with ThreadPoolExecutor(workers) as pool:  # if anything is raised, map cancels what is queued, and the pool waits for the rest
        for _ in tqdm(pool.map(work, chunks), total=len(chunks), desc="reflections", disable=None):
            pass
    if left:
        raise RuntimeError(f"teacher {teacher.url}: {left[-1]}; {len(kept)} reflections are kept in {out}, the same command again goes on")


def _record(job: Job, reflection: str, think: str | None, form: str, out: Path) -> dict:
    """A line of reflections.jsonl; images that are bytes become files beside it."""
    row, images = job.row, []
    for i, image in enumerate(row.images):
        if isinstance(image, bytes):
            (out / "images").mkdir(exist_ok=True)
            (out / "images" / f"{row.id}_{i}").write_bytes(image)
        images.append(image if isinstance(image, str) else f"images/{row.id}_{i}")
    return {"id": row.id, "source": row.source, "query": row.query, "image": images, "answer": row.answer, "content": row.content,
            "first_response": job.response, "first_correct": job.correct, "reflection": reflection, "think": think,
            "target": sft_target(job.response, reflection, think, row.answer, form)}


# Command line
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `run`."""
    add = parser.add_argument
    add_row_arguments(parser, "--rows", required=True)
    add("--out", required=True, help="folder to write to, or to go on in")
    add("--form", choices=FORMS, default="paper", help="targets with the second think (paper) or without (release: the published code's)")
    add("--right-share", type=float, help="cap on the share of rows whose first answer is right (paper: about 0.3; default: none)")
    add("--batch", type=int, default=8, help="rows per batch of the local model")
    add("--teacher-url", help="OpenAI-compatible server, such as http://localhost:8000/v1 (default: the local model is the teacher)")
    add("--teacher-model", help="the teacher's name on that server")
    add("--teacher-key", default="OPENAI_API_KEY", metavar="VARIABLE", help="environment variable that holds the server's key")
    add("--teacher-tokens", type=int, default=8192, help="longest reply, the teacher's own thoughts included")
    add("--in-flight", type=int, default=8, help="requests to the teacher at a time")
    add("--retries", type=int, default=5, help="of a failed request, with growing pauses")
    add("--timeout", type=float, default=120, help="seconds a request may take")


def run(args: argparse.Namespace, load_model: Callable[[], Generate], settings: dict | None = None) -> int:
    """`build` from the flags of `add_arguments`; prints how many rows were kept and rejected. Returns 0, raises what `build` does.

    load_model() -> generate(rows, prompts) -> texts: called once, when first needed; a resumed run may need no local model.
    settings: what a resumed run must share besides the flags, such as the model's name.
    """
    for name in ("batch", "in_flight", "teacher_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if bool(args.teacher_url) != bool(args.teacher_model):
        raise ValueError("--teacher-url and --teacher-model go together; give both, or neither for the local model")
    load_model = cache(load_model)
    teacher = lambda rows, prompts: load_model()(rows, prompts)
    if args.teacher_url:
        teacher = Teacher(args.teacher_url, args.teacher_model, os.environ.get(args.teacher_key),
                          retries=args.retries, timeout=args.timeout, max_tokens=args.teacher_tokens)
    rows, rejected = read_given(args)
    build(rows, lambda some: load_model()(some, [first_prompt(row.query) for row in some]), teacher, args.out, form=args.form,
          right_share=args.right_share, batch=args.batch, in_flight=args.in_flight, rejected=rejected,
          settings=(settings or {}) | {"rows": Path(args.rows).name, "columns": args.columns, "teacher": args.teacher_model})
    kept, refused = (read_lines(Path(args.out) / f"{name}.jsonl") for name in ("reflections", "rejected"))
    right = sum(line["first_correct"] for line in kept)
    print(f"{args.out}: {len(kept)} reflections, {right} of them on right first answers; rejected: {len(refused)}")
    for kind, count in Counter(line["reason"].partition(":")[0] for line in refused).most_common():
        print(f"{count:8d}  {kind}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: (_ for _ in ()).throw(ValueError(message))
    parser.add_argument("--model", required=True, help="folder or hub id: it gives the first answers")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS)
    parser.add_argument("--temperature", type=float, default=0.0, help="of the first answers; 0: greedy")
    add_arguments(parser)

    def work() -> int:
        args = parser.parse_args(argv)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("this runs as one process; start it without torchrun")

        def load_model() -> Generate:
            model, processor = vlm.load_vlm(args.model, getattr(torch, args.dtype), "cuda" if torch.cuda.is_available() else "cpu")

            def generate(rows: list[Row], texts: list[str]) -> list[str]:
                images = [[fit_image(load_image(row, i), max_pixels=args.max_pixels) for i in range(len(row.images))] for row in rows]
                return [c.text for c in vlm.complete(model, processor, images, texts, args.max_new_tokens, args.temperature)]
            return generate

        return run(args, load_model, {name: getattr(args, name) for name in ("model", "dtype", "max_new_tokens", "temperature", "max_pixels")})
    return command(work)


if __name__ == "__main__":
    sys.exit(main())
