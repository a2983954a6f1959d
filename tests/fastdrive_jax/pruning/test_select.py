import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.pruning.select import gather_position_ids, gather_tokens, num_keep, top_k


@pytest.mark.parametrize(
    ("n", "ratio", "k"),
    [
        (3249, 0.75, 2436),
        (3249, 0.5, 1624),
        (3249, 0.25, 812),
        (100, 0.29, 29),
        (3, 0.1, 1),
        (7, 1.0, 7),
    ],
)
def test_num_keep_is_the_published_floor(n, ratio, k):
    assert num_keep(n, ratio) == k


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.2, float("nan")])
def test_num_keep_refuses_ratios_outside(ratio):
    with pytest.raises(UserError, match="keep_ratio"):
        num_keep(10, ratio)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_top_k_equals_a_stable_sort_with_ties_and_padding(k):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (6, 12)).astype(np.float32)  # many ties
    valid = rng.random((6, 12)) < 0.7
    got = np.asarray(top_k(jnp.asarray(scores), k, jnp.asarray(valid)))
    for row in range(6):
        order = sorted(range(12), key=lambda i: (not valid[row, i], -scores[row, i], i))
        if valid[row].sum() >= k:
            np.testing.assert_array_equal(got[row], sorted(order[:k]))
        else:  # all real tokens are there, whatever fills the rest
            assert set(np.flatnonzero(valid[row])) <= set(got[row])


def test_padding_never_comes_before_a_real_token_whatever_that_scores():
    scores = jnp.array([[9.0, -jnp.inf, 9.0, -3.0]])
    valid = jnp.array([[False, True, False, True]])
    np.testing.assert_array_equal(top_k(scores, 2, valid), [[1, 3]])


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000])  # without and with the sign bit
def test_what_is_no_number_is_the_lowest_score_and_comes_before_padding(bits):
    nan = np.array(bits, np.uint32).view(np.float32)
    scores = jnp.array([[nan, -3.0, nan, 5.0, nan, 0.0]])
    valid = jnp.array([[False, True, True, True, True, False]])
    for k, want in ((2, [1, 3]), (3, [1, 2, 3]), (4, [1, 2, 3, 4])):
        np.testing.assert_array_equal(top_k(scores, k, valid), [want])
    np.testing.assert_array_equal(top_k(scores, 3), [[1, 3, 5]])


@pytest.mark.parametrize("k", [0, 5])
def test_top_k_refuses_a_k_outside_the_row(k):
    with pytest.raises(ValueError, match="k must be"):
        top_k(jnp.zeros((1, 4)), k)


def test_gathers_keep_each_token_with_its_own_ids():
    tokens = jnp.arange(24.0).reshape(2, 4, 3)
    ids = jnp.arange(24).reshape(3, 2, 4)
    kept = jnp.array([[0, 3], [1, 2]])
    np.testing.assert_array_equal(gather_tokens(tokens, kept)[1], tokens[1, 1:3])
    np.testing.assert_array_equal(gather_position_ids(ids, kept)[:, 0], ids[:, 0, [0, 3]])


def test_one_compilation_serves_all_pictures():
    traces = []

    @jax.jit
    def choose(scores):
        traces.append(1)
        return top_k(scores, 3)

    for seed in range(4):
        choose(jax.random.normal(jax.random.key(seed), (2, 9)))
    assert len(traces) == 1
