import json
import os
from pathlib import Path

import numpy as np
import pytest
from grey_png import write_grey_png
from PIL import Image

from data_pipelines.maskers.annotations import class_of
from data_pipelines.maskers.interface import (
    BACKGROUND,
    BARRIER,
    CLASSES,
    PERSON,
    ROAD,
    TRAFFIC_LIGHT,
    TRAFFIC_SIGN,
    VEHICLE,
    Frame,
)
from data_pipelines.maskers.label_tables import (
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_INSTANCES,
    CITYSCAPES_TRAIN,
    NUSCENES,
    NUSCENES_CATEGORIES,
    NUSCENES_PANOPTIC,
    TABLES,
    LabelTable,
    coco_table,
    nuscenes_class,
    nuscenes_table,
    read_table,
)
from data_pipelines.maskers.labels import LabelMasker, read_segments
from data_pipelines.maskers.run import folder_frames, make_masks
from data_pipelines.pictures import decode_map
from fastdrive_jax.errors import UserError

SIZE = (30, 40)


def put(folder: Path, labels: np.ndarray, name="CAM_FRONT/a", suffix=".png") -> Frame:
    """Writes a picture and its label map."""
    picture = folder / "images" / f"{name}.jpg"
    path = folder / "labels" / f"{name}{suffix}"
    for place in (picture, path):
        place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE[1], SIZE[0]), (90, 80, 70)).save(picture)
    Image.fromarray(labels).save(path)
    return Frame(picture, name)


def stripes(values, dtype=np.uint8) -> np.ndarray:
    """One row per value, the first repeated to the end."""
    out = np.full(SIZE, values[0], dtype)
    for row, value in enumerate(values):
        out[row] = value
    return out


