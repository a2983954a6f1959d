"""Prefill and greedy decoding of a trajectory, one compiled program for one (N, K, method)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastdrive_jax.inference import segments
from fastdrive_jax.inference.pruned import Decoded, decode_tokens
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.live import Live
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA, positions


def prefill(
    model: DrivingVLA,
    params: dict,
    tokens: Float[Array, "B K D"],
    visual_ids: Int[Array, "3 B K"],
    prompt: Int[Array, "B L"],
    **method: Any,
) -> segments.Prefilled:
    """Reads pictures and prompt, with caches that have room for the whole trajectory.

    Args:
        model: The VLA.
        params: {"params": ...} of it.
        tokens: Visual tokens in raster order.
        visual_ids: Their M-RoPE ids.
        prompt: From `DrivingVocabulary.prompt`; an instruction may stand before it.
        method: What cuts further, from `pruner` on; see `segments.prefill`.
    """
    return segments.prefill(*live_prompt(model, params, tokens, visual_ids, prompt), **method)


def live_prompt(
    model: DrivingVLA,
    params: dict,
    tokens: Float[Array, "B K D"],
    visual_ids: Int[Array, "3 B K"],
    prompt: Int[Array, "B L"],
) -> tuple[Decoder, dict, Live, Int[Array, " B"], int]:
    """What `segments.prefill` and `reuse.prefill` take first: the prompt before the first layer."""
    hidden, ids = model.apply(params, tokens, visual_ids, prompt, method="sequence")
    batch, length = hidden.shape[:2]
    count = tokens.shape[1]
    text = jnp.concatenate([jnp.arange(2), jnp.arange(2 + count, length)])
    live = Live(
        hidden=hidden,
        position_ids=ids,
        visual=jnp.broadcast_to(2 + jnp.arange(count), (batch, count)),
        ids=jnp.broadcast_to(jnp.arange(count), (batch, count)),
        text=jnp.broadcast_to(text, (batch, len(text))),
        count=jnp.full(batch, count),
        length=jnp.full(batch, length),
        prompt=jnp.full(batch, length),
    )
    start = int(positions(model.config).after[0, 0]) + 1 + prompt.shape[1]
    decoder, weights = Decoder(model.config.text), params["params"]["language_model"]
    return decoder, weights, live, jnp.full(batch, start), model.config.vocabulary.plan_length


def decode(
    model: DrivingVLA,
    params: dict,
    prefilled: segments.Prefilled,
    observe: Sequence[int] = (),
) -> Decoded:
    """The most likely trajectory tokens, one after the other.

    Only displacement ids compete, so that every answer is a trajectory.

    Args:
        model: The VLA.
        params: {"params": ...} of it.
        prefilled: Of `prefill`.
        observe: The layers that were given there.
    """
    vocabulary = model.config.vocabulary
    first = vocabulary.first_displacement

    def choose(logits):
        plan = logits[:, first : first + vocabulary.displacement_bins]
        return first + jnp.argmax(plan, axis=-1).astype(jnp.int32)

    decoder, weights = Decoder(model.config.text), params["params"]["language_model"]
    return decode_tokens(decoder, weights, prefilled, vocabulary.plan_length, choose, observe)


def generate(
    model: DrivingVLA,
    params: dict,
    tokens: Float[Array, "B K D"],
    visual_ids: Int[Array, "3 B K"],
    prompt: Int[Array, "B 3"],
) -> Float[Array, "B T 2"]:
    """The planned waypoints [B, T, 2] in metres, from kept visual tokens.

    Args:
        model: The VLA.
        params: {"params": ...} of it.
        tokens: K kept visual tokens in raster order; K = 0 plans without a picture.
        visual_ids: Their M-RoPE ids.
        prompt: From `DrivingVocabulary.prompt`.
    """
    prefilled = prefill(model, params, tokens, visual_ids, prompt)
    return model.config.vocabulary.decode(decode(model, params, prefilled).ids)
