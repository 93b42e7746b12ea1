"""reasoning/sft.py on a tiny Qwen2.5-VL: the gradient against torch's cross-entropy. Whole runs, resumed ones and several ranks: test_reflection_srpo.py, test_parallel.py."""
import pytest
import torch

from reasoning import arrows
import grpo
from reasoning import responses as reflection_rollouts
from reasoning import sft as reflection_sft
import reflection_srpo as rs


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_gradient_is_cross_entropy_on_the_response(base, tmp_path, monkeypatch):
    """Against torch's cross-entropy with the prompt's labels at -100, one padded batch through the model's own loss."""
    rows = arrows.dataset(4, 3, targets=True)
    s = rs.Settings(sft_epochs=1, sft_batch=4, micro_tokens=1)
    model, processor = rs.load(s, base)
    seen = []
    monkeypatch.setattr(grpo, "clip_and_step", lambda optimizer, model, norm: (seen.append(gradient(model)), optimizer.zero_grad(), (1.0, True))[-1])
    saved = []
    assert reflection_sft.fine_tune(s, tmp_path, model, processor, rows, 0, grpo.make_optimizer(model, 1e-3), None, saved.append) == 1 and saved == [1]
    _, prompts = reflection_rollouts.encode(rows, s, processor, None)
    inputs, ids, mask = processor.batch(prompts, [processor.target(row.target) for row in rows])
    labels = inputs["input_ids"].clone()
    labels[:, :-ids.shape[1]] = -100
    labels[:, -ids.shape[1]:][~mask] = -100
    logits = model(**inputs).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    torch.testing.assert_close(seen[0], gradient(model), atol=1e-6, rtol=1e-4)


def test_rows_without_targets_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="arrows has no target to imitate; make targets with: python -m reasoning.teacher"):
        reflection_sft.fine_tune(rs.Settings(), tmp_path, None, None, arrows.dataset(2, 0), 0, None, None, None)
