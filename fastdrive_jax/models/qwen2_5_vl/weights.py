"""Qwen2.5-VL weights in, from Hugging Face tensors."""

import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.hf_names import (
    Place,
    Table,
    decoder_table,
    dense,
    feed_forward,
    fit_table,
    norm,
    to_linen,
)
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.models.qwen2_5_vl.vision import VisionEncoder

_COLOURS = 3
HEAD, EMBEDDING = "lm_head.weight", "language_model.embed_tokens.weight"
# Prefixes of transformers 5 first, then those of the published files; the first that fits counts.
_PREFIXES = (
    (r"^model\.visual\.", "visual."),
    (r"^model\.language_model\.", "language_model."),
    (r"^model\.", "language_model."),
)


def params_from_tensors(
    tensors: Mapping[str, np.ndarray], vision: VisionConfig, text: DecoderConfig
) -> dict:
    """Linen parameters {"visual": ..., "language_model": ...} in float32.

    Args:
        tensors: Of Qwen2_5_VLForConditionalGeneration, PyTorch layouts, named as in transformers 5
            (`model.visual.*`, `model.language_model.*`) or as in the published files (`visual.*`,
            `model.layers.*`); `lm_head.weight` may be absent where the head is the embedding table.
        vision: Sizes of the vision encoder.
        text: Sizes of the decoder.

    Raises:
        UserError: Names the unmapped, unfilled and misshapen tensors, and a head that is not the
            embedding table though it should be, all of them at once.
    """
    table = fit_names({name: value.shape for name, value in tensors.items()}, vision, text)
    head, embedding = (
        next((name for name in tensors if canonical_name(name) == wanted), None)
        for wanted in (HEAD, EMBEDDING)
    )
    if text.tie_word_embeddings and head and not np.array_equal(tensors[head], tensors[embedding]):
        raise untied_head(head)
    return traverse_util.unflatten_dict(
        {
            place: np.ascontiguousarray(to_linen(np.asarray(tensors[name], np.float32), place))
            for name, place in table.items()
        }
    )


def fit_names(
    shapes: Mapping[str, tuple[int, ...]], vision: VisionConfig, text: DecoderConfig
) -> dict[str, Place]:
    """The place among our parameters of every given tensor; a tied head that is given has none.

    Args:
        shapes: Tensor names, of either naming, and their shapes on file.
        vision: Sizes of the vision encoder.
        text: Sizes of the decoder.

    Raises:
        UserError: See `fit_table`.
    """
    return fit_table(
        shapes,
        name_table(vision, text),
        traverse_util.flatten_dict(abstract_params(vision, text)),
        f"a Qwen2.5-VL of {vision.depth} vision blocks and {text.num_layers} decoder layers",
        canonical_name,
        lambda name: text.tie_word_embeddings and name == HEAD,
    )


def untied_head(name: str) -> UserError:
    """What is wrong with a head that was trained apart from the table the sizes tie it to."""
    return UserError(
        f"The weights are unlike the embedding table in {name}, though tie_word_embeddings says "
        "that they are the same; set it to false in config.json."
    )


@functools.cache  # a published size takes seconds, and is asked for more than once
def abstract_params(vision: VisionConfig, text: DecoderConfig) -> dict:
    """Shapes and types {"visual": ..., "language_model": ...} of the parameters, none allocated."""

    def whole(decoder: Decoder, ids: Int[Array, "B N"]) -> Float[Array, "B N V"]:
        places = jnp.zeros((3, *ids.shape), jnp.int32)
        return decoder.logits(decoder(decoder.embed(ids), places)[0])

    def init(key):
        edge = vision.token_pixels
        image, ids = jnp.zeros((1, edge, edge, _COLOURS), jnp.uint8), jnp.zeros((1, 1), jnp.int32)
        return {
            "visual": VisionEncoder(vision).init(key, image)["params"],
            "language_model": Decoder(text).init(key, ids, method=whole)["params"],
        }

    return jax.eval_shape(init, jax.random.key(0))


def canonical_name(name: str) -> str:
    """The name under `visual.*`, `language_model.*` or `lm_head.weight`."""
    for pattern, replacement in _PREFIXES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def published_name(name: str) -> str:
    """A canonical name as the published files have it, which every tool reads."""
    return re.sub(r"^language_model\.", "model.", name)


def name_table(vision: VisionConfig, text: DecoderConfig) -> Table:
    """Every tensor's canonical name, its place among our parameters and its shape on file."""
    return _vision_table(vision) | decoder_table(text, "language_model", HEAD)


def _vision_table(config: VisionConfig) -> Table:
    size, patch = config.hidden_size, config.patch_size
    table = {
        "visual.patch_embed.proj.weight": (
            ("visual", "patch_embed", "kernel"),
            (size, _COLOURS, config.temporal_patch_size, patch, patch),
        )
    }
    for number in range(config.depth):
        source, block = f"visual.blocks.{number}", ("visual", f"blocks_{number}")
        for part in ("norm1", "norm2"):
            table |= norm(f"{source}.{part}", (*block, part), size)
        table |= dense(f"{source}.attn.qkv", (*block, "attn", "qkv"), 3 * size, size, True)
        table |= dense(f"{source}.attn.proj", (*block, "attn", "proj"), size, size, True)
        inner = config.intermediate_size
        table |= feed_forward(f"{source}.mlp", (*block, "mlp"), size, inner, True)
    merged, merger = size * config.spatial_merge_size**2, ("visual", "merger")
    table |= norm("visual.merger.ln_q", (*merger, "ln_q"), size)
    table |= dense("visual.merger.mlp.0", (*merger, "mlp_0"), merged, merged, True)
    out = config.out_hidden_size
    return table | dense("visual.merger.mlp.2", (*merger, "mlp_2"), out, merged, True)
