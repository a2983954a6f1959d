"""Methods that stand within the language model, beside slow NumPy forms of their formulas."""

import math
import re
from functools import partial

import jax
import numpy as np
import pytest
from traced_pruners import traced

from fastdrive_jax.errors import UserError
from fastdrive_jax.pruning import PrunerInputs, make_pruner
from fastdrive_jax.pruning.dpc_knn import cluster_means
from fastdrive_jax.pruning.interface import Seen, cut_plan, keep_tokens, pruner_scores
from fastdrive_jax.pruning.select import falling_keep, num_keep, round_keep
from fastdrive_jax.pruning.sparse_vlm import recycled_among
from fastdrive_jax.pruning.spec_prune import LastFrame

GRID, CAMERAS, DIM, BATCH = (5, 6), 3, 4, 4
LENGTH = CAMERAS * math.prod(GRID)
HEADS, WORDS, PIXELS, FIRST = 4, 6, 12, 100  # FIRST tokens stood before the cut before
COUNTS = (90, 71, 58, 44)
NAMES = ("fastv", "sparsevlm", "sparsevlm_v1", "pyramiddrop", "specprune")
METHODS = {name: make_pruner(name) for name in NAMES}
KINDS = ("continuous", "tied")


def drawn(kind, seed=0, counts=None, cut=0, padded_text=True):
    """Four different samples; what pads them is no number, so that nothing may look at it.

    All that is ranked in "tied" samples is a small whole number over a power of 2: sums are exact
    in float32, and many are equal.
    """
    rng = np.random.default_rng(seed)
    last_row = rng.random((BATCH, HEADS, LENGTH)) / LENGTH
    text_rows = rng.random((BATCH, HEADS, WORDS, LENGTH)) / LENGTH
    tokens = rng.normal(size=(BATCH, LENGTH, DIM))
    if kind == "tied":
        last_row = rng.integers(0, 3, last_row.shape) / 64
        text_rows = rng.integers(0, 2, text_rows.shape) / 64
        tokens = rng.integers(-1, 2, tokens.shape).astype(float)
    embeddings = rng.normal(size=(BATCH, LENGTH, DIM))
    text = rng.normal(size=(BATCH, WORDS, DIM))
    words = np.ones((BATCH, WORDS), bool)
    if padded_text:
        words[0, :2], words[1, 4:], words[2, [0, 3, 5]] = False, False, False
        text[~words] = np.nan
        text_rows[np.broadcast_to(~words[:, None], (BATCH, HEADS, WORDS))] = np.nan

    first = LENGTH if cut == 0 else FIRST
    before = rng.uniform(0.5, 1, size=(BATCH, first, PIXELS))
    ids = np.stack([np.sort(rng.permutation(first)[:LENGTH]) for _ in range(BATCH)])
    pixels = np.take_along_axis(before, ids[..., None], axis=1) * 1.5  # light alone is no change
    moved = rng.random((BATCH, LENGTH)) < 0.1
    pixels[moved] = rng.uniform(0, 1, (moved.sum(), PIXELS)) ** 4
    state = LastFrame(
        pixels=before.astype(np.float32),
        kept=rng.random((BATCH, first)) < 0.3,
        known=np.array([True, True, False, True]),
    )
    if counts is not None:
        padding = np.arange(LENGTH) >= np.array(counts)[:, None]
        for values in (tokens, embeddings, pixels):
            values[padding] = np.nan
        last_row[np.broadcast_to(padding[:, None], last_row.shape)] = np.nan
        text_rows[np.broadcast_to(padding[:, None, None], text_rows.shape)] = np.nan
    single = partial(np.asarray, dtype=np.float32)
    return PrunerInputs(
        tokens=single(tokens),
        text=single(text),
        text_valid=words if padded_text else None,
        count=None if counts is None else np.array(counts),
        ids=None if cut == 0 else ids,
        embeddings=single(embeddings),
        last_row=single(last_row),
        text_rows=single(text_rows),
        pixels=single(pixels),
        state=state,
        grid=GRID,
        cut=cut,
    )


compiled, check_traces = traced(keep_tokens)


jit_scores = jax.jit(pruner_scores, static_argnames="pruner")
jit_cluster_means = jax.jit(cluster_means, static_argnums=2)


def leave(name, inputs, k):
    kept = compiled(METHODS[name], None, inputs, k)
    return np.asarray(kept.indices), np.asarray(kept.tokens)


