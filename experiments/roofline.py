"""What a machine could do at best: FLOP/s of products, bytes a second, and the time that bounds.

A program takes at least its FLOPs over the machine's rate, and at least its bytes over the
memory's: the roofline is the larger (Williams, Waterman and Patterson, 2009).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp

from experiments.training_cost import PEAKS


@dataclass(frozen=True)
class Machine:
    """Rates of a device.

    Attributes:
        name: For people.
        flops: FLOP/s of dense products.
        bandwidth: Bytes a second from its memory.
        memory: Bytes that it holds; 0 if nobody said.
        source: Where the rates are from.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float = 0.0
    source: str = "measured"


# Dense bfloat16 products without sparsity, memory in units of 1000.
ACCELERATORS: Mapping[str, Machine] = MappingProxyType(
    {
        "a100": Machine(
            "A100 SXM 80 GB", PEAKS["A100"], 2.039e12, 80e9, "NVIDIA A100 80GB data sheet"
        ),
        "h100": Machine("H100 SXM", PEAKS["H100"], 3.35e12, 80e9, "NVIDIA H100 data sheet"),
        "h200": Machine("H200 SXM", PEAKS["H200"], 4.8e12, 141e9, "NVIDIA H200 data sheet"),
        "v5e": Machine("TPU v5e", PEAKS["TPU v5 lite"], 819e9, 16e9, "Google Cloud TPU v5e docs"),
        "v6e": Machine("TPU v6e", PEAKS["TPU v6 lite"], 1640e9, 32e9, "Google Cloud TPU v6e docs"),
    }
)


def roofline_ms(machine: Machine, flops: float, moved: float) -> float:
    """Least milliseconds of a program.

    Args:
        machine: That runs it.
        flops: Of its products.
        moved: Bytes that it must read or write, each once.
    """
    return 1e3 * max(flops / machine.flops, moved / machine.bandwidth)


def rate_programs(dtype: jnp.dtype) -> dict[str, tuple[Callable[[], jax.Array], float]]:
    """What measures this machine: name -> (a program to time, its FLOPs or bytes).

    Two square matrices are multiplied, and numbers read once, far more than a cache holds.
    """
    side, floats = (1024, 1 << 25) if jax.default_backend() == "cpu" else (8192, 1 << 30)
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    line = jnp.ones((floats // 4096, 4096), dtype)
    multiply = jax.jit(lambda x: x @ x)
    read = jax.jit(lambda x: x.sum(dtype=jnp.float32))  # decoding reads: writing would not do
    return {
        "flops": (lambda: multiply(square), 2.0 * side**3),
        "bandwidth": (lambda: read(line), float(line.nbytes)),
    }
