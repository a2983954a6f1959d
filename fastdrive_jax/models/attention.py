"""One entry point for softmax attention; which kernel runs is a choice that can be asked for.

| device | type | kernel |
| --- | --- | --- |
| NVIDIA since Ampere | half precision | "cudnn", flash attention |
| GPU | else | "chunked": all heads, some query rows at a time |
| TPU | any | "splash", Pallas |
| all else | any | "blockwise", below: a few query rows against all keys at a time |

None of them holds N x N scores of a long sequence. On a CPU one head at a time: all heads' scores
at once go through memory several times. Where they are few (some 45 tokens on a CPU, 64 MiB on a
GPU), the loop is what takes time, and "xla" does all at once.

Under `jax.set_mesh` each device attends for its own samples and heads (`attention_mesh`).
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastdrive_jax.models.attention_chunked import chunked_attention
from fastdrive_jax.models.attention_mesh import current_mesh, over_mesh
from fastdrive_jax.models.attention_splash import splash_attention

_BLOCK_BYTES = 1 << 24  # most of a block of scores; less fits a cache but leaves threads idle
_MOST_ROWS = 1024  # of such a block
_CAUSAL_PARTS = 8  # a part of the queries meets no key behind its last one
_CAUSAL_FROM = 512  # shorter sequences are one part
_LONG = 4096  # keys from which they come in blocks too, unless causal
_ROWS, _KEYS = 512, 1024  # of a block of those
_SHORT_BYTES = 1 << 26  # of all scores, up to which a GPU holds them
_FEW_SCORES = 1 << 11, 1 << 15  # of a head, and of all, up to which a CPU does all heads at once
_NOTHING = -1e30  # score of a key that is out of sight; finite, so that no row divides 0 by 0
_platform = jax.make_user_context()  # `jax.jit` traces anew where it differs


def kernels_of(platform: str) -> contextlib.AbstractContextManager:
    """What is traced within takes the kernels of a platform, which need not be here.

    One program for several platforms won't do: JAX lowers each branch of it for all of them, and a
    Pallas kernel of a TPU has no form for a CPU.

    Args:
        platform: "cpu", "gpu" or "tpu"; "cuda" for a GPU without cuDNN, whose calls `jax.export`
            does not keep; "any" for the plain operations that converters know.
    """
    return _platform(platform)


def plain_operations() -> bool:
    """Whether a program is made for a converter, see `kernels_of`."""
    return _platform.value == "any"


def attention_kernel(dtype: jnp.dtype, head_dim: int, platform: str | None = None) -> str:
    """Name of the kernel that `attention` takes for queries of this type.

    Args:
        dtype: Of the queries.
        head_dim: d.
        platform: See `kernels_of`; None takes what that says, or asks jax.
    """
    asked = platform or _platform.value
    platform = asked or jax.default_backend()
    if platform == "any":
        return "xla"
    if platform in ("gpu", "cuda"):
        half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        fits = half and head_dim % 8 == 0 and head_dim <= 128
        here = platform == "gpu" and (asked or has_cudnn(jax.local_devices()[0]))
        return "cudnn" if fits and here else "chunked"
    return "splash" if platform == "tpu" else "blockwise"


def has_cudnn(device: jax.Device) -> bool:
    """Whether a GPU can run cuDNN's flash attention: NVIDIA's since Ampere, and no other's."""
    try:
        return float(getattr(device, "compute_capability", "none")) >= 8.0
    except ValueError:  # AMD's are words
        return False


def attention(
    query: Float[Array, "B N Q d"],
    key: Float[Array, "B S G d"],
    value: Float[Array, "B S G d"],
    *,
    causal: bool = False,
    lengths: Int[Array, " B"] | None = None,
    kernel: str | None = None,
) -> Float[Array, "B N Q d"]:
    """Softmax attention.

    Args:
        query: [B, N, Q, d].
        key: [B, S, G, d], G dividing Q.
        value: [B, S, G, d].
        causal: Whether query i sees keys 0 to i only; N and S are then equal.
        lengths: How many keys of each sample are real; None takes all. A sample needs one.
        kernel: "cudnn", "chunked", "splash", "blockwise" or "xla", which holds all scores; None
            chooses.
    """
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError(f"causal needs as many queries as keys, got {query.shape}, {key.shape}")
    if kernel is None:
        kernel = _kernel_for(query, key)
    run = functools.partial(_KERNELS.get(kernel, functools.partial(_fused, kernel)), causal=causal)
    mesh = current_mesh()
    if mesh is None or kernel == "xla":
        return run(query, key, value, lengths=lengths)
    return over_mesh(run, mesh, query, key, value, lengths)


