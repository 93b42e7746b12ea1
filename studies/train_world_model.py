"""V-JEPA 2's training (arXiv 2506.09985) at the size of the built-in simulator: where weights/vjepa_tiny comes from.

1. Hide a part of each clip's tokens: tubes through all of it, or a stretch of time.
2. The encoder sees the visible tokens alone; a small predictor says what the latents of the hidden ones are.
3. Loss: L1 to the latents of an encoder that sees everything, and follows the trained one as an exponential moving average.

Left out: V-JEPA 2's image and action-conditioned stages and its augmentations (a fixed camera needs none).

    python -m studies.train_world_model --out weights/vjepa_tiny            # on 800 episodes of the simulator's expert, half of them mostly failing
    python -m studies.train_world_model --videos rollouts.npz --out FOLDER  # on others; the format is world_model.py's, `success` optional
"""
import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import VJEPA2Config, VJEPA2Model

from world_model import WorldModel, read_rollouts, separation, simulator_rollouts

TINY = dict(crop_size=64, patch_size=16, frames_per_clip=4, tubelet_size=2, hidden_size=96, num_hidden_layers=3,
            num_attention_heads=2, mlp_ratio=4.0, initializer_range=0.06, pred_hidden_size=48,
            pred_num_hidden_layers=2, pred_num_attention_heads=2, pred_num_mask_tokens=1)
# Four frames: a rollout seen once per action chunk has five to eight, so none is ever repeated to fill the clip.
BLOCKS, SHARE = 2, 0.3  # hidden rectangles and each one's share of the frame; V-JEPA 2: (8, .15) and (2, .7) on 16x16


