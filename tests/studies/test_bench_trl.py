"""studies/bench_trl.py: the same work on both sides, and one line where TRL is missing."""
import json
import sys

import pytest

from studies import bench_trl
from studies.bench import Case


def test_without_trl_one_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert bench_trl.main(["--out", str(tmp_path / "trl.json")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "pip install trl" in said.err and not said.out and not (tmp_path / "trl.json").exists()


def test_trl_does_the_same_work_and_computes_the_same(tmp_path):
    """From the same weights, on the same tokens: log-probabilities, and the gradient through its norm."""
    pytest.importorskip("trl")
    out = tmp_path / "trl.json"
    bench_trl.compare(Case("qwen2.5-vl-small", rows=8, length=8, repeats=1), out, repetitions=1)
    result = json.loads(out.read_text())
    assert result["logp_difference"] < 1e-4 and result["gradient_norms"][0] == pytest.approx(result["gradient_norms"][1], rel=1e-3)
    for row in result["pairs"][0].values():
        assert row["generated"] == row["trained"] == [64, 64] and row["updates"] == 2 and 0 < row["seconds_rollout"] < row["seconds"]
    assert result["ratios"]["seconds"] == [pytest.approx(result["pairs"][0]["ours"]["seconds"] / result["pairs"][0]["trl"]["seconds"])]
