r"""The rewards of the two papers called SRPO, each as the paper states it and as its published code computes it.

Progress reward (SRPO-VLA, arXiv 2511.15605), for robot rollouts embedded by a frozen video encoder:
  1. per task, cluster the latents of the batch's successes with DBSCAN; a success earns 1;
  2. a failure's distance d is the squared L2 distance to the nearest cluster centre;
  3. z = (d - mean d) / std d over the task's failures;
  4. a failure earns alpha * sigmoid(-z), alpha = 0.8: more the nearer it came, never as much as a success.
Reflection reward (SRPO-MLLM, arXiv 2506.01713), for `<think><answer><reflection><think><answer>` responses:
  R = R_format + R_accuracy (first answer) + I_eff (first -> second answer) + I_ref + 0.1 * f_len.

Variants: "paper" is what to train with; "official" (siiRL), "openrlhf" and "verl" (SRPO_MLLMs) compute what the published
code computes, quirks named at the spot. The progress reward's "paper" follows public notes on the paper that agree with
each other. Left out: the encoder (world_model.py), stripping of chat templates (pass the response alone), and mathruler,
the verifier of the "verl" code (pass any `verify`).

    python rewards.py                       worked examples of both schemes, paper beside published code
    pytest tests/test_rewards.py            oracle tests
"""
import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.cluster import DBSCAN
from sklearn.preprocessing import StandardScaler

EPS_FACTOR = 2.0  # "paper": DBSCAN's eps in units of the successes' median nearest-neighbour distance
EQUAL_DISTANCES = 1e-6  # "paper": std below this share of the mean distance is rounding noise, z = 0
ADVANTAGE_TOLERANCE = 1e-3  # shaping "changed" a group if an advantage moved by more than this many stds
PROGRESS_VARIANTS, REFLECTION_VARIANTS = ("paper", "official"), ("paper", "openrlhf", "verl")


# Progress reward: SRPO-VLA
@dataclass
class ProgressRecord:
    """What `progress_reward` did. Dicts are keyed by task id; group_changed by group id.

    distances (N,) float64: squared L2 ("paper") or Euclidean ("official") distance to the nearest reference; nan for
    successes and without a reference. eps: DBSCAN's radius in latent ("paper") or standardised ("official") units; nan for
    fewer than two successes. noise: successes in no cluster; beside clusters they are no reference. fallbacks, by name:
      no_success        nothing to compare with: failures get 0
      single_success    that success is the reference
      no_cluster        the mean of the successes is the reference (never in "paper": see `_cluster`)
      single_failure    nothing to normalise over: z = 0, reward alpha / 2 ("official": 0.3)
      equal_distances   the same, for failures all equally far
      zero_latents      "official" only: rows of zeros count as missing and get 0, success or not
    group_changed: whether shaping gave the group other normalised advantages than the reward 0/1; None without `group`.
    """
    variant: str
    distances: np.ndarray
    clusters: dict[Hashable, int] = field(default_factory=dict)
    noise: dict[Hashable, int] = field(default_factory=dict)
    eps: dict[Hashable, float] = field(default_factory=dict)
    fallbacks: dict[Hashable, list[str]] = field(default_factory=dict)
    group_changed: dict[Hashable, bool] | None = None

    @property
    def n_groups_changed(self) -> int:
        return sum((self.group_changed or {}).values())


def _cluster(successes: np.ndarray, variant: str) -> tuple[np.ndarray, float]:
    """Cluster labels (n,), -1 for noise, and the eps used, of n >= 2 success latents (n, D)."""
    if variant == "official":
        # Code: standardise, then a fixed eps. Standardised points are about sqrt(2 D) apart, 53 in the 1408 dimensions of
        # V-JEPA 2, so nothing ever clusters there and the reference is always the plain mean.
        scaled = StandardScaler().fit_transform(successes)
        return DBSCAN(eps=0.5, min_samples=2).fit_predict(scaled), 0.5
    # Paper: DBSCAN in latent space, eps not given. With min_samples = 2 its clusters are the connected components of the
    # "closer than eps" graph. Ours: eps = twice the typical (median) nearest-neighbour distance. It scales with the
    # latents, an outlier stays out, and half the points have a neighbour that near, so there is always a cluster.
    pairwise = cdist(successes, successes)  # (n, n)
    nearest = np.where(np.eye(len(successes), dtype=bool), np.inf, pairwise).min(1)  # (n,)
    apart = nearest[nearest > 0]  # identical rollouts say nothing about scale
    eps = EPS_FACTOR * float(np.median(apart)) if apart.size else np.finfo(float).tiny
    return DBSCAN(eps=eps, min_samples=2, metric="precomputed").fit_predict(pairwise), eps


