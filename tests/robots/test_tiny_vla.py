"""robots/tiny_vla.py: its forward pass written out in loops, rows of a batch that do not touch each
other, files that come back as they went, and damaged ones that are one line."""

import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from robots import openvla as vla
from robots import policy as policies
from robots.tiny_vla import TinyVLA
from tests.conftest import STATS
from tests.robots.spoil import fault, read, spoil

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "openvla_tiny" / "checkpoint"
INSTRUCTIONS = [
    "put the red cube on the green plate",
    "put the red cube on the yellow plate",
    "put the blue cube on the green plate",
    "put the blue cube on the yellow plate",
    "wait",
]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    policy = TinyVLA(STATS)
    with torch.no_grad():
        policy.head.weight.mul_(30)  # from the usual start all logits would be near 0
        policy.film.weight.mul_(5)
        policy.sharpness.normal_()  # starts at 0
    return policy


@pytest.fixture(scope="module")
def frames():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 1, 64, 64, 3), np.uint8))


def logits_of(policy, frames, instructions):
    with torch.no_grad():
        return policy(*policy.prompt_ids(instructions), policy.pixel_values(frames))


def test_batch_is_its_rows(tiny, frames):
    together = logits_of(tiny, frames, INSTRUCTIONS)
    assert together.shape == (5, 56, 256) and together.dtype == torch.float32
    for k, text in enumerate(INSTRUCTIONS):
        torch.testing.assert_close(
            logits_of(tiny, frames[k : k + 1], text), together[k : k + 1], atol=1e-4, rtol=0
        )
    same_image = logits_of(tiny, frames[:1].expand(5, -1, -1, -1, -1), INSTRUCTIONS)
    same_text = logits_of(tiny, frames, INSTRUCTIONS[:1] * 5)
    for logits in (same_image, same_text):  # both inputs matter, for every pair
        assert all((logits[i] - logits[j]).abs().max() > 0.1 for i in range(5) for j in range(i))


def test_ignores_padding(tiny, frames):
    ids, mask = tiny.prompt_ids(INSTRUCTIONS)
    assert ids.shape == mask.shape == (5, 8) and mask.sum(1).tolist() == [8, 8, 8, 8, 1]
    assert (ids[mask == 0] == 0).all() and (ids[mask == 1] > 0).all()
    pixels = tiny.pixel_values(frames)
    with torch.no_grad():
        expected = tiny(ids, mask, pixels)
        torch.testing.assert_close(
            tiny(F.pad(ids, (0, 4), value=77), F.pad(mask, (0, 4)), pixels),
            expected,
            atol=1e-5,
            rtol=0,
        )
        torch.testing.assert_close(
            tiny(ids.masked_fill(mask == 0, 9), mask, pixels), expected, atol=1e-5, rtol=0
        )


def test_forward_in_loops(tiny, frames):
    """The stem, spatial softmax and cosine head of one image, written out."""
    w = {name: p.double() for name, p in tiny.state_dict().items()}
    x = frames[0, 0].double() / 127.5 - 1  # (64, 64, 3)
    line = torch.linspace(-1, 1, 64, dtype=torch.double)
    x = torch.cat(
        [x, line.expand(64, 64)[..., None], line[:, None].expand(64, 64)[..., None]], 2
    ).permute(2, 0, 1)[None]
    words = sum(
        w["words.weight"][1 + zlib.crc32(word) % 255]
        for word in b"put the red cube on the green plate".split()
    )
    scale, shift = (w["film.weight"] @ words + w["film.bias"]).split(32)
    x = F.conv2d(x, w["conv1.weight"], w["conv1.bias"], 2, 2).relu()
    x = F.conv2d(x, w["conv2.weight"], w["conv2.bias"], 2, 1)
    x = (x * (1 + scale[:, None, None]) + shift[:, None, None]).relu()
    x = F.conv2d(x, w["conv3.weight"], w["conv3.bias"], 1, 1)[0]  # (32, 16, 16)
    line, where = np.linspace(-1, 1, 16), []
    for channel, sharpness in zip(x.numpy(), w["sharpness"].exp().flatten().tolist()):
        share = np.exp(channel * sharpness)
        share /= share.sum()
        where += [(share.sum(0) * line).sum(), (share.sum(1) * line).sum()]  # mean column, mean row
    h = (w["fc1.weight"] @ torch.cat([torch.tensor(where), words]) + w["fc1.bias"]).relu()
    h = h + (w["fc2.weight"] @ h + w["fc2.bias"]).relu()
    coefficients = (w["head.weight"] @ h + w["head.bias"]).view(56, 16)
    logits = logits_of(tiny, frames[:1], INSTRUCTIONS[0])[0]
    for token, b in ((0, 0), (5, 255), (17, 100), (55, 31)):
        value = sum(
            3 * coefficients[token, k - 1] * np.cos(np.pi * k * b / 255) for k in range(1, 17)
        )
        assert abs(value - logits[token, b]) < 1e-3


