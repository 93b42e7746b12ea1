"""reflection_srpo.py on a tiny Qwen2.5-VL: gradients against naive ones, both stages end to end,
resuming, bad input."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import grpo
import reflection_srpo as rs
import rewards
from plumbing import adapters, ranks, update
from plumbing.flags import read_command
from plumbing.optimizer import make_optimizer
from plumbing.run import Run
from reasoning import arrows, qwen
from tests.conftest import whole_row, write_arrows

ROOT = Path(__file__).parents[1]
SMALL = [
    "--sft_rows",
    "96",
    "--sft_epochs",
    "1",
    "--sft_batch",
    "32",
    "--steps",
    "3",
    "--prompts",
    "4",
    "--group_size",
    "4",
    "--minibatch",
    "8",
    "--eval_every",
    "2",
    "--save_every",
    "1",
    "--threads",
    "1",
    "--max_new_tokens",
    "24",
]


@dataclass
class Case:
    """A model, a batch of random completions of different lengths, and what each earns beside the
    others: what the update of `train` sees."""

    s: rs.Settings
    parts: rs.Parts
    rows: list
    completions: list
    advantages: torch.Tensor


@pytest.fixture
def case(base) -> Case:
    s = rs.Settings(
        model=str(base), minibatch=0, steps=1, prompts=6, group_size=1, lr=1e-2, save_every=100
    )
    torch.manual_seed(1)
    ids = [torch.randint(7, len(arrows.WORDS), (n,)) for n in (3, 1, 7, 4, 5, 2)]
    completions = [qwen.Completion(x, "", False) for x in ids]
    return Case(
        s,
        loaded(s, base),
        arrows.dataset(6, 0),
        completions,
        torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, 0.7]),
    )


def loaded(s: rs.Settings, base) -> rs.Parts:
    model, processor = rs.prepared(base, s)
    return rs.Parts(model, processor, make_optimizer(model, s.lr))


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def stepped(case: Case, monkeypatch, tmp_path, **changes) -> list[dict]:
    """`rs.train` on the case's completions instead of sampled ones -> its rows of metrics."""
    s, order, encode = replace(case.s, **changes), [], rs.r.encode

    def encoded(rows, *more):
        order[:] = map(case.rows.index, rows)  # rows are drawn in an order of their own
        return encode(rows, *more)

    monkeypatch.setattr(rs.r, "encode", encoded)
    def own(of) -> list:  # the completions of row i are those from i * G on
        return [of[i * s.group_size + j] for i in order for j in range(s.group_size)]

    monkeypatch.setattr(rs.r, "generate", lambda *_: own(case.completions))
    monkeypatch.setattr(
        grpo,
        "group_advantages",
        lambda *_, **__: torch.stack(own(case.advantages)).view(-1, s.group_size),
    )
    run = Run(s, Path(tempfile.mkdtemp(dir=tmp_path)), None, "reflection_srpo.py")
    run.keep(adapters.kept(case.parts.model), case.parts.optimizer)
    rs.train(run, case.parts, case.rows, [], {})
    monkeypatch.setattr(rs.r, "encode", encode)
    return metrics(run.out)[1:]


def updated(case: Case, monkeypatch, tmp_path, **changes) -> torch.Tensor:
    """The gradient that a step hands to the optimiser, mean over its updates."""
    seen = []

    def catch(optimizer, model, norm):
        seen.append(gradient(model))
        optimizer.zero_grad()
        return 1.0, True

    monkeypatch.setattr(update, "clip_and_step", catch)
    stepped(case, monkeypatch, tmp_path, **changes)
    return torch.stack(seen).mean(0)


@pytest.mark.parametrize("group, tokens, aggregate", [
    (1, 16384, "sequence"), (3, 16384, "sequence"), (3, 45, "sequence"), (2, 1, "sequence"),
    (1, 16384, "token"), (3, 45, "constant")])
