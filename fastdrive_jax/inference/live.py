"""What a method may know of sequences within a decoder, and what it leaves of them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fastdrive_jax.models.live import Live
from fastdrive_jax.pruning.cd_pruner import text_relevance
from fastdrive_jax.pruning.interface import Kept, Need, PrunerInputs


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


def first_inputs(
    live: Live, inputs: PrunerInputs | None, needs: frozenset[Need] = frozenset()
) -> PrunerInputs:
    """What is known before the first layer: `inputs`, and what follows from the sequence.

    Args:
        live: The sequence.
        inputs: What the method needs of the pictures.
        needs: Of the method: relevance that it asks for and is not given is that to the text.
    """
    first = visual_tokens(live)
    start = PrunerInputs(first) if inputs is None else inputs.replace(tokens=first)
    relevance = "relevance" in needs and start.relevance is None
    return with_prompt(start, text_tokens(live), instruction(live), relevance)


def with_prompt(
    inputs: PrunerInputs,
    text: Float[Array, "B L D"],
    text_valid: Bool[Array, "B L"],
    relevance: bool,
) -> PrunerInputs:
    """The inputs with what the prompt tells before the language model.

    Args:
        inputs: Of the pictures.
        text: Embeddings of the prompt.
        text_valid: Which are real.
        relevance: Whether to fill that in.
    """
    given = {"text": text, "text_valid": text_valid, "embeddings": inputs.tokens}
    if relevance:
        given["relevance"] = text_relevance(inputs.tokens, text, text_valid)
    return inputs.replace(**given)


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
