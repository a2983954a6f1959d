"""Events and the score on cases that one can work out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipelines.closed_loop.events import CENTRE, END_OF_ROAD, LENGTH, PENALTY, WIDTH, judge
from data_pipelines.closed_loop.route import Route, StopLine, state_rows
from data_pipelines.schema import STRAIGHT
from data_pipelines.synthetic import meshes
from data_pipelines.synthetic.config import ROAD, WorldConfig
from data_pipelines.synthetic.geometry import path_through
from data_pipelines.synthetic.planner import DT, FRONT_OVERHANG, EgoState, Task
from data_pipelines.synthetic.roads import Road, Strip
from data_pipelines.synthetic.sampler import sample_scene
from data_pipelines.synthetic.scene import Actor, Motion, Recording

HALF = 4.0  # metres of road on both sides
PATH = path_through(np.stack([np.arange(-20.0, 121.0), np.zeros(141)], -1), (0.0, 0.0))


@pytest.fixture(scope="module")
def scene():
    """Nothing but a straight road."""
    base = sample_scene(WorldConfig(), "val", 0)
    outline = np.array([[-20, HALF], [120, HALF], [120, -HALF], [-20, -HALF]], float)
    return replace(
        base,
        strips=(Strip(outline, ROAD, "asphalt"),),
        main=Road(PATH, HALF, 0.0),
        branches=(),
        task=Task(PATH),
        actors=(),
        command=STRAIGHT,
    )


def _states(speed, seconds=8.0, y=0.0, x=0.0):
    """Constant speed, or speeds given step by step."""
    steps = round(seconds / DT)
    speeds = np.broadcast_to(speed, steps + 1).astype(float)
    xs = x + np.concatenate([[0.0], np.cumsum(speeds[:-1] * DT)])
    gains = np.append(np.diff(speeds) / DT, 0.0)
    rows = zip(xs, speeds, gains, strict=True)
    return [EgoState(float(a), y, 0.0, float(v), float(a), float(g)) for a, v, g in rows]


def _route(scene, actors=(), lines=(), reference=None, begin=0.0):
    scene = replace(scene, actors=tuple(actors))
    states = tuple(reference or _states(10.0))
    return Route("r", "free", ((0.0, scene),), PATH, tuple(lines), states, begin=begin)


def _car(x, y=0.0, motion=None):
    size = (2.0, 4.0, 1.6)
    return Actor(meshes.car((0, 0, 0), False, size), (x, y), 0.0, "vehicle.car", "", size, motion)


def test_the_reference_scores_one(scene):
    verdict = judge(_route(scene), state_rows(_states(10.0)))
    assert verdict.score == 1.0
    assert verdict.success
    assert verdict.collision == ""
    assert verdict.deviation == 0.0


def test_half_the_way_is_half_the_score(scene):
    verdict = judge(_route(scene), state_rows(_states(5.0)))
    assert verdict.score == pytest.approx(0.5)
    assert not verdict.success


def test_what_lies_behind_the_start_is_not_driven(scene):
    """Routes of the world begin some metres along their path."""
    route = _route(scene, reference=_states(10.0, x=40.0))
    stands = state_rows(_states(0.0, x=40.0))
    assert judge(route, stands).completion == 0.0
    whole = PATH.end - END_OF_ROAD - 40.0
    assert judge(route, state_rows(_states(4.5, x=40.0))).completion == pytest.approx(36 / whole)


def test_a_collision_ends_the_route_and_costs(scene):
    # The front is 3.7 m ahead of the rear axle, the car's rear at 38 m.
    verdict = judge(_route(scene, [_car(40.0)]), state_rows(_states(10.0)))
    assert verdict.collision == "vehicle"
    assert verdict.collision_time == pytest.approx(np.ceil((38 - FRONT_OVERHANG) / 1.0) * DT)
    assert verdict.end == round(verdict.collision_time / DT) + 1
    reached = 10.0 * verdict.collision_time / 80.0
    assert verdict.score == pytest.approx(reached * PENALTY["vehicle"])
    # Beside the lane, by a centimetre more than both half widths, nothing happens.
    beside = _car(40.0, y=1.0 + WIDTH / 2 + 0.01)
    assert judge(_route(scene, [beside]), state_rows(_states(10.0))).collision == ""


def test_who_is_hit_from_behind_or_standing_is_not_to_blame(scene):
    chaser = _car(0.0, motion=Motion(PATH, -15.0, 12.0, 0.0))
    verdict = judge(_route(scene, [chaser]), state_rows(_states(5.0)))
    assert (verdict.collision, verdict.struck) == ("", 1)
    assert verdict.score == pytest.approx(0.5)
    oncoming = _car(0.0, motion=Motion(PATH, 60.0, -8.0, 0.0))
    standing = state_rows(_states(0.0, x=10.0))
    assert judge(_route(scene, [oncoming]), standing).struck == 1
    moving = judge(_route(scene, [oncoming]), state_rows(_states(2.0, x=10.0)))
    assert (moving.collision, moving.struck) == ("vehicle", 0)


def test_actors_are_where_the_scene_has_them_when_the_drive_begins_later(scene):
    # It crosses the lane at the scene's second 3 only.
    times = np.arange(0.0, 12.0)
    known = times == 3.0
    crossing = replace(
        _car(0.0),
        motion=Recording(times, np.tile([40.0, 0.0], (12, 1)), np.zeros(12), known),
    )
    there = state_rows(_states(0.0, x=36.0))
    assert judge(_route(scene, [crossing]), there).struck == 1
    moving = state_rows(_states(10.0, x=4.0))  # front at 38 m after 3.03 s
    assert judge(_route(scene, [crossing]), moving).collision == "vehicle"
    assert judge(_route(scene, [crossing], begin=1.0), moving).collision == ""


@pytest.mark.parametrize(("until", "runs"), [(2.0, False), (4.0, True)])
def test_a_red_light_is_run_while_it_is_red(scene, until, runs):
    # The front passes the line at 30 m after (30 - 3.7) / 10 = 2.63 s.
    line = StopLine("red_light", 30.0, until)
    verdict = judge(_route(scene, lines=[line]), state_rows(_states(10.0)))
    assert verdict.red_light == runs
    assert verdict.score == pytest.approx(PENALTY["red_light"] if runs else 1.0)


def test_a_stop_sign_wants_a_halt(scene):
    line = StopLine("stop_sign", 30.0)
    assert judge(_route(scene, lines=[line]), state_rows(_states(10.0))).stop_sign
    speeds = np.concatenate([np.full(24, 10.0), np.zeros(10), np.full(47, 10.0)])
    halted = state_rows(_states(speeds))  # front at 27.7 m while it stands
    assert not judge(_route(scene, lines=[line]), halted).stop_sign
    early = np.concatenate([np.zeros(10), np.full(71, 10.0)])
    assert judge(_route(scene, lines=[line]), state_rows(_states(early))).stop_sign


def test_leaving_the_road_is_told_by_its_corners(scene):
    # A corner is out once the car's middle is more than 4 + 0.3 - 0.925 m beside the centre line.
    edge = HALF + 0.3 - WIDTH / 2
    inside = judge(_route(scene), state_rows(_states(10.0, y=edge - 0.15)))
    assert inside.off_road == 0.0
    assert inside.off_road_time is None
    states = _states(10.0)
    states = states[:41] + [replace(s, y=edge + 0.15) for s in states[41:]]
    outside = judge(_route(scene), state_rows(states))
    assert outside.off_road == pytest.approx(0.5, abs=0.03)
    assert outside.off_road_time == pytest.approx(4.1)
    assert outside.completion == pytest.approx(0.5)  # it is out of the route's corridor too
    assert outside.score == pytest.approx(outside.completion * (1 - outside.off_road))


def test_stopping_too_early_is_stuck_and_standing_with_the_reference_is_not(scene):
    speeds = np.concatenate([np.full(31, 10.0), np.zeros(50)])
    assert judge(_route(scene), state_rows(_states(speeds))).stuck
    verdict = judge(_route(scene, reference=_states(speeds)), state_rows(_states(speeds)))
    assert not verdict.stuck
    assert verdict.score == 1.0


def test_comfort_figures(scene):
    speeds = np.concatenate([np.full(31, 10.0), 10 - 4 * DT * np.arange(1, 21), np.full(30, 2.0)])
    verdict = judge(_route(scene), state_rows(_states(speeds)))
    assert verdict.braking == pytest.approx(4.0)
    assert verdict.jerk == pytest.approx(4.0 / 0.5)


def test_the_car_is_drawn_about_its_rear_axle():
    assert CENTRE + LENGTH / 2 == FRONT_OVERHANG
