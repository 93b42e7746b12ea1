"""robots/openvla.py against its oracle: inputs and outputs of the published OpenVLA-OFT modules on a tiny random checkpoint."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from robots import openvla as vla
from robots.openvla import OpenVLA

FIXTURE = Path(__file__).parents[1] / "fixtures" / "openvla_tiny"
CHECKPOINT = FIXTURE / "checkpoint"
KEY = "libero_spatial_no_noops"
ROTARY = 1 / 10000 ** (
    torch.arange(0, 8, 2).float() / 8
)  # head size 8, base 1e4, written out by hand


@pytest.fixture(scope="module")
def model():
    return OpenVLA.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def gold():
    return {name: torch.from_numpy(array) for name, array in np.load(FIXTURE / "io.npz").items()}


@pytest.fixture(scope="module")
def batch(gold):
    """The fixture's left-padded rows a, b, a turned into right-padded ones, with images 0, 1, 2."""
    ids, mask = gold["input_ids_left_padded"], gold["attention_mask_left_padded"]
    order = (1 - mask).argsort(dim=1, stable=True)  # real tokens first, in their order
    return ids.gather(1, order), mask.gather(1, order), gold["pixel_values"]


@pytest.fixture(scope="module")
def logits(model, batch):
    with torch.no_grad():
        return model(*batch)


def run(model, ids, pixels):
    with torch.no_grad():
        return model(ids, torch.ones_like(ids), pixels)


def close(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


# The published model's numbers


def test_pixel_values_and_vision(model, gold):
    frames = gold["images_uint8"]
    close(model.pixel_values(frames[:, None]), gold["pixel_values"], 1e-6)
    two = gold["pixel_values"][:2].flatten(0, 1)[None]  # two images on the channel axis
    close(model.pixel_values(frames[None, :2].numpy()), two, 1e-6)
    pixels = gold["pixel_values"][:1]
    with torch.no_grad():
        close(model.vision_backbone["featurizer"](pixels[:, :3]), gold["dino_patches"])
        close(model.vision_backbone["fused_featurizer"](pixels[:, 3:]), gold["siglip_patches"])
        close(model.vision_features(pixels), gold["patch_features"])
        close(model.project(gold["patch_features"]), gold["projected_patches"])


def test_single_prompts_and_two_images(model, gold):
    pixels = gold["pixel_values"]
    close(run(model, gold["input_ids_a"], pixels[:1]), gold["logits256_a"])
    close(run(model, gold["input_ids_b"], pixels[1:2]), gold["logits256_b"])
    close(
        run(model, gold["input_ids_a"], pixels[:2].flatten(0, 1)[None]),
        gold["logits256_a_two_images"],
    )


def test_padded_batch_and_its_mask(model, batch, gold, logits):
    close(logits, gold["logits256_padded_batch"])
    seen, llama = {}, model.language_model.model
    hook = llama.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(*batch)
    hook.remove()
    assert torch.equal(seen["attention_mask"], gold["lm_attention_mask_padded_batch"])


def test_the_whole_lm_head(model, gold):
    """All 32064 columns of the first two action tokens, from the hidden states inside."""
    seen, llama = {}, model.language_model.model
    hook = llama.register_forward_hook(
        lambda _, args, output: seen.update(h=output.last_hidden_state)
    )
    run(model, gold["input_ids_a"], gold["pixel_values"][:1])
    hook.remove()
    at = gold["input_ids_a"].shape[1] - 1 + 256  # 29871
    close(
        F.linear(seen["h"][:, at : at + 2], model.language_model.lm_head.weight).detach(),
        gold["logits_full_a_first2"],
    )


def test_greedy_and_sampled_actions(model, gold, logits):
    bins = logits.argmax(-1)
    assert torch.equal(bins + 31744, gold["greedy_token_ids"])
    close(model.decode(bins, KEY), gold["greedy_actions"], 1e-12)
    sampled = gold["sampled_token_ids_T1.6"] - 31744
    actions = model.decode(sampled, KEY)
    close(actions, gold["sampled_actions_T1.6"], 1e-12)
    assert actions.dtype == np.float64 and np.array_equal(
        actions, model.decode(sampled.view(3, 8, 7).numpy(), KEY)
    )
    close(vla.to_env_actions(actions), gold["env_actions_T1.6"], 1e-12)
    logp = F.log_softmax(logits / 1.6, -1)
    close(logp.gather(-1, sampled[..., None])[..., 0], gold["logprob_T1.6"])
    close(-(logp.exp() * logp).sum(-1), gold["entropy_T1.6"])


def test_images_match_tensorflow():
    gold = {name: stage[0] for name, stage in np.load(FIXTURE / "image_golden.npz").items()}

    def error(a, b):
        assert a.dtype == np.uint8 and a.shape == b.shape
        return np.abs(a.astype(float) - b).mean()

    assert error(vla.jpeg_round_trip(gold["raw"][::-1, ::-1]), gold["after_jpeg"]) < 1.5
    assert error(vla.resize(gold["after_jpeg"]), gold["after_resize"]) < 0.5
    assert error(vla.centre_crop(gold["after_resize"]), gold["after_crop"]) < 0.01
    assert error(vla.preprocess(gold["raw"]), gold["after_crop"]) < 1.5


# Properties


def test_batch_equals_single_rows_whatever_the_padding(model, batch, logits):
    ids, mask, pixels = batch
    for i, length in enumerate(mask.sum(1)):
        close(run(model, ids[i : i + 1, :length], pixels[i : i + 1]), logits[i : i + 1], 1e-5)
    more, junk = (
        F.pad(ids, (0, 9), value=7),
        F.pad(mask, (0, 9)),
    )  # padding of any length and content
    with torch.no_grad():
        close(model(more.masked_fill(junk == 0, 11), junk, pixels), logits, 1e-5)


def test_gradient_checkpointing_recomputes_all_three_and_changes_nothing(model, batch):
    ids, mask, pixels = (x[:2] for x in batch)
    calls = {"language_model": 0, "featurizer": 0, "fused_featurizer": 0}
    parts = {
        "language_model": model.language_model.model.layers[0].mlp,
        "featurizer": model.vision_backbone["featurizer"].blocks[0].mlp["fc1"],
        "fused_featurizer": model.vision_backbone["fused_featurizer"].blocks[0].mlp["fc1"],
    }
    hooks = [
        part.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        for name, part in parts.items()
    ]

    def gradients(on):
        model.set_gradient_checkpointing(on)
        model.zero_grad()
        model(ids, mask, pixels).log_softmax(-1)[..., 3].sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(False)
    assert set(calls.values()) == {1}
    recomputed = gradients(True)
    assert set(calls.values()) == {3}  # one more forward, and one recomputation
    model.set_gradient_checkpointing(False)
    model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    assert plain.keys() == recomputed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name], rtol=1e-5, atol=1e-7)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == plain.keys()  # what never runs asks for no gradient
    frozen = {
        ".".join(name.split(".")[1:4])
        for name, p in model.named_parameters()
        if not p.requires_grad
    }
    assert {"featurizer.blocks.2", "fused_featurizer.blocks.3"} == {
        name for name in frozen if "blocks" in name
    }


