"""DINOv2 (Oquab et al. 2023) in Linen: picture to class and patch tokens."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastdrive_jax.models.attention import attention
from fastdrive_jax.models.dinov2.config import Dinov2Config
from fastdrive_jax.models.dinov2.positions import interpolate_positions


class Attention(nn.Module):
    """Full self-attention with separate projections."""

    config: Dinov2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Mixes tokens [B, N, D]."""
        heads, size = self.config.num_heads, self.config.hidden_size
        split = (*x.shape[:-1], heads, size // heads)
        query, key, value = (
            nn.Dense(size, name=name)(x).reshape(split) for name in ("query", "key", "value")
        )
        mixed = attention(query, key, value)
        return nn.Dense(size, name="out")(mixed.reshape(x.shape))


class Block(nn.Module):
    """Pre-norm attention and MLP, each scaled per channel before it is added."""

    config: Dinov2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Tokens [B, N, D] to tokens."""
        config = self.config
        size = (config.hidden_size,)
        eps = config.layer_norm_eps
        scales = [self.param(f"layer_scale{i}", nn.initializers.ones, size) for i in (1, 2)]
        y = nn.LayerNorm(eps, use_fast_variance=False, name="norm1")(x)
        x = x + scales[0] * Attention(config, name="attention")(y)
        y = nn.LayerNorm(eps, use_fast_variance=False, name="norm2")(x)
        y = nn.Dense(config.hidden_size * config.mlp_ratio, name="fc1")(y)
        y = nn.Dense(config.hidden_size, name="fc2")(nn.gelu(y, approximate=False))
        return x + scales[1] * y


class Dinov2(nn.Module):
    """The encoder; tokens come out after the final norm."""

    config: Dinov2Config = Dinov2Config()

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B P1 D"]:
        """Class token and patch tokens in raster order, [B, 1 + P, D].

        Args:
            pixels: [B, H, W, 3] RGB, ImageNet-normalised; H and W multiples of the patch size.
        """
        config = self.config
        size, patch = config.hidden_size, (config.patch_size, config.patch_size)
        batch, height, width, _ = pixels.shape
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(f"{height} x {width} is not made of {config.patch_size} px patches")
        grid = (height // config.patch_size, width // config.patch_size)
        x = nn.Conv(size, patch, patch, padding="VALID", name="patch_embed")(pixels)
        x = x.reshape(batch, grid[0] * grid[1], size)
        small = nn.initializers.truncated_normal(0.02)
        first = self.param("cls_token", small, (1, 1, size))
        count = 1 + config.position_grid**2
        positions = self.param("position_embeddings", small, (1, count, size))
        x = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, size)), x], axis=1)
        x = x + interpolate_positions(positions, grid)
        for layer in range(config.num_layers):
            x = Block(config, name=f"block_{layer}")(x)
        return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name="norm")(x)
