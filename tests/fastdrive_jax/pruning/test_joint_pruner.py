"""JointPruner beside a slow NumPy form of its formulas."""

import math
import re

import jax
import numpy as np
import pytest

from fastdrive_jax.pruning import PrunerInputs, make_pruner, pruner_scores
from fastdrive_jax.pruning.budgets import per_camera
from fastdrive_jax.pruning.interface import Seen, keep_tokens
from fastdrive_jax.pruning.joint_pruner import share_below
from fastdrive_jax.pruning.recon_pruner import ReconPruner

BATCH, GRID, CAMERAS = 4, (2, 5), 3
LENGTH = CAMERAS * GRID[0] * GRID[1]
SETTINGS = {"action_weight": 0.6, "sharpness": 0.5, "candidates": 1.6}
jit_keep_tokens = jax.jit(keep_tokens, static_argnames=("pruner", "k"))
jit_scores = jax.jit(pruner_scores, static_argnames="pruner")


@pytest.fixture(scope="module")
def params(small_pruner):
    tokens = np.zeros((1, 4, small_pruner.layer.hidden_size), np.float32)
    return jax.jit(ReconPruner(small_pruner).init)(jax.random.key(0), tokens)["params"]


@pytest.fixture(scope="module")
def scorer(small_pruner):
    return make_pruner("reconpruner", config=small_pruner)


@pytest.fixture(scope="module")
def method(small_pruner):
    return make_pruner("jointpruner", config=small_pruner, **SETTINGS)


def drawn(seed=0):
    """Four samples: two with all of the past, one with a part of it, one with none."""
    rng = np.random.default_rng(seed)
    trust = rng.choice([0, 0.64, 0.8, 1], (BATCH, LENGTH))
    trust[:2] = trust[:2].clip(0.64)
    trust[3] = 0
    action = np.round(8 * rng.random((BATCH, LENGTH))) / 8  # ties
    return PrunerInputs(
        tokens=rng.normal(size=(BATCH, LENGTH, 32)).astype(np.float32),
        state={"action": action.astype(np.float32), "trust": trust.astype(np.float32)},
        grid=GRID,
    )


def rank(values):
    """0 for the lowest to 1; of equals the lower index ranks higher."""
    order = sorted(range(len(values)), key=lambda j: (values[j], -j))
    return {j: place / max(len(values) - 1, 1) for place, j in enumerate(order)}


def oracle(tokens, scores, action, trust, k, action_weight, sharpness, candidates):
    looks = rank(scores)
    known = [j for j in range(LENGTH) if trust[j] > 0]
    looked_at = {}
    if known:
        ranks = rank(action[known])
        looked_at = {j: ranks[place] for place, j in enumerate(known)}
    relevance = {
        j: looks[j] + action_weight * trust[j] * (looked_at.get(j, 0) - looks[j])
        for j in range(LENGTH)
    }
    some = min(round(candidates * k), LENGTH)
    best = sorted(relevance, key=lambda j: (-relevance[j], j))[:some]
    units = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)

    kept = best[:1]
    while len(kept) < k:
        left = sorted(set(best) - set(kept))
        far = {j: min(1 - units[i] @ units[j] for i in kept) for j in left}
        kept.append(max(left, key=lambda j: (far[j] * relevance[j] ** sharpness, -j)))
    return np.sort(kept)


@pytest.mark.parametrize("k", [1, 7, 20, LENGTH])
def test_the_formula_gives_the_same_tokens(params, method, scorer, k):
    for seed in range(3):
        inputs = drawn(seed)
        got = np.asarray(jit_keep_tokens(method, params, inputs, k).indices)
        pictures = PrunerInputs(inputs.tokens.reshape(BATCH * CAMERAS, -1, 32))
        scores = np.asarray(jit_scores(scorer, params, pictures), np.float64)
        for sample, row in enumerate(scores.reshape(BATCH, LENGTH)):
            arrays = inputs.tokens, inputs.state["action"], inputs.state["trust"]
            tokens, action, trust = (np.asarray(x[sample], np.float64) for x in arrays)
            want = oracle(tokens, row, action, trust, k, **SETTINGS)
            np.testing.assert_array_equal(got[sample], want)


def test_a_batch_is_pruned_as_its_samples_are(params, method):
    together = np.asarray(jit_keep_tokens(method, params, drawn(), 7).indices)
    for row in range(BATCH):
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], drawn())
        alone = np.asarray(jit_keep_tokens(method, params, one, 7).indices)
        np.testing.assert_array_equal(alone[0], together[row])


def test_without_past_its_candidates_are_reconpruners(params, small_pruner, scorer):
    method = make_pruner("jointpruner", config=small_pruner, candidates=1.0)
    inputs = drawn().replace(grid=(3, 10))  # one camera
    inputs = inputs.replace(state=method.temporal.init(inputs))
    got = jit_keep_tokens(method, params, inputs, 11).indices
    want = jit_keep_tokens(scorer, params, inputs, 11).indices
    np.testing.assert_array_equal(got, want)


def test_padding_is_never_kept_before_real_tokens(params, method):
    counts = np.array([30, 25, 21, 21])
    inputs = drawn().replace(count=counts)
    kept = np.asarray(jit_keep_tokens(method, params, inputs, 20).indices)
    assert (kept.max(axis=1) < counts).all()


def test_each_cameras_own_budget_remembers_that_camera(params, method):
    inputs = drawn()
    got = np.asarray(jit_keep_tokens(per_camera(method, CAMERAS), params, inputs, 12).indices)
    for camera in range(CAMERAS):
        part = jax.tree.map(lambda x, first=10 * camera: x[:, first : first + 10], inputs)
        want = np.asarray(jit_keep_tokens(method, params, part, 4).indices)
        np.testing.assert_array_equal(got[:, 4 * camera : 4 * camera + 4], 10 * camera + want)


def test_memory_of_kept_tokens_by_hand(small_pruner):
    method = make_pruner("jointpruner", config=small_pruner, forget=0.5)
    state = {"action": np.float32([[0.0, 0.4, 0.8]]), "trust": np.float32([[0.0, 1.0, 0.5]])}
    seen = Seen(action=np.float32([[0.2, 0.8, 0.0]]), kept=np.array([[True, True, False]]))
    after = method.temporal.observe(state, seen)
    np.testing.assert_allclose(after["action"], [[0.2, 0.8, 0.8]], atol=1e-6)
    np.testing.assert_allclose(after["trust"], [[1.0, 1.0, 0.25]], atol=1e-6)


def test_shares_by_hand():
    values = np.float32([[3.0, 1.0, 1.0, 9.0], [5.0, 5.0, 5.0, 5.0]])
    among = np.array([[True, True, True, False], [False, True, False, False]])
    got = jax.jit(share_below)(values, among)
    np.testing.assert_allclose(got, [[1, 0.5, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    "setting", [{"action_weight": 1.5}, {"forget": -0.1}, {"sharpness": -1.0}, {"candidates": 0.5}]
)
def test_settings_that_make_no_sense_are_refused(small_pruner, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        make_pruner("jointpruner", config=small_pruner, **setting)


def test_only_candidates_are_compared(small_pruner, params):
    method, k = make_pruner("jointpruner", config=small_pruner), 40
    inputs = PrunerInputs(tokens=np.zeros((1, 16 * 32, 32), np.float32), grid=(2, 16))
    inputs = inputs.replace(state=jax.eval_shape(method.temporal.init, inputs))
    text = jit_keep_tokens.lower(method, params, inputs, k).compile().as_text()
    shapes = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", text)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert (3 * k) ** 2 <= largest < 512**2 / 8
