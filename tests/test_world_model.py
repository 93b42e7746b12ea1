"""world_model.py against the published pipeline's outputs, naive loops and scipy."""
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from transformers import VJEPA2Config, VJEPA2Model

import world_model as wm
from studies.train_world_model import TINY

FIXTURE = Path(__file__).parent / "fixtures" / "vjepa_tiny"
SMALL = dict(TINY, frames_per_clip=8, crop_size=32, patch_size=8, hidden_size=24, pred_hidden_size=12, num_hidden_layers=2)


def squares(n: int, total: int = 9, size: int = 32, seed: int = 0) -> np.ndarray:
    """Videos of a coloured square sliding to a random place: uint8 (n, total, size, size, 3)."""
    rng = np.random.default_rng(seed)
    videos = np.full((n, total, size, size, 3), 180, np.uint8)
    for video in videos:
        start, end, colour = rng.uniform(0, size - 8, 2), rng.uniform(0, size - 8, 2), rng.integers(0, 255, 3)
        for t in range(total):
            y, x = (start + (end - start) * t / (total - 1)).astype(int)
            video[t, y:y + 8, x:x + 8] = colour
    return videos


@pytest.fixture(scope="module")
def published() -> wm.WorldModel:
    return wm.WorldModel.from_pretrained(FIXTURE / "checkpoint", device="cpu")


@pytest.fixture(scope="module")
def small() -> wm.WorldModel:
    torch.manual_seed(0)
    return wm.WorldModel(VJEPA2Model(VJEPA2Config(**{**SMALL, "initializer_range": 0.2})), resize="exact", device="cpu")


# Encoding

def test_equals_published_pipeline(published):
    io = load_file(FIXTURE / "io.safetensors")
    videos, latents = ([io[f"{kind}_{i}"] for i in range(3)] for kind in ("video", "latent"))
    assert [len(v) for v in videos] == [5, 8, 21]  # shorter than, equal to and longer than the clip
    torch.testing.assert_close(published.encode(videos), torch.stack(latents), atol=1e-5, rtol=0)
    torch.testing.assert_close(published.encode([v.numpy() for v in videos]), torch.stack(latents), atol=1e-5, rtol=0)


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
    got = wm.preprocess(torch.from_numpy(frame), 56, "paper")                       # shortest edge 64, long edge 85
    image = np.asarray(Image.fromarray(frame[0]).resize((85, 64), Image.Resampling.BILINEAR))[4:60, 14:70]
    grey = got[0].permute(1, 2, 0) * torch.tensor(wm.STD) + torch.tensor(wm.MEAN)
    assert got.shape == (1, 3, 56, 56)
    assert np.abs(grey.numpy() * 255 - image).max() < 1.01  # Pillow rounds after each of its two passes


def test_exact_averages_larger_frames(small):
    video = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    double = video.repeat_interleave(2, 1).repeat_interleave(2, 2)                 # each pixel four times: the average gives it back
    torch.testing.assert_close(small.pixels([double]), small.pixels([video]))


def test_exact_keeps_the_border_that_paper_crops(small):
    video = squares(1)[0]
    edged = video.copy()
    edged[:, 0] = 0                                                                  # one pixel row
    paper = wm.WorldModel(small.model, "paper", device="cpu")
    assert (small.encode([video]) - small.encode([edged])).abs().max() > 1e-4
    assert torch.equal(paper.encode([video]), paper.encode([edged]))


def test_one_latent_per_rollout_not_per_group(small):
    """Eight rollouts of a group share the first frame and nothing else; the published code would give them one latent."""
    group = squares(8)
    group[:, 0] = group[0, 0]
    latents = small.encode(list(group))
    assert latents.shape == (8, 24) and latents.dtype == torch.float32 and not latents.requires_grad
    gaps = torch.cdist(latents, latents) + torch.eye(8) * 9
    assert gaps.min() > 1e-2
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(small.encode([group[i] for i in order]), latents[order], atol=1e-5, rtol=0)


