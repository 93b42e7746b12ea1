"""world_model.py against the published pipeline's outputs, naive loops and scipy."""

import itertools
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr, spearmanr
from transformers import VJEPA2Config, VJEPA2Model

import world_model as wm
from studies.train_world_model import TINY

FIXTURE = Path(__file__).parent / "fixtures" / "vjepa_tiny"
SMALL = dict(
    TINY,
    frames_per_clip=8,
    crop_size=32,
    patch_size=8,
    hidden_size=24,
    pred_hidden_size=12,
    num_hidden_layers=2,
)


def squares(n: int, total: int = 9, size: int = 32, seed: int = 0) -> np.ndarray:
    """Videos of a coloured square sliding to a random place: uint8 (n, total, size, size, 3)."""
    rng = np.random.default_rng(seed)
    videos = np.full((n, total, size, size, 3), 180, np.uint8)
    for video in videos:
        start, end, colour = (
            rng.uniform(0, size - 8, 2),
            rng.uniform(0, size - 8, 2),
            rng.integers(0, 255, 3),
        )
        for t in range(total):
            y, x = (start + (end - start) * t / (total - 1)).astype(int)
            video[t, y : y + 8, x : x + 8] = colour
    return videos


@pytest.fixture(scope="module")
def published() -> wm.WorldModel:
    return wm.WorldModel.from_pretrained(FIXTURE / "checkpoint", device="cpu")


@pytest.fixture(scope="module")
def small() -> wm.WorldModel:
    torch.manual_seed(0)
    return wm.WorldModel(
        VJEPA2Model(VJEPA2Config(**{**SMALL, "initializer_range": 0.2})),
        resize="exact",
        device="cpu",
    )


# Encoding


def test_equals_published_pipeline(published):
    io = load_file(FIXTURE / "io.safetensors")
    videos, latents = ([io[f"{kind}_{i}"] for i in range(3)] for kind in ("video", "latent"))
    assert [len(v) for v in videos] == [5, 8, 21]  # shorter than, equal to and longer than the clip
    torch.testing.assert_close(published.encode(videos), torch.stack(latents), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        published.encode([v.numpy() for v in videos]), torch.stack(latents), atol=1e-5, rtol=0
    )


def test_frame_sampling_is_the_naive_one():
    for total, clip in itertools.product(range(1, 40), (1, 2, 8, 16)):
        if total < clip:
            naive = [i % total for i in range(clip)]
        else:
            naive = [math.floor(float(x)) for x in np.linspace(0, total - 1, clip)]
        assert wm.sample_frames(total, clip).tolist() == naive
    assert wm.sample_frames(512, 64)[[0, -1]].tolist() == [0, 511]


def test_resize_against_pillow_and_crop_geometry():
    from PIL import Image

    frame = np.random.default_rng(0).integers(0, 255, (1, 90, 120, 3), dtype=np.uint8)
    got = wm.preprocess(torch.from_numpy(frame), 56, "paper")  # shortest edge 64, long edge 85
    image = np.asarray(Image.fromarray(frame[0]).resize((85, 64), Image.Resampling.BILINEAR))[
        4:60, 14:70
    ]
    grey = got[0].permute(1, 2, 0) * torch.tensor(wm.STD) + torch.tensor(wm.MEAN)
    assert got.shape == (1, 3, 56, 56)
    assert (
        np.abs(grey.numpy() * 255 - image).max() < 1.01
    )  # Pillow rounds after each of its two passes


