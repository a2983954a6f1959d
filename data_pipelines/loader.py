"""Batches from shards: a Grain pipeline over one endless stream of examples.

The order of the stream depends on the data, the seed and the shuffling only: every epoch has each
example once. Batch t of all hosts together holds the examples [t G, (t + 1) G), G being the batch
size times the number of hosts, whatever the numbers of hosts, workers and threads; augmentation is
drawn by an example's place in the stream. So a position is one number, of examples given so far,
and a run that goes on with other hosts or another batch size goes on at exactly that example.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import grain
import numpy as np

from data_pipelines.augment import NO_JITTER, ColorJitter, jitter_colors, mirror, mirrored_cameras
from data_pipelines.decode import check_size
from data_pipelines.examples import (
    DEFAULT_FIELDS,
    PICTURE_FIELDS,
    SAMPLE_FIELDS,
    Decoding,
    decode_example,
    single_threaded,
)
from data_pipelines.schema import CAMERAS
from data_pipelines.shards import Shards, record_source
from data_pipelines.token_cache import TokenCache
from data_pipelines.worker_process import start_worker
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made.

    Attributes:
        batch_size: Images (or samples) in a batch of this process.
        image_size: Height and width in pixels, each a multiple of 28.
        resize: "bicubic" as the published Qwen2.5-VL processor, or "area"; see `decode_image`.
        cameras: Cameras to read; None reads all in the shards.
        group: "picture" makes each image an item, "sample" all chosen cameras of a moment.
        fields: Arrays to return, from `examples.PICTURE_FIELDS` or `SAMPLE_FIELDS`; None returns
            the usual ones.
        shuffle: Reshuffle every epoch; otherwise items come in the order of the shards.
        seed: Seed of shuffling and augmentation.
        num_epochs: Passes over the data; None means endless.
        flip: Mirror half of the items, with calibration, trajectories and command. Samples need
            cameras that swap places: all six, or the front and back ones.
        jitter: Random colour changes, drawn once per item.
        remainder: What happens to the last, incomplete batch of all hosts: "drop" leaves it out,
            "keep" returns it smaller (one host only), "pad" fills it with its last example and adds
            an array "valid", bool [B], to every batch.
        max_agents: Rows of the agents' arrays, nearest first.
        num_workers: Decoding processes; 0 uses threads of this process.
        read_threads: Threads per process, each of which makes whole batches.
    """

    batch_size: int
    image_size: tuple[int, int] = (224, 392)
    resize: Literal["bicubic", "area"] = "bicubic"
    cameras: tuple[str, ...] | None = None
    group: Literal["picture", "sample"] = "picture"
    fields: tuple[str, ...] | None = None
    shuffle: bool = True
    seed: int = 0
    num_epochs: int | None = None
    flip: bool = False
    jitter: ColorJitter = NO_JITTER
    remainder: Literal["drop", "keep", "pad"] = "drop"
    max_agents: int = 64
    num_workers: int = 0
    read_threads: int = 4

    def __post_init__(self):
        check_size(self.image_size)
        check_least(self, batch_size=1, num_workers=0, read_threads=1, max_agents=1)
        if self.num_epochs is not None and self.num_epochs < 1:
            raise UserError(
                f"num_epochs={self.num_epochs} must be at least 1, or none for endless."
            )
        choices = {
            "group": ("picture", "sample"),
            "resize": ("bicubic", "area"),
            "remainder": ("drop", "keep", "pad"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r} must be one of {known}.")
        if self.cameras is not None:
            unknown = [camera for camera in self.cameras if camera not in CAMERAS]
            if unknown or not self.cameras or len(set(self.cameras)) < len(self.cameras):
                raise UserError(f"cameras={self.cameras} must name some of {CAMERAS}, each once.")
        known = PICTURE_FIELDS if self.group == "picture" else SAMPLE_FIELDS
        if self.fields is not None and (not self.fields or set(self.fields) - set(known)):
            raise UserError(f"fields={self.fields} must name some of {known}.")


class BatchIterator(Iterator):
    """Batches from a position on; `get_state` and `set_state` read and set it as a JSON object."""

    def __init__(self, start: Callable[[int], Iterator[dict]], batch_examples: int):
        self._start = start
        self._batch_examples = batch_examples
        self._given = 0
        self._batches: Iterator[dict] | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._batches is None:
            self._batches = self._start(self._given)
        batch = next(self._batches)
        self._given += self._batch_examples
        return batch

    def get_state(self) -> dict[str, int]:
        """Where the next batch begins: the number of examples that all hosts were given."""
        return {"examples": self._given}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position that any number of hosts, with any batch size, has left."""
        self.close()
        self._given = int(state["examples"])

    def close(self) -> None:
        """Ends threads and processes."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


@dataclass(frozen=True)
class Loader:
    """An iterable of batches; every `iter` begins at the first."""

    start: Callable[[int], Iterator[dict]]
    batch_examples: int

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self.start, self.batch_examples)


