"""Qwen2.5-VL weights in, from Hugging Face tensors."""

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

# Tensor name to Linen path and the shape that the tensor has on file.
Table = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]


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
) -> dict[str, tuple[str, ...]]:
    """The place among our parameters of every given tensor; a tied head that is given has none.

    Args:
        shapes: Tensor names, of either naming, and their shapes on file.
        vision: Sizes of the vision encoder.
        text: Sizes of the decoder.

    Raises:
        UserError: Names the doubled, unmapped, unfilled and misshapen tensors, all at once.
    """
    names: dict[str, str] = {}
    doubled = []
    for name in shapes:
        own = canonical_name(name)
        if own in names:
            doubled.append(own)
        names[own] = name
    ours = traverse_util.flatten_dict(abstract_params(vision, text))
    table = name_table(vision, text)
    if set(ours) != {place for place, _ in table.values()}:
        raise ValueError("the name table does not cover the model")
    known = set(table) | ({HEAD} if text.tie_word_embeddings else set())
    faults = {
        "given twice": sorted(doubled),
        "unmapped": sorted(set(names) - known),
        "unfilled": sorted(set(table) - set(names)),
        "misshapen": sorted(
            f"{name} {tuple(shapes[names[name]])}, not {shape}"
            for name, (_, shape) in table.items()
            if name in names and tuple(shapes[names[name]]) != shape
        ),
    }
    if any(faults.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise UserError(
            f"The weights do not fit a Qwen2.5-VL of {vision.depth} vision blocks and "
            f"{text.num_layers} decoder layers: {found}."
        )
    return {names[name]: place for name, (place, _) in table.items()}


def untied_head(name: str) -> UserError:
    """What is wrong with a head that was trained apart from the table the sizes tie it to."""
    return UserError(
        f"The weights are unlike the embedding table in {name}, though tie_word_embeddings says "
        "that they are the same; set it to false in config.json."
    )


def to_linen(value: np.ndarray, place: tuple[str, ...]) -> np.ndarray:
    """A tensor in our layout: PyTorch keeps kernels [out, in], a patch convolution [out, in...]."""
    return value.reshape(len(value), -1).T if place[-1] == "kernel" else value


def from_linen(value: np.ndarray, place: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A parameter in PyTorch's layout; the inverse of `to_linen`."""
    value = value.T if place[-1] == "kernel" else value
    return np.ascontiguousarray(value).reshape(shape)


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
    return _vision_table(vision) | _decoder_table(text)


def _dense(name: str, place: tuple[str, ...], out: int, into: int, bias: bool) -> Table:
    table = {f"{name}.weight": ((*place, "kernel"), (out, into))}
    return table | ({f"{name}.bias": ((*place, "bias"), (out,))} if bias else {})


def _norm(name: str, place: tuple[str, ...], size: int) -> Table:
    return {f"{name}.weight": ((*place, "scale"), (size,))}


def _feed_forward(name: str, place: tuple[str, ...], size: int, inner: int, bias: bool) -> Table:
    table = {}
    for part in ("gate_proj", "up_proj"):
        table |= _dense(f"{name}.{part}", (*place, part), inner, size, bias)
    return table | _dense(f"{name}.down_proj", (*place, "down_proj"), size, inner, bias)


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
        for norm in ("norm1", "norm2"):
            table |= _norm(f"{source}.{norm}", (*block, norm), size)
        table |= _dense(f"{source}.attn.qkv", (*block, "attn", "qkv"), 3 * size, size, True)
        table |= _dense(f"{source}.attn.proj", (*block, "attn", "proj"), size, size, True)
        inner = config.intermediate_size
        table |= _feed_forward(f"{source}.mlp", (*block, "mlp"), size, inner, True)
    merged, merger = size * config.spatial_merge_size**2, ("visual", "merger")
    table |= _norm("visual.merger.ln_q", (*merger, "ln_q"), size)
    table |= _dense("visual.merger.mlp.0", (*merger, "mlp_0"), merged, merged, True)
    out = config.out_hidden_size
    return table | _dense("visual.merger.mlp.2", (*merger, "mlp_2"), out, merged, True)


def _decoder_table(config: DecoderConfig) -> Table:
    size, root = config.hidden_size, ("language_model",)
    vocabulary = (config.vocab_size, size)
    table = {EMBEDDING: ((*root, "embed_tokens", "embedding"), vocabulary)}
    table |= _norm("language_model.norm", (*root, "norm"), size)
    if not config.tie_word_embeddings:
        table[HEAD] = ((*root, "lm_head", "kernel"), vocabulary)
    shared = config.num_kv_heads * config.head_dim
    for number in range(config.num_layers):
        source, layer = f"language_model.layers.{number}", (*root, f"layers_{number}")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table |= _norm(f"{source}.{norm}", (*layer, norm), size)
        name, place = f"{source}.self_attn", (*layer, "self_attn")
        for part, out in (("q_proj", size), ("k_proj", shared), ("v_proj", shared)):
            table |= _dense(f"{name}.{part}", (*place, part), out, size, True)
        table |= _dense(f"{name}.o_proj", (*place, "o_proj"), size, size, False)
        inner = config.intermediate_size
        table |= _feed_forward(f"{source}.mlp", (*layer, "mlp"), size, inner, False)
    return table
