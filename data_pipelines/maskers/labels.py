"""Class maps from label maps that somebody made: semantic or panoptic PNGs and a table of ids."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.maskers.interface import BACKGROUND, CLASSES, Frame
from data_pipelines.maskers.label_tables import INSTANCES, SEGMENTS, LabelTable
from data_pipelines.pictures import BROKEN, check_picture, read_bytes, reason, stored_values
from fastdrive_jax.errors import UserError

_VOID_SEGMENT = 0  # black pixels of COCO's panoptic PNGs belong to nothing


@dataclass(frozen=True)
class LabelMasker:
    """Reads `labels_dir / (frame.name + suffix)` by a table.

    A label map that is edited later isn't noticed: settings hold the table, not the files.

    Attributes:
        labels_dir: Where the label maps are.
        table: What their ids mean.
        suffix: Behind a frame's name, such as "_gtFine_labelIds.png".
        segments: File name of a label map to segment id to category id; for tables of encoding
            `SEGMENTS` only, see `read_segments`.
    """

    labels_dir: Path
    table: LabelTable
    suffix: str = ".png"
    segments: Mapping[str, Mapping[int, int]] | None = field(default=None, repr=False)
    name = "labels"

    def __post_init__(self):
        if not Path(self.labels_dir).is_dir():
            raise UserError(f"{self.labels_dir} is not a folder; give one that holds label maps.")
        if (self.segments is not None) != (self.table.encoding == SEGMENTS):
            raise UserError(
                f'Table {self.table.name} has encoding "{self.table.encoding}"; segments of a '
                f'COCO panoptic JSON file belong to "{SEGMENTS}" and to no other.'
            )

    @property
    def settings(self) -> Mapping[str, Any]:
        """The table and the suffix."""
        classes = {str(key): CLASSES.names[value] for key, value in self.table.classes.items()}
        return {
            "table": self.table.name,
            "encoding": self.table.encoding,
            "classes": classes,
            "suffix": self.suffix,
        }

    def __call__(self, frames: Sequence[Frame]) -> list[np.ndarray]:
        """Class ids uint8 [H, W] of each frame.

        Raises:
            UserError: A picture or its label map is missing or damaged, they differ in size, or
                the map holds an id that the table doesn't know.
        """
        return [self._one(frame) for frame in frames]

    def _one(self, frame: Frame) -> np.ndarray:
        size = check_picture(read_bytes(frame.picture), frame.picture)
        path = Path(self.labels_dir) / f"{frame.name}{self.suffix}"
        values = _pixels(path, size, self.table.encoding)
        # A pixel has 24 bits at most, so counting beats sorting a picture of millions of them.
        ids = found = np.flatnonzero(np.bincount(values.ravel()))
        if self.table.encoding == INSTANCES:
            ids = np.where(found >= 1000, found // 1000, found)
        elif self.table.encoding == SEGMENTS:
            ids = self._categories(found, path)
        stray = sorted({int(i) for i in ids if i >= 0 and int(i) not in self.table.classes})
        if stray:
            raise UserError(
                f"{path} holds the ids {stray[:10]}, which table {self.table.name} does not know; "
                "choose another table or add them to one of your own."
            )
        classes = np.zeros(found[-1] + 1, np.uint8)
        classes[found] = [BACKGROUND if i < 0 else self.table.classes[int(i)] for i in ids]
        return classes[values]

    def _categories(self, found: np.ndarray, path: Path) -> np.ndarray:
        """Category of each segment id, -1 for nothing."""
        relative = path.relative_to(self.labels_dir).as_posix()
        segments = self.segments.get(relative, self.segments.get(path.name))
        if segments is None:
            raise UserError(f"The segments of {path} are not in the JSON file; add them.")
        stray = [int(i) for i in found if i != _VOID_SEGMENT and int(i) not in segments]
        if stray:
            raise UserError(f"{path} holds segments {stray[:10]} that its JSON file does not list.")
        return np.array([-1 if i == _VOID_SEGMENT else segments[int(i)] for i in found])


def read_segments(path: Path) -> tuple[dict[str, dict[int, int]], list[dict[str, Any]]]:
    """Segments and categories of a COCO panoptic JSON file.

    Returns:
        File name of each label map to segment id to category id; and the rows of "categories".

    Raises:
        UserError: The file is missing or isn't of that form.
    """
    try:
        content = json.loads(read_bytes(path))
        segments = {
            PurePath(row["file_name"]).as_posix(): {
                int(s["id"]): int(s["category_id"]) for s in row["segments_info"]
            }
            for row in content["annotations"]
        }
        categories = [{"id": int(c["id"]), "name": str(c["name"])} for c in content["categories"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no COCO panoptic file ({type(error).__name__}: {error}); it needs "
            '"annotations" with file_name and segments_info, and "categories".'
        ) from error
    return segments, categories


def _pixels(path: Path, size: tuple[int, int], encoding: str) -> np.ndarray:
    """What the pixels say, as int32 [H, W]: ids, ids with instances, or segments."""
    data = read_bytes(path)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            mode, array = picture.mode, stored_values(np.asarray(picture), data)
    except BROKEN as error:
        raise UserError(
            f"{path} cannot be decoded as PNG ({reason(error)}); write it again."
        ) from error
    wanted = ("RGB",) if encoding == SEGMENTS else ("1", "L", "P", "I", "I;16", "I;16B")
    if mode not in wanted:
        raise UserError(
            f'{path} has pixel format {mode}; label maps of encoding "{encoding}" are PNGs with '
            f"{'three channels' if encoding == SEGMENTS else 'one channel'}."
        )
    if array.shape[:2] != tuple(size):
        raise UserError(
            f"{path} is {array.shape[0]} x {array.shape[1]} pixels but its picture is "
            f"{size[0]} x {size[1]}; make them the same size."
        )
    array = array.astype(np.int32)
    return array @ np.array([1, 256, 65536], np.int32) if encoding == SEGMENTS else array
