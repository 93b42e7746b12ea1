"""Settings as flags of a command line, with nothing but the standard library: `--help` answers
before torch is imported. A script's settings are one dataclass, a field made by `flag` for each;
`read_command` fills it, and `ending` makes of what goes wrong one line and an exit code.
"""
import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from types import GenericAlias

# Idle threads sleep. By OpenMP's default they spin, and take the simulator's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def flag(default, text: str, **more):
    """A dataclass field that is also a flag; `default` may be a list; choices=[...]."""
    value = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**value, metadata={"help": text, **more})


@dataclass
class RunSettings:
    """What every training run can be told besides its algorithm."""
    max_norm: float = flag(1.0, "gradients are scaled down to this global norm")
    lora_rank: int = flag(0, "train LoRA adapters of this rank; 0: all weights")
    dtype: str = flag("float32", "of the weights; bfloat16 keeps fp32 masters in the optimiser",
                      choices=["float32", "bfloat16"])
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: "
                                               "less memory, a third more time")
    offload_optimizer: bool = flag(False, "optimiser state and step on the CPU, for one process: "
                                          "12 of 16 bytes a weight leave the GPU")
    seed: int = flag(0, "of initial weights, data, sampling and minibatches")
    out: str = flag("", "output folder")
    resume: str = flag("", "folder of a run to go on with; its settings are taken over")
    eval_every: int = flag(20, "steps between held-out evaluations; 0: only before and after")
    save_every: int = flag(5, "steps between checkpoints")
    threads: int = flag(2, "torch threads; 0: all cores")


def check_run(s, groups: str) -> None:
    """ValueError, one line, for settings that no run can be made with. groups: the name of the
    setting that counts a step's groups."""
    if s.group_size < 2:
        raise ValueError(f"--group_size must be at least 2, got {s.group_size}: "
                         "a group of one has no baseline")
    require(s, dict(lora_rank=0, seed=0, eval_every=0, save_every=1, threads=0, epochs=1,
                    beta=0) | {groups: 1},
            ("max_norm", "lr", "temperature", "clip_low", "clip_high"))
    if not s.clip_low < 1:
        raise ValueError(f"--clip_low must be below 1, got {s.clip_low}")
    if getattr(s, groups) < (n := int(os.environ.get("WORLD_SIZE", 1))):
        raise ValueError(f"--{groups} {getattr(s, groups)} for {n} ranks: each needs one")
    if s.offload_optimizer and n > 1:
        raise ValueError("--offload_optimizer is for one process; ranks divide the optimiser's "
                         "state among them already")


@dataclass
class Command:
    """What a command line asked for."""
    settings: object
    given: set[str]         # names of the settings it gave
    plan: bool = False      # only say what the run needs


class Parser(argparse.ArgumentParser):
    """Whose errors are ValueErrors of one line."""

    def error(self, message: str):
        raise ValueError(f"{message}; see --help")


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "yes", "1")


def add_flags(parser: argparse.ArgumentParser, settings: type, **defaults) -> None:
    """A flag for every field of a dataclass, --name or --na-me; booleans also as --no_name.
    defaults: in place of the fields' own."""
    for f in fields(settings):
        default = f.default_factory() if f.default is MISSING else f.default
        default = defaults.get(f.name, default)
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
        shown = "none" if default in ("", []) else default
        how = {**f.metadata, "default": default, "dest": f.name, "type": f.type}
        how["help"] = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
        if f.type is bool:
            how |= {"type": _truth, "nargs": "?", "const": True}
            parser.add_argument(f"--no_{f.name}", f"--no-{f.name.replace('_', '-')}", dest=f.name,
                                action="store_false", default=default, help=argparse.SUPPRESS)
        elif isinstance(f.type, GenericAlias):                          # list[int], list[str]
            how |= {"type": f.type.__args__[0], "nargs": "*"}
        parser.add_argument(*names, **how)


