"""plumbing/plan.py: what it counts against the tensors of real passes, and each thing that would
stop a run in one line."""
import gc
import json
import re
import shutil
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import reflection_srpo as rs
import vla_srpo
from plumbing import adapters, plan
from plumbing.optimizer import clip_and_step, make_optimizer
from reasoning import arrows, qwen
from reasoning import planned as reasoning_planned
from robots import openvla as vla
from robots import parts as robots_parts
from robots import planned as robots_planned
from robots import policy as policies
from robots import tabletop
from studies import bench
from tests.conftest import STATS
from world_model import WorldModel

LORA = [dict(lora_rank=3), dict(lora_rank=3, dtype="bfloat16")]
CHANGES = [{}, dict(dtype="bfloat16"), dict(dtype="bfloat16", gradient_checkpointing=True), *LORA]
# In bf16 many times slower than in fp32 on a CPU without instructions for it
SLOW = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default,
        torch.ops.aten.convolution_backward.default}


class Live(TorchDispatchMode):
    """The most bytes of tensors with numbers that were alive at once, those given among them."""

    def __init__(self, tensors):
        super().__init__()
        self.now, self.held = 0, {}
        self.see(tensors)

    def see(self, tensors):
        for x in tree_leaves(tensors):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.held:
                self.held[storage._cdata] = weakref.finalize(
                    storage, self.free, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(getattr(self, "peak", 0), self.now)

    def free(self, key, n):
        del self.held[key]
        self.now -= n

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        half = function in SLOW and arguments[0].dtype == torch.bfloat16
        if half:                            # by way of fp32 copies that are not seen
            arguments = tree_map_only(torch.Tensor, torch.Tensor.float, arguments)
        out = function(*arguments, **(more or {}))
        if half:
            out = tree_map_only(torch.Tensor, torch.Tensor.bfloat16, out)
        self.see(out)
        return out

    def of(self, work) -> int:
        gc.collect()
        self.peak = self.now
        with self:
            work()
        return self.peak


def updated(live: Live, model, loss) -> int:
    """The peak of an update of two micro-batches: the optimiser's state is there, and gradients of
    the first stand beside activations of the second."""
    optimizer = live.optimizer = make_optimizer(model.train(), 1e-6)    # stays for the rollout

    def update(passes):
        for _ in range(passes):
            loss().backward()
        for p in model.parameters() if not passes else ():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        clip_and_step(optimizer, model, 1.0)
    live.of(lambda: update(0))
    return live.of(lambda: update(2))


@pytest.fixture(scope="module")
def openvla_256(tmp_path_factory, openvla):
    folder = tmp_path_factory.mktemp("plan") / "openvla"
    text = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6,
                num_attention_heads=4, num_key_value_heads=4)
    config = vla.TINY | {"text_config": vla.TINY["text_config"] | text, "norm_stats": STATS}
    vla.OpenVLA(config, (64, 5, 256), (80, 6, 320)).save_pretrained(folder)
    shutil.copy(openvla / "tokenizer.json", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("changes", [*CHANGES, dict(average=0.9)])
def test_openvla_s_peaks(changes, openvla_256):
    """Within 2% of what a real update and a real rollout's pass hold."""
    torch.manual_seed(0)
    s = vla_srpo.Settings(**dict(model=str(openvla_256), reward="binary", micro_batch=2,
                                 tables=4, average=0.0) | changes)
    job = robots_planned.job(s)
    needs = plan.measure(s, job)
    model = robots_parts.ready(policies.load_policy(s.model, getattr(torch, s.dtype)), s)
    model.beside = [adapters.running_average(model, s.average)] if s.average else []
    live = Live([*model.parameters(), *(p for x in model.beside for p in x.parameters())])
    assert needs.update == pytest.approx(updated(live, model, lambda: job.loss(model, s)), rel=0.02)
    act, images = policies.sampler(model, 1.0, "tabletop"), np.zeros((4, 256, 256, 3), np.uint8)
    words = [robots_planned.INSTRUCTION] * 4
    assert needs.rollout == pytest.approx(live.of(lambda: act(images, words)), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [*CHANGES, dict(freeze_vision=True),
                                     dict(stage="sft", max_length=300)])
def test_qwen_s_peaks(changes, tmp_path):
    """With generation itself, token by token, beside the two passes that the plan makes of it."""
    torch.manual_seed(0)
    arrows.tiny_vlm(tmp_path, width=256, layers=6)
    s = rs.Settings(**dict(stage="rl", model=str(tmp_path), max_prompt=160, max_new_tokens=40,
                           micro_tokens=800, rollout_batch=8, prompts=4, group_size=2,
                           max_pixels=128 * 128) | changes)
    job = reasoning_planned.job(s)
    needs = plan.measure(s, job)
    model, processor = rs.prepared(s.model, s)
    live = Live([*model.parameters()])
    assert needs.update == pytest.approx(updated(live, model, lambda: job.loss(model, s)), rel=0.02)
    if s.stage == "rl":
        prompt = processor.prompt([Image.new("RGB", (112, 112))], "a")
        more = torch.full((s.max_prompt - len(prompt.ids),), prompt.ids[-1].item())
        prompt.ids = torch.cat([prompt.ids, more])
        model.generation_config.eos_token_id = 10**6            # nothing ends early
        prompts = [replace(prompt) for _ in range(8)]           # none is shared
        measured = live.of(lambda: qwen.generate(model, processor, prompts, 40, 1.0))
        assert needs.rollout == pytest.approx(measured, rel=0.02)


def test_the_world_model_s_peak():
    s = vla_srpo.Settings(clips=4)
    encoder = WorldModel.from_pretrained(s.world_model, batch_size=4)
    live = Live([*encoder.model.parameters()])
    measured = live.of(lambda: encoder.encode([np.zeros((16, 64, 64, 3), np.uint8)] * 4))
    job = robots_planned.job(s)
    with plan.Meter() as meter:
        planned = meter.of(lambda: job.encode(s))
    assert planned == pytest.approx(measured, rel=0.15)


def seven_b(tmp_path, openvla, monkeypatch):
    """OpenVLA's published sizes in place of a folder's."""
    def described(folder, shapes):
        config = vla.TINY | {"text_config": {"vocab_size": 32064}}
        with torch.device("meta"):
            model = vla.OpenVLA(config, (1024, 24, 4096), (1152, 27, 4304)).bfloat16()
        model.norm_stats, model.tokenizer = STATS, tokenizer
        return model
    tokenizer = vla.OpenVLA.described(openvla).tokenizer
    kind = SimpleNamespace(described=described, problems=lambda folder, shapes: [])
    monkeypatch.setattr(robots_planned, "policy_class", lambda name: kind)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)       # bf16 in the world model
    transformers.VJEPA2Config(**bench.VJEPA["vjepa2-vitg"]).save_pretrained(tmp_path)
    paper = vla_srpo.PAPER | dict(suite="tabletop", world_model=str(tmp_path), tables=16)
    return vla_srpo.Settings(model=str(openvla), **paper)


