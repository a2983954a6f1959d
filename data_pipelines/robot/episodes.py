"""Demonstrations on disk: a record a step, in ArrayRecord shards that TFDS reads.

A step holds its pictures as JPEG, the action of the expert at it and those that follow, so that a
chunk of actions is read with one record. The manifest holds what is known of each episode, and
`dataset_statistics.json` the actions' ranges in OpenVLA's form. See `demonstrations` for who writes
them and `episode_loader` for batches.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from data_pipelines.robot.policies import ACTION_SIZE, PROPRIO_SIZE
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import read_json

FORMAT = 2
DATASET = "robot_episodes"  # TFDS's name of it, which begins the files' names
VERSION = "1.0.0"
MANIFEST = "manifest.json"
STATISTICS = "dataset_statistics.json"
HORIZON = 32  # actions stored with a step: its own and those that follow
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Step:
    """One record.

    Attributes:
        images: View to JPEG bytes.
        segments: View to PNG bytes of `tabletop.SEGMENTS`.
        proprio: float32 `[8]`.
        action: float32 `[7]` of the expert.
        executed: float32 `[7]` of the robot, which noise may have changed.
        future: float32 `[HORIZON, 7]` the expert's actions from this step on; the last is repeated.
        instruction: What was asked for.
        task: Its number.
        episode: Number in the split.
        step: Number in the episode.
    """

    images: dict[str, bytes]
    segments: dict[str, bytes]
    proprio: np.ndarray
    action: np.ndarray
    executed: np.ndarray
    future: np.ndarray
    instruction: str
    task: int
    episode: int
    step: int


@dataclass(frozen=True)
class EpisodeNote:
    """What the manifest says of an episode: its task, its trial, its length, and how it ended."""

    task: int
    trial: int
    steps: int
    success: bool


@dataclass(frozen=True)
class Episodes:
    """Finished demonstrations on disk.

    Attributes:
        path: Their folder.
        instructions: Of each task.
        views: Cameras of each step, in order.
        image_size: Height and width of the stored pictures.
        shards: Files of each split within the folder, in order, with the number of their records.
        episodes: Of each split, in order.
        digest: Of the shards' checksums: equal digests mean equal records.
    """

    path: Path
    instructions: tuple[str, ...]
    views: tuple[str, ...]
    image_size: tuple[int, int]
    shards: dict[str, dict[str, int]]
    episodes: dict[str, tuple[EpisodeNote, ...]]
    digest: str

    def steps(self, split: str) -> int:
        """Number of records of a split."""
        return sum(self.shards[split].values())


def step_features(views: Sequence[str]) -> tfds.features.FeaturesDict:
    """A step of some views as TFDS stores it; pictures are handed over and read as bytes."""

    def numbers(*shape):
        return tfds.features.Tensor(shape=shape, dtype=np.float32)

    whole = tfds.features.Scalar(dtype=np.int32)
    labels = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
    return tfds.features.FeaturesDict(
        {
            "images": {view: tfds.features.Image(encoding_format="jpeg") for view in views},
            "segments": dict.fromkeys(views, labels),
            "proprio": numbers(PROPRIO_SIZE),
            "action": numbers(ACTION_SIZE),
            "executed": numbers(ACTION_SIZE),
            "future": numbers(HORIZON, ACTION_SIZE),
            "instruction": tfds.features.Text(),
            "task": whole,
            "episode": whole,
            "step": whole,
        }
    )


def open_episodes(path: Path) -> Episodes:
    """Opens finished demonstrations after checking that all of them are there.

    Raises:
        UserError: The folder holds no whole set, or a shard is missing or cut short.
    """
    path = Path(path)
    again = "record the demonstrations again"
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} has no {MANIFEST}, so it holds no whole demonstrations; {again}.")
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("dataset") != DATASET:
        raise UserError(f"{path / MANIFEST} is not of {DATASET} in format {FORMAT}; {again}.")
    try:
        shards: dict[str, dict[str, int]] = {split: {} for split in manifest["episodes"]}
        for name, shard in sorted(manifest["shards"].items()):
            file = path / name
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"Shard {file} {found} instead of {shard['bytes']} bytes; {again}.")
            shards[name.removeprefix(f"{DATASET}-").rpartition(".array_record")[0]][name] = shard[
                "records"
            ]
        return Episodes(
            path=path,
            instructions=tuple(manifest["instructions"]),
            views=tuple(manifest["views"]),
            image_size=tuple(manifest["image_size"]),
            shards=shards,
            episodes={
                split: tuple(EpisodeNote(*note) for note in notes)
                for split, notes in manifest["episodes"].items()
            },
            digest=manifest["digest"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / MANIFEST} is incomplete ({error!r}); {again}.") from error


def open_together(paths: Sequence[Path]) -> Episodes:
    """Several recordings as one, in this order: a policy learns from all that was ever recorded.

    Its path is the first's.

    Raises:
        UserError: There is none, one cannot be opened or is named twice, or they do not fit.
    """
    if not paths:
        raise UserError("No demonstrations are given; name a folder of `fastdrive robot demos`.")
    first, *others = opened = [open_episodes(path) for path in paths]
    if not others:
        return first
    for place, other in enumerate(others, 1):
        if other.digest in [one.digest for one in opened[:place]]:
            raise UserError(f"{other.path} holds what another folder holds; name each once.")
        for field in ("instructions", "views", "image_size"):
            ours, theirs = getattr(first, field), getattr(other, field)
            if ours != theirs:
                raise UserError(
                    f"{first.path} and {other.path} cannot be read together: their {field} are "
                    f"{ours} and {theirs}."
                )
    splits = [split for split in first.shards if all(split in one.shards for one in others)]
    return replace(
        first,
        shards={
            split: {
                str(one.path.absolute() / name): count
                for one in opened
                for name, count in one.shards[split].items()
            }
            for split in splits
        },
        episodes={split: sum((one.episodes[split] for one in opened), ()) for split in splits},
        digest=hashlib.sha256(" ".join(one.digest for one in opened).encode()).hexdigest(),
    )


class StepSource:
    """Random access to the steps of a split as dicts; pictures stay encoded bytes."""

    def __init__(self, episodes: Episodes, split: str):
        """Opens the files.

        Raises:
            UserError: There is no such split.
        """
        if split not in episodes.shards:
            known = ", ".join(sorted(episodes.shards))
            raise UserError(f"{episodes.path} has no split {split!r}; it has {known}.")
        self._path = episodes.path
        files = [str(episodes.path / name) for name in episodes.shards[split]]
        self._source = ArrayRecordDataSource(files)
        self._features = step_features(episodes.views)
        skip = {view: tfds.decode.SkipDecoding() for view in episodes.views}
        self._raw = {"images": skip, "segments": skip}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        try:
            record = self._source[int(index)]
            return self._features.deserialize_example_np(record, decoders=self._raw)
        except Exception as error:
            raise UserError(
                f"Step {index} of {self._path} cannot be read ({error}); record the demonstrations "
                "again."
            ) from error


def statistics(
    name: str, actions: np.ndarray, proprio: np.ndarray, episodes: int
) -> dict[str, dict]:
    """Ranges of actions and proprio as in OpenVLA's `dataset_statistics.json`.

    Args:
        name: Of the data set; what a policy is told to scale its actions back by.
        actions: `[S, 7]` of all steps.
        proprio: `[S, 8]`.
        episodes: Their number.
    """
    ranges = {"action": _ranges(actions), "proprio": _ranges(proprio)}
    # The gripper is a command, not a distance, so it is not scaled.
    ranges["action"]["mask"] = [True] * (ACTION_SIZE - 1) + [False]
    return {name: {**ranges, "num_transitions": len(actions), "num_trajectories": episodes}}


def _ranges(values: np.ndarray) -> dict[str, list[float]]:
    values = np.asarray(values, np.float64)
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    found = {
        "mean": values.mean(0),
        "std": values.std(0),
        "max": values.max(0),
        "min": values.min(0),
        "q01": low,
        "q99": high,
    }
    return {key: value.tolist() for key, value in found.items()}


def read_statistics(path: Path, name: str | None = None) -> dict[str, dict]:
    """The ranges of one data set of a `dataset_statistics.json`.

    Args:
        path: The file, ours or OpenVLA's.
        name: Which data set; None where there is one only.

    Raises:
        UserError: The file cannot be read, or does not hold that data set.
    """
    content = read_json(path)
    known: Sequence[str] = list(content) if isinstance(content, dict) else []
    chosen = known[0] if name is None and len(known) == 1 else name
    if chosen not in known:
        raise UserError(f"{path} holds {json.dumps(known)}; name one of them, not {chosen!r}.")
    return content[chosen]
