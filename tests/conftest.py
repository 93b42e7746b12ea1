"""Every test starts with one torch thread and torch's own arithmetic, because models are tiny and rounding depends on both, and leaves Ctrl-C as it found it."""
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)            # for what modules and their fixtures compute


@pytest.fixture(autouse=True)
def as_torch_starts():
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    handler = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is handler


# A tiny vision-language model

@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A Qwen2.5-VL of random weights, to be read only."""
    import arrows
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    arrows.tiny_vlm(folder, width=32)
    return folder


# LIBERO, real or in stand-in files

INSTALLED = all(importlib.util.find_spec(name) for name in ("libero", "robosuite", "bddl"))
needs_libero = pytest.mark.skipif(not INSTALLED, reason="LIBERO is not installed (pip install --no-deps -r requirements-libero.txt)")
needs_assets = pytest.mark.skipif(not INSTALLED or not os.environ.get("LIBERO_ASSETS"),
                                  reason="LIBERO_ASSETS is not set, or LIBERO is not installed: nothing to simulate")


def package(folder: Path, plus: bool = False) -> Path:
    """A stand-in for an installed LIBERO (or a copy of LIBERO-Plus) in `folder`: the files that are read before anything is simulated."""
    root = folder / "libero/libero"
    for name in ("benchmark", "bddl_files/libero_spatial", "init_files/libero_spatial"):
        (root / name).mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "benchmark/libero_suite_task_map.py").write_text("libero_task_map = " + repr(
        {"libero_spatial": ["pick_up_the_bowl", "pick_up_the_plate"], "libero_10": ["KITCHEN_SCENE10_turn_on_the_stove"]}))
    if plus:
        base = "KITCHEN_SCENE3_turn_on_the_stove"
        rows = {"libero_spatial": [("pick_up_the_bowl_view_0_10_100_-5_0_initstate_3", "Camera Viewpoints"),
                                   ("pick_up_the_bowl_light_12", "Light Conditions"), ("pick_up_the_bowl_tb_4", "Background Textures"),
                                   ("pick_up_the_bowl_add_13", "Objects Layout"), ("pick_up_the_bowl_level2_sample0", "Objects Layout"),
                                   ("pick_up_the_bowl_language_7", "Language Instructions")],
                "libero_10": [(f"{base}_view_0_0_100_0_0_initstate_0_noise_6", "Sensor Noise"), (f"{base}_table_2", "background textures")]}
        listed = {suite: [{"id": i, "name": name, "category": category} for i, (name, category) in enumerate(each, 1)]
                  for suite, each in rows.items()}
        (root / "benchmark/task_classification.json").write_text(json.dumps(listed))
        (root / "bddl_files/libero_spatial/pick_up_the_bowl_language_7.bddl").write_text(
            "(define (problem x)\n  (:language Grab  the dark\n bowl)\n)")
    return root


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in LIBERO, the only one on the path."""
    import libero_files
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("LIBERO_PLUS_PATH", raising=False)
    libero_files.tasks.cache_clear()
    yield package(tmp_path)
    libero_files.tasks.cache_clear()