def test_encode_is_the_inverse_of_decode(model):
    bins = torch.arange(256)[:, None].repeat(1, 56)  # (256, 56): every bin in every dimension
    again = model.encode(model.decode(bins, KEY), KEY).reshape(256, 56)
    assert torch.equal(again, bins.clamp(min=1))  # bins 0 and 1 share the last centre
    stats = model.norm_stats[KEY]["action"]
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    actions = np.random.default_rng(0).uniform(low, high, (50, 8, 7))
    half_bin = np.where(stats["mask"], (high - low) / 255 / 2, 1 / 255) + 1e-7
    assert (np.abs(model.decode(model.encode(actions, KEY), KEY) - actions) <= half_bin).all()
    outside = model.decode(model.encode(np.stack([low - 9, high + 9])[None], KEY), KEY)[0]
    assert (np.abs(outside[:, :6] - np.stack([low, high])[:, :6]) <= 1.01 * half_bin[:6]).all()
    assert torch.equal(model.encode(np.full((1, 7), 1.0), KEY)[:, 6], torch.tensor([0]))


def test_gripper_conventions_are_inverse(model):
    env = np.zeros((1, 8, 7))
    env[..., 6] = [-1, 1, 1, -1, -1, 1, -1, 1]
    data = vla.from_env_actions(env)
    assert (
        set(data[0, data[0, :, 6] > 0.5, 6]) == {1.0} and data[0, 0, 6] == 1
    )  # 1 is open in the data
    assert np.array_equal(
        vla.to_env_actions(model.decode(model.encode(data, KEY), KEY))[..., 6], env[..., 6]
    )


