"""The official nuScenes devkit opens a generated data set and finds boxes where labels say so."""

import cv2
import numpy as np
import pytest

from data_pipelines.synthetic.config import BARRIER, PERSON, VEHICLE, WorldConfig
from data_pipelines.synthetic.generate import generate
from data_pipelines.synthetic.tables import VERSION

_HOW = (
    "needs the official devkit: pip install --no-deps nuscenes-devkit==1.2.0 && "
    "pip install scikit-learn pyquaternion cachetools shapely"
)
devkit = pytest.importorskip("nuscenes.nuscenes", reason=_HOW)

LABELS = {"vehicle.bicycle": (VEHICLE, PERSON), "movable_object": (BARRIER,), "human": (PERSON,)}


@pytest.fixture(scope="module")
def nusc(tmp_path_factory):
    config = WorldConfig(seed=2, train_scenes=9, val_scenes=3, keyframes_per_scene=4, workers=1)
    root = generate(tmp_path_factory.mktemp("devkit") / "data", config, progress=False)
    return devkit.NuScenes(VERSION, str(root), verbose=True)


def _expected(name):
    return next((ids for key, ids in LABELS.items() if name.startswith(key)), (VEHICLE,))


def test_all_tables_and_files_are_there(nusc):
    assert len(nusc.scene) == 12
    assert len(nusc.sample) == 48
    assert len(nusc.sample_data) == 48 * 6
    for row in nusc.sample_data:
        path, _, intrinsic = nusc.get_sample_data(row["token"])
        assert cv2.imread(path).shape == (row["height"], row["width"], 3)
        assert intrinsic.shape == (3, 3)


def test_links_lead_through_every_scene(nusc):
    for scene in nusc.scene:
        token, count = scene["first_sample_token"], 0
        while token:
            sample = nusc.get("sample", token)
            assert set(sample["data"]) == {row["channel"] for row in nusc.sensor}
            last, token, count = token, sample["next"], count + 1
        assert last == scene["last_sample_token"]
        assert count == scene["nbr_samples"]
        front = nusc.get("sample", last)["data"]["CAM_FRONT"]
        assert nusc.get("sample_data", front)["next"] == ""
    for row in nusc.instance:
        assert (
            len(nusc.field2token("sample_annotation", "instance_token", row["token"]))
            == (row["nbr_annotations"])
        )


def test_boxes_lie_where_the_labels_say(nusc):
    """Centres of fully visible boxes fall on pixels of their class; swapped cameras don't."""
    from nuscenes.utils.geometry_utils import BoxVisibility, view_points

    hits, misses, wrong = 0, 0, 0
    for row in nusc.sample_data:
        path, boxes, intrinsic = nusc.get_sample_data(row["token"], BoxVisibility.ALL)
        labels = cv2.imread(
            path.replace("/samples/", "/labels/").replace(".jpg", ".png"), cv2.IMREAD_UNCHANGED
        )
        for box in boxes:
            annotation = nusc.get("sample_annotation", box.token)
            if annotation["visibility_token"] != "4" or box.center[2] > 35:
                continue
            x, y = view_points(box.center[:, None], intrinsic, normalize=True)[:2, 0]
            if not (0 <= x < row["width"] and 0 <= y < row["height"]):
                continue
            hit = labels[int(y), int(x)] in _expected(box.name)
            hits, misses = hits + hit, misses + (not hit)
            wrong += labels[int(y), -1 - int(x)] in _expected(box.name)
    assert hits + misses > 100
    assert hits / (hits + misses) > 0.9, (hits, misses)
    assert wrong / (hits + misses) < 0.5


def test_box_corners_enclose_the_pixels_of_a_lone_vehicle(nusc):
    """Projected boxes are as large as what was drawn: the overlap of outlines is high."""
    from nuscenes.utils.geometry_utils import BoxVisibility, view_points

    overlaps = []
    for row in nusc.sample_data:
        path, boxes, intrinsic = nusc.get_sample_data(row["token"], BoxVisibility.ALL)
        labels = cv2.imread(
            path.replace("/samples/", "/labels/").replace(".jpg", ".png"), cv2.IMREAD_UNCHANGED
        )
        boxes = [b for b in boxes if b.name == "vehicle.car" and 5 < b.center[2] < 25]
        for box in boxes:
            if nusc.get("sample_annotation", box.token)["visibility_token"] != "4":
                continue
            corners = view_points(box.corners(), intrinsic, normalize=True)[:2].T
            hull = cv2.convexHull(corners.astype(np.float32)).astype(np.int32)
            inside = np.zeros_like(labels)
            cv2.fillPoly(inside, [hull], 1)
            overlaps.append((labels[inside == 1] == VEHICLE).mean())
    assert len(overlaps) > 20
    assert np.median(overlaps) > 0.7


def test_velocities_are_those_of_the_tracks(nusc):
    moving = nusc.field2token("attribute", "name", "vehicle.moving")[0]
    parked = nusc.field2token("attribute", "name", "vehicle.parked")[0]
    seen = {moving: [], parked: []}
    for row in nusc.sample_annotation:
        for token in row["attribute_tokens"]:
            if token in seen and (row["prev"] or row["next"]):
                seen[token].append(np.linalg.norm(nusc.box_velocity(row["token"])[:2]))
    assert max(seen[parked]) < 1e-3
    assert 2.0 < np.nanmedian(seen[moving]) < 10.0


def test_splits_map_and_listing(nusc, capsys, tmp_path):
    from nuscenes.utils.splits import get_scenes_of_custom_split

    train = get_scenes_of_custom_split("train", nusc)
    val = get_scenes_of_custom_split("val", nusc)
    assert (len(train), len(val)) == (9, 3)
    assert set(train) | set(val) == {scene["name"] for scene in nusc.scene}
    nusc.list_scenes()
    nusc.list_categories()
    nusc.list_attributes()
    assert train[0] in capsys.readouterr().out
    on_road = []
    for sample in nusc.sample:
        scene = nusc.get("scene", sample["scene_token"])
        log = nusc.get("log", scene["log_token"])
        mask = nusc.get("map", log["map_token"])["mask"]
        data = nusc.get("sample_data", sample["data"]["CAM_FRONT"])
        x, y, _ = nusc.get("ego_pose", data["ego_pose_token"])["translation"]
        on_road.append(bool(mask.is_on_mask(x, y)[0]))
    assert np.mean(on_road) > 0.98


def test_pictures_with_boxes_can_be_drawn(nusc, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    token = nusc.sample[0]["data"]["CAM_FRONT"]
    out = tmp_path / "front.png"
    nusc.render_sample_data(token, with_anns=True, out_path=str(out), verbose=False)
    assert out.stat().st_size > 10_000
    annotation = nusc.sample_annotation[0]
    boxes = nusc.get_boxes(nusc.get("sample", annotation["sample_token"])["data"]["CAM_FRONT"])
    assert annotation["token"] in [box.token for box in boxes]
