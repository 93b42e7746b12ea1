"""reasoning/teacher.py against rewards.py's own reading of a response, a scripted server with faults, and a real one."""
import argparse
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reasoning import answers
from reasoning import teacher as reflection_teacher
import rewards
from reasoning import qwen as vlm
from tests.conftest import lines, needs, write_rows
from reasoning.rows import MAX_PIXELS, Rejected, Row, first_prompt, load_image, read_rows, reflection_prompt
from reasoning.teacher import Teacher, build

ROOT = Path(__file__).parents[2]
REPLY = json.dumps({"reflection": "I counted a plate twice.", "think": "Three and four make seven."})


def answer(rows: list[Row]) -> list[str]:
    """First answers: right for even rows."""
    return [f"<think>so many</think> <answer>$\\boxed{{{int(row.answer) + int(row.answer) % 2}}}$</answer>" for row in rows]


def teach(rows: list[Row], prompts: list[str]) -> list[str]:
    return [REPLY] * len(rows)


# Prompts, targets, replies

def test_targets_as_the_reward_reads_them():
    first = " <think>3 + 4 = 8</think>\n<answer>$\\boxed{8}$</answer>"
    paper = reflection_teacher.sft_target(first, "3 + 4 is 7.", "3 + 4 = 7", "7")
    record = rewards.reflection_reward(paper, "7")
    assert (record.format, record.accuracy, record.effectiveness, record.reflection) == (0.5, 0, 0.5, 0.25)
    assert rewards.TAG.findall(paper) == rewards.TAG_ORDER
    release = reflection_teacher.sft_target(first, "3 + 4 is 7.", "ignored", "7", form="release")
    assert release == paper.replace("<think>3 + 4 = 7</think>", "") and release.count("<think>") == 1
    for gold, boxed in (("7", "$\\boxed{7}$"), ("$\\frac{1}{2}$", "$\\boxed{\\frac{1}{2}}$"), ("$\\boxed{x}$", "$\\boxed{x}$"),
                        ("$5", "$\\boxed{$5}$"), ("$a$ or $b$", "$\\boxed{$a$ or $b$}$")):
        assert reflection_teacher.sft_target(first, "r", "t", gold).endswith(f"<answer>{boxed}</answer>")
    with pytest.raises(ValueError, match="second think"):
        reflection_teacher.sft_target(first, "r", None, "7")
    for bad in ("7", "<think>a</think><answer></answer>", "<think>a<answer>b</answer>", f"{first}{first}", "<think>a</think><answer>8",
                "<think>a</think><answer>8</answer> and so on", "<think>a</think><reflection>b</reflection><answer>c</answer>"):
        with pytest.raises(ValueError, match="^first answer without tags: "):
            reflection_teacher.sft_target(bad, "r", "t", "7")


def test_prompts():
    row = Row("", r"What is {x} in \frac{1}{x}?", [], "{7}")
    right, wrong = (reflection_teacher.teacher_prompt(row, "RESPONSE {0}", correct) for correct in (True, False))
    assert "tighten" in right and "revise" not in right and "revise" in wrong and "tighten" not in wrong
    for text in (right, wrong):
        assert row.query in text and "{7}" in text and "RESPONSE {0}" in text and '"think"' in text and "worked solution" not in text
    assert '"think"' not in reflection_teacher.teacher_prompt(row, "", True, "release")
    row.content = "WORKED"
    assert "WORKED" in reflection_teacher.teacher_prompt(row, "", True)
    assert rewards.TAG.findall(first_prompt("q").rpartition(":")[2]) == rewards.TAG_ORDER[:4]
    pattern = reflection_prompt("q").rpartition("tags:")[2].strip()
    assert rewards.reflection_reward(pattern, "final answer").format == 0.5      # the example in the prompt obeys the format


LATEX = [r"\frac{1}{2} \times \theta \neq \nu \text{ab} \beta \rho \sqrt{2} \left( \right) \{x\} \u \uparrow \, \nabla \not= \boxed{7}",
         "plain", "two\nlines\nTen and one\nNever", 'quote "x" and c:\\\\d', "ünïcode \u2220 \\angle", "100\\% \\$5 \\_ \\&", "{brace} }{"]


