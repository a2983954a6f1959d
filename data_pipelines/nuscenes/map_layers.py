"""The vector maps of nuScenes: the map expansion v1.3, `ROOT/maps/expansion/LOCATION.json`."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from fastdrive_jax.errors import UserError
from fastdrive_jax.files import read_json

POLYGON_LAYERS = (
    "drivable_area",
    "road_segment",
    "road_block",
    "lane",
    "ped_crossing",
    "walkway",
    "stop_line",
    "carpark_area",
    "lane_connector",
)
LINE_LAYERS = ("road_divider", "lane_divider", "traffic_light")


@dataclass(frozen=True)
class Polygon:
    """An area of the ground.

    Attributes:
        token: Of its record; the polygons of one drivable area share it.
        exterior: [n, 2] metres, global frame, not closed by repeating the first point.
        holes: Of [m, 2] each.
    """

    token: str
    exterior: np.ndarray
    holes: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Line:
    """A line on the ground: `points` [n, 2] in metres, global frame; `token` of its record."""

    token: str
    points: np.ndarray


Shape = TypeVar("Shape", Polygon, Line)


@dataclass(frozen=True)
class Layer(Generic[Shape]):
    """The shapes of one layer.

    Attributes:
        shapes: In the file's order.
        bounds: [n, 4] least x, least y, greatest x, greatest y of each shape.
    """

    shapes: tuple[Shape, ...]
    bounds: np.ndarray

    def near(self, center_xy: Sequence[float], radius: float) -> Layer[Shape]:
        """The shapes whose bounding box comes within `radius` metres of a point [2]."""
        center = np.asarray(center_xy, np.float64)
        beyond = np.maximum(self.bounds[:, :2] - center, center - self.bounds[:, 2:])
        away = np.hypot(*np.maximum(beyond, 0.0).T)
        found = np.flatnonzero(away <= radius)
        return Layer(tuple(self.shapes[k] for k in found), self.bounds[found])


@dataclass(frozen=True)
class MapLayers:
    """The map of one place.

    Attributes:
        location: Such as "boston-seaport".
        size: Width and height of the mapped rectangle in metres.
        polygons: Layer of each name in `POLYGON_LAYERS`.
        lines: Layer of each name in `LINE_LAYERS`.
    """

    location: str
    size: tuple[float, float]
    polygons: Mapping[str, Layer[Polygon]]
    lines: Mapping[str, Layer[Line]]

    def near(self, center_xy: Sequence[float], radius: float) -> MapLayers:
        """What comes within `radius` metres of a point [2], by bounding boxes."""
        return MapLayers(
            self.location,
            self.size,
            {name: layer.near(center_xy, radius) for name, layer in self.polygons.items()},
            {name: layer.near(center_xy, radius) for name, layer in self.lines.items()},
        )

    def checksum(self) -> int:
        """Of all coordinates, to tell maps apart."""
        value = 0
        for name in sorted({*self.polygons, *self.lines}):
            value = zlib.crc32(name.encode(), value)
            layer = self.polygons.get(name) or self.lines[name]
            for shape in layer.shapes:
                for points in outlines(shape):
                    value = zlib.crc32(np.ascontiguousarray(points).tobytes(), value)
        return value


def outlines(shape: Polygon | Line) -> tuple[np.ndarray, ...]:
    """The point lists [n, 2] of a shape: exterior and holes, or the one line."""
    return (shape.exterior, *shape.holes) if isinstance(shape, Polygon) else (shape.points,)


def make_layer(shapes: Sequence[Shape]) -> Layer[Shape]:
    """A layer of shapes, with their bounds."""
    bounds = [np.r_[outlines(s)[0].min(0), outlines(s)[0].max(0)] for s in shapes]
    return Layer(tuple(shapes), np.array(bounds, np.float64).reshape(-1, 4))


def make_map(
    location: str,
    size: tuple[float, float],
    polygons: Mapping[str, Sequence[Polygon]],
    lines: Mapping[str, Sequence[Line]],
) -> MapLayers:
    """A map of the shapes given by layer name; the layers not named are empty."""
    return MapLayers(
        location,
        size,
        {name: make_layer(polygons.get(name, ())) for name in POLYGON_LAYERS},
        {name: make_layer(lines.get(name, ())) for name in LINE_LAYERS},
    )


def expansion_path(root: Path, location: str) -> Path:
    """The file of a place's vector map under the data set's root."""
    return Path(root) / "maps" / "expansion" / f"{location}.json"


def read_map_layers(root: Path, location: str) -> MapLayers | None:
    """Reads the vector map of a place.

    Args:
        root: Folder of the data set.
        location: Such as "boston-seaport".

    Returns:
        None where the expansion has no file of this place.

    Raises:
        UserError: The file is damaged, older than version 1.3, or a token in it leads nowhere.
    """
    path = expansion_path(root, location)
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a map expansion; download it again.")
    version = str(content.get("version", "1.0"))
    if version < "1.3":
        raise UserError(f"{path} is of map expansion {version}; download version 1.3 or later.")
    tables = _Tables(path, content)
    edge = content.get("canvas_edge")
    if not (isinstance(edge, list) and len(edge) == 2):
        raise UserError(f"{path} has no canvas_edge of two lengths; download it again.")
    return make_map(
        location,
        (float(edge[0]), float(edge[1])),
        {name: tuple(tables.areas(name)) for name in POLYGON_LAYERS},
        {name: tuple(tables.strokes(name)) for name in LINE_LAYERS},
    )


class _Tables:
    """The tables of one file, with its nodes as one array."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self._path, self._content = path, content
        nodes = self._rows("node", ("x", "y"))
        self._node = {row["token"]: k for k, row in enumerate(nodes)}
        try:
            self._xy = np.array([(row["x"], row["y"]) for row in nodes], np.float64).reshape(-1, 2)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path} has a node whose place is no number ({error}); download it again."
            ) from error
        wanted = ("exterior_node_tokens", "holes")
        self._polygon = {row["token"]: row for row in self._rows("polygon", wanted)}
        self._line = {row["token"]: row for row in self._rows("line", ("node_tokens",))}

    def areas(self, layer: str) -> Iterator[Polygon]:
        several = layer == "drivable_area"  # the one layer whose records have many polygons
        key = "polygon_tokens" if several else "polygon_token"
        for row in self._rows(layer, (key,)):
            for token in row[key] if several else [row[key]]:
                area = self._find(self._polygon, "polygon", token, f"{layer} {row['token']}")
                exterior = self._points(area["exterior_node_tokens"], 3, "polygon", token)
                holes = [
                    self._points(hole["node_tokens"], 3, "polygon", token)
                    for hole in area["holes"]
                    if hole["node_tokens"]
                ]
                yield Polygon(row["token"], exterior, tuple(holes))

    def strokes(self, layer: str) -> Iterator[Line]:
        for row in self._rows(layer, ("line_token",)):
            token = row["line_token"]
            line = self._find(self._line, "line", token, f"{layer} {row['token']}")
            yield Line(row["token"], self._points(line["node_tokens"], 2, "line", token))

    def _rows(self, table: str, fields: Sequence[str]) -> list[dict[str, Any]]:
        rows = self._content.get(table)
        if not isinstance(rows, list):
            raise UserError(f"{self._path} has no table {table!r}; download it again.")
        for row in rows:
            lacking = [name for name in ("token", *fields) if name not in row]
            if lacking:
                raise UserError(
                    f"A row of table {table!r} in {self._path} lacks {', '.join(lacking)} "
                    f"(token {row.get('token')}); download it again."
                )
        return rows

    def _find(self, table: dict, name: str, token: str, source: str) -> Any:
        try:
            return table[token]
        except KeyError:
            raise UserError(
                f"{source} in {self._path} refers to {name} {token}, which is not in it; "
                "download the file again."
            ) from None

    def _points(self, tokens: Sequence[str], least: int, kind: str, owner: str) -> np.ndarray:
        if len(tokens) < least:
            raise UserError(
                f"{kind} {owner} in {self._path} has {len(tokens)} nodes, fewer than {least}; "
                "download the file again."
            )
        source = f"{kind} {owner}"
        return self._xy[[self._find(self._node, "node", token, source) for token in tokens]]


class MapFolder(Mapping[str, MapLayers | None]):
    """The maps under a data set's root by location, each read when it is first asked for."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self._read: dict[str, MapLayers | None] = {}
        self._checksums: dict[str, int] | None = None

    def __getitem__(self, location: str) -> MapLayers | None:
        if location not in self._read:
            self._read[location] = read_map_layers(self.root, location)
        return self._read[location]

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(expansion_path(self.root, "x").parent.glob("*.json")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def checksums(self) -> dict[str, int]:
        """Of each file, to tell maps apart without reading them as maps."""
        if self._checksums is None:
            self._checksums = {
                name: zlib.crc32(expansion_path(self.root, name).read_bytes()) for name in self
            }
        return self._checksums
