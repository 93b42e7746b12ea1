"""studies/demonstrate.py, vla_srpo.py and eval.py on real LIBERO, small: demonstrations,
fine-tuning, a step of RL, evaluation cut off and gone on with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import vla_srpo
from robots import libero as libero_envs
from robots import libero_expert, libero_files
from robots import openvla as vla
from robots import policy as policies
from studies import demonstrate as vla_sft
from tests.conftest import needs_assets

pytestmark = needs_assets
CHECKPOINT = Path(__file__).parents[1].resolve() / "fixtures" / "openvla_tiny" / "checkpoint"
LIBERO = ["--suite", "libero_object", "--tasks", "3", "--fast_sim"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Two initial states per split instead of 25; an empty working directory."""
    monkeypatch.setattr(
        libero_envs, "SPLITS", {"train": range(0, 4, 2), "heldout": range(1, 4, 2), "all": range(4)}
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_from_demonstrations_to_a_table(small, monkeypatch, capsys):
    sft = [*LIBERO, "--demos", "1", "--size", "64", "--steps", "20", "--threads", "1"]
    assert vla_sft.main([*sft, "--out", "sft"]) == 0
    said = capsys.readouterr().out
    assert "python eval.py vla --checkpoint sft --suite libero_object --tasks 3 --fast_sim" in said
    monkeypatch.setattr(libero_expert, "demonstrate", None)  # a second SFT plays nothing
    assert vla_sft.main([*sft, "--out", "again"]) == 0
    policy, again = policies.load_policy("sft"), policies.load_policy("again")
    assert all(
        torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values())
    )
    ((key, stats),) = json.loads((small / "sft/dataset_statistics.json").read_text()).items()
    assert key == "libero_object_no_noops" and policy.config["size"] == 64
    assert (
        stats["action"]["mask"] == [True] * 6 + [False]
        and -1 <= stats["action"]["q01"][0] < stats["action"]["q99"][0] <= 1
    )

    rl = [
        *LIBERO,
        "--workers",
        "1",
        "--model",
        "sft",
        "--steps",
        "1",
        "--groups",
        "2",
        "--group_size",
        "2",
        "--horizon",
        "16",
        "--reward",
        "srpo",
        "--threads",
        "1",
    ]
    assert vla_srpo.main([*rl, "--out", "rl"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "held-out initial states (odd numbers)" in said
    assert "horizon 16, 10 settling steps" in said
    assert libero_files.tasks("libero_object")[3].instruction in said
    row = json.loads((small / "rl/metrics.jsonl").read_text().splitlines()[1])
    assert row["env_steps"] == 4 * 16 and row["length"] == 16 and row["workers_replaced"] == 0
    assert json.loads((small / "rl/after.json").read_text())["episodes"] == 2
    assert [p.name for p in (small / "rl/after").iterdir()] == ["task3-failure.gif"]

    command = [
        "vla",
        "--checkpoint",
        "rl/policy",
        *LIBERO,
        "--workers",
        "1",
        "--horizon",
        "8",
        "--split",
        "all",
        "--out",
        "e",
    ]
    assert evaluation.main([*command, "--states", "1"]) == 0
    assert evaluation.main([*command, "--states", "2"]) == 0  # one episode is finished already
    said = capsys.readouterr().out
    assert "the papers' own protocol; horizon 8, 10 settling steps, fast pixels" in said
    lines = (small / "e/libero_object/all.jsonl").read_text().splitlines()
    assert sorted((row["task"], row["index"]) for row in map(json.loads, lines[1:])) == [
        (3, 0),
        (3, 1),
    ]
    assert json.loads((small / "e/libero_object/result.json").read_text())["all"]["episodes"] == 2
    assert evaluation.main([*command, "--horizon", "9"]) == 2
    said = capsys.readouterr().err
    assert "all.jsonl was begun with protocol 'horizon 8" in said and "not 'horizon 9" in said
    assert (
        evaluation.main(
            [
                "paper",
                "--checkpoint",
                "libero_object=rl/policy",
                *command[-4:],
                "--tasks",
                "3",
                "--fast_sim",
                "--horizon",
                "8",
                "--states",
                "2",
            ]
        )
        == 0
    )  # the same episodes again, from the same file
    ours, how = capsys.readouterr().out.splitlines()[-2:]
    assert ours.split() == ["ours,", "parts", "of", "the", "suites", "-", "0.0", "-", "-", "-"]
    assert (
        how.startswith("  libero_object: ")
        and " of 500 episodes" in how
        and "initial states: all; horizon" in how
    )


@pytest.mark.slow
def test_openvla(small, monkeypatch):
    """A random checkpoint of OpenVLA-OFT's architecture plays one chunk, on the images that the
    published evaluation would show it."""
    seen, pixels = [], vla.OpenVLA.pixel_values
    monkeypatch.setattr(
        vla.OpenVLA,
        "pixel_values",
        lambda self, frames: seen.append(frames) or pixels(self, frames),
    )
    prompt = torch.tensor([[vla.BOS, 512, vla.SPACE]])  # the fixture has no tokenizer
    monkeypatch.setattr(
        vla.OpenVLA, "prompt_ids", lambda self, texts: (prompt, torch.ones_like(prompt))
    )
    assert (
        evaluation.main(
            [
                "vla",
                "--checkpoint",
                str(CHECKPOINT),
                "--suite",
                "libero_spatial",
                "--tasks",
                "2",
                "--states",
                "1",
                "--horizon",
                "8",
                "--workers",
                "1",
                "--out",
                "e",
            ]
        )
        == 0
    )
    env = libero_envs.Libero("libero_spatial", 2, split="heldout", size=256)
    image = env.reset(options={"index": 0})[0]["image"]
    env.close()
    np.testing.assert_array_equal(seen[0][0, 0], vla.preprocess(image[::-1, ::-1]))
    settings = json.loads((small / "e/libero_spatial/heldout.jsonl").read_text().splitlines()[0])
    assert len(seen) == 1 and settings["key"] == "libero_spatial_no_noops"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--suite", "libero_plus:camera"], "LIBERO-Plus is not here; run: bash setup.sh --lib"),
        (["--suite", "libero_objects"], "unknown suite 'libero_objects'"),
        (["--suite", "libero_object", "--tasks", "10"], "unknown task 10; libero_object has 0..9"),
        (["--suite", "libero_object"], "has action statistics for tabletop, not for libero_object"),
        (["--split", "all"], "--split all: tabletop has train, heldout"),
    ],
)
def test_bad_flags(small, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("robots.libero_files.find_plus", lambda plus="": plus)
    assert vla_srpo.main([*flags, "--out", "x", "--reward", "binary"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said and not (small / "x").exists()
