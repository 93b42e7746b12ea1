"""reasoning/arrows.py: what its pictures show, what its teacher says, and what it writes."""
import subprocess
import sys
from pathlib import Path

import numpy as np

import rewards
from reasoning import arrows
from reasoning import rows as data

ROOT = Path(__file__).parents[2]


def test_answers_follow_the_arrows_in_the_pixels():
    """Arrows read off the picture (a triangle's mass lies away from its tip) lead from the cell
    asked to the answer."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = arrows.draw(rng)
        pixels = np.asarray(data.load_image(scene.row))
        arrow = np.any([(pixels == color).all(-1) for color in arrows.COLORS.values()], 0)
        cell = arrows.NAMES.index(scene.row.query.split()[1])
        for _ in range(arrows.HOPS):
            row, column = divmod(cell, arrows.SIDE)
            y, x = np.nonzero(arrow[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16])
            tip = np.array([(y.min() + y.max()) / 2 - y.mean(), (x.min() + x.max()) / 2 - x.mean()])
            axis = np.abs(tip).argmax()
            cell += int(np.sign(tip[axis])) * (arrows.SIDE if axis == 0 else 1)
        assert arrows.NAMES[cell] == scene.row.answer


def test_the_teacher_errs_as_it_says():
    """Its form always holds, its second look follows the arrows, and it begins in the right place
    as often as SURE and NOTICE say."""
    rng, right, first = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        scene = arrows.draw(rng)
        response = arrows.teach(scene, rng)
        record = rewards.reflection_reward(response, scene.row.answer)
        assert record.format == 0.5 and record.reflection == 0.25
        cells = [
            arrows.NAMES.index(word)
            for word in response.split("</reflection> <think>")[1].split("</think>")[0].split()[::2]
        ]
        assert (
            arrows.walk(scene.follow, cells[0], len(cells) - 1) == cells
            and response.split()[-2] == arrows.NAMES[cells[-1]]
        )
        right, first = right + record.final_correct, first + record.first_correct
    glances = arrows.HOPS // arrows.GLANCE
    sound = arrows.SURE ** (glances - 1)  # every place but the last is on the path
    assert (
        -0.03 < right / 2000 - (sound + (1 - sound) * arrows.NOTICE) < 0.2
    )  # paths also meet by chance
    assert -0.03 < first / 2000 - arrows.SURE**glances < 0.25


def test_the_command_writes_what_is_read_again(tmp_path):
    command = [
        sys.executable,
        "-m",
        "reasoning.arrows",
        "--out",
        tmp_path / "data",
        "--seed",
        "7",
        "--rows",
    ]
    for rows, words in (
        (-3, "error: --rows must be at least 1, got -3"),
        (3, ""),
        (3, f"error: --out {tmp_path}/data exists"),
    ):
        done = subprocess.run([*command, str(rows)], capture_output=True, text=True)
        assert (
            (done.returncode == 0) == (not words)
            and words in done.stderr
            and done.stderr.count("\n") == bool(words)
        )
    rows, rejected = data.read_rows(tmp_path / "data" / "rows.jsonl")
    assert rejected == [] and [(row.query, row.answer) for row in rows] == [
        (row.query, row.answer) for row in arrows.dataset(3, 7)
    ]
