"""Steps of GRPO side by side with TRL's GRPOTrainer: seconds, peak memory, and whether both compute the same.

Generation, reward and update on the same model, prompts, lengths and settings, fp32, the two in turn, each in a process of its own, so that other
load on the machine meets both; the first step warms up. It stops if they did not do the same work. On a CPU TRL also scores the prompts' tokens,
which it leaves out on a GPU.

    pip install trl && python -m studies.bench_trl          # the small Qwen2.5-VL of studies/bench.py -> results/bench/trl.json
"""
import argparse
import importlib.util
import math
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from studies import bench                    # before numpy and torch: it says how idle threads wait
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, TrainerCallback
from transformers.utils import logging

from reasoning import arrows
import grpo
from plumbing.optimizer import make_optimizer
from reasoning import responses as reflection_rollouts
import reflection_srpo
from reasoning import qwen as vlm
from studies.bench import Case, Clock

GROUP, LR = 4, 1e-4             # responses to a prompt, learning rate


def sampling(case: Case) -> dict:
    """Every response has the full length. A picture's place holder is not drawn: TRL's loss shows it to the model as it is, ours as padding."""
    return {"min_new_tokens": case.length, "suppress_tokens": [arrows.WORDS.index("<|image_pad|>")]}


def questions(case: Case) -> list[str]:
    """Of unequal lengths, so that both pad. Without pictures: TRL would need transformers' processor of Qwen2.5-VL, and that torchvision."""
    return [" ".join(arrows.NAMES[(i + j) % len(arrows.NAMES)] for j in range(24 + 2 * i)) for i in range(case.rows // GROUP)]


def pay(completion_ids, **_) -> list[float]:
    """A reward that costs next to nothing and differs within groups: how many of a response's token ids are even."""
    return [float(sum(int(i) % 2 == 0 for i in ids)) for ids in completion_ids]


def our_trainer(case: Case, folder: Path):
    """(settings, model, processor, a function that updates the model on prompts, group by group, and their completions)."""
    s = reflection_srpo.Settings(max_new_tokens=case.length, rollout_batch=case.rows, minibatch=0, micro_tokens=10**9, lr=LR)
    model, processor = reflection_srpo.prepared(folder, s)
    model.generation_config.update(**sampling(case))
    optimizer = make_optimizer(model, s.lr, betas=(0.9, 0.99))

    def train(prompts: list[vlm.Prompt], completions: list[torch.Tensor]) -> dict:
        advantages = grpo.group_advantages(torch.tensor(pay(completions)).view(-1, GROUP), scale=False).flatten()
        model.train()
        batch = reflection_rollouts.Batch(prompts, completions, advantages, len(prompts))
        return bench.update_model(model, processor, optimizer, batch, s)
    return s, model, processor, train


def our_steps(case: Case, folder: Path) -> tuple[list[Clock], list[int], list[int]]:
    """Of each step: its clock, tokens generated, tokens trained on."""
    clocks, tokens, (s, model, processor, train) = [], [], our_trainer(case, folder)
    prompts = [processor.prompt([], text) for text in questions(case) for _ in range(GROUP)]
    for _ in range(1 + case.repeats):
        with Clock() as clock:
            completions = [c.ids for c in reflection_rollouts.generate(model, processor, prompts, s, s.temperature)]
            clock.sampled = time.perf_counter()
            train(prompts, completions)
        clocks.append(clock)
        tokens.append(sum(map(len, completions)))
    return clocks, tokens, tokens                       # that the update is on all of them, the gradient shows: `agreement`


def trl_steps(case: Case, folder: Path) -> tuple[list[Clock], list[int], list[int]]:
    """The same of TRL. What its first step trained on, the log-probabilities and the gradient's norm go to folder/trl.safetensors."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    clocks, generated, trained, first = [], [], [], {}

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clocks.append(Clock().__enter__())

        def on_step_end(self, *_, **__):
            clocks[-1].__exit__()

    def reward(completion_ids, **_):
        clocks[-1].sampled = time.perf_counter()
        generated.append(sum(map(len, completion_ids)))
        return pay(completion_ids)

    def watch(module, args, inputs, output):
        if getattr(output, "log_probs", None) is not None:              # the loss's forward pass, not generation's
            trained.append(int((inputs["labels"] != -100).sum()))
            if not first:
                first.update(ids=inputs["input_ids"], mask=inputs["attention_mask"], logp=output.log_probs[:, -case.length:].detach().clone())

    # Ours; TRL's defaults would be checkpointing and bf16. Advantages without scaling: its standard deviation divides by G - 1, ours by G.
    config = GRPOConfig(str(folder / "trl"), per_device_train_batch_size=case.rows, num_generations=GROUP, max_completion_length=case.length,
                        max_steps=1 + case.repeats, learning_rate=LR, lr_scheduler_type="constant", adam_beta2=0.99, beta=0.0, loss_type="grpo",
                        scale_rewards="none", temperature=1.0, generation_kwargs=sampling(case), gradient_checkpointing=False, bf16=False,
                        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in questions(case)]})
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    trainer = GRPOTrainer(str(folder), reward, config, data, processing_class=tokenizer, callbacks=[Steps()])
    trainer.model.register_forward_hook(watch, with_kwargs=True)
    trainer.train()
    first["norm"] = torch.tensor(trainer.state.log_history[0]["grad_norm"])
    save_file({name: x.cpu().contiguous() for name, x in first.items()}, folder / "trl.safetensors")
    return clocks, generated, trained


def measure_steps(case: Case, side: str, folder: Path) -> dict:
    """The fastest of the steps after the first; the peak, and what of it was not in use before the first."""
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    updates = []
    register_optimizer_step_post_hook(lambda *_: updates.append(1))
    clocks, generated, trained = (our_steps if side == "ours" else trl_steps)(case, folder)
    fastest, peak = min(clocks[1:], key=lambda clock: clock.seconds), max(clock.peak for clock in clocks)
    return {"seconds": fastest.seconds, "seconds_rollout": fastest.sampled - fastest.began, "peak_gib": peak / 2**30,
            "steps_gib": (peak - clocks[0].before) / 2**30, "generated": generated, "trained": trained, "updates": len(updates)}


def agreement(case: Case, folder: Path) -> dict:
    """Ours, from the same weights, on what TRL's first step trained on: log-probabilities and gradient."""
    theirs, (s, model, processor, train) = load_file(folder / "trl.safetensors"), our_trainer(case, folder)
    rows = [(ids[:-case.length][mask[:-case.length].bool()], ids[-case.length:]) for ids, mask in zip(theirs["ids"], theirs["mask"])]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))                     # TRL shuffles; the questions' lengths ascend
    prompts, completions = [vlm.Prompt(rows[i][0], None, None) for i in order], [rows[i][1] for i in order]
    expected = [processor.prompt([], text).ids for text in questions(case) for _ in range(GROUP)]
    assert all(torch.equal(p.ids, ids) for p, ids in zip(prompts, expected, strict=True)), "the prompts are not the same"
    with torch.no_grad():
        batch = reflection_rollouts.Batch(prompts, completions, torch.zeros(len(prompts)), len(prompts))
        every = list(range(len(prompts)))
        logp, _, _ = reflection_rollouts.logprobs(model, processor, batch, every, s.temperature)
    return {"logp_difference": float((logp.cpu() - theirs["logp"][order]).abs().max()),
            "gradient_norms": [train(prompts, completions)["grad_norm"], float(theirs["norm"])]}


