"""A step that is compiled once; if it has to be compiled again, one is told why."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax

from fastdrive_jax.errors import UserError


class OneCompilation:
    """Calls a jitted step and notices when it is compiled after its first call."""

    def __init__(self, step_fn: Callable, on_recompile: Literal["warn", "raise"]):
        """Wraps `step_fn`.

        Args:
            step_fn: of `jax.jit`, `(state, batch, *frozen) -> ...`.
            on_recompile: a `RuntimeWarning` or a `UserError`.
        """
        self._step_fn, self._raise = step_fn, on_recompile == "raise"
        self._first: dict[str, str] | None = None
        self._known = 0
        # Not a public name of jax, but nothing public counts the programs of one function.
        self._count = getattr(step_fn, "_cache_size", None)
        if self._count is None:
            warnings.warn(
                f"jax {jax.__version__} does not tell how often a step was compiled.", stacklevel=2
            )

    def __call__(self, state: Any, batch: Any, *frozen: Any) -> Any:
        """Calls the step.

        Raises:
            UserError: it was compiled again and that was to raise.
        """
        if self._first is None:
            self._first = described(state, batch, *frozen)
            out = self._step_fn(state, batch, *frozen)
            self._known = self._count() if self._count else 0
            return out
        out = self._step_fn(state, batch, *frozen)
        if self._count and self._count() > self._known:
            self._known = self._count()
            # What is described is known of donated arrays too.
            self._report(changes(self._first, described(state, batch, *frozen)))
        return out

    def _report(self, changed: list[str]) -> None:
        text = (
            f"The step was compiled again: {'; '.join(changed) or 'its types changed'}. Make all "
            "batches alike, for instance by dropping or padding the last one of an epoch."
        )
        if self._raise:
            raise UserError(text)
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def described(state: Any, batch: Any, *frozen: Any) -> dict[str, str]:
    """Name -> dtype, shape and placement of every array that a program is compiled for."""
    named = {"state": state, "batch": batch} | ({"frozen": frozen} if frozen else {})
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): _describe(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(named)[0]
    }


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """One phrase for each of the first five arrays that differ."""
    found = [
        f"{name} was {before.get(name, 'absent')} and is now {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    return found[:5] + ([f"{len(found) - 5} more"] if len(found) > 5 else [])


def _describe(leaf: Any) -> str:
    kind = jax.typeof(leaf)
    weak = ", weakly typed" if getattr(kind, "weak_type", False) else ""
    spec = getattr(getattr(leaf, "sharding", None), "spec", None)
    place = f" split as {tuple(spec)}" if spec else ""
    return f"{kind.dtype}{list(kind.shape)}{weak}{place}"
