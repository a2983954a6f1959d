"""The device mesh and how batches are laid out over it; parameters are in `rules`."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
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
        UserError: there are not so many devices, or their network cannot be cut like this.
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
    return Mesh(mesh_devices(shape, chosen), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_devices(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices [data, fsdp, tensor], neighbours in the network along the last axes.

    Raises:
        UserError: their network cannot be cut like this.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise UserError(
            f"data={shape[0]} must be a multiple of the {slices} slices: only batches are split "
            "over the network between them."
        )
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        within = shape[0] // slices, *shape[1:]
        given = within, (slices, 1, 1), devices
        return mesh_utils.create_hybrid_device_mesh(*given, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError, AssertionError) as error:
        raise UserError(
            f"The network of these {len(devices)} devices cannot be cut into {shape[0]} x "
            f"{shape[1]} x {shape[2]} (data x fsdp x tensor): {error}. Choose other numbers."
        ) from error


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of each batch this process reads, and how many shares there are.

    Processes whose devices hold the same parts of a batch, as where a tensor axis crosses hosts,
    read the same share.

    Raises:
        UserError: a process has no device in the mesh, or parts are shared in any other way.
    """
    return _share_of(mesh, jax.process_index(), jax.process_count())


@functools.cache
def _share_of(mesh: Mesh, process: int, count: int) -> tuple[int, int]:
    """Of one of the processes; remembered, since every batch asks and a pod has many devices."""
    parts: dict[int, set[int]] = {number: set() for number in range(count)}
    for part, devices in enumerate(mesh.devices.reshape(batch_parts(mesh), -1)):
        for device in devices:
            parts.setdefault(device.process_index, set()).add(part)
    idle = sorted(number for number, own in parts.items() if not own)
    if idle:
        raise UserError(
            f"A mesh whose batch is in {batch_parts(mesh)} parts (data x fsdp) does not divide "
            f"among {len(parts)} hosts: host {idle[0]} has no device in it; give --data -1, which "
            "takes all devices."
        )
    shares = sorted({tuple(sorted(own)) for own in parts.values()})
    flat = [part for share in shares for part in share]
    if len(flat) != len(set(flat)) or len({len(share) for share in shares}) > 1:
        raise UserError(
            f"Over a mesh of {dict(mesh.shape)} the hosts' devices hold overlapping parts of a "
            "batch; choose a tensor axis that lies within a host, or takes whole hosts."
        )
    return shares.index(tuple(sorted(parts[process]))), len(shares)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Put a host batch on the devices, split over its leading axis.

    Args:
        batch: tree of numpy arrays `[b, ...]`, this process's share of the batch.
        mesh: from `make_mesh`.

    Returns:
        The same tree of global arrays `[b * shares, ...]`.

    Raises:
        UserError: the batch does not divide among the devices, or see `data_share`.
    """
    sharding = batch_sharding(mesh)
    processes, shares = jax.process_count(), data_share(mesh)[1]
    parts = batch_parts(mesh) // shares

    def put(leaf):
        leaf = np.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] % parts:
            raise UserError(
                f"A batch of shape {leaf.shape} does not divide among {parts} devices: choose a "
                "batch size that is a multiple of the number of devices."
            )
        if processes == 1:
            return jax.device_put(leaf, sharding)
        whole = leaf.shape[0] * shares, *leaf.shape[1:]
        return jax.make_array_from_process_local_data(sharding, leaf, whole)

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
