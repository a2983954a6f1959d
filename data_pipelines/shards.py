"""Finished data sets of ArrayRecord shards: opened with checks, read at random. See `build`."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from data_pipelines.pictures import check_picture
from data_pipelines.schema import Classes, classes_from_dict, tfds_features
from fastdrive_jax.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 2
DATASET = "driving_shards"  # TFDS's name of it, which begins the files' names
VERSION = "1.0.0"
_RAW = {name: tfds.decode.SkipDecoding() for name in ("image", "mask")}


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
        bad: Places of samples of each split that `open_shards` left out, which are not counted.
        image_size: Height and width of the first picture.
        digest: sha256 over the shards' checksums and what was left out: equal digests mean equal
            records.
        lengths: Records of each split's shards that can be read, by file name in order.
    """

    path: Path
    name: str
    classes: Classes
    cameras: tuple[str, ...]
    scenes: tuple[str, ...]
    samples: dict[str, int]
    image_size: tuple[int, int]
    digest: str
    lengths: dict[str, dict[str, int]]
    bad: dict[str, frozenset[int]]

    def records(self, split: str) -> int:
        """Number of records (pictures) in `split`."""
        return self.samples[split] * len(self.cameras)


def open_shards(path: Path, verify: bool = False, skip_bad: int = 0) -> Shards:
    """Opens a finished data set after checking that all of it is there.

    Args:
        path: Folder that `build_shards` made.
        verify: Also read every shard and compare its sha256 (about a second for each GB).
        skip_bad: How many damaged samples are left out, each of them named on stderr; above 0 every
            shard is verified, and of a damaged one every record is read.

    Raises:
        UserError: The folder is no whole data set, or a shard is missing, cut short or corrupt.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    wrong = {}
    try:
        for name, shard in manifest["shards"].items():
            fault = _fault(path / name, shard, verify or skip_bad > 0)
            if fault and not skip_bad:
                raise UserError(f"{fault}; build the shards again.")
            if fault:
                wrong[name] = fault
        lengths: dict[str, dict[str, int]] = {split: {} for split in manifest["samples"]}
        for name, shard in sorted(manifest["shards"].items()):
            lengths[_split_of(name)][name] = shard["records"]
        stride = len(manifest["cameras"])
        bad = _bad_samples(path, lengths, wrong, stride, skip_bad)
        readable = {
            split: {name: n for name, n in shards.items() if name not in bad.unreadable}
            for split, shards in lengths.items()
        }
        left_out = json.dumps([sorted(bad.unreadable), *map(sorted, bad.places.values())])
        return Shards(
            path=path,
            name=manifest["source"],
            classes=classes_from_dict(manifest["classes"], path / MANIFEST),
            cameras=tuple(manifest["cameras"]),
            scenes=tuple(manifest["scenes"]),
            samples={
                split: sum(shards.values()) // stride - len(bad.places[split])
                for split, shards in readable.items()
            },
            image_size=tuple(manifest["image_size"]),
            digest=shards_digest(manifest["shards"], left_out * bool(wrong)),
            lengths=readable,
            bad=bad.places,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / MANIFEST} is incomplete ({error!r}); build the shards again."
        ) from error


def shards_digest(shards: Mapping[str, Mapping[str, Any]], left_out: str = "") -> str:
    """`Shards.digest` of what a manifest says of its shards.

    Args:
        shards: By file name.
        left_out: What is not read of them, as JSON; "" if all is.
    """
    sums = "".join(shard["sha256"] for _, shard in sorted(shards.items()))
    return hashlib.sha256((sums + left_out).encode()).hexdigest()


def _read_manifest(path: Path) -> dict:
    manifest_path = path / MANIFEST
    again = "build the shards again"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not path.is_dir():
            again = "name the folder that `fastdrive data build` wrote"
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
    return manifest


def _fault(path: Path, shard: dict, verify: bool) -> str | None:
    if not path.is_file():
        return f"Shard {path} is missing"
    size = path.stat().st_size
    if size != shard["bytes"]:
        return f"Shard {path} has {size} bytes instead of {shard['bytes']}"
    if verify:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard["sha256"]:
            return f"Shard {path} is corrupt (its sha256 is not the manifest's)"
    return None


def _split_of(name: str) -> str:
    return name.removeprefix(f"{DATASET}-").rpartition(".array_record")[0]


@dataclass(frozen=True)
class _Bad:
    """Shards of which no record can be read, and places of bad samples in the others."""

    unreadable: frozenset[str]
    places: dict[str, frozenset[int]]


def _bad_samples(path: Path, lengths: dict, wrong: dict[str, str], stride: int, most: int) -> _Bad:
    """Finds the bad samples of damaged shards and says which they are.

    Raises:
        UserError: There are more than `most`.
    """
    unreadable, places, count = set(), {split: set() for split in lengths}, 0
    for split, shards in lengths.items():
        first = 0
        for name, records in shards.items():
            if name not in wrong:
                first += records
                continue
            found = _unreadable_records(path / name, records)
            samples = sorted({(first + record) // stride for record in found})
            count += len(samples)
            if count > most:
                raise UserError(
                    f"{wrong[name]}, and with it more samples than skip_bad={most}; build the "
                    "shards again."
                )
            if len(found) == records:
                unreadable.add(name)
                print(f"left out: all {len(samples)} samples of {name}", file=sys.stderr)
                continue
            for sample in samples:
                print(f"left out: sample {sample} of split {split} in {name}", file=sys.stderr)
            places[split].update(samples)
            first += records
    return _Bad(frozenset(unreadable), {split: frozenset(found) for split, found in places.items()})


def _unreadable_records(path: Path, records: int) -> list[int]:
    """Numbers of a damaged shard's records that cannot be read or decoded."""
    try:
        source = ArrayRecordDataSource([str(path)])
        if len(source) != records:
            return list(range(records))
    except Exception:  # whatever array_record says of a file that is none
        return list(range(records))
    features, bad = tfds_features(), []
    for number in range(records):
        try:
            record = features.deserialize_example_np(source[number], decoders=_RAW)
            for name in ("image", "mask"):
                check_picture(record[name], path)
            if record["labels"]:
                check_picture(record["labels"], path)
        except Exception:  # a wrong checksum, protocol buffer, array or picture
            bad.append(number)
    return bad


