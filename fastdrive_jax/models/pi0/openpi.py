"""openpi's own pi0 parameters: Orbax, and every layer of a kind in one array.

An array of many layers is read once and cut, so the host holds the largest of them (5 GB of the
published size in float32) beside what is laid out.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Mesh
from tqdm import tqdm

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import shard_value
from fastdrive_jax.models.hf_names import fit_table
from fastdrive_jax.models.pi0.config import Pi0Config
from fastdrive_jax.models.pi0.openpi_arrays import sources
from fastdrive_jax.parallel.mesh import make_mesh

PARAMS = "params"  # folder in a checkpoint, and the root of the tree in it
_VALUE = "value"  # what training writes behind every name


def load(
    folder: Path,
    config: Pi0Config,
    mesh: Mesh | None = None,
    dtype: jnp.dtype = jnp.float32,
    progress: bool = False,
) -> dict[str, Any]:
    """Parameters of a folder with `params`, as openpi's training and its downloads have it.

    Args:
        folder: The checkpoint.
        config: Sizes.
        mesh: Of `make_mesh`; None takes the first device.
        dtype: Of the parameters.
        progress: Show a progress bar.

    Raises:
        UserError: It is no Orbax checkpoint, or its arrays do not fit the sizes.
    """
    mesh = make_mesh(1, devices=jax.local_devices()[:1]) if mesh is None else mesh
    path, flat = Path(folder).resolve() / PARAMS, {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        leaves = _leaves(checkpointer, path)
        found = sources(config)
        names = _fit({name: leaf.shape for name, leaf in leaves.items()}, found, config)
        for source in tqdm(found, desc="weights", unit="array", disable=not progress):
            wanted = {names[name]: leaves[names[name]] for name in source.shapes}
            arrays = _read(checkpointer, path, wanted)
            for place, cut in source.parts.items():
                value = cut(*arrays)
                if place[-1] == "scale" and place[0] != "vision_tower":
                    value = value.astype(np.float32) + 1  # Gemma's are kept as what differs from 1
                flat[place] = shard_value(value.astype(dtype), place, mesh)
    return traverse_util.unflatten_dict(flat)


def _leaves(checkpointer, path) -> dict[str, Any]:
    """Metadata of every array by its name with slashes."""
    try:
        metadata = checkpointer.metadata(path)
        tree = metadata.item_metadata.tree[PARAMS]
    except Exception as error:  # Orbax raises several kinds
        raise UserError(
            f"{path} is no checkpoint of openpi's ({type(error).__name__}: {error}); fetch it anew."
        ) from error
    return traverse_util.flatten_dict(tree, sep="/")


def _canonical(name: str) -> str:
    return name.removesuffix(f"/{_VALUE}")


def _fit(shapes, found, config) -> dict[str, str]:
    """Our names of arrays to those on file.

    Raises:
        UserError: See `fit_table`.
    """
    table = {name: ((name,), shape) for one in found for name, shape in one.shapes.items()}
    places = fit_table(
        shapes,
        table,
        [(name,) for name in table],
        f"a pi0 of {config.vision.depth} vision blocks and {config.prefix.num_layers} decoder "
        "layers",
        _canonical,
    )
    return {ours: name for name, (ours,) in places.items()}


def _read(checkpointer, path, leaves) -> list[np.ndarray]:
    """Arrays of some names, in that order."""
    item = {PARAMS: traverse_util.unflatten_dict(leaves, sep="/")}
    how = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(restore_type=np.ndarray), item)
    given = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    try:
        tree = checkpointer.restore(path, given)
    except Exception as error:  # Orbax raises several kinds
        raise UserError(f"{path} can't be read ({error}); fetch it again.") from error
    read = traverse_util.flatten_dict(tree[PARAMS], sep="/")
    return [np.asarray(read[name]) for name in leaves]
