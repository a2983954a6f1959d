"""Driving logs at 10 Hz in ScenarioNet's form, as MetaDrive reads and records them.

One JSON file, perhaps gzipped, for a drive: `tracks` with the state of the car and of all others at
each step, and `map_features` with lanes and road lines. ScenarioNet draws the edge of the drivable
area as solid lines called `boundary_*`; closed ones are taken for its outline.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_pipelines.geometry import Pose, yaw_of
from data_pipelines.nuscenes.frames import Boxes
from data_pipelines.nuscenes.map_layers import Line, MapLayers, Polygon, make_map
from data_pipelines.schema import STEP_SECONDS
from fastdrive_jax.errors import UserError

_STATE = ("position", "heading", "length", "width", "height", "valid")
_MATCH = 3.0  # metres between a box and its counterpart after the cars were laid over each other


@dataclass(frozen=True)
class Track:
    """One road user over the T steps of a log.

    Attributes:
        token: Its name, in nuScenes logs the instance token.
        category: nuScenes name, such as "vehicle.car".
        position: [T, 3] centre of its box in metres.
        heading: [T] radians.
        size: [T, 3] width, length, height in metres.
        valid: [T] whether it is known at that step.
    """

    token: str
    category: str
    position: np.ndarray
    heading: np.ndarray
    size: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class ScenarioLog:
    """A drive.

    Attributes:
        name: Such as "scene-0061".
        location: Map name.
        rate: Steps per second.
        ego: The car that recorded it.
        others: All others, in the file's order.
        layers: Its part of the map.
    """

    name: str
    location: str
    rate: float
    ego: Track
    others: tuple[Track, ...]
    layers: MapLayers

    @property
    def keyframe_steps(self) -> range:
        """Steps 0.5 s apart, the rate of nuScenes' key frames."""
        return range(0, len(self.ego.heading), round(self.rate * STEP_SECONDS))

    def pose(self, step: int) -> Pose:
        """The car in the log's frame at a step, level and with its height as logged."""
        return Pose(_turn(self.ego.heading[step]), self.ego.position[step])

    def boxes(self, step: int) -> Boxes:
        """All others known at a step; visibility is 0 and lidar points are -1, both unknown."""
        there = [track for track in self.others if track.valid[step]]
        count = len(there)
        return Boxes(
            tokens=tuple(f"{track.token}-{step}" for track in there),
            instances=tuple(track.token for track in there),
            categories=tuple(track.category for track in there),
            centers=np.array([t.position[step] for t in there]).reshape(count, 3),
            sizes=np.array([t.size[step] for t in there]).reshape(count, 3),
            rotations=np.array([_turn(t.heading[step]) for t in there]).reshape(count, 3, 3),
            visibility=np.zeros(count, np.int64),
            lidar_points=np.full(count, -1, np.int64),
        )


def read_scenario_log(path: Path) -> ScenarioLog:
    """Reads a log.

    Raises:
        UserError: The file is missing or damaged, or lacks what is needed; it names what.
    """
    path = Path(path)
    content = _read(path)
    for key in ("id", "tracks", "map_features", "ego_id", "rate_hz"):
        if key not in content:
            raise UserError(f"{path} has no {key!r}; write it as a ScenarioNet log.")
    if content["ego_id"] not in content["tracks"]:
        raise UserError(f"{path} has no track of its own car, {content['ego_id']!r}.")
    tracks = {name: _track(path, name, row) for name, row in content["tracks"].items()}
    ego = _lengthwise(tracks.pop(content["ego_id"]))
    uneven = [name for name, track in tracks.items() if len(track.valid) != len(ego.valid)]
    if uneven:
        raise UserError(
            f"Track {uneven[0]} in {path} has {len(tracks[uneven[0]].valid)} steps where the car "
            f"itself has {len(ego.valid)}; write the log again."
        )
    location = str(content.get("location", ""))
    return ScenarioLog(
        name=str(content["id"]),
        location=location,
        rate=float(content["rate_hz"]),
        ego=ego,
        others=tuple(tracks.values()),
        layers=_layers(path, location, content["map_features"]),
    )


def alignment(log_boxes: Boxes, log_ego: Pose, boxes: Boxes, ego: Pose) -> tuple[Pose, int]:
    """The rigid move that lays a step of a log over the key frame of the same moment.

    The recording cars are laid over each other first, then each box of the log is matched with the
    nearest of its category within 3 m, and the matched centres decide: turn about the vertical and
    shift. Where a log has kept nuScenes' global frame the answer is the identity, whatever the two
    files take for the car's own reference.

    Args:
        log_boxes: `ScenarioLog.boxes` of the step.
        log_ego: `ScenarioLog.pose` of the step.
        boxes: Of the key frame.
        ego: `Keyframe.ego_to_global`.

    Returns:
        Log frame to global frame, and how many boxes were matched.

    Raises:
        UserError: Fewer than two boxes match, so that the two are not the same moment.
    """
    yaw = float(yaw_of(ego.rotation) - yaw_of(log_ego.rotation))
    first = Pose(_turn(yaw), ego.translation - _turn(yaw) @ log_ego.translation)
    moved = first.apply(log_boxes.centers)
    here, there = [], []
    for k, category in enumerate(log_boxes.categories):
        same = np.array([c == category for c in boxes.categories], bool)
        if same.any():
            away = np.linalg.norm(boxes.centers[:, :2] - moved[k, :2], axis=1)
            nearest = int(np.where(same, away, np.inf).argmin())
            if away[nearest] < _MATCH:
                here.append(log_boxes.centers[k])
                there.append(boxes.centers[nearest])
    if len(here) < 2:
        raise UserError(
            f"Of {len(log_boxes.categories)} boxes of the log, {len(here)} lie where the key "
            "frame has one of their category; give the log and step of the same moment."
        )
    # Two things close to each other may swap; the median of the shifts is blind to a few of them.
    for _ in range(3):
        a, b = np.array(here), np.array(there)
        left = np.linalg.norm(b - first.apply(a), axis=1)
        good = left <= max(3 * np.median(left), 1e-3)
        a, b = a[good], b[good]
        p, q = a[:, :2] - a[:, :2].mean(0), b[:, :2] - b[:, :2].mean(0)
        turn = np.arctan2((p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]).sum(), (p * q).sum())
        first = Pose(_turn(turn), b.mean(0) - _turn(turn) @ a.mean(0))
    return first, len(here)


