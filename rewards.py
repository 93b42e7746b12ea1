r"""The two rewards called SRPO, as their papers state them, equation by equation.

Progress reward (SRPO-VLA, arXiv 2511.15605): within a task, from rollouts' latents h
  1. cluster the latents of the batch's successes                               [VLA 3]
  2. d = squared L2 distance of a failure to the nearest cluster's centre       [VLA 4]
  3. a success earns 1, a failure alpha * sigmoid(-z), z = (d - mean d) / std d [VLA 5]
Reflection reward (SRPO-MLLM, arXiv 2506.01713): of a response in five tagged parts,
<think> <answer> <reflection> <think> <answer>, R = R_task + R_reflection       [MLLM 4]
  1. R_task = 0.5 if the format holds + 0.5 if the FIRST answer is right        [MLLM 5]
  2. R_reflection = I_eff + I_ref + alpha * f_len                               [MLLM 6]
  3. f_len: is the whole twice as long as its first think and answer?           [MLLM 7]
  4. I_eff: what did the second answer make of the first?                       [MLLM 8]
Left out: the encoder (world_model.py), a verifier that reads mathematics
(reasoning/answers.py), what published code pays (published_reward.py in either room).

    python rewards.py                       both on small examples
"""
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np


# Progress reward: SRPO-VLA
@dataclass
class ProgressRecord:
    """How the rewards came about; the dicts are keyed by task id.

    distances: (N,) float64, d of [VLA 4]; nan for successes, and in tasks without one.
    clusters, noise: how many clusters of successes, and successes in none of them.
    fallbacks, all ours:  no_success, so failures earn 0;  single_success, which is the
    centre;  equal_distances (or a single failure), so z = 0 and they earn alpha / 2."""
    distances: np.ndarray
    clusters: dict[int | str, int] = field(default_factory=dict)
    noise: dict[int | str, int] = field(default_factory=dict)
    fallbacks: dict[int | str, list[str]] = field(default_factory=dict)


def progress_reward(latents: np.ndarray, success: Sequence[bool], task: Sequence, *,
                    alpha: float = 0.8, earlier: dict | None = None,
                    ) -> tuple[np.ndarray, ProgressRecord]:
    """Rewards (N,) float64 of N rollouts and their record, by [VLA 3] to [VLA 5].

    latents: (N, D) float array or tensor, a row per ROLLOUT. success: (N,) bool. task:
    (N,) ids; neither centres nor normalisation cross tasks. alpha in [0, 1] bounds what
    a failure earns: the paper found 0.8 best, then 1.0, 0.5, 0.3 and 0, the 0/1 reward.
    earlier: ours, {task: latents (K, D)} of successes that count beside the batch's.
    Any two rewards in a GRPO group normalise to the advantages of 0 and 1, so that this
    changes what is learnt only where failures of ONE initial state differ.
    Raises ValueError for other shapes, values or alpha.

    >>> latents = np.array([[0.0], [0.2], [1.0], [2.0], [3.0]])
    >>> reward, record = progress_reward(latents, [1, 1, 0, 0, 0], ["cup"] * 5)
    >>> print(reward.round(3), record.distances.round(2), record.clusters)
    [1.    1.    0.601 0.442 0.169] [ nan  nan 0.81 3.61 8.41] {'cup': 1}
    """
    from scipy.spatial.distance import cdist  # here: paper 1 needs no scipy
    h, success, task = _checked(latents, success, task, alpha)
    reward, record = success.astype(float), ProgressRecord(np.full(len(h), np.nan))
    for name in np.unique(task).tolist():
        won, lost = (np.flatnonzero((task == name) & (success == s)) for s in (1, 0))
        solved = np.concatenate([h[won], (earlier or {}).get(name, h[:0])])
        labels = cluster(solved)  # [VLA 3]
        centres = [solved[labels == c].mean(0) for c in np.unique(labels[labels >= 0])]
        record.clusters[name], record.noise[name] = len(centres), int(sum(labels < 0))
        if len(lost) and not len(solved):
            record.fallbacks.setdefault(name, []).append("no_success")
        elif len(lost):
            if not centres:
                record.fallbacks.setdefault(name, []).append("single_success")
                centres = solved
            d = cdist(h[lost], centres, "sqeuclidean").min(1)  # [VLA 4]
            if d.std() > 1e-6 * d.mean():  # less is rounding noise
                z = (d - d.mean()) / d.std()  # [VLA 5], over the task's failures
            else:
                record.fallbacks.setdefault(name, []).append("equal_distances")
                z = np.zeros_like(d)
            # paper: (5) is printed sigmoid(z), against its text: the nearer, the more
            reward[lost] = alpha / (1 + np.exp(z))  # [VLA 5], alpha * sigmoid(-z)
            record.distances[lost] = d
    return reward, record


