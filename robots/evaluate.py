"""A policy on a suite: every initial state once, greedily, as the papers evaluate.

1. `evaluate`: success by task with intervals, GIFs, a journal to go on from.
2. `film`: episodes in a larger picture than the policy sees, where that takes seconds.
3. `measured`, `describe`: a training step's rollouts in numbers, and one of them in words.
4. What may be wrong with a comparison, in a line: other pixels, states that were trained on.
"""
import hashlib
import json
import os
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
from tqdm import tqdm

from grpo import group_advantages
from plumbing import ranks
from plumbing.files import Journal, whole
from plumbing.plots import rate
from robots import policy as policies
from robots.rollouts import play
from robots.suite import Episode, Start, Suite
from robots.trajectories import save_episode

ROW = {"task": int, "index": int, "success": bool, "steps": int}        # of a journal


def is_row(row: dict) -> bool:
    """False for a damaged row of a journal: its episode is played again."""
    return {name: type(value) for name, value in row.items()} == ROW


def evaluate(policy, workers, suite: Suite, split: str, key: str, *, states: int | None = None,
             gifs: Path | None = None, journal: Journal | None = None,
             record: Path | None = None) -> dict:
    """The first `states` (default all) initial states of every task of a split, once each.

    key: of the policy's action statistics. gifs: folder for the first success and failure of each
    label, in the frames that the policy saw. journal: gets a row for each episode that ends; those
    it has are not played again. record: folder for the episodes as robots/trajectories.py's.
    -> {"split", "success", "interval", "successes", "episodes", "tasks": {instruction or label: the
    same, "steps": mean, "failed": indices}}"""
    starts = {(start.task, start.index): start for start in suite.starts(split, states)}
    seen = {(row["task"], row["index"]): row for row in (journal.rows if journal else [])}
    rows = [row for at, row in seen.items() if at in starts]
    todo = [start for at, start in starts.items() if at not in seen]
    bar = tqdm(total=len(starts), initial=len(rows), desc=f"{suite.name} {split}", unit="episode",
               disable=not journal)

    def finished(episode: Episode) -> None:
        task, index = episode.start.task, episode.start.index
        if gifs:
            name = suite.labels[task].replace(" ", "_") if suite.labels else f"task{task}"
            path = gifs / f"{name}-{'success' if episode.success else 'failure'}.gif"
            if not path.exists():
                save_gif(path, [*episode.clip, *framed(episode.clip[-1], episode.success)], fps=5)
        if record:
            file = f"{suite.name.replace(':', '-')}-{split}-{task}-{index}.npz"
            save_episode(record / file, episode, suite.instructions[task])
        rows.append(dict(task=task, index=index, success=episode.success, steps=episode.steps))
        if journal:
            journal.add(rows[-1])
        episode.clip = None                 # 500 videos of 256 px frames would fill the memory
        bar.update()
    play(policies.greedy(policy, key), workers, todo, suite, finished=finished,
         clip=(lambda video: video) if gifs or record else None)
    bar.close()
    tasks: dict[str, list] = {}
    for row in sorted(rows, key=lambda row: (row["task"], row["index"])):
        tasks.setdefault((suite.labels or suite.instructions)[row["task"]], []).append(row)
    return {"split": split, **rate(sum(row["success"] for row in rows), len(rows)), "tasks": {
        label: rate(sum(row["success"] for row in own), len(own)) | {
            "steps": float(np.mean([row["steps"] for row in own])),
            "failed": [row["index"] for row in own if not row["success"]]}
        for label, own in tasks.items()}}


# Pictures

def film(policy, suite: Suite, starts: list[Start], key: str, path: Path, size: int = 128) -> None:
    """Play greedily and write one GIF, every second step; each episode ends with a border."""
    env = suite.make(size=policy.camera, horizon=suite.horizon)
    act, frames = policies.greedy(policy, key), []
    for start in starts:
        image, ended = env.reset(options=vars(start))[0]["image"], False
        while not ended:
            for action in act(image[None], [suite.instructions[start.task]])[0][0]:
                ended = env.advance(action)
                if env.steps % 2 == 0 or ended:
                    frames.append(env.render(size))
                if ended:
                    break
            image = env.render()
        frames += framed(frames[-1], env.success)
    env.close()
    save_gif(path, frames)


def framed(image: np.ndarray, success: bool) -> list[np.ndarray]:
    """The image six times with a border: green success, red failure."""
    last = image.copy()
    for edge in (np.s_[:4], np.s_[-4:], np.s_[:, :4], np.s_[:, -4:]):
        last[edge] = (40, 160, 60) if success else (200, 40, 40)
    return [last] * 6


