"""The robot policy: pictures and an instruction in, pruned tokens, actions out; any action head.

OpenVLA decodes an action token by token, OpenVLA-OFT reads a chunk of actions off one pass without
a causal mask, and pi0's expert turns noise into a chunk while it looks at the prefix's caches. In
all three a method prunes the visual tokens of one decoder, and what gave the actions tells a
temporal method where they looked: decode queries, action slots, or the expert's queries.
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from fastdrive_jax.inference.pi0 import sample_actions
from fastdrive_jax.inference.pictures import layout_inputs, token_pixels
from fastdrive_jax.inference.pruned import (
    Read,
    decode_tokens,
    next_memory,
    observed_layers,
    read_pruned,
    reset_state,
    start_memory,
)
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.live import Live, live_sequence
from fastdrive_jax.models.openvla.actions import decode_actions
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.pi0.model import Pi0, action_expert
from fastdrive_jax.models.vit_evidence import vit_evidence
from fastdrive_jax.pruning.interface import VISION, Pruner, PrunerInputs


@dataclass(frozen=True)
class RobotVLA:
    """What is compiled once: the model, the method and the number of kept tokens.

    Attributes:
        model: The VLA, with any of the three action heads.
        pruner: Method of choosing tokens; `budgets.per_camera` gives each view a budget of its own.
        keep_ratio: In (0, 1], of all views' tokens together.
    """

    model: OpenVLA | Pi0
    pruner: Pruner
    keep_ratio: float


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


class Acted(flax.struct.PyTreeNode):
    """What the policy answers.

    Attributes:
        actions: A chunk, normalised [B, T, A].
        keep_indices: Tokens that the last layer saw or, of a method that reuses, computed, in
            raster order, view after view [B, K].
        state: What a temporal method takes to the next moment; None of others.
    """

    actions: Float[Array, "B T A"]
    keep_indices: Int[Array, "B K"]
    state: Any = None


def act(
    policy: RobotVLA,
    params: dict,
    moment: Moment,
    key: jax.Array,
    state: Any = None,
    first: Bool[Array, " B"] | None = None,
) -> Acted:
    """Acts; `jax.jit(act, static_argnums=0)` compiles once.

    Args:
        policy: Static.
        params: {"vla": ..., "pruner": ...}.
        moment: What the robots see now.
        key: For methods that draw, of the batch or of each sample [B], and pi0's noise, of the
            batch.
        state: For temporal methods: of `start_state`, or of the last moment.
        first: Which samples begin an episode with this moment, whatever the state says; None: none.
    """
    inputs = see(policy, params, moment.images)
    if first is not None and state is not None:
        start = start_state(policy, *moment.ids.shape, inputs.tokens.dtype)
        state = reset_state(state, start, first)
    inputs = inputs.replace(state=state)
    read = read_moment(policy, params, inputs, moment, key)
    return answer(policy, params, inputs, moment, read, key)


def see(policy: RobotVLA, params: dict, images: UInt8[Array, "B V H W 3"]) -> PrunerInputs:
    """First stage of `act`: visual tokens, and what else the method needs of the pictures."""
    model, needs = policy.model, policy.pruner.needs
    wanted = ["intermediates"] if needs & VISION else False
    tokens = model.apply({"params": params["vla"]}, images, method="encode", mutable=wanted)
    if wanted:
        tokens, sown = tokens
    inputs = layout_inputs(tokens, model.config.token_grid)
    batch, views = images.shape[:2]
    if wanted:
        name, config = _first_encoder(model)
        found = vit_evidence(sown["intermediates"][name], config)
        inputs = inputs.replace(
            vision_received=found.received.reshape(batch, -1) / views,
            vision_keys=found.keys.reshape(batch, -1, found.keys.shape[-1]),
        )
    if "pixels" in needs:
        inputs = inputs.replace(pixels=token_pixels(images, _token_edge(model)))
    return inputs


def read_moment(
    policy: RobotVLA, params: dict, inputs: PrunerInputs, moment: Moment, key: jax.Array
) -> Read:
    """Second stage of `act`: the prefill, with what the method does before it or within."""
    live = _live(policy.model, params, inputs.tokens, moment)
    return read_pruned(
        decoder_of(policy.model),
        params["vla"]["language_model"],
        live,
        live.length,
        _room(policy),
        policy.pruner,
        params["pruner"],
        policy.keep_ratio,
        inputs,
        key,
        acting=_acting(policy.model),
    )


def answer(
    policy: RobotVLA,
    params: dict,
    inputs: PrunerInputs,
    moment: Moment,
    read: Read,
    key: jax.Array,
) -> Acted:
    """Last stage of `act`: the actions, and what a temporal method remembers."""
    model, config, weights = policy.model, policy.model.config, params["vla"]
    batch, total = inputs.tokens.shape[:2]
    decoder = decoder_of(model)
    observe = observed_layers(policy.pruner, decoder.config.num_layers)
    if isinstance(model, Pi0):
        noise = moment.noise
        if noise is None:
            noise = jax.random.normal(key, (batch, config.horizon, config.action_dim))
        state = jnp.pad(moment.proprio, ((0, 0), (0, config.action_dim - moment.proprio.shape[1])))
        given = read.prefilled, state, noise, config.flow_steps, observe, total
        found = sample_actions(action_expert(config, model.dtype), weights["expert"], *given)
        actions, action = found.actions, found.attention
    elif config.parallel:
        live = read.prefilled.live
        places = live.length[:, None] - jnp.asarray(_acting(model))
        hidden = jnp.take_along_axis(live.hidden, places[..., None], axis=1)
        normed = decoder.apply(
            {"params": weights["language_model"]}, hidden, method=lambda model, x: model.norm(x)
        )
        actions = model.apply({"params": weights}, normed, method="act")
        action = read.prefilled.action
    else:
        given = decoder, weights["language_model"], read.prefilled, config.action_tokens
        decoded = decode_tokens(*given, _most_likely, observe)
        actions = decode_actions(decoded.ids.reshape(batch, config.chunk, -1), config)
        action = decoded.action
    state = next_memory(policy.pruner, inputs, read.kept, action, read.reused)
    return Acted(actions, read.kept, state)


def start_state(
    policy: RobotVLA, batch: int, prompt_tokens: int, dtype: jnp.dtype = jnp.float32
) -> Any:
    """What a temporal method knows before the first moment of an episode; None for others.

    Args:
        policy: The model with a method.
        batch: B.
        prompt_tokens: L, of the padded prompts.
        dtype: Of the model's keys and values, if the method reuses them.
    """
    model, config = policy.model, policy.model.config
    decoder = decoder_of(model)
    tokens = jnp.zeros((batch, config.visual_tokens, decoder.config.hidden_size))
    inputs = layout_inputs(tokens, config.token_grid)
    if "pixels" in policy.pruner.needs:
        values = 3 * _token_edge(model) ** 2
        inputs = inputs.replace(pixels=jnp.zeros((batch, config.visual_tokens, values)))
    slots = config.visual_tokens + prompt_tokens + _room(policy)
    if isinstance(model, OpenVLA):
        slots += (config.proprio_dim > 0) + (config.action_tokens + 1 if config.parallel else 0)
    return start_memory(policy.pruner, policy.keep_ratio, decoder.config, inputs, slots, dtype)


def decoder_of(model: OpenVLA | Pi0) -> Decoder:
    """The language model, whose parameters are under "language_model"."""
    if isinstance(model, Pi0):
        return Decoder(model.config.prefix, causal=False)
    return Decoder(model.config.text, causal=not model.config.parallel)


def _live(model, params, tokens, moment) -> Live:
    variables = {"params": params["vla"]}
    if isinstance(model, Pi0):
        return model.apply(variables, tokens, moment.ids, moment.lengths, method="prompt")
    proprio = moment.proprio if model.config.proprio_dim else None
    given = tokens, moment.ids, moment.lengths
    sequence = model.apply(variables, *given, proprio=proprio, method="sequence")
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


def _room(policy: RobotVLA) -> int:
    """Slots behind the prompt; what is answered at once needs caches only to be remembered."""
    config = policy.model.config
    if isinstance(policy.model, Pi0):
        return action_expert(config).room
    return int(policy.pruner.reuse) if config.parallel else config.action_tokens


def _acting(model: OpenVLA | Pi0) -> tuple[int, ...]:
    """The tokens that give actions, from the end: with slots, each the one before its own."""
    if isinstance(model, OpenVLA) and model.config.parallel:
        return tuple(range(model.config.action_tokens + 2, 2, -1))
    return (1,)


def _first_encoder(model):
    """Where the encoder that methods look into has its intermediates, and its sizes."""
    if isinstance(model, Pi0):
        return "vision_tower", model.config.vision
    return "encoders_0", model.config.encoders[0]


def _token_edge(model) -> int:
    return model.config.image_size // model.config.token_grid[0]


def _most_likely(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
