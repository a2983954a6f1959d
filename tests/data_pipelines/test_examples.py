from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines.examples import SAMPLE_FIELDS, Decoding, decode_example, stored_size
from data_pipelines.pictures import encode_labels, encode_mask
from data_pipelines.schema import CAMERAS, Classes

SIZE = (28, 56)
SHARDS = SimpleNamespace(classes=Classes(("sky", "road"), (1,)), scenes=("a", "b"))
DRIVING = (
    "agents",
    "agents_valid",
    "agents_kind",
    "history",
    "history_valid",
    "can_bus",
    "ego_state",
    "scene",
    "index",
)


def record(camera: str, agents: int) -> dict:
    """A record as it is read back; agent k stands 10 k metres away, the farthest first."""
    boxes = np.zeros((agents, 7, 5), np.float32)
    boxes[:, :, 0] = 10 * np.arange(agents, 0, -1)[:, None]
    mask = np.zeros((56, 56), np.uint8)
    mask[:, :28] = 1
    return {
        "mask": encode_mask(mask),
        "labels": encode_labels(mask),
        "camera": camera.encode(),
        "scene": b"b",
        "ego_state": np.array([3, 0.5, 0.1], np.float32),
        "command": 2,
        "future": np.ones((6, 2), np.float32),
        "future_valid": np.ones(6, np.uint8),
        "history": np.full((6, 2), -1, np.float32),
        "history_valid": np.array([0, 0, 0, 1, 1, 1], np.uint8),
        "can_bus": np.full(8, np.nan, np.float32),
        "intrinsic": np.array([[60, 0, 30], [0, 60, 20], [0, 0, 1]], np.float32),
        "camera_to_ego": np.eye(4, dtype=np.float32),
        "agents": boxes,
        "agents_valid": np.ones((agents, 7), np.uint8),
        "agents_kind": np.arange(agents, dtype=np.int32),
    }


def decode(fields, agents=3, most=2):
    decoding = Decoding(SIZE, "bicubic", fields, "sample", CAMERAS, most)
    return decode_example(
        (7, [record(c, agents) for c in CAMERAS]), shards=SHARDS, decoding=decoding
    )


def test_a_sample_has_what_was_asked_for_and_nothing_else_is_decoded():
    """The records have no picture at all, and no field asks for one."""
    out = decode(DRIVING)
    assert set(out) == set(DRIVING)
    assert (out["index"], out["scene"]) == (7, 1)
    assert out["history_valid"].tolist() == [False] * 3 + [True] * 3
    assert np.isnan(out["can_bus"]).all()


@pytest.mark.parametrize(("agents", "kinds"), [(0, [0, 0]), (1, [0, 0]), (2, [1, 0]), (5, [4, 3])])
def test_agents_are_filled_up_or_cut_the_nearest_first(agents, kinds):
    out = decode(DRIVING, agents)
    assert out["agents"].shape == (2, 7, 5)
    assert out["agents_valid"].shape == (2, 7)
    assert out["agents_valid"].any(axis=1).tolist() == [agents > 0, agents > 1]
    assert out["agents_kind"].tolist() == kinds
    near = [10.0, 20.0][: min(agents, 2)]
    assert out["agents"][: len(near), 0, 0].tolist() == near


def test_six_cameras_are_stacked():
    out = decode(("mask", "labels", "foreground", "intrinsic", "camera_to_ego"))
    assert out["mask"].shape == out["labels"].shape == (6, *SIZE)
    np.testing.assert_array_equal(out["foreground"], [[1, 0]] * 6)
    np.testing.assert_array_equal(out["intrinsic"][3], [[60, 0, 30], [0, 30, 10], [0, 0, 1]])
    assert stored_size(record("CAM_FRONT", 0)["mask"]) == (56, 56)
    assert set(DRIVING) < set(SAMPLE_FIELDS)
