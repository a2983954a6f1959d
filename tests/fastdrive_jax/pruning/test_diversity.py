"""Methods that choose tokens together, beside slow NumPy forms of their formulas."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced_pruners import traced

from fastdrive_jax.pruning import Pruner, PrunerInputs, keep_indices, make_pruner, pruner_scores
from fastdrive_jax.pruning.budgets import camera_budgets
from fastdrive_jax.pruning.max_min import (
    LOWEST,
    farthest_first,
    most_isolated,
    pairwise_distances,
    unit_tokens,
)
from fastdrive_jax.pruning.mistakes import MethodError

GRID, CAMERAS, DIM, BATCH = (2, 5), 3, 8, 4
PICTURE = math.prod(GRID)
LENGTH = CAMERAS * PICTURE
KEY = jax.random.key(3)
COUNTS = (30, 23, 17, 12)
WEIGHTS = (3.0, 1.0, 0.5)
METHODS = {
    "divprune": make_pruner("divprune"),
    "cdpruner": make_pruner("cdpruner"),
    "prune2drive": make_pruner("prune2drive"),
    "prune2drive weighted": make_pruner("prune2drive", weights=WEIGHTS),
    "prune2drive as published": make_pruner("prune2drive", as_published=True),
}
# Determinants of "tied" tokens are equal in exact arithmetic only, so CDPruner has "axes" for ties.
CASES = [(name, "continuous") for name in METHODS] + [
    (name, "axes" if name == "cdpruner" else "tied") for name in METHODS
]


def drawn(kind, seed=0, counts=None):
    """Four different samples; what pads them is no number, so that nothing may look at it.

    "tied" tokens have four entries of ±1, "axes" one: their cosines are exact in float32, and many
    are equal.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(BATCH, LENGTH, DIM))
    relevance = rng.normal(size=(BATCH, LENGTH))
    if kind != "continuous":
        entries = 4 if kind == "tied" else 1
        places = np.argsort(tokens, axis=-1) < entries
        tokens = places * rng.choice([-1.0, 1.0], tokens.shape)
        relevance = rng.integers(0, 5, relevance.shape).astype(float)
    if counts is not None:
        padding = np.arange(LENGTH) >= np.array(counts)[:, None]
        tokens[padding], relevance[padding] = np.nan, np.nan
    return PrunerInputs(
        tokens=tokens.astype(np.float32),
        relevance=relevance.astype(np.float32),
        count=None if counts is None else np.array(counts),
        grid=GRID,
    )


compiled, check_traces = traced(keep_indices)


jit_distances = jax.jit(lambda tokens, valid: pairwise_distances(unit_tokens(tokens, valid)))
jit_isolated = jax.jit(most_isolated)
jit_farthest_first = jax.jit(farthest_first, static_argnames="k")
jit_orders = jax.jit(jax.vmap(farthest_first, in_axes=(0, 0, None, 0)), static_argnums=2)


def choose(pruner, inputs, k):
    ratio = min(1.0, (k + 0.5) / LENGTH)  # the floor of which is K
    return np.asarray(compiled(pruner, None, inputs, ratio, KEY))


def cosine_matrix(tokens):
    units = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    return units @ units.T


def isolated(distances):
    return int(np.argmax(np.min(distances + np.diag(np.full(len(distances), np.inf)), axis=1)))


def max_min(distances, start, k):
    kept = [start]
    while len(kept) < k:
        left = [j for j in range(len(distances)) if j not in kept]
        kept.append(max(left, key=lambda j: (min(distances[i, j] for i in kept), -j)))
    return kept


def div_prune_oracle(tokens, relevance, k):
    distances = 1 - cosine_matrix(tokens)
    return max_min(distances, isolated(distances), k)


def cd_pruner_oracle(tokens, relevance, k, extremes=None):
    """Greedy det L_S by definition: j multiplies it by q_j^2 times its Schur complement in S."""
    low, high = extremes or (relevance.min(), relevance.max())
    quality = (relevance - low + 1e-6) / (high - low)
    cosines = cosine_matrix(tokens)
    kept = []
    for _ in range(k):
        gains = {}
        if kept:
            inverse = np.linalg.pinv(cosines[np.ix_(kept, kept)], rcond=1e-10, hermitian=True)
        for j in set(range(len(tokens))) - set(kept):
            explained = cosines[j, kept] @ inverse @ cosines[kept, j] if kept else 0.0
            gains[j] = quality[j] ** 2 * (1 - explained) if explained < 1 - 1e-5 else 0.0
        kept.append(max(gains, key=lambda j: (gains[j], -j)))
    return kept


