"""Many episodes at once: which tasks and initial states, simulators in worker processes, and a policy that plays them.

1. `Suite`: which tasks, how many initial states, how to make the environment; `libero_envs.make_suite` makes one of the real benchmark.
2. `TableBatch`: many chunked environments ("tables") in one process, and `Workers`: one gymnasium `AsyncVectorEnv` per process, replaced
   when it dies.
3. `play`: every policy call covers all running tables; whoever has finished takes the next initial state at once, so nothing idles at the
   end of an episode and no step is simulated after it.
"""
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest

import gymnasium
import numpy as np

from robots import tabletop as envs


@dataclass(frozen=True)
class Start:
    """One initial state: `index` (from 0) of a task's `split`."""
    task: int
    index: int
    split: str = "train"


@dataclass(frozen=True)
class Suite:
    """A set of tasks as training and evaluation need to know it: the built-in one, or LIBERO's (robots/libero.py)."""
    name: str
    instructions: tuple[str, ...]                       # by task number
    tasks: tuple[int, ...]                              # the numbers played
    states: dict[str, int]                              # initial states per task of each split
    make: Callable[..., gymnasium.Env] = envs.Tabletop  # make(size=, horizon=): an environment with advance() and observe() too
    horizon: int | None = envs.HORIZON                  # env steps; None: make's own business
    tables: int = 128                                   # that the processes share; 0: one each
    by_task: bool = False                               # a simulator holds one task, and another costs seconds
    protocol: str = ""                                  # in words, for what is printed
    labels: tuple[str, ...] = ()                        # line of a table that each task counts in (default: its instruction)

    def starts(self, split: str, states: int | None = None) -> list[Start]:
        """The first `states` (default: all) initial states of every task."""
        return [Start(task, index, split) for task in self.tasks for index in range(min(states or self.states[split], self.states[split]))]

    def workers(self, processes: int, size: int, tables: int = 0) -> "Workers":
        """Its environments with images of `size` pixels, in worker processes."""
        return Workers(processes, tables or self.tables or processes,
                       partial(TableBatch, size=size, horizon=self.horizon, make=self.make))


def tabletop(tasks: tuple[int, ...] = ()) -> Suite:
    """The built-in tasks, or some of them by number."""
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--tasks {' '.join(map(str, tasks))}: each once")
    return Suite("tabletop", envs.TASKS, tuple(map(envs.task_id, tasks or range(len(envs.TASKS)))), dict.fromkeys(("train", "heldout"), envs.N_STATES))


