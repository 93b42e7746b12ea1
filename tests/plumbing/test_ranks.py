"""plumbing/ranks.py with two gloo processes on the CPU: the steps of one process, checkpoints
across world sizes, a rank that is interrupted, has a full disk, or dies. What the scripts make of
it: test_scripts_on_ranks.py."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import grpo
import rewards
from plumbing import checkpoint, ranks
from plumbing.flags import RunSettings
from plumbing.optimizer import clip_and_step, make_optimizer, optimizer_tensors
from plumbing.run import Run
from plumbing.update import Update
from tests.conftest import lines

pytestmark = pytest.mark.slow        # processes that torchrun starts

ROOT = Path(__file__).parents[2]


def torchrun(*command, ranks: int = 2) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [*torchrun, *map(str, command)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=400, cwd=ROOT
    )


def on_ranks(file: str, folder: Path, *names: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """Run functions of a test file one after the other on ranks, each with folder/name."""
    for name in names:
        (folder / name).mkdir(exist_ok=True)
    done = torchrun(file, folder, *names, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_here(functions: dict) -> None:
    """What the ranks do with it."""
    torch.set_num_threads(1)
    ranks.start()
    for name in sys.argv[2:]:
        functions[name](Path(sys.argv[1]) / name)
    ranks.stop()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that takes its time to end


def save(tensors: dict, file: Path) -> None:
    if ranks.rank() == 0:
        save_file({name: x.contiguous() for name, x in tensors.items()}, file)


def steady(optimizer):
    """Adam makes whole steps of gradients that are rounding alone, in a direction that the number
    of threads decides; not with this epsilon."""
    optimizer.param_groups[0]["eps"] = 1e-5
    return optimizer


def same_numbers(row: dict, other: dict, **tolerance) -> None:
    """Of two rows of a log, but for the seconds."""
    names = {name for name in row if not name.startswith("seconds")}
    assert names == {name for name in other if not name.startswith("seconds")}
    for name in names:
        if row[name] is None:
            assert other[name] is None
        else:
            assert row[name] == pytest.approx(other[name], **tolerance), name


# What the ranks do. One process does the same when `ranks` is not started, as the tests call these
# functions directly too.


def line(counts: tuple[int, int], target_kl: float = 0.0) -> tuple[dict, dict]:
    """Six updates on seven rows, of which the ranks have so many -> (weights, statistics)."""
    torch.manual_seed(0)
    x, y, model = torch.randn(7, 3), torch.randn(7), torch.nn.Linear(3, 1)
    first = 0 if ranks.rank() == 0 else counts[0]
    mine = 7 if ranks.world_size() == 1 else counts[ranks.rank()]
    model = ranks.shard(model)
    optimizer = make_optimizer(model, 0.1)
    update = Update(model, steady(optimizer), grpo.merge_stats, 0.5, target_kl)
    torch.manual_seed(1 + ranks.rank())  # apart, as after rollouts
    for chosen in update.minibatches(mine, 2, 3):
        for part in update.micro_batches(chosen, lambda rows: rows.split(2)):
            own = [first + int(i) if mine else 0 for i in part]
            errors = (model(x[own]).squeeze(1) - y[own]).square()
            loss = errors.sum() / len(chosen)
            update.backward(
                loss,
                {
                    "loss": loss.detach(),
                    "old_kl": len(update.stats) + errors.detach().mean() / 100,
                    "tokens": torch.tensor(float(len(own))),
                    "ratio_max": errors.detach().max(),
                },
            )
        update.step()
    return ranks.on_first(model.named_parameters()), update.summary()


COUNTS = [(4, 3), (7, 0), (0, 7), (1, 6)]


def line_updates(folder: Path) -> None:
    for counts in COUNTS:
        weights, stats = line(counts)
        _, stopped = line(counts, target_kl=2.5)
        save(weights, folder / f"{counts}.safetensors")
        if ranks.rank() == 0:
            (folder / f"{counts}.json").write_text(json.dumps([stats, stopped]))


def bf16_model() -> torch.nn.Module:
    torch.manual_seed(0)
    # 7, 5 and 3 rows: uneven shards
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).bfloat16()


def bf16_steps(model, optimizer, steps: range) -> list[float]:
    norms = []
    for step in steps:
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(x).float().square().mean().backward()
        norms.append(clip_and_step(optimizer, model, 0.1)[0])
    return norms


def bf16(folder: Path) -> None:
    model = ranks.shard(bf16_model())
    optimizer = make_optimizer(model, 1e-3)
    norms = bf16_steps(model, optimizer, range(3))
    for _ in range(2):  # the second replaces the first
        checkpoint.save(
            folder / "checkpoint",
            dict(model.named_parameters()),
            optimizer,
            {"step": 3, "norms": norms},
        )


def bf16_resume(folder: Path) -> None:
    """From a checkpoint of one process."""
    model = ranks.shard(bf16_model())
    optimizer = make_optimizer(model, 1e-3)
    checkpoint.load(folder / "single", dict(model.named_parameters()), optimizer)
    bf16_steps(model, optimizer, range(3, 5))
    weights = ranks.on_first(model.named_parameters())
    save(weights, folder / "resumed.safetensors")


def crossed(folder: Path) -> None:
    """Save on so many ranks, with a layer of one row, a number and the first layer's weights once
    more under another name; then load what any number of ranks has saved so far."""

    def made():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 1)).bfloat16()
        model = ranks.shard(model)
        optimizer = make_optimizer(model, 1e-2)
        extra = {"n": torch.tensor(0), "table": torch.zeros(3, 2), "tied": model[0].weight}
        return model, optimizer, dict(model.named_parameters()) | extra

    def numbers(optimizer, tensors) -> dict:
        return ranks.on_first((tensors | optimizer_tensors(optimizer)).items())

    model, optimizer, tensors = made()
    tensors["n"] += 7
    tensors["table"][1] = torch.tensor([1.0, 2.0])
    bf16_steps(model, optimizer, range(2))
    here = folder / str(ranks.world_size())
    checkpoint.save(here, tensors, optimizer, {})
    save({name: x.clone() for name, x in numbers(optimizer, tensors).items()},
         folder / f"{here.name}.safetensors")
    ranks.barrier()
    for saved in sorted(folder.glob("*.safetensors")):
        model, optimizer, tensors = made()
        checkpoint.load(saved.with_suffix(""), tensors, optimizer)
        found, wanted = numbers(optimizer, tensors), load_file(saved)
        assert len(wanted) == 4 + 3 + 4 * 4
        assert set(found) == (set() if ranks.rank() else set(wanted))
        for name, x in found.items():
            assert torch.equal(wanted[name], x) and wanted[name].dtype == x.dtype, name
    (folder / f"loaded-{here.name}-{ranks.rank()}").touch()


def full_disk(folder: Path) -> None:
    """The second rank's, when it writes its shards: both say so, and the one before is whole."""
    bf16(folder)
    import resource

    if ranks.rank():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    model = ranks.shard(bf16_model())
    optimizer = make_optimizer(model, 1e-3)
    try:
        checkpoint.save(
            folder / "checkpoint", dict(model.named_parameters()), optimizer, {"step": 4}
        )
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (folder / f"full-{ranks.rank()}").write_text(str(error))


