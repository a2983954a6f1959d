"""A nuScenes folder with masks as a source of records.

Layout: what `tables` reads, and beside `ROOT/samples/` the folders `masks/` and perhaps `labels/`
with the same names as PNG, and `classes.json`: what a masker writes. They may lie in a folder of
their own. A `ROOT/planning.json` is preferred to plans from the ego poses.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.ego import Plan
from data_pipelines.maskers.provenance import check_stamp
from data_pipelines.nuscenes.driving import Moment, scene_moments
from data_pipelines.nuscenes.tables import NuScenes, open_nuscenes
from data_pipelines.pictures import (
    check_bad,
    check_picture,
    labels_png,
    mask_png,
    read_bytes,
    size_of_files,
)
from data_pipelines.schema import (
    CLASSES_FILE,
    FUTURE_STEPS,
    Classes,
    Record,
    Source,
    read_classes,
)
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import read_json


@dataclass(frozen=True)
class SampleRef:
    """One moment of a drive: all of its records but the files' content.

    Attributes:
        token: Of the sample.
        scene: Its drive.
        files: Picture, mask and labels of each camera.
        cameras: Fields of `Record` that each camera has.
        shared: Fields that all cameras have.
    """

    token: str
    scene: str
    files: tuple[tuple[Path, Path, Path | None], ...]
    cameras: tuple[dict[str, Any], ...]
    shared: dict[str, Any]


def read_nuscenes(
    root: Path,
    version: str | None = None,
    split: str | None = None,
    masks: Path | None = None,
    skip_bad: int = 0,
) -> Source:
    """Reads the tables under `root` and checks that every file they name is there.

    Args:
        root: Folder that holds `v1.0-*/` and `samples/`.
        version: Table folder such as "v1.0-trainval"; may be left out when there is only one.
        split: See `open_nuscenes`.
        masks: Folder of `masks/`, `labels/` and `classes.json`; None means `root`.
        skip_bad: How many samples may lack a file. They stay in the source and cannot be loaded, so
            `build_shards` needs as many.

    Raises:
        UserError: A table, picture, mask, scene or camera is missing, or a table is not readable.
    """
    root = Path(root)
    masks = root if masks is None else Path(masks)
    nuscenes = open_nuscenes(root, version, split)
    if not (masks / CLASSES_FILE).is_file():
        raise UserError(
            f"{masks / CLASSES_FILE} is missing; make the masks by `fastdrive data mask`, or name "
            "the folder that it wrote with --masks."
        )
    classes = read_classes(masks / CLASSES_FILE)
    stated_path = root / "planning.json"
    stated = read_json(stated_path) if stated_path.is_file() else None
    has_labels = (masks / "labels").is_dir()
    samples = {}
    for name, scenes in nuscenes.splits.items():
        refs = []
        for scene in scenes:
            for moment in scene_moments(nuscenes, nuscenes.scenes[scene]):
                plan = moment.plan
                if stated is not None:
                    plan = stated_plan(stated_path, stated, moment.keyframe.token, plan)
                refs.append(_reference(nuscenes, moment, plan, masks, has_labels))
        samples[name] = tuple(refs)
    made_by = masks / "masker.json"
    masker = read_json(made_by) if made_by.is_file() else {}
    size = _check_files([ref for refs in samples.values() for ref in refs], skip_bad)
    return Source(
        name=f"nuscenes:{root.resolve().name}",
        cameras=nuscenes.cameras,
        classes=classes,
        samples=samples,
        load=functools.partial(load_sample, classes=classes, masker=masker),
        files=sample_files,
        size=size,
        absent=nuscenes.absent,
        masker=masker,
    )


def sample_files(ref: SampleRef) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Pictures of a reference, and masks and labels."""
    others = tuple(path for paths in ref.files for path in paths[1:] if path is not None)
    return tuple(paths[0] for paths in ref.files), others


def load_sample(ref: SampleRef, classes: Classes, masker: Mapping[str, Any]) -> tuple[Record, ...]:
    """The records of a reference, one for each camera.

    Raises:
        UserError: A file is missing or damaged, or a mask is not of its picture's size or was made
            in another way than `masker` says.
    """
    records = []
    for (picture, mask, labels), own in zip(ref.files, ref.cameras, strict=True):
        image = read_bytes(picture)
        size = check_picture(image, picture)
        found = read_bytes(mask)
        check_stamp(found, mask, masker)
        named = b""
        if labels is not None:
            named = labels_png(read_bytes(labels), labels, size, classes)[0]
        records.append(
            Record(
                image=image,
                mask=mask_png(found, mask, size),
                labels=named,
                sample_token=ref.token,
                scene=ref.scene,
                **own,
                **ref.shared,
            )
        )
    return tuple(records)


def _reference(nuscenes: NuScenes, moment: Moment, plan: Plan, masks: Path, labels: bool):
    files, cameras = [], []
    for view in moment.keyframe.cameras:
        picture = Path(view.filename)
        inside = Path(*picture.parts[1:]).with_suffix(".png")
        files.append(
            (
                nuscenes.root / picture,
                masks / "masks" / inside,
                masks / "labels" / inside if labels else None,
            )
        )
        cameras.append(
            {
                "camera": view.channel,
                "intrinsic": view.intrinsic.astype(np.float32),
                "camera_to_ego": view.camera_to_ego.matrix().astype(np.float32),
            }
        )
    agents = moment.agents
    shared = {
        **{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)},
        "can_bus": moment.can_bus.astype(np.float32),
        "agents": agents.boxes,
        "agents_valid": agents.valid,
        "agents_kind": agents.kind,
    }
    frame = moment.keyframe
    return SampleRef(frame.token, frame.scene, tuple(files), tuple(cameras), shared)


def stated_plan(path: Path, rows: Any, token: str, posed: Plan) -> Plan:
    """The plan in a `planning.json`; what lies behind the car comes from the poses."""
    try:
        row = rows[token]
        plan = dataclasses.replace(
            posed,
            ego_state=np.asarray(row["ego_state"], np.float32),
            command=int(row["command"]),
            future=np.asarray(row["future"], np.float32),
            future_valid=np.asarray(row["future_valid"], bool),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} has no complete plan for sample {token} (ego_state, command, future, "
            "future_valid); write it again or delete the file to use the ego poses."
        ) from error
    shapes = (plan.ego_state.shape, plan.future.shape, plan.future_valid.shape)
    if shapes != ((3,), (FUTURE_STEPS, 2), (FUTURE_STEPS,)) or plan.command not in (0, 1, 2):
        raise UserError(
            f"The plan of sample {token} in {path} needs ego_state [3], command 0..2, "
            f"future [{FUTURE_STEPS}, 2] and future_valid [{FUTURE_STEPS}]."
        )
    return plan


def _check_files(refs: list[SampleRef], skip_bad: int) -> int:
    """Bytes of all files; every absence is found before anything is written."""
    size, bad = 0, []
    for ref in refs:
        found, missing = size_of_files(itertools.chain(*sample_files(ref)))
        size += found
        if missing:
            bad.append(f"{missing[0]} is missing (sample {ref.token} of {ref.scene}); add it.")
    check_bad(bad, skip_bad)
    return size
