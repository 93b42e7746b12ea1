"""Cold-start data for reflection-aware SRPO (arXiv 2506.01713, stage 1): rows become reflections.

  1. Read rows (reasoning/rows.py).
  2. The model to be trained answers each question once: <think>..</think><answer>..</answer>.
  3. The verifier (reasoning/answers.py) compares that answer with the ground truth.
  4. A stronger teacher, a server that speaks OpenAI's chat API or the local model, sees all of it
     and writes a reflection: a right response is to be tightened, a wrong one revised.
  5. Response, reflection and ground truth make one target, in OUT/reflections.jsonl at once.

The same command goes on where the last one stopped. `read_rows` reads reflections.jsonl, target
included; delete OUT/rejected.jsonl to try its rows once more. Left out: the paper's quality filter
by a text model, whose criteria are not published. The command stands in docs/seven_b.md.
"""
import base64
import io
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Event, Lock
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from plumbing.files import Journal
from plumbing.flags import ending, flag, read_command, require
from reasoning import rows as data
from reasoning.answers import default_verify
from reasoning.flags import EngineSettings, check_engine
from reasoning.rows import Row, one_line, pictures
from rewards import TAG, format_holds, inside

TRIES = 3           # the teacher is asked at most so often for a reply that can be read
PATIENCE = 8        # after so many rows in a row without a reply the fault is the teacher's
Generate = Callable[[list[Row], list[str]], list[str]]          # rows, a prompt each -> texts


@dataclass
class Settings(EngineSettings):
    model: str = flag("", "folder or hub id: it gives the first answers")
    rows: str = flag("", "JSONL file, parquet file or folder of them, or dataset of the hub")
    images: str = flag("", "folder that the rows' image paths start from (the file's own)")
    columns: list[str] = flag([], "other column names: query=problem image=images")
    out: str = flag("", "folder to write to, or to go on in")
    form: str = flag("paper", "targets with a second think, or the published code's",
                     choices=["paper", "release"])
    right_share: float = flag(None, "cap on the share of right first answers (paper: about 0.3)")
    dtype: str = flag("bfloat16", "of the model's weights", choices=["float32", "bfloat16"])
    max_new_tokens: int = flag(1024, "the model's longest response")
    max_pixels: int = flag(data.MAX_PIXELS, "larger pictures are scaled down for the model")
    temperature: float = flag(0.0, "of the first answers; 0: greedy")
    batch: int = flag(8, "rows per batch of the model")
    teacher_url: str = flag("", "OpenAI-compatible server (the model itself is the teacher)")
    teacher_model: str = flag("", "the teacher's name on that server")
    teacher_key: str = flag("OPENAI_API_KEY", "environment variable that holds the server's key")
    teacher_tokens: int = flag(8192, "longest reply, the teacher's own thoughts included")
    in_flight: int = flag(8, "requests to the teacher at a time")
    retries: int = flag(5, "of a failed request, with growing pauses")
    timeout: float = flag(120.0, "seconds a request may take")

    def __post_init__(self):
        check_engine(self)
        require(self, dict(batch=1, in_flight=1, teacher_tokens=1, max_new_tokens=1, retries=0,
                           max_pixels=data.MIN_PIXELS, temperature=0), ("timeout",))
        if not 0 <= (self.right_share or 0) < 1:
            raise ValueError(f"--right-share must be in [0, 1), got {self.right_share}")
        if bool(self.teacher_url) != bool(self.teacher_model):
            raise ValueError("--teacher-url and --teacher-model go together; give both, or neither "
                             "for the local model")


# The teacher's prompt: its role is the paper's, the words ours

