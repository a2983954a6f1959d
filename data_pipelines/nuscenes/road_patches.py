"""The road around a car as areas and lines, cut out of a vector map for planning metrics.

Two pieces, both as the public evaluators cut them, so that their rasters can be repeated: the
drivable area in a square of 100 m (the nuScenes devkit's `get_map_mask`, used by OmniDrive), and
the road's boundary in 102.4 m along and 50 m across the car (BEV-Planner's vector map, which is
that of HDMapNet and MapTR): the outline of the union of all road segments and lanes, outer and
inner rings, without the 0.2 m at the piece's border where the cut itself would be an outline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely

from data_pipelines.nuscenes.map_layers import MapLayers, Polygon
from fastdrive_jax.evaluation.truth import Area

_AREA = (100.0, 100.0)  # metres along and across the car
_LINES = (102.4, 50.0)
_BORDER = 0.2
_POLYGON = 3  # GEOS type
_SLACK = 5.0  # metres around a piece at the first, coarse cut


@dataclass(frozen=True)
class RoadMap:
    """A map's polygons, indexed for cutting.

    Attributes:
        areas: Shapely polygons of the drivable area, in the map's order.
        area_tree: Index of `areas`.
        contours: Lists of polygons, each with its index, whose union is the road of the boundary
            lines. They are united list by list, since a closed line begins where the union does,
            and with it the points by which BEV-Planner replaces it.
    """

    areas: np.ndarray
    area_tree: Any
    contours: tuple[tuple[np.ndarray, Any], ...]


def road_map(layers: MapLayers) -> RoadMap:
    """Indexes a map.

    Boundary lines come from road segments and lanes. A map without road segments, such as that of a
    ScenarioNet log, has its drivable area taken instead: there the two differ, since the drivable
    area also has car parks and the like.
    """
    drivable = layers.polygons["drivable_area"].shapes
    segments, lanes = (layers.polygons[name].shapes for name in ("road_segment", "lane"))
    areas = _polygons(drivable)
    # An invalid drivable area is repaired, since leaving it out would call road no road; the vector
    # map leaves out invalid road segments and lanes.
    repaired = np.where(shapely.is_valid(areas), areas, shapely.make_valid(areas))
    areas = _parts(repaired)
    groups = [areas]
    if segments:
        groups = [_polygons(found) for found in (segments, lanes) if found]
        groups = [polygons[shapely.is_valid(polygons)] for polygons in groups]
    return RoadMap(
        areas,
        shapely.STRtree(areas),
        tuple((polygons, shapely.STRtree(polygons)) for polygons in groups),
    )


def road_patch(
    road: RoadMap, center: np.ndarray, yaw: float
) -> tuple[tuple[Area, ...], tuple[np.ndarray, ...]]:
    """Drivable areas and boundary lines around a car, in its frame.

    Args:
        road: Of the place.
        center: [2] the car in the map's frame, metres.
        yaw: Its heading there, radians.

    Returns:
        The areas in the map's order, and lines [n, 2].
    """
    areas = _cut(road.areas, road.area_tree, center, yaw, _AREA, coarsely=True)
    areas = _parts(areas)
    found = tuple(
        Area(_ring(ring), tuple(_ring(hole) for hole in holes)) for ring, holes in _rings(areas)
    )
    unions = [
        shapely.union_all(_cut(polygons, tree, center, yaw, _LINES))
        for polygons, tree in road.contours
    ]
    whole = _parts(np.array([shapely.union_all(unions)]))
    half = [side / 2 - _BORDER for side in _LINES]
    inside = shapely.box(-half[0], -half[1], half[0], half[1])
    lines = []
    for ring, holes in _rings(whole):
        # Clockwise outside and counterclockwise inside, since the raster of a line depends on its
        # direction.
        for outline in (_turned(ring, False), *(_turned(h, True) for h in holes)):
            line = shapely.intersection(outline, inside)
            if line.geom_type == "GeometryCollection":  # it also touches the border in a point
                line = shapely.multilinestrings(
                    [part for part in shapely.get_parts(line) if part.geom_type == "LineString"]
                )
            if line.geom_type == "MultiLineString":
                line = shapely.line_merge(line)
            lines += [
                shapely.get_coordinates(part)
                for part in shapely.get_parts(line)
                if part.geom_type in ("LineString", "LinearRing") and not part.is_empty
            ]
    return found, tuple(lines)


def _polygons(shapes: tuple[Polygon, ...]) -> np.ndarray:
    return np.array([shapely.Polygon(s.exterior, s.holes) for s in shapes], object)


def _parts(geometries: np.ndarray) -> np.ndarray:
    """The polygons in a list of anything, in order."""
    parts = shapely.get_parts(geometries)
    while (shapely.get_type_id(parts) > _POLYGON).any():  # collections, perhaps in collections
        parts = shapely.get_parts(parts)
    return parts[(shapely.get_type_id(parts) == _POLYGON) & ~shapely.is_empty(parts)]


def _cut(geometries, tree, center, yaw, sides, coarsely: bool = False) -> np.ndarray:
    """What of `geometries` lies in a rectangle around the car, in its frame.

    `coarsely` cuts along the map's axes first, which is cheap where an area has tens of thousands
    of corners.
    """
    cos, sin = np.cos(yaw), np.sin(yaw)
    axes = np.array([[cos, sin], [-sin, cos]])  # rows: forward and left
    half = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * np.array(sides) / 2
    corners = half @ axes + center
    patch = shapely.Polygon(corners)
    pieces = geometries[np.sort(tree.query(patch, predicate="intersects"))]
    if coarsely:
        low, high = corners.min(0) - _SLACK, corners.max(0) + _SLACK
        coarse = shapely.clip_by_rect(pieces, *low, *high)
        # It can leave what is not valid; that is cut from the whole.
        pieces = np.where(shapely.is_valid(coarse), coarse, pieces)
    pieces = shapely.intersection(pieces, patch)
    return shapely.transform(pieces, lambda points: (points - center) @ axes.T)


def _rings(polygons: np.ndarray):
    """Exterior and interiors of each polygon."""
    for polygon in polygons:
        yield polygon.exterior, tuple(polygon.interiors)


def _turned(ring, counterclockwise: bool):
    return ring if bool(shapely.is_ccw(ring)) == counterclockwise else shapely.reverse(ring)


def _ring(ring) -> np.ndarray:
    return shapely.get_coordinates(ring)[:-1]
