"""How well a masker agrees with exact label maps: intersection over union, class by class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from data_pipelines.maskers.annotations import AnnotationConfig, AnnotationMasker
from data_pipelines.maskers.interface import (
    BACKGROUND,
    BARRIER,
    CLASSES,
    PERSON,
    ROAD,
    TRAFFIC_LIGHT,
    TRAFFIC_SIGN,
    VEHICLE,
    Frame,
)
from data_pipelines.nuscenes.frames import Keyframe
from data_pipelines.nuscenes.keyframes import read_keyframes
from data_pipelines.nuscenes.map_layers import MapFolder
from data_pipelines.nuscenes.tables import open_nuscenes
from data_pipelines.synthetic import config as world
from fastdrive_jax.errors import UserError

# Class of each label of the synthetic world.
WORLD_CLASSES = np.full(256, BACKGROUND, np.uint8)
for _label, _class in (
    (world.ROAD, ROAD),
    (world.LANE_MARK, ROAD),
    (world.VEHICLE, VEHICLE),
    (world.PERSON, PERSON),
    (world.SIGN, TRAFFIC_SIGN),
    (world.TRAFFIC_LIGHT, TRAFFIC_LIGHT),
    (world.BARRIER, BARRIER),
):
    WORLD_CLASSES[_label] = _class
DEFAULT = AnnotationConfig()
_UNANNOTATED = (TRAFFIC_SIGN, TRAFFIC_LIGHT)


def overlaps(made: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Pixels of intersection and union [classes + 2, 2] of two class maps [H, W].

    Rows: each class of `CLASSES`, then the foreground, then the foreground without signs and
    lights, whose pixels in `exact` count as background there.
    """
    count = len(CLASSES.names)
    pairs = np.bincount(made.ravel().astype(np.int64) * count + exact.ravel(), minlength=count**2)
    pairs = pairs.reshape(count, count)
    known = [k for k in CLASSES.foreground if k not in _UNANNOTATED]
    groups = [*([k] for k in range(count)), list(CLASSES.foreground), known]
    both = [pairs[np.ix_(group, group)].sum() for group in groups]
    either = [pairs[group].sum() + pairs[:, group].sum() for group in groups]
    return np.stack([both, np.subtract(either, both)], 1)


def mean_iou(counts: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean over pictures of intersection over union, by class name, "foreground" and "annotated".

    A picture in which neither map has a class says nothing about it and is left out of its mean;
    a class that no picture has is nan.

    Args:
        counts: `overlaps` of each picture.
    """
    both = np.array(counts, np.float64)
    with np.errstate(invalid="ignore"):
        share = both[..., 0] / both[..., 1]
    names = (*CLASSES.names, "foreground", "annotated")
    means = [column[~np.isnan(column)] for column in share.T]
    return {
        name: float(column.mean()) if len(column) else float("nan")
        for name, column in zip(names, means, strict=True)
    }


def frames_of(root: Path, keyframes: Iterable[Keyframe]) -> list[Frame]:
    """A frame for each picture of the key frames; `name` is its path below `samples`, no suffix."""
    return [
        Frame(
            Path(root) / view.filename,
            str(Path(view.filename).relative_to("samples").with_suffix("")),
            view,
            keyframe,
        )
        for keyframe in keyframes
        for view in keyframe.cameras
    ]


def annotation_iou(
    root: Path,
    config: AnnotationConfig = DEFAULT,
    split: str | None = None,
) -> dict[str, float]:
    """Agreement of masks from annotations with the exact label maps of a synthetic data set.

    Args:
        root: A data set that `data_pipelines.synthetic.generate` wrote.
        config: Of the masker.
        split: "train" or "val"; None takes all scenes.

    Returns:
        `mean_iou`: a class name, "foreground" or "annotated" (the foreground without signs and
        lights, which annotations don't have) to the mean over pictures.

    Raises:
        UserError: A label map is missing or damaged.
    """
    root = Path(root)
    draw = AnnotationMasker(MapFolder(root), config)
    counts = []
    for keyframe in read_keyframes(open_nuscenes(root), split):
        frames = frames_of(root, [keyframe])
        for frame, made in zip(frames, draw(frames), strict=True):
            path = root / "labels" / f"{frame.name}.png"
            exact = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            if exact is None or exact.shape != made.shape:
                raise UserError(f"{path} is missing or not of its picture's size; generate again.")
            counts.append(overlaps(made, WORLD_CLASSES[exact]))
    return mean_iou(counts)


def ablations(config: AnnotationConfig = DEFAULT) -> Mapping[str, AnnotationConfig]:
    """The configuration with one part changed at a time, by a word for the change."""
    return {
        "as configured": config,
        "ground is the car's plane": replace(config, ground="plane"),
        "hidden boxes drawn": replace(config, hidden_visibility=0, min_lidar_points=0),
        "other shape": replace(config, shape="box" if config.shape != "box" else "solid"),
    }
