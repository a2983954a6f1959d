"""Frozen config dataclasses to plain JSON values and back."""

import dataclasses
import json
import types
import typing
from typing import Any, TypeVar

from fastdrive_jax.errors import UserError

Config = TypeVar("Config")


def to_plain(config: Any) -> dict:
    """A dataclass as nested dicts and lists, as JSON would give them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_plain(cls: type[Config], plain: dict) -> Config:
    """The dataclass `cls` from what `to_plain` made of it.

    Raises:
        UserError: Fields are missing or unknown, or the class refuses their values.
    """
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(plain, dict) or set(plain) != names:
        odd = sorted(set(plain) ^ names) if isinstance(plain, dict) else [repr(plain)]
        raise UserError(f"The config of a {cls.__name__} has missing or unknown: {', '.join(odd)}.")
    return cls(**{name: _value(hints[name], value) for name, value in plain.items()})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [h for h in typing.get_args(hint) if h is not type(None)]
        return None if value is None else _value(inner[0], value)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        parts = typing.get_args(hint)
        if len(parts) == 2 and parts[1] is Ellipsis:
            return tuple(_value(parts[0], one) for one in value)
        return tuple(value)
    return value
