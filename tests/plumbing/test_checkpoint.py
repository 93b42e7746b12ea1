"""plumbing/checkpoint.py: a kill at every operation of a save, full disks, damaged files."""

import math
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from plumbing import checkpoint, files
from plumbing.optimizer import clip_and_step, make_optimizer, optimizer_tensors


class TinyRun:
    """A bf16 and an fp32 layer; steps that depend on their number alone."""

    def __init__(self):
        torch.manual_seed(1)
        self.done = 0
        self.model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4))
        self.opt = make_optimizer(self.model, lr=1e-2)

    def step(self):
        self.done += 1
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(self.done))
        self.model[1](self.model[0](x.bfloat16()).float()).pow(2).sum().backward()
        clip_and_step(self.opt, self.model, 1.0)

    @property
    def tensors(self):
        return self.model.state_dict()

    def save(self, path):
        checkpoint.save(path, self.tensors, self.opt, {"step": self.done})

    def save_shards(self, path):
        """As three ranks write it: two of the four rows each, and none is left for the third."""
        self.save(path)
        whole = load_file(path / "00000.safetensors")
        for rank in range(3):
            rows = slice(2 * rank, 2 * rank + 2)
            own = {name: x[rows] for name, x in whole.items() if x.dim()}
            counts = {name: x for name, x in whole.items() if not x.dim() and rank == 0}
            save_file(own | counts, path / f"{rank:05}.safetensors")

    def load(self, path):
        checkpoint.load(path, self.tensors, self.opt)
        self.done = checkpoint.read_state(path)["step"]

    def everything(self):
        return {name: x.clone() for name, x in (self.tensors | optimizer_tensors(self.opt)).items()}


def after(steps: int) -> TinyRun:
    run = TinyRun()
    for _ in range(steps):
        run.step()
    return run


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x, b[name]) and x.dtype == b[name].dtype for name, x in a.items()
    )


# A run that goes on


@pytest.mark.parametrize("save", [TinyRun.save, TinyRun.save_shards])
def test_resume_is_bitwise(tmp_path, save):
    save(after(2), tmp_path / "c")
    second = after(1)  # disturbs weights and moments
    second.load(tmp_path / "c")
    assert second.done == 2
    for _ in range(3):
        second.step()
    a, b = after(5).everything(), second.everything()
    # weights; step, m, v and, in bf16, master of each
    assert same(a, b) and len(a) == 4 + 2 * 4 + 2 * 3


@pytest.mark.parametrize("save", [TinyRun.save, TinyRun.save_shards])
def test_a_run_that_has_made_no_step_is_resumed_too(tmp_path, save):
    save(TinyRun(), tmp_path / "c")
    second = after(1)
    second.load(tmp_path / "c")
    assert not second.opt.state and same(second.everything(), TinyRun().everything())


def test_tied_and_transposed_weights_are_saved(tmp_path):
    w, optimizer = torch.randn(3, 4), make_optimizer(nn.Linear(1, 1), 1e-3)
    tensors = {"embed": w, "head": w, "t": w.t(), "part": w[1:], "count": torch.tensor(3)}
    checkpoint.save(tmp_path / "c", tensors, optimizer, {})
    found = {name: torch.zeros_like(x) for name, x in tensors.items()}
    checkpoint.load(tmp_path / "c", found, optimizer)
    assert same(found, tensors)


