"""plumbing/ranks.py with two gloo processes on the CPU: the update of one process, checkpoints across world sizes, a rank that dies."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reasoning import arrows
import grpo
from plumbing.run import read_state
from plumbing import ranks as parallel
from robots import policy as policies
from reasoning import responses as reflection_rollouts
from reasoning import sft as reflection_sft
import reflection_srpo as rs
import rewards
from robots import openvla as vla
import vla_srpo
from robots.tiny_vla import TinyVLA

ROOT = Path(__file__).parents[2]


def torchrun(*command, ranks: int = 2, **more) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *map(str, command)],
                          capture_output=True, text=True, env=environment, timeout=240, cwd=ROOT)


def job(name: str, folder: Path, ranks: int = 2) -> subprocess.CompletedProcess:
    """Run a function of this file, named below, on every rank."""
    done = torchrun(__file__, name, folder, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def steady(optimizer):
    """Adam makes whole steps of gradients that are rounding alone, in a direction that the number of threads decides; not with this epsilon."""
    optimizer.param_groups[0]["eps"] = 1e-5
    return optimizer


# What the ranks do. One process does the same when `parallel` is not started, as the tests call these functions directly too.

def reflection_case(folder: Path, **changes):
    """Settings, model, processor and the six completions of a batch, of which a rank takes its share: 5 and 1 micro-batches."""
    s = rs.Settings(model=str(folder / "base"), minibatch=4, epochs=2, micro_tokens=60, max_new_tokens=8, **changes)
    model, processor = rs.load(s, folder / "base")
    model.train()
    torch.manual_seed(1)
    _, prompts = reflection_rollouts.encode(arrows.dataset(6, 0), s, processor, None)
    completions = [torch.randint(7, len(arrows.WORDS), (n,)) for n in (3, 1, 7, 4, 5, 2)]
    advantages = [1.0, -1.0, 0.5, 2.0, -0.3, 0.7]
    if parallel.world_size() > 1:
        own = [0, 1, 2, 3, 4] if parallel.rank() == 0 else [5]
    else:
        own = range(6)
    return s, model, processor, rs.Batch([prompts[i] for i in own], [completions[i] for i in own], torch.tensor([advantages[i] for i in own]))


def reflection_updates(folder: Path, **changes) -> tuple[dict, dict]:
    """Four clipped updates -> (all weights, statistics)."""
    s, model, processor, batch = reflection_case(folder, **changes)
    optimizer = steady(grpo.make_optimizer(parallel.shard(model), 1e-2))
    torch.manual_seed(2 + parallel.rank())                  # the ranks' random numbers differ, as after rollouts; the first rank's are one process's
    stats = rs.update(model, None, processor, optimizer, batch, s)
    return parallel.whole_weights(model), stats


CASES = {"plain": {}, "checkpointed": dict(gradient_checkpointing=True, aggregate="token"), "frozen": dict(freeze_vision=True),
         "lora": dict(lora_rank=2, beta=0.1), "constant": dict(aggregate="constant"),
         "bf16": dict(lora_rank=2, beta=0.1, dtype="bfloat16", gradient_checkpointing=True)}


def updates(folder: Path) -> None:
    for name, changes in CASES.items():
        weights, stats = reflection_updates(folder, **changes)
        if parallel.rank() == 0:
            save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(stats))


SFT_CASES = {"plain": {}, "lora": dict(lora_rank=2), "checkpointed": dict(gradient_checkpointing=True, freeze_vision=True)}


def fine_tuning(folder: Path, out: Path, **changes) -> tuple[dict, list[dict]]:
    """Four updates on ten rows, by three: a rank has one and two of them, the last update's only row is one rank's alone. So is the second's first
    row, whose picture is broken: that rank has nothing to train on then. -> (all weights, sft.jsonl)."""
    s = rs.Settings(model=str(folder / "base"), sft_epochs=1, sft_batch=3, sft_lr=1e-2, micro_tokens=80, save_every=100, **changes)
    out.mkdir(exist_ok=True)
    rows = arrows.dataset(10, 0, targets=True)
    rows[np.random.default_rng([s.seed, 0]).permutation(10)[3]].images = [b"broken"]
    model, processor = rs.load(s, folder / "base")
    optimizer = steady(rs.optimizer_of(model, s))
    assert reflection_sft.fine_tune(s, out, model, processor, rows, 0, optimizer, reflection_rollouts.Rejections(out),
                                    lambda step: rs.save(out, s, "sft", step, model, optimizer)) == 4
    return parallel.whole_weights(model), [json.loads(line) for line in (out / "sft.jsonl").read_text().splitlines()] if parallel.rank() == 0 else []


def sft(folder: Path) -> None:
    for name, changes in SFT_CASES.items():
        weights, _ = fine_tuning(folder, folder / f"sft-{name}", **changes)
        if parallel.rank() == 0:
            save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"sft-{name}.safetensors")


def idle(folder: Path) -> None:
    """The second rank has no response with an advantage."""
    s, model, processor, batch = reflection_case(folder)
    if parallel.rank():
        batch.idle = True
    stats = rs.update(model, None, processor, grpo.make_optimizer(parallel.shard(model), 1e-2), batch, s)
    if parallel.rank() == 0:
        (folder / "idle.json").write_text(json.dumps(stats))


def vla_updates(kind: str) -> tuple[dict, dict]:
    """Six clipped updates of a VLA on twelve action chunks of five rollouts, of which the second rank has two -> (weights, statistics)."""
    torch.manual_seed(0)
    adapters = kind in ("lora", "bf16")
    s = vla_srpo.Settings(minibatch=4, micro_batch=2, epochs=2, target_kl=0, beta=0.1 * adapters, lora_rank=2 * adapters,
                          gradient_checkpointing=kind in ("checkpointed", "bf16"))
    policy = TinyVLA({}) if kind == "tiny" else vla.OpenVLA(vla.TINY, (32, 3, 128), (48, 4, 192))
    for p in (p for p in policy.parameters() if p.ndim == 2):
        torch.nn.init.normal_(p, std=0.1)
    size = policy.config.get("size", vla.IMAGE)
    if kind != "tiny":
        policy.prompt_ids = lambda texts: (torch.tensor([[vla.BOS, 5, 9, vla.SPACE]]).expand(len(texts), -1), torch.ones(len(texts), 4, dtype=torch.long))
    policy = policies.prepared(policy.to(torch.bfloat16) if kind == "bf16" else policy, s)
    batch = policies.Batch(frames=torch.randint(256, (12, 1, size, size, 3), dtype=torch.uint8), instructions=["red cube"] * 12,
                           bins=torch.randint(256, (12, 56)), logp=torch.full((12, 56), -5.5), mask=torch.rand(12, 56) < 0.8,
                           advantage=torch.randn(12), trajectory=torch.tensor([0] * 4 + [1] * 4 + [2] * 2 + [3] * 2))
    own = slice(None) if parallel.world_size() == 1 else slice(0, 10) if parallel.rank() == 0 else slice(10, 12)
    batch = policies.Batch(**{name: x[own] for name, x in vars(batch).items()})
    optimizer = steady(grpo.make_optimizer(parallel.shard(policy), 1e-3))
    torch.manual_seed(2 + parallel.rank())
    stats = vla_srpo.update(policy, None, optimizer, batch, s)
    return parallel.whole_weights(policy), stats


VLA_CASES = ("tiny", "full", "checkpointed", "lora", "bf16")


def vla_cases(folder: Path) -> None:
    for kind in VLA_CASES:
        weights, stats = vla_updates(kind)
        if parallel.rank() == 0:
            save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"vla-{kind}.safetensors")
            (folder / f"vla-{kind}.json").write_text(json.dumps(stats))


def vla_script(folder: Path) -> None:
    """vla_srpo.py with the real simulator, few states and no films; then, from its checkpoint, a third step."""
    evaluate = vla_srpo.evaluation.evaluate_vla
    vla_srpo.evaluation.evaluate_vla = lambda policy, workers, split, key, *_: evaluate(policy, workers, split, key, states=1)
    vla_srpo.evaluation.film = lambda *_: None
    code = vla_srpo.main(["--resume", str(folder / "vla")] if (folder / "vla" / "checkpoint").exists() else [
        "--steps", "2", "--groups", "5", "--group_size", "3", "--save_every", "1", "--eval_every", "0", "--threads", "1", "--workers", "1",
        "--tables", "4", "--minibatch", "8", "--out", str(folder / "vla")])
    assert code == 0


def bf16_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).bfloat16()      # 7, 5 and 3 rows: uneven shards


def bf16_steps(model, optimizer, steps: range) -> list[float]:
    norms = []
    for step in steps:
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(x).float().square().mean().backward()
        norms.append(grpo.clip_and_step(optimizer, model, 0.1)[0])
    return norms


def bf16(folder: Path) -> None:
    model = parallel.shard(bf16_model())
    optimizer = grpo.make_optimizer(model, 1e-3)
    norms = bf16_steps(model, optimizer, range(3))
    parallel.save_checkpoint(folder / "checkpoint", dict(model.named_parameters()), optimizer, {"step": 3, "norms": norms})
    parallel.save_checkpoint(folder / "checkpoint", dict(model.named_parameters()), optimizer, {"step": 3, "norms": norms})     # replaces it


def bf16_resume(folder: Path) -> None:
    """From a checkpoint of one process."""
    model = parallel.shard(bf16_model())
    optimizer = grpo.make_optimizer(model, 1e-3)
    parallel.load_checkpoint(folder / "single", dict(model.named_parameters()), optimizer)
    bf16_steps(model, optimizer, range(3, 5))
    weights = parallel.whole_weights(model)
    if parallel.rank() == 0:
        save_file(weights, folder / "resumed.safetensors")


def reward(folder: Path) -> None:
    """Each rank knows its own rollouts' latents; all ranks see all."""
    latents, success, task = latent_case()
    mine = parallel.share(range(len(task)))
    gathered = [np.array(x) for x in zip(*parallel.gather([(latents[i], success[i], task[i]) for i in mine]))]
    record = rewards.progress_reward(*gathered)[0]
    (folder / f"reward-{parallel.rank()}.json").write_text(json.dumps(record.tolist()))


