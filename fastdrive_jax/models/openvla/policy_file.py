"""A small OpenVLA as one file: weights, and beside them sizes, words and the actions' ranges."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from fastdrive_jax.configs import from_plain, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.openvla.actions import ActionStatistics
from fastdrive_jax.models.openvla.config import OpenVLAConfig
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.openvla.prompt import WordPrompts
from fastdrive_jax.packaged import packaged

BUNDLED = "tiny_robot.safetensors"  # of the tabletop, see docs/robot.md
POLICY_FILE = "policy.safetensors"  # in the folder of a training
_KEY = "openvla"  # of the file's metadata


@dataclass(frozen=True)
class PolicySpec:
    """What rebuilds a policy around its weights.

    Attributes:
        model: Sizes.
        prompts: Its words.
        statistics: What its actions were scaled by.
        views: Cameras that it looks through, in order.
    """

    model: OpenVLAConfig
    prompts: WordPrompts
    statistics: ActionStatistics
    views: tuple[str, ...]


def save_policy(path: Path, params: dict, spec: PolicySpec) -> None:
    """Writes parameters as bfloat16, half the bytes of what was trained, and the spec.

    Raises:
        UserError: The file cannot be written (full disk).
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    flat = {name: np.asarray(value).astype(jnp.bfloat16) for name, value in flat.items()}
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(flat, partial, {_KEY: json.dumps(to_plain(spec))})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"The policy {path} can't be written ({error}); check the disk.") from error


def load_policy(path: Path) -> tuple[OpenVLA, dict, PolicySpec]:
    """Model, float32 parameters and spec of what `save_policy` wrote.

    Raises:
        UserError: The file is missing or unreadable, is no policy, or does not fit its own sizes.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            kept = (file.metadata() or {}).get(_KEY)
        tensors = load_file(path)
    except Exception as error:  # safetensors raises several kinds
        raise UserError(f"The policy {path} can't be read ({error}).") from error
    if kept is None:
        raise UserError(f"{path} is no robot policy; `fastdrive robot train` writes one.")
    try:
        stored = json.loads(kept)
    except ValueError as error:
        raise UserError(
            f"The policy {path} is damaged: its sizes are no JSON ({error})."
        ) from error
    spec = from_plain(PolicySpec, stored)
    model = OpenVLA(spec.model)
    wanted = traverse_util.flatten_dict(abstract_params(model), sep="/")
    odd = sorted(
        name
        for name in wanted | tensors
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape
    )
    if odd:
        raise UserError(f"The policy {path} does not fit its own sizes: {', '.join(odd[:8])}.")
    # Converted on the host: on the device each shape would be a program to compile.
    params = {name: value.astype(np.float32) for name, value in tensors.items()}
    return model, jax.device_put(traverse_util.unflatten_dict(params, sep="/")), spec


def bundled_policy() -> Path:
    """The policy file that the package carries."""
    return packaged(BUNDLED)


def example_inputs(config: OpenVLAConfig) -> dict[str, np.ndarray | None]:
    """What `OpenVLA.__call__` takes, of one sample without content."""
    edge = config.image_size
    proprio = np.zeros((1, config.proprio_dim), np.float32) if config.proprio_dim else None
    return {
        "images": np.zeros((1, config.views, edge, edge, 3), np.uint8),
        "ids": np.full((1, 2), config.bos_id, np.int32),
        "lengths": np.full(1, 2, np.int32),
        "actions": None if config.parallel else np.zeros((1, config.action_tokens), np.int32),
        "proprio": proprio,
    }


@functools.cache  # the whole model is traced
def abstract_params(model: OpenVLA) -> dict:
    """Shapes and types of the parameters, none allocated."""
    inputs = example_inputs(model.config)
    return jax.eval_shape(lambda key: model.init(key, **inputs), jax.random.key(0))["params"]
