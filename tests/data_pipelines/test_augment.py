import numpy as np

from data_pipelines.augment import mirror, mirrored_cameras
from data_pipelines.geometry import Pose, project, rotation_matrix
from data_pipelines.schema import CAMERAS

SIZE = (56, 84)


def calibrations(rng):
    """Six cameras that look any way, with skew and a principal point off the middle."""
    intrinsic = np.array([[60.0, 2, 40], [0, 55, 25], [0, 0, 1]]) + np.zeros((6, 1, 1))
    poses = [Pose(rotation_matrix(rng.normal(size=4)), rng.normal(size=3)) for _ in range(6)]
    return intrinsic, np.stack([pose.matrix() for pose in poses])


def test_mirrored_points_fall_on_mirrored_pixels():
    """A point and its mirror image project to columns that add up to the picture's width."""
    rng = np.random.default_rng(0)
    intrinsic, to_ego = calibrations(rng)
    points = rng.uniform(-20, 20, (200, 3))
    example = {"intrinsic": intrinsic.astype(np.float32), "camera_to_ego": to_ego}
    turned = mirror(example, SIZE, mirrored_cameras(CAMERAS))
    for camera, name in enumerate(CAMERAS):
        other = mirrored_cameras(CAMERAS)[camera]
        assert name.replace("LEFT", "?").replace("RIGHT", "?") == (
            CAMERAS[other].replace("LEFT", "?").replace("RIGHT", "?")
        )
        before = in_camera(points, to_ego[camera])
        after = in_camera(points * [1, -1, 1], turned["camera_to_ego"][other])
        ahead = before[:, 2] > 1
        assert ahead.sum() > 10
        np.testing.assert_allclose(after, before * [-1, 1, 1], atol=1e-5)
        old = project(before[ahead], intrinsic[camera])
        new = project(after[ahead], turned["intrinsic"][other])
        np.testing.assert_allclose(old[:, 0] + new[:, 0], SIZE[1], atol=1e-3)
        np.testing.assert_allclose(old[:, 1], new[:, 1], atol=1e-3)
        assert np.linalg.det(turned["camera_to_ego"][other][:3, :3]) > 0.99


def in_camera(points, to_ego):
    pose = Pose(to_ego[:3, :3], to_ego[:3, 3])
    return pose.inverse().apply(points)


def test_what_has_a_side_changes_it_and_twice_is_nothing():
    rng = np.random.default_rng(1)
    example = {
        "image": rng.integers(0, 256, (6, *SIZE, 3), np.uint8),
        "mask": rng.integers(0, 2, (6, *SIZE), np.uint8),
        "foreground": rng.random((6, 6), np.float32),
        "future": rng.normal(size=(6, 2)).astype(np.float32),
        "history": rng.normal(size=(6, 2)).astype(np.float32),
        "ego_state": rng.normal(size=3).astype(np.float32),
        "can_bus": rng.normal(size=8).astype(np.float32),
        "agents": rng.normal(size=(4, 7, 5)).astype(np.float32),
        "command": np.int32(0),
        "speed": np.float32(3),
    }
    swapped = mirrored_cameras(CAMERAS)
    turned = mirror(example, SIZE, swapped)
    left, right = CAMERAS.index("CAM_FRONT_LEFT"), CAMERAS.index("CAM_FRONT_RIGHT")
    np.testing.assert_array_equal(turned["image"][right], example["image"][left][:, ::-1])
    grid = example["foreground"][0].reshape(2, 3)
    np.testing.assert_array_equal(turned["foreground"][0].reshape(2, 3), grid[:, ::-1])
    np.testing.assert_array_equal(turned["future"], example["future"] * [1, -1])
    np.testing.assert_array_equal(turned["agents"][..., 2], -example["agents"][..., 2])
    np.testing.assert_array_equal(
        turned["can_bus"], example["can_bus"] * [1, 1, -1, 1, -1, 1, -1, -1]
    )
    assert turned["command"] == 2
    assert turned["command"].shape == turned["speed"].shape == ()
    again = mirror(turned, SIZE, swapped)
    for key, value in example.items():
        np.testing.assert_array_equal(again[key], value)
        assert again[key].dtype == value.dtype
