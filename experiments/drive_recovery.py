"""Whether a policy steers back: how its plan answers to a car that is put off its lane.

In training the VLA sees only states that the world's own driver gets into. Here the car is moved
sideways or turned, and the change of the planned place after 3 s is set beside that of the driver's
own plan: 1 says that it corrects as the driver would, 0 that it does not notice.
"""

from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.closed_loop.policies import Policy
from data_pipelines.closed_loop.route import Route, displaced, expert_waypoints
from data_pipelines.closed_loop.simulate import view_of
from data_pipelines.synthetic.planner import DT
from fastdrive_jax.evaluation.bootstrap import interval
from fastdrive_jax.evaluation.results import Row

TIME = 1.0  # seconds into the drive
MOVING = 3.0  # m/s at that time and three seconds later, below which nothing is steered
OFFSETS = {
    "recovery_lateral": tuple((lateral, 0.0) for lateral in (-0.6, -0.3, 0.3, 0.6)),
    "recovery_turn": tuple((0.0, turn) for turn in (-0.1, -0.05, 0.05, 0.1)),
}


def recovery_rows(
    method: str,
    ratio: float,
    policy: Policy,
    routes: Sequence[Route],
    cameras: Callable,
    batch: int,
) -> list[Row]:
    """The share of the driver's correction that a policy plans, with intervals over routes.

    Args:
        method: Name for the rows.
        ratio: Keep ratio for the rows.
        policy: One that looks and has no memory.
        routes: Of the world, the first of those of `cameras`.
        cameras: `FrontCameras`.
        batch: Routes that are planned at once.
    """
    now, later = round(TIME / DT), round((TIME + 3.0) / DT)
    chosen = [
        k
        for k, route in enumerate(routes)
        if len(route.reference) > later
        and min(route.reference[now].speed, route.reference[later].speed) > MOVING
    ]
    if not chosen:
        return []
    own, driver = _sideways(policy, routes, chosen, cameras, batch, 0.0, 0.0)
    rows = []
    for metric, offsets in OFFSETS.items():
        products, squares = [], []
        for lateral, turn in offsets:
            moved = _sideways(policy, routes, chosen, cameras, batch, lateral, turn)
            ours, theirs = moved[0] - own, moved[1] - driver
            products.append(ours * theirs)
            squares.append(theirs**2)
        # The least-squares slope through 0 is a ratio of sums, which the bootstrap can resample.
        clusters = np.tile(chosen, len(offsets))
        found = interval(np.concatenate(products), clusters, np.concatenate(squares))
        rows.append(
            Row(method, ratio, metric, found.value, found.low, found.high, found.n, None, "")
        )
    return rows


def _sideways(policy, routes, chosen, cameras, batch, lateral, turn):
    """Where policy and driver plan to be after 3 s, metres to the left of the undisturbed car."""
    now, frame = round(TIME / DT), round(TIME / 0.5)
    places = []
    for begin in range(0, len(chosen), batch):
        numbers = np.resize(chosen[begin : begin + batch], batch).tolist()  # one compiled shape
        picked = [routes[k] for k in numbers]
        states = [displaced(route.reference[now], lateral, turn) for route in picked]
        jobs = [(k, state, TIME, frame) for k, state in zip(numbers, states, strict=True)]
        view = view_of(picked, states, TIME, frame, *cameras(jobs))
        planned, _, _ = policy.plan(policy.start(batch), view)
        expert = [expert_waypoints(r, s, TIME) for r, s in zip(picked, states, strict=True)]
        count = min(batch, len(chosen) - begin)
        places.append([planned[:count, -1, 1], np.stack(expert)[:count, -1, 1]])
    return np.concatenate(places, axis=1).astype(np.float64)
