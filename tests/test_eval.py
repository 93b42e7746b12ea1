"""eval.py against scipy, hand-made numbers, and a policy whose outcome on every initial state is known beforehand."""
import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from robots import tabletop as envs
import eval as evaluation
from robots import policy as policies
from robots import rollouts
from robots import openvla as vla
import world_model
from tests.conftest import STATS
from robots.rollouts import Start
from robots.tiny_vla import TinyVLA

ROOT = Path(__file__).parents[1]
KEY = "tabletop"


# Intervals and tables

def test_wilson():
    assert evaluation.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)        # a textbook value
    assert evaluation.wilson(0, 10) == pytest.approx((0, 0.2775), abs=5e-5)
    for n in (1, 7, 50, 200):
        for successes in range(n + 1):
            exact = binomtest(successes, n).proportion_ci(method="wilson")
            assert evaluation.wilson(successes, n, z=1.959963984540054) == pytest.approx(tuple(exact), abs=1e-12)
            assert evaluation.wilson(successes, n) == pytest.approx(tuple(exact), abs=2e-5)
    for successes, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"^{successes} successes of {n}: need"):
            evaluation.wilson(successes, n)


def result(rates: list[float]) -> dict:
    tasks = {text: {"success": r, "interval": (r / 2, (1 + r) / 2)} for text, r in zip(envs.TASKS, rates)}
    return {"tasks": tasks, "success": float(np.mean(rates)), "interval": (0.011, 0.987)}


def test_table():
    lines = evaluation.table({"before": result([0.1, 0.25, 0.5, 1.0]), "after 200 steps": result([0.9, 1.0, 0.0, 0.62])})
    lines = lines.split("\n")
    assert len({len(line) for line in lines}) == 1 and len(lines) == 6          # aligned
    assert lines[0].split("  ")[-1].strip() == "after 200 steps" and "before" in lines[0]
    cells = [[float(x) for x in re.findall(r"([\d.]+)%", line)] for line in lines[1:]]
    assert cells == [[10, 5, 55, 90, 45, 95], [25, 12.5, 62.5, 100, 50, 100], [50, 25, 75, 0, 0, 50], [100, 50, 100, 62, 31, 81],
                     [46.2, 1.1, 98.7, 63.0, 1.1, 98.7]]
    assert [line.split("  ")[0].strip() for line in lines[1:]] == [*envs.TASKS, "all tasks"]


# A policy with a known outcome on every initial state

class Known:
    """Solves the initial states in `solves` and stands still on all others. It knows every image it will see by heart: the
    expert was followed beforehand, through the same 256 bins, on a table alone in this process."""
    norm_stats, config = STATS, {"size": 64}
    decode, encode = TinyVLA.decode, TinyVLA.encode

    def __init__(self, solves: list[Start]):
        self.answers, self.steps = {}, {}
        env, still = envs.Tabletop(), [0, 0, 0, 0, 0, 0, -1.0]
        self.still = self.encode(vla.from_env_actions(np.array([still] * 8)), KEY).flatten()
        for start in solves:
            image, ended = env.reset(options=vars(start))[0]["image"], False
            expert = envs.Expert(env)
            while not ended:
                chunk = []
                for _ in range(8):
                    bins = self.encode(vla.from_env_actions(expert()), KEY)                             # (7,)
                    chunk.append(bins)
                    ended = ended or env.advance(vla.to_env_actions(self.decode(bins[None], KEY))[0, 0])
                self.answers[image.tobytes(), env.instruction] = torch.cat(chunk)
                image = env.render()
            assert env.success
            self.steps[start] = env.steps

    def prompt_ids(self, instructions):
        return (instructions,)

    def pixel_values(self, frames):
        assert frames.dtype == np.uint8 and frames.shape[1:] == (1, 64, 64, 3)
        return frames

    def __call__(self, instructions, frames):
        bins = torch.stack([self.answers.get((f.tobytes(), i), self.still) for f, i in zip(frames, instructions)])
        return torch.nn.functional.one_hot(bins, 256).float() * 7 - 3           # (B, 56, 256): the greedy choice is clear


