"""plan.py against measured tensors: weights, gradients and optimiser state to the byte, activations by saved-tensor hooks within 15%."""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import arrows
import grpo
import plan
import reflection_srpo as rs
import vla
import vla_srpo
import vlm

TEXT = vla.TINY["text_config"] | {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def openvla(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvla") / "checkpoint"
    torch.manual_seed(0)
    stats = {"tabletop": vla.TINY["norm_stats"]["unit"]}
    vla.OpenVLA(vla.TINY | {"text_config": TEXT, "norm_stats": stats}, (32, 5, 128), (48, 6, 192), files={"tokenizer.json": b"{}"}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    arrows.tiny_vlm(folder, width=64, layers=6)
    return folder


def case(kind: str, folder: Path, **changes):
    """(settings, model ready for training)."""
    if kind == "qwen":
        s = rs.Settings(model=str(folder), **changes)
        return s, rs.load(s, folder)[0]
    s = vla_srpo.Settings(model=str(folder), reward="binary", average=0.0, **changes)
    return s, vla_srpo.prepared(vla.load_policy(folder, getattr(torch, s.dtype)), s)


def size(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("kind, changes", [
    ("openvla", {}), ("openvla", dict(dtype="bfloat16")), ("openvla", dict(lora_rank=3)), ("openvla", dict(lora_rank=3, dtype="bfloat16")), ("tiny", {}),
    ("qwen", {}), ("qwen", dict(freeze_vision=True, dtype="bfloat16")), ("qwen", dict(lora_rank=3)), ("qwen", dict(lora_rank=3, dtype="bfloat16"))])
def test_weights_gradients_and_optimiser_to_the_byte(kind, changes, openvla, qwen):
    folder = {"openvla": openvla, "qwen": qwen, "tiny": vla_srpo.WEIGHTS / "tiny_vla"}[kind]
    s, model = case(kind, folder, **changes)
    _, config, shapes = plan.read_checkpoint(folder)
    planned = plan.needs(s, config, shapes)
    assert planned.weights == size(model.parameters())
    optimizer = grpo.make_optimizer(model, 1e-3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    assert planned.gradients == size(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.step()
    assert planned.optimizer == size(x for x in grpo.optimizer_tensors(optimizer).values() if x.dim())
    four = plan.needs(s, config, shapes, ranks=4)
    assert (four.weights, four.gradients, four.optimizer) == (planned.weights / 4, planned.gradients / 4, planned.optimizer / 4)


def kept(model, inputs, forward) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, parameters and inputs aside."""
    own, seen = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *inputs)}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage          # held, or its address would be used again
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    assert out.requires_grad
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("changes", [{}, dict(dtype="bfloat16"), dict(gradient_checkpointing=True)])
def test_openvla_s_activations(changes, openvla):
    """With checkpointing autograd keeps the blocks' inputs; the plan adds the block being recomputed, which is measured without."""
    s, model = case("openvla", openvla, micro_batch=2, **changes)
    ids = torch.full((2, plan.PROMPT_TOKENS), 5)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    pixels = model.pixel_values(torch.zeros(2, 1, 224, 224, 3, dtype=torch.uint8))
    measured = kept(model, [pixels], lambda: model(ids, mask, pixels))
    _, config, shapes = plan.read_checkpoint(openvla)
    planned = plan.needs(s, config, shapes).activations
    if s.gradient_checkpointing:
        planned -= max(part.block(4) for part in plan.stacks(config, shapes, s))
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("changes", [{}, dict(dtype="bfloat16"), dict(freeze_vision=True)])
def test_qwen_s_activations(changes, qwen):
    s, model = case("qwen", qwen, micro_tokens=720, max_new_tokens=40, max_prompt=200, max_pixels=128 * 128, **changes)
    assert plan.sequences(s) == 3
    processor = vlm.Processor(qwen)
    from PIL import Image
    prompts = [processor.prompt([Image.new("RGB", (128, 128))], " ".join(["go"] * n)) for n in (100, 90, 80)]
    s = replace(s, max_prompt=max(len(p.ids) for p in prompts))
    inputs, ids, _ = processor.batch(prompts, [torch.full((40,), 9)] * 3)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    measured = kept(model, inputs.values(), lambda: vlm.completion_logits(model, inputs, ids.shape[1]))
    _, config, shapes = plan.read_checkpoint(qwen)
    assert plan.needs(s, config, shapes).activations == pytest.approx(measured, rel=0.15)


def test_the_kv_cache_is_what_generation_holds(qwen):
    s, model = case("qwen", qwen, rollout_batch=6, max_prompt=50, max_new_tokens=14)
    _, config, shapes = plan.read_checkpoint(qwen)
    ids = torch.full((6, 64), 9)
    cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    assert plan.needs(s, config, shapes).kv_cache == size(x for layer in cache.layers for x in (layer.keys, layer.values))


def test_7b_is_the_112_gib_of_the_paper_arithmetic():
    """OpenVLA's published sizes: 7.54B parameters; bf16 weights and gradients with fp32 masters and moments."""
    with torch.device("meta"):
        model = vla.OpenVLA({"text_config": {"vocab_size": 32064}}, (1024, 24, 4096), (1152, 27, 4304))
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    config = {"model_type": "openvla", "text_config": model.language_model.config.to_dict()}
    s = vla_srpo.Settings(dtype="bfloat16", average=0.0, gradient_checkpointing=True, micro_batch=8)
    need = plan.needs(s, config, shapes)
    assert sum(map(math.prod, shapes.values())) == pytest.approx(7.54e9, rel=1e-3) and need.weights / plan.GiB == pytest.approx(14.0, abs=0.1)
    assert (need.weights + need.gradients + need.optimizer) / plan.GiB == pytest.approx(112, abs=1)
    changes, best = plan.savings(s, (config, shapes, 1, 0.0), 40 * plan.GiB)
    assert changes["lora_rank"] == 32 and best.peak < 40 * plan.GiB                     # one 40 GB GPU: LoRA
    assert plan.needs(s, config, shapes, ranks=8).peak < 40 * plan.GiB                  # or eight of them


def test_the_command_says_what_is_needed_and_writes_nothing(openvla, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert vla_srpo.main(["--plan", "--model", str(openvla), "--out", str(out), "--reward", "binary"]) == 0
    printed = capsys.readouterr().out
    assert "plan for" in printed and "activations" in printed and not out.exists()
    monkeypatch.setattr(plan, "free_memory", lambda: (300 * 2**20, "a small GPU"))
    assert vla_srpo.main(["--plan", "--model", str(openvla), "--out", str(out), "--reward", "binary"]) == 2
    printed = capsys.readouterr()
    assert "a small GPU" in printed.out and "does not fit" in printed.err and "--micro_batch" in printed.err and not out.exists()


def test_the_command_of_the_other_script(qwen, tmp_path, capsys):
    assert rs.main(["rl", "--plan", "--model", str(qwen), "--out", str(tmp_path / "out")]) == 0
    assert "kv cache" in capsys.readouterr().out and not (tmp_path / "out").exists()


def broken(openvla, tmp_path, change) -> list[str]:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in openvla.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    s = vla_srpo.Settings(model=str(folder), reward="binary")
    return plan.report(s)[1]


def test_what_does_not_belong_together_is_named(openvla, qwen, tmp_path, monkeypatch):
    assert plan.report(vla_srpo.Settings(model=str(openvla), reward="binary", micro_batch=1))[1] == []
    for i, (change, words) in enumerate([
            (lambda f: (f / "action_head--1.pt").touch(), "regression head"), (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
            (lambda f: (f / "dataset_statistics.json").write_text('{"libero_goal_no_noops": {}}'), "libero_goal_no_noops, not for tabletop")]):
        (tmp_path / str(i)).mkdir()
        assert any(words in line for line in broken(openvla, tmp_path / str(i), change))
    assert "takes no pictures" in plan.report(rs.Settings(), model=str(vla_srpo.WEIGHTS / "tiny_vla"))[1][0]
    monkeypatch.setattr("envs.Tabletop", lambda: (_ for _ in ()).throw(RuntimeError("OpenGL is missing")))
    assert plan.report(vla_srpo.Settings(model=str(openvla), reward="binary", micro_batch=1))[1] == ["OpenGL is missing"]


def test_out_of_memory_is_one_line_with_the_plan_s_numbers(openvla, monkeypatch, capsys, tmp_path):
    def run(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")
    monkeypatch.setattr(vla_srpo, "run", run)
    assert vla_srpo.main(["--model", str(openvla), "--reward", "binary"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: out of memory") and "GiB" in error and "--gradient_checkpointing True" in error and "\n" not in error
