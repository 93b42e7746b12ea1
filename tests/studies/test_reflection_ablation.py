"""studies/reflection_ablation.py: small runs, tabled and drawn, and none done twice."""
import json
import re
import time

import pytest

import reflection_srpo
from reasoning import published_reward
from rewards import reflection_reward
from studies import reflection_ablation as ablation
from studies import runs
from tests.test_reflection_srpo import SMALL


@pytest.mark.slow
def test_every_row_is_run_once_tabled_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "RUNS", {name: ablation.RUNS[name] for name in (
        "grpo", "plain_sft_grpo", "srpo", "openrlhf", "outcome")})
    monkeypatch.setattr(ablation, "TABLE", [row for row in ablation.TABLE
                                            if row[1] in ablation.RUNS])
    out = tmp_path / "study"
    arguments = [*SMALL, "--steps", "1", "--seeds", "1", "--jobs", "2", "--out", str(out)]
    assert ablation.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "srpo-0: " in printed and "8 of 8 runs, 0 minutes left" in printed
    names = (*ablation.STARTS, *ablation.RUNS)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*(f"{name}-0" for name in names), "picture.png", "table.txt"])
    assert (out / "picture.png").stat().st_size > 10_000
    text = (out / "table.txt").read_text()
    after = json.loads((out / "srpo-0" / "after.json").read_text())
    line = next(line for line in text.splitlines() if line.startswith("SRPO, alpha 0.1"))
    assert f"{after['final_accuracy']:.1%}" in line and re.search(r"53\.5 +\+9\.1$", line)
    settings = {name: json.loads((out / f"{name}-0" / "settings.json").read_text())
                for name in names}
    assert settings["base"]["target"] == "base" and settings["srpo"]["reward"] == "paper"
    assert settings["plain_sft_grpo"]["model"].endswith("plain_sft-0/policy")
    assert {s["format"] for name, s in settings.items() if "grpo" in name} == {"plain"}
    assert len({s["max_new_tokens"] for s in settings.values()}) == 1       # one budget
    began = time.time()
    assert ablation.main(arguments) == 0 and time.time() - began < 10
    assert "of 8 runs" not in capsys.readouterr().out
    assert ablation.main([*arguments, "--lr", "1"]) == 2
    assert "was made with --lr 0.0003, not 1.0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match=r"x-0: error: .*nowhere"):
        runs.run(reflection_srpo, tmp_path / "x-0", [
            "rl", "--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x-0")])


def test_gains_and_intervals_by_hand():
    assert runs.mean_and_half([0.5, 0.7]) == (0.6, pytest.approx(1.2706, abs=1e-3))
    assert runs.mean_and_half([0.25])[0] == 0.25


@pytest.mark.parametrize("earn, share", [
    (reflection_reward, 1.5), (published_reward.openrlhf, 0.75)])
def test_when_errors_pay_by_hand(earn, share):
    """Which share of wrong first answers must end right for a wrong one to earn as much as a right
    one that stays right; above 1 errors never pay. Paper: 0.75 against at most 0.5."""
    def earned(first: int, final: int) -> float:
        think = "<think> x </think> <answer> {} </answer>"
        record = earn(f"{think} <reflection> y </reflection> {think}".format(first, final), "7")
        return record.accuracy + record.effectiveness
    assert (earned(7, 7) - earned(8, 8)) / (earned(8, 7) - earned(8, 8)) == share


@pytest.mark.parametrize("argv, words", [
    (["--seeds", "0"], "--seeds must be at least 1"), (["--jobs", "0"], "--jobs must be"),
    (["--model", "m"], "has no --model"),
    (["--data", "rows.jsonl"], "--data rows.jsonl: the study has arrows and arrows_text")])
def test_bad_flags_are_one_line(argv, words, tmp_path, capsys):
    assert ablation.main([*argv, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