def _kernel_for(query, key) -> str:
    """`attention_kernel`, or "xla" where there is nothing to fuse."""
    batch, count, heads, size = query.shape
    kernel = attention_kernel(query.dtype, size)
    scores = count * key.shape[1]
    short = {
        "blockwise": scores <= _FEW_SCORES[0] and batch * heads * scores <= _FEW_SCORES[1],
        "chunked": 4 * batch * heads * scores <= _SHORT_BYTES,
    }
    return "xla" if count == 1 or short.get(kernel) else kernel


def _cudnn(query, key, value, *, causal, lengths):
    """JAX refuses the gradient of odd lengths, so those get a row that is not looked at."""
    count, keys = query.shape[1], key.shape[1]
    if keys % 2 and lengths is None:
        lengths = jnp.full(len(key), keys, jnp.int32)

    def even(x):
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    rows = map(even, (query, key, value))
    return _fused("cudnn", *rows, causal=causal, lengths=lengths)[:, :count]


def _fused(kernel, query, key, value, *, causal, lengths):
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation=kernel,
    )


def blockwise_attention(
    query: Float[Array, "B N Q d"],
    key: Float[Array, "B S G d"],
    value: Float[Array, "B S G d"],
    *,
    causal: bool = False,
    lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B N Q d"]:
    """`attention` by loops over batch, heads and blocks of queries; N x N is never held.

    The backward pass computes the weights again from each row's log-sum-exp, as fused kernels do.
    """
    batch, count, heads, size = query.shape
    groups = key.shape[2]
    # Where all see all keys, the heads that share keys are so many more rows of one product.
    share = heads // groups if causal else 1

    def to_rows(x):
        return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], size)

    rows = to_rows(query).reshape(batch * groups * share, -1, size)
    ends = None if lengths is None else jnp.repeat(lengths, groups * share)
    mixed = _attend(causal, share, rows, to_rows(key), to_rows(value), ends)
    return mixed.reshape(batch, heads, count, size).transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(causal, share, query, key, value, ends):
    return _forward(causal, share, query, key, value, ends)[0]


def _parts(count: int, keys: int, causal: bool) -> list[tuple[int, int, int]]:
    """First query, one past the last, and one past the last key that they see."""
    if not causal or count < _CAUSAL_FROM:
        return [(0, count, keys)]
    step = math.ceil(count / _CAUSAL_PARTS)
    return [(i, min(i + step, count), min(i + step, count)) for i in range(0, count, step)]


