"""Sequences on their way through a decoder: which tokens are visual, and which are left."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.interface import Kept, PrunerInputs


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


def keep_live(live: Live, kept: Kept, renumber: bool = False) -> Live:
    """The sequence with the kept visual tokens and all text.

    Args:
        live: The sequence.
        kept: Indices are of `live.visual`.
        renumber: Positions from 0 on, in the order of the sequence, alike in all three rows.
    """
    k = kept.indices.shape[1]
    places = jnp.take_along_axis(live.visual, kept.indices, axis=1)
    both = jnp.concatenate([places, live.text], axis=1)
    order = jnp.argsort(both, axis=1)
    source = jnp.minimum(jnp.take_along_axis(both, order, axis=1), live.hidden.shape[1] - 1)
    hidden = jnp.concatenate([kept.tokens, text_tokens(live)], axis=1)
    found = jnp.argsort(order, axis=1)  # where each of them stands now
    position_ids = jnp.take_along_axis(live.position_ids, source[None], axis=2)
    if renumber:
        position_ids = jnp.broadcast_to(jnp.arange(source.shape[1]), position_ids.shape)
    count = jnp.minimum(live.count, k)
    return Live(
        hidden=jnp.take_along_axis(hidden, order[..., None], axis=1),
        position_ids=position_ids,
        visual=found[:, :k],
        ids=jnp.take_along_axis(live.ids, kept.indices, axis=1),
        text=found[:, k:],
        count=count,
        length=live.length - live.count + count,
        prompt=live.prompt - live.count + count,
        state=live.state,
    )


def visual_tokens(live: Live) -> Float[Array, "B N D"]:
    """Hidden states of the visual tokens."""
    places = jnp.minimum(live.visual, live.hidden.shape[1] - 1)
    return jnp.take_along_axis(live.hidden, places[..., None], axis=1)


def text_tokens(live: Live) -> Float[Array, "B L D"]:
    """Hidden states of all other tokens."""
    places = jnp.minimum(live.text, live.hidden.shape[1] - 1)
    return jnp.take_along_axis(live.hidden, places[..., None], axis=1)


def instruction(live: Live) -> Bool[Array, "B L"]:
    """Which text tokens are the instruction: from behind the pictures to the prompt's end."""
    real = jnp.arange(live.visual.shape[1]) < live.count[:, None]
    places = jnp.where(real, live.visual, -1)
    places = jnp.pad(places, ((0, 0), (0, 1)), constant_values=-1)  # there may be none
    last = jnp.max(places, axis=1, keepdims=True)
    return (live.text > last + live.state) & (live.text < live.prompt[:, None])


def first_inputs(live: Live, inputs: PrunerInputs | None) -> PrunerInputs:
    """What is known before the first layer: `inputs`, and what follows from the sequence."""
    first = visual_tokens(live)
    start = PrunerInputs(first) if inputs is None else inputs.replace(tokens=first)
    return start.replace(embeddings=first, text=text_tokens(live), text_valid=instruction(live))


def cut_inputs(start: PrunerInputs, live: Live, number: int) -> PrunerInputs:
    """What is known of the tokens that are still there, from what is known of all."""
    total = start.tokens.shape[1]
    rows = {
        name: value
        for name in ("foreground", "relevance", "vision_received", "vision_keys", "pixels")
        if (value := getattr(start, name)) is not None
    }
    rows["embeddings"] = start.embeddings
    if live.visual.shape[1] < total:
        rows = {
            name: jnp.take_along_axis(
                value, live.ids.reshape(*live.ids.shape, *[1] * (value.ndim - 2)), 1
            )
            for name, value in rows.items()
        }
    places = jnp.minimum(live.visual, live.hidden.shape[1] - 1)
    position_ids = jnp.take_along_axis(live.position_ids, places[None], axis=2)
    padded = start.count is not None
    return start.replace(
        tokens=visual_tokens(live),
        position_ids=position_ids,
        ids=live.ids,
        count=live.count if padded else None,
        cut=number,
        **rows,
    )
