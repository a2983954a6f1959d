"""FastV (arXiv 2403.06764): tokens that the last word of the prompt attends to.

On entering layer K, with A the attention of the layer before and q the prompt's last token:

    s_j = mean over heads h of A_{K-1}[h, q, j]

The best leave layer K on; layers 0 to K-1 see all. Published: K = 2 of 32 layers, half of the
tokens, in the paper and its table of latencies; K = 3 in the released demo. The paper speaks of the
mean attention a token receives, the released code takes the last row, and so does this.

The released code ranks the first sample of a batch only, for all, and keeps `round(N (1 - R))`;
here each sample is ranked by itself, and `as_published` takes over the rounding. Kept tokens keep
their position ids in both.
"""

import jax.numpy as jnp

from fastdrive_jax.pruning.interface import Cuts, Pruner, PrunerInputs, published_layers
from fastdrive_jax.pruning.select import num_keep, round_keep


def fast_v(layer: int | None = None, as_published: bool = False) -> Pruner:
    """FastV as a method.

    Args:
        layer: K, the layer on entering which tokens leave; None is the published relative depth.
        as_published: round(N * keep_ratio) tokens, at least 1, instead of the floor.
    """

    def score(params, inputs: PrunerInputs, key):
        return jnp.mean(inputs.last_row, axis=1)

    def layers(num_layers: int) -> tuple[int, ...]:
        if layer is not None:
            return (layer,)
        (scaled,) = published_layers(2)(num_layers)
        # Layer 0 hardly tells tokens apart, so that shallow models read layer 1 where they can.
        return (max(scaled, min(2, num_layers - 1)),)

    return Pruner(
        name="fastv",
        score=score,
        needs=frozenset({"last_row"}),
        budget=round_keep if as_published else num_keep,
        cuts=Cuts(layers=layers),
    )
