"""Compiling ahead of time: shapes in place of arrays, and what the program then holds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fastdrive_jax.parallel.mesh import replicated_sharding
from fastdrive_jax.parallel.rules import tree_shardings


def abstract_shards(params: Any, mesh: Mesh, dtype: jnp.dtype = jnp.bfloat16) -> Any:
    """Shapes of parameters, laid out by `parallel.rules`."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
        params,
        tree_shardings(params, mesh),
    )


def whole_shapes(mesh: Mesh) -> Callable[..., jax.ShapeDtypeStruct]:
    """`shape(*sides, dtype=int32)` of an array that every device of a mesh has whole."""
    place = replicated_sharding(mesh)

    def shape(*sides: int, dtype: jnp.dtype = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sides, dtype, sharding=place)

    return shape


def peak_bytes(program: jax.stages.Compiled) -> int:
    """Most bytes that a program holds on a device, its arguments and results among them."""
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return held + memory.output_size_in_bytes - memory.alias_size_in_bytes
