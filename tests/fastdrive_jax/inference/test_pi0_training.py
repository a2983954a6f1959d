"""pi0 learns: the loss in a train step, and its gradient beside finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastdrive_jax.inference.pi0 import flow_loss
from fastdrive_jax.models.pi0.config import TINY_PI0, Pi0Config
from fastdrive_jax.models.pi0.model import Pi0
from fastdrive_jax.models.pi0.weights import abstract_params
from fastdrive_jax.pruning import make_pruner
from fastdrive_jax.training.state import init_train_state, make_train_step

PREFIX = dataclasses.replace(
    TINY_PI0.prefix,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    vocab_size=16,
    mrope_section=(4, 0, 0),
    head_size=8,
)
CONFIG = Pi0Config(
    dataclasses.replace(
        TINY_PI0.vision, depth=1, hidden_size=12, intermediate_size=16, num_heads=2, image_size=16
    ),
    PREFIX,
    PREFIX,
    views=2,
    action_dim=2,
    horizon=3,
)
RATE, BATCH = 0.05, 4
# Half of the visual tokens leave on entering the second layer.
LOSS = functools.partial(flow_loss, Pi0(CONFIG), pruner=make_pruner("fastv"), keep_ratio=0.5)
STEP = jax.jit(make_train_step(LOSS, optax.sgd(RATE)))


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        mean = float(path[-1].key == "scale")
        return jnp.asarray(rng.normal(mean, 0.3 * (1 - mean), leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, abstract_params(CONFIG))
    return init_train_state(lambda key: params, optax.sgd(RATE), seed=0)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "images": jnp.asarray(rng.integers(0, 256, (BATCH, 2, 16, 16, 3), np.uint8)),
        "ids": jnp.asarray(rng.integers(0, 16, (BATCH, 3))),
        "lengths": jnp.asarray([3, 1, 2, 3]),
        "state": jnp.asarray(rng.normal(size=(BATCH, 2)), jnp.float32),
        "actions": jnp.asarray(rng.normal(size=(BATCH, 3, 2)), jnp.float32),
    }


def test_the_gradient_is_that_of_the_loss(start, batch):
    after, metrics = STEP(start, batch)
    params, after = jax.tree.map(np.asarray, (start.params, after.params))
    grads = jax.tree.map(lambda old, new: (old - new) / RATE, params, after)
    for part, own in grads.items():
        norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(own)))
        np.testing.assert_allclose(metrics[f"grad_norm/{part}"], norm, rtol=1e-2)
        assert norm > 1e-3

        def moved(size, part=part, own=own, norm=norm):
            far = np.float32(size / norm)
            step = jax.tree.map(lambda p, g: jnp.asarray(p + far * g), params[part], own)
            state = start.replace(params=start.params | {part: step})
            return float(STEP(state, batch)[1]["loss"])

        size = min(0.05, 0.02 / norm)
        slope = (moved(size) - moved(-size)) / (2 * size)
        np.testing.assert_allclose(slope, norm, rtol=0.02, err_msg=part)
    # The prefix's last norm leads nowhere.
    assert not grads["language_model"]["norm"]["scale"].any()


def test_steps_lower_the_loss(start, batch):
    state, losses = start, []
    for _ in range(60):
        state, metrics = STEP(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])
    assert STEP._cache_size() == 1
