"""Steps of GRPO side by side with TRL's GRPOTrainer: seconds, peak memory, and whether both compute
the same.

Generation, reward and update on the same model, prompts, lengths and settings, fp32, the two in
turn, each in a process of its own, so that other load on the machine meets both; the first step
warms up. It stops if they did not do the same work. On a CPU TRL also scores the prompts' tokens,
which it leaves out on a GPU. With LoRA the two draw other adapters, so that gradients differ.

    pip install trl && python -m studies.bench_trl      # the small Qwen2.5-VL of studies/bench.py
    python -m studies.bench_trl --model qwen2.5-vl-7b   # LoRA, bf16, checkpointing: a GPU's minutes
"""
# ruff: noqa: E402
import sys
from dataclasses import dataclass

from plumbing.flags import flag, require, script

GROUP, LR = 4, 1e-4             # responses to a prompt, as in studies/bench.py; learning rate
FIGURES = "seconds", "seconds_rollout", "peak_gib", "steps_gib"     # of a step; of its generation


@dataclass
class Settings:
    model: str = flag("qwen2.5-vl-small", "random weights of real shapes",
                      choices=["qwen2.5-vl-small", "qwen2.5-vl-7b"])
    lora_rank: int = flag(0, "of adapters on both sides; 0: all weights, at 7B 32")
    rows: int = flag(32, f"responses a step, {GROUP} to a prompt")
    threads: int = flag(1, "torch threads on the CPU")
    out: str = flag("results/bench/trl.json", "JSON")


def check(s: Settings) -> None:
    require(s, dict(threads=1, lora_rank=0))
    if s.rows < GROUP or s.rows % GROUP:
        raise ValueError(f"--rows must be a multiple of {GROUP}, the responses to a prompt, "
                         f"got {s.rows}")


if __name__ == "__main__":      # before torch is imported: --help takes no seconds
    if code := script(Settings, check, __doc__)():
        sys.exit(code)

import importlib.util
import math
import os
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import grpo
import reflection_srpo
from plumbing import ranks
from plumbing.files import write_json
from plumbing.optimizer import make_optimizer
from reasoning import arrows, parts, responses
from studies import bench
from studies.bench import Case, Clock, GiB

DTYPE = {"qwen2.5-vl-small": "float32", "qwen2.5-vl-7b": "bfloat16"}
# Every response has the full length. A picture's place holder is not drawn: TRL's loss shows it to
# the model as it is, ours as padding.
UNSAID = [arrows.WORDS.index(word) for word in ("<|image_pad|>", "<|im_end|>")]


def unsaid(head, given, logits: torch.Tensor) -> torch.Tensor | None:
    """Of ours, while it samples: keeps these words from being drawn."""
    return None if torch.is_grad_enabled() else logits.index_fill(
        -1, torch.tensor(UNSAID, device=logits.device), -torch.inf)


