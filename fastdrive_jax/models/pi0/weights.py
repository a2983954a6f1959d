"""pi0 weights in, from the files of openpi's PyTorch model and of lerobot."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from fastdrive_jax.models.hf_files import Readable, list_tensors, load_shards
from fastdrive_jax.models.hf_names import Place, Table, decoder_table, dense, fit_table, norm
from fastdrive_jax.models.pi0.config import Pi0Config
from fastdrive_jax.models.pi0.model import Pi0
from fastdrive_jax.models.vit_config import ViTConfig

_COLOURS = 3
_EMBEDDING, _HEAD = "language_model.embed_tokens.weight", "language_model.lm_head.weight"
_UNUSED = (_HEAD, "expert.lm_head.weight", "expert.embed_tokens.weight")  # no words are answered
_STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")  # of old lerobot
# Names of all releases to one: lerobot saves below "model.", and transformers has moved parts.
_RENAMED = (
    (r"^model\.", ""),
    (r"^paligemma_with_expert\.", ""),
    (r"^paligemma\.(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"^paligemma\.(model\.)?multi_modal_projector\.linear\.", "multi_modal_projector."),
    (r"^paligemma\.lm_head\.", "language_model.lm_head."),
    (r"^paligemma\.(model\.)?language_model\.(model\.)?", "language_model."),
    (r"^gemma_expert\.(model\.)?", "expert."),
)


@dataclass(frozen=True)
class _Joined:
    """Tensors side by side along their outputs.

    Attributes:
        parts: The tensors.
        shape: Of all together.
        plus: Is added: Gemma's norms are kept as what differs from 1.
    """

    parts: tuple[Readable, ...]
    shape: tuple[int, ...]
    plus: float

    def read(self) -> np.ndarray:
        """Their values; a sum is in float32."""
        values = [part.read() for part in self.parts]
        value = np.concatenate(values) if len(values) > 1 else values[0]
        value = value.astype(np.float32) + np.float32(self.plus) if self.plus else value
        return value.reshape(self.shape)


def load(
    folder: Path,
    config: Pi0Config,
    mesh: Mesh | None = None,
    dtype: jnp.dtype = jnp.float32,
    progress: bool = False,
) -> dict[str, Any]:
    """Parameters of a folder with `model.safetensors`, or several of them and an index.

    Args:
        folder: The checkpoint.
        config: Sizes, which its files do not all tell.
        mesh: Of `make_mesh`; None takes the first device.
        dtype: Of the parameters.
        progress: Show a progress bar.

    Raises:
        UserError: A file is missing or cut off, or the tensors do not fit the sizes.
    """
    tensors = list_tensors(Path(folder))
    places = fit_names({name: tensor.shape for name, tensor in tensors.items()}, config)
    ours = traverse_util.flatten_dict(abstract_params(config))
    joined, targets = {}, {}
    for place in dict.fromkeys(places.values()):
        parts = tuple(tensors[name] for name, at in places.items() if at == place)
        shape = ours[place].shape
        if place[-1] == "kernel":  # still as PyTorch keeps it
            shape = (shape[1], *parts[0].shape[1:])
        name = ".".join(place)
        joined[name], targets[name] = _Joined(parts, shape, float(_is_gemma_norm(place))), place
    return load_shards(joined, targets, mesh, dtype, progress)


def fit_names(shapes: Mapping[str, tuple[int, ...]], config: Pi0Config) -> dict[str, Place]:
    """The place among our parameters of every given tensor; one that is not used has none.

    Queries, keys and values of a vision block share a place, in that order.

    Args:
        shapes: Tensor names and their shapes on file.
        config: Sizes.

    Raises:
        UserError: See `fit_table`.
    """
    # Tied tensors may be saved under one of their names alone.
    whole = any(canonical_name(name) == _EMBEDDING for name in shapes)

    def canonical(name):
        own = canonical_name(name)
        return _EMBEDDING if own == _HEAD and not whole else own

    return fit_table(
        shapes,
        name_table(config),
        traverse_util.flatten_dict(abstract_params(config)),
        f"a pi0 of {config.vision.depth} vision blocks and {config.prefix.num_layers} decoder "
        "layers",
        canonical,
        lambda name: name in _UNUSED or name.startswith(_STATISTICS),
    )


def canonical_name(name: str) -> str:
    """A published name without the wrappers of the model that saved the tensor."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


@functools.cache  # a published size takes seconds, and is asked for more than once
def abstract_params(config: Pi0Config) -> dict:
    """Shapes and types of the parameters, none allocated."""
    edge = config.image_size
    inputs = {
        "images": jax.ShapeDtypeStruct((1, config.views, edge, edge, _COLOURS), jnp.uint8),
        "ids": jax.ShapeDtypeStruct((1, 1), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((1,), jnp.int32),
        "state": jax.ShapeDtypeStruct((1, config.action_dim), jnp.float32),
        "noisy": jax.ShapeDtypeStruct((1, config.horizon, config.action_dim), jnp.float32),
        "time": jax.ShapeDtypeStruct((1,), jnp.float32),
    }
    init = Pi0(config).init
    return jax.eval_shape(lambda inputs: init(jax.random.key(0), **inputs), inputs)["params"]


def name_table(config: Pi0Config) -> Table:
    """Every tensor's canonical name, its place among our parameters and its shape on file."""
    width, size = config.expert.hidden_size, config.prefix.hidden_size
    table = _vision_table(config.vision)
    name = "multi_modal_projector"
    table |= dense(name, (name,), size, config.vision.hidden_size)
    table |= decoder_table(config.prefix, "language_model", _HEAD)
    for name, (place, shape) in decoder_table(config.expert, "expert", "").items():
        if name not in _UNUSED:
            table[name] = (("expert", "model", *place[1:]), shape)
    for name, out, into in (
        ("state_proj", width, config.action_dim),
        ("action_in_proj", width, config.action_dim),
        ("action_time_mlp_in", width, 2 * width),
        ("action_time_mlp_out", width, width),
        ("action_out_proj", config.action_dim, width),
    ):
        table |= dense(name, ("expert", name), out, into)
    return table


def _is_gemma_norm(place: Place) -> bool:
    return place[0] in ("language_model", "expert") and place[-1] == "scale"


def _vision_table(config: ViTConfig) -> Table:
    root, size, patch = "vision_tower", config.hidden_size, config.patch_size
    source = f"{root}.embeddings"
    table = dense(f"{source}.patch_embedding", (root, "patch_embed"), size, 0)
    table[f"{source}.patch_embedding.weight"] = (
        (root, "patch_embed", "kernel"),
        (size, _COLOURS, patch, patch),
    )
    positions = config.grid[0] * config.grid[1], size
    table[f"{source}.position_embedding.weight"] = ((root, "position_embeddings"), positions)
    for number in range(config.depth):
        name, place = f"{root}.encoder.layers.{number}", (root, f"blocks_{number}")
        for part in (1, 2):
            table |= norm(f"{name}.layer_norm{part}", (*place, f"norm{part}"), size, bias=True)
        for part in "qkv":
            table |= dense(f"{name}.self_attn.{part}_proj", (*place, "attn", "qkv"), size, size)
        table |= dense(f"{name}.self_attn.out_proj", (*place, "attn", "proj"), size, size)
        table |= dense(f"{name}.mlp.fc1", (*place, "fc1"), config.intermediate_size, size)
        table |= dense(f"{name}.mlp.fc2", (*place, "fc2"), size, config.intermediate_size)
    return table | norm(f"{root}.post_layernorm", (root, "norm"), size, bias=True)