def test_exact_averages_larger_frames(small):
    video = torch.randint(
        256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    double = video.repeat_interleave(2, 1).repeat_interleave(
        2, 2
    )  # each pixel four times: the average gives it back
    torch.testing.assert_close(small.pixels([double]), small.pixels([video]))


def test_exact_keeps_the_border_that_paper_crops(small):
    video = squares(1)[0]
    edged = video.copy()
    edged[:, 0] = 0  # one pixel row
    paper = wm.WorldModel(small.model, "paper", device="cpu")
    assert (small.encode([video]) - small.encode([edged])).abs().max() > 1e-4
    assert torch.equal(paper.encode([video]), paper.encode([edged]))


def test_one_latent_per_rollout_not_per_group(small):
    """Eight rollouts of a group share the first frame alone; as published, they share a latent."""
    group = squares(8)
    group[:, 0] = group[0, 0]
    latents = small.encode(list(group))
    assert latents.shape == (8, 24) and latents.dtype == torch.float32 and not latents.requires_grad
    gaps = torch.cdist(latents, latents) + torch.eye(8) * 9
    assert gaps.min() > 1e-2
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(
        small.encode([group[i] for i in order]), latents[order], atol=1e-5, rtol=0
    )


def test_pooled_by_place_every_patch_keeps_its_own_mean_over_time(small):
    videos, c = list(squares(5)), small.config
    place = wm.WorldModel(small.model, "exact", device="cpu", batch_size=2, pool="place")
    tokens = small.model.encoder(small.pixels(videos)).last_hidden_state
    side, moments = c.crop_size // c.patch_size, c.frames_per_clip // c.tubelet_size
    naive = torch.zeros(5, side, side, c.hidden_size)
    for t, y, x in itertools.product(range(moments), range(side), range(side)):
        naive[:, y, x] += tokens[:, (t * side + y) * side + x] / moments
    got = place.encode(videos)
    assert got.shape == (5, place.width)
    most = wm.WorldModel(small.model, "exact", device="cpu", pool="max")
    both = tokens.unflatten(1, (moments, -1)).amax(1).flatten(1)
    torch.testing.assert_close(most.encode(videos), torch.cat([got, both], 1), atol=1e-5, rtol=0)
    assert most.width == 2 * place.width
    torch.testing.assert_close(got, naive.flatten(1), atol=1e-5, rtol=0)
    mean = got.view(5, side * side, -1).mean(1)
    torch.testing.assert_close(mean, small.encode(videos), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="pool"):
        wm.WorldModel(small.model, "exact", device="cpu", pool="most")


def test_batch_size_and_neighbours_do_not_matter(small):
    videos = [v[:t] for v, t in zip(squares(7), (1, 4, 8, 9, 2, 9, 5), strict=True)]
    alone = torch.cat([small.encode([v]) for v in videos])
    for batch_size in (2, 3, 7, 64):
        got = wm.WorldModel(small.model, "exact", device="cpu", batch_size=batch_size).encode(
            videos
        )
        torch.testing.assert_close(got, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 3, 7, 8, 9, 21, 100])
def test_the_frames_that_are_seen_have_the_latent_of_the_video(small, frames):
    video = np.random.default_rng(frames).integers(0, 256, (frames, 32, 32, 3), np.uint8)
    kept = small.seen(video)
    assert len(kept) == min(frames, small.config.frames_per_clip)
    assert torch.equal(small.encode([kept]), small.encode([video]))


def test_half_precision_is_near_and_returns_float32(small):
    videos = list(squares(4))
    half = wm.WorldModel(small.model, "exact", dtype=torch.bfloat16, device="cpu").encode(videos)
    full = small.encode(videos)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert (half - full).norm() < 0.05 * full.norm()


