"""ToMe (arXiv 2210.09461): tokens are merged with their nearest, round by round, until K are left.

In a round, each token at an even place has an edge to the token at an odd place that it has the
largest cosine to. The r strongest edges are contracted: the even token joins the odd one, which
becomes their mean, weighted by how many tokens each already stands for. `halves.py` has the order
of the next round. What is left of an edge is at the odd token's index.

Published within a plain ViT, r tokens in each block between attention and MLP, on keys. The blocks
of Qwen's encoder offer no such place: its merger needs the four patches of every token, and its
windows their patches side by side. So the rounds stand behind the encoder. As there are no blocks
to share the work, `rounds` do: of R tokens left, `r = min(R // 2, ceil((R - K) / rounds left))`,
as even as the constant r of the paper. Default 12, the blocks of a ViT-B; where every round must
merge half to come down to K, more follow. Attention in proportion to size is left out, since the
language model's attention is not changed by what stands before it.

The metric is the tokens' by default, which needs nothing of the encoder; with `metric="keys"` it is
the paper's, of the encoder's last block that sees the whole picture, merged as tokens are. Those
keys are turned by their place, so that near tokens are more alike.

A round of T tokens costs O(T^2 (d + D) / 4) and holds two arrays T/2 x T/2, 11 MB each for 3,249
tokens.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.halves import NO_MATCH, next_order
from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, real_tokens
from fastdrive_jax.pruning.max_min import unit_tokens

_EXACT = jax.lax.Precision.HIGHEST  # at the default, GPUs round products to TF32


def tome(metric: Literal["tokens", "keys"] = "tokens", rounds: int = 12) -> Pruner:
    """ToMe behind the encoder, as a method.

    Args:
        metric: What cosines are of.
        rounds: That the merging is spread over.

    Raises:
        ValueError: There is no such metric, or no round.
    """
    if metric not in ("tokens", "keys"):
        raise ValueError(f"metric={metric!r} must be 'tokens' or 'keys'")
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")

    def merge(params, inputs: PrunerInputs, key, k: int) -> tuple[Array, Array]:
        values = [inputs.tokens]
        if metric == "keys":
            values.append(inputs.vision_keys)
        run = partial(_merge, schedule=_schedule(inputs.tokens.shape[1], k, rounds))
        return jax.vmap(run)(values, real_tokens(inputs))

    needs = {"tokens", "vision_keys"} if metric == "keys" else {"tokens"}
    return Pruner(name="tome", merge=merge, needs=frozenset(needs))


def _schedule(n: int, k: int, rounds: int) -> list[Int[np.ndarray, " N+1"]]:
    """Tokens left after each round, by the number of real ones before the first, 0 to N.

    A table rather than arithmetic on the count: its last column is the static shape.
    """
    left, found = np.arange(n + 1), []
    while left[-1] > k:
        share = -(-(left - k) // max(1, rounds - len(found)))
        left = left - np.clip(share, 0, left // 2)
        found.append(left)
    return found


def _merge(
    values: list[Float[Array, "N _"]],
    valid: Bool[Array, " N"],
    schedule: list[Int[np.ndarray, " N+1"]],
) -> tuple[Int[Array, " K"], Float[Array, "K D"]]:
    """Representatives and tokens.

    Args:
        values: What is averaged: tokens and, if it is not they, the metric at the end.
        valid: False for padding.
        schedule: Of `_schedule`.
    """
    values = [jnp.where(valid[:, None], value.astype(jnp.float32), 0) for value in values]
    ids, size = jnp.arange(len(valid)), valid.astype(jnp.float32)
    count = live = jnp.sum(valid)
    for table in schedule:
        length, after = len(ids), jnp.asarray(table)[count]
        place = jnp.arange(length)
        units = unit_tokens(values[-1], size > 0)
        cosines = jnp.dot(units[::2], units[1::2].T, precision=_EXACT)
        cosines = jnp.where(place[1::2] < live, cosines, NO_MATCH)
        order, leaving = next_order(jnp.max(cosines, axis=1), length, live, live - after)
        joins = jnp.argmax(cosines, axis=1)[:, None] == jnp.arange(length // 2)
        # A product, where a scatter would add in an order that GPUs do not fix.
        weights = jnp.where(joins & leaving[::2, None], size[::2, None], 0)
        joint = size[1::2] + jnp.sum(weights, axis=0)
        order, live = order[: table[-1]], after

        def contract(value, weights=weights, size=size, joint=joint, order=order):
            total = jnp.dot(weights.T, value[::2], precision=_EXACT)
            total = total + size[1::2, None] * value[1::2]
            return value.at[1::2].set(total / jnp.maximum(joint, 1)[:, None])[order]

        values = [contract(value) for value in values]
        ids, size = ids[order], size.at[1::2].set(joint)[order]
    return ids, values[0]
