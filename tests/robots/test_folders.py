"""Checkpoint folders of policies, as robots/openvla.py reads and writes them: whole, damaged, half
written, or on the hub."""

import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from robots import openvla as folders
from robots import policy as policies

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path):
    jsons, files = {"config.json": {"model_type": "x"}}, {"tokenizer.json": b"{}"}
    folders.write_folder(tmp_path / "whole", jsons, files, STATE)
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
    assert folders.read_json(folder / "config.json") == {"model_type": "x"}
    assert folders.local_folder(folder) == folder
    for name, x in load_file(folder / "model.safetensors").items():
        assert torch.equal(x, STATE[name]) and x.dtype == STATE[name].dtype
    shapes = {name: tuple(x.shape) for name, x in STATE.items()}
    assert folders.read_headers(folder) == {
        name: (folder / "model.safetensors", shape) for name, shape in shapes.items()
    }
    assert folders.read_headers(sharded) == {
        name: (sharded / f"{i}.safetensors", shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def test_nothing_is_overwritten_or_left_half_done(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="nothing was overwritten"):
        folders.write_folder(tmp_path / "mine", {}, {}, STATE)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            folders.write_folder(tmp_path / "new", {"config.json": {}}, {}, STATE)
    assert not (tmp_path / "new").exists()
    folders.write_folder(tmp_path / "new", {}, {}, STATE)  # the next attempt cleans up
    assert sorted(os.listdir(tmp_path)) == ["mine", "new"]
    assert os.listdir(tmp_path / "new") == ["model.safetensors"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(folders, "save_file", full)
    with pytest.raises(OSError, match="new cannot be written .*is the disk full") as caught:
        folders.write_folder(tmp_path / "new", {"config.json": {}}, {}, STATE)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


def truncate(file):
    with open(file, "r+b") as opened:
        opened.truncate(100)


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(
    "which, file, damage, error, words",
    [
        ("folder", WEIGHTS, truncate, ValueError, f"{WEIGHTS} is truncated"),
        ("folder", WEIGHTS, lambda f: f.write_bytes(b""), ValueError, f"{WEIGHTS} is truncated"),
        ("folder", WEIGHTS, os.remove, FileNotFoundError, f"neither {WEIGHTS} nor {INDEX}"),
        (
            "sharded",
            "1.safetensors",
            os.remove,
            FileNotFoundError,
            "1.safetensors is missing, though the index names it",
        ),
        (
            "sharded",
            INDEX,
            lambda f: f.write_text("[]"),
            ValueError,
            "index.json holds no JSON object; copy it again",
        ),
        (
            "sharded",
            INDEX,
            lambda f: f.write_text('{"weight'),
            ValueError,
            "index.json is not valid JSON",
        ),
    ],
)
def test_damaged_weights_are_one_clear_line(request, which, file, damage, error, words):
    path = request.getfixturevalue(which)
    damage(path / file)
    with pytest.raises(error, match=words) as caught:
        folders.read_headers(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, words",
    [("[]", "holds no JSON object"), ('{"model_', "is not valid JSON"), (None, "is missing")],
)
def test_a_damaged_config_is_one_clear_line(folder, content, words):
    config = folder / "config.json"
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"config.json {words}"):
        policies.load_policy(folder)


@pytest.mark.parametrize("path", ["no_such_folder", "./no/such", "a/b/c", "/no/folder", "~/model"])
def test_a_missing_folder_is_not_asked_from_the_hub(path):
    with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor a hub id"):
        folders.local_folder(path)


def test_hub_ids_go_through_the_hub(monkeypatch, folder):
    import huggingface_hub

    asked = {}

    def download(name, **kwargs):
        asked.update(name=name, **kwargs)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert folders.local_folder("someone/openvla") == folder
    assert asked["name"] == "someone/openvla" and "*.safetensors" in asked["allow_patterns"]
    folders.local_folder("someone/openvla", weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]

    def offline(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"did not give it \(no route to host\); give the"):
        folders.local_folder("someone/openvla")
