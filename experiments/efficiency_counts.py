"""FLOPs and bytes of a frame's stages by count, and the least time of a machine for them."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.frame_stages import Given, Setting, trace_stages, vision_stage
from experiments.program_flops import program_flops
from experiments.roofline import Machine, roofline_ms
from fastdrive_jax.inference.pictures import Encoded
from fastdrive_jax.inference.policy import DrivingPolicy, start_state
from fastdrive_jax.models.qwen2_5_vl.driving import PROMPT_TOKENS, DrivingConfig
from fastdrive_jax.models.qwen2_5_vl.weights import abstract_params
from fastdrive_jax.pruning.accounting import (
    Cost,
    encoder_flops,
    frame_cost,
    recon_pruner_flops,
)
from fastdrive_jax.pruning.interface import VISION, Temporal, cut_plan, stands_before

MARKS = 3  # text tokens around the picture, beside the prompt
COUNTED = ("vision", "pruner", "prefill", "decode")


@dataclass(frozen=True)
class Counts:
    """Of a batch's frame.

    Attributes:
        cost: Of the language model; `method_flops` is the method's own work before it.
        stages: Stage -> FLOPs that must be computed and bytes that must be moved; of decoding, one
            step.
        programs: Stage -> FLOPs of the traced program of one sample, of decoding all steps.
    """

    cost: Cost
    stages: Mapping[str, tuple[float, float]]
    programs: Mapping[str, float]


def frame_counts(
    setting: Setting,
    on_recon: bool,
    text: int,
    batch: int,
    programs: Mapping[str, float],
    number_bytes: int,
) -> Counts:
    """Counts of a batch.

    Args:
        setting: The method.
        on_recon: Its work before the model is a ReconPruner's, which has a formula; another's is
            counted in its program.
        text: Text tokens of a sample.
        batch: B.
        programs: Of `traced_flops`.
        number_bytes: Of a parameter and of a number in a cache.
    """
    policy = setting.policy
    config = policy.model.config
    own = programs["pruner"]
    if setting.whole:
        own = 0.0
    elif on_recon:
        own = recon_pruner_flops(config.text, config.visual_tokens)
    layers = config.text.num_layers
    cost = frame_cost(
        config.text,
        config.visual_tokens,
        text,
        cut_plan(policy.pruner, config.visual_tokens, policy.keep_ratio, layers),
        decode_steps=config.vocabulary.plan_length,
        batch=batch,
        parameter_bytes=number_bytes,
        activation_bytes=number_bytes,
        method_flops=own,
        reuse=policy.pruner.reuse,
    )
    tower = parameter_shapes(config)["visual"]
    pictures = batch * len(config.cameras)
    tokens = batch * config.visual_tokens * config.text.hidden_size * number_bytes
    stages = {
        "vision": (
            pictures * encoder_flops(config.vision, config.image_size),
            number_bytes * _size(tower) + tokens,
        ),
        "pruner": (cost.method_flops, number_bytes * _size(setting.pruner_params) + tokens),
        # What lies above the diagonal need not be computed, though published counts have it.
        "prefill": (cost.prefill_flops - cost.masked_flops, cost.decode_bytes),
        "decode": (cost.decode_flops, cost.decode_bytes),
    }
    if setting.whole or not (cost.method_flops or stands_before(policy.pruner)):
        stages["pruner"] = 0.0, 0.0  # all that it does is within the model
    return Counts(cost, stages, programs)


def traced_flops(
    setting: Setting, text: int, dtype: jnp.dtype, known: MutableMapping[Any, jax.stages.Traced]
) -> dict[str, float]:
    """FLOPs of the products of each stage's program for one sample; nothing is allocated.

    Args:
        setting: The method; shapes will do as its parameters.
        text: Text tokens.
        dtype: Of the model.
        known: See `trace_stages`.
    """
    model, pruner = setting.policy.model, setting.policy.pruner
    config = model.config
    vla = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), parameter_shapes(config)
    )
    images = jax.ShapeDtypeStruct((1, len(config.cameras), *config.image_size, 3), jnp.uint8)
    encoded = Encoded(
        jax.ShapeDtypeStruct((1, config.visual_tokens, config.text.hidden_size), dtype)
    )
    if needs := pruner.needs & VISION:
        encode = partial(vision_stage, model, needs)
        encoded = jax.eval_shape(encode, vla, images)
    given = jax.eval_shape(lambda: given_inputs(config, text, 1))
    state = jax.eval_shape(lambda: start_state(setting.policy, 1, dtype, text - MARKS))
    traced = trace_stages(setting, vla, encoded, images, given, state, known)
    return {stage: program_flops(found.jaxpr) for stage, found in traced.items()}


def added_flops(policy: DrivingPolicy, pruner_params: Any, text: int, dtype: jnp.dtype) -> float:
    """FLOPs of the products that a method adds to one sample's frame, whatever it computes.

    Its traced programs are compared with those of a method that takes the first tokens at the same
    cuts. The layer that one with `Cuts.own_rows` runs twice is not counted.
    A temporal method's rows of answer tokens are among them.

    Args:
        policy: The model with the method.
        pruner_params: Of the method.
        text: Text tokens.
        dtype: Of the model.
    """

    def first(params, inputs, key, k):
        return jnp.broadcast_to(jnp.arange(k), (len(inputs.tokens), k))

    pruner = policy.pruner
    # What reuses keys and values needs a memory; this one looks at nothing for it.
    blind = Temporal(lambda inputs: (), lambda state, seen: state) if pruner.reuse else None
    plain = replace(pruner, score=None, merge=None, choose=first, needs=frozenset(), temporal=blind)

    def count(pruner):
        setting = Setting(replace(policy, pruner=pruner), pruner_params)
        found = traced_flops(setting, text, dtype, {})
        return sum(found.values())

    return count(pruner) - count(plain)


def parameter_shapes(config: DrivingConfig) -> dict:
    """Shapes of the model's parameters."""
    return abstract_params(config.vision, config.text)


def given_inputs(config: DrivingConfig, text: int, batch: int) -> Given:
    """A prompt of `text` tokens, its marks included, and the truth, all the same for all settings.

    Tokens before the vocabulary's prompt are drawn: they stand for an instruction.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    prompt = config.vocabulary.prompt(jnp.full(batch, 5.0), jnp.ones(batch, jnp.int32))
    more = text - MARKS - PROMPT_TOKENS
    instruction = jax.random.randint(keys[0], (batch, more), 0, config.vocabulary.size)
    prompt = jnp.concatenate([instruction.astype(prompt.dtype), prompt], axis=1)
    return Given(prompt, jax.random.uniform(keys[1], (batch, config.visual_tokens)), keys[2])


def stage_rooflines(counts: Counts, machine: Machine, steps: int) -> dict[str, float]:
    """Least milliseconds of the stages, and of a frame with so many decode steps.

    "prefill" is the method's work and the model's, as published tables have it.
    """
    found = {stage: roofline_ms(machine, *counts.stages[stage]) for stage in COUNTED}
    found["prefill"] += found["pruner"]
    found["frame"] = found["vision"] + found["prefill"] + steps * found["decode"]
    return found


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
