"""What each reward of reflection-aware SRPO does to behaviour: several rewards, several seeds, one picture and one table.

The cold start runs once per seed; RL with each reward goes on from there. It takes reflection_srpo.py's flags too. What is finished is not
done again, and the same command goes on with what was interrupted.

    python -m studies.reflection_rewards --out results/reflection            # 4 rewards, 3 seeds
"""
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import reflection_srpo      # before numpy: it says how idle threads wait
import numpy as np
from transformers import HfArgumentParser

import eval as evaluation
from plumbing import run as job
from plumbing import plan
from reflection_srpo import FREE, REWARDS, Settings

MEASURES = ("first_accuracy", "final_accuracy", "fix_rate", "break_rate", "format_rate", "tokens")


def study(s: Settings, kinds: list[str], seeds: int) -> int:
    """Runs OUT/REWARD-SEED, OUT/curves.png and the table; returns the exit code, that of the first run that did not end well."""
    out, runs = Path(s.out), {}
    for seed in range(seeds):
        for kind in kinds:
            folder, first = out / f"{kind}-{seed}", kind == kinds[0]
            one = replace(s, seed=seed, reward=kind, out=str(folder), stage="all" if first else "rl",
                          model="" if first else str(out / f"{kinds[0]}-{seed}" / "sft"))
            if any((folder / name).exists() for name in ("checkpoint", "checkpoint.old")):
                saved = job.read_state(folder / "checkpoint")["settings"]
                for name in sorted(set(saved) - FREE - {"model"}):
                    if saved[name] != getattr(one, name, None):
                        raise ValueError(f"{folder} was made with --{name} {saved[name]}, not {getattr(one, name, None)}; choose another --out")
                one = replace(one, resume=str(folder))
            if not (folder / "after.json").exists():
                print(f"\n{folder}")
                if code := reflection_srpo.run(one):
                    return code
            runs.setdefault(kind, []).append(evaluation.read_metrics(folder / "metrics.jsonl"))
    evaluation.draw_reflection_curves(runs, out / "curves.png")
    print(f"\nheld-out, greedy, after {s.steps} steps: mean of {seeds} seeds\n{'reward':12}" + "".join(f"{name.split('_')[0]:>8}" for name in MEASURES))
    for kind, several in runs.items():
        means = [np.mean([x for rows in several if (x := rows[-1][f"heldout_{name}"]) is not None] or [math.nan]) for name in MEASURES]
        print(f"{kind:12}" + "".join(f"{x:8.1%}" for x in means[:-1]) + f"{means[-1]:8.1f}")
    print(f"wrote {out}/curves.png")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = HfArgumentParser(Settings, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rewards", nargs="+", default=["paper", "openrlhf", "outcome", "no_length"], choices=REWARDS)

    def work() -> int:
        s, more, given = job.parse(parser, sys.argv[1:] if argv is None else argv)
        if wrong := given & {"model", "data", "resume", "reward", "seed", "stage"}:
            raise ValueError(f"a study has no --{min(wrong)}: it runs every reward of --rewards with --seeds seeds on the arrows")
        if more.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {more.seeds}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("a study runs as one process; start it without torchrun")
        reflection_srpo.check(s)
        with plan.explained(s):
            return study(s, more.rewards, more.seeds)
    return job.command(work)


if __name__ == "__main__":
    sys.exit(main())