def teacher_prompt(row: Row, response: str, correct: bool, form: str = "paper") -> str:
    """Asks for JSON with a reflection on a response and, in form "paper", the second think."""
    # code: one prompt for all; paper: an aim for right responses and one for wrong ones
    task = ("The attempt reaches the correct answer. Reflect on how to tighten it: which steps "
            "carry the answer, which are repeated or idle, and how a shorter reasoning would run."
            ) if correct else (
            "The attempt reaches a wrong answer. Reflect on how to revise it: the first place "
            "where it goes wrong (something misread in the image, a false fact, a slip in the "
            "logic or the arithmetic) and what to do there instead.")
    fields = {"reflection": "the reflection, two to five sentences"}
    if form == "paper":
        fields["think"] = ("the reasoning of a second attempt, which follows the reflection and "
                           "arrives at the correct answer")
    solution = f"\n\nA worked solution:\n{row.content}" if row.content else ""
    return ("Below are a question about the image, its correct answer, and a student's attempt.\n\n"
            f"Question:\n{row.query}\n\nCorrect answer:\n{row.answer}{solution}\n\nAttempt:\n"
            f"{response}\n\n{task}\n\nWrite in the first person, as the student rereading the "
            "attempt, and never mention that the correct answer or a solution was given. Use no "
            "tags such as <think> or <answer>. Reply with one JSON object and nothing else:\n"
            f"{json.dumps(fields)}")


# Fine-tuning targets

def split_first(response: str) -> tuple[str, str]:
    """(think, answer) of a first response; ValueError if it has another form."""
    if not format_holds(response, ("think", "answer")):
        raise ValueError("first answer without tags: it must be <think>..</think>"
                         "<answer>..</answer>; was it cut off?")
    return inside(response, "think")[0], inside(response, "answer")[0]


def sft_target(first_response: str, reflection: str, second_think: str | None, answer: str,
               form: str = "paper") -> str:
    r"""The response to imitate: first attempt, the teacher's reflection, the ground truth in a box.
    ValueError if a part is missing.

    >>> sft_target("<think>8</think> <answer>8</answer>", "No, 7.", None, "7", "release")[16:]
    '<answer>8</answer><reflection>No, 7.</reflection><answer>$\\boxed{7}$</answer>'
    """
    # code: "release", without the second think, so RL has to teach it; paper: with it
    think, first = split_first(first_response)
    if form == "paper" and not second_think:
        raise ValueError("form paper needs a second think")
    second = f"<think>{second_think}</think>" if form == "paper" else ""
    if r"\boxed{" not in answer:
        answer = r"$\boxed{" + re.sub(r"^\$([^$]+)\$$", r"\1", answer) + "}$"
    return (f"<think>{think}</think><answer>{first}</answer><reflection>{reflection}</reflection>"
            f"{second}<answer>{answer}</answer>")


# The teacher's replies

class Cut(str):
    """A text that a limit of tokens cut off."""


# \f, \b, \t, \r and \u are escapes in JSON, but a model that writes \frac or \times there forgot to
# double the backslash. A single one before two letters, or before what JSON does not escape, is
# taken for LaTeX; \n only in \ne, \neq, \nu, \neg, \nabla, \not.
LATEX = re.compile(r'(?<!\\)((?:\\\\)*)\\(?=[a-mo-tv-zA-Z][a-zA-Z]|n(?:eq?|u|eg|abla|ot)\b'
                   r'|u(?![0-9a-fA-F]{4})|[^"\\/bfnrtu])')


def parse_reply(text: str, form: str = "paper",
                content: str | None = None) -> tuple[str, str | None]:
    """(reflection, second think) from the last JSON in a reply, fenced or after thoughts or not.

    content: the row's worked solution, which stands in for a second think left out. The think is
    None in form "release". ValueError if the reply was cut off, has no such JSON, or a field is
    empty, holds tags, which would break the pattern, or half a character."""
    if isinstance(text, Cut) or text.count("<think>") > text.count("</think>"):
        raise ValueError("teacher's reply: cut off; see --teacher-tokens")
    text, found = LATEX.sub(r"\1\\\\", text), {}
    decoder = json.JSONDecoder(strict=False)        # line breaks may stand in strings
    starts = [match.start() for match in re.finditer(r'\{(?=\s*")', text)]
    for start in reversed(starts[-1000:]):          # a try may read to the end of a long reply
        with suppress(ValueError, RecursionError):
            found = decoder.raw_decode(text, start)[0]
        if "reflection" in found:
            break
    found["think"] = found.get("think") or content
    for name in ("reflection", "think") if form == "paper" else ("reflection",):
        part = found.get(name)
        if not isinstance(part, str) or not part.strip():
            raise ValueError(f"teacher's reply: no JSON with a {name}")
        if TAG.search(part):
            raise ValueError(f"teacher's reply: tags inside the {name}")
        if data.SURROGATE.search(part):
            raise ValueError(f"teacher's reply: half a character inside the {name}")
    return found["reflection"].strip(), found["think"].strip() if form == "paper" else None


