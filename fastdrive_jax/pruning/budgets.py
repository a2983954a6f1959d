"""How the K tokens of a sample are shared over its cameras.

By itself a method has one budget for all cameras: the front one may take more. `per_camera` gives
each camera its own. Where a method is shown one picture, that is a sample of its own: `ids` and the
leaves of a temporal method's state are of the picture's n tokens.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from fastdrive_jax.pruning.draws import fold
from fastdrive_jax.pruning.interface import (
    Kept,
    Pruner,
    PrunerInputs,
    keep_tokens,
    pruner_scores,
    stands_before,
)
from fastdrive_jax.pruning.mistakes import MethodError
from fastdrive_jax.pruning.select import gather_tokens, top_k

_BY_TOKEN = {  # fields of PrunerInputs with an axis of tokens, and which it is
    "tokens": 1,
    "position_ids": 2,
    "foreground": 1,
    "relevance": 1,
    "ids": 1,
    "embeddings": 1,
    "last_row": 2,
    "text_rows": 3,
    "received": 1,
    "vision_received": 1,
    "vision_keys": 1,
    "pixels": 1,
}


def camera_budgets(k: int, n: int, weights: tuple[float, ...]) -> Int[np.ndarray, " C"]:
    """K_c tokens of each camera: in proportion to the weights, K in all, none above n.

    Tokens are given out one by one to the largest `w_c / (2 K_c + 1)` (Sainte-Lague), ties to the
    first camera; equal weights differ by one token at most, and a larger K takes from no camera.

    Raises:
        ValueError: K is above C * n.
    """
    if k > len(weights) * n:
        raise ValueError(f"{len(weights)} cameras of {n} tokens do not have {k} tokens")
    budgets = np.zeros(len(weights), np.int64)
    for _ in range(k):
        claims = np.where(budgets < n, np.asarray(weights) / (2 * budgets + 1), -1)
        budgets[np.argmax(claims)] += 1
    return budgets


def pictures_of(inputs: PrunerInputs) -> int:
    """C, pictures of a sample.

    Raises:
        ValueError: N is no whole number of grids.
    """
    length = inputs.tokens.shape[1]
    cameras, rest = divmod(length, inputs.grid[0] * inputs.grid[1])
    if rest:
        raise ValueError(f"{length} tokens are no whole number of grids {inputs.grid}")
    return cameras


def slice_tokens(inputs: PrunerInputs, start: int, stop: int) -> PrunerInputs:
    """What `inputs` say of tokens `start` to `stop`; state and cameras are left whole."""
    parts = {
        name: jax.lax.slice_in_dim(value, start, stop, axis=axis)
        for name, axis in _BY_TOKEN.items()
        if (value := getattr(inputs, name)) is not None
    }
    if inputs.count is not None:
        parts["count"] = jnp.clip(inputs.count - start, 0, stop - start)
    return inputs.replace(**parts)


def split_pictures(inputs: PrunerInputs) -> PrunerInputs:
    """Each picture as a sample of its own, [B * C, n, ...]; the text goes with every one.

    So does what a temporal method remembers of the sample; leaves with an axis of N entries, and
    `ids`, are of tokens and split.

    Raises:
        MethodError: A leaf of the state has several axes of N entries.
        ValueError: N is no whole number of grids, or there is padding.
    """
    if inputs.count is not None:
        raise ValueError("pictures with padding can't be told apart")
    pictures = pictures_of(inputs)
    n = inputs.tokens.shape[1] // pictures
    parts = {
        name: value.reshape(-1, n, *value.shape[2:])
        for name, axis in _BY_TOKEN.items()
        if axis == 1 and (value := getattr(inputs, name)) is not None
    }
    if inputs.ids is not None:
        parts["ids"] = parts["ids"] % n
    if inputs.position_ids is not None:
        parts["position_ids"] = inputs.position_ids.reshape(3, -1, n)
    if inputs.camera is not None:
        parts["camera"] = inputs.camera.reshape(-1, 1)
    for name in ("text", "text_valid"):
        if (value := getattr(inputs, name)) is not None:
            parts[name] = jnp.repeat(value, pictures, axis=0)

    def split(leaf: Array) -> Array:
        axis = _token_axis(leaf, n, pictures)
        if axis is None:
            return jnp.repeat(leaf, pictures, axis=0)
        first = jnp.moveaxis(leaf, axis, 1)
        return jnp.moveaxis(first.reshape(-1, n, *first.shape[2:]), 1, axis)

    parts["state"] = jax.tree.map(split, inputs.state)
    return inputs.replace(**parts)


def _picture_state(state: Any, number: int, n: int, pictures: int) -> Any:
    """What a temporal method remembers of one of the pictures of a sample."""

    def part(leaf: Array) -> Array:
        axis = _token_axis(leaf, n, pictures)
        if axis is None:
            return leaf
        return jax.lax.slice_in_dim(leaf, number * n, (number + 1) * n, axis=axis)

    return jax.tree.map(part, state)


def _token_axis(leaf: Array, n: int, pictures: int) -> int | None:
    """Which axis of a state's leaf runs over all N tokens; None: it is of the whole sample."""
    axes = [axis for axis in range(1, leaf.ndim) if leaf.shape[axis] == n * pictures]
    if pictures == 1 or not axes:
        return None
    if len(axes) > 1:
        raise MethodError(
            f"A leaf of a method's state is {leaf.shape}, and which axis is that of the "
            f"{n * pictures} tokens can't be told; give it one such axis, as in [B, N, ...]."
        )
    return axes[0]


