"""Progress curves of successes and failures under a world model, scored as SRPO-VLA's benchmark
(arXiv 2511.15605, Appendix B) scores them.

--curves is one of two kinds:
ours    after every prefix of a video, against the mean of its task's OTHER successes (one centre);
paper   over growing windows, a success against its own whole video, a failure against the nearest
        cluster of successes (rewards.py). A success then ends near 1 by construction: only this
        kind stands beside the paper's table, but ours says more.

    python -m studies.progress_curves                       # the simulator's expert -> progress.png
    python -m studies.progress_curves compare               # trained, random weights, mean pixels
    python -m studies.progress_curves --curves paper --data FOLDER_OR_ID \\
        --model facebook/vjepa2-vitg-fpc64-384 --out curves.png

The data are trajectories as in robots/trajectories.py.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.flags import flag, script
from plumbing.plots import draw_progress
from robots import trajectories
from robots.suite import CHUNK

MEASURES = ("spearman", "pearson", "monotonicity", "mmd", "js", "smd")
COMMANDS = ("draw", "compare")


@dataclass
class Settings:
    stage: str = flag("draw", "draw the curves, or compare with random weights and mean pixels",
                      choices=COMMANDS)
    data: str = flag("", "logged trajectories; without them the simulator is played")
    camera: str = flag("", "LeRobot: feature of the images (its first)")
    model: str = flag("", "V-JEPA 2, folder or hub id; without it the simulator's")
    curves: str = flag("ours", "which kind", choices=["ours", "paper"])
    out: str = flag("progress.png", "draw: the picture")
    seed: int = flag(0, "compare: of the random weights")


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


def progress_curves(videos: list, success: np.ndarray, task: np.ndarray, model, kind: str) -> dict:
    """{task: [(success, frames seen, R)]} of the tasks with two successes and a failure."""
    from robots.offline import reference
    latents, curves = model.encode(videos).numpy(), {}
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


def study(s: Settings) -> None:
    compare = s.stage == "compare"
    if not compare and not Path(s.out).absolute().parent.is_dir():
        raise ValueError(f"--out {s.out}: there is no such folder; make it, or choose another")
    every = 1 if s.curves == "paper" else CHUNK
    videos, success, task = (trajectories.videos(s.data, s.camera) if s.data
                             else simulator_rollouts(seed=1, every=every))
    import torch
    from transformers import VJEPA2Model
    from transformers.utils import logging

    from world_model import SHIPPED, PixelModel, WorldModel, separation
    logging.disable_progress_bar()
    logging.set_verbosity_error()           # of a damaged checkpoint transformers prints a table
    trained = WorldModel.from_pretrained(s.model or SHIPPED, batch_size=32)
    models = {"trained": trained}
    if compare:
        torch.manual_seed(s.seed)
        random = WorldModel(VJEPA2Model(trained.config), trained.resize, batch_size=32)
        models |= {"random weights": random, "pixels": PixelModel(trained)}
    print(f"{len(videos)} rollouts, {success.sum()} successes; {s.curves} curves, means over tasks")
    print(f"{'':15} nearer" + "".join(f"{name:>13}" for name in MEASURES))
    for name, model in models.items():
        curves = progress_curves(videos, success, task, model, s.curves)
        near = separation(model.encode(videos).numpy(), success, task)
        print(f"{name:15}{near:7.3f}" + "".join(f"{x:13.3f}" for x in benchmark(curves).values()))
    print("nearer: share of pairs in which a success lies nearer to the other successes than a "
          "failure does; 0.5 is blind")
    if not compare:
        draw_progress(curves, s.out)
        print(f"wrote {s.out}")


main = script(Settings, study, __doc__, words=COMMANDS)
if __name__ == "__main__":
    sys.exit(main())
