"""The prompt and the answer of Impromptu-VLA's nuScenes planning (arXiv 2505.23757), mode x-y.

A checkpoint answers well only to the words that it was trained on, so they are kept letter by
letter, gaps and double words included (its data generator, nuscenes loaders).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from fastdrive_jax.errors import UserError

STEP_SECONDS, PAST_STEPS, FUTURE_STEPS = 0.5, 6, 6
_ROLE = "You are an autonomous driving agent."
_VIEWS = {
    "none": "",
    "1v": " You have access to a front view camera image of a vehicle <image>. ",
    "6v": (
        " You have access to multi-view camera images of a vehicle: (1) front view (which you "
        "should focus on with the most attention) <image>, (2) front right view <image>, (3) front "
        "left view <image>, (4) back view <image>, (5) back left view <image>, and (6) back right "
        "view <image>. "
    ),
}
_TASK = (
    "Your task is to do your best to predict future waypoints for the vehicle over the next 3 "
    "timesteps, given the vehicle's intent inferred from the images."
)
_PAST = (
    "Provided are the previous ego vehicle status recorded over the last {seconds} seconds (at "
    "0.5-second intervals). This includes the x and y coordinates of the ego vehicle. Positive x "
    "means forward direction while positive y means leftwards. The data is presented in the format "
    "[x, y]:"
)
_STATUS = (
    "Acceleration: X {0}, Y {1} m/s^2, Velocity: X {2}, Steering angle: {3} (positive: left turn, "
    "negative: right turn)"
)
_ANSWER = (
    "Predicted future movement details for the next 3 seconds (sampled at 0.5-second intervals), "
    "including BEV location in x and y directions (in meters). Positive x means forward direction "
    "while positive y means leftwards. The output is formatted as [x, y]: "
)
BEGIN, _END = "<PLANNING>", "</PLANNING>"

# Cameras in the order of their marks in the prompt of six views.
CAMERAS = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_FRONT_LEFT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)


@dataclass(frozen=True)
class EgoStatus:
    """Motion at one past step, from the CAN bus.

    Attributes:
        acceleration: Forward and leftward, m/s^2.
        velocity: Forward, m/s.
        steering: Angle in rad, positive to the left.
    """

    acceleration: tuple[float, float]
    velocity: float
    steering: float


def planning_prompt(
    past: Float[np.ndarray, "T 2"],
    status: Sequence[EgoStatus] | None = None,
    views: Literal["1v", "6v", "none"] = "1v",
) -> str:
    """The user's turn, with the mark `<image>` for each picture.

    Args:
        past: Positions every 0.5 s, oldest first and the present (0, 0) last, at most 7; metres, x
            forward and y left in the present frame.
        status: Motion at the same steps; None where there is no CAN bus.
        views: Cameras, in the order of `CAMERAS`.

    Raises:
        UserError: There are too many steps or none, or positions and status differ in number.
    """
    past = np.asarray(past, np.float64)
    if past.ndim != 2 or past.shape[1] != 2 or not 1 <= len(past) <= PAST_STEPS + 1:
        raise UserError(
            f"past positions of shape {past.shape} must be [T, 2], T from 1 to {PAST_STEPS + 1}."
        )
    if status is not None and len(status) != len(past):
        raise UserError(f"{len(status)} steps of status do not fit {len(past)} past positions.")
    seconds = STEP_SECONDS * (len(past) - 1)
    entries = []
    for number, point in enumerate(past):
        entry = f"(t-{seconds - number * STEP_SECONDS}s) {_pair(point)}"
        if status is not None:
            own = status[number]
            values = (*own.acceleration, own.velocity, own.steering)
            entry += ", " + _STATUS.format(*(round(float(value), 2) for value in values))
        entries.append(entry)
    return _ROLE + _VIEWS[views] + _TASK + _PAST.format(seconds=seconds) + ", ".join(entries) + "\n"


def planning_answer(future: Float[np.ndarray, "6 2"]) -> str:
    """The assistant's turn: six waypoints every 0.5 s, metres, x forward and y left."""
    future = np.asarray(future, np.float64)
    if future.shape != (FUTURE_STEPS, 2):
        raise UserError(f"a plan of shape {future.shape} must be [{FUTURE_STEPS}, 2].")
    return BEGIN + _ANSWER + ", ".join(map(_pair, future)) + _END


def parse_answer(text: str) -> tuple[Float[np.ndarray, "6 2"], int]:
    """Waypoints of an answer as the published evaluation reads them, and how many were in it.

    It is lenient where a mark is missing: without the last the text ends a letter early, and
    without the first it begins with the tenth letter, both of which leave most points readable. It
    is strict with points: all must have as many numbers. Fewer than six are filled up with the
    last. An answer that cannot be read gives zeros and the count 0: the published evaluation scores
    it as standing still, and a caller can tell.
    """
    inside = text[text.find(BEGIN) + len(BEGIN) : text.find(_END)]
    brackets = re.findall(r"\[([^\]]+)\]", inside)
    if "x, y" in brackets:
        brackets.remove("x, y")  # once, as there
    try:
        points = np.array([tuple(map(float, match.split(","))) for match in brackets])
    except ValueError:  # no numbers, or not as many in each
        points = np.zeros(0)
    found = points[:FUTURE_STEPS, :2] if points.ndim == 2 and points.shape[1] > 1 else np.zeros(0)
    if not len(found) or not np.isfinite(found).all():
        return np.zeros((FUTURE_STEPS, 2)), 0
    missing = FUTURE_STEPS - len(found)
    return np.concatenate([found, np.repeat(found[-1:], missing, axis=0)]), len(found)


def shrunk_size(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """Height and width to which LLaMA-Factory shrinks a picture before the processor sees it."""
    if height * width <= max_pixels:
        return height, width
    factor = math.sqrt(max_pixels / (height * width))
    return int(height * factor), int(width * factor)


def _pair(point) -> str:
    # Rounded twice, as in the data; adding zero turns -0.0 into 0.0.
    x, y = (float(value) + 0.0 for value in np.round(np.round(point, 3), 2))
    return f"[{x}, {y}]"
