"""What is reported of runs: rates with their intervals, tables over tasks and seeds, curves.

Nothing here knows torch: `eval.py curves` answers at once."""
import json
import math
import re
from pathlib import Path

import numpy as np

REFLECTION = ("first_accuracy", "final_accuracy", "fix_rate", "break_rate", "format_rate", "tokens")
PARTS = ("format", "accuracy", "effectiveness", "reflection", "length")


# Rates

def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a success rate (Wilson, 1927): sensible at 0 and 1 too.

    >>> [round(x, 3) for x in wilson(50, 50)]
    [0.929, 1.0]
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n and n >= 1")
    p, z2 = successes / n, z * z / n
    centre = (p + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def rate(successes: int, n: int) -> dict:
    """A success rate as evaluations report it."""
    return {"success": successes / n, "interval": wilson(successes, n),
            "successes": successes, "episodes": n}


def success_table(results: dict[str, dict]) -> str:
    """{column title: result of `robots.evaluate`} -> an aligned text table, a row per task."""
    def cells(pick) -> str:
        return "  ".join(f"{r['success']:6.1%} [{r['interval'][0]:5.1%}, {r['interval'][1]:5.1%}]"
                         .rjust(23) for r in map(pick, results.values()))
    tasks = next(iter(results.values()))["tasks"]
    width = max(map(len, (*tasks, "all tasks")))
    return "\n".join([f"{'':{width}}  " + "  ".join(f"{title:>23}" for title in results),
                      *(f"{task:{width}}  " + cells(lambda r, task=task: r["tasks"][task])
                        for task in tasks),
                      f"{'all tasks':{width}}  " + cells(lambda r: r)])


# Runs: {label: the runs of several seeds, each the rows of its metrics.jsonl}

def read_metrics(path: str | Path) -> list[dict]:
    """Rows of a metrics.jsonl, each with a step; ValueError names a line that is no such row."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give the metrics.jsonl of a run") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON ({getattr(error, 'msg', error)}); "
                             "delete that line") from None
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            raise ValueError(f"{path} line {number} is not a row; delete that line")
        rows.append(row)
    return rows


def _is_number(x) -> bool:
    """Not null, NaN, infinite, or larger than anything that is measured."""
    return isinstance(x, (int, float)) and abs(x) < 2**63


def read_runs(paths: list[str], key: str) -> dict[str, list[list[dict]]]:
    """Runs by label, in folders named LABEL-NUMBER. ValueError if one has no number `key`."""
    runs: dict[str, list] = {}
    for path in paths:
        rows = read_metrics(path)
        if not values_of(rows, key):
            raise ValueError(f"{path} has no {key}; give the metrics.jsonl of a run with "
                             "evaluations, and --kind as the script was")
        runs.setdefault(re.sub(r"-\d+$", "", Path(path).absolute().parent.name), []).append(rows)
    return runs


def values_of(rows: list[dict], key: str) -> list[float]:
    return [row[key] for row in rows if _is_number(row.get(key))]


def seeds_table(runs: dict[str, list[list[dict]]], keys: list[str]) -> str:
    """The last value of each key: mean over a label's seeds, 95% interval (Student's t), the seeds'
    values; the first key's mean over the last three evaluations and the step at which it reached
    80%; success of the rollouts in the first and last ten steps; seconds of a step."""
    lines = []
    for label, seeds in runs.items():
        lines += [f"{label:16} " + _over_seeds(seeds, key) for key in keys]
        values = [values_of(rows, keys[0]) for rows in seeds]
        three = ", ".join(f"{np.mean(x[-3:] or [math.nan]):.1%}" for x in values)
        reached = ", ".join(next((str(row["step"]) for row in rows if values_of([row], keys[0])
                                  and row[keys[0]] >= 0.8), "never") for rows in seeds)
        lines.append(f"{'':16} last three {three}; steps to 80%: {reached}")
        if any(values_of(rows, "seconds_update") for rows in seeds):
            lines.append(f"{'':16} " + work(seeds))
    return "\n".join(lines)


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean over seeds, half of its 95% interval (Student's t); nan for one seed."""
    from scipy.stats import t as student
    n = len(values)
    half = np.std(values, ddof=1) * student.ppf(0.975, n - 1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def _over_seeds(seeds: list[list[dict]], key: str) -> str:
    values = [(values_of(rows, key) or [math.nan])[-1] for rows in seeds]
    one = "{:.1f}".format if key.endswith("tokens") else "{:.1%}".format
    mean, half = mean_and_half(values)
    spread = f"+- {one(half):>6}   seeds {', '.join(map(one, values))}"
    return (f"{key.removeprefix('heldout_'):16} {one(mean):>7} "
            + (spread if len(values) > 1 else "one seed"))


def work(seeds: list[list[dict]]) -> str:
    """Success of the rollouts in the first and last ten steps; seconds of a step."""
    sampled = [f"{np.mean(x[:10]):.0%} -> {np.mean(x[-10:]):.0%}"
               for rows in seeds if (x := values_of(rows, "success"))]
    laps = ("rollout", "reward", "update")
    seconds = np.array([[x if _is_number(x := row.get(f"seconds_{lap}")) else 0.0 for lap in laps]
                        for rows in seeds for row in rows if "seconds_update" in row])
    parts = ", ".join(f"{lap} {x:.2f}" for lap, x in zip(laps, np.median(seconds, 0)))
    return (f"sampled {', '.join(sampled)}; " * bool(sampled)
            + f"median seconds of a step {np.median(seconds.sum(1)):.2f}: {parts}")


# Curves

def draw_curves(runs: dict[str, list[list[dict]]], out: str | Path) -> None:
    """Held-out and training success to a PNG: mean and range over seeds."""
    draw_panels(runs, out, [("heldout", "success, held-out, greedy", 1),
                            ("success", "success, training rollouts (mean of 5 steps)", 5)])


def draw_reflection_curves(runs: dict[str, list[list[dict]]], out: str | Path) -> None:
    """The same of paper 1: what the policy does, and what each part of the reward pays it."""
    does = [(f"heldout_{k}", f"{k.replace('_', ' ')}, held-out, greedy", 1) for k in REFLECTION]
    pays = [(k, f"{k.replace('_', ' ')}, sampled (mean of 5 steps)", 5)
            for k in ("reward", *(f"part_{name}" for name in PARTS))]
    draw_panels(runs, out, does + pays, columns=6)


def draw_panels(runs: dict[str, list[list[dict]]], out: str | Path,
                panels: list[tuple[str, str, int]], columns: int = 2) -> None:
    """Panels (key of a row, title, steps to average over) against the step; a line and a band for
    each label: mean and range of its seeds."""
    from matplotlib.figure import Figure
    down = math.ceil(len(panels) / columns)
    size = (max(10, 3.4 * columns), 3.6 if columns == 2 else 2.8 * down)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, columns, squeeze=False)
    for panel, (key, title, window) in zip(axes.flat, panels):
        for i, (label, seeds) in enumerate(runs.items()):
            _draw(panel, seeds, key, window, f"C{i}", label)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("RL step")
        panel.grid(alpha=0.3)
        shares = key.startswith("heldout_") and key.endswith(("accuracy", "rate"))
        if shares or key in ("heldout", "success"):
            panel.set_ylim(0, 1.02)
    lines = axes.flat[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=len(runs), fontsize=8)
    figure.savefig(out, dpi=110)


