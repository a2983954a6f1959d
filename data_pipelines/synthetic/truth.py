"""What plans are measured against in a synthetic world, beyond the last key frame as well.

Annotations end with a drive, so a scene of six key frames has no sample with agents for three more
seconds. The world knows them: a scene can be drawn again from its number alone.
"""

import dataclasses
from pathlib import Path

import numpy as np

from data_pipelines.nuscenes.truth import driving_truth, kind_of
from data_pipelines.schema import FUTURE_STEPS, STEP_SECONDS
from data_pipelines.synthetic.config import SPLITS, WorldConfig
from data_pipelines.synthetic.geometry import pose_on
from data_pipelines.synthetic.planner import DT, EgoState
from data_pipelines.synthetic.record import ANNOTATION_RANGE, plan
from data_pipelines.synthetic.sampler import keyframe_indices, rollout, sample_scene
from data_pipelines.synthetic.scene import Scene
from fastdrive_jax.evaluation.truth import DrivingTruth, pad_agents

_STRIDE = round(STEP_SECONDS / DT)


def world_truth(root: Path, config: WorldConfig, split: str) -> DrivingTruth:
    """The truth of all samples of a split in drive order; maps are those of the data set.

    Every box within the range of annotation counts as seen by the lidar.

    Args:
        root: The data set of `generate`.
        config: Of it.
        split: "train" or "val".
    """
    found = driving_truth(root, split=split)
    samples, future = [], []
    for index in range(config.scenes(split)):
        scene = sample_scene(config, split, index)
        states = rollout(scene, config.keyframes_per_scene)
        for k, step in enumerate(keyframe_indices(config.keyframes_per_scene)):
            samples.append(_agents(scene, states, step, scene.sway[k]))
            future.append(plan(scene, states, step, scene.sway[k])["future"])
    names = [f"scene-{SPLITS.index(split) + 1}{k:04d}" for k in range(config.scenes(split))]
    if list(dict.fromkeys(found.scene.tolist())) != names or len(samples) != len(found):
        raise ValueError(f"{root} does not hold the scenes of this config")
    return dataclasses.replace(
        found,
        future=np.array(future),
        future_valid=np.ones((len(future), FUTURE_STEPS), bool),
        agents=pad_agents(samples, FUTURE_STEPS),
    )


def _agents(scene: Scene, states: list[EgoState], step: int, sway):
    """Boxes now and at each waypoint, as `nuscenes.truth.agents_around` gives them."""
    here = states[step]
    rotation, origin = pose_on(scene.terrain, (here.x, here.y), here.yaw, *sway)
    steps = [step + _STRIDE * k for k in range(FUTURE_STEPS + 1)]
    actors = [actor for actor in scene.actors if actor.category]
    boxes = np.zeros((len(actors), len(steps), 5), np.float32)
    valid = np.zeros((len(actors), len(steps)), bool)
    for row, actor in enumerate(actors):
        width, length, height = actor.size
        for column, at in enumerate(steps):
            xy, yaw = actor.pose(at * DT, states[at].s)
            spot = (scene.terrain.lift(xy, height / 2) - origin) @ rotation
            turn = (yaw - here.yaw + np.pi) % (2 * np.pi) - np.pi
            boxes[row, column] = *spot[:2], turn, length, width
            away = np.hypot(xy[0] - states[at].x, xy[1] - states[at].y)
            valid[row, column] = away <= ANNOTATION_RANGE
    kinds = np.array([kind_of(actor.category) for actor in actors], np.int32)
    there = valid.any(1)
    return boxes[there], valid[there], valid[there], kinds[there]
