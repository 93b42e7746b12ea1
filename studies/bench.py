"""Memory, speed and model FLOP utilisation of rollout and update, full and LoRA, with and without
gradient checkpointing.

Each case runs in a process of its own, through the functions that train. Weights are random, shapes
are real, nothing is downloaded.

  peak     GPU: the allocator's maximum; CPU: the process's resident memory, libraries included
  FLOPs    of one forward pass, counted operator by operator (torch.utils.flop_counter); an update
           is 3 of them, with LoRA 2: the weights' gradients are not computed. What checkpointing
           computes again is not counted, as usual.
  MFU      FLOPs per second over the peak: the data sheet's (dense bf16) of a GPU named below, else
           that of a large matrix product here

Responses have one length, or ends drawn with equal chance at every token, a quarter as long in the
mean (skewed); sampled by qwen.generate, transformers' generate, or vLLM where it is installed.
Left out: the simulator (python -m robots.tabletop measures it), and reading data. `ranks`: seconds
that several add to a run by dividing the weights, putting them together for the rollouts, saving
and reading weights and Adam's moments; the slowest rank's, the median of three.

    python -m studies.bench                         # small models on the CPU, some minutes
    python -m studies.bench gpu                     # all of 7B, and TRL's step: 20 minutes of a GPU
    python -m studies.bench --model openvla-7b      # one of it; or qwen2.5-vl-7b, vjepa2-vitg
    torchrun --nproc-per-node 2 -m studies.bench ranks --model openvla-small
    python -m studies.bench_trl                     # a step side by side with TRL's
"""
# ruff: noqa: E402
import sys
from dataclasses import dataclass

from plumbing.flags import flag, require, script

SMALL = ("openvla-small", "qwen2.5-vl-small", "vjepa2-small")
LARGE = ("openvla-7b", "qwen2.5-vl-7b", "vjepa2-vitg")


@dataclass
class Settings:
    stage: str = flag("", "gpu: the three of 7B; ranks: what several add; else the small ones",
                      choices=["", "gpu", "ranks"])
    model: str = flag("", "one alone", choices=["", *SMALL, *LARGE])
    minutes: float = flag(20.0, "what is not measured by then is left to another call")
    rows: int = flag(0, "action chunks, responses or clips at a time; 0: by model")
    threads: int = flag(1, "torch threads on the CPU")
    out: str = flag("", "JSON lines; none: results/bench/small.jsonl, gpu.jsonl or MODEL.jsonl; "
                        "ranks: folder for a checkpoint, which all see (out/bench_ranks)")


def check(s: Settings) -> None:
    require(s, dict(rows=0, threads=1), ("minutes",))
    if s.stage == "ranks" and not s.model.startswith(("openvla", "qwen")):
        raise ValueError("ranks needs --model: one that is trained")


if __name__ == "__main__":      # before torch is imported: --help takes no seconds
    if code := script(Settings, check, __doc__, words=("gpu", "ranks"))():
        sys.exit(code)

import math
import platform
import resource
import shlex
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import psutil
import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import grpo
import reflection_srpo
import vla_srpo
from plumbing import checkpoint, plan, ranks
from plumbing.files import Journal
from plumbing.optimizer import make_optimizer
from plumbing.update import Update
from reasoning import arrows, parts, qwen, responses
from reasoning.engine import Engine
from robots import openvla
from robots import parts as robots_parts
from robots import policy as policies
from studies import runs
from studies.train_world_model import TINY
from world_model import WorldModel

GiB, GROUP = 2**30, 4           # responses to a prompt
# FLOP/s, dense bf16
DATA_SHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
TEXT = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4)
# Llama; DINOv2 and SigLIP: width, blocks, width of the MLP
OPENVLA = {"openvla-small": (TEXT | {"num_key_value_heads": 4}, (128, 4, 512), (144, 4, 576)),
           "openvla-7b": ({}, (1024, 24, 4096), (1152, 27, 4304))}
# The language model; its vision tower
QWEN = {
    "qwen2.5-vl-small": (TEXT | {"num_key_value_heads": 2, "vocab_size": 8192},
                         dict(hidden_size=128, intermediate_size=344, depth=4, num_heads=4)),
    "qwen2.5-vl-7b": (dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                           num_attention_heads=28, num_key_value_heads=4, vocab_size=152064),
                      dict(hidden_size=1280, intermediate_size=3420, depth=32, num_heads=16))}
VJEPA = {"vjepa2-small": TINY,
         "vjepa2-vitg": dict(hidden_size=1408, num_hidden_layers=40, num_attention_heads=22,
                             mlp_ratio=48 / 11, crop_size=384, frames_per_clip=64)}