def _squash(d: np.ndarray, variant: str, alpha: float) -> tuple[np.ndarray, bool]:
    """Distances (n,) of a task's failures -> rewards (n,), and whether they were too equal to be told apart."""
    if variant == "official":
        # Code: min-max within the task: the nearest failure gets 0.596 and the farthest 0.004 however close they are.
        spread = d.max() - d.min()
        flat = bool(spread < 1e-6)
        normalised = np.full_like(d, 0.5) if flat else (d - d.min()) / spread
        return 0.6 / (1 + np.exp(-10 * (0.5 - normalised))), flat
    std = d.std()
    flat = bool(std <= EQUAL_DISTANCES * d.mean())
    z = np.zeros_like(d) if flat else (d - d.mean()) / std  # SRPO-VLA step 3: z-score over the failures; |z| < sqrt(n)
    return alpha / (1 + np.exp(z)), flat  # SRPO-VLA step 4: alpha * sigmoid(-z)


def _ids(name: str, values: Sequence[Hashable], n: int) -> list[Hashable]:
    ids = list(values.tolist() if hasattr(values, "tolist") else values)
    if len(ids) != n:
        raise ValueError(f"{name} must hold one id per row of latents: expected {n} ids, got {len(ids)}")
    if not all(isinstance(key, Hashable) for key in ids):
        raise ValueError(f"{name} must hold hashable ids such as int or str, got {type(ids[0]).__name__}")
    return ids


def _rows_of(ids: list[Hashable]) -> dict[Hashable, np.ndarray]:
    rows: dict[Hashable, list[int]] = {}
    for row, key in enumerate(ids):
        rows.setdefault(key, []).append(row)
    return {key: np.array(value) for key, value in rows.items()}


def _advantages(rewards: np.ndarray) -> np.ndarray:
    """Group-normalised advantages (G,); zero for a group without signal."""
    if np.ptp(rewards) < 1e-6:
        return np.zeros_like(rewards)
    return (rewards - rewards.mean()) / rewards.std()


