"""Batches of cached token features: a Grain pipeline with an exactly resumable position."""

from collections.abc import Callable
from dataclasses import dataclass

import grain
import jax
import numpy as np
from tqdm import tqdm

from data_pipelines.features import SplitFeatures
from fastdrive_jax.errors import UserError


@dataclass(frozen=True)
class FeatureLoaderConfig:
    """How batches of features are made.

    Attributes:
        batch_size: Pictures in a batch.
        shuffle: Another order each epoch.
        seed: Of the order.
        num_epochs: Passes over the data; None means endless.
        drop_remainder: Leave out a last batch that is not full.
    """

    batch_size: int = 8
    shuffle: bool = True
    seed: int = 0
    num_epochs: int | None = None
    drop_remainder: bool = True

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1.")
        if self.num_epochs is not None and self.num_epochs < 1:
            raise UserError(
                f"num_epochs={self.num_epochs} must be at least 1, or none for endless."
            )


def make_feature_loader(features: SplitFeatures, config: FeatureLoaderConfig) -> grain.IterDataset:
    """Batches of tokens, image, mask and camera.

    float32 [B, N, D], uint8 [B, H, W, 3], uint8 [B, H, W], int32 [B]. Its iterator has `get_state`
    and `set_state`.

    Args:
        features: One split; arrays may be mapped from disk.
        config: How to make batches.

    Raises:
        UserError: There are fewer pictures than a batch holds.
    """
    count = len(features.tokens)
    if count < (config.batch_size if config.drop_remainder else 1):
        raise UserError(
            f"There are {count} pictures with features, fewer than one batch of "
            f"{config.batch_size}: make batch_size smaller."
        )

    def item(index: int) -> dict[str, np.ndarray]:
        return {
            "tokens": np.asarray(features.tokens[index], np.float32),
            "image": np.asarray(features.images[index]),
            "mask": np.asarray(features.masks[index]),
            "camera": np.int32(features.camera[index]),
        }

    data = grain.MapDataset.range(count).seed(config.seed)
    if config.shuffle:
        data = data.shuffle()
    data = data.repeat(config.num_epochs).map(item)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * config.batch_size)
    return data.to_iter_dataset(options).batch(
        config.batch_size, drop_remainder=config.drop_remainder
    )


def encode_split(
    encode: Callable[[np.ndarray], jax.Array],
    images: np.ndarray,
    masks: np.ndarray,
    labels: np.ndarray,
    camera: np.ndarray,
    scene: np.ndarray,
    batch_size: int = 16,
    quiet: bool = True,
) -> SplitFeatures:
    """Features in memory by any encoder, for sets that are small enough.

    Args:
        encode: uint8 [B, H, W, 3] to tokens [B, N, D]; always called with `batch_size` pictures.
        images: uint8 [M, H, W, 3].
        masks: uint8 {0, 1} [M, H, W].
        labels: uint8 [M, H, W].
        camera: int32 [M].
        scene: int32 [M].
        batch_size: Pictures encoded at once.
        quiet: No progress bar.

    Raises:
        UserError: There is no picture.
    """
    if not len(images):
        raise UserError("There is no picture to compute token features of.")
    tokens = []
    for start in tqdm(range(0, len(images), batch_size), desc="token features", disable=quiet):
        batch = np.asarray(images[start : start + batch_size])
        count = len(batch)
        if count < batch_size:  # keeps one compiled shape
            batch = np.concatenate([batch, np.repeat(batch[-1:], batch_size - count, axis=0)])
        tokens.append(np.asarray(encode(batch), np.float32)[:count])
    return SplitFeatures(np.concatenate(tokens), images, masks, labels, camera, scene)
