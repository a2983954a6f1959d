import numpy as np
import pytest

from fastdrive_jax.evaluation.ranking import rank_intervals


def test_a_clear_order_is_sure_and_a_close_one_is_not():
    rng = np.random.default_rng(0)
    scenes = np.repeat(np.arange(30), 4)
    hard = rng.normal(0, 5, 30)[scenes]  # common to all: it must not blur the order
    values = {
        "worst": 9 + hard + rng.normal(0, 0.1, 120),
        "a": 1 + hard + rng.normal(0, 1, 120),
        "b": 1 + hard + rng.normal(0, 1, 120),
        "best": -5 + hard,
    }
    found = rank_intervals(values, scenes)
    assert found["best"] == (1, 1, 1)
    assert found["worst"] == (4, 4, 4)
    assert {found["a"][0], found["b"][0]} == {2, 3}
    assert found["a"][1:] == found["b"][1:] == (2, 3)


def test_equal_methods_share_their_place():
    values = {"a": np.arange(6.0), "b": np.arange(6.0), "c": np.arange(6.0) + 1}
    found = rank_intervals(values, np.arange(6))
    assert found == {"a": (1.5, 1.5, 1.5), "b": (1.5, 1.5, 1.5), "c": (3, 3, 3)}


def test_scenes_weigh_by_their_samples():
    """One scene of five samples against one of a single one; drawing them tells the ends."""
    scenes = np.array([0, 0, 0, 0, 0, 1])
    values = {"a": np.array([0.0] * 5 + [9]), "b": np.array([1.0] * 5 + [0])}
    found = rank_intervals(values, scenes)
    assert found["a"] == (2, 1, 2)  # 1.5 against 0.83; a draw of the first scene alone turns it
    assert found["b"] == (1, 1, 2)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="finite"):
        rank_intervals({"a": np.array([np.nan, 1])}, np.arange(2))
    with pytest.raises(ValueError, match="more than one scene"):
        rank_intervals({"a": np.ones(3)}, np.zeros(3))
