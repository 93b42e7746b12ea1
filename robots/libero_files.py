"""LIBERO and LIBERO-Plus on disk: the installed package, its assets, its tasks and their initial states. robots/libero.py simulates them.

1. `prepare` imports LIBERO without its question on stdin, finds its meshes and textures, and says in one line what is wrong and how to mend it.
2. `tasks` lists a suite in the official order without importing anything; LIBERO-Plus reads its perturbations from the tasks' names.
3. `initial_states` reads the 50 official ones of a task, which are pickles, without running what a pickle could run.
"""
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import pickle
import re
import runpy
import sys
import types
import zipfile
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from robots.tabletop import gl_help                # robots/tabletop.py also sets MUJOCO_GL, which robosuite would force; osmesa works too

INSTALL = "pip install --no-deps -r requirements-libero.txt"
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")        # the papers' four; libero_90 besides
DIMENSIONS = {"camera": "Camera Viewpoints", "robot": "Robot Initial States", "language": "Language Instructions",
              "light": "Light Conditions", "background": "Background Textures", "noise": "Sensor Noise", "layout": "Objects Layout"}
PERTURBATION = re.compile(r"_(view|table|tb|light|add|noise)_-?\d.*$|_level\d.*$")      # in the names of LIBERO-Plus's tasks
ASSET_FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures", "turbosquid_objects")


# Finding and importing LIBERO

def find_package(plus: str = "") -> Path:
    """Folder `libero/libero` of the installed LIBERO, or of the LIBERO-Plus copy at `plus`; nothing is imported. RuntimeError."""
    if plus:
        found = [p for p in (Path(plus), Path(plus) / "libero", Path(plus) / "libero/libero")
                 if (p / "benchmark/task_classification.json").is_file()]
        if not found:
            raise RuntimeError(f"{plus} holds no LIBERO-Plus (no libero/libero/benchmark/task_classification.json); "
                               f"clone it and give its folder by --plus or LIBERO_PLUS_PATH")
        return found[0].resolve()
    folders = dict.fromkeys(Path(entry or ".").resolve() for entry in sys.path)
    found = [folder / "libero/libero" for folder in folders if (folder / "libero/libero/__init__.py").is_file()]
    if len(found) > 1:
        raise RuntimeError(f"two LIBERO packages are on the path, in {found[0].parents[1]} and {found[1].parents[1]}; "
                           f"take one off PYTHONPATH or pip uninstall it (LIBERO-Plus is given by --plus or LIBERO_PLUS_PATH)")
    if not found or (found[0] / "benchmark/task_classification.json").is_file():
        raise RuntimeError(f"LIBERO is not installed{', only LIBERO-Plus' if found else ''}; run: {INSTALL}")
    return found[0]


