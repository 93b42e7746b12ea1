"""Stage 1 of SRPO-MLLM (arXiv 2506.01713), the cold start: fine-tuning on first answers, a teacher's reflections and corrected answers.

reasoning/teacher.py makes the rows, `python reflection_srpo.py sft` runs this.
"""
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

import grpo
from plumbing import run as job
from plumbing import ranks as parallel
from reasoning import qwen as vlm
from reasoning.rows import Row
from reasoning.responses import Rejections, encode, micro_batches


def total_steps(rows: int, s) -> int:
    """Of --sft_epochs passes over so many rows."""
    return math.ceil(rows * s.sft_epochs / s.sft_batch)


def fine_tune(s, out: Path, model, processor, rows: list[Row], step: int, optimizer, rejected: Rejections,
              save: Callable[[int], None]) -> int:
    """Steps `step` + 1 .. the last of --sft_epochs; stops early on Ctrl-C. Returns the last step done.

    s: settings of reflection_srpo.py; rows: with targets, others are a ValueError; save: called with the step every --save_every.
    Loss: cross-entropy on the targets' tokens, mean over the tokens of a batch."""
    if missing := [row.source for row in rows if not row.target]:
        raise ValueError(f"{missing[0]} has no target to imitate; make targets with: python -m reasoning.teacher")
    steps = total_steps(len(rows), s)
    order = np.concatenate([np.random.default_rng([s.seed, epoch]).permutation(len(rows)) for epoch in range(math.ceil(s.sft_epochs))])
    log = parallel.metrics_log(out / "sft.jsonl", step)
    model.train()
    stop = False
    with job.ctrl_c() as interrupted, tqdm(total=steps, initial=step, desc="SFT", unit="step", mininterval=1, disable=parallel.rank() > 0) as bar:
        while step < steps and not stop:
            warmup = max(1, round(0.1 * steps))
            optimizer.param_groups[0]["lr"] = s.sft_lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            own = [rows[i] for i in parallel.share(order[step * s.sft_batch:(step + 1) * s.sft_batch])]
            spare = [rows[i] for i in np.random.default_rng([s.seed, step, 1]).permutation(len(rows))]
            some, prompts = encode(own, s, processor, rejected, spare)
            idle = any(busy := parallel.gather([some[0] in own])) and not busy[parallel.rank()]     # beside other ranks' rows a spare one only fills up passes
            targets = [processor.target(row.target) for row in some]
            tokens, total = sum(parallel.gather([0 if idle else sum(map(len, targets))])), 0.0
            for part in parallel.even(list(micro_batches([(len(p.ids), len(t)) for p, t in zip(prompts, targets)], s))):
                counts, part = part is not None and not idle, part or [0]
                inputs, ids, mask = processor.batch([prompts[i] for i in part], [targets[i] for i in part], model.device)
                logp, _ = grpo.token_logprobs(vlm.completion_logits(model, inputs, ids.shape[1]), ids)      # (B, n)
                loss = -(logp * mask * counts).sum() / tokens
                (loss * parallel.world_size()).backward()                                # ranks' gradients are averaged
                total += loss.item()
            total = sum(parallel.gather([total]))
            norm, stepped = grpo.clip_and_step(optimizer, model, s.max_norm)
            step += 1
            log.append({"step": step, "loss": total, "grad_norm": norm, "skipped": not stepped, "lr": optimizer.param_groups[0]["lr"]})
            bar.set_postfix(loss=f"{total:.3f}")
            bar.update()
            stop = bool(parallel.gather(interrupted))               # on any rank
            if step % s.save_every == 0 or step == steps or stop:
                save(step)
    log.close()
    return step
