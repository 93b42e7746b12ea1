"""Both scripts on two gloo processes on the CPU: the updates of one process, and the commands
themselves, whose runs one process goes on with."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import reflection_srpo as rs
import vla_srpo
from plumbing import adapters, checkpoint, ranks
from plumbing.optimizer import make_optimizer
from plumbing.run import Run
from reasoning import arrows, qwen
from reasoning import responses as r
from robots import find_suite, openvla, trajectories
from robots import policy as policies
from robots.suite import Start
from robots.tabletop import TASKS
from robots.tiny_vla import TinyVLA
from tests.conftest import fake_episode, lines
from tests.plumbing.test_ranks import on_ranks, run_here, same_numbers, save, steady, torchrun

pytestmark = pytest.mark.slow        # processes that torchrun starts

# SRPO for reasoning


def settings(folder: Path, **changes) -> rs.Settings:
    return rs.Settings(
        **dict(
            model=str(folder.parent / "base"),
            stage="rl",
            steps=1,
            prompts=2,
            group_size=2,
            lr=0.1,
            minibatch=4,
            epochs=2,
            micro_tokens=60,
            max_new_tokens=8,
            save_every=100,
        )
        | changes
    )


def responses(processor, s) -> r.Batch:
    """Six responses, of which a rank takes its share: 5 and 1 micro-batches."""
    torch.manual_seed(1)
    prompts = r.encode(arrows.dataset(6, 0), s, processor)
    completions = [torch.randint(7, len(arrows.WORDS), (n,)) for n in (3, 1, 7, 4, 5, 2)]
    advantages = [1.0, -1.0, 0.5, 2.0, -0.3, 0.7]
    own = [range(6)] if ranks.world_size() == 1 else [range(5), range(5, 6)]
    own = own[ranks.rank()]
    return r.Batch(
        [prompts[i] for i in own],
        [completions[i] for i in own],
        torch.tensor([advantages[i] for i in own]),
        len(own),
    )


def reflection_step(folder: Path, out: Path, change=lambda batch: batch, **changes):
    """A step of `train` whose rollouts and advantages made these responses: four updates
    -> (all weights, its row of metrics)."""
    run = Run(settings(folder, **changes), out, None, "reflection_srpo.py")
    parts = rs.load(run, folder.parent / "base")
    steady(parts.optimizer)
    batch = change(responses(parts.processor, run.s))
    sampled = [qwen.Completion(torch.tensor([7, 8]), "", False)]
    generate = lambda model, processor, prompts, *_: sampled * len(prompts)  # noqa: E731
    with patch.object(r, "generate", generate), patch.object(r, "chosen_rows", lambda *_: batch):
        rs.train(run, parts, arrows.dataset(4, 0), [], {})
    return adapters.whole_state(parts.model), (lines(out / "metrics.jsonl") or [{}, {}])[1]


CASES = {
    "plain": {},
    "checkpointed": dict(gradient_checkpointing=True, aggregate="token"),
    "frozen": dict(freeze_vision=True),
    "lora": dict(lora_rank=2, beta=0.1),
    "constant": dict(aggregate="constant"),
    "bf16": dict(lora_rank=2, beta=0.1, dtype="bfloat16", gradient_checkpointing=True),
}


def reflection_updates(folder: Path) -> None:
    for name, changes in CASES.items():
        weights, _ = reflection_step(folder, folder / name, **changes)
        save(weights, folder / f"{name}.safetensors")


def without_rows(batch: r.Batch) -> r.Batch:
    """The second rank has no response with an advantage."""
    if ranks.rank() == 0:
        return batch
    return r.Batch(batch.prompts[:1], batch.completions[:1], batch.advantages[:1], 0)


def idle(folder: Path) -> None:
    weights, _ = reflection_step(folder, folder, without_rows)
    save(weights, folder / "weights.safetensors")


SFT_CASES = {
    "plain": {},
    "lora": dict(lora_rank=2),
    "checkpointed": dict(gradient_checkpointing=True, freeze_vision=True),
}


def fine_tuning(folder: Path, out: Path, **changes) -> tuple[dict, list[dict]]:
    """Four updates on ten rows, by three: a rank has one and two of them, the last update's only
    row is one rank's alone -> (all weights, sft.jsonl)."""
    s = settings(
        folder, stage="sft", sft_epochs=1.0, sft_batch=3, sft_lr=1e-2, micro_tokens=80, **changes
    )
    run = Run(s, out, None, "reflection_srpo.py")
    parts = rs.load(run, folder.parent / "base")
    steady(parts.optimizer)
    rs.cold_start(run, parts, arrows.dataset(10, 0, target="teacher"))
    return adapters.whole_state(parts.model), lines(out / "sft.jsonl")


