"""What plans are measured against, from tables, from the synthetic world and from real logs."""

import dataclasses
import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import shapely
from nuscenes_fixture import write_nuscenes

from data_pipelines.geometry import Pose
from data_pipelines.nuscenes.driving import scene_moments
from data_pipelines.nuscenes.frames import Boxes
from data_pipelines.nuscenes.map_layers import Polygon, expansion_path, make_map, read_map_layers
from data_pipelines.nuscenes.road_patches import road_map, road_patch
from data_pipelines.nuscenes.scenario_log import read_scenario_log
from data_pipelines.nuscenes.tables import open_nuscenes
from data_pipelines.nuscenes.truth import agents_around, driving_truth, log_truth
from data_pipelines.schema import AGENT_KINDS
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.open_loop import protocol_metrics
from fastdrive_jax.evaluation.protocols import PROTOCOLS
from fastdrive_jax.evaluation.rasters import fill_areas
from fastdrive_jax.evaluation.truth import KINDS, join_truths

WORLD = WorldConfig(
    seed=4, train_scenes=2, val_scenes=2, keyframes_per_scene=8, height=28, width=49,
    cameras=("CAM_FRONT",), workers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("truth") / "world", WORLD, progress=False)


def _quarter(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def test_kinds_begin_as_in_records():
    assert KINDS[: len(AGENT_KINDS)] == AGENT_KINDS


def test_ways_from_tables_without_boxes_or_map(tmp_path):
    """Drive b turns left on a circle of 20 m at 5 m/s."""
    root = write_nuscenes(tmp_path)
    truth = driving_truth(root, split="val")
    assert truth.token.tolist() == [f"b{k}" for k in range(9)]
    assert set(truth.scene) == {"scene-b"}
    assert truth.future_valid.all(1).tolist() == [True] * 3 + [False] * 6
    turn = 2.5 * np.arange(1, 7) / 20
    want = 20 * np.stack([np.sin(turn), 1 - np.cos(turn)], 1)
    np.testing.assert_allclose(truth.future[1], want, atol=1e-4)
    assert truth.agents is None
    assert truth.drivable is None
    with pytest.raises(UserError, match="collisions by impromptu need annotated boxes"):
        protocol_metrics(PROTOCOLS["impromptu"], truth.future, truth)
    assert driving_truth(root).token.tolist()[::9] == ["a0", "b0"]
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        driving_truth(root, split="test")


def test_ways_of_the_lidar_from_tables(tmp_path):
    """Drive b's circle again, of the lidar 1 m ahead and 0.2 m to the left, turned by a tenth."""
    root = write_nuscenes(tmp_path)
    path = root / "v1.0-mini" / "calibrated_sensor.json"
    rows = json.loads(path.read_text())
    lidar = next(row for row in rows if row["token"] == "c-LIDAR_TOP")
    lidar["translation"] = [1.0, 0.2, 1.8]
    tilt = np.pi / 2 - 0.1  # its x axis is to the right and its y axis forward, but for 0.1
    lidar["rotation"] = [np.cos(-tilt / 2), 0, 0, np.sin(-tilt / 2)]
    path.write_text(json.dumps(rows))
    truth = driving_truth(root, split="val")

    def place(steps):
        """Seen from the ego frame at step 0, whose y axis points to the centre, 20 m away."""
        turn = 2.5 * np.asarray(steps) / 20
        cos, sin = np.cos(turn), np.sin(turn)
        return np.stack([20 * sin + cos - 0.2 * sin, 20 - 20 * cos + sin + 0.2 * cos], -1)

    turn = np.array([[np.cos(0.1), np.sin(0.1)], [-np.sin(0.1), np.cos(0.1)]])
    for ways, steps, sample in (
        (truth.lidar.future, range(1, 7), 1),
        (truth.lidar.history, range(-6, 0), 7),
    ):
        want = (place(steps) - place([0])) @ turn.T
        np.testing.assert_allclose(ways[sample], want, atol=1e-4)
    assert not truth.lidar.history[0].any()
    assert truth.lidar.history[2, :4].max() == 0
    assert truth.lidar.history[2, 4:].any(1).all()
    assert not truth.lidar.future[8].any()
    again = truth.take([7, 1])
    np.testing.assert_array_equal(again.lidar.future[1], truth.lidar.future[1])
    both = join_truths([truth, again])
    np.testing.assert_array_equal(both.lidar.history[9], truth.lidar.history[7])
    lacking = dataclasses.replace(again, lidar=None)
    with pytest.raises(UserError, match="1 of 2 drives have no lidar"):
        join_truths([truth, lacking])


def test_agents_by_hand():
    """A cyclist ahead now, a police car that appears later, a bicycle rack without lidar points."""

    def boxes(*rows):
        names, categories, places, points = zip(*rows, strict=True)
        count = len(rows)
        return Boxes(
            names, names, categories,
            np.array(places, float), np.tile([0.8, 2.0, 1.5], (count, 1)),
            np.tile(_quarter(120), (count, 1, 1)), np.zeros(count), np.array(points),
        )  # fmt: skip

    now = boxes(
        ("c", "vehicle.bicycle", (100, 57, 3), 4), ("r", "static_object.rack", (98, 50, 3), 0)
    )
    later = boxes(("p", "vehicle.emergency.police", (90, 50, 3), -1))
    pose = Pose(_quarter(90), np.array([100.0, 50.0, 2.0]))
    table, valid, seen, kind = agents_around(pose, [now, later])
    assert [KINDS[k] for k in kind] == ["cycle", "other", "emergency"]
    np.testing.assert_allclose(table[0, 0], [7, 0, np.pi / 6, 2.0, 0.8], atol=1e-6)
    np.testing.assert_allclose(table[1, 0, :2], [0, 2], atol=1e-6)
    np.testing.assert_allclose(table[2, 1, :2], [0, 10], atol=1e-6)
    assert valid.sum(1).tolist() == [1, 1, 1]
    assert valid[[0, 1, 2], [0, 0, 1]].all()
    assert seen[:, :2].tolist() == [[True, False], [False, False], [False, True]]


def test_the_world_gives_agents_and_a_map(world):
    truth = driving_truth(world, split="val")
    assert len(truth) == 2 * WORLD.keyframes_per_scene
    assert truth.future_valid.all(1).sum() == 2 * (WORLD.keyframes_per_scene - 6)
    nuscenes = open_nuscenes(world)
    scenes = nuscenes.splits["val"]
    moments = [m for name in scenes for m in scene_moments(nuscenes, nuscenes.scenes[name])]
    assert truth.token.tolist() == [m.keyframe.token for m in moments]
    compared = 0
    for k, moment in enumerate(moments):
        # The agents of now, in another order and without kinds that records do not have.
        rows = np.flatnonzero(truth.agents.valid[k, :, 0] & (truth.agents.kind[k] < 4))
        mine = sorted(map(tuple, truth.agents.boxes[k, rows].reshape(len(rows), -1)))
        want = sorted(map(tuple, moment.agents.boxes.reshape(len(moment.agents.kind), -1)))
        np.testing.assert_allclose(mine, want, atol=1e-4)
        compared += len(rows)
    assert compared > 20
    assert all(truth.drivable)
    assert all(truth.boundaries)
    for name, protocol in PROTOCOLS.items():
        still = protocol_metrics(protocol, np.zeros_like(truth.future), truth)
        driven = protocol_metrics(protocol, truth.future, truth)
        assert driven.values[f"collision_{name}"].sum() == 0
        assert still.used.sum() == 4


def test_a_map_of_one_place_alone_is_refused(world, tmp_path):
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    files = sorted((copy / "maps" / "expansion").glob("*.json"))
    files[-1].unlink()
    with pytest.raises(UserError, match=f"{files[-1].name} is missing, but other places"):
        driving_truth(copy)
    shutil.rmtree(copy / "maps" / "expansion")
    truth = driving_truth(copy)
    assert truth.drivable is None
    assert truth.boundaries is None
    with pytest.raises(UserError, match="intersections by omnidrive need a vector map"):
        protocol_metrics(PROTOCOLS["omnidrive"], truth.future, truth)
    alone = dataclasses.replace(PROTOCOLS["omnidrive"], intersection=None)
    assert protocol_metrics(alone, truth.future, truth).values["collision_omnidrive"].sum() == 0


def test_drivable_pixels_are_those_of_the_devkit(world, tmp_path):
    pytest.importorskip("nuscenes", reason="needs pip install --no-deps nuscenes-devkit==1.2.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "descartes", types.ModuleType("descartes"))  # for drawings only
        from nuscenes.map_expansion.map_api import NuScenesMap
    source = sorted((world / "maps" / "expansion").glob("*.json"))[0]
    target = expansion_path(tmp_path, "boston-seaport")  # the devkit opens its four places only
    target.parent.mkdir(parents=True)
    shutil.copy(source, target)
    oracle = NuScenesMap(str(tmp_path), "boston-seaport")
    layers = read_map_layers(tmp_path, "boston-seaport")
    road = road_map(layers)
    canvas = np.zeros((1000, 1000), np.uint8)
    rng = np.random.default_rng(0)
    share = []
    for _ in range(8):
        shapes = layers.polygons["drivable_area"].shapes
        center = shapes[rng.integers(len(shapes))].exterior[3] + rng.normal(0, 10, 2)
        yaw = rng.uniform(-np.pi, np.pi)
        want = oracle.get_map_mask(
            (*center, 100.0, 100.0), np.degrees(yaw), ["drivable_area"], (1000, 1000)
        )[0]
        fill_areas(canvas, road_patch(road, center, yaw)[0])
        # Cut along the map's axes first, a corner may round to the other side.
        assert (canvas != want).sum() <= 5
        share.append(want.mean())
    assert 0.01 < np.mean(share) < 0.9


def test_boundary_lines_by_hand():
    """Two road segments and a lane that overlap, with an island, seen from a car turned by 90."""

    def box(x0, y0, x1, y1, *holes):
        ring = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)
        return Polygon("p", ring, holes)

    island = np.array([(4, 8), (5, 8), (5, 9), (4, 9)], float)
    layers = make_map(
        "here",
        (200.0, 200.0),
        {
            "road_segment": [box(0, 0, 10, 20, island), box(0, 15, 10, 30)],
            "lane": [box(8, 18, 14, 22)],
            "drivable_area": [box(-5, -5, 15, 35)],
        },
        {},
    )
    areas, lines = road_patch(road_map(layers), np.array([5.0, 5.0]), np.pi / 2)
    (area,) = areas
    corners = {tuple(np.round(point, 6)) for point in area.exterior}
    assert corners == {(-10, -10), (30, -10), (30, 10), (-10, 10)}
    # Ahead is the map's y; y to the left is the map's -x.
    road = shapely.unary_union([shapely.box(-5, -5, 25, 5), shapely.box(13, -9, 17, 5)])
    outline = road.difference(shapely.box(3, 0, 4, 1)).boundary
    drawn = shapely.union_all([shapely.LineString(line) for line in lines])
    assert shapely.hausdorff_distance(drawn, outline) < 1e-6
    assert drawn.length == pytest.approx(outline.length)
    # The piece ends 51.2 m ahead and 25 m aside; what is cut there is no boundary.
    far, close = np.array([5.0, -30.0]), np.array([5.0, -90.0])
    ends = [road_patch(road_map(layers), place, np.pi / 2)[1] for place in (far, close)]
    assert max(line[:, 0].max() for line in ends[0]) == pytest.approx(51.0)
    assert not any((np.abs(line[:, 0] - 51.0) < 1e-6).all() for line in ends[0])
    assert ends[1] == ()


def _logs():
    shared = os.environ.get("FASTDRIVE_SHARED") or Path(__file__).parents[3] / "shared"
    files = sorted(Path(shared).joinpath("data", "nuscenes_mini_logs").glob("scene-*.json.gz"))
    if not files:
        pytest.skip(f"no real logs in {shared} (set FASTDRIVE_SHARED)")
    return [log_truth(read_scenario_log(path)) for path in files]


def test_six_real_drives_through_all_protocols():
    """The driven way is free of hits; holding the first step's velocity is not."""
    truth = join_truths(_logs())
    assert len(set(truth.scene)) == 6
    used = truth.future_valid.all(1)
    assert used.sum() == len(truth) - 6 * 6
    # Scene-0061's first sample is described beside the data, up to another point of the same car.
    first = truth.at(["scene-0061-0"]).future[0]
    want = [(4.49, -0.01), (8.86, 0.01), (13.06, 0.08), (17.46, 0.18), (21.29, 0.27), (25.18, 0.41)]
    np.testing.assert_allclose(first, want, atol=0.25)
    held = truth.future[:, :1] * np.arange(1, 7)[None, :, None]
    fast = np.broadcast_to(np.arange(1, 7)[:, None] * [5.0, 0.0], held.shape)
    for name, protocol in PROTOCOLS.items():
        found = {
            key: protocol_metrics(protocol, plan, truth).values
            for key, plan in (("driven", truth.future), ("held", held), ("fast", fast))
        }
        shares = {key: values[f"collision_{name}"].mean() for key, values in found.items()}
        assert shares["driven"] == 0
        assert 0 < shares["held"] < 0.05 < shares["fast"] < 0.25
        if protocol.intersection is not None:
            shares = {key: values[f"intersection_{name}"].mean() for key, values in found.items()}
            assert shares["driven"] <= 0.01
            assert 0 < shares["held"] < 0.06 < shares["fast"] < 0.25


def test_a_map_without_areas_and_a_broken_one():
    """A ring that crosses itself is repaired where it is road, and left out where it is a lane."""
    nothing = road_patch(road_map(make_map("here", (9.0, 9.0), {}, {})), np.zeros(2), 0.0)
    assert nothing == ((), ())
    bow = Polygon("p", np.array([(0, 0), (10, 10), (10, 0), (0, 10)], float))
    layers = make_map("here", (9.0, 9.0), {"drivable_area": [bow], "road_segment": [bow]}, {})
    areas, lines = road_patch(road_map(layers), np.array([5.0, 5.0]), 0.0)
    assert sum(shapely.Polygon(area.exterior).area for area in areas) == pytest.approx(50.0)
    assert lines == ()
