"""Reflection-aware SRPO for multimodal reasoning (arXiv 2506.01713): a model learns to answer, reflect, and answer again.

Stage 1, cold start (reasoning/sft.py): fine-tuning on first answers, a teacher's reflections and corrected answers (reasoning/teacher.py makes them).
Stage 2, one step, numbered as in `train`:
  1. Sample G responses <think> <answer> <reflection> <think> <answer> to each of P prompts.
  2. Reward: format, first answer, what the reflection made of it, a well-formed reflection, length (rewards.py).
  3. Advantages are normalised within the G responses to a prompt; groups whose rewards are all equal are dropped.
  4. A clipped policy-gradient update on the tokens of the responses (grpo.py).

Without arguments both stages run on small pictures of arrows (reasoning/arrows.py) with a Qwen2.5-VL of 0.2 M parameters from random weights. The same file
trains the real one; --paper sets the paper's values, other flags override them. Left out: vLLM (generation is transformers'), sequence
packing, a value network.

    python reflection_srpo.py                                           # both stages on a laptop
    python reflection_srpo.py --resume out/reflection                   # go on after Ctrl-C or a crash
    python reflection_srpo.py sft --paper --model Qwen/Qwen2.5-VL-7B-Instruct --data data/reflections.jsonl --out out/sft
    python reflection_srpo.py rl --paper --model out/sft/policy --data rows.jsonl --images DIR --out out/rl
    torchrun --nproc-per-node 8 reflection_srpo.py rl --paper ...       # sft and rl on 8 GPUs: plumbing/ranks.py
"""
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch: idle threads sleep instead of keeping cores busy

import numpy as np
import torch
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from reasoning import answers
from reasoning import arrows
import eval as evaluation
import grpo
from plumbing import run as job
from plumbing import ranks as parallel
from plumbing import plan
from reasoning import rows as reflection_data
import rewards
from reasoning import qwen as vlm
from plumbing.run import flag
from plumbing.update import check_update, clipped_updates
from reasoning.rows import Row
from reasoning.responses import Rejections, behaviour, encode, evaluate, frozen_logprobs, generate, logprobs, micro_batches, reference_logprobs, score, table
from reasoning.sft import fine_tune, total_steps

REWARDS = ("paper", "openrlhf", "verl", "outcome", "no_length")


