"""What a car did, read from shards, and what of it a checkpoint is told."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from data_pipelines.loader import LoaderConfig, make_loader
from data_pipelines.schema import CAN_FIELDS
from data_pipelines.shards import Shards
from fastdrive_jax.evaluation.protocols import LIDAR_AHEAD
from fastdrive_jax.evaluation.truth import LidarWays
from fastdrive_jax.models.qwen2_5_vl.impromptu import EgoStatus


@dataclass(frozen=True)
class Sequences:
    """What the car did, of all samples; see `schema.Record`."""

    command: np.ndarray
    history: np.ndarray
    history_valid: np.ndarray
    can_bus: np.ndarray
    scene: np.ndarray
    future: np.ndarray
    future_valid: np.ndarray
    agents: np.ndarray
    agents_valid: np.ndarray
    agents_kind: np.ndarray


def read_sequences(shards: Shards, split: str, samples: int = 0) -> Sequences:
    """All but the pictures of a split's first samples; 0 takes all."""
    names = tuple(Sequences.__annotations__)
    loader = LoaderConfig(
        batch_size=64,
        image_size=(28, 28),
        cameras=("CAM_FRONT",),
        group="sample",
        shuffle=False,
        num_epochs=1,
        remainder="keep",
        fields=names,
    )
    parts: dict[str, list] = {name: [] for name in names}
    for batch in make_loader(shards, split, loader):
        for name in names:
            parts[name].append(batch[name])
    stop = samples or None
    return Sequences(**{name: np.concatenate(found)[:stop] for name, found in parts.items()})


def past_of(
    driven: Sequences,
    sample: int,
    frame: Literal["lidar", "ego"],
    lidar: LidarWays | None = None,
) -> tuple[Float[np.ndarray, "T 2"], list[EgoStatus] | None]:
    """Known places of the last three seconds with the present (0, 0), and the motion at each.

    The motion is that of the CAN bus at the key frames before; None if one of them has none.
    """
    known = driven.history_valid[sample]
    past = np.concatenate([driven.history[sample][known], np.zeros((1, 2))])
    if frame == "lidar":
        past = ego_to_lidar(past)
        if lidar is not None:
            past[:-1] = lidar.history[sample][known]
    frames = range(sample - len(past) + 1, sample + 1)
    if any(k < 0 or driven.scene[k] != driven.scene[sample] for k in frames):
        return past, None
    bus = driven.can_bus[list(frames)]
    columns = [CAN_FIELDS.index(name) for name in ("ax", "ay", "speed", "steering")]
    if not np.isfinite(bus[:, columns]).all():
        return past, None
    rows = bus[:, columns].tolist()
    return past, [EgoStatus((ax, ay), speed, steering) for ax, ay, speed, steering in rows]


def ego_to_lidar(past: Float[np.ndarray, "T 2"]) -> Float[np.ndarray, "T 2"]:
    """Places of the lidar from past places of the ego origin, of which the last is the present."""
    steps = np.diff(past, axis=0, append=past[-1:] + np.eye(2)[:1])  # now the car looks ahead
    still = np.linalg.norm(steps, axis=1) < 0.1
    yaw = np.where(still, 0.0, np.arctan2(steps[:, 1], steps[:, 0]))
    return past + LIDAR_AHEAD * (_ahead(yaw) - np.eye(2)[0])


def _ahead(yaw) -> np.ndarray:
    return np.stack([np.cos(yaw), np.sin(yaw)], -1)
