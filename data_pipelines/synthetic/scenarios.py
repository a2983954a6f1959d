"""The situations that the driver meets; each is fully decided by what the front picture shows."""

from dataclasses import dataclass, field

import numpy as np

from data_pipelines.schema import LEFT, RIGHT, STRAIGHT
from data_pipelines.synthetic import meshes
from data_pipelines.synthetic.geometry import Path, path_through
from data_pipelines.synthetic.planner import Task
from data_pipelines.synthetic.roads import (
    LANE_WIDTH,
    Road,
    Strip,
    crosswalk,
    main_road,
    side_road,
    stop_line,
    turn_route,
)
from data_pipelines.synthetic.scene import Actor, Motion

# One cycle of scenes; hazards that change the plan outnumber the look-alikes that must not.
CYCLE = (
    "red_light",
    "person_on_road",
    "barrier_avoid",
    "turn_left",
    "lead_stopped",
    "curve",
    "turn_right",
    "lead_slow",
    "stop_sign",
    "person_on_pavement",
    "red_light",
    "barrier_avoid",
    "curve",
    "person_on_road",
    "green_light",
    "turn_right",
    "lead_moving",
    "turn_left",
    "lead_stopped",
    "straight_over_junction",
    "free",
)
PAINTS = (
    (200, 30, 36), (30, 70, 170), (235, 235, 235), (40, 42, 46), (150, 154, 160), (228, 180, 40),
    (30, 110, 70), (120, 40, 110), (90, 150, 200), (196, 96, 40), (90, 70, 54), (178, 186, 120),
)  # fmt: skip
SKINS = ((226, 178, 146), (190, 138, 104), (130, 88, 62), (246, 206, 178))
LEAD_SPEEDS = {"lead_slow_truck": 2.5, "lead_slow_bicycle": 4.0, "lead_moving": 7.0}


@dataclass
class Situation:
    """Parts of a scene that the scenario decides; filled in by `build`."""

    main: Road
    task: Task
    branches: list = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)
    actors: list[Actor] = field(default_factory=list)
    command: int = STRAIGHT
    command_end: float = -np.inf
    oncoming: bool = True
    speed: float = 6.0
    critical_points: list = field(default_factory=list)  # ([x, y, height], needed until arc length)


def paint(rng):
    """A car or shirt colour."""
    return tuple(float(np.clip(c + rng.normal(0, 12), 10, 250)) for c in rng.choice(PAINTS))


def make_person(rng) -> meshes.Mesh:
    """A person in random clothes."""
    return meshes.person(
        paint(rng),
        tuple(0.5 * c for c in paint(rng)),
        tuple(rng.choice(SKINS)),
        tuple(rng.choice([(30, 24, 20), (90, 60, 30), (200, 170, 100)])),
        rng.uniform(0.0, 0.16),
        rng.uniform(0.95, 1.12),
    )


def car_actor(rng, xy, yaw, braking=False, motion=None, critical=None) -> Actor:
    """An annotated car of random size and colour."""
    size = (rng.uniform(1.8, 2.0), rng.uniform(4.2, 4.9), rng.uniform(1.5, 1.8))
    moving = motion is not None
    attribute = "vehicle.moving" if moving else "vehicle.stopped" if braking else "vehicle.parked"
    mesh = meshes.car(paint(rng), braking, size)
    xy = (float(xy[0]), float(xy[1]))
    return Actor(mesh, xy, float(yaw), "vehicle.car", attribute, size, motion, critical)


def person_actor(rng, xy, critical=None, motion=None) -> Actor:
    """An annotated pedestrian."""
    attribute = "pedestrian.standing" if motion is None else "pedestrian.moving"
    mesh = make_person(rng)
    height = float(mesh.vertices[..., 2].max())
    return Actor(
        mesh,
        (float(xy[0]), float(xy[1])),
        float(rng.uniform(-np.pi, np.pi)),
        "human.pedestrian.adult",
        attribute,
        (0.7, 0.7, height),
        motion,
        critical,
    )


def _lane(road: Road) -> Path:
    points, _ = road.centre.beside(np.arange(-49.0, 118.0, 0.5), road.ego_offset)
    return path_through(points, road.centre.beside(0.0, road.ego_offset)[0])


def _junction(rng, main: Road, s: float, sides) -> list:
    return [
        (s, side, side_road(main, s, side, rng.uniform(-0.18, 0.18), rng.normal(0, 1 / 120)))
        for side in sides
    ]