@dataclass
class Settings:
    model: str = flag("", "folder or hub id of a vision-language model (default: a tiny Qwen2.5-VL with random weights)")
    data: str = flag("arrows", "arrows, or rows as reasoning/rows.py reads them: JSONL, parquet, dataset of the hub; for sft with targets")
    images: str = flag("", "folder the rows' image paths start from (default: the data's own)")
    columns: list[str] = flag([], "the data's own names: query=problem image=images")
    eval_data: str = flag("", "held-out rows (default: of arrows 400 new ones, of other data none)")
    prompt: str = flag("query", "query: the question alone, for the tiny model; reflection: with instructions", choices=["query", "reflection"])
    max_pixels: int = flag(reflection_data.MAX_PIXELS, "larger pictures are scaled down to this area")
    max_prompt: int = flag(1024, "rows with longer prompts, in tokens, image tokens included, are set aside (paper: 1024)")
    max_new_tokens: int = flag(56, "longest response, in tokens (paper: 2048)")
    max_length: int = flag(4096, "sft: rows of more tokens, prompt and target, are set aside (paper: 4096)")
    sft_rows: int = flag(6400, "sft on arrows: rows to draw")
    sft_epochs: float = flag(6.0, "sft: passes over the rows (paper: 1)")
    sft_batch: int = flag(64, "sft: rows per update")
    sft_lr: float = flag(4e-3, "sft: learning rate, 10%% warmup, cosine (paper: 1e-5)")
    steps: int = flag(100, "RL steps (paper: about 500)")
    reward: str = flag("paper", "paper, or of its published codes openrlhf and verl; outcome: 1 for a right final answer; no_length: paper's "
                                "without the length term", choices=list(REWARDS))
    prompts: int = flag(32, "P: prompts per step (paper: 128)")
    group_size: int = flag(8, "G: responses per prompt (paper: 8)")
    temperature: float = flag(1.0, "of sampling and of the log-probabilities alike (paper: 1.0)")
    lr: float = flag(5e-4, "rl: learning rate after 10 steps of warmup (paper: 1e-6)")
    minibatch: int = flag(128, "responses per update; 0: all of a step in one (strictly on-policy)")
    epochs: int = flag(1, "passes over a step's responses")
    clip_low: float = flag(0.2, "ratio is clipped below 1 - this")
    clip_high: float = flag(0.2, "and above 1 + this (paper: 0.2 on both sides)")
    beta: float = flag(0.0, "weight of the KL to the starting policy (the paper writes the term, its script sets 0)")
    aggregate: str = flag("sequence", "mean of each response's tokens, then over responses; token: over all tokens; constant: Dr. GRPO",
                          choices=["sequence", "token", "constant"])
    std_scale: bool = flag(True, "divide advantages by the group's standard deviation (False: Dr. GRPO)")
    keep: str = flag("signal", "groups to train on; signal: rewards differ; mixed: and the mean of what the answers earn lies within 0.1..0.9, as published",
                     choices=["signal", "mixed"])
    mask_truncated: bool = flag(False, "responses cut off at --max_new_tokens get no gradient")
    max_norm: float = flag(1.0, "gradient clipping")
    freeze_vision: bool = flag(False, "the vision tower and projector stay as they are, in sft and rl (paper: so; a random tower must learn)")
    lora_rank: int = flag(0, "train LoRA adapters of this rank on the language model; 0: all weights")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, a third more time")
    offload_optimizer: bool = flag(False, "optimiser state and step on the CPU, for one process: 12 of 16 bytes a weight leave the GPU")
    dtype: str = flag("float32", "of the weights; bfloat16 keeps fp32 master weights in the optimiser", choices=["float32", "bfloat16"])
    device: str = flag("", "default: cuda if there is one")
    micro_tokens: int = flag(16384, "tokens per forward pass, padding included; smaller saves memory, same gradient (in bf16 to rounding)")
    rollout_batch: int = flag(256, "responses generated at a time")
    stage: str = flag("all", "what the command's first word says; all: sft, then rl", choices=["all", "sft", "rl"])
    seed: int = flag(0, "of weights, data, sampling")
    out: str = flag("out/reflection", "output folder")
    resume: str = flag("", "folder of a run to go on with; its settings are taken over, others given must agree")
    eval_every: int = flag(10, "steps between held-out evaluations, greedy; 0: only before and after")
    save_every: int = flag(25, "steps between checkpoints")
    threads: int = flag(2, "torch threads; 0: all cores")


# The paper's settings, where they differ from the small ones above
PAPER = dict(prompt="reflection", max_new_tokens=2048, sft_epochs=1.0, sft_lr=1e-5, steps=500, prompts=128, lr=1e-6,
             max_pixels=640 * 28 * 28, keep="mixed", freeze_vision=True, gradient_checkpointing=True, dtype="bfloat16", rollout_batch=32, micro_tokens=8192,
             eval_every=50)
# May change on resume: what costs memory or time and changes no result but for rounding, and with rollout_batch the draws
FREE = {"out", "resume", "threads", "eval_every", "save_every", "rollout_batch", "micro_tokens", "gradient_checkpointing", "offload_optimizer"}


def check(s: Settings) -> None:
    """ValueError, one line, for a setting out of range."""
    job.require(s, dict(steps=0, prompts=1, group_size=2, epochs=1, minibatch=0, sft_rows=1, sft_batch=1, max_new_tokens=1, max_prompt=1, max_length=1,
                        micro_tokens=1, rollout_batch=1, save_every=1, eval_every=0, threads=0, seed=0, beta=0, lora_rank=0,
                        max_pixels=reflection_data.MIN_PIXELS),
                ("temperature", "lr", "sft_lr", "sft_epochs", "max_norm", "clip_low", "clip_high"), {"group_size": "a group of one has no baseline"})
    check_update(s, "prompts")


# Stage 2

@dataclass
class Batch:
    """A step's responses that have an advantage, N of this rank."""
    prompts: list[vlm.Prompt]
    completions: list[torch.Tensor]     # (n_i,) int64
    advantages: torch.Tensor            # (N,) float32
    idle: bool = False                  # this rank has none: the one row only fills up passes


