"""The order in which tokens are computed, beside a slow form of the released rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.pruning import Pruner, PrunerInputs, make_pruner
from fastdrive_jax.pruning.interface import Cuts, Seen, cut_plan, keep_tokens
from fastdrive_jax.pruning.vla_cache import LastFrame

BATCH, LENGTH, PIXELS, SHARE = 3, 64, 12, 120 / 256
COUNTS = (64, 51, 40)
METHOD = make_pruner("vlacache")
compiled = jax.jit(keep_tokens, static_argnames=("pruner", "k"))


def drawn(seed=0):
    """Two frames in which some tokens changed and one is black; many have the same attention."""
    rng = np.random.default_rng(seed)
    before = rng.uniform(0.5, 1, (BATCH, LENGTH, PIXELS))
    pixels = before * 1.5  # light alone is no change
    moved = rng.random((BATCH, LENGTH)) < 0.2
    pixels[moved] = rng.uniform(0, 1, (moved.sum(), PIXELS)) ** 4
    before[:, 5] = pixels[:, 5] = 0
    attention = rng.integers(0, 8, (BATCH, LENGTH)) / 64
    return pixels.astype(np.float32), before.astype(np.float32), attention.astype(np.float32)


def computed(pixels, before, attention, k, **more):
    state = LastFrame(jnp.asarray(before), jnp.asarray(attention))
    tokens = jnp.zeros((*pixels.shape[:2], 4))
    inputs = PrunerInputs(tokens, pixels=jnp.asarray(pixels), state=state, **more)
    return np.asarray(compiled(METHOD, None, inputs, k).indices)


def changed(pixels, before, token):
    a, b = pixels[token].astype(float), before[token].astype(float)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return norms == 0 or a @ b / norms < 0.996


def order(pixels, before, attention):
    """All tokens in the order in which they are computed."""
    tokens = range(len(pixels))
    return sorted(tokens, key=lambda j: (not changed(pixels, before, j), -attention[j], j))


@pytest.mark.parametrize("k", [1, 12, 31, 64])
def test_changed_tokens_come_first_then_those_with_attention(k):
    data = drawn()
    got = computed(*data, k)
    for sample, rows in enumerate(zip(*data, strict=True)):
        np.testing.assert_array_equal(got[sample], np.sort(order(*rows)[:k]))


def test_padding_is_never_computed_before_a_token():
    pixels, before, attention = drawn()
    padding = np.arange(LENGTH) >= np.array(COUNTS)[:, None]
    for values in (pixels, before, attention):
        values[padding] = np.nan
    got = computed(pixels, before, attention, 31, count=jnp.array(COUNTS))
    for sample, real in enumerate(COUNTS):
        rows = (values[sample, :real] for values in (pixels, before, attention))
        np.testing.assert_array_equal(got[sample], np.sort(order(*rows)[:31]))


def test_a_later_cut_goes_on_in_the_same_order():
    pixels, before, attention = drawn()
    left = computed(pixels, before, attention, 40)
    there = np.take_along_axis(pixels, left[..., None], axis=1)
    again = computed(there, before, attention, 20, ids=jnp.asarray(left))
    np.testing.assert_array_equal(
        np.take_along_axis(left, again, axis=1), computed(pixels, before, attention, 20)
    )


def test_a_budget_of_the_size_of_the_released_set_gives_that_set():
    """What the release computes where no layer takes a share: all that is not reusable."""
    for sample, (pixels, before, attention) in enumerate(zip(*drawn(1), strict=True)):
        del sample
        static = {j for j in range(LENGTH) if not changed(pixels, before, j)}
        ranked = sorted(range(LENGTH), key=lambda j: (-attention[j], j))
        relevant = set(ranked[: round(SHARE * LENGTH)])
        released = sorted(set(range(LENGTH)) - (static - relevant))
        got = computed(pixels[None], before[None], attention[None], len(released))
        np.testing.assert_array_equal(got[0], released)


def test_it_stands_where_it_was_published():
    assert cut_plan(METHOD, 256, 0.0625, 32) == ((2, 128), (6, 64), (9, 32), (11, 16))
    assert [layer for layer, _ in cut_plan(METHOD, 3249, 0.25, 36)] == [2, 7, 10, 12]
    assert cut_plan(make_pruner("vlacache", layers=(2,)), 256, 0.25, 32) == ((2, 64),)
    assert cut_plan(METHOD, 256, 1, 32) == ()
    assert METHOD.temporal.text_layers(32) == (15,)


def test_the_last_frame_is_what_is_remembered():
    pixels, _, attention = map(jnp.asarray, drawn())
    start = METHOD.temporal.init(PrunerInputs(jnp.zeros((BATCH, LENGTH, 4)), pixels=pixels))
    assert start.pixels.shape == pixels.shape
    assert start.text.shape == attention.shape
    after = METHOD.temporal.observe(start, Seen(pixels=pixels, text=attention))
    np.testing.assert_array_equal(after.pixels, pixels)
    np.testing.assert_array_equal(after.text, attention)


def test_only_a_method_with_cuts_and_memory_reuses():
    for parts in ({}, {"cuts": Cuts(lambda layers: (1,))}, {"temporal": METHOD.temporal}):
        with pytest.raises(ValueError, match=r"bare.*reuses"):
            Pruner(name="bare", score=METHOD.score, reuse=True, **parts)
