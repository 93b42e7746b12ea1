"""`--plan`: what a run needs of a GPU and of the machine, before any weight is loaded.

The real model makes its passes, and the real optimiser its step, on tensors that have a size and no
numbers (PyTorch's `meta` device), and the bytes alive at once are counted (docs/seven_b.md): so it
holds for any model. Left out: the allocator's fragmentation and the libraries' own buffers, for
which 5% is added; the simulator's memory.
"""
import math
import os
import shutil
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from plumbing import ranks
from plumbing.optimizer import clip_and_step, make_optimizer

aten, META, GiB, MARGIN = torch.ops.aten, torch.device("meta"), 2**30, 1.05
STATIC = {"dtype", "lora_rank", "offload_optimizer"}    # change what stays, not only what passes


@dataclass
class Job:
    """What a script does at its largest, as functions of its settings s, which `savings` varies."""
    name: str                                           # of what it starts from
    model: Callable[[object], nn.Module]                # on `meta`, ready for training
    rollout: Callable[[nn.Module, object], object]      # the largest pass while sampling
    loss: Callable[[nn.Module, object], Tensor]         # of the largest micro-batch
    encode: Callable[[object], object] = lambda s: None     # the world model, after its pass
    images: Callable[[object], float] = lambda s: 0.0   # bytes of a step's images, in RAM
    savings: tuple[dict, ...] = ()                      # flags to try, the least costly first
    problems: list[str] = field(default_factory=list)   # what else would stop the run


class Meter(TorchDispatchMode):
    """Within it floats on `meta` have no numbers and are counted: `now`, and `peak`, in bytes.

    Whole numbers asked for on `meta` are real ones on the CPU: tokens, masks and positions, from
    which shapes follow. What is asked of a number that is not there is answered by 1."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.held: dict[int, object] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        empty = [x.device == META for x in tensors]
        if any(empty) and op in (aten._local_scalar_dense.default, aten.is_nonzero.default):
            return 1.0 if tensors[0].is_floating_point() else 1
        if any(empty) and op is aten.index.Tensor and args[1][0].dtype == torch.bool:
            shape = (int(args[1][0].sum()), *args[0].shape[args[1][0].dim():])
            return self._count(args[0].new_empty(shape))
        if any(empty):                                  # what comes of nothing stays nothing
            kwargs |= {"device": META} if kwargs.get("device") else {}
            if not all(empty):
                args, kwargs = tree_map_only(Tensor, lambda x: x.to(META), (args, kwargs))
        elif kwargs.get("device") == META and not op(*args, **kwargs).is_floating_point():
            kwargs["device"] = torch.device("cpu")
        return self._count(op(*args, **kwargs))

    def _count(self, out):
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device == META:
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.held:
                    self.held[key] = weakref.finalize(storage, self._free, key, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        del self.held[key]
        self.now -= size

    def of(self, work: Callable) -> int:
        """The peak while work() runs."""
        self.peak = self.now
        work()
        return self.peak


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
               enable_gqa=False) -> Tensor:
    """Fused, as on a CPU or GPU; on `meta` PyTorch would take the form that holds every score."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -math.inf)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@dataclass
class Needs:
    """Bytes on each GPU, or in RAM without one: what stays, and the peaks of three phases."""
    parameters: int
    trained: int
    weights: float
    gradients: float
    optimizer: float
    rollout: float
    reward: float
    update: float

    @property
    def peak(self) -> float:
        return MARGIN * max(self.rollout, self.reward, self.update)


def measure(s, job: Job, n: int = 1) -> Needs:
    """Of each of n ranks."""
    with Meter() as meter, patch.object(nn.functional, "scaled_dot_product_attention", _attention):
        encoder = []                                    # it is there in every phase
        encoding = meter.of(lambda: encoder.append(job.encode(s))) - meter.now
        model = job.model(s)
        trained = [p for p in model.parameters() if p.requires_grad]
        weights, gradients = _size(model.parameters()), _size(trained)
        optimizer, before = make_optimizer(model, 1e-6), meter.now

        def update(first: bool = False) -> None:
            for p in trained:               # the gradients of an earlier micro-batch are there
                p.grad = torch.empty_like(p)
            if not first:
                job.loss(model, s).backward()
            if not s.offload_optimizer:
                clip_and_step(optimizer, model, 1.0)
        update(first=True)                  # the optimiser's state is there from now on
        optimizer.zero_grad()
        state, steady = meter.now - before, meter.now
        model.eval()
        with torch.no_grad():
            rollout = meter.of(lambda: job.rollout(model, s))
        model.train()
        update_peak = meter.of(update)
    # Ranks divide what stays; in a pass a block or two and the root are whole on each of them
    shared, part = weights + gradients + state, 1 - 1 / n
    blocks = [_size(block.parameters()) for block in ranks.blocks(model)]
    largest, root = max(blocks, default=0), weights - sum(blocks)
    gathered = root + 2 * largest + (0 if s.lora_rank else root + largest) * 2
    reference = weights if s.beta and not s.lora_rank else 0
    waiting = 0 if torch.cuda.is_available() else reference     # it waits on the CPU
    rollout += weights / n * (n > 1) - state * part
    reward = max(steady + encoding - (weights + state) * part, rollout + reference - waiting)
    update_peak += gathered * (n > 1) - shared * part
    return Needs(
        sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained),
        weights / n, gradients / n, state / n, rollout + waiting, reward + waiting,
        update_peak + waiting)