def progress_reward(latents: np.ndarray, success: Sequence[bool], task: Sequence[Hashable], *, variant: str = "paper",
                    group: Sequence[Hashable] | None = None, alpha: float = 0.8) -> tuple[np.ndarray, ProgressRecord]:
    """Rewards (N,) float64 for N rollouts, and the record of how they came about. Source: SRPO-VLA, arXiv 2511.15605.

    latents: (N, D) float array or tensor, one row per rollout. success: (N,) bool. task: (N,) ids; references and
    normalisation never cross tasks. group: (N,) optional ids of the initial state (the GRPO group), unique over tasks.
    variant: "paper", or "official" for siiRL's code. alpha: in [0, 1), bounds what a failure earns in "paper" ("official"
    has 0.6 built in); 0 gives the plain 0/1 reward. Raises ValueError for wrong shapes or lengths, non-finite latents, an
    unknown variant, an alpha outside [0, 1), a group that spans tasks.

    >>> latents = np.array([[0.0], [0.2], [1.0], [2.0], [3.0]])
    >>> rewards, record = progress_reward(latents, [True, True, False, False, False], ["cup"] * 5)
    >>> print(rewards.round(3), record.distances.round(2), record.clusters, record.eps)
    [1.    1.    0.601 0.442 0.169] [ nan  nan 0.81 3.61 8.41] {'cup': 1} {'cup': 0.4}
    """
    if variant not in PROGRESS_VARIANTS:
        raise ValueError(f"variant must be one of {PROGRESS_VARIANTS}, got {variant!r}")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must lie in [0, 1) so that no failure earns a success's reward, got {alpha}")
    if hasattr(latents, "detach"):
        latents = latents.detach().float().cpu()  # a tensor; numpy has no bfloat16
    x = np.asarray(latents, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"latents must have shape (N, D), one row per rollout, got {x.shape}")
    n = len(x)
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x).all(1))[0])
        raise ValueError(f"latents must be finite, row {row} holds nan or inf: check the encoder")
    success = np.asarray(success)
    if success.shape != (n,) or not np.isin(success, (0, 1)).all():
        raise ValueError(f"success must hold {n} booleans, one per row of latents, got {success.dtype} {success.shape}")
    success = success.astype(bool)
    tasks = _ids("task", task, n)
    groups = None if group is None else _ids("group", group, n)

    missing = ~x.any(1) if variant == "official" else np.zeros(n, dtype=bool)  # code: an all-zero latent is "no video"
    rewards = np.where(success & ~missing, 1.0, 0.0)  # (N,)
    record = ProgressRecord(variant, np.full(n, np.nan))
    for key, rows in _rows_of(tasks).items():
        fallbacks = ["zero_latents"] if missing[rows].any() else []
        rows = rows[~missing[rows]]
        good, bad = rows[success[rows]], rows[~success[rows]]
        labels, eps = np.full(len(good), -1), float("nan")
        if len(good) >= 2:
            labels, eps = _cluster(x[good], variant)  # SRPO-VLA step 1
        record.clusters[key], record.noise[key] = int(labels.max(initial=-1)) + 1, int((labels == -1).sum())
        record.eps[key] = eps
        if len(good) == 0 and len(bad):
            fallbacks.append("no_success")
        elif len(bad):
            # The code maps standardised centres back to latent space; that is the mean of the raw members.
            centres = [x[good[labels == c]].mean(0) for c in range(record.clusters[key])]
            if not centres:
                fallbacks.append("single_success" if len(good) == 1 else "no_cluster")
                centres = [x[good].mean(0)]
            metric = "euclidean" if variant == "official" else "sqeuclidean"  # paper / code differ
            d = cdist(x[bad], np.array(centres), metric).min(1)  # SRPO-VLA step 2, (failures,)
            record.distances[bad] = d
            rewards[bad], flat = _squash(d, variant, alpha)
            if flat:
                fallbacks.append("single_failure" if len(bad) == 1 else "equal_distances")
        if fallbacks:
            record.fallbacks[key] = fallbacks

    if groups is not None:
        # Two reward values in a group normalise to the advantages of 0/1, whatever they are: shaping only acts where
        # failures of ONE initial state earn different rewards. That needs one latent per rollout; siiRL's code keeps one
        # video per initial state, so there it never acts.
        record.group_changed = {}
        for key, rows in _rows_of(groups).items():
            if len({tasks[row] for row in rows}) > 1:
                raise ValueError(f"group {key!r} holds rows of two tasks: use ids like (task, state)")
            shift = _advantages(rewards[rows]) - _advantages(success[rows].astype(float))
            record.group_changed[key] = bool(np.abs(shift).max() > ADVANTAGE_TOLERANCE)
    return rewards, record


# Reflection reward: SRPO-MLLM
@dataclass
class ReflectionRecord:
    """`reflection_reward`'s total and parts; total is their sum, but in "verl" 0.5 * format + 0.5 * accuracy.

    The published codes have one number for accuracy and effectiveness: it stands in `accuracy`; `effectiveness` and
    `reflection` are 0. first_answer / final_answer: the texts compared, None if absent; a lone answer is both. n_tokens: of
    the whole response; n_first_tokens: of the first think and answer without tags. note: the published quirk at work.
    """
    variant: str
    total: float = 0.0
    format: float = 0.0
    accuracy: float = 0.0
    effectiveness: float = 0.0
    reflection: float = 0.0
    length: float = 0.0
    first_answer: str | None = None
    final_answer: str | None = None
    first_correct: bool = False
    final_correct: bool = False
    n_tokens: int = 0
    n_first_tokens: int = 0
    note: str = ""


TAG = re.compile(r"</?(?:think|answer|reflection)>")
TAG_ORDER = [f"<{end}{name}>" for name in ("think", "answer", "reflection", "think", "answer") for end in ("", "/")]


