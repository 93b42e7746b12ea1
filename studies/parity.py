"""One checkpoint by our path and by the published evaluation's rules: where they first differ.

1. `ours`: robots.rollouts.play on robots.libero, whose worker process renders what is looked at.
2. `published`: what OpenVLA-OFT's evaluation does, written out on LIBERO's stock environment.
3. `differences`: the first in an episode's pixels, tokens, actions and success.

Both ask the same network, one image at a time (tests/robots/test_openvla.py holds it against
recorded outputs). Exit code as of diff: 0 for equal, 1 for not, 2 for an error.

    python -m studies.parity --suite libero_object --horizon 40     # a tiny random OpenVLA-OFT
    python -m studies.parity --suite libero_object --checkpoint FOLDER_OR_ID --tasks 0 1 2
"""
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from plumbing.flags import flag, require, script
from robots import find_suite
from robots import libero_files as files
from robots.libero import PROTOCOLS
from robots.suite import CHUNK, Episode, Start, Suite, SuiteOptions

SEED, WAIT, NO_OP = 0, 10, [0.0] * 6 + [-1.0]       # the published evaluation's


@dataclass
class Settings:
    suite: str = flag("libero_object", "LIBERO's suite", choices=[*files.SUITES, "libero_90"])
    checkpoint: str = flag("", "folder or hub id; none: a tiny random OpenVLA-OFT")
    tasks: list[int] = flag([0], "task numbers")
    states: int = flag(2, "initial states of each, 1..50")
    horizon: int = flag(0, "env steps of an episode at most; 0: the published ones")
    seeds: str = flag("published", "of the reference's fixtures: 0 once a task, as published, or "
                      "the initial state's number, as ours", choices=["published", "ours"])
    assets: str = flag("", "folder of LIBERO's assets (LIBERO_ASSETS, else the package's)")


def ours(policy, key: str, suite: Suite, starts: list[Start]) -> list[Episode]:
    """An episode from each start. Its calls: {"pixels": uint8 (S, S, 3), upright, "tokens": (56,)
    of the vocabulary, "actions": (8, 7) for the environment}."""
    from robots.openvla import FIRST_BIN
    from robots.policy import greedy
    from robots.rollouts import play
    act, tokens = greedy(policy, key), []

    def noted(images, texts):
        actions, _ = act(images, texts)
        return actions, [dict(pixels=images[0], tokens=tokens.pop(), actions=actions[0])]
    hook = policy.register_forward_hook(
        lambda *call: tokens.append(FIRST_BIN + call[-1][0].argmax(-1).cpu().numpy()))
    with hook, closing(suite.workers(1, policy.camera)) as workers:
        return play(noted, workers, starts, suite)


def upright(observation: dict) -> np.ndarray:
    return np.ascontiguousarray(observation["agentview_image"][::-1, ::-1])


def decoded(tokens: np.ndarray, stats: dict) -> np.ndarray:
    """Tokens (56,) -> actions (8, 7): bin centres, the data's quantiles, the gripper's sign."""
    edges = np.linspace(-1, 1, 256)
    unit = ((edges[:-1] + edges[1:]) / 2)[(32000 - tokens - 1).clip(0, 254)].reshape(CHUNK, 7)
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    scaled = 0.5 * (unit + 1) * (high - low + 1e-8) + low
    actions = np.where(stats.get("mask", [True] * 7), scaled, unit)
    actions[:, 6] = -np.sign(2 * actions[:, 6] - 1)     # 1 open, 0 closed -> -1 open, 1 close
    return actions


