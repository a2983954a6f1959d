"""The loop: the world's own driver, latency, lights, and what may not change the result."""

import time

import numpy as np
import pytest

from data_pipelines.closed_loop.camera import FrontCameras, Studio
from data_pipelines.closed_loop.clean import clean_routes
from data_pipelines.closed_loop.events import SPEED, S, judge
from data_pipelines.closed_loop.policies import CONSTANT_VELOCITY, EXPERT, Policy
from data_pipelines.closed_loop.route import displaced, expert_waypoints, state_rows
from data_pipelines.closed_loop.simulate import LoopConfig, simulate, simulate_batches
from data_pipelines.synthetic.config import FOREGROUND_IDS, TRAFFIC_LIGHT, WorldConfig
from data_pipelines.synthetic.planner import DT
from data_pipelines.synthetic.scene import WARM_UP
from fastdrive_jax.errors import UserError

SECONDS = 10.0
LOOP = LoopConfig(seconds=SECONDS)
SIZE = (112, 196)


@pytest.fixture(scope="module")
def routes():
    return clean_routes(WorldConfig(seed=0), "val", 300, 14, SECONDS)


def _red(routes):
    return next(route for route in routes if route.scenario == "red_light")


def test_the_reference_is_the_worlds_driver_from_its_first_key_frame(routes):
    for route in routes:
        assert len(route.reference) == round(SECONDS / DT) + 1
        assert route.begin == WARM_UP
        assert judge(route, state_rows(route.reference)).score > 0.9


def test_the_expert_drives_cleanly_and_constant_velocity_does_not(routes):
    assert len({route.scenario for route in routes}) >= 6

    def verdicts(policy):
        states = simulate(routes, policy, LOOP).states
        return [judge(route, driven) for route, driven in zip(routes, states, strict=True)]

    expert = verdicts(EXPERT)
    assert not any(v.collision or v.red_light or v.stop_sign or v.stuck for v in expert)
    assert np.mean([v.score for v in expert]) > 0.97
    blind = verdicts(CONSTANT_VELOCITY)
    assert np.mean([v.score for v in blind]) < 0.5


def test_the_same_again_whatever_the_batch(routes):
    once = simulate(routes, EXPERT, LOOP)
    again = simulate_batches(routes, EXPERT, LOOP, None, 4)
    np.testing.assert_array_equal(once.states, again.states)
    np.testing.assert_array_equal(once.plans, again.plans)
    np.testing.assert_array_equal(once.states[5], simulate(routes[5:6], EXPERT, LOOP).states[0])


def test_a_car_that_stands_has_driven_nothing(routes):
    for route in routes:
        stands = np.repeat(state_rows(route.reference[:1]), len(route.reference), axis=0)
        stands[:, SPEED] = 0.0
        assert judge(route, stands).score == 0.0, route.scenario


def test_times_hold_no_compilation_and_no_filled_up_routes(routes):
    """The first plan of a setting takes long; each later one 10 ms."""
    calls = []

    def slow(memory, view):
        time.sleep(0.01 if calls else 3.0)
        calls.append(len(view.routes))
        return np.zeros((len(view.routes), 6, 2)), None, memory

    driven = simulate_batches(
        routes[:3], Policy(slow, looks=False), LoopConfig(seconds=2.0), None, 2
    )
    assert calls == [2] * 9  # four frames of two batches, and the first once more
    assert 0.75 * 8 * 0.01 <= driven.planning < 2.0


def test_a_plan_is_driven_once_it_is_there(routes):
    """A policy that stops at once: until its first plan arrives the car keeps its speed."""

    def stand(memory, view):
        return np.zeros((len(view.routes), 6, 2)), None, memory

    stop = Policy(stand, looks=False)
    fast = [route for route in routes if route.reference[0].speed > 4][:2]
    for latency in (0.0, 0.3, 0.8):
        driven = simulate(fast, stop, LoopConfig(seconds=3.0, latency=latency))
        speed = driven.states[:, :, SPEED]
        begins = round(latency / DT)
        np.testing.assert_allclose(speed[:, : begins + 1] - speed[:, :1], 0, atol=1e-5)
        assert (speed[:, begins + 1] < speed[:, 0] - 0.2).all()


