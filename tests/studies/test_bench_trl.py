"""studies/bench_trl.py: the same work on both sides, and one line where TRL is missing."""
import json
import sys

import pytest
import torch

from studies import bench_trl
from studies.bench import Case


def test_without_trl_one_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert bench_trl.main(["--out", str(tmp_path / "trl.json")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "pip install trl" in said.err and not said.out
    assert not (tmp_path / "trl.json").exists()


@pytest.mark.parametrize("argv, words", [
    (["--rows", "6"], "--rows must be a multiple of 4"), (["--rows", "0"], "multiple of 4"),
    (["--threads", "0"], "--threads must be at least 1"),
    (["--lora_rank", "-1"], "--lora_rank must be at least 0"),
    (["--model", "qwen2.5-vl-7b"], "takes a GPU; leave it out")])
def test_bad_flags_are_one_line(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_trl.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


@pytest.mark.parametrize("rank", [0, 4])
def test_trl_does_the_same_work_and_computes_the_same(rank, tmp_path):
    """From the same weights, on the same tokens: log-probabilities, and the gradient through its
    norm, but for adapters, which each draws."""
    pytest.importorskip("trl")
    out = tmp_path / "trl.json"
    case = Case("qwen2.5-vl-small", rank, rows=8, length=8, repeats=1)
    bench_trl.compare(case, str(out), repetitions=1)
    result = json.loads(out.read_text())
    ours, theirs = result["gradient_norms"]
    assert result["logp_difference"] < 1e-4
    assert rank or ours == pytest.approx(theirs, rel=1e-3)
    [pair] = result["pairs"]
    for row in pair.values():
        assert row["generated"] == row["trained"] == [64, 64] and row["updates"] == 2
        assert 0 < row["seconds_rollout"] < row["seconds"]
    assert result["ratios"]["seconds"] == [
        pytest.approx(pair["ours"]["seconds"] / pair["trl"]["seconds"])]
