"""robots/openvla.py against its oracle: inputs and outputs of the published OpenVLA-OFT modules on
a tiny random checkpoint; and checkpoint folders: whole, damaged, half written, or on the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from robots import openvla as vla
from robots import policy as policies
from robots import tiny_vla
from robots.openvla import OpenVLA
from tests.conftest import STATS
from tests.robots.spoil import fault, read, spoil

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
        close(model.projector(gold["patch_features"]), gold["projected_patches"])


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
    with pytest.raises(ValueError, match="tokenizer.json"):
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
    words = "gives '▁' the number 5, OpenVLA's Llama-2 29871; copy it"
    with pytest.raises(ValueError, match=words):
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


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path):
    jsons, files = {"config.json": {"model_type": "x"}}, {"tokenizer.json": b"{}"}
    vla.write_folder(tmp_path / "whole", jsons, files, STATE)
    return tmp_path / "whole"


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "sharded").mkdir()
    for i, (name, tensor) in enumerate(STATE.items()):
        save_file({name: tensor}, tmp_path / "sharded" / f"{i}.safetensors")
    index = {"weight_map": {name: f"{i}.safetensors" for i, name in enumerate(STATE)}}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path / "sharded"


def test_what_is_written_is_read(folder, sharded):
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert vla.read_json(folder / "config.json") == {"model_type": "x"}
    assert vla.local_folder(folder) == folder
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == STATE.keys()
    for name, x in stored.items():
        assert torch.equal(x, STATE[name]) and x.dtype == STATE[name].dtype
    shapes = {name: tuple(x.shape) for name, x in STATE.items()}
    assert vla.read_shapes(folder) == vla.read_shapes(sharded) == shapes
    assert vla.weight_files(folder) == [folder / "model.safetensors"]
    assert vla.weight_files(sharded) == [sharded / f"{i}.safetensors" for i in range(2)]


def test_nothing_is_overwritten_or_left_half_done(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "a_file").write_text("x")
    for name in ("mine", "a_file"):
        with pytest.raises(ValueError, match="nothing was overwritten"):
            vla.write_folder(tmp_path / name, {}, {}, STATE)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    assert (tmp_path / "a_file").read_text() == "x"
    (tmp_path / "a_file").unlink()

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vla, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            vla.write_folder(tmp_path / "new", {"config.json": {}}, {}, STATE)
    assert not (tmp_path / "new").exists()
    vla.write_folder(tmp_path / "new", {}, {}, STATE)  # the next attempt cleans up
    assert sorted(os.listdir(tmp_path)) == ["mine", "new"]
    assert os.listdir(tmp_path / "new") == ["model.safetensors"]


# In a process of its own: a file may have no more bytes than so many, as on a full disk
FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from robots.openvla import write_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    write_folder(Path(sys.argv[1]), {"config.json": {"a": "x" * 4000}}, {"t.model": b"y" * 400},
                 {"w": torch.zeros(20000)})
except OSError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a limit of file sizes stands for a full disk")
@pytest.mark.parametrize("room", [0, 100, 1000, 50000])
def test_a_full_disk_is_one_line_and_leaves_no_folder(tmp_path, room):
    command = [sys.executable, "-c", FULL, str(tmp_path / "policy"), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n") == 1 and "is the disk full?" in done.stdout
    assert done.stdout.startswith(f"{tmp_path / 'policy'} cannot be written (")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["json", "weights", "rename"])
def test_any_failure_of_the_disk_is_one_line(tmp_path, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    broken = {
        "json": (Path, "write_bytes"),
        "weights": (vla, "save_file"),
        "rename": (os, "replace"),
    }
    monkeypatch.setattr(*broken[where], full)
    with pytest.raises(OSError, match=r"cannot be written .*No space left.* full\?$") as caught:
        vla.write_folder(tmp_path / "policy", {"config.json": {}}, {}, STATE)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


def truncate(file):
    with open(file, "r+b") as opened:
        opened.truncate(100)


def text(content):
    def write(file):
        file.write_text(content)

    return write


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("which, file, damage, words", [
    ("folder", "model.safetensors", truncate, "model.safetensors is truncated"),
    ("folder", "model.safetensors", text(""), "model.safetensors is truncated"),
    ("folder", "model.safetensors", os.remove, "model.safetensors is truncated, missing or"),
    ("sharded", "1.safetensors", os.remove, "1.safetensors is truncated, missing or"),
    ("sharded", INDEX, text("[]"), "index.json holds no JSON object; copy it again"),
    ("sharded", INDEX, text('{"weight'), "index.json is missing or no valid JSON"),
    ("sharded", INDEX, text("[" * 100000), "index.json is missing or no valid JSON"),
    ("sharded", INDEX, text('{"weight_map": []}'), "no weight_map of file names"),
    ("sharded", INDEX, text("{}"), "no weight_map of file names"),
    ("sharded", INDEX, text('{"weight_map": {"a": 3}}'), "/3 is truncated, missing or"),
])
def test_damaged_weights_are_one_clear_line(request, which, file, damage, words):
    path = request.getfixturevalue(which)
    damage(path / file)
    with pytest.raises(ValueError, match=words) as caught:
        vla.read_shapes(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, words", [
    ("[]", "holds no JSON object"), ("null", "holds no JSON object"),
    *((text, "is missing or no valid JSON")
      for text in ('{"model_', "[" * 100000, '{"a":' * 100000, "", None))])
def test_a_damaged_config_is_one_clear_line(folder, content, words):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json {words}") as caught:
        policies.load_policy(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["no_such_folder", "./no/such", "a/b/c", "/no/such", "~/model"])
def test_a_missing_folder_is_not_asked_from_the_hub(path):
    with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor a hub id"):
        vla.local_folder(path)


def test_hub_ids_go_through_the_hub(monkeypatch, folder):
    import huggingface_hub

    asked = {}

    def given(name, **kwargs):
        asked.update(name=name, **kwargs)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", given)
    assert vla.local_folder("someone/openvla") == folder
    assert asked["name"] == "someone/openvla" and "*.safetensors" in asked["allow_patterns"]
    vla.local_folder("someone/openvla", weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]

    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    words = r"the hub did not give it \(no route to host\); give the folder of a downloaded copy"
    with pytest.raises(FileNotFoundError, match=words):
        vla.local_folder("someone/openvla")


# Action statistics

GOOD = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
LOW = [-1.0] * 7


@pytest.mark.parametrize("value", [
    {"min": LOW, "max": LOW}, {"proprio": GOOD}, None, [], "x",
    {"action": None}, {"action": [GOOD]}, {"action": {"min": LOW, "max": LOW}},
    *({"action": GOOD | changes} for changes in (
        {"q01": [-1.0] * 14, "q99": [1.0] * 14}, {"q99": [1.0] * 14}, {"q99": [1.0] * 6},
        {"q99": []}, {"q99": 1.0}, {"q99": [LOW] * 7}, {"q01": [*LOW[:6], float("nan")]},
        {"q99": [float("inf"), *LOW[:6]]}, {"q99": [2**2000, *LOW[:6]]},
        {"q01": [None, *LOW[:6]]}, {"q01": ["low", *LOW[:6]]}, {"q01": "-1.0 -1"},
        {"mask": [True] * 8}, {"mask": None}, {"mask": ["no"] * 7}, {"q01": [*LOW[:6], 1.5]}))])
@pytest.mark.parametrize("where", ["dataset_statistics.json", "config.json"])
def test_statistics_that_decode_nothing_are_one_line(tmp_path, value, where):
    """Of file and key, before anything is simulated: from both policies and without weights."""
    folder = copy(tmp_path)
    if where == "config.json":
        (folder / "dataset_statistics.json").unlink()
        config = json.loads((folder / where).read_text())
        content = config | {"norm_stats": {"fine": {"action": GOOD}, "ours": value}}
    else:
        content = {"fine": {"action": GOOD}, "ours": value}
    (folder / where).write_text(json.dumps(content))
    line = rf"^{folder}/{where}: 'ours' has no q01, q99 and mask of an action, 7 finite numbers"
    for call in (vla.action_statistics, OpenVLA.from_pretrained, policies.load_policy):
        with pytest.raises(ValueError, match=line) as caught:
            call(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert str(caught.value) == fault(OpenVLA.described, folder)
    if where == "dataset_statistics.json":
        tiny_vla.TinyVLA({"fine": {"action": GOOD}}).save_pretrained(tmp_path / "tiny")
        shutil.copy(folder / where, tmp_path / "tiny" / where)
        with pytest.raises(ValueError, match=line.replace("/copy/", "/tiny/")):
            policies.load_policy(tmp_path / "tiny")


def test_good_statistics_are_kept_as_they_are(tmp_path):
    """Also without a mask, with q01 = q99 (a dimension that never moves), with more keys beside."""
    still = GOOD | {"q01": [0.0] * 7, "q99": [0.0] * 7, "mean": [0.0] * 7}
    del still["mask"]
    content = {"a": {"action": GOOD, "num_transitions": 3}, "b": {"action": still}}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(content))
    assert vla.action_statistics(tmp_path) == content
    (tmp_path / "config.json").write_text('{"norm_stats": {"other": {}}}')
    assert vla.action_statistics(tmp_path) == content  # the file goes before the config
    for text in ("[]", "null", "[" * 100000):
        (tmp_path / "dataset_statistics.json").write_text(text)
        with pytest.raises(ValueError, match="dataset_statistics.json") as caught:
            vla.action_statistics(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "dataset_statistics.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    for content in ({}, *({"norm_stats": value} for value in (None, [], 3, "x"))):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="config.json: there are no action statistics"):
            vla.action_statistics(tmp_path)


# What would stop a run


def words_of_llama() -> dict[str, int]:
    return {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 29871}


def test_faults_are_told_from_the_headers(tmp_path):
    folder = copy(tmp_path)
    with pytest.raises(ValueError, match="^the checkpoint has no tokenizer.json; copy it from"):
        OpenVLA.described(folder).prompt_ids("wait")
    tokenizer = Tokenizer(models.WordLevel(words_of_llama(), unk_token="<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    assert fault(OpenVLA.described, folder) == ""
    (folder / "action_head--150000_checkpoint.pt").write_bytes(b"x")
    line = f"{folder}/action_head--150000_checkpoint.pt is a regression head; give the checkpoint"
    for call in (OpenVLA.described, policies.load_policy):      # so training and evaluation too
        assert fault(call, folder).startswith(line)
    (folder / "action_head--150000_checkpoint.pt").unlink()
    tensors = load_file(folder / "model.safetensors")
    head = tensors["language_model.lm_head.weight"]
    short = tensors | {"language_model.lm_head.weight": head[:31999].clone()}
    save_file(short, folder / "model.safetensors")
    problem = fault(OpenVLA.described, folder)
    assert "the first, language_model.lm_head.weight, has shape (31999, 32)" in problem
    save_file(tensors | {"projector.fc2.bias": torch.zeros(31)}, folder / "model.safetensors")
    problem = fault(OpenVLA.described, folder)
    assert "1 tensors do not fit config.json; the first, projector.fc2.bias" in problem
    save_file(tensors, folder / "model.safetensors")
    for name, words in (
        ("tokenizer.json", "tokenizer.json cannot be read"),
        ("preprocessor_config.json", "preprocessor_config.json is missing or no valid JSON"),
        ("model.safetensors", "model.safetensors is truncated"),
    ):  # the last damage is what is told first
        (folder / name).write_text("{")
        problem = fault(OpenVLA.described, folder)
        assert words in problem and problem.startswith(str(folder))
        (folder / "preprocessor_config.json").write_bytes(
            (CHECKPOINT / "preprocessor_config.json").read_bytes()
        )


def test_misfits():
    """Told from shapes: no tensor is read, and they may come from the hub."""
    shapes, name = vla.read_shapes(CHECKPOINT), "language_model.model.norm.weight"
    fewer = {n: shape for n, shape in shapes.items() if n != name}
    for damaged, words in (
            (shapes | {name: (7,)}, f"the first, {name}, has shape (7,)"),
            (fewer, f"the first, {name}, has shape missing"),
            (shapes | {"value_head.weight": (3, 4)},
             "value_head.weight, has shape (3, 4) and should be absent")):
        with pytest.raises(ValueError, match=f"^{CHECKPOINT}: 1 tensors do not fit") as caught:
            OpenVLA.described(CHECKPOINT, damaged)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    model = OpenVLA.described(CHECKPOINT, shapes)
    assert {p.device.type for p in model.state_dict().values()} == {"meta"}
    assert list(model.norm_stats) == [KEY]
    sizes = [(len(tower.blocks), *tower.blocks[0].mlp["fc1"].weight.shape[::-1])
             for tower in model.vision_backbone.values()]
    assert sizes == [(3, 32, 128), (4, 48, 179)]


def test_read_tokenizer():
    tokenizer = Tokenizer(models.WordLevel(words_of_llama(), unk_token="<unk>"))
    file = Path("tokenizer.json")
    read_back = vla.read_tokenizer(tokenizer.to_str().encode(), file)
    assert read_back.token_to_id("▁") == vla.SPACE and read_back.padding is None
    for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100000, b'{"model": {}}'):
        with pytest.raises(ValueError, match="tokenizer.json cannot be read") as caught:
            vla.read_tokenizer(content, file)
        assert "\n" not in str(caught.value)
    unk = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "▁": 29871}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="tokenizer.json cannot be read .*UNK.*; copy it again"):
        vla.read_tokenizer(unk.to_str().encode(), file)  # it could encode no prompt
    for word, number in (("<s>", 5), ("</s>", 7), ("▁", 3)):
        other = Tokenizer(models.WordLevel(words_of_llama() | {word: number}, unk_token="<unk>"))
        with pytest.raises(ValueError, match=f"gives '{word}' the number {number}, OpenVLA's"):
            vla.read_tokenizer(other.to_str().encode(), file)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The fixture's checkpoint with a tokenizer."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path_factory.mktemp("complete") / "policy"))
    tokenizer = Tokenizer(models.WordLevel(words_of_llama(), unk_token="<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_folder_loads_or_is_one_line(complete, tmp_path, seed):
    folder = Path(shutil.copytree(complete, tmp_path / "policy"))
    what = spoil(folder, seed)
    problem = fault(OpenVLA.described, folder)
    assert "\n" not in problem and len(problem) < 800, (what, problem)
    try:
        policy = policies.load_policy(folder)
        ids, mask = policy.prompt_ids("wait")
        policy.pixel_values(np.zeros((1, 1, 224, 224, 3), np.uint8))
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 800, what
        if isinstance(read(folder / "config.json"), dict):
            kind = read(folder / "config.json").get("model_type")
            assert problem or kind != "openvla", (what, str(error))
    else:
        assert problem == "", what
        for key in policy.norm_stats:
            assert np.isfinite(policy.decode(torch.zeros(1, 56).long(), key)).all(), what


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


def index_of_nothing(folder):
    (shard(folder) / "model.safetensors.index.json").write_text('{"weight_map": {}}')


@pytest.mark.parametrize("damage, words", [
    (lacks_tensor, r"1 tensors .* projector.fc2.bias, has shape missing and should be \(32,\)"),
    (unknown_tensor,
     r"1 tensors .* proprio_projector.fc1.weight, has shape \(2,\) and should be absent"),
    (misshaped_tensor,
     r"1 tensors .* projector.fc2.bias, has shape \(31,\) and should be \(32,\)"),
    (one_tower, r"KeyError: 'vision_backbone.fused_featurizer.patch_embed.proj.weight'"),
    (no_config, r"config.json is missing"),
    (other_model, r"do not describe an OpenVLA \(KeyError: 'text_config'\)"),
    (other_preprocessor, r"do not describe an OpenVLA \(KeyError: 'tvf_normalize_params'\)"),
    (empty_index, r"index.json has no weight_map of file names; copy it again"),
    (index_of_nothing, r"do not describe an OpenVLA \(ValueError: text_config: num_hidden_layers")],
    ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_checkpoint_is_one_clear_line(tmp_path, damage, words):
    folder = copy(tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=words) as caught:
        OpenVLA.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_bad_input_is_refused(model, batch, gold):
    ids, mask, pixels = batch
    left = gold["input_ids_left_padded"], gold["attention_mask_left_padded"]
    frames = gold["images_uint8"]
    for call, words in [
            (lambda: model(*left, pixels), "padded on the RIGHT"),
            (lambda: model(ids, torch.zeros_like(mask), pixels), "padded on the RIGHT"),
            (lambda: model.pixel_values(frames), r"got torch.uint8 \(3, 224, 224, 3\)"),
            (lambda: model.pixel_values(frames[:, None].float()), "got torch.float32"),
            (lambda: vla.preprocess(frames[0].numpy() / 255), "frame must be uint8"),
            (lambda: vla.preprocess(frames.numpy()),
             r"frame must be uint8 \(H, W, 3\), got uint8 \(3, 224"),
            (lambda: model.decode(gold["greedy_token_ids"], KEY), "in 0..255, got int64; token"),
            (lambda: model.decode(torch.zeros(1, 56), KEY), "got float32"),
            (lambda: model.encode(np.full((1, 8, 7), np.nan), KEY), "finite"),
            (lambda: model.encode(np.zeros((1, 8, 6)), KEY), r"\(1, 8, 6\)")]:
        with pytest.raises(AssertionError, match=words):
            call()
    with pytest.raises(ValueError, match=f"'libero_moon' .* knows: {KEY}"):
        model.decode(torch.zeros(1, 56).long(), "libero_moon")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_one_line(tmp_path, value):
    """As a disk's flipped bit in an exponent makes them; also in a small policy's folder."""
    folder = copy(tmp_path)
    tiny_vla.TinyVLA(STATS, channels=(4, 4, 4), width=16, basis=6).save_pretrained(tmp_path / "t")
    for path, name in ((folder, "projector.fc2.weight"), (tmp_path / "t", "fc2.weight")):
        tensors = load_file(path / "model.safetensors")
        tensors[name][3, 5] = value
        save_file(tensors, path / "model.safetensors")
        line = f"^{path}/model.safetensors: {name} holds what is no finite number"
        with pytest.raises(ValueError, match=line) as caught:
            policies.load_policy(path)
        assert "\n" not in str(caught.value)
        save_file(tensors | {name: tensors[name].short()}, path / "model.safetensors")
        with pytest.raises(ValueError, match=f"{name} holds what is no finite number"):
            policies.load_policy(path)


@pytest.mark.parametrize("name, value", [
    ("hidden_act", "gelu"), ("tie_word_embeddings", True), ("attention_dropout", 0.1),
    ("rms_norm_eps", 1.0), ("rms_norm_eps", 0), ("num_hidden_layers", 10**9),
    ("rope_theta", 500000.0), ("num_attention_heads", 3), ("hidden_size", 10**12),
])  # fmt: skip
def test_another_llama_than_the_second_is_one_line(tmp_path, name, value):
    """No shape shows these, or as many layers would be made first."""
    folder = copy(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^{folder}") as caught:
        policies.load_policy(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("norms", [
    [], [{"mean": [0.5] * 3, "std": [0.5] * 3}], [{"mean": [0.5] * 4, "std": [0.5] * 4}] * 2,
    [{"mean": [0.5] * 3, "std": [0.5, 0.5, 0.0]}] * 2, [{"mean": [0.5] * 3, "std": None}] * 2,
    [{"mean": [float("nan")] * 3, "std": [0.5] * 3}] * 2, [{"mean": [0.5] * 3}] * 2, None, {"a": 1},
])  # fmt: skip
def test_pixels_that_cannot_be_normalised_are_one_line(tmp_path, norms):
    folder = copy(tmp_path)
    content = json.loads((folder / "preprocessor_config.json").read_text())
    content["tvf_normalize_params"] = norms
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^{folder}.*preprocessor_config.json and") as caught:
        policies.load_policy(folder)
    assert "\n" not in str(caught.value)


def test_statistics_in_memory_are_checked_too(model):
    """Where a policy's are set by hand: the same line, with the key alone."""
    for value in ({"proprio": GOOD}, {"action": GOOD | {"q01": [None] * 7}}):
        with pytest.raises(ValueError, match="^'k' has no q01, q99 and mask of an action"):
            vla.action_stats({"k": value}, "k")
