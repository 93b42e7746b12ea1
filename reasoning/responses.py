"""What both stages of reflection_srpo.py need of rows and responses: `s` is its settings.

1. `encode`: rows -> prompts; what cannot be used is set aside in a file with the reason (`Rejections`), and the run goes on.
2. `generate`: prompts -> responses; `logprobs`, `reference_logprobs`: of their tokens, under the policy and where it started.
3. `score`, `behaviour`: what a response earns (rewards.py), and what the policy does on average.
4. `evaluate`, `table`: the same on held-out rows, greedily, with intervals.
"""
import json
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import eval as evaluation
import grpo
from plumbing import memory
from plumbing import ranks as parallel
from reasoning import rows as reflection_data
import rewards
from reasoning import qwen as vlm
from reasoning.rows import Row


class Rejections:
    """Rows that cannot be used, written to rejected.jsonl in `out` as they are met, each once; by other ranks to files of their own."""

    def __init__(self, out: Path):
        self.path = out / (f"rejected-{parallel.rank()}.jsonl" if parallel.rank() else "rejected.jsonl")
        self.seen = {line["id"] for line in reflection_data.read_lines(self.path, "id")}

    def add(self, row: Row | reflection_data.Rejected, reason: str) -> None:
        if row.id not in self.seen:
            self.seen.add(row.id)
            with self.path.open("a") as file:
                file.write(json.dumps({"id": row.id, "source": row.source, "reason": reason}) + "\n")
            tqdm.write(f"{row.source}: {reason}; set aside in {self.path}")


def encode(rows: list[Row], s, processor: vlm.Processor, rejected: Rejections, spare: list[Row] = ()) -> tuple[list[Row], list[vlm.Prompt]]:
    """The rows that can be used, and their prompts; if it is none, the first of `spare` that can, ValueError if none of them can either."""
    kept, prompts = [], []
    for i, row in enumerate(chain(rows, spare)):
        if i >= len(rows) and kept:
            break
        try:
            images = [reflection_data.fit_image(reflection_data.load_image(row, i), max_pixels=s.max_pixels) for i in range(len(row.images))]
            prompt = processor.prompt(images, reflection_data.reflection_prompt(row.query) if s.prompt == "reflection" else row.query)
            room = min(s.max_prompt, processor.context - s.max_new_tokens)
            if len(prompt.ids) > room:
                raise ValueError(f"a prompt of {len(prompt.ids)} tokens, and there is room for {room}; see --max_prompt and --max_pixels")
            if row.target and (n := len(prompt.ids) + len(processor.target(row.target))) > min(s.max_length, processor.context):
                raise ValueError(f"prompt and target of {n} tokens, and there is room for {min(s.max_length, processor.context)}; see --max_length")
            kept.append(row), prompts.append(prompt)
        except ValueError as error:
            rejected.add(row, str(error))
    if spare and not kept:
        raise ValueError(f"none of {len(spare)} rows can be used; {rejected.path} says why")
    return kept, prompts


def micro_batches(lengths: list[tuple[int, int]], s):
    """`vlm.micro_batches` within what plumbing/memory.py counts on."""
    return vlm.micro_batches(lengths, s.micro_tokens, memory.completion_tokens(s))


def generate(model, processor: vlm.Processor, prompts: list[vlm.Prompt], s, temperature: float) -> list[vlm.Completion]:
    """`vlm.generate` by --rollout_batch, with whole weights on every rank."""
    with parallel.gathered(model):
        return [c for i in range(0, len(prompts), s.rollout_batch)
                for c in vlm.generate(model, processor, prompts[i:i + s.rollout_batch], s.max_new_tokens, temperature)]


def logprobs(model, processor: vlm.Processor, prompts: list[vlm.Prompt], completions: list[torch.Tensor], temperature: float):
    """(log-probabilities, entropy, mask) of the completions' tokens, each (B, n)."""
    inputs, ids, mask = processor.batch(prompts, completions, model.device)
    return (*grpo.token_logprobs(vlm.completion_logits(model, inputs, ids.shape[1]), ids, temperature), mask)


def frozen_logprobs(model, processor, prompts: list[vlm.Prompt], completions: list[torch.Tensor], s) -> list[torch.Tensor]:
    """Log-probabilities of each response (n_i,), without gradient, by a model whose weights are whole."""
    rows: list = [None] * len(completions)
    with torch.no_grad():
        for part in micro_batches([(len(p.ids), len(c)) for p, c in zip(prompts, completions)], s):
            logp, _, _ = logprobs(model, processor, [prompts[i] for i in part], [completions[i] for i in part], s.temperature)
            for i, row in zip(part, logp):
                rows[i] = row[:len(completions[i])]
    return rows