def test_prompt_ids(model, batch, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        model.prompt_ids("pick up the bowl")
    words = "In : What action should the robot take to lift the bowl ? Out pick".split()
    vocabulary = {word: 100 + i for i, word in enumerate(dict.fromkeys(words))} | {
        "\n": 13,
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "▁": 29871,
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"[\n:?]"), "isolated")]
    )
    (
        tokenizer.enable_padding(length=50),
        tokenizer.enable_truncation(5),
    )  # a file's own settings must not interfere
    folder = copy(tmp_path)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids, mask = OpenVLA.from_pretrained(folder).prompt_ids(["Lift the BOWL", "pick"])
    sentence = "In : What action should the robot take to lift the bowl ? \n Out :".replace(
        "\n", "NEWLINE"
    ).split()
    expected = [1] + [13 if word == "NEWLINE" else vocabulary[word] for word in sentence] + [29871]
    assert ids[0].tolist() == expected and mask.sum(1).tolist() == [18, 16]
    assert (
        ids[1, -2:].tolist() == [32000, 32000]
        and ids[1, 15] == 29871
        and ids[1, 10] == vocabulary["pick"]
    )
    assert OpenVLA.from_pretrained(folder).prompt_ids("pick")[0].shape == (1, 16)
    Tokenizer(models.WordLevel(vocabulary | {"▁": 5}, unk_token="<unk>")).save(
        str(folder / "tokenizer.json")
    )
    with pytest.raises(
        ValueError, match="gives '▁' the number 5, OpenVLA's Llama-2 29871; copy it"
    ):
        OpenVLA.from_pretrained(folder).prompt_ids("pick")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        OpenVLA.from_pretrained(folder).prompt_ids("pick")


def test_statistics_file_overrides_config(model, tmp_path):
    assert list(model.norm_stats) == [KEY] and list(model.config["norm_stats"]) == ["bridge_orig"]
    (copy(tmp_path) / "dataset_statistics.json").unlink()
    assert list(OpenVLA.from_pretrained(tmp_path / "copy").norm_stats) == ["bridge_orig"]


# Checkpoints


def copy(tmp_path):
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "copy"))


