"""Reader of the nuScenes v1.0 tables: records by sample, without the devkit.

Layout: `ROOT/v1.0-*/` with the thirteen tables and optionally `splits.json`, `ROOT/samples/`,
beside it `ROOT/masks/` (and optionally `ROOT/labels/`) with the same names as PNG,
`ROOT/classes.json`, and optionally `ROOT/planning.json`; without the last, the plan comes from the
ego poses.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.ego import Plan, plans_from_poses
from data_pipelines.pictures import check_picture, labels_png, mask_png, read_bytes
from data_pipelines.schema import CAMERAS, FUTURE_STEPS, Record, Source, read_classes
from fastdrive_jax.errors import UserError

TABLES = (
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
)
_FIELDS = {  # of the tables that are read
    "calibrated_sensor": ("token", "sensor_token"),
    "ego_pose": ("token", "timestamp", "translation", "rotation"),
    "sample": ("token", "timestamp", "scene_token"),
    "sample_data": (
        "token",
        "sample_token",
        "ego_pose_token",
        "calibrated_sensor_token",
        "is_key_frame",
        "filename",
    ),
    "scene": ("token", "name"),
    "sensor": ("token", "channel"),
}


@dataclass(frozen=True)
class SampleRef:
    """One moment of a drive: its token and drive, the files in camera order, and the plan."""

    token: str
    scene: str
    files: tuple[tuple[Path, Path, Path | None], ...]  # picture, mask, labels
    plan: Plan


def read_nuscenes(root: Path, version: str | None = None, split: str | None = None) -> Source:
    """Reads the tables under `root` and checks that every file they name is there.

    Args:
        root: Folder that holds `v1.0-*/` and `samples/`.
        version: Table folder such as "v1.0-trainval"; may be left out when there is only one.
        split: Name for the one split that all scenes go to; needed when there is no `splits.json`,
            an error when there is one.

    Raises:
        UserError: A table, picture, mask, scene or camera is missing, or a table is not readable.
    """
    root = Path(root)
    folder = _table_folder(root, version)
    tables = _read_tables(folder)
    classes = read_classes(root / "classes.json")
    cameras, files = _camera_files(root, tables)
    chains = _scene_samples(tables, folder)
    plans = _plans(root, tables, chains)
    samples = {}
    for name, scenes in _splits(folder, tuple(chains), split).items():
        refs = []
        for scene in scenes:
            for token in chains[scene]:
                found = files.get(token, {})
                absent = [camera for camera in cameras if camera not in found]
                if absent:
                    raise UserError(
                        f"Sample {token} of {scene} has no key frame of {', '.join(absent)}; "
                        "complete sample_data.json or leave the scene out of splits.json."
                    )
                refs.append(SampleRef(token, scene, tuple(found[c] for c in cameras), plans[token]))
        samples[name] = tuple(refs)
    size = _check_files([ref for refs in samples.values() for ref in refs])

    def load(ref: SampleRef) -> tuple[Record, ...]:
        return tuple(
            _load_picture(ref, camera, *paths, classes)
            for camera, paths in zip(cameras, ref.files, strict=True)
        )

    return Source(f"nuscenes:{root.resolve().name}", cameras, classes, samples, load, size)


def _load_picture(ref: SampleRef, camera, picture, mask, labels, classes) -> Record:
    image = read_bytes(picture)
    size = check_picture(image, picture)
    return Record(
        image=image,
        mask=mask_png(read_bytes(mask), mask, size),
        labels=b"" if labels is None else labels_png(read_bytes(labels), labels, size, classes)[0],
        camera=camera,
        sample_token=ref.token,
        scene=ref.scene,
        ego_state=ref.plan.ego_state,
        command=ref.plan.command,
        future=ref.plan.future,
        future_valid=ref.plan.future_valid,
    )


def _table_folder(root: Path, version: str | None) -> Path:
    found = sorted(p.name for p in root.glob("v1.0-*") if p.is_dir())
    if version is None:
        if not found:
            raise UserError(f"{root} has no v1.0-* folder of tables; is it a nuScenes folder?")
        if len(found) > 1:
            raise UserError(f"{root} has tables of {', '.join(found)}; name the version to read.")
        version = found[0]
    if version not in found:
        raise UserError(f"{root} has no tables of {version}; it has {', '.join(found) or 'none'}.")
    return root / version


def _read_tables(folder: Path) -> dict[str, list[dict]]:
    absent = [name for name in TABLES if not (folder / f"{name}.json").is_file()]
    if absent:
        raise UserError(
            f"{folder} lacks {len(absent)} of the {len(TABLES)} nuScenes tables: "
            f"{', '.join(f'{name}.json' for name in absent)}; add them."
        )
    tables = {}
    for name, fields in _FIELDS.items():
        path = folder / f"{name}.json"
        tables[name] = rows = _read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} is not a list of rows; write it again.")
        for row in rows:
            if not all(field in row for field in fields):
                lacking = ", ".join(field for field in fields if field not in row)
                raise UserError(f"A row of {path} lacks {lacking} (token {row.get('token')}).")
    return tables


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); write it again.") from error


def _camera_files(root: Path, tables: dict):
    """Cameras that the set has, and sample token -> camera -> (picture, mask, labels)."""
    channel = {row["token"]: row["channel"] for row in tables["sensor"]}
    sensor = {row["token"]: channel.get(row["sensor_token"]) for row in tables["calibrated_sensor"]}
    has_labels = (root / "labels").is_dir()
    files: dict[str, dict[str, tuple]] = {}
    for row in tables["sample_data"]:
        camera = sensor.get(row["calibrated_sensor_token"])
        if not row["is_key_frame"] or camera not in CAMERAS:
            continue
        picture = Path(row["filename"])
        inside = Path(*picture.parts[1:]).with_suffix(".png")
        files.setdefault(row["sample_token"], {})[camera] = (
            root / picture,
            root / "masks" / inside,
            root / "labels" / inside if has_labels else None,
        )
    used = {camera for cameras in files.values() for camera in cameras}
    cameras = tuple(camera for camera in CAMERAS if camera in used)
    if not cameras:
        raise UserError(f"sample_data.json under {root} has no key frame of a camera.")
    return cameras, files


def _scene_samples(tables: dict, folder: Path) -> dict[str, list[str]]:
    """Scene name -> sample tokens in time order."""
    names = {row["token"]: row["name"] for row in tables["scene"]}
    chains: dict[str, list] = {name: [] for name in names.values()}
    for row in tables["sample"]:
        if row["scene_token"] not in names:
            raise UserError(
                f"Sample {row['token']} in {folder / 'sample.json'} belongs to scene token "
                f"{row['scene_token']}, which scene.json does not have; complete the tables."
            )
        chains[names[row["scene_token"]]].append((row["timestamp"], row["token"]))
    return {name: [token for _, token in sorted(rows)] for name, rows in chains.items()}


def _splits(folder: Path, scenes: tuple[str, ...], split: str | None) -> dict[str, list[str]]:
    path = folder / "splits.json"
    if not path.is_file():
        if split is None:
            raise UserError(
                f"{path} is missing; write the scene names of each split to it, or name the one "
                "split that all scenes belong to."
            )
        return {split: list(scenes)}
    if split is not None:
        raise UserError(f"{path} says which scene is in which split; give no split beside it.")
    splits = _read_json(path)
    if not isinstance(splits, dict) or not all(isinstance(v, list) for v in splits.values()):
        raise UserError(f'{path} must look like {{"train": ["scene-0001", ...], "val": [...]}}.')
    splits = {name: members for name, members in splits.items() if members}
    seen: dict[str, str] = {}
    for name, members in splits.items():
        for scene in members:
            if scene not in scenes:
                raise UserError(f"{path} names {scene} in {name}, which scene.json does not have.")
            if scene in seen:
                raise UserError(f"{path} names {scene} in both {seen[scene]} and {name}.")
            seen[scene] = name
    if not seen:
        raise UserError(f"{path} names no scene; add some.")
    return splits


def _plans(root: Path, tables: dict, chains: dict[str, list[str]]) -> dict[str, Plan]:
    path = root / "planning.json"
    if path.is_file():
        rows = _read_json(path)
        return {
            token: _stated_plan(path, rows, token) for tokens in chains.values() for token in tokens
        }
    poses = {row["token"]: row for row in tables["ego_pose"]}
    channel = {row["token"]: row["channel"] for row in tables["sensor"]}
    sensor = {row["token"]: channel.get(row["sensor_token"]) for row in tables["calibrated_sensor"]}
    # The lidar's pose is the sample's reference in nuScenes; a set without lidar has the front
    # camera's, which is taken at almost the same time.
    rank = {"CAM_FRONT": 1, "LIDAR_TOP": 2}
    best: dict[str, tuple[int, str]] = {}
    for row in tables["sample_data"]:
        if row["is_key_frame"]:
            order = rank.get(sensor.get(row["calibrated_sensor_token"]), 0)
            if order > best.get(row["sample_token"], (-1, ""))[0]:
                best[row["sample_token"]] = (order, row["ego_pose_token"])
    plans = {}
    for tokens in chains.values():
        chain = []
        for token in tokens:
            pose = poses.get(best.get(token, (0, ""))[1])
            if pose is None:
                raise UserError(
                    f"Sample {token} has no ego pose in ego_pose.json under {root}; "
                    "complete the table."
                )
            chain.append(pose)
        plans.update(zip(tokens, plans_from_poses(chain), strict=True))
    return plans


def _stated_plan(path: Path, rows: Any, token: str) -> Plan:
    try:
        row = rows[token]
        plan = Plan(
            np.asarray(row["ego_state"], np.float32),
            int(row["command"]),
            np.asarray(row["future"], np.float32),
            np.asarray(row["future_valid"], bool),
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


def _check_files(refs: list[SampleRef]) -> int:
    """Bytes of all files; every absence is found before anything is written."""
    size = 0
    for ref in refs:
        for paths in ref.files:
            for path in paths:
                if path is None:
                    continue
                try:
                    size += path.stat().st_size
                except FileNotFoundError as error:
                    raise UserError(
                        f"{path} is missing (sample {ref.token} of {ref.scene}); add the file or "
                        "leave the scene out of splits.json."
                    ) from error
    return size
