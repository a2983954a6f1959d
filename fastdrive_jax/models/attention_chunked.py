"""Attention on a GPU that has no fused kernel for it: all heads at once, some query rows at a time.

A loop over heads, as on a CPU, would launch thousands of small kernels one after the other.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_CHUNK_BYTES = 1 << 27  # most of the float32 scores of a chunk of rows
_CAUSAL_PARTS = 8  # a part of the queries meets no key behind its last one


def chunked_attention(
    query: Float[Array, "B N Q d"],
    key: Float[Array, "B S G d"],
    value: Float[Array, "B S G d"],
    *,
    causal: bool = False,
    lengths: Int[Array, " B"] | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
) -> Float[Array, "B N Q d"]:
    """See `attention.attention`; the backward pass computes the weights of a chunk again.

    Args:
        query: [B, N, Q, d].
        key: [B, S, G, d].
        value: [B, S, G, d].
        causal: Whether query i sees keys 0 to i only.
        lengths: Real keys of each sample.
        chunk_bytes: Bound on the scores that are held.
    """
    batch, count, heads, _ = query.shape

    def rows_of(keys: int) -> int:
        return max(1, chunk_bytes // (4 * batch * heads * keys))

    def part(start: int, stop: int, keys: int):
        """Rows `start` to `stop` over the first `keys` keys."""

        @jax.checkpoint
        def attend(rows, first):
            column = jnp.arange(keys)
            row = first + jnp.arange(rows.shape[1])
            return jax.nn.dot_product_attention(
                rows,
                key[:, :keys],
                value[:, :keys],
                mask=(column <= row[:, None])[None, None] if causal else None,
                key_value_seq_lengths=lengths,
                implementation="xla",
            )

        rows = query[:, start:stop]
        chunks = math.ceil((stop - start) / rows_of(keys))
        if chunks == 1:
            return attend(rows, start)
        size = math.ceil((stop - start) / chunks)
        rows = jnp.pad(rows, ((0, 0), (0, chunks * size - (stop - start)), (0, 0), (0, 0)))
        rows = rows.reshape(batch, chunks, size, *rows.shape[2:]).swapaxes(0, 1)
        firsts = start + size * jnp.arange(chunks)
        out = jax.lax.map(lambda chunk: attend(*chunk), (rows, firsts))
        return out.swapaxes(0, 1).reshape(batch, chunks * size, *out.shape[3:])[:, : stop - start]

    parts = min(_CAUSAL_PARTS, math.ceil(count / rows_of(key.shape[1]))) if causal else 1
    step = math.ceil(count / parts)
    ends = [(start, min(start + step, count)) for start in range(0, count, step)]
    found = [part(start, stop, stop if causal else key.shape[1]) for start, stop in ends]
    return jnp.concatenate(found, axis=1) if len(found) > 1 else found[0]
