"""Reflection-aware SRPO for multimodal reasoning (arXiv 2506.01713): a model learns to
answer, reflect, and answer again.

Stage 1, cold start: fine-tuning on first answers, a teacher's reflections and corrected
answers (reasoning/teacher.py makes them). Stage 2, one step, numbered as in `train`:
  1. Sample G responses <think> <answer> <reflection> <think> <answer> to P prompts.
  2. Reward: format, first answer, what the reflection made of it, its form, length.
  3. Advantages compare each response with the others to its own prompt.
  4. Clipped policy gradient over the tokens of the responses.

Without arguments both stages run on small pictures of arrows (reasoning/arrows.py) and
a Qwen2.5-VL of 0.2 M random weights. Left out: a value network, sequence packing.

    python reflection_srpo.py                               # both stages on a laptop
    python reflection_srpo.py --resume out/reflection       # go on after Ctrl-C
    python reflection_srpo.py sft --paper --model Qwen/Qwen2.5-VL-7B-Instruct \\
        --data data/reflections.jsonl --out out/sft
    python reflection_srpo.py rl --paper --model out/sft/policy --data rows.jsonl \\
        --images DIR --out out/rl
    torchrun --nproc-per-node 8 reflection_srpo.py rl --paper ...       # on 8 GPUs
"""
import sys
from dataclasses import dataclass

from plumbing.flags import RunSettings, at_once, check_run, flag, require
from reasoning.flags import EngineSettings, check_engine

REWARDS = ("paper", "openrlhf", "verl", "outcome", "task", "no_effectiveness",
           "no_reflection", "no_length")
ARROWS = ("arrows", "arrows_text")      # data that we draw


@dataclass
class Settings(EngineSettings, RunSettings):
    stage: str = flag("all", "what the command's first word says; all: sft, then rl",
                      choices=["all", "sft", "rl"])
    model: str = flag("", "folder or hub id of a vision-language model; none: a tiny "
                          "Qwen2.5-VL with random weights")
    data: str = flag("arrows", "arrows; arrows_text: without pictures; or rows: JSONL, "
                               "parquet, dataset of the hub; for sft with targets")
    images: str = flag("", "folder the rows' image paths start from (the data's own)")
    columns: list[str] = flag([], "the data's own names: query=problem image=images")
    eval_data: str = flag("", "held-out rows (of arrows 400 new ones, else none)")
    prompt: str = flag("query", "query: the question alone, for the tiny model; "
                                "others: with instructions for that format",
                       choices=["query", "reflection", "plain", "twice"])
    max_pixels: int = flag(1280 * 28 * 28, "larger pictures are scaled down to this")
    max_prompt: int = flag(1024, "rows with longer prompts, in tokens, image tokens "
                                 "included, are set aside (paper: 1024)")
    max_new_tokens: int = flag(56, "longest response, in tokens (paper: 2048)")
    max_length: int = flag(4096, "sft: rows of more tokens are set aside (paper: 4096)")
    sft_rows: int = flag(6400, "sft on arrows: rows to draw")
    target: str = flag("teacher", "sft on arrows: whose responses to imitate; base "
                       "knows the formats, and guesses", choices=["teacher", "base"])
    sft_epochs: float = flag(6.0, "sft: passes over the rows (paper: 1)")
    sft_batch: int = flag(64, "sft: rows per update")
    sft_lr: float = flag(4e-3, "sft: learning rate, 10% warmup, cosine (paper: 1e-5)")
    steps: int = flag(100, "RL steps (paper: about 500)")
    format: str = flag("reflection", "of responses; without reflection, the paper's "
                       "baselines: plain: one attempt; twice: two of them",
                       choices=["reflection", "plain", "twice"])
    reward: str = flag("paper", "paper; of its published codes openrlhf and verl; "
                                "outcome: 1 for a right final answer; task: plain "
                                "GRPO's, half of it for the format; no_PART: the "
                                "paper's less one part", choices=list(REWARDS))
    alpha: float = flag(0.1, "weight of the length in the paper's reward (paper: 0.05 "
                             "and 0.1 tie)")
    prompts: int = flag(128, "P: prompts per step (paper: 128)")
    group_size: int = flag(4, "G: responses per prompt (paper: 8)")
    temperature: float = flag(1.0, "of sampling and of log-probabilities (paper: 1.0)")
    lr: float = flag(3e-4, "rl: learning rate after 10 steps of warmup (paper: 1e-6)")
    minibatch: int = flag(0, "responses per update; 0: all of a step in one")
    epochs: int = flag(1, "passes over a step's responses")
    clip_low: float = flag(0.2, "the ratio is clipped below 1 - this (code: 0.2)")
    clip_high: float = flag(0.2, "and above 1 + this (code: 0.2)")
    beta: float = flag(0.0, "weight of the KL to the starting policy (paper: not "
                            "given; code: 0)")
    aggregate: str = flag("sequence", "mean of each response's tokens, then over "
                          "responses; token: over all tokens; constant: Dr. GRPO",
                          choices=["sequence", "token", "constant"])
    std_scale: bool = flag(True, "divide advantages by the group's standard deviation")
    keep: str = flag("signal", "groups to train on; signal: rewards differ; mixed: and "
                     "the mean of what the answers earn lies within 0.1..0.9 (code)",
                     choices=["signal", "mixed"])
    mask_truncated: bool = flag(False, "responses that were cut off get no gradient")
    freeze_vision: bool = flag(False, "vision tower and projector stay as they are "
                                      "(paper: so; a random tower must learn)")
    device: str = flag("", "cuda or cpu (cuda if there is one)")
    micro_tokens: int = flag(16384, "tokens per forward pass, padding included")
    rollout_batch: int = flag(256, "responses generated at a time")
    importance_cap: float = flag(2.0, "vllm: bound on pi / pi_vllm, by which a token's "
                                      "advantage is weighted; 0: not weighted")
    out: str = flag("out/reflection", "output folder")
    eval_every: int = flag(10, "steps between evaluations; 0: before and after")
    save_every: int = flag(25, "steps between checkpoints")