def test_batch_size_and_neighbours_do_not_matter(small):
    videos = [v[:t] for v, t in zip(squares(7), (1, 4, 8, 9, 2, 9, 5))]
    alone = torch.cat([small.encode([v]) for v in videos])
    for batch_size in (2, 3, 7, 64):
        got = wm.WorldModel(small.model, "exact", device="cpu", batch_size=batch_size).encode(videos)
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
    assert again.resize == "exact" and {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    videos = list(squares(3))
    assert torch.equal(again.encode(videos), small.encode(videos))
    for name, tensor in small.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


# Progress

def test_progress_is_the_naive_distance_of_prefixes(small):
    video = squares(1, seed=3)[0]
    references = small.encode(list(squares(2, seed=4))).numpy()
    references[1] = small.encode([video])[0]
    steps, curve = small.progress(video, references, every=3)
    assert steps.tolist() == [1, 4, 7, 9]
    d = [min(np.linalg.norm(small.encode([video[:t]])[0].numpy() - c) for c in references) for t in steps]
    np.testing.assert_allclose(curve, [min(max(1 - x / d[0], 0), 1) for x in d], atol=1e-4)
    assert curve[0] == 0 and curve[-1] > 0.999                                        # ends at a reference


def naive_metrics(curves, success):
    s = [c[-1] for c, won in zip(curves, success) if won]
    f = [c[-1] for c, won in zip(curves, success) if not won]
    pairs = [abs(a - b) for a, b in itertools.combinations(s + f, 2)]
    width = float(np.median(pairs))
    k = lambda xs, ys: sum(math.exp(-(x - y) ** 2 / (2 * width ** 2)) for x in xs for y in ys) / (len(xs) * len(ys))
    p, q = ([sum(min(int(x * 10), 9) == b for x in xs) / len(xs) for b in range(10)] for xs in (s, f))
    kl = lambda a, b: sum(x * math.log2(x / y) for x, y in zip(a, b) if x > 0)
    mid = [(x + y) / 2 for x, y in zip(p, q)]
    var = lambda xs: sum((x - sum(xs) / len(xs)) ** 2 for x in xs)
    won = [c for c, w in zip(curves, success) if w]
    return {"spearman": sum(spearmanr(c, range(len(c)))[0] for c in won) / len(won),
            "monotonicity": sum(sum(b > a for a, b in zip(c, c[1:])) / (len(c) - 1) for c in won) / len(won),
            "mmd": math.sqrt(k(s, s) + k(f, f) - 2 * k(s, f)),
            "js": (kl(p, mid) + kl(q, mid)) / 2,
            "smd": (sum(s) / len(s) - sum(f) / len(f)) / math.sqrt((var(s) + var(f)) / (len(s) + len(f) - 2))}


def test_pixel_baseline_is_the_mean_normalised_frame(small, tmp_path, capsys):
    video = squares(1)[0]
    clip = video[wm.sample_frames(len(video), 8)] / 255
    expected = ((clip - wm.MEAN) / wm.STD).mean(0).transpose(2, 0, 1).ravel()
    pixels = wm.PixelModel(small)
    torch.testing.assert_close(pixels.encode([video])[0], torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=1e-5)
    assert pixels.progress(video, pixels.encode([video]).numpy())[1][-1] == pytest.approx(1)
    np.savez(tmp_path / "r.npz", videos=squares(6), success=[1, 1, 1, 0, 0, 0])
    small.save_pretrained(tmp_path / "model")
    wm.main(["compare", "--videos", str(tmp_path / "r.npz"), "--model", str(tmp_path / "model")])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("trained", "random weights", "pixels", "spearman")) and "nan" not in printed


def test_metrics_against_naive_loops():
    rng = np.random.default_rng(0)
    curves = [rng.random(rng.integers(2, 12)) for _ in range(15)]
    success = rng.random(15) < 0.6
    for name, value in naive_metrics(curves, success).items():
        assert wm.progress_metrics(curves, success)[name] == pytest.approx(value, abs=1e-9), name


def test_metrics_by_hand():
    same = wm.progress_metrics([[0, 1, 0.5]] * 4, [1, 1, 0, 0])
    assert same == {"spearman": 0.5, "monotonicity": 0.5, "mmd": 0, "js": 0, "smd": 0}
    apart = wm.progress_metrics([[0, 1], [0, 1], [0, 0], [0, 0]], [1, 1, 0, 0])
    assert apart["js"] == 1 and apart["smd"] == math.inf
    assert apart["mmd"] == pytest.approx(math.sqrt(2 - 2 * math.exp(-0.5)))  # the median distance is 1
    assert wm.progress_metrics([[1, 1, 1], [0, 0, 0]], [1, 0])["spearman"] == 0        # a constant curve tells nothing


