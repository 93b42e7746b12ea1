"""Many episodes at once: simulators in worker processes, and a policy that plays them.

1. `ActionChunk`: one step of an environment is a chunk of 8 actions, cut short at success.
2. `TableBatch`: many chunked environments ("tables") in one process, stepped by one call.
3. `Workers`: a gymnasium AsyncVectorEnv for each process, replaced when it dies.
4. `play`: every policy call covers all running tables; whoever has finished takes the next initial
   state at once, so nothing idles at the end of an episode and no step is simulated after it.
"""
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary

from plumbing.flags import printable
from robots.suite import CHUNK, Episode, Start, Suite

BROKEN = "is memory short, or the OpenGL driver broken?"


class ActionChunk(gymnasium.Wrapper):
    """One step executes a chunk of actions, (CHUNK, 7), and stops where the episode ends. A single
    frame is rendered, at the end, or one after each `every` actions too, for who wants a video.

    info["executed"]: number of actions that ran before success or the horizon; the tokens of the
    others must not be trained on. info["between"]: the frames before the last, uint8 (H, W, 3)
    each; (executed - 1) // every of them."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.action_space = Box(-1.0, 1.0, (CHUNK, 7), np.float32)

    def step(self, action, every: int = CHUNK):
        if np.shape(action) != (CHUNK, 7):
            raise ValueError(f"a chunk of actions has shape ({CHUNK}, 7), got {np.shape(action)}")
        env, executed, ended, between = self.env.unwrapped, 0, False, []
        while executed < CHUNK and not ended:
            if executed and executed % every == 0:
                between.append(env.observe()["image"])
            ended = env.advance(action[executed])
            executed += 1
        return (env.observe(), float(env.success), env.success, ended and not env.success,
                {"executed": executed, "between": between})


class TableBatch(gymnasium.Env):
    """`n` chunked tables of one process, so that pipes and images are paid for once per batch.

    reset(options={"slots": [(slot, Start), ...]}) starts episodes on some tables;
    step({"chunk": (n, CHUNK, 7), "active": (n,), "every": int}) advances the active ones.
    Observation: {"image": uint8 (n, size, size, 3)}; info: executed (n,) int, success (n,) and
    ended (n,) bool, and between (n, (CHUNK - 1) // every, size, size, 3) uint8, the frames while
    the actions ran, of which a table has (executed - 1) // every."""

    def __init__(self, n: int, size: int, horizon: int | None, make: Callable[..., gymnasium.Env]):
        self.tables = [ActionChunk(make(size=size, horizon=horizon)) for _ in range(n)]
        self.images = np.zeros((n, size, size, 3), np.uint8)
        self.observation_space = Dict({"image": Box(0, 255, self.images.shape, np.uint8)})
        self.action_space = Dict({"chunk": Box(-1.0, 1.0, (n, CHUNK, 7), np.float32),
                                  "active": MultiBinary(n), "every": Discrete(CHUNK, start=1)})
        if multiprocessing.parent_process():
            signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the main process's business

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        for slot, start in (options or {}).get("slots", ()):
            self.images[slot] = self.tables[slot].reset(options=vars(start))[0]["image"]
        return {"image": self.images}, {}

    def step(self, action):
        n, every = len(self.tables), int(action["every"])
        executed, success, ended = np.zeros(n, int), np.zeros(n, bool), np.zeros(n, bool)
        between = np.zeros((n, (CHUNK - 1) // every, *self.images.shape[1:]), np.uint8)
        for slot in np.flatnonzero(action["active"]):
            chunk = action["chunk"][slot]
            seen, _, success[slot], truncated, info = self.tables[slot].step(chunk, every)
            self.images[slot] = seen["image"]
            executed[slot], ended[slot] = info["executed"], success[slot] or truncated
            for frame, row in zip(info["between"], between[slot]):
                row[:] = frame
        info = {"executed": executed, "success": success, "ended": ended, "between": between}
        return {"image": self.images}, 0.0, False, False, info


class Workers:
    """Tables spread over worker processes; table i lives in process i % processes.

    A process that dies is replaced, and its live tables are brought back by repeating their
    actions: the physics is deterministic, so the episodes end as if nothing had happened."""

    def __init__(self, processes: int, tables: int, make_batch: Callable[[int], gymnasium.Env]):
        self.processes, self.tables, self.make_batch = processes, tables, make_batch
        self.counts = [len(range(k, tables, processes)) for k in range(processes)]
        self.envs = [self._spawn(k) for k in range(processes)]
        # Live tables: where they started, the chunks since
        self.history: dict[int, tuple[Start, list]] = {}
        self.replaced = 0

    def _spawn(self, k: int) -> gymnasium.vector.AsyncVectorEnv:
        # Not fork: a fork of a process with threads or an OpenGL context can hang. The new process
        # would import the main script, torch and all (640 MB instead of 160), if it knew which.
        known = multiprocessing.get_all_start_methods()     # Windows has spawn alone
        script = vars(sys.modules["__main__"])
        where = {name: script.get(name) for name in ("__file__", "__spec__")}
        script.update(dict.fromkeys(where))
        try:
            return gymnasium.vector.AsyncVectorEnv(
                [partial(self.make_batch, self.counts[k])],
                context="forkserver" if "forkserver" in known else "spawn")
        except (EOFError, OSError):
            raise RuntimeError(f"a worker process died while starting: {BROKEN}") from None
        finally:
            script.update(where)

    def reset(self, starts: dict[int, Start]) -> dict[int, np.ndarray]:
        """Start episodes, {table: Start} -> {table: image uint8 (size, size, 3)}."""
        replies = self._exchange("reset", starts)
        self.history |= {table: (start, []) for table, start in starts.items()}
        return {t: replies[t % self.processes][0]["image"][0, t // self.processes] for t in starts}

    def step(self, chunks: dict[int, np.ndarray], every: int = CHUNK) -> dict[int, tuple]:
        """Run a chunk (8, 7) on each given table -> {table: (image, actions executed, success,
        ended, the frames before that image: one after each `every` actions, uint8 (n, S, S, 3))}.
        """
        replies = self._exchange("step", chunks, every)
        results = {}
        for t, chunk in chunks.items():
            (image, *_, info), row = replies[t % self.processes], t // self.processes
            executed, success, ended = (info[key][0, row].item()
                                        for key in ("executed", "success", "ended"))
            between = info["between"][0, row, :(executed - 1) // every].copy()
            results[t] = image["image"][0, row], executed, success, ended, between
            self.history[t][1].append(chunk)
            if ended:
                del self.history[t]
        return results

    def _exchange(self, method: str, arguments: dict, every: int = CHUNK) -> dict[int, tuple]:
        """One call on every process concerned, all at work at the same time -> {process: reply}."""
        shares: dict[int, dict] = {}
        for t, argument in arguments.items():
            shares.setdefault(t % self.processes, {})[t] = argument
        replies, dead = {}, []
        for call in (self._send, self._wait):
            for k in [k for k in shares if k not in dead]:
                try:
                    replies[k] = call(k, method, shares[k], every)
                except (EOFError, OSError):                 # its pipe is broken
                    dead.append(k)
        return replies | {k: self._revive(k, method, shares[k], every) for k in dead}

    def _send(self, k: int, method: str, share: dict, every: int = CHUNK) -> None:
        slots = {t // self.processes: value for t, value in share.items()}
        if method == "reset":
            return self.envs[k].reset_async(options={"slots": list(slots.items())})
        n = self.counts[k]
        chunks, active = np.zeros((1, n, CHUNK, 7)), np.zeros((1, n), np.int8)
        for slot, chunk in slots.items():
            chunks[0, slot], active[0, slot] = chunk, 1
        self.envs[k].step_async({"chunk": chunks, "active": active, "every": np.array([every])})

    def _wait(self, k: int, method: str, *_) -> tuple:
        """A process's reply. An error there is one here, of one line, whatever it says, and no
        OSError: it is not the process's death. Its traceback, of which gymnasium warns, is its
        note."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                return getattr(self.envs[k], f"{method}_wait")()
            except Exception as error:
                if not said:
                    raise
                kind = type(error) if type(error) in (ValueError, RuntimeError) else None
                text = printable(" ".join(str(error).split()))
                told = (kind or RuntimeError)(text if kind else f"{type(error).__name__}: {text}")
                told.add_note("\n".join(str(warning.message) for warning in said))
                raise told from None

    def _revive(self, k: int, method: str, share: dict, every: int) -> tuple:
        """Replace process k, repeat what its live tables had done, then make the call that it did
        not answer."""
        live = {t: past for t, past in self.history.items() if t % self.processes == k}
        calls = [("reset", {t: start for t, (start, _) in live.items()}, CHUNK)] if live else []
        for j in range(max((len(chunks) for _, chunks in live.values()), default=0)):
            again = {t: chunks[j] for t, (_, chunks) in live.items() if len(chunks) > j}
            calls.append(("step", again, CHUNK))
        for _ in range(3):
            self.replaced += 1
            self._kill(k)
            self.envs[k] = self._spawn(k)
            try:
                for call in (*calls, (method, share, every)):
                    self._send(k, *call)
                    reply = self._wait(k, call[0])
                return reply
            except (EOFError, OSError):
                continue
        raise RuntimeError(f"worker process {k} died 4 times in a row: {BROKEN}")

    def _kill(self, k: int) -> None:
        for process in self.envs[k].processes:
            process.kill()
            process.join()
        self.envs[k].closed = True                          # nothing left to close in it

    def close(self) -> None:
        for k, env in enumerate(self.envs):
            try:
                env.close()
            except (EOFError, OSError):
                self._kill(k)


def play(act: Callable, workers: Workers, starts: list[Start], suite: Suite, *, every: int = CHUNK,
         clip: Callable[[np.ndarray], np.ndarray] | None = None,
         finished: Callable[[Episode], None] | None = None) -> list[Episode]:
    """One episode from each start, in that order. [VLA 1]

    act(images uint8 (B, S, S, 3), instructions [B]) -> (actions (B, 8, 7), B records). Tables take
    the next start as soon as they are free; the next of their last task, if another task would
    need another simulator. clip: the episode's video, uint8 (T, S, S, 3): the frames that the
    policy saw and the last, with those after each `every` env steps between -> what Episode.clip
    keeps. finished: is told of each episode's end."""
    episodes, waiting = [Episode(start) for start in starts], list(range(len(starts)))[::-1]
    running: dict[int, Episode] = {}
    last: dict[int, int] = {}                               # each table's last task
    film: dict[int, list] = {}                              # running tables' frames
    while waiting or running:
        free = [t for t in range(workers.tables) if t not in running][:len(waiting)]
        for t in free:
            own = next((i for i in reversed(waiting)
                        if suite.by_task and starts[i].task == last.get(t)), waiting[-1])
            waiting.remove(own)
            running[t], last[t] = episodes[own], starts[own].task
        if free:
            images = workers.reset({t: running[t].start for t in free})
            film |= {t: [image] for t, image in images.items()}
        tables = sorted(running)
        texts = [suite.instructions[running[t].start.task] for t in tables]
        actions, records = act(np.stack([film[t][-1] for t in tables]), texts)
        replies = workers.step(dict(zip(tables, actions)), every if clip else CHUNK)
        for t, record in zip(tables, records):
            episode, (image, executed, success, ended, between) = running[t], replies[t]
            film[t] = [*(film[t] if clip else ()), *between, image]
            episode.calls.append(record)
            episode.executed.append(executed)
            episode.success = success
            if ended:
                video = film.pop(t)
                del running[t]
                episode.clip = clip(np.stack(video)) if clip else None
                if finished:
                    finished(episode)
    return episodes
