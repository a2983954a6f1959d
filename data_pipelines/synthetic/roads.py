"""Roads, junctions and the marks painted on them, as flat strips on the ground."""

from dataclasses import dataclass

import numpy as np

from data_pipelines.synthetic.config import GROUND, LANE_MARK, ROAD
from data_pipelines.synthetic.geometry import STEP, Path, path_from_curvature, path_through

LANE_WIDTH = 2.8
MARK_WIDTH = 0.18


@dataclass(frozen=True)
class Road:
    """A road about its centre line; `ego_offset` is the lateral place of the right-hand lane."""

    centre: Path
    half_width: float
    ego_offset: float


@dataclass(frozen=True)
class Strip:
    """A flat polygon on the ground.

    Attributes:
        outline: `[n, 2]` metres.
        label: Class id.
        paint: Name of its colour, see draw.prepare.
        holes: `[m, 2]` each; what lies below shows through them.
    """

    outline: np.ndarray
    label: int
    paint: str
    holes: tuple[np.ndarray, ...] = ()


def main_road(rng: np.random.Generator, two_lanes: bool, curves, straight=None) -> Road:
    """A road from 50 m behind the start to 120 m ahead.

    Args:
        rng: Random source.
        two_lanes: One lane each way, or else one wide lane for the ego car alone.
        curves: (begin, end, curvature) pieces laid over a random gentle course.
        straight: (begin, end) kept straight, such as a junction.
    """
    s = np.arange(-50.0, 120.0, STEP)
    curvature = np.zeros_like(s)
    cut = -50.0
    while cut < 120.0:
        length = rng.uniform(15, 35)
        curvature[(s >= cut) & (s < cut + length)] = np.clip(
            rng.normal(0, 1 / 140), -1 / 70, 1 / 70
        )
        cut += length
    for begin, end, value in curves:
        curvature[(s >= begin) & (s < end)] = value
    if straight is not None:
        curvature[(s >= straight[0]) & (s < straight[1])] = 0.0
    curvature = np.convolve(np.pad(curvature, 4, mode="edge"), np.ones(9) / 9, "valid")
    path = path_from_curvature(curvature, zero=100)
    if two_lanes:
        return Road(path, LANE_WIDTH, -LANE_WIDTH / 2)
    return Road(path, rng.uniform(1.8, 2.2), 0.0)


def side_road(main: Road, s: float, side: int, bend: float, curvature: float) -> Road:
    """A road that leaves `main` at arc length `s`, to the left (`side` 1) or right (-1)."""
    origin, heading = main.centre.at(s)
    course = path_from_curvature(np.full(140, curvature), zero=0)
    angle = heading + side * np.pi / 2 + bend
    c, sn = np.cos(angle), np.sin(angle)
    points = course.points @ np.array([[c, sn], [-sn, c]]) + origin
    return Road(Path(points, course.headings + angle, 0.0), main.half_width, main.ego_offset)


def turn_route(main: Road, branch: Road, radius: float) -> Path:
    """The lane of `main`, an arc of `radius` metres and the lane of `branch`, joined smoothly."""
    lane, _ = main.centre.beside(np.arange(-50.0, 119.0, STEP), main.ego_offset)
    away, _ = branch.centre.beside(np.arange(0.0, 69.0, STEP), branch.ego_offset)
    near = int(np.argmin(((lane - away[8]) ** 2).sum(-1)))
    tangent = lane[near + 1] - lane[near]
    u, v = tangent / np.linalg.norm(tangent), away[9] - away[8]
    v /= np.linalg.norm(v)
    k = np.linalg.solve(np.stack([u, -v], 1), away[8] - lane[near])
    corner = lane[near] + k[0] * u
    angle = np.arccos(np.clip(u @ v, -1, 1))
    reach = radius * np.tan(angle / 2)
    sign = np.sign(u[0] * v[1] - u[1] * v[0])
    normal = sign * np.array([-u[1], u[0]])
    centre = corner - reach * u + radius * normal
    sweep = np.linspace(0, angle, 24)
    arc = centre + radius * (np.sin(sweep)[:, None] * u - np.cos(sweep)[:, None] * normal)
    before = lane[(lane - corner) @ u < -reach - 0.2]
    after = away[(away - corner) @ v > reach + 0.2]
    origin, _ = main.centre.beside(0.0, main.ego_offset)
    return path_through(np.concatenate([before, arc, after]), origin)


