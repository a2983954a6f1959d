"""A pruned driving model as a bundle, VLA, ReconPruner and what rebuilds both, and as a program."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from fastdrive_jax.configs import from_plain, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import read_bundle, write_bundle
from fastdrive_jax.export.programs import Program
from fastdrive_jax.inference.policy import DrivingPolicy, plan
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, DrivingVLA
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig, recon_pruner
from fastdrive_jax.pruning.select import num_keep

KIND = "driving policy"
PROGRAMS = "driving policy programs"


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


def driving_program(policy: DrivingPolicy) -> Program:
    """The policy for `write_programs`; its own keep ratio is not used.

    Args:
        policy: Of a method without memory and draws.

    Raises:
        ValueError: The method needs more than pictures, speed and command.
    """
    if policy.pruner.temporal is not None or "key" in policy.pruner.needs:
        raise ValueError(f"{policy.pruner.name} needs a state or a key, which no program takes")
    config = policy.model.config

    def run(keep_ratio, params, images, speed, command):
        planned = plan(replace(policy, keep_ratio=keep_ratio), params, images, speed, command)
        return {"waypoints": planned.waypoints, "keep_indices": planned.keep_indices}

    pictures = (len(config.cameras), *config.image_size, 3)
    return Program(
        kind=PROGRAMS,
        run=run,
        inputs={
            "images": jax.ShapeDtypeStruct(pictures, jnp.uint8),
            "speed": jax.ShapeDtypeStruct((), jnp.float32),
            "command": jax.ShapeDtypeStruct((), jnp.int32),
        },
        outputs={
            "waypoints": ["batch", config.vocabulary.steps, 2],
            "keep_indices": ["batch", "kept"],
        },
        budget=lambda ratio: policy.pruner.budget(config.visual_tokens, ratio),
        model={"vla": to_plain(config)},
    )
