"""Writes a token cache, file by file, on one host or several, and goes on after a kill.

A file gets its name when it is whole, so what is there is right and a run that was killed makes
only the others. Hosts take the files in turn; they need not know of each other.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from data_pipelines.disk import check_space, disk_errors
from data_pipelines.features import TokenEncoder
from data_pipelines.loader import Loader, LoaderConfig, make_loader
from data_pipelines.schema import TOKEN_PIXELS
from data_pipelines.shards import Shards
from data_pipelines.token_cache import (
    DTYPES,
    MANIFEST,
    CacheIdentity,
    file_faults,
    read_identity,
)
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import write_json

# 13 MB a record at the size of FastDriveVLA: few enough files that all of them can be open.
RECORDS_PER_FILE = 1024


def write_token_cache(
    shards: Shards,
    split: str,
    encoder: TokenEncoder,
    folder: Path,
    image_size: tuple[int, int],
    resize: str = "bicubic",
    batch_size: int = 4,
    dtype: str = "bfloat16",
    host_index: int = 0,
    host_count: int = 1,
    records_per_file: int = RECORDS_PER_FILE,
    progress: bool = True,
) -> bool:
    """Encodes all pictures of a split into `folder`, or this host's share of what is not there yet.

    Args:
        shards: The data set.
        split: One of its splits.
        encoder: Makes the tokens.
        folder: New, or of a cache of the same content; shared by the hosts.
        image_size: H, W to resize to, multiples of 28.
        resize: "bicubic" or "area", see `decode_image`.
        batch_size: Pictures encoded at once.
        dtype: Of the stored tokens: "bfloat16", "float16" or "float32".
        host_index: Which host this is, from 0.
        host_count: How many hosts share the work.
        records_per_file: Pictures in a file; what a kill loses, at most.
        progress: Show a progress bar.

    Returns:
        Whether the cache is whole now; if not, other hosts have not finished their files.

    Raises:
        UserError: The folder holds tokens of other content; the split, size or number type is none;
            a token is not finite; or the disk is full.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} of the tokens must be one of {tuple(DTYPES)}.")
    if records_per_file < 1:
        raise UserError(f"records_per_file={records_per_file} must be at least 1.")
    if not 0 <= host_index < host_count:
        raise UserError(
            f"host_index={host_index} must be at least 0 and less than host_count={host_count}."
        )
    config = LoaderConfig(
        batch_size=batch_size,
        image_size=image_size,
        resize=resize,
        fields=("image",),
        shuffle=False,
        num_epochs=1,
        remainder="keep",
    )
    loader = make_loader(shards, split, config)
    identity = CacheIdentity(
        encoder=encoder.digest,
        data=shards.digest,
        split=split,
        image_size=tuple(image_size),
        resize=resize,
        dtype=dtype,
        grid=(image_size[0] // TOKEN_PIXELS, image_size[1] // TOKEN_PIXELS),
        dim=encoder.dim,
        records=shards.records(split),
        records_per_file=records_per_file,
    )
    folder, names = Path(folder), list(identity.files())
    with disk_errors(folder):
        _claim(folder, identity, host_index)
        missing = file_faults(folder, identity, names)
        # What the others are writing counts too: better refused now than full in hours.
        counts = identity.files()
        check_space(sum(counts[name] for name in missing) * identity.record_bytes, folder)
    mine = [k for k, name in enumerate(names) if k % host_count == host_index]
    with tqdm(
        total=sum(counts[names[k]] for k in mine),
        initial=sum(counts[names[k]] for k in mine if names[k] not in missing),
        desc=f"tokens of {split}",
        unit="picture",
        disable=not progress,
    ) as bar:
        for k in mine:
            if names[k] in missing:
                with disk_errors(folder / names[k]):
                    _write_file(folder, identity, k, loader, encoder, host_index, bar)
    whole = not file_faults(folder, identity, names)
    if whole:
        _remove_partials(folder, "*")
    return whole


def _claim(folder: Path, identity: CacheIdentity, host: int) -> None:
    """Makes the folder this cache's and removes what a killed run of this host left.

    Raises:
        UserError: The folder is another cache's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        if others := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
            raise UserError(
                f"{folder} holds {others[0]} but no token cache; choose another folder."
            )
        # Hosts may begin at once, and all of them write the same.
        write_json(folder / MANIFEST, asdict(identity))
    found, asked = asdict(read_identity(folder)), asdict(identity)
    differing = [
        f"{name} ({_short(found[name])} there, {_short(value)} asked for)"
        for name, value in asked.items()
        if found[name] != value
    ]
    if differing:
        raise UserError(
            f"The token cache {folder} is of other content: {', '.join(differing)}; choose another "
            "folder or delete it."
        )
    _remove_partials(folder, str(host))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12] + "..."


def _remove_partials(folder: Path, host: str) -> None:
    for path in folder.glob(f".tokens*.{host}.*.partial"):
        path.unlink(missing_ok=True)


def _write_file(
    folder: Path,
    identity: CacheIdentity,
    number: int,
    loader: Loader,
    encoder: TokenEncoder,
    host: int,
    bar: tqdm,
) -> None:
    name, count = list(identity.files().items())[number]
    first = number * identity.records_per_file
    partial = folder / f".{name}.{host}.{os.getpid()}.partial"
    # Random access reads one record at a time, and tokens hardly get smaller by compression.
    writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    try:
        with contextlib.closing(iter(loader)) as batches:
            batches.set_state({"examples": first})
            needed = itertools.islice(batches, -(-count // loader.batch_examples))
            encoded = _encoded(needed, encoder, loader.batch_examples)
            tokens = itertools.islice(itertools.chain.from_iterable(encoded), count)
            for place, one in enumerate(tokens, first):
                writer.write(_stored(one, identity, place))
                bar.update()
        writer.close()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        # The writer does not say that it could not flush: count what can be read back.
        readable = ArrayRecordReader(str(partial)).num_records()
        if readable != count:
            raise OSError(errno.EIO, f"{name} holds {readable} of {count} records")
        partial.replace(folder / name)
    finally:
        with contextlib.suppress(Exception):
            writer.close()
        partial.unlink(missing_ok=True)


def _encoded(batches: Iterable, encoder: TokenEncoder, batch_size: int) -> Iterator[np.ndarray]:
    """Tokens [b, N, D] of each batch; a batch is encoded while the one before is written."""
    before = None
    for batch in batches:
        images = batch["image"]
        count = len(images)
        if count < batch_size:  # keeps one compiled shape
            images = np.concatenate([images, np.repeat(images[-1:], batch_size - count, axis=0)])
        tokens = encoder.encode(images)
        if before is not None:
            yield np.asarray(before[0])[: before[1]]
        before = tokens, count
    if before is not None:
        yield np.asarray(before[0])[: before[1]]


def _stored(tokens: np.ndarray, identity: CacheIdentity, record: int) -> bytes:
    if tokens.shape != identity.shape:
        raise ValueError(f"the encoder gave {tokens.shape} instead of {identity.shape}")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(tokens.astype(DTYPES[identity.dtype]))
    if not np.isfinite(stored).all():
        raise UserError(
            f"Record {record} of split {identity.split!r} has tokens that are not finite as "
            f"{identity.dtype}; choose bfloat16 or float32, or look at the picture and the encoder."
        )
    return stored.tobytes()
