"""Every number we report: success rates with intervals, episodes to look at, curves.

    python eval.py vla --checkpoint out/srpo/policy     # per task, train and held-out
    python eval.py vla --checkpoint FOLDER_OR_ID --suite libero_object --split all
    python eval.py vla --checkpoint FOLDER_OR_ID --suite libero_plus --plus FOLDER
    python eval.py paper --checkpoint libero_spatial=FOLDER_OR_ID libero_10=FOLDER_OR_ID
    python eval.py reasoning --model FOLDER_OR_ID --benchmark mathvista --out out/mv
    python eval.py curves results/tabletop/*/metrics.jsonl --out curves.png
    python eval.py curves results/reflection/*/metrics.jsonl --kind reflection

Policies act greedily, as in the papers. Every initial state of a task is played once;
95% intervals are Wilson's. The published codes train and evaluate on the same 50
initial states of LIBERO (`--split all`); here `heldout` states never occur in training.
LIBERO takes hours: episodes are written down one by one, and the same command goes on.
"""
import hashlib
import json
import math
import re
import sys
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from plumbing import plots
from plumbing.flags import Parser, add_flags, ending, flag, require
from robots.flags import SuiteSettings, check_suite

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
# Success in percent on SUITES and their mean (arXiv 2511.15605; the last two: theirs)
PAPER = {"OpenVLA-OFT, one demonstration a task": (63.6, 54.9, 59.6, 17.3, 48.9),
         "+ offline SRPO": (92.5, 96.8, 92.0, 88.7, 92.5),
         "+ online SRPO": (98.8, 100.0, 99.4, 98.6, 99.2),
         "SimpleVLA-RL, GRPO on 0/1 rewards": (98.2, 98.7, 98.8, 91.7, 96.9),
         "RLinf, GRPO, one image": (99.4, 99.8, 98.8, 94.0, 98.0)}


@dataclass
class Played(SuiteSettings):
    """What `vla` and `paper` can be told."""
    checkpoint: list[str] = flag([], "vla: folder of a policy, or hub id; paper: "
                                     "SUITE=CHECKPOINT, as many as you have")
    suite: list[str] = flag(["tabletop"], "tabletop, a suite of LIBERO, or libero_plus:"
                            "DIMENSION[:SUITE]; libero_plus[::SUITE]: all dimensions")
    split: list[str] = flag([], "train, heldout or all (the suite's own)")
    states: int = flag(50, "initial states per task, 1..50")
    gifs: int = flag(1, "episodes per task to film; LIBERO: 0 none, else first success "
                        "and failure")
    record: str = flag("", "folder for the episodes played now, to learn from offline "
                           "(docs/offline.md) or draw their progress")
    out: str = flag("", "folder for result.json and GIFs (beside the checkpoint)")
    plus: str = flag("", "folder of a LIBERO-Plus copy (LIBERO_PLUS_PATH)")
    key: str = flag("", "of the action statistics (the suite's)")
    device: str = flag("", "cuda or cpu (cuda if there is one)")
    threads: int = flag(2, "torch threads; 0: all cores")


def measure(policy, name: str, checkpoint: str, out: Path, s: Played) -> dict:
    """A policy on one suite: prints the table, writes result.json and GIFs into `out`
    -> {split: result of `robots.evaluate`}."""
    from plumbing.files import Journal, read_json, write_json
    from robots import evaluate
    suite, key = suite_and_key(name, policy.norm_stats, s)
    splits = s.split or list(suite.evaluated)
    evaluate.note_training(policy, key, s.fast_sim, splits)
    listed = json.dumps([suite.instructions, suite.labels]).encode()
    settings = {"checkpoint": checkpoint, "weights": evaluate.fingerprint(policy),
                "dtype": str(next(policy.parameters()).dtype), "suite": name,
                "key": key, "protocol": suite.protocol,
                "tasks": hashlib.sha256(listed).hexdigest()[:12]}
    evaluate.try_suite(suite, splits[0], policy.camera)
    out.mkdir(parents=True, exist_ok=True)
    journals = {split: Journal(out / f"{split}.jsonl", settings, evaluate.is_row)
                if suite.slow else None for split in splits}
    results, record = {}, Path(s.record) if s.record else None
    with closing(suite.workers(s.workers, policy.camera, s.tables)) as workers:
        for split, journal in journals.items():
            print(f"{name}: {suite.split_names[split]}; {suite.protocol}".rstrip("; "))
            for gif in (out / split).glob("*.gif") if journal and journal.new else ():
                gif.unlink()                        # of one whose journal is gone
            results[split] = settings | evaluate.evaluate(
                policy, workers, suite, split, key, states=s.states, journal=journal,
                gifs=out / split if suite.slow and s.gifs else None, record=record)
    print(plots.success_table(results))
    others = {}
    with suppress(ValueError, AttributeError):
        others = {split: result
                  for split, result in read_json(out / "result.json").items()
                  if settings.items() <= result.items()}    # other splits of the same
    write_json(out / "result.json", others | results)
    for split in splits if s.gifs and not suite.slow else ():
        starts = suite.starts(split, s.gifs)
        evaluate.film(policy, suite, starts, key, out / f"{split}.gif")
    print(f"wrote {out}/result.json" + f" and GIFs in {out}" * bool(s.gifs))
    return results


