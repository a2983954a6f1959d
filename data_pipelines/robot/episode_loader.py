"""Batches of demonstrations for behaviour cloning: what is seen, and the actions that follow.

One endless stream of steps, as the loader of driving has it: every epoch has each step once, a
position is one number, of steps given so far, and holds for other hosts and batch sizes too.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import cv2
import grain
import numpy as np

from data_pipelines.decode import decode_image
from data_pipelines.loader import HostBlocks, Loader, read_batches
from data_pipelines.robot.episodes import HORIZON, Episodes, StepSource
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError


@dataclass(frozen=True)
class EpisodeLoaderConfig:
    """How batches are made.

    Attributes:
        batch_size: Steps in a batch of this process.
        chunk: Actions of each step, its own and those that follow.
        image_size: Height and width in pixels; None takes the stored one.
        views: Which cameras; None means all.
        segments: Also give what each pixel shows.
        failures: Also give episodes that did not succeed.
        shuffle: Another order each epoch; off gives the order of the shards.
        seed: Root of shuffling.
        num_epochs: Passes over the data, whole batches only; None means endless.
        num_workers: Processes that decode; 0 uses threads of this one.
        read_threads: Threads of each process.
    """

    batch_size: int
    chunk: int = 1
    image_size: tuple[int, int] | None = None
    views: tuple[str, ...] | None = None
    segments: bool = False
    failures: bool = False
    shuffle: bool = True
    seed: int = 0
    num_epochs: int | None = None
    num_workers: int = 0
    read_threads: int = 4

    def __post_init__(self):
        check_least(self, batch_size=1, chunk=1, num_workers=0, read_threads=1)
        if self.chunk > HORIZON:
            raise UserError(f"chunk={self.chunk} must be at most {HORIZON}, which are stored.")


def make_episode_loader(
    episodes: Episodes,
    split: str,
    config: EpisodeLoaderConfig,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Batches of a split as dicts of numpy arrays.

    image uint8 [B, V, H, W, 3], proprio float32 [B, 8], instruction int32 [B] (index into
    `episodes.instructions`), action float32 [B, chunk, 7] (at the end of an episode the last is
    repeated), episode and step int32 [B]; on demand segments uint8 [B, V, H, W] of
    `tabletop.SEGMENTS`.

    Args:
        episodes: Opened demonstrations.
        split: One of their splits.
        config: How to make batches; `batch_size` is that of each process.
        process_index: This process.
        process_count: Processes that share the data.

    Raises:
        UserError: No such split or view, or too little data for a batch.
    """
    source = StepSource(episodes, split)
    places = np.arange(len(source))
    if not config.failures:
        notes = episodes.episodes[split]
        good = [note.success for note in notes]
        places = np.flatnonzero(np.repeat(good, [note.steps for note in notes]))
    views = _chosen_views(episodes, config)
    data = grain.MapDataset.source(_Steps(source, places)).seed(config.seed)
    if config.shuffle:
        data = data.shuffle()
    data = data.repeat(config.num_epochs)
    size = config.image_size or episodes.image_size
    data = data.map(partial(_decode, views=views, size=size, config=config))
    together = config.batch_size * process_count
    if len(places) < together:
        raise UserError(
            f"Split {split!r} of {episodes.path} gives {len(places)} steps, fewer than one batch "
            f"of {together}; make the batch smaller."
        )

    def start(given: int) -> Iterator[dict]:
        rest = data[given:] if given else data
        if config.num_epochs:
            rest = rest[: len(rest) // together * together]
        if process_count > 1:
            block = HostBlocks(rest, config.batch_size, process_index, process_count)
            rest = grain.MapDataset.source(block)
        # Batches are whole; without this, Grain cannot count endless batches of one.
        batches = rest.batch(config.batch_size, drop_remainder=True)
        return iter(read_batches(batches, config.read_threads, config.num_workers))

    return Loader(start, together)


def identity(episodes: Episodes, split: str, config: EpisodeLoaderConfig) -> dict[str, object]:
    """What the stream of steps depends on, as JSON values: keep it beside a checkpoint.

    Batch size, hosts, workers and threads are not part of it, since a position holds for any.
    """
    fields = asdict(config)
    for name in ("batch_size", "num_workers", "read_threads"):
        del fields[name]
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}
    return {"data": episodes.digest, "split": split, **plain}


class _Steps:
    """Random access to the chosen steps."""

    def __init__(self, source: StepSource, places: np.ndarray):
        self._source, self._places = source, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index) -> dict:
        return self._source[self._places[index]]

    def __repr__(self) -> str:
        return f"steps of demonstrations ({len(self)})"


def _decode(
    step: dict, *, views: tuple[str, ...], size: tuple[int, int], config: EpisodeLoaderConfig
) -> dict[str, np.ndarray]:
    example = {
        "image": np.stack([decode_image(step["images"][view], size, "area") for view in views]),
        "proprio": np.asarray(step["proprio"], np.float32),
        "instruction": np.int32(step["task"]),
        "action": np.asarray(step["future"][: config.chunk], np.float32),
        "episode": np.int32(step["episode"]),
        "step": np.int32(step["step"]),
    }
    if config.segments:
        example["segments"] = np.stack([_labels(step["segments"][view], size) for view in views])
    return example


def _labels(data: bytes, size: tuple[int, int]) -> np.ndarray:
    labels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    return cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def _chosen_views(episodes: Episodes, config: EpisodeLoaderConfig) -> tuple[str, ...]:
    wanted = config.views or episodes.views
    absent = [view for view in wanted if view not in episodes.views]
    if absent:
        raise UserError(
            f"{episodes.path} has no view {', '.join(absent)}; it has {', '.join(episodes.views)}."
        )
    return tuple(wanted)
