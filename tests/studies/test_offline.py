"""studies/offline.py: trajectories as they were played, every run once, tabled."""
import pytest

from robots.tabletop import TASKS
from robots.trajectories import read_npz
from studies import offline
from tests.conftest import lines

pytestmark = pytest.mark.slow        # several runs


def test_trajectories_play_again_and_runs_are_made_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(offline, "ROLLOUTS", 1)
    monkeypatch.setattr(offline, "POLICIES", {"middling": [], "good": [
        "--demos", "1", "--steps", "5"]})
    monkeypatch.setattr(offline, "DATA", {"all three": "", "good": "good"})
    monkeypatch.setattr(offline, "WEIGHTS", {name: offline.WEIGHTS[name] for name in (
        "all", "outcome")})
    # One task is evaluated; the other tasks' trajectories are no use then
    arguments = ["--out", str(tmp_path), "--seeds", "1", "--steps", "1", "--tasks", "0"]
    assert offline.main(arguments) == 0
    out = capsys.readouterr().out
    assert "good-outcome-0: 4 of 4 runs" in out
    rows = (tmp_path / "table.txt").read_text().splitlines()
    assert [row[:21].strip() for row in rows[2:]] == ["behaviour cloning, al", "AWR, success"]
    heldout = lines(tmp_path / "good-outcome-0" / "metrics.jsonl")[-1]["heldout"]
    assert f"{heldout:.1%}" in rows[3]
    recorded = [read_npz(file) for file in sorted((tmp_path / "data/middling").glob("*.npz"))]
    assert [x.instruction for x in recorded] == list(TASKS["tabletop"])
    assert offline.main(arguments) == 0 and "of 4 runs" not in capsys.readouterr().out
    assert offline.main([*arguments, "--lr", "1"]) == 2
    assert "was made with --lr 0.0005, not 1.0" in capsys.readouterr().err
    assert offline.main(["--data", "x", "--out", str(tmp_path)]) == 2
    assert "has no --data" in capsys.readouterr().err
