"""robots/libero_expert.py: its data replayed through the simulator, its commands interrupted and repeated."""
import json

import numpy as np
import pytest

from robots import libero_expert
from robots import openvla as vla
from tests.conftest import needs_assets
from robots.libero import Libero
from robots.libero_expert import main


@pytest.mark.parametrize("command, message", [
    ("demos --per-task 0", "--per-task must be 1 or more"), ("demos --suite libero_goal", "invalid choice: 'libero_goal'"),
    ("measure --tsaks 1", "unrecognized arguments: --tsaks"), ("demos --split test", "invalid choice: 'test'")])
def test_bad_flags(capsys, command, message):
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_dataset_statistics_are_a_checkpoints():
    rng = np.random.default_rng(0)
    actions = np.c_[rng.uniform(-0.5, 0.8, (400, 6)), np.sign(rng.standard_normal(400))]
    statistics = libero_expert.dataset_statistics(actions, "libero_object_no_noops", 3)
    own = statistics["libero_object_no_noops"]
    assert own["num_transitions"] == 400 and own["num_trajectories"] == 3 and own["action"]["mask"] == [True] * 6 + [False]
    np.testing.assert_allclose(own["action"]["q01"][:6], np.percentile(actions[:, :6], 1, axis=0))
    stats = vla.action_stats(json.loads(json.dumps(statistics)), "libero_object_no_noops")
    inside = actions[((actions[:, :6] > stats["q01"][:6]) & (actions[:, :6] < stats["q99"][:6])).all(1)]
    back = vla.to_env_actions(vla.decode_actions(vla.encode_actions(vla.from_env_actions(inside), stats), stats)).reshape(-1, 7)
    np.testing.assert_allclose(back[:, :6], inside[:, :6], atol=1.3 / 255)
    np.testing.assert_array_equal(back[:, 6], inside[:, 6])


@needs_assets
def test_demonstrations_can_be_interrupted(tmp_path, capsys, monkeypatch):
    """The first run dies in its second episode; the second goes on from there and writes what an uninterrupted one would."""
    command = ["demos", "--tasks", "3", "--per-task", "2", "--every", "40", "--size", "32", "--fast-sim", "--out", str(tmp_path / "a.npz")]
    whole, calls = libero_expert.demonstrate, []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)
    monkeypatch.setattr(libero_expert, "demonstrate", dies)
    assert main(command) == 130 and not (tmp_path / "a.npz").exists()
    assert main(command) == 0 and len(calls) == 3 and [p.name for p in tmp_path.iterdir() if "parts" in p.name] == []
    data = dict(np.load(tmp_path / "a.npz"))
    assert data["images"].dtype == np.uint8 and data["images"].shape[1:] == (32, 32, 3)
    assert data["task"].tolist() == [3, 3] and data["state"].tolist() == [0, 2] and len(data["instructions"]) == 10
    lengths = np.diff(data["starts"])
    assert len(data["actions"]) == lengths.sum() and np.diff(data["frames"]).tolist() == [-(-n // 40) for n in lengths]
    statistics = json.loads((tmp_path / "a.npz.dataset_statistics.json").read_text())["libero_object_no_noops"]
    assert statistics["num_transitions"] == len(data["actions"]) and statistics["num_trajectories"] == 2
    env = Libero("libero_object", size=32, fast=True)
    observation, _ = env.reset(options={"task": 3, "index": 1})                     # the second episode again: images belong to their actions
    np.testing.assert_array_equal(data["images"][data["frames"][1]], observation["image"])
    for action in data["actions"][data["starts"][1]:]:
        if env.steps == 40:
            np.testing.assert_array_equal(data["images"][data["frames"][1] + 1], env.render())
        env.advance(action)
    assert env.success
    env.close()
    assert data["intended"].shape == data["actions"].shape and (data["intended"][:, 6] == data["actions"][:, 6]).all()
    off = np.abs(data["intended"] - data["actions"])                                # noise while nothing is near, none in grasp and release
    assert off[:20].mean(0)[:3].min() > 0.05 and (off.max(1) == 0).sum() > 40
    assert main(command) == 2 and "a.npz exists; choose another" in capsys.readouterr().err


@needs_assets
def test_expert_command_goes_on(tmp_path, capsys):
    command = ["measure", "--tasks", "3", "--states", "1", "--out", str(tmp_path / "e.json")]
    assert main(command) == 0
    first = json.loads((tmp_path / "e.json").read_text())
    assert first["episodes"] == [{"task": 3, "state": 0, "success": True, "steps": first["episodes"][0]["steps"], "grasps": 1}]
    assert main(command) == 0 and json.loads((tmp_path / "e.json").read_text()) == first
    assert "1/1, the first 1 of all 50 initial states" in capsys.readouterr().out
    assert main([*command, "--noise", "0.1"]) == 2 and "was begun with" in capsys.readouterr().err
    (tmp_path / "e.json").write_text("{")
    assert main(command) == 2 and f"{tmp_path}/e.json is not JSON" in capsys.readouterr().err
