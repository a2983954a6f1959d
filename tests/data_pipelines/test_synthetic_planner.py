"""The ego driver obeys what it sees and nothing else."""

import math

import numpy as np
import pytest

from data_pipelines.synthetic.geometry import path_from_curvature
from data_pipelines.synthetic.planner import (
    BRAKE_LIMIT,
    CRUISE_SPEED,
    DT,
    FRONT_OVERHANG,
    EgoState,
    Task,
    simulate,
    waypoints,
    without_hazards,
)

STRAIGHT = path_from_curvature(np.zeros(400), zero=20)


def _start(speed, **kwargs):
    return EgoState(x=0.0, y=0.0, yaw=0.0, speed=speed, s=0.0, **kwargs)


@pytest.mark.parametrize("speed", [0.0, 3.0, 9.0, 12.0])
def test_free_driving_tends_to_the_cruise_speed(speed):
    states = simulate(Task(STRAIGHT), _start(speed), 15.0)
    assert states[-1].speed == pytest.approx(CRUISE_SPEED, abs=0.1)
    assert abs(states[-1].y) < 1e-6


@pytest.mark.parametrize(("speed", "line"), [(3.0, 14.0), (9.0, 25.0), (12.0, 30.0)])
def test_stops_before_the_line_and_stays(speed, line):
    states = simulate(Task(STRAIGHT, stops=(line,)), _start(speed), 12.0)
    bumper = states[-1].x + FRONT_OVERHANG
    assert line - 3.0 < bumper < line
    assert states[-1].speed < 0.05
    hardest = min(s.acceleration for s in states)
    assert -BRAKE_LIMIT - 1e-6 <= hardest < -2.0


def test_car_about_to_stop_is_still_fast():
    states = simulate(Task(STRAIGHT, stops=(30.0,)), _start(9.0), 5.0)
    assert states[5].speed > 8.5
    assert states[-1].speed < 0.5


def test_follows_a_slow_lead_without_touching_it():
    rear, lead_speed = 22.0, 3.0
    states = simulate(Task(STRAIGHT, lead=(rear, lead_speed)), _start(9.0), 12.0)
    gaps = [rear + lead_speed * k * DT - s.x - FRONT_OVERHANG for k, s in enumerate(states)]
    assert min(gaps) > 1.5
    assert states[-1].speed == pytest.approx(lead_speed, abs=0.3)


def test_slows_for_a_bend_and_keeps_to_it():
    curvature = np.zeros(400)
    curvature[80:160] = 1 / 20.0
    path = path_from_curvature(curvature, zero=20)
    states = simulate(Task(path), _start(9.0), 8.0)
    bend = [s for s in states if 32 < s.s < 68]
    assert max(s.speed for s in bend) < math.sqrt(2.2 * 20) + 0.5
    offsets = [np.hypot(*(path.at(s.s)[0] - [s.x, s.y])) for s in states]
    assert max(offsets) < 0.6


def test_recovers_from_a_lateral_and_heading_error():
    start = EgoState(x=0.0, y=0.4, yaw=0.08, speed=8.0, s=0.0)
    states = simulate(Task(STRAIGHT), start, 5.0)
    assert abs(states[-1].y) < 0.05
    assert abs(states[-1].yaw) < 0.02


def test_step_has_no_memory():
    """Restarting from any state on the way gives the same future: only what is visible counts."""
    task = Task(STRAIGHT, stops=(40.0,))
    states = simulate(task, _start(7.0), 6.0)
    again = simulate(task, states[20], 4.0)
    assert again == states[20:]


def test_waypoints_are_in_the_frame_of_the_car():
    path = path_from_curvature(np.full(400, 1 / 40.0), zero=20)
    states = simulate(Task(path), _start(8.0), 6.0)
    future = waypoints(states, 10)
    assert future.shape == (6, 2)
    assert (np.diff(future[:, 0]) > 0).all()
    assert future[-1, 1] > 2.0  # a bend to the left, whatever the heading by then


def test_without_hazards_keeps_the_route_only():
    task = without_hazards(Task(STRAIGHT, stops=(9.0,), lead=(5.0, 1.0), slow_zone=(1.0, 2.0, 3.0)))
    assert task == Task(STRAIGHT)
