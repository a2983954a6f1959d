"""A camera placed in the scene, and the canvas of polygon numbers that it fills."""

from dataclasses import dataclass

import cv2
import numpy as np

from data_pipelines.synthetic.camera import Camera
from data_pipelines.synthetic.geometry import pose_on
from data_pipelines.synthetic.planner import EgoState

NEAR = 0.4  # metres; nothing nearer to the camera plane is drawn
_SHIFT = 4  # bits of sub-pixel precision


@dataclass(frozen=True)
class View:
    """A camera in scene coordinates.

    Attributes:
        eye: Camera centre `[3]`.
        rotation: `[3, 3]` camera to scene.
        focal: `[2]` pixels.
        centre: `[2]` pixels.
        height: Picture height.
        width: Picture width.
    """

    eye: np.ndarray
    rotation: np.ndarray
    focal: np.ndarray
    centre: np.ndarray
    height: int
    width: int

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Pixels `[..., 2]` of points `[..., 3]` in camera coordinates, depth held at `NEAR`."""
        return points[..., :2] / np.maximum(points[..., 2:], NEAR) * self.focal + self.centre

    def local(self, points: np.ndarray) -> np.ndarray:
        """Camera coordinates of scene points `[..., 3]`."""
        return (points - self.eye) @ self.rotation


def place(camera: Camera, terrain, state: EgoState, sway) -> View:
    """The view of `camera` from an ego state with body pitch and roll `sway` (radians)."""
    rotation, origin = pose_on(terrain, (state.x, state.y), state.yaw, *sway)
    return View(
        origin + rotation @ camera.translation,
        rotation @ camera.rotation,
        camera.intrinsic[[0, 1], [0, 1]],
        camera.intrinsic[:2, 2],
        camera.height,
        camera.width,
    )


class Canvas:
    """A map of polygon numbers with the colour and class of each number; 0 is the sky."""

    def __init__(self, height: int, width: int, sky_label: int):
        self.numbers = np.zeros((height, width), np.int32)
        self._colours = [(0.0, 0.0, 0.0)]
        self._labels = [sky_label]

    def __len__(self):
        return len(self._labels)

    def fill(self, polygons, colour, label: int):
        """Paints disjoint polygons (`fixed_point` pixels, each `[n, 2]`) over what is there."""
        cv2.fillPoly(self.numbers, polygons, len(self._labels), cv2.LINE_8, _SHIFT)
        self._colours.append(colour)
        self._labels.append(label)

    def colours(self) -> np.ndarray:
        """Colour of every pixel `[H, W, 3]` uint8."""
        table = np.zeros((len(self._colours), 4), np.uint8)
        table[:, :3] = np.clip(np.array(self._colours), 0, 255)
        # One 4-byte word per pixel is gathered several times faster than a row of three bytes.
        words = table.view(np.uint32)[:, 0].take(self.numbers)
        return cv2.cvtColor(words.view(np.uint8).reshape(*words.shape, 4), cv2.COLOR_BGRA2BGR)

    def labels(self) -> np.ndarray:
        """Class of every pixel `[H, W]` uint8."""
        return np.array(self._labels, np.uint8).take(self.numbers)


def fixed_point(pixels: np.ndarray) -> np.ndarray:
    """Pixels as the integers that `Canvas.fill` takes, in sixteenths."""
    return np.rint(pixels * (1 << _SHIFT)).astype(np.int32)


def fill_shadow(mask: np.ndarray, polygons):
    """Sets `mask` `[H, W]` uint8 to 1 inside pixel polygons."""
    for polygon in polygons:
        cv2.fillPoly(mask, [fixed_point(polygon)], 1, cv2.LINE_8, _SHIFT)


def clip(polygon: np.ndarray) -> np.ndarray:
    """Part of a polygon `[n, 3]` in front of the near plane (Sutherland-Hodgman)."""
    depth = polygon[:, 2]
    inside = depth > NEAR
    if inside.all():
        return polygon
    if not inside.any():
        return polygon[:0]
    following, next_inside = np.roll(polygon, -1, 0), np.roll(inside, -1)
    crossing = inside != next_inside
    gap = np.where(crossing, following[:, 2] - depth, 1.0)
    cut = polygon + ((NEAR - depth) / gap)[:, None] * (following - polygon)
    both = np.stack([polygon, cut], 1).reshape(-1, 3)
    return both[np.stack([inside, crossing], 1).reshape(-1)]
