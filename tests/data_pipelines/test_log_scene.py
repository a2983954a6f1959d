"""Logs as scenes: everyone where they were logged, the road where the map has it."""

import os
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.closed_loop.events import judge, kind_of, off_road
from data_pipelines.closed_loop.policies import EXPERT
from data_pipelines.closed_loop.route import log_route, log_routes, state_rows
from data_pipelines.closed_loop.simulate import LoopConfig, simulate
from data_pipelines.nuscenes.map_layers import Line, Polygon, make_map
from data_pipelines.nuscenes.scenario_log import ScenarioLog, Track, read_scenario_log
from data_pipelines.schema import LEFT, RIGHT, STRAIGHT
from data_pipelines.synthetic.camera import make_camera
from data_pipelines.synthetic.config import BARRIER, GROUND, LANE_MARK, PERSON, ROAD, VEHICLE
from data_pipelines.synthetic.geometry import pose_on
from data_pipelines.synthetic.log_scene import log_scene, logged_states, scene_frame
from data_pipelines.synthetic.render import prepare, render
from fastdrive_jax.errors import UserError

STEPS = 51
FIVE = 0.5 * np.arange(STEPS)  # metres at 5 m/s
SHARED = Path(os.environ.get("FASTDRIVE_SHARED") or Path(__file__).parents[3] / "shared")


def _track(name, category, xy, heading, size, valid=None):
    position = np.concatenate([xy, np.full((STEPS, 1), 0.8)], 1)
    valid = np.ones(STEPS, bool) if valid is None else valid
    sizes = np.tile(size, (STEPS, 1))
    return Track(name, category, position, np.full(STEPS, heading), sizes, valid)


def _log(others=(), heading=2.0, turn=0.0):
    """A car that drives straight at 5 m/s, or turns by `turn` in all, in a frame far away."""
    origin = np.array([600.0, 1600.0])
    yaws = heading + np.linspace(0, turn, STEPS)
    steps = 0.5 * np.stack([np.cos(yaws), np.sin(yaws)], -1)
    xy = origin + np.concatenate([np.zeros((1, 2)), np.cumsum(steps[:-1], 0)])
    ego = _track("ego", "vehicle.car", xy, heading, (1.73, 4.08, 1.56))
    ego = Track(ego.token, ego.category, ego.position, yaws, ego.size, ego.valid)
    ahead = np.array([np.cos(heading), np.sin(heading)])
    left = np.array([-ahead[1], ahead[0]])

    def box(begin, end, half):
        return origin + np.array(
            [begin * ahead + half * left, end * ahead + half * left,
             end * ahead - half * left, begin * ahead - half * left]
        )  # fmt: skip

    area = Polygon("a", box(-30, 120, 8.0), (box(20, 24, 1.0),))
    line = Line("l", origin + np.array([-30 * ahead + 4 * left, 120 * ahead + 4 * left]))
    layers = make_map("x", (2000, 2000), {"drivable_area": [area]}, {"lane_divider": [line]})

    def place(along, aside):
        return origin + np.multiply.outer(along, ahead) + np.multiply.outer(aside, left)

    tracks = tuple(
        _track(name, category, place(along, aside), heading + turned, size, valid)
        for name, category, along, aside, turned, size, valid in others
    )
    return ScenarioLog("scene-1", "x", 10.0, ego, tracks, layers)


def test_agents_are_where_and_when_they_were_logged():
    late = np.arange(STEPS) >= 20
    log = _log(
        [
            ("a", "vehicle.car", 12 + FIVE, np.full(STEPS, -3.0), 0.1, (1.9, 4.5, 1.6), None),
            ("b", "human.pedestrian.adult", np.full(STEPS, 15.0), 0.1 * FIVE, 1.0,
             (0.7, 0.8, 1.8), late),
        ]
    )  # fmt: skip
    scene = log_scene(log)
    car, person = scene.actors
    assert (car.size, person.size) == ((1.9, 4.5, 1.6), (0.7, 0.8, 1.8))
    for step in (0, 7, 33):
        xy, yaw = car.pose(0.1 * step, 0.0)
        np.testing.assert_allclose(xy, [12 + FIVE[step], -3.0], atol=1e-9)
        assert yaw == pytest.approx(0.1)
        # Back in the log's own frame it is what the log says.
        world = scene_frame(scene).apply(np.append(xy, 0.0))
        np.testing.assert_allclose(world[:2], log.others[0].position[step, :2], atol=1e-9)
    np.testing.assert_allclose(car.pose(0.25, 0.0)[0], [13.25, -3.0], atol=1e-9)
    assert [person.present(t) for t in (0.0, 1.94, 1.96, 4.0)] == [False, False, True, True]
    assert car.mesh.vertices[..., 0].max() == pytest.approx(4.5 / 2, abs=0.02)
    assert np.ptp(person.mesh.vertices[..., 2]) == pytest.approx(1.8, rel=0.1)


