"""Raw records to the arrays of one example; only what is asked for is decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from data_pipelines.decode import decode_image, decode_labels, decode_mask
from data_pipelines.schema import FUTURE_STEPS
from data_pipelines.shards import Shards
from data_pipelines.token_mask import mask_fractions

PIXEL_FIELDS = ("image", "mask", "labels", "foreground", "intrinsic", "camera_to_ego")
PICTURE_FIELDS = (*PIXEL_FIELDS, "camera", "scene", "index")
SAMPLE_FIELDS = (
    *PIXEL_FIELDS,
    "scene",
    "index",
    "speed",
    "ego_state",
    "command",
    "future",
    "future_valid",
    "history",
    "history_valid",
    "can_bus",
    "agents",
    "agents_valid",
    "agents_kind",
)
DEFAULT_FIELDS = {
    "picture": ("image", "mask", "labels", "camera", "scene"),
    "sample": ("image", "mask", "labels", "speed", "command", "future", "future_valid", "scene"),
}


@dataclass(frozen=True)
class Decoding:
    """How records become arrays.

    Attributes:
        image_size: Height and width in pixels.
        resize: See `decode_image`.
        fields: Names of the arrays.
        group: See `LoaderConfig`.
        cameras: Chosen channels, in record order.
        max_agents: Rows that the agents are filled up or cut to, nearest first.
    """

    image_size: tuple[int, int]
    resize: Literal["bicubic", "area"]
    fields: tuple[str, ...]
    group: Literal["picture", "sample"]
    cameras: tuple[str, ...]
    max_agents: int


def decode_example(
    item: tuple[int, Sequence[dict]], *, shards: Shards, decoding: Decoding
) -> dict[str, np.ndarray]:
    """The chosen arrays of an item, without batch axis; see `make_loader`.

    Args:
        item: Its number in the split and its records.
        shards: Their data set.
        decoding: What to do.
    """
    number, records = item
    pictures = [_pixels(record, shards, decoding) for record in records]
    if decoding.group == "picture":
        out = pictures[0]
    else:
        out = {key: np.stack([one[key] for one in pictures]) for key in pictures[0]}
        out |= _driving(records[0], decoding)
    first, fields = records[0], decoding.fields
    if "index" in fields:
        out["index"] = np.int64(number)
    if "scene" in fields:
        out["scene"] = np.int32(shards.scenes.index(first["scene"].decode()))
    if "camera" in fields:
        out["camera"] = np.int32(decoding.cameras.index(first["camera"].decode()))
    return {name: out[name] for name in fields}


def _pixels(record: dict, shards: Shards, decoding: Decoding) -> dict[str, np.ndarray]:
    size, fields, out = decoding.image_size, decoding.fields, {}
    if "image" in fields:
        out["image"] = decode_image(record["image"], size, decoding.resize)
    if "mask" in fields or "foreground" in fields:
        mask = decode_mask(record["mask"], size)
        if "mask" in fields:
            out["mask"] = mask
        if "foreground" in fields:
            out["foreground"] = mask_fractions(mask)
    if "labels" in fields:
        out["labels"] = decode_labels(record["labels"], size, shards.classes)
    if "intrinsic" in fields:
        out["intrinsic"] = _scaled(record, size)
    if "camera_to_ego" in fields:
        out["camera_to_ego"] = np.asarray(record["camera_to_ego"], np.float32)
    return out


def _scaled(record: dict, size: tuple[int, int]) -> np.ndarray:
    """The camera matrix for the resized picture, whose pixel edges fall together."""
    height, width = stored_size(record["mask"])
    scale = np.array([size[1] / width, size[0] / height, 1], np.float32)
    return scale[:, None] * np.asarray(record["intrinsic"], np.float32)


def stored_size(png: bytes) -> tuple[int, int]:
    """Height and width in a PNG's header."""
    width, height = np.frombuffer(png, ">u4", 2, offset=16)
    return int(height), int(width)


def _driving(record: dict, decoding: Decoding) -> dict[str, np.ndarray]:
    out = {
        "speed": np.float32(record["ego_state"][0]),
        "command": np.int32(record["command"]),
        **{
            name: np.asarray(record[name], np.float32)
            for name in ("ego_state", "future", "history", "can_bus")
        },
        **{name: np.asarray(record[name], bool) for name in ("future_valid", "history_valid")},
    }
    if any(name.startswith("agents") for name in decoding.fields):
        out |= _agents(record, decoding.max_agents)
    return out


def _agents(record: dict, most: int) -> dict[str, np.ndarray]:
    boxes = np.asarray(record["agents"], np.float32).reshape(-1, FUTURE_STEPS + 1, 5)
    near = np.argsort(np.hypot(*boxes[:, 0, :2].T), kind="stable")[:most]
    out = {
        "agents": np.zeros((most, FUTURE_STEPS + 1, 5), np.float32),
        "agents_valid": np.zeros((most, FUTURE_STEPS + 1), bool),
        "agents_kind": np.zeros(most, np.int32),
    }
    for name, full in out.items():
        stored = np.asarray(record[name], full.dtype).reshape(-1, *full.shape[1:])
        full[: len(near)] = stored[near]
    return out


def single_threaded() -> None:
    """Keeps OpenCV's own threads out of the way of the readers, which use all cores already."""
    cv2.setNumThreads(1)
