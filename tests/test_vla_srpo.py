"""vla_srpo.py against naive loops, autograd and scipy; and whole runs, killed and resumed, against
uninterrupted ones."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import grpo
import vla_srpo
import world_model
from plumbing import adapters
from plumbing import update as updates
from plumbing.checkpoint import read_state
from plumbing.optimizer import make_optimizer, optimizer_tensors
from plumbing.run import Run
from robots import evaluate, find_suite
from robots import policy as policies
from robots.references import References
from robots.suite import Episode, Start, Suite
from robots.tabletop import HORIZON, TASKS
from robots.tiny_vla import TinyVLA
from robots.trajectories import Trajectory, save
from studies.train_world_model import TINY
from tests.conftest import STATS, fake_episode
from tests.test_world_model import squares
from vla_srpo import Settings

ROOT = Path(__file__).parents[1]


def tiny_policy(seed: int = 0) -> TinyVLA:
    torch.manual_seed(seed)
    policy = TinyVLA(STATS, channels=(4, 4, 4), width=16, basis=6)
    with torch.no_grad():
        policy.head.weight.mul_(20)  # so that the distributions differ from the uniform one
    return policy


# What is shown, what is trained on


def test_the_sample_shown_is_a_failure_with_a_distance():
    """The next one from the i-th; where no failure was compared with successes any failure, where
    there is none the i-th."""
    reward, advantages, lasts = np.linspace(0, 1, 4), torch.zeros(4), (8, 3, 8, 8)
    episodes = [fake_episode(Start(0, i), [8, last], i) for i, last in enumerate(lasts)]
    record = SimpleNamespace(distances=np.array([0.5, np.nan, np.nan, 0.25]))

    def shown(record, i, some=episodes):
        return evaluate.describe(i, some, reward, advantages, record, find_suite("tabletop"))

    assert (
        "initial state 3: failure after 16 steps, latent distance 0.250 -> reward 1.000"
        in shown(record, 1)
    )
    assert "initial state 0: failure" in shown(record, 0)
    assert "latent distance 0.500" in shown(record, 0)
    assert "initial state 2: failure after 16 steps -> reward" in shown(None, 1)
    one = shown(None, 0, [episodes[1]] * 4)
    assert "initial state 1: success after 11 steps -> reward" in one


# The update

TEMPERATURE = 1.3
LENGTHS = [3, 2, 1, 4, 2]  # policy calls of five rollouts: 12 rows


@pytest.fixture
def policy():
    return tiny_policy()


@pytest.fixture
def batch(policy):
    """Twelve chunks sampled by `policy` itself; most rollouts end in the middle of their last
    chunk."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 64, 64, 3), np.uint8)
    instructions = [TASKS["tabletop"][i] for i in (0, 1, 2, 3, 1) for _ in range(LENGTHS[i])]
    torch.manual_seed(1)
    _, records = policies.sampler(policy, TEMPERATURE, "tabletop")(images, instructions)
    executed = torch.tensor([8, 8, 3, 8, 8, 5, 8, 8, 8, 1, 8, 6])
    trajectory = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))
    return policies.Batch(
        torch.from_numpy(images[:, None]),
        instructions,
        torch.stack([call.bins for call in records]),
        torch.stack([call.logp for call in records]),
        torch.arange(56) // 7 < executed[:, None],
        torch.tensor([1.5, -0.5, 0.7, -1.2, 0.1])[trajectory],
        trajectory,
    )


def settings(**changes) -> Settings:
    return Settings(
        **dict(
            steps=1,
            epochs=1,
            minibatch=100,
            micro_batch=100,
            target_kl=0.0,
            temperature=TEMPERATURE,
            temperature_end=TEMPERATURE,
            beta=0.0,
            clip_low=0.2,
            clip_high=0.28,
            max_norm=1.0,
            lr=1e-2,
            lr_end=1.0,
            groups=1,
            group_size=2,
            average=0.0,
            reward="binary",
        )
        | changes
    )


@pytest.fixture
def update(monkeypatch, tmp_path):
    """update(policy, reference, optimizer, batch, s): a step of `train` whose rollouts, rewards and
    advantages made this batch -> its row of metrics."""

    def run_step(policy, reference, optimizer, batch, s) -> dict:
        s = replace(s, lr=10 * optimizer.param_groups[0]["lr"])
        played = [fake_episode(Start(0, i), [8, 3], i) for i in range(2)]
        monkeypatch.setattr(vla_srpo, "play", lambda *_, **__: played)
        monkeypatch.setattr(policies, "collate", lambda *_: batch)
        monkeypatch.setattr(evaluate, "of_run", lambda *_: {"success": 0.5, "episodes": 2})
        run = Run(s, Path(tempfile.mkdtemp(dir=tmp_path)), None, "vla_srpo.py")
        run.keep(adapters.kept(policy), optimizer)
        parts = vla_srpo.Parts(
            find_suite("tabletop"),
            SimpleNamespace(replaced=0),
            policy,
            "tabletop",
            None,
            reference,
            None,
            optimizer,
        )
        vla_srpo.train(run, parts, {"success": 0.5})
        return metrics(run.out)[1]

    return run_step


@pytest.fixture
def gradients(monkeypatch, update):
    """The gradient of every minibatch of an `update` that never steps."""

    def caught_in(policy, batch, s, reference=None) -> list[dict[str, torch.Tensor]]:
        caught = []

        def catch(optimizer, model, max_norm):
            caught.append({name: p.grad.clone() for name, p in model.named_parameters()})
            optimizer.zero_grad()
            return 1.0, True

        monkeypatch.setattr(updates, "clip_and_step", catch)
        row = update(policy, reference, make_optimizer(policy, s.lr), batch, s)
        assert row["updates"] == len(caught) and row["skipped"] == 0
        return caught

    return caught_in


