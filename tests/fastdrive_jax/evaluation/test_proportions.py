"""Wilson's interval against published values and its own definition."""

import math

import pytest

from fastdrive_jax.evaluation.proportions import wilson


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