def find_assets(package: Path, assets: str = "") -> Path:
    """LIBERO's meshes and textures: `assets`, else LIBERO_ASSETS, else inside the package, else where hf-libero keeps them, else a snapshot of
    the hub's data set lerobot/libero-assets, downloaded on first use. LIBERO-Plus has more of its own: there the package comes before LIBERO_ASSETS.
    RuntimeError if they are nowhere, or not whole."""
    inside, plus, cached = package / "assets", (package / "benchmark/task_classification.json").is_file(), Path.home() / ".cache/libero/assets"
    given = assets or (str(inside) if plus and inside.is_dir() else os.environ.get("LIBERO_ASSETS", ""))
    if given or plus or inside.is_dir():
        folder = Path(given or inside)
    elif all((cached / name).is_dir() for name in ASSET_FOLDERS):
        folder = cached
    else:
        try:
            from huggingface_hub import snapshot_download
            folder = Path(snapshot_download("lerobot/libero-assets", repo_type="dataset"))
        except Exception as e:      # no network, no access, no disk: whatever it is, the way out is the same
            raise RuntimeError(f"LIBERO's assets cannot be had from the hub ({type(e).__name__}); put a copy of its data set "
                               f"lerobot/libero-assets into a folder and name that by LIBERO_ASSETS or --assets") from None
    missing = [name for name in ASSET_FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise RuntimeError(f"LIBERO's assets in {folder} are not whole, {missing[0]}/ is missing; set LIBERO_ASSETS or --assets to "
                           f"the folder that holds {', '.join(ASSET_FOLDERS)}")
    return folder.resolve()


def write_config(package: Path, assets: Path) -> Path:
    """LIBERO's config.yaml, without which its import asks on stdin: in LIBERO_CONFIG_PATH where that has one, else in a cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH") or
                  home / "libero_envs" / hashlib.sha256(f"{package} {assets}".encode()).hexdigest()[:12])
    if not (folder / "config.yaml").is_file():
        keys = {"benchmark_root": package, "bddl_files": package / "bddl_files", "init_states": package / "init_files",
                "datasets": package.parent / "datasets", "assets": assets}
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"config.{os.getpid()}.tmp"            # several workers may be here at once
        draft.write_text("".join(f"{key}: {json.dumps(str(value))}\n" for key, value in keys.items()))
        os.replace(draft, folder / "config.yaml")
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    return folder


@cache
def prepare(assets: str = "", plus: str = ""):
    """Make LIBERO ready in this process -> its class ControlEnv. Asks nothing; whatever is wrong is a RuntimeError in one line."""
    try:
        version = importlib.metadata.version("mujoco")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError("mujoco is not installed; run: bash setup.sh") from None
    if not (3, 2) <= tuple(map(int, version.split(".")[:2])) < (3, 10):
        raise RuntimeError(f"mujoco {version} is installed, LIBERO runs with 3.2 to 3.9; run: pip install mujoco==3.8.1")
    if os.environ["MUJOCO_GL"] not in ("egl", "osmesa"):
        raise RuntimeError(f"MUJOCO_GL={os.environ['MUJOCO_GL']} does not render LIBERO without a screen; set it to egl or osmesa")
    package = find_package(plus)
    loaded = getattr(sys.modules.get("libero"), "__path__", None)
    if loaded and Path(next(iter(loaded))).resolve() != package.parent:
        raise RuntimeError(f"this process holds {next(iter(loaded))} already and cannot load {package.parent} too; use a process for each")
    folder = find_assets(package, assets)
    write_config(package, folder)
    if not loaded:      # LIBERO-Plus is called `libero` too, and may have no __init__.py: this pins the name to the package that was meant
        sys.modules["libero"] = types.ModuleType("libero")
        sys.modules["libero"].__path__ = [str(package.parent)]
    logging.disable(logging.WARNING)                            # robosuite's advice about its private macros
    try:
        importlib.import_module("libero.libero")._assets_path_cache = str(folder)       # its config's `assets` is not read
        wrapper = importlib.import_module("libero.libero.envs.env_wrapper")
        if plus:
            wrapper.np = older_numpy()
        return wrapper.ControlEnv
    except ModuleNotFoundError as e:
        raise RuntimeError(f"LIBERO{'-Plus' * bool(plus)} needs the package {e.name}; run: "
                           + ("pip install scikit-image wand, and apt-get install -y libmagickwand-dev" if plus else "bash setup.sh")) from None
    except (AttributeError, ImportError, OSError, RuntimeError) as e:       # all the ways in which a machine can lack OpenGL
        if "MagickWand" in str(e):
            raise RuntimeError("LIBERO-Plus needs ImageMagick; run: apt-get install -y libmagickwand-dev") from None
        raise RuntimeError(f"importing LIBERO failed ({type(e).__name__}: {' '.join(str(e).split())[:120]}); if that is OpenGL for "
                           f"MUJOCO_GL={os.environ['MUJOCO_GL']}, run: {gl_help()}") from None
    finally:
        logging.disable(logging.NOTSET)


def older_numpy() -> types.ModuleType:
    """numpy with what LIBERO-Plus's fog and motion blur call, and numpy 2 lacks."""
    module = types.ModuleType("numpy")
    module.__getattr__ = partial(getattr, np)
    module.float_, module.fromstring = np.float64, lambda data, dtype: np.frombuffer(data, dtype).copy()
    return module


# Tasks and initial states

@dataclass(frozen=True)
class Task:
    suite: str                  # of the four or five; LIBERO-Plus tasks belong to one of them too
    name: str
    instruction: str
    bddl: str                   # path; LIBERO-Plus reads its perturbation from the name, which need not exist as a file
    states: str                 # path of the initial states


@cache
def tasks(suite: str, plus: str = "") -> tuple[Task, ...]:
    """Tasks of a suite in the official order; of `libero_plus:DIMENSION`, that dimension's of all four suites, or of one:
    `libero_plus:DIMENSION:SUITE`. ValueError, RuntimeError."""
    plus_name, _, only = suite.removeprefix("libero_plus:").partition(":")
    dimension = plus_name if suite.startswith("libero_plus") else ""
    if dimension not in ("", *DIMENSIONS) or only not in ("", *SUITES) or not dimension and suite not in (*SUITES, "libero_90"):
        raise ValueError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}, libero_90 and libero_plus:" + "|".join(DIMENSIONS)
                         + ", of one suite libero_plus:DIMENSION:SUITE")
    plus = plus or os.environ.get("LIBERO_PLUS_PATH", "")
    if dimension and not plus:
        raise RuntimeError("LIBERO-Plus is not here; clone it and give its folder by --plus or LIBERO_PLUS_PATH")
    package = find_package(plus if dimension else "")
    if not dimension:
        path = package / "benchmark/libero_suite_task_map.py"                   # importing it would import torch
        return tuple(make_task(package, suite, name) for name in runpy.run_path(str(path))["libero_task_map"][suite])
    path = package / "benchmark/task_classification.json"
    try:
        rows = [(s, row["name"], row["category"]) for s in ([only] if only else SUITES) for row in json.loads(path.read_text()).get(s, ())]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
        raise RuntimeError(f"{path} is not LIBERO-Plus's list of tasks ({type(e).__name__}); clone LIBERO-Plus anew") from None
    return tuple(make_task(package, s, name, dimension) for s, name, category in rows if category.lower() == DIMENSIONS[dimension].lower())


