"""What reflection adds, and what each reward pays for: the ablation table of reflection-aware SRPO
(arXiv 2506.01713) in miniature, plain GRPO included.

Every seed has a base, which knows the formats and guesses; fine-tuned on the same teacher's
responses it becomes two more starts, without reflections and with them; RL goes on from all three.
All run under one token budget. What is finished is not done again, and the same command goes on
with what was interrupted. Further flags are reflection_srpo.py's, of every run.

    python -m studies.reflection_ablation --out results/reflection_ablation --seeds 5 --jobs 2
    python -m studies.reflection_ablation --out results/reflection_text --data arrows_text
"""
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from plumbing.files import read_json
from plumbing.flags import read_command
from plumbing.plots import read_metrics, values_of
from studies import runs

OURS = {"model", "resume", "reward", "seed", "stage", "format", "target", "out"}
# Folders NAME-SEED: where a run starts, and its own flags
SHORT = ["--sft_rows", "1920", "--sft_epochs", "4", "--sft_lr", "2e-3"]
STARTS = {"base": ("", ["--target", "base", "--sft_rows", "9600", "--sft_epochs", "4"]),
          "plain_sft": ("base", [*SHORT, "--format", "plain"]),
          "reflection_sft": ("base", SHORT)}
PLAIN = ["--format", "plain", "--reward", "task"]
# The same of RL, after what the table says: a title, the paper's mean of five benchmarks
RUNS = {
    "grpo": ("GRPO", 49.8, "base", PLAIN),
    "grpo_twice": ("GRPO, two attempts", 50.3, "base", ["--format", "twice", "--reward", "task"]),
    "srpo_no_sft": ("SRPO without SFT", 51.2, "base", []),
    "plain_sft_grpo": ("plain SFT + GRPO", 51.4, "plain_sft", PLAIN),
    "no_I_eff": ("SRPO without I_eff", 52.0, "reflection_sft", ["--reward", "no_effectiveness"]),
    "no_I_ref": ("SRPO without I_ref", None, "reflection_sft", ["--reward", "no_reflection"]),
    "no_f_len": ("SRPO without f_len", 53.1, "reflection_sft", ["--reward", "no_length"]),
    "alpha_0.05": ("SRPO, alpha 0.05", None, "reflection_sft", ["--alpha", "0.05"]),
    "alpha_0.3": ("SRPO, alpha 0.3", None, "reflection_sft", ["--alpha", "0.3"]),
    "srpo": ("SRPO, alpha 0.1", 53.5, "reflection_sft", []),
    "outcome": ("reflection SFT + 0/1 reward", None, "reflection_sft", ["--reward", "outcome"]),
    "openrlhf": ("reflection SFT + openrlhf code's", None, "reflection_sft",
                 ["--reward", "openrlhf"])}
# The table's rows: title, run, which of its evaluations, the paper's mean
TABLE = (("base, asked for one attempt", "grpo", "before", 44.4),
         ("plain SFT, same teacher", "plain_sft_grpo", "before", 45.3),
         ("reflection SFT", "srpo", "before", 46.6),
         *((title, name, "after", paper) for name, (title, paper, *_) in RUNS.items()))
PAIRS = (("srpo", "grpo"), ("srpo", "srpo_no_sft"), ("srpo", "no_I_eff"), ("srpo", "no_f_len"),
         ("srpo", "plain_sft_grpo"), ("outcome", "srpo"), ("outcome", "plain_sft_grpo"))


def command(name: str, seed: int, flags: list[str], out: Path) -> list[str]:
    """Arguments of reflection_srpo.py for one run."""
    *_, start, own = (STARTS | RUNS)[name]
    model = ["--model", str(out / f"{start}-{seed}" / "policy")] if start else []
    return ["rl" if name in RUNS else "sft", *own, *flags, *model, "--seed", str(seed),
            "--threads", "1", "--out", str(out / f"{name}-{seed}")]


def ablation(reflection_srpo, flags: list[str], seeds: int, jobs: int, out: Path) -> str:
    """All runs, their table, and OUT/picture.png."""
    s = read_command(reflection_srpo.Settings, flags).settings
    if s.data not in reflection_srpo.ARROWS:
        raise ValueError(f"--data {s.data}: the study has {' and '.join(reflection_srpo.ARROWS)}")
    reflection_srpo.check(s)

    def left(names: Iterable[str], seeds: Iterable[int]) -> list[tuple[Path, list[str]]]:
        jobs = [(out / f"{name}-{seed}", command(name, seed, flags, out))
                for seed in seeds for name in names]
        return [job for job in jobs if not runs.finished(
            reflection_srpo, *job, "" if job[1][0] == "rl" else "policy")]
    needed = [seed for seed in range(seeds) if left(RUNS, [seed])]      # whose starts are, too
    runs.run_all(reflection_srpo, [left(["base"], needed), left(["plain_sft", "reflection_sft"],
                                                                needed), left(RUNS, needed)], jobs)
    draw(out, seeds)
    return table(out, seeds)