class TableBatch(gymnasium.Env):
    """`n` chunked tables of one process stepped by one call, so that pipes and images are paid for once per batch.

    reset(options={"slots": [(slot, Start), ...]}) starts episodes on some tables; step({"chunk": (n, envs.CHUNK, 7), "active": (n,), "every": int})
    advances the active ones. Observation: {"image": uint8 (n, size, size, 3)}; info: executed (n,) int, success (n,) and ended (n,) bool, and
    between (n, (envs.CHUNK - 1) // every, size, size, 3) uint8, of which a table has (executed - 1) // every.
    """

    def __init__(self, n: int, size: int = 64, horizon: int | None = envs.HORIZON, make: Callable[..., gymnasium.Env] = envs.Tabletop):
        self.tables = [envs.ActionChunk(make(size=size, horizon=horizon)) for _ in range(n)]
        self.observation_space = gymnasium.spaces.Dict({"image": gymnasium.spaces.Box(0, 255, (n, size, size, 3), np.uint8)})
        self.action_space = gymnasium.spaces.Dict({"chunk": gymnasium.spaces.Box(-1.0, 1.0, (n, envs.CHUNK, 7), np.float32),
                                                   "active": gymnasium.spaces.MultiBinary(n),
                                                   "every": gymnasium.spaces.Discrete(envs.CHUNK, start=1)})
        self.images = np.zeros((n, size, size, 3), np.uint8)
        if multiprocessing.parent_process():
            signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is the main process's business

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        for slot, start in (options or {}).get("slots", ()):
            self.images[slot] = self.tables[slot].reset(options=vars(start))[0]["image"]
        return {"image": self.images}, {}

    def step(self, action):
        n, every = len(self.tables), int(action["every"])
        executed, success, ended = np.zeros(n, int), np.zeros(n, bool), np.zeros(n, bool)
        between = np.zeros((n, (envs.CHUNK - 1) // every, *self.images.shape[1:]), np.uint8)
        for slot in np.flatnonzero(action["active"]):
            observation, _, terminated, truncated, info = self.tables[slot].step(action["chunk"][slot], every)
            self.images[slot] = observation["image"]
            executed[slot], success[slot], ended[slot] = info["executed"], terminated, terminated or truncated
            for frame, row in zip(info["between"], between[slot]):
                row[:] = frame
        return {"image": self.images}, 0.0, False, False, {"executed": executed, "success": success, "ended": ended, "between": between}


class Workers:
    """Tables spread over worker processes, each a gymnasium AsyncVectorEnv holding one `TableBatch`. Table i lives in process
    i % processes. A process that dies is replaced, and its live tables are brought back by repeating their actions: the
    physics is deterministic, so the episodes end as if nothing had happened."""

    def __init__(self, processes: int = 2, tables: int = 128, make_batch: Callable[[int], gymnasium.Env] = TableBatch):
        if not 1 <= processes <= tables:
            raise ValueError(f"{tables} tables over {processes} processes: there must be a process, and a table for each")
        self.processes, self.tables, self.make_batch, self.replaced = processes, tables, make_batch, 0
        self.counts = [len(range(k, tables, processes)) for k in range(processes)]
        self.envs = [self._spawn(k) for k in range(processes)]
        self.history: dict[int, tuple[Start, list]] = {}        # live tables: where they started, the chunks since

    def _spawn(self, k: int) -> gymnasium.vector.AsyncVectorEnv:
        # forkserver, because a fork of a process with threads or an OpenGL context can hang. It would import the main script
        # again in each worker, torch and all (640 MB instead of 160), if it knew the script's file.
        script = sys.modules["__main__"]
        file, script.__file__ = getattr(script, "__file__", None), None
        try:
            return gymnasium.vector.AsyncVectorEnv([partial(self.make_batch, self.counts[k])], context="forkserver")
        except (EOFError, OSError):
            raise RuntimeError("a worker process died while starting: is memory short, or the OpenGL driver broken?") from None
        finally:
            script.__file__ = file

    def reset(self, starts: dict[int, Start]) -> dict[int, np.ndarray]:
        """Start episodes, {table: Start} -> {table: image uint8 (size, size, 3)}."""
        replies = self._exchange("reset", starts)
        self.history |= {table: (start, []) for table, start in starts.items()}
        return {t: replies[t % self.processes][0]["image"][0, t // self.processes] for t in starts}

    def step(self, chunks: dict[int, np.ndarray], every: int = envs.CHUNK) -> dict[int, tuple[np.ndarray, int, bool, bool, np.ndarray]]:
        """Run a chunk (8, 7) on each given table -> {table: (image, actions executed, success, ended, frames before that image, one after
        each `every` actions: uint8 (n, size, size, 3))}."""
        replies = self._exchange("step", chunks, every)
        results = {}
        for t, chunk in chunks.items():
            (image, *_, info), row = replies[t % self.processes], t // self.processes
            executed, success, ended = (info[key][0, row].item() for key in ("executed", "success", "ended"))
            results[t] = image["image"][0, row], executed, success, ended, info["between"][0, row, :(executed - 1) // every].copy()
            self.history[t][1].append(chunk)
            if results[t][3]:
                del self.history[t]
        return results

    def _exchange(self, method: str, arguments: dict[int, object], every: int = envs.CHUNK) -> dict[int, tuple]:
        """One call on every process concerned, all at work at the same time -> {process: gymnasium's reply}."""
        shares = {k: {t: a for t, a in arguments.items() if t % self.processes == k} for k in range(self.processes)}
        replies, dead = {}, []
        for k in (k for k, share in shares.items() if share):
            try:
                self._send(k, method, shares[k], every)
                replies[k] = None
            except OSError:                                         # the pipe is broken
                dead.append(k)
        for k in replies:
            try:
                replies[k] = self._wait(k, method)
            except (EOFError, OSError):
                dead.append(k)
        return replies | {k: self._revive(k, method, shares[k], every) for k in dead}

    def _send(self, k: int, method: str, share: dict[int, object], every: int = envs.CHUNK) -> None:
        if method == "reset":
            self.envs[k].reset_async(options={"slots": [(t // self.processes, start) for t, start in share.items()]})
        else:
            chunks, active = np.zeros((1, self.counts[k], envs.CHUNK, 7)), np.zeros((1, self.counts[k]), np.int8)
            for t, chunk in share.items():
                chunks[0, t // self.processes], active[0, t // self.processes] = chunk, 1
            self.envs[k].step_async({"chunk": chunks, "active": active, "every": np.array([every])})

    def _wait(self, k: int, method: str) -> tuple:
        """A process's reply. An error there is raised here, an OSError as RuntimeError: it is not the process's death. Its traceback, of which
        gymnasium warns, goes with it."""
        with warnings.catch_warnings(record=True) as said:
            try:
                return getattr(self.envs[k], f"{method}_wait")()
            except Exception as error:
                if not said:
                    raise
                told = RuntimeError(f"{type(error).__name__}: {error}") if isinstance(error, (EOFError, OSError)) else error
                told.add_note("\n".join(str(warning.message) for warning in said))
                raise told

    def _revive(self, k: int, method: str, share: dict[int, object], every: int) -> tuple:
        """Replace process k, repeat what its live tables had done, then make the call that it did not answer."""
        for attempt in range(3):
            self.replaced += 1
            self._kill(k)
            self.envs[k] = self._spawn(k)
            live = {t: past for t, past in self.history.items() if t % self.processes == k}
            calls = [("reset", {t: start for t, (start, _) in live.items()})] if live else []
            for j in range(max((len(chunks) for _, chunks in live.values()), default=0)):
                calls.append(("step", {t: chunks[j] for t, (_, chunks) in live.items() if len(chunks) > j}))
            try:
                for name, past in calls:
                    self._send(k, name, past)
                    self._wait(k, name)
                self._send(k, method, share, every)
                return self._wait(k, method)
            except (EOFError, OSError):
                continue
        raise RuntimeError(f"worker process {k} died {attempt + 2} times in a row: is memory short, or the OpenGL driver broken?")

    def _kill(self, k: int) -> None:
        for process in self.envs[k].processes:
            process.kill()
            process.join()
        self.envs[k].closed = True                                  # nothing left to close in it

    def close(self) -> None:
        for k, env in enumerate(self.envs):
            try:
                env.close()
            except (EOFError, OSError):
                self._kill(k)


@dataclass
class Episode:
    """What happened from one initial state. Per policy call: the image it saw, its record, how many actions ran."""
    start: Start
    images: list[np.ndarray] = field(default_factory=list)      # uint8 (size, size, 3); one more than calls: the last frame
    records: list = field(default_factory=list)                 # whatever the policy wants to keep of each call
    executed: list[int] = field(default_factory=list)
    success: bool = False
    between: list[np.ndarray] = field(default_factory=list)     # uint8 (n, size, size, 3) per call: frames while its actions ran

    @property
    def steps(self) -> int:
        return sum(self.executed)

    @property
    def video(self) -> np.ndarray:
        """The frames the policy looked at and the last one, with those between: uint8 (calls + 1 or more, size, size, 3)."""
        return np.stack([self.images[0], *(frame for during, image in zip_longest(self.between, self.images[1:], fillvalue=())
                                           for frame in (*during, image))])


def play(act: Callable, workers: Workers, starts: list[Start], finished: Callable[[Episode], None] = lambda episode: None,
         suite: Suite | None = None, every: int = envs.CHUNK) -> list[Episode]:
    """One episode from each start, in that order. Tables take the next start as soon as they are free (the next of their last task, if
    another task would need another simulator), and every policy call covers all running tables:
    act(images uint8 (B, size, size, 3), instructions [B]) -> (actions (B, 8, 7), B records). `finished` is told of each episode's end.
    every: env steps between the frames of `Episode.video`; those after a chunk, which the policy wants, cost nothing more.
    """
    suite = suite or tabletop()
    episodes, waiting, running, last = [Episode(s) for s in starts], list(range(len(starts)))[::-1], {}, {}
    while waiting or running:
        free = [t for t in range(workers.tables) if t not in running][:len(waiting)]
        for t in free:
            own = next((i for i in reversed(waiting) if suite.by_task and starts[i].task == last.get(t)), waiting[-1])
            waiting.remove(own)
            running[t], last[t] = episodes[own], starts[own].task
        if free:
            for t, image in workers.reset({t: running[t].start for t in free}).items():
                running[t].images.append(image)
        tables = sorted(running)
        actions, records = act(np.stack([running[t].images[-1] for t in tables]), [suite.instructions[running[t].start.task] for t in tables])
        for t, record in zip(tables, records):
            running[t].records.append(record)
        for t, (image, executed, success, ended, between) in workers.step(dict(zip(tables, actions)), every).items():
            episode = running[t]
            episode.images.append(image), episode.executed.append(executed), episode.between.append(between)
            episode.success = success
            if ended:
                finished(running.pop(t))
    return episodes
