"""The language model in segments: a token count, and a KV cache length, for each run of layers.

A cut on entering a layer gathers what is left, visual tokens and text in their order, with their
position ids; layers behind it never see the rest. What a method scores by is computed at its cuts
alone, as rows beside the fused attention. All shapes are static.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastdrive_jax.inference.live import cut_inputs, first_inputs, keep_live
from fastdrive_jax.models.attention_rows import attention_received, attention_rows
from fastdrive_jax.models.decoder import Decoder, LayerCache, rows_see
from fastdrive_jax.models.live import Live, Segment
from fastdrive_jax.pruning.draws import fold
from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, cut_plan, keep_tokens


class Prefilled(flax.struct.PyTreeNode):
    """A prompt that was read.

    Attributes:
        logits: Behind each sample's last token [B, V].
        segments: Of the layers, in their order.
        action: Attention of the tokens that give actions to each visual token [B, N]; None if no
            layer was asked for.
        live: The sequence behind the last layer, before the final norm.
    """

    logits: Float[Array, "B V"]
    segments: tuple[Segment, ...]
    action: Float[Array, "B N"] | None
    live: Live


def prefill(
    decoder: Decoder,
    params: dict,
    live: Live,
    next_position: Int[Array, " B"],
    room: int,
    pruner: Pruner | None = None,
    pruner_params: Any = None,
    keep_ratio: float = 1.0,
    inputs: PrunerInputs | None = None,
    key: jax.Array | None = None,
    observe: Sequence[int] = (),
    acting: Sequence[int] = (1,),
    total: int | None = None,
) -> Prefilled:
    """Reads a prompt, cutting visual tokens where the method says.

    Args:
        decoder: The language model.
        params: Its parameters.
        live: The embedded prompt.
        next_position: Position id of the first answer token, before any renumbering.
        room: Tokens that will be decoded.
        pruner: A method; None, as a ratio of 1 for one within the model, prunes nothing.
        pruner_params: Its parameters.
        keep_ratio: In (0, 1].
        inputs: What the method needs and this function does not fill from the sequence; its fields
            of N tokens are those of `live.visual`.
        key: For methods that draw.
        observe: Layers whose attention goes into `Prefilled.action`.
        acting: The tokens whose attention that is, counted from the end of each sample. The last
            one gives the first answer token; a model that decodes at once has more.
        total: N of `Prefilled.action`, if tokens left already; None: those of `live`.
    """
    config = decoder.config
    count = live.visual.shape[1]
    total = count if total is None else total
    plan = () if pruner is None else cut_plan(pruner, count, keep_ratio, config.num_layers)
    start = first_inputs(live, inputs, frozenset() if pruner is None else pruner.needs)
    segments: list[Segment] = []
    rows: list[Float[Array, "B N"]] = []
    at = 0
    for number, (layer, k) in enumerate((*plan, (config.num_layers, 0))):
        if layer > at:
            before, caches, sown = live, [], {}
            # One layer at a time: the method may ask for the last one's queries and keys.
            for step in range(at, layer):
                before, found, cache = _run_layer(decoder, params, before, step, room)
                sown[step] = found
                caches.append(cache)
            segments.append(_segment(live, tuple(caches), (at, layer), next_position))
            observed = [step for step in observe if at <= step < layer]
            rows += [_acting_row(decoder, live, *sown[step], acting) for step in observed]
            evidence_of = live, sown[layer - 1]
            live, at = before, layer
        if k:
            if pruner.cuts is not None and pruner.cuts.own_rows:
                evidence_of = live, _run_layer(decoder, params, live, layer, room)[1]
            given = cut_inputs(start, live, number)
            if pruner.cuts is not None:
                given = given.replace(**_evidence(decoder, pruner, *evidence_of))
            own_key = fold(key, number)
            kept = keep_tokens(pruner, pruner_params, given, k, own_key)
            live = keep_live(live, kept, pruner.renumber)
            if pruner.renumber:
                next_position = live.length
    logits = last_logits(decoder, params, live)
    action = None
    if observe:
        action = sum(
            spread(row, segment, total) for row, segment in _owners(rows, segments, observe)
        )
        action = action / len(observe)
    return Prefilled(logits, tuple(segments), action, live)


def decode_token(
    decoder: Decoder,
    params: dict,
    ids: Int[Array, " B"],
    segments: tuple[Segment, ...],
    observe: Sequence[int] = (),
    total: int = 0,
) -> tuple[Float[Array, "B V"], tuple[Segment, ...], Float[Array, "B N"] | None]:
    """Logits after one more token, the segments with it, and its attention to visual tokens.

    Args:
        decoder: The language model.
        params: Its parameters.
        ids: The token of each sample.
        segments: Of `prefill`, or of the last call.
        observe: Layers whose row is wanted.
        total: N, visual tokens before all cuts; needed with `observe`.
    """
    x = decoder.apply({"params": params}, ids[:, None], method="embed")
    after, action = [], []
    for segment in segments:
        where = jnp.broadcast_to(segment.next_position[None, :, None], (3, len(ids), 1))
        (x, caches), sown = decoder.apply(
            {"params": params},
            x,
            where,
            segment.layers,
            segment.caches,
            method="span",
            mutable=["intermediates"],
        )
        action += observed_rows(sown["intermediates"], segment, caches, observe, total)
        after.append(segment.replace(caches=caches, next_position=segment.next_position + 1))
    logits = decoder.apply({"params": params}, x, method="finish")[:, 0]
    return logits, tuple(after), sum(action) / len(observe) if observe else None


def observed_rows(
    sown: dict,
    segment: Segment,
    caches: tuple[LayerCache, ...],
    observe: Sequence[int],
    total: int,
) -> list[Float[Array, "B N"]]:
    """Attention of new tokens to visual ones in each observed layer of a segment.

    Args:
        sown: What the decoder's layers sowed of the new tokens.
        segment: The layers that ran.
        caches: Theirs, with the new tokens, all of which see all that is in them.
        observe: Layers whose rows are wanted.
        total: N, visual tokens before all cuts.

    Returns:
        Means over heads and new tokens.
    """
    rows = []
    for step in observe:
        if segment.layers[0] <= step < segment.layers[1]:
            query = sown[f"layers_{step}"]["self_attn"]["query"][0]
            cache = caches[step - segment.layers[0]]
            seen = jnp.broadcast_to(cache.length[:, None], query.shape[:2])
            row = attention_rows(query, cache.key, seen).mean(axis=(1, 2))
            rows.append(spread(_take(row, segment.visual), segment, total))
    return rows


def spread(values: Float[Array, "B K"], segment: Segment, total: int) -> Float[Array, "B N"]:
    """Values of a segment's visual tokens at their places among all N; 0 for those that left."""
    real = jnp.arange(values.shape[1]) < segment.count[:, None]
    rows = jnp.arange(len(values))[:, None]
    empty = jnp.zeros((len(values), total), values.dtype)
    return empty.at[rows, segment.ids].add(jnp.where(real, values, 0))


