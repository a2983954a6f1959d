import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.models.attention import attention
from fastdrive_jax.parallel.mesh import make_mesh


def inputs(batch, heads, groups, count=24, size=8):
    rng = np.random.default_rng(0)
    shapes = [(batch, count, number, size) for number in (heads, groups, groups)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("kernel", ["blockwise", "chunked", "xla"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, [24, 3, 17, 1]])
@pytest.mark.parametrize(
    ("data", "fsdp", "tensor", "heads", "groups"),
    [
        (4, 1, 2, 4, 2),
        (2, 1, 4, 8, 2),
        (2, 4, 1, 4, 2),
        (1, 1, 8, 8, 1),
        (1, 2, 4, 6, 3),
        (2, 2, 2, 4, 4),
    ],
)
def test_a_mesh_changes_no_result(kernel, causal, lengths, data, fsdp, tensor, heads, groups):
    """Also where batch or heads do not divide, and where devices share a key head."""
    given = inputs(4, heads, groups)
    lengths = None if lengths is None else jnp.array(lengths)
    run = functools.partial(attention, causal=causal, lengths=lengths, kernel=kernel)
    expected = jax.jit(run)(*given)
    with jax.set_mesh(make_mesh(data, fsdp, tensor)):
        np.testing.assert_allclose(jax.jit(run)(*given), expected, atol=1e-6)


def test_each_device_attends_for_its_own_part():
    """The compiled program gathers nothing and holds an eighth of what one device computes."""
    mesh = make_mesh(2, 2, 2)
    place = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
    place = jax.sharding.NamedSharding(mesh, place)
    given = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in inputs(8, 4, 2, count=256)
    ]
    with jax.set_mesh(mesh):
        text = jax.jit(functools.partial(attention, causal=True)).lower(*given).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" not in text
    assert "f32[2,256,2,8]" in text  # a quarter of the samples, half of the heads
    assert "f32[8,256,4,8]" not in text


def test_gradients_over_a_mesh():
    given = inputs(4, 4, 2)

    def loss(query, key, value):
        return (attention(query, key, value, causal=True) ** 2).sum()

    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(*given)
    with jax.set_mesh(make_mesh(2, 1, 4)):
        found = jax.jit(jax.grad(loss, (0, 1, 2)))(*given)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)
