"""Flow matching: what pi0's action expert learns, and how noise becomes actions.

With noise n and actions a, x_t = t n + (1 - t) a. A velocity v(x_t, t) learns n - a, and Euler
steps from t = 1 to 0 turn noise into actions. The paper counts time the other way round, its
released code as here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Actions = Float[Array, "B H A"]

_EARLIEST = 0.001  # flow time that training draws
_ALPHA, _BETA = 1.5, 1.0  # of its distribution, which leans to noise


def euler(
    velocity: Callable[[Actions, Float[Array, ""]], tuple[Actions, Any]],
    noise: Actions,
    steps: int,
) -> tuple[Actions, Any]:
    """Where a velocity leads, in equal steps, from noise at time 1 to time 0.

    Args:
        velocity: (x, time) to the velocity there and anything else.
        noise: The x at time 1.
        steps: Number of steps; static.

    Returns:
        The x at time 0, and the mean over steps of anything else.
    """

    def step(x, number):
        found, other = velocity(x, (steps - number) / steps)
        return x - found / steps, other

    x, others = jax.lax.scan(step, noise, jnp.arange(steps))
    return x, jax.tree.map(lambda other: other.mean(axis=0), others)


def matching_loss(
    velocity: Callable[[Actions, Float[Array, " B"]], Actions],
    actions: Actions,
    key: jax.Array,
) -> Float[Array, ""]:
    """Mean squared error of a velocity at points between noise and actions.

    Args:
        velocity: (x_t, t) to the velocity there.
        actions: Of the data.
        key: Draws noise, and a time of each sample from Beta(1.5, 1) scaled to (0.001, 1).
    """
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, actions.shape)
    drawn = jax.random.beta(time_key, _ALPHA, _BETA, actions.shape[:1])
    time = _EARLIEST + (1 - _EARLIEST) * drawn
    t = time[:, None, None]
    found = velocity(t * noise + (1 - t) * actions, time)
    return jnp.mean(jnp.square(found - (noise - actions)))
