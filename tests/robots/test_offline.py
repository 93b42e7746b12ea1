"""robots/offline.py: progress and weights against naive loops, gradients against torch's own
cross-entropy, whole runs on files, resumed ones too; and data that is no use, in one line."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import vla_srpo
from plumbing import update as updates
from plumbing.optimizer import make_optimizer
from plumbing.run import Run
from robots import evaluate, find_suite, offline
from robots.openvla import to_env_actions
from robots.tabletop import TASKS
from robots.trajectories import Trajectory, save
from tests.conftest import lines
from tests.test_vla_srpo import metrics, settings, tiny_policy
from world_model import WorldModel


class Grey:
    """A world model whose latent is the mean grey level of the last frame."""
    model, config, batch_size, pool = torch.nn.Linear(1, 1), "grey", 2, "clip"
    progress = WorldModel.progress
    paper_progress = WorldModel.paper_progress
    distances = WorldModel.distances

    def encode(self, videos):
        return torch.tensor([[float(video[-1].mean())] for video in videos])

    def seen(self, video):
        return video


def greys(levels, task: int = 0, success: bool = True, steps: int = 0, every: int = 8,
          seed: int = 0) -> Trajectory:
    """A video of evenly grey frames; random actions."""
    images = np.stack([np.full((64, 64, 3), level, np.uint8) for level in levels])
    n, rng = steps or (len(levels) - 1) * every, np.random.default_rng(seed)
    actions = np.concatenate([rng.uniform(-0.4, 0.4, (n, 6)),
                              rng.choice([-1.0, 1.0], (n, 1))], 1)
    return Trajectory(TASKS["tabletop"][task], success, images, actions, every)


def loaders(*trajectories):
    return {f"{i}": (lambda x=x: x) for i, x in enumerate(trajectories)}


def read(*trajectories):
    return offline.read(loaders(*trajectories), tiny_policy(), "tabletop", find_suite("tabletop"))


# Progress and weights

def test_progress_by_hand(tmp_path):
    """Ours: of each success against the other one's end, of the failure against their mean."""
    some = (greys([0, 50, 100]), greys([0, 60, 80]), greys([0, 30, 45], success=False),
            greys([0, 9], task=1, success=False))
    logged, rejected = read(*some)
    known = offline.progress(Grey(), loaders(*some), logged, "ours", tmp_path)
    assert not rejected and set(known) == {"0", "1", "2"}       # task 1 has no success
    np.testing.assert_allclose(known["0"], [0, 50 / 80, 1 - 20 / 80])
    np.testing.assert_allclose(known["1"], [0, 0.6, 0.8])
    np.testing.assert_allclose(known["2"], [0, 30 / 90, 45 / 90])


def test_the_paper_s_windows_on_five_frames_by_hand(tmp_path):
    """Windows end with frames 1 to 4; before the first nothing is gained. A success is compared
    with its own end, a failure with the nearest success; squared, min-max scaled and flipped."""
    some = (greys([0, 10, 40, 70, 100]), greys([0, 20, 30, 60, 80]),
            greys([0, 40, 20, 60, 60], success=False))
    known = offline.progress(Grey(), loaders(*some), read(*some)[0], "paper", tmp_path)
    for name, levels, end in (("0", [10, 40, 70, 100], 100), ("1", [20, 30, 60, 80], 80),
                              ("2", [40, 20, 60, 60], 90)):     # both are one cluster, of centre 90
        d = (np.array(levels) - end) ** 2.0
        r = 1 - (d - d.min()) / (d.max() - d.min())
        np.testing.assert_allclose(known[name], [r[0], *r], atol=1e-6)


def test_frames_of_every_step_give_the_progress_at_the_calls(tmp_path):
    fine = greys(list(range(0, 200, 8)), steps=24, every=1)     # 25 frames, calls at 0, 8, 16
    some = (fine, greys([0, 100, 192]))
    known = offline.progress(Grey(), loaders(*some), read(*some)[0], "ours", tmp_path)
    np.testing.assert_allclose(known["0"], np.array([0, 64, 128, 192]) / 192)


