"""PyramidDrop (arXiv 2410.17247): tokens leave in stages, for deep layers need fewer of them.

On entering layer l, with A the attention of that layer itself, made from the hidden states that
enter it, and q the last token of the instruction:

    s_j = mean over heads h of A_l[h, q, j]

Published: layers 8, 16 and 24 of 32, each leaving half of what it finds: N/2, N/4, N/8. Here the
keep ratio r is what the last stage leaves, and all stages keep the same share: N r^(1/3),
N r^(2/3), N r. So r = 0.125 is the published setting.

The released code numbers positions anew after each stage, which `as_published` takes over;
otherwise kept tokens keep their position ids. Its ranking in training, by the mean of all tokens
that precede an answer, is left out.
"""

from functools import partial

import jax.numpy as jnp

from fastdrive_jax.pruning.interface import Cuts, Pruner, PrunerInputs, published_layers
from fastdrive_jax.pruning.select import falling_keep


def pyramid_drop(as_published: bool = False) -> Pruner:
    """PyramidDrop as a method.

    Args:
        as_published: Positions are given out anew behind each stage.
    """

    def score(params, inputs: PrunerInputs, key):
        return jnp.mean(inputs.last_row, axis=1)

    return Pruner(
        name="pyramiddrop",
        score=score,
        needs=frozenset({"last_row"}),
        cuts=Cuts(published_layers(8, 16, 24), partial(falling_keep, cuts=3), own_rows=True),
        renumber=as_published,
    )
