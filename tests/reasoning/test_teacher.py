"""reasoning/teacher.py against rewards.py's own reading of a response, a scripted server with
faults, and a real one."""
import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import plumbing.run  # noqa: F401  it imports torch, which tests that look at the clock must not
import rewards
from reasoning import qwen
from reasoning import teacher as t
from reasoning.answers import default_verify
from reasoning.rows import (
    MAX_PIXELS,
    Row,
    first_prompt,
    load_image,
    read_rows,
    reflection_prompt,
)
from tests.conftest import lines, needs, write_arrows, write_rows

ROOT = Path(__file__).parents[2]
REPLY = json.dumps({"reflection": "I counted a plate twice.",
                    "think": "Three and four make seven."})


def answer(rows: list[Row], prompts: list[str] | None = None) -> list[str]:
    """First answers: right for even rows."""
    numbers = [int(row.answer) + int(row.answer) % 2 for row in rows]
    return [f"<think>so many</think> <answer>$\\boxed{{{n}}}$</answer>" for n in numbers]


def teach(rows: list[Row], prompts: list[str]) -> list[str]:
    return [REPLY] * len(rows)


def build(rows, firsts, teacher, out, rejected=None, **options):
    """-> (whether first answers were right, by id; reasons why rows were refused, by id)."""
    work = t.Work(t.Settings(out=str(out), **options), firsts, teacher)
    work.run(rows, rejected or {})
    return work.kept, work.rejections.seen


def Teacher(url, model, key=None, **options) -> t.Teacher:
    return t.Teacher(t.Settings(teacher_url=url, teacher_model=model, **options), key)


# Prompts, targets, replies

def test_targets_as_the_reward_reads_them():
    first = " <think>3 + 4 = 8</think>\n<answer>$\\boxed{8}$</answer>"
    paper = t.sft_target(first, "3 + 4 is 7.", "3 + 4 = 7", "7")
    record = rewards.reflection_reward(paper, "7", verify=default_verify)
    assert (record.format, record.accuracy) == (0.5, 0)
    assert (record.effectiveness, record.reflection) == (0.5, 0.25)
    assert rewards.TAG.findall(paper) == rewards.TAG_ORDER
    release = t.sft_target(first, "3 + 4 is 7.", "ignored", "7", form="release")
    assert release == paper.replace("<think>3 + 4 = 7</think>", "")
    assert release.count("<think>") == 1
    for gold, boxed in (("7", "$\\boxed{7}$"), ("$\\frac{1}{2}$", "$\\boxed{\\frac{1}{2}}$"),
                        ("$\\boxed{x}$", "$\\boxed{x}$"), ("$5", "$\\boxed{$5}$"),
                        ("$a$ or $b$", "$\\boxed{$a$ or $b$}$")):
        assert t.sft_target(first, "r", "t", gold).endswith(f"<answer>{boxed}</answer>")
    with pytest.raises(ValueError, match="second think"):
        t.sft_target(first, "r", None, "7")
    for bad in ("7", "<think>a</think><answer></answer>", "<think>a<answer>b</answer>",
                f"{first}{first}", "<think>a</think><answer>8",
                "<think>a</think><answer>8</answer> and so on",
                "<think>a</think><reflection>b</reflection><answer>c</answer>"):
        with pytest.raises(ValueError, match="^first answer without tags: "):
            t.sft_target(bad, "r", "t", "7")


def test_prompts():
    row = Row("", r"What is {x} in \frac{1}{x}?", [], "{7}")
    right, wrong = (t.teacher_prompt(row, "RESPONSE {0}", correct) for correct in (True, False))
    assert "tighten" in right and "revise" not in right
    assert "revise" in wrong and "tighten" not in wrong
    for text in (right, wrong):
        assert all(part in text for part in (row.query, "{7}", "RESPONSE {0}", '"think"'))
        assert "worked solution" not in text
    assert '"think"' not in t.teacher_prompt(row, "", True, "release")
    row.content = "WORKED"
    assert "WORKED" in t.teacher_prompt(row, "", True)
    assert rewards.TAG.findall(first_prompt("q").rpartition(":")[2]) == rewards.TAG_ORDER[:4]
    pattern = reflection_prompt("q").rpartition("tags:")[2].strip()     # its example obeys it
    assert rewards.reflection_reward(pattern, "final answer").format == 0.5


LATEX = [
    r"\frac{1}{2} \times \theta \neq \nu \text{ab} \beta \rho \sqrt{2} \left( \right) \{x\} \u "
    r"\uparrow \, \nabla \not= \boxed{7}",
    "plain",
    "two\nlines\nTen and one\nNever",
    'quote "x" and c:\\\\d',
    "ünïcode \u2220 \\angle",
    "100\\% \\$5 \\_ \\&",
    "{brace} }{",
]


@pytest.mark.parametrize("text", LATEX)
def test_reply_well_escaped(text):
    for ascii_only in (True, False):
        reply = json.dumps({"reflection": text, "think": text}, ensure_ascii=ascii_only, indent=1)
        thoughts = '<think>Let me see {x}: {"reflection": "draft", "think": "draft"}</think> So:\n'
        for wrapped in (reply, f"```json\n{reply}\n```", f'{{"result": {reply}}}',
                        f'{thoughts}{reply}\nDone. {{"score": 1}}'):
            assert t.parse_reply(wrapped) == (text.strip(), text.strip())


def test_reply_badly_escaped():
    careless = ('{"reflection": "' + LATEX[0] + '", "think": "line\nbreak \\"quoted\\" so\\nNext '
                '$\\\\frac{1}{2}$ \\u00e9"}')
    assert t.parse_reply(careless) == (LATEX[0], 'line\nbreak "quoted" so\nNext $\\frac{1}{2}$ é')


