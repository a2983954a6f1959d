"""The usual mistakes in a method of one's own, each told in one sentence that names the method."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fastdrive_jax.errors import UserError
from fastdrive_jax.pruning.draws import is_per_sample

if TYPE_CHECKING:
    from fastdrive_jax.pruning.interface import Pruner, PrunerInputs


class MethodError(UserError, ValueError):
    """A mistake in a method: a bad value in the library, a sentence on the command line."""


def answer_of(
    pruner: "Pruner",
    function: Callable,
    params: Any,
    inputs: "PrunerInputs",
    key: jax.Array | None,
    *k: int,
) -> Any:
    """What a function of the method answers.

    Raises:
        MethodError: It reads something that is not filled, or draws with samples' keys as with one.
    """
    try:
        return function(params, inputs, key, *k)
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        if key is not None and is_per_sample(key) and "single key" in str(error):
            raise MethodError(
                f"The method {pruner.name!r} draws with one key where each sample has its own "
                f"({error}); draw with uniform, normal or gumbel of fastdrive_jax.pruning.draws."
            ) from error
        if "NoneType" in str(error):
            raise MethodError(
                f"The method {pruner.name!r} stumbles over something that is None ({error}); of "
                f"its inputs only what `needs` names is filled, which is "
                f"{', '.join(sorted(pruner.needs))}: add what else it reads."
            ) from error
        raise


def check_scores(pruner: "Pruner", inputs: "PrunerInputs", scores: Any) -> None:
    """Refuses scores that are not [B, N].

    Raises:
        MethodError: They are not.
    """
    _check_shape(pruner, "gave scores", "[B, N]", inputs.tokens.shape[:2], scores)


def check_choice(
    pruner: "Pruner", inputs: "PrunerInputs", k: int, chosen: Any, merged: Any = None
) -> None:
    """Refuses what is not indices [B, K] and, of a method that merges, tokens [B, K, D].

    Raises:
        MethodError: It is not.
    """
    batch, _, dim = inputs.tokens.shape
    _check_shape(pruner, "chose indices", "[B, K]", (batch, k), chosen)
    if not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise MethodError(
            f"The method {pruner.name!r} gives indices of type {chosen.dtype}; give integers."
        )
    if merged is not None:
        _check_shape(pruner, "merged into tokens", "[B, K, D]", (batch, k, dim), merged)


def _check_shape(pruner, did, letters, expected, found) -> None:
    shape = getattr(found, "shape", type(found).__name__)
    if shape != tuple(expected):
        raise MethodError(
            f"The method {pruner.name!r} {did} {shape}, where {letters} is {tuple(expected)}."
        )


def check_kept(kept: Any, n: int, name: str, keep_ratio: float) -> None:
    """Refuses kept tokens that are no K different ones of N; for what is fetched anyway.

    A program does not stop at an index that there is not, or that there is twice: it reads some
    token in its place, and all figures are of another choice than the method's.

    Args:
        kept: Indices in raster order [..., K], on the host.
        n: N, visual tokens before all cuts.
        name: Of the method.
        keep_ratio: Its ratio.

    Raises:
        MethodError: A token is none of the N, or is kept twice.
    """
    kept = np.asarray(kept)
    outside = (kept < 0) | (kept >= n)
    if outside.any():
        wrong = f"keeps tokens that there are not: N is {n}"
    elif (np.diff(kept, axis=-1) <= 0).any():
        wrong = "keeps a token twice"
    else:
        return
    raise MethodError(
        f"The method {name!r} at a keep ratio of {keep_ratio:g} {wrong}; let `choose` and `merge` "
        "give K different indices of each sample, all in 0..N-1."
    )
