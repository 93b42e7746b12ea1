"""Many episodes at once: simulators in worker processes, and a policy that plays them.

1. `run_chunk`: a policy call's 8 actions on an environment, cut short at success.
2. `TableBatch`: the environments ("tables") of one process.
3. `Workers`: processes that answer calls through a pipe, and are replaced when they die.
4. `play`: every policy call covers all running tables; whoever has finished takes the next initial
   state at once, so nothing idles at the end of an episode and no step is simulated after it.
"""
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress

import numpy as np

from plumbing.flags import printable
from robots.suite import CHUNK, Episode, Start, Suite

BROKEN = "is memory short, or the OpenGL driver broken?"


def run_chunk(env, actions: np.ndarray, every: int = CHUNK) -> tuple:
    """Actions (CHUNK, 7) on an environment, until its episode ends -> (image, how many of them ran:
    the tokens of the others must not be trained on, success, ended, the frames before that image:
    one after each `every` actions, the simulator's own progress)."""
    if np.shape(actions) != (CHUNK, 7):
        raise ValueError(f"a chunk of actions has shape ({CHUNK}, 7), got {np.shape(actions)}")
    between = []
    for executed, action in enumerate(actions, 1):
        ended = env.advance(action)
        if ended or executed == CHUNK:
            break
        if executed % every == 0:
            between.append(env.observe()["image"])
    return (env.observe()["image"], executed, bool(env.success), ended, between,
            getattr(env, "progress", np.nan))


class TableBatch:
    """The tables of these numbers, in one process."""

    def __init__(self, tables: Iterable[int], size: int, horizon: int | None, make: Callable):
        self.tables = {t: make(size=size, horizon=horizon) for t in tables}

    def reset(self, starts: dict[int, Start]) -> dict[int, np.ndarray]:
        """As `Workers.reset`."""
        return {t: self.tables[t].reset(options=vars(start))[0]["image"]
                for t, start in starts.items()}

    def step(self, chunks: dict[int, np.ndarray], every: int) -> dict[int, tuple]:
        """As `Workers.step`."""
        return {t: run_chunk(self.tables[t], chunk, every) for t, chunk in chunks.items()}


def serve(pipe, make_batch: Callable[[range], TableBatch], tables: range) -> None:
    """A worker process: answers calls (method, arguments ..) as long as somebody holds the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is the main process's business
    batch = None
    with suppress(EOFError, OSError):
        while True:
            method, *arguments = pipe.recv()
            try:
                batch = batch or make_batch(tables)
                reply = getattr(batch, method)(*arguments)
            except Exception as error:
                reply = _one_line(error)
            pipe.send(reply)


def _one_line(error: Exception) -> Exception:
    """An error of a simulator as the main process raises it; the traceback is its note. Never an
    OSError, which would pass for the process's death."""
    known, text = type(error) in (ValueError, RuntimeError), " ".join(str(error).split())
    told = (type(error) if known else RuntimeError)(
        printable(text if known else f"{type(error).__name__}: {text}"))
    told.add_note("".join(traceback.format_exception(error)))
    return told


