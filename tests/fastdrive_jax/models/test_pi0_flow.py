"""Flow matching by itself: closed forms, and what the loss draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.models.pi0.expert import time_embedding
from fastdrive_jax.models.pi0.flow import euler, matching_loss

SHAPE = (3, 4, 2)


def drawn(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_a_straight_flow_is_followed_to_its_end(steps):
    noise, actions = drawn(0), drawn(1)
    found, _ = euler(lambda x, time: (noise - actions, None), noise, steps)
    np.testing.assert_allclose(found, actions, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_a_linear_field_shrinks_by_the_same_factor_each_step(steps):
    noise = drawn(0)
    found, _ = euler(lambda x, time: (0.8 * x, None), noise, steps)
    np.testing.assert_allclose(found, (1 - 0.8 / steps) ** steps * noise, rtol=1e-5)


def test_time_runs_from_one_to_just_above_zero():
    """With v = t the end is the mean of the times; what else a field says is averaged as well."""
    steps = 5
    found, seen = euler(lambda x, time: (jnp.full_like(x, time), time), jnp.zeros(SHAPE), steps)
    times = 1 - np.arange(steps) / steps
    np.testing.assert_allclose(found, -times.mean() * np.ones(SHAPE), rtol=1e-6)
    np.testing.assert_allclose(seen, times.mean(), rtol=1e-6)


def test_the_true_field_has_no_loss():
    """Where all samples share their actions, x_t - a = t (n - a)."""
    actions = jnp.broadcast_to(drawn(1, SHAPE[1:]), SHAPE)
    loss = matching_loss(
        lambda x, time: (x - actions) / time[:, None, None], actions, jax.random.key(0)
    )
    assert loss < 1e-9
    off = matching_loss(
        lambda x, time: (x - actions) / time[:, None, None] + 0.5, actions, jax.random.key(0)
    )
    np.testing.assert_allclose(off, 0.25, rtol=1e-4)


def test_times_lean_to_noise_and_points_lie_between():
    """Beta(1.5, 1) has the density 1.5 sqrt(s): mean 0.6, variance 12 / 175."""
    seen = {}

    def field(x, time):
        seen.update(x=np.asarray(x), time=np.asarray(time))
        return x

    count = 20_000
    actions = jnp.full((count, 1, 2), 3.0)
    matching_loss(field, actions, jax.random.key(3))
    time = seen["time"]
    assert time.min() > 0.001
    assert time.max() <= 1
    drawn_times = (time - 0.001) / 0.999
    np.testing.assert_allclose(drawn_times.mean(), 0.6, atol=0.01)
    np.testing.assert_allclose(drawn_times.var(), 12 / 175, atol=0.003)
    noise = (seen["x"][:, 0] - (1 - time[:, None]) * 3) / time[:, None]
    late = noise[time > 0.3]
    np.testing.assert_allclose(late.mean(), 0, atol=0.03)
    np.testing.assert_allclose(late.std(), 1, atol=0.03)


def test_the_time_embedding_turns_once_in_each_period():
    times = jnp.asarray([0.0, 0.004, 0.25, 1.0])
    found = time_embedding(times, 6)
    periods = np.array([0.004, np.sqrt(0.004 * 4), 4])
    angles = 2 * np.pi * np.asarray(times)[:, None] / periods
    np.testing.assert_allclose(
        found, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=2e-4
    )
