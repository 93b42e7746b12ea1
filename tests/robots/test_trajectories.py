"""robots/trajectories.py: our files and LeRobot's two layouts, read back; what is none of them, in
one line."""
import io
import json
import random

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from robots.trajectories import Trajectory, decode, find, read_npz, save, videos
from tests.test_world_model import damaged


def trajectory(actions: int = 19, every: int = 8, last: bool = True, **changes) -> Trajectory:
    rng = np.random.default_rng(actions)
    return Trajectory(**dict(
        instruction="put it there", success=True, every=every,
        images=rng.integers(0, 256, (-(-actions // every) + last, 16, 16, 3), np.uint8),
        actions=rng.uniform(-1, 1, (actions, 7))) | changes)


@pytest.mark.parametrize("actions, every, last, at", [
    (19, 8, True, [0, 1, 2, 3]), (16, 8, True, [0, 1, 2]), (19, 4, True, [0, 2, 4, 5]),
    (19, 1, True, [0, 8, 16, 19]), (19, 1, False, [0, 8, 16, 18]), (3, 1, False, [0, 2])])
def test_calls_by_hand(actions, every, last, at):
    x = trajectory(actions, every, last)
    assert x.at.tolist() == at
    chunks, executed = x.chunks()
    assert chunks.shape == (len(at) - 1, 8, 7) and executed.sum() == actions
    ran = np.concatenate([chunk[:n] for chunk, n in zip(chunks, executed, strict=True)])
    np.testing.assert_array_equal(ran, x.actions)


def test_a_file_is_read_as_it_was_saved(tmp_path):
    save(tmp_path / "deep/er/a.npz", x := trajectory())
    save(tmp_path / "b.npz", trajectory(5, 1, success=False))
    folder, loaders = find(str(tmp_path))
    assert folder == tmp_path and list(loaders) == ["b.npz", "deep/er/a.npz"]
    read = loaders["deep/er/a.npz"]()
    assert (read.instruction, read.success, read.every) == ("put it there", True, 8)
    np.testing.assert_array_equal(read.images, x.images)
    np.testing.assert_array_equal(read.actions, x.actions)
    assert loaders["b.npz"]().success is False


GOOD = {"instruction": np.array("x"), "success": np.array(True), "every": np.array(8),
        "images": np.zeros((2, 4, 4, 3), np.uint8), "actions": np.zeros((8, 7))}


@pytest.mark.parametrize("changes, words", [
    ({"images": None}, "images are missing"), ({"actions": None}, "actions are missing"),
    ({"success": None}, "success is missing, or is no true or false"),
    ({"success": np.array(1.0)}, "success is missing, or is no true or false"),
    ({"success": np.array([True, False])}, "success is missing"),
    ({"instruction": np.array(3)}, "instruction is missing, or is no text"),
    ({"every": np.array(3)}, "every is 3"), ({"every": np.array("8")}, "no whole number"),
    ({"actions": np.zeros((8, 14))}, r"actions must be numbers (N, 7), got float64 (8, 14)"),
    ({"actions": np.array(3.0)}, "actions must be numbers (N, 7), got float64 ()"),
    ({"actions": np.full((8, 7), np.nan)}, "not finite"), ({"actions": np.zeros((0, 7))}, "(0, 7)"),
    ({"images": np.zeros((2, 4, 4, 3))}, "images must be uint8 (T, H, W, 3), got float64"),
    ({"images": np.zeros((2, 4, 4), np.uint8)}, "images must be"),
    ({"images": np.zeros((5, 4, 4, 3), np.uint8)}, "5 images for 8 actions"),
    ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "images must be"),
    ({"actions": np.array([[{}] * 7], object)}, "cannot be read")])
def test_what_is_no_trajectory_is_one_line(tmp_path, changes, words):
    arrays = {name: x for name, x in (GOOD | changes).items() if x is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError) as error:
        read_npz(tmp_path / "a.npz")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_are_refused_in_one_line_or_read_the_same(tmp_path, seed):
    save(tmp_path / "a.npz", x := trajectory())
    data = damaged((tmp_path / "a.npz").read_bytes(), random.Random(seed))
    (tmp_path / "a.npz").write_bytes(data)
    try:
        read = read_npz(tmp_path / "a.npz")
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        np.testing.assert_array_equal(read.images, x.images)
        np.testing.assert_array_equal(read.actions, x.actions)
        assert (read.instruction, read.success, read.every) == ("put it there", True, 8)


def test_all_videos_or_the_first_fault(tmp_path):
    save(tmp_path / "a.npz", trajectory())
    save(tmp_path / "b.npz", trajectory(success=False, instruction="fly"))
    images, success, instructions = videos(str(tmp_path))
    assert len(images) == 2 and success.tolist() == [True, False]
    assert instructions.tolist() == ["put it there", "fly"]
    (tmp_path / "aa.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="aa.npz: cannot be read"):
        videos(str(tmp_path))


# LeRobot

FPS, SIDE, LENGTHS = 10, 32, (12, 9, 20)


def shades(episode: int, frame: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 60 * episode + 5 * frame + 10, np.uint8)


def film(path, frames, codec: str = "libx264") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.gop_size = "yuv420p", 4
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def dataset(folder, version: int, dtype: str = "video", success: str = "next.success",
            tasks=("put it there",)):
    """Three episodes, the second of which fails, in LeRobot's layout 2 or 3."""
    camera, meta = "observation.images.top", folder / "meta"
    meta.mkdir(parents=True)
    paths = {2: ("data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
                 "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"),
             3: ("data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                 "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")}[version]
    (meta / "info.json").write_text(json.dumps({
        "codebase_version": f"v{version}.1", "fps": FPS, "chunks_size": 1000, "data_path": paths[0],
        "video_path": paths[1], "features": {
            "action": {"dtype": "float32"}, "observation.images.wrist": {"dtype": dtype},
            camera: {"dtype": dtype}}}))
    rows, episodes, frames = [], [], []
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            rows.append({"episode_index": i, "frame_index": t, "action": [0.01 * t] * 7})
            if success:
                rows[-1][success] = i != 1 and t == length - 1
            if dtype == "image":
                Image.fromarray(shades(i, t)).save(buffer := io.BytesIO(), "PNG")
                rows[-1][camera] = {"bytes": buffer.getvalue(), "path": ""}
        start = sum(LENGTHS[:i]) / FPS
        episodes.append({"episode_index": i, "tasks": list(tasks), "length": length,
                         **({"data/chunk_index": 0, "data/file_index": 0,
                             f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": 0,
                             f"videos/{camera}/from_timestamp": start} if version == 3 else {})})
        frames.append([shades(i, t) for t in range(length)])

    def table(file, some):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(some), folder / file)
    if version == 3:
        table(meta / "episodes/chunk-000/file-000.parquet", episodes)
        table("data/chunk-000/file-000.parquet", rows)
        film(folder / f"videos/{camera}/chunk-000/file-000.mp4", sum(frames, []))
    else:
        (meta / "episodes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in episodes))
        for i in range(len(LENGTHS)):
            table(paths[0].format(episode_chunk=0, episode_index=i),
                  [row for row in rows if row["episode_index"] == i])
            film(folder / paths[1].format(episode_chunk=0, episode_index=i, video_key=camera),
                 frames[i])
    return folder


@pytest.mark.parametrize("version, dtype", [(2, "video"), (3, "video"), (2, "image"), (3, "image")])
def test_lerobot(tmp_path, version, dtype):
    folder, loaders = find(str(dataset(tmp_path / "d", version, dtype)), "observation.images.top")
    assert list(loaders) == ["episode 0", "episode 1", "episode 2"]
    for i, length in enumerate(LENGTHS):
        x = loaders[f"episode {i}"]()
        assert (x.instruction, x.success, x.every) == ("put it there", i != 1, 1)
        np.testing.assert_allclose(x.actions, np.outer(0.01 * np.arange(length), np.ones(7)))
        assert x.images.shape == (length, SIDE, SIDE, 3)
        expected = [shades(i, t)[0, 0, 0] for t in range(length)]
        assert np.abs(x.images.mean((1, 2, 3)) - expected).max() < 2.5      # 5 from frame to frame


def test_lerobot_s_own_codec_can_be_read(tmp_path):
    film(tmp_path / "a.mp4", [shades(0, t) for t in range(20)], "libsvtav1")
    assert np.abs(decode(tmp_path / "a.mp4", 0.7, 13).mean((1, 2, 3))
                  - [10 + 5 * t for t in range(7, 20)]).max() < 3


@pytest.mark.parametrize("dtype", ["image", "video"])
def test_what_lerobot_itself_writes(tmp_path, dtype):
    """With lerobot installed (0.4.4 was tried): of its own writer, two tasks and both outcomes."""
    LeRobotDataset = pytest.importorskip("lerobot.datasets.lerobot_dataset").LeRobotDataset
    camera, side, lengths = "observation.images.top", 64, (9, 13, 7)    # its codec's least side
    shapes = {camera: (dtype, (side, side, 3), ["height", "width", "channel"]),
              "action": ("float32", (7,), None), "next.success": ("bool", (1,), None)}
    written = LeRobotDataset.create(
        "me/small", fps=20, root=tmp_path / "d", features={
            name: dict(zip(("dtype", "shape", "names"), x)) for name, x in shapes.items()})
    for i, length in enumerate(lengths):
        for t in range(length):
            written.add_frame({
                camera: np.full((side, side, 3), 10 + 40 * i + 5 * t, np.uint8),
                "action": np.full(7, 0.01 * t, np.float32), "task": f"task {i % 2}",
                "next.success": np.array([i != 1 and t == length - 1])})
        written.save_episode()
    written.finalize()
    read = [load() for load in find(str(tmp_path / "d"))[1].values()]
    for i, (length, x) in enumerate(zip(lengths, read, strict=True)):
        assert (x.instruction, x.success, x.every) == (f"task {i % 2}", i != 1, 1)
        np.testing.assert_allclose(x.actions.T, [0.01 * np.arange(length)] * 7, atol=1e-7)
        off = np.abs(x.images.mean((1, 2, 3)) - (10 + 40 * i + 5 * np.arange(length)))
        assert off.max() < (2.5 if dtype == "video" else 0.01)


@pytest.mark.parametrize("how, camera, words", [
    ({"success": ""}, "observation.images.top", "success is not known: there is no next.success"),
    ({"tasks": ("a", "b")}, "observation.images.top", "it has 2 instructions, not one"),
    ({}, "", "cannot be read"),         # the wrist's videos are not there
    ({}, "nose", "--camera nose: ")])
def test_lerobot_s_faults_are_one_line(tmp_path, how, camera, words):
    with pytest.raises(ValueError) as error:
        find(str(dataset(tmp_path / "d", 3, **how)), camera)[1]["episode 0"]()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("version, file, content, words", [
    (2, "meta/episodes.jsonl", "{broken\n", "meta: the episodes cannot be read"),
    (2, "meta/episodes.jsonl", "{}\n", "meta is not LeRobot's, or damaged (KeyError"),
    (2, "meta/episodes.jsonl", "", "meta lists no episodes"),
    (3, "meta/episodes/chunk-000/file-000.parquet", "PAR1", "meta: the episodes cannot be read"),
    (3, "meta/info.json", '{"features": [1]}', "meta is not LeRobot's, or damaged"),
    (3, "meta/info.json", "{}", "has no images"), (3, "meta/info.json", "[", "is truncated or")])
def test_lerobot_s_damaged_meta_is_one_line(tmp_path, version, file, content, words):
    (dataset(tmp_path / "d", version) / file).write_text(content)
    with pytest.raises(ValueError) as error:
        find(str(tmp_path / "d"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    import huggingface_hub

    def gone(*_, **__):
        raise OSError("no network\nat all")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    with pytest.raises(ValueError, match="--data who/what: the hub did not give it .no network at"):
        find("who/what")


def test_a_hub_id_is_downloaded_and_nothing_else_is(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, repo_type: (
        asked.append((name, repo_type)), str(dataset(tmp_path / "d", 3)))[1])
    assert len(find("who/what")[1]) == 3 and asked == [("who/what", "dataset")]
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(ValueError, match="there is none of them"):
            find(source)
    assert len(asked) == 1
