"""V-JEPA 2's training (arXiv 2506.09985) at the size of the built-in simulator: weights/vjepa_tiny.

1. Hide a part of each clip's tokens: tubes through all of it, or a stretch of time.
2. The encoder sees the visible tokens; a small predictor guesses the latents of the hidden ones.
3. Loss: L1 to the latents of an encoder that sees everything, and follows the trained one as an
   exponential moving average (EMA).

Left out: its image and action-conditioned stages, and augmentations (a fixed camera needs none).

    python -m studies.train_world_model --out FOLDER            # on 800 episodes of the simulator
    python -m studies.train_world_model --out FOLDER --data FOLDER_OR_ID    # robots/trajectories.py
"""
import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plumbing.flags import flag, require, script
from robots import trajectories
from studies.progress_curves import separation, simulator_rollouts

if TYPE_CHECKING:       # imported by the functions: --help answers at once
    import torch
    from transformers import VJEPA2Config, VJEPA2Model

    from world_model import WorldModel

# Four frames: a rollout seen once per action chunk has five to eight, so none is ever repeated.
TINY = dict(crop_size=64, patch_size=32, frames_per_clip=4, tubelet_size=2, hidden_size=96,
            num_hidden_layers=3, num_attention_heads=2, mlp_ratio=4.0, initializer_range=0.06,
            pred_hidden_size=48, pred_num_hidden_layers=2, pred_num_attention_heads=2,
            pred_num_mask_tokens=1)
# Hidden rectangles and each one's share of the frame; V-JEPA 2: (8, 0.15) and (2, 0.7) on 16 x 16.
BLOCKS, SHARE = 2, 0.3
MOMENTUM = 0.999                # of the EMA


@dataclass
class Settings:
    data: str = flag("", "logged trajectories; without them the simulator is played")
    camera: str = flag("", "LeRobot: feature of the images (its first)")
    out: str = flag("", "a new folder; needed")
    steps: int = flag(600, "updates")
    batch_size: int = flag(32, "videos of an update")
    lr: float = flag(2e-3, "learning rate: warm-up, cosine")
    seed: int = flag(0, "of weights, batches and masks")


def sample_masks(config: "VJEPA2Config", generator: "torch.Generator") -> list[tuple]:
    """Two (context, target) pairs of token ids, each disjoint and together all tokens.

    1. Tubes, as V-JEPA 2: the union of random rectangles, hidden over the whole clip.
    2. Moments, ours: a random stretch of the clip. A tube can hide an object for good, and with
       jittered layouts nothing visible tells where it was."""
    import torch

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    depth = config.frames_per_clip // config.tubelet_size
    side = config.crop_size // config.patch_size
    tubes, moments = torch.zeros(2, depth, side, side, dtype=torch.bool)        # True = hidden
    for _ in range(BLOCKS):
        aspect = math.exp((draw(201) / 100 - 1) * math.log(1.5))    # height : width, 2:3 to 3:2
        h, w = (min(max(round(side * math.sqrt(SHARE * a)), 1), side) for a in (aspect, 1 / aspect))
        top, left = draw(side - h + 1), draw(side - w + 1)
        tubes[:, top:top + h, left:left + w] = True
    length = 1 + draw(depth - 1)
    start = draw(depth - length + 1)
    moments[start:start + length] = True
    return [(torch.where(~hidden.flatten())[0], torch.where(hidden.flatten())[0])
            for hidden in (tubes, moments)]


def encode_context(encoder: "torch.nn.Module", pixels: "torch.Tensor",
                   ids: "torch.Tensor") -> "torch.Tensor":
    """Tokens `ids` (K,) of clips (B, L, 3, crop, crop) -> (B, K, D), the others dropped BEFORE
    attention: transformers' forward masks the encoder's output, when all have seen the targets."""
    x = encoder.embeddings(pixels)[:, ids]      # (B, K, D)
    for layer in encoder.layer:
        x = layer(x, ids[None])[0]              # rotary positions come from the ids
    return encoder.layernorm(x)


