"""studies/runs.py: which runs are left to do."""
import json

import pytest

import vla_srpo
from studies import runs


def test_a_run_has_ended_with_the_row_of_its_last_step(tmp_path):
    """An evaluation on the way leaves an after.json, too."""
    argv = ["--steps", "3", "--lr", "1e-3"]
    assert not runs.finished(vla_srpo, tmp_path, argv)
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 3, "lr": 1e-3}))
    (tmp_path / "after.json").write_text("{}")
    assert not runs.finished(vla_srpo, tmp_path, argv)
    log = tmp_path / "metrics.jsonl"
    for step in range(4):
        log.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(step + 1)))
        assert runs.finished(vla_srpo, tmp_path, argv) == (step == 3)
    assert not runs.finished(vla_srpo, tmp_path, argv, "policy")
    (tmp_path / "policy").mkdir()
    assert runs.finished(vla_srpo, tmp_path, argv, "policy")
    with pytest.raises(ValueError, match="was made with --lr 0.001, not 0.0005"):
        runs.finished(vla_srpo, tmp_path, argv[:2])
