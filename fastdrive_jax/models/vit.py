"""A plain pre-norm vision transformer: DINOv2's, with or without registers, and SigLIP's."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from fastdrive_jax.models.attention import attention
from fastdrive_jax.models.vit_config import ViTConfig
from fastdrive_jax.models.vit_positions import interpolate_positions
from fastdrive_jax.parallel.rules import constrain


class Attention(nn.Module):
    """Full self-attention.

    Attributes:
        config: Sizes.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Mixes tokens [B, N, D]."""
        heads, (batch, count, size) = self.config.num_heads, x.shape
        qkv = nn.Dense(3 * size, name="qkv")(x).reshape(batch, count, 3, heads, size // heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        # What pruners score tokens by; kept only if a caller asks for it.
        self.sow("intermediates", "query", query)
        self.sow("intermediates", "key", key)
        mixed = attention(query, key, value)
        return nn.Dense(size, name="proj")(mixed.reshape(x.shape))


class Block(nn.Module):
    """Pre-norm attention and MLP, each perhaps scaled per channel before it is added.

    Attributes:
        config: Sizes.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Tokens [B, N, D] to tokens."""
        config = self.config

        def scaled(y, name):
            if not config.layer_scale:
                return y
            return self.param(name, nn.initializers.ones, (config.hidden_size,)) * y

        def norm(y, name):
            return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name=name)(y)

        y = Attention(config, name="attn")(norm(x, "norm1"))
        x = constrain(x + scaled(y, "ls1"), "batch", "token", "embed")
        y = nn.Dense(config.intermediate_size, name="fc1")(norm(x, "norm2"))
        y = nn.gelu(y, approximate=config.activation == "gelu_tanh")
        y = nn.Dense(config.hidden_size, name="fc2")(y)
        return constrain(x + scaled(y, "ls2"), "batch", "token", "embed")


class ViT(nn.Module):
    """Pictures to tokens.

    Attributes:
        config: Sizes.
        whole: Whether the last block and the final norm are there; models that read the output of
            the second-to-last block have neither.
    """

    config: ViTConfig
    whole: bool = True

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
        """Class token, registers and patches in raster order, [B, N, D], of those that there are.

        Args:
            pixels: Of `normalise_pictures`, H and W multiples of the patch size.
        """
        config = self.config
        size, edge = config.hidden_size, config.patch_size
        batch, height, width, colours = pixels.shape
        if height % edge or width % edge:
            raise ValueError(f"{height} x {width} is not made of {edge} px patches")
        rows, columns = height // edge, width // edge
        x = pixels.reshape(batch, rows, edge, columns, edge, colours).transpose(0, 1, 3, 5, 2, 4)
        x = nn.Dense(size, name="patch_embed")(x.reshape(batch, rows * columns, -1))
        small = nn.initializers.truncated_normal(0.02)
        stored = config.grid[0] * config.grid[1]
        positions = self.param("position_embeddings", small, (1, stored, size))
        x = x + interpolate_positions(positions, config.grid, (rows, columns)).astype(x.dtype)
        prefix = []
        if config.class_token:
            prefix.append(self.param("class_token", small, (1, 1, size)))
        if config.registers:
            prefix.append(self.param("register_tokens", small, (1, config.registers, size)))
        prefix = [jnp.broadcast_to(tokens, (batch, *tokens.shape[1:])) for tokens in prefix]
        x = jnp.concatenate([*prefix, x], axis=1)
        for number in range(config.depth if self.whole else config.depth - 1):
            x = Block(config, name=f"blocks_{number}")(x)
        if not self.whole:
            return x
        return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name="norm")(x)


def normalise_pictures(
    images: UInt8[Array, "B H W 3"], config: ViTConfig
) -> Float[Array, "B H W 3"]:
    """RGB bytes to the float32 values that the encoder was trained on."""
    mean, std = (jnp.asarray(v, jnp.float32) for v in (config.mean, config.std))
    return (images.astype(jnp.float32) / 255 - mean) / std
