"""What the car did and will do, from its poses at the key frames of one drive."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.geometry import Pose, yaw_of
from data_pipelines.schema import FUTURE_STEPS, HISTORY_STEPS, LEFT, RIGHT, STRAIGHT

TURN_METRES = (
    2.0  # sideways displacement at 3 s that makes a turn, as in UniAD's and VAD's protocol
)


@dataclass(frozen=True)
class Plan:
    """Ego state, command and the ways ahead and behind; fields as in `schema.Record`."""

    ego_state: np.ndarray
    command: int
    future: np.ndarray
    future_valid: np.ndarray
    history: np.ndarray
    history_valid: np.ndarray


def plans_from_poses(timestamps: Sequence[int], poses: Sequence[Pose]) -> list[Plan]:
    """Plans for the key frames of one drive.

    Waypoint k is the ego position k key frames later (2 Hz), seen from the present ego frame, and
    the history ends with the position one key frame ago. Speed
    and yaw rate are differences to the key frame before, acceleration is the change of that speed;
    a drive's first key frame has none before it, so its speed and yaw rate look one frame ahead and
    acceleration is 0 until there are two speeds.

    Args:
        timestamps: Microseconds, rising.
        poses: Ego to global at those times.
    """
    count = len(poses)
    times = np.array(timestamps, np.float64) * 1e-6
    places = np.array([pose.translation for pose in poses], np.float64).reshape(count, 3)
    turns = [pose.rotation for pose in poses]
    yaws = np.unwrap([float(yaw_of(turn)) for turn in turns])
    if count > 1:
        gaps = np.maximum(np.diff(times), 1e-3)
        # The forward part of the displacement, so that reversing has a negative speed.
        ahead = np.array([(turns[k].T @ (places[k + 1] - places[k]))[0] for k in range(count - 1)])
        speed = np.concatenate([ahead[:1] / gaps[:1], ahead / gaps])
        rate = np.diff(yaws) / gaps
        rate = np.concatenate([rate[:1], rate])
        # Index k of speed belongs to the step that ends at k; 0 repeats step 1.
        gain = np.concatenate([[0.0], np.diff(speed) / gaps])
    else:
        speed = rate = gain = np.zeros(count)
    plans = []
    for k in range(count):
        future = np.zeros((FUTURE_STEPS, 2), np.float32)
        valid = np.zeros(FUTURE_STEPS, bool)
        steps = places[k + 1 : k + 1 + FUTURE_STEPS] - places[k]
        future[: len(steps)] = (steps @ turns[k])[:, :2]
        valid[: len(steps)] = True
        history, known = np.zeros((HISTORY_STEPS, 2), np.float32), np.zeros(HISTORY_STEPS, bool)
        behind = places[max(0, k - HISTORY_STEPS) : k] - places[k]
        if len(behind):
            history[-len(behind) :] = (behind @ turns[k])[:, :2]
            known[-len(behind) :] = True
        state = np.array([speed[k], gain[k], rate[k]], np.float32)
        plans.append(Plan(state, command_of(future, valid), future, valid, history, known))
    return plans


def command_of(future: np.ndarray, valid: np.ndarray) -> int:
    """Command from the sideways place at 3 s, or at the last waypoint that there is.

    Args:
        future: [6, 2] waypoints, x forward, y left.
        valid: [6] which of them exist, true ones first.
    """
    if not valid.any():
        return STRAIGHT
    sideways = future[np.flatnonzero(valid)[-1], 1]
    return LEFT if sideways > TURN_METRES else RIGHT if sideways < -TURN_METRES else STRAIGHT