def shard(folder, parts=3):
    """Split the single file by hand, as the 7B checkpoints are."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-{parts:05}.safetensors": names[i::parts] for i in range(parts)}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in files.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "model.safetensors").unlink()
    return folder


def test_names_and_sizes_are_those_of_the_7b_checkpoints():
    with torch.device("meta"):
        config = {"text_config": {"vocab_size": 32064, "pad_token_id": 32000}}
        model = OpenVLA(config, (1024, 24, 4096), (1152, 27, 4304))
    assert (
        len(model.state_dict()) == 982
        and round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 7.54
    )
    assert model.language_model.config.rms_norm_eps == 1e-6


def test_bf16_is_read_as_stored_and_keeps_the_rotary_frequencies_exact(model, batch, logits):
    stored = load_file(CHECKPOINT / "model.safetensors")
    half = OpenVLA.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    assert all(
        t.dtype == torch.bfloat16 and torch.equal(t, stored[name])
        for name, t in half.state_dict().items()
    )
    also_half = OpenVLA.from_pretrained(CHECKPOINT).to(torch.bfloat16)
    for one in (model, half, also_half):
        assert torch.equal(one.language_model.model.rotary_emb.inv_freq, ROTARY)
    out = run(
        half, batch[0][1:2], half.pixel_values(torch.zeros(1, 1, 224, 224, 3, dtype=torch.uint8))
    )
    assert out.dtype == torch.float32
    with torch.no_grad():
        close(half(*batch), logits, 0.1 * logits.abs().max().item())  # fp32 pixel values are cast
    assert torch.equal(half(*batch), also_half(*batch))


def test_sharded_equals_single(model, batch, logits, tmp_path):
    with torch.no_grad():
        assert torch.equal(OpenVLA.from_pretrained(shard(copy(tmp_path)))(*batch), logits)


@pytest.mark.parametrize("source", ["single", "sharded"])
def test_save_round_trip_is_bit_exact(tmp_path, source):
    half = OpenVLA.from_pretrained(
        CHECKPOINT if source == "single" else shard(copy(tmp_path)), dtype=torch.bfloat16
    )
    saved = tmp_path / "new" / "saved"
    half.save_pretrained(saved)
    assert os.listdir(tmp_path / "new") == ["saved"]  # no temporary left
    assert sorted(os.listdir(saved)) == sorted(
        os.listdir(CHECKPOINT)
    )  # and no index of shards that are not there
    on_disk = load_file(saved / "model.safetensors")
    stored = load_file(CHECKPOINT / "model.safetensors")
    assert on_disk.keys() == stored.keys()
    assert all(
        on_disk[n].dtype == stored[n].dtype and torch.equal(on_disk[n], stored[n]) for n in stored
    )
    for file in CHECKPOINT.glob("*.json"):
        assert json.loads((saved / file.name).read_text()) == json.loads(file.read_text())
    again = OpenVLA.from_pretrained(saved, dtype=torch.bfloat16)
    assert again.norm_stats == half.norm_stats
    assert all(torch.equal(t, half.state_dict()[name]) for name, t in again.state_dict().items())


def lacks_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["projector.fc2.bias"]
    save_file(tensors, folder / "model.safetensors")


def unknown_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"proprio_projector.fc1.weight": torch.zeros(2)}, folder / "model.safetensors"
    )


def misshaped_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"projector.fc2.bias": torch.zeros(31)}, folder / "model.safetensors")


def one_tower(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "fused_featurizer" not in n},
        folder / "model.safetensors",
    )


def no_config(folder):
    (folder / "config.json").unlink()


def other_model(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')


def other_preprocessor(folder):
    (folder / "preprocessor_config.json").write_text("{}")


def empty_index(folder):
    (shard(folder) / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (
            lacks_tensor,
            ValueError,
            r"1 tensors .* projector.fc2.bias, has shape missing and should be \(32,\)",
        ),
        (
            unknown_tensor,
            ValueError,
            r"1 tensors .* proprio_projector.fc1.weight, has shape \(2,\) and should be absent",
        ),
        (
            misshaped_tensor,
            ValueError,
            r"1 tensors .* projector.fc2.bias, has shape \(31,\) and should be \(32,\)",
        ),
        (
            one_tower,
            ValueError,
            r"lacks the tensor vision_backbone.fused_featurizer.patch_embed.proj.weight",
        ),
        (no_config, FileNotFoundError, r"config.json is missing"),
        (other_model, ValueError, r"config.json has no text_config, only model_type"),
        (
            other_preprocessor,
            ValueError,
            r"preprocessor_config.json has no tvf_normalize_params, only nothing",
        ),
        (
            empty_index,
            ValueError,
            r"lacks the tensor vision_backbone.featurizer.patch_embed.proj.weight",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "",
)
def test_a_bad_checkpoint_is_one_clear_line(tmp_path, damage, error, words):
    folder = copy(tmp_path)
    damage(folder)
    with pytest.raises(error, match=words) as caught:
        OpenVLA.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_clear_line(model, batch, gold):
    ids, mask, pixels = batch
    left = gold["input_ids_left_padded"], gold["attention_mask_left_padded"]
    frames = gold["images_uint8"]
    for call, words in [
        (lambda: model(*left, pixels), "padded on the RIGHT"),
        (lambda: model(ids, torch.zeros_like(mask), pixels), "padded on the RIGHT"),
        (lambda: model(ids, mask[:, :-1], pixels), r"\(3, 35\) and \(3, 34\)"),
        (
            lambda: model(ids, mask, pixels[:2]),
            r"\(3, 6 \* images, 224, 224\), got \(2, 6, 224, 224\)",
        ),
        (lambda: model(ids, mask, pixels[:, :3]), r"got \(3, 3, 224, 224\)"),
        (lambda: model.pixel_values(frames), r"got torch.uint8 \(3, 224, 224, 3\)"),
        (lambda: model.pixel_values(frames[:, None].float()), "got torch.float32"),
        (lambda: vla.preprocess(frames[0].numpy() / 255), "frame must be uint8"),
        (
            lambda: vla.preprocess(frames.numpy()),
            r"frame must be uint8 \(H, W, 3\), got uint8 \(3, 224",
        ),
        (
            lambda: model.decode(torch.zeros(1, 56).long(), "libero_moon"),
            f"'libero_moon' .* knows: {KEY}",
        ),
        (
            lambda: model.decode(gold["greedy_token_ids"], KEY),
            r"integers in 0..255, got int64 in 31\d+",
        ),
        (lambda: model.decode(torch.zeros(1, 56), KEY), "got float32"),
        (lambda: model.encode(np.full((1, 8, 7), np.nan), KEY), "NaN"),
        (lambda: model.encode(np.zeros((1, 8, 6)), KEY), r"\(1, 8, 6\)"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["--checkpoint", str(CHECKPOINT)]])
def test_main(capsys, monkeypatch, arguments):
    monkeypatch.setattr("sys.argv", ["robots/openvla.py", "--device", "cpu", *arguments])
    vla.main()
    out = capsys.readouterr().out
    assert "fused_featurizer: width 48, 4 blocks" in out and "142 tensors" in out
    assert len(out.split("[[")[1].split("]\n")) == 9  # 8 rows and what follows
