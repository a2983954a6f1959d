"""Prefill that reuses the last frame's keys and values of visual tokens that it does not compute.

From a method's first cut on, layers compute what the method chose, and all text. What they compute
replaces the keys and values at its places in the last frame's caches; what left stays there as it
was. A query at place p sees the keys of places 0 to p, whichever frame they are of.

A sample without a last frame gets one first: all its tokens go through all layers, and what it then
reuses is of this very frame, so that its answer is the unpruned model's. Only a batch with such a
sample runs that pass (`lax.cond`), and no other sample notices. It costs a drive's first frame up
to twice an unpruned one, but one program serves any mix of samples.

Visual tokens must stand at the same places in both frames; text behind them may differ. What must
be remembered is 2 G d numbers a slot and layer behind the first cut: with Qwen2.5-VL-3B, 3,249
visual tokens, 18 other slots and 34 layers of bfloat16 that is 114 MB a sample.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastdrive_jax.inference.live import (
    cut_inputs,
    first_inputs,
    instruction,
    keep_live,
)
from fastdrive_jax.inference.segments import Prefilled, last_logits
from fastdrive_jax.models.attention_rows import attention_rows
from fastdrive_jax.models.decoder import Decoder, LayerCache, rows_see
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.live import Live, Segment
from fastdrive_jax.pruning.draws import fold
from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, cut_plan, keep_tokens

Caches = tuple[LayerCache, ...]


class Memory(flax.struct.PyTreeNode):
    """What one frame leaves to the next.

    Attributes:
        frame: The method's own state.
        caches: Of the layers behind the first cut; a sample whose lengths are 0 has no last frame.
    """

    frame: Any
    caches: Caches


class Reused(flax.struct.PyTreeNode):
    """A prompt that was read.

    Attributes:
        read: All layers hold all tokens, so they are one segment; its `action` is None.
        computed: Visual tokens that the last layer computed [B, K].
        caches: See `Memory`.
        text: See `Seen`; None if no layer was asked for.
    """

    read: Prefilled
    computed: Int[Array, "B K"]
    caches: Caches
    text: Float[Array, "B N"] | None


def no_caches(
    config: DecoderConfig,
    plan: Sequence[tuple[int, int]],
    batch: int,
    slots: int,
    dtype: jnp.dtype,
) -> Caches:
    """Caches of samples without a last frame.

    Args:
        config: Of the language model.
        plan: Of `cut_plan`.
        batch: B.
        slots: Tokens of a prompt and those that will be decoded.
        dtype: Of keys and values.
    """
    first = plan[0][0] if plan else config.num_layers
    shape = batch, slots, config.num_kv_heads, config.head_dim
    return tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))
        for _ in range(first, config.num_layers)
    )


def prefill(
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
    observe: Sequence[int] = (),
) -> Reused:
    """Reads a prompt, computing visual tokens that the method chooses.

    Args:
        decoder: The language model.
        params: Its parameters.
        live: The embedded prompt.
        next_position: Position id of the first answer token.
        room: Tokens that will be decoded.
        pruner: A method that reuses.
        pruner_params: Its parameters.
        keep_ratio: In (0, 1]; at 1 this is the unpruned model.
        inputs: What the method needs of the pictures; its state is a `Memory`.
        key: For methods that draw.
        observe: Layers whose attention goes into `Reused.text`.

    Raises:
        ValueError: There is no `Memory`, or the method needs what is not given.
    """
    if inputs.state is None:
        raise ValueError(f"pruner {pruner.name!r} needs state, which is not given")
    num_layers = decoder.config.num_layers
    plan = cut_plan(pruner, live.visual.shape[1], keep_ratio, num_layers)
    start = first_inputs(live, inputs, pruner.needs).replace(state=inputs.state.frame)
    first = plan[0][0] if plan else num_layers
    whole, places, held = live, None, ()
    filled: list[LayerCache] = []
    text: list[Float[Array, "B N"]] = []
    at = 0
    for number, (layer, k) in enumerate((*plan, (num_layers, 0))):
        (hidden, caches), sown = decoder.apply(
            {"params": params},
            live.hidden,
            live.position_ids,
            (at, layer),
            held[at - first : layer - first] or None,
            room,
            places,
            whole.length,
            method="span",
            mutable=["intermediates"],
        )
        filled += caches
        for step in range(at, layer):
            if step in observe:
                query = sown["intermediates"][f"layers_{step}"]["self_attn"]["query"][0]
                text.append(_text_attention(decoder, whole, live, query, filled[step].key))
        live, at = live.replace(hidden=hidden), layer
        if k:
            if layer == first:
                held = _last_frame(decoder, params, live, layer, room, inputs.state.caches)
            own_key = fold(key, number)
            given = cut_inputs(start, live, number)
            live = keep_live(live, keep_tokens(pruner, pruner_params, given, k, own_key))
            chosen = jnp.take_along_axis(whole.visual, live.ids, axis=1)
            places = jnp.sort(jnp.concatenate([chosen, whole.text], axis=1), axis=1)
    length = whole.length.astype(jnp.int32)
    layers = tuple(cache.replace(length=length) for cache in filled)
    segment = Segment(layers, whole.visual, whole.ids, whole.count, next_position, (0, num_layers))
    return Reused(
        Prefilled(last_logits(decoder, params, live), (segment,), None, live),
        computed=live.ids,
        caches=layers[first:],
        text=sum(text) / len(text) if text else None,
    )


def _last_frame(decoder, params, live, layer, room, caches):
    """The remembered caches; of this frame, of samples for which there are none."""
    unknown = caches[0].length == 0

    def compute(caches):
        _, own = decoder.apply(
            {"params": params},
            live.hidden,
            live.position_ids,
            (layer, decoder.config.num_layers),
            room=room,
            lengths=live.length,
            method="span",
        )

        def pick(new, old):
            chosen = unknown.reshape(-1, *[1] * (old.ndim - 1))
            return jnp.where(chosen, new.astype(old.dtype), old)

        return jax.tree.map(pick, own, caches)

    return jax.lax.cond(unknown.any(), compute, lambda caches: caches, caches)


def _text_attention(decoder, whole, live, query, key):
    """Attention from the instruction to all visual tokens, mean over heads and rows [B, N]."""
    at = jnp.minimum(live.text, query.shape[1] - 1)
    query = jnp.take_along_axis(query, at[..., None, None], axis=1)
    seen = rows_see(decoder.causal, whole.text, whole.length)
    rows = attention_rows(query, key, seen).mean(axis=1)
    real = instruction(whole)[..., None]
    mean = jnp.sum(jnp.where(real, rows, 0), axis=1) / real.sum(axis=1)
    return jnp.take_along_axis(mean, whole.visual, axis=1, mode="clip")
