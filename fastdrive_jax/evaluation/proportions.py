"""How sure a success rate is."""

import math
from statistics import NormalDist

from fastdrive_jax.evaluation.bootstrap import Interval


def wilson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """A success rate with Wilson's score interval (1927).

    It stays within [0, 1] and has a width where all trials succeed or none does, where a
    bootstrap has none.

    Args:
      successes: number of independent trials that succeeded.
      trials: number of all.
      level: coverage of the interval.

    Raises:
      ValueError: there is no trial, or there are more successes than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials are no rate")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    rate = successes / trials
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = math.sqrt(z2 * (rate * (1 - rate) / trials + z2 / (4 * trials**2)))
    half = spread / (1 + z2 / trials)
    # The ends are exactly 0 and 1 where rounding would leave a last bit.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(rate, low, high, trials, trials)
