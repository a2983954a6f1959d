"""The driving policy: pictures in, pruned tokens, a trajectory out. One pure function."""

from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from fastdrive_jax.inference import reuse
from fastdrive_jax.inference.generate import decode, live_prompt, prefill
from fastdrive_jax.models.qwen2_5_vl.driving import (
    DrivingConfig,
    DrivingVLA,
    positions,
    visual_positions,
)
from fastdrive_jax.models.qwen2_5_vl.patches import patch_grid, patch_rows
from fastdrive_jax.models.qwen2_5_vl.vision_evidence import vision_evidence
from fastdrive_jax.pruning.budgets import split_pictures
from fastdrive_jax.pruning.cd_pruner import text_relevance
from fastdrive_jax.pruning.interface import (
    VISION,
    Kept,
    Need,
    Pruner,
    PrunerInputs,
    Seen,
    cut_plan,
    keep_tokens,
    pruner_scores,
)
from fastdrive_jax.pruning.select import gather_position_ids, gather_tokens, top_k


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


def choose_tokens(
    policy: DrivingPolicy,
    pruner_params: dict | None,
    tokens: Float[Array, "B N D"],
    key: jax.Array | None = None,
) -> Int[Array, "B K"]:
    """Kept tokens of a sample, by a method that stands before the language model."""
    inputs = driving_inputs(policy.model.config, tokens)
    return _keep(policy, pruner_params, inputs, key).indices


def driving_inputs(config: DrivingConfig, tokens: Float[Array, "B N D"]) -> PrunerInputs:
    """What follows from the model's layout alone; position ids count within a picture."""
    rows, columns = config.token_grid
    batch, cameras = len(tokens), len(config.cameras)
    place = jnp.indices((rows, columns)).reshape(2, -1)
    ids = jnp.concatenate([jnp.zeros((1, rows * columns), place.dtype), place])
    ids = jnp.tile(ids, cameras)[:, None]
    return PrunerInputs(
        tokens=tokens,
        position_ids=jnp.broadcast_to(ids, (3, batch, ids.shape[2])),
        camera=jnp.broadcast_to(jnp.arange(cameras), (batch, cameras)),
        grid=config.token_grid,
    )


def _keep(policy, pruner_params, inputs, key) -> Kept:
    """Scores are made of each picture by itself, for one budget; other methods see all."""
    pruner = policy.pruner
    k = pruner.budget(inputs.tokens.shape[1], policy.keep_ratio)
    if pruner.score is None:
        return keep_tokens(pruner, pruner_params, inputs, k, key)
    scores = pruner_scores(pruner, pruner_params, split_pictures(inputs), key)
    kept = top_k(scores.reshape(inputs.tokens.shape[:2]), k)
    return Kept(kept, gather_tokens(inputs.tokens, kept))


def picture_inputs(
    model: DrivingVLA,
    params: dict,
    images: Shaped[Array, "B C H W 3"],
    needs: frozenset[Need] = frozenset(),
) -> PrunerInputs:
    """Visual tokens of uint8 pictures, and what else a method needs of the pictures.

    Args:
        model: The VLA.
        params: {"params": ...} of it.
        images: Of the model's cameras.
        needs: Of the method.
    """
    config = model.config
    batch, cameras = images.shape[:2]
    wanted = ["intermediates"] if needs & VISION else False
    tokens = model.apply(params, images, method="encode", mutable=wanted)
    if wanted:
        tokens, kept = tokens
    inputs = driving_inputs(config, tokens)
    if wanted:
        grid = patch_grid(*config.image_size, config.vision)
        found = vision_evidence(kept["intermediates"]["visual"], config.vision, grid)
        inputs = inputs.replace(
            # A sample's tokens share 1, whatever the number of its cameras.
            vision_received=found.received.reshape(batch, -1) / cameras,
            vision_keys=found.keys.reshape(batch, -1, found.keys.shape[-1]),
        )
    if "pixels" in needs:
        inputs = inputs.replace(pixels=token_pixels(images, config))
    return inputs


