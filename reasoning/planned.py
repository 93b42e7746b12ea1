"""What reflection_srpo.py does at its largest, for --plan (plumbing/plan.py)."""
import math
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

import grpo
from plumbing.plan import Job
from reasoning import qwen
from reasoning import responses as r
from reasoning.parts import ready

SAVINGS = ({"gradient_checkpointing": True}, {"micro_tokens": 4096}, {"rollout_batch": 16},
           {"micro_tokens": 1}, {"dtype": "bfloat16"}, {"offload_optimizer": True},
           {"lora_rank": 32})


def job(s) -> Job:
    """ValueError if the checkpoint is no vision-language model, or is not complete."""
    if not (path := s.model or s.resume and str(Path(s.resume) / "base")):
        raise ValueError("--plan needs --model: a folder or hub id")

    def skeleton(dtype: torch.dtype):
        if Path(path).is_dir():
            return qwen.load_vlm(path, dtype, "meta")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):                      # of a hub id nothing large is downloaded
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype,
                                                            trust_remote_code=False)
        return model, qwen.Processor(path)

    def model(s):
        return ready(skeleton(getattr(torch, s.dtype))[0], s)

    def rollout(model, s) -> None:
        """The prompts' pass; then that of one token, beside the whole cache."""
        if s.stage == "sft":
            return
        prompts = [longest_prompt(s.max_prompt)] * min(s.rollout_batch, s.prompts * s.group_size)
        inputs = qwen.to(model.device, processor.batch(prompts))
        cache = model(**inputs, logits_to_keep=1, use_cache=True)[qwen.CACHE]
        for layer in cache.layers:
            rows, heads, _, width = layer.keys.shape
            whole = (rows, heads, s.max_prompt + s.max_new_tokens - 1, width)
            layer.keys, layer.values = layer.keys.new_empty(whole), layer.keys.new_empty(whole)
        model(input_ids=inputs["input_ids"][:, -1:], use_cache=True, **{qwen.CACHE: cache})

    def loss(model, s):
        length, response = s.max_prompt + s.max_new_tokens, s.max_new_tokens
        if s.stage == "sft":
            length, response = s.max_length, max(1, s.max_length - s.max_prompt)
        rows = max(1, s.micro_tokens // length)
        if s.stage == "sft" and rows == 1:              # a row that is nearly all response
            response = length - 1
        batch = r.Batch([longest_prompt(length - response) for _ in range(rows)],   # none shared
                        [torch.full((response,), word)] * rows, None, rows)
        logp, _, mask = r.logprobs(model, processor, batch, list(range(rows)))
        if s.stage == "sft":
            return -(logp * mask).sum()
        return grpo.policy_loss(logp, logp.detach(), torch.ones(rows), mask, beta=s.beta,
                                ref_logp=logp.detach() if s.beta else None)[0]

    _, processor = skeleton(torch.bfloat16)
    word = processor.target("a")[0]
    side = 28 * max(1, math.isqrt(s.max_pixels) // 28)

    def longest_prompt(length: int) -> qwen.Prompt:
        """A picture as large as they come, where it fits, and words."""
        prompt = processor.prompt([Image.new("RGB", (side, side))], "a")
        if len(prompt.ids) > length:
            return qwen.Prompt(torch.full((length,), word), None, None)
        filled = torch.full((length - len(prompt.ids),), word)
        return qwen.Prompt(torch.cat([prompt.ids, filled]), prompt.pixels, prompt.grid)
    return Job(path, model, rollout, loss, savings=SAVINGS)
