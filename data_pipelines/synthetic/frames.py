"""Some frames of the world straight into memory, to compare programs on: no files, one process."""

from dataclasses import dataclass

import numpy as np

from data_pipelines.synthetic.camera import make_camera
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.planner import DT
from data_pipelines.synthetic.render import prepare, render
from data_pipelines.synthetic.sampler import keyframe_indices, rollout, sample_scene


@dataclass(frozen=True)
class Frames:
    """What a driving policy sees of each.

    Attributes:
        images: uint8 [S, C, H, W, 3].
        speed: float32 [S] metres per second.
        command: int32 [S].
    """

    images: np.ndarray
    speed: np.ndarray
    command: np.ndarray


def world_frames(config: WorldConfig, count: int) -> Frames:
    """The first frames of the validation scenes, as they are before JPEG.

    Args:
        config: Of the world; as many scenes are drawn as are needed.
        count: S.
    """
    images, speed, command, index = [], [], [], 0
    while len(images) < count:
        scene = sample_scene(config, "val", index)
        states, stage = rollout(scene, config.keyframes_per_scene), prepare(scene)
        cameras = [
            make_camera(name, config.height, config.width, scene.pitch[name])
            for name in config.cameras
        ]
        for k, step in enumerate(keyframe_indices(config.keyframes_per_scene)):
            state, sway = states[step], scene.sway[k]
            pictures = [
                render(scene, stage, camera, state, step * DT, sway, 64 * k + number).image
                for number, camera in enumerate(cameras)
            ]
            images.append(np.stack(pictures))
            speed.append(state.speed)
            command.append(scene.command_at(state))
        index += 1
    return Frames(
        np.stack(images[:count]),
        np.asarray(speed[:count], np.float32),
        np.asarray(command[:count], np.int32),
    )