def latent_case():
    rng = np.random.default_rng(0)
    success = np.array([False] * 6 + [True] * 6)                # the first rank has failures alone
    return rng.standard_normal((12, 4)) + success[:, None], success, ["a", "b"] * 6


def death(folder: Path) -> None:
    if parallel.rank():
        raise SystemExit(7)
    parallel.gather([])
    (folder / "survived").touch()


# The tests

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    arrows.tiny_vlm(folder / "base", width=32)
    return folder


def test_two_ranks_make_the_update_of_one(folder):
    """Weights after four Adam steps and the statistics, with 5 micro-batches on one rank and 1 on the other: full, checkpointed, frozen tower, LoRA."""
    job("updates", folder)
    start = reflection_case(folder)[1].state_dict()
    for name, changes in CASES.items():
        weights, stats = reflection_updates(folder, **changes)
        two = load_file(folder / f"{name}.safetensors")
        assert set(two) == set(weights) and stats["updates"] == 4
        moved = 0.0
        for key, x in weights.items():
            # 0.1% of a step, or in bf16 a rounding
            torch.testing.assert_close(two[key], x, atol=1e-5 if x.dtype == torch.float32 else 2e-3, rtol=0, msg=lambda m: f"{name} {key}: {m}")
            moved = max(moved, float((x - start[key]).abs().max()))
        assert moved > 1e-3
        for key, x in json.loads((folder / f"{name}.json").read_text()).items():
            assert x == pytest.approx(stats[key], **(dict(rel=1e-3, abs=1e-5) if "dtype" not in changes else dict(rel=0.05, abs=1e-2))), (name, key)


