"""plumbing/plots.py against scipy, and tables and curves by hand."""

import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from plumbing import plots
from tests.plumbing.test_checkpoint import mutations

TASKS = ("push the red cube", "lift it", "open", "stack the cube on the other cube")


# Intervals and tables


def test_wilson():
    assert plots.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)  # a textbook value
    assert plots.wilson(0, 10) == pytest.approx((0, 0.2775), abs=5e-5)
    for n in (1, 7, 50, 200):
        for successes in range(n + 1):
            exact = binomtest(successes, n).proportion_ci(method="wilson")
            ours = plots.wilson(successes, n, z=1.959963984540054)
            assert ours == pytest.approx(tuple(exact), abs=1e-12)
            assert plots.wilson(successes, n) == pytest.approx(tuple(exact), abs=2e-5)
    for successes, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"^{successes} successes of {n}: need"):
            plots.wilson(successes, n)


def test_rate():
    assert plots.rate(8, 10) == {
        "success": 0.8,
        "interval": plots.wilson(8, 10),
        "successes": 8,
        "episodes": 10,
    }


def result(rates: list[float]) -> dict:
    tasks = {
        text: {"success": r, "interval": (r / 2, (1 + r) / 2)}
        for text, r in zip(TASKS, rates, strict=True)
    }
    return {"tasks": tasks, "success": float(np.mean(rates)), "interval": (0.011, 0.987)}


def test_success_table():
    results = {"before": [0.1, 0.25, 0.5, 1.0], "after 200 steps": [0.9, 1.0, 0.0, 0.62]}
    lines = plots.success_table({k: result(v) for k, v in results.items()}).split("\n")
    assert len({len(line) for line in lines}) == 1 and len(lines) == 6  # aligned
    assert lines[0].split("  ")[-1].strip() == "after 200 steps" and "before" in lines[0]
    cells = [[float(x) for x in re.findall(r"([\d.]+)%", line)] for line in lines[1:]]
    assert cells == [
        [10, 5, 55, 90, 45, 95],
        [25, 12.5, 62.5, 100, 50, 100],
        [50, 25, 75, 0, 0, 50],
        [100, 50, 100, 62, 31, 81],
        [46.2, 1.1, 98.7, 63.0, 1.1, 98.7],
    ]
    assert [line.split("  ")[0].strip() for line in lines[1:]] == [*TASKS, "all tasks"]


def test_seeds_table_by_hand():
    """Three seeds .9, .8, .79: mean .83, sd .0608, t(0.975, 2) = 4.303, so +- .151; 80% is first
    reached at steps 10, 20, never. A pause of a minute in one of twelve steps moves no median; the
    ten steps at either end leave out two of twelve."""
    trained = [
        {
            "step": i + 1,
            "success": (i + 1) / 20,
            "seconds_rollout": 60.0 if i == 5 else 1.0 + i % 2,
            "seconds_reward": 2.0 - i % 2,
            "seconds_update": 3.0,
        }
        for i in range(12)
    ]
    seeds = [
        [
            {"step": 0, "heldout": 0.5},
            {"step": 10, "heldout": a},
            {"step": 20, "heldout": b},
            *(trained if b == 0.9 else []),
        ]
        for a, b in ((0.8, 0.9), (0.7, 0.8), (0.1, 0.79))
    ]
    lines = plots.seeds_table({"srpo": seeds}, ["heldout"]).splitlines()
    assert "83.0% +-  15.1%" in lines[0] and "90.0%, 80.0%, 79.0%" in lines[0]
    assert lines[1].strip() == "last three 73.3%, 66.7%, 46.3%; steps to 80%: 10, 20, never"
    assert lines[2].strip() == (
        "sampled 28% -> 38%; median seconds of a step 6.00: rollout 1.50, reward 1.50, update 3.00"
    )
    assert len(lines) == 3
    one = plots.seeds_table({"base": [[{"step": 0, "heldout": 0.5}]]}, ["heldout"]).splitlines()
    assert len(one) == 2 and one[0].split() == ["base", "heldout", "50.0%", "one", "seed"]


def test_seeds_table_of_paper_1():
    rows = [{"step": 0, "heldout_final_accuracy": 0.25, "heldout_tokens": 31.26}]
    keys = ["heldout_final_accuracy", "heldout_tokens"]
    lines = plots.seeds_table({"paper": [rows]}, keys).splitlines()
    assert lines[0].split()[1:3] == ["final_accuracy", "25.0%"]
    assert lines[1].split()[1:3] == ["tokens", "31.3"]


# Reading


def test_read_metrics(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "heldout": 0.5}\n{"step": 1, "success": null}\n')
    assert plots.read_metrics(file) == [
        {"step": 0, "heldout": 0.5},
        {"step": 1, "success": None},
    ]
    file.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "succ\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl line 3 is not JSON .*delete that line"):
        plots.read_metrics(file)
    for row in ("[1]", "3", '{"heldout": 1}', '{"step": "2"}', '{"step": null}', '{"step": 1e999}'):
        file.write_text('{"step": 0}\n' + row + "\n")
        with pytest.raises(ValueError, match="metrics.jsonl line 2 is not a row; delete that line"):
            plots.read_metrics(file)
    for damaged in (b"\xff\xfe\x00", b"[" * 100_000, b'{"step": ' + b"1" * 5000):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="metrics.jsonl line 1 is not JSON") as error:
            plots.read_metrics(file)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        plots.read_metrics("nowhere")


