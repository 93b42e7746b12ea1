"""robots/libero_expert.py: its data replayed through the simulator, its commands interrupted and
repeated, its files damaged, two processes that make the same ones."""

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from robots import libero_expert
from robots.libero import Libero
from robots.libero_expert import collect, main
from robots.trajectories import Trajectory, save
from tests.conftest import needs_assets

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command, message",
    [
        ("measure --suite libero_goal", "invalid choice: 'libero_goal'"),
        ("measure --tsaks 1", "unrecognized arguments: --tsaks"),
        ("measure --split test", "invalid choice: 'test'"),
        ("replay", "unrecognized arguments: replay"),
        ("measure --noise nan", "--noise must be at least 0"),
        ("--states 0", "--states must be"),
        ("measure --tasks 3 3", "--tasks 3 3: each once"),
    ],
)
def test_bad_flags(capsys, command, message):
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


# Episodes kept in files, without a simulator

FAKE = """
import sys, time, types
from pathlib import Path
import numpy as np
from robots import libero_expert

def demonstrate(env, start, *how, **more):
    time.sleep(0.1)
    open(sys.argv[2], "a").write(f"{start['task']}-{start['attempt']} ")
    env.state, env.steps, env.success = start["index"], 4, start["attempt"] % 3 > 0
    env.instruction = str(start["task"])
    return (types.SimpleNamespace(attempt=0), np.zeros((4, 8, 8, 3), np.uint8),
            np.full((4, 7), start["attempt"]))

libero_expert.demonstrate = demonstrate
env = types.SimpleNamespace(split="train", states_of=lambda split: range(25))
kept = libero_expert.collect(env, [0, 1], 3, Path(sys.argv[1]), every=1)
print([(int(e.instruction), int(e.actions[0, 0])) for e in kept])
"""


ENV = types.SimpleNamespace(split="all", states_of=lambda split: range(50), success=True, state=0,
                            steps=1, instruction="wait")


def played(attempt: int):
    """In place of `demonstrate`: a success after so many grasps that failed."""
    return lambda env, start, *how, **more: (
        types.SimpleNamespace(attempt=attempt), np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 7)))


