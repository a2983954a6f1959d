from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.models.trajectory_tokens import DrivingVocabulary
from fastdrive_jax.training.driving import (
    DrivingLossConfig,
    driving_loss,
    init_driving,
    plan_targets,
)

VOCABULARY = DrivingVocabulary()
LOSS = DrivingLossConfig(classes=3, place_layer=0)


def batch_of(config, batch: int = 2) -> dict:
    rng = np.random.default_rng(0)
    cameras, (height, width) = len(config.cameras), config.image_size
    future = np.cumsum(rng.uniform(0, 2, (batch, config.vocabulary.steps, 2)), axis=1)
    return {
        "image": rng.integers(0, 256, (batch, cameras, height, width, 3), np.uint8),
        "labels": rng.integers(0, 3, (batch, cameras, height, width)).astype(np.uint8),
        "speed": np.array([1.0, 6.0], np.float32),
        "command": np.array([0, 2], np.int32),
        "future": future.astype(np.float32),
    }


@pytest.mark.parametrize("blur", [0.0, 1.0, 3.0])
def test_targets_are_distributions_around_the_true_bin(blur):
    bins = np.array([[0, 64, 127]])
    targets = np.asarray(plan_targets(VOCABULARY, VOCABULARY.first_displacement + bins, blur))
    assert targets.shape == (1, 3, VOCABULARY.displacement_bins)
    np.testing.assert_allclose(targets.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(targets.argmax(axis=-1), bins)
    np.testing.assert_allclose(targets[0, 1, 63], targets[0, 1, 65], rtol=1e-5)
    ratio = np.exp(-0.5 / blur**2) if blur else 0.0
    np.testing.assert_allclose(targets[0, 1, 65] / targets[0, 1, 64], ratio, rtol=1e-4)


@pytest.fixture(scope="module")
def setting(one_camera):
    config, _ = one_camera
    model = DrivingVLA(config)
    params = jax.jit(partial(init_driving, model, LOSS))(jax.random.key(0))
    return model, params, batch_of(config)


def test_every_part_of_the_loss_falls_on_one_batch(setting):
    model, params, batch = setting
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            return driving_loss(model, LOSS, params, batch, jax.random.key(1))

        (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics | {"total": total}, grads

    state, seen = optimizer.init(params), []
    for _ in range(30):
        params, state, metrics, grads = step(params, state)
        seen.append({name: float(value) for name, value in metrics.items()})
    parts = ("plan_loss", "place_loss", "class_loss")
    for name in (*parts, "total"):
        assert seen[-1][name] < 0.97 * seen[0][name], name
    np.testing.assert_allclose(seen[0]["total"], sum(seen[0][name] for name in parts), rtol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["class_head"]))


@pytest.mark.parametrize("hidden", [True, False])
def test_hidden_plans_are_out_of_the_decoders_sight(setting, hidden):
    """If no logit sees the plan, swapping the ends of two plans leaves the sum of their losses."""
    model, params, batch = setting
    loss = DrivingLossConfig(3, place_layer=0, hidden_plan=float(hidden))

    @jax.jit
    def plan_loss(moves):
        future = jnp.cumsum(moves, axis=1)
        everything = batch | {"future": future}
        return driving_loss(model, loss, params, everything, jax.random.key(0))[1]["plan_loss"]

    bins = np.random.default_rng(1).integers(-40, 70, (2, 2, VOCABULARY.steps, 2))
    one, other = 0.1 * bins
    swapped = [
        np.concatenate([a[:, :3], b[:, 3:]], axis=1) for a, b in ((one, other), (other, one))
    ]
    difference = plan_loss(one) + plan_loss(other) - sum(map(plan_loss, swapped))
    assert (abs(difference) < 1e-5) == hidden


def test_a_class_weight_of_zero_leaves_the_class_loss_out(setting):
    model, params, batch = setting
    loss = DrivingLossConfig(3, class_weight=0.0, place_weight=0.5, place_layer=0)
    total, parts = jax.jit(partial(driving_loss, model, loss))(params, batch, jax.random.key(0))
    want = parts["plan_loss"] + 0.5 * parts["place_loss"]
    np.testing.assert_allclose(total, want, rtol=1e-6)
    assert jnp.isfinite(parts["class_loss"])
