"""At which steps of a plan the car leaves the drivable area or crosses a boundary of the road."""

import numpy as np
from jaxtyping import Bool, Float

from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.footprint import corners, headings
from fastdrive_jax.evaluation.protocols import Protocol
from fastdrive_jax.evaluation.rasters import (
    SIZE,
    car_cells,
    corner_cells,
    draw_lines,
    fill_areas,
    leaves,
    marked,
)
from fastdrive_jax.evaluation.truth import DrivingTruth

_LENGTH = 4.08  # metres; OmniDrive's car is 4 mm shorter here than in its collisions


def intersections(
    protocol: Protocol, planned: Float[np.ndarray, "S T 2"], truth: DrivingTruth
) -> Bool[np.ndarray, "S T"]:
    """Whether the car leaves the road, at each step of a plan.

    Args:
      protocol: "area" counts cells outside the drivable area, in samples where the car stands
        wholly inside now; "lines" counts cells on a boundary line, except at steps where the true
        way meets one too.
      planned: waypoints.
      truth: of the same samples.

    Raises:
      UserError: the protocol has no such metric, or the truth has no map.
    """
    if protocol.intersection is None:
        raise UserError(
            f"{protocol.name} does not measure leaving the road; choose omnidrive or bevplanner."
        )
    maps = truth.drivable if protocol.intersection == "area" else truth.boundaries
    if maps is None:
        raise UserError(
            f"intersections by {protocol.name} need a vector map, which this data set does not "
            "have; add maps/expansion/ to it or measure collisions and distances alone."
        )
    planned = np.asarray(planned, np.float64)
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    if protocol.intersection == "area":
        outside = _outside(protocol, planned, maps, canvas)
        return outside[:, 1:] & ~outside[:, :1]
    future = np.asarray(truth.future, np.float64)
    cells = [_cells(protocol, way) for way in (planned, future)]
    found = np.zeros(planned.shape[:2], bool)
    for k, lines in enumerate(maps):
        if lines:
            draw_lines(canvas, lines)
            found[k] = marked(canvas, cells[0](k)) & ~marked(canvas, cells[1](k))
    return found


def _cells(protocol: Protocol, way: np.ndarray):
    """The cells under the car along sample k's way, as a function of k: all at once are large."""
    yaw = headings(way, protocol.yaw)
    return lambda k: car_cells(protocol, way[k], yaw[k])


def _outside(protocol: Protocol, planned: np.ndarray, maps, canvas: np.ndarray) -> np.ndarray:
    """[S, T + 1] whether a cell under the car is not drivable, now and at each step.

    As published, the box's middle lies ahead along the present x axis and not along the heading,
    and the heading is that of the step however short it is.
    """
    count, steps = planned.shape[:2]
    boxes = np.zeros((count, steps + 1, 5))
    boxes[:, 1:, :2] = planned
    boxes[..., 0] += protocol.center_ahead
    boxes[:, 1:, 2] = headings(planned, "any_step")
    boxes[..., 3:] = _LENGTH, protocol.width
    polygons = corner_cells(corners(boxes), "nearest")
    found = np.zeros((count, steps + 1), bool)
    for k, areas in enumerate(maps):
        fill_areas(canvas, areas)
        found[k] = [leaves(canvas, polygon) for polygon in polygons[k]]
    return found
