"""Writes a whole synthetic data set in the nuScenes layout: parallel, resumable and atomic.

Everything is written into `ROOT.partial`; a scene counts as done once its record, which is written
last, is there. A run that is killed goes on from the finished scenes. The folder gets its real name
only when all is in it, so a half-written data set is never taken for a whole one.
"""

import contextlib
import errno
import functools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data_pipelines.disk import locked, own_place
from data_pipelines.synthetic import tables
from data_pipelines.synthetic.config import (
    CLASS_NAMES,
    FOREGROUND_IDS,
    OBJECT_IDS,
    SPLITS,
    WorldConfig,
)
from data_pipelines.synthetic.expansion import expansion
from data_pipelines.synthetic.record import write_scene
from data_pipelines.synthetic.sampler import TILE, TILES
from data_pipelines.worker_process import run_jobs
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import write_text

CONFIG_FILE = "generator.json"
_FORMAT = 2  # raise when equal configs no longer give equal bytes
_MAP_RESOLUTION = 0.1  # metres per pixel; the devkit's default


def generate(root: Path, config: WorldConfig, progress: bool = True) -> Path:
    """Writes the data set of `config` to the folder `root` and returns it.

    Args:
        root: New folder, or one that already holds the data set of the same config.
        config: What to write; equal configs give equal bytes for any number of workers.
        progress: Show a progress bar.

    Raises:
        UserError: `root` holds something else, is being written by another process, cannot be
            written, or the disk is full.
    """
    root = Path(root)
    if root.exists() and any(root.iterdir() if root.is_dir() else [root]):
        if is_complete(root, config):
            return root
        raise UserError(
            f"{root} already exists and does not hold the data set of this config; "
            "choose another folder or delete it."
        )
    with _disk_errors(root):
        place = own_place(root)
        partial = place.with_name(place.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            _prepare_folders(partial, config)
            records = _write_scenes(partial, config, progress)
            _write_tables(partial, config, records)
            for name in ("records", ".lock"):
                path = partial / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            partial.rename(place)
    return root


def is_complete(root: Path, config: WorldConfig) -> bool:
    """Whether `root` holds the finished data set of `config`."""
    try:
        return json.loads((Path(root) / CONFIG_FILE).read_text()) == _identity(config)
    except (OSError, ValueError):
        return False


def _identity(config: WorldConfig) -> dict:
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    del fields["workers"]
    if not fields["recovery"]:
        del fields["recovery"]  # as in data sets written before there was such a field
    return {"format": _FORMAT, **fields}


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"The disk is full while writing {root}; free some space and run the same command "
                "again, which goes on where it stopped."
            )
        else:
            message = f"Cannot write the data set to {root}: {error.strerror or error}."
        raise UserError(message) from error


def _prepare_folders(partial: Path, config: WorldConfig):
    """Keeps finished scenes of the same config, clears everything else."""
    marker = partial / CONFIG_FILE
    if not is_complete(partial, config):
        others = [path for path in partial.iterdir() if path.name not in (".lock", CONFIG_FILE)]
        if others and not marker.exists():
            raise UserError(
                f"{partial} is not an unfinished data set of this generator; move it away or "
                "choose another folder."
            )
        for path in others:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _write_json(marker, _identity(config))
    for name in config.cameras:
        for kind in ("samples", "masks", "labels"):
            (partial / kind / name).mkdir(parents=True, exist_ok=True)
    for name in ("records", "maps/expansion", tables.VERSION):
        (partial / name).mkdir(parents=True, exist_ok=True)


def _write_scenes(partial: Path, config: WorldConfig, progress: bool) -> list[dict]:
    jobs = [(split, index) for split in SPLITS for index in range(config.scenes(split))]
    missing = [job for job in jobs if not _record_path(partial, *job).exists()]
    workers = config.workers or os.cpu_count() or 1
    bar = tqdm(
        total=len(jobs),
        initial=len(jobs) - len(missing),
        desc="synthetic scenes",
        unit="scene",
        disable=not progress,
    )
    with bar:
        for _ in run_jobs(missing, functools.partial(_scene_job, config), partial, workers):
            bar.update()
    return [json.loads(_record_path(partial, *job).read_text()) for job in jobs]


def _scene_job(config: WorldConfig, job: tuple[str, int], partial: Path):
    _write_json(_record_path(partial, *job), write_scene(partial, config, *job))


def _record_path(partial: Path, split: str, index: int) -> Path:
    return partial / "records" / f"{split}-{index:05d}.json"


def _write_tables(partial: Path, config: WorldConfig, records: list[dict]):
    folder = partial / tables.VERSION
    for name, rows in tables.assemble(records, config.cameras, config.seed).items():
        _write_json(folder / f"{name}.json", rows)
    _write_json(folder / "splits.json", tables.splits(records))
    planning = {token: row for record in records for token, row in record["planning"].items()}
    _write_json(partial / "planning.json", planning)
    classes = {
        "names": list(CLASS_NAMES),
        "foreground": list(FOREGROUND_IDS),
        "objects": list(OBJECT_IDS),
        "ignore": [],
    }
    _write_json(partial / "classes.json", classes)
    for location in sorted({record["location"] for record in records}):
        there = [record for record in records if record["location"] == location]
        roads = [road for record in there for road in record["roads"]]
        (partial / "maps" / f"{location}.png").write_bytes(_map_image(roads))
        vector = expansion(location, there, TILE * TILES)
        _write_json(partial / "maps" / "expansion" / f"{location}.json", vector)


def _map_image(roads: list[list[list[float]]]) -> bytes:
    """8-bit PNG of the drivable area, 0.1 m per pixel, north up, as the devkit's MapMask wants."""
    size = round(TILE * TILES / _MAP_RESOLUTION)
    image = np.zeros((size, size), np.uint8)
    for outline in roads:
        pixels = np.array(outline) / _MAP_RESOLUTION
        pixels[:, 1] = size - pixels[:, 1]
        cv2.fillPoly(image, [np.rint(pixels).astype(np.int32)], 255)
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1].tobytes()


def _write_json(path: Path, value):
    write_text(path, json.dumps(value, separators=(",", ":")))
