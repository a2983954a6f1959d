"""Control: tokens evenly spaced over the picture, whatever it shows."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fastdrive_jax.pruning.interface import Pruner, PrunerInputs


def dither_order(grid: tuple[int, int]) -> Float[np.ndarray, " N"]:
    """Rank [N] in which grid places are taken, from the matrix of ordered dithering (Bayer 1973).

    Any number of first places is evenly spread over rows and columns: a quarter are every second
    row and column, a half the chequerboard.
    """
    ranks = np.zeros((1, 1), np.int64)
    while len(ranks) < max(grid):
        ranks = np.block([[4 * ranks, 4 * ranks + 2], [4 * ranks + 3, 4 * ranks + 1]])
    taken = ranks[: grid[0], : grid[1]].reshape(-1)
    return np.argsort(np.argsort(taken)).astype(np.float32)


def uniform_grid() -> Pruner:
    """Every picture of a sample gets the same share of tokens, up to one."""

    def score(params, inputs: PrunerInputs, key):
        batch, count = inputs.tokens.shape[:2]
        order = dither_order(inputs.grid)
        pictures, rest = divmod(count, len(order))
        if rest:
            raise ValueError(f"{count} tokens are no whole number of grids {inputs.grid}")
        # Pictures take turns, so that a budget that does not divide leaves none out.
        turns = order[None] * pictures + np.arange(pictures, dtype=np.float32)[:, None]
        return jnp.broadcast_to(-turns.reshape(-1), (batch, count))

    return Pruner(name="uniform", score=score, needs=frozenset({"tokens", "grid"}))
