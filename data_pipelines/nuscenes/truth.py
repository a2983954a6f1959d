"""What plans are measured against, from a data set in the nuScenes layout or from driving logs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.ego import plans_from_poses
from data_pipelines.geometry import Pose, yaw_of
from data_pipelines.nuscenes.frames import Boxes
from data_pipelines.nuscenes.keyframes import scene_keyframes
from data_pipelines.nuscenes.map_layers import MapFolder, expansion_path
from data_pipelines.nuscenes.road_patches import RoadMap, road_map, road_patch
from data_pipelines.nuscenes.scenario_log import ScenarioLog
from data_pipelines.nuscenes.tables import LIDAR, NuScenes, open_nuscenes
from data_pipelines.schema import FUTURE_STEPS, HISTORY_STEPS
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.truth import (
    KINDS,
    DrivingTruth,
    LidarWays,
    join_truths,
    pad_agents,
)

_KINDS = (  # nuScenes categories by their beginnings; the first that fits
    ("vehicle.bicycle", "cycle"),
    ("vehicle.motorcycle", "cycle"),
    ("vehicle.emergency", "emergency"),
    ("vehicle", "vehicle"),
    ("human", "person"),
    ("movable_object", "obstacle"),
)


def driving_truth(root: Path, version: str | None = None, split: str | None = None) -> DrivingTruth:
    """The truth of a split in drive order, with the tokens of its samples.

    The ways are those of the ego poses. A `planning.json` is not read: it may go on after a drive's
    last key frame, where no agent is annotated and no collision could be seen.

    Args:
        root: Folder that holds `v1.0-*/` and, for the map, `maps/expansion/`.
        version: Table folder; may be left out when there is only one.
        split: One of its splits; None for all scenes of all splits.

    Returns:
        `agents` is None where the set has no annotations (v1.0-test), `drivable` and `boundaries`
        where it has no map of any of these scenes; the protocols that need them say so.

    Raises:
        UserError: A table is missing or damaged, there is no such split, or the maps of some but
            not all places are missing.
    """
    nuscenes = open_nuscenes(Path(root), version)
    if split is not None and split not in nuscenes.splits:
        raise UserError(
            f"{root} has no split {split!r}; it has {', '.join(sorted(nuscenes.splits))}."
        )
    chosen = nuscenes.splits.values() if split is None else [nuscenes.splits[split]]
    return scenes_truth(nuscenes, [name for names in chosen for name in names])


def scenes_truth(nuscenes: NuScenes, names: Sequence[str]) -> DrivingTruth:
    """The truth of some scenes; see `driving_truth`."""
    roads = _roads(nuscenes, {nuscenes.scenes[name].location for name in names})
    truths = []
    for name in names:
        frames = list(scene_keyframes(nuscenes, nuscenes.scenes[name]))
        if not frames:
            continue
        plans = plans_from_poses(
            [frame.timestamp for frame in frames], [frame.ego_to_global for frame in frames]
        )
        lidars = [_lidar_pose(nuscenes, frame.token) for frame in frames]
        truths.append(
            _truth(
                name,
                [frame.token for frame in frames],
                [frame.ego_to_global for frame in frames],
                np.stack([plan.future for plan in plans]),
                np.stack([plan.future_valid for plan in plans]),
                [frame.boxes for frame in frames],
                roads.get(nuscenes.scenes[name].location),
                None if any(pose is None for pose in lidars) else lidar_ways(lidars),
            )
        )
    if not truths:
        raise UserError(f"{nuscenes.root} has no samples in {', '.join(names) or 'no scene'}.")
    return join_truths(truths)


def log_truth(log: ScenarioLog) -> DrivingTruth:
    """The truth of a log every 0.5 s; tokens are NAME-STEP.

    A log does not say how many lidar points fell on a box, so every box counts as seen, and its map
    has no road segments, so the boundary lines are the outline of its drivable area.
    """
    steps = list(log.keyframe_steps)
    poses = [log.pose(step) for step in steps]
    known = log.ego.valid[steps]
    plans = plans_from_poses([round(1e6 * step / log.rate) for step in steps], poses)
    later = np.array(
        [[k + i < len(steps) and known[k + i] for i in range(1, FUTURE_STEPS + 1)]
         for k in range(len(steps))]
    )  # fmt: skip
    truth = _truth(
        log.name,
        [f"{log.name}-{step}" for step in steps],
        poses,
        np.stack([plan.future for plan in plans]),
        later,
        [log.boxes(step) for step in steps],
        road_map(log.layers) if log.layers.polygons["drivable_area"].shapes else None,
    )
    return truth.take(known)


def _roads(nuscenes: NuScenes, places: Iterable[str]) -> dict[str, RoadMap]:
    """The maps of all places, or of none."""
    maps = MapFolder(nuscenes.root)
    there = {place: maps[place] if place else None for place in sorted(places)}
    lacking = [place for place, layers in there.items() if layers is None]
    if lacking and len(lacking) < len(there):
        raise UserError(
            f"{expansion_path(nuscenes.root, lacking[0])} is missing, but other places have a map; "
            "add it, or choose scenes of one place."
        )
    return {place: road_map(layers) for place, layers in there.items() if layers is not None}


def _truth(
    scene: str,
    tokens: Sequence[str],
    poses: Sequence[Pose],
    future: np.ndarray,
    valid: np.ndarray,
    boxes: Sequence[Boxes | None],
    road: RoadMap | None,
    lidar: LidarWays | None = None,
) -> DrivingTruth:
    agents = None
    if all(found is not None for found in boxes):
        samples = [
            agents_around(pose, boxes[k : k + 1 + FUTURE_STEPS]) for k, pose in enumerate(poses)
        ]
        agents = pad_agents(samples, FUTURE_STEPS)
    patches = None
    if road is not None:
        patches = [
            road_patch(road, pose.translation[:2], float(yaw_of(pose.rotation))) for pose in poses
        ]
    return DrivingTruth(
        token=np.array(tokens),
        scene=np.array([scene] * len(tokens)),
        future=future,
        future_valid=valid,
        agents=agents,
        drivable=patches and tuple(areas for areas, _ in patches),
        boundaries=patches and tuple(lines for _, lines in patches),
        lidar=lidar,
    )


def _lidar_pose(nuscenes: NuScenes, token: str) -> Pose | None:
    """Lidar to global at a sample; None where it has no lidar."""
    row = nuscenes.views[token].get(LIDAR)
    if row is None:
        return None
    return nuscenes.pose(row.pose) @ nuscenes.calibrations[row.calibration][0]


def lidar_ways(poses: Sequence[Pose]) -> LidarWays:
    """The ways of the lidar of one drive.

    They are those that Impromptu-VLA was trained on and is measured by: places seen from the
    calibrated lidar, whose own axes are x to the right and y forward.

    Args:
        poses: Lidar to global at the key frames.
    """
    places = np.array([pose.translation for pose in poses])
    count = len(poses)
    history, future = np.zeros((count, HISTORY_STEPS, 2)), np.zeros((count, FUTURE_STEPS, 2))
    for k, pose in enumerate(poses):
        right_ahead = pose.inverse().apply(places)[:, :2]
        ways = np.stack([right_ahead[:, 1], -right_ahead[:, 0]], axis=1)
        behind, after = ways[max(0, k - HISTORY_STEPS) : k], ways[k + 1 : k + 1 + FUTURE_STEPS]
        history[k, HISTORY_STEPS - len(behind) :] = behind
        future[k, : len(after)] = after
    return LidarWays(history, future)


def kind_of(category: str) -> int:
    """Index into `KINDS` of a nuScenes category."""
    return KINDS.index(
        next((kind for begin, kind in _KINDS if category.startswith(begin)), "other")
    )


def agents_around(
    pose: Pose, boxes: Sequence[Boxes]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Agents annotated now or later, seen from the present ego frame.

    Unlike `driving.agents_from`, which serves models, those that appear later are among them, and
    so are animals and static objects.

    Args:
        pose: Ego to global now.
        boxes: Of now and of the steps after it, at most 7.

    Returns:
        Boxes [a, 7, 5], valid and seen [a, 7] and kind [a] as in `evaluation.truth.Agents`.
    """
    rows: dict[str, int] = {}
    kinds = []
    for found in boxes:
        for token, category in zip(found.instances, found.categories, strict=True):
            if token not in rows:
                rows[token] = len(kinds)
                kinds.append(kind_of(category))
    table = np.zeros((len(kinds), FUTURE_STEPS + 1, 5), np.float32)
    valid = np.zeros((len(kinds), FUTURE_STEPS + 1), bool)
    seen = np.zeros_like(valid)
    to_ego = pose.inverse()
    for step, found in enumerate(boxes):
        places = [rows[token] for token in found.instances]
        if not places:
            continue
        table[places, step, :2] = to_ego.apply(found.centers)[:, :2]
        table[places, step, 2] = yaw_of(to_ego.rotation @ found.rotations)
        table[places, step, 3:] = found.sizes[:, [1, 0]]
        valid[places, step] = True
        seen[places, step] = found.lidar_points != 0  # -1: not known
    return table, valid, seen, np.array(kinds, np.int32)
