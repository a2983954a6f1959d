"""Batches from shards: a Grain pipeline whose position can be saved and restored exactly.

The position that an iterator's `get_state` gives holds for this very configuration only; read
`identity` of a loader and keep it beside a checkpoint, since Grain itself does not notice when a
position is used with another batch size, worker count or seed.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import grain
import numpy as np

from data_pipelines.augment import NO_JITTER, ColorJitter, jitter_colors, mirror
from data_pipelines.decode import check_size, decode_image, decode_labels, decode_mask
from data_pipelines.schema import CAMERAS, Classes
from data_pipelines.shards import Shards, record_source
from fastdrive_jax.errors import UserError


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made.

    Attributes:
        batch_size: Pictures (or samples) in a batch of this process.
        image_size: Height and width in pixels, each a multiple of 28.
        cameras: Which cameras to read; None means all that the shards have.
        group: "picture" gives one picture an item, "sample" all chosen cameras of a moment.
        shuffle: Another order each epoch; off gives the order of the shards.
        seed: Root of shuffling and augmentation.
        num_epochs: Passes over the data; None means endless.
        flip: Mirror half of the items. With samples of the front camera alone, also the way
            ahead and the command; with other cameras a mirrored car would need other cameras.
        jitter: Random colours, one draw an item.
        drop_remainder: Leave out a last batch that is not full.
        num_workers: Processes that decode; 0 uses threads of this one.
        read_threads: Threads that decode in each process.
    """

    batch_size: int
    image_size: tuple[int, int] = (224, 392)
    cameras: tuple[str, ...] | None = None
    group: Literal["picture", "sample"] = "picture"
    shuffle: bool = True
    seed: int = 0
    num_epochs: int | None = None
    flip: bool = False
    jitter: ColorJitter = NO_JITTER
    drop_remainder: bool = True
    num_workers: int = 0
    read_threads: int = 4

    def __post_init__(self):
        check_size(self.image_size)
        for name, least in (("batch_size", 1), ("num_workers", 0), ("read_threads", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.num_epochs is not None and self.num_epochs < 1:
            raise UserError(
                f"num_epochs={self.num_epochs} must be at least 1, or none for endless."
            )
        if self.group not in ("picture", "sample"):
            raise UserError(f"group={self.group!r} must be 'picture' or 'sample'.")
        if self.cameras is not None:
            unknown = [camera for camera in self.cameras if camera not in CAMERAS]
            if unknown or not self.cameras or len(set(self.cameras)) < len(self.cameras):
                raise UserError(f"cameras={self.cameras} must name some of {CAMERAS}, each once.")


def make_loader(
    shards: Shards,
    split: str,
    config: LoaderConfig,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Batches of `split` as a `grain.IterDataset` of dicts of numpy arrays.

    In picture mode: image uint8 [B, H, W, 3], mask uint8 {0, 1} [B, H, W], labels uint8 [B, H, W]
    (255 = ignored or unknown), camera int32 [B] (index into the cameras that were chosen), scene
    int32 [B] (index into `shards.scenes`). In sample mode: image [B, C, H, W, 3], mask and labels
    [B, C, H, W], speed float32 [B], command int32 [B], future float32 [B, 6, 2], future_valid bool
    [B, 6], scene int32 [B].

    Its iterator has `get_state` and `set_state`; after the latter, the batches, augmentation
    included, are those that would have followed.

    Args:
        shards: An opened data set.
        split: One of its splits.
        config: How to make batches; `batch_size` is that of each process.
        process_index: This process.
        process_count: Processes that share the data; each item goes to one of them, and a
            remainder that would leave them unequal is left out.

    Raises:
        UserError: No such split or camera, too little data for a batch, or flips with cameras that
            cannot be mirrored.
    """
    cameras = _chosen_cameras(shards, config)
    if config.flip and config.group == "sample" and cameras != ("CAM_FRONT",):
        raise UserError(
            f"Samples of {', '.join(cameras)} cannot be flipped: left and right cameras would have "
            "to change places; use CAM_FRONT alone or no flip."
        )
    items = _Items(shards, split, cameras, config.group)
    data = grain.MapDataset.source(items).seed(config.seed)
    if config.shuffle:
        data = data.shuffle()
    if process_count > 1:
        data = data[: len(data) - len(data) % process_count][process_index::process_count]
    if len(data) < (config.batch_size if config.drop_remainder else 1) and config.num_epochs:
        raise UserError(
            f"Split {split!r} of {shards.path} gives {len(data)} items to a process, fewer than "
            f"one batch of {config.batch_size}; make the batch smaller."
        )
    data = data.repeat(config.num_epochs)
    data = data.map(partial(decode_item, shards=shards, cameras=cameras, config=config))
    if config.flip or config.jitter.active:
        data = data.random_map(partial(_augment, config=config))
    options = grain.ReadOptions(
        num_threads=config.read_threads,
        prefetch_buffer_size=max(config.read_threads, 2 * config.batch_size),
    )
    batches = data.to_iter_dataset(options).batch(
        config.batch_size, drop_remainder=config.drop_remainder
    )
    if config.num_workers:
        _mark_flags_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.num_workers))
    return batches


def identity(
    shards: Shards, split: str, config: LoaderConfig, process_count: int = 1
) -> dict[str, object]:
    """What a saved position depends on, as JSON values; unequal identities must not share one."""
    fields = asdict(config)
    del fields["read_threads"]  # changes speed only
    return {
        "data": shards.digest,
        "split": split,
        "process_count": process_count,
        **{key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()},
    }


class _Items:
    """Random access to raw items: the list of one record, or of a sample's chosen records."""

    def __init__(self, shards: Shards, split: str, cameras: tuple[str, ...], group: str):
        self._records = record_source(shards, split)
        if len(self._records) != shards.records(split):
            raise UserError(
                f"Split {split!r} of {shards.path} holds {len(self._records)} records instead of "
                f"{shards.records(split)}; build the shards again."
            )
        self._stride = len(shards.cameras)
        self._offsets = [shards.cameras.index(camera) for camera in cameras]
        self._per_item = len(cameras) if group == "sample" else 1
        self._samples = shards.samples[split]

    def __len__(self) -> int:
        return self._samples * len(self._offsets) // self._per_item

    def __getitem__(self, index) -> list[dict]:
        if self._per_item > 1:
            sample, chosen = int(index), self._offsets
        else:
            sample, place = divmod(int(index), len(self._offsets))
            chosen = [self._offsets[place]]
        return [self._records[sample * self._stride + offset] for offset in chosen]

    def __repr__(self) -> str:
        return f"driving items ({len(self)})"


def decode_item(
    records: list[dict], *, shards: Shards, cameras: tuple[str, ...], config: LoaderConfig
) -> dict[str, np.ndarray]:
    """Raw records of an item to arrays, without batch axis (see `make_loader`)."""
    size, classes = config.image_size, shards.classes
    pictures = [_decode_picture(record, size, classes) for record in records]
    first = records[0]
    scene = np.int32(shards.scenes.index(first["scene"].decode()))
    if config.group == "picture":
        camera = np.int32(cameras.index(first["camera"].decode()))
        return {**pictures[0], "camera": camera, "scene": scene}
    stacked = {key: np.stack([picture[key] for picture in pictures]) for key in pictures[0]}
    return {
        **stacked,
        "speed": np.float32(first["ego_state"][0]),
        "command": np.int32(first["command"]),
        "future": np.asarray(first["future"], np.float32),
        "future_valid": np.asarray(first["future_valid"], bool),
        "scene": scene,
    }


def _decode_picture(record: dict, size: tuple[int, int], classes: Classes) -> dict:
    return {
        "image": decode_image(record["image"], size),
        "mask": decode_mask(record["mask"], size),
        "labels": decode_labels(record["labels"], size, classes),
    }


def _augment(example: dict, rng: np.random.Generator, *, config: LoaderConfig) -> dict:
    if config.flip and rng.random() < 0.5:
        example = mirror(example)
    if config.jitter.active:
        example = {**example, "image": jitter_colors(example["image"], config.jitter, rng)}
    return example


def _chosen_cameras(shards: Shards, config: LoaderConfig) -> tuple[str, ...]:
    if config.cameras is None:
        return shards.cameras
    absent = [camera for camera in config.cameras if camera not in shards.cameras]
    if absent:
        raise UserError(
            f"{shards.path} has no {', '.join(absent)}; "
            f"its cameras are {', '.join(shards.cameras)}."
        )
    return tuple(camera for camera in shards.cameras if camera in config.cameras)


def _mark_flags_parsed() -> None:
    """Grain's workers read absl flags, which only an absl command line would have parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
