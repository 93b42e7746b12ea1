"""reasoning/responses.py: what responses earn beside rewards.py, and rows that cannot be used."""
import json

import pytest

from reasoning import arrows
from reasoning import responses as reflection_rollouts
import reflection_srpo as rs
import rewards


def test_ablated_rewards(base):
    """outcome: 1 for a right final answer and nothing else; no_length: the paper's without its length term. Unreadable is never right."""
    _, processor = rs.load(rs.Settings(), base)
    response = "<think> a 1 </think> <answer> 1 </answer> <reflection> check a </reflection> <think> a 2 </think> <answer> 2 </answer>"
    paper = rewards.reflection_reward(response, "2", count_tokens=lambda t: processor.count(rewards.TAG.sub(" ", t)))
    assert reflection_rollouts.score(response, "2", "paper", processor).total == paper.total and paper.length > 0
    assert reflection_rollouts.score(response, "2", "no_length", processor).total == pytest.approx(paper.total - paper.length)
    assert [reflection_rollouts.score(response, answer, "outcome", processor).total for answer in ("2", "1")] == [1, 0]
    for kind in ("paper", "no_length", "outcome", "openrlhf"):                  # parts add up to what is paid
        record = reflection_rollouts.score(response, "2", kind, processor)
        assert record.total == pytest.approx(record.format + record.accuracy + record.effectiveness + record.reflection + record.length)
    assert reflection_rollouts.score(response, "2", "openrlhf", processor).n_tokens == processor.count(response) > paper.n_tokens      # code: with its tags
    for garbage in ("", "<answer>", "2", "</answer> 2 <answer>", "<think> 2 </think>"):
        for kind in rs.REWARDS:
            record = reflection_rollouts.score(garbage, "2", kind, processor)
            assert record.accuracy <= 0 and not record.final_correct and record.total <= 0


def test_rows_that_cannot_be_used_are_set_aside_once(base, tmp_path):
    """A broken picture and a long question go, with the reason; where nothing is left, the first spare row that can be used stands in."""
    s, (_, processor) = rs.Settings(max_prompt=60), rs.load(rs.Settings(), base)
    good, broken, long = arrows.dataset(3, 0)
    broken.images, long.query = [b"broken"], "from a1 go 6 " * 30
    rejected = reflection_rollouts.Rejections(tmp_path)
    for resumed in (False, False, True):
        rejected = reflection_rollouts.Rejections(tmp_path) if resumed else rejected
        kept, prompts = reflection_rollouts.encode([broken, good, long], s, processor, rejected)
        assert kept == [good] and len(prompts) == 1
    assert [json.loads(line)["id"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()] == [broken.id, long.id]
    assert reflection_rollouts.encode([broken], s, processor, rejected, [long, good, good])[0] == [good]
    with pytest.raises(ValueError, match=r"none of 2 rows can be used; .*rejected.jsonl says why"):
        reflection_rollouts.encode([broken], s, processor, rejected, [broken, long])
