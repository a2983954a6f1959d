"""The reader of vector maps agrees with the official devkit, shape for shape."""

import json
import shutil
import sys
import time
import types

import numpy as np
import pytest

from data_pipelines.nuscenes.map_layers import (
    LINE_LAYERS,
    POLYGON_LAYERS,
    Line,
    MapFolder,
    Polygon,
    expansion_path,
    make_map,
    read_map_layers,
)
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from fastdrive_jax.errors import UserError

_HOW = (
    "needs the official devkit: pip install --no-deps nuscenes-devkit==1.2.0 && "
    "pip install scikit-learn pyquaternion cachetools shapely"
)
NAME = "boston-seaport"  # the devkit opens its four places only


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A generated world whose one map has the name of a real place, and a hole beside."""
    config = WorldConfig(
        seed=2, train_scenes=12, val_scenes=0, keyframes_per_scene=1, height=28, width=49,
        cameras=("CAM_FRONT",), workers=1,
    )  # fmt: skip
    root = generate(tmp_path_factory.mktemp("maps") / "data", config, progress=False)
    folder = root / "maps" / "expansion"
    content = json.loads((folder / "synthetic-train-000.json").read_text())
    square = [(600, 600), (630, 600), (630, 640), (600, 640)]
    island = [(610, 610), (610, 620), (620, 620), (620, 610)]
    for k, (x, y) in enumerate(square + island):
        content["node"].append({"token": f"n{k}", "x": x, "y": y})
    holes = [{"node_tokens": ["n4", "n5", "n6", "n7"]}, {"node_tokens": []}]
    content["polygon"].append(
        {"token": "yard", "exterior_node_tokens": ["n0", "n1", "n2", "n3"], "holes": holes}
    )
    content["carpark_area"].append({"token": "park", "polygon_token": "yard", "orientation": 0.0})
    two = [content["drivable_area"][0]["polygon_tokens"][0], "yard"]
    content["drivable_area"].append({"token": "both", "polygon_tokens": two})
    (folder / f"{NAME}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def layers(root):
    return read_map_layers(root, NAME)


@pytest.fixture(scope="module")
def oracle(root):
    pytest.importorskip("nuscenes", reason=_HOW)
    # The devkit imports descartes for its drawings, which no shapely of today works with.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "descartes", types.ModuleType("descartes"))
        from nuscenes.map_expansion.map_api import NuScenesMap
    return NuScenesMap(str(root), NAME)


def _records(layer):
    """Shapes of a layer by the token of their record, in order."""
    found = {}
    for shape in layer.shapes:
        found.setdefault(shape.token, []).append(shape)
    return found


def test_all_shapes_are_those_of_the_devkit(layers, oracle):
    assert layers.size == tuple(oracle.canvas_edge)
    counts = {}
    for name in POLYGON_LAYERS:
        mine = _records(layers.polygons[name])
        assert list(mine) == [row["token"] for row in getattr(oracle, name)]
        for row in getattr(oracle, name):
            tokens = row["polygon_tokens"] if name == "drivable_area" else [row["polygon_token"]]
            for shape, token in zip(mine[row["token"]], tokens, strict=True):
                want = oracle.extract_polygon(token)
                np.testing.assert_array_equal(shape.exterior, want.exterior.coords[:-1])
                assert len(shape.holes) == len(want.interiors)
                for hole, ring in zip(shape.holes, want.interiors, strict=True):
                    np.testing.assert_array_equal(hole, ring.coords[:-1])
        counts[name] = len(mine)
    for name in LINE_LAYERS:
        mine = _records(layers.lines[name])
        assert list(mine) == [row["token"] for row in getattr(oracle, name)]
        for row in getattr(oracle, name):
            want = oracle.extract_line(row["line_token"])
            np.testing.assert_array_equal(mine[row["token"]][0].points, want.coords)
        counts[name] = len(mine)
    for name in ("drivable_area", "road_segment", "carpark_area", "road_divider", "lane_divider"):
        assert counts[name], name


@pytest.mark.parametrize("radius", [15.0, 80.0])
def test_records_in_a_radius_are_those_of_the_devkit(layers, oracle, radius):
    """The devkit's radius is a square, and its answer is exact where ours is by bounding boxes."""
    import shapely

    names = [*POLYGON_LAYERS, *LINE_LAYERS]
    rng = np.random.default_rng(0)
    roads = layers.polygons["road_segment"].shapes
    on_roads = [road.exterior[5] + rng.normal(0, radius / 2, 2) for road in roads[:10]]
    places = [*on_roads, (300, 40), (615, 615), (605, 605)]
    hits = 0
    for x, y in places:
        square = shapely.box(x - radius, y - radius, x + radius, y + radius)
        near = layers.near((x, y), radius * 2**0.5)
        want = oracle.get_records_in_radius(x, y, radius, names)
        for name in names:
            layer = (near.polygons if name in POLYGON_LAYERS else near.lines)[name]
            mine = {s.token for s in layer.shapes if _geometry(s).intersects(square)}
            assert mine == set(want[name]), name
            hits += len(mine)
            assert all(
                _geometry(s).envelope.distance(shapely.Point(x, y)) <= radius * 2**0.5 + 1e-9
                for s in layer.shapes
            )
    assert hits > 30


