import dataclasses

import numpy as np
import pytest
from truths import one, random_truth, random_ways

from fastdrive_jax.evaluation.footprint import way_of_point
from fastdrive_jax.evaluation.open_loop import protocol_metrics
from fastdrive_jax.evaluation.plan_scores import (
    HEADLINE,
    driven_collisions,
    group_scores,
    mean_scores,
    measurable,
    paired_rows,
    plan_scores,
    score_rows,
)
from fastdrive_jax.evaluation.protocols import LIDAR_AHEAD, PROTOCOLS
from fastdrive_jax.evaluation.truth import Area, LidarWays


@pytest.fixture(scope="module")
def truth():
    road = np.array([[-20.0, -4], [20, -4], [20, 4], [-20, 4]])
    empty = {"drivable": ((Area(road),),) * 40, "boundaries": ((road[:2], road[2:]),) * 40}
    return random_truth(np.random.default_rng(1), **empty)


@pytest.fixture(scope="module")
def planned():
    return random_ways(np.random.default_rng(2), 40)


def test_each_sample_has_what_the_protocols_say(truth, planned):
    names = measurable(truth)
    assert names == tuple(PROTOCOLS)
    valid = truth.future_valid.copy()
    valid[3, -1] = False
    truth = dataclasses.replace(truth, future_valid=valid)
    scores = plan_scores(planned, truth, names)
    assert measurable(dataclasses.replace(truth, drivable=None, boundaries=None)) == names[:2]
    assert measurable(dataclasses.replace(truth, agents=None)) == ()
    for name in names:
        found = protocol_metrics(PROTOCOLS[name], planned, truth)
        for metric, values in found.values.items():
            assert np.isnan(scores[metric][3])
            np.testing.assert_array_equal(scores[metric][found.used], values)


@pytest.mark.parametrize(("speed", "radius"), [(1.9, 6.0), (6.0, 15.0), (10.0, 40.0)])
def test_a_perfect_plan_of_the_lidar_has_no_distance(speed, radius):
    """On a circle both ways are known in closed form, at any speed."""
    turn = speed / radius * np.arange(1, 7) / 2
    heading = np.stack([np.cos(turn), np.sin(turn)], 1)
    origin = radius * np.stack([np.sin(turn), 1 - np.cos(turn)], 1)
    lidar = origin + LIDAR_AHEAD * (heading - [1, 0])
    truth = one(origin, lidar=LidarWays(np.zeros((1, 6, 2)), lidar[None]))
    aside = lidar + np.array([0.3, 0.4])
    for planned, distance in ((lidar, 0.0), (aside, 0.5)):
        scores = plan_scores(planned[None], truth, measurable(truth), point="lidar")
        assert scores[HEADLINE] == pytest.approx(distance, abs=1e-12)
    # Without the lidar's poses its way is a guess.
    guessed = plan_scores(lidar[None], one(origin), (), point="lidar")
    assert 0 < guessed[HEADLINE] < 0.4


def test_boxes_of_a_lidars_plan_are_those_of_the_cars_way(truth):
    names = measurable(truth)
    ways = random_ways(np.random.default_rng(3), 40) * [1.0, 0.2]  # steps over a metre
    scores = plan_scores(ways, truth, names)
    given = dataclasses.replace(truth, lidar=LidarWays(np.zeros((40, 6, 2)), truth.future))
    same = plan_scores(way_of_point(ways, LIDAR_AHEAD), given, names, point="lidar")
    for name in scores:
        if name.startswith(("collision", "intersection")):
            np.testing.assert_array_equal(scores[name], same[name])


def test_what_the_driven_way_hits_may_be_found_once(truth, planned):
    names = measurable(truth)
    driven = driven_collisions(truth, names)
    assert any(hits.any() for hits in driven.values())
    alone, given = (
        plan_scores(planned, truth, names),
        plan_scores(planned, truth, names, None, driven),
    )
    for metric, values in alone.items():
        np.testing.assert_array_equal(values, given[metric])


def test_answers_that_cannot_be_read_stand_still_or_do_not_count(truth, planned):
    read = np.arange(40) % 2 == 0
    scores = plan_scores(planned, truth, ("impromptu", "omnidrive"), read)
    still = np.linalg.norm(truth.future, axis=-1).mean(1)
    np.testing.assert_allclose(scores["ade"][~read], still[~read])
    assert np.isfinite(scores["collision_impromptu"]).all()
    np.testing.assert_array_equal(np.isfinite(scores["collision_omnidrive"]), read)
    none = plan_scores(planned, truth, ("omnidrive",), np.zeros(40, bool))
    assert "collision_omnidrive" not in none


def test_runs_are_averaged_over_those_that_count():
    runs = [
        {"a": np.array([1.0, np.nan, np.nan])},
        {"a": np.array([3.0, 5, np.nan]), "b": np.ones(3)},
    ]
    found = mean_scores(runs)
    np.testing.assert_array_equal(found["a"], [2, 5, np.nan])
    np.testing.assert_array_equal(found["b"], np.ones(3))


def test_rows_and_groups():
    scenes = np.array(["a", "a", "b", "b"])
    scores = {"ade": np.array([1.0, 2, 3, np.nan]), "collision_x": np.array([0.0, 1, 1, 1])}
    groups = {"turn": np.array([True, False, True, False]), "none": np.zeros(4, bool)}
    both = scores | group_scores(scores, groups)
    rows = {row.metric: row for row in score_rows("m", 0.5, both, scenes, seed=3)}
    assert set(rows) == {"ade", "collision_x", "ade/turn", "collision_x/turn"}
    assert (rows["ade"].value, rows["ade"].n, rows["ade"].unit, rows["ade"].seed) == (2, 3, "m", 3)
    assert (rows["ade/turn"].value, rows["ade/turn"].n) == (2, 2)
    assert (rows["collision_x/turn"].value, rows["collision_x/turn"].unit) == (0.5, "")
    assert rows["ade"].low <= 2 <= rows["ade"].high


def test_pairs_are_of_samples_that_count_for_both():
    a, b = np.array([1.0, 2, np.nan, 9]), np.array([0.0, 4, 1, np.nan])
    difference, p = paired_rows("ade", 0.5, "a", a, "b", b, np.arange(4))
    assert (difference.value, difference.n, difference.unit) == (-0.5, 2, "m")
    assert 0 < p.value <= 1