def test_round_trip_and_load_policy(tiny, frames, tmp_path):
    cropped = TinyVLA(STATS, crop=(8, 20, 40))
    cropped.save_pretrained(tmp_path / "cropped")
    assert torch.equal(
        logits_of(policies.load_policy(tmp_path / "cropped"), frames, INSTRUCTIONS),
        logits_of(cropped, frames, INSTRUCTIONS),
    )
    tiny.save_pretrained(tmp_path / "policy")
    loaded = policies.load_policy(tmp_path / "policy")
    assert type(loaded) is TinyVLA and type(policies.load_policy(CHECKPOINT)) is vla.OpenVLA
    assert loaded.norm_stats == STATS and loaded.config == tiny.config
    assert loaded.state_dict().keys() == tiny.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), tiny.state_dict().values())
    )
    assert torch.equal(
        logits_of(loaded, frames, INSTRUCTIONS), logits_of(tiny, frames, INSTRUCTIONS)
    )
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "dataset_statistics.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "policy" / name).read_bytes()
    with pytest.raises(ValueError, match="nothing was overwritten"):
        loaded.save_pretrained(tmp_path / "policy")
    small = TinyVLA(
        STATS, channels=(4, 6, 8), width=12, basis=5, size=32
    )  # sizes come from config.json
    small.save_pretrained(tmp_path / "small")
    small_frames = frames[:1, :, :32, :32]
    assert torch.equal(
        logits_of(policies.load_policy(tmp_path / "small"), small_frames, "wait"),
        logits_of(small, small_frames, "wait"),
    )


def test_crop(tiny, frames):
    """A crop is a smaller policy's whole image, and the checkpoint remembers it."""
    cropped = TinyVLA(STATS, crop=(8, 20, 40))
    small = TinyVLA(STATS, size=40)
    for policy in (cropped, small):
        policy.load_state_dict(tiny.state_dict())
    expected = logits_of(small, frames[:, :, 8:48, 20:60], INSTRUCTIONS)
    assert torch.equal(logits_of(cropped, frames, INSTRUCTIONS), expected)
    assert not torch.allclose(logits_of(tiny, frames, INSTRUCTIONS), expected)
    for wrong in ((8, 30, 40), (-4, 0, 40), (0, 0, 42), (0, 0, 0)):
        with pytest.raises(ValueError, match="multiples of 4, and the crop lie within the image"):
            TinyVLA(STATS, crop=wrong)


def test_in_bf16(tiny, tmp_path, frames):
    """Near the fp32 logits: evaluation on a GPU runs so."""
    tiny.save_pretrained(tmp_path / "policy")
    half = policies.load_policy(tmp_path / "policy", torch.bfloat16)
    assert half.head.weight.dtype == torch.bfloat16
    exact, near = (logits_of(policy, frames, INSTRUCTIONS) for policy in (tiny, half))
    assert near.dtype == torch.float32 and (near - exact).abs().max() < 0.05 * exact.abs().max()