def make_task(package: Path, suite: str, name: str, dimension: str = "") -> Task:
    """A task of a package, from its name alone but for LIBERO-Plus's language variants; RuntimeError if their file says nothing.

    >>> make_task(Path("p"), "libero_10", "KITCHEN_SCENE3_turn_on_the_stove_light_7", "light").instruction
    'turn on the stove'
    """
    bddl, states = package / "bddl_files" / suite, package / "init_files" / suite
    base = name.partition("_language_")[0]
    if dimension:       # code: LIBERO-Plus's own evaluator leaves "... light 7" in the instruction of all but the language variants
        base = PERTURBATION.sub("", base)
    instruction = re.sub(r"^[A-Z_]*SCENE\d+_", "", base).replace("_", " ")
    if "_language_" in name:
        file = bddl / f"{name.partition('_view_')[0]}.bddl"
        found = re.search(r"\(:language\s+([^)]*)\)", file.read_text()) if file.is_file() else None
        if not found:
            raise RuntimeError(f"{file} has no (:language ...); clone LIBERO-Plus anew")
        instruction = " ".join(found[1].lower().split())
    if dimension and re.search(r"_add_\d|_level\d", name):
        states, base = package / "init_files/libero_newobj" / suite, name
    return Task(suite, name, instruction, str(bddl / f"{name}.bddl"), str(states / f"{base}.pruned_init"))


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled numpy arrays and nothing else: a pickle from elsewhere could otherwise run any code."""

    def find_class(self, module, name):
        if (module.split(".")[0], name) in (("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")


@cache
def initial_states(path: str) -> np.ndarray:
    """Official initial states of a task, float64 (50, 1 + nq + nv): time, qpos, qvel. (1, ...) for LIBERO-Plus's new layouts."""
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open(next(n for n in archive.namelist() if n.endswith("data.pkl"))) as file:
                states = ArrayUnpickler(file).load()
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, StopIteration, EOFError) as e:
        raise RuntimeError(f"{path} holds no initial states ({e or type(e).__name__}); run: {INSTALL} --force-reinstall") from None
    return np.atleast_2d(np.asarray(states, np.float64))
