"""A pruned model as one folder: config, safetensors for other tools, Orbax for JAX.

    OUT/config.json          what it is, every tensor, the SHA-256 of every file
    OUT/model.safetensors    flat names such as "pruner/layer/attention/query/kernel"
    OUT/orbax/               the same tree, readable onto any mesh

Both forms hold the same bits. The folder is written beside its place and renamed into it, so it is
whole or absent.
"""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
from flax.traverse_util import flatten_dict
from safetensors import flax as safetensors_flax
from safetensors import numpy as safetensors_numpy

from fastdrive_jax.errors import UserError
from fastdrive_jax.export import manifest as manifests
from fastdrive_jax.export.folder import write_folder
from fastdrive_jax.export.manifest import Manifest
from fastdrive_jax.export.trees import SEPARATOR, flatten, unflatten

SAFETENSORS = "model.safetensors"
ORBAX = "orbax"
_PACKAGES = ("fastdrive-jax", "jax", "flax", "orbax-checkpoint", "safetensors")

Params = dict[str, Any]
ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def write_bundle(
    out_dir: str | Path,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    beside: Mapping[str, Sequence[Path]] | None = None,
) -> Path:
    """Write a model as a bundle, atomically as a whole folder.

    Args:
      out_dir: the folder to make. An empty folder or an earlier bundle there is replaced.
      params: named trees of arrays, such as {"pruner": ..., "vla": ...}; nested dicts, unboxed.
        Every dtype is kept, bfloat16 included; 64-bit and zero-size arrays are refused, since JAX
        would narrow the first on reading and Orbax cannot hold the second.
      config: what rebuilds the model; JSON only, and it must come back equal (lists, not tuples).
      beside: files to copy, by the folder within the bundle that they go to.

    Returns:
      The folder.

    Raises:
      UserError: the place is taken by something else, or cannot be written (full disk).
      ValueError: parameters or config that a bundle cannot hold.
    """
    tensors = {name: np.asarray(value) for name, value in flatten(params).items()}
    for name, value in tensors.items():
        if value.size == 0 or value.dtype.itemsize > 4:
            raise ValueError(f"{name} is {value.dtype} {value.shape}; a bundle cannot keep that")
    size = 2 * sum(value.nbytes for value in tensors.values())
    fill = functools.partial(_fill, tensors=tensors, config=config, beside=beside or {})
    return write_folder(out_dir, size, fill)


def _fill(
    folder: Path,
    tensors: dict[str, np.ndarray],
    config: Mapping[str, Any],
    beside: Mapping[str, Sequence[Path]],
) -> None:
    shapes = manifests.describe_tensors(tensors)
    manifests.dump(Manifest(dict(config), shapes, {}, {}))  # refuse a bad config before the work
    for name, paths in beside.items():
        (folder / name).mkdir()
        for path in paths:
            shutil.copyfile(path, folder / name / path.name)
    # straight to disk: `save` would hold a second copy of the model in memory
    safetensors_flax.save_file(tensors, folder / SAFETENSORS, metadata={"format": manifests.FORMAT})
    here = jax.process_index()  # one host of a job writes, and does not wait for the others
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix="bundle"
    )
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        checkpointer.save(folder / ORBAX, unflatten(tensors))
    manifests.seal(folder, config, shapes, _PACKAGES)


def read_bundle(
    folder: str | Path, form: Literal["safetensors", "orbax"] = "safetensors"
) -> tuple[Params, dict[str, Any]]:
    """Either form of a bundle, on the default device; see the two functions below."""
    return (read_bundle_safetensors if form == "safetensors" else read_bundle_orbax)(folder)


def read_bundle_safetensors(folder: str | Path) -> tuple[Params, dict[str, Any]]:
    """Read a bundle's safetensors onto the default device.

    Returns:
      (params, config) as they were written, bit for bit.

    Raises:
      UserError: there is no whole bundle, its version is unknown, or a file does not match.
    """
    folder = Path(folder).resolve()
    manifest = manifests.load(folder)
    manifests.check_files(folder, manifest, SAFETENSORS)
    try:
        flat = jax.device_put(safetensors_numpy.load_file(folder / SAFETENSORS))
    except safetensors.SafetensorError as error:
        raise UserError(f"{folder / SAFETENSORS} cannot be read ({error})") from error
    _check_tensors(folder / SAFETENSORS, flat, manifest)
    return unflatten(flat), manifest.config


def read_bundle_orbax(
    folder: str | Path, sharding: ShardingOf | jax.sharding.Sharding | None = None
) -> tuple[Params, dict[str, Any]]:
    """Read a bundle's Orbax checkpoint onto the devices at hand, whatever mesh wrote it.

    Args:
      folder: the bundle.
      sharding: where arrays go: one sharding for all, or a function of flat name and shape; the
        first local device if None.

    Returns:
      (params, config) as they were written, bit for bit.

    Raises:
      UserError: there is no whole bundle, its version is unknown, or a file does not match.
    """
    folder = Path(folder).resolve()
    manifest = manifests.load(folder)
    manifests.check_files(folder, manifest, ORBAX)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {}
    for name, tensor in manifest.tensors.items():
        shape = tuple(tensor["shape"])
        place = sharding if isinstance(sharding, jax.sharding.Sharding) else sharding(name, shape)
        targets[name] = jax.ShapeDtypeStruct(shape, np.dtype(tensor["dtype"]), sharding=place)
    here = jax.process_index()  # one host of a job writes, and does not wait for the others
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix="bundle"
    )
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        stored = checkpointer.metadata(folder / ORBAX).item_metadata.tree
        # before restoring: Orbax casts to the dtype it is asked for without a word
        _check_tensors(folder / ORBAX, flatten_dict(stored, sep=SEPARATOR), manifest)
        params = checkpointer.restore(folder / ORBAX, unflatten(targets))
    return params, manifest.config


def _check_tensors(path: Path, flat: Mapping[str, Any], manifest: Manifest) -> None:
    found = manifests.describe_tensors(flat)
    if found == manifest.tensors:
        return
    wrong = sorted(
        name
        for name in found.keys() | manifest.tensors.keys()
        if found.get(name) != manifest.tensors.get(name)
    )
    raise UserError(
        f"{path} does not hold the tensors its config lists; the first that differs is {wrong[0]}"
    )