class RecordSource:
    """Random access to the good records of a split as dicts; pictures stay encoded bytes."""

    def __init__(self, shards: Shards, split: str):
        self._lengths = shards.lengths[split]
        if not self._lengths:
            raise UserError(
                f"Split {split!r} of {shards.path} has no shard that is whole; build the shards "
                "again, or use another split."
            )
        self._path = shards.path
        self._source = ArrayRecordDataSource([str(shards.path / name) for name in self._lengths])
        self._features = tfds_features()
        stride = len(shards.cameras)
        total = sum(self._lengths.values())
        self._places = None
        if shards.bad[split]:
            samples = np.setdiff1d(np.arange(total // stride), list(shards.bad[split]))
            self._places = (samples[:, None] * stride + np.arange(stride)).ravel()
        self._length = shards.records(split)
        if len(self._source) != total:
            raise UserError(
                f"Split {split!r} of {shards.path} holds {len(self._source)} records instead of "
                f"{total}; build the shards again."
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self._length:
            raise IndexError(index)
        place = int(index if self._places is None else self._places[index])
        try:
            return self._features.deserialize_example_np(self._source[place], decoders=_RAW)
        except Exception as error:
            ends = np.cumsum(list(self._lengths.values()))
            k = int(np.searchsorted(ends, place, "right"))
            path, number = self._path / list(self._lengths)[k], place - (ends[k - 1] if k else 0)
            raise UserError(
                f"Record {number} of {path} cannot be read ({error}); verify the shards, and "
                "build them again or leave out bad samples with --skip-bad N."
            ) from error


def record_source(shards: Shards, split: str) -> RecordSource:
    """Random access to the records of `split`.

    Raises:
        UserError: There is no such split.
    """
    if split not in shards.samples:
        raise UserError(
            f"{shards.path} has no split {split!r}; it has {', '.join(sorted(shards.samples))}."
        )
    return RecordSource(shards, split)


def sample_tokens(shards: Shards, split: str) -> list[str]:
    """Names of a split's samples in their order.

    Raises:
        UserError: There is no such split, or a record cannot be read.
    """
    source, stride = record_source(shards, split), len(shards.cameras)
    return [source[k * stride]["sample_token"].decode() for k in range(shards.samples[split])]