def compare(case: Case, out: Path, repetitions: int = 3) -> None:
    """Pairs of processes, the ratios of their figures, and the agreement; to `out` and to the terminal."""
    if importlib.util.find_spec("trl") is None:
        raise ValueError("TRL is not installed; install it with: pip install trl")
    if case.rows < GROUP or case.rows % GROUP:
        raise ValueError(f"--rows must be a multiple of {GROUP}, the responses to a prompt, got {case.rows}")
    pairs, steps, tokens = [], 1 + case.repeats, case.rows * case.length
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        arrows.tiny_vlm(folder)                                                         # for its tokenizer
        Qwen2_5_VLForConditionalGeneration(bench.qwen_config(case.model)).save_pretrained(folder)
        for _ in range(repetitions):
            pairs.append({side: bench.alone(measure_steps, case, side, Path(folder)) for side in ("trl", "ours")})
            for side, row in pairs[-1].items():
                same = row["generated"] == row["trained"] == [tokens] * steps and row["updates"] == steps
                assert same, f"{side} did not generate and train on {tokens} tokens with one update in each of {steps} steps: {row}"
                print(f"{side:5} {row['seconds']:6.2f} s a step, {row['seconds_rollout']:.2f} of them generation   "
                      f"peak {row['peak_gib']:.2f} GiB, {row['steps_gib']:.2f} of them for the steps", flush=True)
        equal = agreement(case, Path(folder))
    names = ("seconds", "seconds_rollout", "peak_gib", "steps_gib")
    ratios = {name: sorted(pair["ours"][name] / pair["trl"][name] for pair in pairs) for name in names}
    for name, x in ratios.items():
        print(f"ours / TRL  {name:15} {np.median(x):.2f}, of {repetitions} pairs {x[0]:.2f} to {x[-1]:.2f}")
    print(f"log-probabilities of {tokens} tokens differ by at most {equal['logp_difference']:.1e}, the gradient's norm is "
          f"{equal['gradient_norms'][0]:.6f}, TRL's {equal['gradient_norms'][1]:.6f}")
    assert equal["logp_difference"] < 1e-4 and math.isclose(*equal["gradient_norms"], rel_tol=1e-3), "these should be equal"
    bench.write(out, {"trl": version("trl"), "transformers": version("transformers"), "device": "cuda" if torch.cuda.is_available() else "cpu",
                      "command": f"python -m studies.bench_trl --rows {case.rows} --threads {case.threads}",
                      "case": asdict(case), "prompts": case.rows // GROUP, "group_size": GROUP, "ratios": ratios, **equal, "pairs": pairs})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=32, help=f"responses a step, {GROUP} to a prompt")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--out", default="results/bench/trl.json", help="JSON")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        compare(Case("qwen2.5-vl-small", rows=args.rows, length=64, repeats=3, threads=args.threads), Path(args.out))
        return 0
    except (ValueError, RuntimeError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
