"""Every kernel against JAX's own attention that holds all scores."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.models.attention import (
    attention,
    attention_kernel,
    blockwise_attention,
    kernels_of,
)
from fastdrive_jax.models.attention_chunked import chunked_attention
from fastdrive_jax.models.attention_splash import splash_attention

# queries, keys, causal, lengths; some need several blocks, parts and filled-up ones
CASES = {
    "short": (7, 7, False, None),
    "other keys": (5, 11, False, None),
    "lengths": (70, 130, False, (130, 33)),
    "causal": (33, 33, True, None),
    "long": (900, 900, False, (900, 700)),
    "long keys": (600, 4500, False, (4500, 1000)),
    "long and causal": (1030, 1030, True, None),
    "causal with lengths": (600, 600, True, (600, 411)),
}
KERNELS = {
    "blockwise": blockwise_attention,
    "chunked": functools.partial(chunked_attention, chunk_bytes=1 << 20),
    "splash": functools.partial(splash_attention, interpret=True),
}


jit_attention = jax.jit(attention, static_argnames=("causal", "kernel"))
JITTED = {
    "blockwise": jax.jit(blockwise_attention),
    "chunked": jax.jit(functools.partial(chunked_attention, chunk_bytes=1 << 10)),
}


def drawn(count, keys, groups=2, heads=4, size=8):
    normal = np.random.default_rng(count).standard_normal
    query = 4 * normal((2, count, heads, size), np.float32)
    key = 4 * normal((2, keys, groups, size), np.float32)
    value = normal((2, keys, groups, size), np.float32)
    return query, key, value, normal(query.shape, np.float32)


def out_and_grads(attend, query, key, value, weights):
    def loss(query, key, value):
        out = attend(query, key, value)
        return (weights * out).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)


@functools.cache
def expected_of(case):
    """JAX's own results and gradients, for whichever kernels."""
    count, keys, causal, lengths = CASES[case]
    lengths = None if lengths is None else np.array(lengths)
    exact = functools.partial(attention, kernel="xla", causal=causal, lengths=lengths)
    return out_and_grads(exact, *drawn(count, keys))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_and_gradients_equal_jaxs_own(case, kernel):
    count, keys, causal, lengths = CASES[case]
    if kernel == "splash" and case.startswith("long"):
        pytest.skip("interpreted: minutes")
    lengths = None if lengths is None else np.array(lengths)
    attend = functools.partial(KERNELS[kernel], causal=causal, lengths=lengths)
    got, out = out_and_grads(attend, *drawn(count, keys))
    want, expected = expected_of(case)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    for one, other in zip(got, want, strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, atol=5e-4)


@pytest.mark.parametrize("kernel", JITTED)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_query_heads_share_keys(groups, kernel):
    query, key, value, _ = drawn(9, 9, groups)
    shared = 4 // groups
    keys, values = np.repeat(key, shared, 2), np.repeat(value, shared, 2)
    whole = jit_attention(query, keys, values, kernel="xla")
    np.testing.assert_allclose(JITTED[kernel](query, key, value), whole, atol=2e-5)


@pytest.mark.parametrize("kernel", JITTED)
def test_half_precision_is_as_near_as_jaxs_own(kernel):
    query, key, value, _ = (x.astype(jnp.bfloat16) for x in drawn(40, 40))
    exact = jit_attention(*(x.astype(np.float32) for x in (query, key, value)), kernel="xla")

    def error(out):
        assert out.dtype == jnp.bfloat16
        return np.abs(np.asarray(out).astype(np.float32) - exact).max()

    own = error(jit_attention(query, key, value, kernel="xla"))
    assert error(JITTED[kernel](query, key, value)) <= 1.5 * own


def test_scores_that_overflow_an_exponential():
    x = np.full((1, 3, 1, 4), 100, np.float32)
    np.testing.assert_allclose(jit_attention(x, x, x), x)


def test_one_query_sees_its_samples_keys_only():
    query, key, value, _ = drawn(1, 12)
    out = np.asarray(jit_attention(query, key, value, lengths=np.array([12, 5])))
    alone = jit_attention(query[1:], key[1:, :5], value[1:, :5])
    np.testing.assert_allclose(out[1:], alone, atol=1e-6)


