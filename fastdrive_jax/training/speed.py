"""How fast a run is, and what of its devices it uses."""

from collections.abc import Sequence
from typing import Any

import jax


def xla_flops(program: Any) -> float:
    """Floating-point operations of a program, as XLA counts them.

    XLA counts the body of a loop once, however often it runs, so a step with `accumulate` or with a
    scan over layers does more; recomputed activations are counted as often as they are computed;
    kernels that XLA did not write itself count nothing. A lowered program is counted whole, a
    compiled one as each of its devices runs it.

    Args:
        program: `jax.jit(f).lower(...)`, or `.compile()` of that.

    Raises:
        ValueError: the backend does not tell.
    """
    costs = program.cost_analysis()
    if not costs or "flops" not in costs:
        raise ValueError("XLA gives no FLOPs for this program: set flops_per_step yourself")
    return float(costs["flops"])


def utilisation(flops: float | None, seconds: float, peak_flops: float | None) -> dict[str, float]:
    """{"mfu": share of the peak}, or nothing where one of the figures is not known."""
    if flops is None or peak_flops is None:
        return {}
    return {"mfu": flops / max(seconds, 1e-9) / peak_flops}


def device_memory(devices: Sequence[jax.Device] | None = None) -> dict[str, float]:
    """{"device_memory_gib": peak of the fullest device}, or nothing where it is not told.

    Asking does not wait for the devices. CPUs tell nothing.

    Args:
        devices: by default those of this process.
    """
    stats = [device.memory_stats() for device in devices or jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if each and "peak_bytes_in_use" in each]
    return {"device_memory_gib": max(peaks) / 2**30} if peaks else {}
