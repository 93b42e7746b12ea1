"""World model of SRPO-VLA (arXiv 2511.15605): a rollout's video -> latent -> progress.

1. A clip's worth of frames, resized, cropped and normalised as published.
2. A frozen V-JEPA 2 encodes the clip; h is the mean over all its tokens        [VLA 2]
3. The distance of h to centres of successes: over a whole video it makes a failure's
   reward (rewards.py), over growing parts of one a curve of progress           [VLA 4]
4. The numbers by which the paper compares encoders' curves           [VLA 10 to VLA 14]

The published encoder (ViT-g, 384 px, 64 frames) has a billion parameters. A tiny one of
its kind, for the built-in simulator, was trained by studies/train_world_model.py.
Left out: clustering (rewards.py), drawing and reading videos.

    python -m studies.progress_curves       curves of successes and failures
"""
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, VJEPA2Config, VJEPA2Model

SHIPPED = Path(__file__).parent / "weights" / "vjepa_tiny"  # the simulator's encoder
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in [0, 1]
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"


def sample_frames(total: int, clip: int) -> np.ndarray:
    """Indices (clip,) of the frames seen: spread evenly, or a short video repeated.

    >>> sample_frames(21, 8).tolist(), sample_frames(3, 8).tolist()
    ([0, 2, 5, 8, 11, 14, 17, 20], [0, 1, 2, 0, 1, 2, 0, 1])
    """
    if total < clip:
        return np.arange(clip) % total
    return np.linspace(0, total - 1, clip).astype(int)  # code: it truncates


def preprocess(frames: torch.Tensor, crop: int, resize: str) -> torch.Tensor:
    """uint8 (L, H, W, 3) -> float32 (L, 3, crop, crop); `resize` as in WorldModel."""
    x = frames.permute(0, 3, 1, 2).contiguous().float()  # (L, 3, H, W), grey levels
    if resize == "paper":
        h, w = x.shape[-2:]
        short = int(crop * 256 / 224)  # 438 for a crop of 384
        size = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        x = x.round()  # code: whole grey levels
        top, left = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
        x = x[..., top:top + crop, left:left + crop]
    elif x.shape[-1] != crop:
        x = F.interpolate(x, (crop, crop), mode="area")
    mean, std = (255 * x.new_tensor(c).view(3, 1, 1) for c in (MEAN, STD))
    return x.sub_(mean).div_(std)


