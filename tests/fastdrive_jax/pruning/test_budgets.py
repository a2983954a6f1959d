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


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    return PrunerInputs(
        tokens=jnp.asarray(rng.normal(size=(BATCH, LENGTH, DIM)), jnp.float32),
        foreground=jnp.asarray(rng.integers(0, 6, (BATCH, LENGTH)), jnp.float32),  # ties
        position_ids=jnp.asarray(rng.integers(0, 9, (3, BATCH, LENGTH))),
        text_rows=jnp.asarray(rng.random((BATCH, 2, 4, LENGTH)), jnp.float32),
        camera=jnp.broadcast_to(jnp.arange(CAMERAS), (BATCH, CAMERAS)),
        grid=GRID,
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("k", [3, 10, LENGTH])
def test_each_camera_keeps_its_best(k, weights):
    inputs = drawn()
    method = per_camera(make_pruner("ground_truth"), CAMERAS, weights)
    got = np.asarray(jax.jit(lambda x: keep_tokens(method, None, x, k).indices)(inputs))
    budgets = camera_budgets(k, 10, weights or (1.0,) * CAMERAS)
    for row, scores in zip(got, np.asarray(inputs.foreground), strict=True):
        want = []
        for camera, budget in enumerate(budgets):
            best = np.argsort(-scores[10 * camera : 10 * camera + 10], kind="stable")[:budget]
            want.extend(np.sort(10 * camera + best))
        np.testing.assert_array_equal(row, want)


def test_methods_that_choose_see_one_camera_at_a_time():
    inputs = drawn()
    method = make_pruner("divprune")
    got = keep_tokens(per_camera(method, CAMERAS), None, inputs, 12).indices
    alone = [
        10 * camera
        + keep_tokens(method, None, slice_tokens(inputs, 10 * camera, 10 * camera + 10), 4).indices
        for camera in range(CAMERAS)
    ]
    np.testing.assert_array_equal(got, np.concatenate(alone, axis=1))


def test_merging_stays_within_a_camera():
    def merge(params, inputs, key, k):
        """All tokens' mean, k times."""
        mean = inputs.tokens.mean(axis=1, keepdims=True)
        return jnp.broadcast_to(jnp.arange(k), (BATCH, k)), jnp.repeat(mean, k, axis=1)

    inputs = drawn()
    kept = keep_tokens(per_camera(Pruner(name="mean", merge=merge), CAMERAS), None, inputs, 6)
    np.testing.assert_array_equal(kept.indices, [[0, 1, 10, 11, 20, 21]] * BATCH)
    want = np.asarray(inputs.tokens).reshape(BATCH, CAMERAS, 10, DIM).mean(axis=2)
    np.testing.assert_allclose(kept.tokens[:, ::2], want, atol=1e-6)


def test_a_second_cut_finds_each_camera_where_the_first_left_it():
    inputs = drawn()
    method = per_camera(make_pruner("ground_truth"), CAMERAS, WEIGHTS)
    first = keep_tokens(method, None, inputs, 15)
    again = PrunerInputs(
        tokens=first.tokens,
        foreground=jnp.take_along_axis(inputs.foreground, first.indices, axis=1),
        ids=first.indices,
        grid=GRID,
    )
    second = keep_tokens(method, None, again, 6)
    ids = np.take_along_axis(np.asarray(first.indices), np.asarray(second.indices), axis=1)
    np.testing.assert_array_equal(ids, keep_tokens(method, None, inputs, 6).indices)


def test_slices_of_all_that_is_known_of_tokens():
    inputs = drawn().replace(count=jnp.array([30, 17, 12, 5]))
    part = slice_tokens(inputs, 10, 20)
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
    text = jax.random.normal(jax.random.key(0), (BATCH, 6, DIM))
    split = split_pictures(drawn().replace(text=text, text_valid=text[..., 0] > 0))
    assert split.text.shape == (BATCH * CAMERAS, 6, DIM)
    for picture in range(BATCH * CAMERAS):
        np.testing.assert_array_equal(split.text[picture], text[picture // CAMERAS])
        valid = text[picture // CAMERAS, :, 0] > 0
        np.testing.assert_array_equal(split.text_valid[picture], valid)


def test_the_prior_of_each_camera_is_its_own():
    means = jax.random.uniform(jax.random.key(0), (CAMERAS, 10))
    order = jnp.array([2, 0, 1])
    inputs = drawn().replace(camera=jnp.broadcast_to(order, (BATCH, CAMERAS)))
    got = keep_tokens(per_camera(make_pruner("prior"), CAMERAS), means, inputs, 9).indices
    best = np.argsort(-np.asarray(means)[order], axis=1)[:, :3]
    want = np.sort(10 * np.arange(CAMERAS)[:, None] + best, axis=1).reshape(-1)
    np.testing.assert_array_equal(got, [want] * BATCH)


@pytest.mark.parametrize("name", PRUNERS)
def test_every_method_may_have_a_budget_for_each_camera(name, small_pruner):
    cameras, n, dim = 2, 6, small_pruner.layer.hidden_size
    key, length, rows = jax.random.key(0), cameras * n, (2, cameras * n)
    tokens = jax.random.normal(key, (2, length, dim))
    params, settings = None, {}
    if builds_on_recon(name):
        params = ReconPruner(small_pruner).init(key, tokens)["params"]
        settings = {"config": small_pruner}
    if name == "prior":
        params = jnp.ones((cameras, n))
    method = make_pruner(name, **settings)
    inputs = PrunerInputs(
        tokens=tokens,
        position_ids=jnp.zeros((3, *rows), int),
        text=jax.random.normal(key, (2, 3, dim)),
        foreground=jnp.ones(rows),
        relevance=jax.random.normal(key, rows),
        camera=jnp.broadcast_to(jnp.arange(cameras), (2, cameras)),
        embeddings=tokens,
        last_row=jnp.ones((2, 2, length)),
        text_rows=jnp.ones((2, 2, 3, length)),
        received=jnp.ones(rows),
        vision_received=jnp.ones(rows),
        vision_keys=tokens,
        pixels=tokens,
        grid=(2, 3),
    )
    if method.temporal is not None:
        inputs = inputs.replace(state=method.temporal.init(inputs))
    kept = np.asarray(keep_tokens(per_camera(method, cameras), params, inputs, 6, key).indices)
    np.testing.assert_array_equal((kept < n).sum(axis=1), [3, 3])
    assert all(len(set(row)) == 6 for row in kept)


def test_what_makes_no_sense_is_refused():
    for weights in ((1.0, 2.0), (1.0, -1.0, 1.0), (0.0, 0.0, 0.0), (1.0, float("nan"), 1.0)):
        with pytest.raises(ValueError, match="weights must be 3"):
            per_camera(make_pruner("ground_truth"), CAMERAS, weights)
    with pytest.raises(ValueError, match="whole number of grids"):
        pictures_of(drawn().replace(grid=(4, 4)))
    with pytest.raises(ValueError, match="padding"):
        split_pictures(drawn().replace(count=jnp.full(BATCH, 30)))


def test_memory_of_tokens_goes_with_their_picture():
    inputs = drawn()
    state = {"tokens": inputs.tokens[..., 0], "sample": jnp.arange(BATCH)}
    split = split_pictures(inputs.replace(state=state))
    np.testing.assert_array_equal(split.state["tokens"], split.tokens[..., 0])
    np.testing.assert_array_equal(split.state["sample"], np.repeat(np.arange(BATCH), CAMERAS))


def test_memory_is_split_along_its_axis_of_tokens_wherever_that_is():
    inputs = drawn()
    rows = jax.random.normal(jax.random.key(0), (BATCH, 3, LENGTH, 2))
    ids = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    split = split_pictures(inputs.replace(state=rows, ids=ids))
    assert split.state.shape == (BATCH * CAMERAS, 3, 10, 2)
    np.testing.assert_array_equal(split.state[4], rows[1, :, 10:20])
    np.testing.assert_array_equal(split.ids, [np.arange(10)] * BATCH * CAMERAS)
    with pytest.raises(UserError, match=r"\(4, 30, 30\).*one such axis, as in \[B, N, \.\.\.\]"):
        split_pictures(inputs.replace(state=jnp.zeros((BATCH, LENGTH, LENGTH))))
    one = inputs.replace(grid=(3, 10), state=jnp.zeros((BATCH, LENGTH, LENGTH)))
    assert split_pictures(one).state.shape == (BATCH, LENGTH, LENGTH)


def test_memory_of_several_views_scores_with_one_budget_and_with_one_for_each():
    """A method with a memory [B, w, N], which never looks at `ids`."""
    rows = jax.random.normal(jax.random.key(1), (BATCH, 4, LENGTH))
    inputs = drawn().replace(state={"rows": rows, "frames": jnp.ones(BATCH, int)})
    scores = np.asarray(rows.mean(axis=1))
    method = Pruner(
        name="windowed",
        score=lambda params, inputs, key: inputs.state["rows"].mean(axis=1),
        needs=frozenset({"tokens", "state"}),
        temporal=Temporal(lambda inputs: inputs.state, lambda state, seen: state),
    )
    whole = keep_indices(method, None, inputs, 0.4)
    np.testing.assert_array_equal(whole, np.sort(np.argsort(-scores, axis=1)[:, :12], axis=1))
    each = keep_indices(per_camera(method), None, inputs, 0.4)
    best = np.argsort(-scores.reshape(BATCH, CAMERAS, 10), axis=2)[..., :4]
    want = np.sort(best, axis=2) + 10 * np.arange(CAMERAS)[:, None]
    np.testing.assert_array_equal(each, want.reshape(BATCH, 12))


def test_behind_a_cut_ids_count_within_the_picture():
    """A method that takes its memory by `ids`, as those within the model do."""

    def score(params, inputs, key):
        return jnp.take_along_axis(inputs.state, inputs.ids, axis=1)

    method = per_camera(Pruner(name="ids", score=score, needs=frozenset({"state"})), CAMERAS)
    worth = jax.random.normal(jax.random.key(2), (BATCH, LENGTH))
    ids = jnp.broadcast_to(jnp.arange(0, LENGTH, 2), (BATCH, LENGTH // 2))
    inputs = PrunerInputs(jnp.zeros((BATCH, 15, DIM)), ids=ids, state=worth, grid=GRID)
    kept = np.asarray(keep_tokens(method, None, inputs, 6).indices)
    best = np.argsort(-np.asarray(worth)[:, ::2].reshape(BATCH, CAMERAS, 5), axis=2)[..., :2]
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
    given, asked = (per_camera(make_pruner("divprune"), c, weights) for c in (CAMERAS, None))
    for some in (inputs, inputs.replace(camera=None)):
        want = keep_tokens(given, None, some, 12).indices
        np.testing.assert_array_equal(keep_tokens(asked, None, some, 12).indices, want)
    within = Pruner(name="within", score=lambda p, i, k: None, cuts=Cuts(lambda layers: (1,)))
    assert "camera" in per_camera(within).needs  # behind a cut N does not say how many there are


def test_indices_are_those_that_a_policy_keeps():
    """A method that compares tokens with their mean: with its picture's, as policies have it."""

    def score(params, inputs, key):
        return jnp.linalg.norm(inputs.tokens - inputs.tokens.mean(1, keepdims=True), axis=-1)

    inputs = drawn()
    inputs = inputs.replace(tokens=inputs.tokens.at[:, :10].add(5.0))
    pictures = np.asarray(inputs.tokens, np.float64).reshape(BATCH, CAMERAS, 10, DIM)
    far = np.linalg.norm(pictures - pictures.mean(axis=2, keepdims=True), axis=-1)
    best = np.sort(np.argsort(-far.reshape(BATCH, LENGTH), axis=1)[:, :12], axis=1)
    method = Pruner(name="far", score=score)
    np.testing.assert_array_equal(keep_indices(method, None, inputs, 0.4), best)
    # Without a grid nothing tells pictures apart, and within the model they come together.
    together = keep_tokens(method, None, inputs, 12).indices
    assert (together != best).any()
    np.testing.assert_array_equal(
        keep_indices(method, None, inputs.replace(grid=None), 0.4), together
    )
    within = Pruner(name="far", score=score, cuts=Cuts(lambda layers: (1,)))
    np.testing.assert_array_equal(keep_indices(within, None, inputs, 0.4), together)
