"""Attention over a device mesh: samples over the data and fsdp axes, heads over the tensor axis.

A kernel is opaque to XLA's partitioner, which would gather all samples and heads on every device.
No score crosses devices, so each runs the kernel on its own part.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from fastdrive_jax.parallel.mesh import AXES, BATCH_AXES, TENSOR_AXIS


def current_mesh() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` set; None without one, or within `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    known = set(AXES) <= set(mesh.axis_names)
    return mesh if known and not mesh.manual_axes and mesh.size > 1 else None


def over_mesh(
    kernel: Callable,
    mesh: AbstractMesh,
    query: Float[Array, "B N Q d"],
    key: Float[Array, "B S G d"],
    value: Float[Array, "B S G d"],
    lengths: Int[Array, " B"] | None,
) -> Float[Array, "B N Q d"]:
    """`kernel(query, key, value, lengths=lengths)` on each device's samples and heads.

    An axis that does not divide them leaves them whole. Where there are fewer key heads than
    devices along the tensor axis, several devices take the same one.
    """
    parts, tensor = math.prod(mesh.shape[axis] for axis in BATCH_AXES), mesh.shape[TENSOR_AXIS]
    batch, heads, groups = query.shape[0], query.shape[2], key.shape[2]
    rows = BATCH_AXES if batch % parts == 0 else None
    columns = None
    if heads % tensor == 0 and groups % tensor == 0:
        columns = TENSOR_AXIS
    elif heads % tensor == 0 and tensor % groups == 0:
        columns = TENSOR_AXIS
        key, value = (jnp.repeat(x, tensor // groups, axis=2) for x in (key, value))
    if rows is None and columns is None:
        return kernel(query, key, value, lengths=lengths)
    place = PartitionSpec(rows, None, columns, None)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(place, place, place, PartitionSpec(rows)),
        out_specs=place,
        check_vma=False,  # Pallas and cuDNN calls do not say how their results vary
    )
    def on_device(query, key, value, lengths):
        return kernel(query, key, value, lengths=lengths)

    return on_device(query, key, value, lengths)
