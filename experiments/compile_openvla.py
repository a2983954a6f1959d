"""The programs of an OpenVLA, lowered for abstract shapes, for `fastdrive compile-model`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.ahead_of_time import whole_shapes
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.openvla.config import OpenVLAConfig
from fastdrive_jax.models.openvla.model import OpenVLA


def openvla_stages(
    config: OpenVLAConfig, params: Any, mesh: Mesh, prompt_tokens: int
) -> dict[str, jax.stages.Lowered]:
    """Vision encoders, prefill and decoding step of one sample or, of OFT, its single pass.

    Args:
        config: Sizes.
        params: Shapes with shardings.
        mesh: Of the shardings.
        prompt_tokens: L.
    """
    model, decoder = OpenVLA(config, jnp.bfloat16), Decoder(config.text)
    shape = whole_shapes(mesh)

    def encode(params, images):
        return model.apply({"params": params}, images, method="encode")

    def act(params, tokens, ids, lengths, proprio):
        inputs = tokens, ids, lengths
        return model.apply({"params": params}, *inputs, proprio=proprio, method="regress")

    def prefill(params, tokens, ids, lengths):
        sequence = model.apply({"params": params}, tokens, ids, lengths, method="sequence")
        hidden, caches = decoder.apply(
            {"params": params["language_model"]},
            sequence.embeddings,
            sequence.position_ids,
            room=config.action_tokens,
        )
        last = jnp.take_along_axis(hidden, sequence.answer[:, None, None], axis=1)
        caches = tuple(cache.replace(length=sequence.lengths) for cache in caches)
        return decoder.apply({"params": params["language_model"]}, last, method="logits"), caches

    def decode(params, ids, position, caches):
        x = decoder.apply({"params": params["language_model"]}, ids[:, None], method="embed")
        where = jnp.broadcast_to(position[None, :, None], (3, len(ids), 1))
        x, caches = decoder.apply({"params": params["language_model"]}, x, where, caches)
        return decoder.apply({"params": params["language_model"]}, x, method="logits"), caches

    edge = config.image_size
    images = shape(1, config.views, edge, edge, 3, dtype=jnp.uint8)
    tokens = shape(1, config.visual_tokens, config.text.hidden_size, dtype=jnp.bfloat16)
    inputs = params, tokens, shape(1, prompt_tokens), shape(1)
    with jax.set_mesh(mesh):
        stages = {"vision": jax.jit(encode).lower(params, images)}
        if config.parallel:
            proprio = shape(1, config.proprio_dim, dtype=jnp.float32)
            return stages | {"action_chunk": jax.jit(act).lower(*inputs, proprio)}
        caches = jax.eval_shape(prefill, *inputs)[1]
        caches = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), caches)
        step = jax.jit(decode, donate_argnums=3)
        return stages | {
            "prefill": jax.jit(prefill).lower(*inputs),
            "decode": step.lower(params, shape(1), shape(1), caches),
        }