@dataclass
class Case:
    model: str
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    rows: int = 4                   # action chunks, responses or clips at a time
    length: int = 32                # responses' tokens
    repeats: int = 2
    threads: int = 1
    sampler: str = ""               # of responses, and no update: ours, transformers or vllm
    skewed: bool = False            # they end early


@dataclass
class Work:
    """What is measured of a case. Each rollout and update is of n units; a rollout that ends early
    returns of how many."""
    rollout: Callable
    update: Callable | None     # None: nothing is trained
    forward: Callable           # one pass, whose FLOPs are counted; the loss, as policy_loss's
    frozen: Callable | None     # the part of it that has no backward pass
    unit: str
    n: int


# Models of random weights, on the device, in bf16 on a GPU and fp32 on the CPU

def build(case: Case, device: str):
    """(settings of the script that trains it, None for V-JEPA 2; model, adapters included)."""
    half = torch.cuda.is_available() and case.model not in VJEPA
    torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
    how = dict(lora_rank=case.lora_rank, gradient_checkpointing=case.gradient_checkpointing)
    with torch.device(device):
        if case.model in OPENVLA:
            s, ready = vla_srpo.Settings(**how), robots_parts.ready
            text, dino, siglip = OPENVLA[case.model]
            text = {"vocab_size": 32064, "pad_token_id": openvla.PAD, **text}
            model = openvla.OpenVLA(openvla.TINY | {"text_config": text}, dino, siglip)
        elif case.model in QWEN:
            s = reflection_srpo.Settings(
                max_new_tokens=case.length, rollout_batch=case.rows, freeze_vision=True,
                dtype="bfloat16" if half else "float32", **how)
            config, ready = qwen_config(*QWEN[case.model]), parts.ready
            model = transformers.Qwen2_5_VLForConditionalGeneration(config)
        else:
            return None, transformers.VJEPA2Model(transformers.VJEPA2Config(**VJEPA[case.model]))
    torch.set_default_dtype(torch.float32)
    return s, ready(model, s)


def qwen_config(text: dict, vision: dict):
    """The special words are those of reasoning/arrows.py's tokenizer, the others have no names."""
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    side = 3 * half // 8
    rope = {"rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [half - 2 * side, side, side]}
    text = text | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None}
    words = {"image": "image_pad", "video": "video_pad",
             "vision_start": "vision_start", "vision_end": "vision_end"}
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=False,
        **{f"{name}_token_id": arrows.WORDS.index(f"<|{word}|>") for name, word in words.items()})


# What is measured

def openvla_work(case: Case, s, policy) -> Work:
    n, device = case.rows, ranks.device()
    prompts = torch.full((n, 24), 5, device=device), torch.ones(n, 24, dtype=torch.long,
                                                                device=device)
    policy.prompt_ids = lambda texts: tuple(x[:len(texts)] for x in prompts)    # no tokenizer here
    frames = torch.randint(256, (n, openvla.IMAGE, openvla.IMAGE, 3), dtype=torch.uint8)
    optimizer = make_optimizer(policy, 1e-6)
    batch = policies.Batch(
        frames[:, None], [""] * n, torch.randint(openvla.BINS, (n, 56)), torch.full((n, 56), -5.5),
        torch.ones(n, 56, dtype=torch.bool), torch.randn(n), torch.arange(n))
    act = policies.sampler(policy, s.temperature, "unit")

    def loss():
        logp = policies.logprobs(policy, batch, torch.arange(n), s.temperature)     # (n, 56)
        return grpo.policy_loss(logp, *(x.to(logp.device) for x in (
            batch.logp, batch.advantage, batch.mask)), clip=(s.clip_low, s.clip_high))
    return Work(lambda: act(frames.numpy(), batch.instructions),
                lambda: update(policy, optimizer, n, loss, s.max_norm), loss, None, "chunks", n)


def update(model, optimizer, rows: int, loss: Callable, max_norm: float) -> dict:
    """One on a batch in a single pass, as in step 4 of the scripts that train."""
    update = Update(model, optimizer, grpo.merge_stats, max_norm)
    for chosen in update.minibatches(rows, 1, 0):
        for _ in update.micro_batches(chosen, lambda own: [own]):
            update.backward(*loss())
        update.step()
    return update.summary()