def test_progress_is_computed_once(tmp_path, monkeypatch):
    some = (greys([0, 50, 100]), greys([0, 60, 80]), greys([0, 30, 45], success=False))
    logged, _ = read(*some)
    encoder, asked = Grey(), []
    monkeypatch.setattr(Grey, "progress", lambda self, *a: (
        asked.append(1), WorldModel.progress(self, *a))[1])
    first = offline.progress(encoder, loaders(*some), logged, "ours", tmp_path)
    [file] = tmp_path.glob("progress-*.jsonl")
    file.write_text(file.read_text()[:-9])                      # killed while the last was written
    again = offline.progress(encoder, loaders(*some), logged, "ours", tmp_path)
    monkeypatch.setattr(Grey, "encode", pytest.fail)            # all is known: nothing is encoded
    assert again.keys() == offline.progress(encoder, {}, logged, "ours", tmp_path).keys()
    monkeypatch.undo()
    assert len(asked) == 4 and all((first[name] == again[name]).all() for name in first)
    offline.progress(encoder, loaders(*some), logged, "paper", tmp_path)
    assert len(list(tmp_path.glob("progress-*.jsonl"))) == 2    # another question, another file
    other = (greys([0, 70, 100]), *some[1:])                    # other images of the same names
    offline.progress(encoder, loaders(*other), read(*other)[0], "paper", tmp_path)
    assert len(list(tmp_path.glob("progress-*.jsonl"))) == 3


def weigh(logged, curves, **changes):
    return offline.weights(logged, curves, settings(**changes))


@pytest.mark.parametrize("temperature, most", [(1.0, 20.0), (0.3, 5.0)])
def test_weights_equal_a_naive_loop(temperature, most):
    logged = [SimpleNamespace(name=str(i), success=i < 3, bins=np.zeros(n))
              for i, n in enumerate((3, 2, 4, 3, 2))]
    rng = np.random.default_rng(0)
    curves = {x.name: rng.random(len(x.bins) + 1) for x in logged[:4]}      # of one none is known
    found = weigh(logged, curves, weights="progress", awr_temperature=temperature, max_weight=most)
    gains = [r[t] - r[t - 1] for r in curves.values() for t in range(1, len(r))]
    mean = sum(gains) / len(gains)
    std = math.sqrt(sum((d - mean) ** 2 for d in gains) / len(gains))
    naive = [min(math.exp((d - mean) / std / temperature), most) for d in gains]
    np.testing.assert_allclose(np.concatenate(found), [*naive, 1, 1])
    assert max(naive) == most or temperature == 1.0
    found = weigh(logged, {}, weights="outcome", awr_temperature=temperature, max_weight=most)
    for x, w in zip(logged, found, strict=True):
        a = (x.success - 0.6) / math.sqrt(0.24)
        np.testing.assert_allclose(w, min(math.exp(a / temperature), most))
    assert [w.tolist() for w in weigh(logged, {}, weights="successes")] == [
        [1.0] * 3, [1.0] * 2, [1.0] * 4, [0.0] * 3, [0.0] * 2]
    found = weigh(logged, curves, weights="rabc")
    mean = max(mean, 0)
    ramp = [min(max((d - (mean - 2 * std)) / (4 * std + 1e-6), 0), 1) for d in gains]
    naive = [1 if d > 0.01 else 0 if d < 0 else w for d, w in zip(gains, ramp, strict=True)]
    np.testing.assert_allclose(np.concatenate(found), [*naive, 1, 1])


def test_a_reversed_trajectory_has_negative_advantages(tmp_path):
    some = [greys([0, 50 + i, 100]) for i in range(3)] + [greys([100, 50, 0], success=False)]
    logged, _ = read(*some)
    for curves in ("ours", "paper"):
        known = offline.progress(Grey(), loaders(*some), logged, curves, tmp_path / curves)
        found = offline.advantages([np.diff(known[x.name]) for x in logged])
        assert found[3].sum() < 0 < min(a.sum() for a in found[:3])
        if curves == "ours":
            assert (found[3] < 0).all()


# Training

@pytest.fixture
def gradient(monkeypatch, tmp_path):
    """gradient(trajectories, settings) of the first step of `offline.train`, and its row."""
    def of(trajectories, s) -> tuple[dict, dict]:
        caught, policy = [], tiny_policy()

        def catch(optimizer, model, max_norm):
            caught.append({name: p.grad.clone() for name, p in model.named_parameters()})
            return 1.0, True
        monkeypatch.setattr(updates, "clip_and_step", catch)
        monkeypatch.setattr(evaluate, "of_run", lambda *_: {"success": 0.5, "episodes": 2})
        monkeypatch.setattr(offline, "find", lambda *_: (tmp_path, loaders(*trajectories)))
        optimizer = make_optimizer(policy, 1e-3)
        run = Run(s, tmp_path / "run", None, "vla_srpo.py")
        run.keep({}, optimizer)
        encoder = None if s.reward == "binary" else Grey()
        parts = vla_srpo.Parts(find_suite("tabletop"), None, policy, "tabletop", None, None,
                               encoder, optimizer)
        offline.train(run, parts, {"success": 0.5}, offline.prepare(run, parts))
        return caught[0], metrics(run.out)[1]
    return of


