"""Masks of many pictures, which a run that was stopped goes on with.

    OUT/masks/<name>.png    1 bit, white = foreground
    OUT/labels/<name>.png   8-bit class ids
    OUT/classes.json        what the ids mean
    OUT/masker.json         the masker and its settings, which every PNG holds too

The label map of a picture is written before its mask, each under a temporary name first, so where
there is a mask both are whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from data_pipelines.disk import disk_errors, files_below
from data_pipelines.image_folder import PICTURE_SUFFIXES
from data_pipelines.maskers.interface import CLASSES, Frame, Masker
from data_pipelines.maskers.provenance import describe, stamp, stamp_of
from data_pipelines.pictures import check_picture, encode_labels, encode_mask, read_bytes
from data_pipelines.schema import CLASSES_FILE, write_classes
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import write_json

MASKER_FILE = "masker.json"
KINDS = ("masks", "labels")
_THREADS = 4  # PNG encoding and header reading release the interpreter lock


@dataclass(frozen=True)
class MaskReport:
    """What a run did.

    Attributes:
        made: Pictures masked in this run.
        remade: How many of these had a mask of another masker or other settings.
        kept: Pictures whose mask was there already.
        bad: Name and reason of each picture that was left out.
    """

    made: int
    remade: int
    kept: int
    bad: tuple[tuple[str, str], ...]


def make_masks(
    frames: Sequence[Frame],
    masker: Masker,
    out_dir: Path,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    skip_bad: int = 0,
    part: tuple[int, int] = (0, 1),
) -> MaskReport:
    """Masks every frame that has no mask of this masker and these settings yet.

    Args:
        frames: The pictures; their names must differ.
        masker: Makes the class maps.
        out_dir: Where the files go; see the top of this file.
        batch_size: Frames of one call of the masker.
        progress: Called with the number of frames done and their total after each batch.
        skip_bad: How many pictures the masker may refuse (damaged, missing) before the run stops.
        part: (index, count): takes every count-th frame, so that `count` processes or hosts can
            share the work and the folder.

    Raises:
        UserError: Names clash or lead out of the folder, more than `skip_bad` pictures are bad, or
            a file cannot be written.
        ValueError: The masker's answer is not one class map of each picture's size.
    """
    _check(frames, batch_size, skip_bad, part)
    out_dir, text = Path(out_dir), describe(masker)
    mine = frames[part[0] :: part[1]]
    write_classes(out_dir / CLASSES_FILE, CLASSES)
    write_json(out_dir / MASKER_FILE, json.loads(text))
    bad: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda frame: _state(out_dir, frame, text), mine))
        todo = [frame for frame, state in zip(mine, found, strict=True) if state != "kept"]
        done = kept = found.count("kept")
        writes: list[Future] = []
        for batch in _batches(todo, batch_size):
            maps = _mask_batch(masker, batch, bad)
            bad += _settle(writes)  # of the batch before: they ran beside the masker
            writes = [pool.submit(_write, out_dir, f, m, text) for f, m in maps]
            done += len(batch)
            if len(bad) > skip_bad:
                break
            if progress:
                progress(done, len(mine))
        bad += _settle(writes)
    if len(bad) > skip_bad:
        raise UserError(
            f"{len(bad)} of the pictures cannot be masked, {skip_bad} are allowed; the first: "
            f"{bad[0][1]} Mend it, or allow more with skip_bad."
        )
    left_out = {name for name, _ in bad}
    for frame in todo:
        if frame.name in left_out:
            for path in _paths(out_dir, frame):
                if stamp_of(path) is not None:  # what another masker made of it is not this one's
                    path.unlink()
    remade = sum(
        state == "other" and frame.name not in left_out
        for frame, state in zip(mine, found, strict=True)
    )
    return MaskReport(len(todo) - len(bad), remade, kept, tuple(bad))


def folder_frames(images_dir: Path, out_dir: Path | None = None) -> list[Frame]:
    """Every picture below a folder, sorted; its name is its path there without suffix.

    Args:
        images_dir: The folder.
        out_dir: Where `make_masks` writes; what it writes is none of the pictures.

    Raises:
        UserError: No such folder, no picture in it, or two pictures that differ in suffix only.
    """
    images_dir = Path(images_dir)
    if not images_dir.is_dir():
        raise UserError(f"{images_dir} is not a folder; give one that holds pictures.")
    paths = [p for p in files_below(images_dir) if p.suffix.lower() in PICTURE_SUFFIXES]
    if out_dir is not None:
        ours = [(Path(out_dir) / kind).resolve() for kind in KINDS]
        paths = [p for p in paths if not any(p.resolve().is_relative_to(at) for at in ours)]
    if not paths:
        raise UserError(f"{images_dir} holds no picture ({', '.join(PICTURE_SUFFIXES)}).")
    frames = [Frame(p, p.relative_to(images_dir).with_suffix("").as_posix()) for p in paths]
    _check_names(frames)
    return frames


def _check(frames, batch_size, skip_bad, part) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; give at least 1.")
    if skip_bad < 0:
        raise UserError(f"skip_bad is {skip_bad}; give 0 or more.")
    check_part(part)
    _check_names(frames)


def check_part(part: tuple[int, int]) -> None:
    """Refuses what is no (index, count) of a part.

    Raises:
        UserError: The index is not from 0 to below the count.
    """
    index, count = part
    if not 0 <= index < count:
        raise UserError(
            f"part {index} of {count} does not exist; give an index from 0 to below the count, "
            "such as 0 4 to 3 4."
        )


def _check_names(frames: Sequence[Frame]) -> None:
    seen: dict[str, Frame] = {}
    for frame in frames:
        path = PurePosixPath(frame.name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise UserError(f'"{frame.name}" is no name for a mask; use a relative path.')
        if path.as_posix() in seen:
            other = seen[path.as_posix()].picture
            raise UserError(
                f"{frame.picture} and {other} share the mask {frame.name}.png; rename one."
            )
        seen[path.as_posix()] = frame


def _paths(out_dir: Path, frame: Frame) -> tuple[Path, Path]:
    return tuple(out_dir / kind / f"{frame.name}.png" for kind in KINDS)


def _state(out_dir: Path, frame: Frame, text: str) -> str:
    """Of a frame's files: "kept" (both of these settings), "other" (mask of others) or "new"."""
    mask, labels = _paths(out_dir, frame)
    if not mask.exists():
        return "new"
    if stamp_of(mask) != text:
        return "other"
    return "kept" if stamp_of(labels) == text else "new"