def save_gif(path: str | Path, frames: list[np.ndarray], fps: int = 10) -> None:
    """Frames uint8 (H, W, 3) to an animated GIF, whole or not at all."""
    from PIL import Image
    images = [Image.fromarray(frame) for frame in frames]
    with whole(path) as draft:
        images[0].save(draft, "GIF", save_all=True, append_images=images[1:],
                       duration=1000 // fps, loop=0)


# Of a run: what all ranks call, and the first does

def of_run(run, parts, name: str) -> dict:
    """`evaluate` of what a run of vla_srpo.py has trained so far; GIFs go to a folder `name`."""
    gifs = run.out / name if parts.suite.slow else None
    with ranks.whole_weights(parts.evaluated):
        return ranks.first(lambda: evaluate(parts.evaluated, parts.workers, parts.suite,
                                            parts.split, parts.key, gifs=gifs))


def when_due(run, parts) -> dict:
    """Every --eval_every steps and at the last: after.json, a line, and what the log says of it; a
    run that has reached --until ends."""
    if not run.due(run.s.eval_every):
        return {}
    result = run.write("after.json", of_run(run, parts, "after"))
    run.say(f"step {run.step:4d}  {parts.suite.split_names[parts.split]}: success "
            f"{result['success']:.1%} (greedy, {result['episodes']} episodes)")
    if 0 < run.s.until <= result["success"]:
        run.end()
    return {"heldout": result["success"]}


def film_run(run, parts, name: str) -> None:
    """One held-out episode of each task, where that takes no minutes."""
    if not parts.suite.slow:
        starts = parts.suite.starts(parts.split, 1)
        with ranks.whole_weights(parts.evaluated):
            ranks.first(lambda: film(parts.evaluated, parts.suite, starts, parts.key,
                                     run.out / name))


# A training step's rollouts

def measured(gather, played: list[Episode], reward: np.ndarray, advantages: torch.Tensor,
             record) -> dict:
    """All ranks' rollouts in numbers. played: this rank's; gather: joins the ranks' lists; reward
    (P * G,), advantages (P, G): of all; record: of the progress reward, None for 0/1 rewards."""
    success = torch.tensor(gather([e.success for e in played]))
    solved = success.float().view_as(advantages).mean(1)                        # (P,)
    steps = sum(gather([e.steps for e in played]))
    entropy = gather([call.entropy for e in played for call in e.calls])
    progress = gather([e.progress for e in played if not np.isnan(e.progress)])
    failures = torch.tensor(reward, dtype=torch.float32)[~success]
    row = {"success": float(solved.mean()), "reward": float(reward.mean()),
           "failure_reward": float(failures.mean()) if len(failures) else None,
           "length": steps / len(success), "env_steps": steps,
           "groups_used": int((advantages != 0).any(1).sum()),
           "groups_failed": int((solved == 0).sum()), "groups_solved": int((solved == 1).sum()),
           "entropy": float(np.mean(entropy))}
    if progress:
        row["progress"] = float(np.mean(progress))
    if record is not None:
        plain = group_advantages(success.view_as(advantages))
        shift = (group_advantages(torch.tensor(reward).view_as(advantages)) - plain).abs()
        row |= {"groups_changed": int((shift.amax(1) > 1e-3).sum()),
                "clusters": sum(record.clusters.values()), "noise": sum(record.noise.values()),
                "fallbacks": sum(map(bool, record.fallbacks.values()))}
    return row


def describe(i: int, played: list[Episode], reward: np.ndarray, advantages: torch.Tensor, record,
             suite: Suite) -> str:
    """One rollout in a line: the i-th, or the next that failed and was compared with successes."""
    distances = np.full(len(played), np.nan) if record is None else record.distances
    i = min([*range(i, len(played)), *range(i)],
            key=lambda j: (played[j].success, np.isnan(distances[j])))
    e = played[i]
    far = "" if np.isnan(distances[i]) else f", latent distance {distances[i]:.3f}"
    return (f'"{suite.instructions[e.start.task]}", initial state {e.start.index}: '
            f"{'success' if e.success else 'failure'} after {e.steps} steps{far} -> reward "
            f"{reward[i]:.3f}, advantage {advantages[i]:+.2f}")


# What is compared with what

def try_suite(suite: Suite, split: str, size: int = 64) -> gymnasium.Env:
    """One reset in this process: what is wrong with OpenGL, assets or the split is told before
    anything is loaded. -> the environment, closed."""
    suite.starts(split, 1)
    env = suite.make(size=size, horizon=suite.horizon)
    env.reset(options={"task": suite.tasks[0], "index": 0})
    env.close()
    return env


def note_training(policy, key: str, fast: bool, splits: list[str]) -> None:
    """A line if the policy's statistics say: trained on other pixels, or on what is held out."""
    stats = policy.norm_stats[key]
    if (was := stats.get("fast_sim", fast)) != fast:
        print(f"note: this policy was fine-tuned {'with' if was else 'without'} fast pixels "
              "(--fast_sim), and sees others now", file=sys.stderr)
    if stats.get("split") == "all" and "heldout" in splits:
        print("note: this policy was trained on all 50 initial states; none of them is held out",
              file=sys.stderr)


def fingerprint(policy) -> str:
    """Of config, statistics, tokenizer, and a thousand numbers from all over each tensor: seconds
    suffice at 7B."""
    described = json.dumps([policy.config, policy.norm_stats], sort_keys=True).encode()
    return fingerprint_of(policy, described + policy.files.get("tokenizer.json", b""))


def fingerprint_of(model: torch.nn.Module, described: bytes) -> str:
    """Of a model's weights, and of what else makes it what it is."""
    digest = hashlib.sha256(described)
    for tensor in model.state_dict().values():
        some = tensor.flatten()[::max(1, tensor.numel() // 1000)]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def beside(checkpoint: str) -> Path:
    """Where an evaluation goes by default; of a run's policy into the run's folder."""
    here = Path(checkpoint) if Path(checkpoint).name.strip(".") else Path(checkpoint).resolve()
    if here.is_dir() and os.access(here.parent, os.W_OK):
        return here.with_name("eval" if here.name == "policy" else f"eval-{here.name}")
    return Path("out/eval") / here.name