def cluster(successes: np.ndarray) -> np.ndarray:
    """[VLA 3] DBSCAN on a task's success latents (n, D) -> labels (n,), -1 for noise.

    paper: DBSCAN's settings are not given. Ours: two points make a cluster, and the
    radius is twice the median distance to the nearest neighbour: it scales with the
    latents, outliers stay noise, and of two successes or more some make a cluster."""
    from scipy.spatial.distance import cdist
    from sklearn.cluster import DBSCAN
    if len(successes) < 2:
        return np.full(len(successes), -1)
    gaps = cdist(successes, successes)  # (n, n)
    nearest = np.where(np.eye(len(gaps), dtype=bool), np.inf, gaps).min(1)  # (n,)
    apart = nearest[nearest > 0]  # identical rollouts say nothing about scale
    eps = 2 * float(np.median(apart)) if apart.size else np.finfo(float).tiny
    return DBSCAN(eps=eps, min_samples=2, metric="precomputed").fit_predict(gaps)


def _checked(latents, success, task, alpha: float) -> tuple[np.ndarray, ...]:
    if hasattr(latents, "detach"):
        latents = latents.detach().float().cpu()  # a tensor; numpy has no bfloat16
    h, success, task = np.asarray(latents, float), np.asarray(success), np.asarray(task)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}; a success earns 1")
    if h.ndim != 2 or h.shape[1] == 0 or not success.shape == task.shape == h.shape[:1]:
        raise ValueError("need latents (N, D), success (N,) and task (N,), got "
                         f"{h.shape}, {success.shape} and {task.shape}")
    if (bad := ~np.isfinite(h).all(1)).any():
        raise ValueError(f"latents must be finite, row {bad.argmax()} is not")
    if not np.isin(success, (0, 1)).all():
        raise ValueError(f"success must hold booleans, got {success.dtype}")
    return h, success.astype(bool), task


# Reflection reward: SRPO-MLLM
TAG = re.compile(r"</?(?:think|answer|reflection)>")
PATTERN = ("think", "answer", "reflection", "think", "answer")
TAG_ORDER = [tag for part in PATTERN for tag in (f"<{part}>", f"</{part}>")]
I_EFF = {(True, True): 0.25, (False, True): 0.5,  # (first, final answer right)
         (False, False): 0.0, (True, False): -0.25}


@dataclass(frozen=True)
class ReflectionRecord:
    """The parts of a response's reward, the verdicts on its answers (a lone one is both
    first and final), and its length in tokens."""
    format: float
    accuracy: float
    effectiveness: float
    reflection: float
    length: float
    first_correct: bool
    final_correct: bool
    n_tokens: int

    @property
    def total(self) -> float:
        """[MLLM 4] R_task + R_reflection; at most 1.6, for being right twice."""
        task = self.format + self.accuracy
        return task + self.effectiveness + self.reflection + self.length

    def without(self, *parts: str) -> "ReflectionRecord":
        """An ablation: without("effectiveness") pays nothing for I_eff."""
        return replace(self, **dict.fromkeys(parts, 0.0))


