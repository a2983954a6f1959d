"""Mistakes in a method of one's own, each of which must name the method and say what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.pruning import Pruner, PrunerInputs, keep_indices, make_pruner, pruner_scores
from fastdrive_jax.pruning.interface import keep_tokens
from fastdrive_jax.pruning.mistakes import check_kept

INPUTS = PrunerInputs(tokens=jnp.zeros((2, 6, 4)))


def test_a_need_that_there_is_not():
    with pytest.raises(UserError, match=r"'mine' needs pixel, .*choose from .*pixels"):
        Pruner(name="mine", score=None, needs=frozenset({"tokens", "pixel"}))


def test_scores_of_another_shape():
    short = Pruner(name="short", score=lambda params, inputs, key: inputs.tokens[:, 1:, 0])
    with pytest.raises(UserError, match=r"'short' gave scores \(2, 5\), .*\[B, N\] is \(2, 6\)"):
        pruner_scores(short, None, INPUTS)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda k: jnp.zeros((2, k + 1), int), r"chose indices \(2, 4\), .*\[B, K\] is \(2, 3\)"),
        (lambda k: (jnp.zeros((2, k), int),), r"chose indices tuple"),
        (lambda k: jnp.zeros((2, k)), r"type float32; give integers"),
    ],
)
def test_indices_of_another_kind(answer, message):
    wrong = Pruner(name="wrong", choose=lambda params, inputs, key, k: answer(k))
    with pytest.raises(UserError, match=f"'wrong' .*{message}"):
        keep_tokens(wrong, None, INPUTS, 3)


def test_merged_tokens_of_another_shape():
    def merge(params, inputs, key, k):
        return jnp.tile(jnp.arange(k), (2, 1)), inputs.tokens

    with pytest.raises(UserError, match=r"'m' merged into tokens \(2, 6, 4\), .* is \(2, 3, 4\)"):
        keep_tokens(Pruner(name="m", merge=merge), None, INPUTS, 3)


@pytest.mark.parametrize(
    "read",
    [
        lambda inputs: inputs.pixels.mean(-1),
        lambda inputs: jnp.var(inputs.pixels, axis=-1),
        lambda inputs: 2 * inputs.relevance,
        lambda inputs: inputs.text[:, 0],
    ],
)
def test_what_is_read_but_not_declared(read):
    reads = Pruner(name="reads", score=lambda params, inputs, key: read(inputs))
    with pytest.raises(UserError, match=r"'reads' stumbles over .*None.* which is tokens: add"):
        keep_indices(reads, None, INPUTS, 0.5)


def test_other_errors_stay_what_they_are():
    def score(params, inputs, key):
        raise TypeError("something else")

    with pytest.raises(TypeError, match="something else"):
        pruner_scores(Pruner(name="mine", score=score), None, INPUTS)


def test_one_draw_with_the_keys_of_samples():
    draws = Pruner(
        name="drawn",
        score=lambda params, inputs, key: jax.random.gumbel(key, inputs.tokens.shape[:2]),
        needs=frozenset({"tokens", "key"}),
    )
    assert keep_indices(draws, None, INPUTS, 0.5, jax.random.key(0)).shape == (2, 3)
    with pytest.raises(UserError, match=r"'drawn' .*each sample has its own.*pruning\.draws"):
        keep_indices(draws, None, INPUTS, 0.5, jax.random.split(jax.random.key(0)))


def test_a_function_that_returns_no_pruner(tmp_path):
    (tmp_path / "mine.py").write_text("def three():\n    return 3\n")
    with pytest.raises(UserError, match=r"mine\.py:three returns 3; let it return"):
        make_pruner(f"{tmp_path}/mine.py:three")


def test_kept_tokens_are_different_ones_of_all():
    check_kept(np.array([[0, 2, 5], [1, 2, 3]]), 6, "mine", 0.5)
    check_kept(np.zeros((2, 0), int), 6, "mine", 0.5)
    for kept in ([[0, 1, 6]], [[-1, 0, 1]], [[0, 1, 2], [3, 4, 7]]):
        with pytest.raises(UserError, match=r"'mine' at a keep ratio of 0\.5 .*there are not: N"):
            check_kept(np.array(kept), 6, "mine", 0.5)
    with pytest.raises(UserError, match=r"'mine' at .* keeps a token twice"):
        check_kept(np.array([[0, 1, 2], [3, 3, 4]]), 6, "mine", 0.5)
