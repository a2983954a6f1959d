"""OpenVLA's published tensors, and their places among our parameters."""

import functools
import re
from collections.abc import Mapping
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import traverse_util

from fastdrive_jax.models.hf_names import Place, Table, decoder_table, dense, fit_table, norm
from fastdrive_jax.models.openvla.config import OpenVLAConfig
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.openvla.oft import BLOCKS
from fastdrive_jax.models.vit_config import ViTConfig

_FEATURIZERS = ("featurizer", "fused_featurizer")
_COLOURS = 3


def fit_names(shapes: Mapping[str, tuple[int, ...]], config: OpenVLAConfig) -> dict[str, Place]:
    """The place among our parameters of every given tensor; one that is not used has none.

    Args:
        shapes: Tensor names and their shapes on file.
        config: Sizes.

    Raises:
        UserError: See `fit_table`.
    """
    return fit_table(
        shapes,
        name_table(config),
        traverse_util.flatten_dict(abstract_params(config)),
        f"an OpenVLA of {len(config.encoders)} encoders and {config.text.num_layers} decoder "
        f"layers, head {config.head!r}",
        # timm's own name, which files that were not saved by transformers may have.
        lambda name: re.sub(r"(\.ls\d)\.gamma$", r"\1.scale_factor", name),
        lambda name: _is_unused(name, config),
    )


def _is_unused(name: str, config: OpenVLAConfig) -> bool:
    """Whether it is behind the output that is read: the last block, the norm, the pooling."""
    return any(
        re.match(rf"vision_backbone\.{source}\.(blocks\.{sizes.depth - 1}|norm|attn_pool)\.", name)
        for source, sizes in zip(_FEATURIZERS, config.encoders, strict=False)
    )


@functools.cache  # a published size takes seconds, and is asked for more than once
def abstract_params(config: OpenVLAConfig) -> dict:
    """Shapes and types of the parameters, none allocated."""
    edge = config.image_size
    inputs = {
        "images": jax.ShapeDtypeStruct((1, config.views, edge, edge, _COLOURS), jnp.uint8),
        "ids": jax.ShapeDtypeStruct((1, 1), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((1,), jnp.int32),
        "actions": jax.ShapeDtypeStruct((1, config.action_tokens), jnp.int32),
    }
    if config.proprio_dim:
        inputs["proprio"] = jax.ShapeDtypeStruct((1, config.proprio_dim), jnp.float32)
    init = OpenVLA(config).init
    return jax.eval_shape(lambda inputs: init(jax.random.key(0), **inputs), inputs)["params"]


def name_table(config: OpenVLAConfig) -> Table:
    """Every tensor that is read, its place among our parameters and its shape on file."""
    size, width = config.text.hidden_size, config.vision_size
    table = decoder_table(config.text, "language_model.model", "language_model.lm_head.weight")
    for number, sizes in enumerate(config.encoders):
        source = f"vision_backbone.{_FEATURIZERS[number]}"
        table |= _encoder_table(sizes, source, (f"encoders_{number}",))
    widths = (width, 4 * width, size, size) if len(config.encoders) > 1 else (width, size, size)
    for number, (into, out) in enumerate(pairwise(widths), 1):
        table |= dense(f"projector.fc{number}", ("projector", f"fc{number}"), out, into)
    if config.proprio_dim:
        for number, into in enumerate((config.proprio_dim, size), 1):
            name = f"fc{number}"
            table |= dense(f"proprio_projector.{name}", ("proprio_projector", name), size, into)
    return table | (_action_head_table(config) if config.parallel else {})


def _encoder_table(config: ViTConfig, source: str, root: Place) -> Table:
    size, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    positions = (1, config.grid[0] * config.grid[1], size)
    table = dense(f"{source}.patch_embed.proj", (*root, "patch_embed"), size, 0)
    table[f"{source}.patch_embed.proj.weight"] = (
        (*root, "patch_embed", "kernel"),
        (size, _COLOURS, patch, patch),
    )
    table[f"{source}.pos_embed"] = ((*root, "position_embeddings"), positions)
    if config.class_token:
        table[f"{source}.cls_token"] = ((*root, "class_token"), (1, 1, size))
    if config.registers:
        table[f"{source}.reg_token"] = ((*root, "register_tokens"), (1, config.registers, size))
    for number in range(config.depth - 1):
        name, place = f"{source}.blocks.{number}", (*root, f"blocks_{number}")
        for part in (1, 2):
            table |= norm(f"{name}.norm{part}", (*place, f"norm{part}"), size, bias=True)
            if config.layer_scale:
                table[f"{name}.ls{part}.scale_factor"] = ((*place, f"ls{part}"), (size,))
        table |= dense(f"{name}.attn.qkv", (*place, "attn", "qkv"), 3 * size, size)
        table |= dense(f"{name}.attn.proj", (*place, "attn", "proj"), size, size)
        table |= dense(f"{name}.mlp.fc1", (*place, "fc1"), inner, size)
        table |= dense(f"{name}.mlp.fc2", (*place, "fc2"), size, inner)
    return table


def _action_head_table(config: OpenVLAConfig) -> Table:
    size, name, root = config.text.hidden_size, "action_head.model", ("action_head",)
    seen = config.action_dim * size
    table = norm(f"{name}.layer_norm1", (*root, "layer_norm1"), seen, bias=True)
    table |= dense(f"{name}.fc1", (*root, "fc1"), size, seen)
    for number in range(BLOCKS):
        block, place = f"{name}.mlp_resnet_blocks.{number}.ffn", f"blocks_{number}"
        table |= norm(f"{block}.0", (*root, f"{place}_norm"), size, bias=True)
        table |= dense(f"{block}.1", (*root, f"{place}_dense"), size, size)
    table |= norm(f"{name}.layer_norm2", (*root, "layer_norm2"), size, bias=True)
    return table | dense(f"{name}.fc2", (*root, "fc2"), config.action_dim, size)