def _draw(panel, seeds: list[list[dict]], key: str, window: int, color, label: str) -> None:
    curves = [{row["step"]: row[key] for row in rows if _is_number(row.get(key))} for rows in seeds]
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        return
    values = np.array([[curve[t] for t in steps] for curve in curves])          # (seeds, steps)
    kernel, ones = np.ones(min(window, len(steps))), np.ones(len(steps))
    values = np.array([np.convolve(v, kernel, "same") / np.convolve(ones, kernel, "same")
                       for v in values])
    panel.plot(steps, values.mean(0), color=color, markersize=3,
               label=f"{label} ({len(seeds)} seed{'s' * (len(seeds) > 1)})",
               marker="o" if window == 1 else None)
    panel.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)


def draw_progress(curves: dict[object, list[tuple]], out: str | Path) -> None:
    """{task: [(success, frames seen, progress)]}: a panel per task; successes are green."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3.6 * len(curves), 3.2), layout="tight")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)
    for (name, rows), panel in zip(curves.items(), panels[0], strict=True):
        for won, frames, r in rows:
            panel.plot(frames, r, color="tab:green" if won else "tab:red", alpha=0.4, linewidth=1)
        wins = sum(won for won, _, _ in rows)
        panel.set(xlabel="frames seen", ylim=(0, 1))
        panel.set_title(f"{str(name):.40}: {wins} successes, {len(rows) - wins} failures",
                        fontsize=7)
    panels[0][0].set_ylabel("progress (green: success)")
    figure.savefig(out, dpi=120)
