"""A whole pruned model as serialized StableHLO, with static shapes, for other platforms too.

    OUT/config.json          buckets, inputs and outputs, the SHA-256 of every file
    OUT/model.safetensors    the weights, which every program takes as its first argument
    OUT/b1_k56.cpu.stablehlo one program for a batch size, a number of kept tokens and a platform
    OUT/run.py               runs them without this library

A program holds the attention kernel of its platform. One of float32 weights multiplies in float32
on all of them: by default, a GPU rounds to TF32 and a TPU to bfloat16, and would plan another way.
JAX guarantees that a program is still read by later releases for six months.
"""

import contextlib
import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import flax as safetensors_flax

from fastdrive_jax.configs import check_least, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export import manifest as manifests
from fastdrive_jax.export import run_program
from fastdrive_jax.export.bundle import SAFETENSORS
from fastdrive_jax.export.folder import write_folder
from fastdrive_jax.export.trees import flatten, unflatten
from fastdrive_jax.models.attention import kernels_of
from fastdrive_jax.pruning.select import num_keep

PLATFORMS = ("cpu", "cuda", "tpu")
_FLASH = "__cudnn$fmhaSoftmax"
_PACKAGES = ("fastdrive-jax", "jax", "jaxlib", "safetensors")


@dataclass(frozen=True)
class Bucket:
    """Shapes of a program.

    Attributes:
        keep_ratio: In (0, 1], of all cameras' tokens together.
        batch: B, frames of a call.
    """

    keep_ratio: float
    batch: int = 1

    def __post_init__(self):
        num_keep(1000, self.keep_ratio)
        check_least(self, batch=1)


@dataclass(frozen=True)
class Program:
    """What is lowered, whatever its bucket.

    Attributes:
        kind: Of the folder that holds it.
        run: `(keep_ratio, params, *inputs)` to arrays by name; pure.
        inputs: Of `run` in their order, without the batch axis, which comes first.
        outputs: Axes of each result, for people.
        budget: Keep ratio to K.
        model: What rebuilds the model, JSON by name.
    """

    kind: str
    run: Callable[..., dict[str, jax.Array]]
    inputs: Mapping[str, jax.ShapeDtypeStruct]
    outputs: Mapping[str, Sequence[Any]]
    budget: Callable[[float], int]
    model: Mapping[str, Any]


def write_programs(
    folder: Path,
    program: Program,
    params: dict,
    buckets: Sequence[Bucket],
    platforms: Sequence[str] = PLATFORMS,
    cudnn: bool = False,
) -> Path:
    """Lowers the program here for every bucket and platform; none of the platforms need be here.

    Args:
        folder: To make; see `write_folder`.
        program: Of a model.
        params: Of the model.
        buckets: Of the programs.
        platforms: Of "cpu", "cuda" and "tpu".
        cudnn: See `lower`.

    Raises:
        UserError: The extra `export` is not installed, or `cuda` for cuDNN, or the folder cannot be
            written.
    """
    need_flatbuffers()
    tensors = {name: np.asarray(value) for name, value in flatten(params).items()}
    fill = functools.partial(
        _fill, program=program, tensors=tensors, buckets=buckets, platforms=platforms, cudnn=cudnn
    )
    return write_folder(folder, sum(value.nbytes for value in tensors.values()), fill)


def need_flatbuffers() -> None:
    """Refuses what `jax.export` would fail in the middle of."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError(
            "StableHLO programs need flatbuffers; run `pip install -e '.[export]'` in the clone."
        )


def _fill(folder, program, tensors, buckets, platforms, cudnn):
    described = []
    for bucket in buckets:
        kept, programs = program.budget(bucket.keep_ratio), {}
        for platform in platforms:
            programs[platform] = f"b{bucket.batch}_k{kept}.{platform}.stablehlo"
            lowered = lower(program, tensors, bucket, platform, cudnn)
            (folder / programs[platform]).write_bytes(lowered.serialize())
        described.append({**to_plain(bucket), "kept": kept, "programs": programs})
    safetensors_flax.save_file(tensors, folder / SAFETENSORS, metadata={"format": manifests.FORMAT})
    shutil.copyfile(run_program.__file__, folder / "run.py")
    inputs = {name: ["batch", *array.shape] for name, array in program.inputs.items()}
    described = {
        "kind": program.kind,
        "buckets": described,
        "cudnn": cudnn,
        "inputs": inputs,
        "outputs": {name: list(axes) for name, axes in program.outputs.items()},
        **program.model,
    }
    manifests.seal(folder, described, manifests.describe_tensors(tensors), _PACKAGES)


def lower(
    program: Program, tensors: dict, bucket: Bucket, platform: str, cudnn: bool = False
) -> jax.export.Exported:
    """The program of one bucket and platform.

    Args:
        program: See `write_programs`.
        tensors: The parameters by flat name; of each only shape and dtype are read.
        bucket: Shapes.
        platform: "cpu", "cuda" or "tpu".
        cudnn: Whether half precision attends by cuDNN's flash attention on "cuda", of whose calls
            JAX does not promise that other releases know them.

    Raises:
        UserError: cuDNN is asked for and is not installed.
    """

    def run(weights, *inputs):
        return program.run(bucket.keep_ratio, unflatten(weights), *inputs)

    weights = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in tensors.items()}
    inputs = [
        jax.ShapeDtypeStruct((bucket.batch, *array.shape), array.dtype)
        for array in program.inputs.values()
    ]
    flash = cudnn and platform == "cuda"
    checks = [jax.export.DisabledSafetyCheck.custom_call(_FLASH)] if flash else []
    export = jax.export.export(jax.jit(run), platforms=(platform,), disabled_checks=checks)
    products = float32_products(t.dtype for t in weights.values())
    with kernels_of("gpu" if flash else platform), products:
        try:
            return export(weights, *inputs)
        except RuntimeError as error:
            if "cuDNN is not detected" not in str(error):
                raise
            raise UserError(
                "Programs with cuDNN's attention are made where it is installed, with a GPU or "
                "without; run `pip install -e '.[cuda]'` in the clone."
            ) from error


def float32_products(dtypes: Iterable[Any]) -> contextlib.AbstractContextManager:
    """Where all weights are float32, what is traced within also multiplies in float32.

    Of half precision it says nothing: a TPU's kernels refuse to multiply that any more precisely.

    Args:
        dtypes: Of the weights.
    """
    if {np.dtype(dtype) for dtype in dtypes} == {np.dtype("float32")}:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def read_program(
    folder: Path, kind: str, bucket: Bucket | None = None
) -> Callable[..., dict[str, jax.Array]]:
    """The program of a bucket for the devices at hand; see `run_program.load_program`.

    Args:
        folder: Of `write_programs`.
        kind: Of the program.
        bucket: None takes the first.

    Raises:
        UserError: The folder is no such export, a file is missing or damaged, or there is no
            program of the bucket for these devices.
    """
    need_flatbuffers()
    manifest = manifests.load(folder)
    if manifest.config.get("kind") != kind:
        raise UserError(f"{folder} holds a {manifest.config.get('kind')!r}, not {kind}.")
    for name in manifest.files:
        manifests.check_files(folder, manifest, name)
    with _refusing():
        if bucket is None:
            return run_program.load_program(folder)
        return run_program.load_program(folder, bucket.keep_ratio, bucket.batch)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"{error}.") from error