def same_gradient(a: dict, b: dict) -> None:
    size = math.sqrt(sum(float(g.pow(2).sum()) for g in b.values()))
    assert size > 1e-3
    for name in b:
        assert (a[name] - b[name]).abs().max() < 2e-5 * size, name


def naive_gradient(policy, batch, beta: float = 0.0, reference=None) -> dict[str, torch.Tensor]:
    """REINFORCE, token by token: mean over rollouts of the mean over a rollout's executed tokens of
    -A log pi, plus beta times the k3 estimate of the KL to the reference."""
    policy.zero_grad()
    per_rollout = []
    for i in range(len(LENGTHS)):
        terms = []
        for n in torch.nonzero(batch.trajectory == i).flatten().tolist():
            inputs = (
                *policy.prompt_ids(batch.instructions[n]),
                policy.pixel_values(batch.frames[n : n + 1]),
            )
            p = torch.log_softmax(policy(*inputs)[0] / TEMPERATURE, -1)  # (56, 256)
            for t in range(56):
                if batch.mask[n, t]:
                    logp = p[t, batch.bins[n, t]]
                    terms.append(-batch.advantage[n] * logp)
                    if reference is not None:
                        with torch.no_grad():
                            q = torch.log_softmax(reference(*inputs)[0] / TEMPERATURE, -1)[
                                t, batch.bins[n, t]
                            ]
                        terms[-1] = terms[-1] + beta * ((q - logp).exp() - (q - logp) - 1)
        per_rollout.append(sum(terms) / len(terms))
    (sum(per_rollout) / len(per_rollout)).backward()
    naive = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    return naive


@pytest.mark.parametrize("micro_batch", [100, 5, 1])
def test_gradient_at_ratio_1_is_reinforces(policy, batch, gradients, micro_batch):
    """And micro-batching does not change it."""
    (found,) = gradients(policy, batch, settings(micro_batch=micro_batch))
    same_gradient(found, naive_gradient(policy, batch))


def test_gradient_with_a_reference(policy, batch, gradients):
    reference = tiny_policy()
    with torch.no_grad():
        reference.head.bias.add_(
            0.3 * torch.randn(reference.head.bias.shape, generator=torch.Generator().manual_seed(5))
        )
    (found,) = gradients(policy, batch, settings(beta=0.5, micro_batch=5), reference)
    same_gradient(found, naive_gradient(policy, batch, 0.5, reference))


def test_the_reference_passes_once(policy, batch, monkeypatch, update):
    """Whatever the epochs and micro-batches: 15 GB must not travel between CPU and GPU for each of
    them."""
    passed, moved, reference = [], [], tiny_policy()
    forward, to = reference.forward, reference.to
    monkeypatch.setattr(
        reference, "forward", lambda ids, *more: passed.append(len(ids)) or forward(ids, *more)
    )
    monkeypatch.setattr(reference, "to", lambda where: moved.append(str(where)) or to(where))
    update(
        policy,
        reference,
        make_optimizer(policy, 1e-3),
        batch,
        settings(beta=0.1, epochs=3, minibatch=6, micro_batch=5),
    )
    assert passed == [5, 5, 2] and moved == ["cpu", "cpu"]


def test_minibatches_average_to_the_whole_batch(policy, batch, gradients):
    sizes = [5, 5, 2]
    found = gradients(policy, batch, settings(minibatch=5, micro_batch=3))
    assert len(found) == len(sizes)
    mean = {name: sum(n / 12 * g[name] for n, g in zip(sizes, found)) for name in found[0]}
    same_gradient(mean, naive_gradient(policy, batch))


def test_update_raises_the_likelihood_of_what_paid(policy, batch, update):
    def logp():
        with torch.no_grad():
            logits = policy(
                *policy.prompt_ids(batch.instructions), policy.pixel_values(batch.frames)
            )
        p = torch.log_softmax(logits / TEMPERATURE, -1).gather(-1, batch.bins[..., None])[..., 0]
        return (p * batch.mask).sum(1) / batch.mask.sum(1)

    before = logp()
    update(policy, None, make_optimizer(policy, 1e-3), batch, settings(epochs=3, minibatch=6))
    change = torch.stack([(logp() - before)[batch.trajectory == i].mean() for i in range(5)])
    assert change[0] > change[4] > change[3] and change[0] > 0 > change[3]


def snapshot(policy, optimizer) -> dict[str, torch.Tensor]:
    return {
        name: t.clone() for name, t in (policy.state_dict() | optimizer_tensors(optimizer)).items()
    }


def unchanged(before: dict, policy, optimizer) -> bool:
    after = snapshot(policy, optimizer)
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_non_finite_loss_or_gradient_is_skipped_and_counted(policy, batch, update):
    optimizer, good = make_optimizer(policy, 1e-3), batch.advantage.clone()
    s = settings(minibatch=4, epochs=2)
    assert update(policy, None, optimizer, batch, s)["skipped"] == 0
    before = snapshot(policy, optimizer)
    batch.advantage = torch.full_like(good, math.nan)  # every loss
    stats = update(policy, None, optimizer, batch, s)
    assert (stats["updates"], stats["skipped"]) == (0, 6) and unchanged(before, policy, optimizer)
    assert all(p.grad is None for p in policy.parameters())  # nothing is left for the next update
    batch.advantage = good
    hook = policy.fc1.weight.register_hook(
        lambda grad: grad * math.inf
    )  # every gradient, with a finite loss
    stats = update(policy, None, optimizer, batch, s)
    assert (stats["updates"], stats["skipped"]) == (0, 6) and unchanged(before, policy, optimizer)
    assert math.isfinite(stats["loss"])
    hook.remove()
    batch.advantage = good.clone()
    batch.advantage[7] = math.nan  # one row: one minibatch of three an epoch
    stats = update(policy, None, optimizer, batch, s)
    assert (stats["updates"], stats["skipped"]) == (4, 2) and not unchanged(
        before, policy, optimizer
    )
    assert all(torch.isfinite(p).all() for p in policy.parameters())


