"""studies/progress_curves.py: curves by hand, both commands, and rollouts.npz whatever is in it."""

import random
import re
import subprocess
import sys

import numpy as np
import pytest

import world_model as wm
from studies import progress_curves as pc
from tests.test_world_model import damaged, squares


@pytest.fixture(scope="module")
def shipped() -> wm.WorldModel:
    return wm.WorldModel.from_pretrained(wm.SHIPPED, device="cpu")


def fails(capsys, *argv) -> str:
    """The one line on stderr of a command that ends with code 2."""
    assert pc.main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.fixture
def rollouts(tmp_path):
    path = tmp_path / "v.npz"
    np.savez(
        path,
        videos=squares(12, total=13, size=64),
        success=np.arange(12) % 3 > 0,
        length=np.full(12, 12),
    )
    return str(path)


# Curves


def test_ours_leave_a_success_out_of_its_own_reference(shipped):
    videos, success = list(squares(5, size=64)), np.array([1, 1, 1, 0, 0], bool)
    curves = pc.progress_curves(videos, success, np.zeros(5, int), shipped, "ours")[0]
    assert [won for won, _, _ in curves] == success.tolist()
    h = shipped.encode(videos).numpy()
    for i, others in ((0, [1, 2]), (3, [0, 1, 2])):
        expected = shipped.progress(videos[i], h[others].mean(0))
        np.testing.assert_array_equal(curves[i][2], expected[1])


def test_paper_compares_a_success_with_itself_and_a_failure_with_the_nearest_centre(shipped):
    one, two = squares(2, total=13, size=64, seed=1)
    videos = [one, one, two, two, squares(1, total=13, size=64, seed=2)[0]]  # two clusters
    success = np.array([1, 1, 1, 1, 0], bool)
    curves = pc.progress_curves(videos, success, np.zeros(5, int), shipped, "paper")[0]
    np.testing.assert_array_equal(curves[2][2], shipped.paper_progress(two)[1])
    centres = shipped.encode([one, two]).numpy()
    expected = shipped.paper_progress(videos[4], centres)[1]
    np.testing.assert_allclose(curves[4][2], expected, atol=1e-5)


def test_tasks_without_both_outcomes_are_left_out(shipped):
    videos, task = list(squares(6, size=64)), np.array(["a", "a", "a", "b", "b", "c"])
    success = np.array([1, 1, 0, 1, 1, 0], bool)
    curves = pc.progress_curves(videos, success, task, shipped, "ours")
    assert list(curves) == ["a"] and set(pc.benchmark(curves)) == set(pc.MEASURES)
    with pytest.raises(ValueError, match="nothing to compare"):
        pc.progress_curves(videos[3:], success[3:], task[3:], shipped, "ours")


def test_simulator_rollouts_have_a_frame_per_chunk_or_per_step():
    coarse, success, task = pc.simulator_rollouts(8, seed=1)
    fine, same, _ = pc.simulator_rollouts(8, seed=1, every=1)
    assert (success == same).all() and success.any() and sorted(set(task.tolist())) == [0, 1, 2, 3]
    for a, b in zip(coarse, fine, strict=True):
        steps = len(b) - 1
        assert len(a) == 1 + -(-steps // 8)
        np.testing.assert_array_equal(a[1], b[min(8, steps)])
        np.testing.assert_array_equal(a[-1], b[-1])


# Commands


@pytest.mark.parametrize("kind", ["ours", "paper"])
def test_draw(rollouts, tmp_path, capsys, kind):
    png = tmp_path / "curves.png"
    assert pc.main(["--videos", rollouts, "--out", str(png), "--curves", kind]) == 0
    out = capsys.readouterr().out
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert "spearman" in out and f"{kind} curves" in out and "nan" not in out


def test_compare(rollouts, capsys):
    assert pc.main(["compare", "--videos", rollouts]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if re.match("trained|random weights|pixels", line)]
    assert len(rows) == 3 and "nan" not in out
    assert all(len(re.findall(r"-?\d+\.\d{3}", row)) == 1 + len(pc.MEASURES) for row in rows)


def test_help_needs_no_torch():
    code = (
        "import sys; from studies import progress_curves as pc\n"
        "try: pc.main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'mujoco', 'matplotlib', "
        "'scipy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"videos": None, "frames": squares(2)}, "needs `videos`"),
        ({"videos": squares(2).astype(float)}, "float64"),
        ({"videos": squares(2)[..., :2]}, "needs `videos`"),
        ({"videos": squares(2)[:0]}, "needs `videos`"),
        ({"success": np.ones(3, bool)}, r"`success` must be 2 numbers.*got bool \(3,\)"),
        ({"success": [[True], [False]]}, r"`success`.*\(2, 1\)"),
        ({"success": [0.5, 1]}, "`success`.*true or false"),
        ({"success": [np.nan, 1]}, "`success`.*true or false"),
        ({"success": ["yes", "no"]}, "`success`.*true or false"),
        ({"length": [2.5, 3]}, "`length`.*integers in 1..9, one a video, got float64"),
        ({"length": [5, 50]}, "`length`.*integers in 1..9"),
        ({"length": [0, 5]}, "`length`.*integers in 1..9"),
        ({"task": [0.0, np.nan]}, "`task`.*integers or text"),
        ({"task": np.array([{}, {}])}, "cannot read rollouts"),
    ],
)
def test_bad_rollouts(tmp_path, change, message):
    arrays = {"videos": squares(2), "success": [True, False]} | change
    np.savez(tmp_path / "bad.npz", **{key: x for key, x in arrays.items() if x is not None})
    with pytest.raises(ValueError, match=message) as error:
        pc.read_rollouts(str(tmp_path / "bad.npz"))
    assert "bad.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_rollouts_are_refused_in_one_line_or_read_the_same(seed, tmp_path):
    rng, path = random.Random(seed), tmp_path / "damaged.npz"
    save = np.savez_compressed if seed % 2 else np.savez
    arrays = {
        "videos": squares(3, total=4, size=16),
        "success": [True, False, True],
        "task": [0, 0, 1],
        "length": [4, 3, 2],
    }
    save(path, **arrays)
    path.write_bytes(damaged(path.read_bytes(), rng))
    try:
        videos, success, task = pc.read_rollouts(str(path))
    except ValueError as error:
        assert "damaged.npz" in str(error) and "\n" not in str(error)
        return
    assert success.tolist() == arrays["success"] and task.tolist() == arrays["task"]
    for video, whole, t in zip(videos, arrays["videos"], arrays["length"], strict=True):
        np.testing.assert_array_equal(video, whole[:t])


def test_bad_command_lines(rollouts, tmp_path, capsys):
    (tmp_path / "plain.npy").write_bytes(b"\x93NUMPY")
    np.savez(tmp_path / "blind.npz", videos=squares(2, size=64))
    for argv, message in [
        (["--videos", f"{tmp_path}/none.npz"], "none.npz"),
        (["--videos", f"{tmp_path}/plain.npy"], "plain.npy"),
        (["--videos", f"{tmp_path}/blind.npz"], "no `success`"),
        (["--videos", rollouts, "--out", f"{tmp_path}/no/x.png"], "no such folder"),
        (["--videos", rollouts, "--model", f"{tmp_path}/none"], "neither a folder"),
    ]:
        assert message in fails(capsys, *argv)
