"""plumbing/run.py: a kill at every operation of a save, damaged files, logs cut off in mid-line."""
import json
import math
import os

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import grpo
from plumbing import run as job


# checkpoints

def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    x = {"w": torch.ones(3)}
    job.save_checkpoint(tmp_path / "c", model_tensors=x, trainer_tensors={}, state={"step": 1})

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(job, "save_file", full)
    with pytest.raises(OSError, match="c.tmp cannot be written .*No space left.*is the disk full"):
        job.save_checkpoint(tmp_path / "c", model_tensors=x, trainer_tensors={}, state={"step": 2})
    monkeypatch.undo()
    assert job.load_checkpoint(tmp_path / "c")[2] == {"step": 1}
    job.save_checkpoint(tmp_path / "c", model_tensors=x, trainer_tensors={}, state={"step": 2})             # what the failed one left is no hindrance
    assert job.read_state(tmp_path / "c") == {"step": 2}


class TinyRun:
    """A bf16 and an fp32 layer; steps that depend on their number alone."""

    def __init__(self):
        torch.manual_seed(1)
        self.done = 0
        self.model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4))
        self.opt = grpo.make_optimizer(self.model, lr=1e-2)

    def step(self):
        self.done += 1
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(self.done))
        self.model[1](self.model[0](x.bfloat16()).float()).pow(2).sum().backward()
        grpo.clip_and_step(self.opt, self.model, 1.0)

    def save(self, path, step):
        job.save_checkpoint(path, model_tensors=self.model.state_dict(), state={"step": step},
                             trainer_tensors=grpo.optimizer_tensors(self.opt))


def test_resume_is_bitwise(tmp_path):
    straight = TinyRun()
    for _ in range(5):
        straight.step()
    first = TinyRun()
    for _ in range(2):
        first.step()
    first.save(tmp_path / "c", 2)
    second = TinyRun()
    second.step()  # disturb weights and moments
    model, trainer, state = job.load_checkpoint(tmp_path / "c")
    second.model.load_state_dict(model)
    grpo.load_optimizer_tensors(second.opt, trainer)
    second.done = 2
    assert state == {"step": 2}
    for _ in range(3):
        second.step()
    a, b = (run.model.state_dict() | grpo.optimizer_tensors(run.opt) for run in (straight, second))
    assert a.keys() == b.keys() and len(a) == 4 + 2 * 4 + 2 * 3  # weights; step, m, v and, in bf16, master of each
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
def test_a_save_killed_at_any_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch, after):
    """Raises before or after the k-th file operation, for every k, then loads; then saves again over the leftovers."""
    calls, limit = 0, None

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == limit and not after:
                raise Killed
            result = function(*args, **kwargs)
            if calls == limit:
                raise Killed
            return result
        return wrapper

    for module, name in (*((os, n) for n in ("rename", "fsync", "unlink", "rmdir", "mkdir")), (job, "save_file")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    path, seen = tmp_path / "c", set()

    def save(step):
        job.save_checkpoint(path, model_tensors={"w": torch.full((4,), step)},
                             trainer_tensors={"m": torch.full((4,), -step)}, state={"step": step})

    save(0)
    for k in range(1, 100):
        calls, limit = 0, k
        previous = job.load_checkpoint(path)[2]["step"]
        try:
            save(k)
            break
        except Killed:
            model, trainer, state = job.load_checkpoint(path)
            assert state["step"] in (previous, k)
            assert (model["w"] == state["step"]).all() and (trainer["m"] == -state["step"]).all()
            seen.add("new" if state["step"] == k else "old" if path.exists() else "missing")
    assert k > 15 and seen == {"new", "old", "missing"}
    assert job.load_checkpoint(path)[2]["step"] == k and [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors", "state.json"])
@pytest.mark.parametrize("fault", ["truncated", "header", "empty", "missing"])
def test_damaged_checkpoint_is_one_clear_line(tmp_path, name, fault):
    TinyRun().save(tmp_path / "c", 1)
    file = tmp_path / "c" / name
    if fault == "missing":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes({"truncated": data[:-3], "header": b"\xff" * 8 + data[8:], "empty": b""}[fault])
    with pytest.raises(ValueError, match=name) as e:
        job.load_checkpoint(tmp_path / "c")
    assert "\n" not in str(e.value)


def test_save_refuses_what_it_should_not_replace(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    with pytest.raises(ValueError, match="not a checkpoint"):
        TinyRun().save(tmp_path / "photos", 1)
    with pytest.raises(ValueError, match="plain finite JSON"):
        job.save_checkpoint(tmp_path / "c", model_tensors={}, trainer_tensors={}, state={"loss": math.nan})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["one.jpg", "photos"]
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        job.load_checkpoint(tmp_path / "c")


def test_tied_and_transposed_weights_are_saved(tmp_path):
    w = torch.randn(3, 4)
    job.save_checkpoint(tmp_path / "c", model_tensors={"embed": w, "head": w, "t": w.t()}, trainer_tensors={}, state={})
    model = job.load_checkpoint(tmp_path / "c")[0]
    assert torch.equal(model["embed"], w) and torch.equal(model["head"], w) and torch.equal(model["t"], w.t())


# the metrics log

def test_metrics_log_resumes_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = job.MetricsLog(path)
    for step in range(1, 6):
        log.append({"step": step, "loss": torch.tensor(0.5 * step), "kl": math.nan,
                    "tasks": {"a": np.float32(0.25), "b": [math.inf, 1]}})
    assert len(path.read_text().splitlines()) == 5  # flushed, not only closed
    log.close()
    with open(path, "a") as f:
        f.write('{"step": 6, "lo')  # SIGKILL in mid-write
    with pytest.raises(ValueError, match="already has 6 rows"):
        job.MetricsLog(path)
    log = job.MetricsLog(path, resume_step=3)
    log.append({"step": 4, "loss": 9.0})
    log.close()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and rows[3]["loss"] == 9.0
    assert rows[1] == {"step": 2, "loss": 1.0, "kl": None, "tasks": {"a": 0.25, "b": [None, 1]}}
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_metrics_log_keeps_a_whole_last_line_and_refuses_a_broken_middle(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    job.MetricsLog(path, resume_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        job.MetricsLog(path, resume_step=3)
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 3}\n'
    log = job.MetricsLog(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="integer 'step'"):
        log.append({"loss": 1.0})
    log.close()
