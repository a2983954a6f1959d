"""DivPrune (arXiv 2503.02175): the subset whose closest two tokens are farthest apart.

On the visual tokens as they enter the language model: `D_ij = 1 - cos(v_i, v_j)`. The first token
is the one whose nearest other token is farthest, `argmax_i min_{j != i} D_ij`; each further one is
`argmax_j min_{i in S} D_ij`. No attention, no text, no randomness. Published default: a keep ratio
of 0.098. The method defines itself by the matrix D [N, N], which its start needs, so it is held.

The released code keeps `round(ratio N)` tokens and renumbers their positions; here kept tokens keep
their position ids, and `as_published` takes over the rounding.
"""

from functools import partial

import jax
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, real_tokens
from fastdrive_jax.pruning.max_min import (
    farthest_first,
    most_isolated,
    pairwise_distances,
    unit_tokens,
)
from fastdrive_jax.pruning.select import num_keep, round_keep


def div_prune(as_published: bool = False) -> Pruner:
    """DivPrune as a method.

    Args:
        as_published: K = round(N * keep_ratio), at least 1, instead of the floor.
    """

    def choose(params, inputs: PrunerInputs, key, k: int) -> Int[Array, "B K"]:
        return jax.vmap(partial(_diverse, k=k))(inputs.tokens, real_tokens(inputs))

    budget = round_keep if as_published else num_keep
    return Pruner(name="divprune", choose=choose, needs=frozenset({"tokens"}), budget=budget)


def _diverse(tokens: Float[Array, "N D"], valid: Bool[Array, " N"], k: int) -> Int[Array, " K"]:
    distances = pairwise_distances(unit_tokens(tokens, valid))
    start = most_isolated(distances, valid)
    return farthest_first(distances, start, k, valid)
