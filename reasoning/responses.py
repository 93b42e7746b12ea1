"""Rows -> prompts -> responses -> records, for both stages of reflection_srpo.py (settings s)."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import grpo
import rewards
from plumbing import adapters, ranks
from plumbing.flags import printable
from plumbing.plots import PARTS, wilson
from reasoning import published_reward, qwen
from reasoning.answers import default_verify
from reasoning.rows import PROMPTS, Row, pictures


@dataclass
class Batch:
    """N responses of this rank to train on. Where there are none it holds one, whose pass another
    rank's update needs, and `rows` is 0."""
    prompts: list[qwen.Prompt]
    completions: list[Tensor]       # (n_i,) int64
    advantages: Tensor              # (N,) float32
    rows: int
    sampled: list[Tensor] | None = None     # (n_i,), log-probabilities by the engine that sampled

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of each prompt and completion."""
        return [(len(p.ids), len(c)) for p, c in zip(self.prompts, self.completions)]

    @property
    def owner(self) -> list[int]:
        """Whose prompt each has: a prompt is read once for its responses."""
        return qwen.once(self.prompts)[1].tolist()


def encode(rows: list[Row], s, processor: qwen.Processor) -> list[qwen.Prompt]:
    """Prompts of rows that were found usable when they were read."""
    return [processor.prompt(pictures(row, s.max_pixels), PROMPTS[s.prompt](row.query))
            for row in rows]


def split(batch: Batch, s) -> Callable[[Tensor], Iterator[list[int]]]:
    """Rows' numbers -> some at a time, of like lengths, within --micro_tokens, padding included. Of
    these so many are in completions, whose logits are what costs, as where every row is as long as
    a row can be."""
    longest, response, least = s.max_prompt + s.max_new_tokens, s.max_new_tokens, 0
    if s.stage == "sft":                    # where a row may be nearly all response
        longest, response, least = s.max_length, max(1, s.max_length - s.max_prompt), s.max_length
    budget = int(max(1.0, s.micro_tokens / longest) * response)
    owner, lengths = torch.tensor(batch.owner), torch.tensor(batch.lengths)
    return lambda rows: (rows[part].tolist() for part in qwen.micro_batches(
        owner[rows].tolist(), lengths[rows].tolist(), s.micro_tokens, max(budget, least)))


def generate(model, processor: qwen.Processor, prompts: list[qwen.Prompt], s,
             temperature: float, engine=None) -> list[qwen.Completion]:
    """By the engine all at once; else `qwen.generate` by --rollout_batch, with whole weights on
    every rank."""
    if engine is not None:
        return engine.generate(prompts, s.max_new_tokens, temperature, model)
    with ranks.whole_weights(model):
        return [c for i in range(0, len(prompts), s.rollout_batch)
                for c in qwen.generate(model, processor, prompts[i:i + s.rollout_batch],
                                       s.max_new_tokens, temperature)]


def logprobs(model, processor: qwen.Processor, batch: Batch, part: list[int],
             temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, entropy, mask) of some rows' completion tokens, each (B, n)."""
    inputs, ids, place, mask = qwen.packed(
        model, processor, [batch.prompts[i] for i in part], [batch.completions[i] for i in part])
    # (R, W, V), in the model's dtype; other columns never reach the vocabulary
    logits = model(**inputs, logits_to_keep=ids.shape[1], use_cache=False).logits
    logp, entropy = (x.flatten()[place] for x in grpo.token_logprobs(logits, ids, temperature))
    return logp, entropy, mask


@torch.no_grad()
def frozen_logprobs(model, processor: qwen.Processor, batch: Batch, s) -> list[Tensor]:
    """Log-probabilities of each response (n_i,), with whole weights on every rank."""
    rows: list = [None] * len(batch.completions)
    with ranks.whole_weights(model):
        for part in split(batch, s)(torch.arange(len(rows))):
            logp, _, _ = logprobs(model, processor, batch, part, s.temperature)
            for i, row in zip(part, logp):
                rows[i] = row[:len(batch.completions[i])]
    return rows


def chosen_rows(prompts: list[qwen.Prompt], completions: list[qwen.Completion],
                advantages: Tensor, trained: Tensor) -> Batch:
    """The responses to train on: advantages (n,), trained bool (n,)."""
    rows = trained.nonzero().flatten().tolist()
    some = rows or [0]
    sampled = [completions[i].logp for i in some]
    return Batch([prompts[i] for i in some], [completions[i].ids for i in some],
                 advantages[some], len(rows), None if sampled[0] is None else sampled)


def padded(rows: list[Tensor] | None, part: list[int]) -> Tensor | None:
    """Some of rows (n_i,), as (B, n)."""
    return None if rows is None else pad_sequence([rows[i] for i in part], batch_first=True)


def reference_logprobs(model, reference, processor: qwen.Processor, batch: Batch, s):
    """Of the starting policy, None where beta is 0."""
    if not s.beta:
        return None
    with adapters.starting_policy(model, reference) as start:
        return frozen_logprobs(start, processor, batch, s)


# Rewards: (response, answer, processor, settings) -> record. Lengths are in tokens.

# What --format asks for; the last two are the paper's baselines without reflection
PATTERNS = {"reflection": rewards.PATTERN, "plain": ("think", "answer"),
            "twice": ("think", "answer", "think", "answer")}


