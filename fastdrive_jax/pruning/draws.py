"""What methods draw, by one key for a batch or by each sample's own.

Keys of samples [B] make a draw independent of what else is in the batch, as a robot's or a car's
must be that shares a server with others.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float


def is_per_sample(key: jax.Array) -> bool:
    """Whether there is a key for each sample; of `jax.random.key` or of the older `PRNGKey`."""
    typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim > (0 if typed else 1)


def fold(key: jax.Array | None, number: int) -> jax.Array | None:
    """The key, or keys, with a number folded in; None stays it."""
    if key is None:
        return None
    if not is_per_sample(key):
        return jax.random.fold_in(key, number)
    return jax.vmap(lambda own: jax.random.fold_in(own, number))(key)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Numbers in [0, 1).

    Args:
        key: Of the batch, or of its B samples.
        shape: Begins with the batch, or with B times as many parts of it.
    """
    return _draw(jax.random.uniform, key, shape)


def normal(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Numbers of mean 0 and deviation 1; arguments are those of `uniform`."""
    return _draw(jax.random.normal, key, shape)


def gumbel(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Gumbel noise: the K largest of logits with it are a draw of K without putting back.

    Arguments are those of `uniform`.
    """
    return _draw(jax.random.gumbel, key, shape)


def _draw(draw: Callable, key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    if not is_per_sample(key):
        return draw(key, shape)
    own = (shape[0] // len(key), *shape[1:])
    return jax.vmap(lambda one: draw(one, own))(key).reshape(shape)