SOLVES = {"train": [Start(0, 0), Start(0, 1), Start(0, 2), Start(2, 1)],        # task 0: all three, 1: none, 2: one, 3: none
          "heldout": [Start(1, 0, "heldout"), Start(1, 2, "heldout"), Start(3, 1, "heldout")]}


@pytest.fixture(scope="module")
def known() -> Known:
    return Known(SOLVES["train"] + SOLVES["heldout"])


@pytest.fixture(scope="module")
def workers():
    workers = rollouts.Workers(2, 7)
    yield workers
    workers.close()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_evaluate_vla_counts(known, workers, split):
    found = evaluation.evaluate_vla(known, workers, split, KEY, states=3)
    solved = {(s.task, s.index): known.steps[s] for s in SOLVES[split]}
    assert found["split"] == split and found["episodes"] == 12 and found["success"] == len(solved) / 12
    assert found["interval"] == evaluation.wilson(len(solved), 12) and list(found["tasks"]) == list(envs.TASKS)
    for task, row in enumerate(found["tasks"].values()):
        wins = [i for i in range(3) if (task, i) in solved]
        assert row["successes"] == len(wins) and row["episodes"] == 3 and row["success"] == len(wins) / 3
        assert row["failed"] == [i for i in range(3) if i not in wins] and row["interval"] == evaluation.wilson(len(wins), 3)
        assert row["steps"] == pytest.approx(np.mean([solved.get((task, i), envs.HORIZON) for i in range(3)]))
    json.dumps(found)


def test_evaluation_goes_on(known, workers, tmp_path, monkeypatch):
    """Cut off in the middle of writing its eighth line, then again: what is finished is not played again, and the result is the same."""
    whole = evaluation.evaluate_vla(known, workers, "train", KEY, states=3)
    log, play, played = tmp_path / "train.jsonl", rollouts.play, []
    monkeypatch.setattr(rollouts, "play", lambda act, workers, starts, *more: played.append(starts) or play(act, workers, starts, *more))
    evaluation.begin_log(log, {"a": 1})
    assert evaluation.evaluate_vla(known, workers, "train", KEY, 3, None, tmp_path / "gifs", log) == whole
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 13 and sorted(p.name for p in (tmp_path / "gifs").iterdir()) == [
        "task0-success.gif", "task1-failure.gif", "task2-failure.gif", "task2-success.gif", "task3-failure.gif"]
    log.write_text("".join(lines[:8]) + lines[8][:20])
    evaluation.begin_log(log, {"a": 1})
    assert evaluation.evaluate_vla(known, workers, "train", KEY, 3, None, None, log) == whole
    log.write_text(log.read_text() + "".join(lines[1:]))        # two runs of the same command wrote it: an episode counts once
    assert evaluation.evaluate_vla(known, workers, "train", KEY, 3, None, None, log) == whole and played.pop() == []
    done = {(row["task"], row["index"]) for row in map(json.loads, lines[1:8])}
    assert {(s.task, s.index) for s in played[1]} == {(t, i) for t in range(4) for i in range(3)} - done
    assert log.read_text().splitlines(keepends=True)[:8] == lines[:8] and not list(tmp_path.rglob("*.partial"))
    fewer = evaluation.evaluate_vla(known, workers, "train", KEY, 2, rollouts.tabletop((0, 2)), None, log)     # what else is in the log does not count
    assert fewer["episodes"] == 4 and fewer["tasks"].keys() == {envs.TASKS[0], envs.TASKS[2]} and len(played[2]) == 0
    with Image.open(tmp_path / "gifs" / "task1-failure.gif") as gif:                # every frame that the policy saw, and the frame
        assert gif.size == (64, 64)
        edge = np.asarray([(gif.seek(gif.n_frames - 1), gif.convert("RGB"))[1]])[0, 0].mean(0)
        assert edge[0] > 2 * edge[1]


