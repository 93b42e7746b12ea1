"""studies/offline.py: trajectories as they were played, every run once, tabled."""
import numpy as np
import pytest

import vla_srpo
from plumbing.plots import wilson
from robots.tabletop import Tabletop
from robots.trajectories import read_npz
from studies import offline
from tests.conftest import lines

pytestmark = pytest.mark.slow        # several runs


def test_trajectories_play_again_and_runs_are_made_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(offline, "ROLLOUTS", 1)
    monkeypatch.setattr(offline, "POLICIES", {"middling": [], "good": [
        "--demos", "1", "--steps", "5"]})
    monkeypatch.setattr(offline, "DATA", {"good": "good", "mixed": ""})
    monkeypatch.setattr(offline, "WEIGHTS", {name: offline.WEIGHTS[name] for name in (
        "all", "outcome")})
    record = offline.record
    monkeypatch.setattr(offline, "record", lambda *a: record(*a, per_task=1))
    arguments = ["--out", str(tmp_path), "--seeds", "1", "--steps", "1"]
    assert offline.main(arguments) == 0
    out = capsys.readouterr().out
    assert "mixed-outcome-0: 4 of 4 runs" in out
    rows = (tmp_path / "table.txt").read_text().splitlines()
    assert [row[:21].strip() for row in rows[2:]] == ["behaviour cloning, al", "AWR, success"]
    heldout = lines(tmp_path / "mixed-outcome-0" / "metrics.jsonl")[-1]["heldout"]
    assert f"{heldout:.1%}" in rows[3] and wilson(round(200 * heldout), 200)
    for file in (tmp_path / "data/middling").glob("*.npz"):
        x = read_npz(file)                              # the same actions end the same way
        env = Tabletop()
        task, index = env.instructions.index(x.instruction), 0
        image = env.reset(options={"task": task, "index": index})[0]["image"]
        np.testing.assert_array_equal(image, x.images[0])
        ended = [env.advance(action) for action in x.actions]
        assert ended[-1] and not any(ended[:-1]) and env.success == x.success
        np.testing.assert_array_equal(env.render(), x.images[-1])
    assert offline.main(arguments) == 0 and "of 4 runs" not in capsys.readouterr().out
    assert offline.main([*arguments, "--lr", "1"]) == 2
    assert "was made with --lr 0.0005, not 1.0" in capsys.readouterr().err
    assert offline.main(["--data", "x", "--out", str(tmp_path)]) == 2
    assert "has no --data" in capsys.readouterr().err and vla_srpo.READING