# The paper's settings, where they differ from the small ones above
PAPER = dict(
    prompt="reflection", max_new_tokens=2048, max_pixels=640 * 28 * 28, sft_epochs=1.0,
    sft_lr=1e-5, steps=500, group_size=8, lr=1e-6, minibatch=128, keep="mixed",
    freeze_vision=True, gradient_checkpointing=True, dtype="bfloat16", rollout_batch=32,
    micro_tokens=8192, eval_every=50)
# May change on resume: they cost memory or time, and change no more than rounding; with
# rollout_batch also the draws
FREE = {"resume", "threads", "eval_every", "save_every", "rollout_batch",
        "micro_tokens", "gradient_checkpointing", "offload_optimizer"}


def check(s: Settings) -> None:
    """ValueError, one line, for a setting out of range."""
    check_run(s, "prompts")
    check_engine(s)
    require(s, dict(steps=0, minibatch=0, sft_rows=1, sft_batch=1, max_new_tokens=1,
                    max_prompt=1, max_length=1, micro_tokens=1, rollout_batch=1,
                    max_pixels=784 * 4, alpha=0, importance_cap=0),
            ("sft_lr", "sft_epochs"))
    if s.format != "reflection" and s.stage != "sft" and s.reward not in (
            "task", "outcome"):
        raise ValueError(f"--reward {s.reward} reads reflections; with --format "
                         f"{s.format} give --reward task")
    if s.stage == "all" and s.data not in ARROWS:
        raise ValueError("--data needs a stage: python reflection_srpo.py sft ... "
                         "(rows with targets) or rl ...")
    if s.stage != "all" and not s.model and (s.stage == "rl" or s.data not in ARROWS):
        raise ValueError(f"{s.stage} needs --model: a folder or hub id")
    if s.stage == "rl" and s.prompt not in ("query", s.format):
        raise ValueError(f"--prompt {s.prompt} and --format {s.format} must be alike")
    if s.data in ARROWS and (s.reward == "verl" or s.prompt != "query"):
        raise ValueError("the arrows have no boxed answers, which --reward verl reads, "
                         f"and no words for --prompt {s.prompt}; give --data")


READING = dict(paper=PAPER, words=("sft", "rl"), about=__doc__.split("\n\n")[0])
if __name__ == "__main__":      # before torch is imported: --help takes no seconds
    at_once(Settings, check, **READING)

import math
from pathlib import Path

import numpy as np
import torch

import grpo
from plumbing import plots, ranks
from plumbing.files import whole
from plumbing.run import Run, launch
from plumbing.update import Update
from reasoning import arrows
from reasoning import responses as r
from reasoning.engine import corrected
from reasoning.parts import Parts, drawn, load, prepared, read_rows, save_policy
from reasoning.planned import job
from reasoning.rows import Row