def published(policy, key: str, suite: Suite, starts: list[Start], s: Settings
              ) -> Iterator[Episode]:
    """As `ours`, of starts of one task that share an environment."""
    import torch
    make = sys.modules[files.prepare(s.assets).__module__].OffScreenRenderEnv
    task, size = files.tasks(s.suite)[starts[0].task], policy.camera
    states, stats = files.initial_states(task.states), policy.norm_stats[key]["action"]
    env = make(bddl_file_name=task.bddl, camera_names=["agentview"], camera_heights=size,
               camera_widths=size)
    env.seed(starts[0].index if s.seeds == "ours" else SEED)
    for start in starts:
        env.reset()
        env.set_init_state(states[start.index])
        for _ in range(WAIT):
            observation = env.step(NO_OP)[0]
        episode = Episode(start)
        while episode.steps < suite.horizon and not episode.success:
            image = upright(observation)
            with torch.no_grad():
                logits = policy(*policy.prompt_ids([task.instruction]),
                                policy.pixel_values(policy.frames(image[None])))
            tokens = 32000 - 256 + logits[0].argmax(-1).cpu().numpy()
            actions = decoded(tokens, stats)
            episode.calls.append(dict(pixels=image, tokens=tokens, actions=actions))
            episode.executed.append(0)
            for action in actions[:suite.horizon - episode.steps]:
                observation, _, episode.success, _ = env.step(action)
                episode.executed[-1] += 1
                if episode.success:
                    break
        yield episode
    env.close()


def differences(mine: Episode, theirs: Episode) -> list[str]:
    """What differs between two episodes and from which env step on, the earliest first."""
    found = {}
    for i, (a, b) in enumerate(zip(mine.calls, theirs.calls)):
        for name, x in a.items():
            off = np.abs(x.astype(float) - b[name])
            if off.any() and name not in found:
                found[name] = (f"{name} differ from env step {CHUNK * i} on, there in "
                               f"{np.count_nonzero(off)} of {off.size} by up to {off.max():.3g}")
    ends = [f"{'success' if e.success else 'failure'} at step {e.steps}" for e in (mine, theirs)]
    return [*found.values()] + [f"{ends[0]}, published: {ends[1]}"] * (ends[0] != ends[1])


def tiny(suite: str):
    """A random OpenVLA-OFT whose tokens change with the image; it knows no words."""
    import torch
    from tokenizers import Tokenizer, models

    from robots.openvla import SPACE, TINY, OpenVLA
    torch.manual_seed(0)
    stats = {suite: TINY["norm_stats"]["unit"]}
    policy = OpenVLA(TINY | {"norm_stats": stats}, (32, 3, 128), (48, 4, 192))
    for p in (p for p in policy.parameters() if p.ndim == 2):
        torch.nn.init.normal_(p, std=0.3)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": SPACE}
    policy.tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return policy


def compare(s: Settings) -> int:
    """Plays and prints -> 1 if anything differs."""
    require(s, dict(states=1, horizon=0))
    horizon = s.horizon or PROTOCOLS["openvla-oft"][s.suite]
    suite = find_suite(s.suite, tuple(s.tasks), SuiteOptions(horizon=horizon, assets=s.assets))
    from robots.policy import find_key, load_policy
    policy = load_policy(s.checkpoint, None) if s.checkpoint else tiny(s.suite)
    key, equal, count = find_key(policy.norm_stats, s.suite), 0, 0
    print(f"{s.suite}: {s.checkpoint or 'a tiny random OpenVLA-OFT'}; {suite.protocol}")
    for task in suite.tasks:
        starts = [start for start in suite.starts("all", s.states) if start.task == task]
        together = [[start] for start in starts] if s.seeds == "ours" else [starts]
        theirs = (e for some in together for e in published(policy, key, suite, some, s))
        for mine, other in zip(ours(policy, key, suite, starts), theirs, strict=True):
            found, count = differences(mine, other), count + 1
            equal += not found
            told = f"equal, {len(mine.calls)} calls of the policy"
            print(f"task {task} state {mine.start.index}:", "; ".join(found) or told, flush=True)
    print(f"{equal} of {count} episodes are equal to the last bit")
    return int(equal < count)


main = script(Settings, compare, __doc__)
if __name__ == "__main__":
    sys.exit(main())
