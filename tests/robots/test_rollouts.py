"""robots/rollouts.py: episodes in worker processes, some of which are killed, against tables played
alone in this process."""

import multiprocessing
import os
import random
import re
import signal
import sys
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from robots import find_suite
from robots import tabletop as envs
from robots.flags import SuiteSettings, check_suite
from robots.rollouts import TableBatch, Workers, play
from robots.suite import Episode, Start
from robots.tabletop import HORIZON, Expert, Tabletop

SUITE = find_suite("tabletop")
make_tables = partial(TableBatch, size=64, horizon=HORIZON["tabletop"], make=Tabletop)


def whole(video: np.ndarray) -> np.ndarray:
    return video


def at(start: Start) -> Tabletop:
    env = Tabletop()
    env.reset(options=vars(start))
    return env


def test_batch_renders_only_active_tables(monkeypatch):
    rendered, render = [], Tabletop.render
    monkeypatch.setattr(Tabletop, "render", lambda env: (
        rendered.append(env.data), render(env))[1])
    batch = make_tables((2, 5, 8, 11))
    before = batch.reset({2: Start(0, 0), 11: Start(1, 1)})
    assert before.keys() == {2, 11}
    [(table, (image, executed, *_))] = batch.step({11: np.ones((8, 7))}, 8).items()
    scenes = {id(table.data): t for t, table in batch.tables.items()}
    assert [scenes[id(data)] for data in rendered] == [2, 11, 11]
    assert (table, executed) == (11, 8) and not np.array_equal(before[11], image)


def alone(start: Start) -> tuple[Episode, np.ndarray, list[np.ndarray]]:
    """A table by itself, stepped one action at a time by the expert (every third initial state:
    mistaken and trembling, so that it misses), the chunks (calls, 8, 7) that repeat it, and the
    frame after each step; what follows success in the last chunk must not be executed. Its clip is
    the frames before each chunk and the last."""
    env, episode, chunks, ended = at(start), Episode(start), [], False
    rng, misses = np.random.default_rng([start.task, start.index]), start.index % 3 == 0
    expert = Expert(env, error=0.1 * misses, rng=rng)
    frames = [env.render()]
    seen = []
    while not ended:
        seen.append(frames[-1])
        chunk = []
        while len(chunk) < 8 and not ended:
            chunk.append(expert() + misses * np.array([*rng.normal(0, 0.5, 3), 0, 0, 0, 0]))
            ended = env.advance(chunk[-1])
            frames.append(env.render())
        episode.executed.append(len(chunk))
        chunks.append(np.array(chunk + [np.ones(7)] * (8 - len(chunk))))
    episode.clip = np.stack([*seen, frames[-1]])
    episode.success = env.success
    return episode, np.array(chunks), frames


class Script:
    """act() for `play` that knows what to do from the image alone: KeyError if an image differs in
    one bit."""

    def __init__(self, starts: list[Start]):
        self.truth = {start: alone(start) for start in starts}
        self.chunks, self.batches = {}, []
        for episode, chunks, _ in self.truth.values():
            for image, chunk in zip(episode.clip, chunks):
                self.chunks[image.tobytes(), envs.TASKS["tabletop"][episode.start.task]] = chunk

    def __call__(self, images, instructions):
        self.batches.append(len(images))
        return np.array(
            [self.chunks[i.tobytes(), text] for i, text in zip(images, instructions)]
        ), instructions

    def check(self, episodes: list[Episode], starts: list[Start], every: int = 8) -> None:
        assert [e.start for e in episodes] == starts
        for e in episodes:
            truth, _, frames = self.truth[e.start]
            assert (e.executed, e.success) == (truth.executed, truth.success), e.start
            assert e.calls == [envs.TASKS["tabletop"][e.start.task]] * len(e.executed)
            assert e.steps == sum(truth.executed)
            if every == 8:
                np.testing.assert_array_equal(e.clip, truth.clip)
            np.testing.assert_array_equal(e.clip, [*frames[:-1:every], frames[-1]])


