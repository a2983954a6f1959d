"""Methods as programs that the tests of a file share."""

from collections.abc import Callable

import jax


def traced(function: Callable) -> tuple[Callable, Callable]:
    """`function(pruner, params, inputs, k, ...)` compiled, and a check of a pruner's programs.

    The check fails where the same shapes, types and K were traced twice, or nothing was.
    """
    traces = []

    def noted(pruner, params, inputs, k, *rest):
        given = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(inputs)]
        traces.append((pruner, *given, inputs.grid, inputs.cut, k))
        return function(pruner, params, inputs, k, *rest)

    def check(pruner):
        known = [trace for trace in traces if trace[0] is pruner]
        assert known
        assert len(known) == len(set(known))

    return jax.jit(noted, static_argnums=(0, 3)), check
