"""Robot actions as token ids and back, and the statistics that scale them.

The published intervals are uneven in one way: 256 edges in [-1, 1] make 255 intervals, and the
256th id, of the number 1 alone, is read as the last of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import CONFIG_FILE, read_json
from fastdrive_jax.models.openvla.config import OpenVLAConfig

STATISTICS_FILE = "dataset_statistics.json"  # of fine-tuned models; it goes before config.json's
Ends = Literal["percentiles", "extremes"]
_ENDS = {"percentiles": ("q01", "q99"), "extremes": ("min", "max")}
_EPS = 1e-8  # added to the range of a number, as in training


def bin_edges(bins: int) -> Float[np.ndarray, " bins"]:
    """Edges in [-1, 1] as the smallest float32 that is not below the float64 edge.

    So a float32 is on the same side of both.
    """
    edges = np.linspace(-1, 1, bins)
    rounded = edges.astype(np.float32)
    return np.where(rounded < edges, np.nextafter(rounded, np.float32(2)), rounded)


def bin_centres(bins: int) -> Float[np.ndarray, " bins-1"]:
    """Middles of the intervals, float32."""
    edges = np.linspace(-1, 1, bins)
    return ((edges[:-1] + edges[1:]) / 2).astype(np.float32)


def encode_actions(actions: Float[Array, "... A"], config: OpenVLAConfig) -> Int[Array, "... A"]:
    """Token ids of normalised actions; what lies outside [-1, 1] counts as the end of it."""
    edges = jnp.asarray(bin_edges(config.bins))
    clipped = jnp.clip(actions.astype(jnp.float32), -1, 1)
    bins = jnp.searchsorted(edges, clipped, side="right")
    return (config.action_vocab_size - bins).astype(jnp.int32)


def decode_actions(ids: Int[Array, "... A"], config: OpenVLAConfig) -> Float[Array, "... A"]:
    """Normalised actions of token ids; other ids count as the nearest that is an action's."""
    centres = jnp.asarray(bin_centres(config.bins))
    return centres[jnp.clip(config.action_vocab_size - ids - 1, 0, config.bins - 2)]


@dataclass(frozen=True)
class Bounds:
    """What the numbers of an action, or of a robot's state, were scaled by.

    Attributes:
        low: First percentile in the training data; it becomes -1.
        high: Last percentile; it becomes 1.
        mask: Which are scaled at all; a gripper's is not.
        unused: Which never change in the training data; these are 0.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]
    unused: tuple[bool, ...]


@dataclass(frozen=True)
class ActionStatistics:
    """Of one data set.

    Attributes:
        action: Of its actions.
        proprio: Of the robot's states; None where the file has none.
    """

    action: Bounds
    proprio: Bounds | None = None


def normalise(values: Float[Array, "... A"], bounds: Bounds) -> Float[Array, "... A"]:
    """Percentiles to [-1, 1], what lies outside clipped."""
    low, high, mask = _arrays(bounds)
    scaled = jnp.clip(2 * (values - low) / (high - low + _EPS) - 1, -1, 1)
    return jnp.where(jnp.asarray(bounds.unused), 0, jnp.where(mask, scaled, values))


def normalise_proprio(values: Float[Array, "... P"], bounds: Bounds) -> Float[Array, "... P"]:
    """The same of a robot's state as OFT is shown it: all of it clipped, nothing set to 0."""
    low, high, mask = _arrays(bounds)
    scaled = 2 * (values - low) / (high - low + _EPS) - 1
    return jnp.clip(jnp.where(mask, scaled, values), -1, 1)


def unnormalise(values: Float[Array, "... A"], bounds: Bounds) -> Float[Array, "... A"]:
    """Normalised actions to the robot's units."""
    low, high, mask = _arrays(bounds)
    return jnp.where(mask, 0.5 * (values + 1) * (high - low) + low, values)


def _arrays(bounds: Bounds) -> tuple[Float[Array, " A"], Float[Array, " A"], Bool[Array, " A"]]:
    low, high = (jnp.asarray(values, jnp.float32) for values in (bounds.low, bounds.high))
    return low, high, jnp.asarray(bounds.mask)


def read_statistics(
    checkpoint_dir: Path, key: str | None = None, ends: Ends = "percentiles"
) -> ActionStatistics:
    """The statistics of one of the data sets that a checkpoint was trained on.

    Args:
        checkpoint_dir: Holds `dataset_statistics.json` or, under `norm_stats`, `config.json`.
        key: Of the data set; None takes the only one.
        ends: What became -1 and 1 in training, which no file says: first and last percentile, or
            least and greatest, as in OFT's models for ALOHA.

    Raises:
        UserError: There are none, or none of that key, or it lacks its ends.
    """
    folder = Path(checkpoint_dir)
    found, path = stored_statistics(folder)
    if not isinstance(found, Mapping) or not found:
        raise UserError(
            f"{folder} holds no action statistics; it needs {STATISTICS_FILE}, or norm_stats in "
            f"{CONFIG_FILE}."
        )
    return statistics_of(found, key, path, ends)


def stored_statistics(folder: Path) -> tuple[Any, Path]:
    """What a checkpoint holds of all its data sets, None if nothing, and the file it is in."""
    path = folder / STATISTICS_FILE
    if path.exists():
        return read_json(path), path
    path = folder / CONFIG_FILE
    return read_json(path).get("norm_stats") if path.exists() else None, path


def statistics_of(
    found: Mapping[str, Any],
    key: str | None,
    path: Path | str = STATISTICS_FILE,
    ends: Ends = "percentiles",
) -> ActionStatistics:
    """The statistics under a key of a parsed file; see `read_statistics`."""
    if key is None and len(found) == 1:
        key = next(iter(found))
    if key not in found:
        said = "None was chosen" if key is None else f"There is none called {key!r}"
        raise UserError(
            f"{path} holds the action statistics of {len(found)} data sets: {said}; choose one of "
            f"{', '.join(sorted(found))}."
        )
    one = found[key]
    action = _bounds(one.get("action"), f"{key}.action", path, ends)
    if action is None:
        raise UserError(f"{path} holds no action statistics under {key}.")
    return ActionStatistics(action, _bounds(one.get("proprio"), f"{key}.proprio", path, ends))


def _bounds(
    entry: Mapping[str, Any] | None, name: str, path: Path | str, ends: Ends
) -> Bounds | None:
    if entry is None:
        return None
    try:
        low, high = (tuple(map(float, entry[part])) for part in _ENDS[ends])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} holds no {ends} {' and '.join(_ENDS[ends])} under {name}."
        ) from error
    mask = tuple(map(bool, entry.get("mask", [True] * len(low))))
    range_ = entry.get("min", [0] * len(low)), entry.get("max", [1] * len(low))
    unused = tuple(least == most for least, most in zip(*range_, strict=False))
    if not len(low) == len(high) == len(mask) == len(unused):
        raise UserError(f"{path} holds lists of different lengths under {name}.")
    return Bounds(low, high, mask, unused)
