import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from nuscenes_fixture import CLASSES, SIZE, write_nuscenes

from data_pipelines.nuscenes.keyframes import read_keyframes
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.nuscenes.tables import open_nuscenes
from data_pipelines.schema import LEFT, STRAIGHT, Classes
from fastdrive_jax.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_nuscenes(tmp_path_factory.mktemp("nu"))


@pytest.fixture
def root(whole, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "nu"))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_samples_come_in_time_order_with_cameras_front_first(whole):
    source = read_nuscenes(whole)
    assert source.cameras == ("CAM_FRONT", "CAM_BACK")
    assert source.classes == Classes(**{k: tuple(v) for k, v in CLASSES.items()})
    assert {k: [r.token for r in v] for k, v in source.samples.items()} == {
        "train": [f"a{k}" for k in range(9)],
        "val": [f"b{k}" for k in range(9)],
    }
    records = source.load(source.samples["train"][3])
    assert [record.camera for record in records] == list(source.cameras)
    assert {record.scene for record in records} == {"scene-a"}
    path = whole / "samples" / "CAM_FRONT" / "a3-CAM_FRONT.jpg"
    assert records[0].image == path.read_bytes()
    assert records[0].labels == (whole / "labels/CAM_FRONT/a3-CAM_FRONT.png").read_bytes()


def test_name_holds_no_path(whole):
    assert str(whole.parent) not in read_nuscenes(whole).name


def test_size_counts_every_file(whole):
    files = [p for k in ("samples", "masks", "labels") for p in (whole / k).rglob("*.*")]
    assert read_nuscenes(whole).size == sum(p.stat().st_size for p in files)


def test_labels_may_be_absent(tmp_path):
    root = write_nuscenes(tmp_path, frames=1, with_labels=False)
    source = read_nuscenes(root)
    assert source.load(source.samples["val"][0])[0].labels == b""


def test_straight_drive_from_poses(whole):
    source = read_nuscenes(whole)
    record = source.load(source.samples["train"][2])[0]
    np.testing.assert_allclose(record.ego_state, [10, 0, 0], atol=1e-4)
    np.testing.assert_allclose(record.future[:, 0], [5, 10, 15, 20, 25, 30], atol=1e-3)
    np.testing.assert_allclose(record.future[:, 1], 0, atol=1e-3)
    assert record.future_valid.all()
    assert record.command == STRAIGHT


def test_circle_to_the_left_from_poses(whole):
    source = read_nuscenes(whole)
    record = source.load(source.samples["val"][0])[0]
    angles = 5 * 0.5 * np.arange(1, 7) / 20
    np.testing.assert_allclose(record.future[:, 0], 20 * np.sin(angles), atol=1e-3)
    np.testing.assert_allclose(record.future[:, 1], 20 * (1 - np.cos(angles)), atol=1e-3)
    np.testing.assert_allclose(record.ego_state[2], 0.25, atol=1e-4)
    assert record.command == LEFT


def test_the_end_of_a_drive_has_fewer_waypoints(whole):
    source = read_nuscenes(whole)
    record = source.load(source.samples["train"][-3])[0]
    assert record.future_valid.tolist() == [True, True, False, False, False, False]
    assert not record.future[2:].any()


def plan_rows(tokens) -> dict:
    future = [[1.0 * k, 0.5] for k in range(6)]
    row = {"command": 2, "ego_state": [3, 0.5, -0.1], "future": future, "future_valid": [True] * 6}
    return dict.fromkeys(tokens, row)


def test_planning_file_is_preferred(root):
    tokens = [f"{drive}{k}" for drive in "ab" for k in range(9)]
    (root / "planning.json").write_text(json.dumps(plan_rows(tokens)))
    source = read_nuscenes(root)
    record = source.load(source.samples["train"][0])[0]
    assert record.command == 2
    np.testing.assert_allclose(record.ego_state, [3, 0.5, -0.1])
    np.testing.assert_allclose(record.future[5], [5, 0.5])