def test_save_refuses_what_it_should_not_replace(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    run = after(1)
    with pytest.raises(ValueError, match="not a checkpoint folder; choose another --out"):
        run.save(tmp_path / "photos")
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(tmp_path / "c", run.tensors, run.opt, {"loss": math.nan})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["one.jpg", "photos"]
    for read in (checkpoint.find, checkpoint.read_state, run.load):
        with pytest.raises(FileNotFoundError, match="no checkpoint folder at .*c$"):
            read(tmp_path / "c")


# Kills: by the operating system's hand, so that nothing can be cleaned up


def killed(work, limit: int, after: bool) -> bool:
    """Whether a copy of this process that does the work dies at its limit-th file operation,
    before or after it."""
    if child := os.fork():
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    calls = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == limit and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            number = calls
            try:
                return function(*args, **kwargs)
            finally:  # also of what is not there to be unlinked
                if number == limit:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapper

    for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    checkpoint.save_file = counted(checkpoint.save_file)
    Path.write_text = counted(Path.write_text)
    try:
        work()
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
    os._exit(0)


@pytest.mark.parametrize("after", [False, True])
def test_a_save_killed_at_any_operation_leaves_a_whole_checkpoint(tmp_path, after):
    """A SIGKILL before or after the k-th file operation, for every k; then it is loaded, and the
    next save has the leftovers to deal with."""
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = make_optimizer(nn.ParameterList([parameter]), 1e-3)
    path, seen = tmp_path / "c", set()

    def save(step):
        optimizer.state[parameter] = {
            "step": torch.tensor(step),
            "m": torch.full((4,), -float(step)),
            "v": torch.zeros(4),
        }
        checkpoint.save(path, {"w": torch.full((4,), float(step))}, optimizer, {"step": step})

    def loaded() -> int:
        w, step = torch.empty(4), checkpoint.read_state(path)["step"]
        checkpoint.load(path, {"w": w}, optimizer)
        state = optimizer.state[parameter]
        assert (w == step).all() and (state["m"] == -step).all() and state["step"] == step
        return step

    save(0)
    for k in range(1, 100):
        previous = loaded()
        if not killed(lambda k=k: save(k), k, after):
            break
        step = loaded()
        assert step in (previous, k)
        seen.add("new" if step == k else "old" if path.exists() else "missing")
    assert k > 15 and seen == {"new", "old", "missing"}
    assert loaded() == k and [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("after", [False, True])
def test_a_small_file_killed_at_any_operation_is_whole(tmp_path, after):
    path = tmp_path / "before.json"
    files.write_json(path, {"k": 0})
    for k in range(1, 20):
        previous = files.read_json(path)["k"]
        if not killed(lambda k=k: files.write_json(path, {"k": k}), k, after):
            break
        assert files.read_json(path)["k"] in (previous, k)
    assert k > 4 and files.read_json(path) == {"k": k}
    assert [p.name for p in tmp_path.iterdir()] == ["before.json"]


# Full disks


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    run = after(1)
    run.save(tmp_path / "c")
    whole = run.everything()
    run.step()

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="c cannot be written .*No space left.*is the disk full"):
        run.save(tmp_path / "c")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    again = TinyRun()
    again.load(tmp_path / "c")
    assert again.done == 1 and same(again.everything(), whole)
    run.save(tmp_path / "c")  # what the failed one left is no hindrance
    assert checkpoint.read_state(tmp_path / "c") == {"step": 2}


@pytest.mark.parametrize("limit", [0, 10, 300, 700])
def test_a_disk_that_takes_no_more_bytes(tmp_path, limit):
    """The system's own refusal, of every file from the first to the last of a checkpoint."""
    run = after(1)
    run.save(tmp_path / "c")
    run.step()
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="c cannot be written .*What was there before is whole"):
            run.save(tmp_path / "c")
        with pytest.raises(OSError, match="x.json cannot be written"):
            files.write_json(tmp_path / "x.json", {"long": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert checkpoint.read_state(tmp_path / "c") == {"step": 1}


# Whole or not at all


def test_whole_replaces_files_and_folders(tmp_path):
    for content in ("one", "two"):
        with files.whole(tmp_path / "new" / "file") as draft:
            draft.write_text(content)
            assert draft.parent == tmp_path / "new"
        with files.whole(tmp_path / "folder") as draft:
            (draft / "deep").mkdir(parents=True)
            (draft / "deep" / content).write_text(content)
    assert (tmp_path / "new" / "file").read_text() == "two"
    assert [p.name for p in (tmp_path / "folder" / "deep").iterdir()] == ["two"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "new"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError("gone")])
def test_an_error_leaves_what_was_there(tmp_path, error):
    for write in (Path.mkdir, Path.touch):
        with pytest.raises(type(error)), files.whole(tmp_path / "x") as draft:
            write(draft)
            raise error
    assert list(tmp_path.iterdir()) == []


def test_json_files(tmp_path):
    path = tmp_path / "a" / "x.json"
    files.write_json(path, {"a": math.nan, "b": np.float32(0.5), "c": [torch.tensor(2)]})
    assert files.read_json(path) == {"a": None, "b": 0.5, "c": [2]}
    assert os.listdir(tmp_path / "a") == ["x.json"]


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "is missing; the folder is not complete"),
        (b"", "is truncated or corrupt"),
        (b'{"a": 1', "is truncated or corrupt"),
        (b"\xff\xfe", "is truncated or corrupt"),
        (b"[" * 100_000, "is truncated or corrupt"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is truncated or corrupt"),
        (b"[1]", "holds no JSON object"),
        (b"3", "holds no JSON object"),
    ],
)
def test_a_damaged_json_file_is_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json {words}") as error:
        files.read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is truncated or corrupt"):
        files.read_json(tmp_path)  # a folder


