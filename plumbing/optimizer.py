"""Adam with fp32 master weights, one clipped step of it, and its state as named tensors.

At the papers' learning rates (1e-6, 5e-6) an Adam step is under half the gap between neighbouring
bf16 numbers near a typical weight, so bf16 weights that are updated in place do not move.
"""
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from plumbing import ranks


class MasterAdam(torch.optim.Optimizer):
    """Adam with fp32 state whatever the parameters' dtype, and an fp32 master copy of each
    parameter in bf16 or fp16; fp32 parameters are updated directly.

    Gradients are upcast one tensor at a time: 7.54B bf16 parameters take 7.54e9 * (2 + 2 + 4 + 8)
    bytes = 112 GiB. After the first step the masters are the model: whoever loads other weights
    must load the optimiser's state with them. offload: the state lives, and the step is computed,
    on the CPU; of those 112 GiB 28 stay on the GPU."""

    def home(self, p: Tensor) -> torch.device:
        """Where the state of a parameter lives."""
        return torch.device("cpu") if self.defaults["offload"] else p.device

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict) -> None:
        lr, (beta1, beta2), home = group["lr"], group["betas"], self.home(p)
        s = self.state[p]
        if not s:
            s["step"] = torch.zeros((), dtype=torch.int64)
            s["m"], s["v"] = (torch.zeros_like(p, dtype=torch.float32, device=home)
                              for _ in range(2))
        # The second condition: also of a run that is resumed with offload
        if "master" not in s and (p.dtype != torch.float32 or home != p.device):
            s["master"] = p.to(home, torch.float32)
        s["step"] += 1
        t, w, g = int(s["step"]), s.get("master", p), p.grad.to(home, torch.float32)
        s["m"].lerp_(g, 1 - beta1)
        s["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        rms = s["v"].sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
        w.addcdiv_(s["m"], rms, value=-lr / (1 - beta1**t))
        if w is not p:
            p.copy_(w)  # rounds to nearest


def make_optimizer(model: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999),
                   offload: bool = False) -> MasterAdam:
    """`MasterAdam` over a model's trainable parameters. ValueError if there are none, or lr is not
    a finite number >= 0."""
    params = list(ranks.trainable(model).values())
    if not params:
        raise ValueError("nothing to optimise: no parameter has requires_grad=True")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr must be a finite number >= 0, got {lr}")
    return MasterAdam(params, dict(lr=lr, betas=betas, eps=1e-8, offload=offload))


@torch.no_grad()
def clip_and_step(optimizer: torch.optim.Optimizer, model: nn.Module,
                  max_norm: float) -> tuple[float, bool]:
    """Scale the model's gradients to a global L2 norm <= max_norm, step, clear them:
    (norm before clipping, stepped).

    A non-finite norm (one NaN or inf anywhere) skips the step: weights and optimiser state stay."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    # fp32 norms: clip_grad_norm_ would return that of bf16 gradients rounded to bf16
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
    norm = float(torch.stack(norms).norm()) if grads else 0.0
    stepped = math.isfinite(norm)
    if stepped:
        for g in grads if norm > max_norm else []:
            g.mul_(max_norm / norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, stepped


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as {"optimizer.<parameter index>.<name>": tensor}; lr and such are the
    run's settings."""
    return {f"optimizer.{i}.{k}": v for i, p in enumerate(optimizer.param_groups[0]["params"])
            for k, v in optimizer.state.get(p, {}).items()}


def load_optimizer_tensors(optimizer: MasterAdam, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Inverse of `optimizer_tensors`, of keys and whole tensors, one pair after the other: each is
    divided among ranks as its parameter is; on one process they become the state, without a copy
    where they are on its device. ValueError, nothing changed, if they are another model's, or not
    complete."""
    state: dict[Tensor, dict[str, Tensor]] = {}
    params = optimizer.param_groups[0]["params"]
    for key, value in tensors:
        index, name = key.split(".")[1], key.split(".")[-1]
        if not index.isdecimal() or int(index) >= len(params):
            raise ValueError(f"{key}, but {len(params)} parameters: it is another model's")
        p = params[int(index)]
        wanted = ((), torch.int64) if name == "step" else (p.shape, torch.float32)
        if (value.shape, value.dtype) != wanted:
            raise ValueError(f"{key} is {value.dtype} {tuple(value.shape)}, not {wanted[1]} "
                             f"{tuple(wanted[0])}: it is another model's")
        if name == "v" and (value < 0).any():
            raise ValueError(f"{key} holds a number below 0, and is a mean of squares")
        # Counts of steps stay on the CPU
        state.setdefault(p, {})[name] = value if name == "step" else (
            ranks.divided(value, p).to(optimizer.home(p)))
    for names in map(set, state.values()):
        if not {"step", "m", "v"} <= names <= {"step", "m", "v", "master"}:
            raise ValueError(f"the optimiser's state of a parameter is {', '.join(sorted(names))}: "
                             "it is not complete")
    optimizer.state.clear()
    optimizer.state.update(state)