def test_save_load_round_trip(small, tmp_path):
    small.save_pretrained(tmp_path)
    again = wm.WorldModel.from_pretrained(tmp_path, device="cpu")
    assert again.resize == "exact" and {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    videos = list(squares(3))
    assert torch.equal(again.encode(videos), small.encode(videos))
    for name, tensor in small.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


# Progress


def test_progress_is_the_naive_distance_of_prefixes(small):
    video = squares(1, seed=3)[0]
    centres = small.encode(list(squares(2, seed=4))).numpy()
    centres[1] = small.encode([video])[0]
    steps, curve = small.progress(video, centres, every=3)
    assert steps.tolist() == [1, 4, 7, 9]
    h = [small.encode([video[:t]])[0].numpy() for t in steps]
    d = [min(np.linalg.norm(x - c) for c in centres) for x in h]
    np.testing.assert_allclose(curve, [min(max(1 - x / d[0], 0), 1) for x in d], atol=1e-4)
    assert curve[0] == 0 and curve[-1] > 0.999  # ends at a centre


@pytest.mark.parametrize("total", [12, 13, 20, 11, 5, 2, 1])
@pytest.mark.parametrize("success", [True, False])
def test_paper_progress_is_the_naive_one(small, total, success):
    """Appendix B: frames 0-10, then 1-11, 1-12, .. 1-(T-1), all inclusive."""
    video = squares(1, total=max(total, 2), seed=3)[0][:total]
    centres = small.encode(list(squares(2, seed=4))).numpy()
    if total >= 12:
        windows = [video[0:11]] + [video[1:end] for end in range(12, total + 1)]
        assert len(windows[-1]) == total - 1 and len(windows) == total - 10
    else:  # ours: from 0-1 on
        windows = [video[0:2]] + [video[1:end] for end in range(3, total + 1)]
    goals = small.encode([video]).numpy() if success else centres
    h = [small.encode([window])[0].numpy() for window in windows]
    d = np.array([min(((x - c) ** 2).sum() for c in goals) for x in h])
    expected = 1 - (d - d.min()) / (np.ptp(d) or 1)
    ends, curve = small.paper_progress(video, None if success else centres)
    np.testing.assert_allclose(curve, expected, atol=1e-3)
    assert ends[-1] == max(total - 1, 1) and len(ends) == len(windows)


def test_a_success_ends_near_1_by_construction_in_the_paper_s_curves_alone(small):
    video, others = squares(1, total=30, seed=5)[0], small.encode(list(squares(3, seed=6))).numpy()
    assert small.paper_progress(video)[1][-1] > 0.9 > small.progress(video, others)[1][-1]


def naive_metrics(curves, success):
    s = [c[-1] for c, won in zip(curves, success, strict=True) if won]
    f = [c[-1] for c, won in zip(curves, success, strict=True) if not won]
    pairs = [abs(a - b) for a, b in itertools.combinations(s + f, 2)]
    width = float(np.median(pairs))
    p, q = (
        [sum(min(int(x * 10), 9) == b for x in xs) / len(xs) for b in range(10)] for xs in (s, f)
    )
    mid = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    won = [c for c, w in zip(curves, success, strict=True) if w]

    def k(xs, ys):
        kernel = [math.exp(-((x - y) ** 2) / (2 * width**2)) for x in xs for y in ys]
        return sum(kernel) / len(kernel)

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)  # nats

    def var(xs):
        return sum((x - sum(xs) / len(xs)) ** 2 for x in xs)

    rises = [sum(b > a for a, b in itertools.pairwise(c)) / (len(c) - 1) for c in won]
    std = math.sqrt((var(s) + var(f)) / (len(s) + len(f) - 2))
    return {
        "pearson": sum(pearsonr(c, range(len(c)))[0] for c in won) / len(won),
        "spearman": sum(spearmanr(c, range(len(c)))[0] for c in won) / len(won),
        "monotonicity": sum(rises) / len(won),
        "mmd": k(s, s) + k(f, f) - 2 * k(s, f),  # squared
        "js": (kl(p, mid) + kl(q, mid)) / 2,
        "smd": (sum(s) / len(s) - sum(f) / len(f)) / std,
    }


def test_pixel_baseline_is_the_mean_normalised_frame(small):
    video = squares(1)[0]
    clip = video[wm.sample_frames(len(video), 8)] / 255
    expected = ((clip - wm.MEAN) / wm.STD).mean(0).transpose(2, 0, 1).ravel()
    pixels = wm.PixelModel(small.model, "exact", device="cpu")
    torch.testing.assert_close(
        pixels.encode([video])[0], torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=1e-5
    )
    assert pixels.progress(video, pixels.encode([video]).numpy())[1][-1] == pytest.approx(1)
    both = wm.PixelModel(small.model, "exact", device="cpu", pool="max").encode([video])[0]
    largest = ((clip - wm.MEAN) / wm.STD).max(0).transpose(2, 0, 1).ravel()
    np.testing.assert_allclose(both, np.concatenate([expected, largest]), atol=1e-5)