def last_logits(decoder: Decoder, params: dict, live: Live) -> Float[Array, "B V"]:
    """Logits behind each sample's last token, of hidden states that left the last layer."""
    last = jnp.take_along_axis(live.hidden, (live.length - 1)[:, None, None], axis=1)
    return decoder.apply({"params": params}, last, method="finish")[:, 0]


def _run_layer(decoder, params, live, layer, room):
    """The sequence behind a layer, that layer's queries and keys, and its cache."""
    (hidden, (cache,)), sown = decoder.apply(
        {"params": params},
        live.hidden,
        live.position_ids,
        (layer, layer + 1),
        room=room,
        lengths=live.length,
        method="span",
        mutable=["intermediates"],
    )
    found = sown["intermediates"][f"layers_{layer}"]["self_attn"]
    cache = cache.replace(length=live.length.astype(jnp.int32)) if room else None
    return live.replace(hidden=hidden), (found["query"][0], found["key"][0]), cache


def _segment(live, caches, layers, next_position):
    return Segment(caches, live.visual, live.ids, live.count, next_position, layers)


def _owners(rows, segments, observe):
    """Each row with the segment of its layer."""
    of = [s for s in segments for step in observe if s.layers[0] <= step < s.layers[1]]
    return zip(rows, of, strict=True)


def _take(values, places):
    """Values [..., B, n] at places [B, K]; what lies past the end is clipped, and is padding."""
    return jnp.take_along_axis(values, jnp.minimum(places, values.shape[-1] - 1), axis=-1)


def _acting_row(decoder, live, query, key, acting):
    """Attention of some tokens, from the end, to the visual ones, mean over heads [B, N]."""
    places = live.length[:, None] - jnp.asarray(acting)
    return _head_rows(decoder, live, query, key, places).mean(axis=(1, 2))


def _head_rows(decoder, live, query, key, places):
    """Attention of the tokens at some places to the visual ones [B, Q, R, N]."""
    places = jnp.minimum(places, query.shape[1] - 1)
    chosen = jnp.take_along_axis(query, places[..., None, None], axis=1)
    rows = attention_rows(chosen, key, rows_see(decoder.causal, places, live.length))
    return _take(rows, live.visual[:, None, None])


def _evidence(decoder, pruner, live, found):
    """What the method reads of a layer's attention, of the tokens that the layer saw."""
    query, key = found
    out = {}
    if "last_row" in pruner.needs:
        out["last_row"] = _head_rows(decoder, live, query, key, live.prompt[:, None] - 1)[:, :, 0]
    if "text_rows" in pruner.needs:
        out["text_rows"] = _head_rows(decoder, live, query, key, live.text)
    if "received" in pruner.needs:
        seeing = live.length, decoder.causal
        received = attention_received(query, key, *seeing, rows=live.prompt)
        out["received"] = _take(received, live.visual)
    return out