class TeacherError(RuntimeError):
    """A row got no reply. down: nor will any other; refused: the server faults this request."""

    def __init__(self, message: str, down: bool = False, refused: bool = False):
        super().__init__(message)
        self.down, self.refused = down, refused


class Teacher:
    """A model behind OpenAI's chat API; a `Generate`, but of one row, callable by many threads.

    Broken connections, time-outs (of one try to its last byte), 429 and 5xx are tried again with
    growing pauses, or when Retry-After says. ValueError for a bad url, RuntimeError without the
    openai package or if nothing listens, TeacherError when a row gets no reply; messages are
    printable and without key and password."""

    def __init__(self, s: Settings, key: str | None):
        try:
            import openai
        except ImportError:
            raise RuntimeError("a teacher behind a URL needs: pip install openai") from None
        self.s = s
        try:
            parts, key = urlsplit(s.teacher_url), (key or "none").strip()
            name, password = (unquote(part or "") for part in (parts.username, parts.password))
            secrets = (re.escape(secret) for secret in (key, password) if len(secret) > 4)
            self.secrets = re.compile("|".join(secrets) or "(?!)")      # (?!) is nowhere
            self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
            if (parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
                    or re.search("[@?#]", self.url) or not re.fullmatch("[!-~]+", key)):
                raise ValueError
            http = openai.DefaultHttpxClient(follow_redirects=False,    # to another host, with key
                                             auth=(name, password) if name else None)
            http.send = in_time(http, s.timeout)
            self.client = openai.OpenAI(base_url=self.url, api_key=key, timeout=s.timeout,
                                        max_retries=s.retries, http_client=http)
        except Exception:               # whose text may hold the password
            raise ValueError("--teacher-url must be http://HOST:PORT/v1 or https://HOST/v1, with "
                             "what is special in a password in percent code, and the key that "
                             "--teacher-key names plain ASCII without blanks") from None
        try:                            # now rather than after hours of first answers
            self.client.models.list()
        except openai.APIConnectionError as error:
            raise RuntimeError(f"teacher {self.url}: cannot be reached ({self.say(error.__cause__)}"
                               "); start it, or give another --teacher-url") from None
        except (openai.OpenAIError, ValueError, RecursionError):
            pass                        # not every server lists its models

    def say(self, text: object) -> str:
        return one_line(self.secrets.sub("***", str(text)))

    def __call__(self, rows: list[Row], prompts: list[str]) -> list[str]:
        import openai
        [row], [prompt], content = rows, prompts, []
        for image in pictures(row):
            image.save(buffer := io.BytesIO(), "JPEG", quality=95, subsampling=0)
            url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": prompt})
        try:        # no temperature, which reasoning models refuse; not all know response_format
            reply = self.client.chat.completions.create(
                model=self.s.teacher_model, messages=[{"role": "user", "content": content}],
                max_completion_tokens=self.s.teacher_tokens)
            if fault := getattr(reply, "error", None):
                raise TeacherError(f"an error in place of a reply: {self.say(fault)}")
            choice = reply.choices[0]
            said = choice.message.content or ""
            # Some servers send it in parts, their model's thoughts among them
            parts = said if isinstance(said, list) else [{"type": "text", "text": said}]
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            return [Cut(text) if choice.finish_reason == "length" else text]
        except openai.APITimeoutError:
            raise TeacherError(f"no reply within {self.s.timeout:g} s") from None
        except openai.APIConnectionError as error:
            cause = self.say(error.__cause__)
            raise TeacherError(f"cannot be reached ({cause})", down=True) from None
        except openai.APIStatusError as error:
            code, text = error.status_code, self.say(error.response.text)
            hint = " (redirects are not followed)" if code < 400 else {
                401: " (is the key right?)", 403: " (is the key right?)",
                404: " (are the URL and the model's name right?)"}.get(code, "")
            raise TeacherError(f"HTTP {code}{hint} {text}", down=bool(hint),
                               refused=code in (400, 413, 422)) from None
        except (openai.OpenAIError, ValueError, AttributeError, TypeError, LookupError,
                RecursionError):
            raise TeacherError("the reply is no chat completion; does the URL end in /v1?"
                               ) from None


