"""Prefill and greedy decoding of a trajectory, one compiled program for one (N, K)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastdrive_jax.models.qwen2_5_vl.decoder import LayerCache
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA, positions


def prefill(
    model: DrivingVLA,
    params: dict,
    tokens: Float[Array, "B K D"],
    visual_ids: Int[Array, "3 B K"],
    prompt: Int[Array, "B 3"],
) -> tuple[Float[Array, "B V"], tuple[LayerCache, ...]]:
    """Logits of the first trajectory token, and caches with room for the whole trajectory."""
    return model.apply(params, tokens, visual_ids, prompt, method="prefill")


def decode(
    model: DrivingVLA, params: dict, logits: Float[Array, "B V"], caches: tuple[LayerCache, ...]
) -> Int[Array, "B 2T"]:
    """The most likely trajectory tokens [B, 2 T], one after the other.

    Only displacement ids compete, so that every answer is a trajectory.
    """
    vocabulary = model.config.vocabulary
    first = vocabulary.first_displacement
    start = int(positions(model.config).after[0, 0]) + 4

    def choose(logits):
        plan = logits[:, first : first + vocabulary.displacement_bins]
        return first + jnp.argmax(plan, axis=-1).astype(jnp.int32)

    def step(carry, offset):
        ids, caches = carry
        logits, caches = model.apply(params, ids, start + offset, caches, method="decode")
        following = choose(logits)
        return (following, caches), following

    ids = choose(logits)
    _, rest = jax.lax.scan(step, (ids, caches), jnp.arange(vocabulary.plan_length - 1))
    return jnp.concatenate([ids[:, None], rest.T], axis=1)


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
        params: Its parameters.
        tokens: K kept visual tokens in raster order; K = 0 plans without a picture.
        visual_ids: Their M-RoPE ids.
        prompt: From `DrivingVocabulary.prompt`.
    """
    logits, caches = prefill(model, params, tokens, visual_ids, prompt)
    return model.config.vocabulary.decode(decode(model, params, logits, caches))
