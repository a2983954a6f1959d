"""ArrayRecord files, each whole or not there, and the folder that they grow in.

What the records are is for others to say; see `build` for driving and `robot.demonstrations`.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from data_pipelines.disk import disk_errors, own_place
from fastdrive_jax.errors import UserError

NOTES = "notes"  # folder of the finished shards' notes, gone when the set is whole


@dataclass(frozen=True)
class ShardFile:
    """What is known of a file that was written."""

    records: int
    bytes: int
    sha256: str


def write_shard_file(path: Path, records: Iterable[bytes]) -> ShardFile:
    """Writes records beside `path`, reads back their number, and renames the file.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path):
        # Random access reads one record at a time, and pictures do not get smaller by compression.
        writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        count = 0
        try:
            for record in records:
                writer.write(record)
                count += 1
            writer.close()
            with partial.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            # The writer does not say that it could not flush: count what can be read back.
            readable = array_record_module.ArrayRecordReader(str(partial)).num_records()
            if readable != count:
                raise OSError(errno.EIO, f"{path.name} holds {readable} of {count} records")
            length = partial.stat().st_size
            partial.replace(path)
        finally:
            with contextlib.suppress(Exception):
                writer.close()
            partial.unlink(missing_ok=True)
    return ShardFile(count, length, digest)


def check_new(folder: Path) -> Path:
    """Where the folder of a set that is to be written really is; see `own_place`.

    Raises:
        UserError: There is something in it, or it cannot be renamed to.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} already exists; choose another folder or delete it.")
    return own_place(folder)


def give_name(building: Path, folder: Path) -> None:
    """Renames a whole set without the notes, which stay beside it until that has succeeded."""
    aside = _aside(building)
    (building / NOTES).rename(aside)
    (building / ".lock").unlink()
    building.rename(folder)
    shutil.rmtree(aside)


def take_notes_back(building: Path) -> None:
    """Undoes the first half of a `give_name` that did not come to its end."""
    if (aside := _aside(building)).is_dir():
        shutil.rmtree(building / NOTES, ignore_errors=True)
        aside.rename(building / NOTES)


def finished_notes(
    building: Path, jobs: Sequence[Any], parse: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """Notes of the shards that are whole and made of what they would be made of now, by name.

    A note that is damaged or of another version is none: its shard is written again.

    Args:
        building: Folder of the shards.
        jobs: That write them, with `name` and `identity`.
        parse: Makes a note, with `bytes` and `identity`, of the JSON that it was written as.
    """
    notes = {}
    for job in jobs:
        try:
            path = building / NOTES / f"{job.name}.json"
            note = parse(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        shard = building / job.name
        whole = shard.is_file() and shard.stat().st_size == note.bytes
        if whole and note.identity == job.identity():
            notes[job.name] = note
    return notes


def _aside(building: Path) -> Path:
    return building.with_name(f"{building.name}.notes")


def remove_strangers(building: Path, finished: Collection[str]) -> None:
    """Leaves only finished shards: a killed writer's parts and another plan's shards go."""
    (building / NOTES).mkdir(exist_ok=True)
    for path in building.iterdir():
        if path.name not in finished and path.name not in (NOTES, ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (building / NOTES).iterdir():
        if path.stem not in finished:
            path.unlink()


def write_tfds_metadata(
    building: Path,
    dataset: str,
    version: str,
    features: tfds.features.FeaturesDict,
    splits: Mapping[str, Sequence[Any]],
    description: str,
) -> None:
    """Writes what TFDS needs to open the shards.

    Args:
        building: Their folder.
        dataset: TFDS's name of it, which begins the files' names.
        version: TFDS's version of it.
        features: Of a record.
        splits: Split to notes of its shards, in order, with `records` and `bytes`.
        description: A sentence.
    """
    template = tfds.core.ShardedFileTemplate(
        data_dir=building, dataset_name=dataset, filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[note.records for note in notes],
            num_bytes=sum(note.bytes for note in notes),
            filename_template=template,
        )
        for split, notes in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=building,
        features=features,
        split_infos=infos,
        version=version,
        filename_template=template,
        check_data=False,  # reads through TensorFlow
        description=description,
        disable_shuffling=True,
    )