def test_metrics_against_naive_loops():
    rng = np.random.default_rng(0)
    curves = [rng.random(rng.integers(2, 12)) for _ in range(15)]
    success = rng.random(15) < 0.6
    for name, value in naive_metrics(curves, success).items():
        assert wm.progress_metrics(curves, success)[name] == pytest.approx(value, abs=1e-9), name


def test_metrics_by_hand():
    same = wm.progress_metrics([[0, 1, 0.5]] * 4, [1, 1, 0, 0])
    assert same == pytest.approx(
        {
            "pearson": 0.5,
            "spearman": 0.5,
            "monotonicity": 0.5,
            "mmd": 0,
            "js": 0,
            "smd": 0,
        }
    )
    apart = wm.progress_metrics([[0, 1], [0, 1], [0, 0], [0, 0]], [1, 1, 0, 0])
    assert apart["js"] == pytest.approx(math.log(2)) and apart["smd"] == math.inf
    assert apart["mmd"] == pytest.approx(2 - 2 * math.exp(-0.5))  # the median distance is 1
    still = wm.progress_metrics([[1, 1, 1], [0, 0, 0]], [1, 0])
    assert still["spearman"] == still["pearson"] == 0  # a constant curve tells nothing
    bent = wm.progress_metrics([[0, 0.1, 1], [0, 0]], [1, 0])  # ranks rise as time does
    assert bent["spearman"] == 1 > bent["pearson"]
    assert bent["pearson"] == pytest.approx(1 / math.sqrt(2 * (1.01 - 1.1**2 / 3)))


# Bad input


@pytest.mark.parametrize(
    "video, message",
    [
        (np.zeros((4, 32, 32, 3), np.float32), "uint8"),
        (np.zeros((4, 3, 32, 32), np.uint8), r"\(T, H, W, 3\)"),
        (np.zeros((32, 32, 3), np.uint8), r"\(T, H, W, 3\)"),
        (np.zeros((0, 32, 32, 3), np.uint8), "empty"),
        (np.zeros((4, 48, 40, 3), np.uint8), "square ones of at least 32x32"),
        ("film.mp4", "got str"),
    ],
)
def test_bad_videos(small, video, message):
    with pytest.raises(ValueError, match=message) as error:
        small.encode([squares(1)[0]] * 9 + [video])  # beyond the first batch of 8
    assert "videos[9]" in str(error.value) and "\n" not in str(error.value)


