"""robots/policy.py: sampled bins against scipy and naive log-probabilities, greedy ones and rows to
train on against loops, adapters against the policy they are merged into; the registry."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2

import robots
from plumbing import adapters, ranks
from robots import find_suite, tabletop
from robots import openvla as vla
from robots import policy as policies
from robots.suite import Episode, Start
from robots.tiny_vla import TinyVLA
from tests.conftest import STATS, fake_episode

TASKS = tabletop.TASKS["tabletop"]

KEY = "tabletop"
TINY = Path(__file__).parents[2] / "weights" / "tiny_vla"
CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "openvla_tiny" / "checkpoint"


# Either policy


def test_upright_images_become_the_policys_frames():
    model = policies.load_policy(CHECKPOINT)
    upright = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), np.uint8)
    frames = model.frames(upright)
    assert frames.shape == (2, 1, 224, 224, 3) and model.camera == 256
    for frame, image in zip(frames, upright):
        np.testing.assert_array_equal(
            frame[0], vla.preprocess(np.rot90(image, 2))
        )  # as LIBERO renders it: upside down


def test_small_images_pass_as_they_are():
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    policy = policies.load_policy(TINY)
    np.testing.assert_array_equal(policy.frames(images), images[:, None])
    assert policy.camera == 64


def test_find_key():
    stats = {"libero_goal_no_noops": {}, "libero_10": {}}
    assert [policies.find_key(stats, suite) for suite in ("libero_goal", "libero_10")] == list(
        stats
    )
    assert policies.find_key({"mixed": {}}, "libero_plus:camera") == "mixed"
    for known, suite in (
        (stats, "libero_object"),
        ({"tabletop": {}}, "libero_goal"),
        (stats, "libero_plus:camera"),
    ):
        with pytest.raises(
            ValueError,
            match=f"statistics for {', '.join(sorted(known))}, not for {suite}; "
            "choose a checkpoint .*--key",
        ):
            policies.find_key(known, suite)


# Actions


def test_greedy_takes_the_likeliest_bin():
    policy = TinyVLA(STATS, channels=(4, 4, 4), width=16, basis=6)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    actions, records = policies.greedy(policy, KEY)(images, list(TASKS[:3]))
    assert actions.shape == (3, 8, 7) and records == [None] * 3
    with torch.no_grad():
        logits = policy(
            *policy.prompt_ids(list(TASKS[:3])), policy.pixel_values(images[:, None])
        )
    bins = [
        [max(range(256), key=lambda b: logits[i, t, b].item()) for t in range(56)] for i in range(3)
    ]
    np.testing.assert_array_equal(actions, vla.to_env_actions(policy.decode(np.array(bins), KEY)))


class Fixed:
    """A policy that gives the same logits (56, 256) whatever it sees."""

    norm_stats, decode = STATS, TinyVLA.decode

    def __init__(self, logits: torch.Tensor):
        self.logits = logits

    def frames(self, images):
        return images[:, None]

    def prompt_ids(self, instructions):
        return torch.ones(len(instructions), 1).long(), torch.ones(len(instructions), 1).long()

    def pixel_values(self, frames):
        assert frames.shape[1:] == (1, 64, 64, 3)
        return torch.as_tensor(frames)

    def __call__(self, ids, mask, pixels):
        return self.logits.expand(len(pixels), -1, -1)


def draw(logits: torch.Tensor, temperature: float, n: int):
    torch.manual_seed(0)
    return policies.sampler(Fixed(logits), temperature, KEY)(
        np.zeros((n, 64, 64, 3), np.uint8), ["go"] * n
    )


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
        np.testing.assert_array_equal(
            action, vla.to_env_actions(vla.decode_actions(bins[None], STATS[KEY]["action"]))[0]
        )
    assert len({tuple(call.bins.tolist()) for call in records}) == 4


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_sampler_frequencies(temperature):
    """Chi-square over all bins of all 56 tokens; bins without probability never come up."""
    n, logits = 1000, 2 * torch.randn(56, 256, generator=torch.Generator().manual_seed(2))
    impossible = torch.rand(56, 256, generator=torch.Generator().manual_seed(3)) < 0.3
    logits[impossible] = -1e9
    bins = torch.stack([call.bins for call in draw(logits, temperature, n)[1]])  # (n, 56)
    expected = n * torch.softmax(logits.double() / temperature, -1).numpy()  # (56, 256)
    observed = np.stack([np.bincount(column, minlength=256) for column in bins.T.numpy()])
    assert observed[impossible.numpy()].sum() == 0
    statistic = freedom = 0
    for o, e in zip(observed, expected):
        rare = e < 5
        o, e = np.append(o[~rare], o[rare].sum()), np.append(e[~rare], e[rare].sum())
        statistic, freedom = statistic + ((o - e) ** 2 / e).sum(), freedom + len(o) - 1
    assert freedom > 500 and 0.001 < chi2.sf(statistic, freedom) < 0.999
    wrong = (
        n * torch.softmax(logits.double() / (temperature * 1.1), -1).numpy()
    )  # the test can tell
    assert ((observed - wrong)[expected > 5] ** 2 / wrong[expected > 5]).sum() > statistic + 200


# The rows to train on


def test_collate_takes_the_executed_tokens():
    episodes = [
        fake_episode(Start(task, i), executed, i)
        for i, (task, executed) in enumerate(
            [(0, [8, 8, 3]), (3, [8, 8]), (2, [1]), (1, [8, 7]), (0, [8] * 6)]
        )
    ]
    advantages = torch.tensor([0.5, -1.0, 2.0, 0.0, -0.25])  # the fourth says nothing
    batch = policies.collate(episodes, advantages, TASKS)
    rows = [(i, j) for i, e in enumerate(episodes) if i != 3 for j in range(len(e.executed))]
    assert batch.rows == len(batch.mask) == len(rows) == 12
    for n, (i, j) in enumerate(rows):
        e = episodes[i]
        assert batch.mask[n].tolist() == [t < 7 * e.executed[j] for t in range(56)]
        assert torch.equal(batch.bins[n], e.calls[j].bins) and torch.equal(
            batch.logp[n], e.calls[j].logp
        )
        np.testing.assert_array_equal(batch.frames[n, 0], e.clip[j])
        assert batch.instructions[n] == TASKS[e.start.task]
        assert batch.advantage[n] == advantages[i] and batch.trajectory[n] == i
    kinds = (batch.frames, batch.bins, batch.logp, batch.mask, batch.advantage, batch.trajectory)
    assert [x.dtype for x in kinds] == [
        *(torch.uint8, torch.int64, torch.float32, torch.bool, torch.float32, torch.int64)
    ]


def test_a_batch_without_advantages_is_a_row_that_counts_for_nothing():
    """Another rank's update needs this one's pass: it must run, and its loss and gradients be 0."""
    episodes = [fake_episode(Start(2, i), [8, 3], i) for i in range(2)]
    batch = policies.collate(episodes, torch.zeros(2), TASKS)
    assert batch.rows == 0 and batch.mask.shape == (1, 56) and not batch.mask.any()
    assert batch.instructions == [TASKS[2]] and batch.advantage.tolist() == [0.0]
    assert batch.frames.shape == (1, 1, 64, 64, 3) and batch.bins.shape == (1, 56)
    policy = TinyVLA(STATS, channels=(4, 4, 4), width=16, basis=6)
    logp = policies.logprobs(policy, batch, torch.arange(1), 1.6)
    assert logp.shape == (1, 56) and bool(logp.isfinite().all())
    (logp * batch.mask).sum().backward()
    assert all(not p.grad.any() for p in policy.parameters())


def test_logprobs_are_those_of_the_sampling_policy():
    """Rows in any order give the numbers that sampling remembered: one policy, one temperature."""
    torch.manual_seed(0)
    policy, texts = TinyVLA(STATS, channels=(4, 4, 4), width=16, basis=6), list(TASKS)
    torch.nn.init.normal_(policy.head.weight)
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    _, calls = policies.sampler(policy, 1.6, KEY)(images, texts)
    episodes = [Episode(Start(i, 0), [call], [8]) for i, call in enumerate(calls)]
    batch = policies.collate(episodes, torch.ones(4), TASKS)
    part = torch.tensor([2, 0, 3])
    again = policies.logprobs(policy, batch, part, 1.6)
    torch.testing.assert_close(again.detach(), batch.logp[part], rtol=0, atol=1e-4)
    assert (policies.logprobs(policy, batch, part, 1.0) - batch.logp[part]).abs().max() > 0.01


# Adapters


def test_a_vla_s_adapters_are_saved_merged_and_alone(tmp_path):
    from peft import PeftModel

    base, policy = policies.load_policy(TINY), policies.load_policy(TINY)
    layers = [name for name, m in policy.named_modules() if isinstance(m, torch.nn.Linear)]
    adapters.add_adapters(policy, layers, 2, seed=0)
    assert len(ranks.trainable(policy)) == 2 * 4  # film, fc1, fc2, head
    for p in ranks.trainable(policy).values():
        torch.nn.init.normal_(p, std=0.1)
    inputs = (
        *policy.prompt_ids(["put the red cube on the green plate"]),
        torch.randn(1, 3, 64, 64),
    )
    with torch.no_grad():
        expected, start = policy(*inputs), base(*inputs)
        with adapters.starting_policy(policy, None) as model:
            torch.testing.assert_close(model(*inputs), start)
        torch.testing.assert_close(policy(*inputs), expected)  # switched on again
        assert (expected - start).abs().max() > 0.1
        adapters.save_policy(policy, tmp_path / "policy", policy.save_pretrained)
        merged = policies.load_policy(tmp_path / "policy")(*inputs)
        alone = PeftModel.from_pretrained(base, tmp_path / "policy_adapter")(*inputs)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
    names = policies.load_policy(TINY).state_dict().keys()
    assert adapters.whole_state(policy).keys() == names


# The registry


class Third:
    """What a third policy needs to be loaded: a class with `from_pretrained`."""

    half_on_gpu, norm_stats = True, STATS

    @classmethod
    def from_pretrained(cls, folder, dtype, device):
        third = cls()
        third.asked = folder, dtype, device
        return third


def test_a_third_policy_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "third"}')
    with pytest.raises(ValueError, match="^'third' is no policy here; there are openvla"):
        policies.load_policy(tmp_path)
    monkeypatch.setitem(robots.POLICIES, "third", f"{__name__}:Third")
    loaded = policies.load_policy(tmp_path, device="cpu")
    assert type(loaded) is Third and loaded.asked == (tmp_path, torch.float32, "cpu")
    assert robots.policy_class("third") is Third


def test_the_dtype_of_evaluation_is_the_policy_s(tmp_path, monkeypatch):
    """bf16 on a GPU for who is published so; TinyVLA in fp32 everywhere."""
    monkeypatch.setitem(robots.POLICIES, "third", f"{__name__}:Third")
    (tmp_path / "config.json").write_text('{"model_type": "third"}')
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, dtype in (("cuda:0", torch.bfloat16), ("cpu", torch.float32)):
        assert policies.load_policy(tmp_path, None, device).asked[1] == dtype
    monkeypatch.setattr(Third, "half_on_gpu", False)
    assert policies.load_policy(tmp_path, None, "cuda:0").asked[1] == torch.float32
    assert policies.load_policy(TINY, None, "cpu").head.weight.dtype == torch.float32
    assert [vla.OpenVLA.half_on_gpu, TinyVLA.half_on_gpu] == [True, False]


@pytest.mark.parametrize("kind", [None, [], {}, 3, "OPENVLA"])
def test_an_unknown_model_type_is_one_line(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match="is no policy here; there are openvla, tiny_vla$"):
        policies.load_policy(tmp_path)


def test_both_policies_have_what_a_policy_must_have():
    for name, path in (("tiny_vla", TINY), ("openvla", CHECKPOINT)):
        policy = policies.load_policy(path)
        assert robots.policy_class(name) is type(policy) and policy.model_type == name
        assert type(policy).described(path).config == policy.config
        images = np.zeros((2, policy.camera, policy.camera, 3), np.uint8)
        frames = policy.frames(images)
        assert frames.dtype == np.uint8 and frames.shape[:2] == (2, 1)
        assert policy.pixel_values(frames).is_floating_point() and policy.files is not None
        key = next(iter(policy.norm_stats))
        assert policy.encode(policy.decode(np.zeros((2, 56), int), key), key).shape == (2, 8, 7)


def test_suites_by_name():
    assert find_suite("tabletop").instructions == TASKS
    assert find_suite("tabletop", (2, 0)).tasks == (2, 0)
    for name in ("moon", "", "tabletop_x", "Tabletop"):
        with pytest.raises(ValueError, match="suite") as caught:
            find_suite(name)
        assert "\n" not in str(caught.value)
