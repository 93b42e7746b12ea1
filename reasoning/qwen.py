"""Qwen2.5-VL and its relatives, for training: prompts with pictures, sampling, logits of
completions.

The G completions of a group share a prompt, which is most of the tokens where it holds a picture.
So it is read once: `generate` copies its keys and values, `packed` puts its completions behind it
in one row, where each sees the prompt and itself. Prompts are padded on the left, what follows on
the right: the logits of completions alone reach the vocabulary (152k words: for 2048 tokens of one
response 0.6 GB in bf16).

Left out: videos; continuous batching; transformers' processor classes, which need torchvision.
"""
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import grpo

# What transformers calls the keys and values: since 5.24, and before
_FORWARD = signature(transformers.Qwen2_5_VLForConditionalGeneration.forward).parameters
CACHE = "cache" if "cache" in _FORWARD else "past_key_values"


@dataclass
class Prompt:
    """ids (L,) int64, every picture's place holder repeated once per image token; as the image
    processor gives them, None without pictures: pixels (patches, dim) float32, grid (pictures, 3)
    int64 (time, height, width in patches)."""
    ids: Tensor
    pixels: Tensor | None
    grid: Tensor | None
    images: list[Image.Image] = field(default_factory=list)     # for an engine that shows them


@dataclass
class Completion:
    """ids (n,) int64, up to and including the end token; text without special tokens; truncated: no
    end token came; logp (n,): of the engine that sampled, if it was reasoning/engine.py's."""
    ids: Tensor
    text: str
    truncated: bool
    logp: Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids)


class Processor:
    """Tokenizer and image processor of a checkpoint folder or hub id, and what goes between."""

    def __init__(self, path: str | Path):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        if "qwen" not in config.model_type or not hasattr(config, "image_token_id"):
            raise ValueError(f"{path} is a {config.model_type}, which takes no pictures here; give "
                             "a Qwen2.5-VL or Qwen3-VL")
        self.image_token = config.image_token_id
        self.context = config.text_config.max_position_embeddings
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{path} has no chat template: is it an instruction-tuned checkpoint?")
        words = set(self.tokenizer.get_vocab().values())
        if self.image_token not in words or max(words) >= config.text_config.vocab_size:
            raise ValueError(f"its tokenizer knows {len(words)} words to {max(words)}, the model "
                             f"{config.text_config.vocab_size}, and {self.image_token} stands for "
                             "a picture; copy tokenizer.json from the model's own checkpoint")
        self.count("a word")                    # of a damaged vocabulary any error

    def save_pretrained(self, path: str | Path) -> None:
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)

    def prompt(self, images: list[Image.Image], text: str) -> Prompt:
        """One user turn, pictures first, ready for the assistant's answer."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        turn = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(self._ids(turn))
        holders = ids == self.image_token
        if (n := int(holders.sum())) != len(images):
            raise ValueError(f"{len(images)} pictures, but the prompt holds {n} place holders: "
                             "does the text contain one?")
        if not images:
            return Prompt(ids, None, None)
        pictures = self.image_processor(images=images, return_tensors="pt")
        grid, repeats = pictures["image_grid_thw"], torch.ones_like(ids)
        repeats[holders] = grid.prod(1) // self.image_processor.merge_size**2
        return Prompt(ids.repeat_interleave(repeats), pictures["pixel_values"], grid, images)

    def target(self, text: str) -> Tensor:
        """A response to imitate -> ids (n,), end token included."""
        return torch.tensor([*self._ids(text), self.tokenizer.eos_token_id])

    def count(self, text: str) -> int:
        return len(self._ids(text))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def batch(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        """The model's inputs, on the CPU: ids and mask (B, L) int64, all pictures."""
        ids = pad_sequence([p.ids for p in prompts], True, self.tokenizer.pad_token_id, "left")
        # By position: the pad token may be the end token
        mask = pad_sequence([torch.ones_like(p.ids) for p in prompts], True, 0, "left")
        inputs = {"input_ids": ids, "attention_mask": mask}
        if pictured := [p for p in prompts if p.pixels is not None]:
            inputs |= {"pixel_values": torch.cat([p.pixels for p in pictured]),
                       "image_grid_thw": torch.cat([p.grid for p in pictured]),
                       "mm_token_type_ids": (ids == self.image_token).int()}
        return inputs


