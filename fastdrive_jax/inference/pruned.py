"""A prompt read with a pruner, wherever that stands, and what a frame leaves to the next."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.inference import reuse, segments
from fastdrive_jax.inference.live import first_inputs, keep_live, with_prompt
from fastdrive_jax.models.attention import plain_operations
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.live import Live
from fastdrive_jax.pruning.budgets import keep_before
from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, Seen, cut_plan, stands_before


class Decoded(flax.struct.PyTreeNode):
    """An answer of a known length.

    Attributes:
        ids: [B, M].
        action: Attention that each visual token got from the queries that gave them, mean over
            queries, heads and the observed layers [B, N]; None if none was observed.
    """

    ids: Int[Array, "B M"]
    action: Float[Array, "B N"] | None


class Read(flax.struct.PyTreeNode):
    """A prompt that was read.

    Attributes:
        prefilled: Logits, caches, hidden states and, of a temporal method, attention.
        kept: Visual tokens that the last layer saw or, of a method that reuses, computed [B, K].
        reused: Caches and attention for the next frame, of a method that reuses.
    """

    prefilled: segments.Prefilled
    kept: Int[Array, "B K"]
    reused: reuse.Reused | None = None


def observed_layers(pruner: Pruner, num_layers: int) -> tuple[int, ...]:
    """Layers whose action attention the method wants."""
    if pruner.temporal is None or pruner.reuse:
        return ()
    return pruner.temporal.layers(num_layers)


def read_pruned(
    decoder: Decoder,
    params: dict,
    live: Live,
    next_position: Int[Array, " B"],
    room: int,
    pruner: Pruner,
    pruner_params: Any,
    keep_ratio: float,
    inputs: PrunerInputs,
    key: jax.Array | None = None,
    acting: Sequence[int] = (1,),
) -> Read:
    """Reads an embedded prompt with all its visual tokens, of which the method keeps some.

    Args:
        decoder: The language model.
        params: Its parameters.
        live: The prompt.
        next_position: Position id of the first answer token.
        room: Tokens that will be decoded.
        pruner: The method.
        pruner_params: Its parameters.
        keep_ratio: In (0, 1].
        inputs: What the method needs of the pictures.
        key: For methods that draw.
        acting: See `segments.prefill`.
    """
    total, layers = live.visual.shape[1], decoder.config.num_layers
    given = decoder, params, live, next_position, room
    within = pruner, pruner_params, keep_ratio, inputs, key
    observe = observed_layers(pruner, layers)
    if pruner.reuse:
        reused = reuse.prefill(*given, *within, observe=pruner.temporal.text_layers(layers))
        return Read(reused.read, reused.computed, reused)
    if stands_before(pruner):
        first = first_inputs(live, None)
        relevance = "relevance" in pruner.needs and inputs.relevance is None
        inputs = with_prompt(inputs, first.text, first.text_valid, relevance)
        live = keep_live(live, keep_before(pruner, pruner_params, inputs, keep_ratio, key))
        given, within = (decoder, params, live, next_position, room), ()
    read = segments.prefill(*given, *within, observe=observe, acting=acting, total=total)
    return Read(read, read.segments[-1].ids)


def decode_tokens(
    decoder: Decoder,
    params: dict,
    prefilled: segments.Prefilled,
    count: int,
    choose: Callable[[Float[Array, "B V"]], Int[Array, " B"]],
    observe: Sequence[int] = (),
) -> Decoded:
    """An answer of `count` tokens, one after the other, in one scan.

    Args:
        decoder: The language model.
        params: Its parameters.
        prefilled: With room for the answer.
        count: M, static.
        choose: Logits to the next token.
        observe: The layers that were observed in prefill.
    """
    total = prefilled.action.shape[1] if observe else 0

    def step(carry, _):
        ids, parts = carry
        logits, parts, row = segments.decode_token(decoder, params, ids, parts, observe, total)
        following = choose(logits)
        return (following, parts), (following, row)

    ids = choose(prefilled.logits)
    start = ids, prefilled.segments
    if plain_operations() and len(ids) > 1:
        # jax2onnx 0.17 declares the shapes within a loop over several samples wrongly.
        _, (rest, rows) = _unrolled(step, start, count - 1)
    else:
        _, (rest, rows) = jax.lax.scan(step, start, length=count - 1)
    action = (prefilled.action + rows.sum(axis=0)) / count if observe else None
    return Decoded(jnp.concatenate([ids[:, None], rest.T], axis=1), action)


def _unrolled(step: Callable, carry: Any, length: int) -> tuple[Any, Any]:
    """What `jax.lax.scan` gives, without a loop in the program."""
    outs = []
    for _ in range(length):
        carry, out = step(carry, None)
        outs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def start_memory(
    pruner: Pruner,
    keep_ratio: float,
    text: DecoderConfig,
    inputs: PrunerInputs,
    slots: int,
    dtype: jnp.dtype = jnp.float32,
) -> Any:
    """What a temporal method knows before the first frame of a drive; None for others.

    Args:
        pruner: The method.
        keep_ratio: In (0, 1].
        text: Sizes of the language model.
        inputs: Of any frame.
        slots: Tokens of a prompt and those that will be decoded.
        dtype: Of the model's keys and values, if the method reuses them.
    """
    if pruner.temporal is None:
        return None
    state = pruner.temporal.init(inputs)
    if not pruner.reuse:
        return state
    batch, total = inputs.tokens.shape[:2]
    plan = cut_plan(pruner, total, keep_ratio, text.num_layers)
    return reuse.Memory(state, reuse.no_caches(text, plan, batch, slots, dtype))


def next_memory(
    pruner: Pruner,
    inputs: PrunerInputs,
    kept: Int[Array, "B K"],
    action: Float[Array, "B N"] | None,
    reused: reuse.Reused | None,
) -> Any:
    """What a temporal method takes to the next frame; None of others.

    Args:
        pruner: The method.
        inputs: Of this frame, with the state before it.
        kept: Of `Read`, as visual tokens before all cuts.
        action: See `Seen`.
        reused: Of `Read`.
    """
    if pruner.temporal is None:
        return None
    batch, total = inputs.tokens.shape[:2]
    seen = Seen(
        action=action,
        kept=jnp.zeros((batch, total), bool).at[jnp.arange(batch)[:, None], kept].set(True),
        pixels=inputs.pixels,
        text=None if reused is None else reused.text,
    )
    if reused is None:
        return pruner.temporal.observe(inputs.state, seen)
    return reuse.Memory(pruner.temporal.observe(inputs.state.frame, seen), reused.caches)


def reset_state(state: Any, start: Any, first: Bool[Array, " B"]) -> Any:
    """The state with that of samples whose drive begins anew taken from `start`."""

    def pick(old, new):
        return jnp.where(first.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(pick, state, start)
