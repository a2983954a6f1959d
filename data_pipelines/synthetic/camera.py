"""Six pinhole cameras with nuScenes-like calibration.

Conventions are those of nuScenes: the ego frame has x forward, y left, z up; a camera frame has x
right, y down, z forward; `rotation` takes camera coordinates to ego coordinates.
"""

import math
from dataclasses import dataclass

import numpy as np

from data_pipelines.schema import CAMERAS

_NATIVE_WIDTH, _NATIVE_HEIGHT = 1600, 900
# yaw in degrees, focal length in pixels at 1600 x 900, place in the ego frame in metres
_LAYOUT = {
    "CAM_FRONT": (0.0, 1266.0, (1.70, 0.0, 1.51)),
    "CAM_FRONT_RIGHT": (-55.0, 1260.0, (1.55, -0.49, 1.50)),
    "CAM_BACK_RIGHT": (-110.0, 1259.0, (1.01, -0.48, 1.56)),
    "CAM_BACK": (180.0, 809.0, (0.03, 0.0, 1.57)),
    "CAM_BACK_LEFT": (110.0, 1256.0, (1.03, 0.48, 1.56)),
    "CAM_FRONT_LEFT": (55.0, 1272.0, (1.52, 0.49, 1.51)),
}


@dataclass(frozen=True)
class Camera:
    """One calibrated camera.

    Attributes:
        name: Channel, such as "CAM_FRONT".
        intrinsic: `[3, 3]` pixels.
        rotation: `[3, 3]` camera to ego.
        translation: `[3]` camera centre in the ego frame, metres.
        height: Picture height in pixels.
        width: Picture width in pixels.
    """

    name: str
    intrinsic: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray
    height: int
    width: int

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels `[..., 2]` and depths `[...]` of points `[..., 3]` given in the ego frame."""
        local = (points - self.translation) @ self.rotation
        depth = local[..., 2]
        safe = np.where(np.abs(depth) < 1e-6, 1e-6, depth)
        pixels = local[..., :2] / safe[..., None]
        focal = self.intrinsic[[0, 1], [0, 1]]
        return pixels * focal + self.intrinsic[:2, 2], depth


def make_camera(name: str, height: int, width: int, pitch: float = 0.0) -> Camera:
    """Builds camera `name` for a picture of `height` x `width` pixels.

    Args:
        name: One of the six nuScenes channels.
        height: Picture height in pixels.
        width: Picture width in pixels; pixels are square and the focal length scales with it.
        pitch: Radians, positive looks down.
    """
    if name not in CAMERAS:
        raise ValueError(f"unknown camera {name!r}")
    yaw_deg, focal, place = _LAYOUT[name]
    yaw = math.radians(yaw_deg)
    scale = width / _NATIVE_WIDTH
    intrinsic = np.array(
        [
            [focal * scale, 0.0, 816.0 * scale],
            [0.0, focal * scale, 491.0 / _NATIVE_HEIGHT * height],
            [0.0, 0.0, 1.0],
        ]
    )
    forward = np.array(
        [
            math.cos(yaw) * math.cos(pitch),
            math.sin(yaw) * math.cos(pitch),
            -math.sin(pitch),
        ]
    )
    right = np.array([math.sin(yaw), -math.cos(yaw), 0.0])
    rotation = np.stack([right, np.cross(forward, right), forward], 1)
    return Camera(name, intrinsic, rotation, np.array(place), height, width)