def moved_map(layers: MapLayers, move: Pose) -> MapLayers:
    """The map after a rigid move about the vertical, such as `alignment`'s."""

    def place(points):
        return points @ move.rotation[:2, :2].T + move.translation[:2]

    polygons = {
        name: [
            Polygon(s.token, place(s.exterior), tuple(place(hole) for hole in s.holes))
            for s in layer.shapes
        ]
        for name, layer in layers.polygons.items()
    }
    lines = {
        name: [Line(s.token, place(s.points)) for s in layer.shapes]
        for name, layer in layers.lines.items()
    }
    return make_map(layers.location, layers.size, polygons, lines)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except FileNotFoundError as error:
        raise UserError(f"There is no log {path}; give the path of a ScenarioNet log.") from error
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); write it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a log but a {type(content).__name__}; write it again.")
    return content


def _track(path: Path, name: str, row: Mapping[str, Any]) -> Track:
    state = row.get("state", {})
    lacking = [key for key in _STATE if key not in state]
    if lacking or "category" not in row:
        raise UserError(f"Track {name} in {path} lacks {', '.join(lacking or ['category'])}.")
    try:
        columns = {key: np.array(state[key], np.float64) for key in _STATE}
        count = len(columns["heading"])
        width, length, height = (columns[k].reshape(count) for k in ("width", "length", "height"))
        position, valid = columns["position"].reshape(count, 3), columns["valid"].reshape(count)
    except (TypeError, ValueError) as error:
        raise UserError(f"Track {name} in {path} is damaged ({error}); write it again.") from error
    size = np.stack([width, length, height], 1)
    return Track(name, row["category"], position, columns["heading"], size, valid > 0)


def _lengthwise(ego: Track) -> Track:
    """The recording car, whose length and width ScenarioNet's nuScenes logs have swapped."""
    if np.median(ego.size[:, 0]) > np.median(ego.size[:, 1]):
        return replace(ego, size=ego.size[:, [1, 0, 2]])
    return ego


def _layers(path: Path, location: str, features: Mapping[str, Mapping[str, Any]]) -> MapLayers:
    lanes, rings = [], []
    lines: dict[str, list[Line]] = {"road_divider": [], "lane_divider": []}
    for name, feature in features.items():
        kind = feature.get("type", "")
        if kind.startswith("LANE") and feature.get("polygon") is not None:
            ring = _ring(_points(path, name, feature["polygon"]))
            if len(ring) >= 3:
                lanes.append(Polygon(name, ring))
        elif kind.startswith("ROAD_LINE"):
            points = _points(path, name, feature.get("polyline"))
            if name.startswith("boundary"):
                if len(points) > 3 and np.array_equal(points[0], points[-1]):
                    rings.append((name, _ring(points)))
            elif len(points) >= 2:
                layer = "road_divider" if kind.endswith("YELLOW") else "lane_divider"
                lines[layer].append(Line(name, points))
    area = _nested(rings) if rings else lanes
    corners = [s.exterior.max(0) for s in area]
    size = tuple(float(v) for v in np.max(corners, 0)) if corners else (0.0, 0.0)
    return make_map(location, size, {"drivable_area": area, "lane": lanes}, lines)


def _points(path: Path, name: str, value: Any) -> np.ndarray:
    try:
        points = np.array(value, np.float64)
        if points.ndim != 2 or points.shape[1] < 2 or not np.isfinite(points).all():
            raise ValueError(f"shape {points.shape}")
    except (TypeError, ValueError) as error:
        raise UserError(f"Map feature {name} in {path} has no points ({error}).") from error
    return points[:, :2]


def _ring(points: np.ndarray) -> np.ndarray:
    return points[:-1] if len(points) > 1 and np.array_equal(points[0], points[-1]) else points


def _nested(rings: Sequence[tuple[str, np.ndarray]]) -> list[Polygon]:
    """Polygons of rings that do not cross: one inside an odd number of others is a hole."""
    # Differences, since pointPolygonTest works in single precision.
    middle = rings[0][1][0]
    outlines = [(ring - middle).astype(np.float32)[:, None] for _, ring in rings]
    around = []
    for k, (_, ring) in enumerate(rings):
        x, y = (float(v) for v in ring[0] - middle)
        inside = [
            j
            for j, outline in enumerate(outlines)
            if j != k and cv2.pointPolygonTest(outline, (x, y), False) > 0
        ]
        around.append(inside)
    holes: dict[int, list[np.ndarray]] = {}
    for k, inside in enumerate(around):
        if len(inside) % 2:
            owner = max(inside, key=lambda j: len(around[j]))
            holes.setdefault(owner, []).append(rings[k][1])
    return [
        Polygon(name, ring, tuple(holes.get(k, ())))
        for k, (name, ring) in enumerate(rings)
        if len(around[k]) % 2 == 0
    ]


def _turn(yaw: float) -> np.ndarray:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