@pytest.mark.parametrize("text", LATEX)
def test_reply_well_escaped(text):
    for ascii_only in (True, False):
        reply = json.dumps({"reflection": text, "think": text}, ensure_ascii=ascii_only, indent=1)
        thoughts = '<think>Let me see {x}: {"reflection": "draft", "think": "draft"}</think> Here it is:\n'
        for wrapped in (reply, f"```json\n{reply}\n```", f'{thoughts}{reply}\nDone. {{"score": 1}}'):
            assert reflection_teacher.parse_reply(wrapped) == (text.strip(), text.strip())


def test_reply_badly_escaped():
    careless = '{"reflection": "' + LATEX[0] + '", "think": "line\nbreak \\"quoted\\" so\\nNext $\\\\frac{1}{2}$ \\u00e9"}'
    assert reflection_teacher.parse_reply(careless) == (LATEX[0], 'line\nbreak "quoted" so\nNext $\\frac{1}{2}$ é')


@pytest.mark.parametrize("text, reason", [
    ("", "no JSON with a reflection"), ("I cannot help.", "no JSON with a reflection"),
    ('{"reflection": "cut', "no JSON with a reflection"), ('{"reflection": " ", "think": "t"}', "no JSON with a reflection"),
    ('{"reflection": ["r"], "think": "t"}', "no JSON with a reflection"),
    ('{"reflection": "r"}', "no JSON with a think"), ('{"reflection": "r", "think": null}', "no JSON with a think"),
    ('{"reflection": "see <answer>7</answer>", "think": "t"}', "tags inside the reflection"),
    ('{"reflection": "r", "think": "<think>t</think>"}', "tags inside the think"), ("{" * 50, "no JSON with a reflection")])
def test_garbage_replies(text, reason):
    with pytest.raises(ValueError, match=f"^teacher's reply: {reason}$"):
        reflection_teacher.parse_reply(text)


def test_second_think_left_out():
    assert reflection_teacher.parse_reply('{"reflection": "r"}', "release") == ("r", None)
    assert reflection_teacher.parse_reply('{"reflection": "r", "think": "t"}', "release", "worked") == ("r", None)
    assert reflection_teacher.parse_reply('{"reflection": "r"}', "paper", "worked") == ("r", "worked")
    assert reflection_teacher.parse_reply('{"reflection": "r", "think": "t"}', "paper", "worked") == ("r", "t")


# The pipeline with a local teacher

def test_build_with_a_local_teacher(tmp_path):
    rows, _ = read_rows(write_rows(tmp_path, 7))
    firsts, asked = [], []

    def first_answers(rows):
        firsts.append(len(rows))
        return ["no tags" if row.answer == "5" else text for row, text in zip(rows, answer(rows))]

    def teacher(rows, prompts):
        asked.append([row.answer for row in rows])
        assert all(("tighten" in prompt) == (int(row.answer) % 2 == 0) for row, prompt in zip(rows, prompts))
        return ["garbage" if row.answer == "3" or row.answer == "1" and len(asked) == 1 else REPLY for row in rows]

    out = tmp_path / "out"
    bad = Rejected("x:1", "x:1", "broken JSON line: 1")
    build(rows, first_answers, teacher, out, batch=4, rejected=[bad],
          verify=lambda prediction, gold: None if gold == "4" else answers.default_verify(prediction, gold))
    assert firsts == [4, 3]
    assert asked == [["0", "1", "2", "3"], ["1", "3"], ["3"], ["6"]]      # only what could not be read is asked again, TRIES times
    kept, rejected = lines(out / "reflections.jsonl"), lines(out / "rejected.jsonl")
    assert [(line["answer"], line["first_correct"]) for line in kept] == [("0", True), ("2", True), ("1", False), ("6", True)]
    for line in kept:
        record = rewards.reflection_reward(line["target"], line["answer"])
        assert record.format == 0.5 and record.final_correct and record.first_correct == line["first_correct"]
        assert (line["reflection"], line["think"]) == tuple(json.loads(REPLY).values())
    assert [(line["source"], line["reason"].partition(":")[0], line["response"]) for line in rejected] == [
        ("x:1", "broken JSON line", ""), ("rows.jsonl:5", "unreadable ground truth", answer(rows[4:5])[0]),
        ("rows.jsonl:6", "first answer without tags", "no tags"), ("rows.jsonl:4", "teacher's reply", "garbage")]
    before = {path.name: path.read_text() for path in out.iterdir()}
    build(rows, pytest.fail, pytest.fail, out, rejected=[bad])                  # nothing is left to do
    assert {path.name: path.read_text() for path in out.iterdir()} == before
    begun = re.escape(f"{out} was begun with form 'paper', not 'release'; give that, or another --out")
    with pytest.raises(ValueError, match=f"^{begun}$"):
        build(rows, answer, teach, out, form="release")
    with pytest.raises(ValueError, match="was begun with model None, not 'b'"):
        build(rows, answer, teach, out, settings={"model": "b"})
    assert {path.name: path.read_text() for path in out.iterdir()} == before
    for bad_setting in ({"form": "papper"}, {"right_share": 1.0}, {"batch": 0}, {"in_flight": 0}):
        with pytest.raises(ValueError, match="the first must be one of"):
            build(rows, answer, teach, tmp_path / "other", **bad_setting)
    assert not (tmp_path / "other").exists()


