"""Key frames from the tables: calibration, poses and boxes as values."""

from collections.abc import Iterator

import numpy as np

from data_pipelines.geometry import rotation_matrix
from data_pipelines.nuscenes.frames import Boxes, CameraView, Keyframe
from data_pipelines.nuscenes.tables import LIDAR, NuScenes, Scene
from fastdrive_jax.errors import UserError


def read_keyframes(nuscenes: NuScenes, split: str | None = None) -> Iterator[Keyframe]:
    """The key frames of a split, or of all scenes, drive by drive in time order.

    Raises:
        UserError: There is no such split, or a key frame is incomplete.
    """
    if split is not None and split not in nuscenes.splits:
        raise UserError(
            f"{nuscenes.root} has no split {split!r}; it has {', '.join(sorted(nuscenes.splits))}."
        )
    names = nuscenes.scenes if split is None else nuscenes.splits[split]
    for name in names:
        yield from scene_keyframes(nuscenes, nuscenes.scenes[name])


def scene_keyframes(nuscenes: NuScenes, scene: Scene) -> Iterator[Keyframe]:
    """The key frames of one drive in time order."""
    for token in scene.samples:
        yield read_keyframe(nuscenes, scene, token)


def read_keyframe(nuscenes: NuScenes, scene: Scene, token: str) -> Keyframe:
    """One key frame.

    Raises:
        UserError: A camera, its calibration or a pose is missing.
    """
    views = nuscenes.views.get(token, {})
    lacking = [camera for camera in nuscenes.cameras if camera not in views]
    if lacking:
        raise UserError(
            f"Sample {token} of {scene.name} has no key frame of {', '.join(lacking)}; "
            "complete sample_data.json or leave the scene out of splits.json."
        )
    # The lidar's pose is the sample's reference in nuScenes; a set without lidar has the front
    # camera's, which is taken at almost the same time.
    reference = views.get(LIDAR) or views.get("CAM_FRONT") or views[nuscenes.cameras[0]]
    for row in (reference, *(views[camera] for camera in nuscenes.cameras)):
        if np.isnan(nuscenes.poses[row.pose]).any():
            raise UserError(
                f"Sample {token} has no ego pose in ego_pose.json under {nuscenes.root}; "
                "complete the table."
            )
    cameras = []
    for camera in nuscenes.cameras:
        row = views[camera]
        calibration, intrinsic = nuscenes.calibrations[row.calibration]
        cameras.append(
            CameraView(
                camera,
                row.filename,
                row.timestamp,
                row.size,
                intrinsic,
                calibration,
                nuscenes.pose(row.pose),
            )
        )
    return Keyframe(
        token,
        scene.name,
        scene.location,
        nuscenes.times[token],
        nuscenes.pose(reference.pose),
        tuple(cameras),
        read_boxes(nuscenes, token),
    )


def read_boxes(nuscenes: NuScenes, token: str) -> Boxes | None:
    """The boxes of one moment; None where the set has no annotations at all."""
    table = nuscenes.annotations
    if table is None:
        return None
    rows = slice(*table.span.get(token, (0, 0)))
    numbers, things = table.numbers[rows], table.instances[rows]
    return Boxes(
        tuple(table.tokens[rows]),
        tuple(table.instance_tokens[k] for k in things),
        tuple(table.instance_category[k] for k in things),
        numbers[:, :3],
        numbers[:, 3:6],
        rotation_matrix(numbers[:, 6:]).reshape(-1, 3, 3),
        table.visibility[rows],
        table.lidar_points[rows],
    )
