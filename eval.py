"""Every number we report: success rates with intervals, episodes to look at, learning curves.

    python eval.py vla --checkpoint out/srpo/policy                     # success per task, training and held-out initial states
    python eval.py vla --checkpoint out/srpo/policy --split heldout --gifs 2
    python eval.py vla --checkpoint FOLDER_OR_ID --suite libero_object --split all      # LIBERO: 10 tasks x 50 trials
    python eval.py vla --checkpoint FOLDER_OR_ID --suite libero_plus --plus FOLDER      # LIBERO-Plus: a line per dimension
    python eval.py vla --checkpoint out/libero/policy --suite libero_object --videos    # then: python world_model.py --videos .../videos.npz
    python eval.py paper --checkpoint libero_spatial=FOLDER_OR_ID libero_object=FOLDER_OR_ID    # the paper's table, and ours below
    python eval.py curves results/tabletop/*/metrics.jsonl --out results/tabletop/curves.png
    python eval.py curves results/reflection/*/metrics.jsonl --kind reflection --out results/reflection/curves.png
    python eval.py reasoning --model FOLDER_OR_ID --benchmark mathvista --out out/reasoning     # reasoning/benchmarks.py

Policies act greedily, as in the papers' evaluations. Every initial state of a task is played once; 95% intervals are Wilson's.
The papers train and evaluate on the same 50 initial states of LIBERO (`--split all`); here `heldout` states never occur in training.
LIBERO takes hours: finished episodes are written down one by one, and the same command goes on where it was interrupted.
"""
import argparse
import hashlib
import json
import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import replace
from itertools import cycle
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch: idle threads sleep, or they would fight the simulator for cores

import numpy as np
import torch
from tqdm import tqdm

from plumbing import checkpoint as checkpoints
from robots import tabletop as envs
from robots import libero as libero_envs
from robots import libero_files
from robots import policy as policies
from reasoning import benchmarks as reasoning_eval
from robots import rollouts
from robots import openvla as vla

# Success in percent: libero_spatial, _object, _goal, _10 and their mean (arXiv 2511.15605, from notes on the paper; SimpleVLA-RL, RLinf: theirs)
PAPER = {"OpenVLA-OFT, one demonstration a task": (63.6, 54.9, 59.6, 17.3, 48.9), "+ offline SRPO": (92.5, 96.8, 92.0, 88.7, 92.5),
         "+ online SRPO": (98.8, 100.0, 99.4, 98.6, 99.2), "SimpleVLA-RL, GRPO on 0/1 rewards": (98.2, 98.7, 98.8, 91.7, 96.9),
         "RLinf, GRPO, wrist camera, proprioception": (99.4, 99.8, 98.8, 94.0, 98.0)}


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


