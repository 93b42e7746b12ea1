"""robots/suite.py and the registry of suites: names, splits, and a third simulator in one line."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest

import robots
from robots import find_suite
from robots.rollouts import play
from robots.suite import CHUNK, Episode, Start, Suite, SuiteOptions


class Counter(gymnasium.Env):
    """A third simulator: its image is as bright as the number of steps, and 12 + task + index of
    them are a success. No MuJoCo in it."""

    def __init__(self, size, horizon):
        self.size, self.horizon = size, horizon

    def reset(self, *, seed=None, options=None):
        self.steps, self.goal = 0, 12 + options["task"] + options["index"]
        self.success = False
        return self.observe(), {}

    def advance(self, action) -> bool:
        self.steps += 1
        self.success = self.steps == self.goal
        return self.success or self.steps == self.horizon

    def observe(self):
        return {"image": np.full((self.size, self.size, 3), self.steps, np.uint8)}


def third(name: str, tasks: tuple[int, ...], options: SuiteOptions) -> Suite:
    return Suite(
        *(name, ("count", "count on"), tasks or (0, 1), {"train": 3}, Counter),
        {"train": "three starts"},
        horizon=14,
        protocol=f"horizon {options.horizon}",
    )


def test_a_third_simulator_is_a_line(monkeypatch):
    monkeypatch.setitem(robots.SUITES, "third", f"{__name__}:third")
    suite = find_suite("third_small", (1, 0), SuiteOptions(horizon=7))
    assert (suite.name, suite.tasks, suite.protocol) == ("third_small", (1, 0), "horizon 7")
    workers = suite.workers(2, 8, 3)
    try:
        episodes = play(
            *(lambda images, texts: (np.zeros((len(texts), CHUNK, 7)), texts), workers),
            *(suite.starts("train"), suite),
            every=2,
            clip=lambda video: video,
        )
    finally:
        workers.close()
    assert [e.start for e in episodes] == [Start(t, i) for t in (1, 0) for i in range(3)]
    for e in episodes:
        goal = 12 + e.start.task + e.start.index
        assert (e.steps, e.success) == (min(goal, 14), goal <= 14)
        assert e.calls == [suite.instructions[e.start.task]] * 2
        assert e.clip[:, 0, 0, 0].tolist() == [*range(0, e.steps, 2), e.steps]


@pytest.mark.parametrize("name", ["moon", "", "Tabletop", "liberty_object", "\x1b[31m"])
def test_an_unknown_suite_is_one_line(name):
    with pytest.raises(ValueError, match="^no suite .*names begin with tabletop or libero") as told:
        find_suite(name)
    assert "\n" not in str(told.value) and str(told.value).isprintable()


def test_a_task_is_given_once():
    with pytest.raises(ValueError, match="^--tasks 1 3 1: each once$"):
        find_suite("tabletop", (1, 3, 1))


def test_starts():
    suite = third("third", (1,), SuiteOptions())
    assert suite.starts("train", 2) == [Start(1, 0), Start(1, 1)]
    assert suite.starts("train") == suite.starts("train", 0) == suite.starts("train", 99)
    with pytest.raises(ValueError, match="^--split all: third has train$"):
        suite.starts("all")
    assert Episode(Start(0, 0), executed=[8, 8, 3]).steps == 19


def test_it_is_light():
    """What --help of the scripts imports."""
    code = "import sys, robots, robots.flags; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "mujoco", "gymnasium", "robots.rollouts"} & set(done.stdout.split())
