"""plumbing/run.py: a small job that is stopped, killed, damaged and gone on with; and its log."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from plumbing import checkpoint, files, plan, ranks
from plumbing import run as runs
from plumbing.files import Journal
from plumbing.flags import RunSettings, flag, require
from plumbing.optimizer import clip_and_step, make_optimizer
from plumbing.run import Run, launch
from tests.conftest import lines
from tests.plumbing.test_checkpoint import mutations

# A job: ten random numbers are learnt, from noise that both generators give


@dataclass
class Settings(RunSettings):
    steps: int = flag(6, "steps")
    stage: str = flag("all", "which", choices=["all", "one", "two"])
    target: list[float] = flag([1.0, 2.0], "what is learnt")
    lr: float = flag(0.1, "learning rate")
    wait: str = flag("", "a step that waits for ever")
    data: str = flag("", "a folder")
    save_every: int = flag(2, "steps between checkpoints")


def check(s: Settings) -> None:
    require(s, dict(steps=0, save_every=1), ("lr",))


HOOKS = {}  # step -> what happens in it, of tests


def work(run: Run) -> int:
    s = run.s
    torch.manual_seed(s.seed)
    model = nn.Linear(3, 1)
    optimizer = make_optimizer(model, s.lr)
    run.keep(ranks.trainable(model), optimizer)
    print(f"results go to {run.out}/{run.where()}")
    before = run.once("before.json", lambda: {"bias": model.bias.item(), "nan": math.nan})
    for stage in ("one", "two") if s.stage == "all" else (s.stage,):
        if (run.stage or stage) > stage:
            continue  # a run that was resumed in the second
        log = {"one": "one.jsonl", "two": "metrics.jsonl"}[stage]
        for step in run.steps(s.steps, stage=stage, log=log, zero={"bias": before["bias"]}):
            noise = torch.randn(3) + float(run.rng.normal())
            run.lap("rollout")
            loss = (model(noise) - s.target[0]).square().sum()
            loss.backward()
            norm, _ = clip_and_step(optimizer, model, s.max_norm)
            if s.wait == f"{stage}{step}":
                (run.out / "waiting").touch()
                time.sleep(600)
            HOOKS.get((stage, step), lambda run: None)(run)
            run.lap("update")
            row = {"loss": loss.detach(), "norm": norm, "nothing": math.nan, "due": run.due(3)}
            run.log(row, f"loss {loss.item():.3f}")
        if not run.finished:
            return run.stopped()
    run.write("after.json", {"bias": model.bias.item()})
    if s.stage != "one":
        print(run.times())
    return 0


def go(*argv) -> int:
    return launch(
        Settings,
        work,
        list(map(str, argv)),
        check=check,
        free={"resume", "save_every", "steps", "wait"},
        job=lambda s: s,
        paper=dict(lr=0.01),
        words=("one", "two"),
    )


@pytest.fixture(autouse=True)
def hooks():
    yield HOOKS
    HOOKS.clear()


def numbers(out: Path) -> tuple:
    """All that a run leaves, but for seconds."""
    logs = [
        [{k: x for k, x in row.items() if "seconds" not in k} for row in lines(out / name)]
        for name in ("one.jsonl", "metrics.jsonl")
    ]
    weights = {
        name: x.tolist()
        for name, x in load_file(out / "checkpoint" / "00000.safetensors").items()
    }
    small = [(out / name).read_text() for name in ("before.json", "after.json")]
    state = checkpoint.read_state(out / "checkpoint")
    return logs, weights, small, {k: state[k] for k in ("stage", "step", "ended")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert go("--out", out) == 0
    return numbers(out)


def test_a_run(tmp_path, capsys):
    out = tmp_path / "a run"
    assert go("--out", out, "--steps", 7) == 0
    names = ["after.json", "before.json", "checkpoint", "metrics.jsonl", "one.jsonl"]
    assert sorted(os.listdir(out)) == [*names, "settings.json"]
    rows = lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(8)]
    assert rows[0] == {"step": 0, "bias": json.loads((out / "before.json").read_text())["bias"]}
    assert rows[1]["nothing"] is None and rows[1]["seconds_update"] > 0
    assert list(rows[1])[-2:] == ["seconds_rollout", "seconds_update"]
    assert [row["step"] for row in rows[1:] if row["due"]] == [3, 6, 7]
    assert files.read_json(out / "before.json")["nan"] is None
    saved = files.read_json(out / "settings.json")
    assert saved["steps"] == 7 and saved["out"] == saved["resume"] == "" and saved["lr"] == 0.1
    state = checkpoint.read_state(out / "checkpoint")
    assert (state["stage"], state["step"], state["ended"]) == ("two", 7, False)
    printed = capsys.readouterr().out
    assert f"results go to {out}/\n" in printed
    assert printed.count("loss ") == 4  # the first and the fifth step of both stages
    assert re.search(r"step    5  loss [\d.]+  rollout [\d.]+ s  update [\d.]+ s", printed)
    assert re.search(r"^\d+ s; median seconds of a step [\d.]+: rollout [\d.]+, reward 0.00, "
                     r"update [\d.]+$", printed, re.M)


def test_the_same_command_gives_the_same_numbers(tmp_path, whole):
    torch.manual_seed(5)
    assert go("--out", tmp_path / "again") == 0
    assert numbers(tmp_path / "again") == whole
    assert go("--out", tmp_path / "other", "--seed", 1) == 0
    assert numbers(tmp_path / "other") != whole


def test_every_step_has_random_numbers_of_its_own(tmp_path):
    drawn = {}
    for step in (1, 2):
        HOOKS["one", step] = lambda run: drawn.update(
            {run.step: (run.rng.random(), torch.rand(1).item())}
        )
    assert go("one", "--out", tmp_path / "run", "--steps", 2) == 0
    assert drawn[1] != drawn[2]


# Going on


@pytest.mark.parametrize("at", [("one", 1), ("one", 4), ("one", 6), ("two", 3)])
def test_ctrl_c_finishes_the_step_and_resume_is_bitwise(tmp_path, capsys, whole, at):
    """In the last step of a stage too: the next one does not begin."""
    out = tmp_path / "a run"
    HOOKS[at] = lambda run: os.kill(os.getpid(), signal.SIGINT)
    assert go("--out", out) == 130
    said, (stage, step) = capsys.readouterr(), ("two", 0) if at == ("one", 6) else at
    assert "Ctrl-C: finishing this step and saving; press again to stop at once" in said.err
    assert said.out.endswith(
        f"stopped after step {step}; go on with: python test_run.py --resume '{out}'\n"
    )
    state = checkpoint.read_state(out / "checkpoint")
    assert (state["stage"], state["step"]) == (stage, step) and not (out / "after.json").exists()
    HOOKS.clear()
    assert go("--resume", out) == 0
    again = f"{out}/; resumed after step {step} of {stage}\n"
    assert again in capsys.readouterr().out
    assert numbers(out) == whole


def test_ctrl_c_in_the_very_last_step_lets_the_run_end(tmp_path, whole):
    HOOKS["two", 6] = lambda run: os.kill(os.getpid(), signal.SIGINT)
    assert go("--out", tmp_path / "run") == 0
    assert numbers(tmp_path / "run") == whole


def test_ctrl_c_while_a_checkpoint_is_saved(tmp_path, whole, monkeypatch):
    """No further step is begun, and nothing is saved twice."""
    out, saves, save = tmp_path / "run", [], Run.save

    def pressed(run):
        save(run)
        saves.append(run.step)
        if run.step in (0, 4):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "save", pressed)
    assert go("--out", out) == 130 and saves == [0]
    assert go("--resume", out) == 130 and saves == [0, 0]  # step 0 is done again
    monkeypatch.setattr(Run, "save", lambda run: pressed(run) if run.step else save(run))
    assert go("--resume", out) == 130 and saves == [0, 0, 2, 4]
    monkeypatch.undo()
    assert go("--resume", out) == 0 and numbers(out) == whole


def test_a_second_ctrl_c_stops_at_once(tmp_path, capsys, whole):
    def twice(run):
        for _ in range(2):  # two that come together are one signal
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        raise AssertionError("it went on")

    HOOKS["one", 5] = twice
    handler = signal.default_int_handler  # a shell's background job would ignore the signal
    before = signal.signal(signal.SIGINT, handler)
    assert go("--out", tmp_path / "run") == 130
    assert signal.signal(signal.SIGINT, before) is handler
    assert "interrupted; if a checkpoint was saved, go on with --resume" in capsys.readouterr().err
    assert checkpoint.read_state(tmp_path / "run" / "checkpoint")["step"] == 4
    HOOKS.clear()
    assert go("--resume", tmp_path / "run") == 0
    assert numbers(tmp_path / "run") == whole


@pytest.mark.parametrize("kind", ["before", "once", "step"])
def test_a_run_that_failed_is_gone_on_with(tmp_path, capsys, whole, monkeypatch, kind):
    """An error in a step, in the first evaluation or in writing a line is one line; what was saved
    before is gone on with."""
    out = tmp_path / "run"

    def fail(*_):
        raise OSError(28, "No space left on device")

    if kind == "step":
        HOOKS["two", 4] = fail
    else:
        monkeypatch.setattr(
            Run if kind == "once" else Journal, {"once": "write"}.get(kind, "add"), fail
        )
    assert go("--out", out) == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    HOOKS.clear()
    monkeypatch.undo()
    again = ("--resume", out) if kind == "step" else ("--out", out)  # nothing was saved yet
    assert go(*again) == 0
    assert numbers(out) == whole


def process(*argv, **more) -> subprocess.Popen:
    """The job in a process of its own."""
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, argv)], stderr=subprocess.PIPE, text=True, **more
    )


def waiting(out: Path, job: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not (out / "waiting").exists():
        assert job.poll() is None and time.monotonic() < until, job.stderr.read()
        time.sleep(0.05)
    (out / "waiting").unlink()


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with(tmp_path, whole):
    """SIGKILL in the middle of a step, with a line of the log half written."""
    out = tmp_path / "run"
    job = process("--out", out, "--wait", "two4")
    waiting(out, job)
    job.kill()
    job.wait()
    job.stderr.close()
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 4, "lo')
    assert go("--resume", out, "--wait", "") == 0
    assert numbers(out) == whole


@pytest.mark.slow
def test_two_runs_with_one_out(tmp_path, capsys, whole):
    """The second is told the first one's number, and leaves it alone; whoever dies gives way."""
    out = tmp_path / "run"
    job = process("--out", out, "--wait", "one3")
    waiting(out, job)
    for argv in (("--out", out), ("--resume", out)):
        assert go(*argv) == 2
        assert capsys.readouterr().err == (
            f"error: {out} is in use by process {job.pid}; wait for it, or choose another --out\n"
        )
    assert files.read_json(out / "settings.json")["wait"] == "one3"
    job.kill()
    job.wait()
    job.stderr.close()
    HOOKS["one", 5] = lambda run: locks.append((out / ".lock").exists())
    locks = []
    assert go("--resume", out, "--wait", "") == 0
    assert locks == [True] and not (out / ".lock").exists()
    assert numbers(out) == whole


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "write_json", lambda *_: 1 / 0)
    for out in (tmp_path / "a" / "b", tmp_path / "c"):
        with pytest.raises(ZeroDivisionError):
            go("--out", out)
    assert os.listdir(tmp_path) == []


