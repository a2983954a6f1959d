"""Ids of known label maps and what they are in `CLASSES`.

Only what stands here or in a table of one's own is known; another id in a file is an error, since
a map read by the wrong table looks plausible.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.maskers.annotations import CLASS_OF
from data_pipelines.maskers.interface import (
    BACKGROUND,
    CLASSES,
    PERSON,
    ROAD,
    TRAFFIC_LIGHT,
    TRAFFIC_SIGN,
    VEHICLE,
)
from data_pipelines.pictures import read_bytes
from fastdrive_jax.errors import UserError

# How a pixel's value tells its id:
IDS = "ids"  # it is the id
INSTANCES = "instances"  # id * 1000 + instance for what can be counted, the bare id for the rest
SEGMENTS = "segments"  # red + 256 green + 65536 blue is a segment, a JSON file knows its id
ENCODINGS = (IDS, INSTANCES, SEGMENTS)


@dataclass(frozen=True)
class LabelTable:
    """What the ids of label maps mean.

    Attributes:
        name: Shown in settings and errors.
        classes: Id to class id of `CLASSES`, for every id that may occur.
        encoding: One of `ENCODINGS`.
    """

    name: str
    classes: Mapping[int, int]
    encoding: str = IDS

    def __post_init__(self):
        if self.encoding not in ENCODINGS:
            raise UserError(
                f'Table {self.name}: encoding "{self.encoding}" is not one of {list(ENCODINGS)}.'
            )
        if not self.classes:
            raise UserError(f"Table {self.name} knows no id; add some.")
        for key, value in self.classes.items():
            if type(key) is not int or key < 0:
                raise UserError(f"Table {self.name}: {key!r} is no id; use whole numbers from 0.")
            if type(value) is not int or not 0 <= value < len(CLASSES.names):
                raise UserError(
                    f"Table {self.name}: id {key} is given class {value!r}; "
                    f"use 0 to {len(CLASSES.names) - 1}."
                )


def _table(name: str, ids: Sequence[int], encoding: str = IDS, **classes: Sequence[int]):
    """All `ids` are background but those under a class's name."""
    out = dict.fromkeys(ids, BACKGROUND)
    for key, members in classes.items():
        out |= dict.fromkeys(members, CLASSES.names.index(key))
    return LabelTable(name, out, encoding)


# The 11 classes of SegNet's tutorial and 11 = unlabelled. Sign and light are one class there (6);
# a bicyclist (10) is a person on his vehicle.
CAMVID = _table("camvid", range(12), road=(3,), traffic_sign=(6,), vehicle=(8,), person=(9, 10))

# Cityscapes: a rider is a person, a train a vehicle, a guard rail (14) a barrier; fences and walls
# are not of the traffic, parking areas and the own car are left out.
_CITYSCAPES = {
    "road": (7,),
    "vehicle": (26, 27, 28, 29, 30, 31, 32, 33),
    "person": (24, 25),
    "traffic_sign": (20,),
    "traffic_light": (19,),
    "barrier": (14,),
}
CITYSCAPES = _table("cityscapes", range(34), **_CITYSCAPES)
CITYSCAPES_INSTANCES = _table("cityscapes_instances", range(34), INSTANCES, **_CITYSCAPES)
CITYSCAPES_TRAIN = _table(
    "cityscapes_train",
    (*range(19), 255),
    road=(0,),
    traffic_light=(6,),
    traffic_sign=(7,),
    person=(11, 12),
    vehicle=(13, 14, 15, 16, 17, 18),
)

# In this order the ids of nuScenes-lidarseg are 0 to 31. nuImages numbers its 23 kinds of things
# alphabetically, which is the same 1 to 23, and has driveable_surface as 24, vehicle.ego as 31 and
# nothing as 0.
NUSCENES_CATEGORIES = (
    "noise",
    "animal",
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.stroller",
    "human.pedestrian.wheelchair",
    "movable_object.barrier",
    "movable_object.debris",
    "movable_object.pushable_pullable",
    "movable_object.trafficcone",
    "static_object.bicycle_rack",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.car",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.motorcycle",
    "vehicle.trailer",
    "vehicle.truck",
    "flat.driveable_surface",
    "flat.other",
    "flat.sidewalk",
    "flat.terrain",
    "static.manmade",
    "static.other",
    "static.vegetation",
    "vehicle.ego",
)


