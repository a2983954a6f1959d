"""CDPruner (arXiv 2506.10967): a determinantal point process conditioned on relevance.

With `S_ij = cos(v_i, v_j)` and the relevance r brought to q in 0..1, the kernel is
`L_ij = q_i S_ij q_j`, and the kept set is to maximise `det L_S`: tokens that matter and differ. The
greedy answer by Cholesky updates (Chen et al. 2018, arXiv 1709.05135): with `d_i = L_ii`, K times

    j = argmax d;  e_i = (L_ji - sum_t c_t[j] c_t[i]) / sqrt(d_j);  d_i -= e_i^2;  c_{t+1} = e

Rows of L are made as they are asked for, O(N D + K N) a step: L itself is never held, only the
factors c [K, N].

As published, r is minus the mean cosine of a CLIP patch feature to the prompt's CLIP text features
(the minus is in the released code), and `q = (r - min r + 1e-6) / (max r - min r)`. Driving models
have no CLIP text tower, so r is an input, `PrunerInputs.relevance`, and the caller says what it is.
The published temperature on q (theta) is off by default in the released code and left out here.
Kept tokens keep their position ids, where the released code renumbers them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, real_tokens
from fastdrive_jax.pruning.max_min import LOWEST, cosines, unit_tokens

_FLOOR = 1e-6  # published; keeps the kernel of the least relevant token above 0
# Below this share of its L_ii a token's d is rounding and counts as 0: chosen tokens span it.
_SPANNED = 1e-5


def cd_pruner(as_published: bool = False) -> Pruner:
    """CDPruner as a method.

    Args:
        as_published: Smallest and largest relevance are taken over the whole batch, as in the
            released code, so that a sample's choice depends on its neighbours.
    """

    def choose(params, inputs: PrunerInputs, key, k: int) -> Int[Array, "B K"]:
        valid = real_tokens(inputs)
        quality = _quality(inputs.relevance, valid, axis=None if as_published else -1)
        units = unit_tokens(inputs.tokens, valid)
        return jax.vmap(partial(_greedy_map, k=k))(units, quality, valid)

    return Pruner(name="cdpruner", choose=choose, needs=frozenset({"tokens", "relevance"}))


def text_relevance(
    tokens: Float[Array, "B N D"],
    text: Float[Array, "B L D"],
    text_valid: Bool[Array, "B L"] | None = None,
) -> Float[Array, "B N"]:
    """Mean cosine to the prompt's embeddings: what stands in where there is no CLIP text tower."""
    if text_valid is None:
        text_valid = jnp.ones(text.shape[:2], bool)
    units = unit_tokens(text, text_valid)
    mean = units.sum(axis=1) / jnp.maximum(text_valid.sum(axis=1, keepdims=True), 1)
    return jnp.einsum("bnd,bd->bn", unit_tokens(tokens, jnp.ones(tokens.shape[:2], bool)), mean)


def _quality(
    relevance: Float[Array, "B N"], valid: Bool[Array, "B N"], axis: int | None
) -> Float[Array, "B N"]:
    relevance = relevance.astype(jnp.float32)
    low = jnp.min(relevance, axis, keepdims=True, initial=jnp.inf, where=valid)
    high = jnp.max(relevance, axis, keepdims=True, initial=-jnp.inf, where=valid)
    # Where all are equally relevant the choice is by diversity alone.
    quality = (relevance - low + _FLOOR) / jnp.maximum(high - low, _FLOOR)
    return jnp.where(valid, quality, 0)


def _greedy_map(
    units: Float[Array, "N D"], quality: Float[Array, " N"], valid: Bool[Array, " N"], k: int
) -> Int[Array, " K"]:
    count = len(quality)
    if not 1 <= k <= count:
        raise ValueError(f"k must be in 1..{count}, got {k}")
    own = jnp.square(quality) * jnp.sum(jnp.square(units), axis=-1)

    def step(t, carry):
        gain, taken, factors, order = carry
        pick = jnp.argmax(jnp.where(taken, -jnp.inf, jnp.where(valid, gain, LOWEST)))
        row = quality[pick] * cosines(units, pick) * quality
        seen = jnp.dot(factors[:, pick], factors, precision=jax.lax.Precision.HIGHEST)
        scale = jnp.sqrt(gain[pick])
        new = jnp.where(scale > 0, (row - seen) / scale, 0)
        gain = gain - jnp.square(new)
        gain = jnp.where(gain > _SPANNED * own, gain, 0)
        order = order.at[t].set(pick.astype(jnp.int32))
        return gain, taken.at[pick].set(True), factors.at[t].set(new), order

    carry = own, jnp.zeros(count, bool), jnp.zeros((k, count)), jnp.zeros(k, jnp.int32)
    return jax.lax.fori_loop(0, k, step, carry)[-1]
