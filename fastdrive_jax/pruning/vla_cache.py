"""VLA-Cache (arXiv 2502.02175) with a fixed budget: what did not change is not computed again.

All N visual tokens stay in sight of all layers. From the first reuse layer on only some are
computed; the others' keys and values are those of the last frame (`inference.reuse`). In the
released code a token is reused if it is static and not task-relevant:

- static: the cosine of its pixels, 0 for black, to those of the frame before is at least 0.996;
  of such tokens the 130 of 256 that are most alike;
- task-relevant: among the 120 of 256 with most attention from the text in the step before, in layer
  15 of 32, mean over heads and text rows.

So this is the order in which tokens are computed: those that changed, then the static ones, both by
attention. The first M = N r of it are, r being the keep ratio. Where the release computes M tokens
they are these, unless it found more than 130 static ones: M itself bounds how many are reused.

At each of layers 2, 6, 9 and 11 the release stops computing a share of the reusable tokens, which
follows from the entropy of all layers' attention in the step before and may only grow. Such counts
depend on data, and its maps are what fused kernels avoid, so here all four keep the same share of
what they find: N r^(1/4), N r^(1/2), N r^(3/4), N r. For the same reason the release's own counts
have no setting: no fixed M gives them.

A sample without a frame before has no keys to reuse; that all its tokens are computed is for the
caller to see to.
"""

from functools import partial

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

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
from fastdrive_jax.pruning.select import falling_keep, gather_tokens


class LastFrame(flax.struct.PyTreeNode):
    """What is remembered of the frame before besides keys and values.

    Of 3,249 tokens of 28 x 28 pixels that is 31 MB a sample, next to 114 MB of keys and values.

    Attributes:
        pixels: Its pixels [B, N, P].
        text: Attention from its text [B, N].
    """

    pixels: Float[Array, "B N P"]
    text: Float[Array, "B N"]


def vla_cache(static: float = 0.996, layers: tuple[int, ...] = (2, 6, 9, 11)) -> Pruner:
    """VLA-Cache as a method.

    Args:
        static: Cosine from which a token's pixels count as unchanged.
        layers: Of 32, on entering which fewer tokens are computed.
    """

    def score(params, inputs: PrunerInputs, key):
        length = inputs.tokens.shape[1]
        before, attention = inputs.state.pixels, inputs.state.text
        if inputs.ids is not None:
            before = gather_tokens(before, inputs.ids)
            attention = jnp.take_along_axis(attention, inputs.ids, axis=1)
        attention = jnp.where(real_tokens(inputs), attention, -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-attention))  # stable: ties to the lower index
        tier = jnp.where(pixel_cosine(inputs.pixels, before) < static, 0, 1)
        # Whole numbers, so that no tier swallows the order within it.
        return -(tier * length + rank).astype(jnp.float32)

    return Pruner(
        name="vlacache",
        score=score,
        needs=frozenset({"pixels", "state"}),
        cuts=Cuts(published_layers(*layers), partial(falling_keep, cuts=len(layers))),
        temporal=Temporal(_no_frame, _observed, text_layers=published_layers(15)),
        reuse=True,
    )


def _no_frame(inputs: PrunerInputs) -> LastFrame:
    return LastFrame(jnp.zeros_like(inputs.pixels), jnp.zeros(inputs.pixels.shape[:2]))


def _observed(state: LastFrame, seen: Seen) -> LastFrame:
    return LastFrame(seen.pixels, seen.text)
