"""What a driving record is: cameras, classes, and the fields that every source fills.

Sources (a nuScenes folder, a folder of one's own) yield each `Record`; the shard builder stores
them and the loader reads them back, so this file is all that the three share.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastdrive_jax.errors import UserError
from fastdrive_jax.files import write_json

CAMERAS = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_RIGHT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_FRONT_LEFT",
)
TOKEN_PIXELS = 28  # a visual token: 2 x 2 patches of 14 x 14 px
FUTURE_STEPS = 6  # waypoints, one every STEP_SECONDS
HISTORY_STEPS = 6  # positions before now, one every STEP_SECONDS
STEP_SECONDS = 0.5
AGENT_KINDS = ("vehicle", "person", "cycle", "obstacle")
CAN_FIELDS = ("speed", "ax", "ay", "az", "wx", "wy", "wz", "steering")
LEFT, STRAIGHT, RIGHT = range(3)
UNKNOWN_LABEL = 255  # label of ignored and unknown pixels in batches

CLASSES_FILE = "classes.json"


@dataclass(frozen=True)
class Classes:
    """Class names and which of them count as foreground, objects or nothing.

    Attributes:
        names: Name of class id i; empty when the ids have no names.
        foreground: Ids that planning needs (road, vehicles, signs, ...).
        objects: The part of the foreground that stands on the road (vehicles, people, signs, ...).
        ignore: Ids that no measure counts.
    """

    names: tuple[str, ...] = ()
    foreground: tuple[int, ...] = ()
    objects: tuple[int, ...] = ()
    ignore: tuple[int, ...] = ()

    def __post_init__(self):
        for key in ("foreground", "objects", "ignore"):
            for value in getattr(self, key):
                if not 0 <= value <= 254:
                    raise UserError(f"Class id {value} in {key} is outside 0..254; correct it.")
                if self.names and value >= len(self.names):
                    raise UserError(
                        f"Class id {value} in {key} has no name among {len(self.names)}; "
                        "correct the id or add its name."
                    )
        stray = sorted(set(self.objects) - set(self.foreground))
        if stray:
            raise UserError(f"Object ids {stray} are not foreground ids; add them to foreground.")
        both = sorted(set(self.foreground) & set(self.ignore))
        if both:
            raise UserError(f"Class ids {both} are both foreground and ignored; choose one.")


def read_classes(path: Path) -> Classes:
    """Reads `classes.json`.

    Raises:
        UserError: The file is absent, is not JSON, or holds something else than class metadata.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f'{path} is missing; write {{"names": [...], "foreground": [ids], "objects": [ids], '
            '"ignore": [ids]} to it.'
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); write it again.") from error
    return classes_from_dict(content, path)


