"""plan.py against measured tensors: weights, gradients and optimiser state to the byte, activations and the peaks of both phases within 15%."""
import gc
import json
import math
import re
import shutil
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import arrows
import bench
import envs
import grpo
import plan
import policies
import reflection_rollouts
import reflection_srpo as rs
import rollouts
import vla
import vla_srpo
import vlm
import world_model
from conftest import tiny_qwen3

TEXT = vla.TINY["text_config"] | {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def openvla(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvla") / "checkpoint"
    torch.manual_seed(0)
    stats = {"tabletop": vla.TINY["norm_stats"]["unit"]}
    vla.OpenVLA(vla.TINY | {"text_config": TEXT, "norm_stats": stats}, (32, 5, 128), (48, 6, 192)).save_pretrained(folder)
    Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "▁": vla.SPACE}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    arrows.tiny_vlm(folder, width=64, layers=6)
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """Its heads are twice as wide as the model is."""
    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    arrows.tiny_vlm(folder, width=64)
    tiny_qwen3(folder, head_dim=32)
    return folder


def case(kind: str, folder: Path, **changes):
    """(settings, model ready for training)."""
    if kind == "qwen":
        s = rs.Settings(model=str(folder), **changes)
        return s, rs.load(s, folder)[0]
    s = vla_srpo.Settings(model=str(folder), reward="binary", average=0.0, **changes)
    return s, policies.prepared(policies.load_policy(folder, getattr(torch, s.dtype)), s)


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


LORA = [dict(lora_rank=3), dict(lora_rank=3, dtype="bfloat16")]


@pytest.mark.parametrize("changes", [{}, dict(dtype="bfloat16"), dict(gradient_checkpointing=True), *LORA])
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


@pytest.mark.parametrize("family, changes", [*(("qwen", changes) for changes in ({}, dict(dtype="bfloat16"), dict(freeze_vision=True), *LORA)),
                                             *(("qwen3", changes) for changes in (dict(freeze_vision=True), *LORA))])
def test_qwen_s_activations(family, changes, request):
    qwen = request.getfixturevalue(family)
    s, model = case("qwen", qwen, micro_tokens=720, max_new_tokens=40, max_prompt=200, max_pixels=128 * 128, **changes)
    assert plan.sequences(s) == 3
    processor = vlm.Processor(qwen)
    from PIL import Image
    prompts = [processor.prompt([Image.new("RGB", (128, 128))], " ".join(["go"] * n)) for n in (100, 90, 80)]
    s = replace(s, max_prompt=max(len(p.ids) for p in prompts))
    inputs, ids, _ = processor.batch(prompts, [torch.full((40,), 9)] * 3)
    inputs["pixel_values"] = inputs["pixel_values"].to(getattr(torch, s.dtype))
    measured = kept(model, inputs.values(), lambda: vlm.completion_logits(model, inputs, ids.shape[1]))
    _, config, shapes = plan.read_checkpoint(qwen)
    assert plan.needs(s, config, shapes).activations == pytest.approx(measured, rel=0.15)


class Live(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, those given first among them."""

    def __init__(self, tensors):
        super().__init__()
        self.now, self.peak, self.held = 0, 0, {}
        self.see(tensors)

    def see(self, tensors):
        for storage in (x.untyped_storage() for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.held:
                self.held[storage._cdata] = weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def free(self, key, n):
        del self.held[key]
        self.now -= n

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        out = function(*arguments, **(more or {}))
        self.see(out)
        return out

    def of(self, work) -> int:
        gc.collect()
        self.peak = self.now
        with self:
            work()
        return self.peak


PEAKS = [{}, dict(dtype="bfloat16"), dict(dtype="bfloat16", gradient_checkpointing=True), *LORA, dict(LORA[1], gradient_checkpointing=True)]


@pytest.mark.parametrize("changes", PEAKS[::2])
def test_openvla_s_peaks(changes, tmp_path):
    """An update of two micro-batches, so that gradients of the first stand beside activations of the second; and a rollout's pass."""
    torch.manual_seed(0)
    text = TEXT | {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}
    vla.OpenVLA(vla.TINY | {"text_config": text}, (64, 5, 256), (80, 6, 320)).save_pretrained(tmp_path / "big")
    s, model = case("openvla", tmp_path / "big", micro_batch=2, minibatch=4, tables=4, epochs=1, target_kl=0.0, **changes)
    model.prompt_ids = lambda texts: (torch.full((len(texts), plan.PROMPT_TOKENS), 5), torch.ones(len(texts), plan.PROMPT_TOKENS).long())
    optimizer = grpo.make_optimizer(model, 1e-6)
    live = Live([*model.parameters()])
    batch = policies.Batch(torch.zeros(4, 1, 224, 224, 3, dtype=torch.uint8), ["go"] * 4, torch.zeros(4, 56, dtype=torch.long), torch.zeros(4, 56),
                           torch.ones(4, 56).bool(), torch.ones(4), torch.arange(4))

    def update():
        assert vla_srpo.update(model, None, optimizer, batch, s)["updates"] == 1
    live.of(update)                                                                     # the optimiser's state is there from now on
    _, config, shapes = plan.read_checkpoint(tmp_path / "big")
    planned = plan.needs(s, config, shapes)
    assert planned.update / plan.MARGIN == pytest.approx(live.of(update), rel=0.15)
    act = policies.sampler(model, 1.0, "unit")
    assert planned.rollout / plan.MARGIN == pytest.approx(live.of(lambda: act(np.zeros((4, 256, 256, 3), np.uint8), ["go"] * 4)), rel=0.15)


@pytest.mark.parametrize("reward, every", [("srpo", 8), ("srpo", 2), ("binary", 8)])
def test_images_of_a_step_are_those_of_a_step(openvla, every, reward):
    """Rollouts that all fail hold what the plan says, to the byte: of a policy call its image, of the video the world model's frames."""
    torch.manual_seed(0)
    s = vla_srpo.Settings(model=str(openvla), suite="tabletop", reward=reward, groups=1, group_size=3, video_every=every)
    model, world = policies.load_policy(openvla), world_model.WorldModel.from_pretrained(world_model.SHIPPED)
    model.prompt_ids = lambda texts: (torch.full((len(texts), 8), 5), torch.ones(len(texts), 8).long())
    workers = rollouts.tabletop().workers(1, policies.camera_size(model), 3)
    try:
        episodes = rollouts.play(policies.sampler(model, 1.0, "tabletop"), workers, [rollouts.Start(0, i) for i in range(3)],
                                 partial(vla_srpo.keep_seen, encoder=world if reward == "srpo" else None), every=every)
    finally:
        workers.close()
    assert not any(e.success or e.between for e in episodes)
    held = sum(image.nbytes for e in episodes for image in [*e.images, *(call.frame for call in e.records)])
    held += policies.collate(episodes, torch.ones(3)).frames.numel()
    given = plan.read_checkpoint(openvla)[1:]
    assert held == plan.images(s, given[0], (world.config.to_dict(), 0))
    more = plan.host(replace(s, groups=5), *given, 2, (world.config.to_dict(), 0))[0] - plan.host(s, *given, 2, (world.config.to_dict(), 0))[0]
    assert more == 4 * held / 2


@pytest.mark.parametrize("changes", PEAKS)
def test_qwen_s_peaks(changes, tmp_path):
    torch.manual_seed(0)
    arrows.tiny_vlm(tmp_path, width=256, layers=6)
    s, model = case("qwen", tmp_path, max_prompt=160, max_new_tokens=40, micro_tokens=800, rollout_batch=8, prompts=4, group_size=2, minibatch=0,
                    freeze_vision=True, **changes)
    processor = vlm.Processor(tmp_path)
    prompts = [processor.prompt([], " ".join(["go"] * 150))] * 8
    s = replace(s, max_prompt=len(prompts[0].ids))
    optimizer = grpo.make_optimizer(model.train(), 1e-6)
    live = Live([*model.parameters()])
    batch = rs.Batch(prompts, [torch.full((40,), 9)] * 8, torch.ones(8))

    def update():
        assert rs.update(model, None, processor, optimizer, batch, s)["updates"] == 1
    live.of(update)
    _, config, shapes = plan.read_checkpoint(tmp_path)
    planned = plan.needs(s, config, shapes)
    assert planned.update / plan.MARGIN == pytest.approx(live.of(update), rel=0.15)
    model.generation_config.eos_token_id = 10**6                                        # nothing ends early
    assert planned.rollout / plan.MARGIN == pytest.approx(live.of(lambda: reflection_rollouts.generate(model, processor, prompts, s, 1.0)), rel=0.15)


def test_a_micro_batch_of_mixed_lengths_stays_within_the_plan(tmp_path):
    """Short prompts with long responses beside long prompts with short ones, which padding makes long in both; and many short rows."""
    torch.manual_seed(0)
    arrows.tiny_vlm(tmp_path, width=256, layers=6)
    s, model = case("qwen", tmp_path, max_prompt=160, max_new_tokens=40, micro_tokens=800, minibatch=0, freeze_vision=True)
    processor, rng = vlm.Processor(tmp_path), np.random.default_rng(0)
    lengths = [(140, 2), (5, 40), (140, 1), (5, 38), (60, 20), *((int(p), int(c)) for p, c in rng.integers(1, [140, 40], (20, 2)))]
    prompts, completions = [processor.prompt([], " ".join(["go"] * p)) for p, _ in lengths], [torch.full((c,), 9) for _, c in lengths]
    assert max(len(p.ids) for p in prompts) <= s.max_prompt
    optimizer = grpo.make_optimizer(model.train(), 1e-6)
    live, batch = Live([*model.parameters()]), rs.Batch(prompts, completions, torch.ones(len(prompts)))
    update = lambda: rs.update(model, None, processor, optimizer, batch, s)
    live.of(update)
    _, config, shapes = plan.read_checkpoint(tmp_path)
    assert 0.7 < live.of(update) / (plan.needs(s, config, shapes).update / plan.MARGIN) < 1.15


def test_fine_tuning_is_planned_by_its_own_rows(qwen):
    s = rs.Settings(model=str(qwen), max_prompt=100, max_new_tokens=20, max_length=300, micro_tokens=600)
    _, config, shapes = plan.read_checkpoint(qwen)
    rl, sft = (plan.needs(replace(s, stage=stage), config, shapes) for stage in ("rl", "sft"))
    assert sft.kv_cache == sft.forward == 0 < rl.kv_cache and sft.logits == pytest.approx(4 * rl.logits)         # 2 x 200 response tokens, 5 x 20
    assert plan.longest(replace(s, stage="sft")) == (300, 200) and sft.rollout < rl.rollout


def test_the_reference_is_there_for_its_pass_alone(qwen, monkeypatch):
    """On a GPU; on a CPU it is always in the same memory."""
    _, config, shapes = plan.read_checkpoint(qwen)
    without, on_cpu = (plan.needs(rs.Settings(beta=beta), config, shapes) for beta in (0.0, 0.1))
    weights = 4 * sum(map(math.prod, shapes.values()))
    assert on_cpu.copies - without.copies == weights and on_cpu.scoring == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    need = plan.needs(rs.Settings(beta=0.1), config, shapes)
    assert (need.copies, need.reference, need.update, need.rollout) == (without.copies, weights, without.update, without.rollout)
    assert need.scoring > plan.MARGIN * 2 * weights and plan.needs(rs.Settings(beta=0.1, lora_rank=2), config, shapes).reference == 0


@pytest.mark.parametrize("family", ["qwen", "qwen3"])
def test_the_kv_cache_is_what_generation_holds(family, request):
    qwen = request.getfixturevalue(family)
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
    changes, best = plan.savings(s, (config, shapes, 1), 40 * plan.GiB)
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


def test_a_hub_id_is_planned_without_its_weights(qwen, openvla, monkeypatch, tmp_path):
    """From the hub's metadata; from the cache, perhaps offline, if the weights are there; and one line if neither."""
    import huggingface_hub
    shapes, asked = plan.read_checkpoint(qwen)[2], {}
    (tmp_path / "config.json").write_bytes((qwen / "config.json").read_bytes())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: asked.update(more) or str(tmp_path))
    tensors = {name: SimpleNamespace(shape=list(shape)) for name, shape in shapes.items()}
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name: SimpleNamespace(files_metadata={"a": SimpleNamespace(tensors=tensors)}))
    assert plan.read_checkpoint("someone/model")[2] == shapes
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"]) and "*.jinja" in asked["allow_patterns"]

    def offline(name):
        raise type("ConnectError", (Exception,), {})("no route\nto host")
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", offline)
    with pytest.raises(FileNotFoundError, match="shapes of someone/model: no route to host"):
        plan.read_checkpoint("someone/model")
    (tmp_path / "model.safetensors").write_bytes((qwen / "model.safetensors").read_bytes())
    assert plan.read_checkpoint("someone/model")[2] == shapes
    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: str(openvla))
    assert "by plan" in plan.announced(vla_srpo.Settings(model="someone/model", reward="binary", average=0.0))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: ["config.json", "action_head--9_checkpoint.pt"])
    with pytest.raises(ValueError, match="action_head--9_checkpoint.pt, a regression head"):
        plan.announced(vla_srpo.Settings(model="someone/model", reward="binary", average=0.0))