def prune2drive_oracle(tokens, relevance, k, weights=(1.0,) * CAMERAS, as_published=False):
    draws = np.asarray(jax.random.uniform(KEY, (CAMERAS,)))
    budgets = camera_budgets(k, PICTURE, weights)
    orders = []
    for camera in range(CAMERAS):
        picture = tokens[camera * PICTURE : (camera + 1) * PICTURE]
        if not len(picture):
            orders.append([])
            continue
        distances = 1 - cosine_matrix(picture)
        start = isolated(distances) if as_published else int(draws[camera] * len(picture))
        order = max_min(distances, start, len(picture))
        orders.append([camera * PICTURE + place for place in order])
    kept = [
        token for order, budget in zip(orders, budgets, strict=True) for token in order[:budget]
    ]
    turns = range(PICTURE)
    spare = [
        o[b + t] for t in turns for o, b in zip(orders, budgets, strict=True) if b + t < len(o)
    ]
    return kept + spare[: k - len(kept)]


ORACLES = {
    "divprune": div_prune_oracle,
    "cdpruner": cd_pruner_oracle,
    "prune2drive": prune2drive_oracle,
    "prune2drive weighted": partial(prune2drive_oracle, weights=WEIGHTS),
    "prune2drive as published": partial(prune2drive_oracle, as_published=True),
}


def expected(name, inputs, k):
    rows = []
    for row in range(BATCH):
        count = LENGTH if inputs.count is None else int(inputs.count[row])
        tokens = np.asarray(inputs.tokens[row, :count], np.float64)
        relevance = np.asarray(inputs.relevance[row, :count], np.float64)
        rows.append(np.sort(ORACLES[name](tokens, relevance, k)))
    return np.stack(rows)


@pytest.mark.parametrize("k", [1, 4, 11, LENGTH])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_formula_gives_the_same_tokens(name, kind, k):
    for seed in range(3):
        inputs = drawn(kind, seed)
        np.testing.assert_array_equal(choose(METHODS[name], inputs, k), expected(name, inputs, k))


@pytest.mark.parametrize("k", [1, 7, min(COUNTS)])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_padding_is_neither_kept_nor_looked_at(name, kind, k):
    inputs = drawn(kind, counts=COUNTS)
    np.testing.assert_array_equal(choose(METHODS[name], inputs, k), expected(name, inputs, k))


@pytest.mark.parametrize("name", METHODS)
def test_too_few_real_tokens_are_all_kept(name):
    kept = choose(METHODS[name], drawn("continuous", counts=COUNTS), 20)
    for row, count in zip(kept, COUNTS, strict=True):
        assert len(set(row)) == 20
        assert set(range(min(count, 20))) <= set(row) if count <= 20 else row.max() < count


@pytest.mark.parametrize("counts", [None, COUNTS])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_pruned_as_its_samples_are(name, counts):
    k = 11 if counts is None else 7
    inputs = drawn("continuous", counts=counts)
    together = choose(METHODS[name], inputs, k)
    for row in range(BATCH):
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], inputs)
        np.testing.assert_array_equal(choose(METHODS[name], one, k)[0], together[row])


@pytest.mark.parametrize("name", METHODS)
def test_one_compilation_serves_all_pictures(name):
    for seed in range(3):
        for k in (7, 20):
            choose(METHODS[name], drawn("continuous", seed, counts=COUNTS), k)
    check_traces(METHODS[name])


def largest_array(pruner, rows, cameras, dim, k):
    """Elements of the largest array in the compiled program."""
    length = rows * rows * cameras
    inputs = PrunerInputs(
        tokens=np.zeros((1, length, dim), np.float32),
        relevance=np.zeros((1, length), np.float32),
        grid=(rows, rows),
    )
    run = jax.jit(lambda given, key: keep_indices(pruner, None, given, k / length, key))
    text = run.lower(inputs, KEY).compile().as_text()
    shapes = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", text)
    return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


def test_no_needless_array_of_pairs_is_held():
    pairs = 49**2
    assert largest_array(make_pruner("cdpruner"), 7, 1, 4, 10) < pairs
    assert largest_array(make_pruner("prune2drive"), 7, 3, 4, 30) == 3 * pairs  # of each picture
    # The check would see one: this is defined by it.
    assert largest_array(make_pruner("divprune"), 7, 1, 4, 10) >= pairs