def make_loader(
    shards: Shards,
    split: str,
    config: LoaderConfig,
    process_index: int = 0,
    process_count: int = 1,
    tokens: TokenCache | None = None,
) -> Loader:
    """Batches of `split` as dicts of numpy arrays.

    In picture mode: image uint8 [B, H, W, 3], mask uint8 {0, 1} [B, H, W], labels uint8 [B, H, W]
    (255 = ignored or unknown), camera int32 [B] (index into the cameras that were chosen), scene
    int32 [B] (index into `shards.scenes`); on demand foreground float32 [B, N], the mask's share of
    each 28 x 28 token, intrinsic float32 [B, 3, 3] at this size, camera_to_ego float32 [B, 4, 4]
    and index int64 [B], the item's number in the split. In sample mode: image [B, C, H, W, 3] and
    so on, speed float32 [B], command int32 [B], future float32 [B, 6, 2], future_valid bool [B, 6],
    scene; on demand what `schema.Record` holds beside them, the agents as [B, max_agents, ...].
    With `tokens` also those of each picture in the cache's number type, [B, N, D] or [B, C, N, D].

    Args:
        shards: An opened data set.
        split: One of its splits.
        config: How to make batches; `batch_size` is that of each process.
        process_index: This process.
        process_count: Processes that share the data; no example is left out or given twice.
        tokens: The cached tokens of an encoder for the pictures of this split at this size.

    Raises:
        UserError: No such split or camera, too little data for a batch, a remainder that several
            hosts cannot have, flips with cameras that cannot be mirrored, or tokens of other
            pictures than the config makes.
    """
    if not 0 <= process_index < process_count:
        raise UserError(
            f"process_index={process_index} must be from 0 to below process_count={process_count}."
        )
    if tokens is not None:
        _check_tokens(tokens, shards, split, config)
    cameras = _chosen_cameras(shards, config)
    swapped = mirrored_cameras(cameras) if config.flip and config.group == "sample" else None
    items = _Items(shards, split, cameras, config.group)
    data = grain.MapDataset.source(items).seed(config.seed)
    if config.shuffle:
        data = data.shuffle()
    data = data.repeat(config.num_epochs)
    fields = config.fields or DEFAULT_FIELDS[config.group]
    decoding = Decoding(
        config.image_size, config.resize, fields, config.group, cameras, config.max_agents
    )
    data = data.map(partial(_decode, shards=shards, decoding=decoding, tokens=tokens))
    if config.flip or config.jitter.active:
        data = data.random_map(partial(_augment, config=config, swapped=swapped))
    together = config.batch_size * process_count
    if config.remainder == "keep" and process_count > 1:
        raise UserError(
            "remainder='keep' would give hosts batches of different sizes; use 'pad' or 'drop'."
        )
    if config.num_epochs and config.remainder == "drop" and len(data) < together:
        raise UserError(
            f"Split {split!r} of {shards.path} gives {len(items)} items, fewer than one batch of "
            f"{together}; make the batch smaller."
        )

    def start(given: int) -> Iterator[dict]:
        rest = data[given:] if given else data
        if config.num_epochs:
            rest = _whole_batches(rest, together, config.remainder)
        if process_count > 1:
            block = HostBlocks(rest, config.batch_size, process_index, process_count)
            rest = grain.MapDataset.source(block)
        # Nothing is dropped from an endless stream, but Grain cannot count its batches of one.
        batches = rest.batch(config.batch_size, drop_remainder=config.num_epochs is None)
        return iter(read_batches(batches, config.read_threads, config.num_workers))

    return Loader(start, together)


@dataclass(frozen=True)
class HostBlocks:
    """One host's items: of each batch of all hosts a block, in the order that one host would have.

    Attributes:
        items: Of all hosts, whole batches.
        size: Items of a host's batch.
        host: Which host.
        hosts: How many.
    """

    items: grain.MapDataset
    size: int
    host: int
    hosts: int

    def __len__(self) -> int:
        return len(self.items) // (self.size * self.hosts) * self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, place = divmod(index, self.size)
        return self.items[(batch * self.hosts + self.host) * self.size + place]