def test_bad_checkpoints_are_one_clear_line(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "good")
    weights = load_file(tmp_path / "good" / "model.safetensors")
    size = (tmp_path / "good" / "model.safetensors").stat().st_size

    def truncated(folder):
        os.truncate(folder / "model.safetensors", size // 2)

    def reshaped(folder):
        save_file(weights | {"fc2.bias": torch.zeros(12)}, folder / "model.safetensors")

    def lacking(folder):
        save_file(
            {name: tensor for name, tensor in weights.items() if name != "conv1.bias"},
            folder / "model.safetensors",
        )

    def resized(folder):
        (folder / "config.json").write_text(json.dumps(tiny.config | {"width": 128}))

    def half_json(folder):
        (folder / "config.json").write_text('{"model_type": "tiny_')

    for damage, words in [
        (truncated, "model.safetensors is truncated"),
        (reshaped, "do not fit config.json"),
        (lacking, "do not fit config.json"),
        (resized, "do not fit config.json"),
        (half_json, "no valid JSON"),
        *(
            (lambda folder, name=name: (folder / name).unlink(), name)
            for name in ("model.safetensors", "config.json", "dataset_statistics.json")
        ),
    ]:
        folder = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", folder)
        damage(folder)
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            policies.load_policy(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="config.json is not a TinyVLA's"):
        TinyVLA.from_pretrained(CHECKPOINT)


def test_bad_input_is_refused(tiny, frames):
    for call in (lambda: tiny.decode(torch.zeros(1, 56).long(), "libero_moon"),
                 lambda: tiny.encode(np.zeros((1, 8, 7)), "libero_moon")):
        with pytest.raises(ValueError, match="'libero_moon' .* knows: tabletop"):
            call()
    for wrong, words in ((frames[:, 0], r"\(B, 1, 64, 64, 3\), got torch.uint8 .*5, 64, 64, 3"),
                         (frames.float(), "got torch.float32"),
                         (frames[:, :, :32], r"got torch.uint8 .*5, 1, 32, 64, 3")):
        with pytest.raises(AssertionError, match=words):
            tiny.pixel_values(wrong)


def test_described(saved):
    """Without weights, from the headers' shapes or the hub's."""
    shapes = vla.read_shapes(saved)
    for policy in (TinyVLA.described(saved), TinyVLA.described(saved, shapes)):
        assert {p.device.type for p in policy.state_dict().values()} == {"meta"}
        assert policy.config["width"] == 16 and policy.norm_stats == STATS
    with pytest.raises(ValueError, match="1 tensors do not fit config.json; the first, fc1.bias"):
        TinyVLA.described(saved, shapes | {"fc1.bias": (3,)})


def test_activations_are_small(tiny):
    with pytest.raises(ValueError, match="^--gradient_checkpointing is for OpenVLA"):
        tiny.set_gradient_checkpointing(True)


def test_faults_are_told_from_the_headers(tiny, tmp_path):
    folder = tmp_path / "policy"
    tiny.save_pretrained(folder)
    assert fault(TinyVLA.described, folder) == ""
    os.truncate(folder / "model.safetensors", 1000)
    line = fault(TinyVLA.described, folder)
    assert "model.safetensors is truncated" in line and "\n" not in line
    (folder / "model.safetensors").unlink()
    line = fault(TinyVLA.described, folder)
    assert "model.safetensors is truncated, missing or not" in line


@pytest.mark.parametrize("config", [
    {"width": -1}, {"width": 10 ** 30}, {"width": 10 ** 13}, {"width": 10 ** 6}, {"width": "256"},
    {"width": None}, {"width": 0}, {"basis": 0}, {"basis": 1e9}, {"size": 64.0}, {"size": 2 ** 70},
    {"size": 0}, {"size": 2 ** 20},
    {"channels": []}, {"channels": [4, 4]}, {"channels": [10 ** 9] * 3}, {"channels": 4},
    {"channels": [0, 0, 0]}, {"crop": [1]}, {"crop": "all"}, {"crop": [0, 0, None]},
    {"crop": {"top": 0}}, {"colour": 3}, {"norm_stats": {}}])  # fmt: skip
def test_a_config_that_describes_no_policy_is_one_line(tiny, tmp_path, config):
    tiny.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "config.json").write_text(json.dumps(tiny.config | config))
    with pytest.raises(ValueError, match=f"^{tmp_path}/policy") as caught:
        policies.load_policy(tmp_path / "policy")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert fault(TinyVLA.described, tmp_path / "policy") == str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "policy"
    TinyVLA(STATS, channels=(4, 4, 4), width=16, basis=6).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_folder_loads_or_is_one_line(saved, tmp_path, seed):
    folder = Path(shutil.copytree(saved, tmp_path / "policy"))
    what = spoil(folder, seed)
    try:
        policy = policies.load_policy(folder)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 800, what
        if isinstance(read(folder / "config.json"), dict):
            assert fault(TinyVLA.described, folder), what
    else:
        assert fault(TinyVLA.described, folder) == "", what
        black = np.zeros((1, policy.camera, policy.camera, 3), np.uint8)
        for key in policy.norm_stats:
            actions, _ = policies.greedy(policy, key)(black, ["wait"])
            assert actions.shape == (1, 8, 7) and np.isfinite(actions).all(), what
