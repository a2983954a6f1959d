"""What temporal methods share: how alike two frames are."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def pixel_cosine(a: Float[Array, "B N P"], b: Float[Array, "B N P"]) -> Float[Array, "B N"]:
    """Cosine of each token's pixels in two frames, float32; 0 for black, as published."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / (norms + 1e-8)