def one_by_one(distances, start, k, valid):
    """`farthest_first` as it is defined, on the same numbers."""
    nearest = np.where(valid, np.inf, np.float32(LOWEST))
    order = [start]
    for _ in range(k - 1):
        nearest = np.minimum(nearest, distances[order[-1]])
        nearest[order] = -np.inf
        order.append(int(np.argmax(nearest)))
    return order


def scattered(kind, seed, count=150, dim=16):
    """Tokens [3, N, D] and which are real, all of them in the first sample."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(3, count, dim))
    if kind == "clustered":
        tokens = tokens[:, rng.integers(0, 12, count)] + 0.1 * tokens
    if kind == "repeated":
        tokens = tokens[:, rng.integers(0, 20, count)]
    if kind == "tied":
        tokens = (np.argsort(tokens, axis=-1) < 4) * rng.choice([-1.0, 1.0], tokens.shape)
    return tokens.astype(np.float32), np.arange(count) < np.array([[count], [90], [7]])


@pytest.mark.parametrize("k", [1, 2, 40, 150])
@pytest.mark.parametrize("kind", ["random", "clustered", "repeated", "tied"])
def test_rounds_choose_what_single_steps_choose(kind, k):
    for seed in range(5):
        tokens, valid = scattered(kind, seed)
        distances = np.stack([jit_distances(*sample) for sample in zip(tokens, valid, strict=True)])
        start = np.array([3, 89, 0])
        got = np.asarray(jit_orders(distances, start, k, valid))
        for row in range(3):
            want = one_by_one(distances[row], start[row], k, valid[row])
            np.testing.assert_array_equal(got[row], want)


@pytest.mark.parametrize("odd", [[5], [0], [0, 5, 40], range(1, 64), range(64)])
def test_tokens_that_are_no_number_come_last(odd):
    tokens, valid = np.array(scattered("random", 0, count=64)[0][0]), np.arange(64) < 60
    tokens[list(odd), 3] = np.nan
    distances = jit_distances(tokens, valid)
    start = jit_isolated(distances, valid)
    known = [place for place in range(60) if place not in odd]
    assert int(start) in (known or range(60))
    order = np.asarray(jit_farthest_first(distances, start, 60, valid))
    assert sorted(order) == list(range(60))
    if known:
        among = np.asarray(distances)[np.ix_(known, known)]
        assert int(start) == known[isolated(among)]
        want = one_by_one(among, known.index(int(start)), len(known), np.ones(len(known), bool))
        np.testing.assert_array_equal(order[: len(known)], np.array(known)[want])


@pytest.mark.parametrize("name", METHODS)
def test_a_token_that_is_no_number_hangs_no_method(name):
    tokens = np.asarray(
        jax.random.normal(KEY, (2, CAMERAS * 64, DIM))
    )  # more in a picture than in a round
    whole = PrunerInputs(tokens=tokens, relevance=tokens[..., 0], grid=(8, 8))
    broken = whole.replace(tokens=tokens.copy())
    broken.tokens[0, 5, 3] = np.nan
    want, kept = (np.asarray(compiled(METHODS[name], None, x, 0.25, KEY)) for x in (whole, broken))
    assert all(len(set(row)) == 48 for row in kept)
    np.testing.assert_array_equal(kept[1], want[1])


@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_rounds_are_few(monkeypatch, kind):
    rounds = []

    def loop(unfinished, body, carry):
        body = jax.jit(body)
        while unfinished(carry):
            rounds.append(carry)
            carry = body(carry)
        return carry

    monkeypatch.setattr(jax.lax, "while_loop", loop)
    tokens, valid = scattered(kind, 0, count=600)
    distances = jit_distances(tokens[0], valid[0])
    assert len(farthest_first(distances, jnp.int32(0), 150, valid[0])) == 150
    assert len(rounds) < 150 / 4


@pytest.mark.parametrize(
    ("k", "weights", "want"),
    [
        (9, (1.0, 1.0, 1.0), (3, 3, 3)),
        (8, (1.0, 1.0, 1.0), (3, 3, 2)),
        (9, (6.0, 2.0, 1.0), (6, 2, 1)),
        (17, (6.0, 2.0, 1.0), (10, 5, 2)),  # the first is full
        (12, (1.0, 0.0, 0.0), (10, 2, 0)),
        (30, (6.0, 2.0, 1.0), (10, 10, 10)),
    ],
)
def test_budgets_follow_the_weights(k, weights, want):
    np.testing.assert_array_equal(camera_budgets(k, 10, weights), want)


def test_random_start_follows_the_key():
    inputs = drawn("continuous")
    runs = [
        np.asarray(compiled(METHODS["prune2drive"], None, inputs, 0.1, jax.random.key(s)))
        for s in (0, 1)
    ]
    assert (runs[0] != runs[1]).any()


def test_divprune_as_published_rounds():
    def shape(pruner, keep_ratio):
        inputs = drawn("continuous")
        return jax.eval_shape(lambda x: keep_indices(pruner, None, x, keep_ratio), inputs).shape

    assert shape(make_pruner("divprune"), 0.32) == (BATCH, 9)
    published = make_pruner("divprune", as_published=True)
    assert shape(published, 0.32) == (BATCH, 10)
    assert shape(published, 0.01) == (BATCH, 1)


def test_cdpruner_as_published_scales_relevance_by_the_batch():
    inputs = drawn("continuous")
    inputs.relevance[0] *= 10
    published = choose(make_pruner("cdpruner", as_published=True), inputs, 11)
    relevance = np.asarray(inputs.relevance, np.float64)
    extremes = relevance.min(), relevance.max()
    for row, kept in enumerate(published):
        tokens = np.asarray(inputs.tokens[row], np.float64)
        want = cd_pruner_oracle(tokens, relevance[row], 11, extremes)
        np.testing.assert_array_equal(kept, np.sort(want))
    assert (published[1:] != choose(METHODS["cdpruner"], inputs, 11)[1:]).any()


def test_cdpruner_with_equal_relevance_keeps_different_tokens():
    tokens = np.float32([[[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]])
    given = PrunerInputs(tokens=tokens, relevance=np.ones((1, 4), np.float32))
    kept = compiled(METHODS["cdpruner"], None, given, 0.5, None)
    np.testing.assert_array_equal(kept, [[0, 3]])


def test_a_pruner_either_scores_or_chooses():
    def score(params, inputs, key):
        return inputs.foreground

    def last(params, inputs, key, k):
        return jnp.broadcast_to(LENGTH - 1 - jnp.arange(k), (BATCH, k))

    for given in ({}, {"score": score, "choose": last}):
        with pytest.raises(MethodError, match="one of score, choose and merge"):
            Pruner(name="odd", **given)
    kept = choose(Pruner(name="last", choose=last), drawn("continuous"), 3)
    np.testing.assert_array_equal(kept, [[27, 28, 29]] * BATCH)  # raster order
    wrong = Pruner(
        name="wrong", choose=lambda params, inputs, key, k: jnp.zeros((BATCH, k + 1), int)
    )
    with pytest.raises(ValueError, match=r"wrong.*chose"):
        choose(wrong, drawn("continuous"), 3)


def test_a_chooser_has_no_scores_and_gets_what_it_needs():
    with pytest.raises(ValueError, match=r"divprune.*has no scores"):
        pruner_scores(METHODS["divprune"], None, drawn("continuous"))
    with pytest.raises(ValueError, match=r"cdpruner.*needs relevance"):
        choose(METHODS["cdpruner"], drawn("continuous").replace(relevance=None), 3)
    with pytest.raises(ValueError, match=r"prune2drive.*needs key"):
        keep_indices(METHODS["prune2drive"], None, drawn("continuous"), 0.5)


def test_scores_heed_padding_too():
    rng = np.random.default_rng(0)
    foreground = rng.random((BATCH, LENGTH))
    foreground[np.arange(LENGTH) >= np.array(COUNTS)[:, None]] = 9.0
    inputs = drawn("continuous").replace(
        foreground=foreground.astype(np.float32), count=np.array(COUNTS)
    )
    kept = choose(make_pruner("ground_truth"), inputs, 12)
    for row, count in enumerate(COUNTS):
        want = np.sort(np.argsort(-foreground[row, :count])[:12])
        np.testing.assert_array_equal(kept[row], want)


def test_settings_that_make_no_sense_are_refused():
    for weights in ((1.0, -1.0), (0.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="weights must be"):
            make_pruner("prune2drive", weights=weights)
    with pytest.raises(ValueError, match="2 weights for 3 cameras"):
        choose(make_pruner("prune2drive", weights=(1.0, 2.0)), drawn("continuous"), 3)
    with pytest.raises(ValueError, match="whole number of grids"):
        choose(METHODS["prune2drive"], drawn("continuous").replace(grid=(4, 4)), 3)
    with pytest.raises(ValueError, match="k must be"):
        farthest_first(np.zeros((3, 3)), 0, 4, np.ones(3, bool))