def sft(folder: Path) -> None:
    for name, changes in SFT_CASES.items():
        weights, _ = fine_tuning(folder, folder / name, **changes)
        save(weights, folder / f"{name}.safetensors")


# SRPO for robots


def vla_step(kind: str, out: Path) -> tuple[dict, dict]:
    """A step of `train` whose rollouts made twelve action chunks of four rollouts, of which the
    second rank has two: six updates -> (all weights, its row of metrics)."""
    torch.manual_seed(0)
    lora, checkpointed = kind in ("lora", "bf16"), kind in ("checkpointed", "bf16")
    s = vla_srpo.Settings(
        steps=1,
        groups=2,
        group_size=2,
        reward="binary",
        lr=1e-2,
        epochs=2,
        minibatch=4,
        micro_batch=2,
        target_kl=0.0,
        beta=0.1 * lora,
        average=0.0,
        save_every=100,
    )
    policy = (
        TinyVLA({})
        if kind == "tiny"
        else (openvla.OpenVLA(openvla.TINY, (32, 3, 128), (48, 4, 192)))
    )
    for p in policy.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.1)
    side = policy.frames(np.zeros((1, policy.camera, policy.camera, 3), np.uint8)).shape[-2]
    if kind != "tiny":
        ids = torch.tensor([[openvla.BOS, 5, 9, openvla.SPACE]])
        policy.prompt_ids = lambda texts: (
            ids.expand(len(texts), -1),
            torch.ones(len(texts), 4, dtype=torch.long),
        )
    if kind == "bf16":
        policy = policy.to(torch.bfloat16)
    if checkpointed:
        policy.set_gradient_checkpointing(True)
    if lora:
        layers = [
            name
            for name, m in policy.named_modules()
            if isinstance(m, torch.nn.Linear) and "lm_head" not in name and m.weight.requires_grad
        ]
        adapters.add_adapters(policy, layers, 2, seed=0)
    batch = policies.Batch(
        frames=torch.randint(256, (12, 1, side, side, 3), dtype=torch.uint8),
        instructions=["red cube"] * 12,
        bins=torch.randint(256, (12, 56)),
        logp=torch.full((12, 56), -5.5),
        mask=torch.rand(12, 56) < 0.8,
        advantage=torch.randn(12),
        trajectory=torch.tensor([0] * 4 + [1] * 4 + [2] * 2 + [3] * 2),
    )
    own = slice(None) if ranks.world_size() == 1 else (slice(0, 10), slice(10, 12))[ranks.rank()]
    batch = policies.Batch(**{name: x[own] for name, x in vars(batch).items()})
    optimizer = steady(make_optimizer(ranks.shard(policy), s.lr))
    run = Run(s, out, None, "vla_srpo.py")
    run.keep(adapters.kept(policy), optimizer)
    played = [fake_episode(Start(0, i), [8, 8 - 5 * (i % 2)], i) for i in range(4)]
    parts = vla_srpo.Parts(
        find_suite("tabletop"),
        SimpleNamespace(replaced=0),
        policy,
        "tabletop",
        None,
        None,
        None,
        optimizer,
    )
    with (
        patch.object(vla_srpo, "play", lambda *_, **__: ranks.share(played)),
        patch.object(policies, "collate", lambda *_: batch),
        patch.object(vla_srpo.evaluate, "of_run", lambda *_: {"success": 0.5, "episodes": 4}),
    ):
        vla_srpo.train(run, parts, {"success": 0.5})
    return adapters.whole_state(policy), (lines(out / "metrics.jsonl") or [{}, {}])[1]


VLA_CASES = ("tiny", "full", "checkpointed", "lora", "bf16")


def vla_updates(folder: Path) -> None:
    for kind in VLA_CASES:
        weights, _ = vla_step(kind, folder / kind)
        save(weights, folder / f"{kind}.safetensors")


def vla_script(*argv) -> int:
    """vla_srpo.py with the real simulator, few states and no films."""
    evaluate, s = vla_srpo.evaluate.evaluate, {"states": 1}
    with (
        patch.object(vla_srpo.evaluate, "evaluate", lambda *a, **k: evaluate(*a, **k | s)),
        patch.object(vla_srpo.evaluate, "film", lambda *_: None),
    ):
        return vla_srpo.main(list(map(str, argv)))


