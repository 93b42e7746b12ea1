"""studies/parity.py on real LIBERO: our path and the published rules agree to the last bit, and a
difference planted in either is found and named."""
import numpy as np
import pytest

from robots.openvla import decode_actions, to_env_actions
from robots.suite import Episode, Start
from studies import parity
from tests.conftest import needs_assets


def episode(**changed) -> Episode:
    look = dict(pixels=np.zeros((4, 4, 3), np.uint8), tokens=np.arange(56), actions=np.ones((8, 7)))
    return Episode(Start(0, 0), [look, look | changed], [8, 8])


def test_each_difference_is_named():
    assert parity.differences(episode(), episode()) == []
    for name, x in episode().calls[0].items():
        other = x.copy()
        other.flat[3] += 2
        (line,) = parity.differences(episode(), episode(**{name: other}))
        assert line == f"{name} differ from env step 8 on, there in 1 of {x.size} by up to 2"
    solved = episode()
    solved.success, solved.executed = True, [8, 3]
    assert parity.differences(episode(), solved) == [
        "failure at step 16, published: success at step 11"]


def test_the_written_out_actions_are_ours():
    rng = np.random.default_rng(0)
    low = rng.uniform(-1, 0, 7)
    stats = {"q01": low, "q99": low + rng.uniform(0, 1, 7), "mask": [True] * 6 + [False]}
    bins = np.stack([rng.integers(0, 256, 56), np.repeat([0, 255, 127, 128], 14)])
    for row, actions in zip(bins, to_env_actions(decode_actions(bins, stats))):
        np.testing.assert_array_equal(parity.decoded(31744 + row, stats), actions)


@pytest.mark.slow
@needs_assets
def test_equal_and_planted_differences(capsys, monkeypatch):
    """In libero_spatial, whose cabinet and stove stand elsewhere with another seed."""
    play, played = parity.ours, []
    monkeypatch.setattr(parity, "ours", lambda *a: played or played.extend(play(*a)) or played)
    flags = "--suite libero_spatial --tasks 3 --states 1 --horizon 9".split()
    assert parity.main(flags) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "horizon 9, 10 settling steps, MuJoCo 3." in said
    assert "task 3 state 0: equal, 2 calls" in said and "1 of 1 episodes are equal" in said
    assert played[0].executed == [8, 1]
    for name, wrong in (("SEED", 1), ("upright", lambda seen: seen["agentview_image"])):
        with monkeypatch.context() as patch:
            patch.setattr(parity, name, wrong)
            assert parity.main(flags) == 1, name
        said = capsys.readouterr().out
        assert "state 0: pixels differ from env step 0 on" in said and "0 of 1 episodes" in said
        assert "; tokens differ from env step" in said and "; actions differ" in said, name


def test_bad_flags(capsys):
    for flags, message in (("--states 0", "--states must be at least 1"),
                           ("--suite tabletop", "invalid choice: 'tabletop'"),
                           ("--tasks 0 0", "--tasks 0 0: each once")):
        assert parity.main(flags.split()) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and message in said