def test_a_log_belongs_to_its_settings(tmp_path, checkpoint):
    log, settings = tmp_path / "new" / "a.jsonl", {"checkpoint": "x", "horizon": 8}
    evaluation.begin_log(log, settings)
    assert log.read_text() == json.dumps(settings) + "\n"
    with pytest.raises(ValueError, match="a.jsonl was begun with horizon 8, not 9; repeat that, or choose another --out"):
        evaluation.begin_log(log, settings | {"horizon": 9})
    for torn in ("", json.dumps(settings)[:9]):                 # killed before the first line was whole
        log.write_text(torn)
        evaluation.begin_log(log, settings)
        assert log.read_text() == json.dumps(settings) + "\n"
    log.write_text("oops\n")
    with pytest.raises(ValueError, match="a.jsonl does not begin with an evaluation's settings; delete it"):
        evaluation.begin_log(log, settings)
    policy = policies.load_policy(checkpoint)                        # other weights are another policy, wherever they lie
    first = evaluation.fingerprint(policy)
    assert first == evaluation.fingerprint(policies.load_policy(checkpoint))
    with torch.no_grad():
        policy.head.weight[-20:] += 1                                # far into a tensor
    changed, policy.config["crop"] = evaluation.fingerprint(policy), (0, 0, 32)
    cropped, policy.norm_stats = evaluation.fingerprint(policy), {KEY: {"action": STATS[KEY]["action"] | {"q99": [9.0] * 7}}}
    assert len({first, changed, cropped, evaluation.fingerprint(policy)}) == 4