def test_target_kl_ends_the_updates(policy, batch, update):
    optimizer = make_optimizer(policy, 1e-2)
    far = policies.Batch(**vars(batch) | {"logp": batch.logp + 0.5})  # k3 of ratio e^-0.5: 0.1065
    before = snapshot(policy, optimizer)
    stats = update(policy, None, optimizer, far, settings(minibatch=4, epochs=3, target_kl=0.1))
    assert stats["updates"] == 0 and stats["skipped"] == 0 and unchanged(before, policy, optimizer)
    assert (
        abs(stats["old_kl"] - (math.exp(-0.5) + 0.5 - 1)) < 1e-4
        and abs(stats["ratio_max"] - math.exp(-0.5)) < 1e-3
    )
    assert all(p.grad is None for p in policy.parameters())
    assert (
        update(
            policy,
            None,
            make_optimizer(policy, 0.0),
            far,
            settings(minibatch=4, epochs=3, target_kl=0.11),
        )["updates"]
        == 9
    )
    stats = update(policy, None, optimizer, batch, settings(minibatch=4, epochs=20, target_kl=0.01))
    assert 1 <= stats["updates"] < 60  # near enough at first, then not


# Rewards


class Blind:
    """A world model whose latent is the mean colour of a rollout's last frame."""

    width = 3

    def seen(self, video):
        return video[-1:]

    def encode(self, videos):
        assert all(v.dtype == np.uint8 and v.ndim == 4 for v in videos)
        return torch.tensor(
            np.stack([v[-1].reshape(-1, 3).mean(0) for v in videos]), dtype=torch.float32
        )


