"""studies/rare_success.py: the table by hand, and small runs from the one command."""
import json
import re

import numpy as np
import pytest

import vla_srpo
from plumbing.flags import read_command
from studies import progress_curves
from studies import rare_success as study


def test_crossing_by_hand():
    assert study.crossing(np.array([0.0, 0.1, 0.3]), [0, 20, 40], 0.2) == pytest.approx(30)
    assert study.crossing(np.array([0.2, 0.1, 0.3]), [0, 20, 40], 0.2) == 0
    assert study.crossing(np.array([0.0, 0.1]), [0, 20], 0.2) == np.inf


def test_share_of_steps_by_hand():
    steps, grpo = [0, 20, 40], np.array([[0.0, 0.1, 0.2], [0.0, 0.0, 0.2]])
    twice = np.array([[0.0, 0.2, 0.4], [0.0, 0.2, 0.4]])
    assert study.share_of_steps(twice, grpo, steps) == (0.5, 0.5, 0.5)
    assert study.share_of_steps(grpo, grpo, steps) == (1, 1, 1)
    one, low, high = study.share_of_steps(np.array([[0.0, 0.2, 0.2], [0.0, 0.0, 0.1]]), grpo, steps)
    assert (one, low, high) == (np.inf, 0.5, np.inf)       # half of the resamples never get there
    none = np.array([[0.1, 0.0, 0.0]])                      # plain GRPO has only forgotten
    assert study.share_of_steps(none + [[0, 0.1, 0.3]], none, steps)[0] == 0


def test_the_table_has_each_seed_and_its_difference():
    def rows(*heldout):
        return [{"step": 20 * i, "heldout": x} for i, x in enumerate(heldout)]
    text = study.table({"plain GRPO": [rows(0, 0.1, 0.2), rows(0, 0.1, 0.0)],
                        "SRPO": [rows(0, 0.4, 0.3), rows(0, 0.3, 0.1)]})
    assert "seeds 30.0%, 10.0%" in text
    assert re.findall(r"(-?\d+\.\d)% \+-", text.splitlines()[-1]) == ["35.0", "10.0"]


def test_every_run_of_every_case_has_flags_that_the_script_takes(tmp_path):
    for case, (suite, _, _, arms) in study.CASES.items():
        for arm in arms:
            argv = study.command(case, arm, 3, ["--lr", "1e-3"], tmp_path)
            s = read_command(vla_srpo.Settings, argv, **vla_srpo.READING).settings
            vla_srpo.check(s)
            assert (s.suite, s.seed, s.lr, s.eval_every) == (suite, 3, 1e-3, 20)
            assert s.model == str(tmp_path / case / "start")
            assert s.data in ("", str(tmp_path / case / "demos")) and bool(s.data) == (
                s.references > 0)


def test_law_by_hand(tmp_path, monkeypatch):
    """Two groups of ten have both outcomes; SRPO ends ten points below plain GRPO, or twenty above.
    """
    def measured(argv: list[str]) -> str:
        s = read_command(progress_curves.Settings, argv[2:], words=("compare",)).settings
        assert argv[:2] == ["-m", "studies.progress_curves"] and s.stage == "compare"
        assert s.policy == str(tmp_path / "half" / "start") and s.suite == "tabletop"
        return (f"64 rollouts\ntrained            0.900    0.{3 + s.seed}00    1.000\n"
                "pixels, max        0.800    0.700    1.000\n")
    monkeypatch.setattr(study.runs, "python", measured)
    (tmp_path / "half").mkdir()

    def rows(*heldout):
        counts = {"groups_used": 2, "groups_failed": 5, "groups_solved": 3}
        return [[{"step": 0, "heldout": 0.0}] + [
            {"step": 20 * i, "heldout": x} | counts for i, x in enumerate(heldout, 1)]]
    cases = {"half": {"plain GRPO": rows(0.1, 0.2), "SRPO, V-JEPA": rows(0.0, 0.1),
                      "SRPO, pixels, max": rows(0.2, 0.4)}}
    _, vjepa, best = study.law(cases, tmp_path).splitlines()
    assert vjepa.startswith("half, 20% of groups")
    assert vjepa.endswith("within 0.400  gain -10.0%  1 seed")
    assert "SRPO, pixels, max" in best and best.endswith("within 0.700  gain +20.0%  1 seed")
    assert (tmp_path / "law.png").exists()
    assert len(list((tmp_path / "half").glob("ranking-?.txt"))) == 3


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "CASES", {
        "one_cube": ("tabletop", ["--demos", "1", "--steps", "2"], ["--tables", "64"],
                     {"grpo": 8, "pixels": 8})})
    monkeypatch.setattr(study, "law", lambda cases, out: f"law of {', '.join(cases)}")
    argv = ["--seeds", "1", "--out", str(tmp_path), "--steps", "1", "--groups", "2", "--tasks", "0"]
    folder = tmp_path / "one_cube"
    folder.mkdir()
    (folder / "ranking-0.txt").write_text("of another start")
    assert study.main(argv) == 0
    assert "pixels-0: 2 of 2 runs" in capsys.readouterr().out
    assert not list(folder.glob("ranking-*"))
    saved = json.loads((folder / "pixels-0/settings.json").read_text())
    assert saved["data"] == str(folder / "demos") and saved["references"] == 64
    assert saved["suite"] == "tabletop" and len(list((folder / "demos").iterdir())) == 4
    assert (tmp_path / "one_cube.png").exists()
    assert (tmp_path / "table.txt").read_text().endswith("\n\nlaw of one_cube\n")
    assert study.main(argv) == 0
    said = capsys.readouterr().out                                                  # none twice
    assert " runs, " not in said and "\none_cube\n" in said
    assert study.main([*argv, "--pool", "clip"]) == 2
    assert "a study has no --pool" in capsys.readouterr().err
