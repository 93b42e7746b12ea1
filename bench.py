"""Memory, speed and model FLOP utilisation of rollout and update, full and LoRA, with and without gradient checkpointing.

Each case runs in a process of its own, through the functions that train: `sampler` and `update` of vla_srpo.py, `generate` and `update` of
reflection_srpo.py, `encode` of world_model.py. Weights are random, shapes are real, and nothing is downloaded.

  peak     GPU: the allocator's maximum; CPU: the process's resident memory, libraries included
  FLOPs    of one forward pass, counted operator by operator (torch.utils.flop_counter); an update is 3 of them, with LoRA 2: the weights'
           gradients are not computed. What checkpointing computes again is not counted, as usual.
  MFU      FLOPs per second over the peak: the data sheet's (dense bf16) of a GPU named below, else that of a large matrix product here

--against trl takes steps of GRPO (generation, reward, update) side by side with TRL's GRPOTrainer: same model, prompts, lengths and settings,
fp32, the two in turn so that other load on the machine meets both; the first step warms up. It stops if they did not do the same work. On a CPU TRL
also scores the prompts' tokens, which it leaves out on a GPU.

Left out: the simulator (python envs.py measures it), reading data, several GPUs.

    python bench.py                             # small models on the CPU, some minutes -> runs/bench/small.json
    python bench.py --model openvla-7b          # on a GPU; or qwen2.5-vl-7b, vjepa2-vitg -> runs/bench/MODEL.json
    python bench.py --against trl               # needs pip install trl -> runs/bench/trl.json
"""
import argparse
import importlib.util
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import psutil
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (AutoTokenizer, GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, TrainerCallback, VJEPA2Config,
                          VJEPA2Model)
from transformers.utils import logging

import arrows
import grpo
import parallel
import plan
import reflection_srpo
import vla
import vla_srpo
import vlm
import world_model

DATA_SHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}     # dense bf16, FLOP/s
OPENVLA = {"openvla-small": (dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4),
                             (128, 4, 512), (144, 4, 576)),
           "openvla-7b": ({}, (1024, 24, 4096), (1152, 27, 4304))}
QWEN = {"qwen2.5-vl-small": (dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=8192),
                             dict(hidden_size=128, intermediate_size=344, depth=4, num_heads=4, out_hidden_size=256)),
        "qwen2.5-vl-7b": (dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064),
                          dict(hidden_size=1280, intermediate_size=3420, depth=32, num_heads=16, out_hidden_size=3584))}
VJEPA = {"vjepa2-small": world_model.TINY,
         "vjepa2-vitg": dict(hidden_size=1408, num_hidden_layers=40, num_attention_heads=22, mlp_ratio=48 / 11, crop_size=384, frames_per_clip=64)}
SMALL, LARGE = ("openvla-small", "qwen2.5-vl-small", "vjepa2-small"), ("openvla-7b", "qwen2.5-vl-7b", "vjepa2-vitg")


@dataclass
class Case:
    model: str
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    rows: int = 4                   # action chunks, responses or clips at a time
    length: int = 32                # responses' tokens
    repeats: int = 2
    threads: int = 1

    def label(self) -> str:
        how = "" if self.model in VJEPA else (", LoRA" if self.lora_rank else ", full") + ", checkpointing" * self.gradient_checkpointing
        return self.model + how


# Models of random weights, on the device, in bf16 on a GPU and fp32 on the CPU