def build(name: str, rng: np.random.Generator, standing: bool = False) -> Situation:
    """Draws one situation called `name` (an entry of `CYCLE`).

    Args:
        name: Which.
        rng: Random source.
        standing: The car stands; before a green light it stands at the line.
    """
    two_lanes = name.startswith(("turn", "barrier", "straight")) or rng.random() < 0.75
    speed = float(rng.uniform(0.0, 3.0) if rng.random() < 0.15 else rng.uniform(2.5, 12.0))
    # Where things happen grows with the speed, so that they change the coming seconds.
    where = float(rng.uniform(9 + 1.4 * speed, 15 + 2.2 * speed))
    if standing:
        at_line = name == "green_light"
        speed, where = 0.0, float(rng.uniform(*((5.2, 8.0) if at_line else (9.0, 24.0))))
    crossing = None
    if name in ("turn_left", "turn_right"):
        speed = min(speed, 9.5)
        crossing = float(rng.uniform(12 + 0.7 * speed, 20 + 1.5 * speed))
    elif name == "straight_over_junction":
        crossing = where
    elif name.endswith("light") and two_lanes and rng.random() < 0.6:
        crossing = where + 8.5
    straight = None if crossing is None else (crossing - 14.0, crossing + 14.0)
    curves = []
    if name == "curve":
        begin, sign = rng.uniform(2, 10 + speed), rng.choice([-1, 1])
        radius = rng.uniform(18, 60)
        curves = [(begin, begin + rng.uniform(0.6, 1.3) * radius, sign / radius)]
    main = main_road(rng, two_lanes, curves, straight)
    lane = _lane(main)
    sit = Situation(main, Task(lane), speed=speed)
    if crossing is not None:
        _add_junction(name, rng, sit, crossing)
    if name in ("red_light", "green_light"):
        _add_light(name.split("_")[0], rng, sit, where)
    elif name == "stop_sign":
        xy, yaw = main.centre.beside(where + rng.uniform(2, 4), -main.half_width - 1.0)
        sign = Actor(meshes.stop_sign(), tuple(xy), float(yaw), critical_height=2.5)
        sit.actors.append(sign)
        sit.strips.append(stop_line(main, where))
        sit.task = Task(lane, stops=(where,))
    elif name == "person_on_road":
        xy, _ = lane.beside(where, rng.uniform(-1.1, 1.1))
        sit.actors.append(person_actor(rng, xy, critical=1.1))
        if rng.random() < 0.35:
            xy, _ = lane.beside(where + rng.uniform(0, 1.5), rng.uniform(-1.2, 1.2))
            sit.actors.append(person_actor(rng, xy))
        sit.task = Task(lane, stops=(where - 1.2,))
    elif name == "person_on_pavement":
        for _ in range(rng.integers(2, 5)):
            s = where + rng.uniform(-8, 8)
            side = rng.choice([-1, 1], p=[0.7, 0.3])
            xy, _ = main.centre.beside(s, side * (main.half_width + rng.uniform(0.7, 1.6)))
            sit.actors.append(person_actor(rng, xy))
    elif name.startswith("lead"):
        _add_lead(name, rng, sit, where)
    elif name == "barrier_avoid":
        _add_barrier(rng, sit, where)
    return sit


def _add_junction(name, rng, sit: Situation, s: float):
    if name.startswith("turn"):
        side = 1 if name == "turn_left" else -1
        others = [-side] if rng.random() < 0.4 else []
        sit.branches = _junction(rng, sit.main, s, [side, *others])
        route = turn_route(sit.main, sit.branches[0][2], 10.0 if side == 1 else 7.0)
        sit.task = Task(route)
        sit.command = LEFT if side == 1 else RIGHT
        turning = [a for a in np.arange(0.0, route.end - 2, 0.5) if abs(route.curvature(a)) > 0.05]
        sit.command_end = float(turning[-1]) if turning else 0.0
        mouth, _ = sit.branches[0][2].centre.at(sit.main.half_width + 3.0)
        sit.critical_points.append((np.append(mouth, 0.0), float(turning[0]) - 7.0))
        sit.oncoming = side == -1
    else:
        sides = [[1], [-1], [1, -1]][rng.integers(0, 3)]
        sit.branches = _junction(rng, sit.main, s, sides)
        if rng.random() < 0.4:
            sit.strips += crosswalk(sit.main, s - sit.main.half_width - 4.2)


