"""What a pruner is: a name, where it stands, what it looks at, and a pure function.

That function scores tokens, of which the best are kept; or, where the worth of a token depends on
the others, it chooses K of them itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.select import num_keep, top_k

Stage = Literal["input"]
Need = Literal["tokens", "position_ids", "text", "foreground", "relevance", "camera", "grid", "key"]


class PrunerInputs(flax.struct.PyTreeNode):
    """What methods may look at; the caller fills what the chosen one declares.

    With C pictures in a sample their tokens follow each other, N = C * rows * columns.

    Attributes:
        tokens: Visual tokens [B, N, D].
        position_ids: M-RoPE ids [3, B, N].
        text: Text embeddings [B, L, D].
        foreground: Share of each token's area that is foreground [B, N], known in training data.
        relevance: How much each token matters to the task [B, N], higher is kept, on any scale;
            whoever fills it says what it is.
        camera: Index of the camera of each picture [B, C].
        count: How many of the N tokens of each sample are real [B]; the rest, at the end, pads the
            batch. A padded token is never kept before a real one; that K is at most `count` is for
            the caller to see to. None means that all are real.
        grid: Token rows and columns of one picture; static.
    """

    tokens: Float[Array, "B N D"]
    position_ids: Int[Array, "3 B N"] | None = None
    text: Float[Array, "B L D"] | None = None
    foreground: Float[Array, "B N"] | None = None
    relevance: Float[Array, "B N"] | None = None
    camera: Int[Array, "B C"] | None = None
    count: Int[Array, " B"] | None = None
    grid: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)


@dataclass(frozen=True)
class Pruner:
    """A method of choosing tokens: exactly one of `score` and `choose` is given.

    Attributes:
        name: In tables and on the command line.
        score: (params, inputs, key) to scores [B, N], higher is kept; pure and traceable.
        needs: Fields of `PrunerInputs` that it reads, and "key" for one that draws.
        stage: Where it stands: "input" is between projector and language model.
        choose: (params, inputs, key, k) to the indices [B, K] of the kept tokens in any order; k is
            static. It heeds `inputs.count`.
        budget: (N, keep_ratio) to K; another than `num_keep` for a method that rounds otherwise.

    Raises:
        ValueError: Both or none of `score` and `choose` are given.
    """

    name: str
    score: Callable[[Any, PrunerInputs, jax.Array | None], Float[Array, "B N"]] | None = None
    needs: frozenset[Need] = frozenset({"tokens"})
    stage: Stage = "input"
    choose: Callable[[Any, PrunerInputs, jax.Array | None, int], Int[Array, "B K"]] | None = None
    budget: Callable[[int, float], int] = num_keep

    def __post_init__(self):
        if (self.score is None) == (self.choose is None):
            raise ValueError(f"pruner {self.name!r} must have either score or choose")


def real_tokens(inputs: PrunerInputs) -> Bool[Array, "B N"]:
    """True for tokens that are no padding."""
    batch, length = inputs.tokens.shape[:2]
    if inputs.count is None:
        return jnp.ones((batch, length), bool)
    return jnp.arange(length) < inputs.count[:, None]


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
    k = pruner.budget(inputs.tokens.shape[1], keep_ratio)
    if pruner.choose is None:
        # Without padding there is nothing to mask, and a score of minus infinity stays what it is.
        valid = None if inputs.count is None else real_tokens(inputs)
        return top_k(pruner_scores(pruner, params, inputs, key), k, valid)
    _check_needs(pruner, inputs, key)
    chosen = pruner.choose(params, inputs, key, k)
    if chosen.shape != (inputs.tokens.shape[0], k):
        raise ValueError(f"pruner {pruner.name!r} chose {chosen.shape}")
    return jnp.sort(chosen, axis=-1)


def pruner_scores(
    pruner: Pruner, params: Any, inputs: PrunerInputs, key: jax.Array | None = None
) -> Float[Array, "B N"]:
    """Scores [B, N], float32, after a check that all that the method needs is there.

    Padded tokens have scores too, which mean nothing.

    Raises:
        ValueError: The method chooses and has no scores, or something that it needs is absent.
    """
    if pruner.score is None:
        raise ValueError(
            f"pruner {pruner.name!r} chooses tokens together and has no scores: use keep_indices"
        )
    _check_needs(pruner, inputs, key)
    scores = pruner.score(params, inputs, key)
    if scores.shape != inputs.tokens.shape[:2]:
        raise ValueError(f"pruner {pruner.name!r} gave scores {scores.shape}")
    return scores.astype(jnp.float32)


def _check_needs(pruner: Pruner, inputs: PrunerInputs, key: jax.Array | None) -> None:
    given = {need: key if need == "key" else getattr(inputs, need) for need in pruner.needs}
    absent = sorted(need for need, value in given.items() if value is None)
    if absent:
        raise ValueError(f"pruner {pruner.name!r} needs {', '.join(absent)}, which is not given")
