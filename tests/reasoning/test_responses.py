"""reasoning/responses.py: what responses earn beside rewards.py."""
import pytest

import reflection_srpo as rs
import rewards
from plumbing.plots import PARTS
from reasoning.answers import default_verify
from reasoning.qwen import Processor
from reasoning.responses import REWARDS

RESPONSE = ("<think> a 1 </think> <answer> 1 </answer> <reflection> check a </reflection> "
            "<think> a 2 </think> <answer> 2 </answer>")


def test_ablated_rewards(base):
    """outcome: 1 for a right final answer and nothing else; no_PART: the paper's without it.
    Unreadable is never right."""
    processor = Processor(base)
    paper = rewards.reflection_reward(
        RESPONSE, "2", verify=default_verify,
        count_tokens=lambda text: processor.count(rewards.TAG.sub(" ", text)))
    assert REWARDS["paper"](RESPONSE, "2", processor).total == paper.total and paper.length > 0
    for part in ("length", "effectiveness", "reflection"):
        record = REWARDS[f"no_{part}"](RESPONSE, "2", processor)
        assert record.total == pytest.approx(paper.total - getattr(paper, part))
        assert getattr(paper, part) > 0
    assert [REWARDS["outcome"](RESPONSE, answer, processor).total for answer in "21"] == [1, 0]
    for kind in set(REWARDS) - {"verl"}:                # parts add up to what is paid
        record = REWARDS[kind](RESPONSE, "2", processor)
        assert record.total == pytest.approx(sum(getattr(record, part) for part in PARTS))
    counted = REWARDS["openrlhf"](RESPONSE, "2", processor).n_tokens        # code: tags too
    assert counted == processor.count(RESPONSE) > paper.n_tokens


@pytest.mark.parametrize("garbage", ["", "<answer>", "2", "</answer> 2 <answer>",
                                     "<think> 2 </think>"])
def test_garbage_earns_nothing(base, garbage):
    for kind in rs.REWARDS:
        record = REWARDS[kind](garbage, "2", Processor(base))
        assert record.accuracy <= 0 and not record.final_correct and record.total <= 0


def test_the_flag_lists_every_reward():
    assert set(rs.REWARDS) == set(REWARDS)
