"""Intervals of rates against published values and their own definitions."""

import math

import pytest

from fastdrive_jax.evaluation.proportions import unanimous, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(10, 10, 0.72247, 1.0), (0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341)],
)
def test_known_values(successes, trials, low, high):
    found = wilson(successes, trials)
    assert found.value == successes / trials
    assert found.low == pytest.approx(low, abs=1e-5)
    assert found.high == pytest.approx(high, abs=1e-5)
    assert found.n == trials


def test_at_its_ends_the_rate_is_z_standard_errors_away():
    found, z = wilson(437, 500, level=0.9), 1.6448536269514722
    for end in (found.low, found.high):
        assert abs(found.value - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 500))


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 5)])
def test_what_is_no_rate_is_refused(successes, trials):
    with pytest.raises(ValueError, match="no rate"):
        wilson(successes, trials)


Z = 1.959963984540054


def tango(first, second, pairs, difference):
    """Tango's (1998) statistic, where one or the other alone succeeds in so many pairs."""
    b = -first - second + (2 * pairs - first + second) * difference
    c = -second * difference * (1 - difference)
    second_alone = (math.sqrt(b * b - 8 * pairs * c) - b) / (4 * pairs)
    variance = pairs * (2 * second_alone + difference * (1 - difference))
    return (first - second - pairs * difference) / math.sqrt(variance)


@pytest.mark.parametrize("pairs", [1, 8, 48])
def test_where_all_pairs_say_the_same_it_is_the_score_interval(pairs):
    end = Z**2 / (pairs + Z**2)
    assert unanimous(0.0, pairs, least=-1) == (pytest.approx(-end), pytest.approx(end))
    assert abs(tango(0, 0, pairs, end)) == pytest.approx(Z)
    low, high = unanimous(1.0, pairs, least=-1)
    assert (low, high) == (pytest.approx((pairs - Z**2) / (pairs + Z**2)), 1)
    assert tango(pairs, 0, pairs, low) == pytest.approx(Z)
    assert unanimous(-1.0, pairs, least=-1) == (-1, pytest.approx(-low))


@pytest.mark.parametrize("rate", [0, 1])
def test_of_a_rate_it_is_wilsons(rate):
    found = wilson(12 * rate, 12)
    assert unanimous(float(rate), 12) == (pytest.approx(found.low), pytest.approx(found.high))


def test_unanimous_states_may_be_of_several_outcomes():
    """Of 10 states at +1/2 some 27.8% might have been at -1, or at 1."""
    low, high = unanimous(0.5, 10, least=-1)
    assert low == pytest.approx(0.5 - 0.27753 * 1.5, abs=1e-5)
    assert high == pytest.approx(0.5 + 0.27753 * 0.5, abs=1e-5)
    with pytest.raises(ValueError, match="outside"):
        unanimous(-0.5, 10)
