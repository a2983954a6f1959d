"""The device mesh and what is laid out over it: data-parallel batches, replicated states."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fastdrive_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh(data: int = -1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, over which batches are split.

    The axis is Auto: under the Explicit axes that `jax.make_mesh` makes by default, Linen's
    logical constraints raise.

    Args:
        data: how many devices share a batch; -1 means all.
        devices: to choose from, by default all of the job.

    Raises:
        UserError: there are not so many devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = len(devices)
    if not 1 <= data <= len(devices):
        raise UserError(
            f"A mesh of {data} devices was asked for, but there are {len(devices)}: "
            "give a number from 1 to that, or -1 for all."
        )
    return jax.make_mesh((data,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:data])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


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
        UserError: the batch does not divide among the devices.
    """
    sharding = batch_sharding(mesh)
    processes = jax.process_count()
    parts = mesh.shape[DATA_AXIS] // processes

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