def reference_logprobs(model, reference, *arguments) -> list[torch.Tensor]:
    """`frozen_logprobs` under the starting policy: the model with its adapters off, or a copy that waits on the CPU."""
    if reference is None:
        with parallel.gathered(model), model.disable_adapter():
            return frozen_logprobs(model, *arguments)
    try:
        return frozen_logprobs(reference.to(model.device), *arguments)
    finally:
        reference.to("cpu")


def score(response: str, answer: str, kind: str, processor: vlm.Processor) -> rewards.ReflectionRecord:
    """`rewards.reflection_reward`, or one of the two ablations. Lengths are in tokens. Paper/ours differ: the tags are not counted (the
    published variants count them), so that writing twice what the first attempt wrote meets the target, however few words there are."""
    if kind in ("openrlhf", "verl"):
        return rewards.reflection_reward(response, answer, variant=kind, count_tokens=processor.count)
    record = rewards.reflection_reward(response, answer, count_tokens=lambda text: processor.count(rewards.TAG.sub(" ", text)))
    if kind == "no_length":
        record.total, record.length = record.total - record.length, 0.0
    if kind == "outcome":
        record.total = record.accuracy = float(record.final_correct)
        record.format = record.effectiveness = record.reflection = record.length = 0.0
    return record


def behaviour(records: list[rewards.ReflectionRecord], completions: list[vlm.Completion]) -> dict[str, float]:
    """Means over responses: what the policy does (rates), and what it is paid for (reward and its parts)."""
    if not records:
        raise ValueError("none of the held-out rows can be used; the rejected.jsonl of the run says why")
    first, final = (np.array([getattr(r, name) for r in records]) for name in ("first_correct", "final_correct"))
    parts = {name: float(np.mean([getattr(r, name) for r in records])) for name in ("format", "accuracy", "effectiveness", "reflection", "length")}
    return {"first_accuracy": float(first.mean()), "final_accuracy": float(final.mean()),
            "fix_rate": float(final[~first].mean()) if not first.all() else None,           # wrong -> right, among the wrong
            "break_rate": float((~final[first]).mean()) if first.any() else None,           # right -> wrong, among the right
            "format_rate": float(np.mean([rewards.format_holds(c.text) for c in completions])), "tokens": float(np.mean([c.tokens for c in completions])),
            "truncated": float(np.mean([c.truncated for c in completions])), "reward": float(np.mean([r.total for r in records])),
            **{f"part_{name}": x for name, x in parts.items()}}


def evaluate(model, processor: vlm.Processor, rows: list[Row], s, rejected: Rejections) -> dict:
    """Greedy decoding of every row -> `behaviour`, with Wilson intervals of both accuracies. ValueError if no row can be used."""
    own, completions = [], []
    rows = parallel.share(rows)
    for part in parallel.even([rows[i:i + s.rollout_batch] for i in range(0, len(rows), s.rollout_batch)]):     # not all pictures in memory at once
        some, prompts = encode(part or [], s, processor, rejected)
        own += some
        completions += generate(model, processor, prompts, s, 0.0)
    records = parallel.gather([score(c.text, row.answer, s.reward, processor) for row, c in zip(own, completions)])
    result, n = behaviour(records, parallel.gather(completions)), len(records)
    return result | {"rows": n, **{f"{name}_interval": evaluation.wilson(round(result[f"{name}_accuracy"] * n), n) for name in ("first", "final")}}


def table(results: dict[str, dict]) -> str:
    """{column title: result of `evaluate`} -> an aligned text table."""
    lines = [f"{'':16}" + "".join(f"{title:>26}" for title in results)]
    for name in ("first", "final"):
        lines.append(f"{name + ' answer right':16}" + "".join(
            f"{r[f'{name}_accuracy']:10.1%} [{r[f'{name}_interval'][0]:.1%}, {r[f'{name}_interval'][1]:.1%}]".rjust(26) for r in results.values()))
    for name, title in (("fix_rate", "wrong -> right"), ("break_rate", "right -> wrong"), ("format_rate", "format holds")):
        lines.append(f"{title:16}" + "".join(f"{'-' if r[name] is None else format(r[name], '.1%'):>26}" for r in results.values()))
    return "\n".join([*lines, f"{'tokens':16}" + "".join(f"{r['tokens']:26.1f}" for r in results.values())])
