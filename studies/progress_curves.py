"""Progress curves of successes and failures under a world model, scored as SRPO-VLA's benchmark
(arXiv 2511.15605, Appendix B) scores them.

--curves is one of two kinds:
ours    after every prefix of a video, against the mean of its task's OTHER successes (one centre);
paper   over growing windows, a success against its own whole video, a failure against the nearest
        cluster of successes (rewards.py). A success then ends near 1 by construction: only this
        kind stands beside the paper's table, but ours says more.

    python -m studies.progress_curves                       # the simulator's expert -> progress.png
    python -m studies.progress_curves compare               # trained, random weights, mean pixels
    python -m studies.progress_curves compare --policy weights/tiny_vla     # on its own rollouts
    python -m studies.progress_curves compare --suite tabletop_long --policy FOLDER --data FOLDER
    python -m studies.progress_curves --curves paper --data FOLDER_OR_ID \\
        --model facebook/vjepa2-vitg-fpc64-384 --out curves.png

The data are trajectories as in robots/trajectories.py. nearer: share of pairs in which a success
lies nearer to the other successes than a failure does; within: rank correlation of failures'
rewards and true progress in a group; contrast: share of groups with two rewards.
"""
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from plumbing.flags import flag, script
from plumbing.plots import draw_progress
from robots import trajectories
from robots.suite import CHUNK, Episode

MEASURES = ("spearman", "pearson", "monotonicity", "mmd", "js", "smd")
COMMANDS = ("draw", "compare")


@dataclass
class Settings:
    stage: str = flag("draw", "draw the curves, or compare with random weights and mean pixels",
                      choices=COMMANDS)
    data: str = flag("", "logged trajectories; without them the simulator is played; with "
                         "--policy their successes are references, as in vla_srpo.py")
    policy: str = flag("", "compare: a folder; its sampled rollouts on the tabletop, and how "
                           "their failures are ranked")
    suite: str = flag("tabletop", "of --policy", choices=["tabletop", "tabletop_long"])
    camera: str = flag("", "LeRobot: feature of the images (its first)")
    model: str = flag("", "V-JEPA 2, folder or hub id; without it the simulator's")
    curves: str = flag("ours", "which kind", choices=["ours", "paper"])
    out: str = flag("progress.png", "draw: the picture")
    seed: int = flag(0, "compare: of the random weights and of the policy's sampling")


