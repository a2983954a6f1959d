"""VLA-Pruner beside a slow NumPy form of its formulas."""

import math
import re

import jax
import numpy as np
import pytest
from traced_pruners import traced

from fastdrive_jax.pruning import PrunerInputs, make_pruner
from fastdrive_jax.pruning.budgets import per_camera
from fastdrive_jax.pruning.interface import Seen, cut_plan, keep_tokens

BATCH, LENGTH, DIM, HEADS, CAMERAS = 4, 30, 8, 2, 3
COUNTS = (30, 23, 17, 12)
FRAMES = (0, 1, 3, 3)
FORMS = (None, "openvla", "openvla-oft")


def drawn(kind="continuous", seed=0, counts=None):
    """Four samples with 0, 1, 3 and 3 frames behind them; padding is no number.

    "tied" tokens have four entries of ±1 and attention in eighths: all comparisons are exact.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(BATCH, LENGTH, DIM))
    received = rng.random((BATCH, LENGTH))
    last_row = rng.random((BATCH, HEADS, LENGTH))
    history = rng.random((BATCH, 3, LENGTH))
    if kind == "tied":
        places = np.argsort(tokens, axis=-1) < 4
        tokens = places * rng.choice([-1.0, 1.0], tokens.shape)
        received, last_row = (np.round(8 * x) / 8 for x in (received, last_row))
        history = np.repeat(np.round(8 * history[:, :1]) / 8, 3, axis=1)
    history *= (np.arange(3) < np.array(FRAMES)[:, None])[..., None]
    if counts is not None:
        padding = np.arange(LENGTH) >= np.array(counts)[:, None]
        tokens[padding], received[padding] = np.nan, np.nan
        last_row[np.repeat(padding[:, None], HEADS, axis=1)] = np.nan
    return PrunerInputs(
        tokens=np.zeros((BATCH, LENGTH, 1), np.float32),
        embeddings=tokens.astype(np.float32),
        received=received.astype(np.float32),
        last_row=last_row.astype(np.float32),
        state={"rows": history.astype(np.float32), "frames": np.array(FRAMES)},
        count=None if counts is None else np.array(counts),
        grid=(2, 5),
    )


def best(scores, k):
    return set(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k])


def oracle(tokens, semantic, history, frames, k, form):
    """One sample by the formulas, newest frame first."""
    candidates = best(semantic, k)
    if frames:
        powers = [3, 2, 1] if form == "openvla" else [1, 2, 3]
        weights = [0.8**power for power in powers[:frames]]
        action = sum(w * row for w, row in zip(weights, history, strict=False)) / sum(weights)
        candidates |= best(action, k)
    candidates = sorted(candidates)
    units = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    distance = 1 - units @ units.T

    def nearest(j, others):
        return min((distance[i, j] for i in others if i != j), default=np.inf)

    kept = [max(candidates, key=lambda j: (nearest(j, candidates), -j))]
    while len(kept) < k:
        left = [j for j in candidates if j not in kept]
        kept.append(max(left, key=lambda j: (nearest(j, kept), -j)))
    return np.sort(kept)


def expected(inputs, k, form):
    rows = []
    for sample, frames in enumerate(FRAMES):
        count = LENGTH if inputs.count is None else int(inputs.count[sample])
        heads = np.asarray(inputs.last_row[sample], np.float64).mean(axis=0)
        semantic = heads if form == "openvla" else np.asarray(inputs.received[sample], np.float64)
        tokens = np.asarray(inputs.embeddings[sample, :count], np.float64)
        history = np.asarray(inputs.state["rows"][sample, :, :count], np.float64)
        rows.append(oracle(tokens, semantic[:count], history, frames, k, form))
    return np.stack(rows)


METHODS = {form: make_pruner("vlapruner", as_published=form) for form in FORMS}
METHODS["openvla"] = make_pruner("vlapruner_released")  # the same under a name of its own
compiled, check_traces = traced(keep_tokens)


def choose(form, inputs, k):
    return np.asarray(compiled(METHODS[form], None, inputs, k).indices)


@pytest.mark.parametrize("k", [1, 4, 11, 18, LENGTH])
@pytest.mark.parametrize("kind", ["continuous", "tied"])
@pytest.mark.parametrize("form", FORMS)
def test_the_formula_gives_the_same_tokens(form, kind, k):
    for seed in range(3):
        inputs = drawn(kind, seed)
        np.testing.assert_array_equal(choose(form, inputs, k), expected(inputs, k, form))


@pytest.mark.parametrize("k", [1, 7, min(COUNTS)])
@pytest.mark.parametrize("form", FORMS)
def test_padding_is_neither_kept_nor_looked_at(form, k):
    inputs = drawn(counts=COUNTS)
    np.testing.assert_array_equal(choose(form, inputs, k), expected(inputs, k, form))


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_a_batch_is_pruned_as_its_samples_are(counts):
    inputs = drawn(counts=counts)
    k = 11 if counts is None else 7
    together = choose(None, inputs, k)
    for row in range(BATCH):
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], inputs)
        np.testing.assert_array_equal(choose(None, one, k)[0], together[row])


def test_one_compilation_serves_all_frames():
    for seed in range(3):
        for k in (4, 11):
            choose(None, drawn(seed=seed), k)
    check_traces(METHODS[None])


def test_history_is_a_window_of_frames():
    temporal = METHODS[None].temporal
    state = temporal.init(drawn())
    assert temporal.warmup == 3
    observe = jax.jit(temporal.observe)
    for frame in range(5):
        action = np.full((BATCH, LENGTH), frame + 1, np.float32)
        state = observe(state, Seen(action=action))
        newest_first = [float(max(frame + 1 - age, 0)) for age in range(3)]
        np.testing.assert_array_equal(np.asarray(state["rows"])[:, :, 0], [newest_first] * BATCH)
        np.testing.assert_array_equal(state["frames"], min(frame + 1, 3))


def test_it_stands_and_looks_where_it_was_published():
    def where(form, layers=32, ratio=0.25, n=256):
        method = METHODS[form]
        return cut_plan(method, n, ratio, layers), method.temporal.layers(layers)

    assert where(None) == (((3, 64),), tuple(range(16, 32)))
    assert where("openvla") == (((3, 64),), (15,))
    assert where("openvla", ratio=0.375, n=101)[0] == ((3, 38),)  # 37.9 rounded
    assert where(None, ratio=0.375, n=101)[0] == ((3, 37),)
    assert where("openvla-oft")[0] == ((4, 64),)
    # 7.25% of 256 tokens in each of two views, not of 512 together, which would be 37.
    assert METHODS["openvla-oft"].budget(512, 0.0725) == 2 * 19
    assert where(None, layers=36)[0] == ((3, 64),)
    assert where(None, layers=5) == (((1, 64),), (2, 3, 4))
    assert cut_plan(make_pruner("vlapruner", layer=2), 256, 0.5, 5) == ((2, 128),)
    assert cut_plan(METHODS[None], 256, 1.0, 32) == ()  # a ratio of 1 only watches


def test_each_camera_has_its_own_budget_as_published_for_oft():
    inputs = drawn()
    method = per_camera(METHODS["openvla-oft"], CAMERAS)
    got = np.asarray(compiled(method, None, inputs, 12).indices)
    for sample, frames in enumerate(FRAMES):
        want = []
        for camera in range(CAMERAS):
            part = slice(10 * camera, 10 * camera + 10)
            arrays = inputs.embeddings, inputs.received, inputs.state["rows"]
            tokens, received, rows = (np.asarray(x[sample], np.float64) for x in arrays)
            found = oracle(tokens[part], received[part], rows[:, part], frames, 4, "openvla-oft")
            want.extend(10 * camera + found)
        np.testing.assert_array_equal(got[sample], want)


@pytest.mark.parametrize("settings", [{"window": 0}, {"decay": 0.0}, {"decay": 1.5}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="must be at least 1"):
        make_pruner("vlapruner", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"as_published": True},
        {"as_published": False},
        {"as_published": "openvla_oft"},
        {"as_published": "OpenVLA"},
        {"signals": "semantic"},
    ],
)
def test_what_nobody_published_is_refused(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=rf"{name}={value!r} must be"):
        make_pruner("vlapruner", **settings)
    if name == "signals":
        with pytest.raises(ValueError, match="'prefill', 'action'"):
            make_pruner("vlapruner_released", **settings)


def test_only_candidates_are_compared():
    length, k = 512, 40
    inputs = PrunerInputs(
        tokens=np.zeros((1, length, 1), np.float32),
        embeddings=np.zeros((1, length, 4), np.float32),
        received=np.zeros((1, length), np.float32),
        state={"rows": np.zeros((1, 3, length), np.float32), "frames": np.zeros(1, np.int32)},
    )
    text = compiled.lower(METHODS[None], None, inputs, k).compile().as_text()
    shapes = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", text)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert (2 * k) ** 2 <= largest < length**2 / 8
