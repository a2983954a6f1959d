"""Writes a source as ArrayRecord shards that TFDS reads, shard by shard, and goes on after a kill.

Each shard is a job of its own: it depends on its samples only, is written beside its place and
renamed, and a note of its count and checksum follows. So it does not matter who runs the jobs (this
process, several, or Apache Beam, see `beam`): the shards are the same byte for byte, and a run that
was killed does only those that have no note. The data set is written into `OUT.building` and gets
its name when it is whole, `manifest.json` last.

TFDS's own writer would tear the pictures of a sample apart and spill through TensorFlow; its
serializer, file format and metadata are used as they are, and TensorFlow is never imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from data_pipelines.disk import check_space, disk_errors, locked
from data_pipelines.duplicates import without_duplicates
from data_pipelines.pictures import check_bad, check_picture
from data_pipelines.schema import Classes, Record, Source, tfds_features
from data_pipelines.shard_files import (
    NOTES,
    check_new,
    finished_notes,
    give_name,
    remove_strangers,
    take_notes_back,
    write_shard_file,
    write_tfds_metadata,
)
from data_pipelines.shards import DATASET, FORMAT, MANIFEST, VERSION, Shards, open_shards
from data_pipelines.worker_process import run_jobs
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import read_json, write_json

RECORDS_PER_SHARD = 512
_SPLIT = re.compile(r"[\w-]+")
_VERSIONED = ("array-record", "tensorflow-datasets", "numpy", "opencv-python-headless", "pillow")


@dataclass(frozen=True)
class ShardJob:
    """One shard to write; can be pickled.

    Attributes:
        name: File name.
        split: Its split.
        refs: Samples, references of the source: dataclasses.
        load: See `Source`.
        files: See `Source`.
        cameras: See `Source`.
        classes: See `Source`.
        skip_bad: How many bad samples are left out; one more stops the job.
    """

    name: str
    split: str
    refs: tuple[Any, ...]
    load: Callable[[Any], tuple[Record, ...]]
    files: Callable[[Any], tuple[tuple[Path, ...], tuple[Path, ...]]]
    cameras: tuple[str, ...]
    classes: Classes
    skip_bad: int

    def identity(self) -> str:
        """Digest of what the shard is made of, as far as it is known without reading pictures.

        Files count by name, size and time, so that a build goes on with a root that was moved or is
        named in another way.
        """
        about = FORMAT, self.name, self.split, self.cameras, asdict(self.classes)
        digest = hashlib.sha256(repr(about).encode())
        for ref in self.refs:
            digest.update(json.dumps(asdict(ref), default=_without_folder).encode())
            for path in itertools.chain(*self.files(ref)):
                with contextlib.suppress(OSError):
                    stat = path.stat()
                    digest.update(repr((stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class ShardNote:
    """What is known of a finished shard."""

    name: str
    split: str
    identity: str
    samples: int
    records: int
    bytes: int
    sha256: str
    scenes: tuple[str, ...]
    image_size: tuple[int, int] | None
    bad: tuple[str, ...]


def shards_of(source: Source, folder: Path, quiet: bool) -> Shards:
    """The shards in `folder`, built if they are not there.

    Raises:
        UserError: Those that are there are of something else.
    """
    if (folder / MANIFEST).exists():
        shards = open_shards(folder)
        if read_json(folder / MANIFEST).get("source_digest") != source_digest(source):
            raise UserError(
                f"{folder} holds shards of other files than {source.name} now has; delete that "
                "folder, and whatever was made from it, or choose another one."
            )
        return shards
    return build_shards(source, folder, progress=not quiet)


def build_shards(
    source: Source,
    out_dir: Path,
    progress: bool = True,
    records_per_shard: int = RECORDS_PER_SHARD,
    workers: int = 1,
    skip_bad: int = 0,
    run: Callable[[Sequence[ShardJob], Path], Iterable[ShardNote]] | None = None,
) -> Shards:
    """Writes `source` to the new folder `out_dir`: equal sources give equal shard bytes.

    A run that was killed leaves `out_dir.building` behind, and the same call goes on from its
    finished shards.

    Args:
        source: What to write.
        out_dir: New or empty folder.
        progress: Show a progress bar.
        records_per_shard: Pictures in a shard, at most; rounded down to whole samples.
        workers: Processes that write shards.
        skip_bad: How many samples with a missing, damaged or unfitting file are left out; each is
            named on stderr and in the manifest, and one more is an error.
        run: Runs the jobs in another way and yields their notes in any order, see `beam`.

    Raises:
        UserError: `out_dir` exists, a picture of the source is unusable, or the disk is full.
    """
    out_dir = Path(out_dir)
    place = check_new(out_dir)
    numbers = ("workers", workers, 1), ("skip_bad", skip_bad, 0)
    for name, value, least in (*numbers, ("records_per_shard", records_per_shard, 1)):
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}.")
    if not source.samples or not all(source.samples.values()):
        empty = [name for name, refs in source.samples.items() if not refs]
        raise UserError(f"{source.name} has no samples ({', '.join(empty)}); add pictures.")
    if wrong := [name for name in source.samples if not _SPLIT.fullmatch(name)]:
        raise UserError(
            f"Split {wrong[0]!r} of {source.name} is no name that TFDS takes; use letters, digits, "
            "_ and - only."
        )
    digest = source_digest(source)
    source, dropped = without_duplicates(source)
    building = place.with_name(place.name + ".building")
    with disk_errors(out_dir), contextlib.ExitStack() as stack:
        building.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(building))
        take_notes_back(building)
        jobs = plan_jobs(source, records_per_shard, skip_bad)
        notes = kept_notes(building, jobs)
        check_space(source.size * (len(jobs) - len(notes)) // len(jobs), building)
        remove_strangers(building, notes)
        waiting = [job for job in jobs if job.name not in notes]
        bad = [sentence for note in notes.values() for sentence in note.bad]
        _say_bad(bad, bad, skip_bad)
        bar = stack.enter_context(
            tqdm(
                total=sum(len(job.refs) for job in jobs) * len(source.cameras),
                initial=sum(note.records for note in notes.values()),
                desc="shards",
                unit="picture",
                disable=not progress,
            )
        )
        found = run(waiting, building) if run else run_jobs(waiting, write_shard, building, workers)
        for note in found:
            notes[note.name] = note
            bar.update(note.records)
            bad += note.bad
            _say_bad(note.bad, bad, skip_bad)
        ordered = [notes[job.name] for job in jobs]
        _finish(building, source, ordered, dropped, digest)
        give_name(building, place)
    return open_shards(out_dir)


def _say_bad(new: Sequence[str], all_bad: Sequence[str], skip_bad: int) -> None:
    for sentence in new:
        tqdm.write(f"left out: {sentence}", file=sys.stderr)
    check_bad(all_bad, skip_bad)


def source_digest(source: Source) -> str:
    """Of what shards of a source would hold, as far as it is known without reading pictures.

    Files count by name and size, so that a copy in another place is the same source.
    """
    about = FORMAT, source.cameras, asdict(source.classes), list(source.samples)
    digest = hashlib.sha256(repr(about).encode())
    for ref in itertools.chain.from_iterable(source.samples.values()):
        content = json.dumps(asdict(ref), default=_without_folder)
        digest.update(content.encode("utf-8", "surrogateescape"))
        for path in itertools.chain(*source.files(ref)):
            with contextlib.suppress(OSError):
                digest.update(repr(path.stat().st_size).encode())
    return digest.hexdigest()


def _without_folder(value: Any) -> Any:
    return value.name if isinstance(value, Path) else _plain(value)


def plan_jobs(source: Source, records_per_shard: int, skip_bad: int = 0) -> list[ShardJob]:
    """The shards of a source, in order."""
    step = max(1, records_per_shard // len(source.cameras))
    jobs = []
    for split, refs in source.samples.items():
        parts = [refs[start : start + step] for start in range(0, len(refs), step)]
        for k, part in enumerate(parts):
            name = f"{DATASET}-{split}.array_record-{k:05d}-of-{len(parts):05d}"
            files, cameras, classes = source.files, source.cameras, source.classes
            jobs.append(
                ShardJob(name, split, tuple(part), source.load, files, cameras, classes, skip_bad)
            )
    return jobs


def write_shard(job: ShardJob, folder: Path) -> ShardNote:
    """Writes one shard and then its note.

    Raises:
        UserError: More than `job.skip_bad` samples are unusable; the first ones are named.
    """
    folder = Path(folder)
    features = tfds_features()
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    scenes: dict[str, None] = {}
    bad: list[str] = []
    sizes: list[tuple[int, int]] = []

    def examples() -> Iterator[bytes]:
        for ref in job.refs:
            try:
                records = job.load(ref)
            except UserError as error:
                bad.append(str(error))
                check_bad(bad, job.skip_bad)
                continue
            if tuple(record.camera for record in records) != job.cameras:
                raise ValueError(f"{ref} gave other cameras than {job.cameras}")
            for record in records:
                encoded = features.encode_example(_typed(record, features))
                example = serializer.get_tf_example(encoded)
                scenes.setdefault(record.scene)
                if not sizes:
                    sizes.append(check_picture(record.image, "the first picture"))
                yield example.SerializeToString(deterministic=True)

    with disk_errors(folder / job.name):
        written = write_shard_file(folder / job.name, examples())
        note = ShardNote(
            job.name,
            job.split,
            job.identity(),
            written.records // len(job.cameras),
            written.records,
            written.bytes,
            written.sha256,
            tuple(scenes),
            sizes[0] if sizes else None,
            tuple(bad),
        )
        (folder / NOTES).mkdir(exist_ok=True)
        write_json(folder / NOTES / f"{job.name}.json", asdict(note))
    return note


def _typed(record: Record, features) -> dict:
    """The record's fields with arrays of the stored number types: TFDS casts none."""
    return {
        name: value.astype(features[name].np_dtype) if isinstance(value, np.ndarray) else value
        for name, value in asdict(record).items()
    }


