"""Figures that say whether a synthetic data set is worth learning from, and how fast it is made."""

import json
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from data_pipelines.schema import FUTURE_STEPS, STEP_SECONDS
from data_pipelines.synthetic.config import (
    CLASS_NAMES,
    FOREGROUND_IDS,
    OBJECT_IDS,
    SPLITS,
    WorldConfig,
)
from data_pipelines.synthetic.planner import DT, simulate, waypoints, without_hazards
from data_pipelines.synthetic.record import write_scene
from data_pipelines.synthetic.sampler import keyframe_indices, rollout, sample_scene
from data_pipelines.synthetic.tables import VERSION


def pictures_per_second(config: WorldConfig, scenes: int = 4) -> float:
    """Pictures simulated, drawn, encoded and written by one process in a second of CPU time.

    The first scene is drawn beforehand and not counted: it makes the texture tiles.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("samples", "masks", "labels"):
            for camera in config.cameras:
                (folder / kind / camera).mkdir(parents=True)
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            write_scene(folder, config, "train", 0)
            start = time.process_time()
            for index in range(1, scenes + 1):
                write_scene(folder, config, "train", index)
            seconds = time.process_time() - start
        finally:
            cv2.setNumThreads(threads)
    return scenes * config.keyframes_per_scene * len(config.cameras) / seconds


def class_shares(root: Path, camera: str) -> dict[str, float]:
    """Share of the pixels of `camera` by class name, with "foreground" and "objects" beside."""
    counts = np.zeros(len(CLASS_NAMES))
    for path in sorted((Path(root) / "labels" / camera).glob("*.png")):
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        counts += np.bincount(labels.ravel(), minlength=len(CLASS_NAMES))
    shares = counts / max(counts.sum(), 1)
    named = {name: float(share) for name, share in zip(CLASS_NAMES, shares, strict=True)}
    named["foreground"] = float(shares[list(FOREGROUND_IDS)].sum())
    named["objects"] = float(shares[list(OBJECT_IDS)].sum())
    return named


def token_areas(root: Path, camera: str, split: str, token: int = 28) -> dict[str, np.ndarray]:
    """Foreground and object area in each token of a camera's pictures.

    Returns:
        "foreground" and "objects": `[pictures, tokens]` shares of a token's pixels, raster order.
    """
    root = Path(root)
    scenes = set(json.loads((root / VERSION / "splits.json").read_text())[split])
    areas = {"foreground": [], "objects": []}
    for path in sorted((root / "labels" / camera).glob("*.png")):
        if path.name.split("__")[0] not in scenes:
            continue
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        rows, columns = labels.shape[0] // token, labels.shape[1] // token
        labels = labels[: rows * token, : columns * token]
        for name, ids in (("foreground", FOREGROUND_IDS), ("objects", OBJECT_IDS)):
            inside = np.isin(labels, ids).reshape(rows, token, columns, token)
            areas[name].append(inside.mean((1, 3)).ravel())
    return {name: np.array(rows) for name, rows in areas.items()}


def prior_recall(root: Path, camera: str, ratios=(0.5, 0.25)) -> dict[str, dict[float, float]]:
    """Area recall on the validation split of tokens chosen without, and with, seeing the picture.

    "prior" keeps the tokens with the largest mean training foreground; "oracle" those with the
    largest foreground in the picture itself; each is scored on foreground and on objects.
    """
    train, val = token_areas(root, camera, "train"), token_areas(root, camera, "val")
    order = np.argsort(-train["foreground"].mean(0), kind="stable")
    count = val["foreground"].shape[1]
    result = {}
    for ratio in ratios:
        kept = int(count * ratio)
        best = np.argsort(-val["foreground"], axis=1, kind="stable")[:, :kept]
        for name, areas in val.items():
            total = max(areas.sum(), 1e-9)
            prior = float(areas[:, order[:kept]].sum() / total)
            oracle = float(np.take_along_axis(areas, best, 1).sum() / total)
            result.setdefault(f"prior {name}", {})[ratio] = prior
            result.setdefault(f"oracle {name}", {})[ratio] = oracle
    return result


def planning_figures(config: WorldConfig) -> dict[str, float]:
    """How much the plans depend on more than the present speed.

    Returns:
        "hazard_share": key frames whose waypoint at 3 s moves by more than 1 m when stops, leads
        and barriers' speed limits are taken away or the route turns or bends away from straight
        driving; "standing_share": key frames with a standing car; "constant_velocity_l2": mean
        error in metres over six waypoints of going on straight at the present speed.
    """
    errors, hazards, standing = [], [], []
    for split in SPLITS:
        for index in range(config.scenes(split)):
            scene = sample_scene(config, split, index)
            states = rollout(scene, config.keyframes_per_scene)
            free = without_hazards(scene.task)
            for step in keyframe_indices(config.keyframes_per_scene):
                future = waypoints(states, step)
                times = STEP_SECONDS * np.arange(1, FUTURE_STEPS + 1)
                straight = np.stack([states[step].speed * times, np.zeros(FUTURE_STEPS)], 1)
                errors.append(np.linalg.norm(future - straight, axis=1).mean())
                alone = _free_run(free, states[step])
                moved = np.linalg.norm(future[-1] - alone[-1])
                aside = abs(future[:, 1]).max()
                hazards.append(moved > 1.0 or aside > 1.0)
                standing.append(states[step].speed < 0.3)
    return {
        "hazard_share": float(np.mean(hazards)),
        "standing_share": float(np.mean(standing)),
        "constant_velocity_l2": float(np.mean(errors)),
    }


def _free_run(task, state):
    return waypoints(simulate(task, state, FUTURE_STEPS * STEP_SECONDS + DT), 0)
