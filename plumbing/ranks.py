"""Several GPUs, or nodes: torchrun starts one process per GPU, FSDP2 divides weights, gradients and optimiser state among them.

1. Each rank rolls out its own groups with whole weights, gathered once for the phase: no rank waits for another's longest response.
2. What is small (rewards, latents, statistics) is gathered to every rank, so advantages and normalisers are the whole batch's.
3. In the update each block's weights are gathered as they are needed, and its gradients are summed into each rank's shard. Every rank
   must make the same number of passes: who has fewer micro-batches fills up with passes that count for nothing (`even`).
4. Checkpoints are torch.distributed.checkpoint folders, written atomically, readable by any number of ranks.

Ctrl-C reaches every rank, and the step is finished and saved; torchrun kills after 30 s what has not ended, so give it --shutdown-timeout 1800.

Without torchrun everything here does nothing, and the scripts are the single-process programs they look like. Left out: tensor and
pipeline parallelism, which 7B does not need, and elastic restarts: a rank that dies ends the run, --resume goes on with it.

    torchrun --nproc-per-node 8 reflection_srpo.py rl --paper ...                                           # one node
    # two nodes see the same --out folder: each rank writes its shards of a checkpoint into it
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 vla_srpo.py ...   # the same on both
"""
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

import grpo
from plumbing import run as job

PATIENCE = timedelta(hours=12)  # the longest that ranks wait for one that evaluates or has the slowest rollouts


# Processes

def start() -> None:
    """Join the process group that torchrun describes in the environment: gloo, and nccl on CUDA. Ranks but the first print nothing."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    if rank():
        sys.stdout = open(os.devnull, "w")


def stop() -> None:
    """Leave the process group. Only after success: after a failure the others may be waiting in a collective, and torchrun ends them."""
    if dist.is_initialized():
        dist.barrier()                  # gloo aborts a rank that leaves while another still talks to it
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def gather(items: list) -> list:
    """The ranks' lists of picklable things, CPU tensors among them, joined in the order of the ranks."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for each in lists for item in each]


def metrics_log(path: Path, resume_step: int) -> job.MetricsLog:
    """Written by the first rank alone."""
    return job.MetricsLog(os.devnull if rank() else path, resume_step)


def share(items) -> list:
    """This rank's contiguous part of a sequence that all ranks hold: `gather` of the parts is the sequence.

    >>> share([3, 1, 2])
    [3, 1, 2]
    """
    n, r = len(items), rank()
    return list(items[r * n // world_size():(r + 1) * n // world_size()])


def even(parts: list) -> list:
    """A rank's micro-batches, filled up with None to the largest number that any rank has."""
    return parts + [None] * (max(gather([len(parts)])) - len(parts))


def permutation(n: int) -> Tensor:
    """torch.randperm(n) of the first rank, on all: their own random numbers have gone apart in the rollouts."""
    return gather([torch.randperm(n)])[0]


def barrier() -> None:
    gather([])


# Models

def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: both towers' and the language model's. What is recomputed as one is also gathered as one."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def shard(model: nn.Module) -> nn.Module:
    """Divide a model's parameters among the ranks, in place: each block is a unit, the root holds what is left. Gradients are reduced in
    fp32 and averaged over ranks: multiply a loss that is to be summed by `world_size()`. Every rank must hold the same weights. Make the
    optimiser afterwards: parameters become DTensors."""
    if world_size() > 1:
        root = model.get_base_model() if hasattr(model, "get_base_model") else model      # of peft: it generates past its own forward
        mesh = init_device_mesh(next(root.parameters()).device.type, (world_size(),))
        for p in root.parameters():
            p.data = p.data.contiguous()        # TinyVLA's convolutions are channels-last, which cannot be divided
        for unit in (*blocks(root), root):
            fully_shard(unit, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return model


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Within it every rank holds whole weights: passes communicate nothing, so ranks may make different numbers of them. No backward."""
    units = [m for model in models for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in sorted(units, key=lambda unit: -len(list(unit.modules()))):    # the root first: generation may enter a block before it
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


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, put together again if they are divided; every rank must call it."""
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu() for name, x in tensors.items()}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """For saving: all of the model's tensors by its class's names, LoRA adapters merged. Copies on the CPU, but on one process without
    adapters, where they are the model's own; empty on ranks but the first."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) if world_size() > 1 else model.state_dict()
    if not hasattr(model, "peft_config"):
        return state
    merged, config = {}, model.peft_config["default"]
    for name, x in state.items():
        if name.endswith("base_layer.weight"):
            a, b = (state[name.replace("base_layer", f"lora_{side}.default")].float() for side in "AB")     # (r, in), (out, r)
            x = (x.float() + config.lora_alpha / config.r * b @ a).to(x.dtype)
        if ".lora_" not in name:
            merged[name.removeprefix("base_model.model.").replace(".base_layer", "")] = x.cpu()
    return merged


# Checkpoints

def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, state: dict,
                    more: dict[str, Tensor] = {}) -> None:
    """`job.save_checkpoint`, or on several ranks a folder of torch.distributed.checkpoint: each rank writes its shards into
    <path>.tmp, which is renamed when all are on disk. `tensors`: the trained parameters by name; `more`: what else is to be kept."""
    path, trainer = Path(path).absolute(), grpo.optimizer_tensors(optimizer) | more
    if world_size() == 1:
        return job.save_checkpoint(path, model_tensors=tensors, trainer_tensors=trainer, state=state)
    tmp = path.with_name(path.name + ".tmp")
    if rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        (tmp / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False))
    barrier()
    try:
        dcp.save(tensors | trainer, checkpoint_id=tmp)      # returns when every rank's files are flushed
    except CheckpointException as error:
        raise OSError(f"{tmp} cannot be written ({_cause(error)}); is the disk full? The checkpoint before it is whole") from None
    if rank() == 0:
        job.replace_folder(tmp, path)
    barrier()


@torch.no_grad()
def load_checkpoint(path: str | Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Fill `tensors` and the optimiser's state from a checkpoint written by any number of ranks. ValueError if they do not fit."""
    path = job.find_checkpoint(path)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not (path / ".metadata").exists():       # one process wrote it
        model, trainer, _ = job.load_checkpoint(path)
        model |= trainer
        if wrong := [name for name, x in tensors.items() if name not in model or model[name].shape != x.shape]:
            raise ValueError(f"{path}: {wrong[0]} is missing or has another shape; the checkpoint is another model's")
        for name, x in tensors.items():
            x.copy_(_place(model[name], x))
        state = {key: _place(value, params[int(key.split(".")[1])]) for key, value in trainer.items() if key.startswith("optimizer.")}
        return grpo.load_optimizer_tensors(optimizer, state)
    wanted = dict(tensors)
    try:
        for key, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items():
            if key.startswith("optimizer."):
                like = params[int(key.split(".")[1])]
                wanted[key] = (torch.zeros_like(like, dtype=torch.float32, device=optimizer.home(like)) if entry.size
                               else torch.zeros((), dtype=torch.int64))
        dcp.load(wanted, checkpoint_id=path)
    except (CheckpointException, RuntimeError, IndexError, EOFError, OSError) as error:     # the first derives from BaseException
        raise ValueError(f"{path} cannot be loaded, it is damaged or another model's: {_cause(error)}") from None
    grpo.load_optimizer_tensors(optimizer, {key: x for key, x in wanted.items() if key.startswith("optimizer.")})


def _cause(error: BaseException) -> str:
    """The first line of what went wrong on some rank."""
    cause = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _place(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor divided as `like` is."""
    if whole.dim() and isinstance(like, DTensor):
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
    return whole
