"""studies/bench.py: real sizes without memory for them, FLOPs against arithmetic, a measured case
end to end, an unmeasured one that says so."""
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from studies import bench
from tests.conftest import lines


@pytest.mark.parametrize("name, parameters", [
    ("openvla-7b", 7.541e9), ("qwen2.5-vl-7b", 8.292e9), ("vjepa2-vitg", 1.034e9)])
def test_large_models_have_the_published_sizes(name, parameters):
    _, model = bench.build(bench.Case(name), "meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)


@pytest.mark.parametrize("name", ["openvla-small", "qwen2.5-vl-small"])
def test_adapters_are_those_of_the_scripts(name):
    """On Llama or Qwen all of q k v o gate up down; of OpenVLA's towers what runs, too."""
    _, model = bench.build(bench.Case(name, lora_rank=4), "cpu")
    trained = {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    language = {n for n in trained if "language_model" in n}
    assert len(language) == 4 * 7 and not [n for n in trained if "lm_head" in n]
    assert (language == trained) == (name == "qwen2.5-vl-small")
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_flops_are_two_per_weight_and_token():
    case = bench.Case("openvla-small", rows=1)
    s, model = bench.build(case, "cpu")
    forward = bench.openvla_work(case, s, model).forward
    tokens = 256 + 24 + 57
    blocks = {"vision_backbone.featurizer.blocks": 261,
              "vision_backbone.fused_featurizer.blocks": 256, "projector": 256,
              "language_model.model.layers": tokens}
    never_run = tuple(f"vision_backbone.{tower}.blocks.3."
                      for tower in ("featurizer", "fused_featurizer"))
    expected = sum(2 * p.numel() * count for name, p in model.named_parameters()
                   for prefix, count in blocks.items()
                   if name.startswith(prefix) and p.ndim == 2 and not name.startswith(never_run))
    # Attention: q k, and with v
    wide = sum(4 * count**2 * width * depth for count, width, depth in (
        (261, 128, 3), (256, 144, 3), (tokens, 256, 4)))
    patches = 256 * 2 * 3 * 14**2 * (128 + 144)
    head = 2 * 256 * 56 * 256
    assert bench.flops(forward) == pytest.approx(expected + wide + patches + head, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("rank, backward", [(0, 2), (4, 1)])
def test_the_update_of_a_frozen_tower_is_counted_once(rank, backward):
    """Against the FLOPs of the update itself: its forward passes and what autograd does."""
    case = bench.Case("qwen2.5-vl-small", lora_rank=rank, rows=2)
    s, model = bench.build(case, "cpu")
    work = bench.qwen_work(case, s, model)
    once, still = bench.flops(work.forward), bench.flops(work.frozen)
    assert 0.1 * once < still < 0.9 * once
    assert (1 + backward) * (once - still) + still == pytest.approx(
        bench.flops(torch.enable_grad()(work.update)), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvla-small", "qwen2.5-vl-small"])
@pytest.mark.parametrize("rank", [0, 4])
def test_an_update_moves_what_trains_and_counts_once(name, rank):
    case = bench.Case(name, lora_rank=rank, gradient_checkpointing=True, rows=2, length=8)
    s, model = bench.build(case, "cpu")
    work = (bench.openvla_work if name == "openvla-small" else bench.qwen_work)(case, s, model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    summary = work.update()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert summary["updates"] == 1 and summary["skipped"] == 0 and summary["grad_norm"] > 0
    assert moved and moved <= trained


@pytest.mark.slow
def test_a_small_case_is_measured(tmp_path):
    out = tmp_path / "new" / "small.jsonl"
    assert bench.main(["--model", "vjepa2-small", "--out", str(out)]) == 0
    _, row = lines(out)
    rollout = row["rollout"]
    assert row["measured"] and rollout["per_second"] == pytest.approx(4 / rollout["seconds"])
    assert rollout["mfu"] == pytest.approx(
        row["forward_flops"] / rollout["seconds"] / row["peak_flops"])
    assert rollout["peak_gib"] > 0.1


def test_what_takes_a_gpu_is_marked_with_its_command(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = bench.run(bench.Case("openvla-7b"), 9)
    assert not row["measured"] and "it takes a GPU" in row["why"]
    said = bench.show(row)
    assert "not measured" in said and "python -m studies.bench --model openvla-7b" in said


def slow(case):
    time.sleep(60)


def test_a_row_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(bench, "measure", slow)
    began = time.monotonic()
    row = bench.run(bench.Case("vjepa2-small"), seconds=4)
    assert not row["measured"] and "stopped after 4 s" in row["why"]
    assert time.monotonic() - began < 30


def test_gpu_goes_on_where_it_ended(monkeypatch, tmp_path, capsys):
    """Every case once, those that tell most first; what failed comes again."""
    asked, fails = [], {"openvla-7b"}

    def run(case, seconds):
        assert 0 < seconds <= 20 * 60
        asked.append((case.model, case.lora_rank, case.gradient_checkpointing, case.sampler,
                      case.skewed))
        row = bench.asdict(case) | {"command": "-"}
        if case.model in fails:
            return row | {"measured": False, "why": "CUDA out of memory."}
        half = {"per_second": 32 * (1 + bool(case.lora_rank)), "mfu": 0.5, "peak_gib": 1.0}
        return row | {"measured": True, "unit": "things", "rollout": half} | (
            {} if case.model in bench.VJEPA or case.sampler else
            {"update": half | {"planned_gib": 1.1}})
    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    argv = ["gpu", "--out", str(tmp_path / "gpu.jsonl")]
    assert bench.main(argv) == 0
    assert len(asked) == len(set(asked)) == 13
    assert asked[0] == ("openvla-7b", 32, True, "", False)
    said = capsys.readouterr().out
    assert said.count("CUDA out of memory.") == 4 and "planned 1.10" in said
    # 1024 responses of 512 tokens at 64 a second: 136.5 minutes for each half
    assert "qwen2.5-vl-7b, LoRA: 273.1 minutes (rollout 136.5, update 136.5)" in said
    asked.clear()
    fails.clear()
    assert bench.main(argv) == 0
    assert {model for model, *_ in asked} == {"openvla-7b"} and len(asked) == 4
    # 512 rollouts of 64 chunks at 32 a second, and as many clips
    assert "openvla-7b, full: 34.4 minutes (rollout 17.1, update 17.1, reward 0.3)" in (
        capsys.readouterr().out)


def test_vllm_and_trl_come_where_they_are_installed(monkeypatch, tmp_path, capsys):
    """vLLM's rate is that of a step's rollout; TRL's step comes last, in what time is left."""
    called, fault = [], ""

    def run(case, seconds):
        rate = {"per_second": 640 if case.sampler == "vllm" else 64, "mfu": 0.5, "peak_gib": 1.0}
        return bench.asdict(case) | {"command": "-", "measured": True, "unit": "things",
                                     "rollout": rate} | ({} if case.sampler else {"update": rate})

    def trl(argv, seconds):
        called.append((argv, seconds))
        if fault:
            raise RuntimeError(fault)
        return "ours / TRL"
    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench, "find_spec", lambda name: name in ("vllm", "trl"))
    monkeypatch.setattr(bench.runs, "python", trl)
    argv = ["gpu", "--out", str(tmp_path / "gpu.jsonl")]
    assert bench.main(argv) == 0
    said = capsys.readouterr().out
    assert "qwen2.5-vl-7b, vllm" in said and "vllm, lengths skewed" not in said
    assert "qwen2.5-vl-7b, LoRA: 150.2 minutes (rollout by vLLM 13.7, update 136.5)" in said
    assert "ours / TRL" in said and "TRL's step not measured" not in said
    [(command, seconds)] = called
    assert command == ["-m", "studies.bench_trl", "--model", "qwen2.5-vl-7b", "--out",
                       str(tmp_path / "gpu_trl.json")] and 1100 < seconds <= 1200
    fault = "error: CUDA out of memory"
    assert bench.main(argv) == 0
    assert ("TRL's step not measured: error: CUDA out of memory; measure it: python -m "
            "studies.bench_trl --model") in capsys.readouterr().out
    assert bench.main([*argv, "--minutes", "1e-9"]) == 0 and called[-1][1] == 0
    (tmp_path / "gpu_trl.json").touch()
    assert bench.main(argv) == 0 and len(called) == 3                               # none twice


def test_ends_are_drawn_with_their_chance():
    torch.manual_seed(0)
    logits = bench.ending(3, 0.25, None, None, torch.randn(5, 2, 10))
    assert logits.softmax(-1)[..., 3].numpy() == pytest.approx(0.25)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ours", "transformers"])
def test_skewed_lengths_are_counted(sampler):
    """No more than the longest allows, about a quarter of it in the mean."""
    case = bench.Case("qwen2.5-vl-small", rows=16, length=16, sampler=sampler, skewed=True)
    torch.manual_seed(0)
    work = bench.work_of(case, *bench.build(case, "cpu"))
    assert work.update is None and 16 <= work.rollout() < 0.6 * work.n


def test_what_has_no_time_left_comes_in_another_call(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "measure", None)
    assert bench.main(["--minutes", "1e-9", "--out", str(tmp_path / "small.jsonl")]) == 0
    assert capsys.readouterr().out.count("no time was left") == 13


def killed(case):
    os._exit(1)


def failing(case):
    raise RuntimeError("CUDA out of memory.\nand more lines")


@pytest.mark.slow
@pytest.mark.parametrize("measure, words", [
    (killed, "terminated abruptly"), (failing, "CUDA out of memory.")])
def test_a_case_that_does_not_fit_says_so_and_the_others_go_on(measure, words, monkeypatch):
    """One that the system kills, and one with an error of several lines."""
    monkeypatch.setattr(bench, "measure", measure)
    row = bench.run(bench.Case("vjepa2-small"), 60)
    assert not row["measured"] and words in row["why"] and "\n" not in bench.show(row)


@pytest.mark.parametrize("argv, words", [
    (["--model", "gpt"], "--model"), (["--rows", "-1"], "--rows must be at least 0"),
    (["--threads", "0"], "--threads must be at least 1"),
    (["gpu", "--minutes", "0"], "--minutes must be positive"),
    (["cpu"], "no command 'cpu'"), (["ranks"], "ranks needs --model: one that is trained"),
    (["ranks", "--model", "vjepa2-vitg"], "ranks needs --model: one that is trained")])
def test_bad_flags_are_one_line(argv, words, capsys):
    assert bench.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


@pytest.mark.slow
def test_every_part_of_ranks_is_timed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
         "studies.bench", "ranks", "--model", "openvla-small", "--out", str(tmp_path)],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = {line for line in done.stdout.splitlines() if "ranks" in line}
    # Weights and two moments, float32, but for blocks that never run
    assert line.startswith("openvla-small, 22,501,296 parameters, 2 ranks, 0.24 GiB saved: ")
    found = dict(re.findall(r"(\w+) ([\d.]+) s", line))
    assert list(found) == ["shard", "gather", "save", "load"]
    assert all(float(seconds) > 0 for seconds in found.values())
