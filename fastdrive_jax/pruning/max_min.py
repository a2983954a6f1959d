"""Greedy max-min selection (farthest-point sampling) over cosine distance, one token a step.

`j_t = argmax_j min_{i in S} d(i, j)`, `d(i, j) = 1 - cos(v_i, v_j)`, ties to the lower index: the
greedy solution of the max-min diversity and k-centre problems (Gonzalez 1985). The smallest
distance to what is chosen is carried along, so that a step asks only for the distances of the
newest token: O(N D) each, and no N x N array unless the caller holds one. All is in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

LOWEST = float(jnp.finfo(jnp.float32).min)  # of padding: above chosen tokens, below real ones


def unit_tokens(
    tokens: Num[Array, "*batch N D"], valid: Bool[Array, "*batch N"]
) -> Float[Array, "*batch N D"]:
    """Tokens at length 1 in float32; zeros, and so padding, stay at distance 1 from all."""
    tokens = jnp.where(valid[..., None], tokens.astype(jnp.float32), 0)
    length = jnp.sqrt(jnp.sum(jnp.square(tokens), axis=-1, keepdims=True))
    return tokens / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)


def cosines(units: Float[Array, "N D"], token: Int[Array, ""]) -> Float[Array, " N"]:
    """Cosine of one token to all."""
    # Full precision: at the default, GPUs round products to TF32, and near ties would turn over.
    return jnp.dot(units, units[token], precision=jax.lax.Precision.HIGHEST)


def pairwise_cosines(units: Float[Array, "N D"]) -> Float[Array, "N N"]:
    """Cosine of every pair; 42 MB for 3,249 tokens."""
    return jnp.dot(units, units.T, precision=jax.lax.Precision.HIGHEST)


def pairwise_distances(units: Float[Array, "N D"]) -> Float[Array, "N N"]:
    """Cosine distance of every pair."""
    return 1 - pairwise_cosines(units)


def most_isolated(distances: Float[Array, "N N"], valid: Bool[Array, " N"]) -> Int[Array, ""]:
    """The real token whose nearest other real token is farthest."""
    others = valid[None] & ~jnp.eye(len(valid), dtype=bool)
    nearest = jnp.min(jnp.where(others, distances, jnp.inf), axis=1)
    return jnp.argmax(jnp.where(valid, nearest, LOWEST))


def farthest_first(
    distances: Callable[[Int[Array, ""]], Float[Array, " N"]],
    start: Int[Array, ""],
    k: int,
    valid: Bool[Array, " N"],
) -> Int[Array, " K"]:
    """Tokens of one sample in the order in which they are chosen; `jax.vmap` for a batch.

    The first tokens of a longer order are the shorter order.

    Args:
        distances: From one token to all.
        start: The first token; methods differ in it.
        k: K, static.
        valid: False for padding, which comes after every real token.

    Raises:
        ValueError: K is not in 1..N.
    """
    if not 1 <= k <= len(valid):
        raise ValueError(f"k must be in 1..{len(valid)}, got {k}")

    def step(t, carry):
        nearest, order = carry
        pick = jnp.where(t == 0, start, jnp.argmax(nearest)).astype(jnp.int32)
        nearest = jnp.minimum(nearest, distances(pick))
        return nearest.at[pick].set(-jnp.inf), order.at[t].set(pick)

    nearest = jnp.where(valid, jnp.inf, LOWEST)
    return jax.lax.fori_loop(0, k, step, (nearest, jnp.zeros(k, jnp.int32)))[1]
