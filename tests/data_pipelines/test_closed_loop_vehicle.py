"""The car and its controller against closed forms."""

import numpy as np
import pytest

from data_pipelines.closed_loop.vehicle import Motion, Vehicle, advance, follow

CAR = Vehicle()


def _car(speed=0.0, curvature=0.0, x=0.0, y=0.0, yaw=0.0):
    values = (x, y, yaw, speed, 0.0, curvature)
    return Motion(*(np.array([float(v)]) for v in values))


def _drive(now, acceleration, curvature, steps, dt=0.1, car=CAR):
    for _ in range(steps):
        now = advance(car, now, np.array([acceleration]), np.array([curvature]), dt)
    return now


def test_braking_distance_is_v_squared_over_two_a():
    # 10.3 m/s at 4 m/s^2 stands after 2.575 s, within a step, at 10.3^2 / 8 m.
    end = _drive(_car(speed=10.3), -4.0, 0.0, 40)
    assert end.speed[0] == 0.0
    assert end.x[0] == pytest.approx(10.3**2 / 8, abs=1e-9)


def test_a_full_circle_ends_where_it_began():
    speed, radius, steps = 5.0, 10.0, 100
    dt = 2 * np.pi * radius / speed / steps
    quarter = _drive(_car(speed, 1 / radius), 0.0, 1 / radius, steps // 4, dt)
    assert quarter.x[0] == pytest.approx(radius, abs=1e-9)
    assert quarter.y[0] == pytest.approx(radius, abs=1e-9)
    assert quarter.yaw[0] == pytest.approx(np.pi / 2, abs=1e-9)
    whole = _drive(_car(speed, 1 / radius), 0.0, 1 / radius, steps, dt)
    assert np.hypot(whole.x[0], whole.y[0]) < 1e-9


def test_limits_hold():
    fast = advance(CAR, _car(speed=10.0), np.array([50.0]), np.array([1.0]), 0.1)
    assert fast.speed[0] == pytest.approx(10.0 + 0.1 * CAR.acceleration)
    assert fast.curvature[0] == pytest.approx(0.1 * CAR.curvature_rate)
    assert advance(CAR, _car(speed=10.0), np.array([-50.0]), np.array([0.0]), 0.1).speed[
        0
    ] == pytest.approx(10.0 - 0.1 * CAR.braking)
    assert _drive(_car(speed=3.0), 0.0, 9.0, 30).curvature[0] == CAR.curvature
    # At 12 m/s the tyres' 6 m/s^2 allow 6 / 144 of curvature.
    assert _drive(_car(speed=12.0), 0.0, 9.0, 30).curvature[0] == pytest.approx(6.0 / 144)


def test_a_plan_of_constant_acceleration_is_followed_exactly():
    speed, gain, times = 4.0, 1.5, 0.5 * np.arange(7)
    along = speed * times + gain * times**2 / 2
    plan = np.stack([along, np.zeros(7)], -1)[None]
    for elapsed in (0.0, 0.5, 1.0):  # where the preview falls on a waypoint
        at = speed * elapsed + gain * elapsed**2 / 2
        now = _car(speed + gain * elapsed, x=at)
        asked, curvature = follow(CAR, now, plan, 0.5, elapsed)
        assert asked[0] == pytest.approx(gain, abs=1e-9)
        assert curvature[0] == pytest.approx(0.0, abs=1e-12)


def test_pure_pursuit_of_a_circle_asks_for_its_curvature():
    radius, speed = 15.0, 5.0
    angles = np.linspace(0, 1.0, 1001)  # so fine that the plan is the circle
    plan = radius * np.stack([np.sin(angles), 1 - np.cos(angles)], -1)[None]
    _, curvature = follow(CAR, _car(speed), plan, radius * angles[1] / speed, 0.0)
    assert curvature[0] == pytest.approx(1 / radius, rel=1e-4)


def test_a_plan_that_goes_nowhere_makes_it_stand():
    # The controller's own guess of the way does not matter: a vocabulary of 0.1 m jitters.
    plan = np.zeros((1, 7, 2))
    plan[0, :, 0] = [0, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1]
    now = _car(speed=1.0)
    for _ in range(40):
        now = advance(CAR, now, *follow(CAR, now, plan, 0.5, 0.0), 0.1)
    assert now.speed[0] < 0.01
    assert now.x[0] < 1.0


def test_it_comes_back_to_a_line_from_which_it_was_put_off():
    now, speed = _car(6.0, y=0.8, yaw=0.1), 6.0
    for k in range(60):
        along = now.x[0] - 1.0 + speed * 0.5 * np.arange(7)
        plan = np.stack([along, np.zeros(7)], -1)[None]
        asked = follow(CAR, now, plan, 0.5, 1.0 / speed)
        now = advance(CAR, now, *asked, 0.1)
        assert abs(now.y[0]) < 1.2, k
    assert abs(now.y[0]) < 0.01
    assert abs(now.yaw[0]) < 0.01
    assert now.speed[0] == pytest.approx(speed, abs=0.05)


def test_cars_do_not_influence_each_other():
    plans = np.stack([np.stack([2.0 * k * np.arange(7), 0.1 * np.arange(7) ** 2], -1)
                      for k in (0, 1, 2)])  # fmt: skip
    values = [np.array([1.0, 4.0, 7.0])] * 6
    together = follow(CAR, Motion(*values), plans, 0.5, 0.2)
    for k in range(3):
        alone = follow(CAR, Motion(*(v[k : k + 1] for v in values)), plans[k : k + 1], 0.5, 0.2)
        for whole, part in zip(together, alone, strict=True):
            assert whole[k] == part[0]
