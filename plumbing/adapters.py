"""What a policy is besides its weights: LoRA adapters, the policy it started as, a running average,
and a folder in which all of that has become plain weights again.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from plumbing import ranks
from plumbing.files import whole


def add_adapters(model: nn.Module, layers: list[str], rank: int, seed: int) -> nn.Module:
    """LoRA adapters (fp32) of this rank on the linear layers of these names, in place; nothing else
    trains. The same on every rank of a run: their draw depends on the seed alone."""
    from peft import LoraConfig, inject_adapter_in_model
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
    inject_adapter_in_model(config, model)
    for p in ranks.trainable(model).values():
        p.data = p.data.float()
    return model


def has_adapters(model: nn.Module) -> bool:
    return any(hasattr(m, "lora_A") for m in model.modules())


@contextmanager
def starting_policy(model: nn.Module, copy: nn.Module | None) -> Iterator[nn.Module]:
    """The KL term's reference, without gradients and with whole weights, is the policy as it was
    when training began: `copy`, which waits on the CPU, on the model's device meanwhile; or the
    model, its adapters off."""
    device = next(model.parameters()).device
    layers = [m for m in model.modules() if hasattr(m, "lora_A")] if copy is None else []
    for layer in layers:
        layer.enable_adapters(False)
    try:
        with torch.no_grad(), ranks.whole_weights(model):
            yield model if copy is None else copy.to(device)
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        if copy is not None:
            copy.to("cpu")


def running_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential average of the weights, for evaluation; over fewer steps at first, while they
    change fast."""
    def average(averages, weights, n):
        now = min(decay, (1 + int(n)) / (10 + int(n)))
        get_ema_multi_avg_fn(now)(averages, weights, n)
    return AveragedModel(model, multi_avg_fn=average)


def kept(model: nn.Module, average: AveragedModel | None = None) -> dict[str, Tensor]:
    """What a checkpoint holds beside the optimiser: trained weights, and their running average."""
    trained = ranks.trainable(model)
    if average is None:
        return trained
    return trained | {f"average.{name}": x for name, x in average.state_dict().items()
                      if name == "n_averaged" or name.removeprefix("module.") in trained}


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's tensors by its class's own names, on the CPU, adapters merged; on ranks but
    the first none. Every rank must call it."""
    return ranks.on_first(merged(model, model.state_dict()))


def merged(model: nn.Module, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors by its class's own names, one after the other, adapters merged into them;
    without adapters as they are."""
    scale = model.peft_config["default"] if has_adapters(model) else None
    for name, x in state.items():
        if name.endswith("base_layer.weight"):
            x, a, b = (ranks.whole(state[name.replace("base_layer", layer)]) for layer in (
                "base_layer", "lora_A.default", "lora_B.default"))      # a (r, in), b (out, r)
            x = (x.float() + scale.lora_alpha / scale.r * b.float() @ a.float()).to(x.dtype)
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), x


def save_policy(model: nn.Module, folder: Path, write: Callable[[Path, dict], None]) -> None:
    """A checkpoint folder that --model and eval.py load, adapters merged into its weights; these
    alone, as peft reads them, in FOLDER_adapter. write(draft, state): the model's own way of
    saving. Every rank must call it, the first one writes."""
    state = whole_state(model)
    alone = ranks.on_first(ranks.trainable(model).items()) if has_adapters(model) else {}
    if ranks.rank() == 0 and alone:
        with whole(folder.with_name(folder.name + "_adapter")) as draft:
            draft.mkdir()
            model.peft_config["default"].save_pretrained(draft)
            save_file({f"base_model.model.{name.replace('.default.', '.')}": x
                       for name, x in alone.items()}, draft / "adapter_model.safetensors")
    if ranks.rank() == 0:
        with whole(folder) as draft:
            write(draft, state)
    ranks.barrier()