def test_pictures_that_are_bytes_become_files(tmp_path):
    """Beside the reflections, which read_rows reads back, target included."""
    rows, _ = read_rows(write_rows(tmp_path, 3))
    inside = [replace(row, images=[Path(row.images[0]).read_bytes()]) for row in rows]
    build(inside, answer, teach, tmp_path / "out")
    back, _ = read_rows(tmp_path / "out" / "reflections.jsonl")
    assert [load_image(row).tobytes() for row in back] == [load_image(row).tobytes() for row in rows]
    assert all(row.target.endswith(f"<answer>$\\boxed{{{row.answer}}}$</answer>") for row in back)


def test_release_form(tmp_path):
    rows, _ = read_rows(write_rows(tmp_path, 2))
    build(rows, answer, lambda rows, prompts: ['{"reflection": "r"}'] * len(rows), tmp_path / "out", form="release")
    assert [line["target"].count("<think>") for line in lines(tmp_path / "out" / "reflections.jsonl")] == [1, 1]


@pytest.mark.parametrize("share, right", [(None, 10), (0.0, 0), (0.3, 4), (0.5, 10), (0.9, 10)])
def test_right_share_is_a_cap(tmp_path, share, right):
    rows, _ = read_rows(write_rows(tmp_path, 20))
    rows.sort(key=lambda row: int(row.answer) % 2 == 0)      # wrong ones first: a stopped run leaves more right ones than the cap
    calls, taught = [], []

    def first_answers(rows):
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
            build(rows, first_answers, teacher, tmp_path / "out", right_share=share, batch=8)
    build(rows, first_answers, teacher, tmp_path / "out", right_share=share, batch=8)
    kept, rejected = (lines(tmp_path / "out" / f"{name}.jsonl") for name in ("reflections", "rejected"))
    assert sum(line["first_correct"] for line in kept) == right and len(kept) == 10 + right
    assert share is None or right <= share * len(kept) and (right == 10 or right + 1 > share * (len(kept) + 1))
    assert [line["reason"].partition(":")[0] for line in rejected] == ["surplus"] * (10 - right)
    assert sum(len(rows) for rows in calls) == 28                       # 8, 8 interrupted, and in the second run 12


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
    with pytest.raises(ValueError, match="reflections.jsonl line 1 is broken"):
        build(rows, answer, teach, out)


# A scripted server with faults

