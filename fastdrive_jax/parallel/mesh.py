"""The device mesh and how batches are laid out over it; parameters are in `rules`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fastdrive_jax.errors import UserError

DATA_AXIS, FSDP_AXIS, TENSOR_AXIS = AXES = ("data", "fsdp", "tensor")
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)  # a batch is split over both


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of three axes.

    Over "data" the batch is split and parameters are copied; over "fsdp" both are split, and a
    layer's parameters are gathered when it is its turn; over "tensor" a layer's heads and hidden
    units are split. Devices that are near each other in the network are neighbours in the last
    axes. The axes are Auto: under the Explicit axes that `jax.make_mesh` makes by default, Linen's
    logical constraints raise.

    Args:
        data: -1 means as many as the devices allow.
        fsdp: how many devices share the parameters and the batch.
        tensor: how many devices share a layer.
        devices: to choose from, by default all of the job.

    Raises:
        UserError: there are not so many devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and min(fsdp, tensor) > 0:
        data = len(devices) // (fsdp * tensor)
        if 0 < data * fsdp * tensor < len(devices):
            raise UserError(
                f"{fsdp} x {tensor} devices (fsdp x tensor) do not divide the {len(devices)} that "
                "there are: choose numbers that do, or say how many the data axis takes."
            )
    shape = (data, fsdp, tensor)
    if min(shape) < 1 or math.prod(shape) > len(devices):
        raise UserError(
            f"A mesh of {data} x {fsdp} x {tensor} devices was asked for, but there are "
            f"{len(devices)}: give numbers from 1 whose product is at most that, or data=-1 for "
            "all."
        )
    chosen = devices[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=chosen)


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Put a host batch on the devices, split over its leading axis.

    Args:
        batch: tree of numpy arrays `[b, ...]`, this process's part of the batch.
        mesh: from `make_mesh`.

    Returns:
        The same tree of global arrays `[b * processes, ...]`.

    Raises:
        UserError: the batch does not divide among the devices, or the mesh not among the hosts.
    """
    sharding = batch_sharding(mesh)
    processes = jax.process_count()
    if batch_parts(mesh) % processes:
        raise UserError(
            f"A mesh of {dict(mesh.shape)} does not divide among {processes} hosts: choose data x "
            "fsdp as a multiple of them."
        )
    parts = batch_parts(mesh) // processes

    def put(leaf):
        leaf = np.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] % parts:
            raise UserError(
                f"A batch of shape {leaf.shape} does not divide among {parts} devices: choose a "
                "batch size that is a multiple of the number of devices."
            )
        if processes == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(put, batch)


def shard_where_it_divides(batch: Any, mesh: Mesh) -> Any:
    """Put a host batch on the devices, whatever its leaves.

    A leaf is split along its leading axis if that divides, else every device gets a whole copy.

    Args:
        batch: tree of numpy arrays, the whole batch on every process.
        mesh: from `make_mesh`.
    """
    parts = batch_parts(mesh)

    def put(leaf):
        leaf = np.asarray(leaf)
        split = leaf.ndim and leaf.shape[0] % parts == 0
        return jax.device_put(leaf, batch_sharding(mesh) if split else replicated_sharding(mesh))

    return jax.tree.map(put, batch)