@pytest.mark.parametrize(
    "kernel",
    [blockwise_attention, functools.partial(chunked_attention, chunk_bytes=1 << 24)],
    ids=["blockwise", "chunked"],
)
@pytest.mark.parametrize("causal", [False, True])
def test_all_scores_are_never_held(causal, kernel):
    x = jax.ShapeDtypeStruct((1, 16384, 2, 64), jnp.float32)
    run = jax.jit(functools.partial(kernel, causal=causal))
    grad = jax.jit(jax.grad(lambda *y: run(*y).sum(), argnums=(0, 1, 2)))
    for function in (run, grad):
        memory = function.lower(x, x, x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 16384 * 16384 * 4 / 4


@pytest.mark.parametrize(
    ("platform", "dtype", "size", "kernel"),
    [
        ("cpu", jnp.float32, 64, "blockwise"),
        ("cpu", jnp.bfloat16, 64, "blockwise"),
        ("gpu", jnp.bfloat16, 128, "cudnn"),
        ("gpu", jnp.float16, 80, "cudnn"),
        ("gpu", jnp.float32, 128, "chunked"),
        ("gpu", jnp.bfloat16, 256, "chunked"),
        ("cuda", jnp.bfloat16, 128, "chunked"),
        ("tpu", jnp.float32, 128, "splash"),
    ],
)
def test_the_choice_of_a_kernel(platform, dtype, size, kernel):
    assert attention_kernel(dtype, size, platform) == kernel


def test_a_trace_may_be_for_another_platform():
    own = attention_kernel(jnp.float32, 64)
    with kernels_of("tpu"):
        assert attention_kernel(jnp.bfloat16, 64) == "splash"
        with kernels_of("any"):
            assert attention_kernel(jnp.bfloat16, 64) == "xla"
        assert attention_kernel(jnp.bfloat16, 64, "gpu") == "cudnn"
    with pytest.raises(KeyError), kernels_of("tpu"):
        raise KeyError
    assert attention_kernel(jnp.float32, 64) == own


def test_a_program_is_traced_for_each_platform():
    """`jax.jit` would otherwise take what it traced for another platform."""
    row = jax.ShapeDtypeStruct((1, 256, 2, 32), jnp.float32)
    run = jax.jit(lambda x: attention(x, x, x))
    found = {}
    for platform in ("cpu", "tpu", "cpu"):
        with kernels_of(platform):
            found.setdefault(platform, []).append(str(run.trace(row).jaxpr))
    assert "pallas_call" in found["tpu"][0]
    assert "pallas_call" not in "".join(found["cpu"])


@pytest.mark.parametrize(
    ("platform", "count", "loops"),
    [("gpu", 64, False), ("cuda", 64, False), ("gpu", 4096, True), ("cpu", 64, True)],
)
def test_a_gpu_holds_the_scores_of_short_sequences_at_once(platform, count, loops):
    row = jax.ShapeDtypeStruct((1, count, 4, 32), jnp.float32)
    with kernels_of(platform):
        program = str(jax.make_jaxpr(lambda x: attention(x, x, x))(row))
    assert ("scan[" in program or "while[" in program) == loops


def test_causal_attention_of_other_keys_is_refused():
    query, key, value, _ = drawn(5, 11)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(query, key, value, causal=True)


@pytest.mark.parametrize(
    ("capability", "kernel"),
    [("9.0", "cudnn"), ("12.0", "cudnn"), ("7.5", "chunked"), ("gfx942", "chunked")],
)
def test_flash_attention_is_for_gpus_that_have_it(monkeypatch, capability, kernel):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert attention_kernel(jnp.bfloat16, 64) == kernel


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU with cuDNN")
@pytest.mark.parametrize("case", CASES)
def test_cudnn_on_a_gpu(case):
    """Odd numbers of keys among the cases, whose gradient JAX refuses as they are."""
    count, keys, causal, lengths = CASES[case]
    lengths = None if lengths is None else jnp.array(lengths)
    inputs = drawn(count, keys, size=64)
    halves = [x.astype(jnp.bfloat16) for x in inputs]
    settings = {"causal": causal, "lengths": lengths}
    got, out = out_and_grads(functools.partial(attention, kernel="cudnn", **settings), *halves)
    exact = [x.astype(jnp.float32) for x in halves]
    want, expected = out_and_grads(functools.partial(attention, kernel="xla", **settings), *exact)
    for one, other in zip((out, *got), (expected, *want), strict=True):
        error = jnp.linalg.norm((one.astype(jnp.float32) - other).ravel())
        assert float(error / jnp.linalg.norm(other.ravel())) < 2e-2