def ranked(scores):
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


def mean_row_oracle(sample, k):
    heads, count = sample["last_row"].shape
    scores = [sum(sample["last_row"][h, j] for h in range(heads)) for j in range(count)]
    return {j: sample["tokens"][j] for j in ranked(scores)[:k]}


def raters_of(sample):
    words = [t for t in range(WORDS) if sample["words"][t]]
    means = dict.fromkeys(words, 0.0)
    for visual in sample["embeddings"]:
        likeness = {t: math.exp(visual @ sample["text"][t]) for t in words}
        for t in words:
            means[t] += likeness[t] / sum(likeness.values()) / len(sample["embeddings"])
    mean = sum(means.values()) / len(words)
    return [t for t in words if means[t] > mean]


def rater_scores(sample, heads):
    raters, count = raters_of(sample), sample["text_rows"].shape[-1]
    assert 0 < len(raters) < WORDS
    rows = sample["text_rows"]
    seen = [[sum(rows[h, t, j] for t in raters) for j in range(count)] for h in range(HEADS)]
    best = ranked([sum(row) for row in seen])[:heads]
    return [sum(seen[h][j] for h in best) for j in range(count)]


def sparse_oracle(sample, k):
    scores = rater_scores(sample, 2)  # 14 of 32 of 4 heads
    return {j: sample["tokens"][j] for j in ranked(scores)[:k]}


def deleted_gives(deleted):
    candidates = int(0.3 * deleted) + 1
    return candidates, int(candidates / 10) + 1


def split(n, k):
    """Kept tokens among K: as many as leave room for what the deleted ones give."""
    if k == n:
        return k
    half = k - k // 2
    return next((p for p in range(k - 1, half - 1, -1) if p + deleted_gives(n - p)[1] <= k), half)


def clustered(tokens, clusters):
    """DPC-KNN in plain loops: {centre: mean of its tokens}."""
    count, dim = tokens.shape
    every = range(count)
    distance = [[math.dist(tokens[i], tokens[j]) / math.sqrt(dim) for j in every] for i in every]
    square = [[sum((tokens[i] - tokens[j]) ** 2) / dim for j in every] for i in every]
    spread = [sum(sorted(square[i])[:clusters]) / clusters for i in every]
    peaks = []
    for i in every:
        denser = [j for j in every if (spread[j], j) < (spread[i], i)]
        delta = min((distance[i][j] for j in denser), default=max(map(max, distance)))
        peaks.append(delta * math.exp(-spread[i]))
    centres = sorted(ranked(peaks)[:clusters])
    members = {centre: [] for centre in centres}
    for i in every:
        own = i if i in members else min(centres, key=lambda centre: (square[i][centre], centre))
        members[own].append(tokens[i])
    return {centre: np.mean(group, axis=0) for centre, group in members.items()}


def recycling_oracle(sample, k):
    order = ranked(rater_scores(sample, HEADS))
    kept = split(LENGTH, k)
    left = {j: sample["tokens"][j] for j in order[:kept]}
    if kept < k:
        candidates, _ = deleted_gives(LENGTH - kept)
        pool = sorted(order[kept : kept + candidates])
        means = clustered(sample["tokens"][pool], k - kept)
        left |= {pool[centre]: mean for centre, mean in means.items()}
    return left


def spec_oracle(sample, k):
    words, rows = sample["words"], sample["text_rows"]
    count = rows.shape[-1]
    order = ranked(
        [sum(rows[h, t, j] for h in range(HEADS) for t in range(WORDS) if words[t])
         for j in range(count)]
    )  # fmt: skip
    changed, kept = set(), set()
    for j in range(count):
        place = j if sample["ids"] is None else sample["ids"][j]
        now, before = sample["pixels"][j], sample["before"][place]
        likeness = now @ before / (np.linalg.norm(now) * np.linalg.norm(before) + 1e-8)
        if sample["known"] and likeness < 0.986:
            changed.add(j)
        if sample["kept"][place]:
            kept.add(j)
    named = round(28 / 512 * len(sample["before"])) * (1 if sample["cut"] else 3)
    chosen = []
    for tier in (changed, set(order[:named]), kept, set(order)):
        chosen += [j for j in order if j in tier and j not in chosen]
    return {j: sample["tokens"][j] for j in chosen[:k]}


