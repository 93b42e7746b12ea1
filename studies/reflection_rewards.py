"""What each reward of reflection-aware SRPO does to behaviour: several rewards, several seeds, one
picture and one table.

The cold start runs once per seed; RL with each reward goes on from there. Further flags are
reflection_srpo.py's. What is finished is not done again, and the same command goes on with what was
interrupted.

    python -m studies.reflection_rewards --out results/reflection       # 4 rewards, 3 seeds
"""
import argparse
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

from plumbing.flags import ending, read_command
from plumbing.plots import draw_reflection_curves, read_metrics, values_of

MEASURES = ("first_accuracy", "final_accuracy", "fix_rate", "break_rate", "format_rate", "tokens")
OURS = {"model", "data", "resume", "reward", "seed", "stage"}       # flags that the study sets


def study(s, kinds: list[str], seeds: int) -> int:
    """Runs OUT/REWARD-SEED, OUT/curves.png and the table; returns the exit code, that of the first
    run that did not end well. s: reflection_srpo.Settings."""
    import reflection_srpo
    out, runs = Path(s.out), {}
    for seed in range(seeds):
        for kind in kinds:
            folder, first = out / f"{kind}-{seed}", kind == kinds[0]
            one = replace(s, seed=seed, reward=kind, out=str(folder), stage="all" if first else "rl",
                          model="" if first else str(out / f"{kinds[0]}-{seed}" / "sft"))
            if not finished(folder, one) and (code := reflection_srpo.main(command(folder, one))):
                return code
            runs.setdefault(kind, []).append(read_metrics(folder / "metrics.jsonl"))
    draw_reflection_curves(runs, out / "curves.png")
    print(f"\nheld-out, greedy, after {s.steps} steps: mean of {seeds} seeds\n{'reward':16}"
          + "".join(f"{name.split('_')[0]:>8}" for name in MEASURES))
    for kind, several in runs.items():
        print(f"{kind:16}" + "".join(cell(several, name) for name in MEASURES))
    print(f"wrote {out}/curves.png")
    return 0


def cell(runs: list[list[dict]], name: str) -> str:
    last = [x[0] for rows in runs if (x := values_of(rows[-1:], f"heldout_{name}"))]
    mean = sum(last) / len(last) if last else math.nan
    return f"{mean:8.1f}" if name == "tokens" else f"{mean:8.1%}"


def finished(folder: Path, one) -> bool:
    """Whether this run has ended. ValueError if what stands there was made with other settings."""
    if not (folder / "settings.json").exists():
        return False
    from plumbing.files import read_json
    from reflection_srpo import FREE
    saved = read_json(folder / "settings.json")
    for name, value in asdict(one).items():
        if name not in FREE | {"model", "out"} and saved.get(name) != value:
            raise ValueError(f"{folder} was made with --{name} {saved.get(name)}, not {value}; "
                             "choose another --out")
    return (folder / "after.json").exists()


def command(folder: Path, one) -> list[str]:
    """The command line of a run, or of going on with it."""
    print(f"\n{folder}")
    if any((folder / name).exists() for name in ("checkpoint", "checkpoint.old")):
        return ["--resume", str(folder)]
    values = {name: value for name, value in asdict(one).items() if value not in ("", [])}
    return [word for name, value in values.items() for word in (
        f"--{name}", *map(str, value if isinstance(value, list) else [value]))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rewards", nargs="+",
                        default=["paper", "openrlhf", "outcome", "no_length"])
    more, rest = parser.parse_known_args(argv)

    def work() -> int:
        from reflection_srpo import REWARDS, Settings, check
        if wrong := set(more.rewards) - set(REWARDS):
            raise ValueError(f"--rewards {min(wrong)}: there are {', '.join(REWARDS)}")
        asked = read_command(Settings, rest)
        if wrong := asked.given & OURS:
            raise ValueError(f"a study has no --{min(wrong)}: it runs every reward of --rewards "
                             "with --seeds seeds on the arrows")
        if more.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {more.seeds}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("a study runs as one process; start it without torchrun")
        check(asked.settings)
        return study(asked.settings, more.rewards, more.seeds)
    return ending(work)


if __name__ == "__main__":
    sys.exit(main())
