"""robots/published_reward.py against outputs of siiRL's code (fixture), beside rewards.py."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import rewards
from robots.published_reward import progress_reward
from tests.test_rewards import two_clusters

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = json.loads((FIXTURES / "official_rewards.json").read_text())["progress"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_published_code(case):
    got, record = progress_reward(case["latents"], case["success"], case["task"])
    np.testing.assert_allclose(got, case["official"], atol=1e-6)
    expected = {
        "two clusters found": 2,
        "one cluster and a noise success": 1,
        "three tasks, high dimension": 0,
    }
    if case["name"] in expected:
        assert set(record.clusters.values()) == {expected[case["name"]]}
    named = {
        "a single failure": "equal_distances",
        "no success": "no_success",
        "single success": "single_success",
        "failures all equally far": "equal_distances",
        "three tasks, high dimension": "no_cluster",
    }
    if case["name"] in named:
        assert all(named[case["name"]] in record.fallbacks[t] for t in set(case["task"]))


def test_zero_latents_earn_zero():
    latents = np.array([[0.0, 0], [1, 0], [1.1, 0], [2, 0], [3, 0], [0, 0]])
    got, record = progress_reward(latents, [1, 1, 1, 0, 0, 0], [7] * 6)
    np.testing.assert_allclose(got[[0, 1, 2, 5]], [0, 1, 1, 0])
    assert "zero_latents" in record.fallbacks[7] and np.isnan(record.distances[5])
    np.testing.assert_allclose(got[3:5], [0.6 / (1 + math.exp(-5)), 0.6 / (1 + math.exp(5))])


def test_1408_dimensions_never_cluster():
    """Where rewards.py finds both clusters, the reference here is the mean of all successes."""
    latents, success, task = two_clusters()
    _, record = progress_reward(latents, success, task)
    assert (record.clusters["t"], record.noise["t"]) == (0, 12)
    assert record.fallbacks["t"] == ["no_cluster"]
    mean = latents[:12].mean(0)
    far = np.linalg.norm(latents[12] - mean)  # not squared
    assert math.isclose(record.distances[12], far, rel_tol=1e-9)


def test_nearer_failures_earn_more():
    rng = np.random.default_rng(1)
    latents, success = rng.normal(size=(40, 16)), np.arange(40) < 10
    got, record = progress_reward(latents, success, [0] * 40)
    assert (np.diff(got[10:][np.argsort(record.distances[10:])]) < 0).all()


def test_a_video_shared_by_a_group_changes_no_advantage():
    """As published, where frames are keyed by initial state: both rewards are then 0/1's."""
    rng = np.random.default_rng(0)
    success, shared = rng.random(24) < 0.4, rng.normal(size=(3, 6)).repeat(8, 0)
    for rule in (progress_reward, rewards.progress_reward):
        got = rule(shared, success, [0] * 24)[0].reshape(3, 8)
        for r, plain in zip(got, success.reshape(3, 8).astype(float), strict=True):
            np.testing.assert_allclose(
                (r - r.mean()) / r.std(), (plain - plain.mean()) / plain.std()
            )
