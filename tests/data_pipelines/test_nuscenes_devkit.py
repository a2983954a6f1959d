"""Our reader and the official devkit, on the same synthetic set, give the same numbers."""

import json

import numpy as np
import pytest

from data_pipelines.geometry import project
from data_pipelines.nuscenes.driving import scene_moments
from data_pipelines.nuscenes.keyframes import read_keyframes
from data_pipelines.nuscenes.splits import official_splits
from data_pipelines.nuscenes.tables import open_nuscenes
from data_pipelines.schema import AGENT_KINDS
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from data_pipelines.synthetic.tables import VERSION

_HOW = (
    "needs the official devkit: pip install --no-deps nuscenes-devkit==1.2.0 && "
    "pip install scikit-learn pyquaternion cachetools shapely"
)
devkit = pytest.importorskip("nuscenes.nuscenes", reason=_HOW)
POSE = 1e-9
PIXELS = 1e-3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    config = WorldConfig(seed=3, train_scenes=3, val_scenes=1, keyframes_per_scene=8, workers=1)
    root = generate(tmp_path_factory.mktemp("devkit") / "data", config, progress=False)
    write_can_bus(root, json.loads((root / VERSION / "sample.json").read_text()))
    return root


def write_can_bus(root, samples):
    """Messages of one scene only, as real ones are laid out; the devkit reads those of scene-0001
    and so on, so a scene is renamed."""
    scenes = root / VERSION / "scene.json"
    rows = json.loads(scenes.read_text())
    old, rows[0]["name"] = rows[0]["name"], "scene-0001"
    scenes.write_text(json.dumps(rows))
    splits = root / VERSION / "splits.json"
    splits.write_text(splits.read_text().replace(old, "scene-0001"))
    times = [row["timestamp"] for row in samples if row["scene_token"] == rows[0]["token"]]
    rng = np.random.default_rng(0)
    steps = range(min(times) - 100_000, max(times) + 100_000)
    folder = root / "can_bus"
    folder.mkdir()
    pose = [
        {
            "accel": rng.normal(size=3).tolist(),
            "orientation": [1, 0, 0, 0],
            "pos": [0, 0, 0],
            "rotation_rate": rng.normal(size=3).tolist(),
            "utime": time,
            "vel": [float(rng.normal(8, 1)), 0.0, 0.0],
        }
        for time in steps[::20_123]
    ]
    steering = [{"utime": time, "value": float(rng.normal())} for time in steps[::10_007]]
    (folder / "scene-0001_pose.json").write_text(json.dumps(pose))
    (folder / "scene-0001_steeranglefeedback.json").write_text(json.dumps(steering))


@pytest.fixture(scope="module")
def theirs(root):
    return devkit.NuScenes(VERSION, str(root), verbose=False)


@pytest.fixture(scope="module")
def ours(root):
    return open_nuscenes(root)


def test_poses_and_calibration(ours, theirs):
    from pyquaternion import Quaternion

    frames = list(read_keyframes(ours))
    assert {frame.token for frame in frames} == {row["token"] for row in theirs.sample}
    worst = 0.0
    for frame in frames:
        sample = theirs.get("sample", frame.token)
        scene = theirs.get("scene", sample["scene_token"])
        assert (frame.scene, frame.timestamp) == (scene["name"], sample["timestamp"])
        assert frame.location == theirs.get("log", scene["log_token"])["location"]
        assert {view.channel for view in frame.cameras} == set(sample["data"])
        for view in frame.cameras:
            data = theirs.get("sample_data", sample["data"][view.channel])
            assert view.filename == data["filename"]
            assert view.size == (data["height"], data["width"])
            for pose, row in (
                (view.ego_to_global, theirs.get("ego_pose", data["ego_pose_token"])),
                (
                    view.camera_to_ego,
                    theirs.get("calibrated_sensor", data["calibrated_sensor_token"]),
                ),
            ):
                rotation = Quaternion(row["rotation"]).rotation_matrix
                worst = max(worst, np.abs(pose.rotation - rotation).max())
                worst = max(worst, np.abs(pose.translation - row["translation"]).max())
    print(f"poses: max abs error {worst:.1e}")
    assert worst <= POSE


def test_box_corners_in_the_picture(ours, theirs):
    from nuscenes.utils.geometry_utils import view_points

    worst, count = 0.0, 0
    for frame in read_keyframes(ours):
        corners = frame.boxes.corners()
        place = {token: k for k, token in enumerate(frame.boxes.tokens)}
        sample = theirs.get("sample", frame.token)
        assert set(place) == set(sample["anns"])
        for view in frame.cameras:
            _, boxes, intrinsic = theirs.get_sample_data(sample["data"][view.channel])
            for box in boxes:
                k = place[box.token]
                assert frame.boxes.categories[k] == box.name
                expected = view_points(box.corners(), intrinsic, normalize=True)[:2].T
                ahead = box.corners()[2] > 0.5
                pixels = project(view.global_to_camera.apply(corners[k]), view.intrinsic)
                worst = max(worst, np.abs(pixels - expected)[ahead].max(initial=0))
                count += ahead.sum()
    print(f"projections: max abs error {worst:.1e} px of {count} corners")
    assert count > 1000
    assert worst <= PIXELS


