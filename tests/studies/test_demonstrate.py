"""studies/demonstrate.py: the demonstrations against a replay of the expert, what is learnt from
them, and its flags."""
import math

import numpy as np
import pytest
import torch

from robots import trajectories
from robots.openvla import from_env_actions, to_env_actions
from robots.policy import load_policy
from robots.tabletop import TASKS, Expert, Tabletop
from studies import demonstrate
from studies.demonstrate import Settings


@pytest.mark.slow
def test_demonstrations_and_fine_tuning():
    data = demonstrate.demonstrations(demonstrate.tabletop_episodes(1, noise=0.0),
                                      TASKS["tabletop"])
    env, n = Tabletop(), 0
    for task in range(4):
        env.reset(options={"task": task, "index": 0})
        expert, actions, images, ended = Expert(env), [], [env.render()], False
        while not ended:
            actions.append(expert())
            ended = env.advance(actions[-1])
            images.append(env.render())
        assert env.success
        still = [0, 0, 0, 0, 0, 0, -1]
        for t, image in enumerate(images[:-1]):     # what is seen, the eight actions that follow
            np.testing.assert_array_equal(data["image"][n], image)
            chunk = [actions[t + k] if t + k < len(actions) else still for k in range(8)]
            np.testing.assert_array_equal(data["actions"][n], chunk)
            assert data["task"][n] == task
            n += 1
    assert n == len(data["image"]) == len(data["actions"])
    torch.manual_seed(0)
    s = Settings(steps=40, lr=2e-3, seed=3)
    one, two = (demonstrate.fine_tune(data, s, "tabletop", TASKS["tabletop"]) for _ in range(2))
    states = one.state_dict().values(), two.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(*states))
    rows = torch.arange(0, n, 4)
    with torch.no_grad():
        logits = one(*one.prompt_ids([TASKS["tabletop"][t] for t in data["task"][rows]]),
                     one.pixel_values(data["image"][rows][:, None]))
    bins = one.encode(from_env_actions(data["actions"][rows]), "tabletop").flatten(1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), bins.flatten())
    assert loss < 0.6 * math.log(256)
    # 256 bins over -0.5..0.5
    np.testing.assert_allclose(to_env_actions(one.decode(bins, "tabletop"))[..., :6],
                               data["actions"][rows][..., :6].clip(-0.5, 0.5), atol=0.003)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--demos", "1", "--steps", "3", "--threads", "1", "--out", "policy"]
    assert demonstrate.main([*argv, "--record", "demos"]) == 0
    assert "python eval.py vla --checkpoint policy" in capsys.readouterr().out
    assert load_policy("policy").config["size"] == 64
    videos, success, said = trajectories.videos("demos")
    played = list(demonstrate.tabletop_episodes(1))
    assert said.tolist() == list(TASKS["tabletop"])
    for episode, video, flagged in zip(played, videos, success, strict=True):
        np.testing.assert_array_equal(episode.images, video)
        assert episode.success == flagged


@pytest.mark.parametrize("argv, words", [
    ("--out x --record .", "--record must be a new folder; . is not empty"),
    ("", "--out must be a new folder"), ("--out .", ". is not empty"),
    ("--out x --demos 0", "--demos must be at least 1"),
    ("--out x --lr nan", "--lr must be positive"), ("--out x --suite libero_goal", "libero_goal"),
    ("--out x --horizon 9", "unrecognized arguments: --horizon 9"),
    ("--out x --size 128", "--size and --crop are LIBERO's"),
    ("--out x --suite libero_object --size 66",
     "size=66, crop=None: both sides must be multiples of 4"),
    ("--out x --suite libero_object --crop 8 8", "--crop 8 8: give top, left and side"),
    ("--out x --suite libero_object --crop 0 8 60", "lie within the image")])
def test_bad_flags(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert demonstrate.main(argv.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
