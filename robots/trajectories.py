"""Logged trajectories, for learning offline: what was seen, what was done, whether it succeeded.

1. A folder of .npz files, a trajectory each: `eval.py vla --record` writes what it plays.
2. LeRobot's datasets, versions 2 and 3, a folder or hub id: tables in parquet, cameras as videos or
   as images in the tables. Success is a column or a field of the episode, `next.success` or
   `success`.

Actions are LIBERO's (gripper -1 open, +1 close), images as the simulator shows them to the policy.
Everything is read when it is asked for: a data set may be larger than the memory.
"""
import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from plumbing.files import read_json, whole
from robots.suite import CHUNK, Episode

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
SUCCESS = ("next.success", "success")


@dataclass
class Trajectory:
    """ValueError, one line, if its parts do not agree."""
    instruction: str
    success: bool
    images: np.ndarray      # uint8 (T, H, W, 3): at the start, then after every `every` env steps
    actions: np.ndarray     # float (N, 7), an env step each; the last image may be missing
    every: int = CHUNK      # 1, 2, 4 or 8

    def __post_init__(self):
        images, actions, every = self.images, self.actions, self.every
        if every not in (1, 2, 4, 8):
            raise ValueError(f"every is {every!r}: an image after each 1, 2, 4 or 8 env steps")
        for name, x, known, wanted in (
                ("images", images, images.dtype == np.uint8, ("uint8 (T, H, W, 3)", 4, 3)),
                ("actions", actions, actions.dtype.kind in "fiu", ("numbers (N, 7)", 2, 7))):
            if not known or (x.ndim, *x.shape[-1:]) != wanted[1:] or not x.size:
                raise ValueError(f"{name} must be {wanted[0]}, got {x.dtype} {x.shape}")
        if not np.isfinite(actions).all():
            raise ValueError("actions hold a number that is not finite")
        if not 0 <= len(images) - -(-len(actions) // every) <= 1:
            raise ValueError(f"{len(images)} images for {len(actions)} actions and an image after "
                             f"every {every}")

    @property
    def at(self) -> np.ndarray:
        """Where in `images` each call of a policy stands, a chunk of actions apart, and what came
        of the last one: int (K + 1,)."""
        calls = np.arange(0, len(self.actions), CHUNK) // self.every
        return np.append(calls, len(self.images) - 1)

    def chunks(self) -> tuple[np.ndarray, np.ndarray]:
        """(actions (K, 8, 7), padded with zeros, executed (K,)) of each call."""
        k = -(-len(self.actions) // CHUNK)
        padded = np.zeros((k * CHUNK, 7))
        padded[:len(self.actions)] = self.actions
        executed = np.minimum(CHUNK, len(self.actions) - CHUNK * np.arange(k))
        return padded.reshape(k, CHUNK, 7), executed


Loaders = dict[str, Callable[[], Trajectory]]


def find(source: str, camera: str = "") -> tuple[Path, Loaders]:
    """A data set's folder, and by name what reads a trajectory: ValueError, one line, for one that
    is damaged. camera: LeRobot's name of the images, its first if none is given. ValueError or
    OSError for a source that is no data set."""
    folder = Path(source)
    if not folder.is_dir() and re.fullmatch(HUB_ID, source):
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(source, repo_type="dataset"))
        except Exception as error:      # no network, no such data set: they have no common class
            raise ValueError(f"--data {source}: the hub did not give it "
                             f"({' '.join(str(error).split())[:100]})") from None
    if (folder / "meta/info.json").exists():
        try:
            return folder, lerobot(folder, camera)
        except (KeyError, TypeError, AttributeError, OSError, ArithmeticError) as error:
            raise ValueError(f"{folder}/meta is not LeRobot's, or damaged ({error!r:.100}); take "
                             "the whole data set") from None
    files = sorted(folder.rglob("*.npz"))
    if not files:
        raise ValueError(f"--data {source}: a folder of .npz files, or of LeRobot's with "
                         "meta/info.json, or a hub id; there is none of them")
    return folder, {str(file.relative_to(folder)): partial(read_npz, file) for file in files}


def videos(source: str, camera: str = "") -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """(images, success (N,) bool, instructions (N,)) of a whole data set. ValueError, one line, for
    the first trajectory that is damaged."""
    every = []
    for name, load in find(source, camera)[1].items():
        try:
            every.append(load())
        except ValueError as error:
            raise ValueError(f"{source}, {name}: {error}") from None
    return ([x.images for x in every], np.array([x.success for x in every]),
            np.array([x.instruction for x in every]))


# A file each

def save(file: Path, trajectory: Trajectory) -> None:
    """Whole or not at all."""
    with whole(file) as draft, open(draft, "wb") as stream:
        np.savez_compressed(stream, **vars(trajectory))


def save_episode(file: Path, episode: Episode, instruction: str) -> None:
    """One that was played with its whole video, a frame a chunk."""
    save(file, Trajectory(instruction, episode.success, episode.clip,
                          np.concatenate(episode.actions)))


def read_npz(file: Path) -> Trajectory:
    try:
        with zipfile.ZipFile(file) as archive:  # np.load stops reading before the checksum
            parts = {name.removesuffix(".npy"): np.lib.format.read_array(
                io.BytesIO(archive.read(name))) for name in archive.namelist()}
    except Exception as error:      # of damaged files zipfile, zlib and numpy raise a dozen kinds
        raise ValueError(f"cannot be read ({' '.join(str(error).split())[:100]})") from None
    for name, kinds, what in (("instruction", "U", "text"), ("success", "b", "true or false"),
                              ("every", "iu", "whole number")):
        value = parts.get(name, np.array(CHUNK) if name == "every" else None)
        if value is None or value.shape or value.dtype.kind not in kinds:
            raise ValueError(f"{name} is missing, or is no {what}")
        parts[name] = value.item()
    if missing := {"images", "actions"} - set(parts):
        raise ValueError(f"{min(missing)} are missing")
    return Trajectory(**{name: parts[name] for name in Trajectory.__dataclass_fields__})


# LeRobot

def lerobot(folder: Path, camera: str) -> Loaders:
    """Of each episode of a folder."""
    info = read_json(folder / "meta/info.json")
    cameras = [name for name, feature in info.get("features", {}).items()
               if feature.get("dtype") in ("video", "image")]
    if not cameras or camera and camera not in cameras:
        raise ValueError(f"--camera {camera or '(the first)'}: {folder} has "
                         f"{', '.join(cameras) or 'no images'}")
    camera = camera or cameras[0]
    lines = folder / "meta/episodes.jsonl"              # version 2
    try:
        if lines.exists():
            episodes = [json.loads(line) for line in lines.read_text().splitlines()]
        else:
            from pyarrow.parquet import read_table
            tables = sorted((folder / "meta/episodes").rglob("*.parquet"))
            episodes = [row for table in tables for row in read_table(table).to_pylist()]
    except Exception as error:              # of damaged files pyarrow raises kinds of its own
        raise ValueError(f"{folder}/meta: the episodes cannot be read "
                         f"({' '.join(str(error).split())[:100]}); take another copy") from None
    if not episodes:
        raise ValueError(f"{folder}/meta lists no episodes; take the whole data set")
    return {f"episode {episode['episode_index']}": partial(
        read_episode, folder, info, episode, camera) for episode in episodes}


def read_episode(folder: Path, info: dict, episode: dict, camera: str) -> Trajectory:
    """One of LeRobot's, an image before every action."""
    from pyarrow.parquet import read_table
    index = episode["episode_index"]

    def file_of(template: str, prefix: str) -> Path:
        """Version 2: a file for each episode; 3: several share one."""
        return folder / info[template].format(
            episode_index=index, episode_chunk=index // info.get("chunks_size", 1000),
            chunk_index=episode.get(f"{prefix}/chunk_index"),
            file_index=episode.get(f"{prefix}/file_index"), video_key=camera)
    try:
        rows = read_table(file_of("data_path", "data"), filters=[("episode_index", "=", index)])
        actions = np.array(rows["action"].to_pylist())
        flags = [rows[name].to_pylist() for name in SUCCESS if name in rows.column_names]
        flags += [[episode[name]] for name in SUCCESS if name in episode]
        if info["features"][camera]["dtype"] == "video":
            start = episode.get(f"videos/{camera}/from_timestamp") or 0.0
            images = decode(file_of("video_path", f"videos/{camera}"), start, len(actions))
        else:
            from PIL import Image
            images = np.stack([np.array(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
                               for image in rows[camera].to_pylist()])
    except Exception as error:      # pyarrow, PyAV and Pillow raise kinds of their own
        raise ValueError(f"cannot be read ({' '.join(str(error).split())[:100]})") from None
    if not flags:
        raise ValueError(f"success is not known: there is no {' or '.join(SUCCESS)}")
    if len(episode.get("tasks", ())) != 1:
        raise ValueError(f"it has {len(episode.get('tasks', ()))} instructions, not one")
    return Trajectory(episode["tasks"][0], bool(np.any(flags[0])), images, actions, 1)


def decode(file: Path, start: float, count: int) -> np.ndarray:
    """`count` frames of a video from `start`, in seconds: uint8 (count, H, W, 3)."""
    import av
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        half = 0.5 / float(stream.average_rate)
        container.seek(int(start / stream.time_base), stream=stream)    # a key frame before it
        later = (x for x in container.decode(stream) if x.time > start - half)
        frames = [frame.to_ndarray(format="rgb24") for frame in islice(later, count)]
    if len(frames) < count:
        raise ValueError(f"{len(frames)} frames for {count} actions")
    return np.stack(frames)