@contextmanager
def server(script, port: int = 0):
    """A server on loopback. script(n, body) -> (status, headers, text or dict) for the n-th request to the chat endpoint."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"      # no connection outlives the server

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
                self.reply(*script(n, body))
            finally:
                with state.lock:
                    state.active -= 1

        def reply(self, status, headers, content):
            text = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(text))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request, address):
            pass        # a client that timed out has hung up

    state = Server(("127.0.0.1", port), Handler)
    state.lock, state.requests, state.active, state.peak = threading.Lock(), [], 0, 0
    state.url = f"http://127.0.0.1:{state.server_port}/v1"
    thread = threading.Thread(target=state.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.shutdown()
        state.server_close()


def chat(text: str) -> tuple[int, dict, dict]:
    return 200, {}, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]}


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
    assert seen == {0: 1, 1: 2, 2: 2, 3: 1, 4: reflection_teacher.TRIES, 5: 2}
    assert 0.3 < times[1][1] - times[1][0] and 1 <= times[2][1] - times[2][0] < 3                # backoff, and Retry-After obeyed
    assert [line["answer"] for line in lines(tmp_path / "out" / "reflections.jsonl")] == ["0", "1", "2", "5"]
    assert [(line["source"], line["reason"], line["response"]) for line in lines(tmp_path / "out" / "rejected.jsonl")] == [
        ("rows.jsonl:4", 'refused by the teacher: HTTP 400 {"error": {"message": "image\\nrefused"}}', ""),
        ("rows.jsonl:5", "teacher's reply: no JSON with a reflection", "I will not answer in JSON.")]


@needs("openai")
def test_refused_rows_in_a_row_are_no_silent_end(tmp_path):
    """After a reply a refusal is its row's fault; after PATIENCE of them in a row the run stops and says so, and the next one goes on."""
    rows, _ = read_rows(write_rows(tmp_path, 14))
    refused = range(1, 1 + reflection_teacher.PATIENCE)
    with server(lambda n, body: (400, {}, {"error": "no"}) if asked_row(body) in refused else chat(REPLY)) as state:
        with pytest.raises(RuntimeError, match=f"HTTP 400 .*; no reply for rows.jsonl:{refused[-1] + 1}; 1 reflections are kept"):
            build(rows, answer, Teacher(state.url, "m", retries=0), tmp_path / "out", in_flight=1)
        build(rows, pytest.fail, Teacher(state.url, "m", retries=0), tmp_path / "out", in_flight=1)
    assert len(lines(tmp_path / "out" / "reflections.jsonl")) == 14 - len(refused)
    assert [line["source"] for line in lines(tmp_path / "out" / "rejected.jsonl")] == [f"rows.jsonl:{i + 1}" for i in refused]


@needs("openai")
def test_rows_without_a_reply_are_left_for_the_next_run(tmp_path):
    rows, _ = read_rows(write_rows(tmp_path, 5))
    hang = threading.Event()

    def script(n, body):
        if asked_row(body) == 2 and not hang.is_set():
            hang.wait(5)
        return chat(REPLY)

    with server(script) as state:
        start = time.monotonic()
        with pytest.raises(RuntimeError) as error:
            build(rows, answer, Teacher(state.url, "m", retries=1, timeout=0.3), tmp_path / "out")
        assert str(error.value) == (f"teacher {state.url}: no reply within 0.3 s; no reply for rows.jsonl:3; 4 reflections are kept in "
                                    f"{tmp_path / 'out'}, the same command again goes on")
        assert time.monotonic() - start < 4 and sum(asked_row(body) == 2 for _, body, _ in state.requests) == 2
        hang.set()
        build(rows, pytest.fail, Teacher(state.url, "m"), tmp_path / "out")
    assert sorted(line["answer"] for line in lines(tmp_path / "out" / "reflections.jsonl")) == list("01234")
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


