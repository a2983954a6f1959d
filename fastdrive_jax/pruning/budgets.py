"""How the K tokens of a sample are shared over its cameras.

By itself a method sees all cameras' tokens together, and the budget is shared: the front camera may
take more. `per_camera` gives each camera its own.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from fastdrive_jax.pruning.draws import fold
from fastdrive_jax.pruning.interface import Kept, Pruner, PrunerInputs, keep_tokens

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
    """
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

    Raises:
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
    if inputs.position_ids is not None:
        parts["position_ids"] = inputs.position_ids.reshape(3, -1, n)
    if inputs.camera is not None:
        parts["camera"] = inputs.camera.reshape(-1, 1)
    for name in ("text", "text_valid"):
        if (value := getattr(inputs, name)) is not None:
            parts[name] = jnp.repeat(value, pictures, axis=0)
    if inputs.state is not None:
        of_tokens = inputs.tokens.shape[:2]
        parts["state"] = jax.tree.map(
            lambda x: (
                x.reshape(-1, n, *x.shape[2:])
                if x.shape[:2] == of_tokens
                else jnp.repeat(x, pictures, axis=0)
            ),
            inputs.state,
        )
    return inputs.replace(**parts)


def per_camera(pruner: Pruner, cameras: int, weights: tuple[float, ...] | None = None) -> Pruner:
    """The method with a budget for each camera, which it then looks at by itself.

    Padding counts as the last cameras' tokens.

    Args:
        pruner: The method.
        cameras: C.
        weights: Of each camera, in their order; None means equal. K is shared out in proportion.

    Raises:
        ValueError: Not one weight, at least 0 and not all 0, for each camera.
    """
    weights = (1.0,) * cameras if weights is None else weights
    if (
        len(weights) != cameras
        or not np.isfinite(weights).all()
        or not (min(weights) >= 0 < sum(weights))
    ):
        raise ValueError(f"weights must be {cameras}, at least 0 and not all 0, got {weights}")

    def each(params, inputs: PrunerInputs, key, k: int) -> list[tuple[int, Kept]]:
        count = inputs.tokens.shape[1]
        n = inputs.grid[0] * inputs.grid[1]
        # Behind an earlier cut of this method, its own budgets say where each camera begins.
        held = camera_budgets(count, n, weights)
        if inputs.ids is None:
            batch = len(inputs.tokens)
            inputs = inputs.replace(ids=jnp.broadcast_to(jnp.arange(count), (batch, count)))
        found, start = [], 0
        for number, (own, budget) in enumerate(
            zip(held, camera_budgets(k, n, weights), strict=True)
        ):
            if budget:
                part = slice_tokens(inputs, start, start + int(own))
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

    how = {"choose": choose} if pruner.merge is None else {"merge": merge}
    return replace(
        pruner,
        name=f"{pruner.name}_per_camera",
        score=None,
        needs=pruner.needs | {"grid"},
        **how,
    )