def test_gifs_of_labelled_suites(known, workers, tmp_path):
    """LIBERO-Plus has thousands of tasks, each tried once: a GIF for each outcome of a label."""
    suite = replace(rollouts.tabletop(), labels=("one", "one", "two b", "two b"))
    found = evaluation.evaluate_vla(known, workers, "train", KEY, 3, suite, tmp_path)
    assert [(name, row["episodes"]) for name, row in found["tasks"].items()] == [("one", 6), ("two b", 6)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one-failure.gif", "one-success.gif", "two_b-failure.gif", "two_b-success.gif"]


def test_other_pixels_are_noted(capsys):
    policy = SimpleNamespace(norm_stats={"a": {"fast_sim": True}, "b": {}})
    for key, fast in (("a", True), ("b", True), ("b", False)):
        evaluation.note_training(policy, key, fast, ["train"])
    assert capsys.readouterr().err == ""
    evaluation.note_training(policy, "a", False, ["heldout"])
    assert "fine-tuned with fast pixels" in capsys.readouterr().err
    policy.norm_stats["b"]["split"] = "all"
    evaluation.note_training(policy, "b", True, ["all"])
    assert capsys.readouterr().err == ""
    evaluation.note_training(policy, "b", True, ["heldout"])
    assert "trained on all 50 initial states; none of them is held out" in capsys.readouterr().err


def test_the_small_policy_is_evaluated_in_fp32(monkeypatch, checkpoint):
    """On a GPU too, as it is trained: rounding to bf16 changes the outcome of an episode in five. OpenVLA in bf16, as published."""
    monkeypatch.setattr(policies, "load_policy", lambda path, dtype, device: (dtype, device))
    openvla = str(ROOT / "tests" / "fixtures" / "openvla_tiny" / "checkpoint")
    assert [evaluation.load(str(path), "cuda") for path in (checkpoint, openvla)] == [(torch.float32, "cuda"), (torch.bfloat16, "cuda")]
    assert evaluation.load(openvla, "cpu") == (torch.float32, "cpu")


def test_videos_are_what_the_world_model_reads(known, workers, tmp_path):
    played: list[rollouts.Episode] = []
    result = evaluation.evaluate_vla(known, workers, "train", KEY, states=2, videos=played)
    evaluation.save_videos(played, tmp_path / "videos.npz")
    videos, success, task = world_model.read_rollouts(str(tmp_path / "videos.npz"))
    assert len(videos) == 8 and success.sum() == sum(row["successes"] for row in result["tasks"].values()) and sorted(task) == [0, 0, 1, 1, 2, 2, 3, 3]
    for video, episode, solved in zip(videos, played, success):
        assert len(video) == -(-episode.steps // envs.CHUNK) + 1 and solved == episode.success
        env = envs.Tabletop()
        np.testing.assert_array_equal(video[0], env.reset(options={"task": episode.start.task, "index": episode.start.index})[0]["image"])


def test_film_of_an_openvla(tmp_path, monkeypatch):
    """Its frames are rendered at 256 pixels."""
    policy = policies.load_policy(ROOT / "tests" / "fixtures" / "openvla_tiny" / "checkpoint")
    policy.norm_stats, prompt = STATS, torch.tensor([[vla.BOS, 5, vla.SPACE]])
    monkeypatch.setattr(policy, "prompt_ids", lambda texts: (prompt, torch.ones_like(prompt)))
    evaluation.film(policy, [Start(0, 0)], KEY, tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.size == (128, 128)


def test_film(known, tmp_path):
    """A solved and an unsolved state: as many frames as every second step, then six with a green or red border."""
    good, bad = Start(0, 1), Start(1, 0)
    evaluation.film(known, [good, bad], KEY, tmp_path / "x.gif", size=48)
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.size == (48, 48)
        frames, times = [], []
        for k in range(gif.n_frames):                       # equal frames are merged, with the sum of their times
            gif.seek(k)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
            times.append(gif.info["duration"])
    steps = known.steps[good]
    assert sum(times) == 100 * ((steps + 1) // 2 + 6 + envs.HORIZON // 2 + 6)
    edges = [np.concatenate([f[:4].reshape(-1, 3), f[-4:].reshape(-1, 3), f[:, :4].reshape(-1, 3), f[:, -4:].reshape(-1, 3)])
             for f in frames]
    framed = [k for k, e in enumerate(edges) if e.std(0).max() < 3]             # one colour all around
    assert framed[-1] == len(frames) - 1 and framed[0] < framed[-1]
    first, last = edges[framed[0]].mean(0), edges[framed[-1]].mean(0)
    assert first[1] > 2 * first[0] and last[0] > 2 * last[1]


# The paper's table

def test_paper_table():
    def of(rate, episodes=500):
        return {"split": "all", "protocol": "horizon 512", **evaluation.rate(round(episodes * rate), episodes)}
    lines = evaluation.paper_table({"libero_object": of(0.5), "libero_10": of(0.172)}).split("\n")
    table, how = lines[:-2], lines[-2:]
    assert table[0].split()[-5:] == ["spatial", "object", "goal", "10", "mean"] and len({len(line) for line in table}) == 1
    assert table[-1].split() == ["ours", "-", "50.0", "-", "17.2", "-"]
    assert how[0] == "  libero_object: 500 of 500 episodes, 95% interval 45.6% to 54.4%; initial states: all; horizon 512"
    for line in table[1:-1]:                                # the papers' means are the means of their four suites
        numbers = [float(x) for x in line.split()[-5:]]
        assert np.mean(numbers[:4]) == pytest.approx(numbers[4], abs=0.1), line
    four = dict(zip(evaluation.libero_files.SUITES, map(of, (0.1, 0.2, 0.3, 0.6))))
    assert evaluation.paper_table(four).split("\n")[-5].split()[-5:] == ["10.0", "20.0", "30.0", "60.0", "30.0"]
    few = evaluation.paper_table({"libero_10": of(1.0, 3)}).split("\n")
    assert few[-2].startswith("ours, parts of the suites ") and few[-1].startswith("  libero_10: 3 of 500 episodes, 95% interval 43.8% to 100.0%")


# Learning curves

def test_read_metrics(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "heldout": 0.5}\n{"step": 1, "success": null}\n')
    assert evaluation.read_metrics(file) == [{"step": 0, "heldout": 0.5}, {"step": 1, "success": None}]
    file.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "succ\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl line 3 is not JSON .*delete that line"):
        evaluation.read_metrics(file)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        evaluation.read_metrics("nowhere")


def test_draw_curves(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    rng = np.random.default_rng(0)
    seeds = []
    for n in (12, 12, 9):                                   # the third run is not finished
        rows = [{"step": 0, "heldout": rng.random()}]
        rows += [{"step": t, "success": rng.random()} | ({"heldout": rng.random()} if t % 4 == 0 else {})
                 for t in range(1, n + 1)]
        seeds.append(rows)
    seeds[0][5]["success"] = None                           # JSON's NaN
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    evaluation.draw_curves({"srpo": seeds, "binary": seeds[:1], "empty": [[{"step": 0}]]}, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and image.width > 800
    (figure,) = drawn
    heldout, success = figure.axes
    line, alone = heldout.lines[:2]
    assert line.get_xdata().tolist() == [0, 4, 8] and alone.get_xdata().tolist() == [0, 4, 8, 12]
    np.testing.assert_allclose(line.get_ydata(), [np.mean([rows[t]["heldout"] for rows in seeds]) for t in (0, 4, 8)])
    steps = [t for t in range(1, 10) if t != 5]
    assert success.lines[0].get_xdata().tolist() == steps
    smooth = []
    for k in range(len(steps)):                             # mean of the five steps around, fewer at the ends
        near = steps[max(k - 2, 0):k + 3]
        smooth.append(np.mean([rows[t]["success"] for rows in seeds for t in near]))
    np.testing.assert_allclose(success.lines[0].get_ydata(), smooth)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["srpo (3 seeds)", "binary (1 seed)"]
    monkeypatch.undo()
    plt.close(figure)


# The command line

def command(monkeypatch, *argv):
    """`python eval.py ...` in this process -> the message it exits with; None if all went well."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    try:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "policy"
    torch.manual_seed(0)
    TinyVLA(STATS, channels=(4, 4, 4), width=16, basis=6).save_pretrained(folder)
    return folder


def test_vla_command(checkpoint, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "vla", "--checkpoint", checkpoint, "--states", "2", "--workers", "1",
                   "--out", tmp_path / "out") is None
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(found) == ["train", "heldout"] and all(r["episodes"] == 8 for r in found.values())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["heldout.gif", "result.json", "train.gif"]
    printed = capsys.readouterr().out
    assert all(text in printed for text in (*envs.TASKS, "all tasks", "train", "heldout", "result.json"))


def test_all_of_it_is_checked_before_the_first_episode(checkpoint, tmp_path, monkeypatch, capsys):
    """The last suite's fault is not found after hours of the first; and two checkpoints beside each other do not share a folder."""
    measured = []
    monkeypatch.setattr(evaluation, "measure_suite", lambda policy, name, given, out, args: measured.append((name, out.name)) or {"train": {}})

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["eval.py", "vla", *map(str, argv)])
        evaluation.main()
    with pytest.raises(ValueError, match="unknown suite 'libero_objcet'"):
        run("--checkpoint", checkpoint, "--suite", "tabletop", "libero_objcet")
    with pytest.raises(ValueError, match="statistics for tabletop, not for libero_object"):
        monkeypatch.setattr(evaluation.libero_envs, "make_suite", lambda *_, **__: rollouts.tabletop())
        run("--checkpoint", checkpoint, "--suite", "tabletop", "libero_object")
    assert measured == []
    shutil.copytree(checkpoint, tmp_path / "weak")
    for path in (checkpoint, tmp_path / "weak"):
        run("--checkpoint", path)
    assert measured == [("tabletop", "eval"), ("tabletop", "eval-weak")]
    monkeypatch.setattr(evaluation, "suite_and_key", lambda *_: None)
    measured.clear()
    monkeypatch.setattr(evaluation, "rate", lambda *_: {})
    monkeypatch.setattr(evaluation, "table", lambda *_: "")
    monkeypatch.setattr(evaluation, "measure_suite", lambda policy, name, *_: measured.append(name) or {"all": {"successes": 1, "episodes": 2}})
    run("--checkpoint", checkpoint, "--suite", "libero_plus::libero_goal")
    assert measured == [f"libero_plus:{dimension}:libero_goal" for dimension in evaluation.libero_files.DIMENSIONS]
    capsys.readouterr()


def test_seeds_table_by_hand():
    """Three seeds .9, .8, .79: mean .83, sd .0608, t(0.975, 2) = 4.303, so +- .151; 80% is first reached at steps 10, 20, never. A pause of a minute
    in one of twelve steps moves no median; the ten steps at either end leave out two of twelve."""
    trained = [{"step": i + 1, "success": (i + 1) / 20, "seconds_rollout": 60.0 if i == 5 else 1.0 + i % 2, "seconds_reward": 2.0 - i % 2, "seconds_update": 3.0}
               for i in range(12)]
    runs = {"srpo": [[{"step": 0, "heldout": 0.5}, {"step": 10, "heldout": a}, {"step": 20, "heldout": b}] + trained * (b == 0.9)
                     for a, b in ((0.8, 0.9), (0.7, 0.8), (0.1, 0.79))]}
    lines = evaluation.seeds_table(runs, ["heldout"]).splitlines()
    assert "83.0% +-  15.1%" in lines[0] and "90.0%, 80.0%, 79.0%" in lines[0]
    assert lines[1].strip() == "last three 73.3%, 66.7%, 46.3%; steps to 80%: 10, 20, never"
    assert lines[2].strip() == "sampled 28% -> 38%; median seconds of a step 6.00: rollout 1.50, reward 1.50, update 3.00" and len(lines) == 3
    lines = evaluation.seeds_table({"base": [[{"step": 0, "heldout": 0.5}]]}, ["heldout"]).splitlines()
    assert len(lines) == 2 and lines[0].split() == ["base", "heldout", "50.0%", "one", "seed"]


def test_curves_command(tmp_path, monkeypatch):
    for name in ("srpo-0", "srpo-1", "binary-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 0, "heldout": 0.5, "name": name}) + "\n")
    seen = {}
    monkeypatch.setattr(evaluation, "draw_curves", lambda runs, out: seen.update(runs, out=out))
    monkeypatch.setattr(sys, "argv", ["eval.py", "curves", *sorted(map(str, tmp_path.glob("*/metrics.jsonl"))), "--out", "x.png"])
    evaluation.main()
    assert {k: [rows[0]["name"] for rows in v] for k, v in seen.items() if k != "out"} == {
        "binary": ["binary-0"], "srpo": ["srpo-0", "srpo-1"]} and seen["out"] == "x.png"


def test_bad_input_is_one_clear_line(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "runs-0" / "metrics.jsonl"
    bad.parent.mkdir()
    bad.write_text('{"step": 0}\noops\n{"step": 2}\n')
    odd, plain = (tmp_path / name / "metrics.jsonl" for name in ("odd-0", "plain-0"))
    for path, content in ((odd, "[1]"), (plain, '{"step": 0}')):
        path.parent.mkdir()
        path.write_text(content + "\n")
    shutil.copytree(checkpoint, tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    before = sorted(tmp_path.rglob("*"))
    for argv, words in [
            (("vla", "--checkpoint", tmp_path / "missing"), f"{tmp_path}/missing is neither a checkpoint folder nor a hub id"),
            (("vla", "--checkpoint", tmp_path / "half"), "half/model.safetensors is truncated"),
            (("vla", "--checkpoint", checkpoint, "--states", "0"), "--states must be 1..50, got 0"),
            (("vla", "--checkpoint", checkpoint, "--states", "51"), "--states must be 1..50, got 51"),
            (("vla", "--checkpoint", checkpoint, "--out", bad), str(bad)),
            (("vla", "--checkpoint", checkpoint, "--split", "all"), "--split all: tabletop has train, heldout"),
            (("vla", "--checkpoint", checkpoint, "--suite", "libero_objects"), "unknown suite 'libero_objects'"),
            (("vla", "--checkpoint", checkpoint, "--tasks", "4"), "unknown task 4; there are 0..3"),
            (("vla", "--checkpoint", checkpoint, "--key", "bridge"), "bridge"),
            (("vla", "--checkpoint", checkpoint, "--horizon", "-5"), "--horizon must be at least 0, got -5"),
            (("vla", "--checkpoint", checkpoint, "--suite", "libero_object", "libero_plus:light"), "two packages of one name; measure them in two runs"),
            (("paper", "--checkpoint", "libero_goals=x"), "--checkpoint libero_goals: write SUITE=CHECKPOINT, with SUITE one of libero_spatial"),
            (("curves", odd), "odd-0/metrics.jsonl line 1 is not a row; delete that line"),
            (("curves", plain), "plain-0/metrics.jsonl has no heldout; give the metrics.jsonl of a run with evaluations, and --kind"),
            (("curves", tmp_path / "none" / "metrics.jsonl"), "none/metrics.jsonl does not exist"),
            (("curves", bad), "runs-0/metrics.jsonl line 2 is not JSON")]:
        message = command(monkeypatch, *argv)               # Python prints it on stderr and exits with 1
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message and words in message
        assert sorted(tmp_path.rglob("*")) == before