def nuscenes_class(category: str) -> int:
    """Class id of a nuScenes or nuImages category, which is that of its boxes (`CLASS_OF`).

    Traffic signs and lights are part of "static.manmade" there, so they are background.

    Raises:
        UserError: No such category.
    """
    if category not in NUSCENES_CATEGORIES:
        raise UserError(f'"{category}" is no nuScenes category; correct the name.')
    if category == "flat.driveable_surface":
        return ROAD
    if category == "vehicle.ego":
        return BACKGROUND
    boxed = (label for beginning, label in CLASS_OF if category.startswith(beginning))
    return max(next(boxed, BACKGROUND), BACKGROUND)


def nuscenes_table(
    categories: Mapping[int, str], name: str = "nuscenes", encoding: str = IDS
) -> LabelTable:
    """The table of a data set that numbers nuScenes' categories in its own way.

    Args:
        categories: Id to category name; an id 0 that it lacks means nothing was labelled.
        name: Of the table.
        encoding: One of `ENCODINGS`.

    Raises:
        UserError: No such category.
    """
    classes = {0: BACKGROUND} | {i: nuscenes_class(c) for i, c in categories.items()}
    return LabelTable(name, classes, encoding)


NUSCENES = nuscenes_table(dict(enumerate(NUSCENES_CATEGORIES)))
NUSCENES_PANOPTIC = nuscenes_table(
    dict(enumerate(NUSCENES_CATEGORIES)), "nuscenes_panoptic", INSTANCES
)

# COCO's panoptic categories that bear on the driving, by name: their ids are in the JSON file.
_COCO = {
    "road": ROAD,
    "person": PERSON,
    "traffic light": TRAFFIC_LIGHT,
    "stop sign": TRAFFIC_SIGN,
    **dict.fromkeys(("bicycle", "car", "motorcycle", "bus", "train", "truck"), VEHICLE),
}


def coco_table(categories: Sequence[Mapping[str, Any]], name: str = "coco") -> LabelTable:
    """The table of the `categories` in a COCO panoptic JSON file, for COCO's own names.

    For a file with other names, give a table of one's own (`read_table`).

    Raises:
        UserError: None of the names is known, so that every picture would be background.
    """
    classes = {c["id"]: _COCO.get(c["name"], BACKGROUND) for c in categories}
    if not any(classes.values()):
        raise UserError(
            f"Table {name}: none of COCO's names ({', '.join(_COCO)}) is among the categories; "
            "give a table of your own."
        )
    return LabelTable(name, classes, SEGMENTS)


TABLES = {
    table.name: table
    for table in (
        CAMVID,
        CITYSCAPES,
        CITYSCAPES_TRAIN,
        CITYSCAPES_INSTANCES,
        NUSCENES,
        NUSCENES_PANOPTIC,
    )
}


def read_table(path: Path) -> LabelTable:
    """A table of one's own: `{"encoding": "ids", "classes": {"0": "background", "7": "road"}}`.

    `encoding` is one of `ENCODINGS`, "ids" if left out; the file's stem is the table's name.

    Raises:
        UserError: The file is missing or holds something else.
    """
    try:
        content = json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); write it again.") from error
    if not isinstance(content, dict) or not isinstance(content.get("classes"), dict):
        raise UserError(f'{path} must be an object with "classes": {{"id": "class name"}}.')
    classes = {}
    for key, value in content["classes"].items():
        if not key.isdecimal() or value not in CLASSES.names:
            raise UserError(
                f'{path}: "{key}": {value!r} must give one of {list(CLASSES.names)} to an id.'
            )
        classes[int(key)] = CLASSES.names.index(value)
    return LabelTable(Path(path).stem, classes, content.get("encoding", IDS))