class Workers:
    """Tables spread over worker processes; table i lives in process i % processes.

    A process that dies, or does not answer for `patience` seconds, is replaced, and its live tables
    are brought back by repeating their actions: the physics is deterministic, so the episodes end
    as if nothing had happened."""

    def __init__(self, processes: int, tables: int, make_batch: Callable[[range], TableBatch]):
        self.tables, self.make_batch, self.replaced = tables, make_batch, 0
        self.patience = 600         # LIBERO builds a scene in under a minute; OpenGL may hang
        # Live tables: where they started, the chunks since
        self.history: dict[int, tuple[Start, list]] = {}
        self.processes, self.pipes = [None] * processes, [None] * processes
        for k in range(processes):
            self._spawn(k)

    def _spawn(self, k: int) -> None:
        # Not fork: a fork of a process with threads or an OpenGL context can hang. The new process
        # would import the main script, torch and all (640 MB instead of 160), if it knew which.
        known = multiprocessing.get_all_start_methods()     # Windows has spawn alone
        context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
        self.pipes[k], theirs = context.Pipe()
        own = range(k, self.tables, len(self.processes))
        self.processes[k] = context.Process(target=serve, args=(theirs, self.make_batch, own),
                                            daemon=True)
        script = vars(sys.modules["__main__"])
        where = {name: script.get(name) for name in ("__file__", "__spec__")}
        script.update(dict.fromkeys(where))
        try:
            self.processes[k].start()
        except (EOFError, OSError):
            raise RuntimeError(f"a worker process died while starting: {BROKEN}") from None
        finally:
            script.update(where)
            theirs.close()                                  # else its death would not be noticed

    def reset(self, starts: dict[int, Start]) -> dict[int, np.ndarray]:
        """Start episodes, {table: Start} -> {table: image uint8 (size, size, 3)}."""
        images = self._exchange("reset", starts)
        self.history |= {table: (start, []) for table, start in starts.items()}
        return images

    def step(self, chunks: dict[int, np.ndarray], every: int = CHUNK) -> dict[int, tuple]:
        """Run a chunk (8, 7) on each given table -> {table: as from `run_chunk`}."""
        results = self._exchange("step", chunks, every)
        for t, chunk in chunks.items():
            self.history[t][1].append(chunk)
            if results[t][3]:
                del self.history[t]
        return results

    def _exchange(self, method: str, arguments: dict, *more) -> dict:
        """A call on every process concerned, all at work at the same time -> {table: reply}."""
        calls: dict[int, tuple] = {}
        for t, argument in arguments.items():
            k = t % len(self.processes)
            calls.setdefault(k, (method, {}, *more))[1][t] = argument
        for k, call in calls.items():
            with suppress(OSError):                         # a broken pipe: nor will a reply come
                self.pipes[k].send(call)
        replies = {}
        for k, call in calls.items():
            try:
                replies |= self._reply(k)
            except (EOFError, OSError):
                replies |= self._revive(k, call)
        return replies

    def _reply(self, k: int) -> dict:
        if not self.pipes[k].poll(self.patience):
            raise TimeoutError
        reply = self.pipes[k].recv()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _revive(self, k: int, unanswered: tuple) -> dict:
        """Replace process k, repeat what its live tables had done, then make the call that it did
        not answer."""
        live = {t: past for t, past in self.history.items() if t % len(self.processes) == k}
        calls = [("reset", {t: start for t, (start, _) in live.items()})]
        for j in range(max((len(chunks) for _, chunks in live.values()), default=0)):
            again = {t: chunks[j] for t, (_, chunks) in live.items() if len(chunks) > j}
            calls.append(("step", again, CHUNK))
        for _ in range(3):
            self.replaced += 1
            self._kill(k)
            self._spawn(k)
            with suppress(EOFError, OSError):
                for call in (*calls, unanswered):
                    self.pipes[k].send(call)
                    reply = self._reply(k)
                return reply
        raise RuntimeError(f"worker process {k} died or hung 4 times in a row: {BROKEN}") from None

    def _kill(self, k: int) -> None:
        self.pipes[k].close()
        self.processes[k].kill()
        self.processes[k].join()

    def close(self) -> None:
        for k in range(len(self.processes)):
            self._kill(k)


def play(act: Callable, workers: Workers, starts: list[Start], suite: Suite, *, every: int = CHUNK,
         clip: Callable[[np.ndarray], np.ndarray] | None = None,
         finished: Callable[[Episode], None] | None = None) -> list[Episode]:
    """One episode from each start, in that order. [VLA 1]

    act(images uint8 (B, S, S, 3), instructions [B]) -> (actions (B, 8, 7), B records). A free table
    takes the next start; of its last task, if another would need another simulator. clip: the
    video, uint8 (T, S, S, 3), of the frames that the policy saw, the last, and those after each
    `every` env steps -> what Episode.clip keeps. finished: is told of each episode's end."""
    episodes, waiting = [Episode(start) for start in starts], list(range(len(starts)))[::-1]
    running: dict[int, Episode] = {}
    last: dict[int, int] = {}                               # each table's last task
    film: dict[int, list] = {}                              # each table's frames
    while waiting or running:
        free = [t for t in range(workers.tables) if t not in running][:len(waiting)]
        for t in free:
            own = next((i for i in reversed(waiting)
                        if suite.by_task and starts[i].task == last.get(t)), waiting[-1])
            waiting.remove(own)
            running[t], last[t] = episodes[own], starts[own].task
        images = workers.reset({t: running[t].start for t in free})
        film |= {t: [image] for t, image in images.items()}
        tables = sorted(running)
        texts = [suite.instructions[running[t].start.task] for t in tables]
        actions, records = act(np.stack([film[t][-1] for t in tables]), texts)
        replies = workers.step(dict(zip(tables, actions)), every if clip else CHUNK)
        for t, record, chunk in zip(tables, records, actions):
            episode, (image, executed, success, ended, between, progress) = running[t], replies[t]
            film[t] = [*(film[t] if clip else ()), *between, image]
            episode.calls.append(record)
            episode.executed.append(executed)
            episode.actions.append(chunk[:executed])
            episode.success, episode.progress = success, progress
            if ended:
                del running[t]
                episode.clip = clip(np.stack(film.pop(t))) if clip else None
                if finished:
                    finished(episode)
    return episodes
