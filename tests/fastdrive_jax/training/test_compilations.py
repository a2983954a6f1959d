import warnings

import grain
import jax
import jax.numpy as jnp
import pytest
from tiny_run import example, run

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.compilations import OneCompilation, changes
from fastdrive_jax.training.watch import WatchConfig


def step_fn():
    return jax.jit(lambda state, batch: (state + batch["x"].sum(), {}), donate_argnums=0)


def test_the_array_that_changed_is_named_with_both_shapes():
    step = OneCompilation(step_fn(), "raise")
    state, _ = step(jnp.zeros(2), {"x": jnp.ones((4, 3)), "y": jnp.ones(4)})
    for _ in range(3):
        state, _ = step(state, {"x": jnp.ones((4, 3)), "y": jnp.ones(4)})
    words = r"batch\.x was float32\[4, 3\] and is now float32\[2, 3\]; batch\.y was float32\[4\]"
    with pytest.raises(UserError, match=words):
        step(state, {"x": jnp.ones((2, 3)), "y": jnp.ones(2)})


def test_a_state_that_comes_back_of_another_type_is_named():
    """A classic: a Python number in the first state makes the second step compile anew."""
    step = OneCompilation(jax.jit(lambda state, batch: (state * jnp.ones(()), {})), "raise")
    state, _ = step(1.0, {})
    with pytest.raises(UserError, match=r"state was float32\[\], weakly typed and is now float32"):
        step(state, {})


def test_a_warning_goes_on_and_comes_once_for_a_shape():
    step = OneCompilation(step_fn(), "warn")
    state, _ = step(jnp.zeros(2), {"x": jnp.ones(4)})
    with pytest.warns(RuntimeWarning, match=r"batch\.x was float32\[4\] and is now float32\[3\]"):
        state, _ = step(state, {"x": jnp.ones(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (4, 3, 3):
            state, _ = step(state, {"x": jnp.ones(size)})
    assert float(state[0]) == 4 + 3 + 4 + 3 + 3


def test_only_the_first_five_changes_are_listed():
    before = {f"a{number}": "1" for number in range(8)}
    found = changes(before, dict.fromkeys(before, "2"))
    assert found[0] == "a0 was 1 and is now 2"
    assert found[5:] == ["3 more"]
    assert changes(before, before) == []


def test_a_run_whose_last_batch_is_smaller_stops_with_its_shape(tmp_path):
    def batches():
        return iter(
            grain.MapDataset.range(20).seed(0).random_map(example).to_iter_dataset()
            .batch(8, drop_remainder=False)
        )  # fmt: skip

    def loss_fn(params, batch, key):  # of its own, so that no other test has compiled it
        return jnp.square(batch["x"] @ params["kernel"] - batch["y"]).mean(), {}

    words = r"batch\.x was float32\[8, 16\].* and is now float32\[4, 16\]"
    with pytest.raises(UserError, match=words):
        run(tmp_path, 3, batches=batches(), loss=loss_fn, watch=WatchConfig(on_recompile="raise"))