def reward(folder: Path) -> None:
    """Each rank knows its own rollouts' latents; all ranks see all."""
    latents, success, task = latent_case()
    mine = ranks.share(range(len(task)))
    own = [(latents[i], success[i], task[i]) for i in mine]
    gathered = [np.array(x) for x in zip(*ranks.gather(own), strict=True)]
    paid = rewards.progress_reward(*gathered)[0]
    (folder / f"reward-{ranks.rank()}.json").write_text(json.dumps(paid.tolist()))


def latent_case():
    rng = np.random.default_rng(0)
    success = np.array([False] * 6 + [True] * 6)  # the first rank has failures alone
    return rng.standard_normal((12, 4)) + success[:, None], success, ["a", "b"] * 6


def verbs(folder: Path) -> None:
    """What a Run asks of the ranks."""
    run = Run(RunSettings(), folder, {"stage": "", "step": 0, "ended": False}, "x.py")
    found = {
        "mine": run.mine(range(5)),
        "gather": run.gather([ranks.rank()]),
        "first": ranks.first(lambda: os.getpid()),
        "write": run.write("w.json", {"a": ranks.rank()}),
        "once": run.once("once.json", lambda: {"rank": ranks.rank()}),
        "said": run.say("said once"),
    }
    ranks.barrier()
    found |= {"read": run.read("w.json"), "again": run.once("once.json", lambda: {"rank": 9})}
    (folder / f"verbs-{ranks.rank()}.json").write_text(json.dumps(found))
    print("only the first rank prints")


