"""What a run needs of a GPU and of the machine (plumbing/memory.py), and what else would stop it, said before anything is loaded: `--plan` of vla_srpo.py
and reflection_srpo.py, whose runs begin with the short form.

    python vla_srpo.py --plan --model FOLDER --dtype bfloat16 --gradient_checkpointing
    torchrun --nproc-per-node 4 reflection_srpo.py rl --paper --model FOLDER --data rows.jsonl --plan
"""
import math
import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from plumbing import checkpoint, memory
from plumbing.memory import GiB
from robots import evaluate, find_suite, policy_class
from robots import openvla as checkpoints
from robots import policy as policies

# Reports

def inputs(s, model: str = "") -> tuple[Path, tuple]:
    """The checkpoint's folder, and what `memory.needs` takes after the settings; ranks are torchrun's."""
    if not (model or s.model):
        raise ValueError("--plan needs --model: a folder or hub id")
    folder, config, shapes = memory.read_checkpoint(model or s.model)
    kind, encoder = config.get("model_type"), None
    if hasattr(s, "micro_tokens") and not (isinstance(config.get("vision_config"), dict) and "image_token_id" in config):
        raise ValueError(f"{folder} is a {kind}, which takes no pictures here; give a Qwen2.5-VL or Qwen3-VL")
    if hasattr(s, "micro_batch") and kind not in ("openvla", "tiny_vla"):
        raise ValueError(f"{folder} is a {kind}; give an OpenVLA-OFT or a TinyVLA")
    if getattr(s, "reward", "") == "srpo" and s.world_model != "pixels":
        where, video, tensors = memory.read_checkpoint(s.world_model)
        if video.get("model_type") != "vjepa2":
            raise ValueError(f"--world_model {where} is a {video.get('model_type')}; give a V-JEPA 2, or pixels")
        encoder = video, sum(map(math.prod, tensors.values()))
    return folder, (config, shapes, int(os.environ.get("WORLD_SIZE", 1)), encoder)


def summary(s, given: tuple) -> str:
    """One line: what is needed, beside what is there."""
    plan, (free, what) = memory.needs(s, *given), memory.free_memory()
    return f"rollout {plan.rollout / GiB:.2f}, update {plan.update / GiB:.2f} GiB by plan, with 5% for the allocator; {free / GiB:.2f} free ({what})"


def announced(s, model: str = "") -> str:
    """The first lines of a run, before anything is loaded: what is needed, and what to change if that is more than there is. ValueError for what
    would stop the run later."""
    folder, given = inputs(s, model)
    if problems := checks(s, folder, *given[:2]):
        raise ValueError(problems[0])
    free, plan = memory.free_memory()[0], memory.needs(s, *given)
    parts = [f"{field.name.replace('_', ' ')} {x / GiB:.2f}" for field in fields(plan) if (x := getattr(plan, field.name)) > 0.005 * GiB]
    return f"memory: {summary(s, given)}" + f"\n  of it: {', '.join(parts)}" * (plan.peak > GiB) + (
        f"\n  it does not fit: {advice(s, given, free)}" if plan.peak > free else "")


def advice(s, given: tuple, free: float) -> str:
    changes, best = memory.savings(s, given, free)
    flags = " ".join(f"--{name} {value}" for name, value in changes.items()) or "these flags"
    return f"{flags} needs {best.peak / GiB:.2f} GiB" + ("" if best.peak <= free else "; take a larger GPU, or more of them with torchrun")


def report(s, model: str = "") -> tuple[str, list[str]]:
    """The plan as text, and what would stop the run, a line each."""
    try:
        folder, given = inputs(s, model)
    except ValueError as error:                                                         # another architecture: there is nothing to count
        return "", [str(error)]
    config, shapes, *_ = given
    try:
        problems = checks(s, folder, config, shapes)
    except (ValueError, OSError) as error:
        problems = [str(error)]
    problems += simulator(s)
    plan, (free, _), (ram, disk) = memory.needs(s, *given), memory.free_memory(), memory.host(s, *given)
    pictures = memory.images(s, config, given[3]) / given[2]
    room = shutil.disk_usage(next(p for p in Path(s.out or "out").absolute().parents if p.exists())).free
    if disk > room:
        problems.append(f"two checkpoints and the policy need {disk / GiB:.1f} GiB on disk, {room / GiB:.1f} are free; choose another --out")
    if torch.cuda.is_available() and ram > (there := memory.free_ram()):
        problems.append(f"a rank needs {ram / GiB:.1f} GiB of RAM beside the GPU, {there / GiB:.1f} are free; do without --beta and --offload_optimizer"
                        + ", with fewer --groups" * (pictures > 0) + ", or take more GPUs")
    lines = [f"plan for {folder}: {sum(map(math.prod, shapes.values())):,} parameters, {sum(memory.trained(shapes, s).values()):,} trained, {given[2]} rank(s); GiB each"]
    lines += [f"  {field.name.replace('_', ' '):12} {getattr(plan, field.name) / GiB:8.2f}" for field in fields(plan)]
    lines += [f"  beside the GPU: RAM {ram / GiB:.2f}" + f", {pictures / GiB:.2f} of it images" * (pictures > 0) + f", disk {disk / GiB:.2f}"]
    return "\n".join([*lines, "  " + summary(s, given)]), problems + [f"does not fit; {advice(s, given, free)}"] * (plan.peak > free)


