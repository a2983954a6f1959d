"""The driving policy: pictures in, pruned tokens, a trajectory out. One pure function."""

from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from fastdrive_jax.inference import reuse
from fastdrive_jax.inference.generate import decode, live_prompt, prefill
from fastdrive_jax.inference.live import with_prompt
from fastdrive_jax.inference.pictures import driving_inputs, picture_inputs, token_pixels
from fastdrive_jax.inference.pruned import (
    next_memory,
    observed_layers,
    reset_state,
    start_memory,
)
from fastdrive_jax.inference.segments import Prefilled
from fastdrive_jax.models.qwen2_5_vl.driving import (
    PROMPT_TOKENS,
    DrivingVLA,
    positions,
    visual_positions,
)
from fastdrive_jax.pruning.budgets import keep_before
from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, stands_before
from fastdrive_jax.pruning.select import gather_position_ids

PROMPT = frozenset({"text", "text_valid", "embeddings"})  # what the prompt fills in


@dataclass(frozen=True)
class DrivingPolicy:
    """What is compiled once: the model, the method and the number of kept tokens.

    Attributes:
        model: The VLA.
        pruner: Method of choosing tokens.
        keep_ratio: In (0, 1], of all cameras' tokens together.
    """

    model: DrivingVLA
    pruner: Pruner
    keep_ratio: float


class Plan(flax.struct.PyTreeNode):
    """What the policy answers.

    Attributes:
        waypoints: [B, T, 2] metres, x forward, y left, every half second.
        keep_indices: [B, K] tokens that the last layer saw or, of a method that reuses, computed,
            in raster order, camera after camera.
        state: What a temporal method takes to the next frame; None of others.
    """

    waypoints: Float[Array, "B T 2"]
    keep_indices: Int[Array, "B K"]
    state: Any = None


def frame_policy(policy: DrivingPolicy, frame: int) -> DrivingPolicy:
    """The policy of a frame of a drive, counted from 0, as temporal methods were published.

    While such a method warms up nothing is pruned, but it watches: a second program. Methods here
    prune from the first frame on, with what they know; this is for those who want it as published.
    """
    temporal = policy.pruner.temporal
    if temporal is None or frame >= temporal.warmup:
        return policy
    return replace(policy, keep_ratio=1.0)


def start_state(
    policy: DrivingPolicy,
    batch: int,
    dtype: jnp.dtype = jnp.float32,
    prompt_tokens: int = PROMPT_TOKENS,
) -> Any:
    """What a temporal method knows before the first frame of a drive; None for others.

    Args:
        policy: The model with a method.
        batch: B.
        dtype: Of the model's keys and values, if the method reuses them.
        prompt_tokens: Of the prompt, if it is another than the vocabulary's.
    """
    if policy.pruner.temporal is None:
        return None
    config = policy.model.config
    images = jax.ShapeDtypeStruct((batch, len(config.cameras), *config.image_size, 3), jnp.uint8)
    tokens = jnp.zeros((batch, config.visual_tokens, config.text.hidden_size))
    inputs = driving_inputs(config, tokens)
    if "pixels" in policy.pruner.needs:
        shape = jax.eval_shape(lambda x: token_pixels(x, config.vision.token_pixels), images)
        inputs = inputs.replace(pixels=jnp.zeros(shape.shape, shape.dtype))
    where = positions(config, prompt_tokens)
    slots = sum(part.shape[1] for part in (where.before, where.visual, where.after))
    return start_memory(policy.pruner, policy.keep_ratio, config.text, inputs, slots, dtype)


class Chosen(flax.struct.PyTreeNode):
    """What enters the language model.

    Attributes:
        inputs: Of the method, complete.
        indices: Visual tokens [B, K]; of a method within the model, all of them.
        tokens: [B, K, D].
        position_ids: M-RoPE ids [3, B, K].
    """

    inputs: PrunerInputs
    indices: Int[Array, "B K"]
    tokens: Float[Array, "B K D"]
    position_ids: Int[Array, "3 B K"]


class ReadPrompt(flax.struct.PyTreeNode):
    """What was read before the first answer token.

    Attributes:
        prefilled: Logits and caches.
        last: Tokens that the last layer saw or, of a method that reuses, computed: places in
            `Chosen.indices` [B, K].
        reused: Caches and attention for the next frame, of a method that reuses.
    """

    prefilled: Prefilled
    last: Int[Array, "B K"]
    reused: reuse.Reused | None = None


