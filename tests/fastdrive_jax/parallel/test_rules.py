import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.parallel.rules import ACTIVATIONS, constrain, parameter_spec, tree_shardings


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (("layer", "mlp", "up_proj", "kernel"), (8, 16), ("fsdp", "tensor")),
        (("layer", "mlp", "down_proj", "kernel"), (16, 8), ("tensor", "fsdp")),
        (("layer", "self_attn", "o_proj", "kernel"), (8, 8), ("tensor", "fsdp")),
        (("embed_tokens", "embedding"), (32, 8), ("tensor", "fsdp")),
        (("head", "kernel"), (8, 12), ("fsdp", "tensor")),
        (("patch_embed", "kernel"), (6, 8), ("fsdp", None)),
        (("layer", "mlp", "up_proj", "kernel"), (7, 16), (None, "tensor")),
        (("layer", "mlp", "up_proj", "kernel"), (8, 15), ("fsdp", None)),
        (("layer", "self_attn", "q_proj", "bias"), (8,), (None,)),
        (("query",), (8,), (None,)),
        (("scorer", "kernel"), (8, 1), ("fsdp", None)),
    ],
)
def test_rules(path, shape, spec):
    mesh = make_mesh(2, 2, 2)
    assert parameter_spec(path, shape, mesh) == PartitionSpec(*spec)


def params():
    return {
        "pruner": {"mlp": {"up_proj": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}}},
        "decoder": {"head": {"kernel": jnp.ones((16, 12))}},
    }


def test_optimizer_state_lies_as_its_parameters():
    mesh = make_mesh(1, 4, 2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {"params": params(), "opt_state": optimizer.init(params())}
    placed = tree_shardings(state, mesh)
    up = PartitionSpec("fsdp", "tensor")
    found = [
        where.spec
        for path, where in jax.tree_util.tree_leaves_with_path(placed)
        if "up_proj" in str(path) and "kernel" in str(path)
    ]
    assert found == [up] * 3  # the parameter and both moments
    counts = [
        where.spec
        for path, where in jax.tree_util.tree_leaves_with_path(placed)
        if "count" in str(path)
    ]
    assert counts
    assert set(counts) == {PartitionSpec()}


def block(x, kernel):
    """What a layer does to activations [B, N, D]."""
    x = constrain(x, "batch", "token", "embed")
    hidden = constrain(x @ kernel, "batch", "token", "hidden")
    return constrain(hidden @ kernel.T, "batch", "token", "embed")


def test_constraints_reach_the_lowered_program_and_change_no_value():
    x = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    kernel = np.ones((8, 16), np.float32)
    expected = jax.jit(block)(x, kernel)
    plain = jax.jit(block).lower(x, kernel).as_text()
    assert "sharding_constraint" not in plain
    with jax.set_mesh(make_mesh(2, 2, 2)):
        lowered = jax.jit(block).lower(x, kernel)
        found = jax.jit(block)(x, kernel)
    text = lowered.as_text()
    assert text.count("sharding_constraint") == 3
    assert text.count('{"tensor"}') == 1  # the hidden units
    assert text.count('{"data", "fsdp"}') == 3
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    shapes = lowered.compile().as_text()
    assert "f32[1,6,8]" in shapes  # a fourth of the batch on each device
    assert "f32[4,6,8]" not in shapes.split("ENTRY")[1].split("\n", 1)[1]


def test_sides_that_do_not_divide_are_left_to_the_partitioner():
    x = np.ones((3, 6, 8), np.float32)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        text = jax.jit(functools.partial(constrain, x), static_argnums=(0, 1, 2)).lower(
            "batch", "token", "embed"
        )
        assert "?" in text.as_text()
    assert set(ACTIVATIONS) == {"batch", "token", "embed", "hidden"}


def test_what_a_factored_optimizer_keeps_is_copied():
    mesh = make_mesh(1, 4, 2)
    state = optax.adafactor(min_dim_size_to_factor=8).init(params())
    placed = tree_shardings(state, mesh)
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert where.is_fully_replicated or leaf.ndim == 2
