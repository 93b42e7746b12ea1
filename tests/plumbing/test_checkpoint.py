"""plumbing/checkpoint.py: folders that are whole, damaged, half written, or on the hub."""
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from plumbing import checkpoint as checkpoints
from robots import policy as policies

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path):
    checkpoints.write_folder(tmp_path / "whole", {"config.json": {"model_type": "x"}}, {"tokenizer.json": b"{}"}, STATE)
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
    assert checkpoints.read_json(folder / "config.json") == {"model_type": "x"} and checkpoints.local_folder(folder) == folder
    assert all(torch.equal(x, STATE[name]) and x.dtype == STATE[name].dtype for name, x in load_file(folder / "model.safetensors").items())
    assert checkpoints.read_headers(folder) == {name: (folder / "model.safetensors", tuple(x.shape)) for name, x in STATE.items()}
    assert checkpoints.read_headers(sharded) == {name: (sharded / f"{i}.safetensors", tuple(x.shape)) for i, (name, x) in enumerate(STATE.items())}


def test_nothing_is_overwritten_or_left_half_done(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="nothing was overwritten"):
        checkpoints.write_folder(tmp_path / "mine", {}, {}, STATE)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.write_folder(tmp_path / "new", {"config.json": {}}, {}, STATE)
    assert not (tmp_path / "new").exists()
    checkpoints.write_folder(tmp_path / "new", {}, {}, STATE)                           # the next attempt cleans up
    assert sorted(os.listdir(tmp_path)) == ["mine", "new"] and os.listdir(tmp_path / "new") == ["model.safetensors"]


def truncate(file):
    with open(file, "r+b") as opened:
        opened.truncate(100)


@pytest.mark.parametrize("which, file, damage, error, words", [
    ("folder", "model.safetensors", truncate, ValueError, "model.safetensors is truncated"),
    ("folder", "model.safetensors", lambda file: file.write_bytes(b""), ValueError, "model.safetensors is truncated"),
    ("folder", "model.safetensors", os.remove, FileNotFoundError, "neither model.safetensors nor model.safetensors.index.json"),
    ("sharded", "1.safetensors", os.remove, FileNotFoundError, "1.safetensors is missing, though the index names it"),
    ("sharded", "model.safetensors.index.json", lambda file: file.write_text("[]"), ValueError, "index.json holds no JSON object; copy it again"),
    ("sharded", "model.safetensors.index.json", lambda file: file.write_text('{"weight'), ValueError, "index.json is not valid JSON")])
def test_damaged_weights_are_one_clear_line(request, which, file, damage, error, words):
    path = request.getfixturevalue(which)
    damage(path / file)
    with pytest.raises(error, match=words) as caught:
        checkpoints.read_headers(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, words", [("[]", "holds no JSON object"), ('{"model_', "is not valid JSON"), (None, "is missing")])
def test_a_damaged_config_is_one_clear_line(folder, content, words):
    (folder / "config.json").unlink() if content is None else (folder / "config.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"config.json {words}"):
        policies.load_policy(folder)


@pytest.mark.parametrize("path", ["no_such_folder", "./no/such", "a/b/c", "/no/such/folder", "~/model"])
def test_a_missing_folder_is_not_asked_from_the_hub(path):
    with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor a hub id"):
        checkpoints.local_folder(path)


def test_hub_ids_go_through_the_hub(monkeypatch, folder):
    import huggingface_hub
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: asked.update(name=name, **kwargs) or str(folder))
    assert checkpoints.local_folder("someone/openvla") == folder
    assert asked["name"] == "someone/openvla" and "*.safetensors" in asked["allow_patterns"]
    checkpoints.local_folder("someone/openvla", weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]

    def offline(*args, **kwargs):
        raise OSError("no route\nto host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"the hub did not give it \(no route to host\); give the folder of a downloaded copy"):
        checkpoints.local_folder("someone/openvla")