@pytest.mark.parametrize(
    ("table", "dtype", "pairs"),
    [
        (CAMVID, np.uint8, {0: 0, 3: ROAD, 6: TRAFFIC_SIGN, 7: 0, 8: VEHICLE, 9: PERSON, 11: 0}),
        (
            CITYSCAPES,
            np.uint8,
            {4: 0, 7: ROAD, 8: 0, 14: BARRIER, 19: TRAFFIC_LIGHT, 20: TRAFFIC_SIGN, 25: PERSON}
            | {26: VEHICLE, 33: VEHICLE},
        ),
        (
            CITYSCAPES_TRAIN,
            np.uint8,
            {255: 0, 0: ROAD, 1: 0, 6: TRAFFIC_LIGHT, 7: TRAFFIC_SIGN, 11: PERSON, 18: VEHICLE},
        ),
        (
            CITYSCAPES_INSTANCES,
            np.uint16,
            {7: ROAD, 24: PERSON, 24003: PERSON, 26000: VEHICLE, 33012: VEHICLE, 23: 0},
        ),
        (NUSCENES, np.uint8, {0: 0, 2: PERSON, 9: BARRIER, 12: BARRIER, 17: VEHICLE, 24: ROAD}),
        (NUSCENES_PANOPTIC, np.uint16, {0: 0, 17001: VEHICLE, 24000: ROAD, 31000: 0, 7002: PERSON}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_known_ids(tmp_path, table, dtype, pairs):
    labels = stripes(list(pairs), dtype)
    frame = put(tmp_path, labels)
    (out,) = LabelMasker(tmp_path / "labels", table)([frame])
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, np.vectorize(pairs.get)(labels))
    assert TABLES[table.name] is table


def test_a_suffix(tmp_path):
    labels = stripes([7, 26_014, 33_000], np.uint16)
    frame = put(tmp_path, labels, "aachen/aachen_000", "_gtFine_instanceIds.png")
    masker = LabelMasker(tmp_path / "labels", CITYSCAPES_INSTANCES, "_gtFine_instanceIds.png")
    assert masker([frame])[0][:3, 0].tolist() == [ROAD, VEHICLE, VEHICLE]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_few_bits_holds_the_ids_as_stored(tmp_path, depth):
    ids = list(range(min(2**depth, 12)))
    frame = put(tmp_path, stripes(ids))
    write_grey_png(tmp_path / "labels" / f"{frame.name}.png", stripes(ids), depth)
    (out,) = LabelMasker(tmp_path / "labels", CAMVID)([frame])
    np.testing.assert_array_equal(out, np.vectorize(CAMVID.classes.get)(stripes(ids)))


def coco(folder: Path, names=("person", "road", "sky", "traffic light")) -> Path:
    ids = {name: 10 * (k + 1) for k, name in enumerate(names)}
    segments = [
        {"id": 1 + 256 * 2, "category_id": ids[names[0]]},
        {"id": 65536 * 3, "category_id": ids[names[1]]},
        {"id": 9, "category_id": ids[names[3]]},
        {"id": 8, "category_id": ids[names[2]]},
    ]
    content = {
        "annotations": [{"file_name": "a.png", "image_id": 1, "segments_info": segments}],
        "categories": [{"id": i, "name": name, "isthing": 1} for name, i in ids.items()],
    }
    path = folder / "panoptic.json"
    path.write_text(json.dumps(content))
    return path


def test_coco_panoptic(tmp_path):
    colors = [(0, 0, 0), (1, 2, 0), (0, 0, 3), (9, 0, 0), (8, 0, 0)]
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[: len(colors)] = np.array(colors, np.uint8)[:, None]
    frame = put(tmp_path, picture, "a")
    segments, categories = read_segments(coco(tmp_path))
    masker = LabelMasker(tmp_path / "labels", coco_table(categories), segments=segments)
    (out,) = masker([frame])
    assert out[:5, 0].tolist() == [BACKGROUND, PERSON, ROAD, TRAFFIC_LIGHT, BACKGROUND]
    assert not out[5:].any()
    picture[7] = (77, 0, 0)
    put(tmp_path, picture, "a")
    with pytest.raises(UserError, match=r"a\.png holds segments \[77\]"):
        masker([frame])
    other = put(tmp_path, picture, "b")
    with pytest.raises(UserError, match=r"segments of .*b\.png"):
        masker([other])


def test_coco_files_of_another_form_are_named(tmp_path):
    path = tmp_path / "panoptic.json"
    for text in ("{", "[]", '{"annotations": [{}], "categories": []}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"panoptic\.json"):
            read_segments(path)
    categories = read_segments(coco(tmp_path, ("a", "b", "c", "d")))[1]
    with pytest.raises(UserError, match="none of COCO's names"):
        coco_table(categories)
    with pytest.raises(UserError, match="segments"):
        LabelMasker(tmp_path, LabelTable("mine", {0: 0}, "segments"))
    with pytest.raises(UserError, match="segments"):
        LabelMasker(tmp_path, CAMVID, segments={})


def test_nuimages_ids():
    # Its devkit numbers what has boxes alphabetically from 1, then two kinds of surface.
    things = [c for c in NUSCENES_CATEGORIES if c.split(".")[0] not in ("noise", "flat", "static")]
    ids = {i + 1: c for i, c in enumerate(sorted(set(things) - {"vehicle.ego"}))}
    ids |= {24: "flat.driveable_surface", 31: "vehicle.ego"}
    assert len(ids) == 25
    table = nuscenes_table(ids, "nuimages")
    assert dict(table.classes) == {0: BACKGROUND} | {i: NUSCENES.classes[i] for i in ids}


def test_what_is_boxed_and_what_is_labelled_are_the_same_foreground():
    boxed = [c for c in NUSCENES_CATEGORIES[1:-1] if c.split(".")[0] not in ("flat", "static")]
    assert len(boxed) == 23
    for category in boxed:
        assert nuscenes_class(category) == max(class_of(category), BACKGROUND), category


def test_nuscenes_categories_are_the_devkits():
    module = pytest.importorskip("nuscenes.utils.color_map", reason="the nuScenes devkit is absent")
    assert sorted(NUSCENES_CATEGORIES) == sorted(module.get_colormap())
    with pytest.raises(UserError, match=r"vehicle\.ufo"):
        nuscenes_class("vehicle.ufo")


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({"encoding": "instances", "classes": {"0": "background", "5": "barrier"}})
    )
    table = read_table(path)
    assert table == LabelTable("mine", {0: BACKGROUND, 5: BARRIER}, "instances")
    frame = put(tmp_path, stripes([0, 5, 5007], np.uint16))
    masker = LabelMasker(tmp_path / "labels", table)
    assert masker([frame])[0][:3, 0].tolist() == [BACKGROUND, BARRIER, BARRIER]
    settings = masker.settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["classes"] == {"0": "background", "5": "barrier"}
    for bad in (
        {"classes": {"5": "tree"}},
        {"classes": {"five": "road"}},
        {"classes": {}},
        {"classes": {"5": "road"}, "encoding": "xyz"},
        ["road"],
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(UserError):
            read_table(path)
    with pytest.raises(UserError, match="missing"):
        read_table(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: (f / "labels/CAM_FRONT/a.png").unlink(), "a.png is missing"),
        (lambda f: put(f, np.zeros((5, 6), np.uint8)), "5 x 6"),
        (lambda f: put(f, stripes([3, 99])), "99"),
        (lambda f: put(f, np.zeros((*SIZE, 3), np.uint8)), "pixel format RGB"),
        (lambda f: (f / "labels/CAM_FRONT/a.png").write_bytes(b"xx"), "cannot be decoded"),
        (lambda f: (f / "images/CAM_FRONT/a.jpg").unlink(), "a.jpg is missing"),
        (lambda f: (f / "images/CAM_FRONT/a.jpg").write_bytes(b"xx"), "a.jpg cannot be decoded"),
    ],
    ids=["missing", "size", "unknown id", "channels", "damaged", "no picture", "damaged picture"],
)
def test_what_cannot_be_read_is_named(tmp_path, spoil, named):
    frame = put(tmp_path, stripes([3]))
    masker = LabelMasker(tmp_path / "labels", CAMVID)
    assert (masker([frame])[0] == ROAD).all()
    spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        masker([frame])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_label_folder(tmp_path):
    with pytest.raises(UserError, match="nothing is not a folder"):
        LabelMasker(tmp_path / "nothing", CAMVID)


def test_real_camvid_pictures(tmp_path):
    shared = os.environ.get("FASTDRIVE_SHARED") or Path(__file__).parents[3] / "shared"
    root = Path(shared) / "data" / "camvid" / "val"
    if not root.is_dir():
        pytest.skip(f"no CamVid under {root} (set FASTDRIVE_SHARED)")
    frames = folder_frames(root / "images")[::25]
    report = make_masks(frames, LabelMasker(root / "labels", CAMVID), tmp_path)
    assert report.made == len(frames) == 5
    for frame in frames:
        given = np.asarray(Image.open(root / "labels" / f"{frame.name}.png"))
        path = tmp_path / "labels" / f"{frame.name}.png"
        out = decode_map(path.read_bytes(), path, given.shape)
        for old, new in ((3, "road"), (8, "vehicle"), (6, "traffic_sign")):
            np.testing.assert_array_equal(given == old, out == CLASSES.names.index(new))
        np.testing.assert_array_equal(np.isin(given, (9, 10)), out == PERSON)
        mask = tmp_path / "masks" / f"{frame.name}.png"
        share = decode_map(mask.read_bytes(), mask, given.shape).mean()
        assert 0.1 < share < 0.7