def _size(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def free_memory() -> tuple[float, str]:
    """(bytes, of what): free on this rank's GPU, or the available RAM."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    return free_ram(), "RAM of the CPU"


def free_ram() -> float:
    """Bytes for each process of this machine."""
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def savings(s, job: Job, n: int, needs: Needs, free: float) -> tuple[dict, Needs]:
    """The settings to change so that it fits, and what is then needed; all that help if it never
    does."""
    changes, seen, static = {}, [s], needs.weights + needs.gradients + needs.optimizer
    order = job.savings if static <= free else sorted(job.savings, key=lambda x: not STATIC & {*x})
    for more in (*order, *order):       # what did not help at first may help in the end
        if needs.peak <= free:
            break
        changed = replace(s, **changes | more)
        if changed in seen:
            continue
        seen.append(changed)
        with suppress(ValueError):                      # not of this model, or not with ranks
            tried = measure(changed, job, n)
            if tried.peak < 0.99 * needs.peak:
                changes, needs = changes | more, tried
    return changes, needs


def report(s, job: Job) -> tuple[str, list[str]]:
    """The plan as text, and what would stop the run, a line each."""
    n, problems = ranks.world_size(), list(job.problems)
    needs, (free, of) = measure(s, job, n), free_memory()
    if needs.peak > free:
        changes, best = savings(s, job, n, needs, free)
        flags = " ".join(f"--{name} {value}" for name, value in changes.items()) or "these flags"
        problems.append(f"does not fit; {flags} needs {best.peak / GiB:.2f} GiB" + (
            "" if best.peak <= free else "; take a larger GPU, or more of them with torchrun"))
    # Beside the GPU: two checkpoints, since the old one goes when the new one is whole, the policy
    half = 2 if s.dtype == "bfloat16" else 4
    state = needs.trained * (8 if half == 4 or s.lora_rank else 12)
    checkpoint = state + needs.trained * (4 if s.lora_rank else half)
    disk, images = 2 * checkpoint + needs.parameters * half, job.images(s) / n
    ram = (images + max(checkpoint / n, needs.parameters * half) + s.offload_optimizer * state
           + bool(s.beta and not s.lora_rank) * needs.parameters * half)
    out = Path(s.out or "out").absolute()
    room = shutil.disk_usage(next(path for path in out.parents if path.exists())).free
    if disk > room:
        problems.append(f"two checkpoints and the policy need {disk / GiB:.1f} GiB on disk, "
                        f"{room / GiB:.1f} are free; choose another --out")
    if torch.cuda.is_available() and ram > (there := free_ram()):
        problems.append(f"a rank needs {ram / GiB:.1f} GiB of RAM beside the GPU, "
                        f"{there / GiB:.1f} are free; do without --beta and --offload_optimizer"
                        + ", with fewer --groups" * bool(images) + ", or take more GPUs")
    lines = [f"plan for {job.name}: {needs.parameters:,} parameters, {needs.trained:,} trained, "
             f"{n} rank(s); GiB each"]
    phases = [f"peak of the {phase}" for phase in ("rollout", "reward", "update")]
    lines += [f"  {title:20} {getattr(needs, title.split()[-1]) / GiB:9.2f}"
              for title in ("weights", "gradients", "optimizer", *phases)]
    return "\n".join([*lines, f"  needed with 5% for the allocator {needs.peak / GiB:.2f}, "
                      f"{free / GiB:.2f} free ({of}); RAM {ram / GiB:.2f}, "
                      f"{images / GiB:.2f} of it images; disk {disk / GiB:.2f}"]), problems


def show(s, job: Callable[[object], Job]) -> int:
    """--plan of a script: the exit code is 0 if nothing would stop the run."""
    text, problems = report(s, job(s))
    if ranks.rank() == 0:
        print(text)
        print("".join(f"problem: {problem}\n" for problem in problems), end="", file=sys.stderr)
    return 2 if problems else 0