def update(model, reference, processor, optimizer, batch: Batch, s: Settings) -> dict:
    """`clipped_updates` over a step's batch; minibatches and normalisers are of all ranks' responses."""
    own = [] if batch.idle else list(map(len, batch.completions))
    tokens = torch.tensor(parallel.gather(own))                                                         # of all ranks' responses
    lengths = [(len(p.ids), len(c)) for p, c in zip(batch.prompts, batch.completions)]
    padded = lambda rows, part: rows and torch.nn.utils.rnn.pad_sequence([rows[i] for i in part], batch_first=True)     # (B, n)
    old = ref = None
    if s.epochs * math.ceil(len(tokens) / (s.minibatch or len(tokens))) > 1:        # else the only update starts at ratio 1, and its own log-probabilities serve
        with parallel.gathered(model):
            old = frozen_logprobs(model, processor, batch.prompts, batch.completions, s)
    if s.beta:
        ref = reference_logprobs(model, reference, processor, batch.prompts, batch.completions, s)

    def loss(part, normalizer: float):
        counted, part = part is not None, [lengths.index(min(lengths, key=sum))] if part is None else part
        logp, entropy, mask = logprobs(model, processor, [batch.prompts[i] for i in part], [batch.completions[i] for i in part], s.temperature)     # (B, n)
        mask = mask & counted
        value, stat = grpo.policy_loss(logp, padded(old, part), batch.advantages[part].to(logp.device), mask, ref_logp=padded(ref, part), beta=s.beta,
                                       clip=(s.clip_low, s.clip_high), aggregate=s.aggregate, normalizer=normalizer)
        return value, stat | {"entropy": (entropy.detach() * mask).sum() / mask.sum()}
    return clipped_updates(model, optimizer, len(own), s.epochs, s.minibatch,
                           lambda rows: [rows[part].tolist() for part in micro_batches([lengths[i] for i in rows], s)],
                           lambda rows: grpo.loss_normalizer(torch.arange(int(tokens[rows].max())) < tokens[rows, None], s.aggregate, s.max_new_tokens),
                           loss, s.max_norm)


