"""One page that shows what a data set holds, to be looked at before anything is trained on it.

Each picture has its mask, boxes and way ahead as layers that can be switched off, each moment a
plan of what is around the car. The page is one file and fetches nothing.
"""

import base64
import colorsys
import datetime
import functools
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from PIL import Image

from data_pipelines.decode import decode_image, decode_mask
from data_pipelines.disk import read_json
from data_pipelines.geometry import Pose, box_corners, clip_ahead, project
from data_pipelines.maskers.run import MASKER_FILE
from data_pipelines.nuscenes.driving import Moment, scene_moments
from data_pipelines.nuscenes.source import _stated_plan
from data_pipelines.nuscenes.tables import open_nuscenes
from data_pipelines.pictures import check_picture, labels_png, mask_png, read_bytes
from data_pipelines.schema import (
    AGENT_KINDS,
    CAN_FIELDS,
    CLASSES_FILE,
    UNKNOWN_LABEL,
    Classes,
    Record,
    read_classes,
)
from data_pipelines.shards import MANIFEST, open_shards, record_source
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation import palette
from fastdrive_jax.evaluation.files import write_text
from fastdrive_jax.evaluation.pictures import encode_jpeg

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
_KIND_OF = {"vehicle": "vehicle", "human": "person", "movable_object": "obstacle"}