@pytest.mark.parametrize("fault", ["absent", "short", "command"])
def test_an_incomplete_plan_names_its_sample(root, fault):
    rows = plan_rows([f"{drive}{k}" for drive in "ab" for k in range(9)])
    if fault == "absent":
        del rows["b4"]
    else:
        change = {"future": [[0, 0]]} if fault == "short" else {"command": 3}
        rows["b4"] = {**rows["b4"], **change}
    (root / "planning.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="b4"):
        read_nuscenes(root)


def test_all_absent_tables_are_named(root):
    for name in ("sample", "scene"):
        (root / "v1.0-mini" / f"{name}.json").unlink()
    with pytest.raises(UserError, match=r"lacks 2 of .*: sample\.json, scene\.json"):
        read_nuscenes(root)


def test_what_may_be_absent_is_said_once(root):
    for name in ("instance", "log"):
        (root / "v1.0-mini" / f"{name}.json").unlink()
    absent = read_nuscenes(root).absent
    for word in ("log.json", "instance.json", "can_bus"):
        assert word in str(absent)
    assert len(absent) == 3  # no log, so no map is asked for
    assert "all scenes" in absent[2]


def test_real_tables_of_one_key_frame():
    """Nine of the thirteen tables: no log, no boxes, so none of a map either."""
    shared = os.environ.get("FASTDRIVE_SHARED") or Path(__file__).parents[3] / "shared"
    root = Path(shared) / "data" / "nuscenes_samples"
    if not root.is_dir():
        pytest.skip(f"no real samples under {root} (set FASTDRIVE_SHARED)")
    nuscenes = open_nuscenes(root)
    assert nuscenes.splits.keys() == {"test"}
    assert [
        word for word in ("log.json", "instance.json", "can_bus") if word in str(nuscenes.absent)
    ]
    published = json.loads((root / "original" / "keyframe.json").read_text())["keyframe"]
    frames = {frame.token: frame for frame in read_keyframes(nuscenes)}
    frame = frames[published["token"]]
    assert frame.boxes is None
    for view in frame.cameras:
        stated = published["images"][view.channel]
        assert view.filename.endswith(stated["img_path"])
        np.testing.assert_allclose(view.intrinsic, stated["cam2img"], atol=1e-6)
        np.testing.assert_allclose(view.camera_to_ego.matrix(), stated["cam2ego"], atol=1e-6)
    # MMDetection3D keeps a pose as float32 and puts the car on the ground.
    ours, theirs = frame.ego_to_global.matrix(), np.array(published["ego2global"])
    np.testing.assert_allclose(ours[:3, :3], theirs[:3, :3], atol=1e-6)
    np.testing.assert_allclose(ours[:2, 3], theirs[:2, 3], atol=1e-3)


def test_broken_json_is_named(root):
    (root / "v1.0-mini" / "sample.json").write_text("[{")
    with pytest.raises(UserError, match=r"sample\.json is not valid JSON"):
        read_nuscenes(root)


def test_a_table_that_is_no_list_of_rows_is_named(root):
    (root / "v1.0-mini" / "scene.json").write_text('["x"]')
    with pytest.raises(UserError, match=r"scene\.json"):
        read_nuscenes(root)


def test_a_row_without_a_field_is_named(root):
    edit(root / "v1.0-mini" / "sample_data.json", lambda rows: rows[0].pop("filename"))
    with pytest.raises(UserError, match=r"sample_data\.json.*filename"):
        read_nuscenes(root)


@pytest.mark.parametrize("kind", ["samples", "masks", "labels"])
def test_a_missing_file_is_named_before_anything_is_read(root, kind):
    path = next(iter((root / kind / "CAM_BACK").iterdir()))
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        read_nuscenes(root)


def test_as_many_samples_may_lack_files_as_is_allowed(root):
    for name in ("samples/CAM_BACK/a1-CAM_BACK.jpg", "masks/CAM_BACK/a1-CAM_BACK.png"):
        (root / name).unlink()  # one sample
    (root / "labels" / "CAM_FRONT" / "b2-CAM_FRONT.png").unlink()
    with pytest.raises(UserError, match=r"a1-CAM_BACK\.jpg is missing \(sample a1 .*--skip-bad N"):
        read_nuscenes(root)
    with pytest.raises(UserError, match=r"2 samples .*skip_bad=1; the last: .*b2-CAM_FRONT\.png"):
        read_nuscenes(root, skip_bad=1)
    source = read_nuscenes(root, skip_bad=2)
    files = [p for k in ("samples", "masks", "labels") for p in (root / k).rglob("*.*")]
    assert source.size == sum(p.stat().st_size for p in files)


def test_a_sample_without_one_of_the_cameras_is_named(root):
    def drop(rows):
        rows[:] = [row for row in rows if row["token"] != "b2-CAM_BACK"]

    edit(root / "v1.0-mini" / "sample_data.json", drop)
    with pytest.raises(UserError, match=r"b2 .*CAM_BACK"):
        read_nuscenes(root)


def test_one_stated_split_takes_the_place_of_the_file(root):
    (root / "v1.0-mini" / "splits.json").unlink()
    with pytest.raises(UserError, match=r"splits\.json"):
        read_nuscenes(root)
    assert {k: len(v) for k, v in read_nuscenes(root, split="test").samples.items()} == {"test": 18}


def test_a_stated_split_does_not_take_the_place_of_official_ones(root):
    """Or `--split train` would train on the official validation scenes."""
    (root / "v1.0-mini" / "splits.json").unlink()

    def name(rows):
        for row, official in zip(rows, ("scene-0061", "scene-0103"), strict=True):
            row["name"] = official

    edit(root / "v1.0-mini" / "scene.json", name)
    with pytest.raises(UserError, match=r"official splits \(train, val\)"):
        read_nuscenes(root, split="train")


def test_a_stated_split_beside_the_file_is_refused(whole):
    with pytest.raises(UserError, match=r"splits\.json"):
        read_nuscenes(whole, split="test")


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": ["scene-a", "scene-x"]}, "scene-x"),
        ({"train": ["scene-a"], "val": ["scene-a"]}, "both train and val"),
        ({"train": []}, "no scene"),
        ({"train": "scene-a"}, "must look like"),
    ],
)
def test_bad_splits(root, splits, said):
    (root / "v1.0-mini" / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match=said):
        read_nuscenes(root)