def train(s: Settings, out: Path, model, reference, processor, rows: list[Row], heldout: list[Row], step: int, optimizer, before: dict,
          rejected: Rejections) -> int:
    """Steps `step` + 1 .. s.steps; stops early on Ctrl-C. Returns the last step done."""
    log = parallel.metrics_log(out / "metrics.jsonl", step or -1)
    if step == 0:
        log.append({"step": 0, **{f"heldout_{k}": x for k, x in before.items()}})
    stop = False
    with job.ctrl_c() as interrupted, tqdm(total=s.steps, initial=step, desc=f"RL, {s.reward}", unit="step", mininterval=1,
                                            disable=parallel.rank() > 0) as bar:
        while step < s.steps and not stop:
            step += 1
            # Each step has its own random numbers, a function of (seed, step): so a resumed run repeats an uninterrupted one.
            rng = np.random.default_rng([s.seed, step])
            torch.manual_seed(int(rng.integers(2**62)) + parallel.rank())           # of choices all ranks make together: rng
            optimizer.param_groups[0]["lr"] = s.lr * min(1, step / 10)

            began = time.perf_counter()                                                 # 1. responses
            chosen = parallel.share(rng.choice(len(rows), min(s.prompts, len(rows)), replace=False))
            chosen, prompts = encode([rows[i] for i in chosen], s, processor, rejected, [rows[i] for i in rng.permutation(len(rows))])
            repeated = [p for p in prompts for _ in range(s.group_size)]
            completions = generate(model, processor, repeated, s, s.temperature)
            sampled = time.perf_counter()

            answers = [row.answer for row in chosen for _ in range(s.group_size)]       # 2. rewards
            records = [score(c.text, answer, s.reward, processor) for c, answer in zip(completions, answers)]
            first = sum(parallel.gather([len(records)])[:parallel.rank()])
            records, completions = parallel.gather(records), parallel.gather(completions)           # from here on all ranks' responses
            reward = torch.tensor([r.total for r in records]).view(-1, s.group_size)    # (P, G)
            scored = time.perf_counter()

            advantages = grpo.group_advantages(reward, scale=s.std_scale)               # 3. advantages (P, G)
            used = groups_used(advantages, records, s)
            flat, own = advantages.flatten(), range(first, first + len(repeated))
            trained = [bool(used[i // s.group_size]) and not (s.mask_truncated and c.truncated) for i, c in enumerate(completions)]
            keep = [i for i in own if trained[i]]

            model.train()                                                               # 4. update
            batch = Batch(*zip(*[(repeated[i - first], completions[i].ids) for i in keep or own[:1]]), flat[keep or own[:1]], idle=not keep)
            stats = update(model, reference, processor, optimizer, batch, s) if any(trained) else {"updates": 0, "skipped": 0}
            if stats["skipped"]:
                tqdm.write(f"step {step}: {stats['skipped']} updates skipped, loss or gradient not finite")
            tokens = sum(c.tokens for c in completions)
            row = {"step": step, **behaviour(records, completions), "reward_std": float(reward.std()), "groups_used": int(used.sum()),
                   "groups": len(used), **stats, "lr": optimizer.param_groups[0]["lr"], "sampled_tokens": tokens,
                   "seconds_rollout": sampled - began, "seconds_reward": scored - sampled, "seconds_update": time.perf_counter() - scored}
            if heldout and (step == s.steps or s.eval_every and step % s.eval_every == 0):
                row |= {f"heldout_{k}": x for k, x in evaluate(model, processor, heldout, s, rejected).items()}
                tqdm.write(f"step {step:4d}  held-out, greedy: first answer {row['heldout_first_accuracy']:.1%}, "
                           f"final {row['heldout_final_accuracy']:.1%}")
            log.append(row)
            bar.set_postfix(first=f"{row['first_accuracy']:.0%}", final=f"{row['final_accuracy']:.0%}", reward=f"{row['reward']:.2f}")
            bar.update()
            if step % 10 == 0 or step == 1:
                tqdm.write(f"step {step:4d}  first {row['first_accuracy']:5.1%}  final {row['final_accuracy']:5.1%}  reward {row['reward']:.3f}  "
                           f"groups used {row['groups_used']:2d}/{row['groups']}  tokens {row['tokens']:.0f}  rollout {row['seconds_rollout']:.1f} s"
                           f"  update {row['seconds_update']:.1f} s")
            if step % 25 == 1:
                i = int(rng.integers(len(repeated)))                                # the first rank's, which prints, come first
                tqdm.write("  sample: " + describe(chosen[i // s.group_size], completions[i], records[i], float(flat[i])))
            stop = bool(parallel.gather(interrupted))                                   # on any rank
            if step % s.save_every == 0 or step == s.steps or stop:
                save(out, s, "rl", step, model, optimizer)
    log.close()
    return step


def groups_used(advantages: torch.Tensor, records: list[rewards.ReflectionRecord], s: Settings) -> torch.Tensor:
    """Which groups are trained on, bool (P,), from advantages (P, G) and the P * G records. Code: "mixed" looks at what the answers
    earn, without format and length; of the paper's parts that is 0.75 at most, and only the lower bound acts."""
    used = (advantages != 0).any(1)
    if s.keep == "mixed":
        earned = torch.tensor([r.accuracy + r.effectiveness for r in records]).view(advantages.shape).mean(1)
        used &= (earned >= 0.1) & (earned <= 0.9)
    return used


def describe(row: Row, completion: vlm.Completion, record: rewards.ReflectionRecord, advantage: float) -> str:
    """One response with its reward, part by part."""
    parts = " + ".join(f"{name} {getattr(record, name):.2f}" for name in ("format", "accuracy", "effectiveness", "reflection", "length"))
    parts = f"half of {parts}" if record.variant == "verl" else parts           # its code's weights
    return (f"{row.query!r}, answer {row.answer}\n    {completion.text}{' ...' if completion.truncated else ''}\n"
            f"    reward {record.total:.2f} ({parts}), advantage {advantage:+.2f}")


# Models, checkpoints, the whole job

def load(s: Settings, path: str | Path):
    """(model ready for training, processor)."""
    model, processor = vlm.load_vlm(path, getattr(torch, s.dtype), s.device or parallel.device())
    return prepared(model, s), processor


def prepared(model, s: Settings):
    """A model with what is frozen frozen, and the adapters and the checkpointing that the settings ask for."""
    if s.freeze_vision:
        model.model.visual.requires_grad_(False)                # the tower and, in `merger`, the projector
    if s.lora_rank:
        from peft import LoraConfig, get_peft_model
        config = LoraConfig(r=s.lora_rank, lora_alpha=2 * s.lora_rank, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")
        torch.manual_seed(s.seed)                               # the same adapters on every rank
        model = get_peft_model(model, config)
    if s.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def optimizer_of(model, s: Settings) -> grpo.MasterAdamW:
    """Of the model, which is divided among the ranks first."""
    return grpo.make_optimizer(parallel.shard(model), s.lr, betas=(0.9, 0.99), offload=s.offload_optimizer)


def save(out: Path, s: Settings, stage: str, step: int, model, optimizer) -> None:
    """stage: where the run is, sft or rl. What does not train is not saved: the vision tower, or all but the adapters."""
    parallel.save_checkpoint(out / "checkpoint", parallel.trainable(model), optimizer, {"stage": stage, "step": step, "settings": asdict(s)})


def save_policy(model, processor, path: Path) -> None:
    """A checkpoint folder that `--model` and eval.py load; LoRA adapters are merged into it, and saved alone beside it."""
    weights = parallel.whole_weights(model)
    if hasattr(model, "peft_config"):
        adapters = parallel.whole(parallel.trainable(model))
        if parallel.rank() == 0:
            model.save_pretrained(path.with_name(path.name + "_adapter"), state_dict=adapters)
        model = model.get_base_model()
    if parallel.rank() == 0:
        model.save_pretrained(path, state_dict=weights)
        processor.save_pretrained(path)
    parallel.barrier()


def read_rows(data: str, s: Settings, rejected: Rejections) -> list[Row]:
    rows, bad = reflection_data.read_rows(data, s.images or None, reflection_data.column_names(s.columns))
    for item in bad:
        rejected.add(item, item.reason)
    for row in rows:
        if answers.default_verify(row.answer, row.answer) is None:
            rejected.add(row, f"unreadable ground truth: {row.answer[:80]!r}")
    return [row for row in rows if row.id not in rejected.seen]


def run(s: Settings, given: set[str] = frozenset()) -> int:
    """The whole job; returns the exit code."""
    s, out, saved = job.begin(s, given, FREE, s.out)
    check(s)
    stage = s.stage
    if stage == "all" and s.data != "arrows":
        raise ValueError("--data needs a stage: python reflection_srpo.py sft ... (rows with targets) or rl ...")
    if stage != "all" and not s.model:
        raise ValueError(f"{stage} needs --model: a folder or hub id")
    if s.reward == "verl" and s.data == "arrows":
        raise ValueError("--reward verl reads boxed answers, which the arrows do not have; give --data")
    torch.set_num_threads(s.threads or os.cpu_count())
    logging.disable_progress_bar()
    job.make_folder(out)
    rejected = Rejections(out)
    began, base = time.time(), s.model or str(out / "base")
    if not s.model and parallel.rank() == 0 and saved is None:
        shutil.rmtree(out / "base", ignore_errors=True)         # of a run killed before its first checkpoint, maybe with another seed
        torch.manual_seed(s.seed)
        arrows.tiny_vlm(out / "base")
    parallel.barrier()
    print(plan.announced(s, base))
    model, processor = load(s, base if saved is None or saved["stage"] == "sft" or stage == "rl" else out / "sft")
    optimizer = optimizer_of(model, s)
    step = 0
    if saved:
        parallel.load_checkpoint(out / "checkpoint", parallel.trainable(model), optimizer)
        step = saved["step"]
    if parallel.rank() == 0:
        (out / "settings.json").write_text(json.dumps(asdict(replace(s, out="", resume="")), indent=1) + "\n")
    print("settings: " + "  ".join(f"{k}={v}" for k, v in asdict(s).items() if v not in ("", [])))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(map(torch.Tensor.numel, parallel.trainable(model).values())):,} of them trained, "
          f"on {parallel.world_size()} x {model.device.type}; results go to {out}/" + (f"; resumed after step {step} of {saved['stage']}" if saved else ""))
    if s.data == "arrows":
        heldout = arrows.dataset(400, seed=10**6)
    else:
        heldout = read_rows(s.eval_data, s, rejected) if s.eval_data else []

    if stage != "rl" and (saved is None or saved["stage"] == "sft"):
        rows = arrows.dataset(s.sft_rows, s.seed, targets=True) if s.data == "arrows" else read_rows(s.data, s, rejected)
        done = fine_tune(s, out, model, processor, rows, step, optimizer, rejected, lambda at: save(out, s, "sft", at, model, optimizer))
        if done < total_steps(len(rows), s):
            print(f"stopped after step {done}; go on with: python reflection_srpo.py --resume {out}")
            return 130
        save_policy(model, processor, out / ("sft" if stage == "all" else "policy"))
        print(f"fine-tuned in {time.time() - began:.0f} s")
        if stage == "sft":
            print(f"wrote {out}/policy/, {out}/sft.jsonl")
            return 0
        # Anew from the saved folder, as a run resumed here would be: adapters, if any, start over from the merged weights
        model, processor = load(s, out / "sft")
        optimizer, step = optimizer_of(model, s), 0

    if step == 0:
        before = evaluate(model, processor, heldout, s, rejected) if heldout else {}
        if parallel.rank() == 0:
            (out / "before.json").write_text(json.dumps(before, indent=1))
        save(out, s, "rl", 0, model, optimizer)
    before = json.loads((out / "before.json").read_text())
    reference = None
    if s.beta and not s.lora_rank:
        reference, _ = load(s, (out / "sft") if stage == "all" else base)
        reference.to("cpu").requires_grad_(False).eval()
    rows = arrows.dataset(s.steps * s.prompts, s.seed + 1000) if s.data == "arrows" else read_rows(s.data, s, rejected)
    done = train(s, out, model, reference, processor, rows, heldout, step, optimizer, before, rejected)
    if done == s.steps:
        save_policy(model, processor, out / "policy")
    if parallel.rank():
        return 0 if done == s.steps else 130
    metrics = evaluation.read_metrics(out / "metrics.jsonl")
    evaluation.draw_reflection_curves({s.reward: [metrics]}, out / "curves.png")
    if done < s.steps:
        print(f"stopped after step {done}; go on with: python reflection_srpo.py --resume {out}")
        return 130
    if heldout:
        after = {k.removeprefix("heldout_"): x for k, x in metrics[-1].items() if k.startswith("heldout_")}
        (out / "after.json").write_text(json.dumps(after, indent=1))
        print(f"\n{len(heldout)} held-out questions, greedy, 95% Wilson intervals\n"
              + table({"after SFT": before, f"after {s.steps} RL steps": after}))
    print(f"{time.time() - began:.0f} s; wrote " + ", ".join(f"{out}/{name}" for name in ("metrics.jsonl", "curves.png", "policy/", "checkpoint/")))
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    stage, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("all", argv)
    parser = HfArgumentParser(Settings, prog="reflection_srpo.py [sft | rl]", description="Reflection-aware SRPO", allow_abbrev=False)
    parser.add_argument("--plan", action="store_true", help="only say what the flags need of the GPU, and what would stop the run")
    parser.add_argument("--paper", action="store_true", help="the paper's settings, but for flags given")
    if "--paper" in argv:
        parser.set_defaults(**PAPER)

    def work() -> int:
        if stage not in ("all", "sft", "rl"):
            raise ValueError(f"no command {stage!r}; there are sft and rl, and none for the small run")
        s, more, given = job.parse(parser, argv)
        given -= {"paper", "plan"}
        if stage in ("sft", "rl"):
            s.stage = stage
            given.add("stage")
        with plan.explained(s):
            parallel.start()
            if s.resume and more.plan:
                s, _, _ = job.begin(s, given, FREE, s.out)
            if not s.resume or more.plan:              # else `run` checks the settings of the run
                check(s)
            code = plan.show(s, s.model or s.resume and str(Path(s.resume) / "base")) if more.plan else run(s, given)
            parallel.stop()
            return code
    return job.command(work)


if __name__ == "__main__":
    sys.exit(main())