def test_savings_are_no_more_than_needed():
    with torch.device("meta"):
        model = vla.OpenVLA({"text_config": {"vocab_size": 32064}}, (1024, 24, 4096), (1152, 27, 4304))
    given = ({"model_type": "openvla", "text_config": model.language_model.config.to_dict()}, {n: tuple(x.shape) for n, x in model.state_dict().items()}, 1)
    s, (_, encoder) = vla_srpo.Settings(**vla_srpo.PAPER), bench.build(bench.Case("vjepa2-vitg"), "meta")
    vitg = (encoder.config.to_dict(), sum(p.numel() for p in encoder.parameters()))
    assert plan.needs(s, *given, vitg).peak < 131.1 * plan.GiB                          # the paper's settings on a GPU of 141 GB, world model and all
    assert plan.savings(s, given, 79 * plan.GiB)[0] == {"lora_rank": 32}                # that alone, whatever else was tried before
    lora = replace(s, lora_rank=32)
    assert plan.savings(lora, (*given, vitg), 38 * plan.GiB)[0] == {"clips": 4}         # one GPU of 40 GB
    assert plan.savings(lora, (*given, vitg), 23.5 * plan.GiB)[1].peak < 23.5 * plan.GiB            # or of 24
    changes, best = plan.savings(vla_srpo.Settings(), given, 131 * plan.GiB)
    assert best.peak < 131 * plan.GiB and all(plan.needs(replace(vla_srpo.Settings(), **{k: x for k, x in changes.items() if k != name}), *given).peak
                                              > 131 * plan.GiB for name in changes)


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
            (lambda f: (f / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
            (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
            (lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace("29871", "7")), "gives '▁' the number 7"),
            (lambda f: (f / "dataset_statistics.json").write_text('{"libero_goal_no_noops": {}}'), "libero_goal_no_noops, not for tabletop")]):
        (tmp_path / str(i)).mkdir()
        assert any(words in line for line in broken(openvla, tmp_path / str(i), change))
    assert "takes no pictures" in plan.report(rs.Settings(), model=str(vla_srpo.WEIGHTS / "tiny_vla"))[1][0]
    assert "give an OpenVLA-OFT" in plan.report(vla_srpo.Settings(model=str(qwen)))[1][0]
    assert "give a V-JEPA 2" in plan.report(vla_srpo.Settings(world_model=str(openvla)))[1][0]
    assert plan.report(vla_srpo.Settings(tasks=[77], reward="binary"))[1] == ["unknown task 77; there are 0..3: " + "; ".join(envs.TASKS)]
    monkeypatch.setattr("eval.try_suite", lambda *_: (_ for _ in ()).throw(RuntimeError("OpenGL is missing")))
    assert plan.report(vla_srpo.Settings(model=str(openvla), reward="binary", micro_batch=1))[1] == ["OpenGL is missing"]


