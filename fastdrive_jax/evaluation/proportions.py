"""How sure a success rate is, or the difference of two."""

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


def unanimous(
    value: float, states: int, least: float = 0.0, level: float = 0.95
) -> tuple[float, float]:
    """The interval of a mean within [least, 1] that is the same in every state.

    A bootstrap over such states has no width, however few they are. Here a share of all states may
    differ, as large as Wilson's interval of none in `states` allows, and be anything. Of a rate of
    0 or 1 this is Wilson's own interval, and of a difference of paired outcomes, one pair a state,
    Tango's score interval (1998): of none of n pairs that disagree +-z^2 / (n + z^2).

    Args:
      value: the mean of each state.
      states: number of independent states.
      least: -1 for a difference of rates.
      level: coverage of the interval.

    Returns:
      Its ends.

    Raises:
      ValueError: the mean is outside, or there is no state.
    """
    if not least <= value <= 1:
        raise ValueError(f"{value} is outside [{least}, 1]")
    share = wilson(0, states, level).high
    return value - share * (value - least), value + share * (1 - value)
