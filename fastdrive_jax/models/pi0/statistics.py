"""Where a pi0 checkpoint keeps what its states and actions were scaled by.

openpi writes `assets/ASSET_ID/norm_stats.json` beside the weights. lerobot writes the steps of its
pre- and postprocessor as JSON with a safetensors file each, and did write buffers into
`model.safetensors`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import CONFIG_FILE, WEIGHTS_FILE, list_tensors, read_json
from fastdrive_jax.models.pi0.scaling import (
    LEROBOT_EPS,
    OPENPI_EPS,
    RobotStatistics,
    Scaling,
    by_deviation,
    by_range,
    unscaled,
)

ASSETS, STATISTICS_FILE = "assets", "norm_stats.json"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ACTION = "observation.state", "action"  # lerobot's names
_MODES = {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}  # of a pi0 whose config does not say
_RANGES = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
_BUFFERS = {
    STATE: "normalize_inputs.buffer_observation_state.",
    ACTION: "unnormalize_outputs.buffer_action.",
}

Found = Mapping[str, Any]  # "mean", "std", ... of one feature


def read_statistics(folder: Path, asset_id: str | None = None) -> RobotStatistics:
    """What the states and actions of a checkpoint were scaled by.

    Args:
        folder: The checkpoint.
        asset_id: Which of openpi's assets; None takes the only one.

    Raises:
        UserError: There are none, or not these, or they lack what the scaling needs.
    """
    folder = Path(folder)
    if asset_id is not None or (folder / ASSETS).is_dir():
        return _openpi(folder, asset_id)
    if (folder / PREPROCESSOR).exists():
        return RobotStatistics(
            _step(folder / PREPROCESSOR, "normalizer_processor", STATE, "STATE"),
            _step(folder / POSTPROCESSOR, "unnormalizer_processor", ACTION, "ACTION"),
        )
    if found := _buffers(folder):
        return found
    raise UserError(
        f"{folder} holds no statistics of states and actions; it needs openpi's "
        f"{ASSETS}/ASSET_ID/{STATISTICS_FILE}, or lerobot's {PREPROCESSOR} and {POSTPROCESSOR} "
        "with their safetensors."
    )


def asset_ids(folder: Path) -> list[str]:
    """Names of openpi's assets that have statistics; a name may have slashes."""
    root = Path(folder) / ASSETS
    return sorted(path.parent.relative_to(root).as_posix() for path in root.rglob(STATISTICS_FILE))


def _openpi(folder, asset_id) -> RobotStatistics:
    known = asset_ids(folder)
    if asset_id is None and len(known) == 1:
        asset_id = known[0]
    if asset_id not in known:
        said = "" if asset_id is None else f" under the asset id {asset_id!r}"
        there = f"choose the asset id from {', '.join(known)}" if known else "there are none"
        raise UserError(f"{folder / ASSETS} holds no {STATISTICS_FILE}{said}: {there}.")
    path = folder / ASSETS / asset_id / STATISTICS_FILE
    content = read_json(path).get("norm_stats")
    scalings = []
    for name in ("state", "actions"):
        found = content.get(name) if isinstance(content, Mapping) else None
        if not isinstance(found, Mapping):
            raise UserError(f"{path} holds no norm_stats of {name}.")
        mean, std = _numbers(found, ("mean", "std"), name, path)
        scalings.append(by_deviation(mean, std, OPENPI_EPS, OPENPI_EPS))
    return RobotStatistics(*scalings)


def _step(path, registered, feature, kind) -> Scaling:
    """Of one of the features that a step of a processor scales."""
    steps = read_json(path).get("steps")
    for step in steps if isinstance(steps, list) else ():
        if step.get("registry_name") != registered:
            continue
        settings, file = step.get("config") or {}, step.get("state_file")
        if file is None:
            raise UserError(f"{path} names no state_file with the statistics of {feature}.")
        mode = (settings.get("norm_map") or _MODES).get(kind, "IDENTITY")
        shape = ((settings.get("features") or {}).get(feature) or {}).get("shape")
        found = _read_state(path.parent / file, f"{feature}.")
        return _lerobot(found, mode, feature, path.parent / file, settings, shape)
    raise UserError(f"{path} has no step {registered}, which would scale {feature}.")


def _read_state(path, prefix) -> dict[str, np.ndarray]:
    if not path.exists():
        raise UserError(f"{path} is missing; fetch it with the checkpoint.")
    try:
        with safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except Exception as error:  # safetensors raises several kinds
        raise UserError(f"{path} can't be read ({error}); fetch it again.") from error


def _buffers(folder) -> RobotStatistics | None:
    """Of a checkpoint of lerobot from before it had processors."""
    if not (folder / WEIGHTS_FILE).exists():
        return None
    tensors = list_tensors(folder)
    config = folder / CONFIG_FILE
    modes = read_json(config).get("normalization_mapping") if config.exists() else None
    scalings = []
    for feature, kind in ((STATE, "STATE"), (ACTION, "ACTION")):
        prefix = _BUFFERS[feature]
        names = [name for name in tensors if name.startswith(prefix)]
        if not names:
            return None
        found = {name.removeprefix(prefix): tensors[name].read() for name in names}
        mode = (modes or _MODES).get(kind, "IDENTITY")
        scalings.append(_lerobot(found, mode, feature, folder / WEIGHTS_FILE, {}, None))
    return RobotStatistics(*scalings)


def _lerobot(found, mode, feature, path, settings, shape) -> Scaling:
    eps = settings.get("eps", LEROBOT_EPS)
    if mode == "IDENTITY" and shape:
        return unscaled(shape[0])
    if mode in _RANGES:
        return by_range(*_numbers(found, _RANGES[mode], feature, path), eps)
    if mode == "MEAN_STD":
        return by_deviation(*_numbers(found, ("mean", "std"), feature, path), eps, 0.0)
    raise UserError(f"{path} scales {feature} by {mode}, which is not built here.")


def _numbers(found: Found, names, feature, path) -> list[tuple[float, ...]]:
    """Lists of one length, and finite."""
    try:
        lists = [np.asarray(found[name], np.float64) for name in names]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no {' and '.join(names)} of {feature}.") from error
    if any(one.ndim != 1 or one.shape != lists[0].shape for one in lists):
        shapes = " and ".join(str(one.shape) for one in lists)
        raise UserError(f"{path} holds {' and '.join(names)} of {feature} in shapes {shapes}.")
    if not all(np.isfinite(one).all() for one in lists):
        raise UserError(
            f"{path} holds numbers of {feature} that are not finite: a model without statistics of "
            "its own; take one that was fine-tuned."
        )
    return [tuple(one.tolist()) for one in lists]