def simulator_rollouts(episodes: int = 120, seed: int = 0,
                       every: int = CHUNK) -> tuple[list, np.ndarray, np.ndarray]:
    """The scripted expert with noise, a frame after every `every` env steps (the small encoder is
    trained on those of a chunk); in half of the episodes it is wrong by centimetres about where
    cube and plate are, and mostly fails. -> (videos, success, task)."""
    from robots.tabletop import N_STATES, Expert, Tabletop
    rng, env, videos, success, task = np.random.default_rng(seed), Tabletop(), [], [], []
    tasks = len(env.instructions)
    for i in range(episodes):
        start = {"task": i % tasks, "index": int(rng.integers(N_STATES))}
        frames, ended = [env.reset(options=start)[0]["image"]], False
        expert = Expert(env, 0.025 * (i // tasks % 2), rng)
        while not ended:
            ended = env.advance(expert() + 0.1 * np.array([*rng.standard_normal(3), 0, 0, 0, 0]))
            if ended or env.steps % every == 0:
                frames.append(env.render())
        videos.append(np.stack(frames))
        success.append(env.success)
        task.append(env.task)
    return videos, np.array(success), np.array(task)


def policy_rollouts(folder: str | Path, suite: str, states: int, rollouts: int,
                    seed: int) -> list[Episode]:
    """So many rollouts from each of the tasks' first training states, sampled at temperature 1."""
    import torch

    from robots import find_suite
    from robots import policy as policies
    from robots.rollouts import play
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    found, policy = find_suite(suite), policies.load_policy(Path(folder))
    starts = [start for start in found.starts("train", states) for _ in range(rollouts)]
    with closing(found.workers(1, policy.camera)) as workers:
        return play(policies.sampler(policy, 1.0, suite), workers, starts, found,
                    clip=lambda video: video)


def separation(latents: np.ndarray, success: np.ndarray, task: np.ndarray) -> float:
    """Share of pairs in which a success lies nearer to the mean of its task's (other) successes
    than a failure does: 0.5 is blind. latents (N, D), success (N,) bool, task (N,). Mean over tasks
    with two successes and a failure; nan if there is none."""
    from sklearn.metrics import roc_auc_score
    latents, scores = np.asarray(latents, dtype=np.float64), []
    for name in np.unique(task):
        s, f = latents[(task == name) & success], latents[(task == name) & ~success]
        if len(s) >= 2 and len(f):
            others = (s.sum(0) - s) / (len(s) - 1)      # or it would pull its own mean
            gaps = np.linalg.norm(np.concatenate([s - others, f - s.mean(0)]), axis=1)
            scores.append(roc_auc_score(np.arange(len(gaps)) >= len(s), gaps))
    return float(np.mean(scores)) if scores else np.nan


def ranking(latents: np.ndarray, success: np.ndarray, task: np.ndarray, group: np.ndarray,
            progress: np.ndarray, earlier: dict | None = None) -> tuple[float, float]:
    """Of the groups' rewards under a world model (latents (N, D), the others (N,), earlier as in
    rewards.py): Spearman's correlation of failures' rewards with their true progress, mean over
    groups in which three or more differ; share of groups with two different rewards."""
    from scipy.stats import spearmanr

    from rewards import progress_reward
    reward = progress_reward(latents, success, task, earlier=earlier)[0]
    groups = np.unique(group)
    lost = [np.flatnonzero((group == g) & ~success) for g in groups]
    within = [spearmanr(reward[i], progress[i])[0] for i in lost
              if len(i) > 2 and np.ptp(reward[i]) and np.ptp(progress[i])]
    return (float(np.mean(within)) if within else np.nan,
            float(np.mean([np.ptp(reward[group == g]) > 0 for g in groups])))


def progress_curves(videos: list, latents: np.ndarray, success: np.ndarray, task: np.ndarray,
                    model, kind: str) -> dict:
    """{task: [(success, frames seen, R)]} of the tasks with two successes and a failure. latents
    (N, D): the model's, of the whole videos."""
    from robots.offline import reference
    curves = {}
    along = model.paper_progress if kind == "paper" else model.progress
    for name in np.unique(task).tolist():
        won = np.flatnonzero(success & (task == name))
        if len(won) < 2 or success[task == name].all():
            continue
        curves[name] = [(bool(success[i]), *along(videos[i], reference(latents, won, i, kind)))
                        for i in np.flatnonzero(task == name)]
    if not curves:
        raise ValueError("no task has two successes and a failure: nothing to compare")
    return curves


def benchmark(curves: dict) -> dict[str, float]:
    """The paper's numbers, means over tasks."""
    from world_model import progress_metrics
    scores = [progress_metrics([r for _, _, r in rows], [won for won, _, _ in rows])
              for rows in curves.values()]
    return {name: float(np.mean([score[name] for score in scores])) for name in MEASURES}


def beside(trained, seed: int) -> dict:
    """A world model and what it is compared with, by name."""
    import torch
    from transformers import VJEPA2Model

    from robots.references import Oracle
    from world_model import PixelModel, WorldModel
    torch.manual_seed(seed)
    random, how = VJEPA2Model(trained.config), (trained.resize, None, None, 32)
    pixels = PixelModel(random, *how)
    return {"trained": trained, "trained, places": WorldModel(trained.model, *how, "place"),
            "random weights": WorldModel(random, *how),
            "random, places": WorldModel(random, *how, "place"),
            "pixels": pixels, "pixels, max": PixelModel(random, *how, "max"),
            "last frame": SimpleNamespace(width=pixels.width, encode=lambda videos: pixels.encode(
                [video[-1:] for video in videos])),
            "true progress": Oracle()}


def study(s: Settings) -> None:
    compare = s.stage == "compare"
    if not compare and not Path(s.out).absolute().parent.is_dir():
        raise ValueError(f"--out {s.out}: there is no such folder; make it, or choose another")
    if s.policy and (not compare or s.curves == "paper"):
        raise ValueError("--policy is for compare, without --curves paper")
    if s.policy:
        played = policy_rollouts(s.policy, s.suite, 8, 8, s.seed)
        videos, success = [e.clip for e in played], np.array([e.success for e in played])
        task, progress = (np.array(x) for x in zip(*((e.start.task, e.progress) for e in played)))
        group = np.arange(len(played)) // 8
    elif s.data:
        videos, success, task = trajectories.videos(s.data, s.camera)
    else:
        videos, success, task = simulator_rollouts(
            seed=1, every=1 if s.curves == "paper" else CHUNK)
    from transformers.utils import logging

    from robots.references import Oracle, References
    from robots.tabletop import TASKS
    from world_model import SHIPPED, WorldModel
    logging.disable_progress_bar()
    logging.set_verbosity_error()           # of a damaged checkpoint transformers prints a table
    trained = WorldModel.from_pretrained(s.model or SHIPPED, batch_size=32)
    models = beside(trained, s.seed) if compare else {"trained": trained}
    print(f"{len(videos)} rollouts, {success.sum()} successes; {s.curves} curves, means over tasks")
    columns = ["nearer", *(("within", "contrast") if s.policy else ())]
    if s.policy:
        both = [len(set(success[group == g])) == 2 for g in np.unique(group)]
        print(f"groups of 8 with contrast under 0/1 rewards: {np.mean(both):.3f}")
    print(f"{'':15}" + "".join(f"{name:>9}" for name in columns)
          + "".join(f"{name:>13}" for name in MEASURES))
    for name, model in models.items():
        if not s.policy and not isinstance(model, WorldModel):
            continue                        # of rollouts whose true progress is known
        oracle = isinstance(model, Oracle)
        latents = model.encode(played if oracle else videos).numpy()
        numbers = [separation(latents, success, task)]
        if s.policy:
            memory = References(len(TASKS[s.suite]), 64, 1 if oracle else model.width)
            if s.data and not oracle:
                memory.add_logged(s.data, s.camera, TASKS[s.suite], model)
            elif s.data:
                memory = References.solved(len(TASKS[s.suite]))
            numbers += ranking(latents, success, task, group, progress, memory.latents())
        line = f"{name:15}" + "".join(f"{x:9.3f}" for x in numbers)
        # nan: no task has two successes and a failure, which the curves need as well
        if isinstance(model, WorldModel) and not (s.policy and np.isnan(numbers[0])):
            curves = progress_curves(videos, latents, success, task, model, s.curves)
            line += "".join(f"{x:13.3f}" for x in benchmark(curves).values())
        print(line)
    if not compare:
        draw_progress(curves, s.out)
        print(f"wrote {s.out}")


main = script(Settings, study, __doc__, words=COMMANDS)
if __name__ == "__main__":
    sys.exit(main())
