import numpy as np
import pytest

from data_pipelines.features import SplitFeatures
from data_pipelines.schema import Classes
from experiments.camera_budgets import EACH, SHARED, budget_rows
from fastdrive_jax.errors import UserError
from fastdrive_jax.pruning import Pruner

CLASSES = Classes(names=("sky", "road", "car"), foreground=(1, 2), objects=(2,))


def features(cameras=(0, 1, 0, 1)) -> SplitFeatures:
    """Two samples of two cameras, 2 x 2 tokens each; the first camera sees a road, the other sky.

    A token's one channel is its score: the road's are the best of all.
    """
    labels = np.zeros((4, 56, 56), np.uint8)
    labels[0::2] = 1
    labels[1::2, :28, :28] = 2
    tokens = np.tile(np.array([[0.9, 0.8, 0.7, 0.6], [0.5, 0.1, 0.2, 0.3]]), (2, 1))[..., None]
    return SplitFeatures(
        tokens=tokens.astype(np.float16),
        images=np.zeros((4, 56, 56, 3), np.uint8),
        masks=(labels > 0).astype(np.uint8),
        labels=labels,
        camera=np.array(cameras),
        scene=np.array([0, 0, 1, 1]),
    )


def rows(val, ratios=(0.5, 0.75)):
    first = Pruner(name="first", score=lambda params, inputs, key: inputs.tokens[..., 0])
    found = budget_rows("first", first, None, val, CLASSES, ratios)
    return {(row.method, row.keep_ratio, row.metric): row for row in found}


def test_recall_of_both_kinds_of_budget_by_hand():
    found = rows(features())
    # Of 8 tokens 4 are the whole road, which leaves the car out; two of each camera have it.
    for kind, ratio, foreground, objects in (
        (SHARED, 0.5, 4 / 5, 0),
        (EACH, 0.5, 3 / 5, 1),
        (SHARED, 0.75, 1, 1),
        (EACH, 0.75, 4 / 5, 1),
    ):
        cell = f"first, {kind}", ratio
        assert found[*cell, "foreground_recall"].value == pytest.approx(foreground)
        assert found[*cell, "object_recall"].value == pytest.approx(objects)
        assert found[*cell, "object_recall"].n == 2  # samples


def test_samples_of_different_cameras_are_refused():
    with pytest.raises(UserError, match="same cameras"):
        rows(features(cameras=(0, 1, 1, 0)))
