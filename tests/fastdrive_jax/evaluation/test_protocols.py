"""Cases of the planning protocols that can be worked out by hand."""

import dataclasses

import numpy as np
import pytest
from truths import STILL, one, random_truth, random_ways, straight

from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.footprint import car_boxes, headings, way_of_origin, way_of_point
from fastdrive_jax.evaluation.open_loop import protocol_metrics
from fastdrive_jax.evaluation.protocols import PROTOCOLS, averaged
from fastdrive_jax.evaluation.truth import Area, join_truths

AHEAD = {"impromptu": 1.443713, "noavg": 1.443713, "omnidrive": 1.485793, "bevplanner": 1.485793}
# What 0.1 m cells can add: half a cell for each rounding, and a cell for the drawn outline.
SLACK = {"impromptu": 0.01, "noavg": 0.01, "omnidrive": 0.25, "bevplanner": 0.25}
ALL = tuple(PROTOCOLS)


def values(name, planned, truth, **more):
    found = protocol_metrics(PROTOCOLS[name], np.asarray(planned)[None], truth, **more)
    return {key: float(value[0]) for key, value in found.values.items()}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", ["front", "left"])
def test_a_box_touches_or_misses_by_a_little(name, side):
    """At 2 s the car of a straight plan is at x = 20 m; the true one stands still."""
    middle = 20.0 + AHEAD[name]
    for gap, hit in ((-SLACK[name], 1.0), (SLACK[name], 0.0)):
        if side == "front":
            box = ("vehicle", 4, middle + 4.084 / 2 + 3.0 / 2 + gap, 0.0, np.pi, 3.0, 1.0)
        else:
            box = ("vehicle", 4, middle, 1.85 / 2 + 1.0 / 2 + gap, 0.0, 3.0, 1.0)
        found = values(name, straight(10.0), one(boxes=[box]))
        want = {
            "impromptu": (0.0, hit / 4, hit / 6),
            "noavg": (0.0, hit, 0.0),
        }.get(name, (0.0, hit, hit))
        got = [found[f"collision_{name}_{t}s"] for t in (1, 2, 3)]
        assert got == pytest.approx(want)
        assert found[f"collision_{name}"] == pytest.approx(np.mean(want))


@pytest.mark.parametrize("name", ALL)
def test_the_box_turns_with_the_way(name):
    """Six steps round a corner: at the last the car looks to the left and its box lies there."""
    way = np.array([(2, 0), (4, 0), (4, 2), (4, 4), (4, 6), (4, 8)], float)
    front = 8.0 + AHEAD[name] + 4.084 / 2
    for gap, hit in ((-SLACK[name], True), (SLACK[name], False)):
        ahead = ("vehicle", 6, 4.0, front + 0.5 + gap, 0.0, 1.0, 1.0)
        found = values(name, way, one(boxes=[ahead]))
        assert (found[f"collision_{name}_3s"] > 0) == hit
    # Where its box would lie if it still looked ahead.
    beside = ("vehicle", 6, 4.0 + AHEAD[name] + 1.0, 8.0, 0.0, 0.4, 0.4)
    assert values(name, way, one(boxes=[beside]))[f"collision_{name}"] == 0


def test_headings_by_hand():
    way = np.array([[(2, 0), (4, 0), (4, 2), (4, 4), (4, 6), (3, 6)]], float)
    quarter = np.pi / 2
    central = [0, np.pi / 4, quarter, quarter, np.arctan2(2, -1), np.pi]
    np.testing.assert_allclose(headings(way, "central"), [central])
    np.testing.assert_allclose(headings(way, "step"), [[0, 0, *[quarter] * 3, np.pi]])
    # A plan whose ends lie within half a metre has no heading, whatever happens between.
    creeping = np.stack([np.zeros(6), 0.099 * np.arange(6) + 3], 1)[None]
    assert not headings(creeping, "central").any()
    creeping[0, :, 1] *= 1.02
    np.testing.assert_allclose(headings(creeping, "central"), quarter, atol=1e-6)
    # A step below a metre has none in the rasters of collisions.
    sideways = np.cumsum([(0, 0.99), (0, 1.01), (0, 0.5), (0, -1.2), (0, 0), (0, 1.01)], 0)[None]
    step = [0, quarter, 0, -quarter, 0, quarter]
    np.testing.assert_allclose(headings(sideways, "step"), [step])
    np.testing.assert_allclose(headings(sideways, "any_step")[0, :3], quarter)