def test_separation_by_hand():
    latents, task = np.array([[0.], [1.], [2.], [9.], [1.]]), np.zeros(5, int)
    won = np.array([True, True, True, False, False])
    # leave-one-out distances of successes 1.5, 0, 1.5; of failures 8, 0: won 3 of 3 against 8, half a tie against 0
    assert wm.separation(latents, won, task) == pytest.approx((3 + 0.5) / 6)
    assert math.isnan(wm.separation(latents, np.ones(5, bool), task))


# Command line

def test_draw(tmp_path, capsys):
    videos, png = tmp_path / "v.npz", tmp_path / "curves.png"
    np.savez(videos, videos=squares(12, size=64), success=np.arange(12) % 3 > 0, length=np.full(12, 7))
    wm.main(["--videos", str(videos), "--out", str(png)])
    assert png.read_bytes()[:4] == b"\x89PNG" and "spearman" in capsys.readouterr().out


# Bad input

@pytest.mark.parametrize("video, message", [
    (np.zeros((4, 32, 32, 3), np.float32), "uint8"), (np.zeros((4, 3, 32, 32), np.uint8), r"\(T, H, W, 3\)"),
    (np.zeros((32, 32, 3), np.uint8), r"\(T, H, W, 3\)"), (np.zeros((0, 32, 32, 3), np.uint8), "empty"),
    (np.zeros((4, 48, 40, 3), np.uint8), "square ones of at least 32x32"), ("film.mp4", "got str")])
def test_bad_videos(small, video, message):
    with pytest.raises(ValueError, match=message) as error:
        small.encode([squares(1)[0]] * 9 + [video])                # beyond the first batch of 8
    assert "videos[9]" in str(error.value) and "\n" not in str(error.value)


def test_bad_arguments(small):
    video = squares(1)[0]
    for call, message in [
            (lambda: small.encode([]), "videos is empty"),
            (lambda: small.progress(video, np.zeros((1, 7))), r"\(C, 24\)"),
            (lambda: small.progress(video, np.zeros((1, 24)), every=0), "every"),
            (lambda: wm.WorldModel(small.model, "fit"), "resize"),
            (lambda: wm.WorldModel(small.model, batch_size=0), "batch_size"),
            (lambda: wm.progress_metrics([[0, 1]], [True]), "both outcomes"),
            (lambda: wm.progress_metrics([[0, 1], [0]], [True, False]), "2 points")]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_bad_checkpoints(tmp_path):
    def edited(name, **changes):
        folder = shutil.copytree(FIXTURE / "checkpoint", tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    cut, lacking = edited("cut"), edited("lacking")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:len(data) // 2])
    weights = load_file(lacking / "model.safetensors")
    del weights["encoder.layer.1.norm1.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    bare = edited("bare")
    (bare / "model.safetensors").unlink()
    for folder, message in [
            (tmp_path / "nowhere", "nowhere"), ("typo", "neither a folder nor a hub id"), (cut, "cut"), (bare, "bare"),
            (lacking, "encoder.layer.1.norm1.weight"), (edited("llama", model_type="llama"), "model_type is 'llama'"),
            (edited("wide", hidden_size=64), "wide")]:
        with pytest.raises(ValueError, match=message) as error:
            wm.WorldModel.from_pretrained(folder, device="cpu")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("argv, message", [
    (["--videos", "{}/none.npz", "--model", "x"], "none.npz"), (["--videos", "{}/bad.npz", "--model", "x"], "videos"),
    (["--videos", "{}/short.npz", "--model", "x"], "success"), (["--videos", "{}/good.npz"], "no `success`"),
    (["--videos", "{}/half.npz"], "`length` must be integers in 1..9, got float64"), (["--videos", "{}/long.npz"], "got int64 in 5..50"),
    (["--videos", "{}/wide.npz"], "`success` must have one number a video, got shape (2, 1)"),
    (["--videos", "{}/good.npz", "--out", "{}/no/curves.png"], "no such folder")])
def test_bad_command_lines(tmp_path, argv, message):
    np.savez(tmp_path / "bad.npz", frames=squares(2))
    np.savez(tmp_path / "short.npz", videos=squares(2), success=np.ones(3, bool))
    for name, more in (("half", {"length": [2.5, 3]}), ("long", {"length": [5, 50]}), ("wide", {"success": [[True], [False]]})):
        np.savez(tmp_path / f"{name}.npz", videos=squares(2), **more)
    np.savez(tmp_path / "good.npz", videos=squares(2, size=64))
    with pytest.raises(SystemExit) as stop:
        wm.main([word.format(tmp_path) for word in argv])
    assert message in str(stop.value) and "\n" not in str(stop.value)