def in_time(client, seconds: float) -> Callable:
    """client.send, but a try ends after so many seconds, however slowly bytes drip in."""
    httpx = sys.modules[type(client).__base__.__module__.partition(".")[0]]  # httpx2 since openai 3
    send = client.send

    def timed(request, **how):
        with ThreadPool(1) as pool:             # left behind, its thread does not hold the process
            try:
                return pool.apply_async(send, (request,), how).get(seconds)
            except multiprocessing.TimeoutError:
                raise httpx.ReadTimeout("no reply in time", request=request) from None
    return timed


# The pipeline

class Work:
    """Rows to OUT/reflections.jsonl, the others to OUT/rejected.jsonl, each line as soon as it is
    known; whatever stops a run, requests in flight are waited for and kept.

    model: gives the first answers. teacher: a `Teacher`, asked by --in_flight threads, or a local
    model, asked in batches. kept: by id, whether the first answers of the rows in reflections.jsonl
    were right. ValueError if OUT was begun with other settings."""

    def __init__(self, s: Settings, model: Generate, teacher: Teacher | Generate):
        self.s, self.model, self.teacher, self.out = s, model, teacher, Path(s.out)
        names = ("model", "dtype", "max_new_tokens", "temperature", "max_pixels", "columns", "form",
                 "right_share")
        made = *self.out.glob("first_answers.jsonl"), *self.out.glob("rejected.jsonl")
        if not any(file.stat().st_size for file in made):               # nothing was, with those
            (self.out / "settings.json").unlink(missing_ok=True)
        Journal(self.out / "settings.json", {name: getattr(s, name) for name in names} | {
            "rows": Path(s.rows).name, "teacher": s.teacher_model or None}).close()
        self.answers = data.open_journal(self.out / "first_answers.jsonl", id=str, response=str)
        self.reflections = data.open_journal(self.out / "reflections.jsonl", id=str,
                                             first_correct=bool)
        self.rejections = data.Rejections(self.out, loud=False)
        self.first = {line["id"]: line["response"] for line in self.answers.rows}
        self.right: dict[str, bool] = {}        # of those that can be judged, by id as well
        self.kept = {line["id"]: line["first_correct"] for line in self.reflections.rows}
        self.silent, self.left = [], []         # failures since the last reply; rows without one
        self.lock, self.stop = Lock(), Event()

    def run(self, rows: list[Row], rejected: dict[str, str]) -> None:
        """What `read_rows` gives. RuntimeError if the teacher is down or left rows without a reply:
        those are not rejected, the next run tries them."""
        for where, reason in rejected.items():
            self.rejections.add(where, where, reason)
        new = [row for row in rows if not self.done(row) and row.id not in self.first]
        for i in tqdm(range(0, len(new), self.s.batch), "first answers", disable=None):
            some = new[i:i + self.s.batch]
            prompts = [data.first_prompt(row.query) for row in some]
            for row, response in self.ask(self.model, some, prompts):
                self.answers.add({"id": row.id, "response": response})
                self.first[row.id] = response
        rows = self.judged(rows)
        size, workers = (1, self.s.in_flight) if isinstance(self.teacher, Teacher) else (
            self.s.batch, 1)
        chunks = [rows[i:i + size] for i in range(0, len(rows), size)]
        with ThreadPoolExecutor(workers) as pool:       # it waits for what is under way
            list(tqdm(pool.map(self.reflect, chunks), "reflections", len(chunks), disable=None))
        if self.left:
            raise RuntimeError(
                f"teacher {self.teacher.url}: {self.left[-1]}; {len(self.kept)} reflections are "
                f"kept in {self.out}, the same command again goes on")

    def refuse(self, row: Row, reason: object, response: str = "") -> None:
        if row.id not in self.kept:
            self.rejections.add(row.id, row.source, reason, response)

    def done(self, row: Row) -> bool:
        return row.id in self.kept or row.id in self.rejections.seen

    def ask(self, generate: Generate, rows: list[Row], prompts: list[str]) -> list[tuple[Row, str]]:
        """Rows and texts, less what cannot be asked, as a row that is more than the model takes, or
        gets no reply. Only a server raises TeacherError; it is asked one by one."""
        try:
            pairs = list(zip(rows, generate(rows, prompts)))
            self.silent.clear()
            return pairs
        except ValueError as error:
            if len(rows) > 1:
                return [pair for row, text in zip(rows, prompts)
                        for pair in self.ask(generate, [row], [text])]
            self.refuse(rows[0], f"cannot be asked: {error}")
        except TeacherError as error:
            self.silent.append(error)
            if error.down or len(self.silent) >= PATIENCE:
                self.stop.set()
            # before any reply, or so often, the fault may lie with the settings, not with the row
            if error.refused and self.kept and not self.stop.is_set():
                self.refuse(rows[0], f"refused by the teacher: {error}")
            else:
                self.left.append(f"{error}; no reply for {rows[0].source}")
        return []

    def judged(self, rows: list[Row]) -> list[Row]:
        """What is to be reflected on. Rows that are done count for the share of right answers too,
        or what is left of a stopped run would be balanced by itself."""
        for row in (row for row in rows if row.id in self.first):
            try:
                answer = split_first(self.first[row.id])[1]
                self.right[row.id] = bool(default_verify(answer, row.answer))
            except ValueError as error:
                self.refuse(row, error, self.first[row.id])
        if (share := self.s.right_share) is not None:
            right = [row for row in rows if self.right.get(row.id)]
            most = int(share / (1 - share) * (len(self.right) - len(right)) + 1e-9)
            for row in right[most:]:
                self.refuse(row, f"surplus: right first answers make up {share:g} without it")
        return [row for row in rows if row.id in self.right and not self.done(row)]

    def reflect(self, rows: list[Row]) -> None:
        """Ask the teacher until its replies can be read, and keep what they make."""
        for attempt in range(1, TRIES + 1):
            if not rows or self.stop.is_set():
                return
            prompts = [teacher_prompt(row, self.first[row.id], self.right[row.id], self.s.form)
                       for row in rows]
            again = []
            for row, text in self.ask(self.teacher, rows, prompts):
                try:
                    self.keep(row, *parse_reply(text, self.s.form, row.content))
                except ValueError as error:
                    again.append(row)
                    if attempt == TRIES:
                        self.refuse(row, error, text)
            rows = again

    def keep(self, row: Row, reflection: str, think: str | None) -> None:
        """A line of reflections.jsonl; images that are bytes become files beside it."""
        first, correct, images = self.first[row.id], self.right[row.id], []
        target = sft_target(first, reflection, think, row.answer, self.s.form)
        for i, image in enumerate(row.images):
            if isinstance(image, bytes):
                (self.out / "images").mkdir(exist_ok=True)
                (self.out / f"images/{row.id}_{i}").write_bytes(image)
                image = f"images/{row.id}_{i}"
            images.append(image)
        with self.lock:
            self.reflections.add(dict(
                id=row.id, source=row.source, query=row.query, image=images, answer=row.answer,
                content=row.content, first_response=first, first_correct=correct,
                reflection=reflection, think=think, target=target))
            self.kept[row.id] = correct


