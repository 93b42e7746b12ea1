"""rewards.py against naive loops, the papers' tables, and what shaping can and cannot change."""

import math
import time

import numpy as np
import pytest

import rewards
from reasoning.answers import default_verify
from rewards import progress_reward, reflection_reward


def naive_paper(latents, success, task, alpha=0.8):
    """[VLA 3] to [VLA 5] in plain loops: eps graph by flood fill, centres, z-score, sigmoid."""
    out = [1.0 if s else 0.0 for s in success]
    for name in set(task):
        good = [i for i in range(len(task)) if task[i] == name and success[i]]
        bad = [i for i in range(len(task)) if task[i] == name and not success[i]]
        if not good or not bad:
            continue
        centres = []
        if len(good) > 1:
            gap = {(i, j): math.dist(latents[i], latents[j]) for i in good for j in good}
            nearest = sorted(min(gap[i, j] for j in good if j != i) for i in good)
            middle = len(nearest) // 2
            two = nearest[middle - 1] + nearest[middle]
            eps = 2 * (nearest[middle] if len(nearest) % 2 else two / 2)
            left = set(good)
            while left:
                members, frontier = set(), {left.pop()}
                while frontier:
                    i = frontier.pop()
                    members.add(i)
                    reached = {j for j in left if gap[i, j] <= eps}
                    left -= reached
                    frontier |= reached
                if len(members) > 1:
                    centres.append(np.mean([latents[i] for i in members], axis=0))
        else:
            centres = [latents[good[0]]]
        d = [
            min(sum((a - b) ** 2 for a, b in zip(latents[i], c, strict=True)) for c in centres)
            for i in bad
        ]
        mean = sum(d) / len(d)
        std = math.sqrt(sum((v - mean) ** 2 for v in d) / len(d))
        for i, v in zip(bad, d, strict=True):
            out[i] = alpha / (1 + math.exp((v - mean) / std if std else 0.0))
    return out


