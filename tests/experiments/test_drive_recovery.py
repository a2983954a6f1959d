"""The correction of a policy beside that of the world's own driver."""

import numpy as np
import pytest

from data_pipelines.closed_loop.clean import clean_routes
from data_pipelines.closed_loop.policies import EXPERT, Policy
from data_pipelines.closed_loop.route import expert_waypoints
from data_pipelines.synthetic.config import WorldConfig
from experiments.drive_recovery import recovery_rows


@pytest.fixture(scope="module")
def routes():
    return clean_routes(WorldConfig(), "val", 300, 9, 5.0)


def _blank(jobs):
    return np.zeros((len(jobs), 2, 2, 3), np.uint8), np.zeros((len(jobs), 1), np.float32)


def _rows(plan, routes):
    rows = recovery_rows("x", 1.0, Policy(plan), routes, _blank, 4)
    assert [row.metric for row in rows] == ["recovery_lateral", "recovery_turn"]
    return [row.value for row in rows]


def test_the_driver_itself_corrects_as_the_driver(routes):
    np.testing.assert_allclose(_rows(EXPERT.plan, routes), 1.0)


def test_who_goes_straight_does_not_correct(routes):
    def straight(memory, view):
        return np.ones((len(view.routes), 6, 2)), None, memory

    np.testing.assert_allclose(_rows(straight, routes), 0.0)


def test_who_does_half_of_it_has_a_half(routes):
    undisturbed = {route.name: route.reference[10] for route in routes}

    def half(memory, view):
        parts = [
            (
                expert_waypoints(r, s, view.time)
                + expert_waypoints(r, undisturbed[r.name], view.time)
            )
            / 2
            for r, s in zip(view.routes, view.states, strict=True)
        ]
        return np.stack(parts), None, memory

    np.testing.assert_allclose(_rows(half, routes), 0.5)
