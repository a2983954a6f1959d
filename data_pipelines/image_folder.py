"""A folder of one's own pictures as a source.

`DIR/images/*.{jpg,jpeg,png}` with `DIR/labels/*.png` (class ids) or `DIR/masks/*.png` (0 =
background), same stems; or the same under `DIR/train` and `DIR/val`. Without those two, the last
fifth of the sorted names is validation: neighbours in a drive look alike, so a random split would
put almost the same picture on both sides.
"""

import functools
import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipelines.pictures import (
    check_bad,
    check_picture,
    decode_map,
    encode_labels,
    encode_mask,
    labels_png,
    mask_png,
    read_bytes,
    size_of_files,
)
from data_pipelines.schema import CLASSES_FILE, Classes, Record, Source, read_classes
from fastdrive_jax.errors import UserError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
VAL_SHARE = 0.2
MASK_CLASSES = Classes(names=("background", "foreground"), foreground=(1,))  # of masks alone
_CAMERA = "CAM_FRONT"


@dataclass(frozen=True)
class PictureRef:
    """One picture with its mask or label map (at least one of them)."""

    split: str
    picture: Path
    mask: Path | None
    labels: Path | None


def read_image_folder(
    root: Path,
    foreground: tuple[int, ...] | None = None,
    objects: tuple[int, ...] | None = None,
    ignore: tuple[int, ...] | None = None,
    skip_bad: int = 0,
) -> Source:
    """Lists the pictures under `root` and pairs each with its mask or label map.

    Args:
        root: The folder.
        foreground: Foreground class ids, in place of those in `root/classes.json`; one of the two
            is needed when there are label maps.
        objects: Object class ids, likewise; a part of the foreground.
        ignore: Ids to leave out of every measure, likewise.
        skip_bad: How many pictures may lack a mask or label map. They stay in the source and cannot
            be loaded, so `build_shards` needs as many.

    Raises:
        UserError: No pictures, a picture without its mask, a mask without a picture, or class ids
            that are missing or contradict each other.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give one that holds images/ and labels/.")
    halves = [name for name in ("train", "val") if (root / name).is_dir()]
    if len(halves) == 1:
        other = "val" if halves == ["train"] else "train"
        raise UserError(f"{root} has {halves[0]}/ but no {other}/; add it, or use neither.")
    if halves:
        samples = {name: tuple(_pairs(root / name, name)) for name in halves}
    else:
        samples = _block_split(root)
    refs = [ref for split in samples.values() for ref in split]
    size = _check_files(refs, skip_bad)
    has_labels = any(ref.labels for ref in refs)
    classes = _classes(root, has_labels, foreground, objects, ignore)

    return Source(
        name=f"images:{root.resolve().name}",
        cameras=(_CAMERA,),
        classes=classes,
        samples=samples,
        load=functools.partial(_load, classes=classes),
        files=_files,
        size=size,
    )


def _files(ref: PictureRef) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    return (ref.picture,), tuple(path for path in (ref.mask, ref.labels) if path)


def _check_files(refs: list[PictureRef], skip_bad: int) -> int:
    """Bytes of all files; every absence is found before anything is written."""
    size, bad = 0, []
    for ref in refs:
        found, missing = size_of_files(itertools.chain(*_files(ref)))
        size += found
        if missing:
            bad.append(
                f"{missing[0]} is missing; add it or take {ref.picture} out (every picture needs "
                f"its file in {missing[0].parent.name}/)."
            )
    check_bad(bad, skip_bad)
    return size


def _load(ref: PictureRef, classes: Classes) -> tuple[Record, ...]:
    image = read_bytes(ref.picture)
    size = check_picture(image, ref.picture)
    labels = b""
    if ref.labels:
        labels, ids = labels_png(read_bytes(ref.labels), ref.labels, size, classes)
    if ref.mask:
        mask = mask_png(read_bytes(ref.mask), ref.mask, size)
    else:
        mask = encode_mask(np.isin(ids, classes.foreground))
    if not labels and classes.names == MASK_CLASSES.names:
        labels = encode_labels((decode_map(mask, ref.mask, size) > 0).astype(np.uint8))
    return (
        Record(
            image=image,
            mask=mask,
            labels=labels,
            camera=_CAMERA,
            sample_token=f"{ref.split}/{ref.picture.stem}",
            scene=_drive(ref.picture.stem),
        ),
    )


def _drive(stem: str) -> str:
    """What stands before the frame number: "0001TP_006690" is of drive "0001TP"."""
    match = re.fullmatch(r"(.+?)[_-]+[A-Za-z]?\d+", stem)
    return match.group(1) if match else "pictures"


def _pairs(folder: Path, split: str) -> list[PictureRef]:
    images = folder / "images"
    if not images.is_dir():
        raise UserError(f"{images} is missing; put the pictures there.")
    pictures: dict[str, Path] = {}
    for path in sorted(images.iterdir()):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            if any("\ud800" <= letter <= "\udfff" for letter in path.name):
                raise UserError(f"{images} holds {path.name!r}, which is not UTF-8; rename it.")
            if path.stem in pictures:
                raise UserError(f"{path} and {pictures[path.stem].name} share a stem; rename one.")
            pictures[path.stem] = path
    if not pictures:
        raise UserError(f"{images} holds no picture ({', '.join(PICTURE_SUFFIXES)}); add some.")
    maps = {name: folder / name for name in ("masks", "labels") if (folder / name).is_dir()}
    if not maps:
        raise UserError(f"{folder} has neither masks/ nor labels/; add one with a PNG per picture.")
    for place in maps.values():
        stray = sorted(p for p in place.glob("*.png") if p.stem not in pictures)
        if stray:
            raise UserError(f"{stray[0]} belongs to no picture in {images}; remove or rename it.")
    return [
        PictureRef(
            split,
            picture,
            *(maps[name] / f"{stem}.png" if name in maps else None for name in ("masks", "labels")),
        )
        for stem, picture in pictures.items()
    ]


def _block_split(root: Path) -> dict[str, tuple[PictureRef, ...]]:
    refs = _pairs(root, "train")
    if len(refs) < 2:
        raise UserError(
            f"{root / 'images'} holds one picture; two are the least, one to train and one to "
            "validate on."
        )
    val = max(1, round(len(refs) * VAL_SHARE))
    return {
        "train": tuple(refs[:-val]),
        "val": tuple(replace(ref, split="val") for ref in refs[-val:]),
    }


def _classes(root: Path, has_labels: bool, foreground, objects, ignore) -> Classes:
    given = {"foreground": foreground, "objects": objects, "ignore": ignore}
    given = {key: tuple(value) for key, value in given.items() if value is not None}
    if not has_labels:
        if given:
            raise UserError(f"{root} has masks only; class ids ({', '.join(given)}) mean nothing.")
        return MASK_CLASSES
    path = root / CLASSES_FILE
    base = read_classes(path) if path.is_file() else None
    if base is None and not given.get("foreground"):
        raise UserError(
            f"{root} has label maps, so say which class ids are foreground: by --foreground or in "
            f"{path}."
        )
    # Replacing the foreground alone may leave file objects outside it; say nothing of them then.
    if base and "foreground" in given and "objects" not in given:
        given["objects"] = tuple(i for i in base.objects if i in given["foreground"])
    return replace(base or Classes(), **given)