@needs("openai")
@pytest.mark.parametrize("reply, requests, message", [
    ((401, {}, {"error": "key"}), 1, 'HTTP 401 .is the key right\\?. {"error": "key"}'),
    ((404, {}, {"error": "where"}), 1, "HTTP 404 .are the URL and the model's name right\\?."),
    ((400, {}, {"detail": "no model"}), reflection_teacher.PATIENCE, 'HTTP 400 {"detail": "no model"}'),      # nothing kept yet: a setting at fault
    ((503, {}, {}), reflection_teacher.PATIENCE, "HTTP 503"),
    ((200, {"Content-Type": "text/html"}, "<html>"), reflection_teacher.PATIENCE, "the reply is no chat completion; does the URL end in /v1\\?"),
    ((200, {}, "{not json"), reflection_teacher.PATIENCE, "the reply is no chat completion"),
    ((200, {}, {"choices": []}), reflection_teacher.PATIENCE, "the reply is no chat completion")])
def test_a_teacher_that_is_no_use_stops_the_run(tmp_path, reply, requests, message):
    rows, _ = read_rows(write_rows(tmp_path, 12))
    with server(lambda n, body: reply) as state:
        with pytest.raises(RuntimeError, match=f"^teacher {state.url}: {message}.*; no reply for rows.jsonl:{requests}; 0 reflections"):
            build(rows, answer, Teacher(state.url, "m", retries=0), tmp_path / "out", in_flight=1)
        assert len(state.requests) == requests
    assert len(lines(tmp_path / "out" / "first_answers.jsonl")) == 12 and not (tmp_path / "out" / "rejected.jsonl").exists()


@needs("openai")
def test_failures_between_replies_do_not_stop_the_run(tmp_path):
    rows, _ = read_rows(write_rows(tmp_path, 2 * reflection_teacher.PATIENCE + 2))
    with server(lambda n, body: (503, {}, {}) if asked_row(body) % 2 else chat(REPLY)) as state:
        with pytest.raises(RuntimeError, match=f"HTTP 503 .*; no reply for rows.jsonl:{len(rows)}; {len(rows) // 2} reflections are kept"):
            build(rows, answer, Teacher(state.url, "m", retries=0), tmp_path / "out", in_flight=1)


@needs("openai")
@pytest.mark.parametrize("in_flight", [1, 4])
def test_requests_in_flight(tmp_path, in_flight):
    rows, _ = read_rows(write_rows(tmp_path, 12))

    def script(n, body):
        time.sleep(0.1)
        return chat(REPLY)

    with server(script) as state:
        teacher = Teacher(state.url, "m")
        start = time.monotonic()
        build(rows, answer, teacher, tmp_path / "out", in_flight=in_flight)
        seconds = time.monotonic() - start
    assert state.peak == in_flight and len(state.requests) == 12
    assert seconds > 1.2 / in_flight and (in_flight == 1 or seconds < 1.2)
    assert sorted(int(line["answer"]) for line in lines(tmp_path / "out" / "reflections.jsonl")) == list(range(12))


@needs("openai")
def test_an_error_of_ours_stops_the_queue_and_keeps_what_is_in_flight(tmp_path, monkeypatch):
    rows, _ = read_rows(write_rows(tmp_path, 30))
    (tmp_path / "1.png").unlink()        # after it was checked

    def script(n, body):
        time.sleep(0.1)
        return chat(REPLY)

    with server(script) as state:
        with pytest.raises(ValueError, match="^missing image: .*1.png$"):
            build(rows, answer, Teacher(state.url, "m"), tmp_path / "out", in_flight=3)
    assert len(lines(tmp_path / "out" / "reflections.jsonl")) == len(state.requests) < 10


# The command line, as a script of ten lines exposes it

