"""Responses by vLLM, in the process that trains and on its GPU: `--engine vllm`, which batches
continuously: a response that has ended costs nothing more.

1. `Engine.generate`: as `qwen.generate`, and the log-probability of every sampled token by vLLM's
   arithmetic, which is not quite the trainer's.
2. Before it the engine takes the policy's weights, adapters merged, if they have changed; after it,
   on a GPU, it gives its memory back until the next time.
3. `corrected`: what the two arithmetics differ by is an importance weight, truncated.

Left out: an engine over several GPUs; each rank has one of its own. vLLM pins torch and
transformers: an environment of its own, `pip install vllm` and requirements.txt without torch.
"""
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from plumbing import adapters, ranks
from reasoning import qwen
from reasoning.qwen import Completion, Processor, Prompt

PROMPT = 8192       # the longest prompt of a benchmark or a teacher's row, in tokens


class Engine:
    """vLLM on a checkpoint folder or hub id. s: settings, of which it takes dtype and
    engine_memory; context: tokens of a prompt and its response; trains: its GPU is shared with a
    model whose weights it takes. RuntimeError, one line, without the package, ValueError for a
    checkpoint that cannot be loaded."""

    def __init__(self, path: str | Path, processor: Processor, s, context: int,
                 trains: bool = False):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"      # weights move without a copy
        try:
            import vllm
        except ImportError as error:
            raise RuntimeError(f"--engine vllm needs the package vllm ({error}); install it in an "
                               "environment of its own, or leave --engine out") from None
        self.sampling, self.processor, self.seen = vllm.SamplingParams, processor, None
        self.sleeps = trains and torch.cuda.is_available()
        how = "external_launcher" if ranks.world_size() > 1 else "uni"
        try:
            self.llm = vllm.LLM(
                model=str(path), dtype=s.dtype, max_model_len=context,
                gpu_memory_utilization=s.engine_memory, distributed_executor_backend=how,
                enable_sleep_mode=self.sleeps, enforce_eager=not torch.cuda.is_available(),
                limit_mm_per_prompt={"video": 0}, trust_remote_code=False,
                # The checkpoint's top-k and penalties are not the policy's; after the temperature
                generation_config="vllm", logprobs_mode="processed_logprobs")
        except Exception as error:                      # of a damaged folder any
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} cannot be loaded by vLLM: {reason}") from None
        if self.sleeps:
            self.llm.sleep(level=2)

    def take(self, model) -> None:
        """The weights of the model that trains, unless they are those it has."""
        now = sum(p._version for p in model.parameters())   # torch counts changes in place
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        if self.sleeps or now != self.seen:
            with torch.no_grad(), ranks.whole_weights(model):
                weights = adapters.merged(model, dict(model.named_parameters()))
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.forget()
            self.seen = now
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])

    def forget(self) -> None:
        """What other weights made of prompts and pictures."""
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def generate(self, prompts: list[Prompt], max_new_tokens: int, temperature: float,
                 model=None) -> list[Completion]:
        """As `qwen.generate`. model: whose weights are to be used; None: the folder's."""
        if model is not None:
            self.take(model)
        tokenizer = self.processor.tokenizer
        # Of a sampled run torch's seed decides, as with transformers
        seed = int(torch.randint(2**31, ())) if temperature else None
        how = [self.sampling(temperature=temperature, max_tokens=max_new_tokens, logprobs=0,
                             seed=seed and (seed + i) % 2**31, detokenize=False,
                             stop_token_ids=[tokenizer.eos_token_id])
               for i in range(len(prompts))]
        outputs = self.llm.generate([self.asked(p) for p in prompts], how, use_tqdm=False)
        if self.sleeps:
            self.llm.sleep(level=2)
        completions = []
        for output in (request.outputs[0] for request in outputs):
            ids = torch.tensor(output.token_ids)
            logp = torch.tensor([step[token].logprob for step, token in zip(
                output.logprobs, output.token_ids, strict=True)])
            completions.append(Completion(ids, tokenizer.decode(ids, skip_special_tokens=True),
                                          output.finish_reason == "length", logp))
        return completions

    def asked(self, prompt: Prompt) -> dict:
        """vLLM repeats the place holders and shows the pictures itself."""
        ids, image = prompt.ids, prompt.ids == self.processor.image_token
        again = torch.cat([torch.tensor([False]), image[1:] & image[:-1]])
        asked = {"prompt_token_ids": ids[~again].tolist()}
        return asked | ({"multi_modal_data": {"image": prompt.images}} if prompt.images else {})


def engine_of(path: str | Path, processor: Processor, s) -> Engine | None:
    """That of a training run, beside its model; None where the model itself samples."""
    if s.engine != "vllm" or s.stage == "sft":
        return None
    return Engine(path, processor, s, s.max_prompt + s.max_new_tokens, trains=True)


def completer(s, device: str = "", temperature: float = 0.0) -> Callable:
    """The model of settings s by the engine they name, for who does not train: (images, texts) ->
    completions, as `qwen.generate`. ValueError, one line, if it cannot be loaded."""
    if s.engine == "vllm":
        processor = Processor(s.model)
        context = min(processor.context, PROMPT + s.max_new_tokens)
        generate = Engine(s.model, processor, s, context).generate
    else:
        model, processor = qwen.load_vlm(s.model, getattr(torch, s.dtype), ranks.device(device))
        generate = partial(qwen.generate, model, processor)

    def complete(images: list[list[Image.Image]], texts: list[str]) -> list[Completion]:
        prompts = [processor.prompt(*turn) for turn in zip(images, texts, strict=True)]
        return generate(prompts, s.max_new_tokens, temperature)
    return complete


def corrected(advantages: Tensor, logp: Tensor, sampled: Tensor | None, mask: Tensor,
              cap: float) -> tuple[Tensor, dict]:
    """Advantages (B,) of responses sampled by another arithmetic -> (B, n), each token's times
    min(pi_trainer / pi_engine, cap); and by how many nats they differ, a mean over tokens.

    logp (B, n): the trainer's, of the policy that sampled; sampled (B, n): the engine's, None where
    there was none, which changes nothing."""
    advantages = advantages.to(logp.device)
    if sampled is None:
        return advantages, {}
    gap = (logp.detach() - sampled.to(logp.device)).masked_fill(~mask, 0.0)
    weight = gap.exp().clamp(max=cap) if cap else torch.ones_like(gap)
    return advantages[:, None] * weight, {"engine_gap": gap.abs().sum() / mask.sum().clamp(min=1)}
