"""Plane curves, gentle terrain and rotations; metres and radians throughout."""

import math
from dataclasses import dataclass

import numpy as np

STEP = 0.5  # metres between the points of a path


@dataclass(frozen=True)
class Path:
    """A plane curve sampled every `STEP` metres.

    Attributes:
        points: `[n, 2]` positions.
        headings: `[n]` unwrapped tangent angles.
        start: Arc length of the first point (may be negative).
    """

    points: np.ndarray
    headings: np.ndarray
    start: float

    @property
    def end(self) -> float:
        """Arc length of the last point."""
        return self.start + STEP * (len(self.points) - 1)

    def at(self, s):
        """Position `[..., 2]` and heading `[...]` at arc length(s) `s`, held at the ends."""
        last = len(self.points) - 1
        index = np.minimum(np.maximum((np.asarray(s, float) - self.start) / STEP, 0.0), last)
        low = np.minimum(index.astype(int), last - 1)
        share = index - low
        xy = self.points[low] + share[..., None] * (self.points[low + 1] - self.points[low])
        heading = self.headings[low] + share * (self.headings[low + 1] - self.headings[low])
        return xy, heading

    def beside(self, s, lateral):
        """Position `[..., 2]` at `lateral` metres to the left of arc length `s`, and heading."""
        xy, heading = self.at(s)
        normal = np.stack([-np.sin(heading), np.cos(heading)], -1)
        return xy + np.asarray(lateral, float)[..., None] * normal, heading

    def curvature(self, s):
        """Signed curvature in 1/m at `s`, averaged over about 2 m."""
        ahead, behind = self.at(np.asarray(s) + 1.0)[1], self.at(np.asarray(s) - 1.0)[1]
        return (ahead - behind) / 2.0

    def project(self, xy, around: float | None = None, window: float = 6.0) -> float:
        """Arc length of the point nearest to `xy`, searched near `around` where given."""
        low, high = 0, len(self.points)
        if around is not None:
            centre = (around - self.start) / STEP
            low = int(np.clip(centre - window / STEP, 0, high - 2))
            high = int(np.clip(centre + window / STEP, low + 2, high))
        near = low + int(np.argmin(((self.points[low:high] - xy) ** 2).sum(-1)))
        tangent = (math.cos(self.headings[near]), math.sin(self.headings[near]))
        offset = np.asarray(xy) - self.points[near]
        return self.start + STEP * near + float(offset[0] * tangent[0] + offset[1] * tangent[1])


def path_from_curvature(curvature: np.ndarray, zero: int) -> Path:
    """Integrates curvatures `[n]` so that point `zero` is the origin, heading along +x."""
    headings = np.concatenate([[0.0], np.cumsum(curvature[:-1] * STEP)])
    headings = headings - headings[zero]
    middle = (headings[:-1] + headings[1:]) / 2
    steps = STEP * np.stack([np.cos(middle), np.sin(middle)], -1)
    points = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])
    return Path(points - points[zero], headings, -zero * STEP)


def path_through(points: np.ndarray, origin) -> Path:
    """Resamples a polyline `[n, 2]` evenly; arc length 0 lies nearest to `origin` `[2]`."""
    lengths = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    grid = np.arange(0.0, lengths[-1], STEP)
    even = np.stack([np.interp(grid, lengths, points[:, k]) for k in (0, 1)], -1)
    delta = np.diff(even, axis=0)
    headings = np.unwrap(np.arctan2(delta[:, 1], delta[:, 0]))
    headings = np.concatenate([headings[:1], (headings[1:] + headings[:-1]) / 2, headings[-1:]])
    path = Path(even, headings, 0.0)
    return Path(even, headings, -path.project(np.asarray(origin, float)))


@dataclass(frozen=True)
class Terrain:
    """Gentle hills: two plane waves, so that every road, person and tree shares one height.

    Attributes:
        slopes: Largest grade of each wave (0.06 is 6%).
        waves: `[2, 2]` wave vectors in rad/m.
        phases: Phase of each wave.
    """

    slopes: tuple[float, float]
    waves: np.ndarray
    phases: tuple[float, float]

    def height(self, xy):
        """Height `[...]` of points `[..., 2]`; zero at the origin."""
        amplitude = np.asarray(self.slopes) / np.linalg.norm(self.waves, axis=1)
        phase = np.asarray(xy) @ self.waves.T + np.asarray(self.phases)
        return (amplitude * (np.sin(phase) - np.sin(self.phases))).sum(-1)

    def gradient(self, xy):
        """Grade `[2]` (dz/dx, dz/dy) at one point `[2]`."""
        unit = self.waves / np.linalg.norm(self.waves, axis=1, keepdims=True)
        phase = np.asarray(xy) @ self.waves.T + np.asarray(self.phases)
        return (np.asarray(self.slopes) * np.cos(phase)) @ unit

    def lift(self, xy, above=0.0):
        """Points `[..., 3]` on the ground below `xy`, raised by `above`."""
        xy = np.asarray(xy, float)
        return np.concatenate([xy, (self.height(xy) + above)[..., None]], -1)


def rotation_z(yaw: float) -> np.ndarray:
    """Rotation `[3, 3]` about the vertical."""
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def pose_on(terrain: Terrain, xy, yaw: float, pitch: float = 0.0, roll: float = 0.0):
    """Vehicle-to-world rotation `[3, 3]` and origin `[3]` of a vehicle standing on the terrain.

    Args:
        terrain: The ground.
        xy: Position of the rear axle `[2]`.
        yaw: Heading seen from above.
        pitch: Extra nose-down angle of the body.
        roll: Extra angle about the vehicle's own x axis.
    """
    slope = terrain.gradient(xy)
    up = np.array([-slope[0], -slope[1], 1.0])
    up /= np.linalg.norm(up)
    forward = np.array([math.cos(yaw), math.sin(yaw), 0.0])
    forward[2] = slope @ forward[:2]
    forward /= np.linalg.norm(forward)
    base = np.stack([forward, np.cross(up, forward), up], 1)
    cp, sp, cr, sr = math.cos(pitch), math.sin(pitch), math.cos(roll), math.sin(roll)
    lean = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    tilt = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return base @ lean @ tilt, terrain.lift(xy)


def quaternion(rotation: np.ndarray) -> list[float]:
    """Unit quaternion [w, x, y, z] with w >= 0 of a rotation matrix `[3, 3]`."""
    m = rotation
    symmetric = np.array(
        [
            [m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
            [0, m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]],
            [0, 0, m[1, 1] - m[0, 0] - m[2, 2], m[1, 2] + m[2, 1]],
            [0, 0, 0, m[2, 2] - m[0, 0] - m[1, 1]],
        ]
    )
    symmetric = symmetric + np.triu(symmetric, 1).T
    vector = np.linalg.eigh(symmetric)[1][:, -1]
    return [float(x) for x in (vector if vector[0] >= 0 else -vector)]
