"""OpenVLA and OpenVLA-OFT checkpoints as they are published, read straight into shards."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import Readable, list_tensors, load_shards
from fastdrive_jax.models.openvla.components import (
    ACTION_HEAD,
    PROPRIO_PROJECTOR,
    list_components,
)
from fastdrive_jax.models.openvla.config import OpenVLAConfig
from fastdrive_jax.models.openvla.hf_config import read_config
from fastdrive_jax.models.openvla.weights import fit_names


def load(
    checkpoint_dir: Path,
    mesh: Mesh | None = None,
    dtype: jnp.dtype | None = None,
    progress: bool = False,
    *,
    oft_views: int = 2,
    oft_chunk: int = 8,
) -> tuple[OpenVLAConfig, dict[str, Any]]:
    """Sizes and parameters of a checkpoint folder, laid out over a mesh by `parallel.rules`.

    A folder with an action head is OFT's.

    Args:
        checkpoint_dir: Holds config.json and safetensors, of OFT its components too (see
            `list_components`).
        mesh: Of `make_mesh`; None takes the first device.
        dtype: Of the parameters; None keeps each tensor's own.
        progress: Show a progress bar.
        oft_views: Pictures of a sample, which OFT's files do not say; LIBERO's models have 2.
        oft_chunk: Actions of an answer, which they do not say either; LIBERO's models have 8.

    Raises:
        UserError: A file is missing, cut off or of another model, or the tensors do not fit.
    """
    folder = Path(checkpoint_dir)
    components = list_components(folder)
    config = with_components(read_config(folder), components, oft_views, oft_chunk, folder)
    tensors: dict[str, Readable] = list_tensors(folder) | components
    places = fit_names({name: tensor.shape for name, tensor in tensors.items()}, config)
    return config, load_shards(tensors, places, mesh, dtype, progress)


def with_components(
    config: OpenVLAConfig,
    components: Mapping[str, Readable],
    views: int,
    chunk: int,
    folder: Path,
) -> OpenVLAConfig:
    """The sizes with OFT's, which the shapes of its components give.

    Args:
        config: Of config.json.
        components: Of `list_components`.
        views: See `load`.
        chunk: See `load`.
        folder: Named in errors.
    """
    if not components:
        return config
    head = components.get(f"{ACTION_HEAD}.model.fc2.weight")
    if head is None:
        raise UserError(f"{folder} holds OFT's components but no L1 action head; fetch it.")
    proprio = components.get(f"{PROPRIO_PROJECTOR}.fc1.weight")
    return replace(
        config,
        head="regression",
        views=views,
        chunk=chunk,
        action_dim=head.shape[0],
        proprio_dim=0 if proprio is None else proprio.shape[1],
    )