@pytest.mark.parametrize("more", [[], ["--plan"]])
def test_another_architecture_is_one_line(openvla, qwen, more, tmp_path, capsys):
    """In a run as in a plan, before anything is loaded or written."""
    tiny, vjepa = (str(vla_srpo.WEIGHTS / name) for name in ("tiny_vla", "vjepa_tiny"))
    rl = ["rl", "--data", "rows.jsonl", "--out", str(tmp_path / "out"), *more]
    for main, argv, words in [(vla_srpo.main, ["--model", str(qwen)], "is a qwen2_5_vl; give an OpenVLA-OFT"), (vla_srpo.main, ["--model", vjepa], "is a vjepa2;"),
                              (vla_srpo.main, ["--world_model", tiny], "is a tiny_vla; give a V-JEPA 2"),
                              (rs.main, [*rl, "--model", str(openvla)], "is a openvla, which takes no pictures"), (rs.main, [*rl, "--model", tiny], "no pictures"),
                              (rs.main, [*rl, "--model", vjepa], "no pictures")]:
        assert main([*argv, *(["--out", str(tmp_path / "out"), *more] if main is vla_srpo.main else [])]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and not list(tmp_path.glob("out/*"))


def test_a_vision_language_model_whose_parts_do_not_fit_is_named(qwen, tmp_path):
    def words(f, n):
        tokenizer = json.loads((f / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"], tokenizer["added_tokens"] = {str(i): i for i in range(n)}, []
        (f / "tokenizer.json").write_text(json.dumps(tokenizer))

    def without_one(f):
        tensors = load_file(f / "model.safetensors")
        tensors.popitem()
        save_file(tensors, f / "model.safetensors", metadata={"format": "pt"})
    for i, (change, expected) in enumerate([
            (lambda f: words(f, 2), "no word .* place holder of pictures"), (lambda f: words(f, 10**5), "has 100000 words and the model"),
            (lambda f: (f / "tokenizer.json").write_text("{}"), "place holder"), (without_one, "the tensors hold .* config.json describes"),
            (lambda f: (f / "preprocessor_config.json").unlink(), "no preprocessor_config.json"), (lambda f: (f / "chat_template.jinja").unlink(), "no chat template")]):
        shutil.copytree(qwen, tmp_path / str(i))
        change(tmp_path / str(i))
        problems = plan.report(rs.Settings(model=str(tmp_path / str(i))))[1]
        assert len(problems) == 1 and re.search(expected, problems[0]), problems
    assert plan.report(rs.Settings(model=str(qwen)))[1] == []


def test_a_disk_too_small_is_named(openvla, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    [problem] = plan.report(vla_srpo.Settings(model=str(openvla), reward="binary", average=0.0, out=str(tmp_path / "a" / "b")))[1]
    assert "on disk, 0.0 are free; choose another --out" in problem


def test_out_of_memory_is_one_line_with_the_plan_s_numbers(openvla, monkeypatch, capsys, tmp_path):
    def run(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")
    monkeypatch.setattr(vla_srpo, "run", run)
    assert vla_srpo.main(["--model", str(openvla), "--reward", "binary"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: out of memory") and "GiB" in error and "--gradient_checkpointing True" in error and "\n" not in error
