"""What happened on a drive, and the driving score.

The score follows the CARLA leaderboard 2.0 (leaderboard.carla.org, "Driving Score"): the completed
share of the route times the product of a penalty for each infraction, with its coefficients; what
was driven off the road does not count as completed. Different here: the whole of a route is what
the world's own driver, or the logged car, covers in the same time; a route ends with a collision;
and who is hit while standing, or from behind, is not to blame, as in nuPlan's closed-loop metrics
("no at-fault collisions"), since no road user here reacts.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from data_pipelines.closed_loop.route import Route, StopLine
from data_pipelines.synthetic.config import ROAD
from data_pipelines.synthetic.planner import DT, FRONT_OVERHANG
from data_pipelines.synthetic.scene import Actor, Scene
from fastdrive_jax.evaluation.footprint import corners, touching

LENGTH, WIDTH = 4.084, 1.85  # metres, the recording car of nuScenes
CENTRE = FRONT_OVERHANG - LENGTH / 2  # rear axle to the middle of the car
PENALTY = {"person": 0.5, "vehicle": 0.6, "obstacle": 0.65, "red_light": 0.7, "stop_sign": 0.8}
STANDING = 0.1  # m/s
STUCK_SECONDS = 3.0
STUCK_SHORT = 3.0  # metres behind the reference at which a standing car is stuck
TOLERANCE = 0.3  # metres over the edge of the road that do not count, as in nuPlan
CORRIDOR = 3.0  # metres beside the route within which progress counts
END_OF_ROAD = 8.0  # metres of route that are left when a drive is complete
X, Y, YAW, SPEED, S, GAIN, RATE = range(7)  # columns of a drive's states
_CELL = 0.1  # metres
_GRAZE = 1e-6  # metres that a collision goes beyond touching
_MARGIN = 30.0  # metres around the route beyond which nothing is road


@dataclass(frozen=True)
class Verdict:
    """How a route was driven.

    Attributes:
        score: Driving score, 0 to 1.
        success: Completed to 90% or more without an infraction.
        completion: Share of the reference's way, 0 to 1, before off-road driving is taken off.
        collision: "person", "vehicle" or "obstacle", whichever was hit, or "".
        collision_time: Seconds, or None.
        struck: Road users that ran into the car from behind or while it stood; not counted.
        red_light: Whether a red light was run.
        stop_sign: Whether a stop sign was run.
        off_road: Share of the driven metres with a corner off the road.
        off_road_time: Seconds at which it first was, or None.
        stuck: It stood for the last 3 s, more than 3 m short of the reference.
        deviation: Greatest distance to the route, metres.
        braking: Greatest deceleration, m/s^2.
        jerk: Greatest change of acceleration over half a second, m/s^3.
        lateral: Greatest lateral acceleration, m/s^2.
        end: States before and with the last one that counts.
    """

    score: float
    success: bool
    completion: float
    collision: str
    collision_time: float | None
    struck: int
    red_light: bool
    stop_sign: bool
    off_road: float
    off_road_time: float | None
    stuck: bool
    deviation: float
    braking: float
    jerk: float
    lateral: float
    end: int


def judge(route: Route, states: np.ndarray) -> Verdict:
    """What happened on a drive.

    Args:
        route: What was to be driven.
        states: `[steps + 1, 7]` x, y, yaw, speed, s, acceleration and yaw rate every `DT` seconds.
    """
    states = np.asarray(states, np.float64)
    finish = route.path.end - END_OF_ROAD
    done = np.flatnonzero(states[:, S] >= finish)
    end = int(done[0]) + 1 if len(done) else len(states)
    hit, kind, struck = collisions(route, states[:end])
    end = end if hit is None else hit + 1
    driven = states[:end]
    passed = [line.kind for line in route.lines if runs(route, line, driven)]
    outside = off_road(route, driven)
    metres = np.concatenate([[0.0], np.hypot(*np.diff(driven[:, :2], axis=0).T)])
    share = float(metres[outside].sum() / metres.sum()) if metres.sum() > 1e-6 else 0.0
    aside = distance_to(route, driven)
    near = driven[aside <= CORRIDOR, S]
    last = min(len(states), len(route.reference)) - 1
    start = route.reference[0].s  # a route of the world begins behind the origin of its path
    whole = min(max(state.s for state in route.reference[: last + 1]), finish) - start
    reached = float(near.max(initial=start)) - start
    # Where the reference itself stands, standing is all that is asked for.
    completion = float(np.clip(reached / whole, 0.0, 1.0)) if whole > 1.0 else 1.0
    still = driven[-round(STUCK_SECONDS / DT) :, SPEED]
    short = whole - reached > STUCK_SHORT
    stuck = kind == "" and not len(done) and bool((still < STANDING).all() and short)
    infractions = ([kind] if kind else []) + passed
    score = completion * (1 - share) * math.prod(PENALTY[name] for name in infractions)
    gap = 5
    jerk = np.abs(driven[gap:, GAIN] - driven[:-gap, GAIN]) / (gap * DT)
    return Verdict(
        score=score,
        success=completion >= 0.9 and not infractions and share == 0,
        completion=completion,
        collision=kind,
        collision_time=None if hit is None else hit * DT,
        struck=struck,
        red_light="red_light" in passed,
        stop_sign="stop_sign" in passed,
        off_road=share,
        off_road_time=float(outside.argmax() * DT) if outside.any() else None,
        stuck=stuck,
        deviation=float(aside.max()),
        braking=float(max(0.0, -driven[:, GAIN].min())),
        jerk=float(jerk.max(initial=0.0)),
        lateral=float(np.abs(driven[:, SPEED] * driven[:, RATE]).max()),
        end=end,
    )


def ego_boxes(states: np.ndarray) -> np.ndarray:
    """Boxes `[n, 5]` of the car at states `[n, 7]`: x, y, yaw, length, width."""
    yaw = states[:, YAW]
    middle = states[:, :2] + CENTRE * np.stack([np.cos(yaw), np.sin(yaw)], -1)
    return _boxes(middle, yaw, LENGTH, WIDTH)


def _boxes(middle, yaw, length, width):
    count = len(middle)
    sides = (np.broadcast_to(value, (count, 1)) for value in (length, width))
    return np.concatenate([middle, np.broadcast_to(yaw, count)[:, None], *sides], axis=1)


def actor_boxes(route: Route, actor: Actor, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes `[n, 5]` of a road user at a drive's times, and whether it is there `[n]`."""
    times = route.begin + np.arange(len(states)) * DT
    xy, yaw, there = np.asarray(actor.xy, float), actor.yaw, True
    if actor.motion is not None:
        xy, yaw = actor.motion.pose(times, states[:, S])
        there = getattr(actor.motion, "present", lambda t: True)(times)
    count, (width, length, _) = len(states), actor.size
    boxes = _boxes(np.broadcast_to(xy, (count, 2)), yaw, length, width)
    return boxes, np.broadcast_to(there, count)