@pytest.mark.parametrize("name", ALL)
def test_a_step_at_which_the_truth_collides_does_not_count(name):
    """Both ways meet the agent at 1 s; at 1.5 s the plan alone does."""
    boxes = [("vehicle", 2, 10.0, 0.0, 0.0, 4.0, 2.0), ("vehicle", 3, 15.0, 0.0, 0.0, 4.0, 2.0)]
    future = straight(10.0)
    future[2:, 1] = 8.0
    found = values(name, straight(10.0), one(future, boxes))
    assert found[f"collision_{name}_1s"] == 0
    want = {"impromptu": (1 / 4, 1 / 6), "noavg": (0, 0)}.get(name, (1, 1))
    assert [found[f"collision_{name}_{t}s"] for t in (2, 3)] == pytest.approx(want)


def test_which_agents_count():
    """Each protocol's own set of categories, of visibility and of agents that appear later."""
    hits = {}
    for kind in ("vehicle", "person", "cycle", "obstacle", "emergency", "other"):
        truth = one(boxes=[(kind, 2, 11.0, 0.0, 0.0, 2.0, 2.0)])
        hits[kind] = [values(n, straight(10.0), truth)[f"collision_{n}_1s"] > 0 for n in ALL]
    everything = [True, True]  # impromptu and noavg
    assert hits == {
        "vehicle": [*everything, True, True],
        "person": [*everything, False, False],
        "cycle": [*everything, True, True],
        "obstacle": [*everything, False, False],
        "emergency": [*everything, True, False],
        "other": [*everything, False, False],
    }
    truth = one(boxes=[("vehicle", 2, 11.0, 0.0, 0.0, 2.0, 2.0)])
    later = dataclasses.replace(truth.agents, valid=truth.agents.valid & (np.arange(7) > 0))
    hidden = dataclasses.replace(truth.agents, seen=np.zeros_like(truth.agents.seen))
    for agents, want in (
        (later, [*everything, False, True]),
        (hidden, [False, False, True, False]),
    ):
        changed = dataclasses.replace(truth, agents=agents)
        got = [values(n, straight(10.0), changed)[f"collision_{n}_1s"] > 0 for n in ALL]
        assert got == want


def test_a_car_that_creeps_does_not_swing():
    """Impromptu-VLA's waypoints are of the lidar, which a heading out of noise must not move."""
    # Sideways by 0.2 m a step: the heading is to the left, the lidar stays 0.94 m ahead.
    way = np.stack([np.zeros(6), 0.2 * np.arange(1, 7)], 1)
    (boxes,) = car_boxes(PROTOCOLS["impromptu"], way[None])
    np.testing.assert_allclose(boxes[5], [0.943713, 1.2 + 0.5, np.pi / 2, 4.084, 1.85], atol=1e-6)
    # At 1 m a step the lidar goes round with the car.
    (boxes,) = car_boxes(PROTOCOLS["impromptu"], 5.001 * way[None])
    np.testing.assert_allclose(boxes[5, :2], [0.0, 6.0012 + 1.443713], atol=1e-6)
    (boxes,) = car_boxes(PROTOCOLS["omnidrive"], 5.001 * way[None])
    np.testing.assert_allclose(boxes[5, :2], [0.0, 6.0012 + 1.485793], atol=1e-6)


