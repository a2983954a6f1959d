"""The whole pruned policy as serialized StableHLO, with static shapes, for other platforms too.

    OUT/config.json          buckets, inputs and outputs, the SHA-256 of every file
    OUT/model.safetensors    the weights, which every program takes as its first argument
    OUT/b1_k56.cpu.stablehlo one program for a batch size, a number of kept tokens and a platform
    OUT/run.py               runs them without this library

A program holds the attention kernel of its platform. JAX guarantees that a program is still read by
later releases for six months.
"""

import contextlib
import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import flax as safetensors_flax

from fastdrive_jax.configs import to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export import manifest as manifests
from fastdrive_jax.export import run_program
from fastdrive_jax.export.bundle import SAFETENSORS
from fastdrive_jax.export.folder import write_folder
from fastdrive_jax.export.trees import flatten, unflatten
from fastdrive_jax.inference.policy import DrivingPolicy, plan
from fastdrive_jax.models.attention import kernels_of
from fastdrive_jax.pruning.select import num_keep

KIND = "driving policy programs"
PLATFORMS = ("cpu", "cuda", "tpu")
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
        if self.batch < 1:
            raise UserError(f"batch={self.batch} must be at least 1.")


def write_programs(
    folder: Path,
    policy: DrivingPolicy,
    params: dict,
    buckets: Sequence[Bucket],
    platforms: Sequence[str] = PLATFORMS,
) -> Path:
    """Lowers the policy here for every bucket and platform; none of the platforms need be here.

    Args:
        folder: To make; see `write_folder`.
        policy: Of a method without memory and draws; its own keep ratio is not used.
        params: {"vla": ..., "pruner": ...}.
        buckets: Of the programs.
        platforms: Of "cpu", "cuda" and "tpu".

    Raises:
        UserError: The extra `export` is not installed, or the folder cannot be written.
        ValueError: The method needs more than pictures, speed and command.
    """
    need_flatbuffers()
    if policy.pruner.temporal is not None or "key" in policy.pruner.needs:
        raise ValueError(f"{policy.pruner.name} needs a state or a key, which no program takes")
    tensors = {name: np.asarray(value) for name, value in flatten(params).items()}
    fill = functools.partial(
        _fill, policy=policy, tensors=tensors, buckets=buckets, platforms=platforms
    )
    return write_folder(folder, sum(value.nbytes for value in tensors.values()), fill)


def need_flatbuffers() -> None:
    """Refuses what `jax.export` would fail in the middle of."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError(
            "StableHLO programs need flatbuffers; install the extra: pip install "
            "'fastdrive-jax[export]'."
        )


def _fill(folder, policy, tensors, buckets, platforms):
    described = []
    for bucket in buckets:
        kept = policy.pruner.budget(policy.model.config.visual_tokens, bucket.keep_ratio)
        programs = {}
        for platform in platforms:
            programs[platform] = f"b{bucket.batch}_k{kept}.{platform}.stablehlo"
            program = lower(policy, tensors, bucket, platform)
            (folder / programs[platform]).write_bytes(program.serialize())
        described.append({**to_plain(bucket), "kept": kept, "programs": programs})
    safetensors_flax.save_file(tensors, folder / SAFETENSORS, metadata={"format": manifests.FORMAT})
    shutil.copyfile(run_program.__file__, folder / "run.py")
    config = policy.model.config
    described = {
        "kind": KIND,
        "buckets": described,
        "inputs": {
            "images": ["batch", len(config.cameras), *config.image_size, 3],
            "speed": ["batch"],
            "command": ["batch"],
        },
        "outputs": {
            "waypoints": ["batch", config.vocabulary.steps, 2],
            "keep_indices": ["batch", "kept"],
        },
        "vla": to_plain(config),
    }
    manifests.seal(folder, described, manifests.describe_tensors(tensors), _PACKAGES)


def lower(
    policy: DrivingPolicy, tensors: dict, bucket: Bucket, platform: str
) -> jax.export.Exported:
    """The policy as a program of one bucket and platform.

    Args:
        policy: See `write_programs`.
        tensors: The parameters by flat name; of each only shape and dtype are read.
        bucket: Shapes.
        platform: "cpu", "cuda" or "tpu".
    """
    policy, config = replace(policy, keep_ratio=bucket.keep_ratio), policy.model.config

    def run(weights, images, speed, command):
        planned = plan(policy, unflatten(weights), images, speed, command)
        return {"waypoints": planned.waypoints, "keep_indices": planned.keep_indices}

    weights = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in tensors.items()}
    pictures = (bucket.batch, len(config.cameras), *config.image_size, 3)
    inputs = (
        jax.ShapeDtypeStruct(pictures, jnp.uint8),
        jax.ShapeDtypeStruct((bucket.batch,), jnp.float32),
        jax.ShapeDtypeStruct((bucket.batch,), jnp.int32),
    )
    with kernels_of("gpu" if platform == "cuda" else platform):
        return jax.export.export(jax.jit(run), platforms=(platform,))(weights, *inputs)


def read_program(folder: Path, bucket: Bucket | None = None) -> Callable[..., dict[str, jax.Array]]:
    """The program of a bucket for the devices at hand; see `run_program.load_program`.

    Args:
        folder: Of `write_programs`.
        bucket: None takes the first.

    Raises:
        UserError: The folder is no such export, a file is missing or damaged, or there is no
            program of the bucket for these devices.
    """
    need_flatbuffers()
    manifest = manifests.load(folder)
    if manifest.config.get("kind") != KIND:
        raise UserError(f"{folder} holds a {manifest.config.get('kind')!r}, not {KIND}.")
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