def classes_from_dict(content: Any, path: Path | str = CLASSES_FILE) -> Classes:
    """Checks the parsed content of `classes.json`; `path` names it in errors."""
    known = [f.name for f in fields(Classes)]
    if not isinstance(content, dict) or "foreground" not in content:
        raise UserError(f'{path} must be an object with a "foreground" list of class ids.')
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise UserError(f"{path} has unknown fields {unknown}; it may have {known}.")
    values = {}
    for key, value in content.items():
        kind = str if key == "names" else int
        if not isinstance(value, list) or not all(type(v) is kind for v in value):
            raise UserError(f'"{key}" in {path} must be a list of {kind.__name__} values.')
        values[key] = tuple(value)
    try:
        return Classes(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_classes(path: Path, classes: Classes) -> None:
    """Writes `classes.json` atomically."""
    write_json(path, asdict(classes))


@dataclass(frozen=True)
class Record:
    """One picture with all that belongs to it.

    Attributes:
        image: JPEG or PNG bytes, untouched.
        mask: 1-bit PNG bytes, white = foreground, of the picture's size.
        labels: 8-bit grey PNG bytes of class ids, or b"" where there are none.
        camera: Channel, one of `CAMERAS`.
        sample_token: Equal for the pictures taken at the same moment.
        scene: Name of the drive.
        ego_state: [3] speed m/s, longitudinal acceleration m/s^2, yaw rate rad/s (left positive).
        command: 0 left, 1 straight, 2 right.
        future: [6, 2] waypoints every 0.5 s in metres, ego frame, x forward, y left.
        future_valid: [6] whether the drive lasts until that waypoint.
        history: [6, 2] the places 3.0 to 0.5 s ago, likewise.
        history_valid: [6] whether the drive had begun then.
        can_bus: [8] `CAN_FIELDS` in m/s, m/s^2, rad/s and rad, left positive; NaN where absent.
        intrinsic: [3, 3] of the camera at the picture's size; NaN where not known.
        camera_to_ego: [4, 4]; NaN where not known.
        agents: [A, 7, 5] boxes now and at the six waypoints: x, y of the centre in metres and yaw
            in radians in the present ego frame, length, width in metres.
        agents_valid: [A, 7] whether the agent is annotated then.
        agents_kind: [A] index into `AGENT_KINDS`.
    """

    image: bytes
    mask: bytes
    labels: bytes
    camera: str
    sample_token: str
    scene: str
    ego_state: np.ndarray = field(default_factory=lambda: np.zeros(3, np.float32))
    command: int = STRAIGHT
    future: np.ndarray = field(default_factory=lambda: np.zeros((FUTURE_STEPS, 2), np.float32))
    future_valid: np.ndarray = field(default_factory=lambda: np.zeros(FUTURE_STEPS, bool))
    history: np.ndarray = field(default_factory=lambda: np.zeros((HISTORY_STEPS, 2), np.float32))
    history_valid: np.ndarray = field(default_factory=lambda: np.zeros(HISTORY_STEPS, bool))
    can_bus: np.ndarray = field(default_factory=lambda: np.full(len(CAN_FIELDS), np.nan))
    intrinsic: np.ndarray = field(default_factory=lambda: np.full((3, 3), np.nan))
    camera_to_ego: np.ndarray = field(default_factory=lambda: np.full((4, 4), np.nan))
    agents: np.ndarray = field(default_factory=lambda: np.zeros((0, FUTURE_STEPS + 1, 5)))
    agents_valid: np.ndarray = field(default_factory=lambda: np.zeros((0, FUTURE_STEPS + 1), bool))
    agents_kind: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(frozen=True)
class Source:
    """A readable data set: what there is, and how to load one sample of it.

    Attributes:
        name: Shown in the manifest; the folder's name, never its path.
        cameras: Channels of every sample, in `CAMERAS` order.
        classes: Class metadata.
        samples: Split name to references of its samples, in drive order.
        load: Turns a reference into its records, one for each camera, in camera order. It and the
            references can be pickled, so that other processes and machines load too.
        files: A reference's pictures, in camera order, and its other files: by the first duplicates
            are found, by both whether a shard is out of date.
        size: Bytes of all files that `load` will read, for the check of free disk space.
        absent: What the data set lacks, a sentence each.
        masker: How the masks were made, as `maskers.run` notes it; empty where not known.
    """

    name: str
    cameras: tuple[str, ...]
    classes: Classes
    samples: dict[str, tuple[Any, ...]]
    load: Callable[[Any], tuple[Record, ...]]
    files: Callable[[Any], tuple[tuple[Path, ...], tuple[Path, ...]]]
    size: int = 0
    absent: tuple[str, ...] = ()
    masker: dict[str, Any] = field(default_factory=dict)


def tfds_features():
    """The record as a TFDS `FeaturesDict`; images are handed over and read back as bytes."""
    import tensorflow_datasets as tfds

    def numbers(*shape, dtype=np.float32):
        return tfds.features.Tensor(shape=shape, dtype=dtype)

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(doc="camera picture, bytes untouched"),
            "mask": tfds.features.Image(
                shape=(None, None, 1), encoding_format="png", doc="foreground, 1 bit"
            ),
            "labels": tfds.features.Text(doc="PNG of class ids, or empty"),
            "camera": tfds.features.Text(),
            "sample_token": tfds.features.Text(),
            "scene": tfds.features.Text(),
            "ego_state": numbers(3),
            "command": tfds.features.Scalar(dtype=np.int32),
            "future": numbers(FUTURE_STEPS, 2),
            "future_valid": numbers(FUTURE_STEPS, dtype=np.uint8),
            "history": numbers(HISTORY_STEPS, 2),
            "history_valid": numbers(HISTORY_STEPS, dtype=np.uint8),
            "can_bus": numbers(len(CAN_FIELDS)),
            "intrinsic": numbers(3, 3),
            "camera_to_ego": numbers(4, 4),
            "agents": numbers(None, FUTURE_STEPS + 1, 5),
            "agents_valid": numbers(None, FUTURE_STEPS + 1, dtype=np.uint8),
            "agents_kind": numbers(None, dtype=np.int32),
        }
    )
