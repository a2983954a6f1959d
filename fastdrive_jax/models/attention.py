"""Full attention that suits the device it is compiled for.

On a CPU one head at a time: its N x N scores stay in the cache, where all heads' scores at once
go through memory several times. The backward pass recomputes them from the log-sum-exp of each
row, as fused kernels do. Elsewhere JAX's own kernel.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def full_attention(
    query: Float[Array, "B N Q d"], key: Float[Array, "B N G d"], value: Float[Array, "B N G d"]
) -> Float[Array, "B N Q d"]:
    """Softmax attention without a mask.

    Args:
        query: [B, N, Q, d].
        key: [B, N, G, d], G dividing Q.
        value: [B, N, G, d].
    """
    return jax.lax.platform_dependent(
        query, key, value, cpu=head_by_head_attention, default=jax.nn.dot_product_attention
    )


def head_by_head_attention(
    query: Float[Array, "B N Q d"], key: Float[Array, "B N G d"], value: Float[Array, "B N G d"]
) -> Float[Array, "B N Q d"]:
    """The same by a loop over batch and heads."""
    batch, count, heads, size = query.shape

    def to_rows(x):
        x = jnp.repeat(x, heads // x.shape[2], axis=2)
        return x.transpose(0, 2, 1, 3).reshape(batch * heads, count, size)

    mixed = _attend(to_rows(query) * size**-0.5, to_rows(key), to_rows(value))
    return mixed.reshape(batch, heads, count, size).transpose(0, 2, 1, 3)


@jax.custom_vjp
def _attend(query, key, value):
    return _forward(query, key, value)[0]


def _forward(query, key, value):
    def one_head(rows):
        q, k, v = rows
        scores = q @ k.T
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(axis=-1, keepdims=True)
        return (weights @ v) / total, peak + jnp.log(total)

    out, log_total = jax.lax.map(one_head, (query, key, value))
    return out, (query, key, value, out, log_total)


def _backward(saved, grad):
    def one_head(rows):
        q, k, v, out, log_total, g = rows
        weights = jnp.exp(q @ k.T - log_total)
        through = weights * (g @ v.T - (g * out).sum(axis=-1, keepdims=True))
        return through @ k, through.T @ q, weights.T @ g

    return jax.lax.map(one_head, (*saved, grad))


_attend.defvjp(_forward, _backward)
