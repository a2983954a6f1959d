"""Frozen config dataclasses: to plain JSON values and back, and what many refuse."""

import dataclasses
import enum
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from fastdrive_jax.errors import UserError

Config = TypeVar("Config")


def to_plain(config: Any) -> Any:
    """Dataclasses, enums, paths, tuples and numpy scalars as what JSON can hold.

    Raises:
        ValueError: a value has no such form.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = dataclasses.fields(config)
        return {field.name: to_plain(getattr(config, field.name)) for field in fields}
    if isinstance(config, dict):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_plain(value) for value in config]
    if isinstance(config, enum.Enum):
        return config.name
    if isinstance(config, Path):
        return config.as_posix()
    if config is None or isinstance(config, bool | int | float | str):
        return config
    if hasattr(config, "item") and getattr(config, "ndim", None) == 0:
        return config.item()
    raise ValueError(f"a config may not hold a {type(config).__name__}: {config!r}")


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


def check_least(config: Any, **least: float) -> None:
    """Refuses fields that are below what they must be at least; None is not asked.

    Args:
        config: A dataclass, in its `__post_init__`.
        least: By the field's name.

    Raises:
        UserError: Names the first such field and its value.
    """
    for name, value in least.items():
        given = getattr(config, name)
        if given is not None and given < value:
            raise UserError(f"{name}={given} must be at least {value}.")


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