def test_future_boxes_follow_the_instances(ours, theirs):
    """Each agent's centre at the future steps, by walking the devkit's chain of annotations."""
    from pyquaternion import Quaternion

    checked = 0
    for scene in ours.scenes.values():
        for moment in scene_moments(ours, scene):
            frame, agents = moment.keyframe, moment.agents
            kept = [
                token
                for token, category in zip(frame.boxes.tokens, frame.boxes.categories, strict=True)
                if not category.startswith(("animal", "static"))
            ]
            assert len(kept) == len(agents.kind)
            ego = frame.ego_to_global
            for row, token in enumerate(kept):
                annotation = theirs.get("sample_annotation", token)
                kind = AGENT_KINDS[agents.kind[row]]
                assert (kind == "person") == annotation["category_name"].startswith("human")
                for step in range(7):
                    assert agents.valid[row, step] == bool(annotation)
                    if not annotation:
                        continue
                    centre = ego.rotation.T @ (annotation["translation"] - ego.translation)
                    turn = ego.rotation.T @ Quaternion(annotation["rotation"]).rotation_matrix
                    width, length, _ = annotation["size"]
                    expected = [*centre[:2], np.arctan2(turn[1, 0], turn[0, 0]), length, width]
                    np.testing.assert_allclose(agents.boxes[row, step], expected, atol=1e-4)
                    checked += 1
                    following = annotation["next"]
                    annotation = theirs.get("sample_annotation", following) if following else None
    assert checked > 1000


def test_ways_ahead_and_behind(ours, theirs):
    for scene in ours.scenes.values():
        moments = scene_moments(ours, scene)
        tokens = [moment.keyframe.token for moment in moments]
        for k, moment in enumerate(moments):
            data = theirs.get("sample_data", theirs.get("sample", tokens[k])["data"]["CAM_FRONT"])
            assert moment.plan.future_valid.sum() == min(6, len(tokens) - 1 - k)
            assert moment.plan.history_valid.sum() == min(6, k)
            now = theirs.get("ego_pose", data["ego_pose_token"])["translation"]
            way = {-step: moment.plan.history[-step] for step in range(1, min(6, k) + 1)}
            way |= {s: moment.plan.future[s - 1] for s in range(1, min(6, len(tokens) - 1 - k) + 1)}
            for step, found in way.items():
                other = theirs.get("sample", tokens[k + step])["data"]["CAM_FRONT"]
                pose = theirs.get("sample_data", other)["ego_pose_token"]
                there = theirs.get("ego_pose", pose)["translation"]
                ego = moment.keyframe.ego_to_global
                expected = ego.rotation.T @ np.subtract(there, now)
                np.testing.assert_allclose(found, expected[:2], atol=1e-4)


def test_can_bus(root, ours):
    api = pytest.importorskip("nuscenes.can_bus.can_bus_api")
    bus = api.NuScenesCanBus(str(root))
    pose = bus.get_messages("scene-0001", "pose")
    steering = bus.get_messages("scene-0001", "steeranglefeedback")
    assert "CAN bus" in str(ours.absent)
    assert "3 of 4 scenes" in str(ours.absent)
    for name, scene in ours.scenes.items():
        for moment in scene_moments(ours, scene):
            if name != "scene-0001":
                assert np.isnan(moment.can_bus).all()
                continue
            time = moment.keyframe.timestamp
            near = min(pose, key=lambda message: abs(message["utime"] - time))
            wheel = min(steering, key=lambda message: abs(message["utime"] - time))
            expected = [near["vel"][0], *near["accel"], *near["rotation_rate"], wheel["value"]]
            np.testing.assert_array_equal(moment.can_bus, expected)


def test_official_splits():
    from nuscenes.utils.splits import create_splits_scenes

    splits = create_splits_scenes()
    for version, names in (
        ("v1.0-trainval", {"train": "train", "val": "val"}),
        ("v1.0-mini", {"train": "mini_train", "val": "mini_val"}),
        ("v1.0-test", {"test": "test"}),
    ):
        scenes = sorted(scene for name in names.values() for scene in splits[name])
        found = official_splits(version, scenes)
        assert {split: sorted(splits[name]) for split, name in names.items()} == {
            split: list(members) for split, members in found.items()
        }
