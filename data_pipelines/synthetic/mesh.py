"""Meshes: lists of flat polygons in an object's own frame (x forward, y left, z up).

Polygons are listed in the order in which they are painted. Those of one `group` share colour and
label, don't overlap on the screen and are filled in one call.
"""

from dataclasses import dataclass, replace

import numpy as np

CORNERS = 8  # every polygon is stored with 8 vertices; shorter ones repeat the last


@dataclass(frozen=True)
class Mesh:
    """Polygons of one object.

    Attributes:
        vertices: `[M, 8, 3]` metres.
        colours: `[M, 3]` RGB, 0..255.
        labels: `[M]` class ids.
        groups: `[M]` increasing group numbers.
        culled: `[M]` True where the back side is not drawn.
        glowing: `[M]` True where light and haze leave the colour alone.
        billboard: Turned about the vertical to face the camera.
        radius: Distance of the farthest vertex from the origin.
    """

    vertices: np.ndarray
    colours: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    culled: np.ndarray
    glowing: np.ndarray
    billboard: bool
    radius: float


def scaled(mesh: Mesh, factors) -> Mesh:
    """The mesh with its x, y and z stretched by `factors` `[3]`."""
    vertices = mesh.vertices * np.asarray(factors, float)
    return replace(mesh, vertices=vertices, radius=float(np.linalg.norm(vertices, axis=-1).max()))


def only(mesh: Mesh, label: int) -> Mesh:
    """The polygons of a mesh that are of one class."""
    kept = mesh.labels == label
    names = ("vertices", "colours", "labels", "culled", "glowing")
    groups = np.unique(mesh.groups[kept], return_inverse=True)[1].astype(np.int32)
    return replace(mesh, groups=groups, **{name: getattr(mesh, name)[kept] for name in names})


class MeshBuilder:
    """Collects polygons, then freezes them into a `Mesh`."""

    def __init__(self, label: int):
        self.label = label
        self._groups = []

    def add(self, polygons, colour, label=None, culled=True, glowing=False):
        """Adds polygons `[P, n <= 8, 3]` as one group of one colour."""
        block = np.asarray(polygons, float)
        short = CORNERS - block.shape[1]
        if short:
            block = np.concatenate([block] + [block[:, -1:]] * short, 1)
        label = self.label if label is None else label
        self._groups.append((block, colour, label, culled, glowing))

    def box(self, centre, size, colour, label=None, top=1.0, faces="fblrt"):
        """Adds a box; `top` scales its upper face, `faces` picks front, back, left, right, top."""
        (x, y, z), (length, width, height) = centre, size
        a, b, c = length / 2, width / 2, height / 2
        lower = [(x + i * a, y + j * b, z - c) for i, j in ((1, 1), (1, -1), (-1, -1), (-1, 1))]
        upper = [
            (x + i * a * top, y + j * b * top, z + c)
            for i, j in ((1, 1), (1, -1), (-1, -1), (-1, 1))
        ]
        sides = {
            "f": [lower[1], lower[0], upper[0], upper[1]],
            "r": [lower[2], lower[1], upper[1], upper[2]],
            "b": [lower[3], lower[2], upper[2], upper[3]],
            "l": [lower[0], lower[3], upper[3], upper[0]],
            "t": [upper[1], upper[0], upper[3], upper[2]],
        }
        for face in faces:
            self.add([sides[face]], colour, label)

    def build(self, billboard: bool = False) -> Mesh:
        """Freezes the polygons."""
        blocks, colours, labels, culled, glowing = zip(*self._groups, strict=True)
        sizes = [len(block) for block in blocks]
        vertices = np.concatenate(blocks)
        return Mesh(
            vertices,
            np.repeat(np.array(colours, float), sizes, 0),
            np.repeat(np.array(labels, np.uint8), sizes),
            np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            np.repeat(np.array(culled, bool), sizes),
            np.repeat(np.array(glowing, bool), sizes),
            billboard,
            float(np.linalg.norm(vertices, axis=-1).max()),
        )


def facing(y, z, width, height, x=0.0, sign=-1):
    """Rectangle in a plane of constant x; `sign` -1 faces backwards, +1 forwards."""
    a, b = width / 2 * sign, height / 2
    return [(x, y - a, z - b), (x, y + a, z - b), (x, y + a, z + b), (x, y - a, z + b)]


def beside(x, z, length, height, y, sign):
    """Rectangle in a plane of constant y; `sign` +1 faces left, -1 right."""
    a, b = length / 2 * sign, height / 2
    return [(x + a, y, z - b), (x - a, y, z - b), (x - a, y, z + b), (x + a, y, z + b)]


def disc(centre, radius, axis="x", sign=-1, corners=8):
    """Regular polygon about `centre`, facing along `sign` times the axis."""
    angles = np.arange(corners) * 2 * np.pi / corners + np.pi / corners
    p, q = radius * np.cos(angles) * sign, radius * np.sin(angles)
    x, y, z = centre
    if axis == "x":
        return np.stack([np.full(corners, x), y + p, z + q], -1)
    return np.stack([x - p, np.full(corners, y), z + q], -1)
