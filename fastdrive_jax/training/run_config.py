"""The config of a run as plain JSON, kept in its folder and compared on every return to it."""

import dataclasses
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fastdrive_jax.configs import to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import read_json, write_json

CONFIG_FILE = "config.json"


def differences(stored: Any, asked: Any, ignore: Collection[str] = ()) -> list[str]:
    """One phrase for each field in which two plain configs differ, with both values."""
    old, new = dict(_flat(stored)), dict(_flat(asked))
    names = sorted(old.keys() | new.keys())
    missing = object()
    return [
        f"{name} was {_show(old.get(name, missing), missing)} and is now "
        f"{_show(new.get(name, missing), missing)}"
        for name in names
        if not any(name == skip or name.startswith(skip + ".") for skip in ignore)
        and old.get(name, missing) != new.get(name, missing)
    ]


def claim_run_folder(folder: Path, config: Any, ignore: Collection[str] = ()) -> None:
    """Write the config into a new run folder, or check that it is the config of an old one.

    A field that the old one lacks counts as its default: newer code added it, and what is added
    must by default be as it was before.

    Args:
        folder: of the run; made if absent.
        config: a dataclass (or dict) of plain values.
        ignore: dotted names of fields that may change between starts, such as a flag for quiet.

    Raises:
        UserError: the folder belongs to a run of another config, is unreadable, or is no run's.
    """
    check_run_folder(folder, config, ignore)
    path = folder / CONFIG_FILE
    if not path.exists():
        write_json(path, to_plain(config))


def check_run_folder(folder: Path, config: Any, ignore: Collection[str] = ()) -> None:
    """The check of `claim_run_folder` without writing: what else is read may yet be refused."""
    path = folder / CONFIG_FILE
    if not path.exists():
        if folder.is_dir() and (folder / "checkpoints").exists():
            raise UserError(f"{folder} holds checkpoints but no {CONFIG_FILE}: use a new folder.")
        return
    # Through JSON and back, so that what is compared is what would be read.
    asked = json.loads(json.dumps(to_plain(config)))
    found = differences(_completed(read_json(path), config), asked, ignore)
    if found:
        raise UserError(
            f"{folder} holds a run of another config ({'; '.join(found)}): "
            "use a new folder, or the same settings to go on with this run."
        )


def _completed(stored: Any, config: Any) -> Any:
    """A stored config with the defaults of fields that the dataclass of today has besides."""
    if isinstance(config, dict) and isinstance(stored, dict):
        both = config.keys() & stored.keys()
        return stored | {name: _completed(stored[name], config[name]) for name in both}
    if not dataclasses.is_dataclass(config) or not isinstance(stored, dict):
        return stored
    known = {
        field.name: _completed(stored[field.name], getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name in stored
    }
    return stored | known | _defaults(config, stored.keys())


def _defaults(config: Any, besides: Collection[str]) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(config):
        if field.name in besides:
            continue
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return json.loads(json.dumps(to_plain(found)))


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, config


def _show(value: Any, missing: object) -> str:
    return "absent" if value is missing else json.dumps(value)
