"""What a ReconPruner keeps of foreground and objects, beside the controls, and how it is trained.

Scores are made batch by batch, of token features or of pictures, on one host or on several.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax.microbatching import reshape_batch_axis

from data_pipelines.features import SplitFeatures
from data_pipelines.schema import Classes
from experiments.configs.pruner import PrunerRun
from fastdrive_jax.evaluation.foreground import (
    TOKEN,
    Areas,
    foreground_rows,
    oracle_rows,
    token_areas,
)
from fastdrive_jax.evaluation.results import Row
from fastdrive_jax.parallel.mesh import replicated_sharding, shard_batch
from fastdrive_jax.pruning import Pruner, PrunerInputs, make_pruner, pruner_scores
from fastdrive_jax.pruning.select import num_keep, top_k
from fastdrive_jax.training.picture_loss import cast_floats, with_tokens
from fastdrive_jax.training.recon_images import recon_sheet
from fastdrive_jax.training.reconstruction import grid_position_ids, mask_shares, recon_loss
from fastdrive_jax.training.state import TrainState, evaluation_params

RATIOS = (1.0, 0.75, 0.5, 0.25)
DRAWN = {"reconpruner", "random"}  # their rows name the seed


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
        choice by foreground area) and "oracle" (the most that is possible for each recall).
    """
    areas = token_areas(np.asarray(val.labels), classes.foreground, classes.objects, classes.ignore)
    scores = {
        name: score_split(pruner, weights, val, areas, jax.random.key(run.seed))
        for name, (pruner, weights) in _methods(params["pruner"], run, prior).items()
    }
    return recall_rows(scores, areas, val.scene, run.seed, ratios)


def recall_rows(
    scores: dict[str, Any],
    areas: Areas,
    scene: np.ndarray,
    seed: int,
    ratios: Sequence[float] = RATIOS,
) -> list[Row]:
    """Rows of each method's scores [M, N], and of the oracle.

    Args:
        scores: By the method's name.
        areas: Of the M pictures.
        scene: int [M], pictures of one scene are drawn together for the intervals.
        seed: Of the methods that draw.
        ratios: Keep ratios.
    """
    rows = []
    for ratio in ratios:
        k = num_keep(areas.foreground.shape[1], ratio)
        for name, values in scores.items():
            kept = np.asarray(top_k(values, k))
            drawn = seed if name in DRAWN else None
            rows += foreground_rows(name, ratio, areas, kept, scene, drawn)
        rows += oracle_rows(ratio, areas, k, scene)
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
        inputs = _inputs(tokens, foreground, camera, grid)
        return pruner_scores(pruner, params, inputs, key)

    parts = []
    for number, start in enumerate(range(0, len(split.tokens), batch_size)):
        part = slice(start, start + batch_size)
        tokens = jnp.asarray(split.tokens[part], jnp.float32)
        foreground = jnp.asarray(areas.foreground[part], jnp.float32)
        camera = jnp.asarray(split.camera[part])
        parts.append(score(params, tokens, foreground, camera, jax.random.fold_in(key, number)))
    return jnp.concatenate(parts)


def evaluate_pictures(
    pruner: Any,
    run: PrunerRun,
    batches: Iterable[dict[str, np.ndarray]],
    frozen: dict[str, Any],
    encode: Callable[[Any, Any], Any],
    prior: np.ndarray,
    classes: Classes,
    mesh: jax.sharding.Mesh,
) -> list[Row]:
    """`evaluate_pruner` on pictures that are read once, over a mesh.

    Args:
        pruner: Trained parameters of the pruner, on the mesh.
        run: The setting.
        batches: Of `make_loader` with image (or tokens), labels, camera, scene and valid; this
            process's part of them.
        frozen: Of the training.
        encode: See `picture_loss`.
        prior: Mean training mask [cameras, N].
        classes: Which labels count.
        mesh: Of the training.
    """
    methods = _methods(pruner, run, prior)
    weights = {name: values for name, (_, values) in methods.items()}
    dtype = jnp.dtype(run.dtype)

    def score(weights, batch, foreground, frozen, key):
        grid = tuple(edge // TOKEN for edge in run.loader.image_size)
        tokens = with_tokens(batch, frozen, encode)["tokens"].astype(dtype)
        inputs = _inputs(tokens, foreground, batch["camera"], grid)
        weights = {**weights, "reconpruner": cast_floats(weights["reconpruner"], dtype)}
        return {
            name: pruner_scores(method, weights[name], inputs, key)
            for name, (method, _) in methods.items()
        }

    whole = replicated_sharding(mesh)
    score = jax.jit(score, out_shardings=whole)
    gather = jax.jit(lambda *arrays: arrays, out_shardings=whole)
    found: list[tuple] = []
    for number, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(run.seed), number)
        batch = shard_batch(batch, mesh)
        # Labels of all hosts, since each measures all pictures: rows are written by the first.
        labels, scene, valid = map(
            np.asarray, gather(batch["labels"], batch["scene"], batch["valid"])
        )
        areas = token_areas(labels, classes.foreground, classes.objects, classes.ignore)
        foreground = jax.device_put(areas.foreground.astype(np.float32), whole)
        scores = {
            name: np.asarray(values)[valid]
            for name, values in score(weights, batch, foreground, frozen, key).items()
        }
        found.append((scores, areas, scene, valid))
    areas = Areas(
        *(
            np.concatenate([getattr(part, name)[valid] for _, part, _, valid in found])
            for name in ("foreground", "objects", "valid")
        )
    )
    scores = {name: np.concatenate([part[name] for part, *_ in found]) for name in methods}
    scene = np.concatenate([part[valid] for _, _, part, valid in found])
    return recall_rows(scores, areas, scene, run.seed)


