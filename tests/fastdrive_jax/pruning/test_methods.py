from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder import DecoderLayer
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.pruning import PrunerInputs, keep_indices, make_pruner, pruner_scores
from fastdrive_jax.pruning.position_prior import mean_fractions
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig

SMALL = DecoderConfig(16, 32, 1, 2, 1, 8, mrope_section=(1, 1, 2))
jit_keep_indices = jax.jit(keep_indices, static_argnames=("pruner", "keep_ratio"))
jit_scores = jax.jit(pruner_scores, static_argnames="pruner")


def inputs(batch=4, rows=3, columns=5):
    rng = np.random.default_rng(0)
    return PrunerInputs(
        tokens=rng.normal(size=(batch, rows * columns, 16)).astype(np.float32),
        foreground=rng.random((batch, rows * columns)).astype(np.float32),
        camera=rng.integers(0, 2, (batch, 1)),
        grid=(rows, columns),
    )


def test_published_size_of_reconpruner():
    tokens = jax.ShapeDtypeStruct((1, 4, 2048), jnp.float32)
    shapes = jax.eval_shape(ReconPruner(ReconPrunerConfig()).init, jax.random.key(0), tokens)
    layer = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]["layer"]))
    assert layer == 77_076_992
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == layer + 2048 + 2048


@pytest.fixture(scope="module")
def recon():
    """A small ReconPruner and its parameters, which it has the same with and without positions."""
    config = ReconPrunerConfig(layer=SMALL)
    init = jax.jit(ReconPruner(config).init)
    return make_pruner("reconpruner", config=config), init(jax.random.key(1), inputs().tokens)[
        "params"
    ]


def test_reconpruner_scores_are_the_formula_on_the_layers_output(recon):
    pruner, params = recon
    given = inputs()
    scores = jit_scores(pruner, params, given)
    query = np.broadcast_to(params["query"], (4, 1, 16))
    rows = np.concatenate([query, given.tokens], axis=1)
    layer = jax.jit(DecoderLayer(SMALL, causal=False).apply)
    mixed = np.asarray(layer({"params": params["layer"]}, rows, None)[0])
    want = (mixed[:, 1:] * mixed[:, :1]) @ np.asarray(params["scorer"]["kernel"])[:, 0]
    np.testing.assert_allclose(scores, want, atol=1e-5)


def test_a_batch_is_scored_as_its_samples_are(recon):
    given = inputs()
    together = np.asarray(jit_keep_indices(*recon, given, 0.4))
    for row in range(4):
        one = given.replace(tokens=given.tokens[row : row + 1])
        alone = np.asarray(jit_keep_indices(*recon, one, 0.4))
        np.testing.assert_array_equal(alone[0], together[row])


def test_equal_configs_make_the_method_for_which_a_program_is_compiled_already():
    one, other = (make_pruner("reconpruner", config=ReconPrunerConfig(SMALL)) for _ in range(2))
    assert one == other
    assert one != make_pruner("reconpruner", config=ReconPrunerConfig(SMALL, rope=True))


def test_prior_is_each_cameras_mean_mask():
    fractions = np.array([[1.0, 0.0], [0.0, 0.0], [0.5, 1.0]])
    means = mean_fractions(fractions, np.array([0, 0, 1]))
    np.testing.assert_allclose(means, [[0.5, 0.0], [0.5, 1.0]])
    given = PrunerInputs(tokens=np.zeros((2, 2, 1)), camera=np.array([[1], [0]]))
    scores = jit_scores(make_pruner("prior"), np.asarray(means), given)
    np.testing.assert_allclose(scores, means[[1, 0]])


def test_ground_truth_keeps_most_foreground():
    given = inputs()
    kept = jit_keep_indices(make_pruner("ground_truth"), None, given, 0.2)
    want = np.sort(np.argsort(-given.foreground, axis=1)[:, :3], axis=1)
    np.testing.assert_array_equal(kept, want)


def test_random_draws_by_its_key_and_not_by_the_picture():
    pruner, given = make_pruner("random"), inputs()
    scores = [np.asarray(jit_scores(pruner, None, given, jax.random.key(s))) for s in (0, 0, 1)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).any()


