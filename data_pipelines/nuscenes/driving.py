"""What goes on around the car at each key frame of a drive: plan, CAN bus and other agents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.ego import Plan, plans_from_poses
from data_pipelines.geometry import yaw_of
from data_pipelines.nuscenes.can_bus import read_can_bus
from data_pipelines.nuscenes.frames import Keyframe
from data_pipelines.nuscenes.keyframes import scene_keyframes
from data_pipelines.nuscenes.tables import NuScenes, Scene
from data_pipelines.schema import AGENT_KINDS, CAN_FIELDS, FUTURE_STEPS

_KINDS = (  # nuScenes categories by their beginnings; the first that fits
    ("vehicle.bicycle", "cycle"),
    ("vehicle.motorcycle", "cycle"),
    ("vehicle", "vehicle"),
    ("human", "person"),
    ("movable_object", "obstacle"),
)


@dataclass(frozen=True)
class Agents:
    """Annotated things at one key frame and after it; fields as in `schema.Record`."""

    boxes: np.ndarray
    valid: np.ndarray
    kind: np.ndarray


@dataclass(frozen=True)
class Moment:
    """A key frame and what the car did, was told by its sensors, and had around it.

    Attributes:
        keyframe: The moment.
        plan: From the poses of the drive.
        can_bus: [8], NaN where absent.
        agents: None of them where the set has no annotations.
    """

    keyframe: Keyframe
    plan: Plan
    can_bus: np.ndarray
    agents: Agents


def scene_moments(nuscenes: NuScenes, scene: Scene) -> list[Moment]:
    """All moments of one drive in time order.

    Raises:
        UserError: A key frame is incomplete, or a file of the CAN bus is damaged.
    """
    frames = list(scene_keyframes(nuscenes, scene))
    poses = [frame.ego_to_global for frame in frames]
    times = [frame.timestamp for frame in frames]
    bus = read_can_bus(nuscenes.root, scene.name)
    absent = np.full(len(CAN_FIELDS), np.nan)
    return [
        Moment(
            frame,
            plan,
            absent if bus is None else bus.at(frame.timestamp),
            agents_from(frames[k : k + 1 + FUTURE_STEPS]),
        )
        for k, (frame, plan) in enumerate(zip(frames, plans_from_poses(times, poses), strict=True))
    ]


def agents_from(frames: Sequence[Keyframe]) -> Agents:
    """Agents annotated at `frames[0]`, seen from its ego frame, now and at the frames after it.

    Animals and static objects are left out: no collision with them is counted in planning.
    """
    now = frames[0]
    rows: dict[str, int] = {}
    kinds = []
    if now.boxes is not None:
        for token, category in zip(now.boxes.instances, now.boxes.categories, strict=True):
            kind = next((kind for begin, kind in _KINDS if category.startswith(begin)), None)
            if kind is not None:
                rows[token] = len(kinds)
                kinds.append(AGENT_KINDS.index(kind))
    boxes = np.zeros((len(kinds), FUTURE_STEPS + 1, 5), np.float32)
    valid = np.zeros((len(kinds), FUTURE_STEPS + 1), bool)
    to_ego = now.ego_to_global.inverse()
    for step, frame in enumerate(frames):
        if not rows or frame.boxes is None:
            continue
        chosen = [k for k, token in enumerate(frame.boxes.instances) if token in rows]
        places = [rows[frame.boxes.instances[k]] for k in chosen]
        boxes[places, step, :2] = to_ego.apply(frame.boxes.centers[chosen])[:, :2]
        boxes[places, step, 2] = yaw_of(to_ego.rotation @ frame.boxes.rotations[chosen])
        boxes[places, step, 3:] = frame.boxes.sizes[chosen][:, [1, 0]]
        valid[places, step] = True
    return Agents(boxes, valid, np.array(kinds, np.int32))
