"""robots/evaluate.py with a policy whose outcome on every initial state is known beforehand."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from plumbing.files import Journal
from plumbing.plots import wilson
from robots import evaluate, find_suite
from robots.openvla import from_env_actions, to_env_actions
from robots.suite import Start
from robots.tabletop import CHUNK, HORIZON, TASKS, Expert, Tabletop
from robots.tiny_vla import TinyVLA
from robots.trajectories import find
from tests.conftest import STATS

KEY = "tabletop"


class Known:
    """Solves the initial states in `solves` and stands still on all others. It knows every image it
    will see by heart: the expert was followed beforehand, through the same 256 bins, on a table
    alone in this process."""
    norm_stats, config, camera, files = STATS, {"size": 64}, 64, {}
    decode, encode = TinyVLA.decode, TinyVLA.encode

    def __init__(self, solves: list[Start]):
        self.answers, self.steps = {}, {}
        env, still = Tabletop(), [0, 0, 0, 0, 0, 0, -1.0]
        self.still = self.encode(from_env_actions(np.array([still] * 8)), KEY).flatten()
        for start in solves:
            image, ended = env.reset(options=vars(start))[0]["image"], False
            expert = Expert(env)
            while not ended:
                chunk = []
                for _ in range(8):
                    bins = self.encode(from_env_actions(expert()), KEY)             # (7,)
                    chunk.append(bins)
                    action = to_env_actions(self.decode(bins[None], KEY))[0, 0]
                    ended = ended or env.advance(action)
                self.answers[image.tobytes(), env.instruction] = torch.cat(chunk)
                image = env.render()
            assert env.success
            self.steps[start] = env.steps

    def frames(self, images):
        return images[:, None]

    def prompt_ids(self, instructions):
        return (instructions,)

    def pixel_values(self, frames):
        assert frames.dtype == np.uint8 and frames.shape[1:] == (1, 64, 64, 3)
        return frames

    def __call__(self, instructions, frames):
        bins = torch.stack([self.answers.get((f.tobytes(), i), self.still)
                            for f, i in zip(frames, instructions)])
        # (B, 56, 256): the greedy choice is clear
        return torch.nn.functional.one_hot(bins, 256).float() * 7 - 3


# Of the training states task 0: all three, 1: none, 2: one, 3: none
SOLVES = {"train": [Start(0, 0), Start(0, 1), Start(0, 2), Start(2, 1)],
          "heldout": [Start(1, 0, "heldout"), Start(1, 2, "heldout"), Start(3, 1, "heldout")]}


@pytest.fixture(scope="module")
def known() -> Known:
    return Known(SOLVES["train"] + SOLVES["heldout"])


@pytest.fixture(scope="module")
def suite():
    return find_suite("tabletop")


@pytest.fixture(scope="module")
def workers(suite):
    workers = suite.workers(2, 64, 7)
    yield workers
    workers.close()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_counts(known, suite, workers, split):
    found = evaluate.evaluate(known, workers, suite, split, KEY, states=3)
    solved = {(s.task, s.index): known.steps[s] for s in SOLVES[split]}
    assert found["split"] == split and found["episodes"] == 12
    assert found["success"] == len(solved) / 12 and found["interval"] == wilson(len(solved), 12)
    assert list(found["tasks"]) == list(TASKS["tabletop"])
    for task, row in enumerate(found["tasks"].values()):
        wins = [i for i in range(3) if (task, i) in solved]
        assert row["successes"] == len(wins) and row["episodes"] == 3
        assert row["success"] == len(wins) / 3 and row["interval"] == wilson(len(wins), 3)
        assert row["failed"] == [i for i in range(3) if i not in wins]
        steps = [solved.get((task, i), HORIZON["tabletop"]) for i in range(3)]
        assert row["steps"] == pytest.approx(np.mean(steps))
    json.dumps(found)


def test_an_interrupted_evaluation_goes_on(known, suite, workers, tmp_path, monkeypatch):
    """Cut off in the middle of writing its eighth line, then again: what is finished is not played
    again, and the result is the same."""
    path, play, played = tmp_path / "train.jsonl", evaluate.play, []

    def again(chosen=suite, states=3, **more):
        return evaluate.evaluate(known, workers, chosen, "train", KEY, states=states,
                                 journal=Journal(path, {"a": 1}, evaluate.is_row), **more)

    def recording(act, workers, starts, *a, **k):
        played.append(starts)
        return play(act, workers, starts, *a, **k)
    monkeypatch.setattr(evaluate, "play", recording)
    whole = evaluate.evaluate(known, workers, suite, "train", KEY, states=3)
    assert again(gifs=tmp_path / "gifs") == whole
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 13 and sorted(p.name for p in (tmp_path / "gifs").iterdir()) == [
        "task0-success.gif", "task1-failure.gif", "task2-failure.gif", "task2-success.gif",
        "task3-failure.gif"]
    path.write_text("".join(lines[:8]) + lines[8][:20])
    assert again() == whole
    done = {(row["task"], row["index"]) for row in map(json.loads, lines[1:8])}
    missing = {(t, i) for t in range(4) for i in range(3)} - done
    assert {(s.task, s.index) for s in played[-1]} == missing
    assert path.read_text().splitlines(keepends=True)[:8] == lines[:8]
    path.write_text(path.read_text() + "".join(lines[1:]))  # by two runs: an episode counts once
    assert again() == whole and played[-1] == []
    fewer = again(find_suite("tabletop", (0, 2)), 2)        # what else is there does not count
    assert fewer["episodes"] == 4
    assert fewer["tasks"].keys() == {TASKS["tabletop"][0], TASKS["tabletop"][2]}
    assert played[-1] == []
    rows = [json.loads(line) for line in lines[1:]]
    damaged = [{"task": 0}, rows[1] | {"success": "yes"}, rows[2] | {"index": None}, *rows[3:]]
    path.write_text(lines[0] + "".join(json.dumps(row) + "\n" for row in damaged))
    assert again() == whole                                 # a damaged row is played again
    assert ({(s.task, s.index) for s in played[-1]}
            == {(row["task"], row["index"]) for row in rows[:3]})
    with Image.open(tmp_path / "gifs" / "task1-failure.gif") as gif:
        assert gif.size == (64, 64)
        gif.seek(gif.n_frames - 1)
        edge = np.asarray(gif.convert("RGB"))[0].mean(0)
        assert edge[0] > 2 * edge[1]                        # red


def test_a_fingerprint_is_of_all_that_decides(tmp_path):
    torch.manual_seed(0)
    policy = TinyVLA(STATS, channels=(4, 4, 4), width=16, basis=6)
    first = evaluate.fingerprint(policy)
    assert first == evaluate.fingerprint(policy)
    with torch.no_grad():
        policy.head.weight[-20:] += 1                       # far into a tensor
    changed, policy.config["crop"] = evaluate.fingerprint(policy), (0, 0, 32)
    cropped = evaluate.fingerprint(policy)
    policy.norm_stats = {KEY: {"action": STATS[KEY]["action"] | {"q99": [9.0] * 7}}}
    assert len({first, changed, cropped, evaluate.fingerprint(policy)}) == 4


def test_gifs_of_labelled_suites(known, suite, workers, tmp_path):
    """LIBERO-Plus has thousands of tasks, each tried once: a GIF for each outcome of a label."""
    labelled = replace(suite, labels=("one", "one", "two b", "two b"))
    found = evaluate.evaluate(known, workers, labelled, "train", KEY, states=3, gifs=tmp_path)
    assert {name: row["episodes"] for name, row in found["tasks"].items()} == {"one": 6, "two b": 6}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "one-failure.gif", "one-success.gif", "two_b-failure.gif", "two_b-success.gif"]


def test_other_pixels_and_trained_states_are_noted(capsys):
    policy = SimpleNamespace(norm_stats={"a": {"fast_sim": True}, "b": {}})
    for key, fast in (("a", True), ("b", True), ("b", False)):
        evaluate.note_training(policy, key, fast, ["train"])
    assert capsys.readouterr().err == ""
    evaluate.note_training(policy, "a", False, ["heldout"])
    assert "fine-tuned with fast pixels" in capsys.readouterr().err
    policy.norm_stats["b"]["split"] = "all"
    evaluate.note_training(policy, "b", True, ["all"])
    assert capsys.readouterr().err == ""
    evaluate.note_training(policy, "b", True, ["heldout"])
    assert "trained on all 50 initial states; none of them is held out" in capsys.readouterr().err


def test_what_is_recorded_plays_again(known, suite, workers, tmp_path):
    result = evaluate.evaluate(known, workers, suite, "train", KEY, states=2, record=tmp_path)
    loaders = find(str(tmp_path))[1]
    assert set(loaders) == {
        f"tabletop-train-{task}-{index}.npz" for task in range(4) for index in range(2)}
    env, solved = Tabletop(), 0
    for task, instruction in enumerate(suite.instructions):
        for index in range(2):
            x = loaders[f"tabletop-train-{task}-{index}.npz"]()
            assert x.instruction == instruction and len(x.images) == -(-len(x.actions) // CHUNK) + 1
            first = env.reset(options={"task": task, "index": index})[0]["image"]
            np.testing.assert_array_equal(x.images[0], first)
            ended = [env.advance(action) for action in x.actions]
            assert ended[-1] and not any(ended[:-1]) and env.success == x.success
            np.testing.assert_array_equal(x.images[-1], env.render())
            solved += x.success
    assert solved == sum(row["successes"] for row in result["tasks"].values()) > 0


def test_film(known, suite, tmp_path):
    """A solved and an unsolved state: as many frames as every second step, then six with a green or
    red border."""
    good, bad = Start(0, 1), Start(1, 0)
    evaluate.film(known, suite, [good, bad], KEY, tmp_path / "x.gif", size=48)
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.size == (48, 48)
        frames, times = [], []
        for k in range(gif.n_frames):           # equal frames are merged, their times summed
            gif.seek(k)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
            times.append(gif.info["duration"])
    steps = known.steps[good]
    assert sum(times) == 100 * ((steps + 1) // 2 + 6 + HORIZON["tabletop"] // 2 + 6)
    edges = [np.concatenate([part.reshape(-1, 3) for part in (f[:4], f[-4:], f[:, :4], f[:, -4:])])
             for f in frames]
    framed = [k for k, e in enumerate(edges) if e.std(0).max() < 3]         # one colour all around
    assert framed[-1] == len(frames) - 1 and framed[0] < framed[-1]
    first, last = edges[framed[0]].mean(0), edges[framed[-1]].mean(0)
    assert first[1] > 2 * first[0] and last[0] > 2 * last[1]


def test_where_an_evaluation_goes(tmp_path, monkeypatch):
    for name, folder in (("policy", "eval"), ("weak", "eval-weak")):
        (tmp_path / name).mkdir()
        assert evaluate.beside(str(tmp_path / name)) == tmp_path / folder
    assert str(evaluate.beside("owner/name")) == "out/eval/name"
    (tmp_path / "weak/inner").mkdir()
    for inside, checkpoint in (("weak", "."), ("weak/inner", "..")):
        monkeypatch.chdir(tmp_path / inside)
        assert evaluate.beside(checkpoint) == tmp_path / "eval-weak"
    monkeypatch.chdir(tmp_path)
    assert str(evaluate.beside("weak")) == "eval-weak"