def keep_before(
    pruner: Pruner,
    params: Any,
    inputs: PrunerInputs,
    keep_ratio: float,
    key: jax.Array | None = None,
) -> Kept:
    """What a method that stands before the language model keeps.

    Scores are made of each picture by itself, for one budget; other methods see all pictures.

    Args:
        pruner: The method.
        params: Its parameters.
        inputs: Of whole pictures, without padding.
        keep_ratio: In (0, 1].
        key: For methods that draw.
    """
    k = pruner.budget(inputs.tokens.shape[1], keep_ratio)
    if pruner.score is None:
        return keep_tokens(pruner, params, inputs, k, key)
    scores = pruner_scores(pruner, params, split_pictures(inputs), key)
    indices = top_k(scores.reshape(inputs.tokens.shape[:2]), k)
    return Kept(indices, gather_tokens(inputs.tokens, indices))


def keep_indices(
    pruner: Pruner,
    params: Any,
    inputs: PrunerInputs,
    keep_ratio: float,
    key: jax.Array | None = None,
) -> Int[Array, "B K"]:
    """Tokens that `pruner` keeps, [B, K] in raster order, as a policy has it choose them.

    Where `inputs.grid` tells pictures apart, a method that scores and stands before the language
    model is shown each by itself, see `keep_before`; padded tokens come together.

    Args:
        pruner: The method; static.
        params: Its parameters; None for methods without.
        inputs: At least what it needs.
        keep_ratio: In (0, 1]; static, for it sets K.
        key: For methods that draw.

    Raises:
        UserError: The ratio is outside (0, 1], or the method makes a mistake, see `keep_tokens`.
        ValueError: Something that the method needs is absent, or N is no whole number of grids.
    """
    whole = inputs.grid is not None and inputs.count is None and inputs.ids is None
    if whole and pruner.score is not None and stands_before(pruner):
        return keep_before(pruner, params, inputs, keep_ratio, key).indices
    k = pruner.budget(inputs.tokens.shape[1], keep_ratio)
    return keep_tokens(pruner, params, inputs, k, key).indices


def per_camera(
    pruner: Pruner, cameras: int | None = None, weights: tuple[float, ...] | None = None
) -> Pruner:
    """The method with a budget for each camera, which it then looks at by itself.

    Padding counts as the last cameras' tokens.

    Args:
        pruner: The method.
        cameras: C; None takes as many as there are weights or, without any, pictures of a sample.
        weights: Of each camera, in their order; None means equal. K is shared out in proportion.

    Raises:
        ValueError: Not one weight, at least 0 and not all 0, for each camera.
    """
    if weights is not None:
        cameras = len(weights) if cameras is None else cameras
        if (
            len(weights) != cameras
            or not np.isfinite(weights).all()
            or not (min(weights) >= 0 < sum(weights))
        ):
            raise ValueError(f"weights must be {cameras}, at least 0 and not all 0, got {weights}")

    def each(params, inputs: PrunerInputs, key, k: int) -> list[tuple[int, Kept]]:
        count = inputs.tokens.shape[1]
        n = inputs.grid[0] * inputs.grid[1]
        given = _cameras_of(pruner, inputs, cameras)
        shares = (1.0,) * given if weights is None else weights
        # Behind an earlier cut of this method, its own budgets say where each camera begins.
        held = camera_budgets(count, n, shares)
        budgets = camera_budgets(k, n, shares)
        found, start = [], 0
        for number, (own, budget) in enumerate(zip(held, budgets, strict=True)):
            if budget:
                part = slice_tokens(inputs, start, start + int(own))
                part = part.replace(state=_picture_state(inputs.state, number, n, given))
                if inputs.ids is not None:
                    part = part.replace(ids=part.ids - number * n)
                if inputs.camera is not None:
                    part = part.replace(camera=inputs.camera[:, number : number + 1])
                own_key = fold(key, number)
                found.append((start, keep_tokens(pruner, params, part, int(budget), own_key)))
            start += int(own)
        return found

    def choose(params, inputs, key, k):
        found = each(params, inputs, key, k)
        return jnp.concatenate([start + kept.indices for start, kept in found], axis=1)

    def merge(params, inputs, key, k):
        found = each(params, inputs, key, k)
        indices = jnp.concatenate([start + kept.indices for start, kept in found], axis=1)
        return indices, jnp.concatenate([kept.tokens for _, kept in found], axis=1)

    # Behind a cut, N does not say how many pictures there are.
    more = {"camera"} if cameras is None and pruner.cuts is not None else set()
    how = {"choose": choose} if pruner.merge is None else {"merge": merge}
    return replace(
        pruner,
        name=f"{pruner.name}_per_camera",
        score=None,
        needs=pruner.needs | {"grid"} | more,
        **how,
    )


def _cameras_of(pruner: Pruner, inputs: PrunerInputs, cameras: int | None) -> int:
    """C of the inputs, which must be as many as the budgets are for; None takes them as they are.

    Raises:
        MethodError: They are others.
        ValueError: N is no whole number of grids, before any cut.
    """
    if inputs.ids is not None and inputs.camera is not None:
        given = inputs.camera.shape[1]
    elif inputs.ids is not None and cameras is not None:
        given = cameras
    else:
        given = pictures_of(inputs)
    if cameras not in (None, given):
        n = inputs.grid[0] * inputs.grid[1]
        raise MethodError(
            f"per_camera shares the budget of {pruner.name!r} over {cameras} cameras, but a sample "
            f"has {given}, of {n} tokens each; give it {given}, or None to take those there are."
        )
    return given
