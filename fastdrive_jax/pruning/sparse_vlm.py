"""SparseVLM (arXiv 2410.04417): the words that look at the picture rate its tokens.

With H_v and H_t the visual and instruction tokens as they enter the language model, and A the
attention of the layer just left:

    M = softmax over text of (H_v H_t^T);  m_t = mean over v of M_vt;  raters = {t : m_t > mean m}
    s_j = mean over heads and raters t of A[h, t, j]

Published: cuts behind layers 2, 6 and 15 of 32, that is on entering 3, 7 and 16. Here the keep
ratio r is what the last one leaves, and all leave the same share of what they find: N r^(1/3),
N r^(2/3), N r. The paper sets the counts by the rank of A; the released code has fixed lists for
576 tokens, named by about their mean over layers: 192, 128, 96 or 64. `as_published` takes
the list whose name is nearest to 576 * keep_ratio, in proportion to N.

The second version (`sparse_vlm`) averages only the heads with most attention from raters to the
picture, 14 of 32, and keeps position ids. The released code first divides A by the product of
all-ones queries and keys under RoPE; that needs the text's positions and the model's frequencies,
which pruners do not see, and changes sign with distance: left out.

The first version (`sparse_vlm_v1`) averages all heads and recycles: of the d tokens that a cut
deletes, the best m = int(0.3 d) + 1 are clustered by DPC-KNN into c = int(m / 10) + 1, each of
which leaves the mean of its tokens. K counts kept and recycled tokens, K = kept + c, where the
released lists count kept ones: `as_published` adds c to them. A recycled token stands at its
cluster's centre, where the released code puts all behind the kept ones; its noise against equal
densities is replaced by order, the lower index first. It numbers positions anew after each cut,
which `as_published` takes over. For padded samples m and c, which are shapes, follow N too.

Raters are found at each cut from the visual tokens that are still there, where the released code
keeps those of the first. Where no word is above the mean, all of the instruction rates.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.dpc_knn import cluster_means
from fastdrive_jax.pruning.interface import (
    Cuts,
    Pruner,
    PrunerInputs,
    published_layers,
    real_tokens,
)
from fastdrive_jax.pruning.select import falling_keep, gather_tokens, num_keep, top_k

_HEADS = 14 / 32
_LISTED = 576
_LISTS_V1 = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
_LISTS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
_NEEDS = frozenset({"text", "embeddings", "text_rows"})
_LAYERS = published_layers(3, 7, 16)
_FALLING = partial(falling_keep, cuts=3)


def sparse_vlm(as_published: bool = False) -> Pruner:
    """The second version as a method.

    Args:
        as_published: Counts of the released lists; the keep ratio is the mean over layers then.
    """

    def score(params, inputs: PrunerInputs, key):
        return _scores(inputs, max(1, round(inputs.text_rows.shape[1] * _HEADS)))

    budgets = partial(_listed, _LISTS, recycles=False) if as_published else _FALLING
    return Pruner(
        name="sparsevlm",
        score=score,
        needs=_NEEDS,
        budget=_last(budgets),
        cuts=Cuts(_LAYERS, budgets),
    )


def sparse_vlm_v1(as_published: bool = False) -> Pruner:
    """The first version as a method.

    Args:
        as_published: Counts of the released lists and, beyond them, recycled tokens; the keep ratio
            is the mean over layers then. Positions are given out anew.
    """
    budgets = partial(_listed, _LISTS_V1, recycles=True) if as_published else _FALLING
    return Pruner(
        name="sparsevlm_v1",
        merge=_recycle,
        needs=_NEEDS,
        budget=_last(budgets),
        cuts=Cuts(_LAYERS, budgets),
        renumber=as_published,
    )


def recycled_among(n: int, k: int) -> int:
    """Clusters c among K: K - c tokens are kept, and the N - K + c others give c; the smallest c.

    Two c may do, such as 2 and 3 for 119 of 180 tokens; released lists may mean the larger one.

    At most half of K, which only budgets of a few percent run into; 0 if nothing is deleted.
    """
    if k == n:
        return 0
    most = k // 2
    return next((c for c in range(1, most + 1) if _clusters(n - k + c) <= c), most)


def _candidates(deleted: int) -> int:
    return deleted * 3 // 10 + 1


def _clusters(deleted: int) -> int:
    return _candidates(deleted) // 10 + 1


def _last(budgets: Callable[[int, float], tuple[int, ...]]) -> Callable[[int, float], int]:
    return lambda n, keep_ratio: budgets(n, keep_ratio)[-1]


def _listed(lists: dict, n: int, keep_ratio: float, recycles: bool) -> tuple[int, ...]:
    num_keep(n, keep_ratio)  # refuses ratios outside (0, 1]
    name = min(lists, key=lambda target: abs(target - _LISTED * keep_ratio))
    live, budgets = n, []
    for listed in lists[name]:
        kept = max(1, min(listed * n // _LISTED, live - 1))
        live = min(live, kept + _clusters(live - kept)) if recycles else kept
        budgets.append(live)
    return tuple(budgets)


def _scores(inputs: PrunerInputs, heads: int) -> Float[Array, "B N"]:
    """Mean over raters and the `heads` heads with most attention from them to the picture."""
    raters = _raters(inputs)
    rated = jnp.sum(jnp.where(raters[:, None, :, None], inputs.text_rows, 0), axis=2)
    if heads < rated.shape[1]:
        mass = jnp.sum(jnp.where(real_tokens(inputs)[:, None], rated, 0), axis=-1)
        _, best = jax.lax.top_k(mass, heads)
        rated = jnp.take_along_axis(rated, best[..., None], axis=1)
    count = jnp.maximum(jnp.sum(raters, axis=-1, keepdims=True), 1)
    return jnp.sum(rated, axis=1) / (heads * count)


def _raters(inputs: PrunerInputs) -> Bool[Array, "B L"]:
    words = inputs.text_valid
    if words is None:
        words = jnp.ones(inputs.text.shape[:2], bool)
    text = jnp.where(words[..., None], inputs.text, 0)
    # Full precision: raters are those above a threshold.
    likeness = jnp.einsum(
        "bnd,bld->bnl",
        inputs.embeddings,
        text,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    shares = jax.nn.softmax(likeness, axis=-1, where=words[:, None])
    real = real_tokens(inputs)
    total = jnp.sum(jnp.where(real[..., None], shares, 0), axis=1)
    # A visual token's shares are 1 together, so that the mean word gets 1 / L of each.
    mean = jnp.sum(real, axis=-1) / jnp.sum(words, axis=-1)
    above = words & (total > mean[:, None])
    return jnp.where(jnp.any(above, axis=-1, keepdims=True), above, words)


def _recycle(params, inputs: PrunerInputs, key, k: int) -> tuple[Int[Array, "B K"], Array]:
    n = inputs.tokens.shape[1]
    real, scores = real_tokens(inputs), _scores(inputs, inputs.text_rows.shape[1])
    clusters = recycled_among(n, k)
    if clusters == 0:
        chosen = top_k(scores, k, real)
        return chosen, gather_tokens(inputs.tokens, chosen)
    kept = k - clusters
    _, best = jax.lax.top_k(jnp.where(real, scores, -jnp.inf), kept + _candidates(n - kept))
    kept, left = best[:, :kept], jnp.sort(best[:, kept:], axis=-1)
    valid = jnp.take_along_axis(real, left, axis=1)
    centres, means = jax.vmap(partial(cluster_means, clusters=clusters))(
        gather_tokens(inputs.tokens, left), valid
    )
    chosen = jnp.concatenate([kept, jnp.take_along_axis(left, centres, axis=1)], axis=1)
    return chosen, jnp.concatenate([gather_tokens(inputs.tokens, kept), means], axis=1)
