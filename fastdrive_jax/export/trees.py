"""Nested parameters <-> flat names such as "pruner/layer/attention/query/kernel"."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

SEPARATOR = "/"


def flatten(tree: Mapping[str, Any]) -> dict[str, jax.Array | np.ndarray]:
    """Flat dict of a nested dict of arrays, sorted by name.

    Raises:
      ValueError: a key is not a plain string without "/", a branch is empty (it would be lost), or
        a leaf is not an array. Boxed Linen parameters must be unboxed first.
    """
    flat: dict[str, Any] = {}
    _collect(tree, "", flat)
    return dict(sorted(flat.items()))


def _collect(tree: Mapping[str, Any], prefix: str, flat: dict[str, Any]) -> None:
    if not tree:
        raise ValueError(f"branch {prefix or 'root'!r} is empty and would be lost")
    for key, value in tree.items():
        if not isinstance(key, str) or not key or SEPARATOR in key:
            raise ValueError(f"key {key!r} under {prefix or 'root'!r} must be text without '/'")
        name = f"{prefix}{SEPARATOR}{key}" if prefix else key
        if isinstance(value, Mapping):
            _collect(value, name, flat)
        elif isinstance(value, (jax.Array, np.ndarray)):
            flat[name] = value
        else:
            raise ValueError(f"{name} is a {type(value).__name__}, not an array")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict of a flat one; the inverse of `flatten`.

    Raises:
      ValueError: one name is both a leaf and a branch.
    """
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *branches, leaf = name.split(SEPARATOR)
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name} passes through a leaf")
        if leaf in node:
            raise ValueError(f"{name} is given twice, or as leaf and branch")
        node[leaf] = value
    return tree