STARTS = [
    Start(task, index, split)
    for index, split in ((0, "train"), (7, "heldout"), (20, "train"), (33, "heldout"))
    for task in range(4)
]


@pytest.fixture(scope="module")
def script() -> Script:
    script = Script(STARTS)
    wins = sum(e.success for e, *_ in script.truth.values())
    assert (
        6 <= wins <= 12 and len({len(c) for _, c, _ in script.truth.values()}) > 1
    )  # both outcomes, several lengths
    assert len(script.chunks) == sum(
        len(c) for _, c, _ in script.truth.values()
    )  # no two calls saw the same image
    return script


@pytest.fixture(scope="module")
def workers():
    workers = SUITE.workers(2, 64, 5)
    yield workers
    workers.close()


def test_workers_equal_a_table_alone(script, workers):
    """Tables addressed in any order, each at its own stage of its own episode."""
    shuffle, tables = random.Random(0), dict(zip((3, 0, 4, 1, 2), STARTS[2:7]))
    for t, image in workers.reset(tables).items():
        np.testing.assert_array_equal(image, script.truth[tables[t]][0].clip[0])
    stage, running = dict.fromkeys(tables, 0), list(tables)
    while running:
        shuffle.shuffle(running)
        chosen = running[: shuffle.randint(1, len(running))]  # the others wait
        for t, (image, executed, success, ended, *_) in workers.step(
            {t: script.truth[tables[t]][1][stage[t]] for t in chosen}
        ).items():
            truth, chunks, _ = script.truth[tables[t]]
            stage[t] += 1
            last = stage[t] == len(chunks)
            assert (executed, success, ended) == (
                truth.executed[stage[t] - 1],
                truth.success and last,
                last,
            )
            np.testing.assert_array_equal(image, truth.clip[stage[t]])
            if ended:
                running.remove(t)


def test_more_episodes_than_tables(script, workers):
    done, starts = [], STARTS + STARTS[:3]  # 19 episodes, some twice, on 5 tables
    random.Random(1).shuffle(starts)
    script.batches.clear()
    episodes = play(script, workers, starts, SUITE, clip=whole, finished=done.append)
    script.check(episodes, starts)
    assert sorted(map(id, done)) == sorted(map(id, episodes))  # each is told of once
    assert len(done) == 19 and workers.replaced == 0
    assert workers.history == {}  # nothing is kept of episodes that ended
    assert script.batches[0] == 5 and sum(script.batches) == sum(
        len(script.truth[s][1]) for s in starts
    )


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 4])
def test_frames_between_those_that_the_policy_sees(script, workers, every):
    episodes = play(script, workers, STARTS[:8], SUITE, every=every, clip=whole)
    script.check(episodes, STARTS[:8], every)


