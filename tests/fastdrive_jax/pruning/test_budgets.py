import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.pruning import (
    PRUNERS,
    Pruner,
    PrunerInputs,
    builds_on_recon,
    keep_indices,
    make_pruner,
)
from fastdrive_jax.pruning.budgets import (
    camera_budgets,
    per_camera,
    pictures_of,
    slice_tokens,
    split_pictures,
)
from fastdrive_jax.pruning.interface import Cuts, Temporal, keep_tokens
from fastdrive_jax.pruning.recon_pruner import ReconPruner

GRID, CAMERAS, BATCH, DIM = (2, 5), 3, 4, 8
LENGTH = CAMERAS * GRID[0] * GRID[1]
WEIGHTS = (3.0, 1.0, 0.5)
jit_keep_tokens = jax.jit(keep_tokens, static_argnames=("pruner", "k"))
jit_keep_indices = jax.jit(keep_indices, static_argnames=("pruner", "keep_ratio"))


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    return PrunerInputs(
        tokens=rng.normal(size=(BATCH, LENGTH, DIM)).astype(np.float32),
        foreground=rng.integers(0, 6, (BATCH, LENGTH)).astype(np.float32),  # ties
        position_ids=rng.integers(0, 9, (3, BATCH, LENGTH)),
        text_rows=rng.random((BATCH, 2, 4, LENGTH)).astype(np.float32),
        camera=np.tile(np.arange(CAMERAS), (BATCH, 1)),
        grid=GRID,
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("k", [3, 10, LENGTH])
def test_each_camera_keeps_its_best(k, weights):
    inputs = drawn()
    method = per_camera(make_pruner("ground_truth"), CAMERAS, weights)
    got = np.asarray(jit_keep_tokens(method, None, inputs, k).indices)
    budgets = camera_budgets(k, 10, weights or (1.0,) * CAMERAS)
    for row, scores in zip(got, inputs.foreground, strict=True):
        want = []
        for camera, budget in enumerate(budgets):
            best = np.argsort(-scores[10 * camera : 10 * camera + 10], kind="stable")[:budget]
            want.extend(np.sort(10 * camera + best))
        np.testing.assert_array_equal(row, want)


def test_methods_that_choose_see_one_camera_at_a_time():
    inputs = drawn()
    method = make_pruner("divprune")
    got = jit_keep_tokens(per_camera(method, CAMERAS), None, inputs, 12).indices
    pictures = np.split(inputs.tokens, CAMERAS, axis=1)
    alone = [jit_keep_tokens(method, None, PrunerInputs(one), 4).indices for one in pictures]
    places = 10 * np.arange(CAMERAS)[:, None, None] + np.stack(alone)
    np.testing.assert_array_equal(got, np.concatenate(places, axis=1))


def test_merging_stays_within_a_camera():
    def merge(params, inputs, key, k):
        """All tokens' mean, k times."""
        mean = inputs.tokens.mean(axis=1, keepdims=True)
        return jnp.broadcast_to(jnp.arange(k), (BATCH, k)), jnp.repeat(mean, k, axis=1)

    inputs = drawn()
    kept = jit_keep_tokens(per_camera(Pruner(name="mean", merge=merge), CAMERAS), None, inputs, 6)
    np.testing.assert_array_equal(kept.indices, [[0, 1, 10, 11, 20, 21]] * BATCH)
    want = inputs.tokens.reshape(BATCH, CAMERAS, 10, DIM).mean(axis=2)
    np.testing.assert_allclose(kept.tokens[:, ::2], want, atol=1e-6)


def test_a_second_cut_finds_each_camera_where_the_first_left_it():
    inputs = drawn()
    method = per_camera(make_pruner("ground_truth"), CAMERAS, WEIGHTS)
    first = jit_keep_tokens(method, None, inputs, 15)
    again = PrunerInputs(
        tokens=first.tokens,
        foreground=np.take_along_axis(inputs.foreground, first.indices, axis=1),
        ids=first.indices,
        grid=GRID,
    )
    second = jit_keep_tokens(method, None, again, 6)
    ids = np.take_along_axis(np.asarray(first.indices), np.asarray(second.indices), axis=1)
    np.testing.assert_array_equal(ids, jit_keep_tokens(method, None, inputs, 6).indices)


def test_slices_of_all_that_is_known_of_tokens():
    inputs = drawn().replace(count=np.array([30, 17, 12, 5]))
    part = jax.jit(slice_tokens, static_argnums=(1, 2))(inputs, 10, 20)
    np.testing.assert_array_equal(part.tokens, inputs.tokens[:, 10:20])
    np.testing.assert_array_equal(part.position_ids, inputs.position_ids[..., 10:20])
    np.testing.assert_array_equal(part.text_rows, inputs.text_rows[..., 10:20])
    np.testing.assert_array_equal(part.count, [10, 7, 2, 0])


def test_pictures_as_samples():
    inputs = drawn()
    split = split_pictures(inputs)
    assert split.tokens.shape == (BATCH * CAMERAS, 10, DIM)
    np.testing.assert_array_equal(split.tokens[4], inputs.tokens[1, 10:20])
    np.testing.assert_array_equal(split.foreground[5], inputs.foreground[1, 20:])
    np.testing.assert_array_equal(split.position_ids[:, 4], inputs.position_ids[:, 1, 10:20])
    np.testing.assert_array_equal(split.camera[:, 0], [0, 1, 2] * BATCH)


def test_the_text_goes_with_every_picture():
    text = np.random.default_rng(0).normal(size=(BATCH, 6, DIM)).astype(np.float32)
    split = split_pictures(drawn().replace(text=text, text_valid=text[..., 0] > 0))
    assert split.text.shape == (BATCH * CAMERAS, 6, DIM)
    for picture in range(BATCH * CAMERAS):
        np.testing.assert_array_equal(split.text[picture], text[picture // CAMERAS])
        valid = text[picture // CAMERAS, :, 0] > 0
        np.testing.assert_array_equal(split.text_valid[picture], valid)


def test_the_prior_of_each_camera_is_its_own():
    means = np.random.default_rng(0).random((CAMERAS, 10), np.float32)
    order = np.array([2, 0, 1])
    inputs = drawn().replace(camera=np.tile(order, (BATCH, 1)))
    got = jit_keep_tokens(per_camera(make_pruner("prior"), CAMERAS), means, inputs, 9).indices
    best = np.argsort(-means[order], axis=1)[:, :3]
    want = np.sort(10 * np.arange(CAMERAS)[:, None] + best, axis=1).reshape(-1)
    np.testing.assert_array_equal(got, [want] * BATCH)


@pytest.fixture(scope="module")
def seen(small_pruner):
    """All that methods look at, and a ReconPruner's parameters."""
    cameras, n, dim = 2, 6, small_pruner.layer.hidden_size
    rng, length, rows = np.random.default_rng(0), cameras * n, (2, cameras * n)
    tokens = rng.normal(size=(2, length, dim)).astype(np.float32)
    inputs = PrunerInputs(
        tokens=tokens,
        position_ids=np.zeros((3, *rows), np.int32),
        text=rng.normal(size=(2, 3, dim)).astype(np.float32),
        foreground=np.ones(rows, np.float32),
        relevance=rng.normal(size=rows).astype(np.float32),
        camera=np.tile(np.arange(cameras), (2, 1)),
        embeddings=tokens,
        last_row=np.ones((2, 2, length), np.float32),
        text_rows=np.ones((2, 2, 3, length), np.float32),
        received=np.ones(rows, np.float32),
        vision_received=np.ones(rows, np.float32),
        vision_keys=tokens,
        pixels=tokens,
        grid=(2, 3),
    )
    return inputs, jax.jit(ReconPruner(small_pruner).init)(jax.random.key(0), tokens)["params"]


@pytest.mark.parametrize("name", PRUNERS)
def test_every_method_may_have_a_budget_for_each_camera(name, small_pruner, seen):
    inputs, recon_params = seen
    params, settings = None, {}
    if builds_on_recon(name):
        params, settings = recon_params, {"config": small_pruner}
    if name == "prior":
        params = np.ones((2, 6), np.float32)
    method = make_pruner(name, **settings)
    if method.temporal is not None:
        inputs = inputs.replace(state=jax.jit(method.temporal.init)(inputs))
    each = jit_keep_tokens(per_camera(method, 2), params, inputs, 6, jax.random.key(0))
    kept = np.asarray(each.indices)
    np.testing.assert_array_equal((kept < 6).sum(axis=1), [3, 3])
    assert all(len(set(row)) == 6 for row in kept)


def test_what_makes_no_sense_is_refused():
    for weights in ((1.0, 2.0), (1.0, -1.0, 1.0), (0.0, 0.0, 0.0), (1.0, float("nan"), 1.0)):
        with pytest.raises(ValueError, match="weights must be 3"):
            per_camera(make_pruner("ground_truth"), CAMERAS, weights)
    with pytest.raises(ValueError, match="whole number of grids"):
        pictures_of(drawn().replace(grid=(4, 4)))
    with pytest.raises(ValueError, match="padding"):
        split_pictures(drawn().replace(count=np.full(BATCH, 30)))


def test_memory_of_tokens_goes_with_their_picture():
    inputs = drawn()
    state = {"tokens": inputs.tokens[..., 0], "sample": np.arange(BATCH)}
    split = split_pictures(inputs.replace(state=state))
    np.testing.assert_array_equal(split.state["tokens"], split.tokens[..., 0])
    np.testing.assert_array_equal(split.state["sample"], np.repeat(np.arange(BATCH), CAMERAS))


def test_memory_is_split_along_its_axis_of_tokens_wherever_that_is():
    inputs = drawn()
    rows = np.random.default_rng(0).normal(size=(BATCH, 3, LENGTH, 2)).astype(np.float32)
    ids = np.tile(np.arange(LENGTH), (BATCH, 1))
    split = split_pictures(inputs.replace(state=rows, ids=ids))
    assert split.state.shape == (BATCH * CAMERAS, 3, 10, 2)
    np.testing.assert_array_equal(split.state[4], rows[1, :, 10:20])
    np.testing.assert_array_equal(split.ids, [np.arange(10)] * BATCH * CAMERAS)
    with pytest.raises(UserError, match=r"\(4, 30, 30\).*one such axis, as in \[B, N, \.\.\.\]"):
        split_pictures(inputs.replace(state=np.zeros((BATCH, LENGTH, LENGTH))))
    one = inputs.replace(grid=(3, 10), state=np.zeros((BATCH, LENGTH, LENGTH)))
    assert split_pictures(one).state.shape == (BATCH, LENGTH, LENGTH)


def test_memory_of_several_views_scores_with_one_budget_and_with_one_for_each():
    """A method with a memory [B, w, N], which never looks at `ids`."""
    rows = np.random.default_rng(1).normal(size=(BATCH, 4, LENGTH)).astype(np.float32)
    inputs = drawn().replace(state={"rows": rows, "frames": np.ones(BATCH, int)})
    scores = rows.mean(axis=1)
    method = Pruner(
        name="windowed",
        score=lambda params, inputs, key: inputs.state["rows"].mean(axis=1),
        needs=frozenset({"tokens", "state"}),
        temporal=Temporal(lambda inputs: inputs.state, lambda state, seen: state),
    )
    whole = jit_keep_indices(method, None, inputs, 0.4)
    np.testing.assert_array_equal(whole, np.sort(np.argsort(-scores, axis=1)[:, :12], axis=1))
    each = jit_keep_indices(per_camera(method), None, inputs, 0.4)
    best = np.argsort(-scores.reshape(BATCH, CAMERAS, 10), axis=2)[..., :4]
    want = np.sort(best, axis=2) + 10 * np.arange(CAMERAS)[:, None]
    np.testing.assert_array_equal(each, want.reshape(BATCH, 12))


def test_behind_a_cut_ids_count_within_the_picture():
    """A method that takes its memory by `ids`, as those within the model do."""

    def score(params, inputs, key):
        return jnp.take_along_axis(inputs.state, inputs.ids, axis=1)

    method = per_camera(Pruner(name="ids", score=score, needs=frozenset({"state"})), CAMERAS)
    worth = np.random.default_rng(2).normal(size=(BATCH, LENGTH)).astype(np.float32)
    ids = np.tile(np.arange(0, LENGTH, 2), (BATCH, 1))
    inputs = PrunerInputs(np.zeros((BATCH, 15, DIM)), ids=ids, state=worth, grid=GRID)
    kept = np.asarray(jit_keep_tokens(method, None, inputs, 6).indices)
    best = np.argsort(-worth[:, ::2].reshape(BATCH, CAMERAS, 5), axis=2)[..., :2]
    want = np.sort(best, axis=2) + 5 * np.arange(CAMERAS)[:, None]
    np.testing.assert_array_equal(kept, want.reshape(BATCH, 6))


def test_a_budget_for_another_number_of_cameras_is_refused():
    inputs = drawn()
    for cameras in (2, 6):
        with pytest.raises(UserError, match=rf"over {cameras} cameras, but a sample has 3, of 10"):
            keep_tokens(per_camera(make_pruner("divprune"), cameras), None, inputs, 12)
        unnamed = inputs.replace(camera=None)
        with pytest.raises(UserError, match=rf"over {cameras} cameras, but a sample has 3, of 10"):
            keep_tokens(per_camera(make_pruner("divprune"), cameras), None, unnamed, 12)
    with pytest.raises(ValueError, match="do not have 31 tokens"):
        camera_budgets(31, 10, (1.0, 2.0, 3.0))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_as_many_budgets_as_there_are_pictures(weights):
    inputs = drawn()
    given, asked = (per_camera(make_pruner("ground_truth"), c, weights) for c in (CAMERAS, None))
    for some in (inputs, inputs.replace(camera=None)):
        want = jit_keep_tokens(given, None, some, 12).indices
        np.testing.assert_array_equal(jit_keep_tokens(asked, None, some, 12).indices, want)
    within = Pruner(name="within", score=lambda p, i, k: None, cuts=Cuts(lambda layers: (1,)))
    assert "camera" in per_camera(within).needs  # behind a cut N does not say how many there are


def test_indices_are_those_that_a_policy_keeps():
    """A method that compares tokens with their mean: with its picture's, as policies have it."""

    def score(params, inputs, key):
        return jnp.linalg.norm(inputs.tokens - inputs.tokens.mean(1, keepdims=True), axis=-1)

    inputs = drawn()
    inputs.tokens[:, :10] += 5.0
    pictures = inputs.tokens.astype(np.float64).reshape(BATCH, CAMERAS, 10, DIM)
    far = np.linalg.norm(pictures - pictures.mean(axis=2, keepdims=True), axis=-1)
    best = np.sort(np.argsort(-far.reshape(BATCH, LENGTH), axis=1)[:, :12], axis=1)
    method = Pruner(name="far", score=score)
    np.testing.assert_array_equal(jit_keep_indices(method, None, inputs, 0.4), best)
    # Without a grid nothing tells pictures apart, and within the model they come together.
    together = np.asarray(jit_keep_tokens(method, None, inputs, 12).indices)
    assert (together != best).any()
    np.testing.assert_array_equal(
        jit_keep_indices(method, None, inputs.replace(grid=None), 0.4), together
    )
    within = Pruner(name="far", score=score, cuts=Cuts(lambda layers: (1,)))
    np.testing.assert_array_equal(jit_keep_indices(within, None, inputs, 0.4), together)
