"""Scenery and bystanders that never change the plan: the background and the look-alikes."""

import numpy as np

from data_pipelines.synthetic import meshes, scenery
from data_pipelines.synthetic.roads import LANE_WIDTH, Road
from data_pipelines.synthetic.scenarios import Situation, car_actor, paint, person_actor
from data_pipelines.synthetic.scene import Actor, Motion

_WALLS = (
    (168, 108, 84), (196, 178, 150), (146, 150, 158), (208, 204, 196),
    (118, 96, 84), (176, 150, 98), (96, 110, 128), (202, 160, 140),
)  # fmt: skip
_LEAVES = ((62, 104, 42), (88, 118, 48), (44, 84, 50), (128, 122, 44), (150, 98, 40))


class Layout:
    """Keeps scenery off the roads and out of each other."""

    def __init__(self, roads: list[Road]):
        self._centres = np.concatenate([road.centre.points[::2] for road in roads])
        self._widths = np.concatenate(
            [np.full(len(road.centre.points[::2]), road.half_width) for road in roads]
        )
        self._taken = [np.zeros((0, 3))]

    def free(self, xy, radius: float, margin: float = 0.3) -> bool:
        """Whether a disc clears every road edge by `margin` and all that was placed before."""
        away = np.hypot(*(self._centres - xy).T) - self._widths
        if away.min() < radius + margin:
            return False
        taken = np.concatenate(self._taken)
        return not (np.hypot(*(taken[:, :2] - xy).T) < taken[:, 2] + radius).any()

    def take(self, xy, radius: float):
        """Marks a disc as used."""
        self._taken.append(np.array([[xy[0], xy[1], radius]]))


def decorate(sit: Situation, rng: np.random.Generator, pavement: float) -> list[Actor]:
    """Draws the scenery of a situation: `[actors]`, none of which the driver reacts to."""
    roads = [sit.main] + [road for _, _, road in sit.branches]
    layout = Layout(roads)
    density = rng.uniform(0.5, 1.0)
    leaves = _LEAVES[rng.integers(0, len(_LEAVES))]
    actors = []
    actors += _parked(sit, rng, layout)
    for road in roads:
        begin = -42.0 if road is sit.main else 10.0
        actors += _row(
            road, begin, min(road.centre.end, 95.0), rng, layout, pavement, density, leaves
        )
    actors += _skyline(rng, layout)
    actors += _traffic(sit, rng)
    actors += _people(sit, rng, layout, pavement)
    actors += _signs(sit, rng, layout)
    return actors


def _parked(sit, rng, layout):
    actors = []
    for side in (1, -1):
        chance = rng.choice([0.0, 0.15, 0.35])
        for s in np.arange(-24.0, 70.0, 6.5):
            if rng.random() > chance:
                continue
            offset = sit.main.half_width + rng.uniform(1.35, 1.7)
            xy, yaw = sit.main.centre.beside(s + rng.uniform(-0.5, 0.5), side * offset)
            # The four corners decide, since a disc around a car would reach into its own road.
            if not layout.free(xy, 0.9, 0.25):
                continue
            layout.take(xy, 1.8)
            facing = yaw + (np.pi if side == 1 and sit.main.ego_offset else 0.0)
            facing = float(facing + rng.normal(0, 0.03))
            if rng.random() < 0.12:
                xy, _ = sit.main.centre.beside(s, side * (offset + 0.5))
                actors.append(_bus(rng, xy, facing, None))
            else:
                actors.append(car_actor(rng, xy, facing))
    return actors


def _row(road, begin, end, rng, layout, pavement, density, leaves):
    actors = []
    edge = road.half_width + pavement
    for side in (1, -1):
        s = begin
        while s < end:
            length, depth = rng.uniform(8, 18), rng.uniform(7, 12)
            s += length * 0.5
            if rng.random() < density * 0.8:
                xy, yaw = road.centre.beside(s, side * (edge + rng.uniform(2, 11) + depth / 2))
                radius = np.hypot(length, depth) / 2
                if layout.free(xy, radius * 0.8, pavement):
                    layout.take(xy, radius * 0.85)
                    wall = _WALLS[rng.integers(0, len(_WALLS))]
                    wall = tuple(float(np.clip(c + rng.normal(0, 12), 20, 240)) for c in wall)
                    mesh = scenery.building(rng, length, depth, rng.uniform(4, 14), wall)
                    actors.append(Actor(mesh, tuple(xy), float(yaw)))
            s += length * 0.5 + rng.uniform(1, 8)
        for s in np.arange(begin, end, 5.0):
            place = s + rng.uniform(-2, 2)
            if rng.random() < 0.6 * density:
                xy, _ = road.centre.beside(place, side * (edge + rng.uniform(0.5, 9)))
                if layout.free(xy, 0.8, 1.0):
                    layout.take(xy, 0.8)
                    tint = tuple(float(np.clip(c * rng.uniform(0.75, 1.2), 0, 255)) for c in leaves)
                    height = rng.uniform(4, 9)
                    mesh = (
                        scenery.tree(rng, height, tint)
                        if rng.random() < 0.7
                        else scenery.bush(rng, tint)
                    )
                    actors.append(Actor(mesh, tuple(xy), 0.0))
            if rng.random() < 0.5 * density:
                xy, yaw = road.centre.beside(
                    place + 2, side * (road.half_width + rng.uniform(0.9, 4))
                )
                if layout.free(xy, 0.5, 0.3):
                    layout.take(xy, 0.6)
                    turned = float(yaw + rng.normal(0, 0.3))
                    actors.append(Actor(scenery.clutter(rng), tuple(xy), turned))
    return actors


