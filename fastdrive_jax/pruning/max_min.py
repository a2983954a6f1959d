"""Greedy max-min selection (farthest-point sampling) over cosine distance, in few steps.

`j_t = argmax_j min_{i in S} d(i, j)`, `d(i, j) = 1 - cos(v_i, v_j)`, ties to the lower index: the
greedy solution of the max-min diversity and k-centre problems (Gonzalez 1985). The smallest
distance to what is chosen is carried along. All is in float32.

One token a step is K steps, each a few tiny kernels, which an accelerator waits for: so a round
chooses all tokens that the greedy order is already sure of. Of 3,249 tokens 812 take 50 to 70
rounds, of pictures as of random ones. The choice is that of one token a step, to the bit, because
both read the same distances: that is what the N x N array is held for.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

LOWEST = float(jnp.finfo(jnp.float32).min)  # of padding: above chosen tokens, below real ones
_WIDTH = 32  # candidates of a round; more make fewer rounds, but not by much, and longer ones


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
    """The real token whose nearest other real token is farthest; those that are no number aside."""
    valid = valid & ~jnp.isnan(jnp.diagonal(distances))
    others = valid[None] & ~jnp.eye(len(valid), dtype=bool)
    nearest = jnp.min(jnp.where(others, distances, jnp.inf), axis=1)
    return jnp.argmax(jnp.where(valid, nearest, LOWEST))


def farthest_first(
    distances: Float[Array, "N N"], start: Int[Array, ""], k: int, valid: Bool[Array, " N"]
) -> Int[Array, " K"]:
    """Tokens of one sample in the order in which they are chosen; `jax.vmap` for a batch.

    The first tokens of a longer order are the shorter order.

    A round takes the farthest tokens as candidates, in greedy order; choosing one may bring later
    ones nearer. Those that no earlier candidate brings nearer keep their values, and are chosen now
    as long as they are ahead of what was brought nearer. Tokens that are no candidates are behind
    in any case, since nothing ever moves away.

    Args:
        distances: From each token (row) to all; one that is no number counts as 0.
        start: The first token; methods differ in it.
        k: K, static.
        valid: False for padding, which comes after every real token.

    Raises:
        ValueError: K is not in 1..N.
    """
    count = len(valid)
    if not 1 <= k <= count:
        raise ValueError(f"k must be in 1..{count}, got {k}")
    width = min(_WIDTH, count)
    # What is no number compares as false with everything, so that no round would take it.
    distances = jnp.where(jnp.isnan(distances), 0, distances)
    earlier = jnp.triu(jnp.ones((width, width), bool), 1)

    def choose_more(carry):
        nearest, order, chosen = carry
        value, pick = jax.lax.top_k(nearest, width)
        rows = distances[pick]
        between = jnp.where(earlier, rows[:, pick], jnp.inf)
        moved = jnp.any(between < value, axis=0)
        # What a moved candidate is at most by then: one moved by moved ones alone may yet stay.
        later = jnp.min(jnp.where(moved[:, None], jnp.inf, between), axis=0)
        bar = jax.lax.cummax(jnp.where(moved, jnp.minimum(later, value), -jnp.inf))
        take = ~moved & (value > bar)  # never a token chosen before, of value -inf
        nearest = jnp.minimum(nearest, jnp.min(jnp.where(take[:, None], rows, jnp.inf), axis=0))
        nearest = nearest.at[pick].min(jnp.where(take, -jnp.inf, jnp.inf))
        place = chosen + jnp.cumsum(take) - 1
        # Places from K on are out of bounds, and so dropped.
        order = order.at[jnp.where(take, place, k)].set(pick, mode="drop")
        return nearest, order, place[-1] + 1

    nearest = jnp.minimum(jnp.where(valid, jnp.inf, LOWEST), distances[start])
    first = nearest.at[start].set(-jnp.inf), jnp.zeros(k, jnp.int32).at[0].set(start), jnp.int32(1)
    return jax.lax.while_loop(lambda carry: carry[-1] < k, choose_more, first)[1]
