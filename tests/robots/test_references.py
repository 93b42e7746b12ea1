"""robots/references.py: successes of earlier steps, and true progress, as latents."""

import numpy as np
import pytest
import torch

import rewards
from robots.references import Oracle, References
from robots.suite import Episode, Start
from robots.trajectories import Trajectory, save


def test_the_last_successes_of_each_task_are_kept():
    memory = References(tasks=3, size=2, width=1)
    assert memory.latents() == {}
    memory.add(np.array([[1.0], [2.0], [3.0], [9.0]], np.float32), np.array([0, 0, 0, 2]))
    kept = memory.latents()
    kept = {t: h.copy() for t, h in kept.items()}
    assert sorted(kept) == [0, 2] and sorted(kept[0].ravel()) == [2, 3] and kept[2] == 9
    other = References(tasks=3, size=2, width=1)
    for name, x in memory.tensors.items():
        other.tensors[name].copy_(x)
    other.add(np.array([[4.0]], np.float32), np.array([0]))
    assert sorted(other.latents()[0].ravel()) == [3, 4]  # the oldest gave way after resuming, too


def test_failures_are_measured_by_earlier_successes_as_if_they_were_of_the_batch():
    rng = np.random.default_rng(0)
    h, task = rng.normal(size=(12, 5)), np.array([0, 1] * 6)
    success = np.array([1, 0, 0, 0] * 3, bool)
    earlier = {0: rng.normal(size=(3, 5)), 1: rng.normal(size=(2, 5))}
    got, record = rewards.progress_reward(h, success, task, earlier=earlier)
    everything = np.concatenate([h, earlier[0], earlier[1]])
    wanted, _ = rewards.progress_reward(
        everything, [*success, *[1] * 5], [*task, 0, 0, 0, 1, 1])
    np.testing.assert_allclose(got, wanted[:12])
    assert record.fallbacks == {} and len(record.distances) == 12
    alone, record = rewards.progress_reward(h, success, task)
    assert record.fallbacks == {1: ["no_success"]} and (alone[task == 1] == 0).all()


class Brightness:
    """Stands where a world model stands."""

    def encode(self, videos):
        if any(len(video) > 9 for video in videos):
            raise ValueError("videos[0] is too long")
        return torch.tensor([[float(video.mean())] for video in videos])


def grey(value, instruction, success=True, frames=2):
    images = np.full((frames, 4, 4, 3), value, np.uint8)
    return Trajectory(instruction, success, images, np.zeros((8 * frames, 7)))


def test_logged_successes_are_the_first_references(tmp_path):
    logged = [grey(10, "b"), grey(20, "a"), grey(30, "b"), grey(40, "a", False), grey(50, "c")]
    for i, trajectory in enumerate(logged):
        save(tmp_path / f"{i}.npz", trajectory)
    memory = References(2, 8, 1)
    assert memory.add_logged(str(tmp_path), "", ("a", "b"), Brightness()) == 3
    assert {t: h.ravel().tolist() for t, h in memory.latents().items()} == {0: [20], 1: [10, 30]}
    with pytest.raises(ValueError, match="it has no success of these tasks"):
        References(1, 8, 1).add_logged(str(tmp_path), "", ("d",), Brightness())
    save(tmp_path / "long.npz", grey(1, "a", frames=10))
    with pytest.raises(ValueError, match=f"--data {tmp_path}, long.npz: videos.0. is too long"):
        memory.add_logged(str(tmp_path), "", ("a",), Brightness())


def test_the_oracle_ranks_failures_by_true_progress():
    progress = [0.9, 0.1, 1.0, 0.5]
    episodes = [Episode(Start(0, 0), [None], [8], p == 1, progress=p) for p in progress]
    latents = Oracle().encode(episodes)
    assert latents.shape == (4, 1)
    success, task = np.array([e.success for e in episodes]), np.zeros(4, int)
    reward, record = rewards.progress_reward(
        latents, success, task, earlier=References.solved(1).latents())
    assert np.argsort(-reward).tolist() == [2, 0, 3, 1]
    assert record.distances[[0, 1, 3]] == pytest.approx([0.01, 0.81, 0.25])
    # Before the first success, too
    reward, _ = rewards.progress_reward(
        latents[[0, 1, 3]], success[:2].tolist() + [False], task[:3],
        earlier=References.solved(1).latents())
    assert reward[0] > reward[2] > reward[1] > 0