def show(s, model: str = "") -> int:
    """`--plan`: the exit code is 0 if nothing would stop the run. model: in place of the settings'."""
    text, problems = report(s, model)
    if int(os.environ.get("RANK", 0)) == 0:
        print(text)
        print("".join(f"problem: {problem}\n" for problem in problems), end="", file=sys.stderr)
    return 2 if problems else 0


@contextmanager
def explained(s):
    """Within it, running out of memory, on the GPU or the CPU, is a RuntimeError of one line: what settings s needed, and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not re.search("can't allocate memory|ALLOC_FAILED|out of memory", str(error)):
            raise
        if s.resume:
            s = replace(s, **checkpoint.read_state(Path(s.resume) / "checkpoint")["settings"])
        if not s.model:
            raise RuntimeError("out of memory: lower the batch sizes, see --help") from error
        _, given = inputs(s)
        free = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else memory.free_memory()[0]
        free = min(free, 0.9 * memory.needs(s, *given).peak)                                   # it did not fit, whatever the plan says
        raise RuntimeError(f"out of memory: {summary(s, given)}; {advice(s, given, free)}") from error


# What else would stop the run

def checks(s, folder: Path, config: dict, shapes: dict) -> list[str]:
    """Problems of the checkpoint, its tokenizer and the suite, a line each with the fix."""
    kind, problems = config["model_type"], []
    files = {file.name for file in folder.iterdir()}
    if kind == "tiny_vla":
        needed = []
    else:
        needed = ["tokenizer.json", *(["preprocessor_config.json"] if kind == "openvla" or "processor_config.json" not in files else [])]
    problems += [f"{folder} has no {name}; copy it from the original checkpoint" for name in needed if name not in files]
    if hasattr(s, "micro_tokens"):
        return problems or _qwen_checks(folder, config, shapes)
    problems = policy_class(kind).problems(folder)
    try:
        policies.find_key(checkpoints.action_statistics(folder), s.suite)
    except ValueError as error:
        problems.append(f"{folder}: {error}")
    return problems


def _qwen_checks(folder: Path, config: dict, shapes: dict) -> list[str]:
    problems, text = [], config.get("text_config") or config
    tokenizer = checkpoints.read_json(folder / "tokenizer.json")
    words = (tokenizer.get("model") or {}).get("vocab") or {}
    numbers = {*(words.values() if isinstance(words, dict) else range(len(words))), *(token["id"] for token in tokenizer.get("added_tokens", ()))}
    if len(words) > text["vocab_size"]:
        problems.append(f"{folder}: the tokenizer has {len(words)} words and the model {text['vocab_size']} rows; copy tokenizer.json from the model's own checkpoint")
    elif config["image_token_id"] not in numbers:
        problems.append(f"{folder}: the tokenizer has no word {config['image_token_id']}, the model's place holder of pictures; copy tokenizer.json from the model's own checkpoint")
    if not any(folder.glob("chat_template.*")) and "chat_template" not in checkpoints.read_json(folder / "tokenizer_config.json"):
        problems.append(f"{folder} has no chat template; give an instruction-tuned checkpoint")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    wanted, found = {sum(p.numel() for p in tensors) for tensors in (model.parameters(), model.state_dict().values())}, sum(map(math.prod, shapes.values()))
    if found < min(wanted):                                                             # names differ between versions of transformers, sizes do not
        problems.append(f"{folder}: the tensors hold {found:,} numbers, and config.json describes {min(wanted):,}; copy the checkpoint again")
    return problems


def simulator(s) -> list[str]:
    """Problems of the suite, its tasks, OpenGL and the simulator's assets."""
    if hasattr(s, "micro_tokens"):
        return []
    try:
        suite = find_suite(s.suite, tuple(s.tasks), s.options())
        evaluate.try_suite(suite, "heldout" if s.split == "disjoint" else "all")
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return [str(error).splitlines()[0]]
    return []
