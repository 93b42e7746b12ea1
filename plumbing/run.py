"""What stands around the algorithm of a training script, so that it need not stand in it.

    run.steps(n)            the loop: seeds, going on after an interruption, Ctrl-C, saving, the bar
    run.mine, run.gather    this rank's part of what all ranks hold; what all ranks have, joined
    run.lap(name)           the seconds since the last lap go into the log under this name
    run.due(every)          is this step one of every n, or the last?
    run.log(row, line)      a line of metrics.jsonl; its gist on the bar, now and then below it
    run.say(text)           words below the bar
    run.keep(...)           what a checkpoint holds, filled from it if the run is resumed
    run.write, run.read     small results in the run's folder, whole or not at all

`launch` makes a Run of a command line.
"""
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from plumbing import checkpoint, plots, ranks
from plumbing.files import Journal, read_json, write_json
from plumbing.flags import Command, check_types, ending, printable, read_command


class Run:
    """A run's settings `s`, its folder `out`, where it stands (`stage`, `step`), and its verbs."""

    def __init__(self, s, out: Path, state: dict | None, script: str):
        self.s, self.out, self.script = s, out, script
        self.fresh, self.resumed = state is None, state is not None
        at = state or {"stage": "", "step": 0, "ended": False}
        self.stage, self.step, self.ended = at["stage"], at["step"], at["ended"]
        self.began, self.pressed = time.time(), []      # Ctrl-C, also in an earlier stage
        self.mine, self.gather = ranks.share, ranks.gather
        self.first_rank = ranks.rank() == 0

    # The loop

    def steps(self, total: int, stage: str = "", log: str = "metrics.jsonl",
              zero: dict | None = None) -> Iterator[int]:
        """Numbers of the steps still to do, up to `total`; fewer after `end` or Ctrl-C. zero: what
        the log says of step 0.

        Each step has random numbers of its own, a function of (seed, step), so a run that was
        resumed repeats one that was not: `rng` for what all ranks decide together, torch's for what
        each samples. A checkpoint is saved every --save_every steps, and at the end."""
        if stage != self.stage:
            self.stage, self.step, self.ended = stage, 0, False
        self.total, done = total, self.step
        self.journal = Journal(self.out / log if self.first_rank else os.devnull, keep=lambda row:
                               isinstance(row.get("step"), int) and 0 < done >= row["step"])
        self.bar = tqdm(total=total, initial=done, desc=self.stage or Path(self.script).stem,
                        unit="step", mininterval=1, dynamic_ncols=True, disable=not self.first_rank)
        with _ctrl_c(self.pressed), self.bar:
            if done == 0:
                if zero:
                    self.journal.add({"step": 0, **zero})
                self.save()
            saved = self.step
            while not self.finished and not any(ranks.gather(self.pressed)):
                self.step += 1
                self.rng = np.random.default_rng([self.s.seed, self.step])
                torch.manual_seed(int(self.rng.integers(2**62)) + ranks.rank())
                self.seconds: dict[str, float] = {}
                self.clock = time.perf_counter()
                yield self.step
                self.bar.update()
                if self.due(self.s.save_every):
                    self.save()
                    saved = self.step
            if saved != self.step:
                self.save()
        self.journal.close()

    @property
    def finished(self) -> bool:
        return self.ended or self.step >= self.total

    def end(self) -> None:
        """This step is the last one."""
        self.ended = True

    def due(self, every: int) -> bool:
        return self.finished or bool(every) and self.step % every == 0

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"] = now - self.clock
        self.clock = now

    # What is told

    def log(self, row: dict, line: str = "", every: int = 5) -> None:
        """A row of metrics, of this step. line: its gist, printed at the first and each `every`-th
        step."""
        self.journal.add({"step": self.step, **row, **self.seconds})
        self.bar.set_postfix_str(line, refresh=False)
        if line and (self.step == 1 or self.step % every == 0):
            laps = "  ".join(f"{k.removeprefix('seconds_')} {x:.1f} s"
                             for k, x in self.seconds.items())
            self.say(f"step {self.step:4d}  {line}  {laps}")

    def say(self, text: str) -> None:
        tqdm.write(printable(text))

    # What stays

    def keep(self, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """From now on checkpoints hold these; a run that is resumed takes them from its own."""
        self.tensors, self.optimizer = tensors, optimizer
        if self.resumed:
            checkpoint.load(self.out / "checkpoint", tensors, optimizer)
            self.resumed = False
        versions = {name: metadata.version(name) for name in (      # on which numbers depend
            "torch", "transformers", "numpy", "mujoco") if find_spec(name)}
        self.write("settings.json", asdict(replace(self.s, out="", resume=""))
                   | {"versions": versions})

    def save(self) -> None:
        state = {"stage": self.stage, "step": self.step, "ended": self.ended,
                 "settings": asdict(self.s)}
        checkpoint.save(self.out / "checkpoint", self.tensors, self.optimizer, state)

    def write(self, name: str, result: dict) -> dict:
        if self.first_rank:
            write_json(self.out / name, result)
        return result

    def once(self, name: str, make: Callable[[], dict]) -> dict:
        """make(), written; a run that was resumed reads what it wrote then."""
        if self.fresh or not ranks.first((self.out / name).exists):
            return self.write(name, make())
        return self.read(name)

    def read(self, name: str) -> dict:
        return ranks.first(lambda: read_json(self.out / name))

    def age(self) -> float:
        """Seconds since this process began."""
        return time.time() - self.began

    def where(self) -> str:
        """"; resumed after step 20 of rl", or nothing."""
        of = f" of {self.stage}" if self.stage else ""
        return "" if self.fresh else f"; resumed after step {self.step}{of}"

    def times(self) -> str:
        """Seconds of the run, and what `eval.py curves` says of a step's."""
        rows = plots.read_metrics(self.out / "metrics.jsonl")
        return f"{self.age():.0f} s; {plots.work([rows])}"

    def stopped(self) -> int:
        """Exit code of a run that has not finished, and how to go on."""
        print(f"stopped after step {self.step}; go on with: "
              f"python {self.script} --resume {shlex.quote(str(self.out))}")
        return 130


@contextmanager
def _ctrl_c(pressed: list) -> Iterator[None]:
    """Within it Ctrl-C makes a list true instead of raising, so that a loop can finish its step and
    save. A second one raises."""
    before = signal.getsignal(signal.SIGINT)

    def handler(*_):
        pressed.append(1)
        signal.signal(signal.SIGINT, before)
        print("\nCtrl-C: finishing this step and saving; press again to stop at once",
              file=sys.stderr)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# From a command line to a Run

def launch(settings: type, work: Callable[[Run], int], argv: list[str] | None = None, *,
           check: Callable, free: set[str], job: Callable, **reading) -> int:
    """A script's exit code: flags -> Run -> work(run), whatever is wrong in one line.

    check(s): ValueError for settings out of range. free: settings that may change on resume.
    job(s) -> plan.Job, for --plan. reading: further arguments of `read_command`."""
    def whole_job() -> int:
        try:
            command = read_command(settings, argv, **reading)
            ranks.start()
            from transformers.utils import logging
            logging.disable_progress_bar()                  # of loading and saving weights
            s, state = _resumed(command, free, ("", *reading.get("words", ())))
            check(s)
            if command.plan:
                from plumbing.plan import show
                return show(s, job)
            out = Path(s.resume or s.out)
            with nullcontext() if ranks.rank() else _locked(out):
                if state is None:
                    _refuse_taken(out)
                code = work(Run(s, out, state, Path(sys.modules[work.__module__].__file__).name))
            ranks.stop()
            return code
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, (torch.OutOfMemoryError, MemoryError))
                    or "can't allocate memory" in str(error)):
                raise
            reason = " ".join(str(error).split())[:120]
            raise RuntimeError(f"out of memory ({reason}); the same command with --plan says what "
                               "needs it, and which flags make it fit") from error
    return ending(whole_job)


