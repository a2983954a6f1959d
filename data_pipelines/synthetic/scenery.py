"""Low-poly models of the background: trees, buildings and what stands about."""

import numpy as np

from data_pipelines.synthetic.config import BUILDING, GROUND, VEGETATION
from data_pipelines.synthetic.mesh import Mesh, MeshBuilder, beside, disc, facing


def tree(rng: np.random.Generator, height: float, colour) -> Mesh:
    """A trunk below a few irregular masses of leaves."""
    mesh = MeshBuilder(VEGETATION)
    trunk = [(0, -0.2, 0), (0, 0.2, 0), (0, 0.13, height * 0.5), (0, -0.13, height * 0.5)]
    mesh.add([trunk], (92, 66, 44), culled=False)
    for k in range(rng.integers(4, 8)):
        radius = height * rng.uniform(0.14, 0.26)
        y, z = rng.normal(0, height * 0.12), height * rng.uniform(0.5, 0.85)
        blob = disc((0, y, z), 1.0)
        stretch = rng.uniform(0.75, 1.2, (8, 1)) * radius
        blob = (blob - [0, y, z]) * stretch + [0, y, z]
        shade = 0.7 + 0.12 * k if k < 4 else rng.uniform(0.75, 1.25)
        mesh.add([blob], tuple(shade * c for c in colour), culled=False)
    return mesh.build(billboard=True)


def bush(rng: np.random.Generator, colour) -> Mesh:
    """Low leaves."""
    mesh = MeshBuilder(VEGETATION)
    for _ in range(3):
        y, z, radius = rng.normal(0, 0.5), rng.uniform(0.3, 0.6), rng.uniform(0.4, 0.7)
        blob = disc((0, y, z), radius)
        blob[:, 2] = np.maximum(blob[:, 2], 0.0)
        mesh.add([blob], tuple(rng.uniform(0.7, 1.2) * c for c in colour), culled=False)
    return mesh.build(billboard=True)


def building(rng: np.random.Generator, length: float, width: float, height: float, colour) -> Mesh:
    """A block with rows of windows, a door and, sometimes, a poster on each long side."""
    mesh = MeshBuilder(BUILDING)
    mesh.box((0, 0, height / 2), (length, width, height), colour)
    mesh.box(
        (0, 0, height + 0.15), (length * 1.02, width * 1.02, 0.35), tuple(0.6 * c for c in colour)
    )
    pane = tuple(rng.choice([(62, 78, 98), (44, 50, 62), (236, 214, 140), (150, 180, 205)]))
    storeys = np.arange(1.9, height - 1.0, rng.uniform(2.6, 3.4))
    pitch, wide = rng.uniform(1.9, 2.8), rng.uniform(0.9, 1.4)
    poster = tuple(rng.integers(40, 255, 3))
    for sign in (1, -1):
        xs = np.arange(-length / 2 + 1.2, length / 2 - 1.0, pitch)
        wall = sign * (width / 2 + 0.02)
        panes = [beside(x, z, wide, 1.4, wall, sign) for z in storeys for x in xs]
        if panes:
            mesh.add(panes, pane)
        mesh.add(
            [beside(rng.uniform(-0.3, 0.3) * length, 1.1, 1.4, 2.2, wall * 1.003, sign)],
            tuple(rng.integers(30, 150, 3)),
        )
        if rng.random() < 0.5:
            x, z = rng.uniform(-0.25, 0.25) * length, height * rng.uniform(0.4, 0.7)
            mesh.add([beside(x, z, 3.2, 2.0, wall * 1.006, sign)], poster)
            mesh.add([beside(x, z, 2.2, 0.7, wall * 1.009, sign)], tuple(255 - c for c in poster))
        ys = np.arange(-width / 2 + 1.2, width / 2 - 1.0, pitch)
        panes = [
            facing(y, z, wide, 1.4, sign * (length / 2 + 0.02), sign) for z in storeys for y in ys
        ]
        if panes:
            mesh.add(panes, pane)
    return mesh.build()


def clutter(rng: np.random.Generator) -> Mesh:
    """One of the things that stand about and never matter: bin, rock, post, bench, box, poster."""
    mesh = MeshBuilder(GROUND)
    kind = rng.integers(0, 6)
    tint = tuple(rng.integers(40, 230, 3))
    if kind == 0:
        mesh.box((0, 0, 0.55), (0.6, 0.6, 1.1), tint)
        mesh.box((0, 0, 1.15), (0.68, 0.68, 0.12), (40, 40, 44))
    elif kind == 1:
        mesh.box((0, 0, 0.3), (0.9, 1.2, 0.6), (132, 126, 118), top=0.55)
    elif kind == 2:
        mesh.box((0, 0, 3.0), (0.16, 0.16, 6.0), (84, 86, 90))
        mesh.box((0, 0.5, 5.9), (0.3, 1.0, 0.16), (84, 86, 90))
    elif kind == 3:
        mesh.box((0, 0, 0.45), (0.6, 1.7, 0.12), (128, 84, 48))
        mesh.box((0.25, 0, 0.8), (0.1, 1.7, 0.5), (128, 84, 48))
    elif kind == 4:
        mesh.box((0, 0, 0.6), (0.9, 0.9, 1.2), tint, top=0.96)
    else:
        mesh.box((0.1, 0, 1.3), (0.16, 1.7, 2.2), (60, 62, 66))
        mesh.add([facing(0, 1.45, 1.5, 1.7, 0.0)], tint)
        mesh.add([facing(0.1, 1.7, 0.8, 0.5, -0.01)], tuple(255 - c for c in tint))
        mesh.add([facing(-0.1, 1.1, 1.0, 0.3, -0.01)], tuple(rng.integers(30, 255, 3)))
    return mesh.build()
