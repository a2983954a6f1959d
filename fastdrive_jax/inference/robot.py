"""The robot policy: pictures and an instruction in, pruned tokens, actions out; any action head.

What differs between the models is in `action_decoding`.
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from fastdrive_jax.inference.action_decoding import Moment, action_decoding
from fastdrive_jax.inference.pictures import layout_inputs, token_pixels
from fastdrive_jax.inference.pruned import (
    Read,
    next_memory,
    observed_layers,
    read_pruned,
    reset_state,
    start_memory,
)
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.pi0.model import Pi0
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
        name, config = action_decoding(model).encoder
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
    decoding = action_decoding(policy.model)
    live = decoding.prompt(params["vla"], inputs.tokens, moment)
    return read_pruned(
        decoding.decoder,
        params["vla"]["language_model"],
        live,
        live.length,
        _room(policy),
        policy.pruner,
        params["pruner"],
        policy.keep_ratio,
        inputs,
        key,
        acting=decoding.acting,
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
    decoding = action_decoding(policy.model)
    observe = observed_layers(policy.pruner, decoding.decoder.config.num_layers)
    total = inputs.tokens.shape[1]
    if decoding.noise and moment.noise is None:
        moment = moment.replace(noise=jax.random.normal(key, (len(moment.ids), *decoding.noise)))
    actions, action = decoding.actions(params["vla"], read.prefilled, moment, observe, total)
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
    decoding = action_decoding(model)
    decoder = decoding.decoder.config
    tokens = jnp.zeros((batch, config.visual_tokens, decoder.hidden_size))
    inputs = layout_inputs(tokens, config.token_grid)
    if "pixels" in policy.pruner.needs:
        values = 3 * _token_edge(model) ** 2
        inputs = inputs.replace(pixels=jnp.zeros((batch, config.visual_tokens, values)))
    slots = config.visual_tokens + prompt_tokens + decoding.slots + _room(policy)
    return start_memory(policy.pruner, policy.keep_ratio, decoder, inputs, slots, dtype)


def _room(policy: RobotVLA) -> int:
    """Cache slots behind the prompt; what is answered at once needs caches to be remembered."""
    return max(action_decoding(policy.model).room, int(policy.pruner.reuse))


def _token_edge(model) -> int:
    return model.config.image_size // model.config.token_grid[0]