@pytest.mark.parametrize("text, reason", [
    ("", "no JSON with a reflection"),
    ("I cannot help.", "no JSON with a reflection"),
    ('{"reflection": "cut', "no JSON with a reflection"),
    ('{"reflection": " ", "think": "t"}', "no JSON with a reflection"),
    ('{"reflection": ["r"], "think": "t"}', "no JSON with a reflection"),
    ('{"reflection": "r"}', "no JSON with a think"),
    ('{"reflection": "r", "think": null}', "no JSON with a think"),
    ('{"reflection": "see <answer>7</answer>", "think": "t"}', "tags inside the reflection"),
    ('{"reflection": "r", "think": "<think>t</think>"}', "tags inside the think"),
    ("{" * 50, "no JSON with a reflection")])
def test_garbage_replies(text, reason):
    with pytest.raises(ValueError, match=f"^teacher's reply: {reason}$"):
        t.parse_reply(text)


def test_second_think_left_out():
    assert t.parse_reply('{"reflection": "r"}', "release") == ("r", None)
    assert t.parse_reply('{"reflection": "r", "think": "t"}', "release", "worked") == ("r", None)
    assert t.parse_reply('{"reflection": "r"}', "paper", "worked") == ("r", "worked")
    assert t.parse_reply('{"reflection": "r", "think": "t"}', "paper", "worked") == ("r", "t")


@pytest.mark.parametrize("text", [
    '<think>draft: {"reflection": "draft", "think": "draft"} but no,',
    t.Cut('draft: {"reflection": "draft", "think": "draft"} but no,'), t.Cut(REPLY), t.Cut("")])
def test_replies_cut_off(text):
    with pytest.raises(ValueError, match="^teacher's reply: cut off; see --teacher-tokens$"):
        t.parse_reply(text)


