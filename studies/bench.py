"""Memory, speed and model FLOP utilisation of rollout and update, full and LoRA, with and without gradient checkpointing.

Each case runs in a process of its own, through the functions that train: `sampler` of robots/policy.py and `update` of vla_srpo.py, `generate` of reasoning/responses.py,
`update` of reflection_srpo.py, `encode` of world_model.py. Weights are random, shapes are real, and nothing is downloaded.

  peak     GPU: the allocator's maximum; CPU: the process's resident memory, libraries included
  FLOPs    of one forward pass, counted operator by operator (torch.utils.flop_counter); an update is 3 of them, with LoRA 2: the weights'
           gradients are not computed. What checkpointing computes again is not counted, as usual.
  MFU      FLOPs per second over the peak: the data sheet's (dense bf16) of a GPU named below, else that of a large matrix product here

Left out: the simulator (python -m robots.tabletop measures it), reading data, several GPUs. studies/bench_trl.py measures a step side by side with TRL's.

    python -m studies.bench                             # small models on the CPU, some minutes -> results/bench/small.json
    python -m studies.bench --plan                      # 7B by plumbing/memory.py, from the shapes alone
    python -m studies.bench --model openvla-7b          # on a GPU; or qwen2.5-vl-7b, vjepa2-vitg -> results/bench/MODEL.json
"""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, VJEPA2Config, VJEPA2Model
from transformers.utils import logging

from reasoning import arrows
import grpo
from plumbing import memory
from plumbing import ranks as parallel
from robots import policy as policies
from reasoning import responses as reflection_rollouts
import reflection_srpo
from robots import openvla as vla
import vla_srpo
from reasoning import qwen as vlm
import world_model
from studies import train_world_model as world_model_train

DATA_SHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}     # dense bf16, FLOP/s
OPENVLA = {"openvla-small": (dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4),
                             (128, 4, 512), (144, 4, 576)),
           "openvla-7b": ({}, (1024, 24, 4096), (1152, 27, 4304))}
QWEN = {"qwen2.5-vl-small": (dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=8192),
                             dict(hidden_size=128, intermediate_size=344, depth=4, num_heads=4, out_hidden_size=256)),
        "qwen2.5-vl-7b": (dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064),
                          dict(hidden_size=1280, intermediate_size=3420, depth=32, num_heads=16, out_hidden_size=3584))}
VJEPA = {"vjepa2-small": world_model_train.TINY,
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
    """The special words are those of reasoning/arrows.py's tokenizer, the others have no names."""
    text, vision = QWEN[name]
    word, half = arrows.WORDS.index, text["hidden_size"] // text["num_attention_heads"] // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]}
    return Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None}, vision_config=vision, tie_word_embeddings=False,
                            image_token_id=word("<|image_pad|>"), video_token_id=word("<|video_pad|>"),
                            vision_start_token_id=word("<|vision_start|>"), vision_end_token_id=word("<|vision_end|>"))


def needed(case: Case, device: str) -> float:
    """Bytes by plumbing/memory.py, from the shapes alone."""
    s, model = build(case, "meta")
    if s is None:
        return memory.MARGIN * sum(memory.encoder_bytes(model.config.to_dict(), sum(p.numel() for p in model.parameters()), case.rows))
    s.dtype = "bfloat16" if device != "cpu" else "float32"
    return memory.needs(s, *described(model)).peak


def described(model) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """(config.json, shapes of the tensors), as plumbing/memory.py takes them."""
    config = model.config | {"text_config": model.language_model.config.to_dict()} if isinstance(model, vla.OpenVLA) else model.config.to_dict()
    return config, {name: tuple(x.shape) for name, x in model.state_dict().items()}


def planned() -> dict[str, float]:
    """{command: bytes by plumbing/memory.py} of both papers' RL on one GPU, and of what makes it smaller, from the shapes alone."""
    (_, policy), (_, model), (_, encoder) = (build(Case(name), "meta") for name in LARGE)
    video = encoder.config.to_dict(), sum(p.numel() for p in encoder.parameters())
    result = {}
    for script, s, given, smaller in (
            ("vla_srpo.py", vla_srpo.Settings(**vla_srpo.PAPER), (*described(policy), 1, video), ({"lora_rank": 32}, {"clips": 4}, {"micro_batch": 8})),
            ("reflection_srpo.py rl", reflection_srpo.Settings(stage="rl", **reflection_srpo.PAPER), described(model),
             ({"lora_rank": 32}, {"rollout_batch": 16, "micro_tokens": 1}))):
        flags: dict = {}
        for more in ({}, *smaller):
            flags |= more
            result[" ".join([script, "--paper", *(f"--{name} {value}" for name, value in flags.items())])] = memory.needs(replace(s, **flags), *given).peak
    return result


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
            result[name] = {"per_second": n / seconds, "seconds": seconds, "peak_gib": max(c.peak for c in clocks) / memory.GiB,
                            "mfu": total / seconds / peak}
    return result