def collisions(route: Route, states: np.ndarray) -> tuple[int | None, str, int]:
    """First collision that the car is to blame for.

    Returns:
        Its step and kind (None and "" if there is none), and how many ran into the car before it.
    """
    ego, yaw = ego_boxes(states), states[:, YAW]
    ahead = np.stack([np.cos(yaw), np.sin(yaw)], -1)
    first, kind, struck = None, "", []
    for actor in route.phases[0][1].actors:
        if not actor.category:
            continue
        box, there = actor_boxes(route, actor, states)
        reach = (math.hypot(actor.size[0], actor.size[1]) + math.hypot(LENGTH, WIDTH)) / 2
        offset = box[:, :2] - ego[:, :2]
        close = there & ((offset**2).sum(-1) < reach**2)
        if not close.any():
            continue
        touch = close & touching(ego, box, -_GRAZE)
        steps = np.flatnonzero(touch)
        if not len(steps) or steps[0] == 0:
            continue  # one that is inside the car from the start is a mistake of the log
        step = int(steps[0])
        behind = (offset[step] * ahead[step]).sum() < -LENGTH / 2
        if states[step, SPEED] < STANDING or behind:
            struck.append(step)
        elif first is None or step < first:
            first, kind = step, kind_of(actor.category)
    before = sum(first is None or step <= first for step in struck)
    return first, kind, before


def kind_of(category: str) -> str:
    """The kind "person", "vehicle" or "obstacle", by a nuScenes category."""
    if category.startswith("human"):
        return "person"
    return "vehicle" if category.startswith("vehicle") else "obstacle"


def runs(route: Route, line: StopLine, states: np.ndarray) -> bool:
    """Whether the front passes a line when it must not; a stop sign allows it after a halt."""
    place, heading = route.path.at(line.s)
    yaw = states[:, YAW]
    front = states[:, :2] + FRONT_OVERHANG * np.stack([np.cos(yaw), np.sin(yaw)], -1)
    offset = front - place
    along = offset @ [np.cos(heading), np.sin(heading)]
    across = offset @ [-np.sin(heading), np.cos(heading)]
    passes = (along[:-1] < 0) & (along[1:] >= 0) & (np.abs(across[1:]) < CORRIDOR)
    for step in np.flatnonzero(passes) + 1:
        halted = line.kind == "stop_sign" and bool(
            (states[:step, SPEED][along[:step] > -8.0] < STANDING).any()
        )
        if step * DT < line.until and not halted:
            return True
    return False


def off_road(route: Route, states: np.ndarray) -> np.ndarray:
    """Whether a corner of the car is off the road at each state, bool `[n]`."""
    road, low = road_image(route.phases[0][1])
    cells = np.floor((corners(ego_boxes(states)) - low) / _CELL).astype(int)
    inside = ((cells >= 0) & (cells < [road.shape[1], road.shape[0]])).all(-1)
    cells = np.where(inside[..., None], cells, 0)
    return ~(inside & (road[cells[..., 1], cells[..., 0]] > 0)).all(1)


def road_image(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The road, widened by the tolerance, as an image of 0.1 m cells, and its low corner `[2]`."""
    strips = [strip for strip in scene.strips if strip.label == ROAD]
    way = scene.task.route.points
    low, high = way.min(0) - _MARGIN, way.max(0) + _MARGIN
    columns, rows = np.ceil((high - low) / _CELL).astype(int)
    image = np.zeros((rows, columns), np.uint8)
    for strip in strips:
        rings = [np.rint((ring - low) / _CELL * 16).astype(np.int32) - 8
                 for ring in (strip.outline, *strip.holes)]  # fmt: skip
        part = np.zeros_like(image)
        cv2.fillPoly(part, rings, 1, cv2.LINE_8, 4)
        image |= part
    size = 2 * round(TOLERANCE / _CELL) + 1
    return cv2.dilate(image, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))), low


def distance_to(route: Route, states: np.ndarray) -> np.ndarray:
    """Distance to the route at each state, metres `[n]`."""
    points, _ = route.path.at(states[:, S])
    return np.hypot(*(states[:, :2] - points).T)