# Damaged checkpoints


@pytest.mark.parametrize("name", ["00000.safetensors", "00001.safetensors", "state.json"])
@pytest.mark.parametrize("fault", ["truncated", "header", "empty", "missing"])
def test_damaged_checkpoint_is_one_clear_line(tmp_path, name, fault):
    after(1).save_shards(tmp_path / "c")
    file = tmp_path / "c" / name
    if fault == "missing":
        file.unlink()
    else:
        data = file.read_bytes()
        damaged = {"truncated": data[:-3], "header": b"\xff" * 8 + data[8:], "empty": b""}
        file.write_bytes(damaged[fault])
    lost = fault == "missing" and name != "state.json"
    with pytest.raises(ValueError, match="rank's file is missing" if lost else name) as e:
        TinyRun().load(tmp_path / "c")
    assert "\n" not in str(e.value)


def mutations(data: bytes, n: int, seed: int):
    """n damaged copies: flipped, lost, doubled, foreign, zeroed bytes, cut ends; most of it in the
    first part, where the headers are."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            size = int(rng.integers(1, 9))
            end = len(changed) if rng.random() < 0.3 else max(1, len(changed) // 3)
            at = int(rng.integers(end))
            piece = changed[at : at + size]
            kind = rng.integers(6)
            if kind == 0:
                changed[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                del changed[at : at + size]
            elif kind == 2:
                changed[at:at] = piece
            elif kind == 3:
                changed[at : at + size] = rng.bytes(size)
            elif kind == 4:
                changed[at : at + size] = bytes(len(piece))
            else:
                del changed[at + len(changed) // 2 :]
        if bytes(changed) != data:
            yield bytes(changed)


@pytest.mark.parametrize(
    "name, save",
    [
        ("state.json", TinyRun.save),
        ("00000.safetensors", TinyRun.save),
        ("00000.safetensors", TinyRun.save_shards),
        ("00001.safetensors", TinyRun.save_shards),
    ],
)
def test_mutations_are_one_line_or_harmless(tmp_path, name, save):
    """Sixty of each file: one line, or what is loaded can be trained on."""
    save(after(1), tmp_path / "c")
    file, refused = tmp_path / "c" / name, 0
    for number, damaged in enumerate(mutations(file.read_bytes(), 60, seed=len(name))):
        file.write_bytes(damaged)
        run = TinyRun()
        try:
            run.load(tmp_path / "c")
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(tmp_path / "c") in str(error), (number, error)
            refused += 1
        except KeyError:
            assert name == "state.json"  # of this test's own state["step"]
        else:
            run.step()
            assert all(x.isfinite().all() for x in run.everything().values()), number
    assert refused > 20


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    for save in (TinyRun.save, TinyRun.save_shards):
        for name in ("0.weight", "optimizer.1.v"):
            run = after(1)
            run.everything()
            (run.tensors | optimizer_tensors(run.opt))[name].view(-1)[2] = math.inf
            save(run, tmp_path / "c")
            with pytest.raises(ValueError, match=f"{name} holds a number that is not finite"):
                TinyRun().load(tmp_path / "c")


@pytest.mark.parametrize("save", [TinyRun.save, TinyRun.save_shards])
@pytest.mark.parametrize("change", ["shape", "dtype", "more", "fewer"])
def test_another_model_s_checkpoint_is_one_line(tmp_path, save, change):
    other = TinyRun()
    other.model = {
        "shape": nn.Sequential(nn.Linear(4, 5).bfloat16(), nn.Linear(4, 4)),
        "dtype": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        "more": nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4), nn.Linear(4, 4)),
        "fewer": nn.Sequential(nn.Linear(4, 4).bfloat16()),
    }[change]
    other.opt = make_optimizer(other.model, 1e-2)
    save(after(1), tmp_path / "c")
    with pytest.raises(ValueError, match="another model's") as error:
        other.load(tmp_path / "c")
    assert "\n" not in str(error.value) and str(tmp_path / "c") in str(error.value)


def test_checkpoints_of_before_are_one_line(tmp_path):
    """Several ranks wrote .metadata, a pickle, and .distcp files: none is opened."""
    after(1).save(tmp_path / "c")
    (tmp_path / "c" / "00000.safetensors").rename(tmp_path / "c" / "__0_0.distcp")
    (tmp_path / "c" / ".metadata").write_bytes(b"cposix\nmkdir\n(Vattacked\ntR.")
    with pytest.raises(ValueError, match=f"{tmp_path}/c cannot be loaded .* file is missing"):
        TinyRun().load(tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["c"]
