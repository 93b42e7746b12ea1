"""studies/bench.py: real sizes without memory for them, FLOPs against arithmetic, a measured case end to end, an unmeasured one that says so."""
import json

import pytest

from studies import bench


@pytest.mark.parametrize("name, parameters", [("openvla-7b", 7.541e9), ("qwen2.5-vl-7b", 8.292e9), ("vjepa2-vitg", 1.034e9)])
def test_large_models_have_the_published_sizes(name, parameters):
    _, model = bench.build(bench.Case(name), "meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)


def test_flops_are_two_per_weight_and_token():
    case = bench.Case("openvla-small", rows=1)
    s, model = bench.build(case, "cpu")
    forward = bench.openvla_work(case, s, model).forward
    tokens = 256 + 24 + 57
    blocks = {"vision_backbone.featurizer.blocks": 261, "vision_backbone.fused_featurizer.blocks": 256, "projector": 256, "language_model.model.layers": tokens}
    last = tuple(f"vision_backbone.{tower}.blocks.3." for tower in ("featurizer", "fused_featurizer"))          # never run
    expected = sum(2 * p.numel() * count for name, p in model.named_parameters() for prefix, count in blocks.items()
                   if name.startswith(prefix) and p.ndim == 2 and not name.startswith(last))
    wide = sum(4 * count**2 * width * depth for count, width, depth in ((261, 128, 3), (256, 144, 3), (tokens, 256, 4)))       # attention: q k, and with v
    patches = 256 * 2 * 3 * 14**2 * (128 + 144)
    head = 2 * 256 * 56 * 256
    assert bench.flops(forward) == pytest.approx(expected + wide + patches + head, rel=0.01)


@pytest.mark.parametrize("rank, backward", [(0, 2), (4, 1)])
def test_the_update_of_a_frozen_tower_is_counted_once(rank, backward, monkeypatch):
    """Against the FLOPs of the update itself: its forward passes and what autograd does."""
    case = bench.Case("qwen2.5-vl-small", lora_rank=rank, rows=2)
    s, model = bench.build(case, "cpu")
    work = bench.qwen_work(case, s, model)
    once, still = bench.flops(work.forward), bench.flops(work.frozen)
    with bench.flop_counter() as counter:
        work.update()
    assert 0.1 * once < still < 0.9 * once
    assert (1 + backward) * (once - still) + still == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_a_small_case_is_measured(tmp_path):
    out = tmp_path / "small.json"
    assert bench.main(["--model", "vjepa2-small", "--out", str(out)]) == 0
    [row] = json.loads(out.read_text())["rows"]
    assert row["measured"] and row["rollout"]["per_second"] == pytest.approx(4 / row["rollout"]["seconds"])
    assert row["rollout"]["mfu"] == pytest.approx(row["forward_flops"] / row["rollout"]["seconds"] / row["peak_flops"]) and row["rollout"]["peak_gib"] > 0.1


def test_what_was_not_measured_says_so_with_its_command(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    row = bench.run(bench.Case("openvla-7b"))
    assert not row["measured"] and "GPU" in row["why"]
    assert "not measured" in bench.show(row)
    assert "python -m studies.bench --model openvla-7b" in bench.show(row)