def interrupted(folder: Path) -> None:
    """Ctrl-C that reaches the second rank alone, in the middle of a step."""
    model = ranks.shard(bf16_model())
    run = Run(RunSettings(save_every=10), folder, None, "x.py")
    run.keep(dict(model.named_parameters()), make_optimizer(model, 1e-3))
    for step in run.steps(5):
        if step == 2 and ranks.rank():
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        run.log({"x": step})
    (folder / f"stopped-{ranks.rank()}").write_text(f"{run.step} {run.finished}")


def death(folder: Path) -> None:
    if ranks.rank():
        raise SystemExit(7)
    ranks.gather([])
    (folder / "survived").touch()


# The tests


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """All of it in one torchrun: starting takes longer than the work."""
    folder, model = tmp_path_factory.mktemp("ranks"), bf16_model()
    optimizer = make_optimizer(model, 1e-3)
    bf16_steps(model, optimizer, range(3))
    single = folder / "bf16_resume" / "single"
    checkpoint.save(single, dict(model.named_parameters()), optimizer, {"step": 3})
    names = ("line_updates", "bf16", "bf16_resume", "reward", "verbs", "interrupted", "full_disk")
    (folder / "stdout").write_text(on_ranks(__file__, folder, *names).stdout)
    return folder


def test_two_ranks_take_the_steps_of_one(done):
    """Weights and statistics, however the rows lie on them; also where one has none, and where a
    target KL ends the updates."""
    for counts in COUNTS:
        weights, stats = line(counts)
        _, stopped = line(counts, target_kl=2.5)
        two = load_file(done / "line_updates" / f"{counts}.safetensors")
        assert stats["updates"] == 6 and stopped["updates"] == 3
        for name, x in weights.items():
            torch.testing.assert_close(two[name], x, atol=1e-6, rtol=0)
        for one, other in zip(
            (stats, stopped),
            json.loads((done / "line_updates" / f"{counts}.json").read_text()),
            strict=True,
        ):
            same_numbers(one, other, rel=1e-4)


def test_bf16_shards_train_and_resume_on_one_process(done):
    """Two ranks save after three steps; one process goes on and equals one that did it all:
    weights, masters, moments."""
    folder = done / "bf16"
    state = checkpoint.read_state(folder / "checkpoint")
    whole = bf16_model()
    optimizer = make_optimizer(whole, 1e-3)
    norms = bf16_steps(whole, optimizer, range(3))
    assert state["norms"] == pytest.approx(norms, rel=1e-2)  # gradients are bf16
    resumed = bf16_model()
    loaded = make_optimizer(resumed, 1e-3)
    checkpoint.load(folder / "checkpoint", dict(resumed.named_parameters()), loaded)
    ours, theirs = optimizer_tensors(loaded), optimizer_tensors(optimizer)
    assert set(ours) == set(theirs)
    for key, x in theirs.items():
        assert ours[key].dtype == x.dtype
        torch.testing.assert_close(
            ours[key], x, atol=1e-5, rtol=1e-2, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert os.listdir(folder) == ["checkpoint"]


def test_a_checkpoint_of_one_process_resumes_on_two(done):
    """`done` holds it."""
    model = bf16_model()
    optimizer = make_optimizer(model, 1e-3)
    bf16_steps(model, optimizer, range(5))
    for name, x in load_file(done / "bf16_resume" / "resumed.safetensors").items():
        torch.testing.assert_close(x, model.state_dict()[name], atol=1e-5, rtol=0)


def test_a_damaged_or_foreign_checkpoint_is_one_line(done, tmp_path):
    shutil.copytree(done / "bf16" / "checkpoint", tmp_path / "checkpoint")
    other = torch.nn.Linear(7, 5)

    def load(model):
        with pytest.raises(ValueError, match=f"^{tmp_path}/checkpoint cannot be loaded ") as error:
            checkpoint.load(
                tmp_path / "checkpoint", dict(model.named_parameters()), make_optimizer(model, 1e-3)
            )
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "another model's" in load(other)
    parts = {part: part.read_bytes() for part in (tmp_path / "checkpoint").glob("*.safetensors")}
    assert len(parts) == 2
    for part, content in parts.items():
        part.write_bytes(content[:100])
        load(bf16_model())
        part.unlink()
        load(bf16_model())
        part.write_bytes(content)
    checkpoint.load(
        tmp_path / "checkpoint",
        dict((model := bf16_model()).named_parameters()),
        make_optimizer(model, 1e-3),
    )


def test_what_any_number_of_ranks_saves_any_number_loads(tmp_path):
    """One, two and three, bit by bit; of one row two ranks of three have none."""
    (tmp_path / "crossed").mkdir()
    for n in (1, 2, 3, 2, 1):
        if n == 1:
            crossed(tmp_path / "crossed")
        else:
            on_ranks(__file__, tmp_path, "crossed", ranks=n)
    done = sorted(file.name for file in (tmp_path / "crossed").glob("loaded-*"))
    assert done == [f"loaded-{n}-{rank}" for n in (1, 2, 3) for rank in range(n)]


def test_a_full_disk_of_one_rank_is_one_line_of_each(done):
    folder = done / "full_disk"
    for rank in range(2):
        said = (folder / f"full-{rank}").read_text()
        assert "\n" not in said and "File too large" in said
    assert "checkpoint cannot be written" in (folder / "full-0").read_text()
    assert checkpoint.read_state(folder / "checkpoint")["step"] == 3
    assert not (folder / "checkpoint.tmp").exists()


def test_the_reference_set_is_the_whole_batch_s(done):
    folder = done / "reward"
    expected = rewards.progress_reward(*latent_case())[0]
    assert 0 < expected[:6].max() < 1  # the first rank alone, without successes, would pay 0
    for rank in range(2):
        paid = json.loads((folder / f"reward-{rank}.json").read_text())
        assert paid == pytest.approx(expected.tolist())


def test_the_verbs_of_a_run(done):
    folder = done / "verbs"
    one, two = (json.loads((folder / f"verbs-{rank}.json").read_text()) for rank in range(2))
    assert one["mine"] + two["mine"] == [0, 1, 2, 3, 4] and one["mine"] and two["mine"]
    for found in (one, two):
        assert found["gather"] == [0, 1] and found["first"] == one["first"]
        assert found["read"] == {"a": 0} and found["again"] == {"rank": 0}
    said = (done / "stdout").read_text()
    assert said.count("only the first rank prints") == said.count("said once") == 1


def test_ctrl_c_on_one_rank_stops_both_after_the_same_step(done):
    folder = done / "interrupted"
    assert [(folder / f"stopped-{rank}").read_text() for rank in range(2)] == ["2 False"] * 2
    assert checkpoint.read_state(folder / "checkpoint")["step"] == 2
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2]