def test_where_there_are_no_locks_runs_go_on_without(tmp_path, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    assert go("one", "--out", tmp_path / "run", "--steps", 1) == 0


def test_a_run_ends_early(tmp_path):
    HOOKS["one", 3] = lambda run: run.end()
    assert go("one", "--out", tmp_path / "run", "--save_every", 10) == 0
    state = checkpoint.read_state(tmp_path / "run" / "checkpoint")
    assert (state["step"], state["ended"]) == (3, True)
    rows = lines(tmp_path / "run" / "one.jsonl")
    assert [(row["step"], row.get("due")) for row in rows][-1] == (3, True)
    assert go("--resume", tmp_path / "run") == 0  # has nothing to do
    assert len(lines(tmp_path / "run" / "one.jsonl")) == 4


def test_a_finished_run_goes_on_to_more_steps(tmp_path, whole):
    """Where the script says that their number may change."""
    assert go("--out", tmp_path / "run", "--steps", 4) == 0
    assert go("--resume", tmp_path / "run", "--steps", 6) == 0
    rows = numbers(tmp_path / "run")[0]
    assert [len(log) for log in rows] == [5, 7]  # the first stage was over


# What is refused


def test_no_run_is_overwritten(tmp_path, capsys):
    out = tmp_path / "a run"
    assert go("one", "--out", out, "--steps", 1) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert go("one", "--out", out) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {out} holds a run already; go on with --resume '{out}', or choose another --out"
    )
    os.rename(out / "checkpoint", out / "checkpoint.old")  # killed between two renames
    assert go("--out", out) == 2 and "holds a run already" in capsys.readouterr().err
    os.rename(out / "checkpoint.old", out / "checkpoint")
    assert before == {p: p.read_bytes() for p in before}
    record = tmp_path / "record"
    record.mkdir()
    (record / "metrics.jsonl").write_text('{"step": 0}\n')
    assert go("--out", record) == 2
    assert f"{record}/metrics.jsonl is of another run" in capsys.readouterr().err
    (record / "metrics.jsonl").write_text("")
    assert go("one", "--out", record, "--steps", 1) == 0


