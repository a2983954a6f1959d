"""The vector map of the world in the layout of the nuScenes map expansion v1.3.

Each road is a drivable area and a road segment, rounded corners are drivable areas; yellow centre
lines are road dividers. The white lines at the edges stand as lane dividers, since the format has
no layer for them. Lanes, stop lines and traffic lights are left out.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.synthetic import tables
from data_pipelines.synthetic.config import LANE_MARK
from data_pipelines.synthetic.roads import MARK_WIDTH, corner_fill
from data_pipelines.synthetic.scene import Scene

VERSION = "1.3"
_EMPTY = ("road_block", "lane", "walkway", "stop_line", "carpark_area", "traffic_light")
_BAR = (2.5, 0.5)  # metres along and across the road of a crossing's bar, see roads.crosswalk


def scene_map(scene: Scene) -> dict[str, list[list[list[float]]]]:
    """Corners, crossings and lines of a scene in the global frame, each as [x, y] in metres."""
    corners = [
        corner_fill(scene.main, branch, forward, 4.5)
        for _, _, branch in scene.branches
        for forward in (1, -1)
    ]
    shapes = {
        "corners": corners,
        "crossings": list(_crossings(scene)),
        "edges": [line for _, line in _middles(scene, "white")],
        "centres": list(_joined(scene)),
    }
    return {name: [_world(scene, points) for points in found] for name, found in shapes.items()}


def _world(scene: Scene, points: np.ndarray) -> list[list[float]]:
    flat = np.concatenate([points, np.zeros((len(points), 1))], 1)
    _, world = scene.to_world(np.eye(3), flat)
    return [[round(float(x), 3) for x in point] for point in world[:, :2]]


def _sides(outline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left and right edge [n, 2] of a band (see roads.band), both from its begin to its end."""
    half = len(outline) // 2
    return outline[:half], outline[half:][::-1]


def _middles(scene: Scene, paint: str) -> Iterator[tuple[int, np.ndarray]]:
    """Index and middle line [n, 2] of each painted line of the usual width."""
    for k, strip in enumerate(scene.strips):
        left, right = _sides(strip.outline) if strip.label == LANE_MARK else (None, None)
        if left is not None and strip.paint == paint:
            width = np.linalg.norm(left - right, axis=1).max()
            if width < 1.5 * MARK_WIDTH:
                yield k, (left + right) / 2


def _joined(scene: Scene) -> Iterator[np.ndarray]:
    """Broken yellow lines as one line each, cut where a junction leaves a gap."""
    line: list[np.ndarray] = []
    for _, dash in _middles(scene, "yellow"):
        if line and np.linalg.norm(dash[0] - line[-1][-1]) > 6.0:
            yield np.concatenate(line)
            line = []
        line.append(dash)
    if line:
        yield np.concatenate(line)


def _crossings(scene: Scene) -> Iterator[np.ndarray]:
    """Outline [4, 2] of each crossing, found as neighbouring bars in painting order."""
    bars: list[np.ndarray] = []
    for strip in (*scene.strips, None):
        if strip is not None and strip.label == LANE_MARK and _is_bar(strip.outline):
            bars.append(strip.outline)
        elif bars:
            first, last = bars[0], bars[-1]
            yield np.stack([first[3], first[2], last[1], last[0]])
            bars = []


def _is_bar(outline: np.ndarray) -> bool:
    if len(outline) != 4:
        return False
    along = np.linalg.norm(outline[1] - outline[0])
    across = np.linalg.norm(outline[3] - outline[0])
    # On a bend the outer bars are longer and the inner ones shorter than along the middle.
    return bool(abs(along - _BAR[0]) < 0.6 and abs(across - _BAR[1]) < 0.02)


def expansion(location: str, records: list[dict], size: float) -> dict[str, Any]:
    """The file of a location.

    Args:
        location: Map name.
        records: Of the scenes there, as `record.write_scene` returns them.
        size: Side of the mapped square in metres.
    """
    writer = _Writer(location)
    for record in records:
        found = record["map"]
        for outline in record["roads"]:
            area = writer.row("drivable_area", polygon_tokens=[writer.polygon(outline)])
            writer.row(
                "road_segment",
                polygon_token=writer.polygon(outline),
                is_intersection=False,
                drivable_area_token=area,
            )
        for outline in found["corners"]:
            writer.row("drivable_area", polygon_tokens=[writer.polygon(outline)])
        for outline in found["crossings"]:
            # The format wants a segment named; the last one written belongs to the same scene.
            writer.row(
                "ped_crossing",
                polygon_token=writer.polygon(outline),
                road_segment_token=writer.content["road_segment"][-1]["token"],
            )
        for line in found["centres"]:
            writer.divider("road_divider", line, "SINGLE_DASHED_YELLOW", road_segment_token=None)
        for line in found["edges"]:
            writer.divider("lane_divider", line, "SINGLE_SOLID_WHITE")
    return {
        "version": VERSION,
        **writer.content,
        **{name: [] for name in (*_EMPTY, "lane_connector")},
        "canvas_edge": [size, size],
        "connectivity": {},
        "arcline_path_3": {},
    }


class _Writer:
    """Rows by table, with tokens that depend on the location and the order alone."""

    def __init__(self, location: str):
        names = ("polygon", "line", "node", "drivable_area", "road_segment", "ped_crossing")
        self._location = location
        self.content: dict[str, list[dict]] = {
            name: [] for name in (*names, "road_divider", "lane_divider")
        }

    def row(self, table: str, **fields) -> str:
        token = tables.token("map", self._location, table, len(self.content[table]))
        self.content[table].append({"token": token, **fields})
        return token

    def polygon(self, outline: list[list[float]]) -> str:
        return self.row("polygon", exterior_node_tokens=self._nodes(outline), holes=[])

    def divider(self, table: str, line: list[list[float]], kind: str, **fields):
        nodes = self._nodes(line)
        token = self.row("line", node_tokens=nodes)
        segments = [{"node_token": node, "segment_type": kind} for node in nodes]
        self.row(table, line_token=token, **{f"{table}_segments": segments}, **fields)

    def _nodes(self, points: list[list[float]]) -> list[str]:
        return [self.row("node", x=x, y=y) for x, y in points]