def test_score():
    """Task 1: successes all at 10 grey levels, failures at 20, 30 and 50, so at squared distances
    300, 1200, 4800. Task 2 has failures only: the other task's successes are no reference for
    it."""
    episodes = []
    for i, (grey, success) in enumerate(
        [
            (10, True),
            (20, False),
            (30, False),
            (10, True),
            (50, False),
            (10, True),
            (11, False),
            (12, False),
            (60, False),
        ]
    ):
        clip = np.stack([np.full((64, 64, 3), g, np.uint8) for g in (0, grey)])
        episodes.append(Episode(Start(1 + i // 6, i // 3), [None], [8], success, clip))

    def score(encoder, **changes):
        s = settings(group_size=3, **changes)
        return vla_srpo.score(SimpleNamespace(s=s, gather=list), episodes, encoder)

    reward, record = score(None, reward="binary")
    assert reward.tolist() == [1, 0, 0, 1, 0, 1, 0, 0, 0] and record is None
    reward, record = score(Blind(), reward="srpo", alpha=0.8)
    d = np.array([300.0, 1200.0, 4800.0])
    z = (d - d.mean()) / np.sqrt(((d - d.mean()) ** 2).mean())
    expected = np.array([1.0] * 6 + [0.0] * 3)
    expected[[1, 2, 4]] = 0.8 / (1 + np.exp(z))
    np.testing.assert_allclose(reward, expected, atol=1e-6)
    np.testing.assert_allclose(record.distances[[1, 2, 4]], d)
    played = [replace(e, calls=[SimpleNamespace(entropy=1.0)]) for e in episodes]
    row = evaluate.measured(list, played, reward, torch.zeros(3, 3), record)
    # The second group has one failure: two values, as with 0/1; the third is equal
    assert row["groups_changed"] == 1
    reward, _ = score(Blind(), reward="official")
    nearness = 1 - (np.sqrt(d) - np.sqrt(300)) / (np.sqrt(4800) - np.sqrt(300))
    np.testing.assert_allclose(
        reward[[1, 2, 4]], 0.6 / (1 + np.exp(-10 * (nearness - 0.5))), atol=1e-6
    )


@pytest.mark.parametrize("reward", ["srpo", "official"])
@pytest.mark.parametrize("won, used", [([1, 1, 0, 0], 0), ([1, 1, 0, 1], 2), ([0] * 4, 0)])
def test_successes_of_dropped_groups_are_references_all_the_same(reward, won, used):
    """--keep mixed drops groups of equal outcomes; all of them dropped, the step still counts."""
    memory = References(1, 8, 3)
    episodes = [Episode(Start(0, i // 2), [None], [8], bool(success),
                        np.full((2, 64, 64, 3), 40 * i, np.uint8))
                for i, success in enumerate(won)]
    s = settings(group_size=2, keep="mixed", reward=reward, references=8)
    earned, record = vla_srpo.score(SimpleNamespace(s=s, gather=list), episodes, Blind(), memory)
    assert int(memory.count) == sum(won) and np.isfinite(record.distances).sum() == bool(used)
    assert earned.shape == (4,) and (earned[np.array(won) == 1] == 1).all()


# Whole runs on a pretended simulator: an episode is two calls, its outcome a function of what was
# sampled

RUN = [
    "--steps",
    "6",
    "--groups",
    "4",
    "--group_size",
    "12",
    "--lr",
    "3e-3",
    "--epochs",
    "2",
    "--minibatch",
    "40",
    "--micro_batch",
    "40",
    "--target_kl",
    "0",
    "--temperature",
    "1",
    "--seed",
    "7",
    "--eval_every",
    "0",
    "--save_every",
    "2",
    "--threads",
    "1",
]


class Pretend:
    """Stands in for the simulator. outcome(i, start, bins) -> success of the i-th rollout;
    fault(step) is called before each step's rollouts."""

    def __init__(
        self,
        monkeypatch,
        tmp_path,
        fault=lambda step: None,
        outcome=lambda i, start, bins: int(bins.sum()) % 3 == 0,
    ):
        self.outcome, self.fault, self.replaced = outcome, fault, 0
        self.starts, self.batches, self.scores, self.weights = [], [], [], []
        if not (tmp_path / "policy").exists():
            tiny_policy().save_pretrained(tmp_path / "policy")
        result = {"success": 0.5, "interval": (0.4, 0.6), "episodes": 8}
        result = result | {"tasks": dict.fromkeys(TASKS["tabletop"], result)}
        collate, score, log = policies.collate, vla_srpo.score, Run.log
        monkeypatch.setattr(vla_srpo, "play", self.play)
        monkeypatch.setattr(Suite, "workers", lambda *_: self)
        monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: result)
        monkeypatch.setattr(evaluate, "film", lambda *_, **__: None)
        monkeypatch.setattr(world_model.WorldModel, "from_pretrained", lambda *_, **__: Blind())
        monkeypatch.setattr(policies, "collate", lambda *a: self.kept(self.batches, collate(*a)))
        monkeypatch.setattr(vla_srpo, "score", lambda *a: self.kept(self.scores, score(*a)))
        monkeypatch.setattr(
            Run,
            "log",
            lambda run, *a: (
                self.weights.append({k: v.clone() for k, v in run.tensors.items()}),
                log(run, *a),
            ),
        )

    @staticmethod
    def kept(where: list, what):
        where.append(what)
        return what

    def close(self):
        pass

    def play(self, act, workers, starts, suite, every=8, clip=None):
        self.starts.append(starts)
        self.every = every
        self.fault(len(self.starts))
        episodes, images = [], []
        for start in starts:
            rng = np.random.default_rng([start.task, start.index])
            images.append(rng.integers(0, 256, (2, 64, 64, 3), np.uint8))
        images, texts = np.stack(images), [TASKS["tabletop"][s.task] for s in starts]
        calls = [act(images[:, j], texts)[1] for j in range(2)]
        for i, start in enumerate(starts):
            bins = calls[1][i].bins
            win = bool(self.outcome(i, start, bins))
            last = np.full((64, 64, 3), int(bins.sum()) % 256, np.uint8)
            video = np.stack([*images[i], last])
            episodes.append(
                Episode(
                    start,
                    [calls[0][i], calls[1][i]],
                    [8, 5 if win else 8],
                    win,
                    clip(video) if clip else None,
                )
            )
        return episodes


def metrics(out: Path) -> list[dict]:
    """The rows of a run without what depends on the machine."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith("seconds_") and k != "workers_replaced"}
        for row in rows
    ]


def go(tmp_path, out: str, *more: str) -> int:
    return vla_srpo.main(
        [*RUN, "--model", str(tmp_path / "policy"), "--out", str(tmp_path / out), *more]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "reward, keep", [("binary", "signal"), ("srpo", "signal"), ("srpo", "mixed")]
)
def test_groups_without_signal_are_dropped(monkeypatch, tmp_path, reward, keep):
    """Group 0 always fails, 1 always succeeds, 2 has one success in twelve, 3 five. Failed groups
    can have a signal from the distances, if their task has successes elsewhere; a rate of 1/12 is
    below the published filter's 0.1."""
    wins = {0: 0, 1: 12, 2: 1, 3: 5}
    pretend = Pretend(monkeypatch, tmp_path, outcome=lambda i, start, bins: i % 12 < wins[i // 12])
    assert go(tmp_path, "run", "--reward", reward, "--keep", keep) == 0
    rows, shaped = metrics(tmp_path / "run")[1:], 0
    for row, batch, starts, (scores, _) in zip(
        rows, pretend.batches, pretend.starts, pretend.scores, strict=True
    ):
        groups = scores.reshape(4, 12)
        signal = {g for g in range(4) if np.ptp(groups[g]) > 0}
        assert {2, 3} <= signal and 1 not in signal
        if reward == "binary":
            assert 0 not in signal
        elif keep == "mixed":  # dropped before rewards are shaped
            assert 0 not in signal and set(groups[2]) == {0, 1} and 0 < min(groups[3]) < 1
        elif {s.task for s in starts[12:24]} & {starts[0].task}:
            assert 0 in signal  # failures told apart by distance
        used = signal if keep == "signal" else {3}
        shaped += 0 in used
        assert set((batch.trajectory // 12).tolist()) == used and row["groups_used"] == len(used)
        assert (row["groups_failed"], row["groups_solved"], row["success"]) == (
            1,
            1,
            pytest.approx(18 / 48),
        )
        for i in set(batch.trajectory.tolist()):
            r = groups[i // 12]
            expected = (r[i % 12] - r.mean()) / (r.std() + 1e-6)
            np.testing.assert_allclose(
                batch.advantage[batch.trajectory == i], [expected] * 2, rtol=1e-4, atol=1e-5
            )
        assert row["tokens"] == sum(
            7 * (13 if i % 12 < wins[i // 12] else 16) for i in set(batch.trajectory.tolist())
        )
        assert row["reward"] == pytest.approx(scores.mean())
        assert row["failure_reward"] == pytest.approx(scores[scores < 1].mean(), abs=1e-6)
    assert bool(shaped) == (reward == "srpo" and keep == "signal")


@pytest.mark.parametrize("reward, every", [("srpo", 2), ("binary", 8)])
def test_more_frames_are_rendered_for_the_world_model_alone(monkeypatch, tmp_path, reward, every):
    pretend = Pretend(monkeypatch, tmp_path, outcome=lambda i, start, bins: i % 2)
    assert go(tmp_path, "run", "--reward", reward, "--video_every", "2", "--steps", "1") == 0
    assert pretend.every == every


def test_the_temperature_and_the_rate_follow_their_schedules(monkeypatch, tmp_path):
    """In the metrics, and in sampling and update alike: with one update a step every ratio is 1."""
    Pretend(monkeypatch, tmp_path)
    assert (
        go(
            tmp_path,
            "run",
            "--reward",
            "binary",
            "--epochs",
            "1",
            "--minibatch",
            "1000",
            "--temperature",
            "1.5",
            "--temperature_end",
            "0.5",
            "--lr",
            "0.01",
            "--lr_end",
            "0.4",
            "--average",
            "0",
        )
        == 0
    )
    rows = metrics(tmp_path / "run")[1:]
    assert [r["temperature"] for r in rows] == pytest.approx([1.5, 1.3, 1.1, 0.9, 0.7, 0.5])
    assert [r["lr"] for r in rows] == pytest.approx(
        [0.01 * (i + 1) / 10 * (1 - 0.6 * i / 6) for i in range(6)]
    )
    assert [r["updates"] for r in rows] == [1] * 6 and [
        r["ratio_max"] for r in rows
    ] == pytest.approx([1] * 6, abs=1e-3)


def test_advantages_without_division_by_the_std(monkeypatch, tmp_path):
    pretend = Pretend(monkeypatch, tmp_path)
    assert go(tmp_path, "run", "--reward", "binary", "--no_std_scale") == 0
    for batch, (scores, _) in zip(pretend.batches, pretend.scores):
        centred = scores.reshape(4, 12) - scores.reshape(4, 12).mean(1, keepdims=True)
        np.testing.assert_allclose(batch.advantage, centred.flatten()[batch.trajectory], atol=1e-6)


def test_no_signal_at_all(monkeypatch, tmp_path):
    pretend = Pretend(monkeypatch, tmp_path, outcome=lambda i, start, bins: False)
    assert go(tmp_path, "run", "--reward", "binary") == 0
    rows = metrics(tmp_path / "run")[1:]
    assert [(r["groups_used"], r["updates"], r["tokens"], r["reward"]) for r in rows] == [
        (0, 0, 0, 0.0)
    ] * 6
    assert [batch.rows for batch in pretend.batches] == [0] * 6
    start, end = (
        load_file(tmp_path / name / "model.safetensors") for name in ("policy", "run/policy")
    )
    assert all(torch.equal(start[k], end[k]) for k in start)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.25, 0.97, 0.0])
def test_the_saved_policy_is_the_running_average(monkeypatch, tmp_path, decay):
    """Against the definition, from the weights after every step: a_1 = w_1,
    a_t = d a_t-1 + (1 - d) w_t, d = min(decay, t / (9 + t))."""
    pretend = Pretend(monkeypatch, tmp_path)
    assert go(tmp_path, "run", "--reward", "binary", "--average", str(decay)) == 0
    weights = [
        {k: v for k, v in each.items() if not k.startswith("average.")} for each in pretend.weights
    ]
    average = weights[0]
    for n, later in enumerate(weights[1:], 1):
        now = min(decay, (1 + n) / (10 + n))
        average = {k: now * v + (1 - now) * later[k] for k, v in average.items()}
    saved = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert len(weights) == 6
    for name, tensor in average.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(average[k], weights[-1][k], rtol=1e-4) for k in average) == (
        decay > 0
    )


def test_until_ends_a_run_at_the_evaluation_that_reaches_it(monkeypatch, tmp_path, capsys):
    """What stands in for the evaluation gives 50%."""
    pretend = Pretend(monkeypatch, tmp_path)
    assert go(tmp_path, "early", "--reward", "binary", "--eval_every", "2", "--until", "0.5") == 0
    assert "after 2 steps" in capsys.readouterr().out and [
        row["step"] for row in metrics(tmp_path / "early")
    ] == [0, 1, 2]
    assert (tmp_path / "early/after.json").exists() and (tmp_path / "early/policy").exists()
    assert (
        vla_srpo.main(["--resume", str(tmp_path / "early")]) == 0 and len(pretend.starts) == 2
    )  # finished: nothing is played
    assert (
        go(tmp_path, "late", "--reward", "binary", "--eval_every", "2", "--until", "0.51") == 0
        and len(metrics(tmp_path / "late")) == 7
    )


@pytest.mark.slow
def test_starts_are_groups_of_training_states(monkeypatch, tmp_path):
    pretend = Pretend(monkeypatch, tmp_path)
    assert go(tmp_path, "a", "--reward", "binary") == go(tmp_path, "b", "--reward", "binary") == 0
    assert pretend.starts[:6] == pretend.starts[6:] and metrics(tmp_path / "a") == metrics(
        tmp_path / "b"
    )
    assert go(tmp_path, "c", "--reward", "binary", "--seed", "8") == 0
    assert pretend.starts[12:] != pretend.starts[:6]
    for starts in pretend.starts:
        assert len(starts) == 48 and all(
            len(set(starts[g : g + 12])) == 1 for g in range(0, 48, 12)
        )
        assert all(s.split == "train" and 0 <= s.index < 50 for s in starts)
    assert (
        len({s for starts in pretend.starts for s in starts}) > 30
    )  # not the same few all the time


class PowerCut(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "at, fault, flags",
    [
        (4, PowerCut, ()),
        (5, PowerCut, ("--references", "3")),
        (5, PowerCut, ("--references", "3", "--data", "demos")),
        (3, KeyboardInterrupt, ()),
        (6, KeyboardInterrupt, ()),
    ],
)
def test_a_run_cut_at_any_step_resumes_to_the_same_metrics(
    monkeypatch, tmp_path, capsys, at, fault, flags
):
    """Steps 2, 4, 6 are saved: a power cut in step 4 costs a step already done; Ctrl-C finishes the
    step and saves it."""

    def strike(step):
        if step == at:
            if fault is PowerCut:
                raise PowerCut
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # let the handler run

    monkeypatch.chdir(tmp_path)
    save(
        Path("demos/0.npz"),
        Trajectory(TASKS["tabletop"][0], True, squares(1, size=64)[0], np.zeros((8 * 9, 7))),
    )
    Pretend(monkeypatch, tmp_path)
    assert go(tmp_path, "whole", "--reward", "srpo", *flags) == 0
    pretend, handler = Pretend(monkeypatch, tmp_path, fault=strike), signal.getsignal(signal.SIGINT)
    if fault is PowerCut:
        with pytest.raises(PowerCut):
            go(tmp_path, "cut", "--reward", "srpo", *flags)
        signal.signal(
            signal.SIGINT, handler
        )  # a process that lost its power has no handlers either
    else:
        assert go(tmp_path, "cut", "--reward", "srpo") == (130 if at < 6 else 0)
        out = capsys.readouterr().out
        assert (
            at == 6
            or f"stopped after step {at}; go on with: python vla_srpo.py --resume {tmp_path}/cut"
            in out
        )
        assert (
            json.loads((tmp_path / "cut" / "checkpoint" / "state.json").read_text())["step"] == at
        )
    pretend.fault = lambda step: None
    shutil.rmtree("demos")  # what was encoded is in the checkpoint
    if fault is PowerCut or at < 6:
        assert vla_srpo.main(["--resume", str(tmp_path / "cut")]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert [r["step"] for r in metrics(tmp_path / "cut")] == list(range(7))
    for name in (
        "policy/model.safetensors",
        "checkpoint/00000.safetensors",
    ):
        a, b = load_file(tmp_path / "cut" / name), load_file(tmp_path / "whole" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    before = snapshot_of(tmp_path / "cut")
    assert vla_srpo.main(["--resume", str(tmp_path / "cut")]) == 0  # nothing left to do
    assert {k for k, v in snapshot_of(tmp_path / "cut").items() if before[k] != v} <= {"curve.png"}


def test_skipped_updates_are_counted(monkeypatch, tmp_path):
    Pretend(monkeypatch, tmp_path)
    poisoned = grpo.group_advantages
    monkeypatch.setattr(grpo, "group_advantages", lambda *a, **k: poisoned(*a, **k) * math.nan)
    assert go(tmp_path, "run", "--reward", "binary", "--steps", "1") == 0
    (row,) = metrics(tmp_path / "run")[1:]
    assert row["skipped"] > 0 and row["updates"] == 0 and row["loss"] is None


# The command line: each error is one line, and nothing is written


def snapshot_of(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else "folder"
        for p in folder.rglob("*")
    }


def refused(argv: list, words: list[str], folder: Path, capsys) -> None:
    before = snapshot_of(folder)
    assert vla_srpo.main([str(a) for a in argv]) == 2
    stderr = capsys.readouterr().err
    assert (
        stderr.count("\n") == 1
        and stderr.startswith("error: ")
        and all(word in stderr for word in words)
    ), stderr
    assert snapshot_of(folder) == before


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--bogus", "1"], ["--bogus"]),
        (["--reward", "dense"], ["--reward", "dense", "srpo", "binary"]),
        (["--keep", "all"], ["--keep", "signal", "mixed"]),
        (["--group_size", "1"], ["--group_size", "at least 2", "baseline"]),
        (["--groups", "0"], ["--groups", "at least 1"]),
        (["--steps", "-1"], ["--steps", "at least 1", "-1"]),
        (["--steps", "0"], ["--steps", "at least 1"]),
        (["--steps", "x"], ["--steps", "'x'"]),
        (["--steps"], ["--steps", "expected one argument"]),
        (["--lr", "0"], ["--lr", "positive"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--temperature", "-1"], ["--temperature", "positive"]),
        (["--alpha", "1.1"], ["--alpha", "[0, 1]"]),
        (["--until", "95"], ["--until", "[0, 1]"]),
        (["--references", "-1"], ["--references", "at least 0"]),
        (["--references", "8", "--reward", "binary"], ["--references", "srpo, not binary"]),
        (["--world_model", "oracle", "--suite", "libero_goal"], ["oracle", "not libero_goal"]),
        (["--video_every", "3"], ["--video_every", "1, 2, 4, 8"]),
        (["--dtype", "bfloat16"], ["--average 0.97 with bfloat16", "--average 0"]),
        (["--paper"], ["--paper needs --model"]),
        (["--average", "1"], ["--average", "0.9999]"]),
        (["--clip_low", "1.5"], ["--clip_low", "below 1"]),
        (["--workers", "0"], ["--workers", "at least 1"]),
        (["--workers", "200"], ["--workers 200", "--tables"]),
        (["--tasks", "1", "1"], ["--tasks 1 1", "each once"]),
        (["--plan", "--group_size", "1"], ["--group_size", "baseline"]),
        (["--split", "all"], ["--split all", "tabletop has train, heldout"]),
        (["--resume", "run", "--out", "elsewhere"], ["--resume", "drop --out"]),
        (["--seed", "-3"], ["--seed", "at least 0"]),
        (["--resume", "nowhere"], ["nowhere", "no checkpoint"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) and x[0][0] == "-" else "",
)
def test_bad_flags(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where a default --out would appear
    refused(argv, words, tmp_path, capsys)


def test_bad_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ["--steps", "1", "--reward", "binary", "--threads", "1"]
    tiny_policy().save_pretrained(tmp_path / "policy")
    shutil.copytree(tmp_path / "policy", tmp_path / "truncated")
    os.truncate(tmp_path / "truncated" / "model.safetensors", 1000)
    (tmp_path / "file").write_text("in the way")
    refused(
        [*base, "--model", tmp_path / "missing"],
        [f"{tmp_path}/missing", "neither a checkpoint folder nor a hub id"],
        tmp_path,
        capsys,
    )
    refused(
        [*base, "--model", tmp_path / "truncated"],
        ["truncated/model.safetensors", "copy it again"],
        tmp_path,
        capsys,
    )
    for out in ("file", "file/below"):
        refused(
            [*base, "--model", tmp_path / "policy", "--out", tmp_path / out],
            [f"{tmp_path}/{out}"],
            tmp_path,
            capsys,
        )


@pytest.fixture
def stopped(tmp_path):
    """A run after step 3 of 6, as `save` leaves it."""
    policy = tiny_policy()
    policy.save_pretrained(tmp_path / "policy")
    optimizer = make_optimizer(policy, 1e-3)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    s = Settings(steps=6, reward="binary", lr=1e-3, threads=1, model=str(tmp_path / "policy"))
    (tmp_path / "run").mkdir()
    run = Run(s, tmp_path / "run", {"stage": "", "step": 3, "ended": False}, "vla_srpo.py")
    run.tensors, run.optimizer = adapters.kept(policy), optimizer
    run.save()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f'{{"step": {k}}}\n' for k in range(4)))
    return tmp_path / "run", policy, optimizer


def test_checkpoint_holds_everything(stopped):
    run, policy, optimizer = stopped
    model = load_file(run / "checkpoint" / "00000.safetensors")
    trainer = {key: model.pop(key) for key in list(model) if key.startswith("optimizer.")}
    state = read_state(run / "checkpoint")
    assert all(torch.equal(model[k], v) for k, v in policy.state_dict().items()) and len(
        model
    ) == len(policy.state_dict())
    expected = optimizer_tensors(optimizer)
    assert trainer.keys() == expected.keys() and all(
        torch.equal(trainer[k], v) for k, v in expected.items()
    )
    assert len(expected) == 3 * len(list(policy.parameters()))
    assert state["step"] == 3 and Settings(**state["settings"]).lr == 1e-3


def test_resume_with_other_settings_or_a_damaged_checkpoint(stopped, tmp_path, capsys):
    run = stopped[0]
    for flag, value in (
        ("lr", "0.5"),
        ("steps", "7"),
        ("seed", "1"),
        ("reward", "srpo"),
        ("group_size", "4"),
        ("tables", "8"),
        ("until", "0.5"),  # it would not go on if it had ended by it
    ):
        refused(
            ["--resume", run, f"--{flag}", value],
            [f"--{flag} {value} differs from the run's", "drop the flag"],
            tmp_path,
            capsys,
        )
    refused(
        ["--out", run, "--reward", "binary"],
        ["holds a run already", f"--resume {run}"],
        tmp_path,
        capsys,
    )
    (tmp_path / "record").mkdir()
    shutil.copy(run / "metrics.jsonl", tmp_path / "record")
    refused(["--out", tmp_path / "record"], ["metrics.jsonl is of another run"], tmp_path, capsys)
    for name in ("00000.safetensors", "state.json"):
        file = run / "checkpoint" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        refused(["--resume", run], [name, "truncated"], tmp_path, capsys)
        file.unlink()
        refused(["--resume", run], [f"{run}/checkpoint", "missing"], tmp_path, capsys)
        file.write_bytes(content)
    assert (
        vla_srpo.main(["--resume", str(run), "--plan", "--micro_batch", "20"]) == 0
    )  # of the run's policy; what only saves memory may change
    assert f"plan for {tmp_path}/policy" in capsys.readouterr().out
    os.truncate(tmp_path / "policy" / "model.safetensors", 1000)
    refused(["--resume", run], ["policy/model.safetensors"], tmp_path, capsys)


# End to end, in processes of their own

# 4 held-out states instead of 50
SMALL = ("import sys; from robots import tabletop; tabletop.N_STATES = 4; import vla_srpo; "
         "sys.exit(vla_srpo.main())")
END_TO_END = [
    "--steps",
    "5",
    "--groups",
    "3",
    "--group_size",
    "4",
    "--tables",
    "10",
    "--workers",
    "2",
    "--lr",
    "1e-3",
    "--epochs",
    "2",
    "--minibatch",
    "32",
    "--target_kl",
    "0",
    "--temperature",
    "1",
    "--reward",
    "srpo",
    "--eval_every",
    "0",
    "--save_every",
    "10",
    "--seed",
    "3",
]


class Process:
    """A run in a process group of its own."""

    def __init__(self, *argv, code: str = SMALL, cwd: Path = ROOT):
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        self.argv = [
            sys.executable,
            *(["-c", code] if code else [ROOT / "vla_srpo.py"]),
            *map(str, argv),
        ]
        self.popen = subprocess.Popen(
            self.argv,
            cwd=cwd,
            env=environment,
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def strike_after(self, step: int, metrics_file: Path, number: int) -> None:
        """Send a signal when the row of a step has been written: Ctrl-C to the whole group as a
        terminal does, SIGKILL to the main process only."""
        deadline = time.monotonic() + 60
        while f'{{"step": {step},' not in (
            metrics_file.read_text() if metrics_file.exists() else ""
        ):
            assert self.popen.poll() is None and time.monotonic() < deadline, (
                self.popen.communicate()
            )
            time.sleep(0.005)
        (os.killpg if number == signal.SIGINT else os.kill)(self.popen.pid, number)

    def end(self) -> tuple[int, str, str]:
        try:
            out, err = self.popen.communicate(timeout=120)
            return self.popen.returncode, out, err
        finally:
            try:
                os.killpg(self.popen.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import VJEPA2Config, VJEPA2Model

    folder = tmp_path_factory.mktemp("end_to_end")
    torch.manual_seed(0)
    model = VJEPA2Model(
        VJEPA2Config(**dict(TINY, hidden_size=24, pred_hidden_size=12, num_hidden_layers=1))
    )
    world_model.WorldModel(model, resize="exact", device="cpu").save_pretrained(
        folder / "world_model"
    )
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return Process(
        *END_TO_END, "--world_model", folder / "world_model", "--out", folder / "whole"
    ).end(), folder / "whole"


@pytest.mark.slow
def test_a_run_writes_what_it_promises(whole, folder):
    (code, stdout, stderr), out = whole
    assert code == 0, stderr
    assert sorted(p.name for p in out.glob("[!.]*")) == [
        "after.gif",
        "after.json",
        "before.gif",
        "before.json",
        "checkpoint",
        "curve.png",
        "metrics.jsonl",
        "policy",
        "settings.json",
    ]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(6))
    for row in rows[1:]:
        assert (
            0 <= row["success"] <= 1
            and row["success"] <= row["reward"] < 1.0001
            and 1 <= row["length"] <= HORIZON["tabletop"]
        )
        assert (
            row["env_steps"] == pytest.approx(12 * row["length"])
            and row["skipped"] == 0
            and row["workers_replaced"] == 0
        )
        assert (
            row["tokens"] <= 7 * row["env_steps"] and row["updates"] > 0 or row["groups_used"] == 0
        )
        assert 0 < row["entropy"] < math.log(256)
        assert all(row[f"seconds_{part}"] >= 0 for part in ("rollout", "reward", "update"))
    assert sum(r["groups_used"] for r in rows[1:]) >= 5  # something was learnt from
    for key, file in (("before", rows[0]), ("after", rows[-1])):
        result = json.loads((out / f"{key}.json").read_text())
        assert result["episodes"] == 16 and result["success"] == file["heldout"]
        assert list(result["tasks"]) == list(TASKS["tabletop"])
        assert f"{result['success']:.1%}" in stdout
        with Image.open(out / f"{key}.gif") as gif:
            assert gif.n_frames > 4 * 10
    with Image.open(out / "curve.png") as curve:
        assert curve.format == "PNG" and curve.width > 500
    start, end = policies.load_policy(Settings().model), policies.load_policy(out / "policy")
    assert any(
        not torch.equal(a, b)
        for a, b in zip(start.state_dict().values(), end.state_dict().values())
    )
    kept = load_file(out / "checkpoint" / "00000.safetensors")
    state = read_state(out / "checkpoint")
    assert state["step"] == 5 and all(
        torch.equal(kept[f"average.module.{k}"], v) for k, v in end.state_dict().items()
    )
    for promised in (
        "held-out initial states: success",
        'sample: "put the',
        "metrics.jsonl",
        "curve.png",
        "GIFs",
    ):
        assert promised in stdout, promised
    assert "5/5" in stderr  # the progress bar


@pytest.mark.slow
def test_ctrl_c_and_sigkill_do_not_change_the_metrics(whole, folder):
    """Ctrl-C after step 1, resumed, SIGKILL after step 4 with the checkpoint of step 1 or 2,
    resumed: as if nothing had been."""
    out = folder / "cut"
    process = Process(*END_TO_END, "--world_model", folder / "world_model", "--out", out)
    process.strike_after(1, out / "metrics.jsonl", signal.SIGINT)
    code, stdout, stderr = process.end()
    assert (
        code == 130
        and f"go on with: python vla_srpo.py --resume {out}" in stdout
        and "Traceback" not in stderr
    )
    saved = json.loads((out / "checkpoint" / "state.json").read_text())["step"]
    assert (
        1 <= saved <= 3
        and f"stopped after step {saved};" in stdout
        and not (out / "policy").exists()
    )
    process = Process("--resume", out)
    process.strike_after(4, out / "metrics.jsonl", signal.SIGKILL)
    assert process.end()[0] == -signal.SIGKILL
    code, stdout, stderr = Process("--resume", out).end()
    assert code == 0 and f"resumed after step {saved}" in stdout, stderr
    assert metrics(out) == metrics(whole[1])
    for name in ("policy/model.safetensors", "checkpoint/00000.safetensors"):
        a, b = load_file(out / name), load_file(whole[1] / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads((out / "after.json").read_text()) == json.loads(
        (whole[1] / "after.json").read_text()
    )


@pytest.mark.slow
def test_the_command_as_users_type_it(tmp_path):
    """All 200 held-out initial states, plain GRPO, with the folder of the default --out."""
    code, stdout, stderr = Process(
        "--steps",
        "1",
        "--groups",
        "2",
        "--group_size",
        "4",
        "--tables",
        "64",
        "--threads",
        "1",
        "--reward",
        "binary",
        "--eval_every",
        "0",
        code="",
        cwd=tmp_path,
    ).end()
    assert code == 0, stderr
    result = json.loads((tmp_path / "out" / "binary" / "after.json").read_text())
    assert result["episodes"] == 200 and "all tasks" in stdout
    episodes = {task: own["episodes"] for task, own in result["tasks"].items()}
    assert episodes == dict.fromkeys(TASKS["tabletop"], 50)
    (row,) = metrics(tmp_path / "out" / "binary")[1:]
    assert row["reward"] == pytest.approx(row["success"]) and "groups_changed" not in row
    code, stdout, stderr = Process(
        "--reward", "dense", code="", cwd=tmp_path
    ).end()  # with all that importing prints
    assert code == 2 and stdout == "" and stderr.count("\n") == 1 and "--reward" in stderr