def load_vlm(path: str | Path, dtype: torch.dtype = torch.float32, device=None):
    """(model, processor) of a checkpoint folder or hub id. ValueError, one line that names it, if
    it cannot be loaded."""
    try:
        processor = Processor(path)
        # device_map: shards go straight to the device, without a second copy of the weights in RAM
        model, found = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, device_map=device and {"": device}, output_loading_info=True,
            trust_remote_code=False)
    except torch.OutOfMemoryError:                      # the checkpoint is not at fault
        raise
    except Exception as error:                          # of damaged files libraries raise any
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be loaded as a vision-language model: {reason}") from None
    if missing := sorted(found["missing_keys"]):        # transformers would go on with random ones
        more = f" and {len(missing) - 1} more tensors" if missing[1:] else ""
        raise ValueError(f"{path} has no {missing[0]}{more}; copy the checkpoint again")
    # Checkpoints bring top-k, top-p and repetition penalties, under which log-probabilities would
    # not be the sampling distribution's
    end = model.generation_config.eos_token_id or processor.tokenizer.eos_token_id
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=end, pad_token_id=processor.tokenizer.pad_token_id)
    return model, processor


@torch.no_grad()
def generate(model, processor: Processor, prompts: list[Prompt], max_new_tokens: int,
             temperature: float = 0.0) -> list[Completion]:
    """A completion for each prompt, sampled from softmax(logits / temperature), greedy at 0; with
    KV cache. ValueError if a prompt and max_new_tokens exceed the model's context."""
    longest = max(len(p.ids) for p in prompts)
    if longest + max_new_tokens > processor.context:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
                         f"model's context of {processor.context}; ask for fewer, or show smaller "
                         "pictures")
    training = model.training
    model.eval()                            # in training mode checkpointing turns the cache off
    owners, row = once(prompts)
    inputs, row = processor.batch(owners), row.to(model.device)
    position = positions(model, inputs).to(model.device)                            # (3, R, L)
    inputs = to(model.device, inputs)
    out = model(**inputs, position_ids=position, logits_to_keep=1, use_cache=True)
    cache, mask, position = out[CACHE], inputs["attention_mask"][row], position[:, row, -1:]
    cache.batch_select_indices(row)
    logits, ends = out.logits[row, -1], model.generation_config.eos_token_id        # (B, V)
    ends = {ends} if isinstance(ends, int) else {*ends}
    ids: list[list[int]] = [[] for _ in prompts]
    left = list(range(len(prompts)))        # in the batch; the ended ones go several at a time
    while True:
        word = grpo.sample_tokens(logits, temperature) if temperature else logits.argmax(-1)
        for i, drawn in zip(left, word.tolist()):                                   # (b,)
            if not ids[i] or ids[i][-1] not in ends:
                ids[i].append(drawn)
        going = [k for k, i in enumerate(left) if ids[i][-1] not in ends]
        if not going or len(ids[left[going[0]]]) == max_new_tokens:
            break
        if len(going) < 0.9 * len(left):
            left, going = [left[k] for k in going], torch.tensor(going, device=model.device)
            word, mask, position = word[going], mask[going], position[:, going]
            cache.batch_select_indices(going)
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
        logits = model(input_ids=word[:, None], attention_mask=mask, position_ids=position,
                       use_cache=True, **{CACHE: cache}).logits[:, -1]
    model.train(training)
    texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [Completion(torch.tensor(row), text, row[-1] not in ends)
            for row, text in zip(ids, texts)]


def once(prompts: list[Prompt]) -> tuple[list[Prompt], Tensor]:
    """Every prompt once, however many completions share the object; (B,) which of them is whose."""
    number: dict[int, int] = {}
    row = [number.setdefault(id(p), len(number)) for p in prompts]
    return list({id(p): p for p in prompts}.values()), torch.tensor(row)