def test_a_plan_slower_than_the_pictures_drops_some(routes):
    driven = simulate(routes[:1], EXPERT, LoopConfig(seconds=3.0, latency=0.7))
    np.testing.assert_allclose(driven.times, [0.0, 1.0, 2.0])
    quick = simulate(routes[:1], EXPERT, LoopConfig(seconds=3.0, latency=0.5))
    np.testing.assert_allclose(quick.times, 0.5 * np.arange(6))


def test_a_red_light_turns_green_in_the_picture_and_for_the_driver(routes):
    route = _red(routes)
    until = route.lines[0].until
    before, after = route.reference[round(until / DT) - 1], route.reference[-1]
    assert before.speed == 0.0
    assert after.s > before.s + 5
    studio = Studio([route], (224, 392))
    red, green = (studio.picture((0, before, t, 0)) for t in (until - DT, until))
    np.testing.assert_array_equal(red.labels, green.labels)
    changed = (red.image != green.image).any(-1)
    assert changed.any()
    assert (green.labels[changed] == TRAFFIC_LIGHT).all()
    assert green.image[changed][:, 1].astype(int).sum() > red.image[changed][:, 1].astype(int).sum()


def test_pictures_do_not_depend_on_the_number_of_processes(routes):
    jobs = [(k, routes[k].reference[10], 1.0, 2) for k in range(3)]
    with FrontCameras(routes[:3], SIZE, 1) as here, FrontCameras(routes[:3], SIZE, 2) as there:
        for one, other in zip(here(jobs), there(jobs), strict=True):
            np.testing.assert_array_equal(one, other)
    labels = Studio(routes, SIZE).picture(jobs[0]).labels
    tokens = np.isin(labels, FOREGROUND_IDS).reshape(4, 28, 7, 28).mean((1, 3)).ravel()
    with FrontCameras(routes[:1], SIZE, 1) as cameras:
        np.testing.assert_allclose(cameras(jobs[:1])[1][0], tokens, atol=1e-6)


def test_the_pictures_follow_the_car(routes):
    """What is seen is from where the car is, so a policy that looks sees its own doing."""
    seen = []

    def cameras(jobs):
        seen.append([job[1] for job in jobs])
        return np.zeros((len(jobs), 4, 4, 3), np.uint8), np.zeros((len(jobs), 1), np.float32)

    looking = Policy(EXPERT.plan)
    driven = simulate(routes[:2], looking, LoopConfig(seconds=2.0), cameras)
    places = np.array([[(s.x, s.y) for s in states] for states in seen])
    np.testing.assert_allclose(places, driven.states[:, ::5][:, :4, :2].swapaxes(0, 1))


def test_the_expert_corrects_what_it_is_put_off_by(routes):
    route = next(r for r in routes if r.scenario in ("free", "person_on_pavement", "green_light"))
    state = route.reference[10]
    straight = expert_waypoints(route, state, 1.0)
    left = expert_waypoints(route, displaced(state, 0.5, 0.0), 1.0)
    assert left[-1, 1] - straight[-1, 1] == pytest.approx(-0.5, abs=0.15)


def test_progress_never_jumps(routes):
    driven = simulate(routes, EXPERT, LOOP).states
    moved = np.hypot(*np.moveaxis(np.diff(driven[..., :2], axis=1), -1, 0))
    assert (np.abs(np.diff(driven[..., S], axis=1)) < moved + 0.3).all()


def test_senseless_settings_are_refused():
    for settings in ({"period": 0.25}, {"seconds": 0.0}, {"latency": -0.1}):
        with pytest.raises(UserError):
            LoopConfig(**settings)
