"""One page that shows what a data set holds, to be looked at before anything is trained on it.

Each picture has its mask, boxes and way ahead as layers that can be switched off, each moment a
plan of what is around the car. The page is one file and fetches nothing.
"""

import base64
import colorsys
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import cv2
import jinja2
import numpy as np
from PIL import Image

from data_pipelines.decode import decode_image, decode_mask
from data_pipelines.geometry import Pose, clip_ahead, project
from data_pipelines.pictures import check_picture, labels_png
from data_pipelines.schema import (
    CAN_FIELDS,
    UNKNOWN_LABEL,
    Classes,
    Record,
)
from experiments.view_sources import (
    DataSet,
    Sample,
    Solids,
    agents_now,
    ground_outlines,
    of_nuscenes,
    of_shards,
)
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation import palette
from fastdrive_jax.evaluation.pictures import encode_jpeg
from fastdrive_jax.files import write_text

_PLACE = {  # row and column as one sees the cameras from above
    "CAM_FRONT_LEFT": (0, 0),
    "CAM_FRONT": (0, 1),
    "CAM_FRONT_RIGHT": (0, 2),
    "CAM_BACK_LEFT": (1, 0),
    "CAM_BACK": (1, 1),
    "CAM_BACK_RIGHT": (1, 2),
}
# Pairs of `geometry.box_corners`: around the front, around the rear, and from one to the other.
_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4))
_EDGES += ((0, 4), (1, 5), (2, 6), (3, 7))
_COMMANDS = ("turn left", "go straight", "turn right")
_CAN_UNITS = ("m/s", "m/s²", "m/s²", "m/s²", "rad/s", "rad/s", "rad/s", "rad")
_IGNORED = "#8b8f96"
_UNNAMED = "#8a3ffc"  # foreground without a class; not in `palette.CYCLE`
_TRIES = 50  # samples looked at for each that is wanted, in search of different scenes
_REACH = 40.0  # metres ahead of the car on the plan, more where the way is longer


@dataclass(frozen=True)
class ViewArgs:
    """View samples of a data set: images, masks, boxes and trajectories on one HTML page.

    Attributes:
        shards: A finished folder of shards; or give `nuscenes`.
        nuscenes: A nuScenes folder (v1.0-*/ and samples/), instead of `shards`.
        masks: Folder of masks/, labels/ and classes.json, if they are not in `nuscenes`.
        split: Split to show; by default the first of train, val and test, or of any there is.
        samples: Number of samples to draw, from different scenes where possible.
        seed: Selects the samples.
        width: Maximum width of an image on the page, in pixels.
        out: Path of the page.
        version: Table folder such as v1.0-mini, if `nuscenes` has several.
    """

    shards: Path | None = None
    nuscenes: Path | None = None
    masks: Path | None = None
    split: str | None = None
    samples: int = 8
    seed: int = 0
    width: int = 640
    out: Path = Path("runs/view/index.html")
    version: str | None = None

    def __post_init__(self):
        if (self.shards is None) == (self.nuscenes is None):
            raise UserError("Give either --shards or --nuscenes, the folder to look at.")
        if self.nuscenes is None and (self.masks is not None or self.version is not None):
            raise UserError(
                "Shards hold masks of their own; give --masks and --version with --nuscenes only."
            )
        check_least(self, samples=1, seed=0, width=28)


def view_data(args: ViewArgs) -> Path:
    """Writes the page and returns its path; equal data and arguments give equal bytes.

    Raises:
        UserError: A folder, split or file is missing or damaged, or the page cannot be written.
    """
    for folder in (args.shards, args.nuscenes, args.masks):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give one that is there.")
    data = _read(args)
    chosen = draw_samples(data.counts[data.split], data.scene, args.samples, args.seed)
    return write_text(args.out, _page(data, [data.load(k) for k in chosen], args.width))


def _read(args: ViewArgs) -> DataSet:
    if args.nuscenes is None:
        return of_shards(args.shards, args.split)
    return of_nuscenes(args.nuscenes, args.version, args.masks, args.split)


