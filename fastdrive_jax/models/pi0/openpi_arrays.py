"""Names and layouts of openpi's own pi0 parameters, and their places among ours.

Its layers are scanned, so an array has all of a kind; its kernels have heads as an axis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.hf_names import Place
from fastdrive_jax.models.pi0.config import Pi0Config
from fastdrive_jax.models.vit_config import ViTConfig

_VISION, _DECODER = "PaliGemma/img", "PaliGemma/llm"
_COLOURS = 3

Cut = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Source:
    """Arrays that are read together, and what is made of them.

    Attributes:
        shapes: Name to shape on file.
        parts: Place among our parameters to how it is cut out of the arrays, in their order.
    """

    shapes: dict[str, tuple[int, ...]]
    parts: dict[Place, Cut]


def sources(config: Pi0Config) -> list[Source]:
    """All arrays of a pi0 and the parameters that are made of them."""
    width, size, dim = config.expert.hidden_size, config.prefix.hidden_size, config.action_dim
    found = _vision(config.vision)
    found += _dense(f"{_VISION}/head", ("multi_modal_projector",), config.vision.hidden_size, size)
    table = ("language_model", "embed_tokens", "embedding")
    found.append(
        _one(f"{_DECODER}/embedder/input_embedding", table, (config.prefix.vocab_size, size))
    )
    found += _decoder(config.prefix, "", ("language_model",))
    found += _decoder(config.expert, "_1", ("expert", "model"))
    for name, into, out in (
        ("state_proj", dim, width),
        ("action_in_proj", dim, width),
        ("action_time_mlp_in", 2 * width, width),
        ("action_time_mlp_out", width, width),
        ("action_out_proj", width, dim),
    ):
        found += _dense(name, ("expert", name), into, out)
    return found


def _vision(config: ViTConfig) -> list[Source]:
    root, size, inner = "vision_tower", config.hidden_size, config.intermediate_size
    places = config.grid[0] * config.grid[1]
    kernel = config.patch_size, config.patch_size, _COLOURS, size

    def patches(array):  # ours is by colour first
        return array.transpose(2, 0, 1, 3).reshape(-1, size)

    found = [
        Source({f"{_VISION}/embedding/kernel": kernel}, {(root, "patch_embed", "kernel"): patches}),
        _one(f"{_VISION}/embedding/bias", (root, "patch_embed", "bias"), (size,)),
        _one(f"{_VISION}/pos_embedding", (root, "position_embeddings"), (1, places, size)),
    ]
    for part in ("scale", "bias"):
        name = f"{_VISION}/Transformer/encoder_norm/{part}"
        found.append(_one(name, (root, "norm", part), (size,)))
    block = f"{_VISION}/Transformer/encoderblock"
    heads = config.num_heads, size // config.num_heads

    def stack(names, shape, place, cut):
        found.append(_stacked(names, shape, config.depth, {(root, "blocks_{}", *place): cut}))

    stacks: list[tuple[tuple[str, ...], Place, tuple[int, ...], Cut]] = [
        (("LayerNorm_0/scale",), ("norm1", "scale"), (size,), _same),
        (("LayerNorm_0/bias",), ("norm1", "bias"), (size,), _same),
        (("LayerNorm_1/scale",), ("norm2", "scale"), (size,), _same),
        (("LayerNorm_1/bias",), ("norm2", "bias"), (size,), _same),
        (("MlpBlock_0/Dense_0/kernel",), ("fc1", "kernel"), (size, inner), _same),
        (("MlpBlock_0/Dense_0/bias",), ("fc1", "bias"), (inner,), _same),
        (("MlpBlock_0/Dense_1/kernel",), ("fc2", "kernel"), (inner, size), _same),
        (("MlpBlock_0/Dense_1/bias",), ("fc2", "bias"), (size,), _same),
    ]
    for names, place, shape, cut in stacks:
        stack([f"{block}/{name}" for name in names], shape, place, cut)
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for part, shape in (("kernel", (size, *heads)), ("bias", heads)):
        names = [f"{attention}/{name}/{part}" for name in ("query", "key", "value")]
        stack(names, shape, ("attn", "qkv", part), partial(_side_by_side, into=shape[:-2]))
    out = ("attn", "proj")
    stack([f"{attention}/out/kernel"], (*heads, size), (*out, "kernel"), _heads_first)
    stack([f"{attention}/out/bias"], (size,), (*out, "bias"), _same)
    return found


def _decoder(config: DecoderConfig, suffix: str, root: Place) -> list[Source]:
    """One of the two Gemmas, which share arrays' names but for a suffix."""
    size, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    layers, queries, keys = config.num_layers, config.num_heads, config.num_kv_heads
    layer, source = (*root, "layers_{}"), f"{_DECODER}/layers"
    attention = (*layer, "self_attn")

    def joined(array):  # [heads, D, d]
        return array.transpose(1, 0, 2).reshape(size, -1)

    def stack(name, shape, parts):
        return _stacked([f"{source}/{name}"], shape, layers, parts)

    return [
        _one(f"{_DECODER}/final_norm{suffix}/scale", (*root, "norm", "scale"), (size,)),
        stack(
            f"pre_attention_norm{suffix}/scale",
            (size,),
            {(*layer, "input_layernorm", "scale"): _same},
        ),
        stack(
            f"pre_ffw_norm{suffix}/scale",
            (size,),
            {(*layer, "post_attention_layernorm", "scale"): _same},
        ),
        stack(
            f"attn/q_einsum{suffix}/w",
            (queries, size, head),
            {(*attention, "q_proj", "kernel"): joined},
        ),
        stack(
            f"attn/kv_einsum{suffix}/w",
            (2, keys, size, head),
            {
                (*attention, "k_proj", "kernel"): lambda array: joined(array[0]),
                (*attention, "v_proj", "kernel"): lambda array: joined(array[1]),
            },
        ),
        stack(
            f"attn/attn_vec_einsum{suffix}/w",
            (queries, head, size),
            {(*attention, "o_proj", "kernel"): _heads_first},
        ),
        stack(
            f"mlp{suffix}/gating_einsum",
            (2, size, inner),
            {
                (*layer, "mlp", "gate_proj", "kernel"): lambda array: array[0],
                (*layer, "mlp", "up_proj", "kernel"): lambda array: array[1],
            },
        ),
        stack(
            f"mlp{suffix}/linear", (inner, size), {(*layer, "mlp", "down_proj", "kernel"): _same}
        ),
    ]


def _one(name: str, place: Place, shape: tuple[int, ...]) -> Source:
    return Source({name: shape}, {place: _same})


def _dense(name: str, place: Place, into: int, out: int) -> list[Source]:
    return [
        _one(f"{name}/kernel", (*place, "kernel"), (into, out)),
        _one(f"{name}/bias", (*place, "bias"), (out,)),
    ]


def _stacked(
    names: list[str], shape: tuple[int, ...], layers: int, parts: dict[Place, Cut]
) -> Source:
    """Arrays with a layer in each row; "{}" in a place is the layer's number."""

    def of_layer(cut, number):
        return lambda *arrays: cut(*(array[number] for array in arrays))

    return Source(
        dict.fromkeys(names, (layers, *shape)),
        {
            tuple(key.format(number) for key in place): of_layer(cut, number)
            for place, cut in parts.items()
            for number in range(layers)
        },
    )


def _side_by_side(*arrays: np.ndarray, into: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([array.reshape(*into, -1) for array in arrays], axis=-1)


def _heads_first(array: np.ndarray) -> np.ndarray:
    """[heads, d, D] to a kernel [heads x d, D]."""
    return array.reshape(-1, array.shape[-1])


def _same(array: np.ndarray) -> np.ndarray:
    return array
