import numpy as np
import pytest

from fastdrive_jax.export.trees import flatten, unflatten


def test_names_are_paths_in_order():
    tree = {"b": {"y": np.ones(1), "x": {"k": np.zeros(2)}}, "a": np.ones(3)}
    flat = flatten(tree)
    assert list(flat) == ["a", "b/x/k", "b/y"]
    back = unflatten(flat)
    assert back["b"]["x"]["k"] is tree["b"]["x"]["k"]
    assert set(back) == {"a", "b"}
    assert set(back["b"]) == {"x", "y"}


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}])
def test_a_name_is_leaf_or_branch(flat):
    with pytest.raises(ValueError, match="a"):
        unflatten(flat)
