"""Layers that the encoders and decoders share."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32.

    Attributes:
        eps: Added to the mean square.
    """

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises x [..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (scale * x32).astype(x.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward `down(act(gate(x)) * up(x))`.

    Attributes:
        intermediate_size: F.
        use_bias: Whether the three projections have biases.
        activation: Of the gate: SiLU, or GELU's tanh form, which makes it a GeGLU.
    """

    intermediate_size: int
    use_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Maps x [..., D] to [..., D]."""
        gate = nn.Dense(self.intermediate_size, use_bias=self.use_bias, name="gate_proj")(x)
        up = nn.Dense(self.intermediate_size, use_bias=self.use_bias, name="up_proj")(x)
        gate = nn.silu(gate) if self.activation == "silu" else nn.gelu(gate, approximate=True)
        return nn.Dense(x.shape[-1], use_bias=self.use_bias, name="down_proj")(gate * up)


def rotate(
    x: Float[Array, "*batch N heads d"],
    cos: Float[Array, "*batch N d"],
    sin: Float[Array, "*batch N d"],
) -> Float[Array, "*batch N heads d"]:
    """Rotary embedding with the halves layout: channel i is paired with channel i + d / 2.

    Args:
        x: Queries or keys [..., N, heads, d].
        cos: Of the angles, [..., N, d], the second half repeating the first.
        sin: The same for the sine.
    """
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return (x * cos + turned * sin).astype(x.dtype)