def jepa_loss(model: "VJEPA2Model", target_encoder: "torch.nn.Module", pixels: "torch.Tensor",
              masks: list[tuple]) -> "torch.Tensor":
    """Mean over masked tokens of |P(E(visible), positions) - stopgrad(LN(E_ema(all)))|; pixels
    (B, L, 3, crop, crop). A constant encoder would have loss 0; stop-gradient and EMA only make it
    hard to reach."""
    import torch
    with torch.no_grad():
        goal = target_encoder(pixel_values_videos=pixels).last_hidden_state     # (B, tokens, D)
        goal = torch.nn.functional.layer_norm(goal, goal.shape[-1:])
    losses, rows = [], (len(pixels), -1)
    for context, target in masks:
        visible = encode_context(model.encoder, pixels, context)
        seen = torch.zeros_like(goal).index_copy(1, context, visible)
        guess = model.predictor(
            encoder_hidden_states=seen, context_mask=[context.expand(*rows)],
            target_mask=[target.expand(*rows)]).last_hidden_state               # (B, K, D)
        losses.append((guess - goal[:, target]).abs().mean())
    return torch.stack(losses).mean()


def ema_update(target: "torch.nn.Module", online: "torch.nn.Module", momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * online."""
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.data.lerp_(new.data, 1 - momentum)


def train_world_model(videos: list, s: Settings, config: "VJEPA2Config | None" = None,
                      report: Callable = lambda *_: None) -> "WorldModel":
    """Trains a V-JEPA 2 from random weights on `videos` as in WorldModel.encode, on the CPU.

    Returns the EMA encoder, with the predictor. report(step, {"loss", "latent_std"}, world_model)
    is called ten times from step 0 on, and at the end. latent_std: standard deviation of the EMA
    encoder's latents over a batch's videos, mean over dimensions; towards 0 means collapse.
    ValueError, one line, if the loss diverges."""
    import torch
    from transformers import VJEPA2Config, VJEPA2Model

    from world_model import WorldModel
    torch.manual_seed(s.seed)
    generator = torch.Generator().manual_seed(s.seed)
    model = VJEPA2Model(config or VJEPA2Config(**TINY)).train()
    # The target: it moves by EMA alone
    frozen = WorldModel(copy.deepcopy(model), "exact", device="cpu", batch_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.95), weight_decay=0.04)
    warmup, last = max(s.steps // 10, 1), max(s.steps, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(
        (i + 1) / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * min(i / last, 1))) / 2))
    for step in range(s.steps + 1):
        chosen = torch.randint(len(videos), (s.batch_size,), generator=generator).tolist()
        batch = [videos[i] for i in chosen]
        masks = sample_masks(model.config, generator)
        loss = jepa_loss(model, frozen.model.encoder, frozen.pixels(batch), masks)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss became {loss.item()} at step {step}: lower lr, now {s.lr}")
        if step % max(s.steps // 10, 1) == 0 or step == s.steps:
            std = frozen.encode(batch).std(0).mean().item() if s.batch_size > 1 else math.nan
            report(step, {"loss": loss.item(), "latent_std": std}, frozen)
        if step < s.steps:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            ema_update(frozen.model.encoder, model.encoder, MOMENTUM)
    frozen.model.predictor.load_state_dict(model.predictor.state_dict())
    return frozen


def study(s: Settings) -> None:
    require(s, dict(steps=0, batch_size=1, seed=0), ("lr",))
    if not s.out or Path(s.out).exists():
        raise ValueError("--out is needed, a new folder" + (f"; {s.out} exists" if s.out else ""))
    if not Path(s.out).absolute().parent.is_dir():
        raise ValueError(f"--out {s.out}: there is no such folder; make it, or choose another")
    videos, success, task = (trajectories.videos(s.data, s.camera) if s.data
                             else simulator_rollouts(800))
    began = time.time()

    def report(step, numbers, model):
        line = f"step {step:5d}  " + "  ".join(f"{k} {x:.4f}" for k, x in numbers.items())
        # At step 0 this is what random weights already give
        near = separation(model.encode(videos).numpy(), success, task)
        print(f"{line}  success nearer than failure {near:.3f}  {time.time() - began:.0f} s",
              flush=True)
    train_world_model(videos, s, report=report).save_pretrained(s.out)
    print(f"wrote {s.out}")


main = script(Settings, study, __doc__)
if __name__ == "__main__":
    sys.exit(main())
