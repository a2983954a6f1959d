"""ScenarioNet logs and MMDetection3D's key frame, read as key frames and maps."""

import gzip
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipelines.geometry import Pose
from data_pipelines.nuscenes.mmdet_keyframe import read_mmdet_keyframe
from data_pipelines.nuscenes.scenario_log import alignment, moved_map, read_scenario_log
from fastdrive_jax.errors import UserError


def _turn(yaw):
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def _track(category, xy, yaw, length=4.0, width=2.0, steps=11, valid=None):
    return {
        "type": "VEHICLE",
        "category": category,
        "state": {
            "position": [[xy[0] + 0.5 * k, xy[1], 0.8] for k in range(steps)],
            "heading": [yaw] * steps,
            "velocity": [[5.0, 0.0]] * steps,
            "valid": valid or [1.0] * steps,
            "length": [[length]] * steps,
            "width": [[width]] * steps,
            "height": [[1.6]] * steps,
        },
    }


def _square(x, y, half):
    corners = [(-half, -half), (half, -half), (half, half), (-half, half), (-half, -half)]
    return [[x + a, y + b] for a, b in corners]


def _log():
    return {
        "id": "scene-7",
        "length": 11,
        "rate_hz": 10,
        "location": "somewhere",
        "ego_id": "self",
        "tracks": {
            "self": _track("vehicle.car", (100, 50), 0.1, length=1.7, width=4.1),
            "a": _track("vehicle.car", (110, 52), 0.1),
            "b": _track("human.pedestrian.adult", (105, 40), 1.0, 0.6, 0.7),
            "c": _track("vehicle.truck", (90, 60), 2.0, valid=[0.0] * 5 + [1.0] * 6),
        },
        "map_features": {
            "boundary_0": {"type": "ROAD_LINE_SOLID_SINGLE_WHITE", "polyline": _square(100, 50, 9)},
            "boundary_1": {"type": "ROAD_LINE_SOLID_SINGLE_WHITE", "polyline": _square(100, 50, 4)},
            "boundary_2": {"type": "ROAD_LINE_SOLID_SINGLE_WHITE", "polyline": _square(100, 50, 2)},
            "lane": {"type": "LANE_SURFACE_STREET", "polygon": _square(107, 50, 1), "polyline": []},
            "joint": {"type": "LANE_SURFACE_STREET", "polyline": [[0, 0, 1], [1, 1, 1]]},
            "y": {"type": "ROAD_LINE_SOLID_SINGLE_YELLOW", "polyline": [[1, 2], [3, 4]]},
            "w": {"type": "ROAD_LINE_BROKEN_SINGLE_WHITE", "polyline": [[1, 2], [3, 4], [5, 6]]},
        },
    }


def _write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_steps_boxes_and_poses(tmp_path):
    log = read_scenario_log(_write(tmp_path / "log.json", _log()))
    assert (log.name, log.location, list(log.keyframe_steps)) == (
        "scene-7",
        "somewhere",
        [0, 5, 10],
    )
    np.testing.assert_allclose(log.pose(5).translation, [102.5, 50, 0.8])
    np.testing.assert_allclose(log.pose(5).rotation, _turn(0.1))
    assert log.ego.size[0].tolist() == [1.7, 4.1, 1.6]  # swapped back
    first, second = log.boxes(0), log.boxes(5)
    assert first.instances == ("a", "b")
    assert second.categories == ("vehicle.car", "human.pedestrian.adult", "vehicle.truck")
    assert second.sizes[0].tolist() == [2.0, 4.0, 1.6]
    np.testing.assert_allclose(second.rotations[2], _turn(2.0))
    assert first.visibility.tolist() == [0, 0]
    assert first.lidar_points.tolist() == [-1, -1]


def test_rings_of_the_edge_become_areas_with_holes(tmp_path):
    layers = read_scenario_log(_write(tmp_path / "log.json", _log())).layers
    outer, island = layers.polygons["drivable_area"].shapes
    assert (outer.token, len(outer.exterior), len(outer.holes)) == ("boundary_0", 4, 1)
    assert np.ptp(outer.holes[0][:, 0]) == 8
    assert (island.token, island.holes) == ("boundary_2", ())
    assert [lane.token for lane in layers.polygons["lane"].shapes] == ["lane"]
    assert [line.token for line in layers.lines["road_divider"].shapes] == ["y"]
    assert [line.token for line in layers.lines["lane_divider"].shapes] == ["w"]


def test_lanes_stand_for_the_area_where_the_edge_is_not_closed(tmp_path):
    content = _log()
    for k in range(3):
        content["map_features"][f"boundary_{k}"]["polyline"].pop()
    layers = read_scenario_log(_write(tmp_path / "log.json", content)).layers
    assert [area.token for area in layers.polygons["drivable_area"].shapes] == ["lane"]