def suite_and_key(name: str, norm_stats: dict, s: Played):
    """A suite as the flags make it, and the key of the policy's statistics for it."""
    from robots import find_suite
    from robots.openvla import action_stats
    from robots.policy import find_key
    suite = find_suite(name, tuple(s.tasks), s.options())
    suite.count(s.workers, s.tables)
    for split in s.split:
        suite.starts(split, 1)                          # refuses one it does not have
    of = name.split(":")[-1] if name.count(":") > 1 else name
    key = s.key or find_key(norm_stats, of)
    action_stats(norm_stats, key)                       # refuses an unknown key
    trained = key.removesuffix("_no_noops")
    others = sorted(set(suite.labels) - {trained})
    if trained in SUITES and others:
        print(f"note: this policy was trained on {trained}, and plays tasks of "
              f"{', '.join(others)} too; {name}:{trained} is of its own",
              file=sys.stderr)
    return suite, key


def paper_table(ours: dict[str, dict]) -> str:
    """{suite: result} -> the paper's rows and ours, percent; the mean only where all
    four suites are there; and how ours was played."""
    def line(name: str, cells) -> str:
        return f"{name:44}" + "".join(f"{cell:>9}" for cell in cells)
    own = [100 * ours[name]["success"] if name in ours else math.nan for name in SUITES]
    parts = any(result["episodes"] < 500 for result in ours.values())
    cells = ["-" if math.isnan(x) else f"{x:.1f}" for x in (*own, sum(own) / len(own))]
    return "\n".join([
        line("success, %", [name[len("libero_"):] for name in SUITES] + ["mean"]),
        *(line(name, [f"{x:.1f}" for x in row]) for name, row in PAPER.items()),
        line("ours" + ", parts of the suites" * parts, cells),
        *(f"  {name}: {r['episodes']} of 500 episodes, 95% interval "
          f"{r['interval'][0]:.1%} to {r['interval'][1]:.1%}; initial states: "
          f"{r['split']}; {r['protocol']}" for name, r in ours.items())])


def pairs_of(s: Played, command: str) -> dict[str, str]:
    """{suite: checkpoint} of the command line. ValueError, one line."""
    if not s.checkpoint or command == "vla" and len(s.checkpoint) != 1:
        raise ValueError("--checkpoint: give " + (
            "one folder or hub id" if command == "vla" else "SUITE=CHECKPOINT pairs"))
    if command == "paper":
        pairs = dict(pair.partition("=")[::2] for pair in s.checkpoint)
        for name, checkpoint in pairs.items():
            if name not in SUITES or not checkpoint:
                raise ValueError(f"--checkpoint {name}: write SUITE=CHECKPOINT, with "
                                 f"SUITE one of {', '.join(SUITES)}")
        return pairs
    from robots.libero_files import dimensions
    names = []
    for name in s.suite:
        every = re.fullmatch("libero_plus(:(:.+))?", name)
        names += dimensions(every[2] or "", s.plus) if every else [name]
    if len({"plus" in name for name in names}) > 1:
        raise ValueError("--suite: LIBERO-Plus and LIBERO are two packages of one "
                         "name; measure them in two runs")
    return dict.fromkeys(names, s.checkpoint[0])


def vla(args) -> int:
    """`vla` and `paper`: each suite by its policy, then a table over all of them."""
    command = vars(args).pop("command")
    check_suite(s := Played(**vars(args)))
    require(s, dict(states=1, gifs=0, threads=0))
    pairs = pairs_of(s, command)
    from plumbing import ranks
    from robots.evaluate import beside
    from robots.openvla import action_statistics, local_folder
    from robots.policy import load_policy
    ranks.use_cores(s.threads)
    for name, checkpoint in pairs.items():          # before hours of the first suite
        folder = local_folder(checkpoint, weights=False)
        suite_and_key(name, action_statistics(folder), s)
    loaded, policy, results = None, None, {}
    for name, checkpoint in pairs.items():
        if checkpoint != loaded:
            policy = None                           # not two of 7B at once
            policy, loaded = load_policy(checkpoint, None, s.device), checkpoint
        out = Path(s.out or beside(checkpoint))
        out = out if name == "tabletop" else out / name.replace(":", "-")
        results[name] = measure(policy, name, checkpoint, out, s)
    ours = {name: next(iter(each.values())) for name, each in results.items()}
    if command == "paper":
        print("\n" + paper_table(ours))
    elif len(ours) > 1:
        total = plots.rate(*(sum(r[count] for r in ours.values())
                             for count in ("successes", "episodes")))
        print("\n" + plots.success_table({"by suite": {"tasks": ours} | total}))
    return 0


def curves(args) -> int:
    """Learning curves of runs, and what stands in the tables."""
    draw, keys = plots.draw_curves, ["heldout"]
    if args.kind == "reflection":
        draw = plots.draw_reflection_curves
        keys = [f"heldout_{x}" for x in ("final_accuracy", "first_accuracy", "tokens")]
    runs = plots.read_runs(args.metrics, keys[0])
    draw(runs, args.out)
    print(plots.seeds_table(runs, keys))
    print(f"wrote {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    from reasoning import benchmarks
    parser = Parser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add_flags(commands.add_parser(
        "vla", help="success per task and initial state, of one policy"), Played)
    add_flags(commands.add_parser(
        "paper", help="the paper's LIBERO table, a policy for each suite"),
        Played, split=["all"], protocol="simplevla")
    p = commands.add_parser("curves", help="learning curves; runs in folders named "
                                           "LABEL-SEED are averaged by label")
    p.add_argument("metrics", nargs="+", help="metrics.jsonl files")
    p.add_argument("--out", default="curves.png")
    p.add_argument("--kind", default="vla", choices=["vla", "reflection"])
    benchmarks.add_arguments(commands.add_parser(
        "reasoning", help="MathVista, MathVerse, MathVision, MMMU-Pro"))

    def work() -> int:
        args = parser.parse_args(argv)
        other = {"curves": curves, "reasoning": benchmarks.run}
        return other.get(args.command, vla)(args)
    return ending(work)


if __name__ == "__main__":
    sys.exit(main())