def build(case: Case, device: str):
    """(settings, model)."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    shared = dict(lora_rank=case.lora_rank, gradient_checkpointing=case.gradient_checkpointing, dtype=str(dtype).removeprefix("torch."))
    torch.set_default_dtype(torch.float32 if case.model in VJEPA else dtype)
    with torch.device(device):
        if case.model in OPENVLA:
            s = vla_srpo.Settings(average=0.0, minibatch=case.rows, micro_batch=case.rows, tables=case.rows, epochs=1, target_kl=0.0, reward="binary",
                                  **shared)
            text, dino, siglip = OPENVLA[case.model]
            model = vla.OpenVLA({"model_type": "openvla", "text_config": {"vocab_size": 32064, "pad_token_id": vla.PAD, **text},
                                 "norm_stats": vla.TINY["norm_stats"]}, dino, siglip)
        elif case.model in QWEN:
            s = reflection_srpo.Settings(max_prompt=320, max_new_tokens=case.length, rollout_batch=case.rows, prompts=case.rows, group_size=2, minibatch=0,
                                         micro_tokens=case.rows * (320 + case.length), freeze_vision=True, **shared)
            model = Qwen2_5_VLForConditionalGeneration(qwen_config(case.model))
        else:
            s, model = None, VJEPA2Model(VJEPA2Config(**VJEPA[case.model]))
    torch.set_default_dtype(torch.float32)
    return s, model


def qwen_config(name: str) -> Qwen2_5_VLConfig:
    """The special words are those of arrows.py's tokenizer, the others have no names."""
    text, vision = QWEN[name]
    word, half = arrows.WORDS.index, text["hidden_size"] // text["num_attention_heads"] // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]}
    return Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None}, vision_config=vision, tie_word_embeddings=False,
                            image_token_id=word("<|image_pad|>"), video_token_id=word("<|video_pad|>"),
                            vision_start_token_id=word("<|vision_start|>"), vision_end_token_id=word("<|vision_end|>"))


def needed(case: Case, device: str) -> float:
    """Bytes by plan.py, from the shapes alone."""
    s, model = build(case, "meta")
    if s is None:
        return plan.MARGIN * sum(plan.encoder_bytes(model.config.to_dict(), sum(p.numel() for p in model.parameters()), case.rows))
    s.dtype = "bfloat16" if device != "cpu" else "float32"
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    config = model.config | {"text_config": model.language_model.config.to_dict()} if case.model in OPENVLA else model.config.to_dict()
    return plan.needs(s, config, shapes).peak


# Timing

class Clock:
    """Seconds and peak memory of what runs within it, and the memory in use before."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began
        unit = 1 if sys.platform == "darwin" else 1024
        self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def flop_counter() -> FlopCounterMode:
    """Of matrix products, convolutions and attention; torch itself knows the GPU's attention kernels alone."""
    return FlopCounterMode(display=False, custom_mapping={
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)})


def flops(function) -> float:
    with torch.no_grad(), flop_counter() as counter:
        function()
    return counter.get_total_flops()


def machine_peak(device: str) -> tuple[float, str]:
    """(FLOP/s, whose)."""
    name = torch.cuda.get_device_name() if device != "cpu" else platform.machine()
    for key, value in DATA_SHEET.items() if device != "cpu" else ():
        if key in name:
            return value, f"data sheet, {name}"
    n = 8192 if device != "cpu" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device != "cpu" else torch.float32)
    best = []
    for _ in range(5):
        with Clock() as clock:
            a @ a
        best.append(clock.seconds)
    return 2 * n**3 / min(best), f"matrix product here, {name}"


def measure(case: Case) -> dict:
    """Rollout and update, after one of each to warm up; the better of the repeats."""
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    device = parallel.device()
    peak, whose = machine_peak(device)
    s, model = build(case, device)
    rollout, update, forward, frozen, unit, n = {vla.OpenVLA: openvla_work, Qwen2_5_VLForConditionalGeneration: qwen_work, VJEPA2Model: vjepa_work}[type(model)](case, s, model)
    once, still = flops(forward), flops(frozen) if frozen else 0.0      # what is frozen has no backward pass; LoRA has none for the weights
    result = {"unit": unit, "parameters": sum(p.numel() for p in model.parameters()), "forward_flops": once, "frozen_flops": still, "peak_flops": peak,
              "peak_flops_of": whose}
    if update:
        update()                                                        # the optimiser's state stands beside the rollout's memory
    for name, work, total in (("rollout", rollout, once), ("update", update, (2 if case.lora_rank else 3) * (once - still) + still)):
        clocks = []
        for _ in range(1 + case.repeats if work else 0):
            with Clock() as clock:
                work()
            clocks.append(clock)
        if clocks:
            seconds = min(clock.seconds for clock in clocks[1:])
            result[name] = {"per_second": n / seconds, "seconds": seconds, "peak_gib": max(c.peak for c in clocks) / plan.GiB,
                            "mfu": total / seconds / peak}
    return result


