"""SpecPrune-VLA (arXiv 2509.05614) with a fixed budget: what moves, what matters, what mattered.

The released code keeps, behind each of layers 0 and 1 of 32, a union whose size the picture sets:

    tokens that changed  |  a tokens by attention  |  tokens of the step before

- changed: the cosine of the token's pixels, 0 for black, to those of the frame before is below
  0.986;
- attention: mean over heads and instruction rows of the layer just left. On the first cut 3a
  tokens, on the second a of that layer and again a of layer 0; a is 28 of 512 tokens, 44 in the
  mode for slow, precise motion;
- step before: empty in the released code; here what the last frame kept to the end.

A program of fixed shape needs a fixed K. So the terms of the union become tiers in that order, the
rest comes last, each tier is ordered by attention, and the first K tokens stay. Where the union has
K tokens, they are those of the union. Without a frame before, attention alone decides. The last cut
leaves K tokens and the first a more, since of 3a tokens by attention 2a may stay.

Left out: a of layer 0 on the second cut, which sees its own layer's attention only; the bound on
unchanged tokens (200 of 256 in a view), which the budget replaces; a's division between the two
views of a robot; further pruning by layer and skipping of layers, both off by default; and the
switch between modes by speed, for which `attended` may be set. The released second cut takes places
among the tokens left for places in the picture; here they are what they should be.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fastdrive_jax.pruning.frames import pixel_cosine
from fastdrive_jax.pruning.interface import (
    Cuts,
    Pruner,
    PrunerInputs,
    Seen,
    Temporal,
    published_layers,
    real_tokens,
)
from fastdrive_jax.pruning.select import gather_tokens, num_keep


class LastFrame(flax.struct.PyTreeNode):
    """What is remembered of the frame before, over the tokens before all cuts.

    Attributes:
        pixels: Its pixels [B, N, P].
        kept: Tokens that it kept to the end [B, N].
        known: Whether there was one [B].
    """

    pixels: Float[Array, "B N P"]
    kept: Bool[Array, "B N"]
    known: Bool[Array, " B"]


def spec_prune(static: float = 0.986, attended: float = 28 / 512) -> Pruner:
    """SpecPrune-VLA as a method.

    Args:
        static: Cosine from which a token's pixels count as unchanged.
        attended: Share of all tokens that attention alone may name, a / N.
    """

    def score(params, inputs: PrunerInputs, key):
        length = inputs.tokens.shape[1]
        rank = jnp.argsort(jnp.argsort(-_attention(inputs)))  # stable: ties to the lower index
        named = round(attended * inputs.state.kept.shape[1]) * (3 if inputs.cut == 0 else 1)
        before, kept = inputs.state.pixels, inputs.state.kept
        if inputs.ids is not None:
            before = gather_tokens(before, inputs.ids)
            kept = jnp.take_along_axis(kept, inputs.ids, axis=1)
        changed = inputs.state.known[:, None] & (pixel_cosine(inputs.pixels, before) < static)
        tier = jnp.where(changed, 0, jnp.where(rank < named, 1, jnp.where(kept, 2, 3)))
        # Whole numbers, so that no tier swallows the order within it.
        return -(tier * length + rank).astype(jnp.float32)

    def budgets(n: int, keep_ratio: float) -> tuple[int, ...]:
        k = num_keep(n, keep_ratio)
        return min(n, k + round(attended * n)), k

    return Pruner(
        name="specprune",
        score=score,
        needs=frozenset({"text_rows", "pixels", "state"}),
        cuts=Cuts(published_layers(1, 2), budgets),
        temporal=Temporal(init=_no_frame, observe=_observed),
    )


def _attention(inputs: PrunerInputs) -> Float[Array, "B N"]:
    """Attention from the instruction, summed over heads and rows; padding comes last."""
    rows = inputs.text_rows
    if inputs.text_valid is not None:
        rows = jnp.where(inputs.text_valid[:, None, :, None], rows, 0)
    return jnp.where(real_tokens(inputs), jnp.sum(rows, axis=(1, 2)), -jnp.inf)


def _no_frame(inputs: PrunerInputs) -> LastFrame:
    batch, length = inputs.pixels.shape[:2]
    return LastFrame(
        pixels=jnp.zeros_like(inputs.pixels),
        kept=jnp.zeros((batch, length), bool),
        known=jnp.zeros(batch, bool),
    )


def _observed(state: LastFrame, seen: Seen) -> LastFrame:
    return LastFrame(pixels=seen.pixels, kept=seen.kept, known=jnp.ones_like(state.known))