def sample_masks(config: VJEPA2Config, generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two (context, target) pairs of token ids, each disjoint and together all tokens.

    1. Tubes, as V-JEPA 2: the union of random rectangles, hidden over the whole clip.
    2. Moments, ours: whole frames of a random stretch of the clip. A tube can hide an object for good, and with jittered
       layouts nothing visible tells where it was; what happens between two moments can be told from them.
    """
    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    depth, side = config.frames_per_clip // config.tubelet_size, config.crop_size // config.patch_size
    tubes, moments = torch.zeros(2, depth, side, side, dtype=torch.bool)                # True = hidden
    for _ in range(BLOCKS):
        aspect = math.exp((draw(201) / 100 - 1) * math.log(1.5))                        # height : width from 2:3 to 3:2
        h, w = (min(max(round(side * math.sqrt(SHARE * a)), 1), side) for a in (aspect, 1 / aspect))
        top, left = draw(side - h + 1), draw(side - w + 1)
        tubes[:, top:top + h, left:left + w] = True
    length = 1 + draw(depth - 1)
    start = draw(depth - length + 1)
    moments[start:start + length] = True
    return [(torch.where(~hidden.flatten())[0], torch.where(hidden.flatten())[0]) for hidden in (tubes, moments)]


def encode_context(encoder: torch.nn.Module, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tokens `ids` (K,) of clips (B, L, 3, crop, crop) -> (B, K, D), the others dropped BEFORE attention: transformers'
    forward masks the encoder's output, by when every context token has seen the targets."""
    x = encoder.embeddings(pixels)[:, ids]  # (B, K, D)
    for layer in encoder.layer:
        x = layer(x, ids[None])[0]    # rotary positions come from the ids
    return encoder.layernorm(x)


def jepa_loss(model: VJEPA2Model, target_encoder: torch.nn.Module, pixels: torch.Tensor, masks: list) -> torch.Tensor:
    """V-JEPA 2 (arXiv 2506.09985): mean over masked tokens of |P(E(visible), positions) - stopgrad(LN(E_ema(all)))|.

    pixels (B, L, 3, crop, crop). A constant encoder would have loss 0; stop-gradient and EMA only make it hard to reach.
    """
    with torch.no_grad():
        goal = target_encoder(pixel_values_videos=pixels).last_hidden_state  # (B, tokens, D)
        goal = F.layer_norm(goal, goal.shape[-1:])
    losses = []
    for context, target in masks:
        seen = torch.zeros_like(goal).index_copy(1, context, encode_context(model.encoder, pixels, context))
        rows = len(pixels), -1
        guess = model.predictor(encoder_hidden_states=seen, context_mask=[context.expand(*rows)],
                                target_mask=[target.expand(*rows)]).last_hidden_state    # (B, K, D)
        losses.append((guess - goal[:, target]).abs().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def ema_update(target: torch.nn.Module, online: torch.nn.Module, momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * online, parameter by parameter."""
    for old, new in zip(target.parameters(), online.parameters()):
        old.lerp_(new, 1 - momentum)


def train_world_model(videos: list, config: VJEPA2Config | None = None, steps: int = 600, batch_size: int = 16,
                      lr: float = 5e-4, momentum: float = 0.999, resize: str = "exact", seed: int = 0,
                      report: Callable | None = None, report_every: int = 50) -> WorldModel:
    """Trains a V-JEPA 2 from random weights on N `videos` as in `encode`; config defaults to TINY. On the CPU.

    Returns the EMA encoder, with the predictor, as a WorldModel. report(step, {"loss", "latent_std"}, world_model) is
    called every `report_every` steps from 0 on, and at the end. latent_std: standard deviation of the EMA encoder's
    latents over a batch's videos, mean over dimensions; towards 0 means collapse. Raises ValueError if the loss diverges.
    """
    if len(videos) == 0 or steps < 0 or batch_size < 1:
        raise ValueError(f"need videos, steps >= 0 and batch_size >= 1, got {len(videos)} videos, steps {steps}, "
                         f"batch_size {batch_size}")
    config = config or VJEPA2Config(**TINY)
    if config.crop_size < 2 * config.patch_size or config.frames_per_clip < 2 * config.tubelet_size:
        raise ValueError(f"masking needs 2 x 2 patches and 2 tubelets at least: lower patch_size {config.patch_size} "
                         f"or tubelet_size {config.tubelet_size} of the config")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = VJEPA2Model(config).train()
    frozen = WorldModel(copy.deepcopy(model), resize, device="cpu", batch_size=64)  # the target: moves by EMA alone
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.04)
    warmup = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * min(i / max(steps, 1), 1))) / 2))
    for step in range(steps + 1):
        batch = [videos[i] for i in torch.randint(len(videos), (batch_size,), generator=generator).tolist()]
        loss = jepa_loss(model, frozen.model.encoder, frozen.pixels(batch), sample_masks(model.config, generator))
        if not torch.isfinite(loss):
            raise ValueError(f"the loss became {loss.item()} at step {step}: lower lr, now {lr}")
        if report and (step % report_every == 0 or step == steps):
            std = frozen.encode(batch).std(0).mean().item() if batch_size > 1 else math.nan
            report(step, {"loss": loss.item(), "latent_std": std}, frozen)
        if step < steps:
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            ema_update(frozen.model.encoder, model.encoder, momentum)
    frozen.model.predictor.load_state_dict(model.predictor.state_dict())
    return frozen


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a tiny V-JEPA 2 from random weights.")
    parser.add_argument("--videos", help="rollouts.npz; without it the built-in simulator is played")
    parser.add_argument("--out", default="", help="a new folder; needed")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    began = time.time()
    try:
        if not args.out or Path(args.out).exists():
            raise ValueError("--out is needed, a new folder" + (f"; {args.out} exists" if args.out else ""))
        if not Path(args.out).absolute().parent.is_dir():
            raise ValueError(f"--out {args.out}: there is no such folder; make it, or choose another")
        videos, success, task = read_rollouts(args.videos) if args.videos else simulator_rollouts(800)

        def report(step, numbers, model):
            line = f"step {step:5d}  " + "  ".join(f"{key} {value:.4f}" for key, value in numbers.items())
            if success is not None:  # at step 0 this is what random weights already give
                line += f"  success nearer than failure {separation(model.encode(videos).numpy(), success, task):.3f}"
            print(f"{line}  {time.time() - began:.0f} s", flush=True)

        trained = train_world_model(videos, steps=args.steps, batch_size=args.batch_size, lr=args.lr, seed=args.seed,
                                    report=report, report_every=max(args.steps // 10, 1))
        trained.save_pretrained(args.out)
        print(f"wrote {args.out}")
    except (ValueError, OSError, RuntimeError) as error:      # the last: no OpenGL
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