def openvla_work(case: Case, s, policy):
    policy.prompt_ids = lambda texts: (torch.full((len(texts), 24), 5, device=parallel.device()), torch.ones(len(texts), 24, dtype=torch.long, device=parallel.device()))
    policy = vla_srpo.prepared(policy, s)
    frames, n = torch.randint(256, (case.rows, vla.IMAGE, vla.IMAGE, 3), dtype=torch.uint8), case.rows
    act, optimizer = vla_srpo.sampler(policy, s.temperature, "unit"), grpo.make_optimizer(policy, 1e-6)
    bins, logp = torch.randint(vla.BINS, (n, 56)), torch.full((n, 56), -5.5)
    batch = vla_srpo.Batch(frames, [""] * n, bins, logp, torch.ones(n, 56, dtype=torch.bool), torch.randn(n), torch.arange(n))
    forward = lambda: policy(*policy.prompt_ids([""] * n), policy.pixel_values(frames[:, None]))
    return lambda: act(frames.numpy(), [""] * n), lambda: vla_srpo.update(policy, None, optimizer, batch, s), forward, None, "chunks", n


def qwen_work(case: Case, s, model):
    with tempfile.TemporaryDirectory() as folder:
        arrows.tiny_vlm(folder)
        processor = vlm.Processor(folder)
    model.generation_config = GenerationConfig(eos_token_id=10**9, pad_token_id=0)              # never drawn: every response has the full length
    model = reflection_srpo.prepared(model, s)
    side, vision = 32, model.config.vision_config                                               # 32 x 32 patches: 256 image tokens
    ids = torch.cat([torch.full((30,), 9), torch.full((side * side // 4,), processor.image_token), torch.full((34,), 9)])
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    prompts = [vlm.Prompt(ids, torch.randn(side * side, patch), torch.tensor([[1, side, side]])) for _ in range(case.rows)]
    completions = [torch.randint(50, model.config.text_config.vocab_size, (case.length,)) for _ in prompts]
    batch, optimizer = reflection_srpo.Batch(prompts, completions, torch.randn(case.rows)), grpo.make_optimizer(model, 1e-6)

    def forward():
        inputs, ids, _ = processor.batch(prompts, completions, model.device)
        vlm.completion_logits(model, inputs, ids.shape[1])

    def tower():
        inputs, _, _ = processor.batch(prompts, completions, model.device)
        (model.get_base_model() if case.lora_rank else model).model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    return (lambda: reflection_srpo.generate(model, processor, prompts, s, 1.0), lambda: reflection_srpo.update(model, None, processor, optimizer, batch, s),
            forward, tower, "response tokens", case.rows * case.length)


def vjepa_work(case: Case, s, model):
    encoder = world_model.WorldModel(model, batch_size=case.rows)
    videos = [np.random.default_rng(i).integers(0, 256, (80, 256, 256, 3), np.uint8) for i in range(case.rows)]
    return lambda: encoder.encode(videos), None, lambda: encoder.encode(videos), None, "clips", case.rows


# Side by side with TRL: steps of GRPO on the same model, prompts and lengths

GROUP, LR = 4, 1e-4             # responses to a prompt, learning rate


def sampling(case: Case) -> dict:
    """Every response has the full length. A picture's place holder is not drawn: TRL's loss shows it to the model as it is, ours as padding."""
    return {"min_new_tokens": case.length, "suppress_tokens": [arrows.WORDS.index("<|image_pad|>")]}


def questions(case: Case) -> list[str]:
    """Of unequal lengths, so that both pad. Without pictures: TRL would need transformers' processor of Qwen2.5-VL, and that torchvision."""
    return [" ".join(arrows.NAMES[(i + j) % len(arrows.NAMES)] for j in range(24 + 2 * i)) for i in range(case.rows // GROUP)]


def pay(completion_ids, **_) -> list[float]:
    """A reward that costs next to nothing and differs within groups: how many of a response's token ids are even."""
    return [float(sum(int(i) % 2 == 0 for i in ids)) for ids in completion_ids]


def our_trainer(case: Case, folder: Path):
    """(settings, model, processor, a function that updates the model on prompts, group by group, and their completions)."""
    s = reflection_srpo.Settings(max_new_tokens=case.length, rollout_batch=case.rows, minibatch=0, micro_tokens=10**9, lr=LR)
    model, processor = reflection_srpo.load(s, folder)
    model.generation_config.update(**sampling(case))
    optimizer = reflection_srpo.optimizer_of(model, s)

    def train(prompts: list[vlm.Prompt], completions: list[torch.Tensor]) -> dict:
        advantages = grpo.group_advantages(torch.tensor(pay(completions)).view(-1, GROUP), scale=False).flatten()
        model.train()
        return reflection_srpo.update(model, None, processor, optimizer, reflection_srpo.Batch(prompts, completions, advantages), s)
    return s, model, processor, train


def our_steps(case: Case, folder: Path) -> tuple[list[Clock], list[int], list[int]]:
    """Of each step: its clock, tokens generated, tokens trained on."""
    clocks, tokens, (s, model, processor, train) = [], [], our_trainer(case, folder)
    prompts = [processor.prompt([], text) for text in questions(case) for _ in range(GROUP)]
    for _ in range(1 + case.repeats):
        with Clock() as clock:
            completions = [c.ids for c in reflection_srpo.generate(model, processor, prompts, s, s.temperature)]
            clock.sampled = time.perf_counter()
            train(prompts, completions)
        clocks.append(clock)
        tokens.append(sum(map(len, completions)))
    return clocks, tokens, tokens                       # that the update is on all of them, the gradient shows: `agreement`


def trl_steps(case: Case, folder: Path) -> tuple[list[Clock], list[int], list[int]]:
    """The same of TRL. What its first step trained on, the log-probabilities and the gradient's norm go to folder/trl.safetensors."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    clocks, generated, trained, first = [], [], [], {}

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clocks.append(Clock().__enter__())

        def on_step_end(self, *_, **__):
            clocks[-1].__exit__()

    def reward(completion_ids, **_):
        clocks[-1].sampled = time.perf_counter()
        generated.append(sum(map(len, completion_ids)))
        return pay(completion_ids)

    def watch(module, args, inputs, output):
        if getattr(output, "log_probs", None) is not None:              # the loss's forward pass, not generation's
            trained.append(int((inputs["labels"] != -100).sum()))
            if not first:
                first.update(ids=inputs["input_ids"], mask=inputs["attention_mask"], logp=output.log_probs[:, -case.length:].detach().clone())

    # Ours; TRL's defaults would be checkpointing and bf16. Advantages without scaling: its standard deviation divides by G - 1, ours by G.
    config = GRPOConfig(str(folder / "trl"), per_device_train_batch_size=case.rows, num_generations=GROUP, max_completion_length=case.length,
                        max_steps=1 + case.repeats, learning_rate=LR, lr_scheduler_type="constant", adam_beta2=0.99, beta=0.0, loss_type="grpo",
                        scale_rewards="none", temperature=1.0, generation_kwargs=sampling(case), gradient_checkpointing=False, bf16=False,
                        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in questions(case)]})
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    trainer = GRPOTrainer(str(folder), reward, config, data, processing_class=tokenizer, callbacks=[Steps()])
    trainer.model.register_forward_hook(watch, with_kwargs=True)
    trainer.train()
    first["norm"] = torch.tensor(trainer.state.log_history[0]["grad_norm"])
    save_file({name: x.cpu().contiguous() for name, x in first.items()}, folder / "trl.safetensors")
    return clocks, generated, trained


def measure_steps(case: Case, side: str, folder: Path) -> dict:
    """The fastest of the steps after the first; the peak, and what of it was not in use before the first."""
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    updates = []
    register_optimizer_step_post_hook(lambda *_: updates.append(1))
    clocks, generated, trained = (our_steps if side == "ours" else trl_steps)(case, folder)
    fastest, peak = min(clocks[1:], key=lambda clock: clock.seconds), max(clock.peak for clock in clocks)
    return {"seconds": fastest.seconds, "seconds_rollout": fastest.sampled - fastest.began, "peak_gib": peak / plan.GiB,
            "steps_gib": (peak - clocks[0].before) / plan.GiB, "generated": generated, "trained": trained, "updates": len(updates)}


def agreement(case: Case, folder: Path) -> dict:
    """Ours, from the same weights, on what TRL's first step trained on: log-probabilities and gradient."""
    theirs, (s, model, processor, train) = load_file(folder / "trl.safetensors"), our_trainer(case, folder)
    rows = [(ids[:-case.length][mask[:-case.length].bool()], ids[-case.length:]) for ids, mask in zip(theirs["ids"], theirs["mask"])]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))                     # TRL shuffles; the questions' lengths ascend
    prompts, completions = [vlm.Prompt(rows[i][0], None, None) for i in order], [rows[i][1] for i in order]
    expected = [processor.prompt([], text).ids for text in questions(case) for _ in range(GROUP)]
    assert all(torch.equal(p.ids, ids) for p, ids in zip(prompts, expected, strict=True)), "the prompts are not the same"
    with torch.no_grad():
        logp, _, _ = reflection_srpo.logprobs(model, processor, prompts, completions, s.temperature)
    return {"logp_difference": float((logp.cpu() - theirs["logp"][order]).abs().max()),
            "gradient_norms": [train(prompts, completions)["grad_norm"], float(theirs["norm"])]}


def against_trl(case: Case, out: Path, repetitions: int = 3) -> None:
    if importlib.util.find_spec("trl") is None:
        raise ValueError("--against trl needs TRL, which is not installed; install it with: pip install trl")
    if case.rows < GROUP or case.rows % GROUP:
        raise ValueError(f"--rows must be a multiple of {GROUP}, the responses to a prompt, got {case.rows}")
    pairs, steps, tokens = [], 1 + case.repeats, case.rows * case.length
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        arrows.tiny_vlm(folder)                                                         # for its tokenizer
        Qwen2_5_VLForConditionalGeneration(qwen_config(case.model)).save_pretrained(folder)
        for _ in range(repetitions):
            pairs.append({side: child(case, "--side", side, "--out", folder) for side in ("trl", "ours")})
            for side, row in pairs[-1].items():
                same = row["generated"] == row["trained"] == [tokens] * steps and row["updates"] == steps
                assert same, f"{side} did not generate and train on {tokens} tokens with one update in each of {steps} steps: {row}"
                print(f"{side:5} {row['seconds']:6.2f} s a step, {row['seconds_rollout']:.2f} of them generation   "
                      f"peak {row['peak_gib']:.2f} GiB, {row['steps_gib']:.2f} of them for the steps", flush=True)
        equal = agreement(case, Path(folder))
    names = ("seconds", "seconds_rollout", "peak_gib", "steps_gib")
    ratios = {name: sorted(pair["ours"][name] / pair["trl"][name] for pair in pairs) for name in names}
    for name, x in ratios.items():
        print(f"ours / TRL  {name:15} {np.median(x):.2f}, of {repetitions} pairs {x[0]:.2f} to {x[-1]:.2f}")
    print(f"log-probabilities of {tokens} tokens differ by at most {equal['logp_difference']:.1e}, the gradient's norm is "
          f"{equal['gradient_norms'][0]:.6f}, TRL's {equal['gradient_norms'][1]:.6f}")
    assert equal["logp_difference"] < 1e-4 and math.isclose(*equal["gradient_norms"], rel_tol=1e-3), "these should be equal"
    write(out, {"trl": version("trl"), "transformers": version("transformers"), "device": plan.free_memory()[1],
                "command": f"python bench.py --against trl --rows {case.rows} --threads {case.threads}",
                "case": asdict(case), "prompts": case.rows // GROUP, "group_size": GROUP, "ratios": ratios, **equal, "pairs": pairs})


# Cases, the table

def cases(name: str, rows: int, threads: int) -> list[Case]:
    large = name in LARGE
    if name in VJEPA:
        return [Case(name, rows=rows or (8 if large else 4), threads=threads)]
    return [Case(name, lora_rank, checkpointing, rows or (16 if large else 4), 512 if large else 32, threads=threads)
            for lora_rank in (0, 32 if large else 4) for checkpointing in (False, True)]


def run(case: Case) -> dict:
    """In a process of its own, if plan.py says that it fits."""
    need, (free, what) = needed(case, parallel.device()), plan.free_memory()
    row = asdict(case) | {"measured": False, "plan_gib": need / plan.GiB, "command": f"python bench.py --model {case.model} --rows {case.rows}"}
    if need > free:
        return row | {"why": f"needs {need / plan.GiB:.1f} GiB by plan, {free / plan.GiB:.1f} are free ({what})"}
    try:
        return row | {"measured": True, "device": what, **child(case)}
    except RuntimeError as error:
        return row | {"why": str(error)}


def child(case: Case, *more) -> dict:
    """What a process of its own measured; RuntimeError, the last line it wrote, if it failed."""
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(asdict(case)), *more], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1][:300])
    return json.loads(done.stdout.splitlines()[-1])


def show(row: dict) -> str:
    label = Case(**{name: row[name] for name in asdict(Case(""))}).label()
    if not row["measured"]:
        return f"{label:42} not measured: {row['why']}; measure it: {row['command']}"
    return f"{label:42} " + "   ".join(f"{part} {row[part]['per_second']:9.2f} {row['unit']}/s, MFU {row[part]['mfu']:5.1%}, peak {row[part]['peak_gib']:6.2f} GiB"
                                       for part in ("rollout", "update") if part in row)


def write(out: Path, result: dict) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"torch": torch.__version__, "load": os.getloadavg()[0], **result}, indent=1) + "\n")
    print(f"wrote {out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Memory, speed and model FLOP utilisation.")
    parser.add_argument("--model", choices=(*SMALL, *LARGE), help="default: the three small ones")
    parser.add_argument("--rows", type=int, default=0, help="action chunks, responses or clips at a time; 0: by model")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--against", choices=["trl"], help="steps of GRPO side by side with TRL's GRPOTrainer, on the small Qwen2.5-VL")
    parser.add_argument("--out", default="", help="JSON (default: runs/bench/MODEL.json, small.json or trl.json)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    if args.case:
        case = Case(**json.loads(args.case))
        print(json.dumps(measure_steps(case, args.side, Path(args.out)) if args.side else measure(case)))
        return 0
    if args.against:
        try:
            if args.model:
                raise ValueError("--against trl compares on the small Qwen2.5-VL; drop --model")
            case = Case("qwen2.5-vl-small", rows=args.rows or 32, length=64, repeats=3, threads=args.threads)
            against_trl(case, Path(args.out or "runs/bench/trl.json"))
            return 0
        except (ValueError, RuntimeError, AssertionError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    rows = []
    for name in [args.model] if args.model else SMALL:
        for case in cases(name, args.rows, args.threads):
            rows.append(run(case))
            print(show(rows[-1]), flush=True)
    if not args.model:
        for case in (case for name in LARGE for case in cases(name, 0, args.threads)):
            rows.append(asdict(case) | {"measured": False, "why": "this is the small run", "plan_gib": needed(case, "cuda") / plan.GiB,
                                        "command": f"python bench.py --model {case.model}"})
            print(show(rows[-1]))
    write(Path(args.out or f"runs/bench/{args.model or 'small'}.json"), {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