def make_evaluation(
    run: PrunerRun,
    batches: Callable[[], Iterator[dict[str, np.ndarray]]],
    frozen: dict[str, Any],
    encode: Callable[[Any, Any], Any] | None,
    mesh: jax.sharding.Mesh,
    ratios: Sequence[float] = RATIOS[1:],
) -> Callable[[TrainState], dict[str, float]]:
    """State to loss, kept and recall_R, the share of the masks' area in the best R% of the tokens.

    Args:
        run: The setting.
        batches: Gives the same batches each time.
        frozen: Of the training.
        encode: See `picture_loss`.
        mesh: Of the training.
        ratios: Keep ratios.
    """
    pruner = make_pruner("reconpruner", config=run.recon.pruner)
    dtype = jnp.dtype(run.dtype)

    def measure(params, batch, frozen):
        params = cast_floats(params, dtype)
        if run.accumulate == 1:
            return measure_part(params, batch, frozen)
        # In the parts that a training step takes: a whole batch may not fit the devices.
        parts = reshape_batch_axis(batch, len(batch["mask"]) // run.accumulate)
        means, areas = jax.lax.map(lambda part: measure_part(params, part, frozen), parts)
        return jax.tree.map(jnp.mean, means), jax.tree.map(jnp.sum, areas)

    def measure_part(params, batch, frozen):
        batch = with_tokens(batch, frozen, encode)
        # One key: budgets that differ between evaluations would be noise in the loss.
        loss, metrics = recon_loss(
            params, batch, jax.random.key(0), frozen.get("prior"), config=run.recon
        )
        height, width = (edge // TOKEN for edge in batch["mask"].shape[1:])
        inside = mask_shares(batch["mask"])
        inputs = _inputs(batch["tokens"].astype(dtype), None, None, (height, width))
        scores = pruner_scores(pruner, params["pruner"], inputs)
        areas = {"all": inside.sum()}
        for ratio in ratios:
            kept = top_k(scores, num_keep(inside.shape[1], ratio))
            areas[f"recall_{round(100 * ratio)}"] = jnp.take_along_axis(inside, kept, 1).sum()
        return {"loss": loss, "kept": metrics["kept"]}, areas

    measure = jax.jit(measure, out_shardings=replicated_sharding(mesh))

    def evaluate(state: TrainState) -> dict[str, float]:
        params = evaluation_params(state)
        found = [measure(params, shard_batch(batch, mesh), frozen) for batch in batches()]
        means, areas = jax.device_get(jax.tree.map(lambda *values: sum(values), *found))
        means = {name: float(value) / len(found) for name, value in means.items()}
        total = float(areas.pop("all"))
        return means | {k: float(v) / total if total else 1.0 for k, v in areas.items()}

    return evaluate


def make_images(
    run: PrunerRun, encode: Callable[[Any, Any], Any] | None, frozen: Any, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, dict], dict[str, np.ndarray]]:
    """The pictures of `fit`: what is kept and painted of the first pictures of a batch."""

    def draw(state, batch, frozen):
        params = cast_floats(evaluation_params(state), jnp.dtype(run.dtype))
        batch = with_tokens(batch, frozen, encode)
        return recon_sheet(params, batch, state.step_key(), run.recon)

    draw = jax.jit(draw, out_shardings=replicated_sharding(mesh))
    return lambda state, batch: {"reconstruction": np.asarray(draw(state, batch, frozen))}


def _methods(pruner: Any, run: PrunerRun, prior: np.ndarray) -> dict[str, tuple[Pruner, Any]]:
    return {
        "reconpruner": (make_pruner("reconpruner", config=run.recon.pruner), pruner),
        "random": (make_pruner("random"), None),
        "uniform": (make_pruner("uniform"), None),
        "prior": (make_pruner("prior"), jnp.asarray(prior)),
        "ground_truth": (make_pruner("ground_truth"), None),
    }


def _inputs(tokens, foreground, camera, grid) -> PrunerInputs:
    return PrunerInputs(
        tokens=tokens,
        position_ids=grid_position_ids(tokens.shape[0], grid),
        foreground=foreground,
        camera=None if camera is None else camera[:, None],
        grid=grid,
    )
