"""Several GPUs, or nodes: torchrun starts a process for each GPU, FSDP2 divides weights, gradients
and optimiser state among them. On one process every function here is an identity.

1. Each rank rolls out its own groups with whole weights, gathered once for the phase: no rank waits
   for another's longest response.
2. What is small (rewards, latents, statistics) is gathered to every rank, so advantages and
   normalisers are the whole batch's.
3. In the update each block's weights are gathered as they are needed, and its gradients are summed
   into each rank's shard. Every rank must make the same number of passes (plumbing/update.py).

Ctrl-C reaches every rank, and the step is finished and saved; torchrun kills after 30 s what has
not ended, so give it --shutdown-timeout 1800 (the commands: docs/seven_b.md). Left out: tensor and
pipeline parallelism, which 7B does not need, and elastic restarts: a rank that dies ends the run,
--resume goes on with it.
"""
import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# The longest that ranks wait for one that evaluates or has the slowest rollouts
PATIENCE = timedelta(hours=12)


# Processes

def use_cores(threads: int) -> None:
    """torch's threads, 0: one a core. glibc keeps what is freed: page faults took as long again."""
    torch.set_num_threads(threads or os.cpu_count())
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-3, 2**25)              # M_MMAP_THRESHOLD, its highest value
        mallopt(-1, 2**29)              # M_TRIM_THRESHOLD


def start() -> None:
    """Join the process group that torchrun describes in the environment: gloo, and nccl on CUDA.
    Ranks but the first print nothing from here on."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    if rank():
        sys.stdout = open(os.devnull, "w")


def stop() -> None:
    """Leave the process group. Only after success: after a failure the others may be waiting in a
    collective, and torchrun ends them."""
    if "LOCAL_RANK" in os.environ and dist.is_initialized():
        dist.barrier()                  # gloo aborts a rank that leaves while another still talks
        if "vllm" not in sys.modules:   # whose engine ends all groups at exit, its own among them
            dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device(asked: str = "") -> str:
    """This rank's GPU, or cpu; or the one asked for. ValueError if it is not there."""
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {asked}: PyTorch finds no GPU here; leave the flag out")
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return asked or (own if torch.cuda.is_available() else "cpu")


def gather(items: list) -> list:
    """The ranks' lists of picklable things, also CPU tensors, joined in order of the ranks."""
    if world_size() == 1:
        return items
    lists: list = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for each in lists for item in each]


def share(items: Sequence) -> list:
    """This rank's contiguous part of what all ranks hold: `gather` of the parts is the whole.

    >>> share([3, 1, 2])
    [3, 1, 2]
    """
    n, r = len(items), rank()
    return list(items[r * n // world_size():(r + 1) * n // world_size()])


def first(make):
    """make() of the first rank, on all of them."""
    return gather([make()] if rank() == 0 else [])[0]


def barrier() -> None:
    gather([])


# Models

def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: what is recomputed as one is also gathered as one."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def shard(model: nn.Module) -> nn.Module:
    """Divide a model's parameters among the ranks, in place: each block is a unit, the root holds
    what is left. Gradients are reduced in fp32 and averaged over ranks. Every rank must hold the
    same weights. Make the optimiser afterwards: parameters become DTensors."""
    if world_size() > 1:
        mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
        for p in model.parameters():
            p.data = p.data.contiguous()        # channels-last convolutions cannot be divided
        for unit in (*blocks(model), model):
            fully_shard(unit, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return model


@contextmanager
def whole_weights(*models: nn.Module) -> Iterator[None]:
    """Within it every rank holds whole weights: passes communicate nothing, so ranks may make
    different numbers of them. No backward."""
    units = [m for model in models for m in model.modules() if isinstance(m, FSDPModule)]
    # The root first: generation may enter a block before it
    for unit in sorted(units, key=lambda unit: -len(list(unit.modules()))):
        unit._get_fsdp_state()._lazy_init()
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name: what a checkpoint holds of a model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(x: Tensor) -> Tensor:
    """A tensor, put together again if it is divided; every rank must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def on_first(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors on the first rank's CPU, one after the other; none on the others. Every rank
    must call it."""
    parts = ((name, whole(x)) for name, x in named)
    return {name: x.detach().cpu() for name, x in parts if rank() == 0}


def divided(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor divided among the ranks as `like` is; every rank must call it."""
    if isinstance(like, DTensor) and not isinstance(x, DTensor) and x.dim():
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return x


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x