def naive(trajectories, weight) -> dict:
    """Gradient of the mean over tokens that ran of weight x cross-entropy."""
    policy, terms = tiny_policy(), []
    for i, x in enumerate(trajectories):
        chunks, executed = x.chunks()
        actions = chunks.copy()
        actions[..., 6] = (1 - actions[..., 6]) / 2
        bins = policy.encode(actions, "tabletop")                               # (K, 8, 7)
        for k, n in enumerate(executed):
            frame = policy.frames(x.images[x.at[k]][None])
            logits = policy(*policy.prompt_ids([x.instruction]), policy.pixel_values(frame))
            some = slice(0, 7 * n)
            terms.append(weight(i, k) * F.cross_entropy(
                logits[0, some], bins[k].flatten()[some], reduction="none"))
    torch.cat(terms).mean().backward()
    return {name: p.grad for name, p in policy.named_parameters()}


def same(found: dict, wanted: dict) -> None:
    size = math.sqrt(sum(float(g.pow(2).sum()) for g in wanted.values()))
    assert size > 1e-3
    for name, g in wanted.items():
        assert (found[name] - g).abs().max() < 2e-5 * size, name


SOME = (greys([0, 50, 100, 120], seed=1), greys([0, 60, 80], seed=2, steps=11),
        greys([0, 30, 45], success=False, seed=3, steps=13))


@pytest.mark.parametrize("micro_batch", [100, 2])
def test_without_advantages_it_is_behaviour_cloning(gradient, micro_batch):
    """Equal gains: every weight is 1, and the gradient that of plain cross-entropy."""
    even = tuple(greys([0, 40, 80], seed=i) for i in range(3))
    for some, weights, reward in ((SOME, "all", "binary"), (even, "progress", "srpo")):
        s = settings(weights=weights, reward=reward, micro_batch=micro_batch)
        found, row = gradient(some, s)
        same(found, naive(some, lambda i, k: 1.0))
        assert row["nll"] == pytest.approx(nll(some), rel=1e-4)


def nll(trajectories) -> float:
    policy, total, count = tiny_policy(), 0.0, 0
    for x in trajectories:
        chunks, executed = x.chunks()
        actions = chunks.copy()
        actions[..., 6] = (1 - actions[..., 6]) / 2
        bins = policy.encode(actions, "tabletop").flatten(1)
        with torch.no_grad():
            logits = policy(*policy.prompt_ids([x.instruction] * len(bins)),
                            policy.pixel_values(policy.frames(x.images[x.at[:-1]])))
        logp = logits.log_softmax(-1).gather(-1, bins[..., None])[..., 0]
        for row, n in zip(logp, executed, strict=True):
            total, count = total - float(row[:7 * n].sum()), count + 7 * int(n)
    return total / count


def test_the_gradient_is_that_of_weighted_cross_entropy(gradient, tmp_path):
    s = settings(weights="progress", reward="srpo", awr_temperature=0.5)
    logged, _ = read(*SOME)
    given = offline.weights(logged, offline.progress(
        Grey(), loaders(*SOME), logged, "ours", tmp_path / "x"), s)
    assert np.ptp(np.concatenate(given)) > 0.5
    same(gradient(SOME, s)[0], naive(SOME, lambda i, k: given[i][k]))


def test_logged_actions_become_the_bins_they_were_sampled_as():
    policy = tiny_policy()
    bins = torch.randint(1, 256, (4, 56))       # 0 and 1 decode to the same number
    bins.view(4, 8, 7)[..., 6] = torch.where(bins.view(4, 8, 7)[..., 6] > 127, 255, 1)
    actions = to_env_actions(policy.decode(bins, "tabletop")).reshape(-1, 7)
    x = Trajectory(TASKS["tabletop"][0], True, np.zeros((5, 64, 64, 3), np.uint8), actions)
    found = read(x)[0][0].bins.view(4, 8, 7)
    assert torch.equal(found[..., :6], bins.view(4, 8, 7)[..., :6])
    again = to_env_actions(policy.decode(found.flatten(1), "tabletop")).reshape(-1, 7)
    np.testing.assert_allclose(again, actions)