def _batches(frames, size):
    for start in range(0, len(frames), size):
        yield frames[start : start + size]


def _mask_batch(masker, batch, bad) -> list[tuple[Frame, np.ndarray]]:
    """Frames with their maps; frames that the masker refuses go to `bad`."""
    try:
        maps = masker(batch)
    except UserError as error:
        if len(batch) == 1:
            bad.append((batch[0].name, str(error)))
            return []
        # One bad picture must not cost the others of its batch.
        return [pair for frame in batch for pair in _mask_batch(masker, [frame], bad)]
    if len(maps) != len(batch):
        raise ValueError(f"{masker.name} gave {len(maps)} maps for {len(batch)} pictures")
    return list(zip(batch, maps, strict=True))


def _write(out_dir: Path, frame: Frame, labels: np.ndarray, text: str) -> tuple[str, str] | None:
    """Writes both files of a frame; or tells name and reason of a picture that is damaged.

    A masker need not look at the picture (boxes of a data set, say), so it is checked here.
    """
    try:
        size = check_picture(read_bytes(frame.picture), frame.picture)
    except UserError as error:
        return frame.name, str(error)
    if labels.dtype != np.uint8 or labels.shape != size or labels.max() >= len(CLASSES.names):
        raise ValueError(
            f"the map of {frame.name} is {labels.dtype} {labels.shape}, highest id "
            f"{labels.max()}; the picture is {size}"
        )
    mask_path, labels_path = _paths(out_dir, frame)
    _replace(labels_path, stamp(encode_labels(labels), text))
    _replace(mask_path, stamp(encode_mask(np.isin(labels, CLASSES.foreground)), text))
    return None


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)


def _settle(writes: list[Future]) -> list[tuple[str, str]]:
    """Waits for the writes; the pictures that turned out damaged."""
    return [bad for write in writes if (bad := write.result()) is not None]