def cold_start(run: Run, parts: Parts, rows: list[Row]) -> None:
    """Stage 1: cross-entropy on the targets' tokens, mean over a batch's   [MLLM 1]"""
    s, model, processor = run.s, parts.model, parts.processor
    if missing := [row.source for row in rows if not row.target]:
        raise ValueError(f"{missing[0]} has no target to imitate; make targets with: "
                         "python -m reasoning.teacher")
    steps = math.ceil(len(rows) * s.sft_epochs / s.sft_batch)
    orders = [np.random.default_rng([s.seed, epoch]).permutation(len(rows))
              for epoch in range(math.ceil(s.sft_epochs))]
    batches = np.split(np.concatenate(orders), range(
        s.sft_batch, len(orders) * len(rows), s.sft_batch))
    model.train()
    for step in run.steps(steps, stage="sft", log="sft.jsonl"):
        warm = min(1, step / max(1, round(0.1 * steps)))
        rate = s.sft_lr * warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        parts.optimizer.param_groups[0]["lr"] = rate
        own = [rows[i] for i in run.mine(batches[step - 1])]
        some = own or rows[:1]      # of a rank without rows: its pass counts nothing
        batch = r.Batch(r.encode(some, s, processor),
                        [processor.target(row.target) for row in some], None, len(own))
        tokens = sum(run.gather([len(x) for x in batch.completions[:len(own)]]))
        update = Update(model, parts.optimizer, lambda seen: {
            "loss": sum(x["loss"] for x in seen)}, s.max_norm)
        for chosen in update.minibatches(len(own), 1, 0):
            for part in update.micro_batches(chosen, r.split(batch, s)):
                logp, _, mask = r.logprobs(model, processor, batch, part)       # (B, n)
                loss = -(logp * mask).sum() / tokens
                update.backward(loss, {"loss": loss.detach()})
            update.step()
        row = update.summary() | {"lr": rate}
        run.log(row, f"loss {row['loss']:.3f}", every=100)


def train(run: Run, parts: Parts, rows: list[Row], heldout: list[Row],
          before: dict) -> None:
    """Stage 2: the RL steps."""
    s, model, processor = run.s, parts.model, parts.processor
    zero = {f"heldout_{name}": x for name, x in before.items()}
    for step in run.steps(s.steps, stage="rl", zero=zero or {"reward": None}):
        parts.optimizer.param_groups[0]["lr"] = s.lr * min(1, step / 10)

        # 1. Sample G responses to each of P prompts
        drawn = run.rng.choice(len(rows), min(s.prompts, len(rows)), replace=False)
        own = [rows[i] for i in run.mine(drawn)]
        prompts = [p for p in r.encode(own, s, processor) for _ in range(s.group_size)]
        completions = r.generate(model, processor, prompts, s, s.temperature,
                                 parts.engine)
        run.lap("rollout")

        # 2. What each earns                                    [MLLM 4] to [MLLM 8]
        asked = [row for row in own for _ in range(s.group_size)]
        records = [r.REWARDS[s.reward](c.text, row.answer, processor, s)
                   for c, row in zip(completions, asked)]
        everyone = run.gather(records)
        reward = torch.tensor([record.total for record in everyone])
        reward = reward.view(-1, s.group_size)                                  # (P, G)
        run.lap("reward")

        # 3. Advantages, each response beside the others to its prompt      [MLLM 3]
        advantages = grpo.group_advantages(reward, scale=s.std_scale)           # (P, G)
        used = r.groups_used(advantages, everyone, s.keep)                      # (P,)
        advantage = torch.stack(run.mine(advantages)).flatten()     # of this rank's
        trained = torch.stack(run.mine(used)).repeat_interleave(s.group_size)
        if s.mask_truncated:
            trained &= ~torch.tensor([c.truncated for c in completions])
        batch = r.chosen_rows(prompts, completions, advantage, trained)

        # 4. Clipped policy gradient over the tokens of the responses       [MLLM 2]
        model.train()
        update = Update(model, parts.optimizer, grpo.merge_stats, s.max_norm)
        lengths = torch.tensor(run.gather(
            [tokens for _, tokens in batch.lengths[:batch.rows]]))      # of all ranks
        count = len(lengths)
        updates = s.epochs * math.ceil(count / (s.minibatch or count or 1))
        # Of the policy that sampled; one update's own serve: it starts at ratio 1
        old = r.frozen_logprobs(model, processor, batch, s) if updates > 1 else None
        ref = r.reference_logprobs(model, parts.reference, processor, batch, s)
        for chosen in update.minibatches(
                batch.rows, s.epochs, s.minibatch, batch.owner):
            normalizer = {"sequence": len(chosen), "token": int(lengths[chosen].sum()),
                          "constant": len(chosen) * s.max_new_tokens}[s.aggregate]
            for part in update.micro_batches(chosen, r.split(batch, s)):
                logp, entropy, mask = r.logprobs(
                    model, processor, batch, part, s.temperature)               # (B, n)
                old_part = r.padded(old, part)
                weighted, gap = corrected(
                    batch.advantages[part], logp if old is None else old_part,
                    r.padded(batch.sampled, part), mask, s.importance_cap)
                each = grpo.row_weights(mask) if s.aggregate == "sequence" else None
                loss, stats = grpo.policy_loss(
                    logp, old_part, weighted, mask, ref_logp=r.padded(ref, part),
                    clip=(s.clip_low, s.clip_high), beta=s.beta, row_weight=each,
                    normalizer=normalizer)
                mean_entropy = (entropy.detach() * mask).sum() / mask.sum()
                update.backward(loss, stats | gap | {"entropy": mean_entropy})
            update.step()
        run.lap("update")

        row = r.behaviour(everyone, run.gather(completions), r.PATTERNS[s.format])
        row |= update.summary() | {
            "reward_std": float(reward.std()), "groups_used": int(used.sum()),
            "groups": len(used), "lr": parts.optimizer.param_groups[0]["lr"],
            "sampled_tokens": sum(run.gather([c.tokens for c in completions]))}
        if heldout and run.due(s.eval_every):
            result = r.evaluate(model, processor, heldout, s, parts.engine)
            row |= {f"heldout_{name}": x for name, x in result.items()}
            run.say(f"step {step:4d}  held-out, greedy: first answer "
                    f"{result['first_accuracy']:.1%}, "
                    f"final {result['final_accuracy']:.1%}")
        run.log(row, f"first {row['first_accuracy']:5.1%}  "
                     f"final {row['final_accuracy']:5.1%}  reward {row['reward']:.3f}  "
                     f"groups used {row['groups_used']:2d}/{row['groups']}  "
                     f"tokens {row['tokens']:.0f}", every=10)
        if step % 25 == 1:
            i = int(run.rng.integers(len(prompts)))
            run.say("  sample: " + r.describe(asked[i], completions[i], records[i],
                                              float(advantage[i])))


