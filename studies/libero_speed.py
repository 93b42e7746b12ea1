"""LIBERO: env steps per second of robots/libero.py beside the stock environment's, and exactness.

Both are stepped through the same random actions from the same initial state; seconds are of CPU
time, so that other jobs matter little. With lerobot installed its LiberoEnv is measured too.

    python -m studies.libero_speed --suite libero_object --size 128
"""
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from plumbing.flags import flag, require, script
from robots import libero_files as files
from robots.libero import NO_OP, SETTLE, Libero


@dataclass
class Settings:
    suite: str = flag("libero_object", "|".join(files.SUITES) + "|libero_90")
    task: int = flag(0, "task number")
    size: int = flag(128, "pixels")
    steps: int = flag(120, "env steps of each measurement")
    assets: str = flag("", "folder of LIBERO's assets (LIBERO_ASSETS, else from the hub)")


def timed(name: str, step: Callable, actions: np.ndarray, base: float = math.nan) -> float:
    """Calls step(i, action) for each; prints and returns how many in a second of CPU time."""
    began = time.process_time()
    for i, action in enumerate(actions, 1):
        step(i, action)
    speed = len(actions) / (time.process_time() - began)
    print(f"{speed:7.1f} env steps/s  {name}" + f": {speed / base:.1f}x" * (base > 0), flush=True)
    return speed


def stock(env: Libero):
    """The stock environment, settled in the initial state that `env` was reset to."""
    module = sys.modules[files.prepare(env.options.assets, env.plus).__module__]
    task = env.tasks[env.task]
    theirs = module.OffScreenRenderEnv(bddl_file_name=task.bddl, camera_names=["agentview"],
                                       camera_heights=env.size, camera_widths=env.size)
    theirs.seed(env.state)
    theirs.reset()
    theirs.set_init_state(files.initial_states(task.states)[env.state])
    for _ in range(SETTLE):
        theirs.observation = theirs.step(NO_OP)[0]
    return theirs


def others(env: Libero, actions: np.ndarray) -> tuple[float, list, list]:
    """The stock environment, and lerobot's if it is installed -> stock speed, images, qpos."""
    theirs, images, places = stock(env), [], []

    def step(_, action) -> None:
        images.append(theirs.step(action)[0]["agentview_image"][::-1, ::-1])
        places.append(theirs.sim.data.qpos.copy())
    base = timed(f"stock, agent view every step, {env.size} px", step, actions)
    theirs.close()
    with suppress(ImportError):
        from lerobot.envs.libero import LiberoEnv, _get_suite
        lerobot = LiberoEnv(_get_suite(env.suite), env.task, env.suite)
        lerobot.reset(seed=0)
        timed("lerobot's LiberoEnv, two cameras of 256 px",
              lambda _, action: lerobot.step(action), actions, base)
        lerobot.close()
    return base, images, places


def bench(s: Settings) -> None:
    require(s, dict(steps=1))
    make, start = partial(Libero, s.suite, s.task, size=s.size, assets=s.assets), {"index": 0}
    env = make()
    env.reset(options=start)
    actions = np.random.default_rng(0).uniform(-1, 1, (-(-s.steps // 10), 7))
    actions = actions.repeat(10, 0)[:s.steps]                   # the arm gets about
    print(f"{s.suite} task {s.task}, {len(actions)} steps, {s.size} px")
    base, images, places = others(env, actions)
    for fast in (False, True):
        env.close()
        env = make(fast=fast)
        for every, text in ((0, "no camera"), (8, "a frame every 8 steps"),
                            (1, "a frame every step")):
            env.reset(options=start)
            mine, moved = [], []

            def step(i, action, env=env, every=every, mine=mine, moved=moved) -> None:
                env.advance(action)
                moved.append(env.data.qpos.copy())
                if every and i % every == 0:
                    mine.append(env.render())
            timed(f"ours{', fast' * fast}, {text}", step, actions, base)
        off, far = np.abs(np.array(mine, int) - images), np.abs(np.array(moved) - places)
        print(f"{'':21}pixels differ from stock by {off.mean():.2f} of 255 on average, "
              f"{off.max()} at most; qpos by {far.max():.1e}")
    env.close()


main = script(Settings, bench, __doc__)
if __name__ == "__main__":
    sys.exit(main())