class WorldModel:
    """A frozen V-JEPA 2: `encode` maps rollouts to latents, `progress` one to a curve.

    resize "paper": shortest edge to int(crop * 256 / 224), then the centre is cropped.
    resize "exact": frames must be square, and are averaged down to crop x crop whole.
    pool "clip": h is the mean over all tokens (code). Ours, so that h says where things
    were: "place", the mean over time alone, for every patch; "max", that and the
    largest value over time, which also says where something passed.
    dtype: autocast to it; None is bfloat16 on CUDA, else float32. Weights stay float32.
    """

    def __init__(self, model: VJEPA2Model, resize: str = "paper",
                 dtype: torch.dtype | None = None, device: str | None = None,
                 batch_size: int = 8, pool: str = "clip"):
        if resize not in ("paper", "exact") or pool not in ("clip", "place", "max"):
            raise ValueError('resize must be "paper" or "exact", pool "clip", "place" '
                             f'or "max", got {resize!r} and {pool!r}')
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device, half = torch.device(device), str(device).startswith("cuda")
        self.dtype = dtype or (torch.bfloat16 if half else torch.float32)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.config, self.resize, self.batch_size = model.config, resize, batch_size
        self.pool, c = pool, model.config
        self.places = 1 if pool == "clip" else (c.crop_size // c.patch_size) ** 2
        self.width = self.places * c.hidden_size * (1 + (pool == "max"))  # D

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None,
                        device: str | None = None, batch_size: int = 8,
                        pool: str = "clip") -> "WorldModel":
        """A folder, or a hub id such as facebook/vjepa2-vitg-fpc64-384 (D = 1408).

        Raises ValueError, one line that names it, for whatever is missing or damaged.
        """
        try:
            if not (Path(path).is_dir() or re.fullmatch(HUB_ID, str(path))):
                raise ValueError("neither a folder nor a hub id owner/name")
            config, _ = PreTrainedConfig.get_config_dict(path)
            check_config(config)
            model, info = VJEPA2Model.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True)
            wrong = [*info["missing_keys"], *info["unexpected_keys"]]
            wrong += [name for name, weight in model.named_parameters()
                      if not weight.isfinite().all()]
            if wrong := sorted(name for name in wrong if name.startswith("encoder.")):
                raise ValueError(f"{wrong[0]} is missing, unknown or not finite")
            resize = config.get("frame_resize", "paper")
            return cls(model, resize, dtype, device, batch_size, pool)
        except Exception as error:  # of damaged files libraries raise a dozen kinds
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"cannot load world model {path}: {reason}") from error

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json (with `frame_resize`) and model.safetensors."""
        self.config.frame_resize = self.resize
        self.model.save_pretrained(path)

    def seen(self, video: np.ndarray) -> np.ndarray:
        """The frames of a video that `encode` sees, each once: they have its latent."""
        return video[np.unique(sample_frames(len(video), self.config.frames_per_clip))]

    def pixels(self, videos: list, first: int = 0) -> torch.Tensor:
        """Videos -> float32 (N, clip, 3, crop, crop). Errors count from `first`."""
        clips, crop = [], self.config.crop_size
        for i, video in enumerate(videos, first):
            shape = tuple(getattr(video, "shape", ()))
            kind = str(getattr(video, "dtype", type(video).__name__))
            if "uint8" not in kind or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                raise ValueError(f"videos[{i}] must be uint8 (T, H, W, 3), not empty, "
                                 f"got {kind} {shape}")
            if self.resize == "exact" and not crop <= shape[1] == shape[2]:
                raise ValueError(f"videos[{i}] is of {shape[1]}x{shape[2]}, needed are "
                                 f"square ones of at least {crop}x{crop}")
            frames = video[sample_frames(len(video), self.config.frames_per_clip)]
            frames = torch.as_tensor(frames).to(self.device)
            clips.append(preprocess(frames, crop, self.resize))
        return torch.stack(clips)

    @torch.no_grad()
    def encode(self, videos: list) -> torch.Tensor:
        """[VLA 2] N videos, uint8 (T, H, W, 3) with own T -> h (N, D) float32 on CPU.

        One latent for each ROLLOUT, where the published code has one for each initial
        state (robots/published_reward.py). Raises ValueError for any other videos.
        """
        if len(videos) == 0:
            raise ValueError("videos is empty: nothing to encode")
        latents = []
        for start in range(0, len(videos), self.batch_size):
            pixels = self.pixels(videos[start:start + self.batch_size], start)
            half = self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype, enabled=half):
                tokens = self.model.encoder(pixels).last_hidden_state  # (B, tokens, D)
            parts = tokens.float().unflatten(1, (-1, self.places)).flatten(2)
            latents.append(self.summary(parts))
        return torch.cat(latents)

    def summary(self, x: torch.Tensor) -> torch.Tensor:
        """(B, times, W) -> (B, D)."""
        h = x.mean(1)  # [VLA 2]
        return (torch.cat([h, x.amax(1)], 1) if self.pool == "max" else h).cpu()

    def distances(self, videos: list, centres: np.ndarray) -> np.ndarray:
        """L2 distance (N,) to the nearest centre (C, D); unlike [VLA 4] not squared."""
        from scipy.spatial.distance import cdist
        return cdist(self.encode(videos), np.atleast_2d(centres)).min(1)

    def progress(self, video: np.ndarray, centres: np.ndarray,
                 every: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Ours: (t, R), both (K,), of prefixes video[:t], t = 1, 1 + every, .. and T.

        R_t = clip(1 - d_t / d_1, 0, 1): 0 where the rollout began, 1 at a centre. For a
        success take centres it has no part in, or it ends near 1 by construction.
        """
        ends = np.unique(np.append(np.arange(1, len(video) + 1, every), len(video)))
        d = self.distances([video[:t] for t in ends], centres)
        return ends, np.clip(1 - d / max(d[0], 1e-12), 0, 1)

    def paper_progress(self, video: np.ndarray, centres: np.ndarray | None = None,
                       ) -> tuple[np.ndarray, np.ndarray]:
        """The paper's (Appendix B): (t, R), both (K,), of windows ending with frame t.

        Frames 0-10, 1-11, 1-12, .., 1-(T-1). centres None: of a success, compared with
        its own whole video, so that it ends near 1. R: d min-max scaled and flipped.
        Left open, and ours: d squared, scaled over the rollout, from 0-1 on if T < 12.
        """
        first = 10 if len(video) > 11 else 1
        ends = np.arange(first, max(len(video), first + 1))
        centres = self.encode([video]) if centres is None else centres
        windows = [video[int(t > first):t + 1] for t in ends]
        d = self.distances(windows, centres) ** 2
        return ends, 1 - (d - d.min()) / max(np.ptp(d), 1e-12)


