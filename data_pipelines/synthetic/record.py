"""Simulates, renders and writes one scene; returns its rows of the tables."""

from pathlib import Path

import cv2
import numpy as np

from data_pipelines.schema import FUTURE_STEPS, STEP_SECONDS
from data_pipelines.synthetic import tables
from data_pipelines.synthetic.camera import Camera, make_camera
from data_pipelines.synthetic.config import FOREGROUND_IDS, WorldConfig
from data_pipelines.synthetic.expansion import scene_map
from data_pipelines.synthetic.geometry import STEP, pose_on, quaternion, rotation_z
from data_pipelines.synthetic.planner import DT, EgoState
from data_pipelines.synthetic.render import Picture, prepare, render
from data_pipelines.synthetic.roads import band
from data_pipelines.synthetic.sampler import keyframe_indices, rollout, sample_scene
from data_pipelines.synthetic.scene import Scene

ANNOTATION_RANGE = 80.0  # metres around the ego car
_EPOCH = 1_577_836_800_000_000  # microseconds, 2020-01-01
_FOREGROUND = np.isin(np.arange(256), FOREGROUND_IDS)


def encode(picture: Picture, quality: int) -> tuple[bytes, bytes, bytes]:
    """JPEG of the image, 1-bit PNG of the foreground mask, 8-bit PNG of the labels."""
    jpeg = cv2.imencode(".jpg", picture.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    mask = _FOREGROUND[picture.labels].astype(np.uint8) * 255
    bilevel = cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_BILEVEL, 1])[1]
    labels = cv2.imencode(".png", picture.labels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
    return jpeg.tobytes(), bilevel.tobytes(), labels.tobytes()


def plan(scene: Scene, states: list[EgoState], index: int, sway) -> dict:
    """Planning record of the key frame at simulation step `index`, in the tilted ego frame."""
    here = states[index]
    rotation, origin = pose_on(scene.terrain, (here.x, here.y), here.yaw, *sway)
    stride = round(STEP_SECONDS / DT)
    future = [states[index + stride * (k + 1)] for k in range(FUTURE_STEPS)]
    spots = scene.terrain.lift(np.array([[f.x, f.y] for f in future]))
    return {
        "command": scene.command_at(here),
        "ego_state": tables.numbers([here.speed, here.acceleration, here.yaw_rate]),
        "future": [tables.numbers(p) for p in ((spots - origin) @ rotation)[:, :2]],
        "future_valid": [True] * FUTURE_STEPS,
    }


def write_scene(folder: Path, config: WorldConfig, split: str, index: int) -> dict:
    """Writes the pictures of one scene below `folder` and returns its table rows.

    Returns:
        Rows by table name, with "split", "location", "roads" (asphalt outlines in the global
        frame) and "planning" (by sample token) beside them. Depends on the arguments only.
    """
    scene = sample_scene(config, split, index)
    states = rollout(scene, config.keyframes_per_scene)
    stage = prepare(scene)
    cameras = [
        make_camera(name, config.height, config.width, scene.pitch[name]) for name in config.cameras
    ]
    scene_token = tables.token("scene", config.seed, scene.name)
    record = {
        "split": split,
        "location": scene.location,
        "roads": _road_outlines(scene),
        "map": scene_map(scene),
        "planning": {},
        "sample": [],
        "sample_data": [],
        "ego_pose": [],
        "calibrated_sensor": [_calibration(scene_token, c) for c in cameras],
    }
    start = _EPOCH + (index + (split == "val") * 100_000) * 60_000_000
    tracks = {}
    channels = {camera.name: [] for camera in cameras}
    for k, step in enumerate(keyframe_indices(config.keyframes_per_scene)):
        state, time = states[step], step * DT
        timestamp = start + round(time * 1e6)
        sample_token = tables.token("sample", scene_token, k)
        record["sample"].append(
            {"token": sample_token, "timestamp": timestamp, "scene_token": scene_token}
        )
        record["planning"][sample_token] = plan(scene, states, step, scene.sway[k])
        pose = scene.to_world(
            *pose_on(scene.terrain, (state.x, state.y), state.yaw, *scene.sway[k])
        )
        seen = np.zeros(len(scene.actors))
        for camera in cameras:
            seed = 64 * k + config.cameras.index(camera.name)
            picture = render(scene, stage, camera, state, time, scene.sway[k], seed)
            seen = np.maximum(seen, picture.visible)
            stem = f"{camera.name}/{scene.name}__{camera.name}__{timestamp}"
            files = (f"samples/{stem}.jpg", f"masks/{stem}.png", f"labels/{stem}.png")
            for name, data in zip(files, encode(picture, config.jpeg_quality), strict=True):
                (folder / name).write_bytes(data)
            row = _sample_data(sample_token, scene_token, camera, timestamp, files[0])
            channels[camera.name].append(row)
            record["ego_pose"].append(
                {
                    "token": row["ego_pose_token"],
                    "timestamp": timestamp,
                    "rotation": tables.numbers(quaternion(pose[0])),
                    "translation": tables.numbers(pose[1]),
                }
            )
        for track, row in _annotations(scene, scene_token, state, time, sample_token, seen):
            tracks.setdefault(track, []).append(row)
    tables.link(record["sample"])
    record["sample_data"] = [row for rows in channels.values() for row in tables.link(rows)]
    record["sample_annotation"] = [r for k in sorted(tracks) for r in tables.link(tracks[k])]
    record["instance"] = [_instance(scene, k, tracks[k]) for k in sorted(tracks)]
    record["scene"] = [
        {
            "token": scene_token,
            "log_token": tables.token("log", config.seed, scene.location),
            "nbr_samples": len(record["sample"]),
            "first_sample_token": record["sample"][0]["token"],
            "last_sample_token": record["sample"][-1]["token"],
            "name": scene.name,
            "description": scene.scenario,
        }
    ]
    return record


def _calibration(scene_token: str, camera: Camera) -> dict:
    return {
        "token": tables.token("calibrated_sensor", scene_token, camera.name),
        "sensor_token": tables.token("sensor", camera.name),
        "translation": tables.numbers(camera.translation),
        "rotation": tables.numbers(quaternion(camera.rotation)),
        "camera_intrinsic": [tables.numbers(row) for row in camera.intrinsic],
    }


def _sample_data(sample_token, scene_token, camera, timestamp, filename) -> dict:
    token = tables.token("sample_data", sample_token, camera.name)
    return {
        "token": token,
        "sample_token": sample_token,
        "ego_pose_token": token,
        "calibrated_sensor_token": tables.token("calibrated_sensor", scene_token, camera.name),
        "timestamp": timestamp,
        "fileformat": "jpg",
        "is_key_frame": True,
        "height": camera.height,
        "width": camera.width,
        "filename": filename,
    }


def _annotations(scene, scene_token, state, time, sample_token, seen):
    for k, actor in enumerate(scene.actors):
        if not actor.category or not actor.present(time):
            continue
        xy, yaw = actor.pose(time, state.s)
        away = float(np.hypot(xy[0] - state.x, xy[1] - state.y))
        if away > ANNOTATION_RANGE:
            continue
        centre = scene.terrain.lift(xy, actor.size[2] / 2)
        rotation, place = scene.to_world(rotation_z(yaw), centre)
        # About what a 32-beam lidar returns from a surface of this size at this distance.
        points = int(seen[k] * actor.size[1] * actor.size[2] * 4000 / (away + 3.0) ** 2)
        yield (
            k,
            {
                "token": tables.token("annotation", sample_token, k),
                "sample_token": sample_token,
                "instance_token": tables.token("instance", scene_token, k),
                "visibility_token": tables.visibility_token(seen[k]),
                "attribute_tokens": [tables.token("attribute", a) for a in (actor.attribute,) if a],
                "translation": tables.numbers(place),
                "size": tables.numbers(actor.size),
                "rotation": tables.numbers(quaternion(rotation)),
                "num_lidar_pts": points,
                "num_radar_pts": points // 12,
            },
        )


def _instance(scene: Scene, k: int, rows: list[dict]) -> dict:
    return {
        "token": rows[0]["instance_token"],
        "category_token": tables.token("category", scene.actors[k].category),
        "nbr_annotations": len(rows),
        "first_annotation_token": rows[0]["token"],
        "last_annotation_token": rows[-1]["token"],
    }


def _road_outlines(scene: Scene) -> list[list[list[float]]]:
    outlines = []
    for road in (scene.main, *(branch for _, _, branch in scene.branches)):
        begin, end = road.centre.start + STEP, min(road.centre.end, 90.0)
        outline = band(road.centre, begin, end, road.half_width, -road.half_width)
        flat = np.concatenate([outline, np.zeros((len(outline), 1))], 1)
        _, world = scene.to_world(np.eye(3), flat)
        outlines.append([[round(float(x), 2) for x in point] for point in world[:, :2]])
    return outlines