# What came out

def results(out: Path, name: str, when: str, seeds: int) -> list[dict]:
    """An evaluation of each seed's run, with the seconds of its RL steps."""
    found = []
    for seed in range(seeds):
        folder = out / f"{name}-{seed}"
        rows = read_metrics(folder / "metrics.jsonl") if when == "after" else []
        seconds = sum(x for row in rows for key, x in row.items() if key.startswith("seconds_"))
        found.append(read_json(folder / f"{when}.json") | {"seconds": seconds})
    return found


def table(out: Path, seeds: int) -> str:
    """A row per setting; `gain` is the final accuracy less the base's, ours and the paper's."""
    base = np.mean([x["final_accuracy"] for x in results(out, "grpo", "before", seeds)])
    lines = [f"held-out, greedy, mean of {runs.counted(seeds)}; +- is its 95% interval; gain: "
             "points over the base; seconds: of the RL steps",
             f"{'':33}{'final':>15}{'first':>7}{'fixes':>7}{'breaks':>8}{'tokens':>8}{'seconds':>9}"
             f"{'gain':>7}{'paper':>8}{'gain':>6}"]
    for title, name, when, paper in TABLE:
        found = results(out, name, when, seeds)
        final, half = runs.mean_and_half([x["final_accuracy"] for x in found])
        first, tokens, seconds = (np.mean([x[key] for x in found])
                                  for key in ("first_accuracy", "tokens", "seconds"))
        two = name not in ("grpo", "plain_sft_grpo")
        fixes, breaks = (f"{np.mean(x):.0%}" if two and (x := values_of(found, key)) else "-"
                         for key in ("fix_rate", "break_rate"))
        theirs = f"{paper:8.1f}{paper - TABLE[0][3]:+6.1f}" if paper else f"{'-':>8}"
        spread = f" +-{half:5.1%}" if seeds > 1 else ""
        lines.append(f"{title:33}{final:7.1%}{spread:8}{first:7.1%}{fixes:>7}{breaks:>8}"
                     f"{tokens:8.1f}{seconds:9.0f}{100 * (final - base):+7.1f}{theirs}")
    final = {name: [x["final_accuracy"] for x in results(out, name, "after", seeds)]
             for _, name, _, _ in TABLE}
    lines += [runs.paired(f"final answers, {a} - {b}", final[a], final[b])
              for a, b in PAIRS if {a, b} <= final.keys()]
    return "\n".join(lines)


def draw(out: Path, seeds: int) -> None:
    """Left: final accuracy of every row. Right: the first answer under each reward, by step."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    for y, (_, name, when, _) in enumerate(reversed(TABLE)):
        values = [x["final_accuracy"] for x in results(out, name, when, seeds)]
        mean, half = runs.mean_and_half(values)
        color = "tab:gray" if when == "before" else "tab:orange" if "grpo" in name else "tab:blue"
        left.errorbar(mean, y, xerr=half, fmt="o", color=color, capsize=3)
        left.plot(values, [y] * len(values), "|", color=color, alpha=0.5)
    left.set_yticks(range(len(TABLE)), [row[0] for row in reversed(TABLE)], fontsize=9)
    left.set_title(f"final answer right, held-out, {runs.counted(seeds)}", fontsize=10)
    left.set_xlim(0, 1)
    left.grid(axis="x", alpha=0.3)
    for name, color in (("srpo", "tab:blue"), ("openrlhf", "tab:red"), ("outcome", "tab:green")):
        for key, style in (("first", "--"), ("final", "-")):
            curves = [{row["step"]: row[f"heldout_{key}_accuracy"]
                       for row in read_metrics(out / f"{name}-{seed}" / "metrics.jsonl")
                       if f"heldout_{key}_accuracy" in row} for seed in range(seeds)]
            steps = sorted(set.intersection(*map(set, curves)))
            values = np.array([[curve[step] for step in steps] for curve in curves])
            right.plot(steps, values.mean(0), style, color=color, label=f"{name}: {key} answer")
            right.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.1)
    right.set_title("what each reward makes of two answers", fontsize=10)
    right.set_xlabel("RL step")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(out / "picture.png", dpi=80)
    print(f"wrote {out}/picture.png")


main = partial(runs.study, "out/reflection_ablation", "reflection_srpo", OURS, ablation, __doc__)
if __name__ == "__main__":
    sys.exit(main())
