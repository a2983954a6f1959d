from functools import partial

import jax
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.optimizer import (
    OptimizerConfig,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
)


def ones(*shape):
    return np.ones(shape, np.float32)


PARAMS = {
    "dense": {"kernel": ones(3, 4), "bias": ones(4)},
    "stacked": {"kernel": ones(2, 3, 4), "bias": ones(2, 4)},
    "input_layernorm": {"weight": ones(2, 4)},
    "query": ones(1, 4),
}


@partial(jax.jit, static_argnums=0)
def first_update(optimizer, grads, params):
    return optimizer.update(grads, optimizer.init(params), params)


def test_schedule_rises_then_follows_the_cosine():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, total_steps=24, end_factor=0.1)
    rate = jax.jit(learning_rate_schedule(config))
    rates = np.array([rate(step) for step in range(26)])
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[14], 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(rates[24:], 0.2, rtol=1e-5)
    assert (np.diff(rates[4:25]) < 0).all()


def test_constant_schedule():
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", total_steps=5)
    assert [float(learning_rate_schedule(config)(step)) for step in (0, 3, 9)] == [0.5] * 3


def test_only_matrices_decay():
    assert decay_mask(PARAMS) == {
        "dense": {"kernel": True, "bias": False},
        "stacked": {"kernel": True, "bias": False},
        "input_layernorm": {"weight": False},
        "query": True,
    }
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    )
    zero = jax.tree.map(np.zeros_like, PARAMS)
    updates, _ = first_update(optimizer, zero, PARAMS)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["dense"]["bias"], 0.0)
    np.testing.assert_array_equal(updates["input_layernorm"]["weight"], 0.0)


def test_clipping_is_by_global_norm():
    grads = {"a": np.full((4, 4), 100.0, np.float32)}
    params = {"a": np.zeros((4, 4), np.float32)}

    def first_moment(clip):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip, beta1=0.0))
        _, state = first_update(optimizer, grads, params)
        leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4, 4)]
        return leaves[0]

    np.testing.assert_allclose(np.linalg.norm(first_moment(2.0)), 2.0, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(first_moment(0.0)), 400.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup_steps": 10, "total_steps": 10}, "warmup_steps"),
        ({"total_steps": 0}, "total_steps"),
        ({"beta2": 1.0}, "beta2"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"end_factor": 1.2}, "end_factor"),
        ({"schedule": "linear"}, "schedule"),
    ],
)
def test_bad_values_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        OptimizerConfig(**changes)
