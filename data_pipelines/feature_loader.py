"""Batches of cached token features: a Grain pipeline with an exactly resumable position."""

from dataclasses import dataclass

import grain
import numpy as np

from data_pipelines.features import SplitFeatures
from fastdrive_jax.configs import check_least
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
        check_least(self, batch_size=1)
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