def two_clusters(dims=1408, seed=0):
    """12 successes in two tight clusters, 6 failures ever farther from the first; one task."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(2, dims)) * 5
    good = np.concatenate([c + rng.normal(size=(6, dims)) for c in centres])
    step = rng.normal(size=dims)
    bad = np.stack([centres[0] + k * step for k in (1, 2, 3, 4, 5, 6)])
    return np.concatenate([good, bad]), np.array([True] * 12 + [False] * 6), ["t"] * 18


# Progress reward


@pytest.mark.parametrize("alpha", [0.8, 1.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_progress_equals_naive_loops(seed, alpha):
    rng = np.random.default_rng(seed)
    latents, success = rng.normal(size=(60, 5)), rng.random(60) < 0.5
    task = rng.choice(list("abcde"), size=60)
    latents[:, 0] += 10 * rng.integers(0, 3, size=60)  # up to three clumps of successes per task
    got, record = progress_reward(latents, success, task, alpha=alpha)
    np.testing.assert_allclose(got, naive_paper(latents, success, task, alpha), rtol=1e-10)
    assert got.dtype == np.float64 and (got[success] == 1).all()
    assert (got[~success] < alpha).all() and (got[~success] > 0).all()
    assert np.isnan(record.distances).tolist() == success.tolist()


@pytest.mark.parametrize("scale", [1000.0, 1e-4])
def test_progress_ignores_the_scale_of_latents(scale):
    latents, success, task = two_clusters(dims=32)
    small, a = progress_reward(latents, success, task)
    large, b = progress_reward(latents * scale, success, task)
    np.testing.assert_allclose(small, large, rtol=1e-9)
    assert a.clusters == b.clusters == {"t": 2}


def test_two_clusters_are_found_in_1408_dimensions():
    latents, success, task = two_clusters()
    _, record = progress_reward(latents, success, task)
    assert (record.clusters["t"], record.noise["t"], record.fallbacks) == (2, 0, {})
    near = ((latents[12] - latents[:6].mean(0)) ** 2).sum()  # squared, [VLA 4]
    assert math.isclose(record.distances[12], near, rel_tol=1e-9)


def test_an_outlying_success_is_noise_and_no_reference():
    latents, success, task = two_clusters(dims=64)
    without, _ = progress_reward(latents, success, task)
    more = np.vstack([latents, 100 + latents[:1]]), np.append(success, True), task + ["t"]
    with_it, record = progress_reward(*more)
    assert (record.clusters["t"], record.noise["t"]) == (2, 1)
    np.testing.assert_allclose(with_it[:-1], without)


def test_nearer_failures_earn_more():
    """[VLA 5] as its text has it; as printed, without the minus, the farther would earn more."""
    rng = np.random.default_rng(1)
    latents, success = rng.normal(size=(40, 16)), np.arange(40) < 10
    got, record = progress_reward(latents, success, [0] * 40)
    by_distance = np.argsort(record.distances[10:])
    assert (np.diff(got[10:][by_distance]) < 0).all()


def test_what_no_equation_covers():
    point = np.array([[0.0], [1.0], [2.0], [4.0]])
    got, record = progress_reward(point, [0, 0, 0, 0], ["a"] * 4)
    assert got.tolist() == [0] * 4 and record.fallbacks == {"a": ["no_success"]}
    assert np.isnan(record.distances).all() and record.clusters == {"a": 0}
    got, record = progress_reward(point, [1, 0, 0, 0], ["a"] * 4)
    assert record.fallbacks == {"a": ["single_success"]} and record.clusters == {"a": 0}
    assert record.distances[1:].tolist() == [1, 4, 16]
    got, record = progress_reward(point, [1, 1, 1, 0], ["a"] * 4, alpha=0.5)
    assert got.tolist() == [1, 1, 1, 0.25] and record.fallbacks == {"a": ["equal_distances"]}
    got, record = progress_reward([[0.0], [0.1], [3.0], [3.0 + 1e-9]], [1, 1, 0, 0], ["a"] * 4)
    assert got.tolist() == [1, 1, 0.4, 0.4] and record.fallbacks == {"a": ["equal_distances"]}
    got, record = progress_reward([[1.0], [1.0], [1.0], [2.0], [5.0]], [1, 1, 1, 0, 0], ["a"] * 5)
    assert record.clusters == {"a": 1} and record.distances[3:].tolist() == [1, 16]  # identical
    got, record = progress_reward(point, [1, 1, 1, 1], ["a"] * 4)
    assert got.tolist() == [1] * 4 and record.fallbacks == {}
    assert progress_reward(point, [1, 0, 0, 0], ["a"] * 4, alpha=0)[0].tolist() == [1, 0, 0, 0]


def test_alpha_1_is_the_paper_s_and_a_success_still_earns_more():
    latents, success, task = two_clusters(dims=8)
    got, _ = progress_reward(latents, success, task, alpha=1.0)
    eighth, _ = progress_reward(latents, success, task, alpha=0.8)
    np.testing.assert_allclose(got[~success] * 0.8, eighth[~success])
    assert (got[success] == 1).all() and 0.7 < got[~success].max() < 1


def test_tasks_do_not_touch_each_other():
    rng = np.random.default_rng(3)
    latents, success, task = rng.normal(size=(30, 4)), rng.random(30) < 0.5, np.repeat([0, 1], 15)
    both, _ = progress_reward(latents, success, task)
    order = rng.permutation(30)
    shuffled, _ = progress_reward(latents[order], success[order], task[order])
    np.testing.assert_allclose(shuffled, both[order])
    for t in (0, 1):
        alone, _ = progress_reward(latents[task == t], success[task == t], task[task == t])
        np.testing.assert_allclose(both[task == t], alone)


def test_tensors_are_accepted():
    torch = pytest.importorskip("torch")
    latents, success, _ = two_clusters(dims=16)
    latents = np.asarray(torch.tensor(latents).bfloat16().float())
    expected, _ = progress_reward(latents, success, [0] * 18)
    tensor = torch.tensor(latents, dtype=torch.bfloat16, requires_grad=True)
    zeros = torch.zeros(18, dtype=torch.long)
    got, record = progress_reward(tensor, torch.tensor(success), zeros)
    np.testing.assert_array_equal(got, expected)
    assert record.clusters == {0: 2}


def test_shaping_changes_advantages_only_where_failures_of_a_group_differ():
    rng = np.random.default_rng(5)
    latents, success = rng.normal(size=(160, 6)), rng.random(160) < 0.4
    group = np.repeat(np.arange(20), 8)
    latents[16:32][~success[16:32]] = latents[0]  # groups 2, 3: all failures share one video
    success[32:40], success[40:48] = False, True
    success[48:56] = [True] * 7 + [False]  # one failure
    latents[56:64], success[56:64] = latents[1], False  # all fail, one video
    for alpha in (0.8, 0.0):
        got, _ = progress_reward(latents, success, group % 3, alpha=alpha)
        changed = []
        for g in range(20):
            pair = got[group == g], success[group == g].astype(float)
            normal = [(r - r.mean()) / r.std() if np.ptp(r) > 1e-9 else np.zeros(8) for r in pair]
            changed.append(not np.allclose(*normal, atol=1e-6))
            failures = pair[0][pair[1] == 0]
            assert changed[g] == (len(failures) > 0 and np.ptp(failures) > 1e-6), g
        if alpha:
            assert changed[2:8] == [False, False, True, False, False, False] and sum(changed) > 5
        else:
            assert not any(changed)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"latents": np.zeros(4)}, "latents"),
        ({"latents": np.zeros((4, 2, 2))}, "latents"),
        ({"success": [True] * 3}, "success"),
        ({"success": [0.5, 0, 0, 1]}, "success"),
        ({"latents": np.array([[0.0], [np.nan], [1], [2]])}, "row 1"),
        ({"task": ["a"] * 5}, "task"),
        ({"task": [["a"]] * 4}, "task"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
    ],
)
def test_progress_errors_are_one_line(change, word):
    arguments = {
        "latents": np.ones((4, 2)),
        "success": [True, False, False, True],
        "task": ["a"] * 4,
    } | change
    with pytest.raises(ValueError, match=word) as error:
        progress_reward(**arguments)
    assert "\n" not in str(error.value)


# Reflection reward


def respond(first, second, think="one two three four five six", reflection="check it"):
    return (
        f"<think>{think}</think><answer>$\\boxed{{{first}}}$</answer>"
        f"<reflection>{reflection}</reflection>"
        f"<think>{think}</think><answer>$\\boxed{{{second}}}$</answer>"
    )


def reward(response, answer="7", **more):
    return reflection_reward(response, answer, verify=default_verify, **more)


@pytest.mark.parametrize(
    "first, second, earned", [("7", "7", 0.75), ("8", "7", 0.5), ("7", "8", 0.25), ("8", "8", 0.0)]
)
def test_the_paper_s_table(first, second, earned):
    """[MLLM 8] beside [MLLM 5]: being right twice earns most, so nobody fakes a wrong start."""
    record = reward(respond(first, second))
    assert record.accuracy + record.effectiveness == earned and record.format == 0.5
    assert (record.first_correct, record.final_correct) == (first == "7", second == "7")
    parts = record.format + earned + record.reflection + record.length
    assert record.total == pytest.approx(parts)


def test_parts_by_hand():
    response = (
        "<think>a b c</think><answer>7</answer><reflection>d e</reflection>"
        "<think>f g</think><answer>7</answer>"
    )
    record = reward(response, count_tokens=lambda text: len(rewards.TAG.sub(" ", text).split()))
    assert record.n_tokens == 9  # the first response has 4: target 8, maximum 10
    assert (record.format, record.accuracy, record.effectiveness) == (0.5, 0.5, 0.25)
    assert record.reflection == 0.25
    assert record.length == pytest.approx(0.1 * math.exp(-((1 / 2) ** 2)))
    assert record.total == pytest.approx(1.5 + record.length)


@pytest.mark.parametrize(
    "tokens, first, f_len",
    [(8, 4, 1), (10, 4, math.exp(-1)), (6, 4, math.exp(-1)), (12, 4, math.exp(-4)), (5, 0, 0)],
)
def test_length_term_by_hand(tokens, first, f_len):
    assert rewards.length_term(tokens, first) == pytest.approx(f_len)  # exp(-u^2), not exp(-2u)


@pytest.mark.parametrize("first, greatest", [("7", 1.6), ("8", 1.35)])
def test_greatest_rewards_are_the_paper_s(first, greatest):
    response = (
        f"<think>a a</think><answer>{first}</answer><reflection>b</reflection>"
        "<think>c</think><answer>7</answer>"
    )  # 3 words, then 3 more
    record = reward(response, count_tokens=lambda text: len(rewards.TAG.sub(" ", text).split()))
    assert record.total == pytest.approx(greatest)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3, 0.0])
def test_ablations(alpha):
    full, tenth = reward(respond("8", "7"), alpha=alpha), reward(respond("8", "7"))
    assert full.length == pytest.approx(alpha / 0.1 * tenth.length)
    parts = {"effectiveness": 0.5, "reflection": 0.25, "length": full.length}
    for name, value in parts.items():
        less = full.without(name)
        assert less.total == pytest.approx(full.total - value) and getattr(less, name) == 0
        assert less.final_correct and full.total > 1.2  # the record itself is left alone
    assert full.without(*parts).total == 0.5


def test_format_is_strict():
    good = respond(7, 7)
    cases = [
        (good, 0.5),
        (good + "\n", 0.5),
        (good + " end", 0),
        ("so " + good, 0),
        (good.replace("check it", " "), 0),
        (good.replace("check it", ""), 0),
        (good + "<think>x</think>", 0),
        (good.replace("</think>", "", 1), 0),
        (good.replace("</answer><reflection>", "</answer> and <reflection>"), 0),
    ]
    for response, expected in cases:
        assert reward(response).format == expected, response


def test_reflection_part_is_its_own():
    assert reward("x " + respond(7, 7)).reflection == 0.25  # format broken, reflection fine
    for broken in (
        respond(7, 7, reflection=""),
        respond(7, 7, reflection="<think>a</think>"),
        respond(7, 7, reflection="a</reflection><reflection>b"),
        "<reflection>r</reflection><answer>7</answer><answer>7</answer>",
        "<answer>7</answer></reflection>r<reflection><answer>7</answer>",
        "<answer>7</answer><reflection>r</reflection>",
        "<answer>7</answer><answer>7</answer>",
        "",
    ):
        assert reward(broken).reflection == 0, broken


def test_effectiveness_needs_exactly_two_answers():
    one = reward("<think>a</think><answer>7</answer>")
    assert (one.accuracy, one.effectiveness, one.format, one.final_correct) == (0.5, 0, 0, True)
    many = reward("<answer>1</answer><answer>2</answer><answer>7</answer>")
    assert (many.accuracy, many.effectiveness) == (0, 0)
    assert (many.first_correct, many.final_correct) == (False, True)


@pytest.mark.parametrize("answer", ["7", "B", "3/4", "", "  ", "$$"])
@pytest.mark.parametrize("said", ["", "   ", "\\boxed{}", "$\\boxed{7", "?", "$$", "none"])
def test_what_cannot_be_read_is_never_right(said, answer):
    response = (
        f"<think>a</think><answer>{said}</answer><reflection>b</reflection>"
        f"<think>c</think><answer>{said}</answer>"
    )
    record = reward(response, answer)
    assert not record.first_correct and not record.final_correct
    assert record.accuracy == record.effectiveness == 0
    if not said.strip():
        assert not reflection_reward(response, answer).first_correct  # nor by the default


def test_verifier_and_token_count_are_called():
    record = reflection_reward(
        respond("p", "q"),
        "gold",
        count_tokens=len,
        verify=lambda guess, gold: np.bool_("q" in guess),
    )
    assert record.final_correct is True and record.first_correct is False
    assert record.effectiveness == 0.5 and record.n_tokens == len(respond("p", "q"))


@pytest.mark.parametrize("arguments", [(None, "7"), ("a", 7)])
def test_reflection_errors_are_one_line(arguments):
    with pytest.raises(ValueError, match="two strings") as error:
        reflection_reward(*arguments)
    assert "\n" not in str(error.value)


def seconds(make, n):
    response = make(n)
    began = time.process_time()
    reflection_reward(response, "7")
    return time.process_time() - began


@pytest.mark.parametrize(
    "make",
    [
        lambda n: "<think>" * n,
        lambda n: "<answer>" * n,
        lambda n: "</answer>" * n,
        lambda n: "<reflection>" * n,
        lambda n: "<think><answer>" * n,
        lambda n: "<" * n,
        lambda n: "<answer>7</answer>" * n,
        lambda n: "a" + " " * n + "b",
        lambda n: "</think" * n,
        lambda n: "<reflection></answer>" * n + "</reflection>",
    ],
    ids=[
        "thinks",
        "answers",
        "ends",
        "reflections",
        "pairs",
        "less",
        "closed",
        "blanks",
        "cut",
        "nested",
    ],
)
def test_no_response_takes_more_than_linear_time(make):
    short = min(seconds(make, 25_000) for _ in range(3))
    long = min(seconds(make, 100_000) for _ in range(3))
    assert long < max(9 * short, 0.1) and long < 2  # 4 if linear, 16 if quadratic


def test_main_prints_examples(capsys):
    rewards.main()
    text = capsys.readouterr().out
    assert "False -> True     0.500    0.500    0.250" in text and "alpha 1.0" in text
