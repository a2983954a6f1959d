"""Paths, terrain, rotations and cameras of the synthetic world."""

import math

import numpy as np
import pytest

from data_pipelines.schema import CAMERAS
from data_pipelines.synthetic.camera import make_camera
from data_pipelines.synthetic.geometry import (
    Terrain,
    path_from_curvature,
    pose_on,
    quaternion,
    rotation_z,
)


def _matrix(q):
    w, x, y, z = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def test_quaternion_gives_the_matrix_back():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        rotation *= np.sign(np.linalg.det(rotation))
        assert np.allclose(_matrix(quaternion(rotation)), rotation, atol=1e-9)
    assert np.allclose(np.abs(quaternion(rotation_z(math.pi))), [0, 0, 0, 1], atol=1e-9)


@pytest.mark.parametrize("name", CAMERAS)
def test_camera_frame_is_right_down_forward(name):
    camera = make_camera(name, 224, 392)
    right, down, forward = camera.rotation.T
    assert np.allclose(np.cross(right, down), forward)
    assert np.allclose(down, [0, 0, -1])
    pixel, depth = camera.project(camera.translation + 10 * forward + right - 2 * down)
    assert depth == pytest.approx(10)
    assert pixel[0] > camera.intrinsic[0, 2]
    assert pixel[1] < camera.intrinsic[1, 2]


def test_yaws_and_focal_lengths_are_those_of_nuscenes():
    yaws = {}
    for name in CAMERAS:
        forward = make_camera(name, 900, 1600).rotation[:, 2]
        yaws[name] = round(math.degrees(math.atan2(forward[1], forward[0])))
    assert list(yaws.values()) == [0, -55, -110, 180, 110, 55]
    assert make_camera("CAM_FRONT", 900, 1600).intrinsic[0, 0] == 1266
    assert make_camera("CAM_BACK", 900, 1600).intrinsic[0, 0] == 809


def test_camera_pitch_looks_down_when_positive():
    level, down = (make_camera("CAM_FRONT", 224, 392, pitch) for pitch in (0.0, 0.1))
    point = np.array([30.0, 0.0, 1.51])
    assert down.project(point)[0][1] == pytest.approx(
        level.project(point)[0][1] - down.intrinsic[1, 1] * math.tan(0.1), abs=0.5
    )


def test_arc_has_its_radius_and_projection_inverts_position():
    path = path_from_curvature(np.full(200, 1 / 25.0), zero=20)
    centre = np.array([0.0, 25.0])
    assert np.allclose(np.linalg.norm(path.points - centre, axis=1), 25.0, atol=0.01)
    spot, _ = path.beside(17.3, -1.5)
    assert path.project(spot) == pytest.approx(17.3, abs=0.05)
    assert path.curvature(10.0) == pytest.approx(1 / 25.0, rel=1e-3)


def test_vehicle_stands_square_on_the_slope():
    terrain = Terrain((0.05, 0.02), np.array([[0.02, 0.01], [-0.01, 0.03]]), (0.4, 1.0))
    xy, step = np.array([12.0, -7.0]), 1e-4
    numeric = [
        (terrain.height(xy + step * d) - terrain.height(xy - step * d)) / (2 * step)
        for d in np.eye(2)
    ]
    assert np.allclose(terrain.gradient(xy), numeric, atol=1e-6)
    rotation, origin = pose_on(terrain, xy, 0.7)
    assert np.allclose(rotation.T @ rotation, np.eye(3), atol=1e-9)
    assert origin[2] == pytest.approx(float(terrain.height(xy)))
    assert math.atan2(rotation[1, 0], rotation[0, 0]) == pytest.approx(0.7)
    ahead = terrain.lift(xy + 0.01 * np.array([math.cos(0.7), math.sin(0.7)])) - origin
    assert np.allclose(ahead / np.linalg.norm(ahead), rotation[:, 0], atol=1e-3)


def test_nose_down_pitch_lowers_the_view():
    flat = Terrain((0.0, 0.0), np.eye(2), (0.0, 0.0))
    rotation, _ = pose_on(flat, np.zeros(2), 0.0, pitch=0.05)
    assert rotation[2, 0] < 0
