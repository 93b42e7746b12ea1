"""reasoning/published_reward.py against outputs of SRPO_MLLMs' code (fixture), and its quirks."""
import json
import math
import time
from pathlib import Path

import pytest

from reasoning.published_reward import openrlhf, verl
from rewards import reflection_reward
from tests.test_rewards import respond, reward

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROWS = json.loads((FIXTURES / "official_rewards.json").read_text())["reflection"]


def test_openrlhf_equals_published_code():
    for row in ROWS:
        got, want = openrlhf(row["response"], row["answer"]), row["openrlhf"]
        assert math.isclose(got.total, want["rewards"], abs_tol=1e-6), row["response"]
        expected = want["accuracy_rewards"], want["format_rewards"], want["length_rewards"]
        assert (got.accuracy, got.format, got.length) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("first, second, paper, of_openrlhf, of_verl", [
    ("7", "7", 0.75, 0.75, 0.75), ("8", "7", 0.5, 1.0, 0.0), ("7", "8", 0.25, 0.25, 0.0),
    ("8", "8", 0.0, 0.0, -0.25)])
def test_table_of_the_three(first, second, paper, of_openrlhf, of_verl):
    response = respond(first, second)
    for record, earned in ((reward(response), paper), (openrlhf(response, "7"), of_openrlhf),
                           (verl(response, "7"), of_verl)):
        assert record.accuracy + record.effectiveness == earned and record.format == 0.5
        assert (record.first_correct, record.final_correct) == (first == "7", second == "7")
    assert record.total == 0.5 * of_verl + 0.25 and record.length == 0
    record = openrlhf(response, "7")
    assert record.reflection == 0
    assert record.total == pytest.approx(0.5 + of_openrlhf + record.length)


def test_format_is_looser_than_the_paper_s():
    good = respond(7, 7)
    for response, expected in (
            (good, 0.5), (good + "\n", 0.5), (good + " end", 0), ("so " + good, 0.5),
            (good.replace("check it", " "), 0.5), (good.replace("check it", ""), 0),
            (good + "<think>x</think>", 0),
            (good.replace("</answer><reflection>", "</answer> and <reflection>"), 0)):
        assert openrlhf(response, "7").format == expected, response


def test_quirks():
    assert openrlhf(respond(1, 2), "").accuracy == 1.0          # an unreadable ground truth
    assert reward(respond(1, 2), "").accuracy == 0
    letter = respond("?", "?").replace("\\boxed{?}", "the big one", 2)
    assert openrlhf(letter, "B").accuracy == 1.0
    assert reward(letter, "B").accuracy == 0
    lone = "<think>a</think><answer>$\\boxed{7}$</answer>"
    assert openrlhf(lone, "7").total == 0 < reward(lone).total
    unboxed = respond(7, 7).replace("\\boxed", "")
    assert not verl(unboxed, "7").first_correct and verl(unboxed, "None").first_correct
    spaced = respond(7, 7).replace("<", " < ").replace("/", " \n/\t ")
    assert verl(spaced, "7").format == 0.5 and openrlhf(spaced, "7").format == 0


def test_records_are_read_alike():
    """What the training script reads of a record is there, whichever reward is paid."""
    names = ("total", "format", "accuracy", "effectiveness", "reflection", "length",
             "first_correct", "final_correct", "n_tokens")
    for response in (respond(7, 8), "", "<answer>7</answer>"):
        for record in (rule(response, "7") for rule in (reflection_reward, openrlhf, verl)):
            assert all(isinstance(getattr(record, name), (int, float)) for name in names)


def seconds(rule, response):
    began = time.process_time()
    rule(response, "7", verify=str.__eq__)
    return time.process_time() - began


@pytest.mark.parametrize("rule", [openrlhf, verl], ids=["openrlhf", "verl"])
@pytest.mark.parametrize("before, repeated, after", [
    ("", "<think>", ""), ("", "<answer>", ""), ("", "<think><answer>", ""), ("a", " ", "b"),
    ("", " <", ""), ("<", " ", ""), ("", "\\boxed{", ""), ("", "\\boxed{7}", ""),
    ("a", " \n", "/")])
def test_no_response_takes_more_than_linear_time(rule, before, repeated, after):
    short, long = (min(seconds(rule, before + repeated * n + after) for _ in range(3))
                   for n in (25_000, 100_000))
    assert long < max(9 * short, 0.1) and long < 2  # 4 if linear, 16 if quadratic
