"""Draws ground and actors into a canvas, far to near."""

from dataclasses import dataclass

import cv2
import numpy as np

from data_pipelines.synthetic.config import GROUND, LANE_MARK
from data_pipelines.synthetic.scene import Scene
from data_pipelines.synthetic.view import NEAR, Canvas, View, clip, fill_shadow, fixed_point

_FAR = 130.0
_MARKS_FAR = 70.0


@dataclass(frozen=True)
class Stage:
    """Arrays of a scene that all its pictures share; made once by `prepare`.

    Attributes:
        outlines: Rings of each ground polygon on the terrain, each `[n, 3]`, the outer one first.
        reaches: `[S, 4]` centre and radius of each ground polygon.
        shadows: Shadow outline `[n, 3]` of each actor that stands still, else None.
        paints: `[S, 3]` their colours.
        paint_labels: `[S]` their classes.
        vertices: `[M, 8, 3]` polygons of all actors in their own frames.
        colours: `[M, 3]`.
        labels: `[M]`.
        groups: `[M]` polygons filled in one call share a number.
        culled: `[M]` drawn from the front only.
        glowing: `[M]` untouched by light and haze.
        owner: `[M]` actor of each polygon.
        radius: `[A]` reach of each actor in metres.
        billboard: `[A]` turned towards the camera.
    """

    outlines: list[list[np.ndarray]]
    reaches: np.ndarray
    shadows: list[np.ndarray | None]
    paints: np.ndarray
    paint_labels: list[int]
    vertices: np.ndarray
    colours: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    culled: np.ndarray
    glowing: np.ndarray
    owner: np.ndarray
    radius: np.ndarray
    billboard: np.ndarray


def prepare(scene: Scene) -> Stage:
    """Collects what every picture of `scene` needs."""
    look = scene.look
    paints = {
        "pavement": look.pavement,
        "asphalt": look.asphalt,
        "white": (226, 226, 222),
        "yellow": (226, 178, 52),
    }
    meshes = [a.mesh for a in scene.actors]
    starts = np.cumsum([0] + [m.groups[-1] + 1 for m in meshes])[:-1]
    outlines = [[scene.terrain.lift(o) for o in (s.outline, *s.holes)] for s in scene.strips]
    outer = [rings[0] for rings in outlines]
    middles = [(o.min(0) + o.max(0)) / 2 for o in outer]
    radii = [np.linalg.norm(o - m, axis=1).max() for o, m in zip(outer, middles, strict=True)]
    return Stage(
        outlines=outlines,
        reaches=np.concatenate([np.array(middles), np.array(radii)[:, None]], 1),
        shadows=[
            _shadow(scene, a, np.asarray(a.xy), a.yaw) if a.motion is None else None
            for a in scene.actors
        ],
        paints=np.array([paints[s.paint] for s in scene.strips], float),
        paint_labels=[s.label for s in scene.strips],
        vertices=np.concatenate([m.vertices for m in meshes]),
        colours=np.concatenate([m.colours for m in meshes]),
        labels=np.concatenate([m.labels for m in meshes]),
        groups=np.concatenate([m.groups + k for m, k in zip(meshes, starts, strict=True)]),
        culled=np.concatenate([m.culled for m in meshes]),
        glowing=np.concatenate([m.glowing for m in meshes]),
        owner=np.repeat(np.arange(len(meshes)), [len(m.groups) for m in meshes]),
        radius=np.array([m.radius for m in meshes]),
        billboard=np.array([m.billboard for m in meshes]),
    )


def draw_ground(scene: Scene, stage: Stage, view: View, canvas: Canvas):
    """Draws open ground below the skyline, then pavements, roads and marks."""
    canvas.fill([fixed_point(_skyline(scene, view))], scene.look.grass, GROUND)
    middles, radii = view.local(stage.reaches[:, :3]), stage.reaches[:, 3]
    seen = _may_be_seen(view, middles, radii)
    seen &= (np.array(stage.paint_labels) != LANE_MARK) | (middles[:, 2] - radii < _MARKS_FAR)
    for k in np.flatnonzero(seen):
        # Filled in one call, where a ring within another one cuts a hole.
        rings = [clip(view.local(ring)) for ring in stage.outlines[k]]
        rings = [fixed_point(view.pixels(ring)) for ring in rings if len(ring) >= 3]
        if rings:
            canvas.fill(rings, stage.paints[k], stage.paint_labels[k])


def _may_be_seen(view: View, middles, radii):
    """Whether balls at `middles` `[n, 3]` (camera coordinates) reach into the field of view."""
    slope = (
        0.5 * view.width / view.focal[0] + abs(view.centre[0] - 0.5 * view.width) / view.focal[0]
    )
    outside = (np.abs(middles[:, 0]) - slope * middles[:, 2]) / np.hypot(1.0, slope)
    return (middles[:, 2] > NEAR - radii) & (outside < radii)


def _skyline(scene, view):
    columns = np.linspace(-0.1 * view.width, 1.1 * view.width, 25)
    across = ((columns - view.centre[0]) / view.focal[0])[:, None]
    rays = (across * view.rotation[:, 0] + view.rotation[:, 2])[:, :2]
    rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    distances = np.array([15.0, 25, 35, 50, 70, 100, 150, 250])
    spots = view.eye[:2] + distances[:, None, None] * rays
    pixels = view.pixels(view.local(scene.terrain.lift(spots)))
    top = pixels[pixels[..., 1].argmin(0), np.arange(len(columns))]
    foot = [[1.5 * view.width, view.height + 50.0], [-0.5 * view.width, view.height + 50.0]]
    return np.concatenate([top, foot])


