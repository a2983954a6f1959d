"""ArrayRecord shards of a source, written by a TFDS builder, and opened again with checks.

The builder works shard by shard instead of through TFDS's shuffling writer: that one would tear the
pictures of a sample apart, holds up to 1 GB in memory, and spills the rest through TensorFlow. Here
order is the source's order, memory is one shard, and TensorFlow is never imported.

A data set is written beside its final folder and renamed when it is whole, `manifest.json` last.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tqdm import tqdm

from data_pipelines.disk import check_space, disk_errors
from data_pipelines.pictures import check_picture
from data_pipelines.schema import Classes, Record, Source, classes_from_dict, tfds_features
from fastdrive_jax.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
RECORDS_PER_SHARD = 512
_VERSIONED = ("array-record", "tensorflow-datasets", "numpy", "opencv-python-headless", "pillow")


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


class _LocalInfo(tfds.core.DatasetInfo):
    """Dataset info that no bucket knows, so that no temporary folder is made for asking."""

    def initialize_from_bucket(self) -> None:
        """Asks nothing."""


class DrivingShards(tfds.core.ShardBasedBuilder):
    """TFDS builder of a `Source`; use `build_shards`, which adds the checks and the manifest."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source: Source, samples_per_shard: int, on_record, **kwargs):
        self._source = source
        self._samples_per_shard = samples_per_shard
        self._on_record = on_record
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self,
            description="Driving pictures with foreground masks, ego state and way ahead.",
            features=tfds_features(),
            disable_shuffling=True,
        )

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded, so nothing is said of it."""

    def _log_download_done(self) -> None:
        """The progress bar has said it."""

    def _shard_iterators_per_split(self, dl_manager):
        del dl_manager  # nothing is downloaded
        step = self._samples_per_shard
        return {
            split: [
                _ShardExamples(self._source, split, start, step, self._on_record)
                for start in range(0, len(refs), step)
            ]
            for split, refs in self._source.samples.items()
        }


@dataclass(frozen=True)
class _ShardExamples:
    """Makes the (key, example) pairs of one shard when it is called."""

    source: Source
    split: str
    start: int
    count: int
    on_record: object

    def __call__(self):
        refs = self.source.samples[self.split][self.start : self.start + self.count]
        key = self.start * len(self.source.cameras)
        for ref in refs:
            records = self.source.load(ref)
            if tuple(record.camera for record in records) != self.source.cameras:
                raise ValueError(f"{ref} gave other cameras than {self.source.cameras}")
            for record in records:
                yield key, _example(record)
                self.on_record(record)
                key += 1


def _example(record: Record) -> dict:
    example = asdict(record)
    example["future_valid"] = record.future_valid.astype("uint8")
    return example


def build_shards(
    source: Source,
    out_dir: Path,
    progress: bool = True,
    records_per_shard: int = RECORDS_PER_SHARD,
) -> Shards:
    """Writes `source` to the new folder `out_dir`: equal sources give equal shard bytes.

    A run that was killed leaves `out_dir.building` behind, which the next run clears away.

    Args:
        source: What to write.
        out_dir: New or empty folder.
        progress: Show a progress bar.
        records_per_shard: Pictures in a shard, at most; rounded down to whole samples.

    Raises:
        UserError: `out_dir` exists, a picture of the source is unusable, or the disk is full.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise UserError(f"{out_dir} already exists; choose another folder or delete it.")
    if not source.samples or not all(source.samples.values()):
        empty = [name for name, refs in source.samples.items() if not refs]
        raise UserError(f"{source.name} has no samples ({', '.join(empty)}); add pictures.")
    building = out_dir.with_name(out_dir.name + ".building")
    seen = _Seen()
    total = sum(map(len, source.samples.values())) * len(source.cameras)
    with disk_errors(out_dir), contextlib.ExitStack() as cleanup:
        shutil.rmtree(building, ignore_errors=True)
        cleanup.callback(shutil.rmtree, building, ignore_errors=True)
        building.mkdir(parents=True)
        check_space(source.size, building)
        with tqdm(total=total, desc="shards", unit="picture", disable=not progress) as bar:

            def on_record(record: Record) -> None:
                seen.add(record)
                bar.update()

            samples_per_shard = max(1, records_per_shard // len(source.cameras))
            builder = DrivingShards(
                source=source,
                samples_per_shard=samples_per_shard,
                on_record=on_record,
                data_dir=building,
                file_format="array_record",
            )
            builder.download_and_prepare()
        folder = Path(builder.data_path)
        _write_manifest(folder, source, seen, builder.info)
        folder.rename(out_dir)
    return open_shards(out_dir)


class _Seen:
    """What the manifest needs to know of the records that went by."""

    def __init__(self):
        self.scenes: dict[str, None] = {}
        self.image_size: tuple[int, int] | None = None

    def add(self, record: Record) -> None:
        self.scenes.setdefault(record.scene)
        if self.image_size is None:
            self.image_size = check_picture(record.image, "the first picture")


def _write_manifest(folder: Path, source: Source, seen: _Seen, info) -> None:
    lengths = {
        Path(name).name: length
        for split in info.splits.values()
        for name, length in zip(split.filenames, split.shard_lengths, strict=True)
    }
    shards = {}
    for path in sorted(folder.glob("*.array_record*")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        # TFDS counts what it handed over; a shard is whole only if that many can be read back.
        records = array_record_module.ArrayRecordReader(str(path)).num_records()
        if records != lengths.get(path.name):
            raise OSError(errno.EIO, f"{path.name} holds {records} of {lengths.get(path.name)}")
        shards[path.name] = {
            "records": records,
            "bytes": path.stat().st_size,
            "sha256": digest,
        }
    expected = {split: len(refs) * len(source.cameras) for split, refs in source.samples.items()}
    written = {name: split.num_examples for name, split in info.splits.items()}
    if written != expected or set(shards) != set(lengths):
        raise OSError(errno.EIO, f"wrote {written} records of {expected}")
    manifest = {
        "format": FORMAT,
        "source": source.name,
        "samples": {split: len(refs) for split, refs in source.samples.items()},
        "cameras": source.cameras,
        "classes": asdict(source.classes),
        "scenes": tuple(seen.scenes),
        "image_size": seen.image_size,
        "shards": shards,
        "versions": {name: importlib.metadata.version(name) for name in _installed(_VERSIONED)},
    }
    partial = folder / f"{MANIFEST}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST)


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


def _installed(names) -> list[str]:
    found = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return [name for name in names if name in found]