def positions(model, inputs: dict) -> Tensor:
    """Of a batch's tokens, int64 (3, B, L): in time, height and width, which differ in pictures."""
    if "image_grid_thw" in inputs:
        return model.model.get_rope_index(**{name: x for name, x in inputs.items()
                                             if name != "pixel_values"})[0]
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)


def packed(model, processor: Processor, prompts: list[Prompt], completions: list[Tensor]
           ) -> tuple[dict, Tensor, Tensor, Tensor]:
    """-> (the model's inputs, a row for each of R prompts; ids (R, W), which their last W columns
    predict; place (B, n), where among R * W each completion's tokens stand; bool (B, n), where it
    has any).

    A row is a prompt but for its last token and, one after another, its completions, of which each
    begins with that token and ends before its last: [p q] with [a b c], [d e] is p|q a b|q d."""
    owners, row = once(prompts)
    inputs = processor.batch(owners)
    position = positions(model, inputs)
    length, start, width = [len(c) for c in completions], [], [0] * len(owners)
    for r, n in zip(row.tolist(), length):
        start.append(width[r])
        width[r] += n
    ids = torch.full((len(owners), max(width)), processor.tokenizer.pad_token_id)       # (R, W)
    shown, after, part = ids.clone(), torch.zeros_like(ids), torch.full_like(ids, -1)
    for i, (r, first, n, completion) in enumerate(zip(row, start, length, completions), 1):
        own = r, slice(first, first + n)
        ids[own], after[own], part[own] = completion, torch.arange(n), i
        shown[own] = torch.cat([prompts[i - 1].ids[-1:], completion[:-1]])
    # A sampled place holder is only a word: shown as such, the model would look for its picture
    shown[shown == processor.image_token] = processor.tokenizer.pad_token_id
    mask = inputs["attention_mask"][:, :-1]
    part = torch.cat([mask - 1, part], 1)       # (R, T): 0 prompt, 1 .. completion, -1 padding
    inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :-1], shown], 1)
    inputs["position_ids"] = torch.cat([position[..., :-1], position[..., -1:] + after], -1)
    inputs["attention_mask"] = (part >= 0).long()
    if len(owners) < len(prompts):
        part = part.to(model.device)
        seen = ((part[:, None] == part[..., None]) | (part[:, None] == 0)).tril()   # (R, T, T)
        inputs["attention_mask"] = torch.zeros_like(seen, dtype=model.dtype).masked_fill_(
            ~seen, torch.finfo(model.dtype).min)[:, None]
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token).int()
    steps = torch.arange(max(length))                                                   # (n,)
    place = (row * ids.shape[1] + torch.tensor(start))[:, None] + steps
    valid = steps < torch.tensor(length)[:, None]
    return to(model.device, inputs), *(x.to(model.device) for x in (ids, place * valid, valid))


def to(device, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in inputs.items()}


def micro_batches(row: list[int], lengths: list[tuple[int, int]], budget: int,
                  completions: int | None = None) -> Iterator[list[int]]:
    """Numbers of completions in batches that `packed` makes at most `budget` tokens of, and at most
    `completions` (default: all) of completions, padding included; one always goes. row: of whose
    prompt each is (`once`); lengths: of the prompt and the completion. Like lengths go together.

    >>> list(micro_batches([0, 0, 1, 2], [(4, 1), (4, 2), (1, 1), (1, 2)], 7))
    [[2, 3], [0, 1]]
    """
    most, last, bins = completions or budget, {}, []
    for i, (owner, (prompt, n)) in enumerate(zip(row, lengths)):
        one = last.get(owner)               # [prompt, completions' tokens, their numbers]
        if not one or prompt + one[1] + n > budget or one[1] + n > most:
            bins.append(one := [prompt, 0, []])
            last[owner] = one
        one[1] += n
        one[2].append(i)
    batch, prompt, width = [], 0, 0
    for length, n, numbers in sorted(bins, key=lambda one: (one[0] + one[1], one)):
        prompt, width, rows = max(prompt, length), max(width, n), len(batch) + 1
        if batch and (rows * (prompt + width) > budget or rows * width > most):
            yield sum(batch, [])
            batch, prompt, width = [], length, n
        batch.append(numbers)
    if batch:
        yield sum(batch, [])
