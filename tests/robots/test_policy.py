"""robots/policy.py: sampled bins against scipy and naive log-probabilities, greedy ones and rows to train on against loops, adapters against the policy
they are merged into."""
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from robots import tabletop as envs
from robots import policy as policies
from robots import openvla as vla
import vla_srpo
from tests.conftest import STATS, fake_episode
from robots.rollouts import Start
from robots.tiny_vla import TinyVLA

KEY = "tabletop"
TINY = vla_srpo.WEIGHTS / "tiny_vla"


# Either policy

def test_upright_images_become_the_policys_frames():
    model = policies.load_policy(Path(__file__).parents[1] / "fixtures" / "openvla_tiny" / "checkpoint")
    upright = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), np.uint8)
    frames = policies.policy_frames(model, upright)
    assert frames.shape == (2, 1, 224, 224, 3) and policies.camera_size(model) == 256
    for frame, image in zip(frames, upright):
        np.testing.assert_array_equal(frame[0], vla.preprocess(np.rot90(image, 2)))     # as LIBERO renders it: upside down


def test_small_images_pass_as_they_are():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    policy = policies.load_policy(TINY)
    np.testing.assert_array_equal(policies.policy_frames(policy, images), images[:, None])
    assert policies.camera_size(policy) == 64


def test_find_key():
    stats = {"libero_goal_no_noops": {}, "libero_10": {}}
    assert [policies.find_key(stats, suite) for suite in ("libero_goal", "libero_10")] == list(stats)
    assert policies.find_key({"mixed": {}}, "libero_plus:camera") == "mixed"
    for known, suite in ((stats, "libero_object"), ({"tabletop": {}}, "libero_goal"), (stats, "libero_plus:camera")):
        with pytest.raises(ValueError, match=f"statistics for {', '.join(sorted(known))}, not for {suite}; choose a checkpoint .*--key"):
            policies.find_key(known, suite)


# Actions

def test_greedy_takes_the_likeliest_bin():
    policy = TinyVLA(STATS, channels=(4, 4, 4), width=16, basis=6)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    actions, records = policies.greedy(policy, KEY)(images, list(envs.TASKS[:3]))
    assert actions.shape == (3, 8, 7) and records == [None] * 3
    with torch.no_grad():
        logits = policy(*policy.prompt_ids(list(envs.TASKS[:3])), policy.pixel_values(images[:, None]))
    bins = [[max(range(256), key=lambda b: logits[i, t, b].item()) for t in range(56)] for i in range(3)]
    np.testing.assert_array_equal(actions, vla.to_env_actions(policy.decode(np.array(bins), KEY)))


class Fixed:
    """A policy that gives the same logits (56, 256) whatever it sees."""
    norm_stats, decode = STATS, TinyVLA.decode

    def __init__(self, logits: torch.Tensor):
        self.logits = logits

    def prompt_ids(self, instructions):
        return torch.ones(len(instructions), 1).long(), torch.ones(len(instructions), 1).long()

    def pixel_values(self, frames):
        assert frames.shape[1:] == (1, 64, 64, 3)
        return torch.as_tensor(frames)

    def __call__(self, ids, mask, pixels):
        return self.logits.expand(len(pixels), -1, -1)