def corner_fill(main: Road, branch: Road, forward: int, radius: float) -> np.ndarray:
    """Asphalt of the rounded corner between two roads; `forward` -1 is the near corner."""
    origin, _ = branch.centre.at(0.0)
    s = main.centre.project(origin)
    _, heading = main.centre.at(s)
    u = forward * np.array([np.cos(heading), np.sin(heading)])
    v = branch.centre.points[1] - branch.centre.points[0]
    v = v / np.linalg.norm(v)
    side = np.sign(np.cross(np.append([np.cos(heading), np.sin(heading)], 0), np.append(v, 0))[2])
    normal_main = side * np.array([-np.sin(heading), np.cos(heading)])
    normal_branch = np.array([-v[1], v[0]])
    normal_branch = normal_branch if normal_branch @ u > 0 else -normal_branch
    base = origin
    matrix = np.stack([normal_main, normal_branch])
    corner = base + np.linalg.solve(matrix, [main.half_width, branch.half_width])
    angle = np.arccos(np.clip(u @ v, -1, 1))
    reach = radius / np.tan(angle / 2)
    first, last = corner + reach * u, corner + reach * v
    bisector = (u + v) / np.linalg.norm(u + v)
    centre = corner + bisector * radius / np.sin(angle / 2)
    a, b = first - centre, last - centre
    weights = np.linspace(0, 1, 9)[:, None]
    arc = a * (1 - weights) + b * weights
    arc = centre + radius * arc / np.linalg.norm(arc, axis=1, keepdims=True)
    inside = base + 0.9 * (corner - base)
    return np.concatenate([[inside], arc])


def band(path: Path, begin: float, end: float, left: float, right: float) -> np.ndarray:
    """Outline `[n, 2]` of the strip between two lateral offsets of a path."""
    count = max(2, int((end - begin) / 1.5) + 1)
    s = np.linspace(begin, end, count)
    outer, _ = path.beside(s, left)
    inner, _ = path.beside(s, right)
    return np.concatenate([outer, inner[::-1]])


def dashes(path: Path, begin: float, end: float, lateral: float) -> list[np.ndarray]:
    """Outlines of a broken line: 2.5 m painted of every 6 m."""
    half = MARK_WIDTH / 2
    starts = np.arange(np.ceil(begin / 6) * 6, end - 2.5, 6.0)
    return [band(path, s, s + 2.5, lateral + half, lateral - half) for s in starts]


def surface(main: Road, branches: list[tuple[float, int, Road]], pavement: float) -> list[Strip]:
    """Pavement, asphalt and marks of a road and its side roads, in painting order.

    Args:
        main: The through road.
        branches: (arc length on `main`, side, road) of each side road.
        pavement: Width of the pavement on both sides in metres.
    """
    roads = [(main.centre.start, main)] + [(0.0, road) for _, _, road in branches]
    strips = []
    for begin, road in roads:
        wide = road.half_width + pavement
        outline = band(road.centre, begin, road.centre.end, wide, -wide)
        strips.append(Strip(outline, GROUND, "pavement"))
    for begin, road in roads:
        outline = band(road.centre, begin, road.centre.end, road.half_width, -road.half_width)
        strips.append(Strip(outline, ROAD, "asphalt"))
    for _, _, road in branches:
        for forward in (1, -1):
            strips.append(Strip(corner_fill(main, road, forward, 4.5), ROAD, "asphalt"))
    gap = main.half_width + 5.5
    mouths = [(s, side) for s, side, _ in branches]
    for begin, road in roads:
        start = begin if road is main else gap
        edge = road.half_width - 0.22
        for side in (1, -1):
            cuts = sorted(s for s, mouth in mouths if mouth == side) if road is main else []
            pieces, low = [], start
            for cut in cuts:
                pieces.append((low, cut - gap))
                low = cut + gap
            pieces.append((low, road.centre.end))
            for low, high in pieces:
                a, b = side * edge + MARK_WIDTH / 2, side * edge - MARK_WIDTH / 2
                strips.append(Strip(band(road.centre, low, high, a, b), LANE_MARK, "white"))
        if road.ego_offset:
            for outline in dashes(road.centre, start, road.centre.end, 0.0):
                middle = road.centre.project(outline.mean(0))
                if road is main and any(abs(middle - s) < gap for s, _ in mouths):
                    continue
                strips.append(Strip(outline, LANE_MARK, "yellow"))
    return strips


def stop_line(road: Road, s: float) -> Strip:
    """A white line across the ego lane that ends at arc length `s`."""
    left = 0.0 if road.ego_offset else road.half_width - 0.3
    return Strip(band(road.centre, s, s + 0.6, left, -road.half_width + 0.3), LANE_MARK, "white")


def crosswalk(road: Road, s: float) -> list[Strip]:
    """White bars across the whole road from `s` to `s` + 2.5 m."""
    bars = np.arange(-road.half_width + 0.5, road.half_width - 0.3, 1.0)
    return [Strip(band(road.centre, s, s + 2.5, y + 0.5, y), LANE_MARK, "white") for y in bars]