def test_versions(root):
    with pytest.raises(UserError, match=r"v1\.0-test.*v1\.0-mini"):
        read_nuscenes(root, version="v1.0-test")
    (root / "v1.0-test").mkdir()
    with pytest.raises(UserError, match=r"v1\.0-mini, v1\.0-test"):
        read_nuscenes(root)
    assert read_nuscenes(root, version="v1.0-mini").samples["train"]
    with pytest.raises(UserError, match="nuScenes folder"):
        read_nuscenes(root / "samples")


def test_truncated_picture_is_named_when_it_is_loaded(root):
    path = root / "samples" / "CAM_FRONT" / "a0-CAM_FRONT.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    source = read_nuscenes(root)
    with pytest.raises(UserError, match=r"a0-CAM_FRONT\.jpg"):
        source.load(source.samples["train"][0])


def test_mask_bytes_are_one_bit(whole):
    import io

    from PIL import Image

    source = read_nuscenes(whole)
    mask = Image.open(io.BytesIO(source.load(source.samples["train"][0])[0].mask))
    assert mask.mode == "1"
    assert mask.size == SIZE[::-1]


def test_no_pose_is_named(root):
    edit(
        root / "v1.0-mini" / "ego_pose.json",
        lambda rows: rows.remove(next(r for r in rows if r["token"] == "b1-LIDAR_TOP")),
    )
    with pytest.raises(UserError, match="b1"):
        read_nuscenes(root)
