import numpy as np
import pytest

from fastdrive_jax.evaluation.compare import difference_rows


def test_rows_carry_the_difference_and_its_p():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 0.0])
    difference, p = difference_rows("ade", 0.5, "ours", a, "random", b, seed=1, unit="m")
    assert (difference.method, difference.metric) == ("ours - random", "ade_difference")
    assert difference.value == pytest.approx(2.0)
    assert difference.low <= 2.0 <= difference.high
    assert (difference.unit, difference.n, difference.seed) == ("m", 3, 1)
    assert (p.metric, p.value) == ("ade_p", pytest.approx(0.25))