# Command line

def load_model(s: Settings) -> Generate:
    """The model to be trained, loaded when it is first asked: a resumed run may never ask it. Its
    texts are `Cut` where no end token came."""
    @cache
    def load() -> Callable:
        from reasoning.engine import completer
        try:
            return completer(s, temperature=s.temperature)
        except ValueError as error:
            raise RuntimeError(error) from None         # no row is at fault

    def generate(rows: list[Row], prompts: list[str]) -> list[str]:
        completions = load()([pictures(row, s.max_pixels) for row in rows], prompts)
        return [Cut(c.text) if c.truncated else c.text for c in completions]
    return generate


def main(argv: list[str] | None = None) -> int:
    s = read_command(Settings, argv, about=__doc__.split("\n")[0]).settings
    if not (s.model and s.rows and s.out):
        raise ValueError("--model, --rows and --out are needed; see --help")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this runs as one process; start it without torchrun")
    model = load_model(s)
    work = Work(s, model, Teacher(s, os.environ.get(s.teacher_key)) if s.teacher_url else model)
    work.run(*data.read_rows(s.rows, s.images, s.columns))
    kept, refused = work.kept, work.rejections.seen
    print(f"{s.out}: {len(kept)} reflections, {sum(kept.values())} of them on right first answers; "
          f"rejected: {len(refused)}")
    for kind, n in Counter(reason.partition(":")[0] for reason in refused.values()).most_common():
        print(f"{n:8d}  {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(ending(main))
