"""Where progress rewards pay (arXiv 2511.15605): starts from hardly ever to half successful, few
rollouts a step; plain GRPO beside SRPO under world models that rank failures badly to perfectly.

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
DEMOS, PIXELS = ["--references", "64", "--data"], ["--world_model", "pixels"]   # data: a folder
# A title, flags, and in the law the world model's name in `studies.progress_curves compare`
ARMS = {"grpo": ("plain GRPO", ["--reward", "binary"], ""),
        "grpo_nostd": ("plain GRPO, no std", ["--reward", "binary", "--no_std_scale"], ""),
        "vjepa": ("SRPO, V-JEPA", DEMOS, "trained"),
        "vjepa_nostd": ("SRPO, V-JEPA, no std", ["--no_std_scale", *DEMOS], ""),
        "pixels": ("SRPO, mean pixels", [*PIXELS, *DEMOS], "pixels"),
        "max": ("SRPO, pixels, max", [*PIXELS, "--pool", "max", *DEMOS], "pixels, max"),
        "oracle": ("SRPO, true progress", ["--world_model", "oracle"], "true progress")}
SMALL, SEEDS = ["--groups", "8", "--tables", "64"], dict(grpo=5, vjepa=5, pixels=2, max=2, oracle=2)
# The suite, flags of the start's fine-tuning and of every run, how many seeds of an arm are enough
CASES = {"two_cubes": ("tabletop_long", ["--demos", "6", "--steps", "800"],
                       ["--groups", "12", "--tables", "96"], SEEDS | dict(
                           grpo=8, grpo_nostd=2, vjepa_nostd=8, pixels=3, max=8, oracle=8)),
         "weak": ("tabletop", ["--demos", "1", "--steps", "170"], SMALL, SEEDS | dict(
             grpo_nostd=5, vjepa_nostd=5, pixels=3, max=3, oracle=3)),
         "third": ("tabletop", ["--demos", "1", "--steps", "220"], SMALL, SEEDS),
         "half": ("tabletop", [], SMALL, SEEDS | {"vjepa_nostd": 3})}


def compare(vla_srpo, flags: list[str], seeds: int, jobs: int, out: Path) -> str:
    """Every case's start, runs, table, and OUT/CASE.png; what they say together."""
    texts, cases = [], {}
    for case, (*_, enough) in CASES.items():
        folder = out / case
        every = [(folder / f"{name}-{seed}", command(case, name, seed, flags, out))
                 for seed in range(seeds) for name, most in enough.items() if seed < most]
        todo = [job for job in every if not runs.finished(vla_srpo, *job)]
        if todo and not (folder / "start" / "config.json").exists():
            make_start(case, folder)
        runs.run_all(vla_srpo, [todo], jobs)
        cases[case] = found = {
            ARMS[name][0]: [plots.read_metrics(folder / f"{name}-{seed}" / "metrics.jsonl")
                            for seed in range(min(seeds, most))] for name, most in enough.items()}
        plots.draw_curves(found, out / f"{case}.png")
        texts.append(f"{case}\n{table(found)}")
    return "\n\n".join([*texts, law(cases, out)])


def make_start(case: str, folder: Path) -> None:
    """FOLDER/start, fine-tuned on FOLDER/demos."""
    suite, flags, *_ = CASES[case]
    for old in (folder / "demos", *folder.glob("ranking-*.txt")):           # of another start
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
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
    """What `eval.py curves` says of each arm (title -> the rows of each seed's metrics.jsonl), its
    best evaluation, its gain over plain GRPO, seed by seed."""
    lines = [plots.seeds_table(found, ["heldout"]),
             "best evaluation; last one less plain GRPO's; steps to plain GRPO's best mean, as a "
             "share of its own (95% bootstrap over seeds)"]
    heldout, steps = evaluations(found)
    grpo = heldout["plain GRPO"]
    for title, curves in heldout.items():
        cells = [runs.mean_and_half(list(values)) for values in (
            curves.max(1), curves[:, -1] - grpo[:len(curves), -1])]
        lines.append(f"{title:24}" + "".join(f"{mean:8.1%} +-{half:5.1%}" for mean, half in cells)
                     + "  {:.2f} [{:.2f}, {:.2f}]".format(*share_of_steps(curves, grpo, steps)))
    return "\n".join(lines)


def evaluations(found: dict) -> tuple[dict[str, np.ndarray], list[int]]:
    """Held-out success (seeds, evaluations) by title, and the steps of the evaluations."""
    return ({title: np.array([plots.values_of(rows, "heldout") for rows in seeds])
             for title, seeds in found.items()},
            plots.values_of([row for row in found["plain GRPO"][0] if "heldout" in row], "step"))


def law(cases: dict[str, dict], out: Path) -> str:
    """How an encoder ranks the failures of a start, beside what SRPO by it ends above plain GRPO: a
    line each, and OUT/law.png. Three rankings are measured once: OUT/CASE/ranking-*.txt."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panel, lines = figure.subplots(), [
        "within: rank correlation with true progress, at the start; gain: over plain GRPO's last"]
    for case, found in cases.items():
        ranks = []
        for seed in range(3):
            if not (file := out / case / f"ranking-{seed}.txt").exists():
                file.write_text(runs.python([
                    "-m", "studies.progress_curves", "compare", "--suite", CASES[case][0],
                    "--policy", str(out / case / "start"), "--data", str(out / case / "demos"),
                    "--seed", str(seed)]))
            ranks.append({x[:15].strip(): x[15:].split() for x in file.read_text().splitlines()})
        last = {title: curves[:, -1] for title, curves in evaluations(found)[0].items()}
        points = [(float(np.mean([float(rank[name][1]) for rank in ranks])),
                   float(np.mean(last[title] - last["plain GRPO"][:len(last[title])])), title)
                  for title, _, name in ARMS.values() if name and title in found]
        contrast = np.mean([row["groups_used"] / sum(row[f"groups_{x}"] for x in (      # at first
            "used", "failed", "solved")) for rows in found["plain GRPO"] for row in rows[1:11]])
        lines += [f"{case}, {contrast:3.0%} of groups with both outcomes  {title:20} within {x:.3f}"
                  f"  gain {y:+6.1%}  {runs.counted(len(last[title]))}" for x, y, title in points]
        panel.plot(*zip(*sorted((x, y) for x, y, _ in points)), "o-",
                   label=f"{case}: {contrast:.0%} of groups with both outcomes")
    panel.axhline(0, color="black", linewidth=0.5)
    panel.set(xlabel="rank correlation with true progress", ylabel="success less plain GRPO's")
    panel.legend(fontsize=8)
    figure.savefig(out / "law.png", dpi=100)
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
    if not (above := curve >= level).any():
        return np.inf
    i = above.argmax()
    return float(np.interp(level, curve[max(i - 1, 0):i + 1], steps[max(i - 1, 0):i + 1]))


main = partial(runs.study, "out/rare_success", "vla_srpo", OURS, compare, __doc__)
if __name__ == "__main__":
    sys.exit(main())
