"""FLOPs of a program's products, counted in its jaxpr: loops by their rounds, nothing allocated.

XLA's own count of a compiled program takes the body of a loop once, and attention on a CPU is a
loop over heads and blocks; the formulas of `pruning.accounting` know no program at all. This count
stands between the two. What it cannot see into is a kernel of another library (cuDNN, Pallas).
"""

import math
from collections.abc import Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr


def program_flops(program: ClosedJaxpr) -> float:
    """FLOPs of a program's matrix products, 2 for a multiply-add.

    A `cond` counts as its cheapest branch, which here is the usual frame's; a `while_loop`, whose
    rounds depend on data, as one round.

    Args:
        program: Of `jax.make_jaxpr` or a traced function's `jaxpr`.
    """
    return _count(program.jaxpr)


def _count(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "cond":
            total += min(_count(branch.jaxpr) for branch in params["branches"])
        else:
            rounds = params["length"] if name == "scan" else 1
            total += rounds * sum(_count(inner) for inner in _inner(params))
    return total


def _inner(params: dict) -> Iterator[Jaxpr]:
    """Programs that an equation calls."""
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