def test_a_folder_that_has_moved_may_be_named_anew(tmp_path, capsys):
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    old.mkdir()
    assert go("one", "--out", out, "--steps", 1, "--data", old) == 0
    assert go("--resume", out, "--steps", 2, "--data", new) == 2
    assert f"--data {new} differs from the run's {old}" in capsys.readouterr().err
    old.rename(new)
    assert go("--resume", out, "--steps", 2, "--data", "elsewhere") == 2
    assert go("--resume", out, "--steps", 2, "--data", new) == 0
    assert checkpoint.read_state(out / "checkpoint")["settings"]["data"] == str(new)


def test_what_a_resumed_run_cannot_be_told(tmp_path, capsys):
    out = tmp_path / "run"
    assert go("one", "--out", out, "--steps", 1, "--target", 3) == 0
    for argv, words in (
        (["--resume", tmp_path / "none"], f"no checkpoint folder at {tmp_path}/none/checkpoint"),
        (["--resume", ""], "--resume is empty; give the folder of a run"),
        (["--resume", out, "--out", "x"], f"--resume goes on in {out}; drop --out"),
        (["--resume", out, "--lr", 0.2], "--lr 0.2 differs from the run's 0.1; drop the flag"),
        (["two", "--resume", out], "--stage two differs from the run's one; drop the flag"),
        (["--resume", out, "--target", 1, 2], "--target [1.0, 2.0] differs from the run's [3.0]"),
        (["--resume", out, "--save_every", 0], "--save_every must be at least 1, got 0"),
        (["--resume", out, "--lrr", 1], "unrecognized arguments: --lrr 1; see --help"),
    ):
        capsys.readouterr()
        assert go(*argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert go("one", "--resume", out, "--lr", 0.1, "--paper", "--save_every", 3) == 0
    saved = files.read_json(out / "settings.json")
    assert saved["save_every"] == 3 and saved["lr"] == 0.1  # a run's own, also under --paper


def test_folders_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/run"):
        assert go("--out", tmp_path / out) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: --out {tmp_path}/{out} cannot be written to (")
        assert err.endswith("; choose another folder\n")
    assert os.listdir(tmp_path) == ["file"]


def test_plan_and_settings_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "show", lambda s, job: print("planned", job(s).steps) or 0)
    assert go("--out", tmp_path / "run", "--plan", "--steps", 3) == 0
    assert capsys.readouterr().out == "planned 3\n"
    assert go("--out", tmp_path / "run", "--lr", "nan") == 2
    assert "--lr must be positive and finite" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("step"),
        lambda state: state.update(step=-1),
        lambda state: state.update(step="2"),
        lambda state: state.update(step=True),
        lambda state: state.update(ended=0),
        lambda state: state.update(stage="three"),
        lambda state: state.update(settings=[]),
        lambda state: state.update(more=1),
        lambda state: state["settings"].pop("lr"),
        lambda state: state["settings"].update(more=1),
        lambda state: state["settings"].update(steps="6"),
        lambda state: state["settings"].update(dtype="float31"),
        lambda state: state["settings"].update(target=[1, "2"]),
        lambda state: state["settings"].update(lr=None),
        lambda state: state["settings"].update(lr=math.nan),
    ],
)
def test_a_state_of_another_version_or_damaged(tmp_path, capsys, change):
    out = tmp_path / "run"
    assert go("one", "--out", out, "--steps", 1) == 0
    state = checkpoint.read_state(out / "checkpoint")
    change(state)
    (out / "checkpoint" / "state.json").write_text(json.dumps(state))
    capsys.readouterr()
    assert go("--resume", out) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "is damaged" in err or "--lr must be positive" in err


