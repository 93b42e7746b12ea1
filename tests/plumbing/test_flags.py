"""plumbing/flags.py: what a command line says, in settings or in one line."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from plumbing import flags
from plumbing.flags import RunSettings, flag, read_command

ROOT = Path(__file__).parents[2]


@dataclass
class Settings(RunSettings):
    stage: str = flag("all", "of the two", choices=["all", "sft", "rl"])
    steps: int = flag(200, "how many")
    group_size: int = flag(8, "G, 100% of them")
    lr: float = flag(5e-4, "learning rate")
    temperature: float = flag(1.0, "of sampling")
    clip_low: float = flag(0.2, "below 1 - this")
    clip_high: float = flag(0.2, "above 1 + this")
    beta: float = flag(0.0, "of the KL")
    epochs: int = flag(1, "passes")
    groups: int = flag(4, "P")
    std_scale: bool = flag(True, "divide")
    tasks: list[int] = flag([], "of the suite")
    columns: list[str] = flag(["a=b"], "names")
    model: str = flag("", "folder or hub id")


def settings(*argv, **more) -> Settings:
    return read_command(Settings, argv, **more).settings


def test_defaults_and_every_spelling():
    assert settings() == Settings()
    s = settings("--group_size", "3", "--lr=1e-3", "--model", "x y", "--tasks", "3", "1")
    assert (s.group_size, s.lr, s.model, s.tasks) == (3, 1e-3, "x y", [3, 1])
    assert settings("--group-size", "3").group_size == settings("--group-size=3").group_size == 3
    assert settings("--tasks").tasks == settings("--columns").columns == []
    assert settings("--columns", "q=w", "image=i").columns == ["q=w", "image=i"]
    settings().columns.append("x")  # no list is shared
    assert settings().columns == Settings().columns == ["a=b"]
    assert settings(*map(Path, ("--model", "/tmp"))).model == "/tmp"


@pytest.mark.parametrize(
    "given, value",
    [
        ([], True),
        (["--std_scale"], True),
        (["--std-scale"], True),
        (["--std_scale", "false"], False),
        (["--std_scale=No"], False),
        (["--std-scale", "0"], False),
        (["--std_scale", "TRUE"], True),
        (["--std_scale", "yes"], True),
        (["--std_scale", "1"], True),
        (["--no_std_scale"], False),
        (["--no-std-scale"], False),
        (["--no_std_scale", "--std_scale"], True),
    ],
)
def test_booleans(given, value):
    command = read_command(Settings, given)
    assert command.settings.std_scale is value
    assert command.given == ({"std_scale"} if given else set())


def test_a_boolean_that_is_off_is_switched_on_and_off():
    assert settings("--gradient_checkpointing").gradient_checkpointing is True
    assert (
        settings("--gradient-checkpointing", "--no-gradient-checkpointing").gradient_checkpointing
        is False
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["--step", "3"], "unrecognized arguments: --step 3"),  # no abbreviations
        (["stray"], "unrecognized arguments: stray"),
        (["--steps", "3", "4"], "unrecognized arguments: 4"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--steps", "1.5"], "--steps: invalid int value: '1.5'"),
        (["--steps"], "--steps: expected one argument"),
        (["--lr", "1e"], "--lr: invalid float value: '1e'"),
        (["--tasks", "1,2"], "--tasks: invalid int value: '1,2'"),
        (["--dtype", "float31"], "--dtype: invalid choice: 'float31'"),
        (["--std_scale", "maybe"], "'maybe' is neither true nor false"),
        (["--no_std_scale", "true"], "unrecognized arguments: true"),
        (["--no_steps"], "unrecognized arguments: --no_steps"),
        (["--paper"], "unrecognized arguments: --paper"),
    ],
)  # where it has no meaning
def test_what_is_wrong_is_one_line(argv, words):
    with pytest.raises(ValueError, match="see --help") as error:
        read_command(Settings, argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_paper_stands_under_the_flags_given():
    paper = dict(lr=5e-6, steps=500, std_scale=False, columns=["x"])
    command = read_command(Settings, ["--paper", "--steps", "3", "--model", "m"], paper=paper)
    s = command.settings
    assert (s.lr, s.steps, s.std_scale, s.columns) == (5e-6, 3, False, ["x"]) and not command.plan
    assert command.given == {"steps", "model"}
    assert settings("--paper", "--model=m", "--std_scale", paper=paper).std_scale is True
    assert settings("--model", "m", paper=paper) == Settings(model="m")
    assert read_command(Settings, ["--resume", "out", "--paper", "--plan"], paper=paper).plan
    with pytest.raises(ValueError, match="^--paper needs --model: a folder or hub id$"):
        read_command(Settings, ["--paper", "--lr", "1"], paper=paper)


def test_a_first_word_is_the_stage():
    def read(*argv):
        return read_command(Settings, argv, words=("sft", "rl"))

    assert read("rl", "--tasks", "1").settings == Settings(stage="rl", tasks=[1])
    assert read("rl", "--steps", "3").given == {"stage", "steps"}
    assert read("--steps", "3").settings.stage == "all"
    with pytest.raises(ValueError, match="^no command 'rf'; there are sft and rl, or none$"):
        read("rf")
    with pytest.raises(ValueError, match="unrecognized arguments: rl"):
        read("--steps", "3", "rl")


def test_help(capsys):
    """Defaults, the texts as they stand, percent signs too; nothing of --no_x."""
    with pytest.raises(SystemExit) as end:
        read_command(Settings, ["--help"], paper={}, words=("sft", "rl"), about="What it is.")
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "[sft | rl]" in shown and "What it is." in shown
    assert "--group_size GROUP_SIZE, --group-size GROUP_SIZE G, 100% of them (default: 8)" in shown
    assert "(default: ['a=b'])" in shown and "of the suite (default: none)" in shown
    assert "folder or hub id (default: none)" in shown and "--paper" in shown
    assert "--no" not in shown and "weights (default: 0)" in shown


def test_help_of_a_default_with_a_percent_sign(capsys):
    @dataclass
    class Odd:
        form: str = flag("%d%%", "how: %s")

    with pytest.raises(SystemExit):
        read_command(Odd, ["-h"])
    assert "how: %s (default: %d%%)" in capsys.readouterr().out


@pytest.mark.parametrize("groups", ["groups", "prompts"])
@pytest.mark.parametrize(
    "changes, ranks, words",
    [
        (dict(clip_low=1.0), 1, "--clip_low must be below 1, got 1.0"),
        (dict(clip_low=0.0), 1, "--clip_low must be positive and finite, got 0.0"),
        (dict(count=3), 4, "--{} 3 for 4 ranks: each needs one"),
        (dict(count=0), 1, "--{} must be at least 1, got 0"),
        (dict(group_size=1), 1, "--group_size must be at least 2, got 1"),
        (dict(lr=float("nan")), 1, "--lr must be positive and finite, got nan"),
        (dict(max_norm=float("inf")), 1, "--max_norm must be positive and finite, got inf"),
        (dict(seed=-1), 1, "--seed must be at least 0, got -1"),
        (dict(save_every=0), 1, "--save_every must be at least 1, got 0"),
        (dict(offload_optimizer=True), 2, "--offload_optimizer is for one process"),
    ],
)
def test_settings_that_no_run_can_be_made_with(groups, changes, ranks, words, monkeypatch):
    def settings(changes):
        s = Settings(**{k: v for k, v in changes.items() if k != "count"})
        setattr(s, groups, changes.get("count", 8))
        return s

    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    flags.check_run(settings({}), groups)
    with pytest.raises(ValueError) as error:
        flags.check_run(settings(changes), groups)
    assert words.format(groups) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", "3"),
        ("steps", 3.0),
        ("steps", True),
        ("steps", None),
        ("lr", "1"),
        ("lr", False),
        ("std_scale", 1),
        ("tasks", "12"),
        ("tasks", [1, "2"]),
        ("columns", [1]),
        ("columns", {}),
        ("model", 3),
        ("dtype", "float31"),
        ("stage", "rf"),
    ],
)
def test_settings_of_a_damaged_file(name, value):
    flags.check_types(Settings(lr=1, tasks=[1], dtype="bfloat16"), "file")
    with pytest.raises(ValueError, match=f"^file is damaged: {name} cannot be "):
        flags.check_types(Settings(**{name: value}), "file")


# Ends of a process


def test_endings(capsys):
    def raising(error):
        def work():
            raise error

        return work

    assert [flags.ending(lambda code=code: code) for code in (0, None, 5)] == [0, 0, 5]
    for error, line in (
        (ValueError("--x is wrong"), "error: --x is wrong\n"),
        (OSError(28, "No space left"), "error: [Errno 28] No space left\n"),
        (MemoryError(), "error: MemoryError\n"),
        (RuntimeError("server: \x1b[2Jgone"), "error: server: \\x1b[2Jgone\n"),
    ):
        assert flags.ending(raising(error)) == 2 and capsys.readouterr().err == line
    assert flags.ending(raising(KeyboardInterrupt())) == 130
    assert "--resume FOLDER" in capsys.readouterr().err
    with pytest.raises(KeyError):  # a fault of ours keeps its traceback
        flags.ending(raising(KeyError("x")))


SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from dataclasses import dataclass
from plumbing.flags import at_once, flag

@dataclass
class Settings:
    stage: str = flag("all", "which", choices=["all", "sft", "rl"])
    model: str = flag("", "folder or hub id")
    data: str = flag("", "rows")
    steps: int = flag(3, "how many")
    resume: str = flag("", "folder of a run")

def check(s):
    if s.stage == "all" and s.data:
        raise ValueError("--data needs a stage")

at_once(Settings, check, paper=dict(steps=7), words=("sft", "rl"), about="A script.")
assert not {{"torch", "numpy", "transformers"}} & set(sys.modules)
print("then the work")
"""


