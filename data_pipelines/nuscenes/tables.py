"""The nuScenes v1.0 tables as far as key frames need them, read in one pass over each file.

Layout: `ROOT/v1.0-*/` with the tables and perhaps `splits.json`, `ROOT/samples/`; optional beside
them `ROOT/can_bus/` and `ROOT/maps/expansion/`. What an optional part lacks is said once, in
`NuScenes.absent`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.geometry import Pose, rotation_matrix
from data_pipelines.nuscenes.can_bus import has_can_bus
from data_pipelines.nuscenes.rows import stream_rows
from data_pipelines.nuscenes.splits import official_splits, read_splits
from data_pipelines.schema import CAMERAS
from fastdrive_jax.errors import UserError

LIDAR = "LIDAR_TOP"
_REQUIRED = {  # tables and the fields that are read of them
    "calibrated_sensor": ("token", "sensor_token", "translation", "rotation", "camera_intrinsic"),
    "ego_pose": ("token", "timestamp", "translation", "rotation"),
    "sample": ("token", "timestamp", "scene_token"),
    "sample_data": (
        "token",
        "sample_token",
        "ego_pose_token",
        "calibrated_sensor_token",
        "timestamp",
        "is_key_frame",
        "height",
        "width",
        "filename",
    ),
    "scene": ("token", "name", "log_token"),
    "sensor": ("token", "channel"),
}
_BOXES = {
    "sample_annotation": (
        "token",
        "sample_token",
        "instance_token",
        "visibility_token",
        "translation",
        "size",
        "rotation",
        "num_lidar_pts",
    ),
    "instance": ("token", "category_token"),
    "category": ("token", "name"),
}
_LOGS = {"log": ("token", "location")}


@dataclass(frozen=True)
class Scene:
    """A drive.

    Attributes:
        name: Such as "scene-0061".
        location: Map name; "" where the set has no log table.
        samples: Tokens of its key frames in time order.
    """

    name: str
    location: str
    samples: tuple[str, ...]


@dataclass(frozen=True)
class ViewRow:
    """One key frame of one sensor: indices into the columns of `NuScenes`."""

    filename: str
    timestamp: int
    size: tuple[int, int]
    calibration: str
    pose: int


@dataclass(frozen=True)
class Annotations:
    """All boxes, sorted by sample; row i of each column is box i.

    Attributes:
        span: Sample token to its first row and the one past its last.
        tokens: Of the annotations.
        instances: Index into `instance_tokens`.
        instance_tokens: Things.
        instance_category: Category of each thing.
        numbers: [A, 10] centre, size (width, length, height) and quaternion.
        visibility: [A] 1 to 4, 0 unknown.
        lidar_points: [A].
    """

    span: dict[str, tuple[int, int]]
    tokens: list[str]
    instances: np.ndarray
    instance_tokens: list[str]
    instance_category: list[str]
    numbers: np.ndarray
    visibility: np.ndarray
    lidar_points: np.ndarray


@dataclass(frozen=True)
class NuScenes:
    """What the tables say of key frames.

    Attributes:
        root: Folder of the set.
        version: Its table folder, such as "v1.0-trainval".
        scenes: By name, in the order of the table.
        splits: Split name to scene names.
        cameras: Channels that it has, in `CAMERAS` order.
        absent: What the set lacks, a sentence each.
        views: Sample token and channel to a sensor's row.
        times: Sample token to microseconds.
        calibrations: Token to pose and intrinsic [3, 3] (zeros of the lidar).
        poses: [P, 7] translation and quaternion.
        pose_times: [P] microseconds.
        annotations: None where there are none.
    """

    root: Path
    version: str
    scenes: dict[str, Scene]
    splits: dict[str, tuple[str, ...]]
    cameras: tuple[str, ...]
    absent: tuple[str, ...]
    views: dict[str, dict[str, ViewRow]]
    times: dict[str, int]
    calibrations: dict[str, tuple[Pose, np.ndarray]]
    poses: np.ndarray
    pose_times: np.ndarray
    annotations: Annotations | None

    def pose(self, index: int) -> Pose:
        """Ego to global."""
        row = self.poses[index]
        return Pose(rotation_matrix(row[3:]), row[:3])


def open_nuscenes(root: Path, version: str | None = None, split: str | None = None) -> NuScenes:
    """Reads the tables under `root`.

    Args:
        root: Folder that holds `v1.0-*/`.
        version: Table folder such as "v1.0-trainval"; may be left out when there is only one.
        split: Name for the one split that all scenes go to; only for a set that has neither a
            `splits.json` nor an official split.

    Raises:
        UserError: A required table is missing or damaged, a reference leads nowhere, or the split
            is not known.
    """
    root = Path(root)
    folder = _table_folder(root, version)
    lacking = [name for name in _REQUIRED if not (folder / f"{name}.json").is_file()]
    if lacking:
        raise UserError(
            f"{folder} lacks {len(lacking)} of the {len(_REQUIRED)} nuScenes tables that are "
            f"needed: {', '.join(f'{name}.json' for name in lacking)}; add them."
        )
    channel = {row["token"]: row["channel"] for row in _rows(folder, "sensor")}
    sensor, calibrations = {}, {}
    for row in _rows(folder, "calibrated_sensor"):
        sensor[row["token"]] = channel.get(row["sensor_token"])
        if sensor[row["token"]] in (*CAMERAS, LIDAR):
            calibrations[row["token"]] = _calibration(row, folder)
    views, pose_index = _views(folder, sensor)
    poses, pose_times = _poses(folder, pose_index)
    scenes, times, absent = _scenes(folder)
    used = {name for found in views.values() for name in found}
    cameras = tuple(camera for camera in CAMERAS if camera in used)
    if not cameras:
        raise UserError(f"{folder / 'sample_data.json'} has no key frame of a camera.")
    annotations, missing = _annotations(folder)
    return NuScenes(
        root=root,
        version=folder.name,
        scenes=scenes,
        splits=_splits(folder, tuple(scenes), split),
        cameras=cameras,
        absent=(*absent, *missing, *_absent_expansions(root, scenes)),
        views=views,
        times=times,
        calibrations=calibrations,
        poses=poses,
        pose_times=pose_times,
        annotations=annotations,
    )


def _rows(folder: Path, name: str) -> Iterator[dict]:
    fields = {**_REQUIRED, **_BOXES, **_LOGS}[name]
    return stream_rows(folder / f"{name}.json", fields)


def _table_folder(root: Path, version: str | None) -> Path:
    found = sorted(p.name for p in root.glob("v1.0-*") if p.is_dir())
    if version is None:
        if not found:
            raise UserError(f"{root} has no v1.0-* folder of tables; is it a nuScenes folder?")
        if len(found) > 1:
            raise UserError(f"{root} has tables of {', '.join(found)}; name the version to read.")
        version = found[0]
    if version not in found:
        raise UserError(f"{root} has no tables of {version}; it has {', '.join(found) or 'none'}.")
    return root / version


def _calibration(row: dict, folder: Path) -> tuple[Pose, np.ndarray]:
    try:
        intrinsic = np.array(row["camera_intrinsic"] or np.zeros((3, 3)), np.float64)
        place = np.array(row["translation"], np.float64)
        pose = Pose(rotation_matrix(row["rotation"]), place)
        if intrinsic.shape != (3, 3) or place.shape != (3,) or pose.rotation.shape != (3, 3):
            raise ValueError("wrong lengths")
    except (TypeError, ValueError) as error:
        raise UserError(
            f"Row {row['token']} of {folder / 'calibrated_sensor.json'} is no calibration "
            f"({error}); write the table again."
        ) from error
    return pose, intrinsic


def _views(folder: Path, sensor: dict) -> tuple[dict, dict[str, int]]:
    """Rows of key frames by sample and channel, and the index of each pose that they need."""
    views: dict[str, dict[str, ViewRow]] = {}
    pose_index: dict[str, int] = {}
    for row in _rows(folder, "sample_data"):
        channel = sensor.get(row["calibrated_sensor_token"])
        if not row["is_key_frame"] or channel not in (*CAMERAS, LIDAR):
            continue
        views.setdefault(row["sample_token"], {})[channel] = ViewRow(
            row["filename"],
            row["timestamp"],
            (row["height"], row["width"]),
            row["calibrated_sensor_token"],
            pose_index.setdefault(row["ego_pose_token"], len(pose_index)),
        )
    return views, pose_index


def _poses(folder: Path, index: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.full((len(index), 7), np.nan)
    times = np.zeros(len(index), np.int64)
    for row in _rows(folder, "ego_pose"):
        place = index.get(row["token"])
        if place is None:
            continue
        try:
            numbers[place, :3], numbers[place, 3:] = row["translation"], row["rotation"]
            times[place] = row["timestamp"]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"Row {row['token']} of {folder / 'ego_pose.json'} is no pose ({error}); "
                "write the table again."
            ) from error
    return numbers, times


def _scenes(folder: Path) -> tuple[dict[str, Scene], dict[str, int], list[str]]:
    absent = []
    locations = {}
    if (folder / "log.json").is_file():
        locations = {row["token"]: row["location"] for row in _rows(folder, "log")}
    else:
        absent.append(f"{folder.name} has no log.json: the locations of its scenes are not known.")
    rows = {row["token"]: row for row in _rows(folder, "scene")}
    chains: dict[str, list] = {token: [] for token in rows}
    times = {}
    for row in _rows(folder, "sample"):
        if row["scene_token"] not in rows:
            raise UserError(
                f"Sample {row['token']} in {folder / 'sample.json'} belongs to scene token "
                f"{row['scene_token']}, which scene.json does not have; complete the tables."
            )
        chains[row["scene_token"]].append((row["timestamp"], row["token"]))
        times[row["token"]] = row["timestamp"]
    scenes = {}
    for token, row in rows.items():
        samples = tuple(name for _, name in sorted(chains[token]))
        scenes[row["name"]] = Scene(row["name"], locations.get(row["log_token"], ""), samples)
    return scenes, times, absent


def _splits(folder: Path, scenes: tuple[str, ...], split: str | None) -> dict:
    path = folder / "splits.json"
    if path.is_file():
        if split is not None:
            raise UserError(f"{path} says which scene is in which split; give no split beside it.")
        return read_splits(path, scenes)
    if split is None:
        found = official_splits(folder.name, scenes)
        if found is None:
            raise UserError(
                f"{path} is missing; write the scene names of each split to it, or name the one "
                "split that all scenes belong to."
            )
        return found
    try:
        official = official_splits(folder.name, scenes)
    except UserError:  # its scenes are of one's own
        official = None
    if official is not None:
        raise UserError(
            f"{folder} has official splits ({', '.join(official)}), and split {split!r} would take "
            f"the scenes of all of them; give no split, or write {path} to have splits of your own."
        )
    return {split: scenes}


def _annotations(folder: Path) -> tuple[Annotations | None, list[str]]:
    lacking = [f"{name}.json" for name in _BOXES if not (folder / f"{name}.json").is_file()]
    if lacking:
        return None, [f"{folder.name} has no {', '.join(lacking)}: boxes are absent."]
    category = {row["token"]: row["name"] for row in _rows(folder, "category")}
    instances = {}
    for row in _rows(folder, "instance"):
        instances[row["token"]] = category.get(row["category_token"])
    index = {token: k for k, token in enumerate(instances)}
    tokens, samples, things, numbers, visibility, points = [], [], [], [], [], []
    for row in _rows(folder, "sample_annotation"):
        thing = index.get(row["instance_token"])
        if thing is None or instances[row["instance_token"]] is None:
            raise UserError(
                f"Annotation {row['token']} in {folder / 'sample_annotation.json'} is of instance "
                f"{row['instance_token']}, which instance.json or category.json does not have; "
                "complete the tables."
            )
        tokens.append(row["token"])
        samples.append(row["sample_token"])
        things.append(thing)
        numbers.append((*row["translation"], *row["size"], *row["rotation"]))
        level = str(row["visibility_token"])
        visibility.append(int(level) if level.isdecimal() else 0)
        points.append(row["num_lidar_pts"])
    if not tokens:
        return None, [f"{folder.name}/sample_annotation.json is empty: boxes are absent."]
    order = sorted(range(len(samples)), key=samples.__getitem__)
    span: dict[str, tuple[int, int]] = {}
    for place, row in enumerate(order):
        first = span.get(samples[row], (place, place))[0]
        span[samples[row]] = (first, place + 1)
    try:
        columns = np.array(numbers, np.float64).reshape(-1, 10)[order]
    except ValueError as error:
        raise UserError(
            f"{folder / 'sample_annotation.json'} has a box of wrong lengths ({error}); write it "
            "again."
        ) from error
    return (
        Annotations(
            span,
            [tokens[row] for row in order],
            np.array(things, np.int32)[order],
            list(instances),
            list(instances.values()),
            columns,
            np.array(visibility, np.int8)[order],
            np.array(points, np.int32)[order],
        ),
        [],
    )


def _absent_expansions(root: Path, scenes: dict[str, Scene]) -> list[str]:
    """What the optional downloads lack, each said once for all scenes."""
    said = []
    without = [name for name in scenes if not has_can_bus(root, name)]
    if without:
        which = "all" if len(without) == len(scenes) else f"{len(without)} of {len(scenes)}"
        said.append(f"can_bus/ lacks {which} scenes: their CAN bus fields are absent.")
    places = sorted({scene.location for scene in scenes.values() if scene.location})
    expansion = root / "maps" / "expansion"
    maps = [place for place in places if not (expansion / f"{place}.json").is_file()]
    if maps:
        said.append(f"maps/expansion/ has no {', '.join(maps)}: map layers are absent there.")
    return said