@pytest.mark.slow
def test_7b_is_planned_in_under_a_minute_without_a_gpu(openvla, tmp_path, monkeypatch):
    """7.54B parameters; bf16 weights and gradients with fp32 masters and moments are 112 GiB."""
    s = seven_b(tmp_path, openvla, monkeypatch)
    start = time.monotonic()
    needs = plan.measure(s, robots_planned.job(s))
    assert time.monotonic() - start < 60
    assert needs.parameters == pytest.approx(7.54e9, rel=1e-3)
    static = needs.weights + needs.gradients + needs.optimizer
    assert static / plan.GiB == pytest.approx(112, abs=1) and needs.peak < 139 * plan.GiB


@pytest.mark.slow
def test_savings_are_flags_that_make_it_fit(openvla, tmp_path, monkeypatch):
    s = seven_b(tmp_path, openvla, monkeypatch)
    s.lora_rank = 32
    job = robots_planned.job(s)
    needs, free = plan.measure(s, job), 40 * plan.GiB
    changes, best = plan.savings(s, job, 1, needs, free)
    assert changes == {"clips": 4} and needs.peak > free > best.peak
    assert plan.savings(s, job, 1, needs, 200 * plan.GiB) == ({}, needs)
    s.lora_rank, s.clips = 0, 4
    assert plan.measure(s, job, 8).peak < free          # of eight GPUs each


def test_no_saving_is_measured_twice(monkeypatch):
    """Two of four help. One that did not is tried again only after others were changed."""
    s, tried = vla_srpo.Settings(), []
    job = plan.Job("", None, None, None, savings=(
        dict(micro_batch=1), dict(clips=1), dict(lora_rank=4), dict(tables=2)))

    def measure(s, job, n):
        tried.append((s.micro_batch, s.clips, s.lora_rank, s.tables))
        return SimpleNamespace(peak=100 - 50 * (s.micro_batch == 1) - 20 * (s.lora_rank == 4))
    monkeypatch.setattr(plan, "measure", measure)
    start = SimpleNamespace(peak=100, weights=0, gradients=0, optimizer=0)
    changes, best = plan.savings(s, job, 1, start, 10)
    assert changes == dict(micro_batch=1, lora_rank=4) and best.peak == 30
    assert len(tried) == len(set(tried)) == 5       # clips once more: more had changed by then


@pytest.mark.slow
def test_the_command_says_what_is_needed_and_writes_nothing(openvla, tmp_path, capsys,
                                                           monkeypatch):
    argv = ["--plan", "--model", str(openvla), "--out", str(tmp_path / "out"),
            "--reward", "binary", "--micro_batch", "4", "--tables", "4"]
    assert vla_srpo.main(argv) == 0
    assert "peak of the update" in capsys.readouterr().out
    monkeypatch.setattr(plan, "free_memory", lambda: (20 * 2**20, "a small GPU"))
    assert vla_srpo.main(argv) == 2
    printed = capsys.readouterr()
    assert "a small GPU" in printed.out and "does not fit; --" in printed.err
    assert not (tmp_path / "out").exists()


def test_the_command_of_the_other_script(qwen, tmp_path, capsys):
    assert rs.main(["rl", "--plan", "--model", str(qwen), "--out", str(tmp_path / "out")]) == 0
    assert "peak of the rollout" in capsys.readouterr().out and not (tmp_path / "out").exists()