def test_averages_by_hand():
    hits = np.array([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], bool)
    np.testing.assert_allclose(averaged("mean", hits), [[1 / 2, 1 / 4, 1 / 3], [0, 0, 1 / 6]])
    np.testing.assert_allclose(averaged("any", hits), [[1, 1, 1], [0, 0, 1]])
    np.testing.assert_allclose(averaged("last", hits), [[1, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize("name", ALL)
def test_missing_future_and_unread_answers(name):
    """Of three samples the second has no whole future and the third an answer without numbers."""
    box = ("vehicle", range(1, 7), 3.0, 0.0, 0.0, 4.0, 2.0)
    truth = join_truths([one(straight(30.0), [box])] * 3)
    valid = np.ones((3, 6), bool)
    valid[1, 5] = False
    truth = dataclasses.replace(truth, future_valid=valid)
    planned = np.stack([straight(30.0), np.full((6, 2), np.nan), np.full((6, 2), np.nan)])
    protocol = dataclasses.replace(PROTOCOLS[name], intersection=None)
    with pytest.raises(ValueError, match="not finite"):
        protocol_metrics(protocol, planned, truth)
    found = protocol_metrics(protocol, planned, truth, read=np.array([True, True, False]))
    if name == "omnidrive":
        assert found.used.tolist() == [True, False, False]
    else:
        # Scored as standing still, in the agent that stands there at every step.
        assert found.used.tolist() == [True, False, True]
        assert found.values[f"collision_{name}"].tolist() == [0.0, 1.0]


def test_leaving_the_drivable_area():
    """A street 8 m wide that ends 12 m ahead, with a hole beside the way."""
    hole = np.array([(5, 2), (7, 2), (7, 3), (5, 3)], float)
    street = Area(np.array([(-20, -4), (12, -4), (12, 4), (-20, 4)], float), (hole,))
    truth = one(drivable=((street,),))
    found = values("omnidrive", straight(6.0), truth)
    # The front reaches 3 k + 1.49 + 2.04 m: past 12 m from the third step on.
    assert [found[f"intersection_omnidrive_{t}s"] for t in (1, 2, 3)] == [0, 1, 1]
    assert found["intersection_omnidrive"] == pytest.approx(2 / 3)
    assert values("omnidrive", straight(4.0), truth)["intersection_omnidrive_2s"] == 0
    aside = np.array([(2, 1.6), (4, 1.6), *[(4, 0)] * 4], float)
    assert values("omnidrive", aside, truth)["intersection_omnidrive_1s"] == 1  # in the hole
    # Of a car that stands outside now nothing is counted.
    short = Area(np.array([(-20, -4), (3, -4), (3, 4), (-20, 4)], float))
    assert values("omnidrive", straight(6.0), one(drivable=((short,),))) == values(
        "omnidrive", STILL, one(drivable=((street,),))
    )
    # A second area fills the hole, since it is drawn later.
    whole = Area(street.exterior)
    assert (
        values("omnidrive", aside, one(drivable=((street, whole),)))["intersection_omnidrive"] == 0
    )
    assert (
        values("omnidrive", aside, one(drivable=((whole, street),)))["intersection_omnidrive"] == 1
    )


def test_the_published_box_of_leaving_lies_ahead_and_not_along_the_heading():
    """Driving to the left from x = 1 m, the box reaches to 1 + 1.49 + 0.93 m and not to 1.93 m."""
    way = np.array([(0.5, 0), (1, 0), (1, 2), (1, 4), (1, 6), (1, 8)], float)
    for gap, found in ((0.15, 0), (-0.15, 1)):
        edge = 1 + 1.485793 + 0.925 + gap
        bay = np.array([(-20, -20), (20, -20), (20, 1.5), (edge, 1.5), (edge, 20), (-20, 20)])
        got = values("omnidrive", way, one(drivable=((Area(bay),),)))
        assert [got[f"intersection_omnidrive_{t}s"] for t in (1, 2, 3)] == [0, found, found]


def test_crossing_a_boundary_line():
    """A line across the way 12 m ahead, another along it."""
    across = np.array([(12, -6), (12, 6)], float)
    truth = one(boundaries=((across,),))
    found = values("bevplanner", straight(6.0), truth)
    # The box reaches from 3 k - 0.56 to 3 k + 3.53 m: over the line at steps 3 and 4 only.
    assert [found[f"intersection_bevplanner_{t}s"] for t in (1, 2, 3)] == [0, 1, 1]
    assert values("bevplanner", straight(22.0), truth)["intersection_bevplanner"] == 1
    assert values("bevplanner", straight(33.0), truth)["intersection_bevplanner"] == 0  # leapt over
    # Steps at which the true way meets a line too are left out.
    same = one(straight(6.0), boundaries=((across,),))
    assert values("bevplanner", straight(6.0), same)["intersection_bevplanner"] == 0
    later = values("bevplanner", straight(5.0), same)
    assert [later[f"intersection_bevplanner_{t}s"] for t in (1, 2, 3)] == [0, 0, 1]  # step 5 alone
    for left, hit in ((0.7, 1.0), (1.2, 0.0)):
        along = np.array([(-30, left), (30, left)], float)
        beside = one(boundaries=((along,),))
        # The car that stands still is on the line too, but only at the start.
        moving = dataclasses.replace(beside, future=np.full((1, 6, 2), [0.0, -9.0]))
        assert values("bevplanner", straight(6.0), moving)["intersection_bevplanner"] == hit


@pytest.mark.parametrize("name", ALL)
def test_driving_as_was_driven_never_collides(name):
    truth = random_truth(np.random.default_rng(1), samples=300)
    protocol = dataclasses.replace(PROTOCOLS[name], intersection=None)
    kept = protocol_metrics(protocol, truth.future, truth)
    assert kept.values[f"collision_{name}"].sum() == 0
    other = protocol_metrics(protocol, random_ways(np.random.default_rng(2), 300), truth)
    assert other.values[f"collision_{name}"].sum() > 0


def test_what_lacks_is_said():
    bare = dataclasses.replace(one(), agents=None)
    for name in ALL:
        with pytest.raises(UserError, match=f"collisions by {name} need annotated boxes"):
            values(name, STILL, bare)
    for name in ("omnidrive", "bevplanner"):
        with pytest.raises(UserError, match=f"intersections by {name} need a vector map"):
            values(name, STILL, one(drivable=None, boundaries=None))
    unknown = one(future_valid=np.zeros((1, 6), bool))
    with pytest.raises(UserError, match="none of the 1 samples counts for impromptu"):
        values("impromptu", STILL, unknown)
    with pytest.raises(ValueError, match="must be alike"):
        values("impromptu", STILL[:5], one())
    with pytest.raises(ValueError, match="not finite"):
        values("impromptu", np.full((6, 2), np.inf), one())
    with pytest.raises(ValueError, match="around the ego origin"):
        dataclasses.replace(PROTOCOLS["omnidrive"], origin_ahead=0.9)
    with pytest.raises(ValueError, match="unknown kinds"):
        dataclasses.replace(PROTOCOLS["impromptu"], kinds=("tank",))


def test_samples_are_chosen_by_mask_index_and_token():
    truth = random_truth(np.random.default_rng(0), drivable=((),) * 40)
    chosen = truth.at(["t7", "t3"])
    assert chosen.token.tolist() == ["t7", "t3"]
    np.testing.assert_array_equal(chosen.agents.boxes, truth.agents.boxes[[7, 3]])
    assert len(chosen.drivable) == 2
    assert chosen.boundaries is None
    assert truth.take(truth.scene == "drive1").token.tolist() == [f"t{k}" for k in range(5, 10)]
    with pytest.raises(UserError, match="1 of 2 samples are not in this truth, such as x"):
        truth.at(["t7", "x"])
    with pytest.raises(UserError, match="1 of 2 drives have no drivable, such as drive"):
        join_truths([truth, one(drivable=None)])


def test_the_way_of_the_origin_is_the_inverse_of_a_points():
    rng = np.random.default_rng(0)
    steps = np.stack([rng.uniform(1.1, 6, (50, 6)), rng.uniform(-1, 1, (50, 6))], -1)
    ways = np.concatenate([np.cumsum(steps, axis=1), 0.05 * np.cumsum(steps, axis=1)])
    points = way_of_point(ways, 0.943713)
    assert np.abs(points - ways).max() > 0.1
    np.testing.assert_allclose(way_of_origin(points, 0.943713), ways, atol=1e-9)
    radius, angle = 20.0, np.arange(1, 7) * 0.1  # headings of steps lag by half of one
    ego = np.stack([radius * np.sin(angle), radius * (1 - np.cos(angle))], 1)
    lidar = ego + 0.943713 * (np.stack([np.cos(angle), np.sin(angle)], 1) - [1, 0])
    np.testing.assert_allclose(way_of_origin(lidar[None], 0.943713)[0], ego, atol=0.06)