# The whole job

def work(run: Run) -> int:
    s, out = run.s, run.out
    ranks.use_cores(s.threads)
    base = s.model or str(out / "base")
    if not s.model and run.fresh and run.first_rank:
        torch.manual_seed(s.seed)
        with whole(out / "base") as draft:
            arrows.tiny_vlm(draft)
    ranks.barrier()
    # From the folder, as a run that is resumed here: new adapters on merged weights
    start = base if s.stage == "rl" else out / "sft"
    cold = s.stage != "rl" and run.stage != "rl"
    parts = load(run, base if cold else start)
    total, trained = (sum(p.numel() for p in some) for some in (
        parts.model.parameters(), ranks.trainable(parts.model).values()))
    print(f"{total:,} parameters, {trained:,} of them trained, on {ranks.world_size()} "
          f"x {parts.model.device.type}; results go to {out}/{run.where()}")
    if cold:
        rows = (drawn(s, s.sft_rows, s.seed, s.target) if s.data in ARROWS
                else read_rows(run, s.data, parts.processor))
        cold_start(run, parts, rows)
        if not run.finished:
            return run.stopped()
        save_policy(parts, out / ("policy" if s.stage == "sft" else "sft"))
        print(f"fine-tuned in {run.age():.0f} s")
        if s.stage == "sft":
            print(f"wrote {out}/policy/, {out}/sft.jsonl")
            return 0
        parts = load(run, start)
    return reinforce(run, parts, start)


def reinforce(run: Run, parts: Parts, start: str | Path) -> int:
    """Stage 2 from a fine-tuned model, with what comes before and after it."""
    s, out = run.s, run.out
    if s.data in ARROWS:
        rows = drawn(s, s.steps * s.prompts, s.seed + 1000)
        heldout = drawn(s, 400, 10**6)
    else:
        rows, heldout = (read_rows(run, x, parts.processor) if x else []
                         for x in (s.data, s.eval_data))
    before = run.once("before.json", lambda: r.evaluate(
        parts.model, parts.processor, heldout, s, parts.engine) if heldout else {})
    if s.beta and not s.lora_rank:
        parts.reference = prepared(start, s)[0].to("cpu").requires_grad_(False).eval()
    train(run, parts, rows, heldout, before)
    if run.finished:
        save_policy(parts, out / "policy")
    if not run.first_rank:
        return 0 if run.finished else 130
    metrics = plots.read_metrics(out / "metrics.jsonl")
    plots.draw_reflection_curves({s.reward: [metrics]}, out / "curves.png")
    if not run.finished:
        return run.stopped()
    if heldout:
        after = run.write("after.json", {
            name.removeprefix("heldout_"): x for name, x in metrics[-1].items()
            if name.startswith("heldout_")})
        print(f"\n{len(heldout)} held-out questions, greedy, 95% Wilson intervals\n"
              + r.table({"after SFT": before, f"after {s.steps} RL steps": after}))
    print(f"{run.age():.0f} s; metrics.jsonl, curves.png, policy/ are in {out}/")
    return 0


def main(argv: list[str] | None = None) -> int:
    return launch(Settings, work, argv, check=check, free=FREE, job=job, **READING)


if __name__ == "__main__":
    sys.exit(main())
