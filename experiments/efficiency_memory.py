"""Peak memory of one setting, measured in a process of its own.

An accelerator's runtime says how many bytes were in use at most. A CPU's says nothing, so there it
is the process's largest resident set: with Python, the compiler and the weights as they were drawn.
"""

import dataclasses
import multiprocessing
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.efficiency_args import At, BenchEfficiencyArgs, settings_of
from experiments.efficiency_counts import MARKS, given_inputs, parameter_shapes
from experiments.frame_inputs import random_params
from experiments.frame_stages import compile_stages, time_stages, trace_stages, vision_stage
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, point
from fastdrive_jax.inference.policy import start_state
from fastdrive_jax.pruning.interface import VISION

PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def memory_rows(args: BenchEfficiencyArgs, settings: Iterable[At]) -> list[Row]:
    """Peak of every setting and batch size; the processes run one after the other.

    Raises:
        UserError: This process holds the accelerator's memory, so that no other gets any.
    """
    check_free(jax.default_backend(), os.environ)
    rows = []
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's peak
    for batch in args.batch:
        for name, ratio in settings:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                peak = pool.submit(peak_bytes, args, (name, ratio), batch).result()
            label = name.rpartition(":")[2]
            metric = f"measured_peak_bytes_batch_{batch}"
            rows.append(point(label, ratio, metric, peak, seed=0, unit="B"))
    return rows


def check_free(backend: str, environment: Mapping[str, str]) -> None:
    """Refuses where a second process would find no memory; see `memory_rows`."""
    if backend == "tpu":
        raise UserError(
            "memory can't be measured on a TPU, which serves one process: leave it out."
        )
    if backend == "gpu" and environment.get(PREALLOCATE, "").lower() not in ("false", "0"):
        raise UserError(
            f"memory takes processes beside this one: set {PREALLOCATE}=false, so that it does not "
            "hold most of the GPU."
        )


def peak_bytes(args: BenchEfficiencyArgs, at: At, batch: int) -> int:
    """Most bytes that this process ever held, after one frame; meant for a fresh one."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    asked = args if at[1] == 1 else dataclasses.replace(args, methods=at[:1], ratios=at[1:])
    setting = settings_of(asked, dtype, abstract=False)[at]
    config, policy = args.driving, setting.policy
    vla = random_params(parameter_shapes(config), dtype)
    images = jnp.zeros((batch, args.cameras, *config.image_size, 3), jnp.uint8)
    encode = jax.jit(vision_stage, static_argnums=(0, 1))
    encoded = encode(policy.model, policy.pruner.needs & VISION, vla, images)
    state = start_state(policy, batch, dtype, args.text - MARKS)
    inputs = setting, vla, encoded, images, given_inputs(config, args.text, batch), state
    time_stages(compile_stages({at: trace_stages(*inputs, {})})[at], *inputs)
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resident_peak()


def resident_peak() -> int:
    """Largest resident set of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` would count what the parent held when it made this process
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