def test_uniform_spreads_over_the_grid():
    given = inputs(rows=8, columns=14)
    kept = np.asarray(jit_keep_indices(make_pruner("uniform"), None, given, 0.25))[0]
    rows, columns = kept // 14, kept % 14
    assert len(kept) == 28
    assert np.histogram(rows, bins=4, range=(0, 8))[0].min() >= 4
    assert np.histogram(columns, bins=7, range=(0, 14))[0].min() >= 2


def test_half_of_a_uniform_grid_is_the_chequerboard():
    given = inputs(batch=1, rows=4, columns=6)
    kept = np.asarray(jit_keep_indices(make_pruner("uniform"), None, given, 0.5))[0]
    assert len(kept) == 12
    assert len({(place // 6 + place % 6) % 2 for place in kept}) == 1


def test_uniform_gives_every_picture_of_a_sample_its_share():
    given = inputs(rows=6, columns=5).replace(grid=(2, 5))  # three pictures of ten tokens
    kept = np.asarray(jit_keep_indices(make_pruner("uniform"), None, given, 0.5))
    np.testing.assert_array_equal(np.bincount(kept[0] // 10), [5, 5, 5])
    with pytest.raises(ValueError, match="whole number of grids"):
        keep_indices(make_pruner("uniform"), None, given.replace(grid=(4, 5)), 0.5)


@pytest.mark.parametrize(
    ("name", "need"),
    [("ground_truth", "foreground"), ("prior", "camera"), ("uniform", "grid")],
)
def test_what_a_method_needs_must_be_given(name, need):
    with pytest.raises(ValueError, match=rf"{name}.*needs {need}"):
        pruner_scores(make_pruner(name), np.ones((2, 15)), inputs().replace(**{need: None}))


def test_random_needs_a_key_and_rope_needs_positions():
    with pytest.raises(ValueError, match="needs key"):
        keep_indices(make_pruner("random"), None, inputs(), 0.5)
    turned = make_pruner("reconpruner", config=ReconPrunerConfig(layer=SMALL, rope=True))
    with pytest.raises(ValueError, match="needs position_ids"):
        keep_indices(turned, None, inputs(), 0.5)


def test_a_misspelt_name_gets_a_hint():
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        make_pruner("unifrom")


def test_a_strange_name_gets_the_list():
    with pytest.raises(
        UserError, match="choose from reconpruner, jointpruner, random, uniform, prior"
    ):
        make_pruner("zzz")


@pytest.mark.parametrize("rope", [False, True])
def test_padding_changes_no_score(recon, rope):
    _, params = recon
    given = inputs(batch=2)
    ids = np.tile(np.arange(15), (3, 2, 1))
    given = given.replace(position_ids=ids, foreground=None)
    pruner = make_pruner("reconpruner", config=ReconPrunerConfig(layer=SMALL, rope=rope))
    want = jit_scores(pruner, params, given)
    for fill in (0.0, 7.0):
        padded = given.replace(
            tokens=np.pad(given.tokens, ((0, 0), (0, 6), (0, 0)), constant_values=fill),
            position_ids=np.pad(ids, ((0, 0), (0, 0), (0, 6))),
            count=np.full(2, 15),
        )
        scores = np.asarray(jit_scores(pruner, params, padded))[:, :15]
        np.testing.assert_allclose(scores, want, atol=1e-5)


def test_programs_of_a_method_serve_it_when_it_is_made_again():
    """Equal methods are one object, those with other settings are not."""
    config = ReconPrunerConfig(layer=SMALL)
    again = ReconPrunerConfig(layer=replace(SMALL))
    assert make_pruner("reconpruner", config=config) is make_pruner("reconpruner", config=again)
    assert make_pruner("fastv") is make_pruner("fastv")
    assert make_pruner("fastv", layer=2) is not make_pruner("fastv")
    assert make_pruner("prune2drive", weights=[1.0, 2.0]).name == "prune2drive"
    with pytest.raises(TypeError, match="wide"):
        make_pruner("fastv", wide=[2])