def _geometry(shape):
    import shapely

    if isinstance(shape, Polygon):
        return shapely.Polygon(shape.exterior, shape.holes)
    return shapely.LineString(shape.points)


def test_query_of_a_whole_city_is_fast():
    rng = np.random.default_rng(1)
    centers = rng.uniform(0, 3000, (20_000, 2))
    lines = [Line(str(k), c + np.array([[0, 0], [5, 5]])) for k, c in enumerate(centers)]
    layer = make_map("city", (3000.0, 3000.0), {}, {"lane_divider": lines}).lines["lane_divider"]
    times = []
    for _ in range(20):
        start = time.perf_counter()
        found = layer.near((1500, 1500), 80)
        times.append(time.perf_counter() - start)
    away = np.hypot(*(np.maximum(np.maximum(centers - 1500, 1500 - centers - 5), 0)).T)
    assert {shape.token for shape in found.shapes} == {str(k) for k in np.flatnonzero(away <= 80)}
    assert min(times) < 2e-3


def test_place_without_a_file_is_none(root):
    assert read_map_layers(root, "singapore-onenorth") is None
    folder = MapFolder(root)
    assert folder["singapore-onenorth"] is None
    assert set(folder) == {NAME, "synthetic-train-000"}
    assert folder[NAME] is folder[NAME]
    assert folder.checksums()[NAME] != folder.checksums()["synthetic-train-000"]


def test_checksum_tells_maps_apart(layers, root):
    assert layers.checksum() == read_map_layers(root, NAME).checksum()
    assert layers.checksum() != read_map_layers(root, "synthetic-train-000").checksum()


def _drop(content, table):
    content[table] = content[table][1:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: _drop(c, "node"), "refers to node .* not in it"),
        (lambda c: _drop(c, "polygon"), "drivable_area .* refers to polygon .* not in it"),
        (lambda c: _drop(c, "line"), "road_divider .* refers to line .* not in it"),
        (lambda c: c.pop("lane"), "no table 'lane'"),
        (lambda c: c.update(version="1.2"), "map expansion 1.2"),
        (lambda c: c["node"][3].pop("y"), "lacks y"),
        (lambda c: c["node"][3].update(x="far"), "no number"),
        (lambda c: c["line"][0].update(node_tokens=[]), "0 nodes"),
        (lambda c: c.pop("canvas_edge"), "canvas_edge"),
    ],
)
def test_damage_is_one_sentence(root, tmp_path, damage, message):
    content = json.loads(expansion_path(root, NAME).read_text())
    damage(content)
    path = expansion_path(tmp_path, NAME)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        read_map_layers(tmp_path, NAME)
    assert str(path) in str(caught.value)


def test_broken_off_file_is_one_sentence(root, tmp_path):
    path = expansion_path(tmp_path, NAME)
    path.parent.mkdir(parents=True)
    shutil.copy(expansion_path(root, NAME), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not valid JSON"):
        read_map_layers(tmp_path, NAME)
