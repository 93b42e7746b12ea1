"""plumbing/adapters.py against peft, a policy's own past, and an average by hand."""

import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from plumbing import adapters, ranks

LAYERS = ["body.0", "body.2"]


def model(dtype=torch.float32) -> nn.Module:
    """Two layers that get adapters, and a head that does not."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False))
    return nn.ModuleDict({"body": body, "head": nn.Linear(5, 3)}).to(dtype)


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model["head"](model["body"](x))


def moved(model: nn.Module) -> nn.Module:
    for p in ranks.trainable(model).values():
        nn.init.normal_(p, std=0.3)
    return model


def test_only_adapters_train_and_they_are_fp32():
    policy = adapters.add_adapters(model(torch.bfloat16), LAYERS, 2, seed=3)
    trained = ranks.trainable(policy)
    assert {name: tuple(p.shape) for name, p in trained.items()} == {
        "body.0.lora_A.default.weight": (2, 6),
        "body.0.lora_B.default.weight": (8, 2),
        "body.2.lora_A.default.weight": (2, 8),
        "body.2.lora_B.default.weight": (5, 2),
    }
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert adapters.has_adapters(policy) and not adapters.has_adapters(model())


def test_a_fresh_adapter_changes_nothing_and_its_draw_is_the_seed_s():
    torch.manual_seed(9)
    one = adapters.add_adapters(model(), LAYERS, 2, seed=3)
    torch.manual_seed(8)
    two = adapters.add_adapters(model(), LAYERS, 2, seed=3)
    other = adapters.add_adapters(model(), LAYERS, 2, seed=4)
    x, name = torch.randn(4, 6), "body.0.lora_A.default.weight"
    assert torch.equal(forward(one, x), forward(model(), x))
    a, b, c = (m.state_dict()[name] for m in (one, two, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_merged_weights_are_peft_s(tmp_path, dtype, atol):
    """Of the folder of adapters, which peft itself reads and merges."""
    policy = moved(adapters.add_adapters(model(dtype), LAYERS, 2, seed=0))
    x = torch.randn(4, 6).to(dtype)
    out = forward(policy, x)
    adapters.save_policy(policy, tmp_path / "policy", lambda draft, state: write(draft, state))
    ours = load_file(tmp_path / "policy" / "model.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["policy", "policy_adapter"]
    config = json.loads((tmp_path / "policy_adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 4
    theirs = PeftModel.from_pretrained(model(dtype), tmp_path / "policy_adapter")
    theirs = theirs.merge_and_unload().state_dict()
    assert set(ours) == set(theirs) == set(model().state_dict())
    for name, weight in theirs.items():
        assert ours[name].dtype == dtype
        torch.testing.assert_close(
            ours[name], weight, atol=1e-2 * (dtype != torch.float32) + 1e-6, rtol=1e-5
        )
    plain = model(dtype)
    assert not torch.equal(forward(plain, x), out)
    plain.load_state_dict(ours)
    torch.testing.assert_close(forward(plain, x), out, atol=atol, rtol=0)


def write(draft, state) -> None:
    draft.mkdir()
    save_file(state, draft / "model.safetensors")


def test_the_adapters_are_as_peft_would_have_made_them():
    ours = adapters.add_adapters(model(), LAYERS, 2, seed=0)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=LAYERS)
    theirs = get_peft_model(model(), config).base_model.model
    assert set(ours.state_dict()) == set(theirs.state_dict())
    torch.manual_seed(5)
    moved(ours)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(forward(ours, x), forward(theirs, x))


def test_without_adapters_the_state_is_the_model_s_own(tmp_path):
    policy = model()
    state = adapters.whole_state(policy)
    assert {name: x.data_ptr() for name, x in state.items()} == {
        name: x.data_ptr() for name, x in policy.state_dict().items()
    }
    adapters.save_policy(policy, tmp_path / "policy", write)
    adapters.save_policy(policy, tmp_path / "policy", write)  # in place of the first
    assert os.listdir(tmp_path) == ["policy"]


def test_a_policy_that_cannot_be_written_leaves_the_one_before(tmp_path):
    policy = adapters.add_adapters(model(), LAYERS, 2, seed=0)
    adapters.save_policy(policy, tmp_path / "policy", write)
    before = (tmp_path / "policy" / "model.safetensors").read_bytes()

    def full(draft, state):
        draft.mkdir()
        (draft / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="policy cannot be written .*is the disk full"):
        adapters.save_policy(policy, tmp_path / "policy", full)
    assert sorted(os.listdir(tmp_path)) == ["policy", "policy_adapter"]
    assert os.listdir(tmp_path / "policy") == ["model.safetensors"]
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() == before


def test_the_starting_policy_is_the_one_without_adapters():
    policy, x = moved(adapters.add_adapters(model(), LAYERS, 2, seed=0)), torch.randn(4, 6)
    with adapters.starting_policy(policy, None) as start:
        assert start is policy and torch.equal(forward(start, x), forward(model(), x))
        assert not forward(start, x).requires_grad
    assert not torch.equal(forward(policy, x), forward(model(), x))
    assert len(ranks.trainable(policy)) == 4  # they train again
    with pytest.raises(KeyError), adapters.starting_policy(policy, None):
        raise KeyError
    assert len(ranks.trainable(policy)) == 4
    assert not torch.equal(forward(policy, x), forward(model(), x))


def test_the_starting_policy_is_a_copy_that_waits_on_the_cpu():
    policy, copy, x = moved(model()), model(), torch.randn(4, 6)
    with adapters.starting_policy(policy, copy) as start:
        assert start is copy and not forward(start, x).requires_grad
        assert torch.equal(forward(start, x), forward(model(), x))
    assert next(copy.parameters()).device.type == "cpu"


def test_running_average_by_hand():
    """The decay rises: after update n (from 0) it is (1 + n) / (10 + n), at most 0.2. The first
    update copies."""
    policy = nn.Linear(1, 1, bias=False)
    average, wanted = adapters.running_average(policy, 0.2), None
    for n, value in enumerate((1.0, 2.0, 4.0, 8.0, 16.0)):
        policy.weight.data.fill_(value)
        average.update_parameters(policy)
        decay = min(0.2, (1 + n) / (10 + n))
        wanted = value if wanted is None else decay * wanted + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(wanted)
    assert policy.weight.item() == 16.0


def test_what_a_checkpoint_holds():
    policy = model()
    assert adapters.kept(policy) == dict(policy.named_parameters())
    policy["head"].requires_grad_(False)
    average = adapters.running_average(policy, 0.9)
    found = adapters.kept(policy, average)
    trained = ["body.0.bias", "body.0.weight", "body.2.weight"]
    averaged = [f"average.module.{name}" for name in trained]
    assert set(found) == {*trained, *averaged, "average.n_averaged"}
    moved(policy)
    average.update_parameters(policy)
    assert found["average.n_averaged"] == 1  # they are not copies
    assert torch.equal(found["average.module.body.2.weight"], average.module["body"][2].weight)
