"""Prune2Drive (arXiv 2508.13305, section 3): farthest-point sampling in each camera by itself.

Of the n tokens of camera c, K_c are chosen by T-FPS, max-min over `d(i, j) = 1 - cos(v_i, v_j)`.
The paper starts at a random token. Distances [n, n] are held within each picture, none between
pictures. The paper searches a keep ratio alpha_c for each camera once, on a small validation set,
for the reward of the task less lambda times the sum of the ratios, each in 0.1..1; published
operating points: 25% and 10% of 6 x 729 tokens. Here those ratios are `weights`: K tokens in all
are shared out in their proportion, since one keep ratio sets K for every method.

The released code differs: it starts at the most isolated token, `argmax_i min_{j != i} d(i, j)`,
and stands inside the language model, on the hidden states that enter a layer. `as_published` takes
over the start.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.budgets import camera_budgets, pictures_of
from fastdrive_jax.pruning.draws import is_per_sample, uniform
from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, real_tokens
from fastdrive_jax.pruning.max_min import (
    farthest_first,
    most_isolated,
    pairwise_distances,
    unit_tokens,
)
from fastdrive_jax.pruning.select import top_k


def prune2drive(weights: tuple[float, ...] | None = None, as_published: bool = False) -> Pruner:
    """Prune2Drive as a method.

    Its random start is drawn once for each camera, as a share of its tokens, for all samples of the
    batch: so what a sample keeps does not depend on its row.

    Padding may leave a camera fewer real tokens than its budget; the other cameras then go on, each
    in its own order and in turn, until K tokens are chosen.

    Args:
        weights: Of each camera of a sample in their order; None means equal.
        as_published: Start at the most isolated token of each picture; it needs no key.

    Raises:
        ValueError: A weight is negative or not finite, or none is above 0.
    """
    if weights is not None and not (
        np.isfinite(weights).all() and min(weights) >= 0 < sum(weights)
    ):
        raise ValueError(f"weights must be at least 0 and not all 0, got {weights}")

    def choose(params, inputs: PrunerInputs, key, k: int) -> Int[Array, "B K"]:
        batch, length, dim = inputs.tokens.shape
        cameras = pictures_of(inputs)
        n = length // cameras
        if weights is not None and len(weights) != cameras:
            raise ValueError(f"{len(weights)} weights for {cameras} cameras")
        budgets = camera_budgets(k, n, weights or (1.0,) * cameras)
        # Only padding can make a camera give more than its budget.
        steps = int(budgets.max()) if inputs.count is None else min(n, k)
        valid = real_tokens(inputs)
        units = unit_tokens(inputs.tokens, valid).reshape(batch, cameras, n, dim)
        if as_published:
            draws = jnp.zeros((batch, cameras))
        elif is_per_sample(key):
            draws = uniform(key, (batch, cameras))
        else:  # one for all samples
            draws = jnp.broadcast_to(uniform(key, (cameras,)), (batch, cameras))
        rank = partial(_ranks, steps=steps, isolated=as_published)
        ranks = jax.vmap(jax.vmap(rank), in_axes=(0, 0, 0))(
            units, draws, valid.reshape(batch, cameras, n)
        )
        beyond = jnp.maximum(ranks - jnp.asarray(budgets)[:, None] + 1, 0)
        return top_k(-beyond.reshape(batch, length), k, valid)

    needs = {"tokens", "grid"} if as_published else {"tokens", "grid", "key"}
    return Pruner(name="prune2drive", choose=choose, needs=frozenset(needs))


def _ranks(
    units: Float[Array, "n D"],
    draw: Float[Array, ""],
    valid: Bool[Array, " n"],
    steps: int,
    isolated: bool,
) -> Int[Array, " n"]:
    """At which step each token of a picture is chosen; n for those that are not."""
    n = len(valid)
    distances = pairwise_distances(units)
    if isolated:
        start = most_isolated(distances, valid)
    else:
        count = jnp.sum(valid)
        start = jnp.minimum((draw * count).astype(jnp.int32), jnp.maximum(count - 1, 0))
    order = farthest_first(distances, start, steps, valid)
    return jnp.full(n, n).at[order].set(jnp.arange(steps))
