"""studies/train_world_model.py: masks, what encoder and target may see; a run; bad input."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import VJEPA2Config, VJEPA2Model

from robots.trajectories import Trajectory, save
from studies import train_world_model as wmt
from tests.test_world_model import SMALL, squares


def test_masks_are_disjoint_and_cover():
    config, generator, seen = VJEPA2Config(**SMALL), torch.Generator().manual_seed(0), set()
    for _ in range(200):
        for context, target in wmt.sample_masks(config, generator):
            assert len(context) and len(target)
            assert sorted(context.tolist() + target.tolist()) == list(range(64))
            seen.add(tuple(target.tolist()))
    assert len(seen) > 50


def test_context_encoder_sees_only_the_context():
    torch.manual_seed(0)
    encoder, everything = VJEPA2Model(VJEPA2Config(**SMALL)).eval().encoder, torch.arange(64)
    pixels = torch.randn(2, 8, 3, 32, 32)
    whole = encoder(pixel_values_videos=pixels).last_hidden_state
    torch.testing.assert_close(wmt.encode_context(encoder, pixels, everything), whole)
    context = everything[16:]  # the first two frames are hidden
    changed = pixels.clone()
    changed[:, :2] += 1
    assert torch.equal(
        wmt.encode_context(encoder, pixels, context), wmt.encode_context(encoder, changed, context)
    )


def test_target_gets_no_gradient_and_moves_by_ema():
    torch.manual_seed(0)
    model = VJEPA2Model(VJEPA2Config(**SMALL))
    target = copy.deepcopy(model.encoder)
    pixels = torch.randn(3, 8, 3, 32, 32)
    wmt.jepa_loss(
        model, target, pixels, wmt.sample_masks(model.config, torch.Generator().manual_seed(0))
    ).backward()
    assert all(p.grad is None for p in target.parameters())
    online = [
        p for name, p in model.named_parameters() if not name.endswith("key.bias")
    ]  # softmax ignores that one
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in online)
    before = [p.clone() for p in target.parameters()]
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(torch.randn_like(p))
    wmt.ema_update(target, model.encoder, 0.9)
    after = zip(before, target.parameters(), model.encoder.parameters(), strict=True)
    for old, new, online in after:
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)


@pytest.mark.slow
def test_training_lowers_the_loss_without_collapse():
    log = []
    trained = wmt.train_world_model(
        squares(64), wmt.Settings(steps=60, batch_size=8), VJEPA2Config(**SMALL),
        report=lambda step, numbers, _: log.append((step, numbers)))
    assert [step for step, _ in log] == list(range(0, 61, 6))
    assert log[-1][1]["loss"] < 0.7 * log[0][1]["loss"]
    assert log[-1][1]["latent_std"] > 0.3 * log[0][1]["latent_std"] > 0
    assert torch.isfinite(trained.encode(list(squares(2)))).all()


def test_training_is_reproducible():
    s, config = wmt.Settings(steps=3, batch_size=4, seed=1), VJEPA2Config(**SMALL)
    a, b = (wmt.train_world_model(squares(8), s, config).model.parameters() for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_command(tmp_path, capsys):
    data, model = tmp_path / "data", tmp_path / "model"
    for i, video in enumerate(squares(12, size=64)):
        save(data / f"{i}.npz", Trajectory("x", i % 3 > 0, video[:7], np.zeros((48, 7))))
    assert wmt.main(["--data", str(data), "--out", str(model), "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "latent_std" in out and "success nearer" in out
    assert (model / "model.safetensors").stat().st_size < 4e6


def test_help_needs_no_torch():
    code = (
        "import sys; from studies import train_world_model as wmt\n"
        "try: wmt.main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'mujoco'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"


def test_a_loss_that_diverges_is_one_line():
    with pytest.raises(ValueError, match="the loss became nan at step 1: lower lr, now inf"):
        wmt.train_world_model(squares(4), wmt.Settings(steps=2, batch_size=2, lr=math.inf),
                              VJEPA2Config(**SMALL))


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--out"),
        (["--out", "{}"], "exists"),
        (["--out", "{}/no/model"], "no such folder"),
        (["--data", "{}/none", "--out", "{}/m"], "/none: a folder of .npz files"),
        (["--data", "{}", "--out", "{}/m"], "good.npz: images are missing"),
        (["--out", "{}/m", "--steps", "-1"], "steps"),
        (["--out", "{}/m", "--batch-size", "0"], "--batch_size must be at least 1"),
        (["--out", "{}/m", "--lr", "nan"], "--lr must be positive"),
    ],
)
def test_bad_command_lines(tmp_path, capsys, argv, message):
    np.savez(tmp_path / "good.npz", instruction="x", success=True, actions=np.zeros((8, 7)))
    assert wmt.main([word.format(tmp_path) for word in argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "m").exists()
