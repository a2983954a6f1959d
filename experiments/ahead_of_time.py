"""Compiling ahead of time: shapes in place of arrays, and what the program then holds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.chips import CHIPS, ChipName
from fastdrive_jax.errors import UserError
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


def compile_for(chip: ChipName, lowered: jax.stages.Lowered, what: str) -> jax.stages.Compiled:
    """The program, compiled for devices of `chips.chip_devices`.

    Args:
        chip: Whose devices it was lowered for.
        lowered: The program.
        what: Names it in errors.

    Raises:
        UserError: It does not fit the chip's memory.
    """
    # A GPU tries cuBLAS's and XLA's own products and takes the faster. Where none can be tried XLA
    # would take its own, and fail where a shape suits none of them.
    options = {"xla_gpu_enable_triton_gemm": False} if CHIPS[chip].platform == "gpu" else None
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        # The compiler of a TPU ends here; the others leave it to whoever runs the program.
        if "Ran out of memory" not in str(error):
            raise
        raise UserError(_too_large(what, chip, str(error).splitlines()[0])) from error
    memory, need = CHIPS[chip].memory, peak_bytes(compiled)
    if memory is not None and need > memory:
        why = f"{need / 2**30:.1f} GiB are needed, and there are {memory / 2**30:.1f}"
        raise UserError(_too_large(what, chip, why))
    return compiled


def _too_large(what: str, chip: str, why: str) -> str:
    return (
        f"{what} does not fit the memory of a {chip} ({why}); shard it over more devices, or make "
        "it smaller."
    )


def peak_bytes(program: jax.stages.Compiled) -> int:
    """Most bytes that a program holds on a device: arguments, results and, on a TPU, itself."""
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.generated_code_size_in_bytes
    return held + memory.output_size_in_bytes - memory.alias_size_in_bytes