def paper(response: str, answer: str, processor: qwen.Processor, s,
          without: tuple[str, ...] = ()) -> rewards.ReflectionRecord:
    """The paper's, less some parts. Ours: tags are not counted (code: they are), so that twice what
    the first attempt wrote meets the target, however few words there are."""
    record = rewards.reflection_reward(
        response, answer, verify=default_verify, alpha=s.alpha,
        count_tokens=lambda text: processor.count(rewards.TAG.sub(" ", text)))
    return record.without(*without)


def plain(form: float, right: float, response: str, answer: str, processor: qwen.Processor, s):
    """`form` for --format's tags, `right` for a right final answer, nothing else: 0.5 and 0.5 are
    what plain GRPO pays ("task"), 0 and 1 the "outcome"."""
    record = paper(response, answer, processor, s, without=PARTS)
    return replace(record, format=form * rewards.format_holds(response, PATTERNS[s.format]),
                   accuracy=right * record.final_correct)


def published(rule, response: str, answer: str, processor: qwen.Processor, s):
    """A published code's, whose lengths count the tags too."""
    return rule(response, answer, verify=default_verify, count_tokens=processor.count)


REWARDS = {"paper": paper, "task": partial(plain, 0.5, 0.5), "outcome": partial(plain, 0.0, 1.0),
           "openrlhf": partial(published, published_reward.openrlhf),
           "verl": partial(published, published_reward.verl),
           "no_effectiveness": partial(paper, without=("effectiveness",)),
           "no_reflection": partial(paper, without=("reflection",)),
           "no_length": partial(paper, without=("length",))}


def groups_used(advantages: Tensor, records: list[rewards.ReflectionRecord], keep: str) -> Tensor:
    """Which groups are trained on, bool (P,), from advantages (P, G) and all P * G records."""
    used = (advantages != 0).any(1)
    if keep == "mixed":     # code: what the answers earn; by the paper's parts never above 0.75
        earned = torch.tensor([r.accuracy + r.effectiveness for r in records])
        earned = earned.view(advantages.shape).mean(1)
        used &= (earned >= 0.1) & (earned <= 0.9)
    return used


# What the policy does

def behaviour(records: list[rewards.ReflectionRecord], completions: list[qwen.Completion],
              pattern: tuple[str, ...]) -> dict[str, float | None]:
    """Means over responses: what the policy does (rates), what it is paid for (reward, parts)."""
    def mean(values) -> float:
        return float(np.mean(list(values)))
    first, final = (np.array([getattr(r, name) for r in records])
                    for name in ("first_correct", "final_correct"))
    return {"first_accuracy": mean(first), "final_accuracy": mean(final),
            # wrong -> right among the wrong, right -> wrong among the right
            "fix_rate": mean(final[~first]) if not first.all() else None,
            "break_rate": mean(~final[first]) if first.any() else None,
            "format_rate": mean(rewards.format_holds(c.text, pattern) for c in completions),
            "tokens": mean(c.tokens for c in completions),
            "truncated": mean(c.truncated for c in completions),
            "reward": mean(r.total for r in records),
            **{f"part_{name}": mean(getattr(r, name) for r in records) for name in PARTS}}


def evaluate(model, processor: qwen.Processor, rows: list[Row], s, engine=None) -> dict:
    """Greedy decoding of every row -> `behaviour`, with Wilson intervals of both accuracies."""
    rows, completions = ranks.share(rows), []
    for i in range(0, len(rows), s.rollout_batch):          # not all pictures in memory at once
        prompts = encode(rows[i:i + s.rollout_batch], s, processor)
        completions += generate(model, processor, prompts, s, 0.0, engine)
    records = ranks.gather([REWARDS[s.reward](c.text, row.answer, processor, s)
                            for c, row in zip(completions, rows)])
    completions = ranks.gather(completions)
    result, n = behaviour(records, completions, PATTERNS[s.format]), len(records)
    return result | {"rows": n} | {
        f"{name}_interval": wilson(round(result[f"{name}_accuracy"] * n), n)
        for name in ("first", "final")}


def table(results: dict[str, dict]) -> str:
    """{column title: result of `evaluate`} -> an aligned text table."""
    def column(title: str, r: dict) -> dict[str, str]:
        right = {f"{name} answer right": "{:.1%} [{:.1%}, {:.1%}]".format(
            r[f"{name}_accuracy"], *r[f"{name}_interval"]) for name in ("first", "final")}
        rates = {"wrong -> right": r["fix_rate"], "right -> wrong": r["break_rate"],
                 "format holds": r["format_rate"]}
        return {"": title} | right | {name: "-" if rate is None else f"{rate:.1%}"
                                      for name, rate in rates.items()} | {
            "tokens": f"{r['tokens']:.1f}"}
    columns = [column(title, r) for title, r in results.items()]
    return "\n".join(f"{name:20}" + "".join(f"{cells[name]:>26}" for cells in columns)
                     for name in columns[0])


def describe(row: Row, completion: qwen.Completion, record: rewards.ReflectionRecord,
             advantage: float) -> str:
    """One response with its reward, part by part."""
    parts = " + ".join(f"{name} {getattr(record, name):.2f}" for name in PARTS)
    return (f"{printable(row.query)!r}, answer {printable(row.answer)}\n"
            f"    {printable(completion.text)}{' ...' * completion.truncated}\n"
            f"    reward {record.total:.2f} ({parts}), advantage {advantage:+.2f}")
