import numpy as np
import pytest

from fastdrive_jax.evaluation.foreground import (
    FOREGROUND_PRECISION,
    FOREGROUND_RECALL,
    OBJECT_RECALL,
    UNLABELLED,
    Areas,
    foreground_rows,
    kept_area,
    oracle_indices,
    oracle_rows,
    precision,
    recall,
    token_areas,
    token_fractions,
)

# two pictures of 2 x 4 pixels, tokens of 2: N = 2
LABELS = np.array(
    [
        [[4, 4, 6, 0], [4, 0, 9, 9]],
        [[0, 0, 4, 4], [0, 0, 4, 4]],
    ]
)


def test_fractions_by_hand():
    found = token_fractions(LABELS, (4, 6), token=2)
    np.testing.assert_allclose(found, [[0.75, 0.25], [0.0, 1.0]])


def test_ignored_pixels_carry_no_area():
    areas = token_areas(LABELS, foreground=(4, 6, 9), objects=(6,), ignore=(9,), token=2)
    np.testing.assert_allclose(areas.foreground, [[0.75, 0.25], [0.0, 1.0]])
    np.testing.assert_allclose(areas.objects, [[0.0, 0.25], [0.0, 0.0]])
    np.testing.assert_allclose(areas.valid, [[1.0, 0.5], [1.0, 1.0]])


def test_ignored_pixels_carry_no_area_once_they_are_loaded_either():
    """A loader gives 255 in their place, and the precision is that of the stored map."""
    loaded = np.where(LABELS == 9, UNLABELLED, LABELS)
    classes = {"foreground": (4, 6), "objects": (6,), "ignore": (9,), "token": 2}
    stored, found = token_areas(LABELS, **classes), token_areas(loaded, **classes)
    for name in ("foreground", "objects", "valid"):
        np.testing.assert_array_equal(getattr(found, name), getattr(stored, name))
    rows = {r.metric: r for r in foreground_rows("m", 1.0, found, np.array([[0, 1], [0, 1]]))}
    assert rows[FOREGROUND_PRECISION].value == pytest.approx((0.75 + 0.25 + 1.0) / 3.5)


def test_tokens_are_in_raster_order():
    labels = np.zeros((1, 56, 84), np.uint8)
    labels[0, 28:, 28:56] = 5  # second row, second of three columns
    assert np.flatnonzero(token_fractions(labels, (5,))[0]).tolist() == [4]


def test_recall_and_precision_by_hand():
    fractions = token_fractions(LABELS, (4, 6), token=2)
    keep = np.array([[0], [1]])
    assert recall(fractions, keep) == pytest.approx(1.75 / 2.0)
    assert precision(fractions, keep) == pytest.approx((0.75 + 1.0) / 2)
    assert recall(fractions, np.array([[0, 1], [0, 1]])) == 1.0
    valid = np.array([[1.0, 1.0], [1.0, 0.5]])
    assert precision(fractions, np.array([[0], [0]]), valid) == pytest.approx(0.75 / 2)


def test_no_foreground_has_no_recall():
    assert np.isnan(recall(np.zeros((1, 4)), np.array([[0]])))


def test_oracle_takes_most_area_with_ties_by_the_lower_index():
    fractions = np.array([[0.5, 1.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.9]])
    np.testing.assert_array_equal(oracle_indices(fractions, 2), [[0, 1], [0, 3]])


def test_no_choice_beats_the_oracle():
    rng = np.random.default_rng(0)
    fractions = rng.random((8, 20)) ** 3
    best = recall(fractions, oracle_indices(fractions, 5))
    for _ in range(50):
        keep = np.stack([rng.choice(20, 5, replace=False) for _ in range(8)])
        assert recall(fractions, keep) <= best


def test_rows_pool_over_pictures_and_cover_their_value():
    areas = token_areas(LABELS, foreground=(4, 6), objects=(6,), token=2)
    rows = {r.metric: r for r in foreground_rows("m", 0.5, areas, np.array([[0], [1]]), seed=3)}
    assert rows[FOREGROUND_RECALL].value == pytest.approx(1.75 / 2.0)
    assert rows[FOREGROUND_RECALL].low == pytest.approx(0.75)
    assert rows[FOREGROUND_RECALL].high == pytest.approx(1.0)
    assert rows[FOREGROUND_PRECISION].value == pytest.approx(0.875)
    assert rows[OBJECT_RECALL].value == 0.0
    assert {r.n for r in rows.values()} == {2}
    assert {r.seed for r in rows.values()} == {3}


def test_pictures_without_objects_have_no_object_recall():
    areas = token_areas(LABELS, foreground=(4,), objects=(7,), token=2)
    metrics = {r.metric for r in foreground_rows("m", 0.5, areas, np.array([[0], [1]]))}
    assert metrics == {FOREGROUND_RECALL, FOREGROUND_PRECISION}


def test_oracle_rows_give_each_metric_its_own_ceiling():
    areas = Areas(
        foreground=np.array([[1.0, 0.6]]), objects=np.array([[0.0, 0.6]]), valid=np.ones((1, 2))
    )
    rows = {r.metric: r.value for r in oracle_rows(0.5, areas, 1)}
    assert rows[FOREGROUND_RECALL] == pytest.approx(1 / 1.6)
    assert rows[OBJECT_RECALL] == 1.0


@pytest.mark.parametrize(
    ("keep", "message"),
    [([[0, 0]], "twice"), ([[4]], "must be in"), ([[-1]], "must be in"), ([0], "do not fit")],
)
def test_bad_indices_are_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        kept_area(np.ones((1, 4)), np.array(keep))


def test_bad_pictures_are_refused():
    with pytest.raises(ValueError, match="does not split"):
        token_fractions(np.zeros((1, 30, 28), int), (1,))
    with pytest.raises(ValueError, match=r"0\.\.255"):
        token_fractions(np.full((1, 28, 28), 300), (1,))
