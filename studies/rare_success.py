"""Where progress rewards pay (arXiv 2511.15605): two cubes to place, a start that hardly ever
succeeds, few rollouts a step. Plain GRPO beside SRPO under world models that rank failures badly to
perfectly (`studies.progress_curves compare --policy OUT/start --data OUT/demos` measures how well).

Ours: the demonstrations that the start was fine-tuned on are the first references, since most
batches have no success to measure by; true progress needs none.

    python -m studies.rare_success --out results/rare_success --seeds 8 --jobs 2

What is finished is not done again. Further flags are vla_srpo.py's, of every run.
"""
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from plumbing import plots
from studies import runs

OURS = {"stage", "data", "model", "suite", "reward", "world_model", "pool", "references", "resume",
        "seed", "out", "tables", "eval_every"}
SUITE = ["--suite", "tabletop_long"]
START = ["--demos", "6", "--steps", "800", "--threads", "1"]
COMMON = [*SUITE, "--steps", "100", "--groups", "12", "--tables", "96", "--temperature", "1.0",
          "--temperature_end", "0.7", "--eval_every", "20", "--workers", "1", "--threads", "1"]
DEMOS = ["--references", "64", "--data"]        # and a folder
# A title, flags, and how many seeds are enough
ARMS = {"grpo": ("plain GRPO", ["--reward", "binary"], 8),
        "pixels": ("SRPO, mean pixels", ["--world_model", "pixels", *DEMOS], 3),
        "max": ("SRPO, pixels, max", ["--world_model", "pixels", "--pool", "max", *DEMOS], 8),
        "oracle": ("SRPO, true progress", ["--world_model", "oracle"], 1)}


def compare(vla_srpo, flags: list[str], seeds: int, jobs: int, out: Path) -> str:
    """The start, all runs, their table, and OUT/curves.png."""
    every = [(out / f"{name}-{seed}", command(name, seed, flags, out)) for seed in range(seeds)
             for name, (_, _, enough) in ARMS.items() if seed < enough]
    todo = [job for job in every if not runs.finished(vla_srpo, *job)]
    if todo and not (out / "start" / "config.json").exists():
        shutil.rmtree(out / "demos", ignore_errors=True)        # of one that was interrupted
        subprocess.run([sys.executable, "-m", "studies.demonstrate", *SUITE, *START, "--record",
                        str((out / "demos").resolve()), "--out", str((out / "start").resolve())],
                       check=True, cwd=runs.ROOT)
    runs.run_all(vla_srpo, [todo], jobs)
    found = {title: [plots.read_metrics(out / f"{name}-{seed}" / "metrics.jsonl")
                     for seed in range(min(seeds, enough))]
             for name, (title, _, enough) in ARMS.items()}
    plots.draw_curves(found, out / "curves.png")
    return table(found)


def command(name: str, seed: int, flags: list[str], out: Path) -> list[str]:
    """Arguments of vla_srpo.py for one run."""
    own = ARMS[name][1]
    if "--data" in own:
        own = [*own, str(out / "demos")]
    return [*COMMON, *own, *flags, "--model", str(out / "start"), "--seed", str(seed), "--out",
            str(out / f"{name}-{seed}")]


# What came out

def table(found: dict[str, list[list[dict]]]) -> str:
    """What `eval.py curves` says of each arm (title -> the rows of each seed's metrics.jsonl), its
    best evaluation, and how it compares with plain GRPO, seed by seed."""
    lines = [plots.seeds_table(found, ["heldout"]),
             "best evaluation; last one less plain GRPO's; steps to plain GRPO's best mean, as a "
             "share of its own (95% bootstrap over seeds)"]
    heldout = {title: np.array([plots.values_of(rows, "heldout") for rows in seeds])
               for title, seeds in found.items()}                       # (seeds, evaluations)
    grpo = heldout["plain GRPO"]
    steps = plots.values_of([row for row in found["plain GRPO"][0] if "heldout" in row], "step")
    for title, curves in heldout.items():
        cells = [runs.mean_and_half(list(values)) for values in (
            curves.max(1), curves[:, -1] - grpo[:len(curves), -1])]
        lines.append(f"{title:24}" + "".join(f"{mean:8.1%} +-{half:5.1%}" for mean, half in cells)
                     + "  {:.2f} [{:.2f}, {:.2f}]".format(*share_of_steps(curves, grpo, steps)))
    return "\n".join(lines)


def share_of_steps(curves: np.ndarray, grpo: np.ndarray, steps: list[int]) -> tuple[float, ...]:
    """Steps that the mean of curves (S, E) needs for the best mean of plain GRPO, as a share of
    those that it needs itself, and the 95% interval over resampled pairs of seeds; inf: never."""
    def share(seeds: np.ndarray) -> float:
        ours, theirs = curves[seeds].mean(0), grpo[seeds].mean(0)
        level = theirs.max()
        return crossing(ours, steps, level) / (crossing(theirs, steps, level) or steps[-1])

    n, rng = len(curves), np.random.default_rng(0)
    many = [share(rng.integers(n, size=n)) for _ in range(2000)]
    return share(np.arange(n)), *np.quantile(many, (0.025, 0.975), method="nearest")


def crossing(curve: np.ndarray, steps: list[int], level: float) -> float:
    """The step at which the line through the evaluations first reaches a level; inf: never."""
    above = np.flatnonzero(curve >= level)
    if not len(above):
        return np.inf
    i = above[0]
    return float(np.interp(level, curve[max(i - 1, 0):i + 1], steps[max(i - 1, 0):i + 1]))


main = partial(runs.study, "out/rare_success", "vla_srpo", OURS, compare, __doc__)
if __name__ == "__main__":
    sys.exit(main())
