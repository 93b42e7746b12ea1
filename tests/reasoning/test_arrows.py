"""reasoning/arrows.py: what its pictures show and its teacher says."""
import numpy as np
import pytest

import rewards
from reasoning import arrows
from reasoning import rows as data
from reasoning.responses import PATTERNS
from tests.conftest import write_arrows


def ways_in(picture) -> np.ndarray:
    """The cell that each cell's arrow points at, (16,), read off the picture: a triangle's mass
    lies away from its tip."""
    pixels = np.asarray(data.load_image(picture))
    arrow = np.any([(pixels == color).all(-1) for color in arrows.COLORS.values()], 0)
    follow = np.zeros(arrows.SIDE**2, int)
    for cell in range(len(follow)):
        row, column = divmod(cell, arrows.SIDE)
        y, x = np.nonzero(arrow[row * 16:row * 16 + 16, column * 16:column * 16 + 16])
        tip = np.array([(y.min() + y.max()) / 2 - y.mean(), (x.min() + x.max()) / 2 - x.mean()])
        axis = np.abs(tip).argmax()
        follow[cell] = cell + int(np.sign(tip[axis])) * (arrows.SIDE if axis == 0 else 1)
    return follow


def ways_told(row) -> np.ndarray:
    """The same, read off the question: a cell and the one it points at, and so on."""
    words = row.query.split()[:2 * arrows.SIDE**2]
    assert not row.images and words[::2] == arrows.NAMES
    return np.array([arrows.NAMES.index(word) for word in words[1::2]])


@pytest.mark.parametrize("text", [False, True])
def test_one_start_is_right_and_a_long_way_is_wrong(text):
    """By brute force, from the pixels or the words."""
    for asked in arrows.dataset(40, 0, text=text):
        follow = ways_told(asked) if text else ways_in(asked)
        asked_for = asked.query.split().index("to") + 1
        end, ends = arrows.NAMES.index(asked.query.split()[asked_for]), np.arange(arrows.SIDE**2)
        ways = [ends]
        for _ in range(arrows.STEPS):
            ways.append(follow[ways[-1]])
        (start,) = np.flatnonzero(ways[-1] == end)
        assert arrows.NAMES[start] == asked.answer
        right = [step[start] for step in ways]                  # from the start to the end
        wrong = 0
        for cell in set(range(arrows.SIDE**2)) - {start}:
            for n in range(1, arrows.STEPS):
                if ways[n][cell] == end:                        # n arrows lead there: a dead end
                    own, way = [step[cell] for step in ways[:n + 1]][::-1], right[::-1]
                    apart = next((i for i, (x, y) in enumerate(zip(own, way)) if x != y), n + 1)
                    wrong = max(wrong, n + 1 - apart)
        assert wrong >= arrows.LURE


@pytest.mark.parametrize("form", arrows.FORMS)
@pytest.mark.parametrize("who", ["teacher", "base"])
def test_responses_follow_the_arrows(form, who):
    """The formats hold, each attempt goes back along arrows, a shorter way has met a dead end; the
    teacher's last answer is right, and a reflection names where its first attempt left the way."""
    rng, right = np.random.default_rng(0), []
    for _ in range(200):
        row, follow, way = arrows.draw(rng, form)
        text = arrows.respond(follow, way, form, who == "teacher", rng)
        assert rewards.format_holds(text, PATTERNS[form])
        thinks = [[arrows.NAMES.index(word) for word in think.split()]
                  for think in rewards.inside(text, "think")]
        answers = rewards.inside(text, "answer")
        back = 0
        if form == "reflection":
            place = rewards.inside(text, "reflection")[0].split()[-1]
            if thinks[0].count(arrows.NAMES.index(place)) != 1:
                continue                                        # in a circle: which time is meant?
            back = thinks[0].index(arrows.NAMES.index(place))
        for think, answer, at in zip(thinks, answers, (0, back)):
            assert all(follow[b] == a for a, b in zip(think, think[1:]))
            assert arrows.NAMES[think[-1]] == answer
            assert len(think) + at == arrows.STEPS + 1 or not (follow == think[-1]).any()
        assert thinks[0][0] == way[0] and thinks[-1][0] == thinks[0][back]
        right.append((answers[0] == row.answer, answers[-1] == row.answer))
        if who == "teacher":
            assert thinks[-1] == way[back:] and right[-1][1]
            left = next((i for i, (a, b) in enumerate(zip(thinks[0], way)) if a != b), 99) - 1
            assert form != "reflection" or back == min(left, arrows.STEPS - 1)
        elif form == "reflection" and len(thinks[0]) <= arrows.STEPS:
            assert thinks[1][1] != thinks[0][back + 1]          # after a dead end, another way
    first, final = np.mean(right, 0)
    if who == "base":
        assert 0.25 < first < 0.5
        assert final > first + 0.2 if form == "reflection" else final < 0.5


def test_the_base_learns_all_forms():
    rows = arrows.dataset(6, 1, target="base")
    assert [row.query.split()[-2] for row in rows] == [*arrows.FORMS] * 2
    assert all(rewards.format_holds(row.target, PATTERNS[row.query.split()[-2]]) for row in rows)
    assert {row.query.split()[-2] for row in arrows.dataset(6, 1, "plain", "teacher")} == {"plain"}
    assert [row.target for row in arrows.dataset(2, 1)] == [None, None]


@pytest.mark.parametrize("seed", [0, 7])
def test_rows_and_pictures_in_files_are_read_again(tmp_path, seed):
    rows, rejected = data.read_rows(write_arrows(tmp_path / "data", 3, seed))
    asked = arrows.dataset(3, seed)
    assert rejected == {}
    for row, other in zip(rows, asked, strict=True):
        assert (row.query, row.answer) == (other.query, other.answer)
        assert data.load_image(row).tobytes() == data.load_image(other).tobytes()
