"""The synthetic world's vector map: the devkit opens it and it says what the pictures show."""

import json
import shutil
import sys
import types

import cv2
import numpy as np
import pytest

from data_pipelines.nuscenes.map_layers import MapFolder, expansion_path
from data_pipelines.synthetic.config import LANE_MARK, WorldConfig
from data_pipelines.synthetic.expansion import scene_map
from data_pipelines.synthetic.generate import generate
from data_pipelines.synthetic.roads import crosswalk
from data_pipelines.synthetic.sampler import sample_scene
from data_pipelines.synthetic.tables import VERSION

CONFIG = WorldConfig(
    seed=2, train_scenes=17, val_scenes=2, keyframes_per_scene=3, height=28, width=49,
    cameras=("CAM_FRONT",), workers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("expansion") / "data", CONFIG, progress=False)


def _rows(root, table):
    return json.loads((root / VERSION / f"{table}.json").read_text())


def test_every_location_has_a_map_that_the_devkit_opens(root, tmp_path):
    pytest.importorskip("nuscenes", reason="needs pip install --no-deps nuscenes-devkit==1.2.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "descartes", types.ModuleType("descartes"))  # for drawings only
        from nuscenes.map_expansion.map_api import NuScenesMap
    found = MapFolder(root)
    assert set(found) == {row["location"] for row in _rows(root, "log")}
    assert len(found) == 3
    target = expansion_path(tmp_path, "boston-seaport")  # the devkit opens its four places only
    target.parent.mkdir(parents=True)
    ego = [row["translation"][:2] for row in _rows(root, "ego_pose")]
    for location in found:
        shutil.copy(expansion_path(root, location), target)
        world = NuScenesMap(str(tmp_path), "boston-seaport")
        assert world.canvas_edge == [640.0, 640.0]
        assert len(world.road_segment) >= 1
        for row in world.road_segment:
            assert world.extract_polygon(row["polygon_token"]).is_valid
            assert world.get("drivable_area", row["drivable_area_token"])
        for row in world.ped_crossing:
            assert world.extract_polygon(row["polygon_token"]).is_valid
            assert world.get("road_segment", row["road_segment_token"])
        if location == "synthetic-train-000":
            on = [bool(world.record_on_point(*xy, "drivable_area")) for xy in ego[: 16 * 3]]
            assert np.mean(on) > 0.98


def test_drivable_area_is_the_picture_of_the_map_with_the_corners_filled(root):
    for location, layers in MapFolder(root).items():
        picture = cv2.imread(str(root / "maps" / f"{location}.png"), cv2.IMREAD_GRAYSCALE) > 0
        size = picture.shape[0]
        drawn = np.zeros_like(picture, np.uint8)
        for shape in layers.polygons["drivable_area"].shapes:
            pixels = shape.exterior / 0.1
            pixels[:, 1] = size - pixels[:, 1]
            cv2.fillPoly(drawn, [np.rint(pixels).astype(np.int32)], 1)
        assert picture.any()
        assert (drawn[picture] == 1).all()
        assert (drawn > 0).sum() < 1.02 * picture.sum()


def _scenes():
    return [sample_scene(CONFIG, "train", k) for k in range(40)]


def _contains(outline, points):
    ring = np.array(outline, np.float32).reshape(-1, 1, 2)
    return [cv2.pointPolygonTest(ring, (float(x), float(y)), True) > -0.03 for x, y in points]


def test_crossings_and_dividers_are_what_is_painted():
    """Bars of crossings are told from other paint by their size; check it against the painter."""
    crossings = broken = 0
    for scene in _scenes():
        found = scene_map(scene)
        marks = [s for s in scene.strips if s.label == LANE_MARK]
        bars = [s for s in marks if _is_bar(s.outline)]
        here = scene.to_world(np.eye(3), np.zeros((1, 3)))[1][0]
        for outline in found["crossings"]:
            crossings += 1
            inside = [b for b in bars if all(_contains(outline, _global(scene, b.outline)))]
            count = len(crosswalk(scene.main, 10.0))
            assert len(inside) == count
            assert np.linalg.norm(np.mean(outline, 0) - here[:2]) < 100
        assert len(bars) == len(found["crossings"]) * len(crosswalk(scene.main, 10.0))
        dashes = [s for s in marks if s.paint == "yellow"]
        assert bool(dashes) == bool(found["centres"]) == bool(scene.main.ego_offset)
        broken += len(found["centres"]) > 1
        ends = [np.array(line) for line in found["centres"]]
        for dash in dashes:
            middle = _global(scene, dash.outline.mean(0)[None])
            assert min(np.linalg.norm(line - middle, axis=1).min() for line in ends) < 1.4
        solid = [s for s in marks if s.paint == "white" and len(s.outline) > 8]
        assert len(found["edges"]) >= len(solid) >= 2
    assert crossings >= 2
    assert broken >= 2


def _is_bar(outline):
    across, along = sorted(cv2.minAreaRect(outline.astype(np.float32))[1])
    return 0.45 < across < 0.57 and 1.9 < along < 3.2


def _global(scene, points):
    flat = np.concatenate([points, np.zeros((len(points), 1))], 1)
    return scene.to_world(np.eye(3), flat)[1][:, :2]
