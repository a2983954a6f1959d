"""How parameters lie over the mesh: one rule for each kind, in this file alone.

A layer is split over the model axis so that it needs two sums (Megatron-LM, section 3): what leads
into heads or hidden units is split by its outputs, what leads out of them by its inputs. The other
side is split over the data axis (ZeRO, stage 3), so that no device keeps a whole model.
"""

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastdrive_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS

INTO = {"q_proj", "k_proj", "v_proj", "qkv", "gate_proj", "up_proj", "mlp_0", "lm_head"}
OUT_OF = {"o_proj", "proj", "down_proj", "mlp_2"}


def parameter_spec(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The axes over which a parameter is split.

    Args:
        path: Its place, such as ("language_model", "layers_0", "mlp", "up_proj", "kernel").
        shape: Its shape; an axis that does not divide a side leaves that side whole.
        mesh: Of `make_mesh`.
    """
    axes: tuple[str | None, ...] = (None,) * len(shape)
    if path[-1] == "embedding":
        axes = (MODEL_AXIS, DATA_AXIS)
    elif path[-1] == "kernel" and path[-2] in INTO:
        axes = (DATA_AXIS, MODEL_AXIS)
    elif path[-1] == "kernel" and path[-2] in OUT_OF:
        axes = (MODEL_AXIS, DATA_AXIS)
    return PartitionSpec(
        *(
            axis if axis and side % mesh.shape[axis] == 0 else None
            for axis, side in zip(axes, shape, strict=True)
        )
    )


def parameter_sharding(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`parameter_spec` on its mesh."""
    return NamedSharding(mesh, parameter_spec(path, shape, mesh))
