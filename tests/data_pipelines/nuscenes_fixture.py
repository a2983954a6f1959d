"""A tiny data set in the nuScenes layout, written by hand: two drives, two cameras."""

import json
from pathlib import Path

import cv2
import numpy as np

CAMERAS = ("CAM_BACK", "CAM_FRONT")  # not in our order, on purpose
SIZE = (56, 84)
CLASSES = {
    "names": ["sky", "road", "car", "void"],
    "foreground": [1, 2],
    "objects": [2],
    "ignore": [3],
}
STEP = 500_000  # microseconds


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def scene_arrays(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture [H, W, 3] and its label map [H, W], different for every seed."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(SIZE, np.uint8)
    labels[28:] = 1
    labels[30:50, 10 + seed % 40 : 30 + seed % 40] = 2
    labels[:4, :4] = 3
    image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return cv2.GaussianBlur(image, (5, 5), 0), labels


def write_nuscenes(
    root: Path,
    frames: int = 9,
    splits: dict | None = None,
    planning: dict | None = None,
    with_labels: bool = True,
) -> Path:
    """Drive a goes straight at 10 m/s, drive b turns left on a circle of 20 m at 5 m/s."""
    tables = {name: [] for name in ("sensor", "calibrated_sensor", "scene", "sample")}
    tables |= {name: [] for name in ("sample_data", "ego_pose")}
    for name in ("attribute", "category", "instance", "log", "map"):
        tables[name] = []
    tables |= {"sample_annotation": [], "visibility": []}
    tables["log"] = [{"token": "l", "location": "boston-seaport"}]
    tables["sensor"] = [
        {"token": f"s-{c}", "channel": c, "modality": "camera"} for c in CAMERAS
    ] + [{"token": "s-lidar", "channel": "LIDAR_TOP", "modality": "lidar"}]
    tables["calibrated_sensor"] = [
        {
            "token": f"c-{row['channel']}",
            "sensor_token": row["token"],
            "translation": [1.5, 0.0, 1.4],
            "rotation": [0.5, -0.5, 0.5, -0.5],  # x right, y down, z ahead
            "camera_intrinsic": [[60.0, 0, 42.0], [0, 60.0, 28.0], [0, 0, 1]]
            if row["modality"] == "camera"
            else [],
        }
        for row in tables["sensor"]
    ]
    seed = 0
    for drive in ("a", "b"):
        tables["scene"].append({"token": f"t-{drive}", "name": f"scene-{drive}", "log_token": "l"})
        for k in range(frames):
            token = f"{drive}{k}"
            stamp = k * STEP
            tables["sample"].append(
                {"token": token, "timestamp": stamp, "scene_token": f"t-{drive}"}
            )
            for channel in (*CAMERAS, "LIDAR_TOP"):
                key = f"{token}-{channel}"
                folder = "sweeps" if channel == "LIDAR_TOP" else "samples"
                suffix = "bin" if channel == "LIDAR_TOP" else "jpg"
                name = f"{folder}/{channel}/{key}.{suffix}"
                tables["sample_data"].append(
                    {
                        "token": key,
                        "sample_token": token,
                        "ego_pose_token": key,
                        "calibrated_sensor_token": f"c-{channel}",
                        "timestamp": stamp,
                        "is_key_frame": True,
                        "height": SIZE[0],
                        "width": SIZE[1],
                        "filename": name,
                    }
                )
                tables["ego_pose"].append(pose(key, stamp, drive, channel == "LIDAR_TOP"))
                if channel != "LIDAR_TOP":
                    write_picture(root, name, seed, with_labels)
                    seed += 1
    # Table rows come in no useful order in the real set.
    for name in ("sample", "sample_data", "ego_pose"):
        tables[name] = tables[name][::-1]
    for name, rows in tables.items():
        write_json(root / "v1.0-mini" / f"{name}.json", rows)
    chosen = {"train": ["scene-a"], "val": ["scene-b"]} if splits is None else splits
    if chosen:
        write_json(root / "v1.0-mini" / "splits.json", chosen)
    write_json(root / "classes.json", CLASSES)
    if planning is not None:
        write_json(root / "planning.json", planning)
    return root


def pose(key: str, stamp: int, drive: str, lidar: bool) -> dict:
    seconds = stamp * 1e-6
    if drive == "a":
        yaw, place = 0.3, 10 * seconds * np.array([np.cos(0.3), np.sin(0.3)])
    else:
        yaw = 5 * seconds / 20
        place = 20 * np.array([np.sin(yaw), 1 - np.cos(yaw)])
    # Camera poses are a little off, so that a test sees whose pose was taken.
    shift = 0.0 if lidar else 0.5
    return {
        "token": key,
        "timestamp": stamp,
        "translation": [100 + place[0] + shift, 50 + place[1], 0.0],
        "rotation": [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))],
    }


def write_picture(root: Path, name: str, seed: int, with_labels: bool) -> None:
    image, labels = scene_arrays(seed)
    inside = Path(*Path(name).parts[1:]).with_suffix(".png")
    write_image(root / name, image)
    write_image(root / "masks" / inside, np.where(np.isin(labels, (1, 2)), 255, 0).astype("uint8"))
    if with_labels:
        write_image(root / "labels" / inside, labels)


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array)
