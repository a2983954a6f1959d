"""Accelerators to compile for where there is none: XLA's compilers need to know one, not hold it.

A TPU's compiler comes with the extra `tpu`, a GPU's with the extra `cuda`. Programs for "virtual"
are compiled for devices of the CPU, and judged by an H100's rates.
"""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from jax.experimental import topologies

from experiments.training_cost import PEAKS
from fastdrive_jax.errors import UserError

ChipName = Literal["virtual", "h100", "v5e", "v5p", "v6e"]
GPU_NODE = 8  # GPUs that NVLink joins
TPU_HOST = 4  # chips of the smallest slice

# What XLA asks of a GPU before it writes kernels for it; NVIDIA's figures of an H100 SXM.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Without these the library waits for a cloud's metadata, complains of a host that it cannot name,
# and refuses to start beside a TPU's job.
_TPU_COMPILER = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Chip:
    """Rates of a device.

    Attributes:
        platform: Whose attention kernels it runs, see `attention.kernels_of`.
        peak_flops: Dense bfloat16, FLOP/s.
        link: Bytes per second that it sends in a ring: by NVLink within a node of GPUs, over one
            axis of a TPU's torus in both directions.
        memory: Bytes; None where the compiler itself refuses what does not fit, or nothing does.
        axes: Of the torus; 0 where there is none.
    """

    platform: Literal["cpu", "gpu", "tpu"]
    peak_flops: float
    link: float
    memory: int | None = None
    axes: int = 0


CHIPS: dict[ChipName, Chip] = {
    "virtual": Chip("cpu", PEAKS["H100"], 450e9),
    "h100": Chip("gpu", PEAKS["H100"], 450e9, memory=84_942_979_072),
    "v5e": Chip("tpu", PEAKS["TPU v5 lite"], 90e9, axes=2),
    "v5p": Chip("tpu", PEAKS["TPU v5p"], 180e9, axes=3),
    "v6e": Chip("tpu", PEAKS["TPU v6 lite"], 180e9, axes=2),
}


def chip_devices(name: ChipName, count: int) -> Sequence[jax.Device]:
    """Devices to make a mesh of and to compile for; no program can run on those of a real chip.

    No accelerator at hand is touched, so this works beside a running job.

    Args:
        name: Of `CHIPS`.
        count: How many.

    Raises:
        UserError: The compiler is not installed, or no slice of that TPU has so many chips.
    """
    chip = CHIPS[name]
    jax.config.update("jax_platforms", "cpu")
    if chip.platform == "cpu":
        with contextlib.suppress(RuntimeError):  # jax was used before: a mesh counts what there is
            jax.config.update("jax_num_cpu_devices", count)
        return jax.devices()
    if chip.platform == "gpu":
        nodes = math.ceil(count / GPU_NODE)
        given = {"topology": f"{nodes}x1x{min(count, GPU_NODE)}", "target_config": _H100}
        return _described("cuda", "cuda", **given)[:count]
    for setting, value in _TPU_COMPILER.items():
        os.environ.setdefault(setting, value)
    slice_name = f"{name}:{'x'.join(map(str, tpu_slice(count, chip.axes)))}"
    return _described("tpu", "tpu", topology_name=slice_name)[:count]


def tpu_slice(count: int, axes: int) -> tuple[int, ...]:
    """Sides of the smallest slice of a torus that has `count` chips, as even as can be.

    Raises:
        UserError: Above the smallest, slices have a power of two.
    """
    if count > TPU_HOST and count.bit_count() > 1:
        raise UserError(f"devices={count} must be a power of two: no TPU slice has so many chips.")
    if count <= TPU_HOST:
        return (2, 2, 1)[:axes]
    sides = [2] * axes
    while math.prod(sides) < count:
        sides[sides.index(min(sides))] *= 2
    return tuple(sorted(sides))


def _described(platform: str, extra: str, topology_name: str = "", **given) -> Sequence[jax.Device]:
    try:
        return topologies.get_topology_desc(topology_name, platform=platform, **given).devices
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The compiler for this chip cannot be had ({str(error).splitlines()[0]}); run "
            f"`pip install -e '.[{extra}]'` in the clone."
        ) from error
