"""World model of SRPO-VLA (arXiv 2511.15605): video of a rollout -> one latent -> distance to successes -> progress.

1. Sample a rollout's frames to the clip length, resize, crop, normalise: the published preprocessing without torchvision.
2. A frozen V-JEPA 2 encodes the clip; the mean over all its tokens is the rollout's latent h.
3. rewards.py clusters the successes' latents and pays a failure by its distance to the nearest centre. Here that
   distance after every prefix of a video is a progress curve; `progress_metrics` scores curves as the paper's benchmark.
4. The published encoder (ViT-g, 384 px, 64 frames) has a billion parameters. For the built-in simulator there is a tiny one of
   the same architecture, trained from scratch by studies/train_world_model.py.

    python world_model.py                                                       # curves of successes and failures -> PNG
    python world_model.py compare                                               # trained, random weights, pixels: the benchmark's numbers
    python world_model.py --videos rollouts.npz --model facebook/vjepa2-vitg-fpc64-384 --out curves.png

rollouts.npz: `videos` uint8 (N, T, H, W, 3) and `success` bool (N,); optional `task` int (N,) and `length` int (N,), the true
number of frames of videos padded to T.
"""
import argparse
import math
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from scipy.spatial.distance import cdist, jensenshannon
from scipy.stats import rankdata, spearmanr
from transformers import PreTrainedConfig, VJEPA2Model
from transformers.utils import logging

SHIPPED = Path(__file__).parent / "weights" / "vjepa_tiny"  # the tiny encoder of the built-in simulator
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet, RGB in [0, 1]


# Videos -> latents

def sample_frames(total: int, clip: int) -> np.ndarray:
    """Indices (clip,) of the frames the encoder sees: evenly spread first to last, or a short video repeated.

    >>> sample_frames(21, 8).tolist(), sample_frames(3, 8).tolist()
    ([0, 2, 5, 8, 11, 14, 17, 20], [0, 1, 2, 0, 1, 2, 0, 1])
    """
    if total < clip:
        return np.arange(clip) % total
    return np.linspace(0, total - 1, clip).astype(int)  # published code truncates, it does not round


def preprocess(frames: torch.Tensor, crop: int, resize: str) -> torch.Tensor:
    """uint8 (L, H, W, 3) -> float32 (L, 3, crop, crop), ImageNet-normalised; `resize` as in WorldModel."""
    x = frames.permute(0, 3, 1, 2).contiguous().float()  # (L, 3, H, W), 0..255; contiguous first halves the time
    if resize == "paper":
        h, w = x.shape[-2:]
        short = int(crop * 256 / 224)  # 438 for crop 384
        size = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True).round()  # published: whole grey levels
        top, left = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
        x = x[..., top:top + crop, left:left + crop]
    elif x.shape[-1] != crop:
        x = F.interpolate(x, (crop, crop), mode="area")
    mean, std = (255 * torch.tensor(c, device=x.device).view(3, 1, 1) for c in (MEAN, STD))
    return x.sub_(mean).div_(std)