def check_config(config: dict) -> None:
    """ValueError for what no V-JEPA 2 has and shapes of weights do not show, or only
    after hours and in all memory."""
    if config.get("model_type") != "vjepa2":
        raise ValueError(f"model_type is {config.get('model_type')!r}, not 'vjepa2'")
    needed = {"crop_size", "frames_per_clip", "hidden_act", "num_attention_heads"}
    if missing := sorted(needed - set(config)):
        raise ValueError(f"config.json has no {missing[0]}")
    c = VJEPA2Config.from_dict(config)  # checks types
    if not (0 < c.crop_size * c.frames_per_clip < 10**6 and 0 < c.layer_norm_eps < 0.01
            and max(c.num_hidden_layers, c.pred_num_hidden_layers) < 200):
        raise ValueError("config.json has sizes that no V-JEPA 2 has")


class PixelModel(WorldModel):
    """The benchmark's baseline: h is the mean preprocessed frame (3 * crop * crop,),
    with pool "max" its largest values over time, too."""

    def __init__(self, *how, **named):
        super().__init__(*how, **named)
        self.width = 3 * self.config.crop_size ** 2 * (1 + (self.pool == "max"))

    def encode(self, videos: list) -> torch.Tensor:
        each = (self.pixels([video], i) for i, video in enumerate(videos))
        return torch.cat([self.summary(clip.flatten(2)) for clip in each])


def progress_metrics(curves: list, success: list) -> dict[str, float]:
    """The paper's benchmark of N curves (T_i,) in [0, 1] of ONE task, success (N,).

    Means over the successes' curves (ours: over which is not said):
    pearson       [VLA 10] correlation of R_t and t, as printed; constant curves count 0
    spearman      [VLA 10] the same of ranks, as it is called
    monotonicity  [VLA 11] share of t with R_{t+1} > R_t
    Last progress of successes s against that of failures f:
    mmd           [VLA 12] squared; ours: biased, Gaussian kernel, median gap as width
    js            [VLA 13] Jensen-Shannon divergence in nats (best ln 2); ours: 10 bins
    smd           [VLA 14] (mean s - mean f) / std, pooled over n + m - 2

    >>> curves = [[0, .5, 1.], [0, .6, .8], [0, .1, 0], [0, .1, .2]]
    >>> m = progress_metrics(curves, [1, 1, 0, 0])
    >>> m["spearman"], m["monotonicity"], round(m["js"], 4), round(m["smd"], 3)
    (1.0, 1.0, 0.6931, 5.657)
    """
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import pearsonr, spearmanr
    success = np.asarray(success, dtype=bool)
    if len(curves) != len(success) or success.all() or not success.any():
        raise ValueError("need a success flag per curve, of both outcomes, got "
                         f"{success.sum()} of {len(success)} for {len(curves)} curves")
    if min(map(len, curves)) < 2:
        raise ValueError("every curve needs at least 2 points")
    won = [np.asarray(curves[i], dtype=float) for i in np.flatnonzero(success)]
    moving, time = [c for c in won if np.ptp(c) > 0], np.arange(max(map(len, won)))
    end = np.array([curve[-1] for curve in curves], dtype=float)  # (N,)
    s, f = end[success], end[~success]
    gaps = np.abs(end[:, None] - end)  # (N, N)
    width = np.median(gaps[np.triu_indices(len(gaps), 1)]) or 1.0
    k = np.exp(-gaps ** 2 / (2 * width ** 2))  # (N, N)
    within = k[success][:, success].mean() + k[~success][:, ~success].mean()
    bins = [np.histogram(x, bins=10, range=(0, 1))[0] for x in (s, f)]
    squares = ((s - s.mean()) ** 2).sum() + ((f - f.mean()) ** 2).sum()
    std, gap = np.sqrt(squares / max(len(end) - 2, 1)), s.mean() - f.mean()  # [VLA 14]
    scores = {  # pearson, spearman: [VLA 10]
        "pearson": sum(pearsonr(c, time[:len(c)])[0] for c in moving) / len(won),
        "spearman": sum(spearmanr(c, time[:len(c)])[0] for c in moving) / len(won),
        "monotonicity": np.mean([(np.diff(c) > 0).mean() for c in won]),  # [VLA 11]
        "mmd": within - 2 * k[success][:, ~success].mean(),  # [VLA 12]
        "js": jensenshannon(*bins) ** 2,  # [VLA 13]
        "smd": gap / std if std else math.copysign(math.inf, gap) if gap else 0.0}
    return {name: float(score) for name, score in scores.items()}
