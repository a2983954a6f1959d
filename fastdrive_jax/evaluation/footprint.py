"""The car's rectangle along a way, and whether rectangles touch."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from fastdrive_jax.evaluation.protocols import Protocol

_STILL = 0.5  # metres between a plan's first and last waypoint below which it has no heading
_SHORT = 1.0  # metres of a step below which it has none
_CORNERS = np.array([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])


def headings(
    waypoints: Float[np.ndarray, "S T 2"], rule: Literal["central", "step", "any_step"]
) -> Float[np.ndarray, "S T"]:
    """Heading at each waypoint, in radians, by a protocol's rule.

    Args:
      waypoints: in the present ego frame; the car is now at the origin.
      rule: see `Protocol.yaw`; "any_step" is "step" however short a step is.
    """
    way = np.concatenate([np.zeros_like(waypoints[:, :1]), waypoints], 1)
    steps = np.diff(way, axis=1)
    if rule == "central":
        # Over two steps, and over one at the end.
        change = np.concatenate([steps[:, :-1] + steps[:, 1:], steps[:, -1:]], 1)
        still = np.linalg.norm(waypoints[:, -1] - waypoints[:, 0], axis=-1) < _STILL
        return np.where(still[:, None], 0.0, np.arctan2(change[..., 1], change[..., 0]))
    yaw = np.arctan2(steps[..., 1], steps[..., 0])
    if rule == "any_step":
        return yaw
    return np.where(np.linalg.norm(steps, axis=-1) < _SHORT, 0.0, yaw)


def car_boxes(
    protocol: Protocol, waypoints: Float[np.ndarray, "S T 2"]
) -> Float[np.ndarray, "S T 5"]:
    """The car's box at each waypoint: x, y of the centre, yaw, length, width."""
    way = way_of_point(waypoints, protocol.origin_ahead) if protocol.origin_ahead else waypoints
    yaw = headings(way, protocol.yaw)
    center = way + protocol.center_ahead * _ahead(yaw) + [protocol.origin_ahead, 0.0]
    size = np.broadcast_to([protocol.length, protocol.width], way.shape)
    return np.concatenate([center, yaw[..., None], size], -1)


def way_of_point(waypoints: Float[np.ndarray, "S T 2"], ahead: float) -> Float[np.ndarray, "S T 2"]:
    """The way of a point that lies `ahead` metres before the ego origin, seen from where it is now.

    Turns by the heading of each step, and looks ahead as now where a step is below 1 m.
    """
    return waypoints + ahead * (_ahead(headings(waypoints, "step")) - [1.0, 0.0])


def way_of_origin(way: Float[np.ndarray, "S T 2"], ahead: float) -> Float[np.ndarray, "S T 2"]:
    """The way of the ego origin from that of a point before it: the inverse of `way_of_point`.

    From one origin to the next point is a straight line through the next origin, `ahead` before it.
    """
    way = np.asarray(way, np.float64)
    found, origin = [], np.zeros_like(way[:, 0])
    for point in np.moveaxis(way, 1, 0):
        line = point + ahead * np.eye(2)[0] - origin
        length = np.linalg.norm(line, axis=-1, keepdims=True)
        step = line * (1 - ahead / np.maximum(length, ahead))
        origin = np.where(length - ahead < _SHORT, point, origin + step)
        found.append(origin)
    return np.stack(found, axis=1)


def _ahead(yaw: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(yaw), np.sin(yaw)], -1)


def corners(boxes: Float[np.ndarray, "*B 5"]) -> Float[np.ndarray, "*B 4 2"]:
    """Corners of boxes (x, y, yaw, length, width), once around."""
    boxes = np.asarray(boxes, np.float64)
    cos, sin = np.cos(boxes[..., 2]), np.sin(boxes[..., 2])
    along = _CORNERS[:, 0] * boxes[..., None, 3]
    across = _CORNERS[:, 1] * boxes[..., None, 4]
    x = boxes[..., None, 0] + cos[..., None] * along - sin[..., None] * across
    y = boxes[..., None, 1] + sin[..., None] * along + cos[..., None] * across
    return np.stack([x, y], -1)


def touching(
    first: Float[np.ndarray, "N 5"], second: Float[np.ndarray, "N 5"], margin: float = 0.0
) -> Bool[np.ndarray, " N"]:
    """Whether two boxes have a point in common, pair by pair.

    Two rectangles are apart when one of the four directions of their sides separates them
    (separating-axis theorem); a shared edge or corner is touching.

    Args:
      first: x, y, yaw, length, width.
      second: likewise.
      margin: metres by which they may be apart along each of these directions.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    apart = second[:, :2] - first[:, :2]
    found = np.ones(len(first), bool)
    for turn in (0.0, np.pi / 2):
        for yaw in (first[:, 2] + turn, second[:, 2] + turn):
            axis = np.stack([np.cos(yaw), np.sin(yaw)], -1)
            reach = _reach(first, yaw) + _reach(second, yaw) + margin
            found &= np.abs((apart * axis).sum(-1)) <= reach
    return found


def _reach(boxes: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """How far boxes [N, 5] reach from their middle in directions [N]."""
    turn = boxes[:, 2] - yaw
    return (np.abs(np.cos(turn)) * boxes[:, 3] + np.abs(np.sin(turn)) * boxes[:, 4]) / 2
