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
from dataclasses import asdict
from pathlib import Path

from plumbing.files import read_json
from plumbing.flags import ending, read_command
from plumbing.plots import REFLECTION, draw_reflection_curves, read_metrics, values_of

OURS = {"model", "data", "resume", "reward", "seed", "stage"}       # flags that the study sets


def study(flags: list[str], kinds: list[str], seeds: int) -> int:
    """Runs OUT/REWARD-SEED, OUT/curves.png and the table; returns the exit code, that of the first
    run that did not end well. flags: reflection_srpo.py's, of every run."""
    import reflection_srpo
    s, runs = read_command(reflection_srpo.Settings, flags).settings, {}
    out = Path(s.out)
    for seed in range(seeds):
        tuned = ["--stage", "rl", "--model", str(out / f"{kinds[0]}-{seed}" / "sft")]
        for kind in kinds:
            folder = out / f"{kind}-{seed}"
            argv = [*flags, "--seed", str(seed), "--reward", kind, "--out", str(folder),
                    *(tuned if kind != kinds[0] else [])]
            if not finished(folder, read_command(reflection_srpo.Settings, argv).settings):
                print(f"\n{folder}")
                begun = any((folder / f"checkpoint{old}").exists() for old in ("", ".old"))
                if code := reflection_srpo.main(["--resume", str(folder)] if begun else argv):
                    return code
            runs.setdefault(kind, []).append(read_metrics(folder / "metrics.jsonl"))
    draw_reflection_curves(runs, out / "curves.png")
    print(f"\nheld-out, greedy, after {s.steps} steps: mean of {seeds} seeds\n{'reward':16}"
          + "".join(f"{name.split('_')[0]:>8}" for name in REFLECTION))
    for kind, several in runs.items():
        print(f"{kind:16}" + "".join(cell(several, name) for name in REFLECTION))
    print(f"wrote {out}/curves.png")
    return 0


def cell(runs: list[list[dict]], name: str) -> str:
    last = [x[0] for rows in runs if (x := values_of(rows[-1:], f"heldout_{name}"))]
    mean = sum(last) / len(last) if last else math.nan
    return f"{mean:8.1f}" if name == "tokens" else f"{mean:8.1%}"


def finished(folder: Path, s) -> bool:
    """Whether this run has ended. ValueError if what stands there was made with other settings."""
    from reflection_srpo import FREE
    if not (folder / "settings.json").exists():
        return False
    saved = read_json(folder / "settings.json")
    for name, value in asdict(s).items():
        if name not in FREE | {"model", "out"} and saved.get(name) != value:
            raise ValueError(f"{folder} was made with --{name} {saved.get(name)}, not {value}; "
                             "choose another --out")
    return (folder / "after.json").exists()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rewards", nargs="+",
                        default=["paper", "openrlhf", "outcome", "no_length"])
    more, rest = parser.parse_known_args(argv)

    def work() -> int:
        from reflection_srpo import REWARDS, Settings, check
        asked = read_command(Settings, rest)
        if wrong := set(more.rewards) - set(REWARDS):
            raise ValueError(f"--rewards {min(wrong)}: there are {', '.join(REWARDS)}")
        if wrong := asked.given & OURS:
            raise ValueError(f"a study has no --{min(wrong)}: it runs every reward of --rewards "
                             "with --seeds seeds on the arrows")
        if more.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {more.seeds}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("a study runs as one process; start it without torchrun")
        check(asked.settings)
        return study(rest, more.rewards, more.seeds)
    return ending(work)


if __name__ == "__main__":
    sys.exit(main())