ORACLES = {
    "fastv": mean_row_oracle,
    "sparsevlm": sparse_oracle,
    "sparsevlm_v1": recycling_oracle,
    "pyramiddrop": mean_row_oracle,
    "specprune": spec_oracle,
}


def samples(inputs):
    """Each sample without its padding, in float64."""
    for row in range(BATCH):
        count = LENGTH if inputs.count is None else int(inputs.count[row])
        double = partial(np.asarray, dtype=np.float64)
        words = np.ones(WORDS, bool) if inputs.text_valid is None else inputs.text_valid[row]
        yield {
            "tokens": double(inputs.tokens[row, :count]),
            "text": double(inputs.text[row]),
            "words": np.asarray(words),
            "embeddings": double(inputs.embeddings[row, :count]),
            "last_row": double(inputs.last_row[row, :, :count]),
            "text_rows": double(inputs.text_rows[row, :, :, :count]),
            "pixels": double(inputs.pixels[row, :count]),
            "before": double(inputs.state.pixels[row]),
            "kept": np.asarray(inputs.state.kept[row]),
            "known": bool(inputs.state.known[row]),
            "ids": None if inputs.ids is None else np.asarray(inputs.ids[row]),
            "cut": inputs.cut,
        }


def check(name, inputs, k):
    indices, tokens = leave(name, inputs, k)
    for row, sample in enumerate(samples(inputs)):
        want = ORACLES[name](sample, k)
        np.testing.assert_array_equal(indices[row], sorted(want))
        np.testing.assert_allclose(tokens[row], [want[j] for j in sorted(want)], atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, 11, 40, LENGTH])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_formula_leaves_the_same_tokens(name, kind, k):
    for seed in range(3):
        check(name, drawn(kind, seed, padded_text=seed > 0), k)


