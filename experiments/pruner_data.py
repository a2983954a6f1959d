"""What a ReconPruner is trained and measured on: batches, cached tokens, the mean training mask."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data_pipelines.augment import NO_JITTER
from data_pipelines.features import FeatureSet, SplitFeatures, cache_features, dino_encoder
from data_pipelines.loader import Loader, make_loader
from data_pipelines.shards import Shards
from data_pipelines.token_cache import TokenCache, open_token_cache
from data_pipelines.token_cache_writer import write_token_cache
from experiments.configs.pruner import PrunerRun
from experiments.encoders import FrozenEncoder, load_encoder
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.foreground import token_fractions
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.pruning.position_prior import mean_fractions

PRIOR_PICTURES = 4096  # of a large split; a mean of so many masks is known to a hundredth
PRIOR_BATCH = 64
ENCODED_AT_ONCE = 4  # pictures a device, for the cache

Share = tuple[int, int]  # which of a batch this process reads, and how many there are: `data_share`


def training_batches(
    shards: Shards, run: PrunerRun, share: Share, tokens: TokenCache | None = None
) -> Loader:
    """This process's share of the training batches."""
    return _loader(shards, "train", run, share, _training_fields(run), tokens)


def validation_batches(
    shards: Shards, run: PrunerRun, share: Share
) -> Iterator[dict[str, np.ndarray]]:
    """Whole batches of about `eval_pictures` pictures, of a split that is smaller all of them."""
    size = run.loader.batch_size
    count = max(1, min(run.eval_pictures, shards.records("val")) // size)
    plain = {"flip": False, "jitter": NO_JITTER, "shuffle": True}
    batches = iter(_loader(shards, "val", run, share, _training_fields(run), **plain))
    try:
        yield from itertools.islice(batches, count)
    finally:
        batches.close()


def measured_batches(
    shards: Shards, run: PrunerRun, share: Share, pictures: int
) -> Iterator[dict[str, np.ndarray]]:
    """Pictures of val with their labels, each once; the last batch filled up, see "valid".

    Args:
        shards: The data set.
        run: The setting.
        share: See `Share`.
        pictures: How many are drawn, rounded up to whole batches; 0 takes all.
    """
    batches = _loader(
        shards,
        "val",
        run,
        share,
        ("image", "labels", "camera", "scene"),
        flip=False,
        jitter=NO_JITTER,
        shuffle=bool(pictures),
        num_epochs=1,
        remainder="pad",
    )
    return itertools.islice(batches, -(-pictures // run.loader.batch_size) or None)


def train_prior(train: SplitFeatures) -> np.ndarray:
    """Mean training mask [cameras, N] as foreground shares of token places.

    Raises:
        UserError: No picture has any foreground.
    """
    return _mean_mask(token_fractions(np.asarray(train.masks), (1,)), train.camera)


def shards_prior(shards: Shards, run: PrunerRun) -> np.ndarray:
    """`train_prior` of shards, of up to `PRIOR_PICTURES` pictures that are drawn once.

    Raises:
        UserError: As `train_prior`.
    """
    count = shards.records("train")
    whole = count <= PRIOR_PICTURES
    config = replace(
        run.loader,
        batch_size=min(PRIOR_BATCH, count),
        fields=("foreground", "camera"),
        flip=False,
        jitter=NO_JITTER,
        shuffle=not whole,
        num_epochs=1,
        remainder="keep",
    )
    batches = make_loader(shards, "train", config)
    taken = batches if whole else itertools.islice(batches, PRIOR_PICTURES // PRIOR_BATCH)
    found = [(batch["foreground"], batch["camera"]) for batch in taken]
    return _mean_mask(*map(np.concatenate, zip(*found, strict=True)))


def _mean_mask(fractions: np.ndarray, camera: np.ndarray) -> np.ndarray:
    if not fractions.any():
        raise UserError(
            "No training picture has any foreground, so there is nothing to learn; look at the "
            "masks, or at which class ids are foreground, and build the shards again."
        )
    return mean_fractions(fractions, camera)


def dino_features(
    shards: Shards, weights: Path | None, run: PrunerRun, folder: Path, quiet: bool = False
) -> FeatureSet:
    """DINOv2 tokens of all pictures, cached in `folder`.

    Raises:
        UserError: The run's pruner is not as wide as the tokens.
    """
    encoder = dino_encoder(weights)
    check_width(run, encoder.dim)
    return cache_features(shards, encoder, folder, progress=not quiet)


def cached_tokens(
    folder: Path,
    shards: Shards,
    run: PrunerRun,
    encoder: FrozenEncoder,
    mesh: Mesh,
    weights: Path | None,
    quiet: bool = False,
) -> TokenCache:
    """Tokens of train, of which each host makes a part.

    Args:
        folder: Shared by the hosts.
        shards: The data set.
        run: The setting.
        encoder: Of the training, over all devices.
        mesh: Those devices.
        weights: See `load_encoder`; several hosts encode each by itself, so each loads them.
        quiet: No progress bars.
    """
    hosts = jax.process_count()
    if hosts > 1:
        mesh = make_mesh(devices=jax.local_devices())
        encoder = load_encoder(run.encoder, weights, mesh, jnp.dtype(run.dtype), quiet)
    write_token_cache(
        shards,
        "train",
        encoder.tokens(mesh),
        folder,
        run.loader.image_size,
        run.loader.resize,
        batch_size=ENCODED_AT_ONCE * mesh.size,
        dtype="float16" if run.dtype == "float32" else run.dtype,
        host_index=jax.process_index(),
        host_count=hosts,
        progress=not quiet,
    )
    multihost_utils.sync_global_devices("tokens are cached")
    return open_token_cache(folder)


def _loader(shards, split, run, share, fields, tokens=None, **changes):
    """Batches of this process."""
    index, count = share
    config = replace(
        run.loader, batch_size=run.loader.batch_size // count, fields=fields, **changes
    )
    return make_loader(shards, split, config, index, count, tokens)


def _training_fields(run: PrunerRun) -> tuple[str, ...]:
    return ("image", "mask", "camera") if run.recon.needs_prior else ("image", "mask")


def check_width(run: PrunerRun, width: int) -> None:
    """Refuses a pruner for tokens of another width."""
    if run.recon.pruner.layer.hidden_size != width:
        raise UserError(
            f"recon.pruner.layer.hidden_size={run.recon.pruner.layer.hidden_size} must be the size "
            f"of the encoder's tokens, {width}."
        )