def choose_inputs(
    policy: DrivingPolicy,
    params: dict,
    inputs: PrunerInputs,
    prompt: Int[Array, "B L"],
    key: jax.Array | None = None,
) -> Chosen:
    """First stage of `plan_tokens`: what a method that stands before the model does."""
    model, pruner = policy.model, policy.pruner
    relevance = "relevance" in pruner.needs and inputs.relevance is None
    if stands_before(pruner) and (relevance or PROMPT & pruner.needs):
        variables = {"params": params["vla"]}
        text = model.apply(variables, prompt, method=lambda vla, ids: vla.language_model.embed(ids))
        inputs = with_prompt(inputs, text, jnp.ones(prompt.shape, bool), relevance)
    batch, total = inputs.tokens.shape[:2]
    where = visual_positions(model.config, batch)
    if not stands_before(pruner):
        whole = jnp.broadcast_to(jnp.arange(total), (batch, total))
        return Chosen(inputs, whole, inputs.tokens, where)
    kept = keep_before(pruner, params["pruner"], inputs, policy.keep_ratio, key)
    return Chosen(inputs, kept.indices, kept.tokens, gather_position_ids(where, kept.indices))


def read_prompt(
    policy: DrivingPolicy,
    params: dict,
    chosen: Chosen,
    prompt: Int[Array, "B L"],
    key: jax.Array | None = None,
) -> ReadPrompt:
    """Second stage of `plan_tokens`: the prefill, with what a method within the model does."""
    model, pruner = policy.model, policy.pruner
    variables = {"params": params["vla"]}
    given = variables, chosen.tokens, chosen.position_ids, prompt
    within: dict[str, Any] = {}
    if not stands_before(pruner):
        within = {
            "pruner": pruner,
            "pruner_params": params["pruner"],
            "keep_ratio": policy.keep_ratio,
            "inputs": chosen.inputs,
            "key": key,
        }
    if pruner.reuse:
        text_layers = pruner.temporal.text_layers(model.config.text.num_layers)
        reused = reuse.prefill(*live_prompt(model, *given), **within, observe=text_layers)
        return ReadPrompt(reused.read, reused.computed, reused)
    read = prefill(model, *given, **within, observe=_observed(policy))
    return ReadPrompt(read, read.segments[-1].ids)


def answer_prompt(policy: DrivingPolicy, params: dict, chosen: Chosen, read: ReadPrompt) -> Plan:
    """Last stage of `plan_tokens`: the trajectory, and what a temporal method remembers."""
    model, pruner, inputs = policy.model, policy.pruner, chosen.inputs
    answer = decode(model, {"params": params["vla"]}, read.prefilled, _observed(policy))
    indices = jnp.take_along_axis(chosen.indices, read.last, axis=1)
    action = answer.action
    if action is not None:
        rows = jnp.arange(len(action))[:, None]
        nothing = jnp.zeros(inputs.tokens.shape[:2])
        action = nothing.at[rows, chosen.indices].set(action)
    state = next_memory(pruner, inputs, indices, action, read.reused)
    return Plan(model.config.vocabulary.decode(answer.ids), indices, state)


def _observed(policy: DrivingPolicy) -> tuple[int, ...]:
    return observed_layers(policy.pruner, policy.model.config.text.num_layers)


def plan_tokens(
    policy: DrivingPolicy,
    params: dict,
    inputs: PrunerInputs,
    speed: Float[Array, " B"],
    command: Int[Array, " B"],
    key: jax.Array | None = None,
) -> Plan:
    """Plans from visual tokens; see `plan`.

    Args:
        policy: Static.
        params: {"vla": ..., "pruner": ...}.
        inputs: All visual tokens, and what else the method needs of the pictures: see
            `driving_inputs`. A temporal method's `state` is that of the last frame.
        speed: Metres per second.
        command: 0 left, 1 straight, 2 right.
        key: For methods that draw.
    """
    prompt = policy.model.config.vocabulary.prompt(speed, command)
    chosen = choose_inputs(policy, params, inputs, prompt, key)
    read = read_prompt(policy, params, chosen, prompt, key)
    return answer_prompt(policy, params, chosen, read)


def plan(
    policy: DrivingPolicy,
    params: dict,
    images: Shaped[Array, "B C H W 3"],
    speed: Float[Array, " B"],
    command: Int[Array, " B"],
    key: jax.Array | None = None,
    state: Any = None,
    first: Bool[Array, " B"] | None = None,
) -> Plan:
    """Plans from pictures; `jax.jit(plan, static_argnums=0)` compiles once.

    Args:
        policy: Static.
        params: {"vla": ..., "pruner": ...}.
        images: uint8 pictures of the model's cameras.
        speed: Metres per second.
        command: 0 left, 1 straight, 2 right.
        key: For methods that draw.
        state: For temporal methods: of `start_state`, or of the last frame's plan.
        first: Which samples begin a drive with this frame, whatever the state says; None: none.
    """
    variables = {"params": params["vla"]}
    inputs = picture_inputs(policy.model, variables, images, policy.pruner.needs)
    if first is not None and state is not None:
        state = reset_state(state, start_state(policy, len(images), inputs.tokens.dtype), first)
    inputs = inputs.replace(state=state)
    return plan_tokens(policy, params, inputs, speed, command, key)
