"""Many runs of a training script for one study: each a process of its own, what is finished is not
done again, and what was interrupted goes on."""
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from plumbing.files import read_json
from plumbing.flags import Parser, ending, read_command, require
from plumbing.plots import mean_and_half, read_metrics

ROOT = Path(__file__).parents[1]


def finished(script, folder: Path, argv: list[str], ended: str = "") -> bool:
    """Whether a run of a script, a module, has ended: by a file of this name, else the row of its
    last step. ValueError if what stands in the folder was made with other settings."""
    if not (folder / "settings.json").exists():
        return False
    saved, s = read_json(folder / "settings.json"), read_command(
        script.Settings, argv, **script.READING).settings
    script.check(s)
    for name, value in asdict(s).items():
        if name == "world_model" and Path(value).name == Path(saved.get(name, value)).name:
            continue                                    # the shipped one, of another checkout
        if name not in script.FREE | {"model", "out"} and saved.get(name, value) != value:
            raise ValueError(f"{folder} was made with --{name} {saved.get(name)}, not {value}; "
                             "choose another --out")
    if ended or not (folder / "metrics.jsonl").exists():
        return bool(ended) and (folder / ended).exists()
    return bool(rows := read_metrics(folder / "metrics.jsonl")) and rows[-1]["step"] >= s.steps


def run_all(script, stages: list[list[tuple[Path, list[str]]]], jobs: int) -> None:
    """The (folder, arguments) of each stage, `jobs` at a time; a line for each that ends."""
    began, done, total = time.time(), 0, sum(map(len, stages))
    with ThreadPoolExecutor(jobs) as pool:
        for stage in stages:
            for folder in pool.map(lambda job: run(script, *job), stage):
                done += 1
                left = (time.time() - began) / done * (total - done) / 60
                print(f"{folder.name}: {done} of {total} runs, {left:.0f} minutes left", flush=True)


def run(script, folder: Path, argv: list[str]) -> Path:
    """RuntimeError with its last words if it fails."""
    begun = any((folder / f"checkpoint{old}").exists() for old in ("", ".old"))
    python([script.__file__, *(["--resume", str(folder)] if begun else argv)], what=f"{folder}: ")
    return folder


def python(argv: list[str], seconds: float | None = None, what: str = "") -> str:
    """What a command of Python's prints; RuntimeError, one line, if it fails or takes longer."""
    try:
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True,
                              timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{what}stopped after {seconds:.0f} s; give more --minutes") from None
    if done.returncode:
        raise RuntimeError(what + (done.stderr.splitlines() or ["it failed"])[-1])
    return done.stdout


def paired(title: str, a: list[float], b: list[float]) -> str:
    """a - b, seed by seed, as a line in points."""
    mean, half = mean_and_half([x - y for x, y in zip(a, b, strict=True)])
    return f"{title}: {100 * mean:+.1f}" + ("" if math.isnan(half) else f" +- {100 * half:.1f}")


def counted(seeds: int) -> str:
    return f"{seeds} seed" + "s" * (seeds > 1)


def study(default_out: str, script: str, ours: set[str], work: Callable, about: str,
          argv: list[str] | None = None) -> int:
    """Exit code of a study's command: --out, --seeds and --jobs are its own, other flags are each
    run's, but for `ours`. work(the training script's module, flags, seeds, jobs, out) makes the
    runs and gives their table, which is printed, and written into --out."""
    parser = Parser(description=about.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--out", default=default_out)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")

    def checked() -> None:
        own, rest = parser.parse_known_args(argv)
        require(own, dict(seeds=1, jobs=1))
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("a study starts its own processes; start it without torchrun")
        module, out = import_module(script), Path(own.out)
        if wrong := read_command(module.Settings, rest).given & ours:
            raise ValueError(f"a study has no --{min(wrong)}: it sets that itself")
        text = work(module, rest, own.seeds, own.jobs, out)
        (out / "table.txt").write_text(text + "\n")
        print(f"\n{text}\nwrote {out}/table.txt")
    return ending(checked)