def questions(case: Case) -> list[str]:
    """Of unequal lengths, so that both pad. Without pictures: for TRL these take torchvision."""
    names = arrows.NAMES
    return [" ".join(names[(i + j) % len(names)] for j in range(24 + 2 * i))
            for i in range(case.rows // GROUP)]


def pay(completion_ids, **_) -> list[float]:
    """A reward that differs within groups: how many of a response's token ids are even."""
    return [float(sum(int(i) % 2 == 0 for i in ids)) for ids in completion_ids]


class Ours:
    """Our model, and its update on prompts, group by group, and their completions."""

    def __init__(self, case: Case, folder: Path):
        self.case, self.s = case, reflection_srpo.Settings(
            max_new_tokens=case.length, rollout_batch=case.rows, lora_rank=case.lora_rank,
            gradient_checkpointing=case.gradient_checkpointing, dtype=DTYPE[case.model])
        self.model, self.processor = parts.prepared(folder, self.s)
        self.model.generation_config.eos_token_id = 10**9          # is never drawn
        self.model.lm_head.register_forward_hook(unsaid)
        self.optimizer = make_optimizer(self.model, LR, betas=(0.9, 0.99))
        self.prompts = [prompt for text in questions(case)
                        for prompt in [self.processor.prompt([], text)] * GROUP]

    def train(self, completions: list[torch.Tensor]) -> dict:
        reward = torch.tensor(pay(completions)).view(-1, GROUP)
        advantages = grpo.group_advantages(reward, scale=False).flatten()
        batch = responses.Batch(self.prompts, completions, advantages, len(completions))
        self.model.train()
        loss = partial(bench.loss_of, self.model, self.processor, batch, self.s)
        return bench.update(self.model, self.optimizer, batch.rows, loss, self.s.max_norm)

    def steps(self) -> tuple[list[Clock], list[int], list[int]]:
        """Of each step: its clock, tokens generated, tokens trained on, which `agreement` shows."""
        clocks, tokens = [], []
        for _ in range(1 + self.case.repeats):
            with Clock() as clock:
                drawn = responses.generate(self.model, self.processor, self.prompts, self.s, 1.0)
                clock.sampled = time.perf_counter()
                self.train([c.ids for c in drawn])
            clocks.append(clock)
            tokens.append(sum(c.tokens for c in drawn))
        return clocks, tokens, tokens

    def agreement(self, theirs: dict[str, torch.Tensor]) -> dict:
        """On what TRL's first step trained on: log-probabilities and gradient."""
        cut, mask = -self.case.length, theirs["mask"].bool()
        # TRL shuffles; the questions' lengths ascend
        order = mask.sum(1).argsort(stable=True).tolist()
        for i, prompt in zip(order, self.prompts, strict=True):
            assert torch.equal(theirs["ids"][i, :cut][mask[i, :cut]], prompt.ids)
        completions = list(theirs["ids"][order, cut:])
        batch = responses.Batch(self.prompts, completions, torch.zeros(len(order)), len(order))
        logp, _, _ = responses.logprobs(self.model, self.processor, batch, range(len(order)))
        return {"logp_difference": float((logp.detach().cpu() - theirs["logp"][order]).abs().max()),
                "gradient_norms": [self.train(completions)["grad_norm"], float(theirs["norm"])]}


def trl_steps(case: Case, folder: Path) -> tuple[list[Clock], list[int], list[int]]:
    """The same of TRL. What its first step trained on, the log-probabilities and the gradient's
    norm go to folder/trl.safetensors."""
    import peft
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    clocks, generated, trained, first = [], [], [], {}

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            clocks.append(Clock().__enter__())

        def on_step_end(self, *_, **__):
            clocks[-1].__exit__()

    def reward(completion_ids, **_):
        clocks[-1].sampled = time.perf_counter()
        generated.append(sum(map(len, completion_ids)))
        return pay(completion_ids)

    def watch(module, args, inputs, output):
        if getattr(output, "log_probs", None) is not None:      # the loss's pass, not generation's
            trained.append(int((inputs["labels"] != -100).sum()))
            if not first:
                logp = output.log_probs[:, -case.length:].detach().clone()
                first.update(ids=inputs["input_ids"], mask=inputs["attention_mask"], logp=logp)

    # Ours; TRL's defaults would be checkpointing and bf16. Advantages without scaling: its standard
    # deviation divides by G - 1, ours by G.
    config = GRPOConfig(
        str(folder / "trl"), per_device_train_batch_size=case.rows, num_generations=GROUP,
        max_completion_length=case.length, max_steps=1 + case.repeats, learning_rate=LR,
        lr_scheduler_type="constant", adam_beta2=0.99, beta=0.0, loss_type="grpo",
        scale_rewards="none", temperature=1.0, generation_kwargs={"suppress_tokens": UNSAID},
        bf16=False, gradient_checkpointing=case.gradient_checkpointing, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True,
        model_init_kwargs={"dtype": DTYPE[case.model]})
    lora = peft.LoraConfig(r=case.lora_rank, lora_alpha=2 * case.lora_rank,
                           target_modules=parts.ADAPTED.pattern)
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}]
                                         for text in questions(case)]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    trainer = GRPOTrainer(str(folder), reward, config, data, processing_class=tokenizer,
                          callbacks=[Steps()], peft_config=lora if case.lora_rank else None)
    trainer.model.register_forward_hook(watch, with_kwargs=True)
    trainer.train()
    first["norm"] = torch.tensor(trainer.state.log_history[0]["grad_norm"])
    save_file({name: x.cpu().contiguous() for name, x in first.items()}, folder / "trl.safetensors")
    return clocks, generated, trained