def test_two_ranks_fine_tune_as_one(folder, tmp_path):
    """Weights after four steps, losses and norms, with rows that ranks share unevenly; see `fine_tuning`."""
    job("sft", folder)
    start = reflection_case(folder)[1].state_dict()
    for name, changes in SFT_CASES.items():
        weights, log = fine_tuning(folder, tmp_path / name, **changes)
        two, rows = load_file(folder / f"sft-{name}.safetensors"), (folder / f"sft-{name}" / "sft.jsonl").read_text().splitlines()
        assert set(two) == set(weights) and len(log) == len(rows) == 4
        for key, x in weights.items():
            torch.testing.assert_close(two[key], x, atol=1e-4, rtol=0, msg=lambda m: f"{name} {key}: {m}")      # 1% of the largest step
        assert max(float((x - start[key]).abs().max()) for key, x in weights.items()) > 1e-2
        for row, expected in zip(map(json.loads, rows), log):
            assert row == pytest.approx(expected, rel=1e-3), name


def test_two_ranks_make_the_vla_update_of_one(folder):
    """TinyVLA; OpenVLA in full, with checkpointed blocks in the language model and both towers, with adapters and a KL to the model without, and
    with all of that in bf16."""
    job("vla_cases", folder)
    for kind in VLA_CASES:
        weights, stats = vla_updates(kind)
        two = load_file(folder / f"vla-{kind}.safetensors")
        assert set(two) == set(weights) and stats["updates"] == 6 and stats["old_kl"] > 1e-4
        for key, x in weights.items():
            if key != "conv3.bias":         # the softmax after it takes no notice of it: its gradient is rounding, which Adam makes steps of
                torch.testing.assert_close(two[key], x, atol=1e-5 if kind != "bf16" else 2e-3, rtol=0, msg=lambda m: f"{kind} {key}: {m}")
        for key, x in json.loads((folder / f"vla-{kind}.json").read_text()).items():
            assert x == pytest.approx(stats[key], **(dict(rel=1e-3, abs=1e-5) if kind != "bf16" else dict(rel=0.05, abs=1e-2))), (kind, key)


