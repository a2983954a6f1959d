"""Samples whose pictures are those of another sample, byte for byte."""

import contextlib
import dataclasses
import hashlib
from pathlib import Path

from data_pipelines.schema import Source


def without_duplicates(source: Source) -> tuple[Source, dict[str, int]]:
    """The source with every sample once, and how many were dropped of each split.

    A sample of a held-out split goes before one of "train", so that no picture of theirs is ever
    trained on. Only samples whose files have the same sizes are read. One whose picture is missing
    or cannot be read stays, for whoever loads it to refuse.
    """
    order = sorted(source.samples, key=lambda split: split == "train")
    by_size: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for split in order:
        for place, ref in enumerate(source.samples[split]):
            try:
                sizes = tuple(path.stat().st_size for path in source.files(ref)[0])
            except OSError:
                continue
            by_size.setdefault(sizes, []).append((split, place))
    drop: set[tuple[str, int]] = set()
    for places in by_size.values():
        if len(places) < 2:
            continue
        seen = set()
        for split, place in places:
            with contextlib.suppress(OSError):
                digest = _digest(source.files(source.samples[split][place])[0])
                if digest in seen:
                    drop.add((split, place))
                seen.add(digest)
    samples = {
        split: tuple(ref for place, ref in enumerate(refs) if (split, place) not in drop)
        for split, refs in source.samples.items()
    }
    counts = {split: sum(name == split for name, _ in drop) for split in source.samples}
    samples = {split: refs for split, refs in samples.items() if refs}
    return dataclasses.replace(source, samples=samples), counts


def _digest(files: tuple[Path, ...]) -> bytes:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.digest()