def format_holds(response: str, published: bool = False) -> bool:
    """Exactly the ten tags in order, text inside each pair, none between and after."""
    if TAG.findall(response) != TAG_ORDER:
        return False
    before, *pieces = TAG.split(response)  # 10 pieces: inside, between, inside, ..., after the last tag
    if any(piece.strip() for piece in pieces[1::2]):
        return False
    if published:  # code: any text may come before the first tag, and a blank is text
        return all(pieces[0::2])
    return not before.strip() and all(piece.strip() for piece in pieces[0::2])


def _reflection_holds(response: str) -> bool:
    """One non-blank reflection, holding no other tag, between the first answer and the last."""
    tags = TAG.findall(response)
    if tags.count("<reflection>") != 1 or tags.count("</reflection>") != 1:
        return False
    i = tags.index("<reflection>")
    closed = tags[i + 1:i + 2] == ["</reflection>"] and TAG.split(response)[i + 1].strip() != ""
    return closed and "</answer>" in tags[:i] and "</answer>" in tags[i + 2:]


def _length_term(n_tokens: int, n_first: int) -> float:
    """SRPO-MLLM: f_len(L) = exp(-(|L - T_target| / (T_max - T_target))^2), T_target, T_max = 2, 2.5 first responses."""
    if n_first == 0:
        return 0.0
    return math.exp(-((n_tokens - 2 * n_first) / (0.5 * n_first)) ** 2)


def reflection_reward(response: str, answer: str, *, variant: str = "paper",
                      count_tokens: Callable[[str], int] = lambda text: len(text.split()),
                      verify: Callable[[str, str], bool | None] | None = None) -> ReflectionRecord:
    r"""Reward of one response, with every part. Source: SRPO-MLLM, arXiv 2506.01713; code: SRPO_MLLMs.

    response: the decoded completion alone. answer: the ground truth. variant: "paper", or "openrlhf" for the published
    srpo_reward_func.py, or "verl" for srpo_rm.py. count_tokens: text -> length, such as lambda t: len(tokenizer.encode(t)).
    verify: (prediction, answer) -> right or not, None for an unreadable answer; reasoning/answers.py's if not given.
    Raises ValueError for an unknown variant or a response or answer that is not a string.

    >>> fixed = "<think>a</think><answer>8</answer><reflection>b</reflection><think>c</think><answer>7</answer>"
    >>> record = reflection_reward(fixed, "7")
    >>> record.format, record.accuracy, record.effectiveness, record.reflection, record.final_answer
    (0.5, 0.0, 0.5, 0.25, '7')
    """
    if variant not in REFLECTION_VARIANTS:
        raise ValueError(f"variant must be one of {REFLECTION_VARIANTS}, got {variant!r}")
    for name, value in (("response", response), ("answer", answer)):
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a string, got {type(value).__name__} {value!r}: pass str({name})")
    if verify is None:
        from reasoning.answers import default_verify as verify        # here, so that the paper's variant can be copied alone, with a verifier of your own
    response = response.strip()
    record = ReflectionRecord(variant)
    if variant == "verl":
        _score_verl(record, response, answer, count_tokens, verify)
        return record

    thinks = re.findall(r"<think>(.*?)</think>", response, re.DOTALL)
    answers = [text.strip() for text in re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)]
    record.n_tokens = count_tokens(response)
    if thinks and answers:
        record.n_first_tokens = count_tokens(thinks[0].strip()) + count_tokens(answers[0])
    first = final = False
    if answers:
        record.first_answer, record.final_answer = answers[0], answers[-1]
        first, final = verify(answers[0], answer), verify(answers[-1], answer)
        record.first_correct, record.final_correct = bool(first), bool(final)
    if variant == "openrlhf":
        if len(thinks) < 2 or len(answers) < 2:  # code: its length term raises, and the caller scores the sample 0
            record.note = "fewer than two thinks or answers: 0 in total"
        else:
            _score_openrlhf(record, response, answer, unreadable=first is None or final is None)
        return record

    record.format = 0.5 if format_holds(response, published=False) else 0.0  # SRPO-MLLM: R_format; ours: the tags alone, whether answers are boxed or not
    record.accuracy = 0.5 if record.first_correct else 0.0  # SRPO-MLLM: R_accuracy, of the FIRST answer
    if len(answers) == 2:  # SRPO-MLLM: I_eff; ours: nothing for one answer, or for many to choose from
        table = {(True, True): 0.25, (False, True): 0.5, (False, False): 0.0, (True, False): -0.25}
        record.effectiveness = table[record.first_correct, record.final_correct]
    record.reflection = 0.25 if _reflection_holds(response) else 0.0  # SRPO-MLLM: I_ref
    record.length = 0.1 * _length_term(record.n_tokens, record.n_first_tokens)  # SRPO-MLLM: alpha * f_len(L)
    record.total = record.format + record.accuracy + record.effectiveness + record.reflection + record.length
    return record