def test_bad_arguments(small):
    video = squares(1)[0]
    for call, message in [
        (lambda: small.encode([]), "videos is empty"),
        (lambda: small.progress(video, np.zeros((1, 7))), "number of columns"),
        (lambda: wm.WorldModel(small.model, "fit"), "resize"),
        (lambda: wm.progress_metrics([[0, 1]], [True]), "both outcomes"),
        (lambda: wm.progress_metrics([[0, 1], [0]], [True, False]), "2 points"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def edited(folder, **changes):
    """A copy of the checkpoint with other settings; None takes one away."""
    shutil.copytree(FIXTURE / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_size": 64}, "changed"),
        ({"num_hidden_layers": 1}, "unknown"),
        ({"num_hidden_layers": 10**9}, "sizes"),
        ({"pred_num_hidden_layers": 10**9}, "sizes"),
        ({"num_hidden_layers": -1}, "unknown"),
        ({"crop_size": 10**7}, "sizes"),
        ({"frames_per_clip": 0}, "sizes"),
        ({"layer_norm_eps": 1.5}, "sizes"),
        ({"crop_size": "64"}, "expected int"),
        ({"frame_resize": "fit"}, "resize"),
        ({"hidden_act": "gelv"}, "gelv"),
        ({"frames_per_clip": None}, "no frames_per_clip"),
        ({"crop_size": None}, "no crop_size"),
        ({"num_attention_heads": 5}, "changed"),
        ({"patch_size": []}, "changed"),
    ],
)
def test_bad_configs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        wm.WorldModel.from_pretrained(edited(tmp_path / "changed", **changes), device="cpu")
    assert "\n" not in str(error.value) and "changed" in str(error.value)


def test_bad_weights(tmp_path):
    cut, bare = edited(tmp_path / "cut"), edited(tmp_path / "bare")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    (bare / "model.safetensors").unlink()
    name = "encoder.layer.1.norm1.weight"
    lacking, endless = edited(tmp_path / "lacking"), edited(tmp_path / "endless")
    weights = load_file(lacking / "model.safetensors")
    save_file(
        {key: x for key, x in weights.items() if key != name},
        lacking / "model.safetensors",
        metadata={"format": "pt"},
    )
    weights[name][3] = math.inf
    save_file(weights, endless / "model.safetensors", metadata={"format": "pt"})
    for folder, message in [
        (tmp_path / "nowhere", "nowhere"),
        (cut, "cut"),
        (bare, "bare"),
        ("typo", "neither a folder nor a hub id"),
        (lacking, name),
        (endless, f"{name} is missing, unknown or not finite"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            wm.WorldModel.from_pretrained(folder, device="cpu")
        assert "\n" not in str(error.value)


def test_code_of_a_checkpoint_is_never_run(tmp_path, capfd, monkeypatch):
    code = {"AutoModel": "foreign.Model", "AutoConfig": "foreign.Config"}
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on stdin"))
    for name, changes in (("same", {}), ("other", {"model_type": "new"})):
        folder = edited(tmp_path / name, auto_map=code, **changes)
        (folder / "foreign.py").write_text("print('foreign code')")
        if changes:
            with pytest.raises(ValueError, match="model_type is 'new'"):
                wm.WorldModel.from_pretrained(folder, device="cpu")
        else:
            wm.WorldModel.from_pretrained(folder, device="cpu")
    assert "foreign code" not in "".join(capfd.readouterr())


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One of six accidents, half of them where the header of a file stands."""
    kind, data = rng.choice(["flip", "cut", "insert", "delete", "zero", "swap"]), bytearray(data)
    i = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 4000))
    if kind == "flip":
        data[i] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[i:]
    elif kind == "insert":
        data[i:i] = rng.randbytes(rng.randrange(1, 9))
    elif kind == "delete":
        del data[i : i + rng.randrange(1, 9)]
    elif kind == "zero":
        data[i : i + 8] = bytes(8)
    else:
        data[i] = rng.choice(b'0123456789"{}[],:-eE.nN')
    return bytes(data)


VALUES = (0, -1, 1, 2, 3, 1.5, 1e9, 10**30, None, True, "x", [], {}, [1, 2], math.nan, "96")


@pytest.mark.parametrize("seed", range(60))
def test_damaged_folders_are_refused_in_one_line_or_read_the_same(seed, tmp_path, published):
    """Bytes of either file, or one value of config.json. What no cheap check can see may pass:
    a bit of a weight that stays finite, a number of heads that divides the width."""
    rng, folder = random.Random(seed), edited(tmp_path / "damaged")
    video, config = squares(1, size=64)[0], json.loads((folder / "config.json").read_text())
    if seed % 3 == 0:
        key = rng.choice(sorted(config))
        config[key] = rng.choice(VALUES)
        (folder / "config.json").write_text(json.dumps(config))
    else:
        file = folder / ("config.json" if seed % 3 == 1 else "model.safetensors")
        file.write_bytes(damaged(file.read_bytes(), rng))
    try:
        model = wm.WorldModel.from_pretrained(folder, device="cpu")
        latent = model.encode([video])
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and "damaged" in str(error)
        return
    assert latent.isfinite().all()
    if seed % 3 == 0 and key not in {
        "num_attention_heads",
        "layer_norm_eps",
        "hidden_act",
        "frames_per_clip",
        "crop_size",
        "tubelet_size",
    }:
        assert torch.equal(latent, published.encode([video])), (key, config[key])
