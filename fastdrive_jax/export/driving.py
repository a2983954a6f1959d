"""A pruned driving model as a bundle: VLA, ReconPruner and what rebuilds both."""

from pathlib import Path
from typing import Literal

from fastdrive_jax.configs import from_plain, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import read_bundle, write_bundle
from fastdrive_jax.inference.policy import DrivingPolicy
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, DrivingVLA
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig, recon_pruner
from fastdrive_jax.pruning.select import num_keep

KIND = "driving policy"


def write_policy(
    folder: Path,
    params: dict,
    vla: DrivingConfig,
    pruner: ReconPrunerConfig,
    keep_ratio: float,
) -> Path:
    """Writes {"vla": ..., "pruner": ...} with its config; see `write_bundle`.

    Raises:
        UserError: The ratio is outside (0, 1], or the folder cannot be written.
    """
    num_keep(vla.visual_tokens, keep_ratio)
    config = {
        "kind": KIND,
        "keep_ratio": keep_ratio,
        "vla": to_plain(vla),
        "pruner": to_plain(pruner),
    }
    return write_bundle(folder, {name: params[name] for name in ("vla", "pruner")}, config)


def read_policy(
    folder: Path, form: Literal["safetensors", "orbax"] = "safetensors"
) -> tuple[DrivingPolicy, dict]:
    """The policy of a bundle and its params, ready for `inference.policy.plan`.

    Raises:
        UserError: It is no whole bundle, or one of another kind.
    """
    params, config = read_bundle(folder, form)
    if config.get("kind") != KIND:
        raise UserError(f"{folder} holds a {config.get('kind')!r}, not a {KIND}.")
    return stored_policy(config), params


def stored_policy(config: dict) -> DrivingPolicy:
    """The policy that a bundle's config describes."""
    model = DrivingVLA(from_plain(DrivingConfig, config["vla"]))
    pruner = recon_pruner(from_plain(ReconPrunerConfig, config["pruner"]))
    return DrivingPolicy(model, pruner, config["keep_ratio"])