def qwen_work(case: Case, s, model) -> Work:
    with tempfile.TemporaryDirectory() as folder:
        arrows.tiny_vlm(folder)                                             # for its tokenizer
        qwen.Qwen2VLImageProcessorPil().save_pretrained(folder)
        processor = qwen.Processor(folder)
        if case.sampler == "vllm":
            model.save_pretrained(folder)
            engine = Engine(folder, processor, s, 512 + case.length)
    # 256 image tokens and 64 more
    asked = [processor.prompt([Image.new("RGB", (448, 448), (i % 256, 0, 0))], "a1 " * 57)
             for i in range(math.ceil(case.rows / GROUP))]
    prompts = [asked[i // GROUP] for i in range(case.rows)]
    # Else its end is never drawn
    end = processor.tokenizer.eos_token_id if case.skewed else 10**9
    model.generation_config = transformers.GenerationConfig(eos_token_id=end, pad_token_id=0)
    if case.skewed:
        model.lm_head.register_forward_hook(partial(ending, end, 4 / case.length))
    completions = [torch.randint(50, model.config.text_config.vocab_size, (case.length,))
                   for _ in prompts]
    batch = responses.Batch(prompts, completions, torch.randn(case.rows), case.rows)
    loss = partial(loss_of, model, processor, batch, s)

    def by_transformers() -> int:
        inputs = qwen.to(model.device, processor.batch(prompts))
        ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=case.length)
        ids = ids[:, inputs["input_ids"].shape[1]:]
        return int(((ids == end).cumsum(1) - (ids == end).int() == 0).sum())

    def rollout() -> int:
        if case.sampler == "vllm":
            engine.forget()                                     # as after an update
            return sum(c.tokens for c in engine.generate(prompts, case.length, 1.0))
        return sum(c.tokens for c in responses.generate(model, processor, prompts, s, 1.0))

    def tower():
        x = qwen.to(model.device, processor.batch(asked))
        model.model.get_image_features(x["pixel_values"], x["image_grid_thw"])
    train = None if case.sampler else partial(
        update, model, make_optimizer(model, 1e-6), case.rows, loss, s.max_norm)
    return Work(by_transformers if case.sampler == "transformers" else rollout, train, loss, tower,
                "response tokens", case.rows * case.length)


def ending(end: int, chance: float, head, given, logits: torch.Tensor) -> torch.Tensor:
    """The head's logits (B, n, V), the end's such that it is drawn with this chance."""
    rest = logits.index_fill(-1, torch.tensor(end, device=logits.device), -torch.inf)
    rest[..., end] = rest.logsumexp(-1) + math.log(chance / (1 - chance))
    return rest


def loss_of(model, processor, batch: responses.Batch, s):
    """Of responses, all in one pass, as in step 4 of reflection_srpo.py."""
    logp, _, mask = responses.logprobs(model, processor, batch, range(batch.rows), s.temperature)
    return grpo.policy_loss(logp, None, batch.advantages.to(logp.device), mask,
                            clip=(s.clip_low, s.clip_high), row_weight=grpo.row_weights(mask))


def vjepa_work(case: Case, s, model) -> Work:
    videos = [np.random.default_rng(i).integers(0, 256, (80, 256, 256, 3), np.uint8)
              for i in range(case.rows)]
    encode = partial(WorldModel(model, batch_size=case.rows).encode, videos)
    return Work(encode, None, encode, None, "clips", case.rows)


# Timing

class Clock:
    """Seconds and peak memory of what runs within it, and the memory in use before."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = psutil.Process().memory_info().rss
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began
        unit = 1 if sys.platform == "darwin" else 1024
        self.peak = (torch.cuda.max_memory_allocated() if torch.cuda.is_available()
                     else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def flops(function: Callable | None) -> float:
    """Of matrix products, convolutions and attention; torch itself knows the GPU's attention
    kernels alone."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    counter = FlopCounterMode(display=False, custom_mapping={
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)})
    with torch.no_grad(), counter:
        if function:
            function()
    return float(counter.get_total_flops())


def machine_peak(device: str) -> tuple[float, str]:
    """(FLOP/s, whose)."""
    on_cpu = device == "cpu"
    name = platform.machine() if on_cpu else torch.cuda.get_device_name()
    for key, value in {} if on_cpu else DATA_SHEET.items():
        if key in name:
            return value, f"data sheet, {name}"
    n = 1024 if on_cpu else 8192
    a = torch.randn(n, n, device=device, dtype=torch.float32 if on_cpu else torch.bfloat16)
    best = min(seconds_of(lambda: a @ a).seconds for _ in range(5))
    return 2 * n**3 / best, f"matrix product here, {name}"


def seconds_of(function: Callable, n: int = 1) -> Clock:
    """Its clock, and units: what it returns, if that is a number, else n."""
    with Clock() as clock:
        done = function()
    clock.units = done if isinstance(done, int) else n
    return clock


