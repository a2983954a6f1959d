"""The device mesh and how batches are laid out over it; parameters are in `rules`."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fastdrive_jax.errors import UserError

DATA_AXIS, MODEL_AXIS = "data", "model"


def make_mesh(data: int = -1, model: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with an axis over which batches are split and one over which layers are.

    The axes are Auto: under the Explicit axes that `jax.make_mesh` makes by default, Linen's
    logical constraints raise.

    Args:
        data: how many groups of devices share a batch; -1 means as many as there are.
        model: how many devices share a layer.
        devices: to choose from, by default all of the job.

    Raises:
        UserError: there are not so many devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and model > 0:
        data = len(devices) // model
    if model < 1 or not 1 <= data * model <= len(devices):
        raise UserError(
            f"A mesh of {data} x {model} devices was asked for, but there are {len(devices)}: "
            "give two numbers from 1 whose product is at most that, or data=-1 for all."
        )
    return jax.make_mesh(
        (data, model),
        (DATA_AXIS, MODEL_AXIS),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: data * model],
    )


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


def shard_where_it_divides(batch: Any, mesh: Mesh) -> Any:
    """Put a host batch on the devices, whatever its leaves.

    A leaf is split over the data axis along its leading axis if that divides, else every device
    gets a whole copy.

    Args:
        batch: tree of numpy arrays, the whole batch on every process.
        mesh: from `make_mesh`.
    """
    parts = mesh.shape[DATA_AXIS]

    def put(leaf):
        leaf = np.asarray(leaf)
        split = leaf.ndim and leaf.shape[0] % parts == 0
        return jax.device_put(leaf, batch_sharding(mesh) if split else replicated_sharding(mesh))

    return jax.tree.map(put, batch)
