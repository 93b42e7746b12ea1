"""rewards.py against the published codes' outputs (fixture), naive loops, and the tables of the two papers."""
import json
import math
from pathlib import Path

import numpy as np
import pytest

from reasoning import answers
import rewards
from rewards import progress_reward, reflection_reward

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "official_rewards.json").read_text())


def naive_paper(latents, success, task, alpha=0.8):
    """The paper's progress reward in plain loops: eps graph by flood fill, centres, z-score, sigmoid."""
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
            eps = 2 * (nearest[middle] if len(nearest) % 2 else (nearest[middle - 1] + nearest[middle]) / 2)
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
        d = [min(sum((a - b) ** 2 for a, b in zip(latents[i], c)) for c in centres) for i in bad]
        mean = sum(d) / len(d)
        std = math.sqrt(sum((v - mean) ** 2 for v in d) / len(d))
        for i, v in zip(bad, d):
            out[i] = alpha / (1 + math.exp((v - mean) / std if std else 0.0))
    return out


def two_clusters(dims=1408, seed=0):
    """12 successes in two tight clusters, 6 failures at growing distance from the first; ids all one task."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(2, dims)) * 5
    good = np.concatenate([c + rng.normal(size=(6, dims)) for c in centres])
    step = rng.normal(size=dims)
    bad = np.stack([centres[0] + k * step for k in (1, 2, 3, 4, 5, 6)])
    return np.concatenate([good, bad]), np.array([True] * 12 + [False] * 6), ["t"] * 18, centres


@pytest.mark.parametrize("case", FIXTURE["progress"], ids=lambda case: case["name"])
def test_official_progress_equals_published_code(case):
    got, record = progress_reward(case["latents"], case["success"], case["task"], variant="official")
    np.testing.assert_allclose(got, case["official"], atol=1e-6)
    expected = {"two clusters found": 2, "one cluster and a noise success": 1, "three tasks, high dimension": 0}
    if case["name"] in expected:
        assert set(record.clusters.values()) == {expected[case["name"]]}
    named = {"a single failure": "single_failure", "no success": "no_success", "single success": "single_success",
             "failures all equally far": "equal_distances", "three tasks, high dimension": "no_cluster"}
    if case["name"] in named:
        assert all(named[case["name"]] in record.fallbacks[t] for t in set(case["task"]))


def test_official_scores_zero_latents_zero():
    latents = np.array([[0.0, 0], [1, 0], [1.1, 0], [2, 0], [3, 0], [0, 0]])
    got, record = progress_reward(latents, [1, 1, 1, 0, 0, 0], [7] * 6, variant="official")
    np.testing.assert_allclose(got[[0, 1, 2, 5]], [0, 1, 1, 0])
    assert "zero_latents" in record.fallbacks[7] and np.isnan(record.distances[5])
    np.testing.assert_allclose(got[3:5], [0.6 / (1 + math.exp(-5)), 0.6 / (1 + math.exp(5))])


@pytest.mark.parametrize("seed", range(4))
def test_paper_progress_equals_naive_loops(seed):
    rng = np.random.default_rng(seed)
    latents, success, task = rng.normal(size=(60, 5)), rng.random(60) < 0.5, rng.choice(list("abcde"), size=60)
    latents[:, 0] += 10 * rng.integers(0, 3, size=60)  # up to three clumps of successes per task
    got, record = progress_reward(latents, success, task)
    np.testing.assert_allclose(got, naive_paper(latents, success, task), rtol=1e-10)
    assert got.dtype == np.float64 and (got[success] == 1).all()
    assert (got[~success] < 0.8).all() and (got[~success] > 0).all()
    assert np.isnan(record.distances).tolist() == success.tolist()


@pytest.mark.parametrize("scale", [1000.0, 1e-4])
def test_paper_progress_ignores_the_scale_of_latents(scale):
    latents, success, task, _ = two_clusters(dims=32)
    small, a = progress_reward(latents, success, task)
    large, b = progress_reward(latents * scale, success, task)
    np.testing.assert_allclose(small, large, rtol=1e-9)
    assert a.clusters == b.clusters and math.isclose(b.eps["t"], a.eps["t"] * scale, rel_tol=1e-9)


def test_two_clusters_in_1408_dimensions_are_found_only_with_adaptive_eps():
    latents, success, task, centres = two_clusters()
    _, paper = progress_reward(latents, success, task)
    _, official = progress_reward(latents, success, task, variant="official")
    assert (paper.clusters["t"], paper.noise["t"], paper.fallbacks) == (2, 0, {})
    assert (official.clusters["t"], official.noise["t"], official.fallbacks["t"]) == (0, 12, ["no_cluster"])
    near = ((latents[12] - latents[:6].mean(0)) ** 2).sum()
    assert math.isclose(paper.distances[12], near, rel_tol=1e-9)
    mean = latents[:12].mean(0)
    assert math.isclose(official.distances[12], np.linalg.norm(latents[12] - mean), rel_tol=1e-9)


def test_an_outlying_success_is_noise_and_no_reference():
    latents, success, task, _ = two_clusters(dims=64)
    latents, success, task = np.vstack([latents, 100 + latents[:1]]), np.append(success, True), task + ["t"]
    _, record = progress_reward(latents, success, task)
    assert (record.clusters["t"], record.noise["t"]) == (2, 1)
    without, _ = progress_reward(latents[:-1], success[:-1], task[:-1])
    with_it, _ = progress_reward(latents, success, task)
    np.testing.assert_allclose(with_it[:-1], without)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_nearer_failures_earn_more(variant):
    rng = np.random.default_rng(1)
    latents, success = rng.normal(size=(40, 16)), np.arange(40) < 10
    got, record = progress_reward(latents, success, [0] * 40, variant=variant)
    by_distance = np.argsort(record.distances[10:])
    assert (np.diff(got[10:][by_distance]) < 0).all()


def test_paper_fallbacks():
    point = np.array([[0.0], [1.0], [2.0], [4.0]])
    got, record = progress_reward(point, [0, 0, 0, 0], ["a"] * 4)
    assert got.tolist() == [0] * 4 and record.fallbacks == {"a": ["no_success"]} and np.isnan(record.distances).all()
    got, record = progress_reward(point, [1, 0, 0, 0], ["a"] * 4)
    assert record.fallbacks == {"a": ["single_success"]} and record.distances[1:].tolist() == [1, 4, 16]
    assert record.clusters == {"a": 0} and math.isnan(record.eps["a"])
    got, record = progress_reward(point, [1, 1, 1, 0], ["a"] * 4, alpha=0.5)
    assert got.tolist() == [1, 1, 1, 0.25] and record.fallbacks == {"a": ["single_failure"]}
    got, record = progress_reward([[0.0], [0.1], [3.0], [3.0 + 1e-9]], [1, 1, 0, 0], ["a"] * 4)
    assert got.tolist() == [1, 1, 0.4, 0.4] and record.fallbacks == {"a": ["equal_distances"]}
    got, record = progress_reward([[1.0], [1.0], [1.0], [2.0], [5.0]], [1, 1, 1, 0, 0], ["a"] * 5)  # identical successes
    assert record.clusters == {"a": 1} and record.distances[3:].tolist() == [1, 16]
    got, record = progress_reward(point, [1, 1, 1, 1], ["a"] * 4)
    assert got.tolist() == [1] * 4 and record.fallbacks == {}
    assert progress_reward(point, [1, 0, 0, 0], ["a"] * 4, alpha=0)[0].tolist() == [1, 0, 0, 0]


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
    latents, success, task, _ = two_clusters(dims=16)
    latents = np.asarray(torch.tensor(latents).bfloat16().float())
    expected, _ = progress_reward(latents, success, [0] * 18)
    tensor = torch.tensor(latents, dtype=torch.bfloat16, requires_grad=True)
    got, record = progress_reward(tensor, torch.tensor(success), torch.zeros(18, dtype=torch.long))
    np.testing.assert_array_equal(got, expected)
    assert record.clusters == {0: 2}


def test_groups_changed_equals_brute_force():
    rng = np.random.default_rng(5)
    latents, success = rng.normal(size=(160, 6)), rng.random(160) < 0.4
    group = np.repeat(np.arange(20), 8)
    task = group % 3
    latents[16:32][~success[16:32]] = latents[0]  # groups 2, 3: all failures share one video
    success[32:40], success[40:48], success[48:56] = False, True, [True] * 7 + [False]  # none, all, one failure
    latents[56:64], success[56:64] = latents[1], False  # all fail, one video
    got, record = progress_reward(latents, success, task, group=group)
    for g in range(20):
        rows = group == g
        r, b = got[rows], success[rows].astype(float)
        normal = [(v - v.mean()) / v.std() if np.ptp(v) > 1e-9 else np.zeros(8) for v in (r, b)]
        assert record.group_changed[g] == (not np.allclose(*normal, atol=1e-6)), g
    assert [record.group_changed[g] for g in (2, 3, 4, 5, 6, 7)] == [False, False, True, False, False, False]
    assert record.n_groups_changed == sum(record.group_changed.values()) > 5
    assert progress_reward(latents, success, task)[1].group_changed is None
    binary = progress_reward(latents, success, task, group=group, alpha=0)[1]
    assert binary.n_groups_changed == 0


@pytest.mark.parametrize("change, word", [
    ({"latents": np.zeros(4)}, "latents"), ({"latents": np.zeros((4, 2, 2))}, "latents"), ({"success": [True] * 3}, "success"),
    ({"latents": np.array([[0.0], [np.nan], [1], [2]])}, "row 1"), ({"success": [0.5, 0, 0, 1]}, "success"),
    ({"task": ["a"] * 5}, "task"), ({"task": [["a"]] * 4}, "task"), ({"group": [1, 2]}, "group"),
    ({"task": list("aabb"), "group": [0, 0, 0, 1]}, "group 0"), ({"variant": "Paper"}, "variant"),
    ({"alpha": 1.0}, "alpha"), ({"alpha": -0.1}, "alpha"), ({"alpha": math.nan}, "alpha")])
def test_progress_errors_are_one_line(change, word):
    arguments = {"latents": np.ones((4, 2)), "success": [True, False, False, True], "task": ["a"] * 4} | change
    with pytest.raises(ValueError, match=word) as error:
        progress_reward(**arguments)
    assert "\n" not in str(error.value)


def respond(first, second, think="one two three four five six", reflection="check it"):
    return (f"<think>{think}</think><answer>$\\boxed{{{first}}}$</answer><reflection>{reflection}</reflection>"
            f"<think>{think}</think><answer>$\\boxed{{{second}}}$</answer>")


@pytest.mark.parametrize("library", [True, False], ids=["installed", "plain"])
def test_openrlhf_equals_published_code(library, monkeypatch):
    if not library:
        answers.default_verify.cache_clear()
        monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None)
    for row in FIXTURE["reflection"]:
        got, want = reflection_reward(row["response"], row["answer"], variant="openrlhf"), row["openrlhf"]
        assert math.isclose(got.total, want["rewards"], abs_tol=1e-6), row["response"]
        parts = (got.accuracy, got.format, got.length)
        assert parts == pytest.approx((want["accuracy_rewards"], want["format_rewards"], want["length_rewards"]), abs=1e-6)


TABLE = [("7", "7", 0.75, 0.75, 0.75), ("8", "7", 0.5, 1.0, 0.0), ("7", "8", 0.25, 0.25, 0.0), ("8", "8", 0.0, 0.0, -0.25)]


@pytest.mark.parametrize("first, second, paper, openrlhf, verl", TABLE)
def test_table_of_the_variants(first, second, paper, openrlhf, verl):
    for variant, want in (("paper", paper), ("openrlhf", openrlhf), ("verl", verl)):
        record = reflection_reward(respond(first, second), "7", variant=variant)
        assert record.accuracy + record.effectiveness == want and record.format == 0.5
        assert (record.first_correct, record.final_correct) == (first == "7", second == "7")
        if variant == "verl":
            assert record.total == 0.5 * want + 0.25 and record.length == 0
        else:
            assert record.total == pytest.approx(record.format + want + record.reflection + record.length)


def test_paper_parts_by_hand():
    response = ("<think>a b c</think><answer>7</answer><reflection>d e</reflection>"  # first response: 4 tokens
                "<think>f g</think><answer>7</answer>")
    record = reflection_reward(response, "7", count_tokens=lambda text: len(rewards.TAG.sub(" ", text).split()))
    assert (record.n_tokens, record.n_first_tokens) == (9, 4)  # target 8, maximum 10
    assert (record.format, record.accuracy, record.effectiveness, record.reflection) == (0.5, 0.5, 0.25, 0.25)
    assert record.length == pytest.approx(0.1 * math.exp(-(1 / 2) ** 2))
    assert record.total == pytest.approx(1.5 + record.length)


def test_format_of_the_paper_is_stricter_than_the_published_pattern():
    good = respond(7, 7)
    cases = [(good, 0.5, 0.5), (good + "\n", 0.5, 0.5), (good + " end", 0, 0), ("so " + good, 0, 0.5),
             (good.replace("check it", " "), 0, 0.5), (good.replace("check it", ""), 0, 0),
             (good + "<think>x</think>", 0, 0), (good.replace("</think>", "", 1), 0, 0),
             (good.replace("</answer><reflection>", "</answer> and <reflection>"), 0, 0)]
    for response, paper, published in cases:
        assert reflection_reward(response, "7").format == paper, response
        if response.count("</think>") >= 2:  # else the published code scores nothing at all
            assert reflection_reward(response, "7", variant="openrlhf").format == published, response


def test_reflection_part_is_its_own():
    assert reflection_reward("x " + respond(7, 7), "7").reflection == 0.25  # format broken, reflection fine
    for broken in (respond(7, 7, reflection=""), respond(7, 7, reflection="a</reflection><reflection>b"),
                   respond(7, 7, reflection="<think>a</think>"),
                   "<reflection>r</reflection><answer>7</answer><answer>7</answer>",
                   "<answer>7</answer><reflection>r</reflection>", "<answer>7</answer><answer>7</answer>", ""):
        assert reflection_reward(broken, "7").reflection == 0, broken


def test_effectiveness_needs_exactly_two_answers():
    one = reflection_reward("<think>a</think><answer>7</answer>", "7")
    assert (one.accuracy, one.effectiveness, one.format, one.final_correct) == (0.5, 0, 0, True)
    many = reflection_reward("<answer>1</answer><answer>2</answer><answer>7</answer>", "7")
    assert (many.accuracy, many.effectiveness, many.first_correct, many.final_correct) == (0, 0, False, True)


@pytest.mark.parametrize("answer", ["7", "B", "3/4", "", "  ", "$$"])
@pytest.mark.parametrize("said", ["", "   ", "\\boxed{}", "$\\boxed{7", "?", "$$", "none"])
def test_what_cannot_be_read_is_never_right(said, answer):
    record = reflection_reward(f"<think>a</think><answer>{said}</answer><reflection>b</reflection>"
                               f"<think>c</think><answer>{said}</answer>", answer)
    assert not record.first_correct and not record.final_correct and record.accuracy == record.effectiveness == 0


def test_published_quirks():
    unreadable = reflection_reward(respond(1, 2), "", variant="openrlhf")
    assert unreadable.accuracy == 1.0 and "unreadable" in unreadable.note
    assert reflection_reward(respond(1, 2), "").accuracy == 0
    letter = respond("?", "?").replace("\\boxed{?}", "the big one", 2)
    assert reflection_reward(letter, "B", variant="openrlhf").accuracy == 1.0
    assert reflection_reward(letter, "B").accuracy == 0
    lone = "<think>a</think><answer>$\\boxed{7}$</answer>"
    assert reflection_reward(lone, "7", variant="openrlhf").total == 0 < reflection_reward(lone, "7").total
    unboxed = respond(7, 7).replace("\\boxed", "")
    assert reflection_reward(unboxed, "7", variant="verl").first_answer == "None"


def test_verifier_and_token_count_are_called():
    record = reflection_reward(respond("p", "q"), "gold", count_tokens=len,
                               verify=lambda guess, gold: np.bool_("q" in guess and gold == "gold"))
    assert record.final_correct is True and record.first_correct is False and record.effectiveness == 0.5
    assert record.n_tokens == len(respond("p", "q"))


@pytest.mark.parametrize("arguments, word", [(("a", "7", "verL"), "variant"), ((None, "7", "paper"), "response"),
                                             (("a", 7, "paper"), "answer")])
def test_reflection_errors_are_one_line(arguments, word):
    response, answer, variant = arguments
    with pytest.raises(ValueError, match=word) as error:
        reflection_reward(response, answer, variant=variant)
    assert "\n" not in str(error.value)


def test_main_prints_examples(capsys):
    rewards.main()
    text = capsys.readouterr().out
    assert "F -> T       0.500     1.000     0.000" in text and "2 clusters of successes" in text