def _score_openrlhf(record: ReflectionRecord, response: str, answer: str, unreadable: bool) -> None:
    from reasoning.answers import normalise
    record.format = 0.5 if format_holds(response, published=True) else 0.0
    # Paper / code differ: a corrected answer earns more than being right twice, so faking a wrong first answer pays.
    table = {(True, True): 0.75, (False, True): 1.0, (True, False): 0.25, (False, False): 0.0}
    record.accuracy = table[record.first_correct, record.final_correct]
    if unreadable:
        record.accuracy, record.note = 1.0, "unreadable ground truth: accuracy 1"  # code: whatever was answered
    elif record.accuracy == 0 and (letter := normalise(answer)) in ("a", "b", "c", "d"):
        # Code: right if the final answer holds the letter, even inside a word, and none of the other three.
        if [c for c in "abcd" if c in record.final_answer.lower()] == [letter]:
            record.accuracy, record.note = 1.0, "option letter found in the text: accuracy 1"
    record.length = 0.1 * _length_term(record.n_tokens, record.n_first_tokens)
    record.total = record.format + record.accuracy + record.length  # code: no I_ref


def _score_verl(record: ReflectionRecord, response: str, answer: str, count_tokens: Callable[[str], int],
                verify: Callable[[str, str], bool | None]) -> None:
    from reasoning.answers import boxed
    response = re.sub(r"\s*([<>/])\s*", r"\1", response)  # code: blanks round these characters go first
    record.n_tokens = count_tokens(response)
    record.format = 0.5 if format_holds(response, published=True) else 0.0
    # Code: the first and the last box anywhere in the text, whatever the tags; the word "None" if there is none.
    starts = [match.start() for match in re.finditer(r"\\boxed\{", response)] or [len(response)]
    record.first_answer, record.final_answer = (boxed(response[i:]) or "None" for i in (starts[0], starts[-1]))
    a = record.first_correct = bool(verify(record.first_answer, answer))
    b = record.final_correct = bool(verify(record.final_answer, answer))
    # Code: conditions of the form `a == True & b == False`; & binds first and == chains, so they mean what stands here.
    if a and b:
        record.accuracy = 0.75
    elif a == (True & b) and (True & b) == False:  # noqa: E712  meant for right -> wrong, true for wrong -> wrong
        record.accuracy = -0.25
    elif a == (False & b) and (False & b) == True:  # noqa: E712  meant for wrong -> right, never true
        record.accuracy = 1.0
    # Code: the length term needs `math`, which is not imported, so every call raises. It is 0 here: the rest as written.
    record.note = "length term left out: the published code cannot compute it"
    record.total = 0.5 * record.format + 0.5 * record.accuracy  # code: format_weight = 0.5 halves both