def test_the_gradient_is_reinforce_s(case, monkeypatch, tmp_path, group, tokens, aggregate):
    """One update, ratio 1: the gradient of -sum_i A_i mean_t log p_it / N, or of the other two
    means, a row at a time through the whole forward pass. Prompt tokens have no part, and `group`
    rows share theirs."""
    case.rows = case.rows[: 6 // group]
    case.s = replace(case.s, prompts=6 // group, group_size=group, micro_tokens=tokens,
                     aggregate=aggregate)
    ours = updated(case, monkeypatch, tmp_path)
    model, processor = case.parts.model, case.parts.processor
    prompts = [p for p in rs.r.encode(case.rows, case.s, processor) for _ in range(group)]
    for prompt, completion, advantage in zip(prompts, case.completions, case.advantages):
        logp = model(**whole_row(processor, prompt, completion.ids)).logits[0].log_softmax(-1)
        loss = -advantage * sum(
            logp[len(prompt.ids) - 1 + t, token] for t, token in enumerate(completion.ids)
        )
        of = {"sequence": len(completion.ids) * len(prompts), "constant": 56 * len(prompts),
              "token": sum(len(c.ids) for c in case.completions)}
        (loss / of[aggregate]).backward()
    torch.testing.assert_close(ours, gradient(model), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_micro_batches_do_not_change_the_gradient(case, monkeypatch, tmp_path, aggregate):
    whole = updated(case, monkeypatch, tmp_path, aggregate=aggregate)
    for tokens in (1, 90):
        parts = updated(case, monkeypatch, tmp_path, aggregate=aggregate, micro_tokens=tokens)
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_does_not_change_the_gradient(case, monkeypatch, tmp_path, base):
    plain = updated(case, monkeypatch, tmp_path)
    case.parts = loaded(replace(case.s, gradient_checkpointing=True), base)
    case.parts.model.train()
    flags = [getattr(m, "gradient_checkpointing", False) for m in case.parts.model.modules()]
    assert sum(flags) >= 3  # both language layers and the tower's
    torch.testing.assert_close(updated(case, monkeypatch, tmp_path), plain, atol=1e-6, rtol=1e-4)


def test_what_follows_the_end_token_gets_no_gradient(case, monkeypatch, tmp_path):
    """A completion in a batch with longer ones has the gradient it has alone."""
    case.advantages = torch.tensor([1.0, 0, 0, 0, 0, 0])
    monkeypatch.setattr(rs.r, "groups_used", lambda *_: torch.ones(6, dtype=torch.bool))
    together = updated(case, monkeypatch, tmp_path) * 6  # mean over 6 responses
    monkeypatch.setattr(rs.r, "groups_used", lambda a, *_: (a != 0).any(1))
    alone = updated(case, monkeypatch, tmp_path)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


def test_later_updates_are_clipped_round_the_first_policy(case, monkeypatch, tmp_path):
    """With several minibatches the old log-probabilities are those from before all of them: ratios
    start at 1 and leave it."""
    [row] = stepped(case, monkeypatch, tmp_path, minibatch=2, epochs=3)
    assert row["updates"] == 9 and row["ratio_max"] > 1.01
    [once] = stepped(case, monkeypatch, tmp_path)
    assert once["updates"] == 1 and once["ratio_max"] == 1


@pytest.mark.parametrize("rank", [0, 4])
def test_the_kl_pulls_towards_the_reference(case, monkeypatch, tmp_path, base, rank):
    """The reference is the starting policy: KL 0 at first, positive after a step; with LoRA it is
    the model with its adapters off."""
    case.s = replace(case.s, beta=0.1, lora_rank=rank)
    case.parts = loaded(case.s, base)
    case.parts.reference = None if rank else rs.prepared(base, case.s)[0]
    rows = stepped(case, monkeypatch, tmp_path, steps=3)
    kl = [row["ref_kl"] for row in rows]
    assert abs(kl[0]) < 1e-6 < kl[1] < kl[2]


def test_lora_trains_adapters_of_the_language_model_alone(base, tmp_path):
    parts = loaded(rs.Settings(lora_rank=4), base)
    model, processor = parts.model, parts.processor
    names = set(ranks.trainable(model))
    assert names and all("lora_" in name and "language_model" in name for name in names)
    with torch.no_grad():
        for p in ranks.trainable(model).values():
            p.add_(torch.randn_like(p) * 0.05)
    prompt = processor.prompt([], "to a2 in 5 plain ?")
    inputs = processor.batch([prompt])
    with torch.no_grad():
        expected = model(**inputs).logits
    rs.save_policy(parts, tmp_path / "policy")
    merged, _ = qwen.load_vlm(tmp_path / "policy")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "policy_adapter" / "adapter_model.safetensors").stat().st_size < (
        tmp_path / "policy" / "model.safetensors"
    ).stat().st_size


def test_a_frozen_tower_stays_as_it_is(base):
    model, _ = rs.prepared(base, rs.Settings(freeze_vision=True))
    assert not any("visual" in name for name in ranks.trainable(model)) and any(
        "language_model" in name for name in ranks.trainable(model)
    )


def test_which_groups_are_trained_on():
    """mixed: by what the answers earn: rare corrections count, format and length do not; equal
    rewards never do."""
    right, wrong = (
        rewards.ReflectionRecord(0.5, 0.0, earned, 0.25, 0.07, False, earned > 0, 9)
        for earned in (0.5, 0.0)
    )
    groups = [[right] * 2 + [wrong] * 6, [right] + [wrong] * 7, [wrong] * 8, [right] * 8]
    advantages = grpo.group_advantages(torch.tensor([[r.total for r in group] for group in groups]))
    records = [r for group in groups for r in group]
    assert rs.r.groups_used(advantages, records, "signal").tolist() == [True, True, False, False]
    assert rs.r.groups_used(advantages, records, "mixed").tolist() == [True, False, False, False]


def run(*arguments, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "reflection_srpo.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **more,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    done = run(*SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout + done.stderr


def metrics(out: Path) -> list[dict]:
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("seconds")}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_both_stages_end_to_end(finished):
    out, printed = finished
    rows = metrics(out)
    assert (
        [r["step"] for r in rows] == [0, 1, 2, 3]
        and "heldout_final_accuracy" in rows[2]
        and "heldout_final_accuracy" in rows[3]
    )
    assert len((out / "sft.jsonl").read_text().splitlines()) == 3
    assert all(
        (out / name).exists()
        for name in (
            "curves.png",
            "before.json",
            "after.json",
            "base",
            "sft",
            "policy/model.safetensors",
            "checkpoint",
        )
    )
    assert (
        "sample: 'to " in printed
        and "reflection ?', answer" in printed
        and "final answer right" in printed
        and "(format" in printed
    )
    model, processor = qwen.load_vlm(out / "policy")  # a checkpoint like any other
    prompt = processor.prompt([], "to a2 in 5 plain ?")
    assert qwen.generate(model, processor, [prompt], 4)[0].tokens <= 4


@pytest.mark.slow
@pytest.mark.parametrize("stage, moment", [("sft", '"step": 2'), ("rl", '"step": 2')])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished, tmp_path, stage, moment):
    whole, _ = finished
    process = subprocess.Popen(
        [sys.executable, "reflection_srpo.py", *SMALL, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    state, deadline = tmp_path / "out" / "checkpoint" / "state.json", time.time() + 120
    while not (
        state.exists()
        and (text := state.read_text())
        and f'"stage": "{stage}"' in text
        and moment in text
    ):
        assert time.time() < deadline and process.poll() is None, "it never got there"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run("--resume", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "out") == metrics(whole)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "reflection_srpo.py",
            *SMALL,
            "--steps",
            "500",
            "--out",
            str(tmp_path / "out"),
        ],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.time() + 120
    while not (tmp_path / "out" / "metrics.jsonl").exists() or len(metrics(tmp_path / "out")) < 3:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and f"--resume {tmp_path / 'out'}" in printed
    step = json.loads((tmp_path / "out" / "checkpoint" / "state.json").read_text())["step"]
    assert step == metrics(tmp_path / "out")[-1]["step"]


def test_rl_on_rows_of_a_file_sets_unusable_ones_aside(base, tmp_path, capsys):
    """A missing picture, an empty question, a row without answer, a broken line, too long a
    question: named, saved, and the run goes on."""
    lines = write_arrows(tmp_path / "data", 6).read_text().splitlines()
    good = json.loads(lines[0])
    lines += [
        json.dumps(good | {"image": "nowhere.png"}),
        json.dumps(good | {"query": " "}),
        json.dumps({"query": "q", "image": good["image"]}),
        "{",
        json.dumps(good | {"answer": "$$"}),
        json.dumps(good | {"query": "how many " * 600}),
    ]
    (tmp_path / "data" / "rows.jsonl").write_text("\n".join(lines) + "\n")
    code = rs.main(
        [
            "rl",
            "--model",
            str(base),
            "--data",
            str(tmp_path / "data" / "rows.jsonl"),
            "--steps",
            "2",
            "--prompts",
            "7",
            "--group_size",
            "2",
            "--max_new_tokens",
            "6",
            "--threads",
            "1",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert code == 0
    reasons = [
        json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    ]
    assert [r["source"].split(":")[1] for r in reasons] == ["7", "8", "9", "10", "11", "12"]
    for r, words in zip(
        reasons,
        (
            "missing image",
            "empty question",
            "no answer",
            "broken JSON",
            "unreadable ground truth: '$$'",
            "room for 1024",
        ),
    ):
        assert words in r["reason"]
    printed = capsys.readouterr()
    assert "rows.jsonl:7: missing image" in printed.out + printed.err
    assert metrics(tmp_path / "out")[-1]["step"] == 2


def test_training_with_the_flags_of_scale(base, tmp_path, capsys):
    """parquet with other column names, the reflection prompt, LoRA, bf16, KL, both filters, no
    division by the std, held-out rows."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {
            "problem": row.query,
            "images": [{"bytes": row.images[0], "path": "a.png"}],
            "answer": row.answer,
        }
        for row in arrows.dataset(4, 0)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    arguments = [
        "rl",
        "--model",
        str(base),
        "--data",
        str(tmp_path / "rows.parquet"),
        "--eval_data",
        str(tmp_path / "rows.parquet"),
        "--columns",
        "query=problem",
        "image=images",
        "--prompt",
        "reflection",
        "--lora_rank",
        "2",
        "--dtype",
        "bfloat16",
        "--beta",
        "0.1",
        "--keep",
        "mixed",
        "--mask_truncated",
        "--no_std_scale",
        "--steps",
        "2",
        "--prompts",
        "2",
        "--group_size",
        "2",
        "--max_new_tokens",
        "8",
        "--threads",
        "1",
    ]
    assert rs.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert (
        metrics(tmp_path / "out")[-1]["heldout_rows"] == 4
        and (tmp_path / "out" / "policy_adapter").is_dir()
    )
    assert (
        rs.main([*arguments, "--columns", "quer=problem", "--out", str(tmp_path / "b")]) == 2
        and "--columns quer=problem" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["fly"], ["fly", "sft and rl"]),
        (["--reward", "best"], ["--reward", "best"]),
        (["--group_size", "1"], ["--group_size", "no baseline"]),
        (["--temperature", "0"], ["--temperature", "positive"]),
        (["--clip_low", "1"], ["--clip_low", "below 1"]),
        (["--nonsense", "1"], ["--nonsense"]),
        (["--resume", "nowhere"], ["nowhere", "no checkpoint"]),
        (["--data", "rows.jsonl"], ["--data", "stage"]),
        (["rl"], ["rl", "--model"]),
        (["--reward", "verl"], ["verl", "boxed"]),
        (["rl", "--paper", "--model", "BASE"], ["--prompt reflection", "give --data"]),
        (
            ["rl", "--paper", "--model", "BASE", "--data", "ROWS", "--format", "plain"]
            + ["--reward", "task"],
            ["--prompt reflection", "--format plain", "alike"],
        ),
        (["--format", "plain"], ["--reward paper", "--format plain", "--reward task"]),
        (["--resume", "RUN", "--out", "elsewhere"], ["--resume", "drop --out"]),
        (["rl", "--model", "nowhere/at/all"], ["nowhere/at/all"]),
        (
            ["sft", "--model", "BASE", "--data", "missing.jsonl"],
            ["missing.jsonl", "does not exist"],
        ),
        (["sft", "--model", "BASE", "--data", "ROWS"], ["no target", "reasoning.teacher"]),
    ],
    ids=" ".join,
)
def test_bad_flags_are_one_line(argv, words, base, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    if "ROWS" in argv:
        (tmp_path / "a.png").write_bytes(arrows.dataset(1, 0)[0].images[0])
        rows.write_text(json.dumps({"query": "q", "image": "a.png", "answer": "1"}) + "\n")
    argv = [str(base) if a == "BASE" else str(rows) if a == "ROWS" else a for a in argv]
    assert rs.main([*argv, "--out", str(tmp_path / "out")] if "--resume" not in argv else argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in words)


@pytest.mark.slow
def test_resume_with_other_settings_and_a_taken_folder(finished, tmp_path, capsys):
    out, _ = finished
    assert (
        rs.main(["--resume", str(out), "--lr", "0.5"]) == 2
        and "--lr 0.5 differs from the run's 0.0003" in capsys.readouterr().err
    )
    assert (
        rs.main([*SMALL, "--out", str(out)]) == 2 and f"--resume {out}" in capsys.readouterr().err
    )
    assert rs.main(["--resume", str(out), "--plan"]) == 0
    assert f"plan for {out}/base" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_bytes(
        (out / "metrics.jsonl").read_bytes()
    )  # a record of a run, without checkpoint
    assert (
        rs.main([*SMALL, "--out", str(tmp_path)]) == 2
        and "metrics.jsonl is of another run" in capsys.readouterr().err
    )


def test_paper_settings_yield_to_flags():
    argv = ["rl", "--paper", "--model", "m", "--data", "d", "--lr", "2e-6"]
    command = read_command(rs.Settings, argv, **rs.READING)
    s = command.settings
    assert s.stage == "rl" and s.lr == 2e-6 and s.prompts == 128 and s.dtype == "bfloat16"
    assert s.freeze_vision and s.gradient_checkpointing


def test_the_cold_start_s_gradient_is_cross_entropy_on_the_response(base, tmp_path, monkeypatch):
    """Against torch's cross-entropy, a row at a time through the whole forward pass."""
    rows, seen = arrows.dataset(4, 3, target="teacher"), []
    s = rs.Settings(sft_epochs=1, sft_batch=4, micro_tokens=1, save_every=100)
    parts, run = loaded(s, base), Run(s, tmp_path, None, "reflection_srpo.py")
    run.keep(adapters.kept(parts.model), parts.optimizer)
    monkeypatch.setattr(
        update,
        "clip_and_step",
        lambda optimizer, model, norm: (
            seen.append(gradient(model)),
            optimizer.zero_grad(),
            (1.0, True),
        )[-1],
    )
    rs.cold_start(run, parts, rows)
    processor = parts.processor
    losses = []
    for prompt, row in zip(rs.r.encode(rows, s, processor), rows):
        ids = processor.target(row.target)
        logits = parts.model(**whole_row(processor, prompt, ids)).logits[0, len(prompt.ids) - 1:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids, reduction="none"))
    torch.cat(losses).mean().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], gradient(parts.model), atol=1e-6, rtol=1e-4)


def test_the_arrows_as_text(tmp_path):
    """Both stages, without a picture anywhere."""
    argv = [*SMALL, "--steps", "1", "--data", "arrows_text", "--freeze_vision"]
    assert rs.main([*argv, "--out", str(tmp_path)]) == 0
    before, row = metrics(tmp_path)
    assert row["groups"] == 4 and row["tokens"] > 0
    assert len(before) > 1 and (tmp_path / "policy" / "model.safetensors").exists()
