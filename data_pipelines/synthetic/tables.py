"""The thirteen nuScenes v1.0 tables, assembled from the records of the scenes."""

import hashlib

import numpy as np

from data_pipelines.synthetic.config import SPLITS

VERSION = "v1.0-trainval"
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
CATEGORIES = (
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.wheelchair",
    "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.construction_worker",
    "animal",
    "vehicle.car",
    "vehicle.motorcycle",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.truck",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.trailer",
    "movable_object.barrier",
    "movable_object.trafficcone",
    "movable_object.pushable_pullable",
    "movable_object.debris",
    "static_object.bicycle_rack",
)
ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)
_VISIBILITY = (
    ("1", "v0-40", 0, 40),
    ("2", "v40-60", 40, 60),
    ("3", "v60-80", 60, 80),
    ("4", "v80-100", 80, 100),
)


def token(*parts) -> str:
    """A 32-digit hexadecimal token that depends on `parts` only."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def visibility_token(share: float) -> str:
    """NuScenes visibility level of a visible share 0..1."""
    return "1" if share < 0.4 else "2" if share < 0.6 else "3" if share < 0.8 else "4"


def link(rows: list[dict]) -> list[dict]:
    """Sets `prev` and `next` of rows that follow each other, in place, and returns them."""
    for k, row in enumerate(rows):
        row["prev"] = rows[k - 1]["token"] if k else ""
        row["next"] = rows[k + 1]["token"] if k + 1 < len(rows) else ""
    return rows


def fixed_tables(cameras) -> dict[str, list[dict]]:
    """Tables that do not depend on the scenes: category, attribute, visibility, sensor."""
    return {
        "category": [
            {"token": token("category", name), "name": name, "description": name, "index": k + 1}
            for k, name in enumerate(CATEGORIES)
        ],
        "attribute": [
            {"token": token("attribute", name), "name": name, "description": name}
            for name in ATTRIBUTES
        ],
        "visibility": [
            {
                "token": key,
                "level": level,
                "description": f"visibility of whole object is between {low} and {high}%",
            }
            for key, level, low, high in _VISIBILITY
        ],
        "sensor": [
            {"token": token("sensor", name), "channel": name, "modality": "camera"}
            for name in cameras
        ],
    }


def assemble(records: list[dict], cameras, seed: int) -> dict[str, list[dict]]:
    """All tables of a data set.

    Args:
        records: One per scene, as `record.write_scene` returns them, in order.
        cameras: Channels that were rendered.
        seed: Seed of the data set; part of the log and map tokens.
    """
    tables = fixed_tables(cameras)
    for name in ("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor"):
        tables[name] = [row for record in records for row in record[name]]
    for name in ("instance", "sample_annotation"):
        tables[name] = [row for record in records for row in record[name]]
    locations = sorted({record["location"] for record in records})
    tables["log"] = [
        {
            "token": token("log", seed, name),
            "logfile": name,
            "vehicle": "synthetic",
            "date_captured": "2020-01-01",
            "location": name,
        }
        for name in locations
    ]
    tables["map"] = [
        {
            "token": token("map", seed, name),
            "log_tokens": [token("log", seed, name)],
            "category": "semantic_prior",
            "filename": f"maps/{name}.png",
        }
        for name in locations
    ]
    return {name: tables[name] for name in TABLES}


def splits(records: list[dict]) -> dict[str, list[str]]:
    """Scene names by split, the content of the devkit's `splits.json`."""
    return {
        split: [r["scene"][0]["name"] for r in records if r["split"] == split] for split in SPLITS
    }


def numbers(values) -> list[float]:
    """Plain floats rounded to a millionth, so that equal data gives equal text."""
    return [round(float(v), 6) + 0.0 for v in np.ravel(values)]
