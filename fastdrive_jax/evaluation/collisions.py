"""At which steps of a plan the car's box meets another agent's."""

import numpy as np
from jaxtyping import Bool, Float

from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.footprint import car_boxes, corners, touching
from fastdrive_jax.evaluation.protocols import Protocol
from fastdrive_jax.evaluation.rasters import HALF, any_marked, car_cells, corner_cells
from fastdrive_jax.evaluation.truth import KINDS, Agents, DrivingTruth

_BLOCK = 256  # samples at once: bounds memory
_ROUNDING = 0.5  # metres, more than rounding corners and cells can move a box


def collisions(
    protocol: Protocol, waypoints: Float[np.ndarray, "S T 2"], truth: DrivingTruth
) -> Bool[np.ndarray, "S T"]:
    """Whether the car meets an agent that counts, at each step of a way.

    Args:
      protocol: whose boxes, agents and kind of overlap.
      waypoints: planned or driven.
      truth: of the same samples.

    Raises:
      UserError: the data set has no annotated agents.
    """
    if truth.agents is None:
        raise UserError(
            f"collisions by {protocol.name} need annotated boxes, which this data set does not "
            "have; measure the distances alone or choose an annotated split."
        )
    waypoints = np.asarray(waypoints, np.float64)
    found = np.zeros(waypoints.shape[:2], bool)
    if truth.agents.kind.shape[1] == 0:
        return found
    for begin in range(0, len(waypoints), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        agents = truth.agents
        part = Agents(
            agents.boxes[block], agents.valid[block], agents.seen[block], agents.kind[block]
        )
        found[block] = _block(protocol, waypoints[block], part)
    return found


def _block(protocol: Protocol, waypoints: np.ndarray, agents: Agents) -> np.ndarray:
    steps = waypoints.shape[1]
    cars = car_boxes(protocol, waypoints)
    near = _near(cars, agents.boxes) & _counted(protocol, agents)[:, :, 1 : steps + 1]
    sample, agent, step = np.nonzero(near)
    car, other = cars[sample, step], agents.boxes[sample, agent, step + 1]
    raster = protocol.overlap == "raster"
    meets = touching(car, other, _ROUNDING if raster else 0.0)
    if raster:
        # Cells beyond the grid are moved to its edge, where boxes say nothing about them.
        meets |= np.abs(car[:, :2]).max(-1) > HALF - protocol.length
    sample, step, other = sample[meets], step[meets], other[meets]
    found = np.zeros(waypoints.shape[:2], bool)
    if not raster:
        found[sample, step] = True
        return found
    if not len(sample):
        return found
    place, group = np.unique(sample * steps + step, return_inverse=True)
    at = np.divmod(place, steps)
    cells = car_cells(protocol, waypoints[at], cars[at][:, 2])
    polygons = corner_cells(corners(other), protocol.cells)
    order = np.argsort(group, kind="stable")
    parts = np.split(polygons[order], np.flatnonzero(np.diff(group[order])) + 1)
    found[at] = [any_marked(part, mine) for part, mine in zip(parts, cells, strict=True)]
    return found


def _near(cars: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """[S, A, T] whether circles around cars [S, T, 5] and agents [S, A, T + 1, 5] meet.

    Also for the car moved to the grid's edge, which is at most as far from a box in the grid.
    """
    later = boxes[:, :, 1 : cars.shape[1] + 1]
    reach = (
        np.hypot(cars[..., 3], cars[..., 4])[:, None] + np.hypot(later[..., 3], later[..., 4])
    ) / 2 + 2 * _ROUNDING
    found = np.zeros(later.shape[:3], bool)
    for middle in (cars[..., :2], np.clip(cars[..., :2], -HALF, HALF)):
        away = later[..., :2] - middle[:, None]
        found |= (away**2).sum(-1) <= reach**2
    return found


def _counted(protocol: Protocol, agents: Agents) -> np.ndarray:
    """[S, A, T + 1] whether a box counts."""
    kinds = [KINDS.index(kind) for kind in protocol.kinds]
    counts = agents.valid & np.isin(agents.kind, kinds)[..., None]
    if protocol.seen_only:
        counts &= agents.seen
    if protocol.now_only:
        counts &= agents.valid[..., :1]
    return counts
