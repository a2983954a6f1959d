"""Qwen2.5-VL between the Hugging Face layout and a bundle (Orbax and safetensors) of ours."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from fastdrive_jax.configs import from_plain, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import read_bundle_orbax, write_bundle
from fastdrive_jax.models.qwen2_5_vl.checkpoint import load, save
from fastdrive_jax.models.qwen2_5_vl.config import QwenVLConfig
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.parallel.rules import parameter_sharding

KIND = "qwen2_5_vl"


def bundle_of_checkpoint(checkpoint_dir: Path, out_dir: Path) -> Path:
    """Writes the bundle of a Hugging Face checkpoint; types and bits are kept.

    Raises:
        UserError: See `load` and `write_bundle`.
    """
    config, params = load(checkpoint_dir)
    return write_bundle(out_dir, params, {"kind": KIND, "model": to_plain(config)})


def read_qwen_bundle(folder: Path, mesh: Mesh | None = None) -> tuple[QwenVLConfig, dict[str, Any]]:
    """Sizes and parameters of such a bundle, from Orbax straight into the shards of a mesh.

    Args:
        folder: The bundle.
        mesh: Of `make_mesh`; None takes all devices.

    Raises:
        UserError: It is no bundle, or one of another kind.
    """
    mesh = make_mesh() if mesh is None else mesh

    def place(name: str, shape: tuple[int, ...]):
        return parameter_sharding(tuple(name.split("/")), shape, mesh)

    params, described = read_bundle_orbax(folder, place)
    if described.get("kind") != KIND:
        raise UserError(
            f"{folder} is a bundle of kind {described.get('kind')!r}, not {KIND!r}; give one of a "
            "Qwen2.5-VL."
        )
    return from_plain(QwenVLConfig, described["model"]), params


def checkpoint_of_bundle(folder: Path, checkpoint_dir: Path, mesh: Mesh | None = None) -> Path:
    """Writes the Hugging Face checkpoint of such a bundle, which transformers opens.

    Raises:
        UserError: See `read_qwen_bundle` and `save`.
    """
    return save(checkpoint_dir, *read_qwen_bundle(folder, mesh))