def _over_blocks(function, rows, keys: int, carry=()):
    """Scans `function(carry, rows, first)` over blocks of leading rows; the last one is filled up.

    Returns:
        The carry and the results' rows.
    """
    count = rows[0].shape[0]
    most = max(8, min(_MOST_ROWS, _BLOCK_BYTES // (4 * keys)))
    blocks = math.ceil(count / most)
    if blocks == 1:
        return function(carry, rows, 0)
    size = math.ceil(count / blocks)

    def cut(x):
        filled = jnp.pad(x, [(0, blocks * size - count)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(blocks, size, *x.shape[1:])

    def step(carry, inputs):
        return function(carry, inputs[0], inputs[1])

    carry, out = jax.lax.scan(
        step, carry, (tuple(map(cut, rows)), size * jnp.arange(blocks, dtype=jnp.int32))
    )
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)


def _masked(scores, first, causal, end):
    """Scores of queries `first` and on, with keys that they must not see at `_NOTHING`."""
    column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    seen = True
    if causal:
        seen = column <= first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    if end is not None:
        seen = seen & (column < end)
    return scores if seen is True else jnp.where(seen, scores, _NOTHING)


def _products(q, k):
    return jnp.einsum("nd,sd->ns", q, k, preferred_element_type=jnp.float32)


def _head(number, share, key, value, ends):
    """Keys, values and end of one of the flattened query heads."""
    k, v = key[number // share], value[number // share]
    return k, v, None if ends is None else ends[number]


def _forward(causal, share, query, key, value, ends):
    scale = query.shape[-1] ** -0.5

    def one_head(number):
        q = query[number].astype(jnp.float32) * scale  # once here, not on all scores
        k, v, end = _head(number, share, key, value, ends)

        def attend(start, keys, carry, rows, first):
            scores = _masked(_products(rows[0], k[:keys]), start + first, causal, end)
            peak = scores.max(axis=-1, keepdims=True)
            weights = jnp.exp(scores - peak)
            total = weights.sum(axis=-1, keepdims=True)
            mixed = jnp.einsum(
                "ns,sd->nd",
                weights.astype(v.dtype),
                v[:keys],
                preferred_element_type=jnp.float32,
            )
            return carry, ((mixed / total).astype(v.dtype), peak + jnp.log(total))

        if not causal and k.shape[0] >= _LONG:
            return _online(q, k, v, end)
        found = [
            _over_blocks(functools.partial(attend, start, keys), (q[start:stop],), keys)[1]
            for start, stop, keys in _parts(q.shape[0], k.shape[0], causal)
        ]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

    out, log_total = jax.lax.map(one_head, jnp.arange(query.shape[0]))
    return out, (query, key, value, ends, out, log_total)


def _online(q, k, v, end):
    """One head's rows and log-sum-exps, with a running softmax over blocks of keys."""
    count, size = k.shape
    blocks = math.ceil(count / _KEYS)
    end = count if end is None else end
    filled = ((0, blocks * _KEYS - count), (0, 0))
    k, v = (jnp.pad(x, filled).reshape(blocks, _KEYS, size) for x in (k, v))

    def attend(carry, rows, first):
        del first
        (q,) = rows

        def step(state, block):
            mixed, peak, total = state
            k, v, start = block
            scores = _masked(_products(q, k), 0, False, end - start)
            higher = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - higher), jnp.exp(peak - higher)
            more = jnp.einsum(
                "ns,sd->nd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            return (mixed * shrink + more, higher, total), None

        lines = jnp.zeros((len(q), 1), jnp.float32)
        start = jnp.zeros(q.shape, jnp.float32), lines + _NOTHING, lines
        starts = _KEYS * jnp.arange(blocks, dtype=jnp.int32)
        (mixed, peak, total), _ = jax.lax.scan(step, start, (k, v, starts))
        return carry, ((mixed / total).astype(v.dtype), peak + jnp.log(total))

    return _over_blocks(attend, (q,), _BLOCK_BYTES // (4 * _ROWS))[1]


def _backward(causal, share, saved, grad):
    query, key, value, ends, out, log_total = saved
    scale = query.shape[-1] ** -0.5
    lean = jnp.sum(grad.astype(jnp.float32) * out, axis=-1, keepdims=True)

    def one_head(number):
        k, v, end = _head(number, share, key, value, ends)

        def pull(start, keys, carry, rows, first):
            q, g, total, leaning = rows
            scores = _masked(scale * _products(q, k[:keys]), start + first, causal, end)
            weights = jnp.exp(scores - total)
            through = scale * weights * (_products(g, v[:keys]) - leaning)
            key_grad = carry[0] + jnp.einsum("ns,nd->sd", through, q.astype(jnp.float32))
            value_grad = carry[1] + jnp.einsum("ns,nd->sd", weights, g.astype(jnp.float32))
            return (key_grad, value_grad), through @ k[:keys].astype(jnp.float32)

        key_grad, value_grad = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        query_grads = []
        for start, stop, keys in _parts(query.shape[1], k.shape[0], causal):
            rows = tuple(x[number, start:stop] for x in (query, grad, log_total, lean))
            zero = jnp.zeros((keys, k.shape[1]), jnp.float32)
            carry, query_grad = _over_blocks(
                functools.partial(pull, start, keys), rows, keys, (zero, zero)
            )
            key_grad = key_grad.at[:keys].add(carry[0])
            value_grad = value_grad.at[:keys].add(carry[1])
            query_grads.append(query_grad)
        return jnp.concatenate(query_grads), key_grad, value_grad

    grads = jax.lax.map(one_head, jnp.arange(query.shape[0]))

    def shared(x):
        return x.reshape(-1, share, *x.shape[1:]).sum(axis=1)

    query_grad, key_grad, value_grad = grads[0], shared(grads[1]), shared(grads[2])
    like = ((query_grad, query), (key_grad, key), (value_grad, value))
    return (*(x.astype(y.dtype) for x, y in like), None)


_attend.defvjp(_forward, _backward)
_KERNELS = {
    "blockwise": blockwise_attention,
    "chunked": chunked_attention,
    "cudnn": _cudnn,
    "splash": splash_attention,
}