def token_pixels(
    images: Shaped[Array, "B C H W 3"], config: DrivingConfig
) -> Float[Array, "B N P"]:
    """Each token's square of the picture, 0 for black [B, N, 3 * 28 * 28]."""
    flat = images.reshape(-1, *images.shape[2:])
    squares = patch_rows(flat, config.vision.token_pixels, 1).astype(jnp.float32)
    return squares.reshape(len(images), -1, squares.shape[-1])


def start_state(policy: DrivingPolicy, batch: int, dtype: jnp.dtype = jnp.float32) -> Any:
    """What a temporal method knows before the first frame of a drive; None for others.

    Args:
        policy: The model with a method.
        batch: B.
        dtype: Of the model's keys and values, if the method reuses them.
    """
    if policy.pruner.temporal is None:
        return None
    config = policy.model.config
    images = jax.ShapeDtypeStruct((batch, len(config.cameras), *config.image_size, 3), jnp.uint8)
    tokens = jnp.zeros((batch, config.visual_tokens, config.text.hidden_size))
    inputs = driving_inputs(config, tokens)
    if "pixels" in policy.pruner.needs:
        shape = jax.eval_shape(lambda x: token_pixels(x, config), images)
        inputs = inputs.replace(pixels=jnp.zeros(shape.shape, shape.dtype))
    state = policy.pruner.temporal.init(inputs)
    if not policy.pruner.reuse:
        return state
    layers, where = config.text.num_layers, positions(config)
    slots = sum(part.shape[1] for part in (where.before, where.visual, where.after))
    plan = cut_plan(policy.pruner, config.visual_tokens, policy.keep_ratio, layers)
    return reuse.Memory(state, reuse.no_caches(config.text, plan, batch, slots, dtype))


def reset_state(state: Any, start: Any, first: Bool[Array, " B"]) -> Any:
    """The state with that of samples whose drive begins anew taken from `start`."""

    def pick(old, new):
        return jnp.where(first.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(pick, state, start)


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
    model, pruner = policy.model, policy.pruner
    variables = {"params": params["vla"]}
    batch, total = inputs.tokens.shape[:2]
    prompt = model.config.vocabulary.prompt(speed, command)
    if "relevance" in pruner.needs and inputs.relevance is None:
        text = model.apply(variables, prompt, method=lambda vla, ids: vla.language_model.embed(ids))
        inputs = inputs.replace(relevance=text_relevance(inputs.tokens, text))
    where, tokens = visual_positions(model.config, batch), inputs.tokens
    whole = jnp.broadcast_to(jnp.arange(total), (batch, total))
    observe, reused = (), None
    if pruner.temporal is not None and not pruner.reuse:
        observe = pruner.temporal.layers(model.config.text.num_layers)
    if pruner.cuts is None and not pruner.renumber:
        kept = _keep(policy, params["pruner"], inputs, key)
        whole, tokens = kept.indices, kept.tokens
        where = gather_position_ids(where, whole)
        within: dict[str, Any] = {}
    else:
        within = {
            "pruner": pruner,
            "pruner_params": params["pruner"],
            "keep_ratio": policy.keep_ratio,
            "inputs": inputs,
            "key": key,
        }
    if pruner.reuse:
        text_layers = pruner.temporal.text_layers(model.config.text.num_layers)
        start = live_prompt(model, variables, tokens, where, prompt)
        reused = reuse.prefill(*start, **within, observe=text_layers)
        read, last = reused.read, reused.computed
    else:
        read = prefill(model, variables, tokens, where, prompt, **within, observe=observe)
        last = read.segments[-1].ids
    answer = decode(model, variables, read, observe)
    indices = jnp.take_along_axis(whole, last, axis=1)
    state = None
    if pruner.temporal is not None:
        rows = jnp.arange(batch)[:, None]
        seen = Seen(
            action=None
            if answer.action is None
            else jnp.zeros((batch, total)).at[rows, whole].set(answer.action),
            kept=jnp.zeros((batch, total), bool).at[rows, indices].set(True),
            pixels=inputs.pixels,
            text=None if reused is None else reused.text,
        )
        if reused is None:
            state = pruner.temporal.observe(inputs.state, seen)
        else:
            state = reuse.Memory(pruner.temporal.observe(inputs.state.frame, seen), reused.caches)
    return Plan(model.config.vocabulary.decode(answer.ids), indices, state)


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
