"""What may drive: a policy as two functions, and the two controls that look at no picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.closed_loop.route import Route, expert_waypoints
from data_pipelines.schema import FUTURE_STEPS, STEP_SECONDS
from data_pipelines.synthetic.planner import EgoState


@dataclass(frozen=True)
class View:
    """What there is to plan from at a moment, for R routes.

    Attributes:
        routes: `[R]`.
        states: `[R]` of the cars.
        time: Seconds since the start.
        frame: Number of the frame, from 0.
        speed: `[R]` m/s.
        command: `[R]` 0 left, 1 straight, 2 right.
        images: uint8 `[R, H, W, 3]` front pictures; None for who does not look.
        foreground: `[R, N]` share of foreground in each token, for the control that knows it.
    """

    routes: Sequence[Route]
    states: Sequence[EgoState]
    time: float
    frame: int
    speed: np.ndarray
    command: np.ndarray
    images: np.ndarray | None = None
    foreground: np.ndarray | None = None


@dataclass(frozen=True)
class Policy:
    """What drives.

    Attributes:
        plan: (memory, view) to waypoints `[R, T, 2]` in metres, x forward, y left, every half
            second; kept tokens `[R, K]` or None; and the memory of the next frame.
        start: Number of routes to the memory of the first frame.
        looks: Whether it needs pictures.
    """

    plan: Callable[[Any, View], tuple[np.ndarray, np.ndarray | None, Any]]
    start: Callable[[int], Any] = lambda count: None
    looks: bool = True


def _expert(memory, view: View):
    rows = zip(view.routes, view.states, strict=True)
    return (
        np.stack([expert_waypoints(route, state, view.time) for route, state in rows]),
        None,
        memory,
    )


def _constant_velocity(memory, view: View):
    times = STEP_SECONDS * np.arange(1, FUTURE_STEPS + 1)
    ahead = view.speed[:, None] * times
    return np.stack([ahead, np.zeros_like(ahead)], -1), None, memory


EXPERT = Policy(_expert, looks=False)
CONSTANT_VELOCITY = Policy(_constant_velocity, looks=False)
