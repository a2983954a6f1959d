"""The programs of a pi0, lowered for abstract shapes, for `fastdrive compile-model`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.ahead_of_time import whole_shapes
from fastdrive_jax.inference import pi0
from fastdrive_jax.models.pi0.config import Pi0Config
from fastdrive_jax.models.pi0.model import Pi0, action_expert


def pi0_stages(
    config: Pi0Config, params: Any, mesh: Mesh, prompt_tokens: int
) -> dict[str, jax.stages.Lowered]:
    """Vision encoder, prefill of the prefix, and all flow steps of a chunk, of one sample.

    Args:
        config: Sizes.
        params: Shapes with shardings.
        mesh: Of the shardings.
        prompt_tokens: L.
    """
    model, expert = Pi0(config, jnp.bfloat16), action_expert(config, jnp.bfloat16)
    shape = whole_shapes(mesh)

    def encode(params, images):
        return model.apply({"params": params}, images, method="encode")

    def prefill(params, tokens, ids, lengths):
        return pi0.read_prompt(model, params, tokens, ids, lengths)

    def act(params, prefilled, state, noise):
        given = prefilled, state, noise, config.flow_steps
        return pi0.sample_actions(expert, params["expert"], *given).actions

    edge, dim = config.image_size, config.action_dim
    images = shape(1, config.views, edge, edge, 3, dtype=jnp.uint8)
    tokens = shape(1, config.visual_tokens, config.prefix.hidden_size, dtype=jnp.bfloat16)
    inputs = params, tokens, shape(1, prompt_tokens), shape(1)
    prefilled = jax.eval_shape(prefill, *inputs)
    prefilled = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), prefilled)
    state = shape(1, dim, dtype=jnp.float32)
    noise = shape(1, config.horizon, dim, dtype=jnp.float32)
    with jax.set_mesh(mesh):
        return {
            "vision": jax.jit(encode).lower(params, images),
            "prefill": jax.jit(prefill).lower(*inputs),
            "action_chunk": jax.jit(act).lower(params, prefilled, state, noise),
        }
