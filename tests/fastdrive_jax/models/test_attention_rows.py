import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.models.attention_rows import attend_rows, attention_received, attention_rows


def drawn(queries, keys, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (2, queries, 4, 8), (2, keys, 2, 8)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def softmax_rows(query, key, seen):
    """[Q, R, S] of one sample by definition."""
    weights = np.zeros((query.shape[1], len(query), len(key)))
    for row, count in enumerate(seen):
        for head in range(query.shape[1]):
            scores = key[:count, head // 2] @ query[row, head] / np.sqrt(8)
            share = np.exp(scores - scores.max())
            weights[head, row, :count] = share / share.sum()
    return weights


def test_rows_of_weights_are_those_of_a_softmax():
    query, key = drawn(3, 10)
    seen = np.array([[10, 4, 1], [6, 6, 3]])
    rows = np.asarray(jax.jit(attention_rows)(query, key, seen))
    assert rows.shape == (2, 4, 3, 10)
    for sample in range(2):
        want = softmax_rows(query[sample], key[sample], seen[sample])
        np.testing.assert_allclose(rows[sample], want, atol=1e-5)
    whole = np.asarray(jax.jit(attention_rows)(query, key))
    np.testing.assert_allclose(whole[0, :, 0], rows[0, :, 0], atol=1e-6)


@pytest.mark.parametrize("block_bytes", [1 << 24, 5000])
def test_rows_anywhere_attend_to_what_they_see(monkeypatch, block_bytes):
    monkeypatch.setattr("fastdrive_jax.models.attention_rows._BLOCK_BYTES", block_bytes)
    query, key = drawn(21, 34)
    value = key[::-1, :, ::-1]
    seen = np.random.default_rng(1).integers(1, 35, (2, 21))
    attend = jax.jit(functools.partial(attend_rows))  # traced anew for each size of a block
    got = np.asarray(attend(query, key, value, seen))
    for sample in range(2):
        values = np.repeat(value[sample], 2, axis=1)
        weights = softmax_rows(query[sample], key[sample], seen[sample])
        want = np.einsum("qrs,sqd->rqd", weights, values)
        np.testing.assert_allclose(got[sample], want, atol=1e-5)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_bytes", [1 << 24, 2000])
def test_what_tokens_receive_is_the_mean_over_real_rows(monkeypatch, causal, block_bytes, every):
    monkeypatch.setattr("fastdrive_jax.models.attention_rows._BLOCK_BYTES", block_bytes)
    query, key = drawn(21, 21)
    lengths = np.array([21, 13])
    received = jax.jit(functools.partial(attention_received, causal=causal, every=every))
    got = np.asarray(received(query, key, lengths))
    for sample, length in enumerate(lengths):
        rows, keys = query[sample, :length:every], key[sample]
        seen = np.arange(1, length + 1, every) if causal else np.full(len(rows), length)
        want = softmax_rows(rows, keys, seen).mean(axis=(0, 1))
        np.testing.assert_allclose(got[sample], want, atol=1e-5)
        np.testing.assert_allclose(got[sample].sum(), 1, atol=1e-5)
    whole = np.asarray(received(query, key))
    np.testing.assert_allclose(whole[0], got[0], atol=1e-6)
    # The first rows alone, which see what they saw.
    few = np.array([9, 13])
    got = np.asarray(received(query, key, lengths, rows=few))
    for sample, (length, count) in enumerate(zip(lengths, few, strict=True)):
        rows, keys = query[sample, :count:every], key[sample]
        seen = np.arange(1, count + 1, every) if causal else np.full(len(rows), length)
        want = softmax_rows(rows, keys, seen).mean(axis=(0, 1))
        np.testing.assert_allclose(got[sample], want, atol=1e-5)


def test_no_array_of_pairs_is_held():
    shapes = [jax.ShapeDtypeStruct((1, 4096, heads, 8), jnp.float32) for heads in (4, 2)]
    run = jax.jit(lambda query, key: attention_received(query, key, causal=True))
    text = run.lower(*shapes).compile().as_text()
    sizes = re.findall(r"\bf32\[([\d,]+)\]", text)
    assert max(math.prod(map(int, size.split(","))) for size in sizes) < 4096**2