def evaluate_vla(policy, workers: rollouts.Workers, split: str, key: str, states: int | None = None, suite: rollouts.Suite | None = None,
                 gifs: Path | None = None, log: Path | None = None, videos: list[rollouts.Episode] | None = None) -> dict:
    """The first `states` (default: all) initial states of every task, once each, greedily.

    gifs: folder for the first success and the first failure of each task (LIBERO-Plus: of each suite), in the frames that the policy saw. log:
    a JSONL file begun by `begin_log` that gets a line for each finished episode; those it holds already are not played again. videos: gets the episodes played now, with their images.
    -> {"split", "success": mean, "interval", "episodes", "tasks": {instruction: {"success", "interval", "successes", "episodes",
    "steps", "failed": indices}}}
    """
    suite = suite or rollouts.tabletop()
    starts = {(start.task, start.index): start for start in suite.starts(split, states)}
    seen = {(row["task"], row["index"]): row for row in (read_metrics(log)[1:] if log else [])}
    rows = [row for at, row in seen.items() if at in starts]    # each once, though two runs may have written the log
    starts = [start for at, start in starts.items() if at not in seen]
    bar = tqdm(total=len(rows) + len(starts), initial=len(rows), desc=f"{suite.name} {split}", unit="episode", disable=not log)

    def finished(episode: rollouts.Episode) -> None:
        start, outcome = episode.start, "success" if episode.success else "failure"
        gif = gifs and gifs / f"{suite.labels[start.task].replace(' ', '_') if suite.labels else f'task{start.task}'}-{outcome}.gif"
        if gif and not gif.exists():
            gif.parent.mkdir(parents=True, exist_ok=True)
            envs.save_gif(str(gif), [*episode.images, *framed(episode.images[-1], episode.success)], fps=5)
        rows.append({"task": start.task, "index": start.index, "success": episode.success, "steps": episode.steps})
        if log:
            with open(log, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        if videos is not None:
            videos.append(replace(episode, images=[*episode.images]))
        episode.images.clear(), episode.between.clear()         # 500 episodes of 256 px frames would fill the memory
        bar.update()
    rollouts.play(policies.greedy(policy, key), workers, starts, finished, suite)
    bar.close()
    rows.sort(key=lambda row: (row["task"], row["index"]))
    own: dict[str, list] = {}
    for row in rows:
        own.setdefault((suite.labels or suite.instructions)[row["task"]], []).append(row)
    return {"split": split, **rate(sum(row["success"] for row in rows), len(rows)), "tasks": {
        label: rate(sum(row["success"] for row in each), len(each))
        | {"steps": float(np.mean([row["steps"] for row in each])), "failed": [row["index"] for row in each if not row["success"]]}
        for label, each in own.items()}}


def save_videos(episodes: list[rollouts.Episode], out: Path) -> None:
    """Episodes as `world_model.py --videos` reads them: the frames the policy saw and the last one, padded to the longest."""
    lengths = np.array([len(e.images) for e in episodes])
    videos = np.zeros((len(episodes), lengths.max(), *episodes[0].images[0].shape), np.uint8)
    for video, episode in zip(videos, episodes):
        video[:len(episode.images)] = episode.images
    np.savez_compressed(out, videos=videos, length=lengths, success=np.array([e.success for e in episodes]), task=np.array([e.start.task for e in episodes]))


def rate(successes: int, n: int) -> dict:
    return {"success": successes / n, "interval": wilson(successes, n), "successes": successes, "episodes": n}


def begin_log(log: Path, settings: dict) -> bool:
    """A new log begins with the settings; a last line that was cut off is dropped from one that is there, ValueError if that has other settings.
    -> whether it is new."""
    text = log.read_text() if log.exists() else ""
    whole = text[:text.rfind("\n") + 1] or json.dumps(settings) + "\n"
    try:
        begun = dict(json.loads(whole.split("\n")[0]))
    except (ValueError, TypeError):
        raise ValueError(f"{log} does not begin with an evaluation's settings; delete it, or choose another --out") from None
    if begun != settings:
        other = ", ".join(f"{name} {begun.get(name)!r}, not {settings.get(name)!r}" for name in begun | settings if begun.get(name) != settings.get(name))
        raise ValueError(f"{log} was begun with {other}; repeat that, or choose another --out")
    if whole != text:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(whole)
    return "\n" not in text


def fingerprint(policy) -> str:
    """Of what decides the actions: config, action statistics, tokenizer, and a thousand numbers from all over each tensor, so that seconds suffice
    at 7B."""
    digest = hashlib.sha256(json.dumps([policy.config, policy.norm_stats], sort_keys=True).encode() + getattr(policy, "files", {}).get("tokenizer.json", b""))
    for tensor in policy.state_dict().values():
        digest.update(tensor.flatten()[::max(1, tensor.numel() // 1000)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def table(results: dict[str, dict]) -> str:
    """{column title: result of `evaluate_vla`} -> an aligned text table, a row per task."""
    def cell(r):
        return f"{r['success']:6.1%} [{r['interval'][0]:5.1%}, {r['interval'][1]:5.1%}]"
    first = next(iter(results.values()))
    width = max(map(len, first["tasks"]))
    rows = [f"{'':{width}}  " + "  ".join(f"{title:>23}" for title in results)]
    rows += [f"{task:{width}}  " + "  ".join(f"{cell(r['tasks'][task]):>23}" for r in results.values()) for task in first["tasks"]]
    return "\n".join([*rows, f"{'all tasks':{width}}  " + "  ".join(f"{cell(r):>23}" for r in results.values())])


def film(policy, starts: list[rollouts.Start], key: str, path: Path, size: int = 128) -> None:
    """Play greedily and write one GIF with a coloured border at the end of each episode: green success, red failure."""
    table_, act, frames = envs.Tabletop(size=policies.camera_size(policy)), policies.greedy(policy, key), []
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
        frames += framed(frames[-1], table_.success)
    envs.save_gif(str(path), frames)


def framed(image: np.ndarray, success: bool) -> list[np.ndarray]:
    """The image six times with a green or red border."""
    last = image.copy()
    for edge in (np.s_[:4], np.s_[-4:], np.s_[:, :4], np.s_[:, -4:]):
        last[edge] = (40, 160, 60) if success else (200, 40, 40)
    return [last] * 6


def read_metrics(path: str | Path) -> list[dict]:
    """Rows of a metrics.jsonl; ValueError names a line that is not JSON."""
    rows = []
    try:
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{path} line {number} is not a row; delete that line")
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


def seeds_table(runs: dict[str, list[list[dict]]], keys: list[str], threshold: float = 0.8) -> str:
    """The last value of each key: mean over a label's seeds, its 95% interval (Student's t over seeds) and the seeds' values; then, of each seed, the
    first key's mean over the last three evaluations and the step at which it reached the threshold, and the success of rollouts that sample in the
    first and the last ten steps; then the median seconds of a step and of its parts."""
    from scipy.stats import t as student
    lines, values_of = [], lambda rows, key: [r[key] for r in rows if r.get(key) is not None]
    for label, seeds in runs.items():
        for key in keys:
            values = np.array([(values_of(rows, key) or [math.nan])[-1] for rows in seeds])
            one = (lambda x: f"{x:.1%}") if not key.endswith("tokens") else (lambda x: f"{x:.1f}")
            half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
            lines.append(f"{label:16} {key.removeprefix('heldout_'):16} {one(values.mean()):>7} "
                         + ("one seed" if half is None else f"+- {one(half):>6}   seeds {', '.join(map(one, values))}"))
        reached = [next((str(r["step"]) for r in rows if r.get(keys[0]) is not None and r[keys[0]] >= threshold), "never") for rows in seeds]
        three = [f"{np.mean(values_of(rows, keys[0])[-3:] or math.nan):.1%}" for rows in seeds]
        lines.append(f"{'':16} last three {', '.join(three)}; steps to {threshold:.0%}: {', '.join(reached)}")
        sampled = [f"{np.mean(x[:10]):.0%} -> {np.mean(x[-10:]):.0%}" for rows in seeds if (x := values_of(rows, "success"))]
        trained = np.array([[r[f"seconds_{part}"] for part in ("rollout", "reward", "update")] for rows in seeds for r in rows if "seconds_rollout" in r])
        if len(trained):
            whole, (rollout, reward, update) = np.median(trained.sum(1)), np.median(trained, 0)
            lines.append(f"{'':16} " + f"sampled {', '.join(sampled)}; " * bool(sampled)
                         + f"median seconds of a step {whole:.2f}: rollout {rollout:.2f}, reward {reward:.2f}, update {update:.2f}")
    return "\n".join(lines)


def draw_panels(runs: dict[str, list[list[dict]]], out: str | Path, panels: list[tuple[str, str, int]], columns: int = 2) -> None:
    """Panels (key of a row, title, steps to average over), against the step; a line and a band per label: mean and range of its seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows_of_panels = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows_of_panels, columns, figsize=(max(10, 3.4 * columns), 3.6 if columns == 2 else 2.8 * rows_of_panels), squeeze=False,
                                layout="constrained")
    for color, (label, seeds) in zip(cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"]), runs.items()):
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
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(runs), fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def find_suite(name: str, tasks: list[int] = (), **libero) -> rollouts.Suite:
    """`tabletop` or a suite of LIBERO; for the latter the keywords of `libero_envs.make_suite`."""
    return rollouts.tabletop(tuple(tasks)) if name == "tabletop" else libero_envs.make_suite(name, tuple(tasks), **libero)


def try_suite(suite: rollouts.Suite, size: int) -> None:
    """One reset in this process, so that whatever is wrong with OpenGL or assets is one line, before anything is written."""
    env = suite.make(size=size, horizon=suite.horizon)
    env.reset(options={"task": suite.tasks[0], "index": 0})
    env.close()


def note_training(policy, key: str, fast: bool, splits: list[str]) -> None:
    """A line if the policy was trained on LIBERO's other pixels, or on the states to be held out, as the scripts write into its statistics."""
    if (was := policy.norm_stats[key].get("fast_sim", fast)) != fast:
        print(f"note: this policy was fine-tuned {'with' if was else 'without'} fast pixels (--fast-sim), and sees others now", file=sys.stderr)
    if policy.norm_stats[key].get("split") == "all" and "heldout" in splits:
        print("note: this policy was trained on all 50 initial states; none of them is held out", file=sys.stderr)


def measure_suite(policy, name: str, checkpoint: str, out: Path, args) -> dict[str, dict]:
    """A policy on one suite: prints the table, writes result.json and GIFs into `out` -> {split: result of `evaluate_vla`}."""
    libero, (suite, key), size = name != "tabletop", suite_and_key(name, policy.norm_stats, args), policies.camera_size(policy)
    splits = args.split or (["all"] if "plus" in name else ["heldout"] if libero else ["train", "heldout"])
    note_training(policy, key, args.fast_sim, splits)
    of = key.removesuffix("_no_noops")
    if of in libero_files.SUITES and (others := sorted(set(suite.labels) - {of})):
        print(f"note: this policy was trained on {of}, and plays tasks of {', '.join(others)} too; {':'.join((name, of))} is of its own", file=sys.stderr)
    logs = {split: out / f"{split}.jsonl" if libero else None for split in splits}
    settings = {"checkpoint": checkpoint, "weights": fingerprint(policy), "dtype": str(next(policy.parameters()).dtype), "suite": name, "key": key, "protocol": suite.protocol}
    if "plus" in name:                                          # two clones may list other tasks
        settings["tasks"] = hashlib.sha256(json.dumps([suite.instructions, suite.labels]).encode()).hexdigest()[:12]
    try_suite(suite, size)
    for split, log in logs.items():
        if log and begin_log(log, settings):
            for gif in (out / split).glob("*.gif"):             # of an evaluation whose log is gone
                gif.unlink()
    out.mkdir(parents=True, exist_ok=True)
    workers, results, played = suite.workers(args.workers, size, args.tables), {}, [] if args.videos else None
    try:
        for split, log in logs.items():
            if libero:
                some = f"the first {args.states} of " if args.states < suite.states[split] else ""
                print(f"{name}: {'one trial a task' if 'plus' in name else some + libero_envs.SPLIT_NAMES[split]}; {suite.protocol}")
            results[split] = settings | evaluate_vla(policy, workers, split, key, args.states, suite,
                                                     out / split if libero and args.gifs else None, log, played)
    finally:
        workers.close()
    print(table(results))
    others = {}
    with suppress(OSError, ValueError, AttributeError):         # the other splits of the same evaluation stay
        others = {split: r for split, r in json.loads((out / "result.json").read_text()).items() if settings.items() <= r.items()}
    (out / "result.json").write_text(json.dumps(others | results, indent=1) + "\n")
    for split in splits if args.gifs and not libero else ():
        film(policy, [rollouts.Start(t, i, split) for t in suite.tasks for i in range(args.gifs)], key, out / f"{split}.gif")
    if played:
        save_videos(played, out / "videos.npz")
    elif args.videos:
        print(f"no episode was played now, and no {out}/videos.npz written; delete the log beside it to play them again", file=sys.stderr)
    print(f"wrote {out}/result.json" + (f", {out}/videos.npz" if played else "") + (f" and GIFs in {out}" if args.gifs else ""))
    return results


def load(checkpoint: str, device: str):
    """A policy for evaluation: OpenVLA on a GPU in bf16, as published; TinyVLA in fp32, as it is trained (rounding changes what it does)."""
    device, folder = device or ("cuda" if torch.cuda.is_available() else "cpu"), checkpoints.local_folder(checkpoint)
    half = device.startswith("cuda") and checkpoints.read_json(folder / "config.json").get("model_type") != "tiny_vla"
    return policies.load_policy(folder, torch.bfloat16 if half else torch.float32, device)


def suite_and_key(name: str, norm_stats: dict, args) -> tuple[rollouts.Suite, str]:
    """A suite as the flags make it, and the policy's action statistics for it. ValueError, RuntimeError."""
    suite = find_suite(name, args.tasks, **dict(protocol=args.protocol, horizon=args.horizon, fast=args.fast_sim, hard=args.hard,
                                                assets=args.assets, plus=args.plus) if name != "tabletop" else {})
    if unknown := set(args.split or ()) - set(suite.states):
        raise ValueError(f"--split {unknown.pop()}: {name} has {', '.join(suite.states)}")
    key = args.key or policies.find_key(norm_stats, name.split(":")[-1] if name.count(":") > 1 else name)
    vla.action_stats(norm_stats, key)                           # refuses an unknown key
    return suite, key


def paper_table(ours: dict[str, dict]) -> str:
    """{suite: result of `measure_suite`} -> the paper's rows and ours, percent, the mean only where all four suites are there; and how ours was played."""
    lines = [f"{'success, %':44}" + "".join(f"{name.removeprefix('libero_'):>9}" for name in (*libero_files.SUITES, "mean"))]
    lines += [f"{name:44}" + "".join(f"{x:9.1f}" for x in row) for name, row in PAPER.items()]
    own = [100 * ours[name]["success"] if name in ours else math.nan for name in libero_files.SUITES]
    parts = any(result["episodes"] < 500 for result in ours.values())
    lines.append(f"{'ours' + ', parts of the suites' * parts:44}" + "".join(f"{'-':>9}" if math.isnan(x) else f"{x:9.1f}" for x in (*own, np.mean(own))))
    return "\n".join([*lines, *(f"  {name}: {r['episodes']} of 500 episodes, 95% interval {r['interval'][0]:.1%} to {r['interval'][1]:.1%}; initial states: "
                                f"{r['split']}; {r['protocol']}" for name, r in ours.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a policy, or draw learning curves.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("vla", "success per task and initial state, of one policy"), ("paper", "the paper's LIBERO table, a policy for each suite")):
        p = commands.add_parser(name, help=text)
        if name == "vla":
            p.add_argument("--checkpoint", required=True, help="folder of a policy, or hub id")
            p.add_argument("--suite", nargs="+", default=["tabletop"], help="tabletop, " + ", ".join(libero_files.SUITES) + ", libero_90, "
                           "libero_plus:DIMENSION or libero_plus:DIMENSION:SUITE; libero_plus or libero_plus::SUITE for all seven dimensions")
        else:
            p.add_argument("--checkpoint", required=True, nargs="+", metavar="SUITE=CHECKPOINT", help="as many as you have")
        p.add_argument("--tasks", type=int, nargs="+", default=[], help="task numbers (default: all)")
        p.add_argument("--split", nargs="+", default=["all"] if name == "paper" else None, choices=["train", "heldout", "all"],
                       help="initial states (default: tabletop train and heldout, LIBERO heldout); all: the papers' own protocol")
        p.add_argument("--states", type=int, default=envs.N_STATES, help="initial states per task, 1..50")
        p.add_argument("--gifs", type=int, default=1, help="episodes per task to film; LIBERO: 0 none, else first success and failure")
        p.add_argument("--videos", action="store_true", help="also write videos.npz, the episodes played now, for world_model.py --videos; their frames stay in memory until then")
        p.add_argument("--out", default="", help="folder for result.json and the GIFs (default: beside the checkpoint)")
        p.add_argument("--workers", type=int, default=2, help="simulator processes")
        p.add_argument("--tables", type=int, default=0, help="parallel environments over all processes; 0: tabletop 128, LIBERO one per process")
        p.add_argument("--protocol", default="simplevla" if name == "paper" else "openvla-oft", choices=list(libero_envs.PROTOCOLS),
                       help="LIBERO: whose horizons (default: vla openvla-oft, paper simplevla, as the published codes play)")
        p.add_argument("--horizon", type=int, default=0, help="LIBERO: env steps instead of the protocol's")
        p.add_argument("--hard", action="store_true", help="LIBERO: build the simulator anew at every reset, as the stock environment does")
        p.add_argument("--fast-sim", "--fast_sim", action="store_true", help="LIBERO: other pixels, same physics; only for policies trained so")
        p.add_argument("--assets", default="", help="LIBERO: folder of its assets (default: LIBERO_ASSETS, else from the hub)")
        p.add_argument("--plus", default="", help="folder of a LIBERO-Plus copy (default: LIBERO_PLUS_PATH)")
        p.add_argument("--key", default="", help="of the action statistics (default: the suite's)")
        p.add_argument("--device", default="", help="default: cuda if there is one")
        p.add_argument("--threads", type=int, default=2, help="torch threads; 0: all cores")
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
        keys = ["heldout"] if args.kind == "vla" else ["heldout_final_accuracy", "heldout_first_accuracy", "heldout_tokens"]
        for path in args.metrics:
            runs.setdefault(Path(path).absolute().parent.name.rsplit("-", 1)[0], []).append(read_metrics(path))
            if not any(row.get(keys[0]) is not None for row in read_metrics(path)):
                raise ValueError(f"{path} has no {keys[0]}; give the metrics.jsonl of a run with evaluations, and --kind as the script was")
        (draw_curves if args.kind == "vla" else draw_reflection_curves)(runs, args.out)
        print(seeds_table(runs, keys))
        return print(f"wrote {args.out}")
    if args.command == "reasoning":
        return reasoning_eval.run(args)
    if not 1 <= args.states <= envs.N_STATES:
        raise ValueError(f"--states must be 1..{envs.N_STATES}, got {args.states}")
    for name, least in (("gifs", 0), ("threads", 0), ("horizon", 0), ("tables", 0), ("workers", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    torch.set_num_threads(args.threads or os.cpu_count())
    if args.command == "paper":
        pairs = dict(pair.partition("=")[::2] for pair in args.checkpoint)
        if unknown := [name for name, checkpoint in pairs.items() if name not in libero_files.SUITES or not checkpoint]:
            raise ValueError(f"--checkpoint {unknown[0]}: write SUITE=CHECKPOINT, with SUITE one of {', '.join(libero_files.SUITES)}")
    else:
        names = [n for name in args.suite for n in ([name.replace("libero_plus", f"libero_plus:{d}").replace("::", ":") for d in libero_files.DIMENSIONS]
                                                    if re.match("libero_plus(::|$)", name) else [name])]
        if any("plus" in name for name in names) and not all("plus" in name for name in names):
            raise ValueError("--suite: LIBERO-Plus and LIBERO are two packages of one name; measure them in two runs")
        pairs = dict.fromkeys(names, args.checkpoint)
    for name, checkpoint in pairs.items():                      # whatever is wrong with the last one is said before hours of the first
        suite_and_key(name, checkpoints.action_statistics(checkpoints.local_folder(checkpoint, weights=False)), args)
    loaded, policy, results = None, None, {}
    for name, checkpoint in pairs.items():
        if checkpoint != loaded:
            policy = None                                       # not two of 7B at once
            policy, loaded = load(checkpoint, args.device), checkpoint
        here = Path(checkpoint)                                 # of a run's policy the evaluation is the run's
        beside = here.with_name("eval" if here.name == "policy" else f"eval-{here.name}") if here.is_dir() else Path("out/eval") / here.name
        out = Path(args.out or beside)
        results[name] = measure_suite(policy, name, checkpoint, out if name == "tabletop" else out / name.replace(":", "-"), args)
    ours = {name: next(iter(each.values())) for name, each in results.items()}
    if args.command == "paper":
        print("\n" + paper_table(ours))
    elif len(ours) > 1:
        total = rate(*(sum(result[count] for result in ours.values()) for count in ("successes", "episodes")))
        print("\n" + table({"by suite": {"tasks": ours} | total}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with LIBERO's unfinished episodes")
