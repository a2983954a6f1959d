"""The Qwen2.5-VL vision encoder: window attention, 2-D rotary embedding, 2 x 2 patch merger."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from fastdrive_jax.models.attention import attention, attention_kernel
from fastdrive_jax.models.layers import RMSNorm, SwiGLU, rotate
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.models.qwen2_5_vl.patches import (
    PictureLayout,
    normalise,
    ordered_layout,
    patch_grid,
    patch_rows,
    rotary_angles,
)
from fastdrive_jax.parallel.rules import constrain

_FUSED_FROM = 64  # patches of a window from which a fused kernel pays


class VisionAttention(nn.Module):
    """Attention within windows, or over the whole picture.

    Attributes:
        config: Sizes.
        full: Whether every patch sees every other.
    """

    config: VisionConfig
    full: bool

    @nn.compact
    def __call__(self, x: Float[Array, "M P D"], layout: PictureLayout) -> Float[Array, "M P D"]:
        """Attends over the patches x [M, P, D] of each picture.

        Windows are sliced or gathered to [windows, S]: scores cost P * S, not P * P.
        """
        config = self.config
        pictures, count, width = x.shape
        size = width // config.num_heads
        qkv = nn.Dense(3 * width, name="qkv")(x)
        qkv = qkv.reshape(pictures, count, 3, config.num_heads, size)
        cos, sin = rotary_angles(layout.position, config)
        query, key, value = (
            rotate(qkv[:, :, 0], cos, sin),
            rotate(qkv[:, :, 1], cos, sin),
            qkv[:, :, 2],
        )
        if self.full:
            # What pruners score tokens by; kept only if a caller asks for it.
            self.sow("intermediates", "query", query)
            self.sow("intermediates", "key", key)
            lengths = layout.count
            if lengths is not None:
                lengths = jnp.broadcast_to(lengths, (pictures,))
            out = attention(query, key, value, lengths=lengths)
        elif layout.groups:
            out = _within_slices(query, key, value, layout.groups)
        else:
            windows, slots = layout.members.shape[1:]

            def gather(y):
                y = _take(y, layout.members.reshape(len(layout.members), -1))
                return y.reshape(pictures * windows, slots, config.num_heads, size)

            real = jnp.asarray(layout.members < count)[:, :, None, None]
            mask = jnp.broadcast_to(real, (pictures, windows, 1, 1, slots))
            mask = mask.reshape(-1, 1, 1, slots)
            out = jax.nn.dot_product_attention(*map(gather, (query, key, value)), mask=mask)
            out = out.reshape(pictures, windows * slots, config.num_heads, size)
            out = _take(out, layout.slots)
        return nn.Dense(width, name="proj")(out.reshape(pictures, count, width))


def _within_slices(query, key, value, groups):
    """Attention within windows that follow each other, see `PictureLayout.groups`."""
    pictures, _, heads, size = query.shape
    found, start = [], 0
    for windows, slots in groups:
        stop = start + windows * slots
        part = (
            x[:, start:stop].reshape(pictures * windows, slots, heads, size)
            for x in (query, key, value)
        )
        fused = attention_kernel(query.dtype, size) == "cudnn" and slots >= _FUSED_FROM
        out = attention(*part, kernel="cudnn" if fused else "xla")
        found.append(out.reshape(pictures, windows * slots, heads, size))
        start = stop
    return jnp.concatenate(found, axis=1)


def _take(x, index):
    """Rows `index` [M, n] of x [M, P, ...], or [1, n] of all pictures; zeros past the last row."""
    take = functools.partial(jnp.take, mode="fill", fill_value=0)
    if len(index) == 1:
        return take(x, index[0], axis=1)
    return jax.vmap(functools.partial(take, axis=0))(x, index)


class VisionBlock(nn.Module):
    """Pre-norm attention and gated feed-forward.

    Attributes:
        config: Sizes.
        full: See `VisionAttention`.
    """

    config: VisionConfig
    full: bool

    @nn.compact
    def __call__(self, x: Float[Array, "M P D"], layout: PictureLayout) -> Float[Array, "M P D"]:
        """Maps patches [M, P, D] to the same shape."""
        config = self.config
        y = RMSNorm(name="norm1")(x)
        x = constrain(
            x + VisionAttention(config, self.full, name="attn")(y, layout),
            "batch",
            "token",
            "embed",
        )
        y = RMSNorm(name="norm2")(x)
        x = x + SwiGLU(config.intermediate_size, use_bias=True, name="mlp")(y)
        return constrain(x, "batch", "token", "embed")


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
        dtype: Of the patches, and with parameters of the same type of all that follows.
    """

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    def __call__(self, images: Shaped[Array, "M H W 3"]) -> Float[Array, "M N D"]:
        """Visual tokens [M, N, D] in raster order of uint8 pictures [M, H, W, 3].

        Raises:
            UserError: The picture is not made of whole tokens.
        """
        config = self.config
        layout, order, places = ordered_layout(patch_grid(*images.shape[1:3], config), config)
        rows = patch_rows(images, config.patch_size, config.spatial_merge_size)
        return self.encode_rows(rows[:, order], layout)[:, places]

    @nn.compact
    def encode_rows(
        self, rows: Shaped[Array, "M P pixels"], layout: PictureLayout
    ) -> Float[Array, "M N D"]:
        """Visual tokens of pictures that may differ in size.

        Args:
            rows: uint8 patch rows of `process_pictures`, filled up to P each.
            layout: Of `layout_of`.

        Returns:
            [M, N, D], N = P / 4; a picture's own tokens come first, in raster order.
        """
        config = self.config
        patches = normalise(rows, config).astype(self.dtype)
        x = nn.Dense(config.hidden_size, use_bias=False, name="patch_embed")(patches)
        for number in range(config.depth):
            full = number in config.fullatt_block_indexes
            x = VisionBlock(config, full, name=f"blocks_{number}")(x, layout)
        return PatchMerger(config, name="merger")(x)