def test_gradient_checkpointing_does_not_change_the_vla_s_update():
    (plain, _), (recomputed, _) = vla_updates("full"), vla_updates("checkpointed")
    for key, x in plain.items():
        torch.testing.assert_close(recomputed[key], x, atol=1e-6, rtol=0)


def test_a_rank_without_responses_only_keeps_step(folder):
    job("idle", folder)
    stats, (s, model, processor, batch) = json.loads((folder / "idle.json").read_text()), reflection_case(folder)
    alone = rs.Batch(batch.prompts[:5], batch.completions[:5], batch.advantages[:5])
    torch.manual_seed(2)
    expected = rs.update(model, None, processor, grpo.make_optimizer(model, 1e-2), alone, s)
    assert stats["updates"] == expected["updates"] == 4


def test_merged_weights_are_peft_s(folder):
    _, model, _, _ = reflection_case(folder, lora_rank=2)
    for name, p in parallel.trainable(model).items():
        torch.nn.init.normal_(p, std=0.1)
    ours = parallel.whole_weights(model)
    theirs = model.merge_and_unload().state_dict()
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, atol=1e-6, rtol=1e-5)


def test_bf16_shards_train_and_resume_on_one_process(tmp_path):
    """Two ranks save after three steps; one process goes on and equals one that did it all: weights, masters, moments."""
    job("bf16", tmp_path)
    state = read_state(tmp_path / "checkpoint")
    whole = bf16_model()
    optimizer = grpo.make_optimizer(whole, 1e-3)
    assert state["norms"] == pytest.approx(bf16_steps(whole, optimizer, range(3)), rel=1e-2)        # gradients are bf16
    resumed = bf16_model()
    loaded = grpo.make_optimizer(resumed, 1e-3)
    parallel.load_checkpoint(tmp_path / "checkpoint", dict(resumed.named_parameters()), loaded)
    ours, theirs = grpo.optimizer_tensors(loaded), grpo.optimizer_tensors(optimizer)
    assert set(ours) == set(theirs) and all(ours[key].dtype == x.dtype for key, x in theirs.items())
    for key, x in theirs.items():
        torch.testing.assert_close(ours[key], x, atol=1e-5, rtol=1e-2, msg=lambda m: f"{key}: {m}")
    assert not (tmp_path / "checkpoint.tmp").exists() and not (tmp_path / "checkpoint.old").exists()


