"""Attention on TPU: JAX's splash kernel (Pallas), which takes whole blocks and real keys only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LANES = 128  # head sizes and blocks are multiples of it
_BLOCK = 512


def splash_attention(
    query: Float[Array, "B N Q d"],
    key: Float[Array, "B S G d"],
    value: Float[Array, "B S G d"],
    *,
    causal: bool = False,
    lengths: Int[Array, " B"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B N Q d"]:
    """See `attention.attention`; sequences and heads are filled up to what the kernel takes.

    Args:
        query: [B, N, Q, d].
        key: [B, S, G, d].
        value: [B, S, G, d].
        causal: Whether query i sees keys 0 to i only.
        lengths: Real keys of each sample.
        interpret: Run the kernel as plain JAX, on any device.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    batch, count, heads, size = query.shape
    keys = key.shape[1]

    def blocks(length):
        block = min(_BLOCK, -(-length // _LANES) * _LANES)
        return block, -(-length // block) * block

    (query_block, rows), (key_block, columns) = blocks(count), blocks(keys)
    if causal:  # one square mask
        key_block, columns = query_block, rows
    width = -(-size // _LANES) * _LANES

    def fill(x, length):
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - size)))
        return x.transpose(0, 2, 1, 3)

    seen = masks.CausalMask((rows, columns)) if causal else masks.FullMask((rows, columns))
    attend = kernels.make_splash_mha(
        masks.MultiHeadMask([seen] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            block_q_dq=query_block,
            block_kv_dq=key_block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    ends = jnp.full(batch, keys) if lengths is None else lengths
    real = (jnp.arange(columns) < ends[:, None]).astype(jnp.int32)
    segments = kernels.SegmentIds(q=jnp.ones((batch, rows), jnp.int32), kv=real)
    scaled = fill(query * jnp.asarray(size**-0.5, query.dtype), rows)
    out = jax.vmap(attend)(scaled, fill(key, columns), fill(value, columns), segments)
    return out.transpose(0, 2, 1, 3)[:, :count, :, :size]
