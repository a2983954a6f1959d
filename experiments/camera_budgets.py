"""One budget for all cameras of a sample beside one for each: what is kept of six pictures."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.features import SplitFeatures
from data_pipelines.schema import Classes
from experiments.measure_pruner import score_split
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.foreground import TOKEN, Areas, foreground_rows, token_areas
from fastdrive_jax.evaluation.results import Row
from fastdrive_jax.pruning import Pruner, PrunerInputs
from fastdrive_jax.pruning.budgets import per_camera
from fastdrive_jax.pruning.interface import keep_tokens
from fastdrive_jax.pruning.select import num_keep, top_k

SHARED, EACH = "one budget", "one for each camera"


def budget_rows(
    name: str,
    pruner: Pruner,
    params: Any,
    val: SplitFeatures,
    classes: Classes,
    ratios: Sequence[float],
) -> list[Row]:
    """Recall over all cameras of a sample together, of both kinds of budget.

    Args:
        name: Of the method.
        pruner: A method that scores pictures by themselves.
        params: Its parameters.
        val: Pictures, all cameras of a sample one after the other.
        classes: Which labels count.
        ratios: Keep ratios.

    Raises:
        UserError: Samples do not have the same cameras in the same order.
    """
    cameras = int(val.camera.max()) + 1
    if not np.array_equal(val.camera, np.tile(np.arange(cameras), len(val.camera) // cameras)):
        raise UserError("Budgets are compared on samples that all have the same cameras.")
    areas = token_areas(np.asarray(val.labels), classes.foreground, classes.objects, classes.ignore)
    grid = tuple(edge // TOKEN for edge in val.images.shape[1:3])
    samples = [
        np.asarray(x).reshape(-1, cameras * x.shape[1])
        for x in (areas.foreground, areas.objects, areas.valid)
    ]
    whole = Areas(*samples)
    scene = np.asarray(val.scene)[::cameras]
    n = grid[0] * grid[1]
    each = per_camera(
        Pruner(name=name, score=lambda params, inputs, key: inputs.relevance), cameras
    )

    scores = score_split(pruner, params, val, areas, jax.random.key(0))
    scores = scores.reshape(len(scene), cameras * n)
    given = PrunerInputs(scores[..., None], relevance=scores, grid=grid)
    rows = []
    for ratio in ratios:
        k = num_keep(cameras * n, ratio)
        for kind, kept in (
            (SHARED, top_k(scores, k)),
            (EACH, keep_tokens(each, None, given, k).indices),
        ):
            label = f"{name}, {kind}"
            rows += foreground_rows(label, ratio, whole, np.asarray(kept), scene, None)
    return rows
