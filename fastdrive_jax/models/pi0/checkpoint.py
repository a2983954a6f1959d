"""A pi0 checkpoint: its `config.json`, of lerobot or of openpi's PyTorch port, and its weights.

Neither lists layers and widths but by the name of a Gemma, so they are the published ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, read_json
from fastdrive_jax.models.pi0 import openpi, weights
from fastdrive_jax.models.pi0.config import PI0, Pi0Config
from fastdrive_jax.models.pi0.expert import MAX_PERIOD, MIN_PERIOD
from fastdrive_jax.models.pi0.prompt import PROMPT_TOKENS

TYPE = "pi0"  # lerobot's name of it
_EMPTY = "empty_camera"  # of a view that no robot has; it is masked, so it may as well be absent


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's config tells.

    Attributes:
        config: Sizes.
        prompt_tokens: Of a padded prompt.
        cameras: Names of the pictures in the model's order; empty where the config does not say.
        relative: Which numbers of an action are meant relative to the state; None where it does
            not say.
    """

    config: Pi0Config
    prompt_tokens: int = PROMPT_TOKENS
    cameras: tuple[str, ...] = ()
    relative: tuple[bool, ...] | None = None


def read_checkpoint(folder: Path, published: Pi0Config = PI0) -> Checkpoint:
    """What the config in a folder tells; without one all is as published.

    Args:
        folder: The checkpoint.
        published: Sizes of "gemma_2b" with "gemma_300m", and whatever else a config leaves out.

    Raises:
        UserError: The config is of another model, or asks for what is not built here.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.exists():
        return Checkpoint(published)
    content = read_json(path)
    if "type" in content:
        return _lerobot(content, published, path)
    if "action_horizon" in content:
        return _openpi(content, published, path)
    raise UserError(
        f"{path} is of model_type {content.get('model_type')!r}; a pi0 of lerobot says "
        f'"type": "{TYPE}", one of openpi its action_horizon.'
    )


def load(
    folder: Path,
    config: Pi0Config,
    mesh: Mesh | None = None,
    dtype: jnp.dtype = jnp.float32,
    progress: bool = False,
) -> dict[str, Any]:
    """Parameters of a folder with safetensors, or with openpi's own `params`.

    Args:
        folder: The checkpoint.
        config: Sizes.
        mesh: Of `make_mesh`; None takes the first device.
        dtype: Of the parameters.
        progress: Show a progress bar.

    Raises:
        UserError: See `weights.load` and `openpi.load`.
    """
    folder = Path(folder)
    safetensors = any((folder / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE))
    own = not safetensors and (folder / openpi.PARAMS).is_dir()
    return (openpi if own else weights).load(folder, config, mesh, dtype, progress)


def _openpi(content, published, path) -> Checkpoint:
    _refuse(content, _variants(), path)
    config = _sized(
        published,
        path,
        action_dim=content.get("action_dim"),
        horizon=content["action_horizon"],
    )
    return Checkpoint(config, content.get("max_token_len") or PROMPT_TOKENS)


def _lerobot(content, published, path) -> Checkpoint:
    if content["type"] != TYPE:
        raise UserError(f'{path} is of type {content["type"]!r}; only "{TYPE}" is built here.')
    edges = [published.image_size] * 2
    known = _variants() | {
        "n_obs_steps": [1],
        "min_period": [MIN_PERIOD],
        "max_period": [MAX_PERIOD],
        "image_resolution": [edges],
        "resize_imgs_with_padding": [edges],
        "adapt_to_pi_aloha": [False],
        "use_delta_joint_actions_aloha": [False],
    }
    _refuse(content, known, path)
    sizes = [content.get(f"max_{name}_dim", published.action_dim) for name in ("state", "action")]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{path} has max_state_dim={sizes[0]} and max_action_dim={sizes[1]}; one size for both "
            "is built here."
        )
    config = _sized(
        published,
        path,
        action_dim=sizes[0],
        horizon=content.get("chunk_size"),
        flow_steps=content.get("num_inference_steps", content.get("num_steps")),
    )
    features = content.get("input_features") or {}
    cameras = tuple(
        name
        for name, feature in features.items()
        if feature.get("type") == "VISUAL" and _EMPTY not in name
    )
    length = content.get("tokenizer_max_length") or PROMPT_TOKENS
    return Checkpoint(config, length, cameras, _relative(content))


def _relative(content: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """Numbers of an action by their names; those that "gripper" names usually are left out."""
    if not content.get("use_relative_actions"):
        return None
    shape = ((content.get("output_features") or {}).get("action") or {}).get("shape") or [0]
    names = [str(name).lower() for name in content.get("action_feature_names") or ()]
    left_out = [str(name).lower() for name in content.get("relative_exclude_joints") or () if name]
    found = [not any(part in name for part in left_out) for name in names[: shape[0]]]
    return (*found, *[True] * (shape[0] - len(found)))


def _variants() -> dict[str, list]:
    return {"paligemma_variant": ["gemma_2b"], "action_expert_variant": ["gemma_300m"]}


def _refuse(content, known, path) -> None:
    """Settings that would change the result without changing a shape."""
    found = [
        f"{name}={content[name]!r}"
        for name, values in known.items()
        if content.get(name) is not None and content[name] not in values
    ]
    if found:
        raise UserError(f"{path} asks for {', '.join(found)}, which is not built here.")


def _sized(published: Pi0Config, path: Path, **sizes: Any) -> Pi0Config:
    given = {name: size for name, size in sizes.items() if size is not None}
    odd = [f"{name}={size!r}" for name, size in given.items() if not isinstance(size, int)]
    if odd:
        raise UserError(f"{path} has {', '.join(odd)}, which must be whole numbers.")
    return replace(published, **given)
