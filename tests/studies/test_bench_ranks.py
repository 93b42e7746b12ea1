"""studies/bench_ranks.py on two CPU processes."""
import re
import subprocess
import sys

import pytest

from studies import bench_ranks


@pytest.mark.slow
def test_every_part_is_timed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
         "studies.bench_ranks", "--out", str(tmp_path)],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = done.stdout.splitlines()
    # Weights and two moments, float32, but for blocks that never run
    assert line.startswith("openvla-small, 22,501,296 parameters, 2 ranks, 0.24 GiB saved: ")
    found = dict(re.findall(r"(\w+) ([\d.]+) s", line))
    assert list(found) == ["shard", "gather", "save", "load"]
    assert all(float(seconds) > 0 for seconds in found.values())


def test_bad_flags_are_one_line(capsys):
    assert bench_ranks.main(["--model", "vjepa2-vitg"]) == 2
    assert "invalid choice: 'vjepa2-vitg'" in capsys.readouterr().err
