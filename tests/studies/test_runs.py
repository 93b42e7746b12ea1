"""studies/runs.py: which runs are left to do, and what a command says."""
import json
import time

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


def test_a_command_says_what_it_prints_or_one_line():
    assert runs.python(["-c", "print('so')"]) == "so\n"
    with pytest.raises(RuntimeError, match="^of it: no$"):
        runs.python(["-c", "import sys; print('some'); sys.exit('and\\nno')"], what="of it: ")
    with pytest.raises(RuntimeError, match="^it failed$"):
        runs.python(["-c", "raise SystemExit(3)"])
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="^stopped after 1 s; give more --minutes$"):
        runs.python(["-c", "import time; time.sleep(60)"], 1.0)
    assert time.monotonic() - began < 30