def test_a_checkpoint_of_one_process_resumes_on_two(tmp_path):
    model = bf16_model()
    optimizer = grpo.make_optimizer(model, 1e-3)
    bf16_steps(model, optimizer, range(3))
    parallel.save_checkpoint(tmp_path / "single", dict(model.named_parameters()), optimizer, {"step": 3})
    job("bf16_resume", tmp_path)
    bf16_steps(model, optimizer, range(3, 5))
    for name, x in load_file(tmp_path / "resumed.safetensors").items():
        torch.testing.assert_close(x, model.state_dict()[name], atol=1e-5, rtol=0)


def test_a_damaged_or_foreign_checkpoint_is_one_line(tmp_path):
    job("bf16", tmp_path)
    other = torch.nn.Linear(7, 5)
    with pytest.raises(ValueError, match="another model's") as error:
        parallel.load_checkpoint(tmp_path / "checkpoint", dict(other.named_parameters()), grpo.make_optimizer(other, 1e-3))
    assert "\n" not in str(error.value)
    model = bf16_model()
    for part in (tmp_path / "checkpoint").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged") as error:
        parallel.load_checkpoint(tmp_path / "checkpoint", dict(model.named_parameters()), grpo.make_optimizer(model, 1e-3))
    assert "\n" not in str(error.value)


def test_the_reference_set_is_the_whole_batch_s(tmp_path):
    job("reward", tmp_path)
    latents, success, task = latent_case()
    expected = rewards.progress_reward(latents, success, task)[0]
    assert 0 < expected[:6].max() < 1                           # the first rank alone, without successes, would pay 0
    for rank in range(2):
        assert json.loads((tmp_path / f"reward-{rank}.json").read_text()) == pytest.approx(expected.tolist())


def test_a_rank_that_dies_ends_the_other(tmp_path):
    done = torchrun(__file__, "death", tmp_path)
    assert done.returncode != 0 and not (tmp_path / "survived").exists()


def test_reflection_srpo_on_two_ranks_resumes_on_one(folder, tmp_path):
    """The command itself: one log, one policy; then one process goes on for a third step."""
    out = tmp_path / "run"
    done = torchrun("reflection_srpo.py", "rl", "--model", folder / "base", "--steps", 2, "--prompts", 3, "--group_size", 4, "--minibatch", 6,
                    "--max_new_tokens", 12, "--save_every", 1, "--eval_every", 0, "--threads", 1, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("settings:") == 1 and "2 x cpu" in done.stdout
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2] and rows[1]["groups"] == 3 and (out / "policy" / "model.safetensors").exists()
    state = out / "checkpoint" / "state.json"
    state.write_text(state.read_text().replace('"steps": 2', '"steps": 3'))             # as if it had been stopped
    assert rs.main(["rl", "--resume", str(out)]) == 0
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_vla_srpo_on_two_ranks_resumes_on_one(tmp_path):
    """Simulator, world model, running average and all: the average that is saved is that of the last two steps' weights."""
    job("vla_script", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "vla" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2] and any(r["updates"] for r in rows[1:]) and rows[2]["groups_used"] <= 5
    state = tmp_path / "vla" / "checkpoint" / "state.json"
    assert read_state(tmp_path / "vla" / "checkpoint")["step"] == 2
    start, saved = (load_file(path / "model.safetensors") for path in (vla_srpo.WEIGHTS / "tiny_vla", tmp_path / "vla" / "policy"))
    assert set(start) == set(saved) and all(0 < (start[k] - saved[k]).abs().max() < 0.01 for k in ("fc1.weight", "conv1.weight", "head.weight"))
    state.write_text(state.read_text().replace('"steps": 2', '"steps": 3'))             # as if it had been stopped
    job("vla_script", tmp_path, ranks=1)
    assert [json.loads(line)["step"] for line in (tmp_path / "vla" / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_share_and_even_alone():
    assert parallel.share([3, 1, 2]) == [3, 1, 2] and parallel.even([[0]]) == [[0]] and parallel.gather([1]) == [1]
    torch.manual_seed(0)
    ours = parallel.permutation(5)
    torch.manual_seed(0)
    assert torch.equal(ours, torch.randperm(5))


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel.start()
    globals()[sys.argv[1]](Path(sys.argv[2]))
    parallel.stop()
    sys.stdout.flush()
    os._exit(0)             # gloo's threads may abort an interpreter that takes its time to end
