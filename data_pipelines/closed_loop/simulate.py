"""The closed loop: picture, plan, drive, for all routes at once.

Every `period` a picture is taken. The plan made of it arrives `latency` later, and until then the
car follows the one before; while a plan is being made no other is begun, so a policy slower than
the period drops pictures. Before the first plan the car goes on straight at its speed. The
controller picks up what has arrived at its own steps of 0.1 s.
"""

import time as clock
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.closed_loop.camera import Job
from data_pipelines.closed_loop.policies import CONSTANT_VELOCITY, Policy, View
from data_pipelines.closed_loop.route import Route, state_rows
from data_pipelines.closed_loop.vehicle import Motion, Vehicle, advance, follow
from data_pipelines.schema import STEP_SECONDS
from data_pipelines.synthetic.planner import DT, EgoState
from fastdrive_jax.errors import UserError


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a closed loop.

    Attributes:
        seconds: Duration of a drive.
        period: Seconds between pictures, a multiple of 0.1.
        latency: Seconds from a picture to its plan.
        vehicle: The car and its controller.
    """

    seconds: float = 10.0
    period: float = STEP_SECONDS
    latency: float = 0.1
    vehicle: Vehicle = Vehicle()

    def __post_init__(self):
        ticks = self.period / DT
        if self.period <= 0 or abs(ticks - round(ticks)) > 1e-6:
            raise UserError(f"period={self.period} must be a multiple of {DT} seconds.")
        if self.seconds <= 0 or self.latency < 0:
            raise UserError(
                f"seconds={self.seconds} must be positive and latency={self.latency} not negative."
            )


@dataclass(frozen=True)
class Drives:
    """What was driven.

    Attributes:
        states: float64 `[R, steps + 1, 7]` x, y, yaw, speed, s, acceleration and yaw rate.
        times: `[F]` seconds of the frames that were planned from.
        plans: float32 `[F, R, T, 2]`.
        kept: int32 `[F, R, K]` tokens, or None.
        drawing: Wall seconds of all pictures.
        planning: Wall seconds of all plans.
    """

    states: np.ndarray
    times: np.ndarray
    plans: np.ndarray
    kept: np.ndarray | None
    drawing: float
    planning: float


def simulate(
    routes: Sequence[Route],
    policy: Policy,
    config: LoopConfig,
    cameras: Callable[[Sequence[Job]], tuple[np.ndarray, np.ndarray]] | None = None,
    numbers: Sequence[int] | None = None,
    warm: bool = False,
) -> Drives:
    """Drives all routes with a policy.

    Args:
        routes: R of them, of which all have the duration.
        policy: What drives.
        config: Settings.
        cameras: `FrontCameras`; not needed for a policy that does not look.
        numbers: Of the routes among those of `cameras`; None if they are the same.
        warm: Plan the first frame once more before, so that no time is that of a compilation.
    """
    numbers = range(len(routes)) if numbers is None else numbers
    start = [route.reference[0] for route in routes]
    x, y, yaw, speed = state_rows(start)[:, :4].T
    now = Motion(x, y, yaw, speed, np.zeros(len(start)), np.zeros(len(start)))
    states, memory = list(start), policy.start(len(routes))
    log, times, plans, kept = [state_rows(states)], [], [], []
    drawing = planning = 0.0
    straight, _, _ = CONSTANT_VELOCITY.plan(None, view_of(routes, states, 0.0, 0))
    path, begun = _in_scene(now, straight), 0.0
    waiting: list[tuple[float, float, np.ndarray]] = []
    ticks, free = round(config.period / DT), 0.0
    for k in range(round(config.seconds / DT)):
        time = k * DT
        if k % ticks == 0 and time >= free - 1e-9:
            frame = k // ticks
            view = view_of(routes, states, time, frame)
            if policy.looks:
                before = clock.perf_counter()
                jobs = [(r, s, time, frame) for r, s in zip(numbers, states, strict=True)]
                view = view_of(routes, states, time, frame, *cameras(jobs))
                drawing += clock.perf_counter() - before
            if warm and not plans:
                policy.plan(memory, view)
            before = clock.perf_counter()
            planned, chosen, memory = policy.plan(memory, view)
            planning += clock.perf_counter() - before
            free = time + config.latency
            waiting.append((free, time, _in_scene(now, planned)))
            times.append(time)
            plans.append(np.asarray(planned, np.float32))
            kept.append(chosen)
        while waiting and waiting[0][0] <= time + 1e-9:
            _, begun, path = waiting.pop(0)
        asked = follow(config.vehicle, now, path, STEP_SECONDS, time - begun)
        now = advance(config.vehicle, now, *asked, DT)
        states = _states(routes, states, now)
        log.append(state_rows(states))
    return Drives(
        states=np.stack(log, 1),
        times=np.array(times),
        plans=np.stack(plans),
        kept=None if kept[0] is None else np.stack(kept).astype(np.int32),
        drawing=drawing,
        planning=planning,
    )


def simulate_batches(
    routes: Sequence[Route],
    policy: Policy,
    config: LoopConfig,
    cameras: Callable | None,
    batch: int,
    first: int = 0,
) -> Drives:
    """`simulate` in batches of one size, so that the policy is compiled once; see there.

    A last batch that does not come out even is filled with its last route. `first` is the number
    of the first route among those of `cameras`.
    """
    parts = []
    for begin in range(0, len(routes), batch):
        rows = np.arange(begin, begin + batch).clip(max=len(routes) - 1)
        chosen = [routes[row] for row in rows]
        numbers = (first + rows).tolist()
        parts.append(simulate(chosen, policy, config, cameras, numbers, warm=not parts))
    count = len(routes)
    real = count / (len(parts) * batch)  # of the rows that were drawn and planned
    return Drives(
        states=np.concatenate([part.states for part in parts])[:count],
        times=parts[0].times,
        plans=np.concatenate([part.plans for part in parts], 1)[:, :count],
        kept=None
        if parts[0].kept is None
        else np.concatenate([part.kept for part in parts], 1)[:, :count],
        drawing=real * sum(part.drawing for part in parts),
        planning=real * sum(part.planning for part in parts),
    )


def view_of(
    routes: Sequence[Route],
    states: Sequence[EgoState],
    time: float,
    frame: int,
    images: np.ndarray | None = None,
    foreground: np.ndarray | None = None,
) -> View:
    """What there is to plan from where the cars are."""
    return View(
        routes=routes,
        states=states,
        time=time,
        frame=frame,
        speed=np.array([state.speed for state in states], np.float32),
        command=np.array(
            [route.command(state) for route, state in zip(routes, states, strict=True)], np.int32
        ),
        images=images,
        foreground=foreground,
    )


def _states(routes: Sequence[Route], before: Sequence[EgoState], now: Motion) -> list[EgoState]:
    """The cars with their progress, one step after `before`."""
    columns = np.stack([now.x, now.y, now.yaw, now.speed, now.acceleration], -1).tolist()
    return [
        EgoState(
            x=x,
            y=y,
            yaw=yaw,
            speed=speed,
            s=route.path.project((x, y), around=old.s),
            acceleration=gain,
            yaw_rate=(yaw - old.yaw) / DT,
        )
        for route, old, (x, y, yaw, speed, gain) in zip(routes, before, columns, strict=True)
    ]


def _in_scene(now: Motion, planned: np.ndarray) -> np.ndarray:
    """The car's place and the waypoints after it, `[R, T + 1, 2]` in the scenes' frames."""
    c, s = np.cos(now.yaw)[:, None], np.sin(now.yaw)[:, None]
    x, y = planned[..., 0].astype(float), planned[..., 1].astype(float)
    ahead = np.stack([x * c - y * s, x * s + y * c], -1)
    here = np.stack([now.x, now.y], -1)[:, None]
    return np.concatenate([here, here + ahead], 1)