@pytest.mark.parametrize("k", [1, 7, min(COUNTS)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_padding_is_neither_kept_nor_looked_at(name, kind, k):
    check(name, drawn(kind, counts=COUNTS), k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_later_cut_sees_what_the_one_before_left(name, kind):
    check(name, drawn(kind, cut=1), 20)


@pytest.mark.parametrize("name", NAMES)
def test_too_few_real_tokens_are_all_kept(name):
    indices, tokens = leave(name, drawn("continuous", counts=COUNTS), 60)
    for row, count in zip(indices, COUNTS, strict=True):
        assert len(set(row)) == 60
        assert set(range(count)) <= set(row) if count <= 60 else row.max() < count
    real = indices < np.array(COUNTS)[:, None]
    assert np.isfinite(tokens[real]).all()


@pytest.mark.parametrize("counts", [None, COUNTS])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_pruned_as_its_samples_are(name, counts):
    inputs = drawn("continuous", counts=counts)
    k = 11 if counts is None else 7
    indices, tokens = leave(name, inputs, k)
    for row in range(BATCH):
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], inputs)
        alone, its_tokens = leave(name, one, k)
        np.testing.assert_array_equal(alone[0], indices[row])
        np.testing.assert_allclose(its_tokens[0], tokens[row], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_one_compilation_serves_all_frames(name):
    for seed in range(3):
        for k in (7, 60):
            leave(name, drawn("continuous", seed, counts=COUNTS), k)
    check_traces(METHODS[name])


@pytest.mark.parametrize("name", NAMES)
def test_no_array_of_pairs_is_held(name):
    inputs = jax.tree.map(lambda leaf: leaf[:1], drawn("continuous"))
    text = compiled.lower(METHODS[name], None, inputs, 11).compile().as_text()
    shapes = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", text)
    assert max(math.prod(int(size) for size in shape.split(",")) for shape in shapes) < LENGTH**2


@pytest.mark.parametrize(
    ("name", "layers", "want"),
    [
        ("fastv", 32, ((2, 72),)),
        ("fastv", 28, ((2, 72),)),
        ("fastv", 64, ((4, 72),)),
        ("fastv", 6, ((2, 72),)),  # layer 1, not 0, is read
        ("fastv", 2, ((1, 72),)),
        ("sparsevlm", 32, ((3, 288), (7, 144), (16, 72))),
        ("sparsevlm_v1", 28, ((3, 288), (6, 144), (14, 72))),
        ("pyramiddrop", 32, ((8, 288), (16, 144), (24, 72))),
        ("pyramiddrop", 28, ((7, 288), (14, 144), (21, 72))),
        ("specprune", 32, ((1, 104), (2, 72))),  # 72 and a = 576 * 28 / 512 = 31.5
        ("specprune", 28, ((1, 104), (2, 72))),
    ],
)
def test_cuts_at_an_eighth_of_576_tokens(name, layers, want):
    assert cut_plan(METHODS[name], 576, 1 / 8, layers) == want


# (Ratio, second version, first version: kept and c recycled, e.g. of 276 deleted tokens 83, in 9).
RELEASED = [
    (1 / 3, (300, 200, 118), (300 + 9, 200 + 4, 110 + 3)),
    (2 / 9, (238, 108, 60), (303 + 9, 110 + 7, 36 + 3)),
    (1 / 6, (246, 54, 28), (238 + 11, 48 + 7, 26 + 1)),
    (0.1, (66, 34, 20), (66 + 16, 30 + 2, 17 + 1)),
]


@pytest.mark.parametrize(("ratio", "second", "first"), RELEASED)
def test_sparsevlm_as_published_has_the_released_counts(ratio, second, first):
    for name, want in (("sparsevlm", second), ("sparsevlm_v1", first)):
        pruner = make_pruner(name, as_published=True)
        assert tuple(k for _, k in cut_plan(pruner, 576, ratio, 32)) == want
        assert pruner.budget(576, ratio) == want[-1]
        with pytest.raises(UserError, match="keep_ratio"):
            pruner.budget(576, 1.5)


@pytest.mark.parametrize(("live", "k", "kept"), [(576, 309, 300), (309, 204, 200), (82, 32, 30)])
def test_sparsevlm_as_published_keeps_the_released_counts(live, k, kept):
    assert k - recycled_among(live, k) == kept


def test_released_counts_grow_with_the_tokens():
    pruner = make_pruner("sparsevlm", as_published=True)
    assert [k for _, k in cut_plan(pruner, 1152, 1 / 3, 32)] == [600, 400, 236]
    first = make_pruner("sparsevlm_v1", as_published=True)
    assert [k for _, k in cut_plan(first, 1152, 1 / 3, 32)] == [617, 407, 226]
    for n in (1, 2, 3, 10, 50):
        for each in (pruner, first):
            assert all(k >= 1 for _, k in cut_plan(each, n, 1 / 9, 32))


@pytest.mark.parametrize("n", [2, 31, 90, 576])
def test_recycled_tokens_are_what_the_deleted_ones_give(n):
    for k in range(1, n + 1):
        assert k - recycled_among(n, k) == split(n, k)


@pytest.mark.parametrize("clusters", [1, 2, 5, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_clusters_are_those_of_the_formula(kind, clusters):
    tokens = drawn(kind, 5).tokens[0, :24]
    want = clustered(tokens.astype(np.float64), clusters)
    centres, means = jit_cluster_means(tokens, np.ones(24, bool), clusters)
    np.testing.assert_array_equal(centres, sorted(want))
    np.testing.assert_allclose(means, [want[centre] for centre in sorted(want)], atol=1e-5)


def test_clusters_of_large_tokens_are_told_apart():
    """rho, exp(-200) at most, is 0 in float32 for all of these."""
    tokens = np.float32([[0.0], [30.0], [1000.0], [1020.0], [-3000.0]])
    centres, means = jit_cluster_means(tokens, np.ones(5, bool), 2)
    np.testing.assert_array_equal(centres, [2, 3])
    np.testing.assert_allclose(np.asarray(means)[:, 0], [-492.5, 1020.0])


def test_where_no_word_is_above_the_mean_all_rate():
    inputs = drawn("continuous").replace(text=np.zeros((BATCH, WORDS, DIM), np.float32))
    one_head = inputs.replace(text_rows=inputs.text_rows[:, :1])
    scores = np.asarray(jit_scores(METHODS["sparsevlm"], None, one_head))
    for row, sample in enumerate(samples(one_head)):
        want = sample["text_rows"][0][sample["words"]].mean(axis=0)
        np.testing.assert_allclose(scores[row], want, rtol=1e-5)


def test_scores_of_rows_are_means():
    inputs = drawn("continuous")
    for name in ("fastv", "pyramiddrop"):
        scores = jit_scores(METHODS[name], None, inputs)
        np.testing.assert_allclose(scores, inputs.last_row.mean(axis=1), rtol=1e-6)
    scores = np.asarray(jit_scores(METHODS["sparsevlm"], None, inputs))
    for row, sample in enumerate(samples(inputs)):
        want = np.array(rater_scores(sample, 2)) / (2 * len(raters_of(sample)))
        np.testing.assert_allclose(scores[row], want, rtol=1e-5)


def test_only_what_was_published_so_rounds_and_renumbers():
    assert make_pruner("fastv", as_published=True).budget(30, 0.32) == 10
    assert METHODS["fastv"].budget(30, 0.32) == 9
    assert round_keep(30, 0.01) == 1
    assert falling_keep(1000, 0.001, 3) == (100, 10, 1)
    assert falling_keep(1000, 0.343, 3) == (700, 490, 343)
    for k in (100, 75, 28):  # as many as methods with one cut keep, of whatever ratio
        assert falling_keep(112, k / 112, 3)[-1] == num_keep(112, k / 112)
    renumbering = {name for name in NAMES if METHODS[name].renumber}
    assert not renumbering
    for name in ("sparsevlm", "sparsevlm_v1", "pyramiddrop", "fastv"):
        published = make_pruner(name, as_published=True)
        assert published.renumber == (name in ("sparsevlm_v1", "pyramiddrop"))
    assert [name for name in NAMES if METHODS[name].cuts.own_rows] == ["pyramiddrop"]
    assert cut_plan(make_pruner("fastv", layer=3), 100, 0.5, 32) == ((3, 50),)


def frame(pixels, attention, state, cut=0):
    """One head, one word, tokens of two pixels."""
    pixels = np.float32(pixels)
    rows = np.float32(attention)[:, None, None]
    return PrunerInputs(
        tokens=np.zeros((*pixels.shape[:2], 1), np.float32),
        text_rows=rows,
        pixels=pixels,
        state=state,
        cut=cut,
    )


def test_specprune_keeps_the_union_of_the_release():
    """Ten tokens, a = 1: changed | three by attention | kept before, on the first cut."""
    pruner = make_pruner("specprune", attended=0.1)
    pixels = np.ones((1, 10, 2))
    attention = np.arange(10)[None] / 100
    start = pruner.temporal.init(frame(pixels, attention, None))
    first = compiled(pruner, None, frame(pixels, attention, start), 3)
    np.testing.assert_array_equal(first.indices, [[7, 8, 9]])  # attention alone

    kept = np.isin(np.arange(10), [2, 9])[None]
    state = pruner.temporal.observe(start, Seen(kept=kept, pixels=np.float32(pixels)))
    pixels[0, 0] = (1, 0)  # another colour
    pixels[0, 1] = 0  # black has no colour, and counts as changed
    pixels[0, 3] = 0.25  # darker
    given = frame(pixels, attention, state)
    for k, want in ((2, [0, 1]), (5, [0, 1, 7, 8, 9]), (6, [0, 1, 2, 7, 8, 9])):
        np.testing.assert_array_equal(compiled(pruner, None, given, k).indices, [want])
    second = compiled(pruner, None, given.replace(cut=1), 4).indices
    np.testing.assert_array_equal(second, [[0, 1, 2, 9]])  # one by attention, one kept before


def test_specprune_remembers_each_drive_by_itself():
    """A drive that starts anew is pruned as on its first frame, whatever its neighbours do."""
    pruner = METHODS["specprune"]
    inputs = drawn("continuous")
    start = pruner.temporal.init(inputs)
    kept = np.zeros((BATCH, LENGTH), bool)
    other = inputs.pixels.copy()
    other[:, ::7, 0] += 5
    state = pruner.temporal.observe(start, Seen(kept=kept, pixels=other))
    assert not start.known.any()
    assert state.known.all()
    new = np.array([True, False, True, False])
    mixed = jax.tree.map(
        lambda a, b: np.where(new.reshape(-1, *[1] * (a.ndim - 1)), a, b), start, state
    )
    got, first, later = (
        leave("specprune", inputs.replace(state=each), 11)[0] for each in (mixed, start, state)
    )
    np.testing.assert_array_equal(got, np.where(new[:, None], first, later))
    assert (first != later).any(axis=1).all()


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("fastv", "last_row"),
        ("pyramiddrop", "last_row"),
        ("sparsevlm", "text_rows"),
        ("sparsevlm_v1", "embeddings"),
        ("specprune", "state"),
    ],
)
def test_what_a_method_needs_must_be_given(name, need):
    with pytest.raises(ValueError, match=rf"{name}.*needs {need}"):
        keep_tokens(METHODS[name], None, drawn("continuous").replace(**{need: None}), 3)
