import numpy as np
import pytest

from fastdrive_jax.evaluation.compare import difference_rows, holm_rows
from fastdrive_jax.evaluation.results import point


def test_rows_carry_the_difference_and_its_p():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 0.0])
    difference, p = difference_rows("ade", 0.5, "ours", a, "random", b, seed=1, unit="m")
    assert (difference.method, difference.metric) == ("ours - random", "ade_difference")
    assert difference.value == pytest.approx(2.0)
    assert difference.low <= 2.0 <= difference.high
    assert (difference.unit, difference.n, difference.seed) == ("m", 3, 1)
    assert (p.metric, p.value) == ("ade_p", pytest.approx(0.25))


def test_a_family_of_tests_is_corrected_together():
    family = [point(name, 0.5, "ade_p", p, n=9) for name, p in (("a", 0.04), ("b", 0.01))]
    found = holm_rows(family)
    assert [(row.method, row.metric) for row in found] == [("a", "ade_p_holm"), ("b", "ade_p_holm")]
    assert [row.value for row in found] == pytest.approx([0.04, 0.02])
