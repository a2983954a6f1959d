"""Action decoding: from a moment to the sequence that a decoder reads, and from that to actions.

OpenVLA decodes an action token by token, OpenVLA-OFT reads a chunk of actions off one pass without
a causal mask, and pi0's expert turns noise into a chunk while it looks at the prefix's caches. In
all three a method prunes the visual tokens of one decoder, and what gave the actions tells a
temporal method where they looked: decode queries, action slots, or the expert's queries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from fastdrive_jax.inference.pi0 import sample_actions
from fastdrive_jax.inference.pruned import decode_tokens
from fastdrive_jax.inference.segments import Prefilled
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.live import Live, live_sequence
from fastdrive_jax.models.openvla.actions import decode_actions
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.pi0.model import Pi0, action_expert
from fastdrive_jax.models.vit_config import ViTConfig


class Moment(flax.struct.PyTreeNode):
    """What a robot sees, is told and feels.

    Attributes:
        images: uint8 [B, V, H, W, 3].
        ids: Prompts, padded on the right [B, L].
        lengths: Real ids of each [B].
        proprio: Its normalised state [B, P]; None for a model without.
        noise: Where pi0's flow begins [B, H, A]; None draws it from the key.
    """

    images: UInt8[Array, "B V H W 3"]
    ids: Int[Array, "B L"]
    lengths: Int[Array, " B"]
    proprio: Float[Array, "B P"] | None = None
    noise: Float[Array, "B H A"] | None = None


@dataclass(frozen=True)
class ActionDecoding:
    """What a model's kind of actions asks of its decoder; all static.

    Attributes:
        decoder: The language model, whose parameters are under "language_model".
        encoder: The vision encoder that methods look into: its name, and its sizes.
        prompt: `(params, tokens, moment)` to what the decoder reads.
        actions: `(params, prefilled, moment, observe, total)` to a chunk [B, T, A] and what each
            of the `total` visual tokens got from it in the layers of `observe` [B, N] (None
            without any).
        room: Cache slots behind the prompt, for what is decoded.
        slots: Tokens of the sequence that are neither visual nor of the prompt.
        acting: Tokens that give actions in the prefill, from the end.
        noise: H and A of the normal noise that actions begin as; None for those that need none.
    """

    decoder: Decoder
    encoder: tuple[str, ViTConfig]
    prompt: Callable[[dict, Array, Moment], Live]
    actions: Callable[[dict, Prefilled, Moment, tuple[int, ...], int], tuple[Array, Array | None]]
    room: int = 0
    slots: int = 0
    acting: tuple[int, ...] = (1,)
    noise: tuple[int, int] | None = None


def action_decoding(model: OpenVLA | Pi0) -> ActionDecoding:
    """That of a model, by its kind and head."""
    if isinstance(model, Pi0):
        return _flow(model)
    return _slots(model) if model.config.parallel else _tokens(model)


def _tokens(model: OpenVLA) -> ActionDecoding:
    """Token by token (OpenVLA)."""
    config = model.config
    decoder = Decoder(config.text)

    def actions(params, prefilled, moment, observe, total):
        given = decoder, params["language_model"], prefilled, config.action_tokens
        decoded = decode_tokens(*given, _most_likely, observe)
        ids = decoded.ids.reshape(len(moment.ids), config.chunk, -1)
        return decode_actions(ids, config), decoded.action

    return ActionDecoding(
        decoder=decoder,
        encoder=("encoders_0", config.encoders[0]),
        prompt=_openvla_prompt(model),
        actions=actions,
        room=config.action_tokens,
        slots=int(config.proprio_dim > 0),
    )


def _slots(model: OpenVLA) -> ActionDecoding:
    """A chunk from the slots of one pass, each read off the place before its own (OpenVLA-OFT)."""
    config = model.config
    decoder = Decoder(config.text, causal=False)
    acting = tuple(range(config.action_tokens + 2, 2, -1))

    def actions(params, prefilled, moment, observe, total):
        live = prefilled.live
        places = live.length[:, None] - jnp.asarray(acting)
        hidden = jnp.take_along_axis(live.hidden, places[..., None], axis=1)
        normed = decoder.apply(
            {"params": params["language_model"]}, hidden, method=lambda model, x: model.norm(x)
        )
        return model.apply({"params": params}, normed, method="act"), prefilled.action

    return ActionDecoding(
        decoder=decoder,
        encoder=("encoders_0", config.encoders[0]),
        prompt=_openvla_prompt(model),
        actions=actions,
        slots=(config.proprio_dim > 0) + config.action_tokens + 1,
        acting=acting,
    )


def _flow(model: Pi0) -> ActionDecoding:
    """A chunk from noise, by flow matching (pi0)."""
    config = model.config
    expert = action_expert(config, model.dtype)

    def prompt(params, tokens, moment):
        given = tokens, moment.ids, moment.lengths
        return model.apply({"params": params}, *given, method="prompt")

    def actions(params, prefilled, moment, observe, total):
        state = jnp.pad(moment.proprio, ((0, 0), (0, config.action_dim - moment.proprio.shape[1])))
        given = prefilled, state, moment.noise, config.flow_steps, observe, total
        found = sample_actions(expert, params["expert"], *given)
        return found.actions, found.attention

    return ActionDecoding(
        decoder=Decoder(config.prefix, causal=False),
        encoder=("vision_tower", config.vision),
        prompt=prompt,
        actions=actions,
        room=expert.room,
        noise=(config.horizon, config.action_dim),
    )


def _openvla_prompt(model: OpenVLA) -> Callable[[dict, Array, Moment], Live]:
    def prompt(params, tokens, moment):
        proprio = moment.proprio if model.config.proprio_dim else None
        given = tokens, moment.ids, moment.lengths
        sequence = model.apply({"params": params}, *given, proprio=proprio, method="sequence")
        total = tokens.shape[1]
        return live_sequence(
            sequence.embeddings,
            sequence.position_ids,
            sequence.is_visual,
            sequence.lengths,
            total,
            sequence.embeddings.shape[1] - total,
            prompt=sequence.answer + 1,
            state=int(proprio is not None),
        )

    return prompt


def _most_likely(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