def _add_light(state: str, rng, sit: Situation, s: float):
    main = sit.main
    sit.strips.append(stop_line(main, s))
    head = s + rng.uniform(13.0, 17.0)
    reach = main.half_width + 0.8 + main.ego_offset + rng.uniform(-0.4, 0.8)
    lateral, bottom = -main.half_width - 0.8, 3.6
    if rng.random() < 0.35:  # on a pole beside the road instead of an arm above it
        reach, bottom = 0.0, 3.0
    xy, yaw = main.centre.beside(head, lateral)
    mesh = meshes.traffic_light(state, reach, bottom)
    critical = bottom + (2.4 if state == "red" else 0.5)
    light = Actor(mesh, tuple(xy), float(yaw), critical_height=critical, centre=(0.0, reach))
    sit.actors.append(light)
    if state == "red":
        sit.task = Task(sit.task.route, stops=(s,))
    if rng.random() < 0.3:
        sit.strips += crosswalk(main, s + 1.2)


def _add_lead(name, rng, sit: Situation, where: float):
    lane = sit.task.route
    if name == "lead_stopped":
        xy, yaw = lane.beside(where + 2.4, rng.uniform(-0.25, 0.25))
        actor = car_actor(rng, xy, yaw, braking=True, critical=0.8)
        sit.actors.append(actor)
        sit.task = Task(lane, lead=(where + 2.4 - actor.size[1] / 2, 0.0))
        return
    if name == "lead_moving":
        kind, s = name, sit.speed * 0.8 + rng.uniform(8, 18)
    else:
        kind = str(rng.choice(["lead_slow_truck", "lead_slow_bicycle"]))
        s = sit.speed * 1.3 + rng.uniform(8, 20)
    speed = LEAD_SPEEDS[kind]
    motion = Motion(lane, s, speed, float(rng.uniform(-0.25, 0.25)))
    if kind == "lead_moving":
        actor = car_actor(rng, (0, 0), 0.0, motion=motion, critical=0.8)
    elif kind == "lead_slow_truck":
        size = (2.3, 5.6, 2.7)
        actor = Actor(meshes.slow_truck(size), (0, 0), 0.0, "vehicle.construction",
                      "vehicle.moving", size, motion, 1.6)  # fmt: skip
    else:
        size = (0.8, 1.9, 1.85)
        actor = Actor(meshes.cyclist(paint(rng), size), (0, 0), 0.0, "vehicle.bicycle",
                      "cycle.with_rider", size, motion, 1.2)  # fmt: skip
    sit.actors.append(actor)
    sit.task = Task(lane, lead=(s - actor.size[1] / 2, speed))


def _add_barrier(rng, sit: Situation, where: float):
    """Closes part of the ego lane from the right; the route passes it on the left."""
    lane = sit.task.route
    begin, length = where, rng.uniform(4.0, 9.0)
    shift = rng.uniform(1.5, 2.9)
    inner = shift - 1.45  # lateral end of the obstruction: half a car and 0.5 m beside the route
    rows = [begin, begin + length]
    first = True
    for s in rows:
        for lateral in np.arange(inner - 0.8, -LANE_WIDTH / 2 - 0.2, -1.75):
            xy, yaw = lane.beside(s, lateral)
            size = (1.6, 0.45, 1.1)
            critical = 0.7 if first else None
            sit.actors.append(
                Actor(
                    meshes.barrier(size),
                    tuple(xy),
                    float(yaw),
                    category="movable_object.barrier",
                    size=size,
                    critical_height=critical,
                )
            )
            first = False
    for s in np.arange(begin + 2.0, begin + length - 1.0, 2.0):
        xy, yaw = lane.beside(s, inner - 0.3)
        size = (0.6, 0.6, 1.0)
        sit.actors.append(Actor(meshes.cone(size), tuple(xy), float(yaw),
                                "movable_object.trafficcone", "", size))  # fmt: skip
    s = np.arange(lane.start, lane.end, 0.5)
    out = np.clip((s - (begin - 4.5 - 11.0)) / 11.0, 0, 1)
    back = np.clip((s - (begin + length + 1.0)) / 11.0, 0, 1)
    offset = shift * (0.5 - 0.5 * np.cos(np.pi * out)) * (0.5 + 0.5 * np.cos(np.pi * back))
    points, _ = lane.beside(s, offset)
    route = path_through(points, lane.at(0.0)[0])
    sit.task = Task(route, slow_zone=(begin - 6.0, begin + length, 6.0))
    sit.oncoming = False
