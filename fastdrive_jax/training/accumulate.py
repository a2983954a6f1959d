"""Gradients of a batch that is too large for the devices, one part after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from optax.microbatching import reshape_batch_axis

from fastdrive_jax.errors import UserError


def accumulated_grads(loss_fn: Callable[..., tuple[jax.Array, dict]], parts: int) -> Callable:
    """What `jax.value_and_grad(loss_fn, has_aux=True)` gives, as the mean over parts of the batch.

    For a loss that is a mean over the batch this is the loss, and the gradient, of the whole batch.

    Args:
        loss_fn: `(params, batch, key, *frozen) -> (scalar loss, metrics)`; each part gets a key of
            its own.
        parts: how many; they are computed one after the other within one program.

    Returns:
        `(params, batch, key, *frozen) -> ((loss, metrics), grads)`. When traced it raises a
        `UserError` if the batch does not divide.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def run(params: Any, batch: Any, key: jax.Array, *frozen: Any) -> tuple[tuple, Any]:
        size = _part_size(batch, parts)
        # Each part takes every n-th sample, so that samples stay on the devices where they are.
        pieces = reshape_batch_axis(batch, size)

        def add(total, piece):
            number, part = piece
            out, grads = value_and_grad(params, part, jax.random.fold_in(key, number), *frozen)
            return jax.tree.map(lambda old, new: old + new.astype(old.dtype), total, grads), out

        total, outs = jax.lax.scan(add, _zeros(params), (jnp.arange(parts), pieces))
        grads = jax.tree.map(lambda leaf, like: (leaf / parts).astype(like.dtype), total, params)
        return jax.tree.map(lambda leaf: leaf.mean(axis=0), outs), grads

    return run


def _zeros(params: Any) -> Any:
    """Where gradients are summed: in float32 at least, since rounding errors would add up too."""
    return jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), params
    )


def _part_size(batch: Any, parts: int) -> int:
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        raise UserError(
            f"A batch whose arrays have the leading sizes {sorted(map(str, sizes))} can't be "
            "divided for accumulation: all must have the batch size, or use accumulate=1."
        )
    (size,) = sizes
    if size % parts:
        raise UserError(
            f"A batch of {size} does not divide into accumulate={parts} equal parts: choose a "
            f"batch size that is a multiple of {parts}."
        )
    return size // parts
