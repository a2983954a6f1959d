"""Draws by one key for a batch, or by each sample's own."""

import jax
import numpy as np
import pytest

from fastdrive_jax.pruning import PrunerInputs, make_pruner
from fastdrive_jax.pruning.budgets import per_camera
from fastdrive_jax.pruning.draws import fold, gumbel, is_per_sample, normal, uniform
from fastdrive_jax.pruning.interface import keep_tokens

KEYS = jax.random.split(jax.random.key(3), 4)


def test_one_key_draws_as_jax_does():
    for key in (jax.random.key(1), jax.random.PRNGKey(1)):
        assert not is_per_sample(key)
        np.testing.assert_array_equal(uniform(key, (4, 5)), jax.random.uniform(key, (4, 5)))
        for have, want in ((fold(key, 2), jax.random.fold_in(key, 2)),):
            np.testing.assert_array_equal(jax.random.uniform(have), jax.random.uniform(want))
    assert fold(None, 2) is None


def test_a_sample_draws_the_same_whatever_stands_beside_it():
    for keys in (KEYS, jax.random.key_data(KEYS)):
        assert is_per_sample(keys)
        every, some = uniform(fold(keys, 1), (4, 6)), uniform(fold(keys[1:3], 1), (2, 6))
        np.testing.assert_array_equal(every[1:3], some)
        assert len(np.unique(every)) == 24
        parts = uniform(keys, (8, 3))  # two parts of each sample
        np.testing.assert_array_equal(parts[2:4], uniform(keys[1:2], (2, 3)))


@pytest.mark.parametrize(
    ("name", "cameras"), [("random", False), ("random", True), ("prune2drive", False)]
)
def test_methods_that_draw_take_a_key_of_each_sample(name, cameras):
    tokens = np.random.default_rng(0).normal(size=(4, 24, 8)).astype(np.float32)
    inputs = PrunerInputs(tokens=tokens, camera=np.tile(np.arange(2), (4, 1)), grid=(3, 4))
    pruner = per_camera(make_pruner(name), 2) if cameras else make_pruner(name)
    run = jax.jit(lambda inputs, keys: keep_tokens(pruner, None, inputs, 8, keys).indices)
    whole = np.asarray(run(inputs, KEYS))
    for sample in range(4):
        alone = jax.tree.map(lambda x, sample=sample: x[sample : sample + 1], inputs)
        found = np.asarray(run(alone, KEYS[sample : sample + 1]))
        np.testing.assert_array_equal(found[0], whole[sample])
    if name == "random":
        assert len({tuple(row) for row in whole.tolist()}) > 1


@pytest.mark.parametrize("draw", [normal, gumbel])
def test_other_draws_are_jaxs_of_each_key(draw):
    jaxs = getattr(jax.random, draw.__name__)
    np.testing.assert_array_equal(draw(KEYS[0], (4, 5)), jaxs(KEYS[0], (4, 5)))
    whole = draw(KEYS, (8, 5))
    for sample, key in enumerate(KEYS):
        np.testing.assert_array_equal(whole[2 * sample : 2 * sample + 2], jaxs(key, (2, 5)))
