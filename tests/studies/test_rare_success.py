"""studies/rare_success.py: the table by hand, and small runs from the one command."""
import json
import re

import numpy as np
import pytest

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


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "CASES", {
        "two_cubes": ("tabletop_long", ["--demos", "1", "--steps", "2"], ["--tables", "16"],
                      {"grpo": 8, "pixels": 8}),
        "one_cube": ("tabletop", ["--demos", "1", "--steps", "2"], ["--tables", "16"],
                     {"grpo": 1})})
    argv = ["--seeds", "1", "--out", str(tmp_path), "--steps", "1", "--groups", "2"]
    assert study.main(argv) == 0
    said = capsys.readouterr().out
    assert "pixels-0: 2 of 2 runs" in said and "grpo-0: 1 of 1 runs" in said
    folder = tmp_path / "two_cubes"
    saved = json.loads((folder / "pixels-0/settings.json").read_text())
    assert saved["data"] == str(folder / "demos") and saved["references"] == 64
    assert saved["suite"] == "tabletop_long" and len(list((folder / "demos").iterdir())) == 4
    assert (tmp_path / "two_cubes.png").exists() and (tmp_path / "one_cube.png").exists()
    assert study.main(argv) == 0
    said = capsys.readouterr().out                                                  # none twice
    assert " runs, " not in said and said.index("two_cubes\n") < said.index("one_cube\n")
    assert study.main([*argv, "--pool", "clip"]) == 2
    assert "a study has no --pool" in capsys.readouterr().err
