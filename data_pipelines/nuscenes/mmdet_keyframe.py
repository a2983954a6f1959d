"""One key frame as MMDetection3D describes it: an entry of its `nuscenes_infos_*`, in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.geometry import Pose
from data_pipelines.nuscenes.frames import Boxes, CameraView, Keyframe
from data_pipelines.schema import CAMERAS
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import read_json

# The ten detection classes stand for several categories each; the plainest one is named.
CATEGORIES = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "trailer": "vehicle.trailer",
    "bus": "vehicle.bus.rigid",
    "construction_vehicle": "vehicle.construction",
    "bicycle": "vehicle.bicycle",
    "motorcycle": "vehicle.motorcycle",
    "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone",
    "barrier": "movable_object.barrier",
}


def read_mmdet_keyframe(
    path: Path, scene: str, location: str, size: tuple[int, int] = (900, 1600)
) -> Keyframe:
    """Reads `{"metainfo": ..., "keyframe": ...}`.

    Boxes of no detection class (label -1) are left out: the file does not say what they are. It has
    no visibility either (0), and no tokens of annotations and things: numbers stand for them.

    Args:
        path: The JSON file; pictures are at `CHANNEL/<img_path>` beside it.
        scene: Name of the drive, which the file does not have.
        location: Map name, which the file does not have.
        size: Height and width of the pictures.

    Raises:
        UserError: The file is missing or damaged, or lacks a field.
    """
    content = read_json(path)
    try:
        return _keyframe(content, scene, location, size)
    except KeyError as error:
        raise UserError(f"{path} has no field {error}; is it an MMDetection3D info?") from error
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); write it again.") from error


def _keyframe(content: Mapping[str, Any], scene: str, location: str, size) -> Keyframe:
    row = content["keyframe"]
    ego = _pose(row["ego2global"])
    lidar = ego @ _pose(row["lidar_points"]["lidar2ego"])
    cameras = []
    for channel in CAMERAS:
        if channel in row["images"]:
            image = row["images"][channel]
            calibration = _pose(image["cam2ego"])
            # lidar2cam holds how far the car went between the lidar's moment and the camera's.
            camera = lidar @ _pose(image["lidar2cam"]).inverse()
            cameras.append(
                CameraView(
                    channel,
                    f"{channel}/{image['img_path']}",
                    round(image["timestamp"] * 1e6),
                    size,
                    np.array(image["cam2img"], np.float64)[:3, :3],
                    calibration,
                    camera @ calibration.inverse(),
                )
            )
    return Keyframe(
        row["token"],
        scene,
        location,
        round(row["timestamp"] * 1e6),
        ego,
        tuple(cameras),
        _boxes(row, content["metainfo"]["categories"], lidar),
    )


def _boxes(row: Mapping[str, Any], labels: Mapping[str, int], lidar: Pose) -> Boxes:
    names = {label: CATEGORIES[name] for name, label in labels.items()}
    known = [(k, item) for k, item in enumerate(row["instances"]) if item["bbox_label_3d"] in names]
    numbers = np.array([item["bbox_3d"] for _, item in known], np.float64).reshape(-1, 7)
    # Annotated boxes stand upright in the world; the file has their yaw in the lidar's frame, which
    # leans by a degree or two.
    ahead = np.stack([np.cos(numbers[:, 6]), np.sin(numbers[:, 6]), np.zeros(len(known))], 1)
    ahead = ahead @ lidar.rotation.T
    c, s = ahead[:, :2].T / np.hypot(*ahead[:, :2].T)
    zero, one = np.zeros_like(c), np.ones_like(c)
    upright = np.array([[c, -s, zero], [s, c, zero], [zero, zero, one]]).transpose(2, 0, 1)
    tokens = tuple(f"{row['token']}-{k}" for k, _ in known)
    return Boxes(
        tokens=tokens,
        instances=tokens,
        categories=tuple(names[item["bbox_label_3d"]] for _, item in known),
        centers=lidar.apply(numbers[:, :3]),
        sizes=numbers[:, [4, 3, 5]],  # its order is length, width, height
        rotations=upright,
        visibility=np.zeros(len(known), np.int64),
        lidar_points=np.array([item["num_lidar_pts"] for _, item in known], np.int64),
    )


def _pose(matrix) -> Pose:
    matrix = np.array(matrix, np.float64).reshape(4, 4)
    # Single precision left the rotation a little off; the nearest proper one inverts exactly.
    u, _, v = np.linalg.svd(matrix[:3, :3])
    return Pose(u @ v, matrix[:3, 3])