@pytest.mark.parametrize("text, reason", [
    *[('{"reflection": ' + part * (n // len(part)), "no JSON with a reflection")
      for part in ("[", '{"a": ', '[{"reflection": ', '{"a" ', '{"', "{ ") for n in (999, 200_000)],
    ('{"reflection": "bad \\ud83d end", "think": "t"}', "half a character inside the reflection"),
    ('{"reflection": "r", "think": "\\udc00"}', "half a character inside the think"),
    ('{"reflection": "bad \ud83d end", "think": "t"}', "half a character inside the reflection")])
def test_nested_replies_and_half_characters(text, reason):
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"^teacher's reply: {reason}$"):
        t.parse_reply(text)
    assert time.monotonic() - start < 10
    assert t.parse_reply(text[:50_000] + "\n" + REPLY) == tuple(json.loads(REPLY).values())


def test_long_first_answers_are_read_in_linear_time():
    for text in ("<think>" + "</think><answer>" * 200_000, "<think>" + " " * 10**6, "<" * 10**6,
                 "<think>a</think>" + " " * 10**6 + "b", "</think> <answer>" * 100_000):
        start = time.monotonic()
        with pytest.raises(ValueError, match="^first answer without tags"):
            t.split_first(text)
        assert time.monotonic() - start < 5


# The pipeline with a local teacher

def test_build_with_a_local_teacher(tmp_path):
    write_rows(tmp_path, 7)
    text = (tmp_path / "rows.jsonl").read_text().replace('"answer": "4"', '"answer": "nan"')
    (tmp_path / "rows.jsonl").write_text(text)
    rows, rejected = read_rows(tmp_path / "rows.jsonl")
    firsts, asked = [], []

    def model(rows, prompts):
        firsts.append(len(rows))
        assert prompts == [first_prompt(row.query) for row in rows]
        return ["no tags" if row.answer == "5" else answer([row])[0] for row in rows]

    def teacher(rows, prompts):
        asked.append([row.answer for row in rows])
        for row, prompt in zip(rows, prompts, strict=True):
            assert ("tighten" in prompt) == (int(row.answer) % 2 == 0)
        return ["garbage" if row.answer == "3" or row.answer == "1" and len(asked) == 1 else REPLY
                for row in rows]

    out = tmp_path / "out"
    rejected = {"x:1": "broken JSON line: 1"} | rejected
    kept, refused = build(rows, model, teacher, out, rejected, batch=4)
    assert list(kept.values()) == [True, True, False, True] and len(refused) == 4
    assert firsts == [4, 2]         # what could not be read is asked again, TRIES times
    assert asked == [["0", "1", "2", "3"], ["1", "3"], ["3"], ["6"]]
    kept, refused = lines(out / "reflections.jsonl"), lines(out / "rejected.jsonl")
    assert [(line["answer"], line["first_correct"]) for line in kept] == [
        ("0", True), ("2", True), ("1", False), ("6", True)]
    for line in kept:
        record = rewards.reflection_reward(line["target"], line["answer"], verify=default_verify)
        assert record.format == 0.5 and record.final_correct
        assert record.first_correct == line["first_correct"]
        assert (line["reflection"], line["think"]) == tuple(json.loads(REPLY).values())
    assert [(line["source"], line["reason"].partition(":")[0], line["response"])
            for line in refused] == [
        ("x:1", "broken JSON line", ""),
        ("rows.jsonl:5", "unreadable ground truth", ""),
        ("rows.jsonl:6", "first answer without tags", "no tags"),
        ("rows.jsonl:4", "teacher's reply", "garbage")]
    before = {path.name: path.read_text() for path in out.iterdir()}
    build(rows, pytest.fail, pytest.fail, out, rejected)        # nothing is left to do
    assert {path.name: path.read_text() for path in out.iterdir()} == before
    begun = f"{out}/settings.json was begun with form 'paper', not 'release'; "
    with pytest.raises(ValueError, match=f"^{re.escape(begun)}"):
        build(rows, answer, teach, out, form="release")
    with pytest.raises(ValueError, match="was begun with model '', not 'b'"):
        build(rows, answer, teach, out, model="b")
    assert {path.name: path.read_text() for path in out.iterdir()} == before
    for bad_setting, words in (({"right_share": 1.0}, "--right-share must be in .*, got 1.0"),
                               ({"batch": 0}, "--batch must be at"),
                               ({"in_flight": 0}, "--in_flight must be at")):
        with pytest.raises(ValueError, match=words):
            build(rows, answer, teach, tmp_path / "other", **bad_setting)
    assert not (tmp_path / "other").exists()


def test_a_folder_in_which_nothing_was_made_takes_other_settings(tmp_path):
    """A mistyped --rows or --model, found before the first answer, does not lock --out."""
    (tmp_path / "rows.jsonl").write_text("{}")                  # what is read may lie there too
    for name in ("row.jsonl", "rows.jsonl"):
        t.Work(t.Settings(out=str(tmp_path), rows=name), pytest.fail, pytest.fail)
    saved = json.loads((tmp_path / "settings.json").read_text().splitlines()[0])
    assert saved["rows"] == "rows.jsonl"


def test_a_row_that_the_teacher_spoils_does_not_end_the_others(tmp_path):
    rows, _ = read_rows(write_rows(tmp_path, 5))
    replies = {"0": '{"reflection": ' + "[" * 2000, "1": '{"reflection": "\\ud83d", "think": "t"}',
               "2": t.Cut(REPLY), "3": "\x1b]0;owned\x07"}
    build(rows, answer, lambda rows, prompts: [replies.get(row.answer, REPLY) for row in rows],
          tmp_path / "out", batch=2)
    assert [line["answer"] for line in lines(tmp_path / "out" / "reflections.jsonl")] == ["4"]
    assert len(lines(tmp_path / "out" / "rejected.jsonl")) == 4
    assert "\x1b" not in (tmp_path / "out" / "rejected.jsonl").read_text()


def mutated(text: bytes, rng: np.random.Generator) -> bytes:
    """Damage of one of the kinds that files suffer: cut, flipped bytes, other JSON, other types."""
    parts = text.split(b"\n")
    i, kind = int(rng.integers(max(1, len(parts) - 1))), int(rng.integers(9))
    if kind == 0:
        return text[:int(rng.integers(len(text)))]
    if kind == 1:
        flipped = bytearray(text)
        for place in rng.integers(len(text), size=int(rng.integers(1, 8))):
            flipped[place] = int(rng.integers(256))
        return bytes(flipped)
    if kind == 2:
        depth = int(rng.choice([100, 500, 900, 2000]))
        parts[i] = b'{"id": ' + b"[" * depth + b"]" * depth + b"}"
    if kind == 3:
        others = [b"[]", b"{}", b"NaN", b"null", b'"id"', b'[["id", 3]]', b"\xff"]
        parts[i] = others[rng.integers(7)]
    if kind in (4, 5):
        record = json.loads(parts[i])
        name = str(rng.choice(list(record)))
        record[name] = [None, 7, [], {}, float("nan"), "\x1b[31m", {"a": [1]}][rng.integers(7)]
        parts[i] = json.dumps(record).encode()
    if kind == 6:
        record = json.loads(parts[i])
        del record[str(rng.choice(list(record)))]
        parts[i] = json.dumps(record).encode()
    if kind == 7:
        parts[i] = parts[i] * 2
    return b"" if kind == 8 else b"\n".join(parts)


def test_damaged_folders(tmp_path):
    """Each damage is one line that names the file, or the row is done again; never a traceback."""
    rows, rejected = read_rows(write_rows(tmp_path, 6))
    build(rows, lambda rows, prompts: ["no tags" if row.answer == "5" else answer([row])[0]
                                       for row in rows],
          teach, tmp_path / "whole", right_share=0.5)
    names, outcomes = sorted(path.name for path in (tmp_path / "whole").iterdir()), Counter()
    assert len(names) == 4
    for seed in range(120):
        rng = np.random.default_rng(seed)
        shutil.copytree(tmp_path / "whole", out := tmp_path / "out")
        name = names[seed % 4]
        (out / name).write_bytes(mutated((out / name).read_bytes(), rng))
        try:
            kept, refused = build(rows, answer, teach, out, right_share=0.5)
            assert {*kept, *refused} >= {row.id for row in rows}
            assert all(isinstance(right, bool) for right in kept.values())
            read_rows(out / "reflections.jsonl")
            outcomes["went on"] += 1
        except (ValueError, OSError) as error:
            assert name in str(error) and "\n" not in str(error)
            outcomes["one line"] += 1
        shutil.rmtree(out)
    assert min(outcomes.values()) > 20


def test_pictures_that_are_bytes_become_files(tmp_path):
    """Beside the reflections, which read_rows reads back, target included."""
    rows, _ = read_rows(write_rows(tmp_path, 3))
    inside = [replace(row, images=[Path(row.images[0]).read_bytes()]) for row in rows]
    build(inside, answer, teach, tmp_path / "out")
    back, _ = read_rows(tmp_path / "out" / "reflections.jsonl")
    pixels = [[load_image(row).tobytes() for row in some] for some in (back, rows)]
    assert pixels[0] == pixels[1]
    assert all(row.target.endswith(f"<answer>$\\boxed{{{row.answer}}}$</answer>") for row in back)


def test_release_form(tmp_path):
    rows, _ = read_rows(write_rows(tmp_path, 2))
    build(rows, answer, lambda rows, prompts: ['{"reflection": "r"}'] * len(rows),
          tmp_path / "out", form="release")
    written = lines(tmp_path / "out" / "reflections.jsonl")
    assert [line["target"].count("<think>") for line in written] == [1, 1]


@pytest.mark.parametrize("share, right", [(None, 10), (0.0, 0), (0.3, 4), (0.5, 10), (0.9, 10)])
def test_right_share_is_a_cap(tmp_path, share, right):
    """Wrong ones come first: a stopped run leaves more right ones than the cap."""
    rows, _ = read_rows(write_rows(tmp_path, 20))
    rows.sort(key=lambda row: int(row.answer) % 2 == 0)
    calls, taught = [], []

    def model(rows, prompts):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(rows)

    def teacher(rows, prompts):
        taught.append(rows)
        if len(taught) == 2:
            raise KeyboardInterrupt
        return teach(rows, prompts)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build(rows, model, teacher, tmp_path / "out", right_share=share, batch=8)
    build(rows, model, teacher, tmp_path / "out", right_share=share, batch=8)
    kept, rejected = (lines(tmp_path / "out" / f"{name}.jsonl")
                      for name in ("reflections", "rejected"))
    assert sum(line["first_correct"] for line in kept) == right and len(kept) == 10 + right
    if share is not None:               # as many as the cap allows, and not one more
        assert right <= share * len(kept)
        assert right == 10 or right + 1 > share * (len(kept) + 1)
    assert [line["reason"].partition(":")[0] for line in rejected] == ["surplus"] * (10 - right)
    assert sum(len(rows) for rows in calls) == 28  # 8, 8 interrupted, and in the second run 12


def test_half_written_lines(tmp_path):
    rows, _ = read_rows(write_rows(tmp_path, 4))
    out = tmp_path / "out"
    build(rows, answer, teach, out)
    files = [out / f"{name}.jsonl" for name in ("first_answers", "reflections")]
    whole = [sorted(path.read_text().splitlines()) for path in files]
    for path in files:
        path.write_bytes(path.read_bytes()[:-7])
    build(rows, answer, teach, out)
    assert [sorted(path.read_text().splitlines()) for path in files] == whole
    files[1].write_text("{broken\n" + files[1].read_text())
    with pytest.raises(ValueError, match="reflections.jsonl line 1 is not a row"):
        build(rows, answer, teach, out)


# A scripted server with faults

@contextmanager
def server(script, port: int = 0):
    """A server on loopback. script(n, body) -> (status, headers, text or dict) for the n-th request
    to the chat endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # no connection outlives the server

        def do_GET(self):
            self.reply(200, {}, {"object": "list", "data": []})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                n = len(state.requests)
                state.requests.append((time.monotonic(), body, self.headers))
                state.active += 1
                state.peak = max(state.peak, state.active)
            try:
                answer = script(n, body)
            finally:
                with state.lock:        # before the reply, after which the next request may come
                    state.active -= 1
            self.reply(*answer)

        def reply(self, status, headers, content):
            text = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            for name, value in (
                {"Content-Type": "application/json", "Content-Length": str(len(text))} | headers
            ).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, address):
            pass  # a client that timed out has hung up

    state = Server(("127.0.0.1", port), Handler)
    state.lock, state.requests, state.active, state.peak = threading.Lock(), [], 0, 0
    state.url = f"http://127.0.0.1:{state.server_port}/v1"
    thread = threading.Thread(
        target=state.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield state
    finally:
        state.shutdown()
        state.server_close()


def chat(text: str) -> tuple[int, dict, dict]:
    choice = {"index": 0, "finish_reason": "stop",
              "message": {"role": "assistant", "content": text}}
    return 200, {}, {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                     "choices": [choice]}


def asked_row(body: dict) -> int:
    return int(re.search(r"Row (\d+):", body["messages"][0]["content"][-1]["text"])[1])


@needs("openai")
def test_request(tmp_path):
    Image.new("RGB", (2000, 1000), (200, 30, 40)).save(tmp_path / "big.png")
    row = Row("i", "q", [str(tmp_path / "big.png"), (tmp_path / "big.png").read_bytes()], "7")
    with server(lambda n, body: chat("hello")) as state:
        assert Teacher(state.url, "name", "secret")([row], ["PROMPT"]) == ["hello"]
        assert Teacher(state.url, "name")([row], ["PROMPT"]) == ["hello"]
    (_, body, headers), (_, _, keyless) = state.requests
    assert headers["Authorization"] == "Bearer secret" and "secret" not in str(keyless)
    assert set(body) == {"model", "messages", "max_completion_tokens"} and body["model"] == "name"
    [message] = body["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "text"]
    assert message["content"][2]["text"] == "PROMPT"
    for part in message["content"][:2]:
        kind, _, encoded = part["image_url"]["url"].partition(",")
        image = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert kind == "data:image/jpeg;base64" and image.format == "JPEG"
        assert 0.99 * MAX_PIXELS < image.width * image.height <= MAX_PIXELS
        assert image.width / image.height == pytest.approx(2, abs=0.01)
        assert np.abs(np.asarray(image, dtype=int) - (200, 30, 40)).max() <= 3


@needs("openai")
def test_faults_one_by_one(tmp_path):
    rows, _ = read_rows(write_rows(tmp_path, 6))
    seen = dict.fromkeys(range(6), 0)
    times = {}

    def script(n, body):
        i = asked_row(body)
        seen[i] += 1
        times.setdefault(i, []).append(time.monotonic())
        if i == 1 and seen[i] == 1:
            return 500, {}, {"error": "oops"}
        if i == 2 and seen[i] == 1:
            return 429, {"Retry-After": "1"}, {"error": "slow down"}
        if i == 3:
            return 400, {}, {"error": {"message": "image\nrefused"}}
        if i == 4:
            return chat("I will not answer in JSON.")
        if i == 5 and seen[i] == 1:
            return chat(REPLY[:20])
        return chat(f"```json\n{REPLY}\n```")

    with server(script) as state:
        build(rows, answer, Teacher(state.url, "m"), tmp_path / "out", in_flight=1)
    assert seen == {0: 1, 1: 2, 2: 2, 3: 1, 4: t.TRIES, 5: 2}
    assert 0.3 < times[1][1] - times[1][0]          # a growing pause
    assert 1 <= times[2][1] - times[2][0] < 3       # Retry-After
    kept = lines(tmp_path / "out" / "reflections.jsonl")
    assert [line["answer"] for line in kept] == list("0125")
    assert [(line["source"], line["reason"], line["response"])
            for line in lines(tmp_path / "out" / "rejected.jsonl")] == [
        ("rows.jsonl:4",
         'refused by the teacher: HTTP 400 {"error": {"message": "image\\nrefused"}}', ""),
        ("rows.jsonl:5", "teacher's reply: no JSON with a reflection",
         "I will not answer in JSON.")]


@needs("openai")
def test_refused_rows_in_a_row_are_no_silent_end(tmp_path):
    """After a reply a refusal is its row's fault; after PATIENCE of them in a row the run stops and
    says so, and the next one goes on."""
    rows, _ = read_rows(write_rows(tmp_path, 14))
    refused = range(1, 1 + t.PATIENCE)

    def script(n, body):
        return (400, {}, {"error": "no"}) if asked_row(body) in refused else chat(REPLY)

    said = f"HTTP 400 .*; no reply for rows.jsonl:{refused[-1] + 1}; 1 reflections are kept"
    with server(script) as state:
        teacher = Teacher(state.url, "m", retries=0)
        with pytest.raises(RuntimeError, match=said):
            build(rows, answer, teacher, tmp_path / "out", in_flight=1)
        build(rows, pytest.fail, teacher, tmp_path / "out", in_flight=1)
    assert len(lines(tmp_path / "out" / "reflections.jsonl")) == 14 - len(refused)
    assert [line["source"] for line in lines(tmp_path / "out" / "rejected.jsonl")] == [
        f"rows.jsonl:{i + 1}" for i in refused]


@needs("openai")
def test_rows_without_a_reply_are_left_for_the_next_run(tmp_path):
    rows, _ = read_rows(write_rows(tmp_path, 5))
    hang = threading.Event()

    def script(n, body):
        if asked_row(body) == 2 and not hang.is_set():
            hang.wait(5)
        return chat(REPLY)

    with server(script) as state:
        teacher, start = Teacher(state.url, "m", retries=1, timeout=0.3), time.monotonic()
        with pytest.raises(RuntimeError) as error:
            build(rows, answer, teacher, tmp_path / "out")
        assert str(error.value) == (
            f"teacher {state.url}: no reply within 0.3 s; no reply for rows.jsonl:3; 4 reflections "
            f"are kept in {tmp_path / 'out'}, the same command again goes on")
        assert time.monotonic() - start < 4
        assert sum(asked_row(body) == 2 for _, body, _ in state.requests) == 2
        hang.set()
        build(rows, pytest.fail, Teacher(state.url, "m"), tmp_path / "out")
    kept = lines(tmp_path / "out" / "reflections.jsonl")
    assert sorted(line["answer"] for line in kept) == list("01234")
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


@needs("openai")
@pytest.mark.parametrize("reply, requests, message", [
    ((401, {}, {"error": "key"}), 1, 'HTTP 401 .is the key right\\?. {"error": "key"}'),
    ((404, {}, {"error": "where"}), 1, "HTTP 404 .are the URL and the model's name right\\?."),
    # nothing kept yet: a setting at fault
    ((400, {}, {"detail": "no model"}), t.PATIENCE, 'HTTP 400 {"detail": "no model"}'),
    ((503, {}, {}), t.PATIENCE, "HTTP 503"),
    ((200, {"Content-Type": "text/html"}, "<html>"), t.PATIENCE,
     "the reply is no chat completion; does the URL end in /v1\\?"),
    ((200, {}, "{not json"), t.PATIENCE, "the reply is no chat completion"),
    ((200, {}, {"choices": []}), t.PATIENCE, "the reply is no chat completion")])
def test_a_teacher_that_is_no_use_stops_the_run(tmp_path, reply, requests, message):
    rows, _ = read_rows(write_rows(tmp_path, 12))
    with server(lambda n, body: reply) as state:
        said = f"^teacher {state.url}: {message}.*; no reply for rows.jsonl:{requests}; 0 ref"
        with pytest.raises(RuntimeError, match=said):
            build(rows, answer, Teacher(state.url, "m", retries=0), tmp_path / "out", in_flight=1)
        assert len(state.requests) == requests
    assert len(lines(tmp_path / "out" / "first_answers.jsonl")) == 12
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


@needs("openai")
def test_failures_between_replies_do_not_stop_the_run(tmp_path):
    rows, _ = read_rows(write_rows(tmp_path, 2 * t.PATIENCE + 2))
    n = len(rows)
    said = f"HTTP 503 .*; no reply for rows.jsonl:{n}; {n // 2} reflections are kept"
    with server(lambda n, body: (503, {}, {}) if asked_row(body) % 2 else chat(REPLY)) as state:
        with pytest.raises(RuntimeError, match=said):
            build(rows, answer, Teacher(state.url, "m", retries=0), tmp_path / "out", in_flight=1)


def slowly(n, body):
    time.sleep(0.1)
    return chat(REPLY)


@needs("openai")
@pytest.mark.parametrize("in_flight", [1, 4])
def test_requests_in_flight(tmp_path, in_flight):
    rows, _ = read_rows(write_rows(tmp_path, 12))
    with server(slowly) as state:
        teacher = Teacher(state.url, "m")
        start = time.monotonic()
        build(rows, answer, teacher, tmp_path / "out", in_flight=in_flight)
        seconds = time.monotonic() - start
    assert state.peak == in_flight and len(state.requests) == 12
    assert seconds > 1.2 / in_flight and (in_flight == 1 or seconds < 1.2)
    kept = lines(tmp_path / "out" / "reflections.jsonl")
    assert sorted(int(line["answer"]) for line in kept) == list(range(12))


@needs("openai")
def test_an_error_of_ours_stops_the_queue_and_keeps_what_is_in_flight(tmp_path, monkeypatch):
    rows, _ = read_rows(write_rows(tmp_path, 30))
    prompt = t.teacher_prompt

    def full(row, *more):
        if row.answer == "1":
            raise OSError("the disk is full")
        return prompt(row, *more)

    monkeypatch.setattr(t, "teacher_prompt", full)
    with server(slowly) as state:
        with pytest.raises(OSError, match="^the disk is full$"):
            build(rows, answer, Teacher(state.url, "m"), tmp_path / "out", in_flight=3)
    assert len(lines(tmp_path / "out" / "reflections.jsonl")) == len(state.requests) < 10


@needs("openai")
def test_a_picture_that_is_gone_costs_its_row(tmp_path):
    rows, _ = read_rows(write_rows(tmp_path, 3))
    (tmp_path / "1.png").unlink()       # after it was checked
    with server(lambda n, body: chat(REPLY)) as state:
        kept, refused = build(rows, answer, Teacher(state.url, "m"), tmp_path / "out")
    assert len(kept) == 2
    assert list(refused.values()) == [f"cannot be asked: missing image: {tmp_path}/1.png"]


@needs("openai")
@pytest.mark.parametrize("content, why, read", [
    ([{"type": "text", "text": REPLY[:9]}, {"type": "text", "text": REPLY[9:]}], "stop", True),
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "{"}]},
      {"type": "text", "text": REPLY}], "stop", True),
    (REPLY, None, True), (REPLY, "length", False), ("<think>" + REPLY, "stop", False),
    (None, "stop", False), ([], "stop", False), ([{"type": "refusal"}], "stop", False)])
def test_content_of_other_forms(tmp_path, content, why, read):
    """Parts are joined; what was cut off is refused, with the reason."""
    rows, _ = read_rows(write_rows(tmp_path, 1))
    body = chat(content)[2]
    body["choices"][0]["finish_reason"] = why
    with server(lambda n, _: (200, {}, body)) as state:
        kept, refused = build(rows, answer, Teacher(state.url, "m"), tmp_path / "out")
    assert (len(kept), len(refused)) == (read, not read)
    if why == "length" or content and content[0] == "<":
        assert list(refused.values()) == ["teacher's reply: cut off; see --teacher-tokens"]


@needs("openai")
@pytest.mark.parametrize("reply, message", [
    ((200, {}, {"error": {"message": "model \x1b[31moverloaded"}}),
     r"an error in place of a reply: .*model .*x1b.31moverloaded"),
    ((200, {}, {"error": "no model", "choices": None}), "an error in place of a reply: no model"),
    ((200, {}, "[" * 100_000), "the reply is no chat completion"),
    ((200, {}, {"choices": [{"message": {"content": 7}}]}), "the reply is no chat completion"),
    ((200, {}, {"choices": [{"message": {"content": [7]}}]}), "the reply is no chat completion"),
    ((200, {}, {"choices": {"a": 1}}), "the reply is no chat completion"),
    ((500, {}, "\x1b]0;owned\x07\r\n" * 900), r"HTTP 500 \\x1b\]0;owned"),
    ((400, {}, {"error": "wrong key sesame-street"}), r'HTTP 400 {"error": "wrong key \*\*\*"}')])
def test_what_a_server_says_is_printable(tmp_path, reply, message):
    rows, _ = read_rows(write_rows(tmp_path, 1))
    with server(lambda n, body: reply) as state:
        teacher = Teacher(state.url, "m", "sesame-street", retries=0)
        with pytest.raises(RuntimeError, match=message) as error:
            build(rows, answer, teacher, tmp_path / "out")
    assert str(error.value).isprintable() and len(str(error.value)) < 700


@needs("openai")
def test_credentials_are_not_printed(tmp_path, capfd, caplog):
    caplog.set_level("INFO")
    rows, _ = read_rows(write_rows(tmp_path, 1))
    with server(lambda n, body: (503, {}, {"error": "Basic robin:hood-1 no"})) as state:
        url = state.url.replace("http://", "http://robin:hood%2D1@")
        with pytest.raises(RuntimeError, match=f"^teacher {state.url}: HTTP 503") as error:
            build(rows, answer, Teacher(url, "m", retries=0), tmp_path / "out")
        said, requests = [str(error.value)], state.requests
    with pytest.raises(RuntimeError, match=f"^teacher {state.url}: cannot be reached") as error:
        Teacher(url, "m", retries=0)                                        # it is down now
    said.append(str(error.value))
    for illegal in ("hood-1\nx", "hood-1\u00e9"):
        with pytest.raises(ValueError, match="the key that --teacher-key names plain") as error:
            Teacher(url, "m", illegal, retries=0)
        said.append(str(error.value))
    assert base64.b64decode(requests[0][2]["Authorization"].split()[1]) == b"robin:hood-1"
    for bad in ("http://robin:ho/od-1@host/v1", "http://robin:hood-1@[/v1", "robin:hood-1@host/v1",
                "http://robin:hood-1@/v1", "http://robin:1/hood-1@x", "http://x/v1?key=hood-1",
                "ftp://robin:hood-1@host", "http://robin:hood-1@host:99999999/v1"):
        with pytest.raises(ValueError, match="^--teacher-url must be http://HOST:PORT/v1") as error:
            Teacher(bad, "m", retries=0)
        said.append(str(error.value))
    said += [caplog.text, *capfd.readouterr(), *((tmp_path / "out" / name).read_text() for name in (
        "settings.json", "first_answers.jsonl"))]
    assert not any(word in text for text in said for word in ("hood-1", "hood%2D1", "od-1"))


@needs("openai")
@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_redirects_are_not_followed(tmp_path, code):
    """Pictures and key stay with the host that they were meant for."""
    rows, _ = read_rows(write_rows(tmp_path, 2))
    with server(lambda n, body: chat(REPLY)) as other:
        headers = {"Location": f"{other.url}/chat/completions"}
        with server(lambda n, body: (code, headers, "")) as state:
            with pytest.raises(RuntimeError, match=f"HTTP {code} .redirects are not followed."):
                build(rows, answer, Teacher(state.url, "m", "key"), tmp_path / "out")
        assert other.requests == []


@pytest.mark.slow
@needs("openai")
@pytest.mark.parametrize("headers", [True, False])
def test_a_dripping_server_does_not_hold_the_run(tmp_path, headers):
    """A byte now and then keeps every single read short; the whole request has --timeout."""
    rows, _ = read_rows(write_rows(tmp_path, 1))
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve():
        while not ended.is_set():
            with suppress(OSError):
                connection, _ = listener.accept()
                threading.Thread(target=drip, args=[connection], daemon=True).start()

    def drip(connection):
        with suppress(OSError), connection:
            if b"POST" not in connection.recv(65536):
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                return
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            if not headers:
                connection.sendall(b"Content-Type: application/json\r\n")
                connection.sendall(b"Content-Length: 99999\r\n\r\n")
            while not ended.wait(0.05):
                connection.sendall(b"X: y\r\n" if headers else b" ")

    threading.Thread(target=serve, daemon=True).start()
    try:
        url, start = f"http://127.0.0.1:{listener.getsockname()[1]}/v1", time.monotonic()
        with pytest.raises(RuntimeError, match="no reply within 0.5 s; no reply for rows.jsonl:1"):
            build(rows, answer, Teacher(url, "m", retries=1, timeout=0.5), tmp_path / "out")
        assert 0.9 < time.monotonic() - start < 5
    finally:
        ended.set()
        listener.close()


# The command line, with a model of ten lines

SCRIPT = """
import os, sys
from plumbing.flags import ending
from reasoning import teacher

def load_model(s):
    def generate(rows, prompts):
        assert all(row.query in prompt and "<reflection>" not in prompt
                   for row, prompt in zip(rows, prompts))
        with open(os.environ["LOG"], "a") as file:
            file.writelines(row.answer + "\\n" for row in rows)
        return [f"<think>t</think><answer>{row.answer}</answer>" for row in rows]
    return generate

teacher.load_model = load_model
sys.exit(ending(teacher.main))
"""


def flags(folder: Path, url: str, name: str = "m") -> list[str]:
    return ["--model", "tiny", "--rows", f"{folder}/rows.jsonl", "--out", f"{folder}/out",
            "--teacher-url", url, "--teacher-model", name, "--in-flight", "4"]


def command(folder: Path, url: str, *more: str) -> subprocess.Popen:
    (folder / "script.py").write_text(SCRIPT)
    environment = {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "sesame", "LOG": f"{folder}/log"}
    return subprocess.Popen([sys.executable, folder / "script.py", *flags(folder, url), *more],
                            env=os.environ | environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.slow
@needs("openai")
def test_teacher_down_mid_run_killed_and_resumed(tmp_path, monkeypatch):
    n = 40
    write_rows(tmp_path, n)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{broken\n")
    out, served = tmp_path / "out", []

    def script(delay):
        def reply(n, body):
            time.sleep(delay)
            served.append(asked_row(body))
            return chat(REPLY)
        return reply

    def answers() -> list[int]:
        return [int(line["answer"]) for line in lines(out / "reflections.jsonl")]

    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    # 1. No server at all: said at once, before rows are read or first answers made.
    down = f"^teacher {url}: cannot be reached .*; start it, or give another --teacher-url$"
    with pytest.raises(RuntimeError, match=down):
        Teacher(url, "m", retries=1)
    # 2. The server goes down in the middle.
    with server(script(0.05), port) as state:
        process = command(tmp_path, url, "--retries", "0")
        while len(state.requests) < 12:
            time.sleep(0.01)
            assert process.poll() is None
    code, _, errors = finish(process)
    [line] = errors.strip().splitlines()
    first = answers()
    assert code == 2 and re.fullmatch(
        rf"error: teacher {url}: cannot be reached \(.*\); no reply for rows.jsonl:\d+; "
        rf"{len(first)} reflections are kept in {re.escape(str(out))}, the same command again "
        "goes on", line)
    assert set(first) <= set(served) and len(first) >= 8
    # 3. Killed without warning in the middle, and with a line cut in two.
    with server(script(0.05), port) as state:
        process = command(tmp_path, url)
        while len(answers()) < len(first) + 8:
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    second = answers()
    assert second[:len(first)] == first and len(second) < n
    with (out / "reflections.jsonl").open("a") as file:
        file.write('{"id": "half')
    # 4. To the end.
    with server(script(0), port) as state:
        code, printed, errors = finish(command(tmp_path, url))
        assert code == 0, errors
        assert "sesame" in state.requests[0][2]["Authorization"]
        summary = f"{out}: {n} reflections, {n} of them on right first answers; rejected: 1\n"
        assert f"{summary}       1  broken JSON line" in printed
        # 5. Once more: nothing to do, no request. And with another teacher: refused.
        before, requests = (out / "reflections.jsonl").read_bytes(), len(state.requests)
        monkeypatch.setattr(qwen, "load_vlm", pytest.fail)      # no local model is loaded
        assert t.main(flags(tmp_path, url)) == 0
        with pytest.raises(ValueError, match="was begun with teacher 'm', not 'other'; "):
            t.main(flags(tmp_path, url, "other"))
        assert (out / "reflections.jsonl").read_bytes() == before
        assert len(state.requests) == requests
    # None lost, none twice; first answers made once; asked twice: at most the requests in flight
    # when the two runs ended.
    assert answers()[:len(second)] == second and sorted(answers()) == list(range(n))
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(n))
    assert len(served) - n <= 2 * 4
    assert [line["source"] for line in lines(out / "rejected.jsonl")] == ["rows.jsonl:41"]


def test_flags_that_go_together():
    common = ["--model", "m", "--rows", "x", "--out", "y"]
    with pytest.raises(ValueError, match="^--teacher-url and --teacher-model go together"):
        t.main([*common, "--teacher-url", "http://localhost:1/v1"])
    with pytest.raises(ValueError, match="^--model, --rows and --out are needed"):
        t.main(common[:4])
    with pytest.raises(ValueError, match="^unrecognized arguments: --bogus"):
        t.main([*common, "--bogus"])
    with pytest.raises(ValueError, match="argument --form: invalid choice: 'papper'"):
        t.main([*common, "--form", "papper"])


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(RuntimeError, match="^a teacher behind a URL needs: pip install openai$"):
        Teacher("http://localhost:1/v1", "m")


@needs("openai")
def test_command_with_a_server(base, tmp_path, monkeypatch):
    """First answers of the model, reflections from a server; a question that the model cannot be
    asked is rejected, and named."""
    said = qwen.Completion(torch.tensor([1]), "<think>one</think><answer>a1</answer>", False)

    def generate(model, processor, prompts, max_new_tokens, temperature):
        return [said for _ in prompts]

    monkeypatch.setattr(qwen, "generate", generate)
    path, out = write_arrows(tmp_path / "data", 4), tmp_path / "out"
    rows = lines(path)
    rows[2]["query"] = "from <|image_pad|> a2 go 6 ?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with server(lambda n, body: chat(REPLY)) as state:
        arguments = ["--model", str(base), "--dtype", "float32", "--rows", str(path), "--out",
                     str(out), "--teacher-url", state.url, "--teacher-model", "m"]
        assert t.main(arguments) == 0
        assert t.main(arguments) == 0 and len(state.requests) == 3      # nothing is done twice
    rows, _ = read_rows(out / "reflections.jsonl")
    assert len(rows) == 3 and all("<reflection>" in row.target for row in rows)
    [rejected] = lines(out / "rejected.jsonl")
    assert rejected["source"] == "rows.jsonl:3" and "place holders" in rejected["reason"]


def test_command_with_a_local_model(base, tmp_path, capsys):
    """First answers of a random model have no tags, so every row is rejected with that reason;
    nothing is lost, nothing crashes."""
    path = write_arrows(tmp_path / "data", 3)
    code = t.main(["--model", str(base), "--dtype", "float32", "--max-new-tokens", "5", "--rows",
                   str(path), "--out", str(tmp_path / "out")])
    assert code == 0 and "rejected: 3" in capsys.readouterr().out
    assert len(lines(tmp_path / "out" / "first_answers.jsonl")) == 3


def test_a_model_that_cannot_be_loaded_is_no_row_s_fault(tmp_path):
    write_rows(tmp_path, 3)
    out, folder = tmp_path / "out", tmp_path / "no model"
    folder.mkdir()
    with pytest.raises(RuntimeError, match="no model cannot be loaded"):
        t.main(["--model", str(folder), "--rows", f"{tmp_path}/rows.jsonl", "--out", str(out)])
    assert not (out / "rejected.jsonl").exists()


# transformers' own server

def save_tiny_model(folder: Path) -> None:
    """A LLaVA of 30,000 random weights with a byte tokenizer in which REPLY is one token, taught to
    say it after any prompt.

    (LLaVA, because its processor needs no torchvision; what the server does with a request is the
    same for any model.)
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    base.add_tokens([REPLY])
    base.add_special_tokens(["<pad>", "<eos>", "<image>", "<assistant>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="<pad>", eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>"})
    pad, eos, image, assistant, reply = tokenizer.convert_tokens_to_ids(
        ["<pad>", "<eos>", "<image>", "<assistant>", REPLY])
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=8192,
        pad_token_id=pad, eos_token_id=eos, bos_token_id=None)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                              num_attention_heads=2, image_size=28, patch_size=14)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        tokens = torch.randint(0, 256, (8, 24))  # (8, 24) any prompt
        tokens[:, -3:] = torch.tensor([assistant, reply, eos])
        loss = model(input_ids=tokens, labels=tokens.where(torch.arange(24) >= 22, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.generation_config.update(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    template = ("{% for m in messages %}{% for part in m.content %}"
                "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
                "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    images = CLIPImageProcessorPil(size={"shortest_edge": 28},
                                   crop_size={"height": 28, "width": 28})
    LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1, chat_template=template).save_pretrained(folder)
    model.save_pretrained(folder)


@contextmanager
def served(model: Path, log: Path):
    """The url of transformers' server, once it answers."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--host",
         "127.0.0.1", "--port", str(port), "--device", "cpu"],
        stdout=log.open("w"), stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(1800):  # it imports torch and more, which takes a busy machine a while
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.slow
@pytest.mark.slow
@needs("openai", "fastapi", "uvicorn", "accelerate")
def test_transformers_serve(tmp_path):
    torch.manual_seed(0)
    save_tiny_model(tmp_path / "tiny")
    rows, _ = read_rows(write_rows(tmp_path, 6))
    with served(tmp_path / "tiny", tmp_path / "log") as url:
        teacher = Teacher(url, str(tmp_path / "tiny"), teacher_tokens=8)
        build(rows, answer, teacher, tmp_path / "out", in_flight=3)
        kept = lines(tmp_path / "out" / "reflections.jsonl")
        assert sorted(line["answer"] for line in kept) == list("012345")
        assert all((line["reflection"], line["think"]) == tuple(json.loads(REPLY).values())
                   for line in kept)

        def tokens(*content) -> int:
            return teacher.client.chat.completions.create(
                model=teacher.s.teacher_model, max_completion_tokens=8,
                messages=[{"role": "user", "content": content}]).usage.prompt_tokens

        text = {"type": "text", "text": "q"}
        png = base64.b64encode((tmp_path / "0.png").read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + png}}
        assert tokens(image, text) - tokens(text) == 4      # the model sees it: 2 x 2 patches
        # The server knows no such model
        with pytest.raises(RuntimeError, match="HTTP 400 .*no reply for rows.jsonl"):
            build(rows, answer, Teacher(url, "other", teacher_tokens=8), tmp_path / "other")
        assert not (tmp_path / "other" / "rejected.jsonl").exists()