def identity(
    shards: Shards, split: str, config: LoaderConfig, tokens: TokenCache | None = None
) -> dict[str, object]:
    """What the stream of examples depends on, as JSON values.

    A position is of this stream: keep it beside a checkpoint. Batch size, hosts, workers and
    threads are not part of it, since a position holds for any of them.
    """
    fields = asdict(config)
    for name in ("batch_size", "num_workers", "read_threads", "remainder"):
        del fields[name]
    stream = {
        "data": shards.digest,
        "split": split,
        **{key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()},
    }
    if tokens is not None:
        stream["tokens"] = [tokens.identity.encoder, tokens.identity.dtype]
    return stream


def _check_tokens(tokens: TokenCache, shards: Shards, split: str, config: LoaderConfig) -> None:
    """Raises `UserError` unless the tokens are of the pictures that the loader gives."""
    made = {"data": shards.digest, "split": split}
    made |= {"image_size": tuple(config.image_size), "resize": config.resize}
    for name, value in made.items():
        if (stored := getattr(tokens.identity, name)) != value:
            raise UserError(
                f"The token cache {tokens.path} is of {name}={stored!r}, and batches of {value!r} "
                "are asked for; make both the same."
            )
    if config.flip or config.jitter.active:
        raise UserError(
            f"The token cache {tokens.path} holds tokens of unchanged pictures; turn flip and "
            "jitter off."
        )


def _decode(
    item: tuple[int, list[int], list[dict]],
    *,
    shards: Shards,
    decoding: Decoding,
    tokens: TokenCache | None,
) -> dict[str, np.ndarray]:
    number, places, records = item
    example = decode_example((number, records), shards=shards, decoding=decoding)
    if tokens is not None:
        each = [tokens[place] for place in places]
        example["tokens"] = np.stack(each) if decoding.group == "sample" else each[0]
    return example


def _whole_batches(data: grain.MapDataset, size: int, remainder: str) -> grain.MapDataset:
    if remainder == "drop":
        return data[: len(data) // size * size]
    return data if remainder == "keep" else _Padded(data, -(-len(data) // size) * size)


class _Padded(grain.MapDataset):
    """A data set filled up with its last example; "valid" says which are real."""

    def __init__(self, parent: grain.MapDataset, length: int):
        super().__init__(parent)
        self._real, self._length = len(parent), length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        example = self._parent[min(index, self._real - 1)]
        return {**example, "valid": np.bool_(index < self._real)}


def read_batches(
    batches: grain.MapDataset, read_threads: int, num_workers: int
) -> grain.IterDataset:
    """Batches made by threads, and by processes if there are any; see `LoaderConfig`."""
    threads = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=read_threads + 1)
    data = batches.to_iter_dataset(threads)
    single_threaded()
    if num_workers:
        _mark_flags_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        data = data.mp_prefetch(options, worker_init_fn=_start_worker)
    return data


def _start_worker(index: int, count: int) -> None:
    del index, count
    start_worker()
    # Terminals and schedulers signal all processes of a job. A training that is asked to stop may
    # wait for a batch before it saves, so its workers stay; they end when it does.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Items:
    """Random access to an item's number, its records and their places in the split.

    A picture has one record, a sample those of its cameras.
    """

    def __init__(self, shards: Shards, split: str, cameras: tuple[str, ...], group: str):
        self._records = record_source(shards, split)
        self._stride = len(shards.cameras)
        self._offsets = [shards.cameras.index(camera) for camera in cameras]
        self._per_item = len(cameras) if group == "sample" else 1
        self._samples = shards.samples[split]

    def __len__(self) -> int:
        return self._samples * len(self._offsets) // self._per_item

    def __getitem__(self, index) -> tuple[int, list[int], list[dict]]:
        if self._per_item > 1:
            sample, chosen = int(index), self._offsets
        else:
            sample, place = divmod(int(index), len(self._offsets))
            chosen = [self._offsets[place]]
        places = [sample * self._stride + offset for offset in chosen]
        return int(index), places, [self._records[place] for place in places]

    def __repr__(self) -> str:
        return f"driving items ({len(self)})"


def _augment(
    example: dict,
    rng: np.random.Generator,
    *,
    config: LoaderConfig,
    swapped: tuple[int, ...] | None,
) -> dict:
    if config.flip and rng.random() < 0.5:
        example = mirror(example, config.image_size, swapped)
    if config.jitter.active and "image" in example:
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
