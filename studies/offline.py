"""What learning offline makes of logged trajectories, by what they are weighted with (arXiv
2511.15605, eq. 15; robots/offline.py).

1. Three policies of the tabletop, weak, middling and good, play the training initial states, their
   actions sampled; each trajectory becomes a file.
2. From the middling policy: behaviour cloning of all, of successes alone, weights of progress, of
   success alone, LeRobot's RA-BC; on the trajectories of all three, and on those of each alone.
3. Held-out success, mean over seeds. Further flags are vla_srpo.py's, of every run.

    python -m studies.offline --out out/offline --seeds 5 --jobs 2
"""
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

from plumbing.files import read_json
from robots.trajectories import save_episode
from studies import runs
from studies.progress_curves import policy_rollouts

OURS = {"stage", "data", "weights", "curves", "model", "resume", "seed", "out", "eval_every"}
WEIGHTS = {         # a row of the table: its title, flags
    "all": ("behaviour cloning, all", ["--weights", "all"]),
    "successes": ("behaviour cloning, successes", ["--weights", "successes"]),
    "outcome": ("AWR, success", ["--weights", "outcome"]),
    "progress": ("AWR, progress", ["--weights", "progress"]),
    "progress_paper": ("AWR, progress, paper's curves", ["--curves", "paper"]),
    "progress_pixels": ("AWR, progress of mean pixels", ["--world_model", "pixels"]),
    "rabc": ("RA-BC weights", ["--weights", "rabc"])}
# Who plays, as flags of studies.demonstrate; the middling one is shipped
POLICIES = {"weak": ["--demos", "1", "--steps", "220"], "middling": [],
            "good": ["--demos", "25", "--steps", "2000"]}
DATA = {"all three": "", "middling": "middling", "weak": "weak", "good": "good"}  # in OUT/data
ROLLOUTS = 40           # of each policy and task


def compare(vla_srpo, flags: list[str], seeds: int, jobs: int, out: Path) -> str:
    """Trajectories, sampled at temperature 1 and written as files, all runs, their table."""
    from robots.tabletop import TASKS
    todo = []
    for (data, folder), seed, name in product(DATA.items(), range(seeds), WEIGHTS):
        here = run_folder(out, data, name, seed)
        argv = ["offline", "--steps", "6", "--eval_every", "0", *WEIGHTS[name][1], *flags, "--data",
                str(out / "data" / folder), "--seed", str(seed), "--threads", "1",
                "--workers", "1", "--out", str(here)]
        if not runs.finished(vla_srpo, here, argv):
            todo.append((here, argv))
    for number, (name, how) in enumerate(POLICIES.items() if todo else ()):
        folder, policy = out / "data" / name, vla_srpo.WEIGHTS / "tiny_vla"
        if how and not ((policy := out / name / "policy") / "config.json").exists():
            subprocess.run([sys.executable, "-m", "studies.demonstrate", *how, "--threads", "1",
                            "--out", str(policy.resolve())], check=True, cwd=runs.ROOT)
        if len(list(folder.glob("*.npz"))) < 4 * ROLLOUTS:
            for i, e in enumerate(policy_rollouts(policy, "tabletop", ROLLOUTS, 1, number)):
                save_episode(folder / f"{i:04d}.npz", e, TASKS["tabletop"][e.start.task])
    runs.run_all(vla_srpo, [todo], jobs)
    return table(out, seeds)


def run_folder(out: Path, data: str, name: str, seed: int) -> Path:
    return out / f"{data.replace(' ', '_')}-{name}-{seed}"


def table(out: Path, seeds: int) -> str:
    """A row per weight, a column per data set."""
    before = read_json(run_folder(out, "all three", "all", 0) / "before.json")["success"]
    lines = [f"held-out success of the middling policy, {before:.1%} before; mean of "
             f"{runs.counted(seeds)} and its 95% interval", f"{'':30}" + "".join(
                 f"{name:>17}" for name in DATA)]
    found = {(data, name): [read_json(run_folder(out, data, name, seed) / "after.json")["success"]
                            for seed in range(seeds)] for data in DATA for name in WEIGHTS}
    for name, (title, _) in WEIGHTS.items():
        cells = [runs.mean_and_half(found[data, name]) for data in DATA]
        lines.append(f"{title:30}" + "".join(
            f"{mean:9.1%}" + (f" +-{half:5.1%}" if seeds > 1 else " " * 8) for mean, half in cells))
    lines += [runs.paired(f"{data}, {name} - {other}", found[data, name], found[data, other])
              for data in DATA for name in ("progress", "rabc")
              for other in ("successes", "all") if {name, other} <= WEIGHTS.keys()]
    return "\n".join(lines)


main = partial(runs.study, "out/offline", "vla_srpo", OURS, compare, __doc__)
if __name__ == "__main__":
    sys.exit(main())
