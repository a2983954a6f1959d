"""pi0 weights in, from the files of openpi and lerobot."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.pi0.config import PI0, Pi0Config
from fastdrive_jax.models.pi0.model import Pi0
from fastdrive_jax.models.qwen2_5_vl.checkpoint import list_tensors
from fastdrive_jax.models.vit_config import ViTConfig
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.parallel.rules import parameter_sharding

_COLOURS = 3
_EMBEDDING, _HEAD = "language_model.embed_tokens.weight", "language_model.lm_head.weight"
_UNUSED = ("expert.lm_head.weight", "expert.embed_tokens.weight")  # the expert reads no words
# Names of all releases to ours: lerobot saves below "model.", and transformers has moved parts.
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
class Source:
    """What a parameter is made of.

    Attributes:
        names: Tensors; several are put side by side along their outputs.
        shape: Of each of them on file.
        plus: Is added; Gemma's norms are kept as what differs from 1.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    plus: float = 0.0


Table = dict[tuple[str, ...], Source]


def params_from_tensors(
    tensors: Mapping[str, np.ndarray], config: Pi0Config, dtype: np.dtype = np.float32
) -> dict:
    """Linen parameters of pi0.

    Args:
        tensors: Named as by openpi's or lerobot's PyTorch models, in PyTorch's layouts.
        config: Sizes.
        dtype: Of the parameters.

    Raises:
        UserError: Names the doubled, unmapped, unfilled and misshapen tensors, all at once.
    """
    sources = fit_names({name: value.shape for name, value in tensors.items()}, config)
    return traverse_util.unflatten_dict(
        {
            place: _parameter(tensors.__getitem__, place, source, dtype)
            for place, source in sources.items()
        }
    )


def load(
    folder: Path, config: Pi0Config = PI0, mesh: Mesh | None = None, dtype: jnp.dtype = jnp.float32
) -> dict:
    """Parameters of a checkpoint folder, one at a time into its shards.

    Args:
        folder: Holds safetensors, one file or several with an index.
        config: Sizes; a pi0 file does not tell all of them.
        mesh: Of `make_mesh`; None takes the first device.
        dtype: Of the parameters.

    Raises:
        UserError: A file is missing or cut off, or the tensors do not fit the sizes.
    """
    tensors = list_tensors(Path(folder))
    mesh = make_mesh(1, devices=jax.local_devices()[:1]) if mesh is None else mesh
    sources = fit_names({name: tensor.shape for name, tensor in tensors.items()}, config)
    flat = {}
    for place, source in sources.items():
        value = _parameter(lambda name: tensors[name].read(), place, source, dtype)
        flat[place] = jax.device_put(value, parameter_sharding(place, value.shape, mesh))
        flat[place].block_until_ready()  # else many of them wait on the host for their transfer
    return traverse_util.unflatten_dict(flat)


def fit_names(shapes: Mapping[str, tuple[int, ...]], config: Pi0Config) -> Table:
    """What each of our parameters is made of, by the names as they were given.

    Args:
        shapes: Tensor names and their shapes on file.
        config: Sizes.

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
    # Tied tensors are saved under one of their names.
    head = names.pop(_HEAD, None)
    if head is not None:
        names.setdefault(_EMBEDDING, head)
    table = name_table(config)
    wanted = {name: source.shape for source in table.values() for name in source.names}
    faults = {
        "given twice": sorted(doubled),
        "unmapped": sorted(set(names) - set(wanted) - set(_UNUSED)),
        "unfilled": sorted(set(wanted) - set(names)),
        "misshapen": sorted(
            f"{name} {tuple(shapes[names[name]])}, not {shape}"
            for name, shape in wanted.items()
            if name in names and tuple(shapes[names[name]]) != shape
        ),
    }
    if any(faults.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise UserError(
            f"The weights do not fit a pi0 of {config.vision.depth} vision blocks and "
            f"{config.prefix.num_layers} decoder layers: {found}."
        )
    return {
        place: replace(source, names=tuple(names[name] for name in source.names))
        for place, source in table.items()
    }


def canonical_name(name: str) -> str:
    """A published tensor's name without the wrappers of the model that saved it."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def abstract_params(config: Pi0Config, dtype: jnp.dtype = jnp.float32) -> dict:
    """Shapes and types of the parameters, none allocated."""
    shapes = {
        "images": ((1, config.views, config.image_size, config.image_size, _COLOURS), jnp.uint8),
        "ids": ((1, 1), jnp.int32),
        "lengths": ((1,), jnp.int32),
        "state": ((1, config.action_dim), jnp.float32),
        "noisy": ((1, config.horizon, config.action_dim), jnp.float32),
        "time": ((1,), jnp.float32),
    }
    inputs = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    params = jax.eval_shape(Pi0(config).init, jax.random.key(0), **inputs)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)


