"""Qwen2.5-VL checkpoints in the Hugging Face layout: streamed in, written out.

One tensor is read at a time, straight into its shards, so the host never holds two copies of the
model.
"""

import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from safetensors.numpy import save_file
from tqdm import tqdm

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.config import QwenVLConfig
from fastdrive_jax.models.qwen2_5_vl.hf_config import (
    CONFIG_FILE,
    GENERATION_FILE,
    config_to_hf,
    read_config,
)
from fastdrive_jax.models.qwen2_5_vl.weights import (
    EMBEDDING,
    HEAD,
    canonical_name,
    fit_names,
    from_linen,
    name_table,
    published_name,
    to_linen,
    untied_head,
)
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.parallel.rules import parameter_sharding

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PARTS = ("visual", "language_model")  # of the parameters
_DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": jnp.dtype("bfloat16")}
_SAMPLE = 1 << 12  # bytes at each end of a tensor that its digest covers
_ROWS_AT_ONCE = 1 << 24  # bytes of a table that are compared at once


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies on the disk.

    Attributes:
        path: File.
        offset: First byte.
        shape: Shape.
        dtype: Type.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Its values, in one copy."""
        count = int(np.prod(self.shape))
        return np.fromfile(self.path, self.dtype, count, offset=self.offset).reshape(self.shape)


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
    folder = Path(checkpoint_dir)
    config = read_config(folder)
    mesh = make_mesh(1, devices=jax.local_devices()[:1]) if mesh is None else mesh
    tensors = list_tensors(folder)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    places = fit_names(shapes, config.vision, config.text)
    _check_head(tensors, config)
    places = {name: place for name, place in places.items() if place[0] in parts}
    flat = {}
    for name in tqdm(sorted(places), desc="weights", unit="tensor", disable=not progress):
        place = places[name]
        value = to_linen(tensors[name].read(), place)
        if dtype is not None:
            value = value.astype(dtype)
        sharding = parameter_sharding(place, value.shape, mesh)
        flat[place] = jax.make_array_from_callback(
            value.shape, sharding, lambda index, value=value: np.ascontiguousarray(value[index])
        )
        flat[place].block_until_ready()  # else many tensors wait on the host for their transfer
    return config, traverse_util.unflatten_dict(flat)


def checkpoint_digest(checkpoint_dir: Path, parts: Collection[str] = PARTS) -> str:
    """Tells checkpoints apart without reading them whole.

    It covers the sizes and, of each tensor, name, shape, type, and both ends of its values.

    Args:
        checkpoint_dir: See `load`.
        parts: See `load`; other tensors do not count.
    """
    config = read_config(Path(checkpoint_dir))
    tensors = list_tensors(Path(checkpoint_dir))
    places = fit_names({k: v.shape for k, v in tensors.items()}, config.vision, config.text)
    digest = hashlib.sha256(repr(config).encode())
    for name in sorted(name for name, place in places.items() if place[0] in parts):
        tensor = tensors[name]
        size = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
        digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        with tensor.path.open("rb") as file:
            for start in (0, max(size - _SAMPLE, 0)):
                file.seek(tensor.offset + start)
                digest.update(file.read(min(size, _SAMPLE)))
    return digest.hexdigest()


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder.

    Raises:
        UserError: There are no weights, or a file is missing or damaged.
    """
    index = folder / INDEX_FILE
    if index.exists():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error!r}); fetch it again.") from error
    elif (folder / WEIGHTS_FILE).exists():
        files = {WEIGHTS_FILE}
    else:
        raise UserError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; fetch one.")
    found: dict[str, Tensor] = {}
    for file in sorted(files):
        for name, tensor in _read_header(folder / file).items():
            if name in found:
                raise UserError(f"{folder / file} and {found[name].path} both hold {name}.")
            found[name] = tensor
    return found


def _read_header(path: Path) -> dict[str, Tensor]:
    """Tensors of one file: 8 bytes of header length, the header as JSON, then the values."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if entry["dtype"] not in _DTYPES:
                raise UserError(f"{path} holds {name} as {entry['dtype']}; convert it to BF16.")
            tensor = Tensor(path, begin, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            if end > size:
                raise ValueError(f"{name} ends at byte {end} of {size}")
            if end - begin != int(np.prod(tensor.shape)) * tensor.dtype.itemsize:
                raise ValueError(f"the bytes of {name} do not fit its shape")
            found[name] = tensor
        return found
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; fetch it.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is cut off or damaged ({error}); fetch it again.") from error


def _check_head(tensors: Mapping[str, Tensor], config: QwenVLConfig) -> None:
    own = {canonical_name(name): name for name in tensors}
    if not config.text.tie_word_embeddings or HEAD not in own:
        return
    head, table = tensors[own[HEAD]], tensors[own[EMBEDDING]]
    same = head.shape == table.shape and head.dtype == table.dtype
    if not same or not all(map(np.array_equal, _in_pieces(head), _in_pieces(table))):
        raise untied_head(own[HEAD])


def _in_pieces(tensor: Tensor) -> Iterator[np.ndarray]:
    count = int(np.prod(tensor.shape))
    step = _ROWS_AT_ONCE // tensor.dtype.itemsize
    for start in range(0, count, step):
        offset = tensor.offset + start * tensor.dtype.itemsize
        yield np.fromfile(tensor.path, tensor.dtype, min(step, count - start), offset=offset)


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
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}.") from error
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
