"""The folder of a Hugging Face checkpoint: JSON files, and tensors that are read one at a time.

Each tensor goes straight into its shards, so the host never holds two copies of a model.
"""

import hashlib
import json
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from tokenizers import Tokenizer
from tqdm import tqdm

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_names import to_linen
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.parallel.rules import parameter_sharding

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"
_DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": jnp.dtype("bfloat16")}
_SAMPLE = 1 << 12  # bytes at each end of a tensor that its digest covers
_ROWS_AT_ONCE = 1 << 24  # bytes of a table that are compared at once


class Readable(Protocol):
    """A tensor that can be read when it is its turn."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        ...

    def read(self) -> np.ndarray:
        """Its values."""
        ...


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

    def pieces(self) -> Iterator[np.ndarray]:
        """Its values in order, some megabytes at a time."""
        count = int(np.prod(self.shape))
        step = _ROWS_AT_ONCE // self.dtype.itemsize
        for start in range(0, count, step):
            offset = self.offset + start * self.dtype.itemsize
            yield np.fromfile(self.path, self.dtype, min(step, count - start), offset=offset)

    def ends(self) -> Iterator[bytes]:
        """The first and the last of its bytes."""
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        with self.path.open("rb") as file:
            for start in (0, max(size - _SAMPLE, 0)):
                file.seek(self.offset + start)
                yield file.read(min(size, _SAMPLE))


def load_shards(
    tensors: Mapping[str, Readable],
    places: Mapping[str, tuple[str, ...]],
    mesh: Mesh | None = None,
    dtype: jnp.dtype | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Parameters read from tensors, laid out over a mesh by `parallel.rules`.

    Args:
        tensors: By name.
        places: Of those that are read, by name: where each stands among the parameters.
        mesh: Of `make_mesh`; None takes the first device.
        dtype: Of the parameters; None keeps each tensor's own.
        progress: Show a progress bar.
    """
    mesh = make_mesh(1, devices=jax.local_devices()[:1]) if mesh is None else mesh
    flat = {}
    for name in tqdm(sorted(places), desc="weights", unit="tensor", disable=not progress):
        place = places[name]
        value = to_linen(tensors[name].read(), place)
        flat[place] = shard_value(value if dtype is None else value.astype(dtype), place, mesh)
    return traverse_util.unflatten_dict(flat)


def shard_value(value: np.ndarray, place: tuple[str, ...], mesh: Mesh) -> jax.Array:
    """A parameter laid out over a mesh by `parallel.rules`, no longer needed on the host."""
    sharding = parameter_sharding(place, value.shape, mesh)
    laid = jax.make_array_from_callback(
        value.shape, sharding, lambda index: np.ascontiguousarray(value[index])
    )
    return laid.block_until_ready()  # else many tensors wait on the host for their transfer


def tensors_digest(config: Any, tensors: Mapping[str, Tensor], names: Collection[str]) -> str:
    """Tells checkpoints apart without reading them whole.

    It covers the sizes and, of each tensor, name, shape, type, and both ends of its values.

    Args:
        config: The sizes, whose text counts.
        tensors: By name.
        names: Of those that count.
    """
    digest = hashlib.sha256(repr(config).encode())
    for name in sorted(names):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        for part in tensor.ends():
            digest.update(part)
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
        for name, tensor in read_header(folder / file).items():
            if name in found:
                raise UserError(f"{folder / file} and {found[name].path} both hold {name}.")
            found[name] = tensor
    return found


def read_header(path: Path) -> dict[str, Tensor]:
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in one of a checkpoint's JSON files.

    Raises:
        UserError: There is no such file, or no object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} holds no {path.name}; give the folder of a checkpoint."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; take the checkpoint's own file.")
    return content


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a checkpoint's folder, which neither cuts nor fills up.

    transformers writes the length that training cut and padded texts to into the file.

    Raises:
        UserError: There is none, or it is damaged.
    """
    path = folder / TOKENIZER_FILE
    if not path.exists():
        raise UserError(f"{folder} holds no {TOKENIZER_FILE}; fetch the checkpoint's own.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{path} cannot be read: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
