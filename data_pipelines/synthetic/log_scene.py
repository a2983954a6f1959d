"""A recorded drive as a scene: its map and its road users, drawn by the renderer of the world.

The ground is flat and, off the road, paved; road lines have lost their pattern in the log, so
yellow ones are drawn whole and white ones broken. Road users keep the class, the size and the way
that they were logged with, and are there only while they were annotated: they react to nobody.
Their looks are made up, and so are weather and light. Lights and signs are in no log.
"""

import zlib
from dataclasses import replace

import numpy as np

from data_pipelines.geometry import Pose
from data_pipelines.nuscenes.scenario_log import ScenarioLog, Track
from data_pipelines.schema import CAMERAS, STRAIGHT
from data_pipelines.synthetic import meshes
from data_pipelines.synthetic.config import BARRIER, LANE_MARK, ROAD, VEHICLE
from data_pipelines.synthetic.geometry import Path, Terrain, path_through, rotation_z
from data_pipelines.synthetic.mesh import Mesh, MeshBuilder, only, scaled
from data_pipelines.synthetic.planner import EgoState, Task
from data_pipelines.synthetic.roads import MARK_WIDTH, Road, Strip
from data_pipelines.synthetic.sampler import draw_look
from data_pipelines.synthetic.scenarios import make_person, paint
from data_pipelines.synthetic.scene import Actor, Recording, Scene

REACH = 90.0  # metres around the driven way within which the map is taken over
STANDING = 0.5  # metres; who moved less over the whole log is parked
_LANE_HALF = 1.75
_BEHIND, _AHEAD = 20.0, 60.0  # metres of route before the first and beyond the last logged place


def log_scene(log: ScenarioLog, seed: int = 0) -> Scene:
    """The scene of a log, in a frame whose origin is the car's first place, x along its heading.

    Args:
        log: A drive.
        seed: Decides looks, weather and light.
    """
    start = log.pose(0)
    base = Pose(rotation_z(float(log.ego.heading[0])), np.append(start.translation[:2], 0.0))
    route = logged_route(log, base)
    return Scene(
        name=log.name,
        scenario="log",
        main=Road(route, _LANE_HALF, 0.0),
        branches=(),
        strips=(*_surface(log, base, route), *_marks(log, base, route)),
        terrain=Terrain((0.0, 0.0), np.eye(2), (0.0, 0.0)),
        task=Task(route),
        command=STRAIGHT,
        command_end=-np.inf,
        start=logged_states(log, base, route)[0],
        actors=tuple(_actor(track, log.rate, base, seed) for track in log.others),
        look=_look(log.name, seed),
        pitch=dict.fromkeys(CAMERAS, 0.0),
        sway=np.zeros((1, 2)),
        world_yaw=float(log.ego.heading[0]),
        world_shift=base.translation,
        location=log.location,
        split="val",
    )


def scene_frame(scene: Scene) -> Pose:
    """The frame of a scene within the frame of its log."""
    return Pose(rotation_z(scene.world_yaw), scene.world_shift)


def logged_route(log: ScenarioLog, base: Pose) -> Path:
    """The logged way, made longer straight ahead and behind; `base` is the scene's frame."""
    places = _local(base, log.ego.position)[:, :2]
    kept = [0]
    for k in range(1, len(places)):
        if np.hypot(*(places[k] - places[kept[-1]])) >= 0.5:
            kept.append(k)
    way = places[kept]
    first, last = (log.ego.heading[k] - log.ego.heading[0] for k in (0, -1))
    before = way[0] - np.arange(_BEHIND, 0, -1.0)[:, None] * [np.cos(first), np.sin(first)]
    after = way[-1] + np.arange(1.0, _AHEAD + 1)[:, None] * [np.cos(last), np.sin(last)]
    return path_through(np.concatenate([before, way, after]), way[0])


def logged_states(log: ScenarioLog, base: Pose, route: Path) -> list[EgoState]:
    """The recording car at each step of the log."""
    places = _local(base, log.ego.position)[:, :2]
    yaws = np.unwrap(log.ego.heading) - log.ego.heading[0]
    ahead = np.stack([np.cos(yaws), np.sin(yaws)], -1)
    speeds = (np.gradient(places, 1 / log.rate, axis=0) * ahead).sum(1)
    gains = np.gradient(speeds, 1 / log.rate)
    rates = np.gradient(yaws, 1 / log.rate)
    states, s = [], 0.0
    for k, (x, y) in enumerate(places):
        s = route.project((x, y), around=s)
        numbers = (x, y, yaws[k], speeds[k], s, gains[k], rates[k])
        states.append(EgoState(*(float(v) for v in numbers)))
    return states


def _local(base: Pose, points: np.ndarray) -> np.ndarray:
    flat = np.array(points, float)
    if flat.shape[1] == 2:
        flat = np.concatenate([flat, np.zeros((len(flat), 1))], 1)
    return base.inverse().apply(flat)


