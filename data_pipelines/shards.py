"""Finished data sets of ArrayRecord shards: opened with checks, read at random. See `build`."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.schema import Classes, classes_from_dict
from fastdrive_jax.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 2
DATASET = "driving_shards"  # TFDS's name of it, which begins the files' names
VERSION = "1.0.0"


@dataclass(frozen=True)
class Shards:
    """A finished data set on disk.

    Attributes:
        path: Its folder.
        name: Name of the source it was made from.
        classes: Class metadata.
        cameras: Channels of every sample, in record order.
        scenes: Drive names; a batch's `scene` indexes this tuple.
        samples: Samples of each split; records are `len(cameras)` times as many.
        image_size: Height and width of the first picture.
        digest: sha256 over the shards' checksums: equal digests mean equal records.
    """

    path: Path
    name: str
    classes: Classes
    cameras: tuple[str, ...]
    scenes: tuple[str, ...]
    samples: dict[str, int]
    image_size: tuple[int, int]
    digest: str

    def records(self, split: str) -> int:
        """Number of records (pictures) in `split`."""
        return self.samples[split] * len(self.cameras)


def open_shards(path: Path, verify: bool = False) -> Shards:
    """Opens a finished data set after checking that all of it is there.

    Args:
        path: Folder that `build_shards` made.
        verify: Also read every shard and compare its sha256 (about a second for each GB).

    Raises:
        UserError: The folder is no whole data set, or a shard is missing, cut short or corrupt.
    """
    path = Path(path)
    manifest_path = path / MANIFEST
    again = "build the shards again"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} has no {MANIFEST}, so it is no whole data set; {again}."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{manifest_path} cannot be read ({error}); {again}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{manifest_path} is not of format {FORMAT}; {again}.")
    for name in ("features.json", "dataset_info.json"):
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing; {again}.")
    try:
        for name, shard in manifest["shards"].items():
            _check_shard(path / name, shard, verify, again)
        sums = "".join(shard["sha256"] for _, shard in sorted(manifest["shards"].items()))
        return Shards(
            path=path,
            name=manifest["source"],
            classes=classes_from_dict(manifest["classes"], manifest_path),
            cameras=tuple(manifest["cameras"]),
            scenes=tuple(manifest["scenes"]),
            samples=dict(manifest["samples"]),
            image_size=tuple(manifest["image_size"]),
            digest=hashlib.sha256(sums.encode()).hexdigest(),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest_path} is incomplete ({error!r}); {again}.") from error


def _check_shard(path: Path, shard: dict, verify: bool, again: str) -> None:
    if not path.is_file():
        raise UserError(f"Shard {path} is missing; {again}.")
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise UserError(f"Shard {path} has {size} bytes instead of {shard['bytes']}; {again}.")
    if verify:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard["sha256"]:
            raise UserError(f"Shard {path} is corrupt (its sha256 is not the manifest's); {again}.")


def record_source(shards: Shards, split: str):
    """Random access to the records of `split` as dicts; pictures stay encoded bytes.

    Raises:
        UserError: There is no such split.
    """
    if split not in shards.samples:
        raise UserError(
            f"{shards.path} has no split {split!r}; it has {', '.join(sorted(shards.samples))}."
        )
    skip = tfds.decode.SkipDecoding()
    builder = tfds.builder_from_directory(shards.path)
    return builder.as_data_source(split, decoders={"image": skip, "mask": skip})