def vla_run(folder: Path) -> None:
    assert (
        vla_script(
            "--steps",
            2,
            "--groups",
            5,
            "--group_size",
            3,
            "--save_every",
            1,
            "--eval_every",
            0,
            "--threads",
            1,
            "--workers",
            1,
            "--tables",
            4,
            "--minibatch",
            8,
            "--out",
            folder / "run",
        )
        == 0
    )


def offline_run(folder: Path) -> None:
    """Seven trajectories: one rank has four of them, the other three."""
    data = folder.parent / "trajectories"
    if ranks.rank() == 0:
        for i in range(7):
            levels = [10 * i, 60 + 20 * i, 100 + 15 * i]
            images = np.stack([np.full((64, 64, 3), level, np.uint8) for level in levels])
            actions = np.random.default_rng(i).uniform(-0.4, 0.4, (16 - i, 7))
            trajectories.save(data / f"{i}.npz", trajectories.Trajectory(
                TASKS["tabletop"][0], i < 5, images, actions))
    ranks.barrier()
    assert vla_script("offline", "--data", data, "--steps", 2, "--minibatch", 6, "--micro_batch", 2,
                      "--workers", 1, "--threads", 1, "--out", folder / "run") == 0


# The tests


def close(got, wanted, atol: float, what: str) -> None:
    torch.testing.assert_close(got, wanted, atol=atol, rtol=0, msg=lambda m: f"{what}: {m}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    arrows.tiny_vlm(folder / "base", width=32)
    on_ranks(__file__, folder, "reflection_updates", "idle", "sft")
    return folder


def start_weights(folder: Path) -> dict:
    return rs.prepared(folder / "base", settings(folder / "x"))[0].state_dict()


def test_two_ranks_make_the_update_of_one(folder, tmp_path):
    """Weights after four Adam steps and the statistics, with 5 micro-batches on one rank and 1 on
    the other: full, checkpointed, frozen tower, LoRA."""
    start, there = start_weights(folder), folder / "reflection_updates"
    for name, changes in CASES.items():
        weights, row = reflection_step(there, tmp_path / name, **changes)
        two = load_file(there / f"{name}.safetensors")
        assert set(two) == set(weights) and row["updates"] == 4
        moved = 0.0
        for key, x in weights.items():
            # 0.1% of a step, or in bf16 a rounding
            atol = 1e-5 if x.dtype == torch.float32 else 2e-3
            close(two[key], x, atol, f"{name} {key}")
            moved = max(moved, float((x - start[key]).abs().max()))
        assert moved > 1e-3
        same_numbers(
            lines(there / name / "metrics.jsonl")[1],
            row,
            **(dict(rel=1e-3, abs=1e-5) if "dtype" not in changes else dict(rel=0.05, abs=1e-2)),
        )


def test_two_ranks_fine_tune_as_one(folder, tmp_path):
    """Weights after four steps, losses and norms, with rows that ranks share unevenly."""
    start, there = start_weights(folder), folder / "sft"
    for name, changes in SFT_CASES.items():
        weights, log = fine_tuning(there, tmp_path / name, **changes)
        two = load_file(there / f"{name}.safetensors")
        rows = lines(there / name / "sft.jsonl")
        assert set(two) == set(weights) and [row["step"] for row in log] == [1, 2, 3, 4]
        for key, x in weights.items():  # 1% of the largest step
            close(two[key], x, 1e-4, f"{name} {key}")
        assert max(float((x - start[key]).abs().max()) for key, x in weights.items()) > 1e-2
        for row, expected in zip(rows, log, strict=True):
            same_numbers(row, expected, rel=1e-3)


def test_a_rank_without_responses_only_keeps_step(folder, tmp_path):
    there = folder / "idle"

    def alone(batch: r.Batch) -> r.Batch:
        return r.Batch(batch.prompts[:5], batch.completions[:5], batch.advantages[:5], 5)

    weights, row = reflection_step(there, tmp_path, alone)
    two = load_file(there / "weights.safetensors")
    assert row["updates"] == 4
    for key, x in weights.items():
        torch.testing.assert_close(two[key], x, atol=1e-5, rtol=0)
    same_numbers(lines(there / "metrics.jsonl")[1], row, rel=1e-3, abs=1e-5)


def test_merged_weights_are_peft_s(folder):
    model = rs.prepared(folder / "base", settings(folder / "x", lora_rank=2))[0]
    for p in ranks.trainable(model).values():
        torch.nn.init.normal_(p, std=0.1)
    ours = adapters.whole_state(model)
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {
        f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    }
    assert len(layers) == 14 and set(layers) < set(ours)  # seven of each of two blocks
    assert set(ours) == set(start_weights(folder))
    for name, layer in layers.items():
        layer.merge()
        torch.testing.assert_close(ours[name], layer.get_base_layer().weight, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def robots(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("robots")
    on_ranks(__file__, folder, "vla_updates", "vla_run")
    on_ranks(__file__, folder, "offline_run")           # a script ends the ranks' group
    return folder


def test_two_ranks_make_the_vla_update_of_one(robots, tmp_path):
    """TinyVLA; OpenVLA in full, with checkpointed blocks in the language model and both towers,
    with adapters and a KL to the model without, and with all of that in bf16."""
    for kind in VLA_CASES:
        weights, row = vla_step(kind, tmp_path / kind)
        two = load_file(robots / "vla_updates" / f"{kind}.safetensors")
        assert set(two) == set(weights) and row["updates"] == 6 and row["old_kl"] > 1e-4
        atol = 1e-5 if kind != "bf16" else 2e-3
        for key, x in weights.items():
            # The softmax after this bias takes no notice of it: its gradient is rounding, which
            # Adam makes steps of
            if key != "conv3.bias":
                close(two[key], x, atol, f"{kind} {key}")
        same_numbers(
            lines(robots / "vla_updates" / kind / "metrics.jsonl")[1],
            row,
            **(dict(rel=1e-3, abs=1e-5) if kind != "bf16" else dict(rel=0.05, abs=1e-2)),
        )


def test_two_ranks_learn_offline_as_one(robots, tmp_path):
    offline_run(tmp_path / "one")
    two, one = (lines(folder / "run" / "metrics.jsonl")
                for folder in (robots / "offline_run", tmp_path / "one"))
    assert [row["updates"] for row in one[1:]] == [6, 6]        # 14 chunks in sixes, twice
    for a, b in zip(two, one, strict=True):         # far from these data a step's rounding grows
        same_numbers(a, b, rel=1e-2, abs=1e-5)
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-6)


def test_gradient_checkpointing_does_not_change_the_vla_s_update(tmp_path):
    plain, recomputed = (vla_step(kind, tmp_path / kind)[0] for kind in ("full", "checkpointed"))
    for key, x in plain.items():
        torch.testing.assert_close(recomputed[key], x, atol=1e-6, rtol=0)


def as_if_it_had_been_stopped(out: Path) -> None:
    """A run of two steps becomes one of three."""
    state = out / "checkpoint" / "state.json"
    assert checkpoint.read_state(out / "checkpoint")["step"] == 2
    state.write_text(state.read_text().replace('"steps": 2', '"steps": 3'))


def test_vla_srpo_on_two_ranks_resumes_on_one(robots):
    """Simulator, world model, running average and all: the average that is saved is that of the
    last two steps' weights."""
    out = robots / "vla_run" / "run"
    rows = lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and any(row["updates"] for row in rows[1:])
    assert rows[2]["groups_used"] <= 5
    start, saved = (
        load_file(path / "model.safetensors")
        for path in (vla_srpo.WEIGHTS / "tiny_vla", out / "policy")
    )
    assert set(start) == set(saved)
    for name in ("fc1.weight", "conv1.weight", "head.weight"):
        assert 0 < (start[name] - saved[name]).abs().max() < 0.01
    as_if_it_had_been_stopped(out)
    assert vla_script("--resume", out) == 0
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [0, 1, 2, 3]


def test_reflection_srpo_on_two_ranks_resumes_on_one(folder, tmp_path):
    """The command itself: one log, one policy; then one process goes on for a third step."""
    out = tmp_path / "run"
    done = torchrun(
        "reflection_srpo.py",
        "rl",
        "--model",
        folder / "base",
        "--steps",
        2,
        "--prompts",
        3,
        "--group_size",
        4,
        "--minibatch",
        6,
        "--max_new_tokens",
        12,
        "--save_every",
        1,
        "--eval_every",
        0,
        "--threads",
        1,
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("settings:") == 1 and "2 x cpu" in done.stdout
    rows = lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[1]["groups"] == 3
    assert (out / "policy" / "model.safetensors").exists()
    as_if_it_had_been_stopped(out)
    assert rs.main(["rl", "--resume", str(out)]) == 0
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [0, 1, 2, 3]


if __name__ == "__main__":
    run_here(globals())