def kept_notes(building: Path, jobs: Sequence[ShardJob]) -> dict[str, ShardNote]:
    """Notes of the finished shards that lack no more samples than they may."""
    most = {job.name: job.skip_bad for job in jobs}
    notes = finished_notes(building, jobs, _note)
    return {name: note for name, note in notes.items() if len(note.bad) <= most[name]}


def _note(content: dict[str, Any]) -> ShardNote:
    lists = {key: tuple(content[key]) for key in ("scenes", "bad")}
    size = content["image_size"] and tuple(content["image_size"])
    return ShardNote(**content | lists | {"image_size": size})


def _finish(
    building: Path, source: Source, notes: Sequence[ShardNote], dropped: dict, digest: str
) -> None:
    """TFDS's metadata and the manifest."""
    for split in source.samples:
        if not sum(note.samples for note in notes if note.split == split):
            raise UserError(f"No sample of split {split} of {source.name} is usable.")
    splits = {split: [note for note in notes if note.split == split] for split in source.samples}
    description = "Driving pictures with foreground masks, ego state and way ahead."
    write_tfds_metadata(building, DATASET, VERSION, tfds_features(), splits, description)
    write_json(
        building / MANIFEST,
        {
            "format": FORMAT,
            "source": source.name,
            "source_digest": digest,
            "samples": {
                split: sum(note.samples for note in part) for split, part in splits.items()
            },
            "cameras": source.cameras,
            "classes": asdict(source.classes),
            "scenes": list(dict.fromkeys(scene for note in notes for scene in note.scenes)),
            "image_size": next(note.image_size for note in notes if note.image_size),
            "shards": {
                note.name: {"records": note.records, "bytes": note.bytes, "sha256": note.sha256}
                for note in sorted(notes, key=lambda note: note.name)
            },
            "duplicates": dropped,
            "skipped": [sentence for note in notes for sentence in note.bad],
            "absent": list(source.absent),
            "masker": source.masker,
            "versions": {name: importlib.metadata.version(name) for name in _installed()},
        },
    )


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _installed() -> list[str]:
    found = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return [name for name in _VERSIONED if name in found]
