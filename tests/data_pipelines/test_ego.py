import numpy as np
import pytest

from data_pipelines.ego import command_of, plans_from_poses
from data_pipelines.geometry import Pose, rotation_matrix
from data_pipelines.schema import LEFT, RIGHT, STRAIGHT


def pose(seconds, x, y=0.0, yaw=0.0):
    return {
        "timestamp": seconds * 1e6,
        "translation": [x, y, 0.0],
        "rotation": [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)],
    }


def read_plans(rows):
    poses = [Pose(rotation_matrix(row["rotation"]), np.array(row["translation"])) for row in rows]
    return plans_from_poses([row["timestamp"] for row in rows], poses)


def test_rotation_matrix_turns_x_to_y_at_ninety_degrees():
    half = np.sqrt(0.5)
    np.testing.assert_allclose(
        rotation_matrix([half, 0, 0, half]) @ [1, 0, 0], [0, 1, 0], atol=1e-12
    )
    np.testing.assert_allclose(
        rotation_matrix([3, 0, 0, 3]), rotation_matrix([half, 0, 0, half]), atol=1e-12
    )


def test_speed_and_acceleration_are_differences_backwards():
    # x = t^2: mean speeds 0.5, 1.5, 2.5 over half-second steps, gain 2 m/s^2.
    plans = read_plans([pose(t, t * t) for t in (0.0, 0.5, 1.0, 1.5)])
    np.testing.assert_allclose([p.ego_state[0] for p in plans], [0.5, 0.5, 1.5, 2.5], atol=1e-6)
    np.testing.assert_allclose([p.ego_state[1] for p in plans], [0, 0, 2, 2], atol=1e-5)


def test_reversing_has_negative_speed():
    plans = read_plans([pose(0.0, 0.0), pose(0.5, -1.0)])
    assert plans[1].ego_state[0] == pytest.approx(-2)


def test_yaw_rate_goes_through_the_seam():
    plans = read_plans([pose(0.0, 0.0, yaw=3.1), pose(0.5, 0.0, yaw=-3.1)])
    assert plans[1].ego_state[2] == pytest.approx((2 * np.pi - 6.2) / 0.5, abs=1e-4)


def test_future_is_seen_from_the_present_frame():
    plans = read_plans([pose(0.0, 1.0, 2.0, np.pi / 2), pose(0.5, 1.0, 5.0, 0.0)])
    np.testing.assert_allclose(plans[0].future[0], [3, 0], atol=1e-6)
    assert plans[0].future_valid.tolist() == [True] + [False] * 5


def test_a_single_pose_stands_still():
    (plan,) = read_plans([pose(0.0, 7.0)])
    assert not plan.ego_state.any()
    assert not plan.future_valid.any()
    assert plan.command == STRAIGHT


@pytest.mark.parametrize(
    ("sideways", "command"), [(2.1, LEFT), (1.9, STRAIGHT), (-1.9, STRAIGHT), (-2.1, RIGHT)]
)
def test_two_metres_sideways_make_a_turn(sideways, command):
    future = np.zeros((6, 2))
    future[5, 1] = sideways
    assert command_of(future, np.ones(6, bool)) == command


def test_command_uses_the_last_waypoint_that_exists():
    future = np.zeros((6, 2))
    future[3, 1], future[5, 1] = 3.0, -9.0
    assert command_of(future, np.arange(6) < 4) == LEFT


def test_real_drive_has_the_published_future():
    """Scene-0061 of nuScenes, whose way ahead the data's README states."""
    import gzip
    import json
    import os
    from pathlib import Path

    shared = os.environ.get("FASTDRIVE_SHARED") or Path(__file__).parents[3] / "shared"
    path = Path(shared) / "data" / "nuscenes_mini_logs" / "scene-0061.json.gz"
    if not path.is_file():
        pytest.skip(f"no real log at {path} (set FASTDRIVE_SHARED)")
    log = json.loads(gzip.decompress(path.read_bytes()))
    state = log["tracks"][log["ego_id"]]["state"]
    poses = [
        pose(k / 10, *state["position"][k][:2], yaw=state["heading"][k]) for k in range(0, 31, 5)
    ]
    (plan, *_) = read_plans(poses)
    stated = [
        (4.49, -0.01),
        (8.86, 0.01),
        (13.06, 0.08),
        (17.46, 0.18),
        (21.29, 0.27),
        (25.18, 0.41),
    ]
    np.testing.assert_allclose(plan.future, stated, atol=0.02)
    assert plan.command == STRAIGHT