def main() -> None:
    print("Reflection reward (SRPO-MLLM): first -> second answer, T = right, F = wrong; the ground truth is 7\n")
    print("              accuracy + effectiveness             total")
    print("            " + "".join(f"{v:>10}" for v in REFLECTION_VARIANTS * 2))
    for name, first, second in (("T -> T", 7, 7), ("F -> T", 8, 7), ("T -> F", 7, 8), ("F -> F", 8, 8)):
        response = (f"<think>Three cups and four plates make {first} in all.</think><answer>$\\boxed{{{first}}}$</answer>"
                    "<reflection>Count the plates on the left once more.</reflection>"
                    f"<think>Three and four: {second}.</think><answer>$\\boxed{{{second}}}$</answer>")
        records = [reflection_reward(response, "7", variant=v) for v in REFLECTION_VARIANTS]
        sums = [r.accuracy + r.effectiveness for r in records] + [r.total for r in records]
        print(f"    {name}  " + "".join(f"{value:10.3f}" for value in sums))
        if name == "F -> T":
            example = records[0], response
    print("\nIn openrlhf a corrected answer beats being right twice: the policy is paid to answer wrong first.")
    print("In verl an operator-precedence slip gives a correction nothing; its total halves format and accuracy.\n")
    print("One response in full:\n  " + example[1].replace("><", ">\n  <"))
    parts = ("format", "accuracy", "effectiveness", "reflection", "length", "total")
    print("  paper: " + "  ".join(f"{part} {getattr(example[0], part):.3f}" for part in parts))

    # Two ways to do one task, each a direction in a 1408-d latent space; a failure stopped part of the way along one.
    rng = np.random.default_rng(0)
    ways = 40 * np.linalg.qr(rng.normal(size=(1408, 2)))[0].T  # (2, 1408)
    rollouts = [  # group, way, share of the way covered; 1 is a success
        ("A", 0, 1.0), ("A", 0, 1.0), ("A", 1, 1.0), ("A", 0, 0.8),
        ("B", 1, 1.0), ("B", 1, 1.0), ("B", 1, 0.3), ("B", 0, 0.7),
        ("C", 0, 1.0), ("C", 1, 0.5), ("C", 1, 0.5), ("C", 1, 0.5),
        ("D", 0, 0.1), ("D", 1, 0.4), ("D", 0, 0.6), ("D", 1, 0.95)]
    latents = np.stack([share * ways[way] + rng.normal(scale=0.05, size=1408) for _, way, share in rollouts])  # (16, 1408)
    latents[10] = latents[11] = latents[9]  # group C: three failures sharing one video, as in siiRL's code
    group, success = [r[0] for r in rollouts], [r[2] == 1 for r in rollouts]
    results = {v: progress_reward(latents, success, ["cup"] * 16, variant=v, group=group) for v in PROGRESS_VARIANTS}
    print("\n\nProgress reward (SRPO-VLA): one task that can be done in two ways, 4 initial states (groups) x 4 rollouts\n")
    for variant, (_, record) in results.items():
        print(f"  {variant:<9} {record.clusters['cup']} clusters of successes, {record.noise['cup']} in none, "
              f"eps {record.eps['cup']:.2f}, fallbacks: {', '.join(record.fallbacks.get('cup', [])) or 'none'}")
    print("\n    group  way  covered     paper: distance^2  reward     official: distance  reward")
    for i, (name, way, share) in enumerate(rollouts):
        cells = [(record.distances[i], rewards[i]) for rewards, record in results.values()]
        (d2, paper), (d, official) = cells
        far = [f"{d2:18.1f}", f"{d:18.2f}"] if not success[i] else [f"{'success':>18}"] * 2
        print(f"    {name:>5}  {way + 1:>3}  {share:>6.0%}      {far[0]}  {paper:6.3f}     {far[1]}  {official:6.3f}")
    print("\nWithout clusters the reference lies between the ways: to the published code, being halfway looks best.\n")
    print("    group  advantages of 0/1 rewards     of paper rewards              shaping changed them")
    for name in "ABCD":
        rows = [i for i, g in enumerate(group) if g == name]
        plain, shaped = (_advantages(r[rows]) for r in (np.array(success, dtype=float), results["paper"][0]))
        cells = ["  ".join(f"{a:5.2f}" for a in advantages) for advantages in (plain, shaped)]
        print(f"    {name:>5}  {cells[0]}    {cells[1]}    {'yes' if results['paper'][1].group_changed[name] else 'no'}")
    print("\nTwo reward values in a group (A; C, whose failures share a video) normalise to 0/1's advantages;\n"
          "shaping acts where failures of one group differ (B), and gives a group of failures alone a signal (D).")


if __name__ == "__main__":
    main()
