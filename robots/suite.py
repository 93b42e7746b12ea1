"""Tasks, initial states and rollouts, whatever simulates them; robots/__init__.py lists what does.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

CHUNK = 8           # actions of a policy call, as in OpenVLA-OFT


@dataclass(frozen=True)
class Start:
    """One initial state: `index` (from 0) of a task's `split`."""
    task: int
    index: int
    split: str = "train"


@dataclass
class Episode:
    """What happened from one initial state."""
    start: Start
    calls: list = field(default_factory=list)       # `policy.Call`s; None where none was sampled
    executed: list[int] = field(default_factory=list)   # how many actions of each call's chunk ran
    success: bool = False
    clip: np.ndarray | None = None      # uint8 (T, H, W, 3), the frames that were asked for
    progress: float = np.nan            # true, 0 .. 1, where the simulator knows it
    actions: list[np.ndarray] = field(default_factory=list)     # (executed, 7) of each call

    @property
    def steps(self) -> int:
        return sum(self.executed)


@dataclass(frozen=True)
class SuiteOptions:
    """What only some simulators know: see the flags of robots/flags.py."""
    protocol: str = "openvla-oft"
    horizon: int = 0
    hard: bool = False
    fast: bool = False
    assets: str = ""
    plus: str = ""


@dataclass(frozen=True)
class Suite:
    """A set of tasks, some of which are played, and how. make(size=, horizon=) gives a gymnasium
    environment, which also has advance(action) -> ended, observe() and success."""
    name: str
    instructions: tuple[str, ...]   # by task number
    tasks: tuple[int, ...]          # the numbers that are played
    states: dict[str, int]          # initial states per task of each split
    make: Callable
    split_names: dict[str, str]     # in words, for what is printed
    horizon: int | None = None      # env steps; None: make's own business
    tables: int = 0                 # that the processes share; 0: one each
    by_task: bool = False           # a simulator holds one task, and another costs seconds
    protocol: str = ""              # in words
    labels: tuple[str, ...] = ()    # the line of a table that each task counts in, if not its own
    evaluated: tuple[str, ...] = ("heldout",)       # splits that `eval.py vla` plays by default
    slow: bool = True               # episodes cost seconds: a journal, GIFs of what the policy saw

    def starts(self, split: str, states: int | None = None) -> list[Start]:
        """The first `states` (default all) of every task. ValueError for an unknown split."""
        if split not in self.states:
            raise ValueError(f"--split {split}: {self.name} has {', '.join(self.states)}")
        n = min(states or self.states[split], self.states[split])
        return [Start(task, index, split) for task in self.tasks for index in range(n)]

    def count(self, processes: int, tables: int = 0) -> int:
        """Parallel environments. ValueError if there are fewer than processes."""
        if (count := tables or self.tables or processes) < processes:
            raise ValueError(f"--workers {processes}: each needs a table, of {count}; set --tables")
        return count

    def workers(self, processes: int, size: int, tables: int = 0):
        """Its environments with images of `size` pixels, in worker processes."""
        from robots.rollouts import TableBatch, Workers
        batch = partial(TableBatch, size=size, horizon=self.horizon, make=self.make)
        return Workers(processes, self.count(processes, tables), batch)
