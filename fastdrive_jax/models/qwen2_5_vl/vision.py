"""The Qwen2.5-VL vision encoder: window attention, 2-D rotary embedding, 2 x 2 patch merger."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from fastdrive_jax.models.attention import attention
from fastdrive_jax.models.layers import RMSNorm, SwiGLU, rotate
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.models.qwen2_5_vl.patches import (
    patch_grid,
    patchify,
    rotary_table,
    window_table,
)


class VisionAttention(nn.Module):
    """Attention within windows, or over the whole picture.

    Attributes:
        config: Sizes.
        full: Whether every patch sees every other.
    """

    config: VisionConfig
    full: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"], grid: tuple[int, int]) -> Float[Array, "B P D"]:
        """Attends over patches x [B, P, D] of a (rows, columns) grid.

        Windows are gathered to [windows, S]: scores cost P * S, not P * P.
        """
        config = self.config
        batch, count, width = x.shape
        size = width // config.num_heads
        qkv = nn.Dense(3 * width, name="qkv")(x).reshape(batch, count, 3, config.num_heads, size)
        cos, sin = rotary_table(*grid, config)
        query, key, value = (
            rotate(qkv[:, :, 0], cos, sin),
            rotate(qkv[:, :, 1], cos, sin),
            qkv[:, :, 2],
        )
        if self.full:
            out = attention(query, key, value)
        else:
            members, slots = window_table(*grid, config)
            windows, slot_count = members.shape

            def gather(y):
                y = jnp.take(y, members.ravel(), axis=1, mode="fill", fill_value=0)
                return y.reshape(batch * windows, slot_count, config.num_heads, size)

            real = jnp.asarray(members < count)[:, None, None, :]
            mask = jnp.broadcast_to(real, (batch, *real.shape)).reshape(-1, 1, 1, slot_count)
            out = jax.nn.dot_product_attention(*map(gather, (query, key, value)), mask=mask)
            out = out.reshape(batch, windows * slot_count, config.num_heads, size)
            out = jnp.take(out, slots, axis=1)
        return nn.Dense(width, name="proj")(out.reshape(batch, count, width))


class VisionBlock(nn.Module):
    """Pre-norm attention and gated feed-forward.

    Attributes:
        config: Sizes.
        full: See `VisionAttention`.
    """

    config: VisionConfig
    full: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"], grid: tuple[int, int]) -> Float[Array, "B P D"]:
        """Maps patches [B, P, D] to the same shape."""
        config = self.config
        y = RMSNorm(name="norm1")(x)
        x = x + VisionAttention(config, self.full, name="attn")(y, grid)
        y = RMSNorm(name="norm2")(x)
        return x + SwiGLU(config.intermediate_size, use_bias=True, name="mlp")(y)


class PatchMerger(nn.Module):
    """Four neighbouring patches to one visual token.

    Attributes:
        config: Sizes.
    """

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B P W"]) -> Float[Array, "B N D"]:
        """Maps patches [B, P, W] in merge-block order to tokens [B, P / 4, D] in raster order."""
        config = self.config
        block = config.spatial_merge_size**2
        x = RMSNorm(name="ln_q")(x)
        x = x.reshape(x.shape[0], x.shape[1] // block, block * x.shape[2])
        x = nn.gelu(nn.Dense(x.shape[-1], name="mlp_0")(x), approximate=False)
        return nn.Dense(config.out_hidden_size, name="mlp_2")(x)


class VisionEncoder(nn.Module):
    """Pictures to visual tokens.

    Attributes:
        config: Sizes.
    """

    config: VisionConfig

    @nn.compact
    def __call__(self, images: Shaped[Array, "B H W 3"]) -> Float[Array, "B N D"]:
        """Visual tokens [B, N, D] in raster order of uint8 pictures [B, H, W, 3].

        Raises:
            UserError: The picture is not made of whole tokens.
        """
        config = self.config
        grid = patch_grid(*images.shape[1:3], config)
        patches = patchify(images, config)
        x = nn.Dense(config.hidden_size, use_bias=False, name="patch_embed")(patches)
        for number in range(config.depth):
            full = number in config.fullatt_block_indexes
            x = VisionBlock(config, full, name=f"blocks_{number}")(x, grid)
        return PatchMerger(config, name="merger")(x)
