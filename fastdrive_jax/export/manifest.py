"""`config.json` of a bundle: what the model is, and what its files must contain.

The manifest lists every tensor and the size and SHA-256 of every file, and signs itself with its
own sum, so a truncated, mixed-up or edited bundle is told from a whole one before it is used.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fastdrive_jax.errors import UserError

FORMAT = "fastdrive-jax-bundle"
VERSION = 1
NAME = "config.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    Attributes:
      config: the caller's configuration of the model.
      tensors: flat name -> {"shape": [...], "dtype": "bfloat16"}.
      files: path inside the bundle -> {"bytes": size, "sha256": sum}.
      made_with: versions of the libraries that wrote it.
    """

    config: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    made_with: dict[str, str]


def file_sum(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sum of every file below a folder, by path with forward slashes."""
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_sum(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _own_sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dump(manifest: Manifest) -> str:
    """The text of `config.json`.

    Raises:
      ValueError: the configuration does not come back equal from JSON (tuples, NaN, other types).
    """
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}
    try:
        back = json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the bundle's config cannot be stored as JSON: {error}") from error
    if back != content:
        raise ValueError("the bundle's config does not come back equal from JSON; use lists, text")
    return json.dumps({**content, "sha256": _own_sum(content)}, indent=1) + "\n"


def seal(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Any]],
    packages: Sequence[str],
) -> None:
    """Write `config.json` over the files that are there; last of all: no config, no bundle.

    Args:
      folder: of the bundle.
      config: see `Manifest`.
      tensors: see `Manifest`.
      packages: whose versions are noted.
    """
    made_with = {name: metadata.version(name) for name in packages}
    text = dump(Manifest(dict(config), dict(tensors), describe_files(folder), made_with))
    (folder / NAME).write_text(text, "utf-8")


def describe_tensors(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each array, as a manifest lists them."""
    return {
        name: {"shape": list(value.shape), "dtype": np.dtype(value.dtype).name}
        for name, value in tensors.items()
    }


def is_bundle(folder: Path) -> bool:
    """Whether a folder calls itself a bundle, whole or damaged."""
    try:
        content = json.loads((folder / NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def load(folder: Path) -> Manifest:
    """Read and check `config.json`; the files it lists are checked by `check_files`.

    Raises:
      UserError: no bundle there, unreadable or edited `config.json`, or an unknown version.
    """
    path = folder / NAME
    if not folder.is_dir():
        raise UserError(f"no bundle at {folder}: there is no such folder; name that of an export")
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} is no bundle: {NAME} cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not whole JSON ({error}); export the model again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not the config of a {FORMAT}")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path} has version {content.get('version')!r}, but this release reads {VERSION}; "
            "export the model again or use the release that wrote it"
        )
    own = content.pop("sha256", None)
    if own != _own_sum(content):
        raise UserError(f"{path} was changed after it was written; export the model again")
    names = {field.name for field in dataclasses.fields(Manifest)}
    if names - content.keys():
        raise UserError(f"{path} lacks {sorted(names - content.keys())[0]!r}; export it again")
    return Manifest(**{name: content[name] for name in names})


def check_files(folder: Path, manifest: Manifest, prefix: str) -> None:
    """Compare the files below a prefix with the manifest.

    Raises:
      UserError: names the first file that is missing, truncated or changed.
    """
    for name, expected in _below(manifest.files, prefix):
        path = folder / name
        if not path.is_file():
            raise UserError(f"bundle {folder} lacks {name}; copy or export it again")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise UserError(
                f"{path} has {size} bytes instead of {expected['bytes']}: it is truncated or from "
                "another model; copy or export the bundle again"
            )
        if file_sum(path) != expected["sha256"]:
            raise UserError(
                f"{path} does not match its SHA-256: it is damaged or from another model; "
                "copy or export the bundle again"
            )


def _below(files: Mapping[str, dict], prefix: str) -> Iterable[tuple[str, dict]]:
    found = [(n, f) for n, f in files.items() if n == prefix or n.startswith(prefix + "/")]
    if not found:
        raise UserError(f"this bundle was written without {prefix}; export the model again")
    return found
