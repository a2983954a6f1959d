"""An exponential moving average of params, by which a run may be measured and exported."""

from typing import Any

import jax
import jax.numpy as jnp

from fastdrive_jax.errors import UserError

Params = Any


def check_decay(decay: float) -> None:
    """Refuse what is no decay.

    Raises:
        UserError: it is not in (0, 1).
    """
    if not 0 < decay < 1:
        raise UserError(f"ema_decay must be between 0 and 1, such as 0.999, not {decay}.")


def start_average(params: Params) -> Params:
    """An average that begins at the params, in float32: bfloat16 would swallow small increments."""

    def copy(leaf: jax.Array) -> jax.Array:
        # One buffer under two names couldn't be donated to the step.
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True)

    return jax.tree.map(copy, params)


def warmed_decay(step: jax.Array, decay: float) -> jax.Array:
    """The decay at an update, which rises from 0.1 to `decay`.

    So the random params of the beginning are forgotten as fast as training leaves them behind, and
    nothing has to be divided out afterwards.

    Args:
        step: number of updates made before this one.
        decay: reached in the end.
    """
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def update_average(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """The average after an update.

    Args:
        ema: before it.
        params: after it.
        step: number of updates made before it.
        decay: share of the old average that stays, after the warm-up.
    """
    share = 1 - warmed_decay(step, decay)
    return jax.tree.map(lambda old, new: old + share * (new.astype(old.dtype) - old), ema, params)
