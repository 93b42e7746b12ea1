"""reasoning/responses.py: what responses earn beside rewards.py."""
import pytest

import reflection_srpo as rs
import rewards
from plumbing.plots import PARTS
from reasoning.answers import default_verify
from reasoning.qwen import Processor
from reasoning.responses import REWARDS

S = rs.Settings()
RESPONSE = ("<think> a 1 </think> <answer> 1 </answer> <reflection> check a </reflection> "
            "<think> a 2 </think> <answer> 2 </answer>")


def test_ablated_rewards(base):
    """outcome: 1 for a right final answer and nothing else; no_PART: the paper's without it.
    Unreadable is never right."""
    processor = Processor(base)
    paper = rewards.reflection_reward(
        RESPONSE, "2", verify=default_verify,
        count_tokens=lambda text: processor.count(rewards.TAG.sub(" ", text)))
    assert REWARDS["paper"](RESPONSE, "2", processor, S).total == paper.total and paper.length > 0
    for part in ("length", "effectiveness", "reflection"):
        record = REWARDS[f"no_{part}"](RESPONSE, "2", processor, S)
        assert record.total == pytest.approx(paper.total - getattr(paper, part))
        assert getattr(paper, part) > 0
    assert [REWARDS["outcome"](RESPONSE, answer, processor, S).total for answer in "21"] == [1, 0]
    for kind in set(REWARDS) - {"verl"}:                # parts add up to what is paid
        record = REWARDS[kind](RESPONSE, "2", processor, S)
        assert record.total == pytest.approx(sum(getattr(record, part) for part in PARTS))
    counted = REWARDS["openrlhf"](RESPONSE, "2", processor, S).n_tokens        # code: tags too
    assert counted == processor.count(RESPONSE) > paper.n_tokens


def test_what_plain_grpo_pays(base):
    """Half for the format that was asked for, half for the last answer, however many there are."""
    first, last = (f"<think> a </think> <answer> {n} </answer>" for n in (1, 2))
    for form, response, right in (("plain", last, 1.0), ("plain", first, 0.5), ("plain", "2", 0.0),
                                  ("twice", first + last, 1.0), ("twice", last + first, 0.5),
                                  ("plain", first + last, 0.5), ("twice", last, 0.5),
                                  ("reflection", RESPONSE, 1.0), ("twice", RESPONSE, 0.5)):
        record = REWARDS["task"](response, "2", Processor(base), rs.Settings(format=form))
        assert record.total == record.format + record.accuracy == right, (form, response)


def test_the_length_s_weight_is_a_setting(base):
    one, two = (REWARDS["paper"](RESPONSE, "2", Processor(base), rs.Settings(alpha=alpha))
                for alpha in (0.1, 0.3))
    assert two.length == pytest.approx(3 * one.length) and two.format == one.format


@pytest.mark.parametrize("garbage", ["", "<answer>", "2", "</answer> 2 <answer>",
                                     "<think> 2 </think>"])
def test_garbage_earns_nothing(base, garbage):
    for kind in rs.REWARDS:
        record = REWARDS[kind](garbage, "2", Processor(base), S)
        assert record.accuracy <= 0 and not record.final_correct and record.total <= 0


def test_the_flag_lists_every_reward():
    assert set(rs.REWARDS) == set(REWARDS)
