"""How parameters and activations lie over the mesh: the rules, in this file alone.

A layer is split over the tensor axis so that it needs two sums (Megatron-LM, section 3): what leads
into heads or hidden units is split by its outputs, what leads out of them by its inputs. The other
side is split over the fsdp axis (ZeRO, stage 3), so that no device keeps a whole model. Gradients,
optimizer state and averages of parameters lie as their parameters do. Vision encoders need a gather
besides: theirs is one matrix for q, k and v, whose parts a device has of other heads each.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from fastdrive_jax.parallel.mesh import AXES, BATCH_AXES, FSDP_AXIS, TENSOR_AXIS

INTO = {
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv",
    "gate_proj",
    "up_proj",
    "mlp_0",
    "fc1",
    "lm_head",
    "in_proj",
    "head",
}
OUT_OF = {"o_proj", "proj", "down_proj", "mlp_2", "fc2"}
ACTIVATIONS = {  # axes of the mesh by what an axis of an array counts
    "batch": BATCH_AXES,
    "token": None,
    "embed": None,
    "hidden": TENSOR_AXIS,
}


def parameter_spec(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The axes over which a parameter is split.

    Args:
        path: Its place, such as ("language_model", "layers_0", "mlp", "up_proj", "kernel").
        shape: Its shape; an axis that does not divide a side leaves that side whole.
        mesh: Of `make_mesh`.
    """
    axes: tuple[str | None, ...] = (None,) * len(shape)
    matrix = len(shape) == 2  # what a factored optimizer keeps of one is not
    if matrix and path[-1] == "embedding":
        axes = (TENSOR_AXIS, FSDP_AXIS)
    elif matrix and path[-1] == "kernel":
        if path[-2] in INTO:
            axes = (FSDP_AXIS, TENSOR_AXIS)
        elif path[-2] in OUT_OF:
            axes = (TENSOR_AXIS, FSDP_AXIS)
        else:
            axes = (FSDP_AXIS, None)
    return PartitionSpec(
        *(
            axis if axis and side % mesh.shape[axis] == 0 else None
            for axis, side in zip(axes, shape, strict=True)
        )
    )


def parameter_sharding(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`parameter_spec` on its mesh."""
    return NamedSharding(mesh, parameter_spec(path, shape, mesh))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """`parameter_sharding` of every leaf of a tree of arrays or shapes.

    A leaf's place is read from the names on its path, so what optimizers keep for a parameter lies
    as the parameter does; leaves without a name, such as counters, are copied.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        if len(names) < 2:
            return NamedSharding(mesh, PartitionSpec())
        return parameter_sharding(names, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def constrain(x: Array, *counts: str) -> Array:
    """`x` laid out by what each of its axes counts, under `jax.set_mesh`; without a mesh as it is.

    An axis that does not divide is left to the partitioner.

    Args:
        x: An activation.
        counts: A name of `ACTIVATIONS` for each axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(AXES) - set(mesh.axis_names) or mesh.manual_axes:
        return x
    axes = []
    for count, side in zip(counts, x.shape, strict=True):
        axis = ACTIVATIONS[count]
        parts = 1
        for name in (axis,) if isinstance(axis, str) else axis or ():
            parts *= mesh.shape[name]
        axes.append(axis if side % parts == 0 else PartitionSpec.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))