def _resumed(command: Command, free: set[str], stages: tuple[str, ...]
             ) -> tuple[object, dict | None]:
    """The settings of a run, and its state if it is to be gone on with: then its own settings, but
    for those that are `free` and given now."""
    s, given = command.settings, command.given
    if not s.resume:
        if "resume" in given:
            raise ValueError("--resume is empty; give the folder of a run")
        return s, None
    if "out" in given:
        raise ValueError(f"--resume goes on in {s.resume}; drop --out")
    state = checkpoint.read_state(Path(s.resume) / "checkpoint")
    saved = state.get("settings")
    kinds = {"stage": str, "step": int, "ended": bool, "settings": dict}
    if ({name: type(x) for name, x in state.items()} != kinds or set(saved) != set(asdict(s))
            or state["step"] < 0 or state["stage"] not in stages):
        raise ValueError(f"{s.resume}/checkpoint is damaged, or was written by another version of "
                         "this script; start a new run with --out")
    check_types(type(s)(**saved), f"{s.resume}/checkpoint")
    # What lay in a folder that has moved since may be named anew
    free = free | {k for k in given if os.path.isabs(x := str(saved[k])) and not os.path.exists(x)
                   and os.path.exists(getattr(s, k))}
    for name in sorted(given - free):
        if getattr(s, name) != saved[name]:
            raise ValueError(f"--{name} {getattr(s, name)} differs from the run's {saved[name]}; "
                             "drop the flag, or start a new run with --out")
    new = {name: getattr(s, name) for name in given & free} | {"out": s.resume, "resume": s.resume}
    return type(s)(**saved | new), state


def _refuse_taken(out: Path) -> None:
    """ValueError if a new run into this folder would overwrite one."""
    if any((out / name / "state.json").exists() for name in ("checkpoint", "checkpoint.old")):
        raise ValueError(f"{out} holds a run already; go on with --resume "
                         f"{shlex.quote(str(out))}, or choose another --out")
    metrics = out / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        raise ValueError(f"{metrics} is of another run; choose another --out")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder is this run's alone while the block lasts: two runs in one would mix settings and
    checkpoints. Of a run that wrote nothing nothing stays. ValueError, one line, if another has the
    folder or nothing can be written there."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written to ({error.strerror}); "
                         "choose another folder") from None
    try:
        lock = FileLock(out / ".lock", timeout=0).acquire()
        with suppress(OSError):
            (out / ".lock").write_text(str(os.getpid()))
    except Timeout:
        raise ValueError(f"{out} is in use by process {(out / '.lock').read_text() or '?'}; wait "
                         "for it, or choose another --out") from None
    except (OSError, NotImplementedError):      # some network disks have no locks
        lock = nullcontext()
    try:
        with lock:
            yield
    finally:
        with suppress(OSError):                         # folders that are not empty stay
            (out / ".lock").unlink(missing_ok=True)
            for path in made:
                path.rmdir()
