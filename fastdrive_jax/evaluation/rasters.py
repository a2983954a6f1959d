"""The grid on which ST-P3's successors count: 1000 x 1000 cells of 0.1 m around the ego origin.

Cells are kept as those evaluators keep them, down to their single-precision constants: a waypoint
written with one decimal lies on a cell's border, and its cell depends on the constant's last bit.
Column is x and row is y.
"""

import functools
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int

from fastdrive_jax.evaluation.protocols import Protocol

SIZE = 1000
HALF = 50.0  # metres from the middle to the grid's edge
CELL = float(np.float32(0.1))
_FIRST = float(np.float32(-49.95))  # middle of the first cell
_MIDDLE = 499.5  # the ego origin in cells


@functools.cache
def _car_cells(length: float, width: float, ahead: float) -> np.ndarray:
    """Cells [n, 2] (x, y) whose middle lies in the car at the origin, seen from the origin."""
    spans = []
    for middle, size in ((ahead, length), (0.0, width)):
        low, high = ((middle + sign * size / 2 - _FIRST) / CELL for sign in (-1, 1))
        spans.append(np.arange(np.ceil(low), np.floor(high) + 1) - _MIDDLE)
    return np.stack(np.meshgrid(*spans, indexing="ij"), -1).reshape(-1, 2)


def car_cells(
    protocol: Protocol, waypoints: Float[np.ndarray, "N 2"], yaw: Float[np.ndarray, " N"]
) -> Int[np.ndarray, "N C 2"]:
    """Cells (column, row) under the car: its cells at the origin, turned, rounded and shifted.

    Turning leaves gaps between cells, and cells outside the grid are moved to its edge; both are
    as published.
    """
    cells = _car_cells(protocol.length, protocol.width, protocol.center_ahead)
    cos, sin = (
        f(np.asarray(yaw, np.float64)).astype(np.float32)[:, None] for f in (np.cos, np.sin)
    )
    turned = np.stack(
        [cells[:, 0] * cos - cells[:, 1] * sin, cells[:, 0] * sin + cells[:, 1] * cos], -1
    )
    place = np.rint(turned + _MIDDLE) + np.asarray(waypoints, np.float64)[:, None] / CELL
    return np.clip(place.astype(np.int64), 0, SIZE - 1)


def corner_cells(
    points: Float[np.ndarray, "*B 2"], rule: Literal["nearest", "below"]
) -> Int[np.ndarray, "*B 2"]:
    """Cells (column, row) of points in metres; see `Protocol.cells`."""
    points = np.asarray(points, np.float64)
    if rule == "nearest":
        return np.rint((points - _FIRST + CELL / 2) / CELL).astype(np.int32)
    return ((points - _FIRST) / CELL).astype(np.int32)


def any_marked(polygons: Int[np.ndarray, "P 4 2"], cells: Int[np.ndarray, "C 2"]) -> bool:
    """Whether filled polygons cover one of these cells, all in grid cells."""
    points = np.concatenate([polygons.reshape(-1, 2), cells])
    low = np.clip(points.min(0), 0, SIZE - 1)
    high = np.clip(points.max(0), 0, SIZE - 1)
    canvas = np.zeros((high[1] - low[1] + 1, high[0] - low[0] + 1), np.uint8)
    for polygon in polygons:
        # One by one: together, even-odd filling would leave holes where two overlap.
        cv2.fillPoly(canvas, [(polygon - low).astype(np.int32)], 1)
    x, y = (cells - low).T
    return bool(canvas[y, x].any())


def fill_areas(canvas: np.ndarray, areas) -> np.ndarray:
    """Draws drivable areas on `canvas` [1000, 1000] as the nuScenes devkit does, and returns it.

    Exterior by exterior, its holes cut out after it: a later area fills an earlier one's hole.
    """
    canvas.fill(0)
    for area in areas:
        cv2.fillPoly(canvas, [_map_cells(area.exterior)], 1)
        if area.holes:
            cv2.fillPoly(canvas, [_map_cells(hole) for hole in area.holes], 0)
    return canvas


def leaves(canvas: np.ndarray, polygon: Int[np.ndarray, "4 2"]) -> bool:
    """Whether a filled polygon of cells covers an unmarked cell of the grid."""
    low = np.clip(polygon.min(0), 0, SIZE)
    high = np.clip(polygon.max(0) + 1, 0, SIZE)
    part = canvas[low[1] : high[1], low[0] : high[0]]
    if part.size == 0 or part.all():
        return False
    car = np.zeros_like(part)
    cv2.fillPoly(car, [(polygon - low).astype(np.int32)], 1)
    return bool((car > part).any())


def draw_lines(canvas: np.ndarray, lines, points: int = 20) -> np.ndarray:
    """Draws lines one cell wide on `canvas` [1000, 1000], and returns it.

    Args:
      canvas: bytes; cleared before.
      lines: of [n, 2] metres.
      points: evenly spaced points by which each line is replaced first, as the vector map of
        BEV-Planner does: bends are cut short.
    """
    canvas.fill(0)
    if lines:
        drawn = [
            np.clip((resampled(line, points) - _FIRST) / CELL, 0, SIZE - 1).astype(np.int32)
            for line in lines
        ]
        cv2.polylines(canvas, drawn, False, 1)
    return canvas


def resampled(line: Float[np.ndarray, "n 2"], points: int) -> Float[np.ndarray, "p 2"]:
    """Points at equal distances along a line, its ends among them."""
    line = np.asarray(line, np.float64)
    along = np.r_[0.0, np.hypot(*np.diff(line, axis=0).T).cumsum()]
    wanted = np.linspace(0, along[-1], points)
    return np.stack([np.interp(wanted, along, line[:, k]) for k in (0, 1)], 1)


def marked(canvas: np.ndarray, cells: Int[np.ndarray, "N C 2"]) -> Bool[np.ndarray, " N"]:
    """Whether one of each row's cells is marked."""
    return canvas[cells[..., 1], cells[..., 0]].any(-1)


def _map_cells(points: np.ndarray) -> np.ndarray:
    return np.rint((np.asarray(points, np.float64) + HALF) * (SIZE / (2 * HALF))).astype(np.int32)
