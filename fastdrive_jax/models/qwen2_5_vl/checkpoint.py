"""Qwen2.5-VL checkpoints in the Hugging Face layout: streamed in, written out."""

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    Tensor,
    list_tensors,
    load_shards,
    tensors_digest,
)
from fastdrive_jax.models.hf_names import from_linen
from fastdrive_jax.models.qwen2_5_vl.config import QwenVLConfig
from fastdrive_jax.models.qwen2_5_vl.hf_config import (
    GENERATION_FILE,
    config_to_hf,
    read_config,
)
from fastdrive_jax.models.qwen2_5_vl.weights import (
    EMBEDDING,
    HEAD,
    canonical_name,
    fit_names,
    name_table,
    published_name,
    untied_head,
)

PARTS = ("visual", "language_model")  # of the parameters


def load(
    checkpoint_dir: Path,
    mesh: Mesh | None = None,
    dtype: jnp.dtype | None = None,
    progress: bool = False,
    parts: Collection[str] = PARTS,
) -> tuple[QwenVLConfig, dict[str, Any]]:
    """Sizes and parameters of a checkpoint folder, laid out over a mesh by `parallel.rules`.

    Args:
        checkpoint_dir: Holds config.json and safetensors, one file or several with an index.
        mesh: Of `make_mesh`; None takes the first device.
        dtype: Of the parameters; None keeps each tensor's own.
        progress: Show a progress bar.
        parts: Which of `PARTS` to read; all tensors are checked in any case.

    Raises:
        UserError: A file is missing or cut off, or the tensors do not fit the sizes.
    """
    config = read_config(Path(checkpoint_dir))
    tensors, places = _fitted(Path(checkpoint_dir), config, parts)
    _check_head(tensors, config)
    return config, load_shards(tensors, places, mesh, dtype, progress)


def checkpoint_digest(checkpoint_dir: Path, parts: Collection[str] = PARTS) -> str:
    """Tells checkpoints apart without reading them whole; see `tensors_digest`.

    Args:
        checkpoint_dir: See `load`.
        parts: See `load`; other tensors do not count.
    """
    config = read_config(Path(checkpoint_dir))
    return tensors_digest(config, *_fitted(Path(checkpoint_dir), config, parts))


def _fitted(folder, config, parts):
    """All tensors of a folder, and the places of those of some parts."""
    tensors = list_tensors(folder)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    places = fit_names(shapes, config.vision, config.text)
    return tensors, {name: place for name, place in places.items() if place[0] in parts}


def _check_head(tensors: Mapping[str, Tensor], config: QwenVLConfig) -> None:
    own = {canonical_name(name): name for name in tensors}
    if not config.text.tie_word_embeddings or HEAD not in own:
        return
    head, table = tensors[own[HEAD]], tensors[own[EMBEDDING]]
    same = head.shape == table.shape and head.dtype == table.dtype
    if not same or not all(map(np.array_equal, head.pieces(), table.pieces())):
        raise untied_head(own[HEAD])


def save(
    checkpoint_dir: Path,
    config: QwenVLConfig,
    params: Mapping[str, Any],
    shard_bytes: int = 5_000_000_000,
    also: Mapping[str, Path] | None = None,
) -> Path:
    """Writes a folder that transformers opens, as a whole or not at all.

    Args:
        checkpoint_dir: New folder.
        config: Sizes.
        params: {"visual", "language_model"}; each type is kept.
        shard_bytes: Most bytes of a weight file; one is held on the host at a time.
        also: Further files, such as tokenizer.json, by name.

    Raises:
        UserError: The folder is there already, or cannot be written.
    """
    out = Path(checkpoint_dir)
    if out.exists():
        raise UserError(f"{out} exists already; choose a new folder or remove it.")
    flat = traverse_util.flatten_dict(dict(params))
    table = name_table(config.vision, config.text)
    if set(flat) != {place for place, _ in table.values()}:
        raise ValueError("the parameters are not those of this config")
    groups, size = [[]], 0
    for name in table:
        value = flat[table[name][0]]
        if groups[-1] and size + value.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += value.nbytes
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
        try:
            _write_files(partial, config, flat, table, groups, also or {})
            partial.chmod(0o755)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out} cannot be written: {getattr(error, 'strerror', None) or error}."
        ) from error
    return out


def _write_files(folder, config, flat, table, groups, also) -> None:
    weight_map, total = {}, 0
    for number, names in enumerate(groups, 1):
        file = WEIGHTS_FILE
        if len(groups) > 1:
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name in names:
            place, shape = table[name]
            full = published_name(name)
            tensors[full] = from_linen(np.asarray(jax.device_get(flat[place])), place, shape)
            weight_map[full] = file
            total += tensors[full].nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
    kind = np.dtype(flat["language_model", "norm", "scale"].dtype).name
    content = config_to_hf(config, kind)
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    ends = {"eos_token_id": list(config.eos_token_ids), "pad_token_id": config.pad_token_id}
    (folder / GENERATION_FILE).write_text(json.dumps(ends, indent=1), encoding="utf-8")
    for name, path in also.items():
        shutil.copyfile(path, folder / name)
