"""What the page of `view_data` is drawn from: samples of shards or of a nuScenes folder."""

import datetime
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.geometry import Pose, box_corners
from data_pipelines.maskers.run import MASKER_FILE
from data_pipelines.nuscenes.driving import Moment, scene_moments
from data_pipelines.nuscenes.source import stated_plan
from data_pipelines.nuscenes.tables import open_nuscenes
from data_pipelines.pictures import check_picture, labels_png, mask_png, read_bytes
from data_pipelines.schema import (
    AGENT_KINDS,
    CLASSES_FILE,
    Classes,
    Record,
    read_classes,
)
from data_pipelines.shards import MANIFEST, open_shards, record_source
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import read_json

_KIND_OF = {"vehicle": "vehicle", "human": "person", "movable_object": "obstacle"}


@dataclass(frozen=True)
class Solids:
    """M things to outline in the pictures.

    Attributes:
        corners: [M, 8, 3] as `geometry.box_corners`, metres in the ego frame; flat boxes may have
            height 0.
        kinds: Of `AGENT_KINDS`, or "other".
        titles: Shown when one points at a box.
        faint: bool [M], drawn dashed.
    """

    corners: np.ndarray
    kinds: tuple[str, ...]
    titles: tuple[str, ...]
    faint: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One moment.

    Attributes:
        records: As in shards; `mask` is b"" where there is none.
        files: Where each picture comes from, for errors.
        place: Location and time, as far as known.
        solids: None where there are no annotations.
        to_camera: The ego frame of the moment seen from each camera; None where not known.
    """

    records: tuple[Record, ...]
    files: tuple[Path, ...]
    place: Mapping[str, str]
    solids: Solids | None
    to_camera: tuple[Pose | None, ...]


@dataclass(frozen=True)
class DataSet:
    """What the page says of the whole set, and how a sample of the chosen split is read.

    Attributes:
        name: Of the set.
        split: The chosen one.
        counts: Samples of each split.
        cameras: Channels.
        classes: None where nothing says what class ids mean.
        lists: Sentences under their titles: what is absent, dropped or skipped.
        masker: How the masks were made; empty where not known.
        boxes: Says what the outlines in the pictures are.
        scene: The drive of sample i.
        load: Sample i.
    """

    name: str
    split: str
    counts: Mapping[str, int]
    cameras: tuple[str, ...]
    classes: Classes | None
    lists: Mapping[str, tuple[str, ...]]
    masker: Mapping[str, Any]
    boxes: str
    scene: Callable[[int], str]
    load: Callable[[int], Sample]


def _choose_split(asked: str | None, counts: Mapping[str, int], path: Path) -> str:
    filled = [name for name in ("train", "val", "test", *sorted(counts)) if counts.get(name)]
    if not filled:
        raise UserError(f"{path} has no sample in any split; add some.")
    if asked is not None and asked not in filled:
        raise UserError(f"{path} has no split {asked!r}; it has {', '.join(sorted(set(filled)))}.")
    return asked or filled[0]


def of_shards(path: Path, asked: str | None) -> DataSet:
    """Shards and the split `asked` for, or the first.

    Raises:
        UserError: They are not whole, or there is no such split.
    """
    shards = open_shards(path)
    manifest = read_json(shards.path / MANIFEST)
    split = _choose_split(asked, shards.samples, shards.path)
    source, stride = record_source(shards, split), len(shards.cameras)
    lacking = sorted({"absent", "duplicates", "masker", "skipped"} - set(manifest))
    if lacking:
        raise UserError(f"{path / MANIFEST} has no {', '.join(lacking)}; build the shards again.")
    dropped = manifest["duplicates"]

    def load(number: int) -> Sample:
        stored = [source[place] for place in range(number * stride, (number + 1) * stride)]
        names = ("camera", "sample_token", "scene")
        records = tuple(Record(**row | {key: row[key].decode() for key in names}) for row in stored)
        return Sample(
            records,
            tuple(shards.path / f"{row.sample_token} {row.camera}" for row in records),
            {"Location, time": "not kept in shards"},
            ground_outlines(records[0]),
            tuple(
                Pose(pose[:3, :3], pose[:3, 3]).inverse() if np.isfinite(pose).all() else None
                for pose in (np.asarray(row.camera_to_ego, np.float64) for row in records)
            ),
        )

    return DataSet(
        name=shards.name,
        split=split,
        counts=shards.samples,
        cameras=shards.cameras,
        classes=shards.classes,
        lists={
            "Absent": tuple(manifest["absent"]),
            "Dropped as duplicates": tuple(f"{n} of {k}" for k, n in dropped.items() if n),
            "Skipped": tuple(manifest["skipped"]),
        },
        masker=manifest["masker"],
        boxes="outlines of agents on the ground (z = 0 of the ego frame) at the sample's moment, "
        "as shards keep no heights; the thick edge is the front",
        scene=lambda number: source[number * stride]["scene"].decode(),
        load=load,
    )


def agents_now(record: Record) -> tuple[np.ndarray, tuple[str, ...]]:
    """Agents annotated at the moment, [A, 5] x, y, yaw, length and width, and their kinds."""
    now = np.asarray(record.agents_valid, bool)[:, 0]
    kinds = np.asarray(record.agents_kind)[now]
    return np.asarray(record.agents, np.float64)[now, 0], tuple(AGENT_KINDS[k] for k in kinds)


def ground_outlines(record: Record) -> Solids:
    """The same agents as boxes of height 0 on the ground of the ego frame."""
    agents, kinds = agents_now(record)
    (x, y, yaw, length, width), zero = agents.T, np.zeros(len(agents))
    cos, sin = np.cos(yaw), np.sin(yaw)
    turns = np.array([[cos, -sin, zero], [sin, cos, zero], [zero, zero, zero + 1]])
    corners = box_corners(
        np.stack([x, y, zero], -1), np.stack([width, length, zero], -1), np.moveaxis(turns, 2, 0)
    )
    return Solids(corners, kinds, kinds, zero > 0)


def of_nuscenes(root: Path, version: str | None, masks: Path | None, asked: str | None) -> DataSet:
    """A nuScenes folder, with masks as far as there are any; arguments as in `ViewArgs`.

    Raises:
        UserError: A table is missing or damaged, or there is no such split.
    """
    nuscenes = open_nuscenes(root, version)
    places = {
        split: [(name, k) for name in names for k in range(len(nuscenes.scenes[name].samples))]
        for split, names in nuscenes.splits.items()
    }
    counts = {split: len(found) for split, found in places.items()}
    split = _choose_split(asked, counts, nuscenes.root)
    folder = masks or nuscenes.root
    maps = [kind for kind in ("masks", "labels") if (folder / kind).is_dir()]
    if masks is not None and not maps:
        raise UserError(f"{folder} has neither masks/ nor labels/; give the folder that has them.")
    lacking = [
        f"{folder.resolve().name}/ has no {kind}/: pictures are shown without {kind}."
        for kind in ("masks", "labels")
        if kind not in maps
    ]
    classes = None
    if "labels" in maps or (folder / CLASSES_FILE).is_file():
        classes = read_classes(folder / CLASSES_FILE)
    stated_path, made_by = nuscenes.root / "planning.json", folder / MASKER_FILE
    stated = read_json(stated_path) if stated_path.is_file() else None

    @functools.lru_cache(maxsize=1)  # samples come in the order of their scenes
    def moments(scene: str) -> list[Moment]:
        return scene_moments(nuscenes, nuscenes.scenes[scene])

    def load(number: int) -> Sample:
        scene, step = places[split][number]
        moment = moments(scene)[step]
        if stated is not None:
            plan = stated_plan(stated_path, stated, moment.keyframe.token, moment.plan)
            moment = replace(moment, plan=plan)
        return _sample_of(moment, nuscenes.root, folder, maps, classes)

    return DataSet(
        name=f"nuscenes:{nuscenes.root.resolve().name}",
        split=split,
        counts=counts,
        cameras=nuscenes.cameras,
        classes=classes,
        lists={"Absent": (*nuscenes.absent, *lacking)},
        masker=read_json(made_by) if made_by.is_file() else {},
        boxes="annotated boxes at the sample's moment, the front filled; dashed where at most 40% "
        "of a thing is seen in all pictures together",
        scene=lambda number: places[split][number][0],
        load=load,
    )


def _sample_of(
    moment: Moment, root: Path, folder: Path, maps: Sequence[str], classes: Classes | None
) -> Sample:
    """A moment with its pictures and the masks and labels that there are.

    Args:
        moment: Of a scene.
        root: Of the pictures.
        folder: Of masks/ and labels/.
        maps: Which of the two it has.
        classes: Of the labels.
    """
    frame, records = moment.keyframe, []
    shared = vars(moment.plan) | {
        "can_bus": moment.can_bus,
        "agents": moment.agents.boxes,
        "agents_valid": moment.agents.valid,
        "agents_kind": moment.agents.kind,
    }
    for view in frame.cameras:
        file = root / view.filename
        inside = Path(*Path(view.filename).parts[1:]).with_suffix(".png")
        found = {kind: folder / kind / inside for kind in ("masks", "labels")}
        image = read_bytes(file)
        size = check_picture(image, file)
        mask, labels = (
            read_bytes(path) if kind in maps and path.is_file() else b""
            for kind, path in found.items()
        )
        records.append(
            Record(
                image=image,
                mask=mask and mask_png(mask, found["masks"], size),
                labels=labels and labels_png(labels, found["labels"], size, classes)[0],
                camera=view.channel,
                sample_token=frame.token,
                scene=frame.scene,
                intrinsic=view.intrinsic,
                **shared,
            )
        )
    time = datetime.datetime.fromtimestamp(frame.timestamp // 10**6, datetime.UTC)
    return Sample(
        tuple(records),
        tuple(root / view.filename for view in frame.cameras),
        {
            "Location": frame.location or "not known",
            "Time": f"{time:%Y-%m-%d %H:%M:%S} UTC",
        },
        _annotated_solids(moment),
        tuple(view.global_to_camera @ frame.ego_to_global for view in frame.cameras),
    )


def _annotated_solids(moment: Moment) -> Solids | None:
    boxes = moment.keyframe.boxes
    if boxes is None:
        return None
    kinds = tuple(
        "cycle"
        if name in ("vehicle.bicycle", "vehicle.motorcycle")
        else _KIND_OF.get(name.partition(".")[0], "other")
        for name in boxes.categories
    )
    rows = zip(boxes.categories, boxes.visibility, boxes.lidar_points, strict=True)
    return Solids(
        moment.keyframe.ego_to_global.inverse().apply(boxes.corners()),
        kinds,
        tuple(f"{name}, visibility {v or 'not known'}, {n} lidar points" for name, v, n in rows),
        boxes.visibility == 1,
    )