def work_of(case: Case, s, model) -> Work:
    return (openvla_work if case.model in OPENVLA else
            qwen_work if case.model in QWEN else vjepa_work)(case, s, model)


def planned(case: Case, s) -> float:
    """GiB of an update by --plan's reckoning, without its 5%."""
    job = plan.Job(case.model, lambda s: build(case, "meta")[1],
                   lambda model, s: None, lambda model, s: work_of(case, s, model).forward()[0])
    return plan.measure(s, job).update / GiB


def measure(case: Case) -> dict:
    """Rollout and update, after one of each to warm up; the better of the repeats."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    device = ranks.device()
    peak, whose = machine_peak(device)
    s, model = build(case, device)
    work = work_of(case, s, model)
    # What is frozen has no backward pass; LoRA has none for the weights
    once, still = flops(work.forward), flops(work.frozen)
    trained = (2 if case.lora_rank else 3) * (once - still) + still
    result = {"unit": work.unit, "parameters": sum(p.numel() for p in model.parameters()),
              "forward_flops": once, "frozen_flops": still, "peak_flops": peak,
              "peak_flops_of": whose}
    if work.update:
        work.update()           # the optimiser's state stands beside the rollout's memory
    for name, total in (("rollout", once), ("update", trained)):
        if function := getattr(work, name):
            clocks = [seconds_of(function, work.n) for _ in range(1 + case.repeats)]
            speed = max(clock.units / clock.seconds for clock in clocks[1:])
            result[name] = {"per_second": speed, "seconds": work.n / speed,
                            "peak_gib": max(clock.peak for clock in clocks) / GiB,
                            "mfu": total * speed / work.n / peak}
    if work.update:
        result["update"]["planned_gib"] = planned(case, s)
    return result


# Cases, the table

def cases(name: str, rows: int, threads: int) -> list[Case]:
    large = name in LARGE
    if name in VJEPA:
        return [Case(name, rows=rows or (8 if large else 4), threads=threads)]
    some = Case(name, rows=rows or (16 if large else 4), length=512 if large else 32,
                threads=threads)
    samplers = [] if name in OPENVLA else [
        replace(some, rows=rows or 4 * some.rows, sampler=sampler, skewed=skewed)
        for sampler in ("ours", "transformers", "vllm") for skewed in (False, True)
        if sampler != "vllm" or find_spec("vllm") and not skewed]
    return samplers + [replace(some, lora_rank=lora_rank, gradient_checkpointing=checkpointing)
                       for lora_rank in (0, 32 if large else 4) for checkpointing in (False, True)]


def alone(work: Callable, *given, seconds: float | None = None) -> dict:
    """work(*given) in a process of its own. RuntimeError, one line, if it fails, is killed, or
    takes longer."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, *given).result(seconds)
        except TimeoutError:
            for child in active_children():
                child.kill()
            raise RuntimeError(f"stopped after {seconds:.0f} s; give more --minutes") from None
        except Exception as error:
            said = str(error) or type(error).__name__
            raise RuntimeError(said.splitlines()[0][:300]) from error


def run(case: Case, seconds: float) -> dict:
    """The row of a case: measured within so many seconds, or why not."""
    row = asdict(case) | {"measured": False, "command":
                          f"python -m studies.bench --model {case.model} --rows {case.rows}"}
    if seconds <= 0:
        return row | {"why": "no time was left"}
    if case.model in LARGE and not torch.cuda.is_available():
        return row | {"why": "it takes a GPU"}
    try:
        return row | {"measured": True, **alone(measure, case, seconds=seconds)}
    except RuntimeError as error:
        return row | {"why": str(error)}


def label(row: dict) -> str:
    how = "" if row["model"] in VJEPA else ", LoRA" if row["lora_rank"] else ", full"
    if row["sampler"]:
        how = f", {row['sampler']}" + ", lengths skewed" * row["skewed"]
    return row["model"] + how + ", checkpointing" * row["gradient_checkpointing"]


def show(row: dict) -> str:
    if not row["measured"]:
        return f"{label(row):42} not measured: {row['why']}; measure it: {row['command']}"
    return f"{label(row):42} " + "   ".join(
        f"{part} {x['per_second']:9.2f} {row['unit']}/s, MFU {x['mfu']:5.1%}, "
        f"peak {x['peak_gib']:6.2f} GiB" + (f", planned {x['planned_gib']:.2f}"
                                            if "planned_gib" in x else "")
        for part in ("rollout", "update") if (x := row.get(part)))


