"""A car that follows planned waypoints: a kinematic bicycle and its controller, R cars at once.

The bicycle model is about the rear axle: with steering angle `d` and wheelbase `w` the path has
curvature tan(d) / w, so the curvature stands for the steering. Along the path the controller looks
a second ahead: it takes the constant acceleration that brings the car to where the plan is then,
which follows a plan of constant acceleration without error. Across it is pure pursuit (Coulter
1992, CMU-RI-TR-92-01).
"""

from dataclasses import dataclass

import numpy as np

_STAND = 0.3  # metres; a plan that covers less up to its end asks to stand


@dataclass(frozen=True)
class Vehicle:
    """What the car can do, and how it is steered.

    Attributes:
        acceleration: Greatest, m/s^2.
        braking: Greatest, m/s^2.
        curvature: Greatest, 1/m; the tightest circle of the world's own driver.
        curvature_rate: Greatest change of curvature, 1/(m s).
        lateral: Greatest lateral acceleration, m/s^2.
        preview: Seconds that the controller looks ahead along the plan.
        look: Look-ahead distance of pure pursuit when standing, metres.
        look_time: What it grows by with the speed, seconds.
    """

    acceleration: float = 3.0
    braking: float = 6.0
    curvature: float = 0.22
    curvature_rate: float = 0.5
    lateral: float = 6.0
    preview: float = 1.0
    look: float = 1.5
    look_time: float = 0.3


@dataclass(frozen=True)
class Motion:
    """Cars in motion, each array `[R]`: rear axle in metres, radians, m/s, m/s^2 and 1/m."""

    x: np.ndarray
    y: np.ndarray
    yaw: np.ndarray
    speed: np.ndarray
    acceleration: np.ndarray
    curvature: np.ndarray


def advance(vehicle: Vehicle, now: Motion, acceleration, curvature, seconds: float) -> Motion:
    """The cars after some seconds of constant acceleration on a circle, both within the limits.

    Args:
        vehicle: The limits.
        now: The cars.
        acceleration: Asked for, `[R]`.
        curvature: Asked for, `[R]`.
        seconds: Duration; a car that comes to a stop within it stays there.
    """
    gain = np.clip(acceleration, -vehicle.braking, vehicle.acceleration)
    change = vehicle.curvature_rate * seconds
    bend = np.clip(curvature, now.curvature - change, now.curvature + change)
    bound = np.minimum(vehicle.curvature, vehicle.lateral / np.maximum(now.speed, 0.1) ** 2)
    bend = np.clip(bend, -bound, bound)
    speed = np.maximum(now.speed + gain * seconds, 0.0)
    # Time until it stands, or all of it.
    moving = np.where(speed > 0, seconds, now.speed / np.maximum(-gain, 1e-9))
    travelled = np.where(
        speed > 0, seconds * (now.speed + speed) / 2, now.speed * np.minimum(moving, seconds) / 2
    )
    turn = travelled * bend
    chord = travelled * np.sinc(turn / (2 * np.pi))
    return Motion(
        x=now.x + chord * np.cos(now.yaw + turn / 2),
        y=now.y + chord * np.sin(now.yaw + turn / 2),
        yaw=now.yaw + turn,
        speed=speed,
        acceleration=(speed - now.speed) / seconds,
        curvature=bend,
    )


def follow(vehicle: Vehicle, now: Motion, plan: np.ndarray, step: float, elapsed: float):
    """What the controller asks for.

    Args:
        vehicle: Its settings.
        now: The cars.
        plan: `[R, T + 1, 2]` places in metres, in the frame of `now`, the first where the car was
            when the plan's picture was taken.
        step: Seconds from one place to the next.
        elapsed: Seconds since that picture.

    Returns:
        Acceleration `[R]` and curvature `[R]`.
    """
    spot = np.stack([now.x, now.y], -1)
    lengths = np.hypot(*np.moveaxis(np.diff(plan, axis=1), -1, 0))
    marks = np.concatenate([np.zeros((len(plan), 1)), np.cumsum(lengths, 1)], 1)
    here = _progress(plan, lengths, marks, spot)
    there = _at_time(marks, (elapsed + vehicle.preview) / step)
    ahead = there - here - now.speed * vehicle.preview
    acceleration = 2 * ahead / vehicle.preview**2
    stand = marks[:, -1] - here < _STAND
    acceleration = np.where(stand, np.minimum(acceleration, -now.speed / 0.5), acceleration)
    look = vehicle.look + vehicle.look_time * now.speed
    away = _at_length(plan, marks, here + look, now.yaw) - spot
    distance = np.maximum(np.hypot(away[:, 0], away[:, 1]), 1e-6)
    bearing = np.arctan2(away[:, 1], away[:, 0]) - now.yaw
    return acceleration, 2 * np.sin(bearing) / distance


def _progress(plan, lengths, marks, spot):
    """Arc length `[R]` of the place of each plan nearest to the car, on straight past its ends."""
    start, along = plan[:, :-1], np.diff(plan, axis=1)
    offset = spot[:, None] - start
    share = (offset * along).sum(-1) / np.maximum(lengths, 1e-6) ** 2
    share = np.where(lengths > 1e-6, share, 0.0)
    low, high = np.zeros(share.shape[1]), np.ones(share.shape[1])
    low[0], high[-1] = -np.inf, np.inf
    share = np.clip(share, low, high)
    away = np.linalg.norm(offset - share[..., None] * along, axis=-1)
    best = away.argmin(1)[:, None]
    take = [np.take_along_axis(x, best, 1)[:, 0] for x in (marks[:, :-1], share, lengths)]
    return take[0] + take[1] * take[2]


def _at_time(marks, place: float):
    """Arc length `[R]` at a fractional step; past the last one it goes on as in the last step."""
    low = int(np.clip(np.floor(place), 0, marks.shape[1] - 2))
    return marks[:, low] + (place - low) * (marks[:, low + 1] - marks[:, low])


def _at_length(plan, marks, wanted, yaw):
    """Places `[R, 2]` at an arc length of each plan; past its end straight on."""
    found = np.empty((len(plan), 2))
    for r, (points, mark) in enumerate(zip(plan, marks, strict=True)):
        end = mark[-1]
        found[r] = [np.interp(wanted[r], mark, points[:, k]) for k in (0, 1)]
        if wanted[r] > end:
            # The last half metre decides where a plan points, since its last steps may be tiny.
            back = [np.interp(max(end - 0.5, 0.0), mark, points[:, k]) for k in (0, 1)]
            chord = points[-1] - back
            length = float(np.hypot(*chord))
            straight = [np.cos(yaw[r]), np.sin(yaw[r])]
            found[r] = points[-1] + (wanted[r] - end) * (
                chord / length if length > 0.4 else np.array(straight)
            )
    return found
