"""VLA-Pruner (arXiv 2511.16449): what the prompt looks at, united with what actions looked at.

Semantic relevance is the attention that a visual token receives in prefill; action relevance is the
attention that it got from the queries that gave action tokens, averaged over the last w frames:

    S_vl[m] = mean over all rows i of A_vl[i, m]            (layer K - 1, mean over heads)
    S_act[m] = sum_{i=1..w} g^i A_act^{t-i}[m] / sum_i g^i  (mean over heads and action queries)
    C = Top_K(S_vl) united with Top_K(S_act)

and of C the K tokens are kept that differ most: greedily max-min over `1 - cos(v_i, v_j)` of the
projector's tokens, from the one whose nearest other candidate is farthest. Published: one cut on
entering layer K = 3 of 32, w = 3, g = 0.8, action attention over the latter half of the layers.
A sample with fewer than w frames behind it takes what there is, and none at all S_vl alone; as
published nothing is pruned in these frames (`inference.policy.frame_policy`).

`as_published` follows the released code where it differs. "openvla": S_vl is the last prompt
token's row (the paper's form is an option there that its authors advise against), action attention
of layer 15 of 32 alone, the weights reversed, so that the oldest frame weighs most, K rounded.
"openvla-oft": the cut is one layer later, the newest frame weighs most, and each of the two cameras
has its own budget, rounded by itself: wrap it in `per_camera`. `vla_pruner_released` is the first
of these under its own name, for tables that hold both. In all forms a pruned token got no action
attention, so it can come back only through S_vl.
"""

from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.interface import (
    Cuts,
    Pruner,
    PrunerInputs,
    Seen,
    Temporal,
    published_layers,
    real_tokens,
)
from fastdrive_jax.pruning.max_min import (
    farthest_first,
    most_isolated,
    pairwise_distances,
    unit_tokens,
)
from fastdrive_jax.pruning.select import gather_tokens, num_keep, round_keep, top_k

State = dict[str, Array]
Signals = Literal["both", "prefill", "action"]
Release = Literal["openvla", "openvla-oft"]


def vla_pruner(
    layer: int | None = None,
    window: int = 3,
    decay: float = 0.8,
    signals: Signals = "both",
    as_published: Release | None = None,
) -> Pruner:
    """VLA-Pruner as a method.

    Args:
        layer: On entering which tokens leave; None is the published relative depth.
        window: w, frames of action attention.
        decay: g.
        signals: Of what C is made, for ablations; without frames behind it a sample takes S_vl.
        as_published: A release to follow.

    Raises:
        ValueError: The window is below 1, the decay outside (0, 1], or there are no such signals or
            no such release.
    """
    if signals not in get_args(Signals):
        raise ValueError(f"signals={signals!r} must be one of {get_args(Signals)}")
    if as_published is not None and as_published not in get_args(Release):
        raise ValueError(
            f"as_published={as_published!r} must be None or one of {get_args(Release)}"
        )
    if window < 1 or not 0 < decay <= 1:
        raise ValueError(f"window={window} must be at least 1 and decay={decay} in (0, 1]")
    openvla, oft = as_published == "openvla", as_published == "openvla-oft"
    ages = range(window, 0, -1) if openvla else range(1, window + 1)
    weights = tuple(decay**age for age in ages)

    def choose(params, inputs: PrunerInputs, key, k: int) -> Int[Array, "B K"]:
        valid = real_tokens(inputs)
        semantic = inputs.last_row.mean(axis=1) if openvla else inputs.received
        action = action_relevance(inputs.state, weights)
        if inputs.ids is not None:
            action = jnp.take_along_axis(action, inputs.ids, axis=1)
        known = inputs.state["frames"][:, None] > 0
        united = _best(semantic, k, valid)
        if signals != "prefill":
            acted = _best(action, k, valid) & known
            united = united | acted if signals == "both" else jnp.where(known, acted, united)
        return jax.vmap(partial(differing, k=k))(inputs.embeddings, united, valid)

    layers = published_layers(4 if oft else 3) if layer is None else lambda num_layers: (layer,)
    attention = published_layers(15) if as_published else latter_half
    return Pruner(
        name="vlapruner",
        choose=choose,
        needs=frozenset({"embeddings", "state", "last_row" if openvla else "received"}),
        budget=_of_two_views if oft else round_keep if openvla else num_keep,
        cuts=Cuts(layers),
        temporal=action_history(window, attention),
    )


def _of_two_views(n: int, keep_ratio: float) -> int:
    return 2 * round_keep(n // 2, keep_ratio)


def vla_pruner_released(window: int = 3, decay: float = 0.8, signals: Signals = "both") -> Pruner:
    """VLA-Pruner as its code for OpenVLA has it, see the top of this file.

    Args:
        window: As for `vla_pruner`.
        decay: As for `vla_pruner`.
        signals: As for `vla_pruner`.

    Raises:
        ValueError: The window is below 1, the decay outside (0, 1], or there are no such signals.
    """
    released = vla_pruner(None, window, decay, signals, as_published="openvla")
    return replace(released, name="vlapruner_released")


def action_history(window: int, layers) -> Temporal:
    """Action attention of the last frames: {"rows": [B, w, N], newest first, "frames": [B]}."""

    def init(inputs: PrunerInputs) -> State:
        batch, count = inputs.tokens.shape[:2]
        return {"rows": jnp.zeros((batch, window, count)), "frames": jnp.zeros(batch, jnp.int32)}

    def observe(state: State, seen: Seen) -> State:
        rows = jnp.concatenate([seen.action[:, None], state["rows"][:, :-1]], axis=1)
        return {"rows": rows, "frames": jnp.minimum(state["frames"] + 1, window)}

    return Temporal(init, observe, layers, warmup=window)


def action_relevance(state: State, weights: tuple[float, ...]) -> Float[Array, "B N"]:
    """S_act of the frames that there are, by their weights, newest first; zeros without any."""
    weights = jnp.asarray(weights) * (jnp.arange(len(weights)) < state["frames"][:, None])
    total = jnp.maximum(weights.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return jnp.einsum("bwn,bw->bn", state["rows"], weights / total)


def latter_half(num_layers: int) -> tuple[int, ...]:
    """The layers whose action attention counts."""
    return tuple(range(num_layers // 2, num_layers))


def _best(scores: Float[Array, "B N"], k: int, valid: Bool[Array, "B N"]) -> Bool[Array, "B N"]:
    best = top_k(scores, k, valid)
    rows = jnp.arange(len(best))[:, None]
    return jnp.zeros(scores.shape, bool).at[rows, best].set(True)


def differing(
    tokens: Float[Array, "N D"], candidates: Bool[Array, " N"], valid: Bool[Array, " N"], k: int
) -> Int[Array, " K"]:
    """K of at most 2 K candidates, greedily max-min; candidates are gathered before compared."""
    count = len(candidates)
    slots = min(2 * k, count)
    rank = jnp.where(candidates, 0, 1) + jnp.where(valid, 0, 2)
    places = jnp.argsort(rank, stable=True)[:slots]
    real = candidates[places] & valid[places]
    distances = pairwise_distances(unit_tokens(gather_tokens(tokens[None], places[None])[0], real))
    order = farthest_first(distances, most_isolated(distances, real), k, real)
    return places[order]
