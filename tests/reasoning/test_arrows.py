"""reasoning/arrows.py: what its pictures show, what its teacher says, and what it writes."""
import numpy as np
import pytest

import rewards
from plumbing.flags import ending
from reasoning import arrows
from reasoning import rows as data
from reasoning.responses import PATTERNS


def test_answers_follow_the_arrows_in_the_pixels():
    """Arrows read off the picture (a triangle's mass lies away from its tip) lead from the cell
    asked to the answer."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        asked, *_ = arrows.draw(rng)
        pixels = np.asarray(data.load_image(asked))
        arrow = np.any([(pixels == color).all(-1) for color in arrows.COLORS.values()], 0)
        cell = arrows.NAMES.index(asked.query.split()[1])
        for _ in range(arrows.HOPS):
            row, column = divmod(cell, arrows.SIDE)
            y, x = np.nonzero(arrow[row * 16:row * 16 + 16, column * 16:column * 16 + 16])
            tip = np.array([(y.min() + y.max()) / 2 - y.mean(), (x.min() + x.max()) / 2 - x.mean()])
            axis = np.abs(tip).argmax()
            cell += int(np.sign(tip[axis])) * (arrows.SIDE if axis == 0 else 1)
        assert arrows.NAMES[cell] == asked.answer


def test_the_teacher_errs_as_it_says():
    """Its form always holds, its second look follows the arrows, and it begins in the right place
    as often as SURE and NOTICE say."""
    rng, right, first = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        row, start, follow = arrows.draw(rng)
        response = arrows.teach(start, follow, rng)
        record = rewards.reflection_reward(response, row.answer)
        assert record.format == 0.5 and record.reflection == 0.25
        trace = response.split("</reflection> <think>")[1].split("</think>")[0].split()
        cells = [arrows.NAMES.index(word) for word in trace[::2]]
        assert arrows.walk(follow, cells[0], len(cells) - 1) == cells
        assert response.split()[-2] == arrows.NAMES[cells[-1]]
        right, first = right + record.final_correct, first + record.first_correct
    glances = arrows.HOPS // arrows.GLANCE
    sound = arrows.SURE ** (glances - 1)        # every place but the last is on the path
    paths = right / 2000 - (sound + (1 - sound) * arrows.NOTICE)        # they also meet by chance
    assert -0.03 < paths < 0.2 and -0.03 < first / 2000 - arrows.SURE**glances < 0.25


def test_the_forms_without_reflection_are_of_the_same_teacher():
    rng = np.random.default_rng(0)
    for _ in range(50):
        row, start, follow = arrows.draw(rng)
        seed = int(rng.integers(2**31))
        texts = {form: arrows.teach(start, follow, np.random.default_rng(seed), form)
                 for form in PATTERNS}
        assert all(rewards.format_holds(text, PATTERNS[form]) for form, text in texts.items())
        before, _, after = texts["reflection"].partition("<reflection>")
        assert texts["twice"] == before + after.partition("</reflection> ")[2]
        trace = [arrows.NAMES.index(word) for word in texts["plain"].split()[1:-4:2]]
        assert trace == arrows.walk(follow, start, arrows.HOPS)     # always right
        assert texts["plain"].endswith(f"<answer> {row.answer} </answer>")


@pytest.mark.parametrize("seed", [0, 7])
def test_the_command_writes_what_is_read_again(tmp_path, capsys, seed):
    command = ["--out", str(tmp_path / "data"), "--seed", str(seed), "--rows"]
    for n, error in ((-3, "error: --rows must be at least 1, got -3\n"), (3, ""),
                     (3, f"error: --out {tmp_path}/data exists; choose a new folder\n")):
        code = ending(lambda n=n: arrows.main([*command, str(n)]))
        assert (code, capsys.readouterr().err) == (2 if error else 0, error)
    rows, rejected = data.read_rows(tmp_path / "data" / "rows.jsonl")
    asked = [(row.query, row.answer) for row in arrows.dataset(3, seed)]
    assert rejected == {} and [(row.query, row.answer) for row in rows] == asked