def name_table(config: Pi0Config) -> Table:
    """Every parameter's place, and the canonical names and shapes of what it is made of."""
    width, into = config.expert.hidden_size, config.action_dim
    size = config.prefix.hidden_size
    table: Table = {
        ("language_model", "embed_tokens", "embedding"): Source(
            (_EMBEDDING,), (config.prefix.vocab_size, size)
        )
    }
    table |= _vision_table(config.vision)
    table |= _dense("multi_modal_projector", size, config.vision.hidden_size)
    table |= _decoder_table("language_model", ("language_model",), config.prefix)
    table |= _decoder_table("expert", ("expert", "model"), config.expert)
    for name, (out, from_) in {
        "state_proj": (width, into),
        "action_in_proj": (width, into),
        "action_time_mlp_in": (width, 2 * width),
        "action_time_mlp_out": (width, width),
        "action_out_proj": (into, width),
    }.items():
        table |= _dense(name, out, from_, place=("expert", name))
    return table


def _parameter(
    read: Callable[[str], np.ndarray], place: tuple[str, ...], source: Source, dtype: np.dtype
) -> np.ndarray:
    """A parameter in Linen's layout; PyTorch keeps kernels [out, in], convolutions [out, in...]."""
    values = [np.asarray(read(name)) for name in source.names]
    value = values[0] if len(values) == 1 else np.concatenate(values)
    if place[-1] == "kernel":
        value = value.reshape(len(value), -1).T
    if source.plus:
        value = value.astype(np.float32) + np.float32(source.plus)
    return np.ascontiguousarray(value.astype(dtype))


def _dense(
    names: str | tuple[str, ...],
    out: int,
    into: int,
    place: tuple[str, ...] | None = None,
    bias: bool = True,
) -> Table:
    names = (names,) if isinstance(names, str) else names
    place = tuple(names[0].split(".")) if place is None else place
    weights = tuple(f"{name}.weight" for name in names)
    table = {(*place, "kernel"): Source(weights, (out, into))}
    if bias:
        biases = tuple(f"{name}.bias" for name in names)
        table[(*place, "bias")] = Source(biases, (out,))
    return table


def _layer_norm(name: str, place: tuple[str, ...], size: int) -> Table:
    return {
        (*place, "scale"): Source((f"{name}.weight",), (size,)),
        (*place, "bias"): Source((f"{name}.bias",), (size,)),
    }


def _vision_table(config: ViTConfig) -> Table:
    root, size, patch = "vision_tower", config.hidden_size, config.patch_size
    rows, columns = config.grid
    patches = f"{root}.embeddings.patch_embedding"
    positions = f"{root}.embeddings.position_embedding.weight"
    table: Table = {
        (root, "patch_embed", "kernel"): Source(
            (f"{patches}.weight",), (size, _COLOURS, patch, patch)
        ),
        (root, "patch_embed", "bias"): Source((f"{patches}.bias",), (size,)),
        (root, "position_embeddings"): Source((positions,), (rows * columns, size)),
    }
    for number in range(config.depth):
        source, block = f"{root}.encoder.layers.{number}", (root, f"blocks_{number}")
        for part in (1, 2):
            table |= _layer_norm(f"{source}.layer_norm{part}", (*block, f"norm{part}"), size)
        qkv = tuple(f"{source}.self_attn.{part}_proj" for part in "qkv")
        table |= _dense(qkv, size, size, place=(*block, "attn", "qkv"))
        table |= _dense(f"{source}.self_attn.out_proj", size, size, place=(*block, "attn", "proj"))
        inner = config.intermediate_size
        table |= _dense(f"{source}.mlp.fc1", inner, size, place=(*block, "fc1"))
        table |= _dense(f"{source}.mlp.fc2", size, inner, place=(*block, "fc2"))
    return table | _layer_norm(f"{root}.post_layernorm", (root, "norm"), size)


def _decoder_table(name: str, root: tuple[str, ...], config: DecoderConfig) -> Table:
    size, inner = config.hidden_size, config.intermediate_size
    own, shared = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))

    def norm(name, place):
        return {(*place, "scale"): Source((f"{name}.weight",), (size,), plus=1.0)}

    table = norm(f"{name}.norm", (*root, "norm"))
    for number in range(config.num_layers):
        source, layer = f"{name}.layers.{number}", (*root, f"layers_{number}")
        for part in ("input_layernorm", "post_attention_layernorm"):
            table |= norm(f"{source}.{part}", (*layer, part))
        for part, out, into in (
            ("self_attn.q_proj", own, size),
            ("self_attn.k_proj", shared, size),
            ("self_attn.v_proj", shared, size),
            ("self_attn.o_proj", size, own),
            ("mlp.gate_proj", inner, size),
            ("mlp.up_proj", inner, size),
            ("mlp.down_proj", size, inner),
        ):
            place = (*layer, *part.split("."))
            table |= _dense(f"{source}.{part}", out, into, place, bias=False)
    return table
