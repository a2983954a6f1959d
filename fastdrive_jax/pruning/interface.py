"""What a pruner is: a name, where it stands, what it looks at, and a pure score function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastdrive_jax.pruning.select import num_keep, top_k

Stage = Literal["input"]
Need = Literal["tokens", "position_ids", "text", "foreground", "camera", "grid", "key"]


class PrunerInputs(flax.struct.PyTreeNode):
    """What methods may look at; the caller fills what the chosen one declares.

    With C pictures in a sample their tokens follow each other, N = C * rows * columns.

    Attributes:
        tokens: Visual tokens [B, N, D].
        position_ids: M-RoPE ids [3, B, N].
        text: Text embeddings [B, L, D].
        foreground: Share of each token's area that is foreground [B, N], known in training data.
        camera: Index of the camera of each picture [B, C].
        grid: Token rows and columns of one picture; static.
    """

    tokens: Float[Array, "B N D"]
    position_ids: Int[Array, "3 B N"] | None = None
    text: Float[Array, "B L D"] | None = None
    foreground: Float[Array, "B N"] | None = None
    camera: Int[Array, "B C"] | None = None
    grid: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)


@dataclass(frozen=True)
class Pruner:
    """A method of choosing tokens.

    Attributes:
        name: In tables and on the command line.
        score: (params, inputs, key) to scores [B, N], higher is kept; pure and traceable.
        needs: Fields of `PrunerInputs` that it reads, and "key" for one that draws.
        stage: Where it stands: "input" is between projector and language model.
    """

    name: str
    score: Callable[[Any, PrunerInputs, jax.Array | None], Float[Array, "B N"]]
    needs: frozenset[Need]
    stage: Stage = "input"


def keep_indices(
    pruner: Pruner,
    params: Any,
    inputs: PrunerInputs,
    keep_ratio: float,
    key: jax.Array | None = None,
) -> Int[Array, "B K"]:
    """Tokens that `pruner` keeps, [B, K] in raster order.

    Args:
        pruner: The method; static.
        params: Its parameters; None for methods without.
        inputs: At least what it needs.
        keep_ratio: In (0, 1]; static, for it sets K.
        key: For methods that draw.

    Raises:
        UserError: The ratio is outside (0, 1].
        ValueError: Something that the method needs is absent.
    """
    k = num_keep(inputs.tokens.shape[1], keep_ratio)
    return top_k(pruner_scores(pruner, params, inputs, key), k)


def pruner_scores(
    pruner: Pruner, params: Any, inputs: PrunerInputs, key: jax.Array | None = None
) -> Float[Array, "B N"]:
    """Scores [B, N], float32, after a check that all that the method needs is there."""
    given = {need: key if need == "key" else getattr(inputs, need) for need in pruner.needs}
    absent = sorted(need for need, value in given.items() if value is None)
    if absent:
        raise ValueError(f"pruner {pruner.name!r} needs {', '.join(absent)}, which is not given")
    scores = pruner.score(params, inputs, key)
    if scores.shape != inputs.tokens.shape[:2]:
        raise ValueError(f"pruner {pruner.name!r} gave scores {scores.shape}")
    return scores.astype(jnp.float32)