def draw(logits: torch.Tensor, temperature: float, n: int):
    torch.manual_seed(0)
    return policies.sampler(Fixed(logits), temperature, KEY)(np.zeros((n, 64, 64, 3), np.uint8), ["go"] * n)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_sampler_logprobs_are_at_the_temperature(temperature):
    logits = 3 * torch.randn(56, 256, generator=torch.Generator().manual_seed(1))
    actions, records = draw(logits, temperature, 4)
    p = torch.log_softmax(logits.double() / temperature, -1)
    for action, call in zip(actions, records, strict=True):
        bins, logp, entropy = call.bins, call.logp, call.entropy
        expected = torch.tensor([p[t, b] for t, b in enumerate(bins.tolist())])
        torch.testing.assert_close(logp.double(), expected, rtol=0, atol=1e-4)
        assert abs(entropy - np.mean([-(row.exp() * row).sum() for row in p])) < 1e-3
        np.testing.assert_array_equal(action, vla.to_env_actions(vla.decode_actions(bins[None], STATS[KEY]["action"]))[0])
    assert len({tuple(call.bins.tolist()) for call in records}) == 4


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_sampler_frequencies(temperature):
    """Chi-square over all bins of all 56 tokens; bins without probability never come up."""
    n, logits = 1000, 2 * torch.randn(56, 256, generator=torch.Generator().manual_seed(2))
    impossible = torch.rand(56, 256, generator=torch.Generator().manual_seed(3)) < 0.3
    logits[impossible] = -1e9
    bins = torch.stack([call.bins for call in draw(logits, temperature, n)[1]])                # (n, 56)
    expected = n * torch.softmax(logits.double() / temperature, -1).numpy()                     # (56, 256)
    observed = np.stack([np.bincount(column, minlength=256) for column in bins.T.numpy()])
    assert observed[impossible.numpy()].sum() == 0
    statistic = freedom = 0
    for o, e in zip(observed, expected):
        rare = e < 5
        o, e = np.append(o[~rare], o[rare].sum()), np.append(e[~rare], e[rare].sum())
        statistic, freedom = statistic + ((o - e) ** 2 / e).sum(), freedom + len(o) - 1
    assert freedom > 500 and 0.001 < chi2.sf(statistic, freedom) < 0.999
    wrong = n * torch.softmax(logits.double() / (temperature * 1.1), -1).numpy()                # the test can tell
    assert ((observed - wrong)[expected > 5] ** 2 / wrong[expected > 5]).sum() > statistic + 200


# The rows to train on

def test_collate_takes_the_executed_tokens():
    episodes = [fake_episode(Start(task, i), executed, i) for i, (task, executed) in enumerate(
        [(0, [8, 8, 3]), (3, [8, 8]), (2, [1]), (1, [8, 7]), (0, [8] * 6)])]
    advantages = torch.tensor([0.5, -1.0, 2.0, 0.0, -0.25])                                     # the fourth says nothing
    batch = policies.collate(episodes, advantages)
    rows = [(i, j) for i, e in enumerate(episodes) if i != 3 for j in range(len(e.executed))]
    assert len(batch.mask) == len(rows) == 12
    for n, (i, j) in enumerate(rows):
        e = episodes[i]
        assert batch.mask[n].tolist() == [t < 7 * e.executed[j] for t in range(56)]
        assert torch.equal(batch.bins[n], e.records[j].bins) and torch.equal(batch.logp[n], e.records[j].logp)
        np.testing.assert_array_equal(batch.frames[n, 0], e.images[j])
        assert batch.instructions[n] == envs.TASKS[e.start.task]
        assert batch.advantage[n] == advantages[i] and batch.trajectory[n] == i
    empty = policies.collate(episodes, torch.zeros(5))
    assert len(empty.mask) == 0 and empty.instructions == []


# Adapters

def test_a_vla_s_adapters_are_saved_merged_and_alone(tmp_path):
    from peft import PeftModel
    base = policies.load_policy(TINY)
    policy = policies.prepared(policies.load_policy(TINY), vla_srpo.Settings(lora_rank=2))
    assert sum(p.requires_grad for p in policy.parameters()) == 2 * 4               # film, fc1, fc2, head
    for p in (p for p in policy.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=0.1)
    inputs = (*policy.prompt_ids(["put the red cube on the green plate"]), torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        expected, start = policy(*inputs), base(*inputs)
        with policies.adapters_off(policy):
            torch.testing.assert_close(policy(*inputs), start)
        assert (expected - start).abs().max() > 0.1
        policies.save_policy(policy, tmp_path)
        torch.testing.assert_close(policies.load_policy(tmp_path / "policy")(*inputs), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "policy_adapter")(*inputs), expected, atol=1e-4, rtol=1e-4)
