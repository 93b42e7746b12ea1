"""reasoning/qwen.py against transformers: a Qwen2.5-VL and a Qwen3-VL of the real architectures,
tiny, through the real loading path."""
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import grpo
from reasoning import arrows
from reasoning import qwen as vlm
from tests.conftest import tiny_qwen3, whole_row


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    arrows.tiny_vlm(folder)
    if request.param == "qwen3_vl":     # the same tokenizer and image processor
        tiny_qwen3(folder)
    model, processor = vlm.load_vlm(folder)
    with torch.no_grad():
        # A place holder that is sampled is shown as padding later: tested by itself
        model.lm_head.weight[processor.image_token] = 0
    return model, processor


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def prompts(loaded):
    """Of different lengths and pictures' sizes; two pictures in one, none in another."""
    _, processor = loaded
    turns = [([picture(64, 64)], "from a2 go 6 ?"), ([picture(96, 48)], "how many ?"),
             ([picture(64, 64), picture(80, 80)], "red ?"), ([], "from a2 go 6 ?")]
    return [processor.prompt(*turn) for turn in turns]


def test_a_place_holder_per_image_token(loaded, prompts):
    _, processor = loaded
    held = [int((p.ids == processor.image_token).sum()) for p in prompts]
    assert held == [16, 18, 16 + 25, 0]             # an image token covers 16 x 16 pixels
    assert prompts[0].pixels.shape[0] == 64
    assert prompts[2].grid.tolist() == [[1, 8, 8], [1, 10, 10]]


def test_place_holders_in_the_text_are_refused(loaded):
    with pytest.raises(ValueError, match="1 pictures, but the prompt holds 2 place holders"):
        loaded[1].prompt([picture(64, 64)], "how <|image_pad|> many")


def test_packed_completions_have_the_log_probabilities_they_have_alone(loaded, prompts):
    """Three behind one prompt, two behind another, two alone, of unequal lengths, against the whole
    sequence of each through transformers' own forward pass; and their gradients."""
    model, processor = loaded
    # 5: an image place holder as a word
    completions = [torch.tensor(ids) for ids in (
        [9, 20, 21, 2], [30], [5, 11, 12], [2], [40, 2], [33, 34, 35, 36, 2], [9, 2])]
    owners = [prompts[k] for k in (0, 2, 0, 3, 2, 1, 0)]
    inputs, ids, place, mask = vlm.packed(model, processor, owners, completions)
    assert len(ids) == 4 and mask.sum(1).tolist() == [len(c) for c in completions]
    logits = model(**inputs, logits_to_keep=ids.shape[1], use_cache=False).logits
    together = grpo.token_logprobs(logits, ids)[0].flatten()[place]
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    gradients = []
    alone = torch.zeros_like(together)
    for i, (prompt, completion) in enumerate(zip(owners, completions)):
        logits = model(**whole_row(processor, prompt, completion)).logits[0, len(prompt.ids) - 1:-1]
        alone[i, :len(completion)] = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
    torch.testing.assert_close(together * mask, alone, atol=1e-5, rtol=1e-5)
    for logp in (together, alone):
        model.zero_grad()
        (logp * weight).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()
                                    if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("limit", [3, 12])
def test_generation_is_transformers_own(loaded, prompts, limit):
    """Greedy, against its `generate` of each prompt alone, several of them twice: read once, the
    batch shrinks as they end, and nobody minds."""
    model, processor = loaded
    asked = [prompts[k] for k in (0, 1, 0, 2, 3, 3, 1, 0, 2, 3)]
    # What some would say third ends, so that the batch shrinks
    third = int(vlm.generate(model, processor, prompts[:1], 3)[0].ids[-1])
    model.generation_config.eos_token_id = [third, processor.tokenizer.eos_token_id]
    completions = vlm.generate(model, processor, asked, limit)
    for prompt, completion in zip(asked, completions, strict=True):
        row = whole_row(processor, prompt, torch.empty(0, dtype=torch.long))
        theirs = model.generate(**row, max_new_tokens=limit, do_sample=False)[0, len(prompt.ids):]
        assert completion.ids.tolist() == theirs.tolist()
        assert completion.truncated == (int(theirs[-1]) not in model.generation_config.eos_token_id)
    assert len({c.tokens for c in completions}) > 1 or limit == 3
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id


