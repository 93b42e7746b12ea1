"""Where progress rewards pay (arXiv 2511.15605): starts from hardly ever to half successful, few
rollouts a step; plain GRPO beside SRPO under world models that rank failures badly to perfectly
(`studies.progress_curves compare --policy OUT/CASE/start --data OUT/CASE/demos` measures them).

Ours: the demonstrations that the start was fine-tuned on are the first references, since most
batches have no success to measure by; true progress needs none.

    python -m studies.rare_success --out results/rare_success --seeds 8 --jobs 2

What is finished is not done again. Further flags are vla_srpo.py's, of every run.
"""
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np

from plumbing import plots
from studies import runs

OURS = {"stage", "data", "model", "suite", "reward", "world_model", "pool", "references", "resume",
        "seed", "out", "tables", "eval_every"}
COMMON = ["--steps", "100", "--temperature", "1.0", "--temperature_end", "0.7", "--eval_every",
          "20", "--workers", "1", "--threads", "1"]
DEMOS = ["--references", "64", "--data"]        # and a folder
ARMS = {"grpo": ("plain GRPO", ["--reward", "binary"]),
        "vjepa": ("SRPO, V-JEPA", DEMOS),
        "pixels": ("SRPO, mean pixels", ["--world_model", "pixels", *DEMOS]),
        "max": ("SRPO, pixels, max", ["--world_model", "pixels", "--pool", "max", *DEMOS]),
        "oracle": ("SRPO, true progress", ["--world_model", "oracle"])}
# The suite, flags of the start's fine-tuning and of every run, how many seeds of an arm are enough
CASES = {"two_cubes": ("tabletop_long", ["--demos", "6", "--steps", "800"],
                       ["--groups", "12", "--tables", "96"],
                       {"grpo": 8, "pixels": 3, "max": 8, "oracle": 1}),
         "half": ("tabletop", [], ["--groups", "8", "--tables", "64"],
                  {"grpo": 3, "vjepa": 3, "max": 3})}


def compare(vla_srpo, flags: list[str], seeds: int, jobs: int, out: Path) -> str:
    """Every case's start, runs, table, and OUT/CASE.png."""
    texts = []
    for case, (*_, enough) in CASES.items():
        folder = out / case
        every = [(folder / f"{name}-{seed}", command(case, name, seed, flags, out))
                 for seed in range(seeds) for name, most in enough.items() if seed < most]
        todo = [job for job in every if not runs.finished(vla_srpo, *job)]
        if todo and not (folder / "start" / "config.json").exists():
            make_start(case, folder)
        runs.run_all(vla_srpo, [todo], jobs)
        found = {ARMS[name][0]: [plots.read_metrics(folder / f"{name}-{seed}" / "metrics.jsonl")
                                 for seed in range(min(seeds, most))]
                 for name, most in enough.items()}
        plots.draw_curves(found, out / f"{case}.png")
        texts.append(f"{case}\n{table(found)}")
    return "\n\n".join(texts)


def make_start(case: str, folder: Path) -> None:
    """FOLDER/start, fine-tuned on FOLDER/demos."""
    suite, flags, *_ = CASES[case]
    shutil.rmtree(folder / "demos", ignore_errors=True)         # of one that was interrupted
    runs.python(["-m", "studies.demonstrate", "--suite", suite, *flags, "--threads", "1",
                 "--record", str(folder / "demos"), "--out", str(folder / "start")])


def command(case: str, name: str, seed: int, flags: list[str], out: Path) -> list[str]:
    """Arguments of vla_srpo.py for one run."""
    (suite, _, own, _), arm, folder = CASES[case], ARMS[name][1], out / case
    if "--data" in arm:
        arm = [*arm, str(folder / "demos")]
    return [*COMMON, "--suite", suite, *own, *arm, *flags, "--model", str(folder / "start"),
            "--seed", str(seed), "--out", str(folder / f"{name}-{seed}")]


# What came out

def table(found: dict[str, list[list[dict]]]) -> str:
    """What `eval.py curves` says of each arm (title -> the rows of each seed's metrics.jsonl), what
    groups 0/1 rewards can use, an arm's best evaluation, its gain over plain GRPO, seed by seed."""
    used = [[row["groups_used"] / sum(row[f"groups_{kind}"] for kind in (
        "used", "failed", "solved")) for row in rows if "groups_used" in row]
        for rows in found["plain GRPO"]]
    lines = [plots.seeds_table(found, ["heldout"]),
             "groups with both outcomes, plain GRPO, first and last ten steps: " + ", ".join(
                 f"{np.mean(x[:10]):.0%} -> {np.mean(x[-10:]):.0%}" for x in used),
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
