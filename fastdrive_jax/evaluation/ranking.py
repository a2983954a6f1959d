"""The order of several methods on the same samples, and how sure each place is."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Num

from fastdrive_jax.evaluation.bootstrap import RESAMPLES

RANK = "rank"


def rank_intervals(
    values: Mapping[str, Float[np.ndarray, " S"]],
    clusters: Num[np.ndarray, " S"],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
    """(rank, lower, upper end) of each method, 1 is the least mean.

    All methods see the same redrawn scenes, so that what makes a scene hard for all of them does
    not blur their order. Equal means share the mean of their places.

    Args:
      values: method to one figure a sample, the lower the better, all finite.
      clusters: [S] scene of each sample.
      resamples: number of bootstrap draws.
      level: coverage of the intervals.
      seed: of the draws.

    Raises:
      ValueError: a value is not finite, or there is one scene only.
    """
    table = np.stack([np.asarray(x, np.float64) for x in values.values()])  # [methods, S]
    if not np.isfinite(table).all():
        raise ValueError("values must be finite: leave invalid samples out first")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    count = index.max() + 1
    if count < 2:
        raise ValueError("an order's certainty needs more than one scene")
    sums = np.stack([np.bincount(index, weights=row, minlength=count) for row in table])
    sizes = np.bincount(index, minlength=count)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)  # [resamples, scenes]
    means = (drawn @ sums.T) / (drawn @ sizes)[:, None]
    tail = (1 - level) / 2
    low, high = np.quantile(_ranks(means), [tail, 1 - tail], axis=0)
    here = _ranks(table.mean(axis=1)[None])[0]
    return {name: (float(here[k]), float(low[k]), float(high[k])) for k, name in enumerate(values)}


def _ranks(means: Float[np.ndarray, "R M"]) -> Float[np.ndarray, "R M"]:
    below = (means[:, None, :] < means[:, :, None]).sum(axis=2)
    equal = (means[:, None, :] == means[:, :, None]).sum(axis=2)
    return below + (equal + 1) / 2