def test_a_rank_that_dies_ends_the_other(tmp_path):
    (tmp_path / "death").mkdir()
    done = torchrun(__file__, tmp_path, "death")
    assert done.returncode != 0 and not (tmp_path / "death" / "survived").exists()


def test_alone_all_of_it_is_an_identity():
    model = torch.nn.Linear(2, 2)
    assert ranks.share([3, 1, 2]) == [3, 1, 2] and ranks.gather([1]) == [1]
    assert ranks.first(lambda: 5) == 5 and ranks.rank() == 0 and ranks.world_size() == 1
    ranks.start(), ranks.barrier(), ranks.stop()
    assert ranks.shard(model) is model and set(ranks.trainable(model)) == {"weight", "bias"}
    with ranks.whole_weights(model):
        assert ranks.divided(model.weight, model.weight) is ranks.local(model.weight)
    assert ranks.on_first([("w", model.weight)])["w"].data_ptr() == model.weight.data_ptr()


if __name__ == "__main__":
    run_here(globals())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    assert ranks.device("cpu") == ranks.device() == "cpu"
    with pytest.raises(ValueError, match="^--device cuda:1: PyTorch finds no GPU here; leave"):
        ranks.device("cuda:1")


KEPT = """
import ctypes, torch
from plumbing import ranks

class Info(ctypes.Structure):       # struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
ranks.use_cores(1)
before = mallinfo()
x = torch.ones(2**22)
mapped = mallinfo().hblks - before.hblks
del x
print(torch.get_num_threads(), mapped, mallinfo().arena - before.arena >= 2**24)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_freed_memory_is_kept_for_the_next_batch():
    """Else each tensor of 16 MiB would be mapped, and given back: page faults at every use."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("1 0 True\n", "")


def test_another_c_library_only_gets_its_threads(monkeypatch):
    monkeypatch.setattr(ranks.ctypes, "CDLL", lambda _: SimpleNamespace())
    ranks.use_cores(1)
    assert torch.get_num_threads() == 1
    ranks.use_cores(0)
    assert torch.get_num_threads() == os.cpu_count()