SCRIPT = """
import argparse, sys
from reasoning import answers
from reasoning import teacher as reflection_teacher

def load_model():
    def generate(rows, prompts):
        assert all(row.query in prompt and "<reflection>" not in prompt for row, prompt in zip(rows, prompts))
        with open(args.log, "a") as file:
            file.writelines(row.answer + "\\n" for row in rows)
        return [f"<think>t</think><answer>{row.answer}</answer>" for row in rows]
    return generate

parser = argparse.ArgumentParser()
reflection_teacher.add_arguments(parser)
parser.add_argument("--log")
args = parser.parse_args()
try:
    sys.exit(reflection_teacher.run(args, load_model, {"model": "tiny"}))
except (ValueError, RuntimeError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


def command(folder: Path, url: str, *more: str, **options) -> subprocess.Popen:
    (folder / "script.py").write_text(SCRIPT)
    flags = ["--rows", folder / "rows.jsonl", "--out", folder / "out", "--log", folder / "log"]
    flags += ["--teacher-url", url, "--teacher-model", "m", "--in-flight", "4"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OPENAI_API_KEY": "sesame"}
    return subprocess.Popen([sys.executable, folder / "script.py", *flags, *more], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


@needs("openai")
def test_teacher_down_mid_run_killed_and_resumed(tmp_path):
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

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    # 1. No server at all: said at once, before rows are read or first answers made.
    with pytest.raises(RuntimeError, match=f"^teacher {url}: cannot be reached .*; start it, or give another --teacher-url$"):
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
    assert code == 2 and re.fullmatch(rf"error: teacher {url}: cannot be reached \(.*\); no reply for rows.jsonl:\d+; {len(first)} "
                                      rf"reflections are kept in {re.escape(str(out))}, the same command again goes on", line)
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
        assert f"{out}: {n} reflections, {n} of them on right first answers; rejected: 1\n       1  broken JSON line" in printed
        # 5. Once more: nothing to do, no request. And with another teacher: refused.
        before, requests = (out / "reflections.jsonl").read_bytes(), len(state.requests)
        parser = argparse.ArgumentParser()
        reflection_teacher.add_arguments(parser)
        flags = ["--rows", str(tmp_path / "rows.jsonl"), "--out", str(out), "--teacher-url", url, "--teacher-model"]
        assert reflection_teacher.run(parser.parse_args([*flags, "m"]), pytest.fail, {"model": "tiny"}) == 0      # no local model is loaded
        with pytest.raises(ValueError, match="was begun with teacher 'm', not 'other'; give that, or another --out$"):
            reflection_teacher.run(parser.parse_args([*flags, "other"]), pytest.fail, {"model": "tiny"})
        assert (out / "reflections.jsonl").read_bytes() == before and len(state.requests) == requests
    assert answers()[:len(second)] == second and sorted(answers()) == list(range(n))     # none lost, none twice
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(n))   # first answers were made once
    assert len(served) - n <= 2 * 4                      # asked twice: at most the requests in flight when the two runs ended
    assert [line["source"] for line in lines(out / "rejected.jsonl")] == ["rows.jsonl:41"]


def test_flags_that_go_together(tmp_path):
    parser = argparse.ArgumentParser()
    reflection_teacher.add_arguments(parser)
    with pytest.raises(ValueError, match="^--teacher-url and --teacher-model go together"):
        reflection_teacher.run(parser.parse_args(["--rows", "x", "--out", "y", "--teacher-url", "http://localhost:1/v1"]), pytest.fail)


@needs("openai")
def test_command_with_a_server(base, tmp_path, monkeypatch):
    """First answers of the model, reflections from a server; a question that the model cannot be asked is rejected, and named."""
    monkeypatch.setattr(vlm, "complete", lambda model, processor, images, texts, *more: [
        vlm.Completion(torch.tensor([1]), "<think>one by one</think><answer>a1</answer>", False)
        for _ in [processor.prompt(*turn) for turn in zip(images, texts)]])
    assert subprocess.run([sys.executable, "-m", "reasoning.arrows", "--out", str(tmp_path / "data"), "--rows", "4"], cwd=ROOT).returncode == 0
    path = tmp_path / "data" / "rows.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"query": "from <|image_pad|> a2 go 6 ?"})
    path.write_text("\n".join(lines) + "\n")
    with server(lambda n, body: chat(REPLY)) as state:
        arguments = ["--model", str(base), "--dtype", "float32", "--rows", str(path), "--out", str(tmp_path / "out"),
                     "--teacher-url", state.url, "--teacher-model", "m"]
        assert reflection_teacher.main(arguments) == 0
        assert reflection_teacher.main(arguments) == 0 and len(state.requests) == 3                            # nothing is done twice
    rows, _ = read_rows(tmp_path / "out" / "reflections.jsonl")
    assert len(rows) == 3 and all("<reflection>" in row.target for row in rows)
    [rejected] = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert rejected["source"] == "rows.jsonl:3" and "place holders" in rejected["reason"]


def test_command_with_a_local_model(base, tmp_path, capsys):
    """First answers of a random model have no tags, so every row is rejected with that reason; nothing is lost, nothing crashes."""
    assert subprocess.run([sys.executable, "-m", "reasoning.arrows", "--out", str(tmp_path / "data"), "--rows", "3"], cwd=ROOT).returncode == 0
    code = reflection_teacher.main(["--model", str(base), "--dtype", "float32", "--max-new-tokens", "5", "--rows", str(tmp_path / "data" / "rows.jsonl"),
                    "--out", str(tmp_path / "out")])
    assert code == 0 and "rejected: 3" in capsys.readouterr().out
    assert len((tmp_path / "out" / "first_answers.jsonl").read_text().splitlines()) == 3


# transformers' own server

def save_tiny_model(folder: Path) -> None:
    """A LLaVA of 30,000 random weights with a byte tokenizer in which REPLY is one token, taught to say it after any prompt.

    (LLaVA, because its processor needs no torchvision; what the server does with a request is the same for any model.)
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
                              PreTrainedTokenizerFast)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    base.pre_tokenizer, base.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    base.add_tokens([REPLY])
    base.add_special_tokens(["<pad>", "<eos>", "<image>", "<assistant>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="<eos>",
                                        extra_special_tokens={"image_token": "<image>"})
    pad, eos, image, assistant, reply = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<image>", "<assistant>", REPLY])
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=2, max_position_embeddings=8192, pad_token_id=pad, eos_token_id=eos, bos_token_id=None)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                              patch_size=14)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=image,
                                                      vision_feature_layer=-1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        tokens = torch.randint(0, 256, (8, 24))                             # (8, 24) any prompt
        tokens[:, -3:] = torch.tensor([assistant, reply, eos])
        loss = model(input_ids=tokens, labels=tokens.where(torch.arange(24) >= 22, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.generation_config.update(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    template = ("{% for m in messages %}{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
                "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
                   chat_template=template).save_pretrained(folder)
    model.save_pretrained(folder)


@needs("openai", "fastapi", "uvicorn", "accelerate")
def test_transformers_serve(tmp_path):
    torch.manual_seed(0)
    save_tiny_model(tmp_path / "tiny")
    rows, _ = read_rows(write_rows(tmp_path, 6))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", tmp_path / "tiny",
               "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path / "log"
    process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(1800):       # it imports torch and more, which takes a busy machine a while
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        url = f"http://127.0.0.1:{port}/v1"
        teacher = Teacher(url, str(tmp_path / "tiny"), max_tokens=8)
        build(rows, answer, teacher, tmp_path / "out", in_flight=3)
        kept = lines(tmp_path / "out" / "reflections.jsonl")
        assert sorted(line["answer"] for line in kept) == list("012345")
        assert all((line["reflection"], line["think"]) == tuple(json.loads(REPLY).values()) for line in kept)
        text = teacher.client.chat.completions.create(model=teacher.model, max_completion_tokens=8, messages=[
            {"role": "user", "content": [{"type": "text", "text": "q"}]}])
        url_of = "data:image/png;base64," + base64.b64encode((tmp_path / "0.png").read_bytes()).decode()
        image = teacher.client.chat.completions.create(model=teacher.model, max_completion_tokens=8, messages=[
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url_of}}, {"type": "text", "text": "q"}]}])
        assert image.usage.prompt_tokens - text.usage.prompt_tokens == 4         # the model does see the picture: 2 x 2 patches
        with pytest.raises(RuntimeError, match="HTTP 400 .*no reply for rows.jsonl"):         # the server knows no such model
            build(rows, answer, Teacher(url, "other", max_tokens=8), tmp_path / "other")
        assert not (tmp_path / "other" / "rejected.jsonl").exists()
    finally:
        process.terminate()
        process.wait(10)