def test_mutations_of_a_state_are_one_line_or_harmless(tmp_path, capsys):
    """Sixty damaged state.json: a line and code 2, or a run like any other."""
    out, codes = tmp_path / "run", []
    assert go("one", "--out", out, "--steps", 2) == 0
    file = out / "checkpoint" / "state.json"
    good = file.read_bytes()
    for number, damaged in enumerate(mutations(good, 60, seed=1)):
        file.write_bytes(damaged)
        capsys.readouterr()
        codes.append(go("--resume", out, "--steps", 2))
        err = capsys.readouterr().err.splitlines()
        assert codes[-1] == 0 or codes[-1] == 2 and err[-1].startswith("error: "), (number, err)
        assert codes[-1] == 0 or len(err) == 1 or "step" in err[0], (number, err)
    assert codes.count(2) > 40


# Verbs


def test_once_and_read(tmp_path):
    run = Run(Settings(), tmp_path, None, "x.py")
    assert run.once("a.json", lambda: {"a": 1}) == {"a": 1}
    assert run.once("a.json", lambda: {"a": 2}) == {"a": 2} == run.read("a.json")  # a new run
    state = {"stage": "", "step": 3, "ended": False}
    resumed = Run(Settings(), tmp_path, state, "x.py")
    assert resumed.once("a.json", lambda: {"a": 3}) == {"a": 2}
    assert resumed.once("b.json", lambda: {"b": 3}) == {"b": 3}  # killed before it was written
    assert resumed.where() == "; resumed after step 3" and run.where() == ""
    with pytest.raises(ValueError, match="c.json is missing"):
        run.read("c.json")
    assert run.mine([3, 1, 2]) == run.gather([3, 1, 2]) == [3, 1, 2] and run.first_rank


