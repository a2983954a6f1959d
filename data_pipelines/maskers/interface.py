"""What a masker is: pictures in, one class map for each picture out.

Adding one is a file with a frozen dataclass that has `name`, `settings` and `__call__`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines.nuscenes.frames import CameraView, Keyframe
from data_pipelines.schema import Classes

BACKGROUND, ROAD, VEHICLE, PERSON, TRAFFIC_SIGN, TRAFFIC_LIGHT, BARRIER = range(7)
# The foreground of nuScenes-FG (FastDriveVLA, section 3.1): what bears on the driving.
CLASSES = Classes(
    names=("background", "road", "vehicle", "person", "traffic_sign", "traffic_light", "barrier"),
    foreground=(ROAD, VEHICLE, PERSON, TRAFFIC_SIGN, TRAFFIC_LIGHT, BARRIER),
    objects=(VEHICLE, PERSON, TRAFFIC_SIGN, TRAFFIC_LIGHT, BARRIER),
)


@dataclass(frozen=True)
class Frame:
    """A picture to mask.

    Attributes:
        picture: Its file.
        name: Where its mask goes below `masks/`, without suffix, such as "CAM_FRONT/n015_1234".
        view: Calibration and pose, where known.
        keyframe: The moment it belongs to, with boxes where there are any.
    """

    picture: Path
    name: str
    view: CameraView | None = None
    keyframe: Keyframe | None = None


class Masker(Protocol):
    """Makes class maps.

    Its settings are stored in each mask, and a mask of other settings is made again.
    """

    @property
    def name(self) -> str:
        """Short and unique, such as "grounded_sam"."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values of all that a mask depends on: model ids, prompts, thresholds."""
        ...

    def __call__(self, frames: Sequence[Frame]) -> list[np.ndarray]:
        """Class ids of `CLASSES`, uint8 [H, W] of each picture's size.

        Raises:
            UserError: A picture or what the masker needs beside it is missing or damaged.
        """
        ...
