"""Qwen2.5-VL and its relatives, for training: prompts with pictures, padded batches, sampling,
logits of completions.

Prompts are padded on the left and completions on the right, so that every completion starts in one
column: generation goes on from there, and the logits of completion positions alone reach the
vocabulary (152k words: for 2048 tokens of one response 0.6 GB in bf16).

Left out: videos; continuous batching; transformers' processor classes, which need torchvision.
"""
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor


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
        if not hasattr(config, "image_token_id"):
            raise ValueError(f"{path} is a {config.model_type}, which takes no pictures here; give "
                             "a Qwen2.5-VL or Qwen3-VL")
        self.image_token = config.image_token_id
        self.context = config.text_config.max_position_embeddings
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self.image_processor = transformers.AutoImageProcessor.from_pretrained(
            path, backend="pil", trust_remote_code=False)   # the other backend is torchvision
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

    def batch(self, prompts: list[Prompt], completions: list[Tensor] | None = None,
              device=None) -> tuple[dict, Tensor, Tensor]:
        """-> (the model's inputs; completions (B, n) int64; bool (B, n), true on their tokens). n
        is 0 without completions."""
        completions = completions or [torch.empty(0, dtype=torch.long)] * len(prompts)
        left, right = max(len(p.ids) for p in prompts), max(map(len, completions))
        ids = torch.full((len(prompts), left + right), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)            # by position: the pad token may be the end token
        for i, (prompt, completion) in enumerate(zip(prompts, completions)):
            row = slice(left - len(prompt.ids), left + len(completion))
            ids[i, row], mask[i, row] = torch.cat([prompt.ids, completion]), 1
        # A sampled place holder is only a word: shown as such, the model would look for its picture
        shown = ids.clone()
        shown[:, left:].masked_fill_(ids[:, left:] == self.image_token, self.tokenizer.pad_token_id)
        inputs = {"input_ids": shown, "attention_mask": mask}
        if pictured := [p for p in prompts if p.pixels is not None]:
            inputs |= {"pixel_values": torch.cat([p.pixels for p in pictured]),
                       "image_grid_thw": torch.cat([p.grid for p in pictured]),
                       "mm_token_type_ids": (shown == self.image_token).int()}
        inputs = {name: x.to(device) for name, x in inputs.items()}
        return inputs, ids[:, left:].to(device), mask[:, left:].bool().to(device)


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
    inputs, _, _ = processor.batch(prompts, device=model.device)
    training = model.training
    model.eval()                            # in training mode checkpointing turns the cache off
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else \
        dict(do_sample=False)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, use_cache=True, **how)
    ids = ids[:, inputs["input_ids"].shape[1]:].cpu()
    model.train(training)
    ended = torch.isin(ids, torch.tensor(model.generation_config.eos_token_id))     # (B, n)
    length = torch.where(ended.any(1), ended.int().argmax(1) + 1, ids.shape[1])     # (B,)
    texts = processor.tokenizer.batch_decode([row[:n] for row, n in zip(ids, length)],
                                             skip_special_tokens=True)
    return [Completion(row[:n].clone(), text, not bool(end.any()))
            for row, n, text, end in zip(ids, length, texts, ended)]


def complete(model, processor: Processor, images: list[list[Image.Image]], texts: list[str],
             max_new_tokens: int, temperature: float = 0.0) -> list[Completion]:
    """`generate` from pictures and text."""
    prompts = [processor.prompt(*turn) for turn in zip(images, texts)]
    return generate(model, processor, prompts, max_new_tokens, temperature)


def completion_logits(model, inputs: dict, n: int) -> Tensor:
    """Logits (B, n, V) of the last n positions' tokens, in the model's dtype; other positions never
    reach the vocabulary."""
    return model(**inputs, logits_to_keep=n + 1, use_cache=False).logits[:, :-1]


def micro_batches(lengths: list[tuple[int, int]], budget: int,
                  completions: int | None = None) -> Iterator[list[int]]:
    """Row numbers in batches of at most `budget` tokens, of which at most `completions` (default:
    all) in completions, padding included; one row always goes. lengths: each row's prompt and
    completion, which `Processor.batch` pads apart. Rows of like length stand together.

    >>> list(micro_batches([(4, 1), (1, 1), (2, 2), (1, 2)], 12))
    [[1, 3, 2], [0]]
    """
    batch, prompt, completion = [], 0, 0
    for i in sorted(range(len(lengths)), key=lambda i: (sum(lengths[i]), lengths[i])):
        prompt, completion = max(prompt, lengths[i][0]), max(completion, lengths[i][1])
        rows = len(batch) + 1
        if batch and (rows * (prompt + completion) > budget
                      or rows * completion > (completions or budget)):
            yield batch
            batch, (prompt, completion) = [], lengths[i]
        batch.append(i)
    if batch:
        yield batch
