"""eval.py: the paper's table, the command line, and each thing that is wrong in one line. How
policies are played: tests/robots/test_evaluate.py; numbers and curves:
tests/plumbing/test_plots.py."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import robots
from plumbing.plots import rate
from robots import libero_files
from robots.tabletop import TASKS
from robots.tiny_vla import TinyVLA
from tests.conftest import STATS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "policy"
    torch.manual_seed(0)
    TinyVLA(STATS, channels=(4, 4, 4), width=16, basis=6).save_pretrained(folder)
    return folder


def run(*argv) -> int:
    return evaluation.main([str(word) for word in argv])


def test_paper_table():
    def of(share, episodes=500):
        counted = rate(round(episodes * share), episodes)
        return {"split": "all", "protocol": "horizon 512", **counted}

    lines = evaluation.paper_table({"libero_object": of(0.5), "libero_10": of(0.172)}).split("\n")
    table, how = lines[:-2], lines[-2:]
    assert table[0].split()[-5:] == ["spatial", "object", "goal", "10", "mean"]
    assert len({len(line) for line in table}) == 1
    assert table[-1].split() == ["ours", "-", "50.0", "-", "17.2", "-"]
    assert how[0] == (
        "  libero_object: 500 of 500 episodes, 95% interval 45.6% to 54.4%; "
        "initial states: all; horizon 512"
    )
    for line in table[1:-1]:  # the papers' means are the means of their four suites
        numbers = [float(x) for x in line.split()[-5:]]
        assert np.mean(numbers[:4]) == pytest.approx(numbers[4], abs=0.1), line
    four = dict(zip(evaluation.SUITES, map(of, (0.1, 0.2, 0.3, 0.6))))
    ours = evaluation.paper_table(four).split("\n")[-5].split()[-5:]
    assert ours == ["10.0", "20.0", "30.0", "60.0", "30.0"]
    few = evaluation.paper_table({"libero_10": of(1.0, 3)}).split("\n")
    assert few[-2].startswith("ours, parts of the suites ")
    assert few[-1].startswith("  libero_10: 3 of 500 episodes, 95% interval 43.8% to 100.0%")


@pytest.mark.slow
def test_vla_command(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("vla", "--checkpoint", checkpoint, "--states", 2, "--workers", 1, "--out", out) == 0
    found = json.loads((out / "result.json").read_text())
    assert list(found) == ["train", "heldout"] and {r["episodes"] for r in found.values()} == {8}
    names = sorted(p.name for p in out.iterdir())
    assert names == ["heldout.gif", "result.json", "train.gif"]
    printed = capsys.readouterr().out
    words = (*TASKS["tabletop"], "all tasks", "train", "heldout", "result.json")
    assert all(text in printed for text in words)


def test_all_of_it_is_checked_before_the_first_episode(checkpoint, tmp_path, monkeypatch, capsys):
    """The last suite's fault is not found after hours of the first; and two checkpoints beside each
    other do not share a folder."""
    measured = []
    monkeypatch.setattr(
        evaluation,
        "measure",
        lambda policy, name, given, out, s: (
            measured.append((name, out.name)),
            {"train": {"successes": 1, "episodes": 2}},
        )[1],
    )
    assert run("vla", "--checkpoint", checkpoint, "--suite", "tabletop", "liberoo_objcet") == 2
    assert "no suite 'liberoo_objcet'" in capsys.readouterr().err
    monkeypatch.setitem(robots.SUITES, "libero", robots.SUITES["tabletop"])
    assert run("vla", "--checkpoint", checkpoint, "--suite", "tabletop", "libero_plus:light") == 2
    assert "two packages of one name" in capsys.readouterr().err
    assert measured == []
    shutil.copytree(checkpoint, tmp_path / "weak")
    for path in (checkpoint, tmp_path / "weak"):
        assert run("vla", "--checkpoint", path) == 0
    assert measured == [("tabletop", "eval"), ("tabletop", "eval-weak")]
    measured.clear()
    monkeypatch.setattr(evaluation, "suite_and_key", lambda *_: None)
    monkeypatch.setattr(evaluation.plots, "success_table", lambda *_: "")
    capsys.readouterr()
    listed = {}
    for dimension in libero_files.DIMENSIONS:
        name, lacks = f"libero_plus:{dimension}:libero_goal", dimension in ("light", "background")
        own = [lacks, lacks or dimension == "layout"]       # of layout some tasks run
        listed[name] = [SimpleNamespace(own_assets=x) for x in own]
    monkeypatch.setattr(libero_files, "tasks", lambda name, plus: listed[name])
    assert run("vla", "--checkpoint", checkpoint, "--suite", "libero_plus::libero_goal") == 0
    runs = ("camera", "robot", "language", "noise", "layout")
    assert [name for name, _ in measured] == [f"libero_plus:{x}:libero_goal" for x in runs]
    assert capsys.readouterr().err == (
        "note: libero_plus:background:libero_goal, libero_plus:light:libero_goal need "
        "LIBERO-Plus's own assets, and are left out\n")


def test_curves_command(tmp_path, monkeypatch):
    for name in ("srpo-0", "srpo-1", "binary-0"):
        (tmp_path / name).mkdir()
        row = {"step": 0, "heldout": 0.5, "name": name}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    seen = {}
    monkeypatch.setattr(evaluation.plots, "draw_curves",
                        lambda runs, out: seen.update(runs, out=out))
    files = sorted(tmp_path.glob("*/metrics.jsonl"))
    assert run("curves", *files, "--out", "x.png") == 0 and seen.pop("out") == "x.png"
    assert {label: [rows[0]["name"] for rows in seeds] for label, seeds in seen.items()} == {
        "binary": ["binary-0"],
        "srpo": ["srpo-0", "srpo-1"],
    }


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch):
    """Damaged things to be given."""
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("runs-0", '{"step": 0}\noops\n{"step": 2}'),
        ("odd-0", "[1]"),
        ("plain-0", '{"step": 0}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(content + "\n")
    shutil.copytree(checkpoint, tmp_path / "good")
    shutil.copytree(checkpoint, tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    return tmp_path


@pytest.mark.parametrize(
    "argv, words",
    [
        ("vla", "--checkpoint: give one folder or hub id"),
        ("vla --checkpoint missing", "missing is neither a checkpoint folder nor a hub id"),
        ("vla --checkpoint half", "half/model.safetensors is truncated"),
        ("vla --checkpoint good --states 0", "--states must be at least 1, got 0"),
        ("vla --checkpoint good --out runs-0/metrics.jsonl", "runs-0/metrics.jsonl"),
        ("vla --checkpoint good --split all", "--split all: tabletop has train, heldout"),
        ("vla --checkpoint good --suite libero_objects", "unknown suite 'libero_objects'"),
        ("vla --checkpoint good --tasks 4", "unknown task 4; tabletop has 0..3"),
        ("vla --checkpoint good --key bridge", "bridge"),
        ("vla --checkpoint good --horizon -5", "--horizon must be at least 0, got -5"),
        (
            "vla --checkpoint good --suite libero_object libero_plus:light",
            "two packages of one name; measure them in two runs",
        ),
        ("vla --checkpoint good --bogus 1", "--bogus"),
        (
            "paper --checkpoint libero_goals=x",
            "--checkpoint libero_goals: write SUITE=CHECKPOINT, with SUITE one of libero_spatial",
        ),
        ("curves odd-0/metrics.jsonl", "odd-0/metrics.jsonl line 1 is not"),
        (
            "curves plain-0/metrics.jsonl",
            "plain-0/metrics.jsonl has no heldout; give the metrics.jsonl",
        ),
        ("curves none/metrics.jsonl", "none/metrics.jsonl does not exist"),
        ("curves runs-0/metrics.jsonl", "runs-0/metrics.jsonl line 2 is not JSON"),
    ],
)
def test_bad_input_is_one_clear_line(folder, argv, words, capsys):
    before = sorted(folder.rglob("*"))
    assert run(*argv.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said
    assert sorted(folder.rglob("*")) == before
