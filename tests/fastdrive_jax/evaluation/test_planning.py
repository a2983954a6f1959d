import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.planning import (
    planning_errors,
    planning_metrics,
    planning_rows,
)


def _straight(offsets):
    """A future along x and a plan that is off by `offsets` [T] to the left."""
    future = np.stack([np.arange(1.0, 7.0), np.zeros(6)], 1)
    planned = future + np.stack([np.zeros(6), offsets], 1)
    return planned, future


def test_both_averages_by_hand():
    planned, future = _straight(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    errors = planning_errors(planned[None], future[None], np.ones((1, 6), bool))
    np.testing.assert_allclose(errors.noavg, [[2.0, 4.0, 6.0]])
    np.testing.assert_allclose(errors.temavg, [[1.5, 2.5, 3.5]])
    assert errors.ade == pytest.approx([3.5])
    assert errors.fde == pytest.approx([6.0])
    metrics = planning_metrics(errors)
    assert metrics["l2_temavg"] == pytest.approx([2.5])
    assert metrics["l2_noavg"] == pytest.approx([4.0])
    assert metrics["l2_noavg_3s"] == pytest.approx([6.0])
    assert metrics["l2_temavg_1s"] == pytest.approx([1.5])


def test_distance_is_euclidean():
    future = np.zeros((1, 6, 2))
    planned = np.broadcast_to([3.0, -4.0], (1, 6, 2))
    errors = planning_errors(planned, future, np.ones((1, 6), bool))
    np.testing.assert_allclose(errors.temavg, 5.0)


def test_a_sample_with_an_unknown_step_does_not_count():
    planned, future = _straight(np.ones(6))
    broken = future.copy()
    broken[5] = np.nan
    valid = np.array([[True] * 6, [True] * 5 + [False]])
    errors = planning_errors(np.stack([planned, planned]), np.stack([future, broken]), valid)
    assert errors.used.tolist() == [True, False]
    assert errors.temavg.shape == (1, 3)


def test_rows_are_in_metres_and_resample_scenes():
    plans, futures = zip(*(_straight(np.full(6, size)) for size in (1.0, 1.0, 3.0)), strict=True)
    valid = np.ones((3, 6), bool)
    errors = planning_errors(np.stack(plans), np.stack(futures), valid)
    rows = {r.metric: r for r in planning_rows("random", 0.5, errors, np.array([0, 0, 1]), seed=2)}
    row = rows["l2_temavg"]
    assert row.value == pytest.approx(5 / 3)
    assert (row.low, row.high) == (1.0, 3.0)
    assert (row.n, row.seed, row.unit, row.keep_ratio) == (3, 2, "m", 0.5)
    assert len(rows) == 10


def test_scenes_follow_the_samples_that_count():
    plans, futures = zip(*(_straight(np.full(6, size)) for size in (9.0, 1.0, 3.0)), strict=True)
    valid = np.ones((3, 6), bool)
    valid[0, 0] = False
    errors = planning_errors(np.stack(plans), np.stack(futures), valid)
    rows = {r.metric: r for r in planning_rows("m", None, errors, np.array([5, 6, 6]))}
    assert rows["ade"].value == 2.0
    assert rows["ade"].low is None  # one scene left


def test_nothing_to_measure_is_said():
    with pytest.raises(UserError, match="none of the 2 samples"):
        planning_errors(np.zeros((2, 6, 2)), np.zeros((2, 6, 2)), np.zeros((2, 6), bool))


@pytest.mark.parametrize(
    ("planned", "valid", "message"),
    [
        (np.zeros((1, 5, 2)), np.ones((1, 5)), "shorter"),
        (np.zeros((1, 6, 2)), np.ones((1, 5)), "valid"),
        (np.zeros((1, 6, 3)), np.ones((1, 6)), r"\[S, T, 2\]"),
        (np.full((1, 6, 2), np.nan), np.ones((1, 6)), "finite"),
    ],
)
def test_bad_arrays_are_refused(planned, valid, message):
    with pytest.raises(ValueError, match=message):
        planning_errors(planned, np.zeros_like(planned), valid)