def test_two_processes_make_one_cache(tmp_path):
    """Nothing is played twice, both get the same episodes."""
    command = [sys.executable, "-c", FAKE, str(tmp_path / "cache"), str(tmp_path / "played")]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0] for process in both]
    kept = str([(task, attempt) for task in (0, 1) for attempt in (1, 2, 4)])
    assert [each.splitlines()[-1] for each in said] == [kept] * 2
    played = (tmp_path / "played").read_text().split()
    assert sorted(played) == [f"{task}-{attempt}" for task in (0, 1) for attempt in range(5)]
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_damaged_episodes(tmp_path):
    """A cut, a changed byte, a pickle, arrays that do not agree, a file of before: one line that
    names the file."""
    whole = tmp_path / "0-0.npz"
    steps, images = np.zeros((4, 7), np.float32), np.zeros((4, 8, 8, 3), np.uint8)
    save(whole, one := Trajectory("wait", True, images, steps, 1))
    arrays, env = vars(one), types.SimpleNamespace(split="all", states_of=lambda split: range(50))

    def again() -> Trajectory:
        (episode,) = collect(env, [0], 1, tmp_path, every=1)
        return episode

    assert vars(again()).keys() == arrays.keys()
    rng, good, refused = np.random.default_rng(0), whole.read_bytes(), 0
    bad = [good[: rng.integers(len(good))] for _ in range(60)]
    for _ in range(240):
        data = bytearray(good)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        bad.append(bytes(data))
    for data in bad:
        whole.write_bytes(data)
        try:
            episode = vars(again())
            assert all(np.array_equal(episode[k], arrays[k]) for k in arrays)  # a time, a comment
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{whole} is damaged (") and "\n" not in str(error)
    assert refused > 200
    for change in (
        {"actions": steps[:2]},
        {"images": images.astype(float)},
        {"success": steps},
        {"actions": steps * np.nan},
        {"actions": np.array([object()])},
        dict.fromkeys(("instruction", "intended"), steps),
    ):
        np.savez_compressed(whole, **arrays | change)
        with pytest.raises(ValueError, match="0-0.npz is damaged"):
            again()


def test_a_full_disk_leaves_no_half_episode(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    monkeypatch.setattr(libero_expert, "demonstrate", played(attempt=0))
    with pytest.raises(OSError, match="0-0.npz cannot be written .*No space left.*disk full"):
        collect(ENV, [0], 1, tmp_path, every=1)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_an_expert_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(libero_expert, "demonstrate", played(attempt=1))
    with pytest.raises(RuntimeError, match="succeeds too rarely at task 7; leave it out"):
        collect(ENV, [7], 1, tmp_path, every=1)
    assert len(list(tmp_path.glob("*.npz"))) == 25


# With LIBERO and its assets


@pytest.mark.slow
@needs_assets
def test_demonstrations_can_be_interrupted(tmp_path, monkeypatch):
    """The first run dies in its second episode; the second goes on from there and leaves what an
    uninterrupted one would."""
    env = Libero("libero_object", size=32, fast=True)
    whole, calls = libero_expert.demonstrate, []

    def dies(*arguments, **how):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **how)

    ran, advance = {}, Libero.advance  # the actions as they were executed, by initial state

    def noted(self, action):
        ran.setdefault(self.state, []).append(action)
        return advance(self, action)

    monkeypatch.setattr(libero_expert, "demonstrate", dies)
    monkeypatch.setattr(Libero, "advance", noted)
    with pytest.raises(KeyboardInterrupt):
        collect(env, [3], 2, tmp_path, every=8)
    first, data = collect(env, [3], 2, tmp_path, every=8)
    env.close()
    monkeypatch.undo()
    assert len(calls) == 3 and list(ran) == [0, 2]
    assert data.images.dtype == np.uint8 and data.images.shape[1:] == (32, 32, 3)
    assert len(data.images) == -(-len(data.actions) // 8)
    env = Libero("libero_object", size=32, fast=True)
    observation, info = env.reset(options={"task": 3, "index": 1})  # the second episode again:
    np.testing.assert_array_equal(data.images[0], observation["image"])  # images fit actions
    assert info["instruction"] == data.instruction == first.instruction
    for action in ran[2]:
        if env.steps % 8 == 0:
            np.testing.assert_array_equal(data.images[env.steps // 8], env.render())
        env.advance(action)
    assert env.success
    env.close()
    intended, actions = np.concatenate([first.actions, data.actions]), np.float32(ran[0] + ran[2])
    assert intended.shape == actions.shape and (intended[:, 6] == actions[:, 6]).all()
    off = np.abs(intended - actions)  # noise while nothing is near, none in grasp and release
    assert off[:20].mean(0)[:3].min() > 0.05 and (off.max(1) == 0).sum() > 40


@pytest.mark.slow
@needs_assets
def test_expert_command_goes_on(tmp_path, capsys):
    out = tmp_path / "e.jsonl"
    command = ["measure", "--tasks", "3", "--states", "1", "--out", str(out)]
    assert main(command) == 0
    settings, row = map(json.loads, out.read_text().splitlines())
    assert settings["suite"] == "libero_object" and settings["noise"] == 0
    assert row == {"task": 3, "state": 0, "success": True, "steps": row["steps"], "grasps": 1}
    assert main(command) == 0 and len(out.read_text().splitlines()) == 2
    assert "1/1, the first 1 of all 50 initial states" in capsys.readouterr().out
    assert main([*command, "--noise", "0.1"]) == 2
    assert "was begun with noise 0.0, not 0.1" in capsys.readouterr().err
    out.write_text("{\n" + json.dumps(row) + "\n")
    assert main(command) == 2 and f"{out} line 1 is not a row" in capsys.readouterr().err
