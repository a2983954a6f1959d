"""Rigid poses, boxes and the pinhole camera, in float64 and metres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Corners of a box in halves of (length, width, height), the order of the nuScenes devkit: the four
# of the front first, x forward, y left, z up.
_CORNERS = np.array(
    [
        [1, 1, 1, 1, -1, -1, -1, -1],
        [1, -1, -1, 1, 1, -1, -1, 1],
        [1, 1, -1, -1, 1, 1, -1, -1],
    ]
).T


@dataclass(frozen=True)
class Pose:
    """A frame seen from its parent: `parent = rotation @ child + translation`.

    Attributes:
        rotation: [3, 3].
        translation: [3] in metres.
    """

    rotation: np.ndarray
    translation: np.ndarray

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 3] of the child frame in the parent frame."""
        return points @ self.rotation.T + self.translation

    def inverse(self) -> Pose:
        """The parent seen from the child."""
        return Pose(self.rotation.T, -self.rotation.T @ self.translation)

    def __matmul__(self, other: Pose) -> Pose:
        """`other`'s child seen from the parent of this."""
        return Pose(self.rotation @ other.rotation, self.apply(other.translation))

    def matrix(self) -> np.ndarray:
        """Homogeneous [4, 4]."""
        out = np.eye(4)
        out[:3, :3], out[:3, 3] = self.rotation, self.translation
        return out


def rotation_matrix(quaternion) -> np.ndarray:
    """Rotations [..., 3, 3] of quaternions [..., 4] (w, x, y, z), which may have any length."""
    q = np.asarray(quaternion, np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def yaw_of(rotation: np.ndarray) -> np.ndarray:
    """Heading [...] of rotations [..., 3, 3] about the vertical axis, left positive, in radians."""
    return np.arctan2(rotation[..., 1, 0], rotation[..., 0, 0])


def box_corners(centers: np.ndarray, sizes: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Corners [M, 8, 3] of boxes, front four first.

    Args:
        centers: [M, 3].
        sizes: [M, 3] width, length, height: nuScenes' order.
        rotations: [M, 3, 3].
    """
    halves = _CORNERS * sizes[:, None, [1, 0, 2]] / 2
    return np.einsum("mij,mkj->mki", rotations, halves) + centers[:, None]


def project(points: np.ndarray, intrinsic: np.ndarray) -> np.ndarray:
    """Pixels [..., 2] (column, row) of points [..., 3] in the camera frame, whose z must not be 0.

    Args:
        points: x right, y down, z ahead.
        intrinsic: [3, 3].
    """
    image = points @ intrinsic.T
    return image[..., :2] / image[..., 2:]


def clip_ahead(polygon: np.ndarray, near: float = 0.1) -> np.ndarray:
    """The part of a closed polygon [n, 3] in the camera frame that lies ahead of `near` metres.

    One pass of Sutherland and Hodgman's clipping; a polygon wholly behind gives [0, 3].
    """
    out = []
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if a[2] >= near:
            out.append(a)
        if (a[2] >= near) != (b[2] >= near):
            out.append(a + (b - a) * (near - a[2]) / (b[2] - a[2]))
    return np.array(out).reshape(-1, 3)
