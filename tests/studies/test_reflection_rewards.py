"""studies/reflection_rewards.py: runs of one step each, drawn and tabled, and none done twice."""
import time

import pytest

from studies import reflection_rewards as reflection_study
from tests.test_reflection_srpo import SMALL


@pytest.mark.slow
@pytest.mark.slow
def test_study_draws_one_picture_and_skips_what_is_done(tmp_path, capsys):
    out = tmp_path / "study"
    arguments = [*SMALL, "--steps", "1", "--seeds", "2", "--rewards", "paper", "outcome",
                 "--out", str(out)]
    assert reflection_study.main(arguments) == 0
    assert (out / "curves.png").stat().st_size > 10_000
    assert sorted(p.name for p in out.iterdir()) == [
        "curves.png", "outcome-0", "outcome-1", "paper-0", "paper-1"]
    capsys.readouterr()
    began = time.time()
    assert reflection_study.main(arguments) == 0 and time.time() - began < 10
    assert "settings:" not in capsys.readouterr().out
    assert reflection_study.main([*arguments, "--lr", "1"]) == 2
    assert "was made with --lr 0.0005, not 1.0" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    (["--seeds", "0"], "--seeds must be at least 1"), (["--model", "m"], "has no --model")])
def test_bad_flags_are_one_line(argv, words, tmp_path, capsys):
    assert reflection_study.main([*argv, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