def draw_samples(count: int, scene: Callable[[int], str], wanted: int, seed: int) -> list[int]:
    """Numbers of `wanted` of `count` samples, rising, of as many scenes as there are.

    To learn a sample's scene may mean to read its picture, so of a large set with few scenes only
    a part is looked at.
    """
    found: list[tuple[int, int]] = []  # samples of the same scene before it, number
    seen: dict[str, int] = {}
    for number in np.random.default_rng(seed).permutation(count)[: wanted * _TRIES].tolist():
        name = scene(number)
        found.append((seen.get(name, 0), number))
        seen[name] = seen.get(name, 0) + 1
        if len(seen) == wanted:
            break
    found.sort(key=lambda pair: pair[0])
    return sorted(number for _, number in found[:wanted])


def class_colours(classes: Classes | None) -> dict[int, str]:
    """A colour "#rrggbb" of its own for each foreground class id."""
    out = {}
    for place, number in enumerate(classes.foreground if classes else ()):
        if place < len(palette.CYCLE):
            out[number] = palette.CYCLE[place]
        else:  # beyond the palette by the golden angle, which keeps neighbours apart
            rgb = colorsys.hsv_to_rgb(place * 0.381966 % 1, 0.75, 0.85)
            out[number] = "#" + "".join(f"{round(255 * v):02x}" for v in rgb)
    return out