def _skyline(rng, layout):
    actors = []
    for _ in range(rng.integers(6, 14)):
        angle, away = rng.uniform(-np.pi, np.pi), rng.uniform(55, 110)
        xy = (20 + away * np.cos(angle), away * np.sin(angle))
        if layout.free(xy, 12.0, 6.0):
            layout.take(xy, 12.0)
            wall = _WALLS[rng.integers(0, len(_WALLS))]
            size = rng.uniform(10, 20), rng.uniform(10, 18), rng.uniform(10, 34)
            actors.append(Actor(scenery.building(rng, *size, wall), xy, float(angle)))
    return actors


def _traffic(sit, rng):
    main = sit.main
    actors = []
    if main.ego_offset and sit.oncoming:
        s = rng.uniform(8, 26)
        while s < 90 and rng.random() < 0.65:
            motion = Motion(main.centre, float(s), -float(rng.uniform(5, 9)), LANE_WIDTH / 2)
            if rng.random() < 0.15:
                actors.append(_bus(rng, (0, 0), 0.0, motion))
                break
            actors.append(car_actor(rng, (0, 0), 0.0, motion=motion))
            s += rng.uniform(14, 40)
    if rng.random() < 0.5:
        motion = Motion(sit.task.route, -float(rng.uniform(9, 18)), 1.0, 0.0, follows_ego=True)
        actors.append(car_actor(rng, (0, 0), 0.0, motion=motion))
    for _, side, branch in sit.branches:
        uses = sit.command != 1 and branch is sit.branches[0][2]
        if not uses and rng.random() < 0.4:
            xy, yaw = branch.centre.beside(branch.half_width + 9.0, -branch.ego_offset)
            actors.append(car_actor(rng, xy, yaw + np.pi, braking=bool(rng.random() < 0.5)))
        del side
    return actors


def _bus(rng, xy, yaw, motion):
    size = (2.5, 9.0, 3.1)
    attribute = "vehicle.moving" if motion else "vehicle.parked"
    place = (float(xy[0]), float(xy[1]))
    mesh = meshes.bus(paint(rng), size)
    return Actor(mesh, place, yaw, "vehicle.bus.rigid", attribute, size, motion)


def _people(sit, rng, layout, pavement):
    actors = []
    main = sit.main
    for _ in range(rng.integers(0, 6)):
        side = rng.choice([-1, 1])
        s, lateral = (
            rng.uniform(4, 50),
            main.half_width + rng.uniform(0.8, max(1.0, pavement - 0.3)),
        )
        xy, _ = main.centre.beside(s, side * lateral)
        if not layout.free(xy, 0.35, 0.4):
            continue
        motion = None
        if rng.random() < 0.5 and not sit.branches:
            motion = Motion(main.centre, float(s), float(rng.choice([-1.2, 1.2])), side * lateral)
        else:
            layout.take(xy, 0.4)
        actors.append(person_actor(rng, xy, motion=motion))
    return actors


def _signs(sit, rng, layout):
    actors = []
    main = sit.main
    for _ in range(rng.integers(0, 4)):
        side = rng.choice([-1, 1], p=[0.7, 0.3])
        xy, yaw = main.centre.beside(
            rng.uniform(8, 55), side * (main.half_width + rng.uniform(0.8, 2))
        )
        if layout.free(xy, 0.3, 0.4):
            layout.take(xy, 0.4)
            turned = float(yaw) + (np.pi if side == 1 else 0.0)
            actors.append(Actor(meshes.other_sign(int(rng.integers(0, 4))), tuple(xy), turned))
    if rng.random() < 0.35:
        # Boards above the road; far beyond any signal, so that they never hide its lamps.
        s = rng.uniform(24, 60)
        if not any(a.critical_height for a in sit.actors if not a.category) or s > 48:
            xy, yaw = main.centre.beside(s, -main.half_width - 1.2)
            if layout.free(xy, 0.4, 0.4):
                layout.take(xy, 0.5)
                span = 2 * main.half_width + 1.2
                actors.append(Actor(meshes.gantry(rng, span), tuple(xy), float(yaw)))
    if rng.random() < 0.35 and not any(a.critical_height for a in sit.actors if not a.category):
        # A head for the oncoming traffic: we see its back.
        xy, yaw = main.centre.beside(rng.uniform(15, 45), main.half_width + 0.9)
        if layout.free(xy, 0.3, 0.4):
            mesh = meshes.traffic_light("off", 0.0, 2.8)
            actors.append(Actor(mesh, tuple(xy), float(yaw) + np.pi))
    return actors