def measure_steps(case: Case, side: str, folder: Path) -> dict:
    """The fastest of the steps after the first; the peak, and what of it was not in use before the
    first. RuntimeError if they are not the work that was asked for."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    updates, steps, tokens = [], 1 + case.repeats, case.rows * case.length
    register_optimizer_step_post_hook(lambda *_: updates.append(1))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):    # TRL prints its metrics
        clocks, generated, trained = (
            Ours(case, folder).steps() if side == "ours" else trl_steps(case, folder))
    if not (generated == trained == [tokens] * steps and len(updates) == steps):
        raise RuntimeError(f"{side} did not generate and train on {tokens} tokens with one update "
                           f"in each of {steps} steps: {generated}, {trained}, {len(updates)}")
    fastest = min(clocks[1:], key=lambda clock: clock.seconds)
    peak = max(clock.peak for clock in clocks)
    return {"seconds": fastest.seconds, "seconds_rollout": fastest.sampled - fastest.began,
            "peak_gib": peak / GiB, "steps_gib": (peak - clocks[0].before) / GiB,
            "generated": generated, "trained": trained, "updates": len(updates)}


def compare(case: Case, out: str, repetitions: int = 3) -> None:
    """Pairs of processes, the ratios of their figures, and the agreement; to `out` and to the
    terminal. RuntimeError if the two did not do or compute the same."""
    if importlib.util.find_spec("trl") is None:
        raise ValueError("TRL is not installed; install it with: pip install trl")
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        arrows.tiny_vlm(folder)                                         # for its tokenizer
        bench.build(Case(case.model), ranks.device())[1].save_pretrained(folder)
        torch.cuda.empty_cache()
        for _ in range(repetitions):
            pairs.append({})
            for side in ("trl", "ours"):
                row = pairs[-1][side] = bench.alone(measure_steps, case, side, folder)
                print(f"{side:5}", *(f"  {name} {row[name]:.2f}" for name in FIGURES), flush=True)
        equal = Ours(case, folder).agreement(load_file(folder / "trl.safetensors"))
    ratios = {name: sorted(pair["ours"][name] / pair["trl"][name] for pair in pairs)
              for name in FIGURES}
    for name, x in ratios.items():
        print(f"ours / TRL  {name:15} {np.median(x):.2f}, of {repetitions} pairs "
              f"{x[0]:.2f} to {x[-1]:.2f}")
    difference, norms = equal["logp_difference"], equal["gradient_norms"]
    print(f"log-probabilities of {case.rows * case.length} tokens differ by at most "
          f"{difference:.1e}, the gradient's norm is {norms[0]:.6f}, TRL's {norms[1]:.6f}")
    # In bf16 8e-3 and 5e-4 were seen, of 4 layers
    bound, relative = (1e-4, 1e-3) if DTYPE[case.model] == "float32" else (0.1, 1e-2)
    if not (difference < bound and (case.lora_rank or math.isclose(*norms, rel_tol=relative))):
        raise RuntimeError("these should be equal")
    command = (f"python -m studies.bench_trl --model {case.model} --lora_rank {case.lora_rank} "
               f"--rows {case.rows} --threads {case.threads}")
    write_json(out, {
        "torch": torch.__version__, "load": os.getloadavg()[0], "trl": version("trl"),
        "transformers": version("transformers"), "device": ranks.device(), "command": command,
        "case": asdict(case), "prompts": case.rows // GROUP, "group_size": GROUP,
        "ratios": ratios, **equal, "pairs": pairs})
    print(f"wrote {out}")


def study(s: Settings) -> None:
    check(s)
    if s.model == "qwen2.5-vl-small":
        return compare(Case(s.model, s.lora_rank, rows=s.rows, length=64, repeats=3,
                            threads=s.threads), s.out)
    if not torch.cuda.is_available():
        raise ValueError(f"--model {s.model} takes a GPU; leave it out for the small one")
    return compare(Case(s.model, s.lora_rank or 32, True, s.rows, 512, repeats=1), s.out, 1)


main = script(Settings, study, __doc__)
if __name__ == "__main__":
    sys.exit(main())