def test_what_is_said_does_not_steer_the_terminal(tmp_path, capsys):
    Run(Settings(), tmp_path, None, "x.py").say("response: \x1b[2J\x07done\nnext")
    assert capsys.readouterr().out == "response: \\x1b[2J\\x07done\nnext\n"


# The journal


def test_a_journal_is_flushed_line_by_line_and_is_plain_json(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    log = Journal(path)
    assert log.new and log.rows == []
    for step in range(1, 6):
        log.add(
            {
                "step": step,
                "loss": torch.tensor(0.5 * step),
                "kl": math.nan,
                "tasks": {"a": np.float32(0.25), "b": [math.inf, 1]},
            }
        )
    assert len(path.read_text().splitlines()) == 5  # flushed, not only closed
    log.close()
    with open(path, "a") as f:
        f.write('{"step": 6, "lo')  # SIGKILL in mid-write
    log = Journal(path, keep=lambda row: row["step"] <= 3)
    assert not log.new and [row["step"] for row in log.rows] == [1, 2, 3]
    log.add({"step": 4, "loss": 9.0})
    log.close()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and rows[3]["loss"] == 9.0
    assert rows[1] == {"step": 2, "loss": 1.0, "kl": None, "tasks": {"a": 0.25, "b": [None, 1]}}
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", range(1, 26))
def test_a_journal_cut_anywhere_goes_on(tmp_path, cut):
    """Of two lines of 12 bytes and one more; a whole last line without its newline stays."""
    path = tmp_path / "log.jsonl"
    whole = '{"step": 1}\n{"step": 2}\n{'
    path.write_text(whole[:cut])
    log = Journal(path)
    kept = [i + 1 for i in range(2) if cut >= 12 * i + 11]
    assert [row["step"] for row in log.rows] == kept
    log.add({"step": 9})
    log.close()
    assert [row["step"] for row in lines(path)] == [*kept, 9]


def test_a_journal_refuses_a_broken_middle_and_leaves_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for bad in ('{"st', "[1]", "[[1, 2]]", "3", "", "[" * 100_000):
        text = f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n'
        path.write_text(text)
        with pytest.raises(ValueError, match="metrics.jsonl line 2 is not a row") as error:
            Journal(path)
        assert path.read_text() == text and "\n" not in str(error.value)
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n')
    with pytest.raises(ValueError, match="line 2 is not a row"):
        Journal(path)
    path.write_text('{"a": "\\u2028"}\n')  # ends no line
    assert Journal(path).rows == [{"a": "\u2028"}]


def test_a_damaged_row_of_a_log_is_dropped(tmp_path):
    """Where it is a row, but not one with a step."""
    out = tmp_path / "run"
    assert go("one", "--out", out, "--steps", 2) == 0
    with open(out / "one.jsonl", "a") as log:
        log.write('{"stop": 3}\n{"step": "3"}\n{"step": null}\n{"step": [1]}\n')
    assert go("--resume", out, "--steps", 4) == 0
    assert [row["step"] for row in lines(out / "one.jsonl")] == [0, 1, 2, 3, 4]


def test_a_journal_belongs_to_its_settings(tmp_path):
    path, settings = tmp_path / "new" / "a.jsonl", {"checkpoint": "x", "sizes": (1, 2), "n": None}
    log = Journal(path, settings)
    line = '{"checkpoint": "x", "sizes": [1, 2], "n": null}\n'
    assert log.new and path.read_text() == line
    log.add({"task": 0})
    log.close()
    again = Journal(path, settings)
    assert not again.new and again.rows == [{"task": 0}]
    with pytest.raises(ValueError, match="a.jsonl was begun with n None, not 9; repeat that, or"):
        Journal(path, settings | {"n": 9})
    with pytest.raises(ValueError, match="begun with checkpoint 'x', not None, other None, not 1;"):
        Journal(path, {"other": 1, "sizes": [1, 2], "n": None})
    for torn in ("", line[:9]):  # killed before the first line was whole
        path.write_text(torn)
        Journal(path, settings).close()
        assert path.read_text() == line
    path.write_text("oops\n")
    with pytest.raises(ValueError, match="a.jsonl line 1 is not a row: 'oops'; delete that line"):
        Journal(path, settings)


def test_a_full_disk_leaves_the_journal(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="log.jsonl cannot be written .*is the disk full"):
        Journal(path, keep=lambda row: row["step"] < 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and os.listdir(tmp_path) == [
        "log.jsonl"
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(go(*sys.argv[1:]))