@dataclass(frozen=True)
class Solids:
    """M things to outline in the pictures.

    Attributes:
        corners: [M, 8, 3] as `geometry.box_corners`, metres in the ego frame; flat boxes may have
            height 0.
        kinds: Of `AGENT_KINDS`, or "other".
        titles: Shown when one points at a box.
        faint: bool [M], drawn dashed.
    """

    corners: np.ndarray
    kinds: tuple[str, ...]
    titles: tuple[str, ...]
    faint: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One moment.

    Attributes:
        records: As in shards; `mask` is b"" where there is none.
        files: Where each picture comes from, for errors.
        place: Location and time, as far as known.
        solids: None where there are no annotations.
        to_camera: The ego frame of the moment seen from each camera; None where not known.
    """

    records: tuple[Record, ...]
    files: tuple[Path, ...]
    place: Mapping[str, str]
    solids: Solids | None
    to_camera: tuple[Pose | None, ...]


@dataclass(frozen=True)
class DataSet:
    """What the page says of the whole set, and how a sample of the chosen split is read.

    Attributes:
        name: Of the set.
        split: The chosen one.
        counts: Samples of each split.
        cameras: Channels.
        classes: None where nothing says what class ids mean.
        lists: Sentences under their titles: what is absent, dropped or skipped.
        masker: How the masks were made; empty where not known.
        boxes: Says what the outlines in the pictures are.
        scene: The drive of sample i.
        load: Sample i.
    """

    name: str
    split: str
    counts: Mapping[str, int]
    cameras: tuple[str, ...]
    classes: Classes | None
    lists: Mapping[str, tuple[str, ...]]
    masker: Mapping[str, Any]
    boxes: str
    scene: Callable[[int], str]
    load: Callable[[int], Sample]


def _choose_split(asked: str | None, counts: Mapping[str, int], path: Path) -> str:
    filled = [name for name in ("train", "val", "test", *sorted(counts)) if counts.get(name)]
    if not filled:
        raise UserError(f"{path} has no sample in any split; add some.")
    if asked is not None and asked not in filled:
        raise UserError(f"{path} has no split {asked!r}; it has {', '.join(sorted(set(filled)))}.")
    return asked or filled[0]


def of_shards(path: Path, asked: str | None) -> DataSet:
    """Shards and the split `asked` for, or the first.

    Raises:
        UserError: They are not whole, or there is no such split.
    """
    shards = open_shards(path)
    manifest = read_json(shards.path / MANIFEST)
    split = _choose_split(asked, shards.samples, shards.path)
    source, stride = record_source(shards, split), len(shards.cameras)
    lacking = sorted({"absent", "duplicates", "masker", "skipped"} - set(manifest))
    if lacking:
        raise UserError(f"{path / MANIFEST} has no {', '.join(lacking)}; build the shards again.")
    dropped = manifest["duplicates"]

    def load(number: int) -> Sample:
        stored = [source[place] for place in range(number * stride, (number + 1) * stride)]
        names = ("camera", "sample_token", "scene")
        records = tuple(Record(**row | {key: row[key].decode() for key in names}) for row in stored)
        return Sample(
            records,
            tuple(shards.path / f"{row.sample_token} {row.camera}" for row in records),
            {"Location, time": "not kept in shards"},
            ground_outlines(records[0]),
            tuple(
                Pose(pose[:3, :3], pose[:3, 3]).inverse() if np.isfinite(pose).all() else None
                for pose in (np.asarray(row.camera_to_ego, np.float64) for row in records)
            ),
        )

    return DataSet(
        name=shards.name,
        split=split,
        counts=shards.samples,
        cameras=shards.cameras,
        classes=shards.classes,
        lists={
            "Absent": tuple(manifest["absent"]),
            "Dropped as duplicates": tuple(f"{n} of {k}" for k, n in dropped.items() if n),
            "Skipped": tuple(manifest["skipped"]),
        },
        masker=manifest["masker"],
        boxes="outlines of agents on the ground (z = 0 of the ego frame) at the sample's moment, "
        "as shards keep no heights; the thick edge is the front",
        scene=lambda number: source[number * stride]["scene"].decode(),
        load=load,
    )


def agents_now(record: Record) -> tuple[np.ndarray, tuple[str, ...]]:
    """Agents annotated at the moment, [A, 5] x, y, yaw, length and width, and their kinds."""
    now = np.asarray(record.agents_valid, bool)[:, 0]
    kinds = np.asarray(record.agents_kind)[now]
    return np.asarray(record.agents, np.float64)[now, 0], tuple(AGENT_KINDS[k] for k in kinds)


def ground_outlines(record: Record) -> Solids:
    """The same agents as boxes of height 0 on the ground of the ego frame."""
    agents, kinds = agents_now(record)
    (x, y, yaw, length, width), zero = agents.T, np.zeros(len(agents))
    cos, sin = np.cos(yaw), np.sin(yaw)
    turns = np.array([[cos, -sin, zero], [sin, cos, zero], [zero, zero, zero + 1]])
    corners = box_corners(
        np.stack([x, y, zero], -1), np.stack([width, length, zero], -1), np.moveaxis(turns, 2, 0)
    )
    return Solids(corners, kinds, kinds, zero > 0)


def of_nuscenes(root: Path, version: str | None, masks: Path | None, asked: str | None) -> DataSet:
    """A nuScenes folder, with masks as far as there are any; arguments as in `ViewArgs`.

    Raises:
        UserError: A table is missing or damaged, or there is no such split.
    """
    nuscenes = open_nuscenes(root, version)
    places = {
        split: [(name, k) for name in names for k in range(len(nuscenes.scenes[name].samples))]
        for split, names in nuscenes.splits.items()
    }
    counts = {split: len(found) for split, found in places.items()}
    split = _choose_split(asked, counts, nuscenes.root)
    folder = masks or nuscenes.root
    maps = [kind for kind in ("masks", "labels") if (folder / kind).is_dir()]
    if masks is not None and not maps:
        raise UserError(f"{folder} has neither masks/ nor labels/; give the folder that has them.")
    lacking = [
        f"{folder.resolve().name}/ has no {kind}/: pictures are shown without {kind}."
        for kind in ("masks", "labels")
        if kind not in maps
    ]
    classes = None
    if "labels" in maps or (folder / CLASSES_FILE).is_file():
        classes = read_classes(folder / CLASSES_FILE)
    stated_path, made_by = nuscenes.root / "planning.json", folder / MASKER_FILE
    stated = read_json(stated_path) if stated_path.is_file() else None

    @functools.lru_cache(maxsize=1)  # samples come in the order of their scenes
    def moments(scene: str) -> list[Moment]:
        return scene_moments(nuscenes, nuscenes.scenes[scene])

    def load(number: int) -> Sample:
        scene, step = places[split][number]
        moment = moments(scene)[step]
        frame, plan = moment.keyframe, moment.plan
        if stated is not None:
            plan = _stated_plan(stated_path, stated, frame.token, plan)
        shared = vars(plan) | {
            "can_bus": moment.can_bus,
            "agents": moment.agents.boxes,
            "agents_valid": moment.agents.valid,
            "agents_kind": moment.agents.kind,
        }
        records = []
        for view in frame.cameras:
            file = nuscenes.root / view.filename
            inside = Path(*Path(view.filename).parts[1:]).with_suffix(".png")
            found = {kind: folder / kind / inside for kind in ("masks", "labels")}
            image = read_bytes(file)
            size = check_picture(image, file)
            mask, labels = (
                read_bytes(path) if kind in maps and path.is_file() else b""
                for kind, path in found.items()
            )
            records.append(
                Record(
                    image=image,
                    mask=mask and mask_png(mask, found["masks"], size),
                    labels=labels and labels_png(labels, found["labels"], size, classes)[0],
                    camera=view.channel,
                    sample_token=frame.token,
                    scene=frame.scene,
                    intrinsic=view.intrinsic,
                    **shared,
                )
            )
        time = datetime.datetime.fromtimestamp(frame.timestamp // 10**6, datetime.UTC)
        return Sample(
            tuple(records),
            tuple(nuscenes.root / view.filename for view in frame.cameras),
            {
                "Location": frame.location or "not known",
                "Time": f"{time:%Y-%m-%d %H:%M:%S} UTC",
            },
            _annotated_solids(moment),
            tuple(view.global_to_camera @ frame.ego_to_global for view in frame.cameras),
        )

    return DataSet(
        name=f"nuscenes:{nuscenes.root.resolve().name}",
        split=split,
        counts=counts,
        cameras=nuscenes.cameras,
        classes=classes,
        lists={"Absent": (*nuscenes.absent, *lacking)},
        masker=read_json(made_by) if made_by.is_file() else {},
        boxes="annotated boxes at the sample's moment, the front filled; dashed where at most 40% "
        "of a thing is seen in all pictures together",
        scene=lambda number: places[split][number][0],
        load=load,
    )


def _annotated_solids(moment: Moment) -> Solids | None:
    boxes = moment.keyframe.boxes
    if boxes is None:
        return None
    kinds = tuple(
        "cycle"
        if name in ("vehicle.bicycle", "vehicle.motorcycle")
        else _KIND_OF.get(name.partition(".")[0], "other")
        for name in boxes.categories
    )
    rows = zip(boxes.categories, boxes.visibility, boxes.lidar_points, strict=True)
    return Solids(
        moment.keyframe.ego_to_global.inverse().apply(boxes.corners()),
        kinds,
        tuple(f"{name}, visibility {v or 'not known'}, {n} lidar points" for name, v, n in rows),
        boxes.visibility == 1,
    )


@dataclass(frozen=True)
class ViewArgs:
    """Look at samples of a data set: pictures, masks, boxes and ways on one HTML page.

    Attributes:
        shards: A finished folder of shards; or else:
        nuscenes: A nuScenes folder (v1.0-*/ and samples/).
        masks: Folder of masks/, labels/ and classes.json where they do not lie in `nuscenes`.
        split: Which split; by default the first of train, val and test, or of any there is.
        samples: How many samples are drawn, of different scenes as far as there are.
        seed: Which ones.
        width: Pixels across a picture on the page, at most.
        out: The page.
        version: Table folder such as v1.0-mini, where `nuscenes` has several.
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
        for name, least in (("samples", 1), ("seed", 0), ("width", 28)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}.")


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
