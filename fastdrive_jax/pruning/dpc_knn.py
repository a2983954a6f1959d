"""Density-peak clustering by nearest neighbours (DPC-KNN, Du et al. 2016), as token pruners use it.

Of m tokens of D entries, with `d` their distances over sqrt(D), c become centres:

    rho_i = exp(-mean of the c smallest d_ij^2, its own 0 among them)
    delta_i = min over denser j of d_ij, for the densest the largest distance of all
    centres = the c tokens with the largest rho * delta

and every token joins its nearest centre. Of equal densities the lower index is denser, and all ties
go to it, so that nothing is drawn. Distances are held, m x m: the method is defined by them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.select import top_k


def cluster_means(
    tokens: Float[Array, "m D"], valid: Bool[Array, " m"], clusters: int
) -> tuple[Int[Array, " c"], Float[Array, "c D"]]:
    """Centres, ascending, and the mean of each one's tokens, float32; `jax.vmap` for a batch.

    Args:
        tokens: Of one sample.
        valid: False for padding, which is a centre only where too few are real.
        clusters: c, static.
    """
    dot = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    tokens = jnp.where(valid[:, None], tokens.astype(jnp.float32), 0)
    products = dot(tokens, tokens.T)
    own = jnp.diagonal(products)
    # Symmetric to the last bit, 0 on the diagonal: at c = 2 nearest pairs tie by definition.
    squares = own[:, None] + own - (products + products.T)
    squares = jnp.maximum(squares, 0) / tokens.shape[-1]
    pairs = valid[:, None] & valid
    squares = jnp.where(pairs, squares, jnp.inf)

    # rho enters by its logarithm, for itself it is 0 in float32 where tokens are large.
    spread = -jnp.mean(jax.lax.top_k(-squares, clusters)[0], axis=-1)
    place = jnp.arange(len(valid))
    denser = jnp.where(spread == spread[:, None], place < place[:, None], spread < spread[:, None])
    farthest = jnp.max(jnp.where(pairs, squares, 0))
    delta = jnp.min(jnp.where(denser, squares, farthest), axis=-1)
    peaks = jnp.log(delta) / 2 - spread
    centres = top_k(peaks[None], clusters, valid[None])[0]

    number = jnp.arange(clusters)
    nearest = jnp.argmin(squares[centres], axis=0).at[centres].set(number)
    members = (nearest == number[:, None]) & valid
    sizes = jnp.maximum(jnp.sum(members, axis=-1, keepdims=True), 1)
    return centres, dot(members.astype(jnp.float32), tokens) / sizes
