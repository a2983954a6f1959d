"""What stands in a box: solids that fill it less than the box itself, and their outlines."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from data_pipelines.geometry import project

_ROUND = 12  # corners of a round cross-section


@dataclass(frozen=True)
class Solid:
    """The convex hull of cross-sections of a box.

    Attributes:
        sections: (height, length, width) of each: height -1 (bottom) to 1 (top), length and width
            as shares of the box's.
        round: Elliptic cross-sections instead of rectangles.
    """

    sections: tuple[tuple[float, float, float], ...]
    round: bool = False

    def points(self) -> np.ndarray:
        """[n, 3] in halves of (length, width, height)."""
        if self.round:
            angle = np.arange(_ROUND) * (2 * np.pi / _ROUND)
            base = np.stack([np.cos(angle), np.sin(angle)], 1)
        else:
            base = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]], np.float64)
        rings = [
            np.concatenate([base * [length, width], np.full((len(base), 1), height)], 1)
            for height, length, width in self.sections
        ]
        return np.concatenate(rings)


BOX = Solid(((-1.0, 1.0, 1.0), (1.0, 1.0, 1.0)))


def solid_points(
    solid: Solid, center: np.ndarray, size: np.ndarray, rotation: np.ndarray
) -> np.ndarray:
    """Points [n, 3] of a solid in a box.

    Args:
        solid: The shape.
        center: [3].
        size: [3] width, length, height.
        rotation: [3, 3].
    """
    return solid.points() * (size[[1, 0, 2]] / 2) @ rotation.T + center


def silhouette(points: np.ndarray, intrinsic: np.ndarray, near: float) -> np.ndarray:
    """Outline [n, 2] in pixels of the convex hull of points, of which only what is ahead counts.

    Args:
        points: [m, 3] in the camera frame.
        intrinsic: [3, 3].
        near: Metres ahead of the camera where the hull is cut.

    Returns:
        [0, 2] where nothing is ahead.
    """
    ahead = points[:, 2] >= near
    if not ahead.any():
        return np.zeros((0, 2))
    if not ahead.all():
        # The cut of a convex hull is the hull of where the lines between all pairs are cut: its
        # own edges are among them, and the others end inside.
        front, behind = points[ahead][:, None], points[~ahead][None]
        share = (near - front[..., 2:]) / (behind[..., 2:] - front[..., 2:])
        cuts = (front + share * (behind - front)).reshape(-1, 3)
        points = np.concatenate([points[ahead], cuts])
    pixels = project(points, intrinsic)
    return cv2.convexHull(pixels.astype(np.float32))[:, 0].astype(np.float64)