# The papers' settings: responses and their tokens; rollouts, of so many chunks at the 512 steps
# that libero_object's episodes may last
RESPONSES, TOKENS, ROLLOUTS, CHUNKS = 1024, 512, 512, 64


def steps(rows: list[dict]) -> list[str]:
    """Minutes that a step takes at the papers' settings by the rates measured, a line a case."""
    rows = [row for row in rows if row["measured"]]
    clips = [row["rollout"]["per_second"] for row in rows if row["model"] in VJEPA]
    vllm = [row["rollout"] for row in rows if row["sampler"] == "vllm"]
    lines = []
    for row in rows:
        if row["model"] in LARGE and row.get("update"):
            units = RESPONSES * TOKENS if row["model"] in QWEN else ROLLOUTS * CHUNKS
            by_vllm = bool(row["model"] in QWEN and vllm)
            measured = {"rollout" + " by vLLM" * by_vllm: vllm[0] if by_vllm else row["rollout"],
                        "update": row["update"]}
            parts = {name: units / x["per_second"] / 60 for name, x in measured.items()}
            if row["model"] in OPENVLA and clips:
                parts["reward"] = ROLLOUTS / clips[0] / 60
            said = ", ".join(f"{name} {x:.1f}" for name, x in parts.items())
            lines.append(f"a step of the paper's, {label(row)}: {sum(parts.values()):.1f} "
                         f"minutes ({said}); without the simulator")
    return lines


def of_ranks(s: Settings) -> None:
    """Prints the seconds of each part."""
    torch.set_num_threads(s.threads)
    ranks.start()
    torch.manual_seed(0)                                    # every rank holds the same weights
    _, model = build(Case(s.model), ranks.device())
    count = f"{sum(p.numel() for p in model.parameters()):,}"
    seconds = {"shard": [seconds_of(lambda: ranks.shard(model)).seconds]}
    optimizer, kept = make_optimizer(model, 1e-6), ranks.trainable(model)
    for p in kept.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()                                        # makes the moments
    folder = Path(s.out or "out/bench_ranks") / "checkpoint"

    def gather() -> None:
        with ranks.whole_weights(model):
            pass
    parts = {"gather": gather, "save": lambda: checkpoint.save(folder, kept, optimizer, {}),
             "load": lambda: checkpoint.load(folder, kept, optimizer)}
    for name, part in parts.items():
        ranks.barrier()
        seconds[name] = [seconds_of(part).seconds for _ in range(3)]
    size = sum(file.stat().st_size for file in folder.iterdir()) / GiB
    slowest = {name: max(ranks.gather([np.median(x)])) for name, x in seconds.items()}
    print(f"{s.model}, {count} parameters, {ranks.world_size()} ranks, {size:.2f} GiB saved: "
          + ", ".join(f"{name} {x:.3f} s" for name, x in slowest.items()))
    ranks.stop()


def study(s: Settings) -> None:
    """Every case, the most telling first, each row kept as it ends; the same command goes on."""
    check(s)
    if s.stage == "ranks":
        return of_ranks(s)
    models, began = [s.model] if s.model else LARGE if s.stage else SMALL, time.monotonic()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    journal = Journal(s.out or f"results/bench/{s.model or s.stage or 'small'}.jsonl",
                      {"device": device, "torch": torch.__version__},
                      keep=lambda row: row.get("measured") is True)
    every = [case for name in models for case in cases(name, s.rows, s.threads)]
    every.sort(key=lambda case: (case.model not in VJEPA and not case.gradient_checkpointing
                                 and case.sampler != "vllm", not case.lora_rank))
    print(f"{device}, torch {torch.__version__}", *map(show, rows := journal.rows), sep="\n")
    for case in every:
        if any(asdict(case).items() <= row.items() for row in rows):
            continue
        left = 60 * s.minutes - (time.monotonic() - began)
        rows.append(run(case, left))
        journal.add(rows[-1])
        print(show(rows[-1]), flush=True)
    journal.close()
    print(*steps(rows), f"wrote {journal.path}", sep="\n")
    trl = journal.path.with_name(f"{journal.path.stem}_trl.json")
    if s.stage and find_spec("trl") and not trl.exists():
        command = ["-m", "studies.bench_trl", "--model", "qwen2.5-vl-7b", "--out", str(trl)]
        try:
            print(runs.python(command, max(0, 60 * s.minutes - (time.monotonic() - began))))
        except RuntimeError as error:
            print(f"TRL's step not measured: {error}; measure it: python {shlex.join(command)}")


main = script(Settings, study, __doc__, words=("gpu", "ranks"))
if __name__ == "__main__":
    sys.exit(main())
