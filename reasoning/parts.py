"""What reflection_srpo.py trains with, how it is loaded and saved."""
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from plumbing import adapters, ranks
from plumbing.optimizer import make_optimizer
from reasoning import arrows, qwen
from reasoning import rows as data
from reasoning.engine import engine_of
from reasoning.rows import Row

ADAPTED = re.compile(r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")


@dataclass
class Parts:
    """What a stage trains with."""
    model: torch.nn.Module
    processor: qwen.Processor
    optimizer: torch.optim.Optimizer
    reference: object | None = None     # the starting policy, for the KL
    engine: object | None = None        # that samples, if it is not the model itself


def load(run, path: str | Path) -> Parts:
    """A model ready for training, divided among the ranks."""
    s = run.s
    model, processor = prepared(path, s)
    optimizer = make_optimizer(ranks.shard(model), s.lr, betas=(0.9, 0.99),
                               offload=s.offload_optimizer)
    run.keep(adapters.kept(model), optimizer)
    return Parts(model, processor, optimizer, None, engine_of(path, processor, s))


def prepared(path: str | Path, s) -> tuple[torch.nn.Module, qwen.Processor]:
    model, processor = qwen.load_vlm(path, getattr(torch, s.dtype), ranks.device(s.device))
    return ready(model, s), processor


def ready(model: torch.nn.Module, s) -> torch.nn.Module:
    """What is frozen frozen, with the adapters and the checkpointing asked for."""
    if s.freeze_vision:
        model.model.visual.requires_grad_(False)    # the tower, and in it the projector
    if s.lora_rank:
        layers = [name for name, _ in model.named_modules() if ADAPTED.fullmatch(name)]
        adapters.add_adapters(model, layers, s.lora_rank, s.seed)
    if s.gradient_checkpointing:        # its name since transformers 5.24, else before
        getattr(model, "activation_checkpointing_enable",
                model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def save_policy(parts: Parts, folder: Path) -> None:
    def write(draft: Path, state: dict) -> None:
        parts.model.save_pretrained(draft, state_dict=state)
        parts.processor.save_pretrained(draft)
    adapters.save_policy(parts.model, folder, write)


def drawn(s, n: int, seed: int, target: str = "") -> list[Row]:
    return arrows.dataset(n, seed, s.format, target, text=s.data == "arrows_text")


def read_rows(run, source: str, processor: qwen.Processor) -> list[Row]:
    """The rows of a file that can be used; others are set aside in rejected.jsonl."""
    s, rejections = run.s, data.Rejections(run.out)
    rows = data.read_rows(source, s.images, s.columns)
    return data.usable(*rows, processor, s, rejections)
