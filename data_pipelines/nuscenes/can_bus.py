"""The CAN bus expansion: what the car's own sensors said, by scene.

`ROOT/can_bus/SCENE_pose.json` (50 Hz) has velocity, acceleration and rotation rate,
`SCENE_steeranglefeedback.json` (100 Hz) the steering angle.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.schema import CAN_FIELDS
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import read_json

_FARTHEST = 500_000  # microseconds to the nearest message; farther apart, the value is absent


@dataclass(frozen=True)
class CanBus:
    """Messages of one scene in time order.

    Attributes:
        pose_times: [P] microseconds.
        pose: [P, 7] forward speed in m/s, acceleration in m/s^2 and rotation rate in rad/s (x
            forward, y left, z up).
        steering_times: [S] microseconds.
        steering: [S] steering wheel angle in rad, left positive.
    """

    pose_times: np.ndarray
    pose: np.ndarray
    steering_times: np.ndarray
    steering: np.ndarray

    def at(self, timestamp: int) -> np.ndarray:
        """`CAN_FIELDS` [8] of the messages nearest to a time, NaN where none is within 0.5 s."""
        values = np.full(len(CAN_FIELDS), np.nan)
        k = _nearest(self.pose_times, timestamp)
        if k is not None:
            values[:7] = self.pose[k]
        k = _nearest(self.steering_times, timestamp)
        if k is not None:
            values[7] = self.steering[k]
        return values


def has_can_bus(root: Path, scene: str) -> bool:
    """Whether the expansion has this scene; it lacks some, such as scene-0161."""
    return _path(root, scene, "pose").is_file()


def read_can_bus(root: Path, scene: str) -> CanBus | None:
    """The messages of a scene, None where the expansion does not have it.

    Raises:
        UserError: A file is damaged.
    """
    if not has_can_bus(root, scene):
        return None
    rows = read_json(_path(root, scene, "pose"))
    steering_path = _path(root, scene, "steeranglefeedback")
    steering = read_json(steering_path) if steering_path.is_file() else []
    try:
        pose = [(row["vel"][0], *row["accel"], *row["rotation_rate"]) for row in rows]
        bus = CanBus(
            np.array([row["utime"] for row in rows], np.int64),
            np.array(pose, np.float64).reshape(-1, 7),
            np.array([row["utime"] for row in steering], np.int64),
            np.array([row["value"] for row in steering], np.float64),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"The CAN bus of {scene} in {root / 'can_bus'} is not as published ({error!r}); "
            "restore its files or remove them."
        ) from error
    return bus


def _path(root: Path, scene: str, kind: str) -> Path:
    return Path(root) / "can_bus" / f"{scene}_{kind}.json"


def _nearest(times: np.ndarray, timestamp: int) -> int | None:
    if not len(times):
        return None
    k = int(np.argmin(np.abs(times - timestamp)))
    return k if abs(int(times[k]) - timestamp) <= _FARTHEST else None