def draw_actors(scene: Scene, stage: Stage, view: View, canvas: Canvas, time: float, ego_s: float):
    """Draws all actors far to near.

    Returns:
        Shadow mask `[H, W]` uint8, and (actor, first number, end number, outline area in pixels)
        of each actor drawn.
    """
    poses = [a.pose(time, ego_s) for a in scene.actors]
    spots = np.array([p[0] for p in poses])
    away = scene.terrain.lift(spots) - view.eye
    towards_camera = np.arctan2(away[:, 1], away[:, 0])
    yaws = np.where(stage.billboard, towards_camera, [p[1] for p in poses])
    local = away @ view.rotation
    seen = _may_be_seen(view, local, stage.radius + 1.5) & (local[:, 2] < _FAR)
    seen &= np.array([a.present(time) for a in scene.actors], bool)

    chosen = np.flatnonzero(seen[stage.owner])
    owner = stage.owner[chosen]
    world = _turned(stage.vertices[chosen], yaws[owner]) + away[owner][:, None]
    points = world @ view.rotation
    normals = np.cross(world[:, 1] - world[:, 0], world[:, 2] - world[:, 1])
    front = ((normals * world[:, 0]).sum(1) < 0) | ~stage.culled[chosen]
    whole = points[..., 2].min(1) > NEAR
    drawn = front & (points[..., 2].max(1) > NEAR)
    colours = _lit(scene.look, stage, chosen, normals, points)
    pixels = fixed_point(view.pixels(points))

    shadows = np.zeros((view.height, view.width), np.uint8)
    fill_shadow(shadows, _shadows(scene, stage, view, np.flatnonzero(seen), spots, yaws))
    drawings = []
    bounds = np.searchsorted(owner, np.arange(len(poses) + 1))
    for actor in np.argsort(-np.hypot(away[:, 0], away[:, 1]), kind="stable"):
        rows = np.arange(bounds[actor], bounds[actor + 1])
        rows = rows[drawn[rows]]
        if not len(rows):
            continue
        begin, outline = len(canvas), []
        groups = stage.groups[chosen[rows]]
        for members in np.split(rows, np.flatnonzero(np.diff(groups)) + 1):
            polygons = [
                pixels[r] if whole[r] else fixed_point(view.pixels(clip(points[r])))
                for r in members
            ]
            polygons = [p for p in polygons if len(p) >= 3]
            if polygons:
                head = chosen[members[0]]
                canvas.fill(polygons, colours[members[0]], int(stage.labels[head]))
                outline += polygons
        if outline:
            hull = cv2.convexHull(np.concatenate(outline))
            area = cv2.contourArea(hull) / fixed_point(np.ones(1))[0] ** 2
            drawings.append((int(actor), begin, len(canvas), float(area)))
    return shadows, drawings


def _turned(vertices, yaws):
    c, s = np.cos(yaws)[:, None], np.sin(yaws)[:, None]
    x, y = vertices[..., 0], vertices[..., 1]
    return np.stack([x * c - y * s, x * s + y * c, vertices[..., 2]], -1)


def _lit(look, stage, chosen, normals, points):
    length = np.maximum(np.linalg.norm(normals, axis=1), 1e-9)
    slant = np.where(stage.culled[chosen], normals @ look.sun / length, 0.5)
    light = look.ambient + (1 - look.ambient) * 1.25 * np.clip(slant, 0, 1)
    fade = np.exp(-np.maximum(points[..., 2].mean(1), 0) / look.haze)[:, None]
    colour = stage.colours[chosen]
    dull = np.clip(colour * light[:, None], 0, 255) * fade + look.sky[1] * (1 - fade)
    return np.where(stage.glowing[chosen][:, None], colour, dull)


def _shadows(scene, stage, view, actors, spots, yaws):
    for k in actors:
        outline = stage.shadows[k]
        if outline is None and scene.actors[k].motion is not None:
            outline = _shadow(scene, scene.actors[k], spots[k], yaws[k])
        if outline is None:
            continue
        polygon = clip(view.local(outline))
        if len(polygon) >= 3:
            yield view.pixels(polygon)


def _shadow(scene, actor, xy, yaw):
    """Flat shadow `[n, 3]` below an actor, moved away from the sun; None where there is none."""
    top = float(actor.mesh.vertices[..., 2].max())
    if actor.mesh.billboard:
        half = np.array([0.15, 0.15]) * top
    elif actor.category:
        half = np.array([actor.size[1], actor.size[0]]) * 0.52
    else:
        half = np.abs(actor.mesh.vertices[..., :2]).max((0, 1)) * 1.02
        if top > 3.2 and half.max() < 6:  # masts cast next to nothing
            return None
    c, s = np.cos(yaw), np.sin(yaw)
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * half
    corners = corners @ np.array([[c, s], [-s, c]]) + xy
    sun = scene.look.sun
    cast = corners - min(top, 3.0) * 0.17 * sun[:2] / sun[2]
    flat = cv2.convexHull(np.concatenate([corners, cast]).astype(np.float32))[:, 0]
    return scene.terrain.lift(flat.astype(float))