def openvla_work(case: Case, s, policy):
    policy.prompt_ids = lambda texts: (torch.full((len(texts), 24), 5, device=parallel.device()), torch.ones(len(texts), 24, dtype=torch.long, device=parallel.device()))
    policy = policies.prepared(policy, s)
    frames, n = torch.randint(256, (case.rows, vla.IMAGE, vla.IMAGE, 3), dtype=torch.uint8), case.rows
    act, optimizer = policies.sampler(policy, s.temperature, "unit"), grpo.make_optimizer(policy, 1e-6)
    bins, logp = torch.randint(vla.BINS, (n, 56)), torch.full((n, 56), -5.5)
    batch = policies.Batch(frames[:, None], [""] * n, bins, logp, torch.ones(n, 56, dtype=torch.bool), torch.randn(n), torch.arange(n))
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
    return (lambda: reflection_rollouts.generate(model, processor, prompts, s, 1.0), lambda: reflection_srpo.update(model, None, processor, optimizer, batch, s),
            forward, tower, "response tokens", case.rows * case.length)


def vjepa_work(case: Case, s, model):
    encoder = world_model.WorldModel(model, batch_size=case.rows)
    videos = [np.random.default_rng(i).integers(0, 256, (80, 256, 256, 3), np.uint8) for i in range(case.rows)]
    return lambda: encoder.encode(videos), None, lambda: encoder.encode(videos), None, "clips", case.rows


# Cases, the table

def cases(name: str, rows: int, threads: int) -> list[Case]:
    large = name in LARGE
    if name in VJEPA:
        return [Case(name, rows=rows or (8 if large else 4), threads=threads)]
    return [Case(name, lora_rank, checkpointing, rows or (16 if large else 4), 512 if large else 32, threads=threads)
            for lora_rank in (0, 32 if large else 4) for checkpointing in (False, True)]


def run(case: Case) -> dict:
    """In a process of its own, if plumbing/memory.py says that it fits."""
    need, (free, what) = needed(case, parallel.device()), memory.free_memory()
    row = asdict(case) | {"measured": False, "plan_gib": need / memory.GiB, "command": f"python -m studies.bench --model {case.model} --rows {case.rows}"}
    if need > free:
        return row | {"why": f"needs {need / memory.GiB:.1f} GiB by plan, {free / memory.GiB:.1f} are free ({what})"}
    try:
        return row | {"measured": True, "device": what, **child(case)}
    except RuntimeError as error:
        return row | {"why": str(error)}


def child(case: Case, *more, file: str = __file__) -> dict:
    """What a process of its own measured; RuntimeError, the last line it wrote, if it failed."""
    done = subprocess.run([sys.executable, file, "--case", json.dumps(asdict(case)), *more], capture_output=True, text=True)
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
    parser.add_argument("--out", default="", help="JSON (default: results/bench/MODEL.json or small.json)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help="only what both papers' runs at 7B need of a GPU by plumbing/memory.py, from the shapes alone; other flags do not count")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    if args.plan:
        print("\n".join(f"{need / memory.GiB:6.1f} GiB  {command}" for command, need in planned().items()))
        return 0
    if args.case:
        case = Case(**json.loads(args.case))
        print(json.dumps(measure(case)))
        return 0
    rows = []
    for name in [args.model] if args.model else SMALL:
        for case in cases(name, args.rows, args.threads):
            rows.append(run(case))
            print(show(rows[-1]), flush=True)
    if not args.model:
        for case in (case for name in LARGE for case in cases(name, 0, args.threads)):
            rows.append(asdict(case) | {"measured": False, "why": "this is the small run", "plan_gib": needed(case, "cuda") / memory.GiB,
                                        "command": f"python -m studies.bench --model {case.model}"})
            print(show(rows[-1]))
    write(Path(args.out or f"results/bench/{args.model or 'small'}.json"), {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