# Whole runs

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(8):
        save(folder / f"{i}.npz", greys([0, 50 + i, 100 - i], i % 2, i < 6, seed=i))
    (folder / "broken.npz").write_bytes(b"PK")
    save(folder / "small.npz", Trajectory(TASKS["tabletop"][0], True, np.zeros(
        (2, 32, 32, 3), np.uint8), np.zeros((8, 7))))
    return folder


def go(monkeypatch, data, out, *more) -> int:
    whole = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: whole(*a, **k | {"states": 1}))
    monkeypatch.setattr(evaluate, "film", lambda *_, **__: None)
    return vla_srpo.main(["offline", "--data", str(data), "--steps", "4", "--eval_every", "0",
                          "--save_every", "1", "--minibatch", "8", "--workers", "1", "--threads",
                          "1", "--out", str(out), *map(str, more)])


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--curves", "paper"), ("--world_model", "pixels"),
                                  ("--weights", "rabc"), ("--weights", "successes")])
def test_from_files_to_a_policy(monkeypatch, tmp_path, data, capsys, more):
    assert go(monkeypatch, data, tmp_path / "run", *more) == 0
    out = capsys.readouterr().out
    assert "8 trajectories, 6 successes, 16 chunks; 2 of 10 trajectories cannot be used" in out
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[4]["nll"] < rows[1]["nll"]
    rejected = {row["name"]: row["reason"] for row in lines(tmp_path / "run/rejected.jsonl")}
    assert "cannot be read" in rejected["broken.npz"]
    assert rejected["small.npz"] == "images are 32x32, the policy's camera has 64x64"
    assert (tmp_path / "run/progress.png").exists() == (more[:1] != ("--weights",)
                                                        or more[1] == "rabc")
    assert json.loads((tmp_path / "run/settings.json").read_text())["stage"] == "offline"


@pytest.mark.slow
def test_resume_is_bitwise(monkeypatch, tmp_path, data, capsys):
    assert go(monkeypatch, data, tmp_path / "whole") == 0

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt
    log = Run.log
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", lambda run, *a: (stop(run.step), log(run, *a)))
        assert go(patch, data, tmp_path / "cut") == 130
    assert vla_srpo.main(["--resume", str(tmp_path / "cut")]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    a, b = (load_file(tmp_path / name / "policy/model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("argv, words", [
    (["offline"], "offline needs --data"),
    (["--data", "x"], "--data is for: python vla_srpo.py offline"),
    (["--data", "x", "--references", "4", "--world_model", "oracle"], "--data is for: python"),
    (["--data", "nowhere", "--references", "4"], "--data nowhere: a folder of .npz files"),
    (["online"], "no command 'online'; there are offline"),
    (["offline", "--data", "nowhere"], "--data nowhere: a folder of .npz files"),
    (["offline", "--data", "x", "--world_model", "oracle"], "for rollouts, not for offline"),
    (["offline", "--data", "x", "--awr_temperature", "0"], "--awr_temperature must be positive")])
def test_bad_flags_are_one_line(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "of_run", lambda *_: {"success": 0.5})
    monkeypatch.setattr(evaluate, "film_run", lambda *_: None)
    assert vla_srpo.main([*argv, "--out", str(tmp_path / "run"), "--workers", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error


def test_data_of_no_use_is_told_before_the_evaluation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "of_run", lambda *_: pytest.fail("it was evaluated"))
    monkeypatch.setattr(offline, "find", lambda *_: (tmp_path, loaders(greys([0, 1], task=1))))
    assert vla_srpo.main(["offline", "--data", "x", "--tasks", "0", "--workers", "1",
                          "--weights", "all", "--out", str(tmp_path / "run")]) == 2
    assert "no task that is played" in capsys.readouterr().err


@pytest.mark.parametrize("trajectories, more, words", [
    ([greys([0, 1], success=False)], {"weights": "successes"}, "no chunk has a weight"),
    ([greys([0, 1]), greys([0, 1], task=1)], {"reward": "srpo"}, "no task has two successes"),
    ([Trajectory("fly", True, np.zeros((2, 64, 64, 3), np.uint8), np.zeros((8, 7)))], {},
     "1 of 1 trajectories cannot be used; 1 x no task that is played: 'fly'")])
def test_data_of_no_use_is_one_line(gradient, trajectories, more, words):
    with pytest.raises(ValueError) as error:
        gradient(trajectories, settings(**more))
    assert words in str(error.value) and "\n" not in str(error.value)