def test_of_a_video_only_what_was_asked_for_is_kept(script, workers):
    """Chosen once, when the episode ends, before anybody is told of it; by default nothing."""
    seen, told = [], []

    def choose(video):
        assert video.dtype == np.uint8 and video.shape[1:] == (64, 64, 3)
        seen.append(len(video))
        return video[::7]

    def finished(episode):
        told.append(len(episode.clip))

    episodes = play(script, workers, STARTS[:6], SUITE, every=2, clip=choose, finished=finished)
    lengths = [len(frames[:-1:2]) + 1 for *_, frames in map(script.truth.get, STARTS[:6])]
    assert sorted(seen) == sorted(lengths) and told == [-(-n // 7) for n in seen]
    for episode, (*_, frames) in zip(episodes, map(script.truth.get, STARTS[:6])):
        np.testing.assert_array_equal(episode.clip, [*frames[:-1:2], frames[-1]][::7])
    assert [e.clip for e in play(script, workers, STARTS[:3], SUITE)] == [None] * 3
    assert play(script, workers, [], SUITE) == []


@pytest.mark.slow
def test_dead_workers_are_replaced(script):
    """Killed before a call, in the middle of one, both at once, and between two batches of
    episodes."""
    workers, calls, script.batches = SUITE.workers(2, 64, 9), [], []

    def act(images, instructions):
        calls.append(len(images))
        if len(calls) == 2:  # gone before the call: its pipe is broken
            workers.processes[0].kill(), workers.processes[0].join()
        if len(calls) == 4:  # gone while the call waits for its answer
            os.kill(workers.processes[1].pid, signal.SIGSTOP)
            threading.Timer(0.2, workers.processes[1].kill).start()
        if len(calls) == 7:  # with tables that started at different times
            workers.processes[0].kill(), workers.processes[1].kill()
        return script(images, instructions)

    try:
        script.check(play(act, workers, STARTS, SUITE, every=2, clip=whole), STARTS, 2)
        assert len(calls) > 7 and workers.replaced == 4
        workers.processes[1].kill(), workers.processes[1].join()
        script.check(play(script, workers, STARTS[:4], SUITE, clip=whole), STARTS[:4])
        assert workers.replaced == 5
        workers.patience = 1.0          # one that hangs is replaced as one that died
        os.kill(workers.processes[0].pid, signal.SIGSTOP)
        script.check(play(script, workers, STARTS[:4], SUITE, clip=whole), STARTS[:4])
        assert workers.replaced == 6
    finally:
        workers.close()


class Dying(TableBatch):
    def step(self, chunks, every):
        os._exit(1)


def test_worker_that_always_dies():
    workers = Workers(1, 1, partial(Dying, size=64, horizon=HORIZON["tabletop"], make=Tabletop))
    try:
        workers.reset({0: Start(0, 0)})
        with pytest.raises(RuntimeError, match="^worker process 0 died or hung 4 times in a row"):
            workers.step({0: np.zeros((8, 7))})
    finally:
        workers.close()


class Refusing(TableBatch):
    def step(self, chunks, every):
        raise (ValueError if 0 in chunks else FileNotFoundError)("no such mesh")


@pytest.mark.parametrize("table, error, message", [
    (0, ValueError, "no such mesh"), (1, RuntimeError, "FileNotFoundError: no such mesh")])
def test_an_error_in_a_worker_is_raised_as_it_is(table, error, message):
    """Its message alone, for one line; where it happened stands in its notes, which Python prints
    with a traceback. A file that the worker misses does not pass for its death."""
    workers = Workers(1, 2, partial(Refusing, size=64, horizon=HORIZON["tabletop"], make=Tabletop))
    try:
        workers.reset({table: Start(0, 0)})
        with pytest.raises(error, match="no such mesh") as caught:
            workers.step({table: np.zeros((8, 7))})
        assert workers.replaced == 0 and str(caught.value) == message
        assert "in step" in caught.value.__notes__[0]
    finally:
        workers.close()


class Garbled(TableBatch):
    """Errors as simulators make them."""

    def step(self, chunks, every):
        raise (ValueError("no\nsuch \x1b[31mmesh\r\n  Traceback (most recent call last)\n\ttable"),
               KeyError("mesh\n"), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
               MemoryError())[min(chunks)]


@pytest.mark.slow
@pytest.mark.parametrize("slot, error, start", [
    (0, ValueError, r"no such \\x1b\[31mmesh Traceback \(most recent call last\) table$"),
    (1, RuntimeError, "KeyError: "), (2, RuntimeError, "UnicodeDecodeError: "),
    (3, RuntimeError, "MemoryError: "),
])  # fmt: skip
def test_whatever_a_worker_says_is_one_line(slot, error, start):
    workers = Workers(1, 4, partial(Garbled, size=64, horizon=HORIZON["tabletop"], make=Tabletop))
    try:
        workers.reset({slot: Start(0, 0)})
        with pytest.raises(error) as caught:
            workers.step({slot: np.zeros((8, 7))})
        text = str(caught.value)
        assert re.match(start, text) and "\n" not in text and text.isprintable()
        assert type(caught.value) is error and workers.replaced == 0
    finally:
        workers.close()


def test_frames_between_are_made_for_who_keeps_them(script, workers, monkeypatch):
    asked, step = [], workers.step
    monkeypatch.setattr(
        workers, "step", lambda chunks, every: asked.append(every) or step(chunks, every)
    )
    play(script, workers, STARTS[:3], SUITE, every=1)
    assert set(asked) == {8}
    play(script, workers, STARTS[:3], SUITE, every=1, clip=whole)
    assert asked[-1] == 1


@pytest.mark.parametrize("known", [["spawn"], ["fork", "spawn", "forkserver"]])
def test_the_start_method_is_the_system_s(script, monkeypatch, known):
    """Windows has spawn alone; no worker imports the main script, and its file is known again."""
    used, get_context = [], multiprocessing.get_context

    def context(method):
        kind = get_context(method).Process

        class Process(kind):
            def start(self):
                main = sys.modules["__main__"]
                used.append((method, main.__file__, main.__spec__))
                self.__class__ = kind           # the worker knows no other
                self.start()

        return SimpleNamespace(Process=Process, Pipe=multiprocessing.Pipe)

    monkeypatch.setattr(multiprocessing, "get_context", context)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: known)
    main = sys.modules["__main__"]
    before = main.__file__, main.__spec__
    workers = SUITE.workers(1, 64, 2)
    try:
        script.check(play(script, workers, STARTS[:3], SUITE, clip=whole), STARTS[:3])
    finally:
        workers.close()
    assert used == [(known[-1] if len(known) > 1 else "spawn", None, None)]
    assert (main.__file__, main.__spec__) == before


def test_workers_and_tables_must_match():
    words = "^--workers 3: each needs a table, of 2; set --tables$"
    for refused in (SUITE.count, lambda *numbers: SUITE.workers(numbers[0], 64, numbers[1])):
        with pytest.raises(ValueError, match=words):
            refused(3, 2)
    with pytest.raises(ValueError, match="--workers must be at least 1, got 0"):
        check_suite(SuiteSettings(workers=0, tables=4))
    assert [SUITE.count(2), SUITE.count(2, 2), replace(SUITE, tables=0).count(3)] == [128, 2, 3]


class Recorder:
    """Workers whose episodes last one chunk; notes which task starts on which table."""

    def __init__(self, tables: int):
        self.tables, self.started = tables, []

    def reset(self, starts):
        self.started += [(table, start.task) for table, start in starts.items()]
        return {table: np.zeros((4, 4, 3), np.uint8) for table in starts}

    def step(self, chunks, every):
        none = np.zeros((0, 4, 4, 3), np.uint8)
        return {t: (np.ones((4, 4, 3), np.uint8), 8, True, True, none, 1.0) for t in chunks}


def test_a_table_keeps_its_task_where_another_needs_another_simulator():
    starts = [Start(task, index) for index in range(6) for task in range(3)]

    def act(images, instructions):
        return np.zeros((len(images), 8, 7)), [None] * len(images)

    changes = {}
    for by_task in (True, False):
        workers = Recorder(3)
        episodes = play(act, workers, starts, replace(SUITE, by_task=by_task))
        assert [e.start for e in episodes] == starts and all(e.success for e in episodes)
        assert len(workers.started) == 18
        own = [[task for t, task in workers.started if t == table] for table in range(3)]
        changes[by_task] = sum(a != b for tasks in own for a, b in zip(tasks, tasks[1:]))
    assert changes[True] == 0
    workers = Recorder(2)  # two tables, three tasks: the third is shared, each table changes once
    play(act, workers, starts, replace(SUITE, by_task=True))
    for table in range(2):
        tasks = [task for t, task in workers.started if t == table]
        assert sum(a != b for a, b in zip(tasks, tasks[1:])) == 1
