"""What a pruner is: a name, where it stands, what it looks at, and a pure function.

That function scores tokens, of which the best are kept; or, where the worth of a token depends on
the others, it chooses K of them itself; or it merges all into K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.mistakes import MethodError, answer_of, check_choice, check_scores
from fastdrive_jax.pruning.select import gather_tokens, num_keep, top_k

Need = Literal[
    "tokens",
    "position_ids",
    "text",
    "text_valid",
    "foreground",
    "relevance",
    "camera",
    "grid",
    "embeddings",
    "last_row",
    "text_rows",
    "received",
    "vision_received",
    "vision_keys",
    "pixels",
    "state",
    "key",
]
ATTENTION = frozenset({"last_row", "text_rows", "received"})
VISION = frozenset({"vision_received", "vision_keys"})


class PrunerInputs(flax.struct.PyTreeNode):
    """What methods may look at; the caller fills what the chosen one declares.

    With C pictures in a sample their tokens follow each other, N = C * rows * columns. Behind an
    earlier cut N is what that one kept. A method that scores and stands before the language model,
    and one within `budgets.per_camera`, is shown each picture as a sample of its own, with C = 1.

    Attributes:
        tokens: Visual tokens [B, N, D]: as they enter the language model or, for a method that
            stands within it, the hidden states that enter the layer.
        position_ids: M-RoPE ids [3, B, N].
        text: Text embeddings [B, L, D].
        text_valid: Which of them are instruction, behind the picture, and no padding [B, L]; None
            means all.
        foreground: Share of each token's area that is foreground [B, N], known in training data.
        relevance: How much each token matters to the task [B, N], higher is kept, on any scale;
            whoever fills it says what it is.
        camera: Index of the camera of each picture [B, C].
        count: How many of the N tokens of each sample are real [B]; the rest, at the end, pads the
            batch. A padded token is never kept before a real one; that K is at most `count` is for
            the caller to see to. None means that all are real.
        ids: Which of the tokens before all cuts these are [B, N]; None means all.
        embeddings: Visual tokens as they entered the language model [B, N, D].
        last_row: Attention of the last token of the prompt, by head [B, Q, N], a share of the
            row's whole mass.
        text_rows: Attention of the text tokens [B, Q, L, N].
        received: Attention that each token gets, mean over heads and all rows [B, N].
        vision_received: The same in the vision encoder's last block that sees the whole picture,
            summed over a token's patches [B, N].
        vision_keys: Keys of that block, mean over heads and a token's patches [B, N, d].
        pixels: Each token's pixels [B, N, P], of a method that compares frames.
        state: What a temporal method remembers of earlier frames, a pytree with leaves [B, ...].
        grid: Token rows and columns of one picture; static.
        cut: Which of a method's cuts this is, from 0; static.
    """

    tokens: Float[Array, "B N D"]
    position_ids: Int[Array, "3 B N"] | None = None
    text: Float[Array, "B L D"] | None = None
    text_valid: Bool[Array, "B L"] | None = None
    foreground: Float[Array, "B N"] | None = None
    relevance: Float[Array, "B N"] | None = None
    camera: Int[Array, "B C"] | None = None
    count: Int[Array, " B"] | None = None
    ids: Int[Array, "B N"] | None = None
    embeddings: Float[Array, "B N D"] | None = None
    last_row: Float[Array, "B Q N"] | None = None
    text_rows: Float[Array, "B Q L N"] | None = None
    received: Float[Array, "B N"] | None = None
    vision_received: Float[Array, "B N"] | None = None
    vision_keys: Float[Array, "B N d"] | None = None
    pixels: Float[Array, "B N P"] | None = None
    state: Any = None
    grid: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)
    cut: int = flax.struct.field(pytree_node=False, default=0)


@dataclass(frozen=True)
class Cuts:
    """Where within the language model a method stands.

    Attributes:
        layers: Number of layers to the layers, ascending, on entering which tokens leave.
        budgets: (N, keep_ratio) to the K of each cut; None gives all `Pruner.budget`.
        own_rows: Attention is that of the layer that is entered; otherwise of the one before.
    """

    layers: Callable[[int], tuple[int, ...]]
    budgets: Callable[[int, float], tuple[int, ...]] | None = None
    own_rows: bool = False


class Seen(flax.struct.PyTreeNode):
    """What a frame shows to a temporal method once it is planned.

    Attributes:
        action: Attention that each visual token got from the queries that gave action tokens, mean
            over heads, queries and the layers that were asked for [B, N]; 0 for a pruned one.
        kept: Tokens that the last layer saw or, of a method that reuses, computed [B, N].
        pixels: See `PrunerInputs`.
        text: Attention that each visual token got from the instruction, mean over heads, rows and
            the layers that were asked for [B, N]; for methods that reuse.
    """

    action: Float[Array, "B N"] | None = None
    kept: Bool[Array, "B N"] | None = None
    pixels: Float[Array, "B N P"] | None = None
    text: Float[Array, "B N"] | None = None


@dataclass(frozen=True)
class Temporal:
    """What a method remembers from frame to frame.

    Attributes:
        init: (first frame's inputs) to the state before it; every leaf starts with B.
        observe: (state, seen) to the state of the next frame.
        layers: Number of layers to those whose action attention `Seen.action` is the mean of; ()
            if it is not read.
        text_layers: The same of `Seen.text`.
        warmup: Frames of a drive, from its first, in which the published method prunes nothing.
    """

    init: Callable[[PrunerInputs], Any]
    observe: Callable[[Any, Seen], Any]
    layers: Callable[[int], tuple[int, ...]] = lambda num_layers: ()
    text_layers: Callable[[int], tuple[int, ...]] = lambda num_layers: ()
    warmup: int = 0


@dataclass(frozen=True)
class Pruner:
    """A method: exactly one of `score`, `choose` and `merge` is given.

    Attributes:
        name: In tables and on the command line.
        score: (params, inputs, key) to scores [B, N], higher is kept; pure and traceable. Before
            the language model each picture is scored as a sample of its own, B being batch times
            pictures, and the K best of all of a sample's pictures stay; within it all pictures'
            tokens come together. The key is the batch's, or each sample's own: draw with `draws`.
        needs: Fields of `PrunerInputs` that it reads, and "key" for one that draws.
        choose: (params, inputs, key, k) to the indices [B, K] of the kept tokens in any order; k is
            static. It heeds `inputs.count`.
        merge: The same, to indices and the tokens [B, K, D] that stand there from now on.
        budget: (N, keep_ratio) to K; another than `num_keep` for a method that rounds otherwise.
        cuts: Where it stands; None is between projector and language model.
        temporal: What it remembers; None is nothing.
        renumber: Positions are given out anew to what is left, as some methods were published;
            otherwise every token keeps its own.
        reuse: Tokens that leave are not forgotten but not computed: from there on layers see their
            keys and values of the last frame, see `inference.reuse`. It chooses by what is known
            before the first layer.

    Raises:
        MethodError: It needs what there is not, not exactly one of `score`, `choose` and `merge`
            is given, or it reuses without cuts or memory.
    """

    name: str
    score: Callable[[Any, PrunerInputs, jax.Array | None], Float[Array, "B N"]] | None = None
    needs: frozenset[Need] = frozenset({"tokens"})
    choose: Callable[[Any, PrunerInputs, jax.Array | None, int], Int[Array, "B K"]] | None = None
    merge: Callable[[Any, PrunerInputs, jax.Array | None, int], tuple] | None = None
    budget: Callable[[int, float], int] = num_keep
    cuts: Cuts | None = None
    temporal: Temporal | None = None
    renumber: bool = False
    reuse: bool = False

    def __post_init__(self):
        if unknown := sorted(set(self.needs) - set(get_args(Need))):
            raise MethodError(
                f"The method {self.name!r} needs {', '.join(unknown)}, which no input is called; "
                f"choose from {', '.join(get_args(Need))}."
            )
        if self.reuse and (self.cuts is None or self.temporal is None):
            raise MethodError(f"The method {self.name!r} reuses: let it have cuts and temporal.")
        if sum(part is not None for part in (self.score, self.choose, self.merge)) != 1:
            raise MethodError(
                f"The method {self.name!r} must have one of score, choose and merge, and no other."
            )


class Kept(flax.struct.PyTreeNode):
    """What a method leaves.

    Attributes:
        indices: [B, K] in raster order, padding last; of a merged token, its representative's.
        tokens: [B, K, D].
    """

    indices: Int[Array, "B K"]
    tokens: Float[Array, "B K D"]


def stands_before(pruner: Pruner) -> bool:
    """Whether a method is done before the language model, which then need not know it."""
    return pruner.cuts is None and not pruner.renumber


def real_tokens(inputs: PrunerInputs) -> Bool[Array, "B N"]:
    """True for tokens that are no padding."""
    batch, length = inputs.tokens.shape[:2]
    if inputs.count is None:
        return jnp.ones((batch, length), bool)
    return jnp.arange(length) < inputs.count[:, None]


def keep_tokens(
    pruner: Pruner, params: Any, inputs: PrunerInputs, k: int, key: jax.Array | None = None
) -> Kept:
    """The K tokens that `pruner` leaves of `inputs`.

    Args:
        pruner: The method; static.
        params: Its parameters; None for methods without.
        inputs: At least what it needs.
        k: K, static.
        key: For methods that draw.

    Raises:
        MethodError: The method's answer is not of the shape that it must be, it reads what it does
            not declare, or something that it needs is absent.
        ValueError: K is not in 1..N.
    """
    length = inputs.tokens.shape[1]
    if not 1 <= k <= length:
        raise ValueError(f"k must be in 1..{length}, got {k}")
    _check_needs(pruner, inputs, key)
    if pruner.score is not None:
        # Without padding there is nothing to mask, and a score of minus infinity stays what it is.
        valid = None if inputs.count is None else real_tokens(inputs)
        indices = top_k(pruner_scores(pruner, params, inputs, key), k, valid)
        return Kept(indices, gather_tokens(inputs.tokens, indices))
    if pruner.choose is not None:
        chosen, merged = answer_of(pruner, pruner.choose, params, inputs, key, k), None
    else:
        chosen, merged = answer_of(pruner, pruner.merge, params, inputs, key, k)
    check_choice(pruner, inputs, k, chosen, merged)
    order = jnp.argsort(chosen, axis=-1)
    indices = jnp.take_along_axis(chosen, order, axis=-1)
    if merged is None:
        return Kept(indices, gather_tokens(inputs.tokens, indices))
    return Kept(indices, gather_tokens(merged, order).astype(inputs.tokens.dtype))


def pruner_scores(
    pruner: Pruner, params: Any, inputs: PrunerInputs, key: jax.Array | None = None
) -> Float[Array, "B N"]:
    """Scores [B, N], float32, after a check that all that the method needs is there.

    Padded tokens have scores too, which mean nothing.

    Raises:
        MethodError: They are not [B, N], the method reads what it does not declare, or something
            that it needs is absent.
        ValueError: The method has no scores.
    """
    if pruner.score is None:
        raise ValueError(
            f"pruner {pruner.name!r} chooses tokens together and has no scores: use keep_tokens"
        )
    _check_needs(pruner, inputs, key)
    scores = answer_of(pruner, pruner.score, params, inputs, key)
    check_scores(pruner, inputs, scores)
    return scores.astype(jnp.float32)


def cut_plan(
    pruner: Pruner, n: int, keep_ratio: float, num_layers: int
) -> tuple[tuple[int, int], ...]:
    """(layer, K) of each cut, both static; layer 0 stands for the place before all layers.

    Args:
        pruner: The method.
        n: N, visual tokens before all cuts.
        keep_ratio: In (0, 1]; at 1 nothing is cut.
        num_layers: Of the language model.

    Raises:
        UserError: The ratio is outside (0, 1].
        MethodError: The cuts are not ascending layers of the model with falling budgets.
    """
    k = pruner.budget(n, keep_ratio)
    if pruner.cuts is None:
        return ((0, k),)
    if keep_ratio == 1:
        return ()
    layers = pruner.cuts.layers(num_layers)
    budgets = (k,) * len(layers)
    if pruner.cuts.budgets is not None:
        budgets = pruner.cuts.budgets(n, keep_ratio)
    first = 0 if pruner.cuts.own_rows else 1
    ascending = all(a < b for a, b in zip((first - 1, *layers), (*layers, num_layers), strict=True))
    falling = all(a >= b for a, b in zip((n, *budgets), (*budgets, 1), strict=True))
    if len(budgets) != len(layers) or not ascending or not falling:
        raise MethodError(
            f"The method {pruner.name!r} cuts to {budgets} tokens on entering layers {layers} of "
            f"{num_layers}: let them be {first} to {num_layers - 1}, ascending, with K falling."
        )
    return tuple(zip(layers, budgets, strict=True))


def published_layers(*layers: int, of: int = 32) -> Callable[[int], tuple[int, ...]]:
    """Layers at the same relative depth of any model, ascending and at least 1.

    Args:
        layers: Published ones.
        of: Layers of the published model.
    """

    def scaled(num_layers: int) -> tuple[int, ...]:
        found: list[int] = []
        for number, layer in enumerate(layers):
            most = num_layers - (len(layers) - number)  # room for the cuts that follow
            least = found[-1] + 1 if found else 1
            found.append(max(least, min(most, round(layer * num_layers / of))))
        return tuple(found)

    return scaled


def _check_needs(pruner: Pruner, inputs: PrunerInputs, key: jax.Array | None) -> None:
    given = {need: key if need == "key" else getattr(inputs, need) for need in pruner.needs}
    absent = sorted(need for need, value in given.items() if value is None)
    if absent:
        raise MethodError(
            f"The method {pruner.name!r} needs {', '.join(absent)}, which is not given here."
        )