def read_command(settings: type, argv: list[str] | None = None, *, paper: dict | None = None,
                 words: tuple[str, ...] = (), about: str = "") -> Command:
    """The command line as a `Command`. ValueError, one line, for a flag that is wrong or unknown.

    paper: values that --paper puts in place of the defaults. words: what the first word may be,
    which is the setting `stage`. about: a docstring, whose first paragraph --help shows."""
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    if words and argv and not argv[0].startswith("-"):
        if argv[0] not in words:
            raise ValueError(f"no command {argv[0]!r}; there are {' and '.join(words)}, or none")
        argv += ["--stage", argv.pop(0)]
    parser = Parser(description=about.split("\n\n")[0], allow_abbrev=False)
    if words:
        parser.prog += f" [{' | '.join(words)}]"
    add_flags(parser, settings)
    if paper is not None:
        parser.add_argument("--paper", action="store_true",
                            help="the paper's values, but for flags given")
        parser.add_argument("--plan", action="store_true",
                            help="only say what the run needs, and what would stop it")
        if "--paper" in argv:
            parser.set_defaults(**paper)
    values = vars(parser.parse_args(argv))
    more = {name: values.pop(name, False) for name in ("paper", "plan")}
    given = {re.sub("^no_", "", a[2:].partition("=")[0].replace("-", "_"))
             for a in argv if a.startswith("--")} & set(values)
    if more["paper"] and not {"model", "resume"} & given:
        raise ValueError("--paper needs --model: a folder or hub id")
    return Command(settings(**values), given, more["plan"])


def require(s, at_least: dict[str, float], positive: tuple[str, ...] = ()) -> None:
    """ValueError, one line, for a setting below its least value, not positive, or not finite."""
    for name, low in at_least.items():
        if not low <= getattr(s, name) < math.inf:
            raise ValueError(f"--{name} must be at least {low}, got {getattr(s, name)}")
    for name in positive:
        if not 0 < getattr(s, name) < math.inf:
            raise ValueError(f"--{name} must be positive and finite, got {getattr(s, name)}")


def check_types(s, source: str) -> None:
    """ValueError, one line, for a value of settings from a file that no flag can have."""
    for f in fields(s):
        value, known = getattr(s, f.name), f.metadata.get("choices")
        many = isinstance(f.type, GenericAlias)
        kind = f.type.__args__[0] if many else f.type
        kinds = (int, float) if kind is float else (kind,)
        if many and type(value) is not list or any(
                type(x) not in kinds or known and x not in known
                for x in (value if many else [value])):
            raise ValueError(f"{source} is damaged: {f.name} cannot be {value!r}")


def at_once(settings: type, check: Callable, **reading) -> None:
    """Answers --help, a wrong flag, or prints the settings of a new run; before torch is imported.

    For the light part on top of a script; `main` reads the command line again."""
    def answer() -> int:
        command = read_command(settings, **reading)
        s = command.settings
        if not s.resume:
            check(s)
            if int(os.environ.get("RANK", 0)) == 0 and not command.plan:
                values = {k: v for k, v in asdict(s).items() if v not in ("", [])}
                print("settings: " + "  ".join(f"{k}={v}" for k, v in values.items()), flush=True)
        return 0
    if code := ending(answer):
        sys.exit(code)


def script(settings: type, work: Callable, about: str, **reading) -> Callable[..., int]:
    """A script's `main`: work(settings of its command line), with an exit code as of `ending`."""
    def main(argv: list[str] | None = None) -> int:
        return ending(lambda: work(read_command(settings, argv, about=about, **reading).settings))
    return main


def ending(work: Callable[[], int]) -> int:
    """Exit code of work(): an error is one line on stderr and code 2, Ctrl-C is 130."""
    try:
        return work() or 0
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"error: {printable(str(error)) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; if a checkpoint was saved, go on with --resume FOLDER",
              file=sys.stderr)
        return 130


def jsonable(x):
    """Tensors and numpy values as numbers or lists; NaN and infinities, not in JSON, as null."""
    if isinstance(x, dict):
        return {str(k): jsonable(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [jsonable(v) for v in x]
    if hasattr(x, "tolist"):
        return jsonable(x.tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


def printable(text: str) -> str:
    r"""Foreign text without the control characters that would steer a terminal.

    >>> printable("red \x1b[31malert")
    'red \\x1b[31malert'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
