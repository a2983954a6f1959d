"""The ego driver: a deterministic rule that uses only what the front picture shows.

Speed obeys an envelope: for each thing ahead that limits the speed to `v_c` at distance `d`, the
speed may not exceed sqrt(v_c^2 + 2 b d). Braking therefore begins late and is firm, so that a car
about to stop is often still fast, and the present speed alone does not tell the future. Steering is
pure pursuit along the route. There is no randomness and no memory.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from data_pipelines.schema import FUTURE_STEPS, STEP_SECONDS
from data_pipelines.synthetic.geometry import Path

DT = 0.1
CRUISE_SPEED = 9.0  # m/s, the same everywhere, so nothing unseen decides it
ACCELERATION = 2.0
BRAKE_STOP = 3.0  # m/s^2 used in the envelope of a stop or a lead vehicle
BRAKE_CURVE = 2.0
BRAKE_LIMIT = 6.0
LATERAL_ACCELERATION = 2.2
FRONT_OVERHANG = 3.7  # rear axle to front bumper
STOP_MARGIN = 1.5
FOLLOW_MARGIN, FOLLOW_TIME = 2.5, 0.6


@dataclass(frozen=True)
class Task:
    """What the driver has to respect, in arc length along the route.

    Attributes:
        route: Lane centre to follow, detours included.
        stops: Arc lengths that the front bumper must not pass.
        lead: (arc length of the lead's rear at time 0, its constant speed), or None.
        slow_zone: (begin, end, speed limit) of a passage beside barriers, or None.
        hold: Seconds from time 0 on during which the car may not set off.
    """

    route: Path
    stops: tuple[float, ...] = ()
    lead: tuple[float, float] | None = None
    slow_zone: tuple[float, float, float] | None = None
    hold: float = 0.0


@dataclass(frozen=True)
class EgoState:
    """Rear-axle pose and motion: metres, radians, m/s, m/s^2, rad/s; `s` is route progress."""

    x: float
    y: float
    yaw: float
    speed: float
    s: float
    acceleration: float = 0.0
    yaw_rate: float = 0.0


def _envelope(limit: float, distance: float, brake: float) -> float:
    return math.sqrt(limit * limit + 2 * brake * distance) if distance > 0 else limit


def speed_limit(task: Task, state: EgoState, time: float) -> float:
    """Highest speed in m/s that the route, stops, lead and zones allow at this state."""
    if time < task.hold - DT / 2:
        return 0.0
    ahead = np.arange(0.0, 40.0, 1.0)
    curvature = np.abs(task.route.curvature(state.s + ahead))
    corner = LATERAL_ACCELERATION / np.maximum(curvature, 1e-3)
    limit = float(np.sqrt(np.min(corner + 2 * BRAKE_CURVE * ahead)))
    for stop in task.stops:
        distance = stop - FRONT_OVERHANG - STOP_MARGIN - state.s
        limit = min(limit, _envelope(0.0, distance, BRAKE_STOP))
    if task.lead is not None:
        rear, lead_speed = task.lead
        gap = rear + lead_speed * time - state.s - FRONT_OVERHANG
        spare = gap - FOLLOW_MARGIN - FOLLOW_TIME * lead_speed
        calm = _envelope(lead_speed, spare, BRAKE_STOP)
        limit = min(limit, calm if spare > 0 else max(0.0, lead_speed + 0.7 * spare))
    if task.slow_zone is not None:
        begin, end, zone_speed = task.slow_zone
        if state.s < end:
            limit = min(limit, _envelope(zone_speed, begin - state.s, BRAKE_CURVE))
    return limit


def step(task: Task, state: EgoState, time: float) -> EgoState:
    """Advances the driver by `DT` seconds from `time`; usable in a closed loop as it stands."""
    free = state.speed + DT * ACCELERATION * (1 - (state.speed / CRUISE_SPEED) ** 4)
    free = max(free, state.speed - DT * ACCELERATION)
    speed = min(free, max(speed_limit(task, state, time), state.speed - DT * BRAKE_LIMIT))
    speed = speed if speed > 0.05 or free <= speed else 0.0
    look = 2.5 + 0.5 * state.speed
    target, _ = task.route.at(state.s + look)
    bearing = math.atan2(target[1] - state.y, target[0] - state.x) - state.yaw
    curvature = float(np.clip(2 * math.sin(bearing) / look, -0.22, 0.22))
    travelled = DT * (state.speed + speed) / 2
    turn = travelled * curvature
    middle = state.yaw + turn / 2
    x, y = state.x + travelled * math.cos(middle), state.y + travelled * math.sin(middle)
    return EgoState(
        x=x,
        y=y,
        yaw=state.yaw + turn,
        speed=speed,
        s=task.route.project((x, y), around=state.s),
        acceleration=(speed - state.speed) / DT,
        yaw_rate=turn / DT,
    )


def simulate(task: Task, start: EgoState, seconds: float) -> list[EgoState]:
    """Rolls the driver out; element k of the result is the state at k * DT, the start first."""
    states = [start]
    for k in range(round(seconds / DT)):
        states.append(step(task, states[-1], k * DT))
    return states


def waypoints(states: list[EgoState], index: int) -> np.ndarray:
    """Future positions `[6, 2]` every 0.5 s in the flat frame of `states[index]`."""
    stride = round(STEP_SECONDS / DT)
    here = states[index]
    future = [states[index + stride * (k + 1)] for k in range(FUTURE_STEPS)]
    offset = np.array([[f.x - here.x, f.y - here.y] for f in future])
    c, s = math.cos(here.yaw), math.sin(here.yaw)
    return offset @ np.array([[c, -s], [s, c]])


def without_hazards(task: Task) -> Task:
    """The same route with nothing to stop, follow or slow down for."""
    return replace(task, stops=(), lead=None, slow_zone=None)
