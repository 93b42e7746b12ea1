"""studies/progress_curves.py: curves by hand, and both commands."""

import re
import subprocess
import sys

import numpy as np
import pytest

import world_model as wm
from robots.trajectories import Trajectory, save
from studies import progress_curves as pc
from studies.demonstrate import recorded, tabletop_episodes
from tests.test_world_model import squares


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
    for i, video in enumerate(squares(12, total=12, size=64)):
        save(tmp_path / f"data/{i:02d}.npz", Trajectory(
            "put it there", i % 3 > 0, video, np.zeros((11 * 8, 7))))
    return str(tmp_path / "data")


# Curves


def curves_of(videos, *rest) -> dict:
    return pc.progress_curves(videos, rest[-2].encode(videos).numpy(), *rest)


def test_ours_leave_a_success_out_of_its_own_reference(shipped):
    videos, success = list(squares(5, size=64)), np.array([1, 1, 1, 0, 0], bool)
    curves = curves_of(videos, success, np.zeros(5, int), shipped, "ours")[0]
    assert [won for won, _, _ in curves] == success.tolist()
    h = shipped.encode(videos).numpy()
    for i, others in ((0, [1, 2]), (3, [0, 1, 2])):
        expected = shipped.progress(videos[i], h[others].mean(0))
        np.testing.assert_array_equal(curves[i][2], expected[1])


def test_paper_compares_a_success_with_itself_and_a_failure_with_the_nearest_centre(shipped):
    one, two = squares(2, total=13, size=64, seed=1)
    videos = [one, one, two, two, squares(1, total=13, size=64, seed=2)[0]]  # two clusters
    success = np.array([1, 1, 1, 1, 0], bool)
    curves = curves_of(videos, success, np.zeros(5, int), shipped, "paper")[0]
    np.testing.assert_array_equal(curves[2][2], shipped.paper_progress(two)[1])
    centres = shipped.encode([one, two]).numpy()
    expected = shipped.paper_progress(videos[4], centres)[1]
    np.testing.assert_allclose(curves[4][2], expected, atol=1e-5)


def test_tasks_without_both_outcomes_are_left_out(shipped):
    videos, task = list(squares(6, size=64)), np.array(["a", "a", "a", "b", "b", "c"])
    success = np.array([1, 1, 0, 1, 1, 0], bool)
    curves = curves_of(videos, success, task, shipped, "ours")
    assert list(curves) == ["a"] and set(pc.benchmark(curves)) == set(pc.MEASURES)
    with pytest.raises(ValueError, match="nothing to compare"):
        curves_of(videos[3:], success[3:], task[3:], shipped, "ours")


def test_simulator_rollouts_have_a_frame_per_chunk_or_per_step():
    coarse, success, task = pc.simulator_rollouts(8, seed=1)
    fine, same, _ = pc.simulator_rollouts(8, seed=1, every=1)
    assert (success == same).all() and success.any() and sorted(set(task.tolist())) == [0, 1, 2, 3]
    for a, b in zip(coarse, fine, strict=True):
        steps = len(b) - 1
        assert len(a) == 1 + -(-steps // 8)
        np.testing.assert_array_equal(a[1], b[min(8, steps)])
        np.testing.assert_array_equal(a[-1], b[-1])


def test_separation_by_hand():
    latents, task = np.array([[0.0], [1.0], [2.0], [9.0], [1.0]]), np.zeros(5, int)
    won = np.array([True, True, True, False, False])
    # distances of successes (leave-one-out) 1.5, 0, 1.5, of failures 8, 0:
    # won 3 of 3 against 8, half a tie against 0
    assert pc.separation(latents, won, task) == pytest.approx((3 + 0.5) / 6)
    assert np.isnan(pc.separation(latents, np.ones(5, bool), task))


def test_ranking_is_of_failures_within_their_group():
    """By hand: four groups of four; the latent is where a rollout ended, 0 for a success."""
    latents = np.array([[0, 1, 2, 3], [0, 3, 2, 1], [0, 0, 1, 2], [0] * 4], float).reshape(-1, 1)
    success = latents[:, 0] == 0
    progress = 1 - latents[:, 0] / 4
    progress[4:8] = [1, 0.1, 0.3, 0.2]          # here the world model is wrong about two of three
    within, contrast = pc.ranking(latents, success, np.zeros(16), np.arange(16) // 4, progress)
    assert within == pytest.approx((1.0 + 0.5) / 2)     # a group of two failures does not count
    assert contrast == 3 / 4                            # all succeed in the last
    alone = pc.ranking(latents[:4] + 1, np.zeros(4, bool), np.zeros(4), np.zeros(4), progress[:4])
    assert np.isnan(alone[0]) and alone[1] == 0         # no success: nothing is shaped


# Commands


@pytest.mark.parametrize("kind", ["ours", "paper"])
def test_draw(rollouts, tmp_path, capsys, kind):
    png = tmp_path / "curves.png"
    assert pc.main(["--data", rollouts, "--out", str(png), "--curves", kind]) == 0
    out = capsys.readouterr().out
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert "spearman" in out and f"{kind} curves" in out and "nan" not in out


def test_compare(rollouts, capsys):
    assert pc.main(["compare", "--data", rollouts]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if re.match("trained|random|pixels", line)]
    assert len(rows) == 6 and "nan" not in out
    assert all(len(re.findall(r"-?\d+\.\d{3}", row)) == 1 + len(pc.MEASURES) for row in rows)


@pytest.mark.slow
def test_compare_on_a_policy_s_rollouts(capsys, monkeypatch, tmp_path):
    """True progress is the ceiling; with demonstrations for references every group is shaped."""
    play, asked, played = pc.policy_rollouts, [], []

    def few(policy, suite, states, rollouts, seed):
        asked.append((policy, suite, states, rollouts, seed))
        played.extend([] if played else play(policy, suite, 2, rollouts, seed))
        return played
    monkeypatch.setattr(pc, "policy_rollouts", few)
    policy = str(wm.SHIPPED.with_name("tiny_vla"))
    assert pc.main(["compare", "--policy", policy, "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert asked == [(policy, "tabletop", 8, 8, 3)] and out.startswith("64 rollouts")
    def read(out):
        return {line[:15].strip(): [float(x) for x in line[15:].split()]
                for line in out.splitlines()
                if re.match("trained|random|pixels|last frame|true progress", line)}
    rows = read(out)
    assert len(rows) == 8 and rows["true progress"][:2] == [1, 1]
    assert all(-1 <= row[1] < 1 for name, row in rows.items() if name != "true progress")
    assert len(rows["trained"]) == 3 + len(pc.MEASURES) and len(rows["last frame"]) == 3
    list(recorded(tabletop_episodes(1), tmp_path))
    assert pc.main(["compare", "--policy", policy, "--data", str(tmp_path)]) == 0
    demonstrated = read(capsys.readouterr().out)
    assert all(row[2] >= rows[name][2] for name, row in demonstrated.items())
    assert demonstrated["pixels"][1] != rows["pixels"][1]


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


def test_bad_command_lines(rollouts, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.npz").write_bytes(b"PK")
    for argv, message in [
        (["--data", f"{tmp_path}/none"], "none: a folder of .npz files"),
        (["--data", f"{tmp_path}/bad"], "a.npz: cannot be read"),
        (["--data", rollouts, "--out", f"{tmp_path}/no/x.png"], "no such folder"),
        (["--policy", "x"], "--policy is for compare"),
        (["compare", "--policy", f"{tmp_path}/none"], "none"),
        (["--data", rollouts, "--model", f"{tmp_path}/none"], "neither a folder"),
    ]:
        assert message in fails(capsys, *argv)
