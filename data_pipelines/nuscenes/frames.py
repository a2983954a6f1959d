"""What a key frame of nuScenes holds: plain values that readers make and maskers take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.geometry import Pose, box_corners


@dataclass(frozen=True)
class CameraView:
    """One camera at its own moment of a key frame.

    Attributes:
        channel: Such as "CAM_FRONT".
        filename: Seen from the data set's root.
        timestamp: Microseconds.
        size: Height and width in pixels.
        intrinsic: [3, 3] at that size.
        camera_to_ego: Calibration.
        ego_to_global: Of the car when this picture was taken.
    """

    channel: str
    filename: str
    timestamp: int
    size: tuple[int, int]
    intrinsic: np.ndarray
    camera_to_ego: Pose
    ego_to_global: Pose

    @property
    def global_to_camera(self) -> Pose:
        """The world seen from the camera."""
        return (self.ego_to_global @ self.camera_to_ego).inverse()


@dataclass(frozen=True)
class Boxes:
    """Annotated boxes of one moment, in the global frame.

    Attributes:
        tokens: Of the M annotations.
        instances: Token of the thing, equal over time.
        categories: nuScenes names, such as "vehicle.car".
        centers: [M, 3] metres.
        sizes: [M, 3] width, length, height in metres.
        rotations: [M, 3, 3].
        visibility: [M] 1 (0 to 40% of it is seen in all six pictures) to 4 (80 to 100%), 0 unknown.
        lidar_points: [M] how many lidar points lie in it.
    """

    tokens: tuple[str, ...]
    instances: tuple[str, ...]
    categories: tuple[str, ...]
    centers: np.ndarray
    sizes: np.ndarray
    rotations: np.ndarray
    visibility: np.ndarray
    lidar_points: np.ndarray

    def corners(self) -> np.ndarray:
        """[M, 8, 3]; see `geometry.box_corners`."""
        return box_corners(self.centers, self.sizes, self.rotations)


@dataclass(frozen=True)
class Keyframe:
    """One annotated moment.

    Attributes:
        token: Of the sample.
        scene: Name of the drive.
        location: Map name, such as "boston-seaport".
        timestamp: Microseconds.
        ego_to_global: Of the car at the moment of the lidar, or of the front camera without one.
        cameras: In `CAMERAS` order.
        boxes: None where the set has no annotations, as v1.0-test.
    """

    token: str
    scene: str
    location: str
    timestamp: int
    ego_to_global: Pose
    cameras: tuple[CameraView, ...]
    boxes: Boxes | None