def test_the_picture_holds_what_the_log_holds_and_nobody_else():
    late = np.arange(STEPS) >= 20
    log = _log(
        [
            ("a", "vehicle.truck", 14 + FIVE, np.full(STEPS, -2.0), 0.0, (2.5, 7.0, 3.0), None),
            ("b", "human.pedestrian.adult", np.full(STEPS, 20.0), np.full(STEPS, 2.5), 1.0,
             (0.7, 0.8, 1.8), late),
            ("c", "movable_object.debris", np.full(STEPS, 16.0), np.full(STEPS, 5.0), 1.0,
             (1.0, 1.0, 1.0), None),
        ]
    )  # fmt: skip
    scene = log_scene(log)
    states = logged_states(log, scene_frame(scene), scene.task.route)
    stage, camera = prepare(scene), make_camera("CAM_FRONT", 224, 392)

    def labels(step):
        return render(scene, stage, camera, states[step], 0.1 * step).labels

    early, then = labels(0), labels(20)
    assert not (early == PERSON).any()
    assert (then == PERSON).any()
    for wanted in (VEHICLE, BARRIER, LANE_MARK):
        assert (early == wanted).sum() > 20
    # The middle of the hole, 22 m ahead, is open ground within road; the truck is not before it.
    rotation, origin = pose_on(scene.terrain, (0.0, 0.0), 0.0)
    for spot, wanted in (((21.0, 0.7), GROUND), ((27.0, 1.5), ROAD), ((17.0, 1.5), ROAD)):
        pixel, _ = camera.project((np.array([*spot, 0.0]) - origin) @ rotation)
        column, row = np.rint(pixel).astype(int)
        assert early[row, column] == wanted, spot


def test_states_and_commands_follow_the_log():
    route = log_route(_log(turn=1.2), 2.0)
    assert route.reference[0].speed == pytest.approx(5.0, rel=1e-3)
    assert route.reference[20].yaw_rate == pytest.approx(1.2 / 5.0, rel=1e-2)
    assert route.reference[20].s == pytest.approx(10.0, abs=0.1)
    assert route.command(route.reference[0]) == LEFT
    assert log_route(_log(turn=-1.2), 2.0).command(route.reference[0]) == RIGHT
    assert log_route(_log(), 2.0).command(route.reference[0]) == STRAIGHT
    with pytest.raises(UserError, match=r"2\.0 s"):
        log_route(_log(), 3.0)


def test_replaying_a_log_drives_it():
    log = _log([("a", "vehicle.car", 12 + FIVE, np.zeros(STEPS), 0.0, (1.9, 4.5, 1.6), None)])
    route = log_route(log, 2.0)
    driven = simulate([route], EXPERT, LoopConfig(seconds=2.0, latency=0.0))
    np.testing.assert_allclose(
        driven.states[0, :, :2], state_rows(route.reference)[:21, :2], atol=0.05
    )
    assert judge(route, driven.states[0]).score > 0.99


def test_kinds_of_categories():
    assert kind_of("human.pedestrian.child") == "person"
    assert kind_of("vehicle.bicycle") == "vehicle"
    assert kind_of("movable_object.barrier") == "obstacle"


def test_a_folder_without_logs_is_refused(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        log_routes(tmp_path, 2.0)


@pytest.fixture(scope="module")
def real():
    folder = SHARED / "data" / "nuscenes_mini_logs"
    if not folder.is_dir():
        pytest.skip(f"no real logs under {SHARED} (set FASTDRIVE_SHARED)")
    return folder


def test_real_logs_are_drawn_and_replayed_without_a_collision(real):
    routes = log_routes(real, 16.0)
    assert len(routes) == 6
    driven = simulate(routes, EXPERT, LoopConfig(seconds=16.0)).states
    camera = make_camera("CAM_FRONT", 224, 392)
    for route, states in zip(routes, driven, strict=True):
        logged = state_rows(route.reference)[: len(states)]
        assert not off_road(route, logged).any(), route.name
        exact, replayed = judge(route, logged), judge(route, states)
        assert (exact.collision, exact.struck, exact.score) == ("", 0, 1.0), route.name
        assert (replayed.collision, replayed.struck) == ("", 0), route.name
        assert replayed.score > 0.99
        scene = route.phases[0][1]
        picture = render(scene, prepare(scene), camera, route.reference[40], 4.0)
        assert np.isin(picture.labels, (ROAD, LANE_MARK)).mean() > 0.1, route.name
        assert (picture.labels == VEHICLE).mean() > 0.001, route.name


def test_real_agents_are_at_their_logged_places(real):
    log = read_scenario_log(real / "scene-0103.json.gz")
    scene = log_scene(log)
    frame, step = scene_frame(scene), 77
    there = [a for a in scene.actors if a.present(step / log.rate)]
    boxes = log.boxes(step)
    assert len(there) == len(boxes.tokens) > 20
    places = np.array([frame.apply(np.append(a.pose(step / log.rate, 0.0)[0], 0.0)) for a in there])
    np.testing.assert_allclose(places[:, :2], boxes.centers[:, :2], atol=1e-6)
