"""A pruner alone as a bundle, which `torch_pruner` loads as well."""

from pathlib import Path
from typing import Literal

from fastdrive_jax.configs import from_plain, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import read_bundle, write_bundle
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig

KIND = "pruner"
TORCH_MODULE = Path(__file__).with_name("torch_pruner.py")  # to copy; importing it needs torch


def write_pruner(folder: Path, params: dict, pruner: ReconPrunerConfig) -> Path:
    """Writes the tree of a ReconPruner under "pruner" with its config; see `write_bundle`.

    Raises:
        UserError: The folder cannot be written.
    """
    return write_bundle(folder, {"pruner": params}, {"kind": KIND, "pruner": to_plain(pruner)})


def read_pruner(
    folder: Path, form: Literal["safetensors", "orbax"] = "safetensors"
) -> tuple[ReconPrunerConfig, dict]:
    """Config and tree of the ReconPruner of any bundle that holds one.

    Raises:
        UserError: It is no whole bundle, or one without a pruner, or whose pruner was rounded.
    """
    params, config = read_bundle(folder, form)
    if "pruner" not in params or "pruner" not in config:
        raise UserError(f"{folder} holds a {config.get('kind')!r}, without a pruner.")
    if "weights" in config:
        raise UserError(
            f"{folder} holds a {config['kind']!r}, whose weights were rounded to "
            f"{config['weights']}; give the bundle or the run that it was exported from."
        )
    return from_plain(ReconPrunerConfig, config["pruner"]), params["pruner"]