def script(tmp_path, *argv, **environment) -> subprocess.CompletedProcess:
    """A script that reads its command line at once, as the two on top do, and does nothing else."""
    (tmp_path / "script.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, tmp_path / "script.py", *argv],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
    )


@pytest.mark.parametrize(
    "argv, environment, code, out, err",
    [
        (
            ["rl", "--data", "rows"],
            {},
            0,
            "settings: stage=rl  data=rows  steps=3\nthen the work\n",
            "",
        ),
        (["--paper", "--resume", "x", "--data", "rows"], {}, 0, "then the work\n", ""),
        (["--plan"], {}, 0, "then the work\n", ""),
        (["rl"], {"RANK": "1"}, 0, "then the work\n", ""),
        (["--data", "rows"], {}, 2, "", "error: --data needs a stage\n"),
        (["--stepz"], {}, 2, "", "error: unrecognized arguments: --stepz; see --help\n"),
    ],
)
def test_at_once(tmp_path, argv, environment, code, out, err):
    """Checked, and told, before anything slow is imported: with the stage of the first word."""
    done = script(tmp_path, *argv, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_help_at_once(tmp_path):
    done = script(tmp_path, "rl", "--help")
    assert done.returncode == 0 and "A script." in done.stdout and "then" not in done.stdout


# Text


def test_printable():
    assert flags.printable("plain\n\tü 漢字 $x^2$ \\frac") == "plain\n\tü 漢字 $x^2$ \\frac"
    for foreign, shown in (
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb", "a\\rb"),
        ("\x07", "\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("\ud83d", "\\ud83d"),
        ("\u202eabc", "\\u202eabc"),
        ("\U000e0001", "\\U000e0001"),
        ("\x00", "\\x00"),
    ):
        assert flags.printable(foreign) == shown
        assert flags.printable(flags.printable(foreign)) == shown
        flags.printable(foreign).encode()


def test_jsonable():
    found = flags.jsonable(
        {
            1: torch.tensor([1.0, float("nan")]),
            "b": (np.float32(0.5), np.int64(3)),
            "c": np.array([[True]]),
            "d": {"e": float("-inf")},
            "f": None,
            "g": "x",
            "h": torch.tensor(2.0, dtype=torch.bfloat16),
        }
    )
    assert found == {
        "1": [1.0, None],
        "b": [0.5, 3],
        "c": [[True]],
        "d": {"e": None},
        "f": None,
        "g": "x",
        "h": 2.0,
    }
