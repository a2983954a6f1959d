"""The height of the ground around the car, from where annotated boxes stand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.geometry import Pose
from data_pipelines.nuscenes.frames import Boxes

_REACH = 25.0  # metres over which the height of one box tells of its surroundings
_HILL = 0.5  # metres, how far the ground bulges off a plane
_SLOPE = 0.03  # grade, how far that plane leans against the car's own
_NOISE = 0.1  # metres between a box's bottom and the ground below it
_ROUNDS = 3
PARAMETERS = {
    "reach": _REACH,
    "hill": _HILL,
    "slope": _SLOPE,
    "noise": _NOISE,
    "rounds": _ROUNDS,
}  # what a mask depends on


@dataclass(frozen=True)
class Ground:
    """Height above the plane z = 0 of the car's frame.

    Attributes:
        places: [n, 2] where it is known, metres in the car's frame.
        weights: [n] of the kernel at each place; all 0 leave the plane.
    """

    places: np.ndarray
    weights: np.ndarray

    def height(self, xy: np.ndarray) -> np.ndarray:
        """Metres [k] at places [k, 2] of the car's frame."""
        return _kernel(xy, self.places) @ self.weights


FLAT = Ground(np.zeros((0, 2)), np.zeros(0))


def ground_below(boxes: Boxes, ego_to_global: Pose) -> Ground:
    """The smooth surface through the car's own foot and, nearly, the bottoms of the boxes.

    A Gaussian process: a leaning plane plus hills of 25 m reach, which fall back to the car's plane
    far from every box. A box that stands far off the surface of the others, on a stair or a lorry,
    loses weight.

    Args:
        boxes: In the global frame.
        ego_to_global: Of the car.
    """
    bottoms = boxes.centers - boxes.rotations[:, :, 2] * boxes.sizes[:, 2:] / 2
    bottoms = np.concatenate([np.zeros((1, 3)), ego_to_global.inverse().apply(bottoms)])
    places, heights = bottoms[:, :2], bottoms[:, 2]
    noise = np.full(len(places), _NOISE**2)
    noise[0] = 1e-4  # the car stands on the ground
    kernel = _kernel(places, places)
    for _ in range(_ROUNDS):
        weights = np.linalg.solve(kernel + np.diag(noise), heights)
        left = np.abs(heights - kernel @ weights)[1:]
        noise[1:] = _NOISE**2 * np.maximum(1.0, left / (2 * _NOISE)) ** 2
    return Ground(places, weights)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    square = ((a[:, None] - b[None]) ** 2).sum(-1)
    return _HILL**2 * np.exp(-square / (2 * _REACH**2)) + _SLOPE**2 * (a @ b.T)
