"""Sequences on their way through a decoder: which tokens are visual, and what its layers keep."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.models.decoder import LayerCache


class Live(flax.struct.PyTreeNode):
    """A batch of sequences on their way through the layers.

    Attributes:
        hidden: [B, n, D].
        position_ids: [3, B, n].
        visual: Places of the visual tokens in the sequence, ascending [B, N]; padding lies behind
            `length`.
        ids: Which of the visual tokens before all cuts these are [B, N].
        text: Places of all others, ascending [B, L]; padding as above.
        count: Real visual tokens [B].
        length: Real tokens [B].
        prompt: Those of them up to the end of the prompt [B]; behind it stand slots for an answer
            that is read off at once.
        state: Tokens between pictures and instruction that are neither, such as a robot's state;
            static.
    """

    hidden: Float[Array, "B n D"]
    position_ids: Int[Array, "3 B n"]
    visual: Int[Array, "B N"]
    ids: Int[Array, "B N"]
    text: Int[Array, "B L"]
    count: Int[Array, " B"]
    length: Int[Array, " B"]
    prompt: Int[Array, " B"]
    state: int = flax.struct.field(pytree_node=False, default=0)


def live_sequence(
    embeddings: Float[Array, "B n D"],
    position_ids: Int[Array, "3 B n"],
    is_visual: Bool[Array, "B n"],
    lengths: Int[Array, " B"],
    visual_tokens: int,
    text_tokens: int,
    prompt: Int[Array, " B"] | None = None,
    state: int = 0,
) -> Live:
    """A padded batch in which visual tokens may stand anywhere.

    Args:
        embeddings: Of visual tokens and text in their order.
        position_ids: M-RoPE ids.
        is_visual: Which are visual tokens.
        lengths: Real tokens of each sample, from the first.
        visual_tokens: N, of the sample with most; static.
        text_tokens: L, of the sample with most; static.
        prompt: See `Live`; None: the whole sequence.
        state: See `Live`.
    """
    length = embeddings.shape[1]
    place = jnp.arange(length)
    real = place < lengths[:, None]

    def places(chosen, most):
        found = jnp.sort(jnp.where(chosen, place, length), axis=1)
        short = max(0, most - length)
        return jnp.pad(found, ((0, 0), (0, short)), constant_values=length)[:, :most]

    visual = places(is_visual & real, visual_tokens)
    return Live(
        hidden=embeddings,
        position_ids=position_ids,
        visual=visual,
        ids=jnp.broadcast_to(jnp.arange(visual_tokens), visual.shape),
        text=places(~is_visual & real, text_tokens),
        count=jnp.sum(is_visual & real, axis=1),
        length=lengths,
        prompt=lengths if prompt is None else prompt,
        state=state,
    )


class Segment(flax.struct.PyTreeNode):
    """What decoding needs of some layers that follow each other.

    Attributes:
        caches: One a layer, with room for what will be decoded.
        visual: Places of the visual tokens in them [B, K].
        ids: Which visual tokens these are [B, K].
        count: Real ones among them [B].
        next_position: Position id of the next token [B].
        layers: The first, and one past the last; static.
    """

    caches: tuple[LayerCache, ...]
    visual: Int[Array, "B K"]
    ids: Int[Array, "B K"]
    count: Int[Array, " B"]
    next_position: Int[Array, " B"]
    layers: tuple[int, int] = flax.struct.field(pytree_node=False)
