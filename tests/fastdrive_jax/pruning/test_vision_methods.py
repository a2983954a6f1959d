"""VisPruner, VisionZip and ToMe, beside slow NumPy forms of their formulas."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from traced_pruners import traced

from fastdrive_jax.pruning import PrunerInputs, make_pruner
from fastdrive_jax.pruning.interface import keep_tokens
from fastdrive_jax.pruning.vis_pruner import num_rounds

GRID, CAMERAS, DIM, BATCH = (3, 5), 3, 8, 4
LENGTH = CAMERAS * math.prod(GRID)
COUNTS = (45, 32, 23, 17)
METHODS = {
    "vispruner": make_pruner("vispruner"),
    "vispruner one by one": make_pruner("vispruner", per_round=1),
    "vispruner in large rounds": make_pruner("vispruner", important_ratio=0.25, per_round=20),
    "vispruner by attention": make_pruner("vispruner", important_ratio=1.0),
    "visionzip": make_pruner("visionzip"),
    "visionzip as published": make_pruner("visionzip", contextual_ratio=0.5, as_published=True),
    "tome": make_pruner("tome", rounds=2),
    "tome on keys": make_pruner("tome", metric="keys", rounds=3),
    "tome in one round": make_pruner("tome", rounds=1),
}
KEPT = (1, 24, LENGTH)
# ToMe's means round, so that only its first round knows ties.
CASES = [(name, "continuous", k) for name in METHODS for k in KEPT] + [
    (name, "tied", k)
    for name in METHODS
    for k in KEPT
    if not name.startswith("tome") or (name == "tome in one round" and k >= LENGTH / 2)
]


def drawn(kind, seed=0, counts=None):
    """Four different samples; what pads them is no number, so that nothing may look at it.

    "tied" tokens and keys have four entries of ±1: their cosines are exact in float32, and many are
    equal.
    """
    rng = np.random.default_rng(seed)
    tokens, keys = rng.normal(size=(2, BATCH, LENGTH, DIM))
    received = rng.random((BATCH, LENGTH))
    if kind == "tied":
        tokens, keys = (
            (np.argsort(x, axis=-1) < 4) * rng.choice([-1.0, 1.0], x.shape) for x in (tokens, keys)
        )
        received = rng.integers(0, 5, received.shape) / 8
    if counts is not None:
        padding = np.arange(LENGTH) >= np.array(counts)[:, None]
        tokens[padding], keys[padding], received[padding] = np.nan, np.nan, np.nan
    return PrunerInputs(
        tokens=tokens.astype(np.float32),
        vision_received=received.astype(np.float32),
        vision_keys=keys.astype(np.float32),
        count=None if counts is None else np.array(counts),
        grid=GRID,
    )


compiled, check_traces = traced(keep_tokens)


def choose(name, inputs, k):
    return jax.tree.map(np.asarray, compiled(METHODS[name], None, inputs, k))


def cosine(x, y):
    return x @ y / math.sqrt((x @ x) * (y @ y))


def falling(values):
    return sorted(range(len(values)), key=lambda j: (-values[j], j))


def matches(features):
    """[(best, odd)] of each even place, odd a place among the odd ones."""
    even, odd = np.stack(features[::2]), np.stack(features[1::2])
    lengths = np.sqrt((even**2).sum(axis=1)[:, None] * (odd**2).sum(axis=1))
    similar = even @ odd.T / lengths
    return list(zip(similar.max(axis=1), similar.argmax(axis=1), strict=True))


def vis_pruner_oracle(tokens, received, keys, k, ratio=0.5, per_round=8):
    order = falling(received)
    important, rest = order[: int(k * ratio)], order[int(k * ratio) :]
    left = k - len(important)
    while left and len(rest) > left:
        even, odd = rest[::2], rest[1::2]
        best = [score for score, _ in matches([tokens[j] for j in rest])]
        leave = min(per_round, len(rest) - left, len(even))
        rest = [even[place] for place in falling(best)[leave:]] + odd
    return {j: tokens[j] for j in important + rest[:left]}


def vision_zip_oracle(tokens, received, keys, k, ratio=10 / 64, add=False):
    contextual = int(k * ratio)
    dominant = falling(received)[: k - contextual]
    kept = {j: tokens[j] for j in dominant}
    if not contextual:
        return kept
    rest = [j for j in range(len(tokens)) if j not in dominant]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    joined = {target: [] for target in targets}
    for j in rest:
        if j not in targets:
            similar = [cosine(keys[j], keys[target]) for target in targets]
            joined[targets[falling(similar)[0]]].append(tokens[j])
    for target, others in joined.items():
        if add:
            kept[target] = tokens[target] + (np.mean(others, axis=0) if others else 0)
        else:
            kept[target] = np.mean([tokens[target], *others], axis=0)
    return kept


def tome_oracle(tokens, received, keys, k, rounds, metric="tokens"):
    """A token is the set of those that it stands for, its representative first."""
    groups, done = [[j] for j in range(len(tokens))], 0
    features = keys if metric == "keys" else tokens
    while len(groups) > k:
        even, odd = groups[::2], [list(group) for group in groups[1::2]]
        found = matches([features[group].mean(axis=0) for group in groups])
        merges = math.ceil((len(groups) - k) / max(1, rounds - done))
        merges = min(merges, len(groups) // 2)
        order = falling([score for score, _ in found])
        for place in order[:merges]:
            odd[found[place][1]] += even[place]
        groups = [even[place] for place in order[merges:]] + odd
        done += 1
    return {group[0]: tokens[group].mean(axis=0) for group in groups}


ORACLES = {
    "vispruner": vis_pruner_oracle,
    "vispruner one by one": partial(vis_pruner_oracle, per_round=1),
    "vispruner in large rounds": partial(vis_pruner_oracle, ratio=0.25, per_round=20),
    "vispruner by attention": partial(vis_pruner_oracle, ratio=1.0),
    "visionzip": vision_zip_oracle,
    "visionzip as published": partial(vision_zip_oracle, ratio=0.5, add=True),
    "tome": partial(tome_oracle, rounds=2),
    "tome on keys": partial(tome_oracle, metric="keys", rounds=3),
    "tome in one round": partial(tome_oracle, rounds=1),
}


def check(name, inputs, k):
    """The method leaves what its formula does, sample by sample."""
    got = choose(name, inputs, k)
    for row in range(BATCH):
        count = LENGTH if inputs.count is None else int(inputs.count[row])
        fields = inputs.tokens, inputs.vision_received, inputs.vision_keys
        want = ORACLES[name](*(np.asarray(field[row, :count], np.float64) for field in fields), k)
        assert got.indices[row].tolist() == sorted(want)
        merged = np.stack([want[j] for j in sorted(want)])
        np.testing.assert_allclose(got.tokens[row], merged, atol=1e-5)


@pytest.mark.parametrize(("name", "kind", "k"), CASES)
def test_the_formula_leaves_the_same_tokens(name, kind, k):
    for seed in range(3):
        check(name, drawn(kind, seed), k)


@pytest.mark.parametrize("k", [1, 13, min(COUNTS)])
@pytest.mark.parametrize("name", METHODS)
def test_padding_is_neither_kept_nor_looked_at(name, k):
    check(name, drawn("continuous", counts=COUNTS), k)


@pytest.mark.parametrize("name", METHODS)
def test_too_few_real_tokens_are_all_kept(name):
    kept = choose(name, drawn("continuous", counts=COUNTS), 25)
    for indices, tokens, count in zip(kept.indices, kept.tokens, COUNTS, strict=True):
        real = set(indices.tolist())
        assert len(real) == 25
        assert set(range(count)) <= real if count <= 25 else max(real) < count
        assert np.isfinite(tokens[indices < count]).all()


@pytest.mark.parametrize("counts", [None, COUNTS])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_pruned_as_its_samples_are(name, counts):
    inputs = drawn("continuous", counts=counts)
    k = 24 if counts is None else 13
    together = choose(name, inputs, k)
    for row in range(BATCH):
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], inputs)
        alone = choose(name, one, k)
        np.testing.assert_array_equal(alone.indices[0], together.indices[row])
        np.testing.assert_allclose(alone.tokens[0], together.tokens[row], atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_one_compilation_serves_all_pictures(name):
    for seed in range(3):
        for k in (13, 25):
            choose(name, drawn("continuous", seed, counts=COUNTS), k)
    check_traces(METHODS[name])


def largest_array(pruner, length, k):
    """Elements of the largest array in the compiled program."""
    inputs = PrunerInputs(
        tokens=np.zeros((1, length, 4), np.float32),
        vision_received=np.zeros((1, length), np.float32),
        vision_keys=np.zeros((1, length, 4), np.float32),
    )
    text = compiled.lower(pruner, None, inputs, k).compile().as_text()
    shapes = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", text)
    return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


def test_no_array_of_pairs_is_held():
    length, k = 120, 40
    assert largest_array(make_pruner("visionzip"), length, k) < length**2 / 4
    assert largest_array(make_pruner("tome", rounds=3), length, k) <= length**2 / 4  # half by half
    # Its rounds would meet most pairs of what attention leaves, so it makes all of those once.
    assert largest_array(make_pruner("vispruner"), length, k) == (length - k // 2) ** 2


@pytest.mark.parametrize(
    ("live", "k", "per_round", "rounds"),
    [(512, 64, 8, 56), (2843, 406, 8, 305), (64, 64, 8, 0), (10, 1, 8, 3), (10, 1, 1, 9)],
)
def test_vispruner_takes_no_more_rounds_than_it_needs(live, k, per_round, rounds):
    assert num_rounds(live, k, per_round) == rounds


def test_tokens_keep_their_type():
    inputs = drawn("continuous")
    inputs = inputs.replace(tokens=inputs.tokens.astype(jnp.bfloat16))
    for name in ("vispruner", "visionzip", "tome"):
        kept = jax.eval_shape(partial(keep_tokens, METHODS[name], None, k=13), inputs)
        assert kept.tokens.dtype == jnp.bfloat16


def test_as_published_gives_out_positions_anew():
    for name in ("vispruner", "visionzip"):
        assert not make_pruner(name).renumber
        assert make_pruner(name, as_published=True).renumber


def test_a_method_gets_what_it_needs():
    bare = drawn("continuous").replace(vision_received=None, vision_keys=None)
    for name, need in (("vispruner", "vision_received"), ("tome on keys", "vision_keys")):
        with pytest.raises(ValueError, match=need):
            compiled(METHODS[name], None, bare, 3)
    kept = jax.eval_shape(partial(keep_tokens, METHODS["tome"], None, k=44), bare)
    assert kept.indices.shape == (BATCH, 44)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vispruner", {"important_ratio": 1.5}),
        ("vispruner", {"per_round": 0}),
        ("visionzip", {"contextual_ratio": -0.1}),
        ("tome", {"metric": "values"}),
        ("tome", {"rounds": 0}),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, settings):
    with pytest.raises(ValueError, match="must be"):
        make_pruner(name, **settings)


@pytest.mark.parametrize("name", ["vispruner", "visionzip"])
def test_a_token_without_a_number_goes_before_padding(name):
    tokens = np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32)
    received = np.float32([[0, 1, np.nan, 3, 4, 5, 6, 7]])
    given = PrunerInputs(
        tokens=tokens, vision_received=received, vision_keys=tokens, count=np.array([6])
    )
    kept = choose(name, given, 6)
    np.testing.assert_array_equal(kept.indices[0], np.arange(6))