def reflection_reward(
        response: str, answer: str, *, alpha: float = 0.1,
        count_tokens: Callable[[str], int] = lambda text: len(text.split()),
        verify: Callable[[str, str], bool | None] = str.__eq__) -> ReflectionRecord:
    """Reward of one response, the completion alone, by [MLLM 4] to [MLLM 8].

    answer: the ground truth. alpha: weight of the length; the paper's 0.05 and 0.1 tie.
    count_tokens: text -> length, such as lambda text: len(tokenizer.encode(text)).
    verify: (prediction, answer) -> right?, None for an answer that it cannot read. The
    default knows equal texts alone: to train, pass reasoning.answers.default_verify.

    >>> first = "<think>a</think><answer>8</answer><reflection>b</reflection>"
    >>> fixed = reflection_reward(first + "<think>c</think><answer>7</answer>", "7")
    >>> fixed.format, fixed.accuracy, fixed.effectiveness, fixed.reflection
    (0.5, 0.0, 0.5, 0.25)
    """
    if not isinstance(response, str) or not isinstance(answer, str):
        raise ValueError(f"need two strings, got {response!r} and {answer!r}")
    response = response.strip()
    thinks, answers = inside(response, "think"), inside(response, "answer")
    first, final = (bool(answers and answers[i] and verify(answers[i], answer))
                    for i in (0, -1))
    tokens = count_tokens(response)
    attempt = (thinks[0], answers[0]) if thinks and answers else ()
    return ReflectionRecord(
        format=0.5 * format_holds(response),  # [MLLM 5]
        accuracy=0.5 * first,  # [MLLM 5]
        # [MLLM 8]; ours: nothing for one answer, or for many to choose from
        effectiveness=I_EFF[first, final] if len(answers) == 2 else 0.0,
        reflection=0.25 * reflection_holds(response),  # [MLLM 6], I_ref
        length=alpha * length_term(tokens, sum(map(count_tokens, attempt))),  # [MLLM 6]
        first_correct=first, final_correct=final, n_tokens=tokens)


def length_term(tokens: int, first: int) -> float:
    """[MLLM 7] f_len = exp(-(|L - T_target| / (T_max - T_target))^2), L tokens in all.

    T_target is 2 and T_max 2.5 times the tokens of the first response. paper: its print
    can be read as exp(-2u), and its first response is the first think. code: exp(-u^2),
    think and answer, as here. Ours: 0 where there is no first response."""
    return math.exp(-((tokens - 2 * first) / (0.5 * first)) ** 2) if first else 0.0


def format_holds(response: str, pattern: Sequence[str] = PATTERN) -> bool:
    """The pattern's tags in order, text inside each pair, none before, between, after.

    Ours: the tags alone; whether answers are boxed, as in the paper, is not asked."""
    outside, within = (TAG.split(response)[i::2] for i in (0, 1))
    order = [tag for part in pattern for tag in (f"<{part}>", f"</{part}>")]
    return (TAG.findall(response) == order and not "".join(outside).strip()
            and all(text.strip() for text in within))


def reflection_holds(response: str) -> bool:
    """One reflection, not blank and without other tags, between two answers."""
    before, _, rest = response.partition("<reflection>")
    text, _, after = rest.partition("</reflection>")
    one = response.count("<reflection>") == response.count("</reflection>") == 1
    return (one and text.strip() != "" and TAG.search(text) is None
            and "</answer>" in before and "</answer>" in after)


def inside(response: str, name: str) -> list[str]:
    """What stands in each <name>..</name>; linear, where a lazy regex is quadratic."""
    closed = (part.partition(f"<{name}>") for part in response.split(f"</{name}>")[:-1])
    return [text.strip() for _, tag, text in closed if tag]


def main() -> None:
    latents = np.array([[0.0], [0.2], [1.0], [2.0], [3.0]])
    print("two successes, at 0.0 and 0.2, and failures at 1, 2 and 3")
    for alpha in (0.3, 0.8, 1.0):
        reward, _ = progress_reward(latents, [1, 1, 0, 0, 0], ["cup"] * 5, alpha=alpha)
        print(f"  alpha {alpha}: rewards {reward.round(3)}")
    print("answers right         R_task    I_eff    I_ref  0.1 f_len    total")
    for first, final in ((7, 7), (8, 7), (7, 8), (8, 8)):
        r = reflection_reward(
            f"<think>3 and 4</think><answer>{first}</answer><reflection>Count again"
            f"</reflection><think>4, 3</think><answer>{final}</answer>", "7")
        parts = r.format + r.accuracy, r.effectiveness, r.reflection, r.length, r.total
        print(f"{first == 7!s:>7} -> {final == 7!s:5}", *(f"{x:8.3f}" for x in parts))


if __name__ == "__main__":
    main()