def _surface(log, base, route) -> list[Strip]:
    area = log.layers.polygons["drivable_area"]
    strips = []
    for shape, bounds in zip(area.shapes, area.bounds, strict=True):
        # Bounds are of the log's frame; a box around a polygon is enough to leave out the far ones.
        corners = _local(base, np.array([bounds[[0, 1]], bounds[[2, 3]]]))[:, :2]
        middle, radius = corners.mean(0), np.linalg.norm(corners[1] - corners[0]) / 2
        if np.hypot(*(route.points - middle).T).min() < radius + REACH:
            rings = [_local(base, ring)[:, :2] for ring in (shape.exterior, *shape.holes)]
            strips.append(Strip(rings[0], ROAD, "asphalt", tuple(rings[1:])))
    return strips


def _marks(log, base, route) -> list[Strip]:
    strips = []
    for layer, colour, whole in (
        ("lane_divider", "white", False),
        ("road_divider", "yellow", True),
    ):
        for shape in log.layers.lines[layer].shapes:
            points = _local(base, shape.points)[:, :2]
            lengths = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
            painted = 6.0 if whole else 2.5
            for begin in np.arange(0.0, lengths[-1] - 0.5, 6.0):
                s = np.linspace(begin, min(begin + painted, lengths[-1]), 5)
                piece = np.stack([np.interp(s, lengths, points[:, k]) for k in (0, 1)], -1)
                if np.hypot(*(route.points - piece[2]).T).min() < REACH:
                    strips.append(Strip(_ribbon(piece), LANE_MARK, colour))
    return strips


def _ribbon(points: np.ndarray) -> np.ndarray:
    along = np.gradient(points, axis=0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-6)
    aside = MARK_WIDTH / 2 * np.stack([-along[:, 1], along[:, 0]], -1)
    return np.concatenate([points + aside, (points - aside)[::-1]])


def _look(name: str, seed: int):
    look = draw_look(np.random.default_rng([seed, zlib.crc32(name.encode())]))
    return replace(look, grass=look.pavement)  # a town is paved


def _actor(track: Track, rate: float, base: Pose, seed: int) -> Actor:
    valid = np.flatnonzero(track.valid)
    steps = np.arange(len(track.valid))
    # Where it is not known it waits at the nearest place where it is.
    nearest = valid[np.abs(steps[:, None] - valid).argmin(1)] if len(valid) else steps
    xy = _local(base, track.position)[nearest, :2]
    yaw = np.zeros(len(steps))
    yaw[valid] = np.unwrap(track.heading[valid]) - np.arctan2(*base.rotation[[1, 0], 0])
    moves = bool(len(valid) and np.ptp(xy[valid], axis=0).max() > STANDING)
    known = track.size[valid] if len(valid) else track.size
    size = tuple(float(v) for v in np.median(known, axis=0))
    rng = np.random.default_rng([seed, zlib.crc32(track.token.encode())])
    return Actor(
        mesh=_mesh(track.category, size, moves, rng),
        xy=(float(xy[0, 0]), float(xy[0, 1])),
        yaw=float(yaw[nearest][0]),
        category=track.category,
        attribute=_attribute(track.category, moves),
        size=size,
        motion=Recording(steps / rate, xy, yaw[nearest], track.valid),
    )


def _attribute(category: str, moves: bool) -> str:
    if category.startswith("human"):
        return "pedestrian.moving" if moves else "pedestrian.standing"
    if category in ("vehicle.bicycle", "vehicle.motorcycle"):
        return "cycle.with_rider" if moves else "cycle.without_rider"
    if category.startswith("vehicle"):
        return "vehicle.moving" if moves else "vehicle.parked"
    return ""


def _mesh(category: str, size, moves: bool, rng) -> Mesh:
    """A model of the fitting kind and the logged (width, length, height)."""
    width, length, height = size
    if category.startswith("human"):
        return scaled(make_person(rng), np.full(3, height / 1.95))
    if category in ("vehicle.bicycle", "vehicle.motorcycle"):
        mesh = meshes.cyclist(paint(rng))
        mesh = mesh if moves else only(mesh, VEHICLE)
        return scaled(mesh, (length / 1.9, width / 0.8, height / (1.85 if moves else 1.1)))
    if category.startswith("vehicle.bus"):
        return scaled(meshes.bus(paint(rng)), (length / 10.0, width / 2.6, height / 3.1))
    if category == "vehicle.construction":
        return meshes.slow_truck(size)
    if category in ("vehicle.truck", "vehicle.trailer", "vehicle.emergency.ambulance"):
        return meshes.truck(paint(rng), size)
    if category.startswith("vehicle"):
        return meshes.car(paint(rng), False, size)
    if category == "movable_object.barrier":
        return meshes.barrier(size)
    if category == "movable_object.trafficcone":
        return scaled(meshes.cone(), (length / 0.6, width / 0.6, height / 1.0))
    block = MeshBuilder(BARRIER)
    block.box((0, 0, height / 2), (length, width, height), (128, 118, 104))
    return block.build()