class WorldModel:
    """A frozen V-JEPA 2 encoder: `encode` maps rollouts to latents, `progress` one rollout to a curve.

    resize "paper": shortest edge to int(crop * 256 / 224), centre crop (cuts 1/16 off each border).
    resize "exact": frames must be square and are used whole, averaged down to crop x crop; the simulator's encoder is trained so.
    dtype: computation is autocast to it; None means bfloat16 on CUDA, float32 elsewhere. Weights stay float32.
    """

    def __init__(self, model: VJEPA2Model, resize: str = "paper", dtype: torch.dtype | None = None,
                 device: str | None = None, batch_size: int = 8):
        if resize not in ("paper", "exact"):
            raise ValueError(f'resize must be "paper" or "exact", got {resize!r}')
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.config, self.resize, self.batch_size, self.width = model.config, resize, batch_size, model.config.hidden_size

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, dtype: torch.dtype | None = None, device: str | None = None,
                        batch_size: int = 8) -> "WorldModel":
        """A folder or hub id of a V-JEPA 2 in transformers' layout, such as facebook/vjepa2-vitg-fpc64-384 (D = 1408).

        Raises ValueError for a missing or damaged checkpoint, another architecture, or missing encoder weights.
        """
        if not Path(path_or_id).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_id)):
            raise ValueError(f"no world model at {str(path_or_id)!r}: neither a folder nor a hub id owner/name")
        try:
            config, _ = PreTrainedConfig.get_config_dict(path_or_id)
            if config.get("model_type") != "vjepa2":
                raise ValueError(f"{path_or_id}: model_type is {config.get('model_type')!r}, needed is 'vjepa2'")
            model, info = VJEPA2Model.from_pretrained(path_or_id, dtype=torch.float32, use_safetensors=True,
                                                      output_loading_info=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot load a world model from {str(path_or_id)!r}: {reason}") from error
        missing = sorted(name for name in info["missing_keys"] if name.startswith("encoder."))
        if missing:
            raise ValueError(f"{path_or_id}: the weights lack {len(missing)} encoder tensors, the first is {missing[0]}")
        return cls(model, config.get("frame_resize", "paper"), dtype, device, batch_size)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json (with `frame_resize`) and model.safetensors."""
        self.config.frame_resize = self.resize
        self.model.save_pretrained(path)

    def seen(self, video: np.ndarray) -> np.ndarray:
        """The frames of a video (T, H, W, 3) that `encode` looks at, each once: (min(T, clip), H, W, 3), with the same latent."""
        return video[np.unique(sample_frames(len(video), self.config.frames_per_clip))]

    def pixels(self, videos: list, first: int = 0) -> torch.Tensor:
        """Videos -> (N, clip, 3, crop, crop) float32 on the device; see `encode`. Errors count videos from `first`."""
        clips = []
        for i, video in enumerate(videos, first):
            shape, kind = tuple(getattr(video, "shape", ())), str(getattr(video, "dtype", type(video).__name__))
            if not kind.endswith("uint8") or len(shape) != 4 or shape[-1] != 3:
                raise ValueError(f"videos[{i}] must be a uint8 array (T, H, W, 3), got {kind} {shape}")
            if 0 in shape:
                raise ValueError(f"videos[{i}] is empty: shape {shape}; a rollout has at least its first frame")
            crop = self.config.crop_size
            if self.resize == "exact" and (shape[1] != shape[2] or shape[1] < crop):
                raise ValueError(f"videos[{i}] has {shape[1]}x{shape[2]} frames, this world model takes square ones of at least "
                                 f"{crop}x{crop}: render them so")
            frames = torch.as_tensor(video[sample_frames(shape[0], self.config.frames_per_clip)]).to(self.device)
            clips.append(preprocess(frames, crop, self.resize))
        return torch.stack(clips)

    @torch.no_grad()
    def encode(self, videos: list) -> torch.Tensor:
        """N videos, each uint8 (T, H, W, 3) with its own T -> latents (N, D), float32, on the CPU: ONE PER ROLLOUT.

        Paper/code differ: the published code stores frames under (task, trial), so the rollouts of a group, which start
        from one trial, share one video and one latent; all failures of a group then get the same reward, and the
        normalised advantages equal those of 0/1 rewards.
        Raises ValueError for an empty list, another dtype or shape, or a video without frames.
        """
        if len(videos) == 0:
            raise ValueError("videos is empty: nothing to encode")
        latents = []
        for start in range(0, len(videos), self.batch_size):
            pixels = self.pixels(videos[start:start + self.batch_size], start)  # (B, L, 3, crop, crop)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                # VJEPA2Model's forward(skip_predictor=True) is this plus a gather by a (B, tokens, D) int64 index.
                tokens = self.model.encoder(pixel_values_videos=pixels).last_hidden_state  # (B, tokens, D)
            latents.append(tokens.float().mean(1).cpu())  # SRPO-VLA: h = mean over all tokens
        return torch.cat(latents)  # (N, D)

    def progress(self, video: np.ndarray, references: np.ndarray, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Progress along one rollout: (t, R), both (K,), for the prefixes video[:t], t = 1, 1 + every, .. and always T.

        d_t = distance of the prefix's latent to the nearest of `references` (C, D); R_t = clip(1 - d_t / d_1, 0, 1):
        0 where the rollout began, 1 at a reference. This scale is ours: how the paper maps d_t to R_t was not verified.
        """
        references = np.atleast_2d(np.asarray(references, dtype=np.float64))
        if references.ndim != 2 or references.shape[1] != self.width or len(references) == 0:
            raise ValueError(f"references must be (C, {self.width}) with C >= 1, got {references.shape}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        steps = np.unique(np.append(np.arange(1, len(video) + 1, every), len(video)))
        distance = cdist(self.encode([video[:t] for t in steps]), references).min(1)  # (K,) SRPO-VLA: nearest centre
        return steps, np.clip(1 - distance / max(distance[0], 1e-12), 0, 1)


class PixelModel(WorldModel):
    """The baseline of the paper's benchmark: the mean preprocessed frame in place of the latent, N videos -> (N, 3 * crop * crop)."""

    def __init__(self, like: WorldModel):
        super().__init__(like.model, like.resize, like.dtype, str(like.device), like.batch_size)
        self.width = 3 * self.config.crop_size ** 2

    def encode(self, videos: list) -> torch.Tensor:
        return torch.cat([self.pixels([video], i).mean(1).flatten(1).cpu() for i, video in enumerate(videos)])


# Curves -> the five numbers of the paper's progress-reward benchmark

def progress_metrics(curves: list, success: list) -> dict[str, float]:
    """Scores N progress curves, each (T_i,) in [0, 1], with their `success` (N,), of ONE task; the paper averages over tasks.

    spearman      mean over successes of Spearman's rho between R_t and t (a constant curve counts 0)
    monotonicity  mean over successes of mean_t 1[R_{t+1} > R_t]
    The others compare TERMINAL progress of successes (s) and failures (f):
    mmd           sqrt of the biased MMD^2, Gaussian kernel, bandwidth = median distance between different rollouts
    js            Jensen-Shannon divergence in bits of the two histograms, 10 bins on [0, 1]
    smd           (mean_s - mean_f) / pooled standard deviation, inf if that is 0 and the means differ
    Kernel, bins, and taking the first two over successes only are ours: the published numbers leave them open.

    >>> m = progress_metrics([[0, .5, 1.], [0, .6, .8], [0, .1, 0], [0, .1, .2]], [1, 1, 0, 0])
    >>> m["spearman"], m["monotonicity"], m["js"], round(m["smd"], 3)
    (1.0, 1.0, 1.0, 5.657)
    """
    success = np.asarray(success, dtype=bool)
    if len(curves) != len(success) or success.all() or not success.any():
        raise ValueError(f"need one success flag per curve and both outcomes, got {len(curves)} curves and "
                         f"{success.sum()} successes among {len(success)} flags")
    if min(len(curve) for curve in curves) < 2:
        raise ValueError("every curve needs at least 2 points")
    curves = [np.asarray(curve, dtype=np.float64) for curve in curves]
    good = [curve for curve, won in zip(curves, success) if won]
    terminal = np.array([curve[-1] for curve in curves])
    s, f = terminal[success], terminal[~success]
    gaps = np.abs(terminal[:, None] - terminal)                                      # (N, N)
    width = np.median(gaps[np.triu_indices(len(gaps), 1)]) or 1.0
    k = np.exp(-gaps ** 2 / (2 * width ** 2))                                        # (N, N)
    mmd2 = k[success][:, success].mean() + k[~success][:, ~success].mean() - 2 * k[success][:, ~success].mean()
    counts = [np.histogram(x, bins=10, range=(0, 1))[0] for x in (s, f)]
    spread = np.sqrt((((s - s.mean()) ** 2).sum() + ((f - f.mean()) ** 2).sum()) / max(len(terminal) - 2, 1))
    gap = s.mean() - f.mean()
    return {"spearman": float(np.mean([spearmanr(c, np.arange(len(c)))[0] if np.ptp(c) > 0 else 0.0 for c in good])),
            "monotonicity": float(np.mean([(np.diff(c) > 0).mean() for c in good])),
            "mmd": math.sqrt(max(mmd2, 0.0)),
            "js": float(jensenshannon(*counts, base=2) ** 2),
            "smd": float(gap / spread) if spread > 0 else math.copysign(math.inf, gap) if gap else 0.0}


def separation(latents: np.ndarray, success: np.ndarray, task: np.ndarray) -> float:
    """Probability that a success lies nearer to the mean of its task's (other) successes than a failure does: 0.5 is
    blind, 1 perfect. Mean over the tasks with two successes and a failure, nan if there is none. latents (N, D)."""
    latents, scores = np.asarray(latents, dtype=np.float64), []
    for name in np.unique(task):
        s, f = latents[(task == name) & success], latents[(task == name) & ~success]
        if len(s) < 2 or len(f) == 0:
            continue
        others = (s.sum(0) - s) / (len(s) - 1)  # leave-one-out, or a success would pull its own mean
        distance = np.concatenate([np.linalg.norm(s - others, axis=1), np.linalg.norm(f - s.mean(0), axis=1)])
        nearer = rankdata(distance)[:len(s)].sum() - len(s) * (len(s) + 1) / 2  # Mann-Whitney U
        scores.append(1 - nearer / (len(s) * len(f)))
    return float(np.mean(scores)) if scores else math.nan


# Commands

def read_rollouts(path: str) -> tuple[list, np.ndarray | None, np.ndarray]:
    """(videos, success or None, task) of an npz as described on top."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in ("videos", "success", "task", "length") if name in data}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read rollouts from {path}: {str(error).splitlines()[0]}") from error
    videos = arrays.get("videos")
    if videos is None or videos.dtype != np.uint8 or videos.ndim != 5 or len(videos) == 0:
        found = "none" if videos is None else f"{videos.dtype} {videos.shape}"
        raise ValueError(f"{path}: needs `videos`, uint8 (N, T, H, W, 3), got {found}")
    for name, array in arrays.items():
        if array.shape[:1] != (len(videos),):
            raise ValueError(f"{path}: `{name}` has shape {array.shape}, there are {len(videos)} videos")
        if name != "videos" and array.ndim != 1:
            raise ValueError(f"{path}: `{name}` must have one number a video, got shape {array.shape}")
    lengths = arrays.get("length", np.full(len(videos), videos.shape[1]))
    if lengths.dtype.kind not in "iu" or lengths.min() < 1 or lengths.max() > videos.shape[1]:
        raise ValueError(f"{path}: `length` must be integers in 1..{videos.shape[1]}, got {lengths.dtype} in {lengths.min()}..{lengths.max()}")
    success = arrays["success"].astype(bool) if "success" in arrays else None
    return [v[:t] for v, t in zip(videos, lengths)], success, arrays.get("task", np.zeros(len(videos), int))


def simulator_rollouts(episodes: int = 120, seed: int = 0) -> tuple[list, np.ndarray, np.ndarray]:
    """The simulator's expert on training initial states, a frame per 8-step chunk as vla_srpo.py sees them; in half of the
    episodes it is wrong by centimetres about where cube and plate are, and mostly fails. (videos, success, task)."""
    from robots import tabletop as envs  # the demonstration alone needs the simulator
    rng, env, videos, success, task = np.random.default_rng(seed), envs.Tabletop(), [], [], []
    for i in range(episodes):
        frames = [env.reset(options={"task": i % len(envs.TASKS), "index": int(rng.integers(envs.N_STATES))})[0]["image"]]
        expert, ended = envs.Expert(env, 0.025 * (i // len(envs.TASKS) % 2), rng), False
        while not ended:
            ended = env.advance(expert() + 0.1 * np.array([*rng.standard_normal(3), 0, 0, 0, 0]))
            if ended or env.steps % envs.CHUNK == 0:
                frames.append(env.render())
        videos.append(np.stack(frames))
        success.append(env.success)
        task.append(env.task)
    return videos, np.array(success), np.array(task)


def draw(videos: list, success: np.ndarray, task: np.ndarray, model: WorldModel, out: str | None) -> dict[str, float]:
    """Progress curves to a PNG (None: none), one panel per task; returns the benchmark's numbers, means over tasks. Reference: the mean
    of the task's OTHER successes (one centre, the published code's fallback; rewards.py does the clustering)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    latents, scores = model.encode(videos).numpy(), []
    names = [n for n in np.unique(task) if (success & (task == n)).sum() > 1 and (~success & (task == n)).any()]
    if not names:
        raise ValueError("no task has two successes and a failure: nothing to compare")
    figure, panels = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.2), sharey=True, squeeze=False)
    for name, panel in zip(names, panels[0]):
        curves, rows = [], np.flatnonzero(task == name)
        for i in rows:
            reference = latents[success & (task == name) & (np.arange(len(task)) != i)].mean(0)
            steps, curve = model.progress(videos[i], reference)
            curves.append(curve)
            panel.plot(steps, curve, color="tab:green" if success[i] else "tab:red", alpha=0.4, linewidth=1)
        scores.append(progress_metrics(curves, success[rows]))
        title = f"task {name}: {success[rows].sum()} successes, {(~success[rows]).sum()} failures"
        panel.set(title=title, xlabel="frames seen", ylim=(0, 1))
        panel.title.set_fontsize(9)
    panels[0][0].set_ylabel("progress (green: success)")
    figure.tight_layout()
    if out:
        figure.savefig(out, dpi=120)
    plt.close(figure)
    return {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Latent progress of rollouts under a V-JEPA 2 world model.")
    parser.add_argument("command", nargs="?", choices=("draw", "compare"), default="draw")
    parser.add_argument("--videos", help="rollouts.npz; without it the built-in simulator is played")
    parser.add_argument("--model", default=str(SHIPPED), help="folder or hub id")
    parser.add_argument("--out", default="progress.png", help="draw: PNG")
    parser.add_argument("--seed", type=int, default=0, help="compare: of the random weights")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        if not Path(args.out).absolute().parent.is_dir():
            raise ValueError(f"--out {args.out}: there is no such folder; make it, or choose another")
        videos, success, task = read_rollouts(args.videos) if args.videos else simulator_rollouts(seed=1)
        if success is None:
            raise ValueError(f"{args.videos}: there is no `success` in it, to compare by; add it, bool, one a video")
        if args.command == "draw":
            model = WorldModel.from_pretrained(args.model, batch_size=32)
            scores = draw(videos, success, task, model, args.out)
            print("  ".join(f"{key} {value:.3f}" for key, value in scores.items()))
            share = separation(model.encode(videos).numpy(), success, task)
            print(f"success nearer than failure in {share:.3f} of pairs (0.5 is blind)")
            print(f"wrote {args.out}")
            return
        trained = WorldModel.from_pretrained(args.model, batch_size=32)
        torch.manual_seed(args.seed)
        models = {"trained": trained, "random weights": WorldModel(VJEPA2Model(trained.config), trained.resize, batch_size=32),
                  "pixels": PixelModel(trained)}
        print(f"{len(videos)} rollouts, {success.sum()} successes; means over tasks\n{'':15} nearer " + " ".join(f"{k:>12}" for k in
              ("spearman", "monotonicity", "mmd", "js", "smd")))
        for name, model in models.items():
            scores = draw(videos, success, task, model, None)
            print(f"{name:15} {separation(model.encode(videos).numpy(), success, task):6.3f} " + " ".join(f"{x:12.3f}" for x in scores.values()))
    except (ValueError, OSError, RuntimeError) as error:      # the last: no OpenGL
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