def test_alignment_finds_the_move_between_two_frames(tmp_path):
    content = _log()
    for k in range(6):
        content["tracks"][f"more{k}"] = _track("vehicle.car", (80 + 9 * k, 30 + 5 * k), 0.3 * k)
    log = read_scenario_log(_write(tmp_path / "log.json", content))
    move = Pose(_turn(0.7), np.array([500.0, -200.0, 1.5]))
    boxes = log.boxes(5)
    there = type(boxes)(
        **{**vars(boxes), "centers": move.apply(boxes.centers),
           "rotations": move.rotation @ boxes.rotations}
    )  # fmt: skip
    car = log.pose(5)
    # Another reference point in the car, as the real logs have, must not matter.
    ego = move @ Pose(car.rotation, car.translation + np.array([0.15, 0.05, -0.8]))
    found, count = alignment(boxes, car, there, ego)
    assert count == len(boxes.tokens)
    np.testing.assert_allclose(found.matrix(), move.matrix(), atol=1e-6)
    area = log.layers.polygons["drivable_area"].shapes[0]
    moved = moved_map(log.layers, found).polygons["drivable_area"].shapes[0]
    flat = np.concatenate([area.exterior, np.zeros((4, 1))], 1)
    np.testing.assert_allclose(moved.exterior, move.apply(flat)[:, :2], atol=1e-4)
    assert len(moved.holes) == 1
    far = Pose(ego.rotation, ego.translation + np.array([300.0, 0, 0]))
    with pytest.raises(UserError, match="same moment"):
        alignment(boxes, car, there, far)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("tracks"), "no 'tracks'"),
        (lambda c: c.update(ego_id="x"), "own car, 'x'"),
        (lambda c: c["tracks"]["a"]["state"].pop("heading"), "Track a .* lacks heading"),
        (lambda c: c["tracks"]["a"]["state"]["valid"].pop(), "Track a .* damaged"),
        (lambda c: c["tracks"].update(a=_track("vehicle.car", (0, 0), 0, steps=4)), "4 steps"),
        (lambda c: c["map_features"]["y"].update(polyline=[1, 2]), "feature y .* no points"),
    ],
)
def test_damage_is_one_sentence(tmp_path, damage, message):
    content = _log()
    damage(content)
    with pytest.raises(UserError, match=message):
        read_scenario_log(_write(tmp_path / "log.json", content))


def test_unreadable_files_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no log"):
        read_scenario_log(tmp_path / "log.json.gz")
    (tmp_path / "log.json.gz").write_bytes(gzip.compress(json.dumps(_log()).encode())[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        read_scenario_log(tmp_path / "log.json.gz")
    with pytest.raises(UserError, match="is not a log but a list"):
        read_scenario_log(_write(tmp_path / "log.json", []))
    with pytest.raises(UserError, match="no field 'keyframe'"):
        read_mmdet_keyframe(_write(tmp_path / "info.json", {}), "scene", "place")
    wrong = {"metainfo": {"categories": {}}, "keyframe": {"ego2global": [1, 2]}}
    with pytest.raises(UserError, match="damaged"):
        read_mmdet_keyframe(_write(tmp_path / "info.json", wrong), "scene", "place")


def _shared(*parts):
    shared = os.environ.get("FASTDRIVE_SHARED") or Path(__file__).parents[3] / "shared"
    path = Path(shared).joinpath("data", *parts)
    if not path.exists():
        pytest.skip(f"no real data at {path} (set FASTDRIVE_SHARED)")
    return path


def test_real_cars_drive_on_the_drivable_area():
    files = sorted(_shared("nuscenes_mini_logs").glob("scene-*.json.gz"))
    assert files
    for path in files:
        log = read_scenario_log(path)
        assert log.ego.size[0, :2].tolist() == [1.73, 4.08]  # a Renault Zoe
        inside = []
        for step in log.keyframe_steps:
            xy = log.ego.position[step, :2]
            near = log.layers.near(xy, 1.0).polygons["drivable_area"].shapes
            inside.append(any(_holds(area, xy) for area in near))
        assert np.mean(inside) > 0.97, path.name
        assert len(log.boxes(0).tokens) > 5


def _holds(area, xy):
    def within(ring):
        outline = (ring - xy).astype(np.float32)[:, None]
        return cv2.pointPolygonTest(outline, (0.0, 0.0), False) > 0

    return within(area.exterior) and not any(within(hole) for hole in area.holes)


def test_real_log_and_key_frame_of_the_same_moment_agree():
    """The log keeps the global frame: boxes agree to a millimetre, the car itself by 0.16 m."""
    log = read_scenario_log(_shared("nuscenes_mini_logs", "scene-0061.json.gz"))
    path = _shared("nuscenes_samples", "original", "keyframe.json")
    keyframe = read_mmdet_keyframe(path, "scene-0061", "singapore-onenorth")
    assert keyframe.token == "ca9a282c9e77460f8360f564131a8af5"
    assert keyframe.timestamp == 1532402927647951
    assert len(keyframe.boxes.tokens) == 68  # and one of no detection class
    move, count = alignment(log.boxes(0), log.pose(0), keyframe.boxes, keyframe.ego_to_global)
    assert count == 68
    np.testing.assert_allclose(move.matrix(), np.eye(4), atol=1e-3)
    offset = keyframe.ego_to_global.translation - log.pose(0).translation
    assert 0.14 < np.hypot(*offset[:2]) < 0.17
    for k, instance in enumerate(log.boxes(0).categories):
        away = np.linalg.norm(keyframe.boxes.centers - log.boxes(0).centers[k], axis=1)
        near = int(away.argmin())
        if away[near] < 0.01:
            np.testing.assert_allclose(
                keyframe.boxes.sizes[near], log.boxes(0).sizes[k], atol=1e-3, err_msg=instance
            )
            turn = keyframe.boxes.rotations[near].T @ log.boxes(0).rotations[k]
            assert np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)) < 0.005
    # Each camera's own ego pose: the car drove on at about 9 m/s between the pictures.
    for view in keyframe.cameras:
        seconds = (view.timestamp - keyframe.timestamp) / 1e6
        way = keyframe.ego_to_global.inverse().apply(view.ego_to_global.translation)
        assert abs(way[0] - 9.0 * seconds) < 0.05
        assert abs(way[1]) < 0.05