def test_sampling_follows_the_distribution_that_log_probabilities_are_of(loaded, prompts):
    """Frequencies of the first token at temperature 1.5, against softmax(logits / 1.5); a top-k of
    the checkpoint would show."""
    model, processor = loaded
    n = 4000
    torch.manual_seed(1)
    drawn = vlm.generate(model, processor, [prompts[3]] * n, 1, temperature=1.5)
    with torch.no_grad():
        p = (model(input_ids=prompts[3].ids[None]).logits[0, -1] / 1.5).softmax(-1)
    frequency = torch.cat([c.ids for c in drawn]).bincount(minlength=len(p)) / n
    assert (frequency - p).abs().max() < 5 * (p.max() * (1 - p.max()) / n) ** 0.5


def test_too_long_a_prompt_is_named(loaded, prompts):
    model, processor = loaded
    n = len(prompts[0].ids)
    with pytest.raises(ValueError, match=f"{n} tokens and {processor.context} new ones exceed"):
        vlm.generate(model, processor, prompts[:1], processor.context)


def test_sampling_penalties_of_the_checkpoint_are_dropped(tmp_path):
    arrows.tiny_vlm(tmp_path)
    model, _ = vlm.load_vlm(tmp_path)
    model.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=1.05, temperature=0.1,
                                   do_sample=True)
    model.generation_config.save_pretrained(tmp_path)
    config = vlm.load_vlm(tmp_path)[0].generation_config
    assert config.repetition_penalty in (None, 1.0) and config.top_k != 1 and config.top_p != 0.1


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        vlm.load_vlm(tmp_path)


@pytest.mark.parametrize("config", [transformers.LlavaConfig(), transformers.Qwen2Config()])
def test_another_family_is_refused(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} is a {config.model_type}, .*give a Qwen2.5"):
        vlm.load_vlm(tmp_path)


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    """Nor is the user asked whether it should be."""
    maps = {"AutoConfig": "trap.Trap", "AutoModelForImageTextToText": "trap.Trap"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "trap", "auto_map": maps}))
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be loaded"):
        vlm.load_vlm(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_truncated_weights_are_one_line(tmp_path):
    arrows.tiny_vlm(tmp_path, width=32)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be loaded"):
        vlm.load_vlm(tmp_path)


def test_out_of_memory_is_not_the_checkpoint_s_fault(tmp_path, monkeypatch):
    arrows.tiny_vlm(tmp_path, width=32)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):         # plumbing/plan.py says what would fit
        vlm.load_vlm(tmp_path)


@pytest.mark.parametrize("budget", [1, 10, 100])
def test_micro_batches_hold_every_completion_once_within_the_budget(budget):
    """Counted as `packed` lays them out: a row for each prompt, padded on both sides."""
    rng = np.random.default_rng(0)
    row = rng.integers(0, 12, 50).tolist()
    prompt, lengths = rng.integers(1, 30, 12), rng.integers(1, 30, 50).tolist()
    for completions in (None, 30):
        batches = list(vlm.micro_batches(
            row, [(int(prompt[r]), n) for r, n in zip(row, lengths)], budget, completions))
        assert sorted(i for b in batches for i in b) == list(range(50))
        for b in batches:
            width = max(sum(lengths[i] for i in b if row[i] == r) for r in {row[i] for i in b})
            rows, before = len({row[i] for i in b}), max(prompt[row[i]] for i in b)
            assert len(b) == 1 or (rows * (before + width) <= budget
                                   and rows * width <= (completions or budget))
        assert budget < 100 or completions or max(map(len, batches)) > 3


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_checkpoint_without_all_its_tensors_is_refused(tmp_path, damage):
    """transformers alone would go on with random ones."""
    from safetensors.torch import load_file, save_file
    arrows.tiny_vlm(tmp_path, width=32)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "layers.0.self_attn.q_proj.weight" in name)
    whole = tensors.pop(name)
    save_file(tensors if damage == "missing" else tensors | {name: whole[:3]},
              tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as caught:
        vlm.load_vlm(tmp_path)
    said = str(caught.value)
    assert str(tmp_path) in said and "\n" not in said
    assert damage == "shape" or "q_proj.weight" in said
