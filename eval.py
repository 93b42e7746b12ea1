"""Every number we report: success rates with intervals, episodes to look at, learning curves.

    python eval.py vla --checkpoint out/srpo/policy                     # success per task, training and held-out initial states
    python eval.py vla --checkpoint out/srpo/policy --split heldout --gifs 2
    python eval.py curves runs/tabletop/*/metrics.jsonl --out runs/tabletop/curves.png

Policies act greedily, as in the papers' evaluations. Every initial state of a task is played once; 95% intervals are Wilson's.
The papers train and evaluate on the same 50 initial states of LIBERO; here `heldout` states never occur in training.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

import envs
import reasoning_eval
import vla


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a success rate (Wilson, 1927): sensible at 0 and 1 too.

    >>> [round(x, 3) for x in wilson(50, 50)]
    [0.929, 1.0]
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n and n >= 1")
    p, z2 = successes / n, z * z / n
    centre, half = (p + z2 / 2) / (1 + z2), z / (1 + z2) * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def greedy(policy, key: str):
    """act() of `envs.play`: the most likely bin of every token."""
    def act(images, instructions):
        with torch.no_grad():
            bins = policy(*policy.prompt_ids(instructions), policy.pixel_values(images[:, None])).argmax(-1)
        return vla.to_env_actions(policy.decode(bins, key)), [None] * len(bins)
    return act


def evaluate_vla(policy, workers: envs.Workers, split: str, key: str, states: int = envs.N_STATES) -> dict:
    """The first `states` initial states of every task, once each, greedily.

    -> {"split", "success": mean, "interval", "episodes", "tasks": {instruction: {"success", "interval", "successes", "episodes",
    "steps", "failed": indices}}}
    """
    starts = [envs.Start(task, index, split) for task in range(len(envs.TASKS)) for index in range(states)]
    episodes, tasks = envs.play(greedy(policy, key), workers, starts), {}
    for task, instruction in enumerate(envs.TASKS):
        own = [e for e in episodes if e.start.task == task]
        wins = sum(e.success for e in own)
        tasks[instruction] = {"success": wins / len(own), "interval": wilson(wins, len(own)), "successes": wins, "episodes": len(own),
                              "steps": float(np.mean([e.steps for e in own])),
                              "failed": [e.start.index for e in own if not e.success]}
    wins = sum(e.success for e in episodes)
    return {"split": split, "success": wins / len(episodes), "interval": wilson(wins, len(episodes)), "episodes": len(episodes),
            "tasks": tasks}


def table(results: dict[str, dict]) -> str:
    """{column title: result of `evaluate_vla`} -> an aligned text table, a row per task."""
    def cell(r):
        return f"{r['success']:6.1%} [{r['interval'][0]:5.1%}, {r['interval'][1]:5.1%}]"
    first = next(iter(results.values()))
    width = max(map(len, first["tasks"]))
    rows = [f"{'':{width}}  " + "  ".join(f"{title:>23}" for title in results)]
    rows += [f"{task:{width}}  " + "  ".join(f"{cell(r['tasks'][task]):>23}" for r in results.values()) for task in first["tasks"]]
    return "\n".join([*rows, f"{'all tasks':{width}}  " + "  ".join(f"{cell(r):>23}" for r in results.values())])


def film(policy, starts: list[envs.Start], key: str, path: Path, size: int = 128) -> None:
    """Play greedily and write one GIF with a coloured border at the end of each episode: green success, red failure."""
    table_, act, frames = envs.Tabletop(size=policy.config["size"]), greedy(policy, key), []
    for start in starts:
        image, ended = table_.reset(options=vars(start))[0]["image"], False
        while not ended:
            chunk = act(image[None], [table_.instruction])[0][0]
            for action in chunk:
                ended = table_.advance(action)
                if table_.steps % 2 == 0 or ended:
                    frames.append(table_.scene.render(table_.data, size))
                if ended:
                    break
            image = table_.render()
        last = frames[-1].copy()
        for edge in (np.s_[:4], np.s_[-4:], np.s_[:, :4], np.s_[:, -4:]):
            last[edge] = (40, 160, 60) if table_.success else (200, 40, 40)
        frames += [last] * 6
    envs.save_gif(str(path), frames)


def read_metrics(path: str | Path) -> list[dict]:
    """Rows of a metrics.jsonl; ValueError names a line that is not JSON."""
    rows = []
    try:
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            rows.append(json.loads(line))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give the metrics.jsonl of a run") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number} is not JSON ({error.msg}); delete that line") from None
    return rows


def draw_curves(runs: dict[str, list[list[dict]]], out: str | Path) -> None:
    """{label: runs of several seeds, each the rows of a metrics.jsonl} -> PNG: held-out and training success, mean and range."""
    draw_panels(runs, out, [("heldout", "success, held-out, greedy", 1), ("success", "success, training rollouts (mean of 5 steps)", 5)])


def draw_reflection_curves(runs: dict[str, list[list[dict]]], out: str | Path) -> None:
    """The same for reflection_srpo.py: what the policy does, and what each part of the reward pays it."""
    heldout = ("first_accuracy", "final_accuracy", "fix_rate", "break_rate", "format_rate", "tokens")
    parts = ("reward", *(f"part_{name}" for name in ("format", "accuracy", "effectiveness", "reflection", "length")))
    draw_panels(runs, out, [(f"heldout_{k}", f"{k.replace('_', ' ')}, held-out, greedy", 1) for k in heldout]
                + [(k, f"{k.replace('_', ' ')}, sampled (mean of 5 steps)", 5) for k in parts], columns=6)


def draw_panels(runs: dict[str, list[list[dict]]], out: str | Path, panels: list[tuple[str, str, int]], columns: int = 2) -> None:
    """Panels (key of a row, title, steps to average over), against the step; a line and a band per label: mean and range of its seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows_of_panels = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows_of_panels, columns, figsize=(max(10, 3.4 * columns), 3.6 if columns == 2 else 2.8 * rows_of_panels), squeeze=False)
    for color, (label, seeds) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], runs.items()):
        for panel, (key, _, window) in zip(axes.flat, panels):
            curves = [{r["step"]: r[key] for r in rows if r.get(key) is not None} for rows in seeds]
            steps = sorted(set.intersection(*map(set, curves)))
            if not steps:
                continue
            values = np.array([[c[t] for t in steps] for c in curves])              # (seeds, steps)
            kernel = np.ones(min(window, len(steps)))
            values = np.array([np.convolve(v, kernel, "same") / np.convolve(np.ones(len(v)), kernel, "same") for v in values])
            panel.plot(steps, values.mean(0), color=color, label=f"{label} ({len(seeds)} seed{'s' * (len(seeds) > 1)})",
                       marker="o" if window == 1 else None, markersize=3)
            panel.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
    for panel, (key, title, _) in zip(axes.flat, panels):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("RL step")
        panel.grid(alpha=0.3)
        if key in ("heldout", "success") or key.endswith(("accuracy", "rate")) and key.startswith("heldout"):
            panel.set_ylim(0, 1.02)
    for panel in axes.flat[:2 if columns == 2 else 1]:
        if panel.lines:
            panel.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a policy, or draw learning curves.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("vla", help="success per task on training and held-out initial states")
    p.add_argument("--checkpoint", required=True, help="folder of a policy, or hub id")
    p.add_argument("--split", nargs="+", default=["train", "heldout"], choices=["train", "heldout"])
    p.add_argument("--states", type=int, default=envs.N_STATES, help="initial states per task, 1..50")
    p.add_argument("--gifs", type=int, default=1, help="episodes per task to film")
    p.add_argument("--out", default="", help="folder for result.json and the GIFs (default: beside the checkpoint)")
    p.add_argument("--workers", type=int, default=2)
    p = commands.add_parser("curves", help="learning curves; runs in folders named LABEL-SEED are averaged by label")
    p.add_argument("metrics", nargs="+", help="metrics.jsonl files")
    p.add_argument("--out", default="curves.png")
    p.add_argument("--kind", default="vla", choices=["vla", "reflection"], help="which script wrote them")
    reasoning_eval.add_arguments(commands.add_parser("reasoning", help="MathVista, MathVerse, MathVision, MMMU-Pro"))
    for each in (parser, *commands.choices.values()):
        each.error = lambda message: sys.exit(f"error: {message}")
    args = parser.parse_args()
    if args.command == "curves":
        runs: dict[str, list] = {}
        for path in args.metrics:
            runs.setdefault(Path(path).absolute().parent.name.rsplit("-", 1)[0], []).append(read_metrics(path))
        (draw_curves if args.kind == "vla" else draw_reflection_curves)(runs, args.out)
        return print(f"wrote {args.out}")
    if args.command == "reasoning":
        return reasoning_eval.run(args)
    if not 1 <= args.states <= envs.N_STATES:
        raise ValueError(f"--states must be 1..{envs.N_STATES}, got {args.states}")
    policy = vla.load_policy(args.checkpoint)
    key = next(iter(policy.norm_stats))
    out = Path(args.out or Path(args.checkpoint).with_name("eval"))
    out.mkdir(parents=True, exist_ok=True)
    workers = envs.Workers(args.workers, 128)
    try:
        results = {split: evaluate_vla(policy, workers, split, key, args.states) for split in args.split}
    finally:
        workers.close()
    print(table(results))
    (out / "result.json").write_text(json.dumps(results, indent=1) + "\n")
    for split in args.split if args.gifs else ():
        film(policy, [envs.Start(t, i, split) for t in range(len(envs.TASKS)) for i in range(args.gifs)], key, out / f"{split}.gif")
    print(f"wrote {out}/result.json" + (f" and GIFs in {out}" if args.gifs else ""))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
