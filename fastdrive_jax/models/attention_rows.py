"""The attention weights that pruners read, computed beside the fused kernel, never N x N of them.

A row is one query's weights over all keys: R rows cost O(R d S), a few of them next to nothing.
What every token receives needs all rows; they are made in blocks and added up as they come. So is
the attention of rows that see keys no kernel's mask describes.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_NOTHING = -1e30  # score of a key that is out of sight; finite, so that no row divides 0 by 0
_BLOCK_BYTES = 1 << 24  # most of a block of rows


def attention_rows(
    query: Float[Array, "B R Q d"],
    key: Float[Array, "B S G d"],
    seen: Int[Array, "B R"] | None = None,
) -> Float[Array, "B Q R S"]:
    """Attention weights of a few rows, float32.

    Args:
        query: Those rows' queries.
        key: All keys.
        seen: How many keys each row sees, from the first; None means all. For a causal model that
            is the row's place plus 1. A row needs one key.
    """
    batch, rows, heads, size = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, rows, groups, heads // groups, size)
    scores = jnp.einsum(
        "brgqd,bsgd->bgqrs", query, key, preferred_element_type=jnp.float32
    ) / math.sqrt(size)
    if seen is not None:
        in_sight = jnp.arange(key.shape[1]) < seen[:, None, None, :, None]
        scores = jnp.where(in_sight, scores, _NOTHING)
    return jax.nn.softmax(scores, axis=-1).reshape(batch, heads, rows, -1)


def attend_rows(
    query: Float[Array, "B R Q d"],
    key: Float[Array, "B S G d"],
    value: Float[Array, "B S G d"],
    seen: Int[Array, "B R"],
) -> Float[Array, "B R Q d"]:
    """Softmax attention of rows that stand anywhere in the sequence, a block of them at a time.

    Args:
        query: Those rows' queries.
        key: All keys.
        value: All values.
        seen: How many keys each row sees, see `attention_rows`.
    """
    batch, _, heads, size = query.shape
    groups = key.shape[2]

    def one(row):
        query, seen = row
        weights = attention_rows(query[:, None], key, seen[:, None])
        weights = weights.reshape(batch, groups, heads // groups, -1).astype(value.dtype)
        mixed = jnp.einsum("bgqs,bsgd->bgqd", weights, value, preferred_element_type=jnp.float32)
        return mixed.reshape(batch, heads, size).astype(value.dtype)

    most = max(8, _BLOCK_BYTES // (4 * batch * heads * key.shape[1]))
    mixed = jax.lax.map(one, (jnp.moveaxis(query, 1, 0), seen.T), batch_size=most)
    return jnp.moveaxis(mixed, 0, 1)


def attention_received(
    query: Float[Array, "B N Q d"],
    key: Float[Array, "B N G d"],
    lengths: Int[Array, " B"] | None = None,
    causal: bool = False,
    every: int = 1,
    rows: Int[Array, " B"] | None = None,
) -> Float[Array, "B N"]:
    """Attention that each token receives, mean over heads and over rows.

    Args:
        query: [B, N, Q, d].
        key: [B, N, G, d].
        lengths: Real tokens of each sample; None means all.
        causal: Whether row i sees keys 0 to i only.
        every: Rows 0, `every`, 2 `every` and so on stand for all; 1 takes all.
        rows: How many rows of each sample count, from the first; None: those of real tokens.
    """
    batch, count, heads, _ = query.shape
    lengths = jnp.full(batch, count) if lengths is None else lengths
    counted = lengths if rows is None else rows
    query = query[:, ::every]
    most = max(8, _BLOCK_BYTES // (4 * batch * heads * count))
    blocks = math.ceil(query.shape[1] / most)
    size = math.ceil(query.shape[1] / blocks)
    query = jnp.pad(query, ((0, 0), (0, blocks * size - query.shape[1]), (0, 0), (0, 0)))

    def add(total, start):
        place = every * (start + jnp.arange(size))
        real = place < counted[:, None]
        seen = jnp.minimum(place + 1, lengths[:, None]) if causal else lengths[:, None]
        part = jax.lax.dynamic_slice_in_dim(query, start, size, axis=1)
        weights = attention_rows(part, key, jnp.broadcast_to(seen, (batch, size)))
        return total + jnp.einsum("bqrs,br->bs", weights, real.astype(jnp.float32)), None

    total = jnp.zeros((batch, count), jnp.float32)
    if blocks == 1:
        total, _ = add(total, 0)
    else:
        total, _ = jax.lax.scan(add, total, size * jnp.arange(blocks))
    number = (counted + every - 1) // every
    return total / (heads * number[:, None])
