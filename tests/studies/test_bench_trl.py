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
    assert said.err.count("\n") == 1 and "pip install trl" in said.err and not said.out
    assert not (tmp_path / "trl.json").exists()


@pytest.mark.parametrize("argv, words", [
    (["--rows", "6"], "--rows must be a multiple of 4"), (["--rows", "0"], "multiple of 4"),
    (["--threads", "0"], "--threads must be at least 1")])
def test_bad_flags_are_one_line(argv, words, capsys):
    assert bench_trl.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


def test_trl_does_the_same_work_and_computes_the_same(tmp_path):
    """From the same weights, on the same tokens: log-probabilities, and the gradient through its
    norm."""
    pytest.importorskip("trl")
    out = tmp_path / "trl.json"
    case = Case("qwen2.5-vl-small", rows=8, length=8, repeats=1)
    bench_trl.compare(case, str(out), repetitions=1)
    result = json.loads(out.read_text())
    ours, theirs = result["gradient_norms"]
    assert result["logp_difference"] < 1e-4 and ours == pytest.approx(theirs, rel=1e-3)
    [pair] = result["pairs"]
    for row in pair.values():
        assert row["generated"] == row["trained"] == [64, 64] and row["updates"] == 2
        assert 0 < row["seconds_rollout"] < row["seconds"]
    assert result["ratios"]["seconds"] == [
        pytest.approx(pair["ours"]["seconds"] / pair["trl"]["seconds"])]