def test_read_runs(tmp_path):
    paths = []
    for name in ("srpo-1", "srpo-0", "plain-grpo-0", "lr-low", "lr-high", "alone"):
        paths.append(tmp_path / name / "metrics.jsonl")
        paths[-1].parent.mkdir()
        paths[-1].write_text(json.dumps({"step": 0, "heldout": 0.5, "name": name}) + "\n")
    runs = plots.read_runs(list(map(str, paths)), "heldout")
    assert {label: [rows[0]["name"] for rows in each] for label, each in runs.items()} == {
        "srpo": ["srpo-1", "srpo-0"],
        "plain-grpo": ["plain-grpo-0"],
        "lr-low": ["lr-low"],
        "lr-high": ["lr-high"],
        "alone": ["alone"],
    }
    with pytest.raises(ValueError, match="has no reward; give the metrics.jsonl of a run with"):
        plots.read_runs([str(paths[0])], "reward")


@pytest.mark.slow
def test_mutations_are_one_line_or_harmless(tmp_path):
    """Sixty damaged files: one line, or a table and curves of what is left; no number that is drawn
    is not one."""
    file, refused = tmp_path / "srpo-0" / "metrics.jsonl", 0
    file.parent.mkdir()
    rows = [{"step": 0, "heldout": 0.5}] + [
        {"step": i, "success": i / 9, "heldout": 0.7, "seconds_update": 1.5, "seconds_reward": 2}
        for i in range(1, 8)
    ]
    good = "".join(json.dumps(row) + "\n" for row in rows).encode()
    odd = [good.replace(b"0.7", x) for x in (b"NaN", b"1e999", b"9" * 400, b'"x"', b"[]", b"{}")]
    odd += [good.replace(b'reward": 2', b'reward": ' + x) for x in (b"null", b'"x"', b"9" * 400)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for damaged in (*odd, *mutations(good, 60, seed=0)):
            file.write_bytes(damaged)
            try:
                runs = plots.read_runs([str(file)], "heldout")
            except ValueError as error:
                assert "\n" not in str(error) and str(file) in str(error)
                refused += 1
            else:
                assert "nan" not in plots.seeds_table(runs, ["heldout"]).partition("sampled")[0]
                plots.draw_curves(runs, tmp_path / "curve.png")
    assert 20 < refused < 60


# Curves


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *out, **how: figures.append(self) or save(self, *out, **how)
    )
    return figures


def test_draw_curves(tmp_path, drawn):
    rng = np.random.default_rng(0)
    seeds = []
    for n in (12, 12, 9):  # the third run is not finished
        rows = [{"step": 0, "heldout": rng.random()}]
        for t in range(1, n + 1):
            rows.append({"step": t, "success": rng.random()})
            if t % 4 == 0:
                rows[-1]["heldout"] = rng.random()
        seeds.append(rows)
    seeds[0][5]["success"] = None  # JSON's NaN
    runs = {"srpo": seeds, "binary": seeds[:1], "empty": [[{"step": 0}]]}
    plots.draw_curves(runs, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and image.width > 800
    (figure,) = drawn
    heldout, success = figure.axes
    line, alone = heldout.lines[:2]
    assert line.get_xdata().tolist() == [0, 4, 8] and alone.get_xdata().tolist() == [0, 4, 8, 12]
    means = [np.mean([rows[t]["heldout"] for rows in seeds]) for t in (0, 4, 8)]
    np.testing.assert_allclose(line.get_ydata(), means)
    steps = [t for t in range(1, 10) if t != 5]
    assert success.lines[0].get_xdata().tolist() == steps
    smooth = []
    for k in range(len(steps)):  # mean of the five steps around, fewer at the ends
        near = steps[max(k - 2, 0) : k + 3]
        smooth.append(np.mean([rows[t]["success"] for rows in seeds for t in near]))
    np.testing.assert_allclose(success.lines[0].get_ydata(), smooth)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["srpo (3 seeds)", "binary (1 seed)"]


def test_draw_reflection_curves(tmp_path, drawn):
    """A panel for each thing that the policy does, and each part of what it is paid."""
    rows = [{f"heldout_{k}": 0.5 for k in plots.REFLECTION} | {"step": t} for t in (0, 1)]
    rows[1] |= {"reward": 1.0} | {f"part_{k}": 0.1 for k in plots.PARTS}
    plots.draw_reflection_curves({"paper": [rows]}, tmp_path / "curves.png")
    (figure,) = drawn
    panels = {panel.get_title(): panel for panel in figure.axes if panel.lines}
    assert len(panels) == len(plots.REFLECTION) + 1 + len(plots.PARTS) == 12
    assert panels["fix rate, held-out, greedy"].get_ylim() == (0, 1.02)
    assert panels["tokens, held-out, greedy"].get_ylim() != (0, 1.02)


def test_no_torch_for_a_table():
    code = (
        "import sys; from plumbing import plots; "
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