def vla_problems(**changes) -> list[str]:
    s = vla_srpo.Settings(**dict(reward="binary", micro_batch=1, tables=2) | changes)
    return plan.report(s, robots_planned.job(s))[1]


@pytest.mark.parametrize("change, words", [
    (lambda f: (f / "action_head--1.pt").touch(), "regression head"),
    (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
    (lambda f: (f / "tokenizer.json").write_text(
        (f / "tokenizer.json").read_text().replace("29871", "7")), "gives '▁' the number 7"),
    (lambda f: (f / "dataset_statistics.json").write_text(json.dumps(
        {"libero_goal_no_noops": STATS["tabletop"]})), "libero_goal_no_noops, not for tabletop")])
def test_a_policy_s_fault_is_named(openvla, tmp_path, capsys, change, words):
    shutil.copytree(openvla, tmp_path / "broken")
    change(tmp_path / "broken")
    assert vla_srpo.main(["--plan", "--model", str(tmp_path / "broken"), "--reward", "binary",
                          "--micro_batch", "1", "--tables", "2"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_what_does_not_belong_together_is_named(openvla, qwen, monkeypatch):
    assert vla_problems(model=str(openvla)) == []
    with pytest.raises(ValueError, match="tiny_vla cannot be loaded as a vision-language model"):
        reasoning_planned.job(rs.Settings(model=str(vla_srpo.WEIGHTS / "tiny_vla")))
    with pytest.raises(ValueError, match="is no policy here"):
        vla_problems(model=str(qwen))
    with pytest.raises(ValueError, match="give a V-JEPA 2"):
        vla_problems(reward="srpo", world_model=str(openvla))
    assert vla_problems(tasks=[77]) == ["unknown task 77; tabletop has 0..3: "
                                        + "; ".join(tabletop.TASKS["tabletop"])]

    def no_opengl(*_, **__):
        raise RuntimeError("OpenGL is missing")
    monkeypatch.setattr(tabletop.Tabletop, "__init__", no_opengl)
    assert vla_problems(model=str(openvla)) == ["OpenGL is missing"]


def test_a_vision_language_model_whose_parts_do_not_fit_is_named(qwen, tmp_path):
    def words(f, n):
        tokenizer = json.loads((f / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] = {str(i): i for i in range(n)}
        tokenizer["added_tokens"] = []
        (f / "tokenizer.json").write_text(json.dumps(tokenizer))

    def without_one(f):
        tensors = load_file(f / "model.safetensors")
        tensors.popitem()
        save_file(tensors, f / "model.safetensors", metadata={"format": "pt"})
    for i, (change, expected) in enumerate([
            (lambda f: words(f, 2), "cannot be loaded .*UNK"),
            (lambda f: words(f, 10**5), "knows 1000.. words .* copy tokenizer.json"),
            (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be loaded"),
            (without_one, "has no .*; copy the checkpoint again"),
            (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor|processor"),
            (lambda f: (f / "chat_template.jinja").unlink(), "no chat template")]):
        shutil.copytree(qwen, folder := tmp_path / str(i))
        change(folder)
        with pytest.raises((ValueError, OSError), match=expected):
            reasoning_planned.job(rs.Settings(model=str(folder)))


def test_a_hub_id_is_planned_without_its_weights(openvla, monkeypatch, tmp_path):
    """From the hub's metadata; one line if it gives none."""
    import huggingface_hub
    shapes = vla.read_shapes(openvla)
    shutil.copytree(openvla, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"),
                    dirs_exist_ok=True)
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **more: asked.update(more) or str(tmp_path))
    tensors = {name: SimpleNamespace(shape=list(shape)) for name, shape in shapes.items()}
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name: SimpleNamespace(
        files_metadata={"a": SimpleNamespace(tensors=tensors)}))
    assert vla_problems(model="someone/model") == []
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])

    def offline(name):
        raise type("ConnectError", (Exception,), {})("no route\nto host")
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", offline)
    with pytest.raises(FileNotFoundError, match="someone/model: no route to host"):
        vla_problems(model="someone/model")


def test_a_disk_too_small_is_named(openvla, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    [problem] = vla_problems(model=str(openvla), average=0.0, out=str(tmp_path / "a" / "b"))
    assert "on disk, 0.0 are free; choose another --out" in problem


def test_too_little_ram_beside_the_gpu_is_named(openvla, monkeypatch):
    """Fewer groups help where rollouts hold images."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(plan, "free_memory", lambda: (2**40, "a GPU"))
    monkeypatch.setattr(plan, "free_ram", lambda: 1000)
    [problem] = vla_problems(model=str(openvla), average=0.0)
    assert re.search("of RAM beside the GPU, 0.0 are free; do without --beta .*--groups", problem)


def test_out_of_memory_is_one_line(openvla, monkeypatch, capsys, tmp_path):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")
    monkeypatch.setattr(vla_srpo, "prepare", run_out)
    assert vla_srpo.main(["--model", str(openvla), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: out of memory") and "--plan" in error and "\n" not in error