def box_lines(
    corners: np.ndarray, to_camera: Pose, intrinsic: np.ndarray, scale: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """A box in a picture, cut ahead of the camera.

    Args:
        corners: [8, 3] metres in the ego frame, the front four first.
        to_camera: The ego frame seen from the camera.
        intrinsic: [3, 3] in the picture's pixels.
        scale: [2] pixels of the page for one of the picture, across and down.

    Returns:
        In pixels of the page: those of the twelve edges [2, 2] that lie ahead at least in part, and
        the front as a closed polygon [n, 2], n = 0 where it is behind.
    """
    seen = to_camera.apply(corners)
    edges = [clip_ahead(seen[list(pair)])[:2] for pair in _EDGES]
    edges = [project(edge, intrinsic) * scale for edge in edges if len(edge)]
    return edges, project(clip_ahead(seen[:4]), intrinsic) * scale


def _path(lines: list[np.ndarray], end: str = "") -> str:
    """SVG path of lines [n, 2]."""
    return "".join(
        "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in line) + end for line in lines if len(line)
    )


def _outlines(solids: Solids, to_camera: Pose, intrinsic, scale, size) -> list[dict]:
    """Boxes of which something falls into a page picture of `size` (width, height)."""
    out = []
    for k, corners in enumerate(solids.corners):
        edges, front = box_lines(corners, to_camera, intrinsic, scale)
        if not edges:
            continue
        points = np.concatenate(edges)
        if (points.max(0) > 0).all() and (points.min(0) < size).all():
            look = f"{solids.kinds[k]}{' faint' if solids.faint[k] else ''}"
            paths = {"edges": _path(edges), "front": _path([front], "Z")}
            out.append({"look": look, "title": solids.titles[k], **paths})
    return out


def _way(record: Record, to_camera: Pose, intrinsic, scale) -> dict:
    """The way ahead on the ground of the ego frame, with a dot at every waypoint."""
    steps = np.asarray(record.future)[np.asarray(record.future_valid, bool)]
    seen = to_camera.apply(np.pad(steps, ((1, 0), (0, 1))).astype(np.float64))
    lines = [clip_ahead(seen[k : k + 2])[:2] for k in range(len(steps))]
    dots = [point for point in seen[1:] if len(clip_ahead(point[None]))]
    return {
        "path": _path([project(line, intrinsic) * scale for line in lines if len(line)]),
        "dots": [_point(project(dot, intrinsic) * scale) for dot in dots],
    }


def _point(pixel: np.ndarray) -> tuple[str, str]:
    return f"{pixel[0]:.2f}", f"{pixel[1]:.2f}"


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _mask_layer(mask: np.ndarray, labels: np.ndarray | None, classes, size) -> str:
    """A PNG of `size` (width, height): foreground in its class's colour, ignored pixels grey."""
    colours = class_colours(classes)
    # 0 is clear, 1 foreground of no foreground class, 2 ignored, then the classes.
    table = np.ones(256, np.uint8)
    table[list(colours)] = np.arange(len(colours)) + 3
    table[[*(classes.ignore if classes else ()), UNKNOWN_LABEL]] = 2
    layer = mask.astype(np.uint8)
    if labels is not None:
        layer = np.where(mask | (table[labels] == 2), table[labels], 0).astype(np.uint8)
    layer = cv2.resize(layer, size, interpolation=cv2.INTER_NEAREST_EXACT)
    picture = Image.frombytes("P", size, layer.tobytes())
    shades = ["#000000", _UNNAMED, _IGNORED, *colours.values()]
    picture.putpalette([value for shade in shades for value in palette.rgb(shade)])
    out = io.BytesIO()
    picture.save(out, "PNG", transparency=0)
    return _uri("png", out.getvalue())


def _shot(sample: Sample, place: int, classes: Classes | None, width: int) -> dict:
    """One picture with its layers and counts of its pixels, for the template."""
    record, to_camera = sample.records[place], sample.to_camera[place]
    full = check_picture(record.image, sample.files[place])
    across = min(width, full[1])
    size = (across, max(1, round(full[0] * across / full[1])))
    scale = np.array(size) / full[::-1]
    labels = mask = None
    notes, out = [], {"mask": "", "share": None, "boxes": [], "way": {"path": "", "dots": []}}
    if record.labels:
        labels = labels_png(record.labels, sample.files[place], full, classes)[1]
    if record.mask:
        mask = decode_mask(record.mask, full) > 0
    elif labels is not None:
        mask = np.isin(labels, classes.foreground)
        notes.append("no mask: foreground classes of the label map")
    else:
        notes.append("no mask")
    if mask is not None:
        out |= {"mask": _mask_layer(mask, labels, classes, size), "share": float(mask.mean())}
    intrinsic = np.asarray(record.intrinsic, np.float64)
    if to_camera is None or not np.isfinite(intrinsic).all():
        notes.append("no calibration: nothing is projected")
    else:
        out["way"] = _way(record, to_camera, intrinsic, scale)
        if sample.solids is not None:
            out["boxes"] = _outlines(sample.solids, to_camera, intrinsic, scale, size)
    photo = encode_jpeg(decode_image(record.image, size[::-1], "area"))
    return out | {
        "camera": record.camera,
        "width": size[0],
        "height": size[1],
        "photo": _uri("jpeg", photo),
        "notes": notes,
        "counts": _counts(mask if record.mask else None, labels, classes),
    }


def _counts(mask: np.ndarray | None, labels: np.ndarray | None, classes: Classes | None) -> dict:
    """Pixels with a mask and in the foreground, compared with labels and differing, by class."""
    both = mask is not None and labels is not None
    return {
        "pixels": 0 if mask is None else mask.size,
        "foreground": 0 if mask is None else int(mask.sum()),
        "compared": mask.size if both else 0,
        "differ": int((mask != np.isin(labels, classes.foreground)).sum()) if both else 0,
        "classes": np.bincount([] if labels is None else labels.ravel(), minlength=256),
    }


def _plan(record: Record) -> dict:
    """What is around the car, from above: x forward is up and y left is left, metres."""
    ways = {
        name: np.asarray(getattr(record, name), np.float64)[
            np.asarray(getattr(record, f"{name}_valid"), bool)
        ]
        for name in ("future", "history")
    }
    far = max([_REACH, *(float(np.abs(way).max()) + 5 for way in ways.values() if len(way))])
    agents, kinds = agents_now(record)
    corners = ground_outlines(record).corners[:, [2, 3, 7, 6], :2]
    inside = (agents[:, 0] > -far / 2) & (agents[:, 0] < far) & (abs(agents[:, 1]) < 0.75 * far)
    return {
        "far": far,
        "rings": [10 * k for k in range(1, int(far // 10) + 1) if far < 80 or k % 2 == 0],
        "agents": [
            {
                "kind": kinds[k],
                "path": _path([-corners[k][:, ::-1]], "Z"),
                "front": _path([-corners[k][:2, ::-1]]),
            }
            for k in np.flatnonzero(inside)
        ],
        "outside": int((~inside).sum()),
        **{name: [_point(-step[::-1]) for step in way] for name, way in ways.items()},
    }


def _facts(sample: Sample) -> dict[str, str]:
    """Names and values in words; what no pose tells is not given as 0."""
    record = sample.records[0]
    moved = np.any(record.future_valid) or np.any(record.history_valid)
    speed, gain, rate = (f"{value:.2f}" for value in record.ego_state)
    facts = dict(sample.place)
    facts["Command"] = _COMMANDS[int(record.command)] if moved else "not known"
    facts["Speed"] = f"{speed} m/s" if moved else "not known"
    facts["Acceleration"] = f"{gain} m/s²" if moved else "not known"
    facts["Yaw rate"] = f"{rate} rad/s" if moved else "not known"
    facts["Boxes"] = "absent" if sample.solids is None else str(len(sample.solids.kinds))
    if np.isnan(record.can_bus).all():
        return facts | {"CAN bus": "absent"}
    for name, unit, value in zip(CAN_FIELDS, _CAN_UNITS, record.can_bus, strict=True):
        facts[f"CAN {name}"] = "absent" if np.isnan(value) else f"{value:.2f} {unit}"
    return facts


def _page(data: DataSet, samples: list[Sample], width: int) -> str:
    shown = []
    for sample in samples:
        record = sample.records[0]
        shots = [_shot(sample, k, data.classes, width) for k in range(len(sample.records))]
        rows, columns = (sorted({_PLACE[s["camera"]][axis] for s in shots}) for axis in (0, 1))
        for shot in shots:
            row, column = _PLACE[shot["camera"]]
            shot |= {"row": rows.index(row) + 1, "column": columns.index(column) + 1}
        shown.append(
            {
                "scene": record.scene,
                "token": record.sample_token,
                "facts": _facts(sample),
                "plan": _plan(record),
                "columns": len(columns),
                "shots": sorted(shots, key=lambda shot: _PLACE[shot["camera"]]),
            }
        )
    counts = [shot["counts"] for sample in shown for shot in sample["shots"]]
    sums = {name: sum(count[name] for count in counts) for name in counts[0]}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("fastdrive_jax.evaluation")
    return environment.from_string(folder.joinpath("samples.html").read_text("utf-8")).render(
        data=data,
        samples=shown,
        classes=_class_rows(data.classes, sums["classes"]),
        sums=sums,
        masker=json.dumps(data.masker, indent=1, sort_keys=True) if data.masker else "",
        mask_colour=_UNNAMED,
        ignored_colour=_IGNORED,
    )


def _class_rows(classes: Classes | None, counts: np.ndarray) -> list[dict]:
    """Every class with its colour, role and share of the shown labelled pixels."""
    if classes is None:
        return []
    colours, total = class_colours(classes), int(counts.sum())
    named = range(len(classes.names))
    numbers = sorted({*named, *classes.foreground, *classes.ignore, *np.flatnonzero(counts)})
    rows = []
    for number in map(int, numbers):
        role = "foreground" if number in classes.foreground else "background"
        role = "object (foreground)" if number in classes.objects else role
        ignored = number in classes.ignore or number == UNKNOWN_LABEL
        rows.append(
            {
                "id": number,
                "name": classes.names[number] if number in named else "",
                "role": "ignored" if ignored else role,
                "colour": _IGNORED if ignored else colours.get(number, ""),
                "share": f"{counts[number] / total:.2%}" if total else "",
            }
        )
    return rows
