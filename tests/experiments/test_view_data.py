"""The page of samples: what stands on it, and where boxes and ways are drawn."""

import base64
import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipelines.build import build_shards
from data_pipelines.geometry import box_corners, project, rotation_matrix
from data_pipelines.image_folder import read_image_folder
from data_pipelines.nuscenes.mmdet_keyframe import read_mmdet_keyframe
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.nuscenes.tables import open_nuscenes
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from experiments.view_data import ViewArgs, class_colours, draw_samples, view_data
from fastdrive_jax.errors import UserError

SIZE = (56, 84)
WORLD = WorldConfig(
    train_scenes=2,
    val_scenes=1,
    keyframes_per_scene=3,
    height=SIZE[0],
    width=SIZE[1],
    cameras=("CAM_FRONT", "CAM_BACK"),
    workers=1,
)
VOID = ("meta", "img", "input", "br")


class Page(HTMLParser):
    """Figures with what lies over their pictures, and all text; tags must be closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.figures, self.text, self.links, self._open = [], "", [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self._open.append(tag)
        self._see(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self._see(tag, dict(attrs))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data

    def _see(self, tag, attrs):
        assert tag not in ("script", "link", "iframe")
        self.links += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "figure":
            self.figures.append({"edges": [], "front": [], "dots": [], "mask": None})
        kind = attrs.get("class", "")
        if "figure" in self._open:
            figure = self.figures[-1]
            if tag == "img":
                figure |= {"name": attrs["alt"], "photo": attrs["src"]}
            elif kind == "mask":
                figure["mask"] = attrs["href"]
            elif kind in ("edges", "front"):
                figure[kind].append(points(attrs["d"]))
            elif kind == "dot":
                figure["dots"].append((float(attrs["cx"]), float(attrs["cy"])))

    def figure(self, camera: str, token: str) -> dict:
        return next(f for f in self.figures if f["name"] == f"{camera} of {token}")


def points(path: str) -> np.ndarray:
    """Numbers [n, 2] of an SVG path."""
    return np.array(re.findall(r"-?\d+\.?\d*", path), float).reshape(-1, 2)


def picture(uri: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_UNCHANGED)


def edit(root: Path, table: str, change) -> None:
    path = next(root.glob("v1.0-*")) / f"{table}.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(change(rows) or rows))


def read(root: Path, table: str) -> list[dict]:
    return json.loads((next(root.glob("v1.0-*")) / f"{table}.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("view") / "world", WORLD, progress=False)


@pytest.fixture
def own(root, tmp_path):
    return Path(shutil.copytree(root, tmp_path / "own"))


@pytest.fixture(scope="module")
def plain(root, tmp_path_factory):
    """The world with numbers that a person can reckon with, and one box.

    The car goes at 10 m/s along a yaw of 0.3, cameras look ahead from 1.5 m before and 1.4 m above
    its origin, and at CAM_BACK's moment it is 0.5 m further in x.
    """
    root = Path(shutil.copytree(root, tmp_path_factory.mktemp("plain") / "world"))
    (root / "planning.json").unlink()
    times, shift = {}, {}
    start = {row["token"]: row["first_sample_token"] for row in read(root, "scene")}
    stamps = {row["token"]: row["timestamp"] for row in read(root, "sample")}
    first = {row["token"]: stamps[start[row["scene_token"]]] for row in read(root, "sample")}
    for row in read(root, "sample_data"):
        token = row["sample_token"]
        times[row["ego_pose_token"]] = (stamps[token] - first[token]) * 1e-6
        shift[row["ego_pose_token"]] = 0.5 * ("CAM_BACK" in row["filename"])
    turn = [np.cos(0.15), 0.0, 0.0, np.sin(0.15)]

    def poses(rows):
        for row in rows:
            way = 10 * times[row["token"]]
            x = 100 + way * np.cos(0.3) + shift[row["token"]]
            row |= {"translation": [x, 50 + way * np.sin(0.3), 0.0], "rotation": turn}

    def calibrations(rows):
        for row in rows:
            row["translation"], row["rotation"] = [1.5, 0.0, 1.4], [0.5, -0.5, 0.5, -0.5]
            row["camera_intrinsic"] = [[60.0, 0, 42.0], [0, 60.0, 28.0], [0, 0, 1]]

    centre = np.array([100, 50, 0]) + rotation_matrix(turn) @ [11.5, 0.0, 1.4]
    box = {
        "token": "box",
        "sample_token": next(iter(sorted(start.items())))[1],
        "instance_token": "thing",
        "visibility_token": "1",
        "translation": centre.tolist(),
        "size": [2.0, 4.0, 2.8],
        "rotation": turn,
        "num_lidar_pts": 7,
    }
    edit(root, "ego_pose", poses)
    edit(root, "calibrated_sensor", calibrations)
    edit(root, "category", lambda rows: [{"token": "c", "name": "vehicle.car"}])
    edit(root, "instance", lambda rows: [{"token": "thing", "category_token": "c"}])
    edit(root, "sample_annotation", lambda rows: [box])
    scene = next(r for r in read(root, "scene") if r["first_sample_token"] == box["sample_token"])
    split = next(s for s, names in open_nuscenes(root).splits.items() if scene["name"] in names)
    return root, box["sample_token"], split


@pytest.fixture(scope="module")
def plain_page(plain):
    root, token, split = plain
    args = ViewArgs(nuscenes=root, split=split, samples=99, width=42, out=root / "page.html")
    return Page(view_data(args)), token


def test_a_box_is_drawn_where_it_is(plain_page):
    """Sides at +-1 m, bottom and top at +-1.4 m from the optical axis, 12 m and 8 m ahead."""
    page, token = plain_page
    figure = page.figure("CAM_FRONT", token)
    (edges,), (front,) = figure["edges"], figure["front"]
    assert edges.shape == (24, 2)
    near = np.array([[s * 60 / 8 + 42, t * 60 * 1.4 / 8 + 28] for s in (1, -1) for t in (1, -1)])
    far = np.array([[s * 60 / 12 + 42, t * 60 * 1.4 / 12 + 28] for s in (1, -1) for t in (1, -1)])
    corners = np.unique(edges.round(2), axis=0)
    np.testing.assert_allclose(corners, np.unique(np.concatenate([near, far]) / 2, axis=0))
    np.testing.assert_allclose(np.unique(front, axis=0), np.unique(far / 2, axis=0))
    assert 'class="vehicle faint"' in page.source
    assert "vehicle.car, visibility 1, 7 lidar points" in page.text


def test_a_box_moves_with_the_car_between_the_cameras_moments(plain_page):
    """What `geometry` says of its corners half a metre further on."""
    page, token = plain_page
    turn = rotation_matrix([np.cos(0.15), 0, 0, np.sin(0.15)])
    centre = np.array([[11.5, 0, 1.4]]) - turn.T @ [0.5, 0, 0]
    corners = box_corners(centre, np.array([[2.0, 4.0, 2.8]]), np.eye(3)[None])[0]
    camera = (corners - [1.5, 0, 1.4])[:, [1, 2, 0]] * [-1, -1, 1]
    pixels = project(camera, np.array([[60.0, 0, 42], [0, 60, 28], [0, 0, 1]])) / 2
    (edges,) = page.figure("CAM_BACK", token)["edges"]
    gap = np.abs(edges[:, None] - pixels).max(-1).min(1)
    assert gap.max() <= 0.0051


def test_the_way_lies_on_the_ground(plain_page):
    page, token = plain_page
    ahead = np.array([5.0, 10.0]) - 1.5  # two waypoints of a drive of three key frames
    expected = np.stack([np.full(2, 21.0), (28 + 60 * 1.4 / ahead) / 2], -1)
    np.testing.assert_allclose(page.figure("CAM_FRONT", token)["dots"], expected, atol=0.0051)


def test_shards_draw_outlines_on_the_ground(plain, tmp_path):
    root, token, split = plain
    build_shards(read_nuscenes(root), tmp_path / "shards", progress=False)
    args = ViewArgs(shards=tmp_path / "shards", split=split, samples=99, out=tmp_path / "p.html")
    page = Page(view_data(args))
    (edges,) = page.figure("CAM_FRONT", token)["edges"]
    corners = [(s * 60 / z + 42, 60 * 1.4 / z + 28) for z in (8, 12) for s in (1, -1)]
    gap = np.abs(edges[:, None] - np.array(corners)).max(-1)
    assert gap.min(1).max() <= 0.0051
    assert gap.min(0).max() <= 0.0051
    assert "on the ground" in page.text


@pytest.fixture(scope="module")
def pages(root, tmp_path_factory):
    """The page of the folder and of its shards."""
    folder = tmp_path_factory.mktemp("pages")
    build_shards(read_nuscenes(root), folder / "shards", progress=False)
    args = ViewArgs(nuscenes=root, samples=2, width=SIZE[1])
    return {
        "root": Page(view_data(replace(args, out=folder / "root.html"))),
        "shards": Page(
            view_data(
                replace(args, nuscenes=None, shards=folder / "shards", out=folder / "shards.html")
            )
        ),
    }


@pytest.mark.parametrize("kind", ["root", "shards"])
def test_every_picture_of_the_samples_is_there_with_its_mask(pages, root, kind):
    page = pages[kind]
    assert len(page.figures) == 2 * 2
    assert all(link.startswith("data:image/") for link in page.links)
    stems = {row["sample_token"]: {} for row in read(root, "sample_data")}
    for row in read(root, "sample_data"):
        stems[row["sample_token"]][row["filename"].split("/")[1]] = row["filename"]
    classes = json.loads((root / "classes.json").read_text())
    colours = class_colours(open_classes(root))
    for figure in page.figures:
        camera, _, token = figure["name"].partition(" of ")
        name = Path(*Path(stems[token][camera]).parts[1:]).with_suffix(".png")
        labels = cv2.imread(str(root / "labels" / name), cv2.IMREAD_UNCHANGED)
        expected = np.zeros((*SIZE, 4), np.uint8)
        for number in classes["foreground"]:
            shade = bytes.fromhex(colours[number][1:])
            expected[labels == number] = (*shade[::-1], 255)
        layer = picture(figure["mask"])
        np.testing.assert_array_equal(layer[..., 3], expected[..., 3])
        np.testing.assert_array_equal(layer[layer[..., 3] > 0], expected[expected[..., 3] > 0])
        # The same picture, but for being JPEG twice.
        photo = picture(figure["photo"]).astype(float)
        given = cv2.imread(str(root / stems[token][camera])).astype(float)
        assert np.abs(photo - given).mean() < 6


def open_classes(root):
    return read_nuscenes(root).classes


def test_both_ways_tell_the_same(pages, root):
    assert [f["name"] for f in pages["root"].figures] == [
        f["name"] for f in pages["shards"].figures
    ]
    for one, other in zip(pages["root"].figures, pages["shards"].figures, strict=True):
        np.testing.assert_allclose(one["dots"], other["dots"], atol=0.02)
    commands = [re.findall(r"go straight|turn \w+", page.text) for page in pages.values()]
    assert commands[0] == commands[1] != []
    for page in pages.values():
        assert "can_bus/ lacks all scenes" in page.text
        assert "0.00% of the pixels differ" in page.text
        masks = [picture(figure["mask"])[..., 3] > 0 for figure in page.figures]
        assert f"{100 * np.mean(masks):.1f}% of {np.size(masks):,} pixels" in page.text


def test_duplicates_masker_and_can_bus_are_told(own, tmp_path):
    rows = read(own, "sample_data")
    tokens = {row["sample_token"]: row for row in rows}
    scene = open_nuscenes(own).scenes[open_nuscenes(own).splits["train"][0]]
    one, two = (
        {r["filename"].split("/")[1]: r["filename"] for r in rows if r["sample_token"] == token}
        for token in scene.samples[:2]
    )
    for camera in one:
        shutil.copyfile(own / one[camera], own / two[camera])
    bus = [
        {
            "utime": tokens[token]["timestamp"],
            "vel": [7.25, 0, 0],
            "accel": [0.5, 0, 9.8],
            "rotation_rate": [0, 0, 0.125],
        }
        for token in scene.samples
    ]
    (own / "can_bus").mkdir()
    (own / "can_bus" / f"{scene.name}_pose.json").write_text(json.dumps(bus))
    (own / "masker.json").write_text(json.dumps({"name": "by hand", "settings": {"pen": 3}}))
    build_shards(read_nuscenes(own), tmp_path / "shards", progress=False)
    page = Page(view_data(ViewArgs(shards=tmp_path / "shards", samples=9, out=tmp_path / "p.html")))
    assert "1 of train" in page.text
    assert "by hand" in page.text
    assert '"pen": 3' in page.text
    assert "CAN speed7.25 m/s" in page.text
    assert "CAN steeringabsent" in page.text
    manifest = tmp_path / "shards" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["masker"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json has no masker; build"):
        view_data(ViewArgs(shards=tmp_path / "shards", out=tmp_path / "p.html"))


def test_equal_arguments_give_equal_bytes(root, pages, tmp_path):
    args = ViewArgs(nuscenes=root, samples=2, width=SIZE[1], out=tmp_path / "again.html")
    assert view_data(args).read_text() == pages["root"].source
    other = view_data(replace(args, seed=3, out=tmp_path / "other.html"))
    assert other.read_text() != pages["root"].source


def test_samples_are_of_different_scenes_where_there_are_enough():
    scenes = [k // 10 for k in range(200)]
    chosen = draw_samples(200, scenes.__getitem__, 20, 0)
    assert len({scenes[k] for k in chosen}) == 20
    assert chosen == sorted(chosen)
    assert draw_samples(200, scenes.__getitem__, 20, 1) != chosen
    few = draw_samples(200, lambda k: k // 100, 6, 0)
    assert [k // 100 for k in few] == [0, 0, 0, 1, 1, 1]
    assert draw_samples(3, lambda k: 0, 8, 0) == [0, 1, 2]


def test_a_folder_without_masks_shows_pictures_and_boxes(own, tmp_path):
    for name in ("masks", "labels"):
        shutil.rmtree(own / name)
    (own / "classes.json").unlink()
    page = Page(view_data(ViewArgs(nuscenes=own, samples=9, out=tmp_path / "p.html")))
    assert all(figure["mask"] is None for figure in page.figures)
    assert any(figure["edges"] for figure in page.figures)
    assert "has no masks/: pictures are shown without masks" in page.text
    assert "not known: there are no masks" in page.text


def test_masks_of_another_folder_and_one_that_is_missing(own, tmp_path):
    (tmp_path / "fg").mkdir()
    for name in ("masks", "classes.json"):
        shutil.move(own / name, tmp_path / "fg" / name)
    shutil.rmtree(own / "labels")
    args = ViewArgs(nuscenes=own, masks=tmp_path / "fg", samples=9, out=tmp_path / "p.html")
    missing = min((tmp_path / "fg" / "masks" / "CAM_BACK").iterdir())
    missing.unlink()
    page = Page(view_data(args))
    without = [figure for figure in page.figures if figure["mask"] is None]
    expected = {row["filename"] for row in read(own, "sample_data") if missing.stem in str(row)}
    assert len(without) == len(expected) == page.text.count("no mask") == 1
    colours = {tuple(c) for c in picture(page.figures[0]["mask"]).reshape(-1, 4) if c[3]}
    assert len(colours) == 1  # no label maps, so no classes


def test_a_folder_of_pictures_has_no_projection(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a_01", "a_02"):
        for kind, array in (
            ("images", rng.integers(0, 255, (*SIZE, 3), np.uint8)),
            ("masks", np.eye(*SIZE, dtype=np.uint8) * 255),
        ):
            (tmp_path / "d" / kind).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "d" / kind / f"{name}.png"), array)
    build_shards(read_image_folder(tmp_path / "d"), tmp_path / "s", progress=False)
    page = Page(view_data(ViewArgs(shards=tmp_path / "s", out=tmp_path / "p.html")))
    (figure,) = page.figures
    assert figure["edges"] == figure["dots"] == []
    assert "no calibration: nothing is projected" in page.text
    assert "Speednot known" in page.text
    layer = picture(figure["mask"])
    np.testing.assert_array_equal(layer[..., 3] > 0, np.eye(*SIZE) > 0)


def test_text_of_the_data_is_escaped(own, tmp_path):
    edit(own, "log", lambda rows: [row | {"location": "<script>x & y"} for row in rows])
    page = Page(view_data(ViewArgs(nuscenes=own, out=tmp_path / "p.html")))
    assert "<script>" not in page.source
    assert "<script>x & y" in page.text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "either --shards or --nuscenes"),
        ({"shards": Path("a"), "nuscenes": Path("b")}, "either --shards or --nuscenes"),
        ({"shards": Path("a"), "masks": Path("m")}, "--masks and --version with --nuscenes only"),
        ({"shards": Path("a"), "samples": 0}, "samples=0 must be at least 1"),
        ({"shards": Path("nowhere")}, "nowhere is not a folder"),
        ({"nuscenes": Path("nowhere")}, "nowhere is not a folder"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(said)):
        view_data(ViewArgs(**given))
    assert list(tmp_path.iterdir()) == []


def test_unknown_splits_and_folders_without_masks_are_named(root, tmp_path):
    args = ViewArgs(nuscenes=root, out=tmp_path / "out" / "p.html")
    with pytest.raises(UserError, match=r"no split 'best'; it has train, val\."):
        view_data(replace(args, split="best"))
    with pytest.raises(UserError, match="neither masks/ nor labels/"):
        view_data(replace(args, masks=tmp_path))
    with pytest.raises(UserError, match=r"manifest\.json"):
        view_data(ViewArgs(shards=tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_real_key_frame_has_its_boxes_where_mmdetection3d_says(tmp_path):
    """Outlines of boxes against the published 2-D boxes of the same annotations."""
    shared = os.environ.get("FASTDRIVE_SHARED") or Path(__file__).parents[3] / "shared"
    data = Path(shared) / "data" / "nuscenes_samples"
    if not data.is_dir():
        pytest.skip(f"no real samples under {data} (set FASTDRIVE_SHARED)")
    root = real_root(tmp_path / "real", data)
    args = ViewArgs(nuscenes=root, width=1600, out=tmp_path / "p.html")
    page = Page(view_data(args))
    assert len(page.figures) == 6
    assert all(figure["edges"] == [] for figure in page.figures)  # v1.0-test has no boxes
    assert "Boxesabsent" in page.text
    add_boxes(root, data)
    page = Page(view_data(args))
    row = json.loads((data / "original" / "keyframe.json").read_text())["keyframe"]
    compared = []
    for camera, things in row["cam_instances"].items():
        drawn = [seen(path) for path in page.figure(camera, row["token"])["edges"]]
        for thing in things:
            compared.append(min(np.abs(box - thing["bbox"]).max() for box in drawn))
    assert len(compared) == 84
    assert max(compared) < 1.0, sorted(compared)[-5:]


def seen(path: np.ndarray) -> np.ndarray:
    """Left, top, right and bottom of the part of a projected box that the picture holds."""
    canvas = np.array([[0, 0], [1600, 0], [1600, 900], [0, 900]], np.float32)
    _, part = cv2.intersectConvexConvex(cv2.convexHull(path.astype(np.float32)), canvas)
    return np.concatenate([part.min((0, 1)), part.max((0, 1))])


def real_root(root: Path, data: Path) -> Path:
    root.mkdir()
    shutil.copytree(data / "v1.0-test", root / "v1.0-test")
    (root / "samples").symlink_to(data / "original")
    return root


def add_boxes(root: Path, data: Path) -> None:
    """Annotation tables from the published key frame, whose ego pose lies in another height."""
    frame = read_mmdet_keyframe(data / "original" / "keyframe.json", "scene-0061", "")
    nuscenes = open_nuscenes(root)
    lidar = nuscenes.views[frame.token]["LIDAR_TOP"]
    move = nuscenes.pose(lidar.pose) @ frame.ego_to_global.inverse()
    boxes, rows = frame.boxes, []
    for k, token in enumerate(boxes.tokens):
        turn = move.rotation @ boxes.rotations[k]
        yaw = np.arctan2(turn[1, 0], turn[0, 0])
        rows.append(
            {
                "token": token,
                "sample_token": frame.token,
                "instance_token": token,
                "visibility_token": "4",
                "translation": move.apply(boxes.centers[k]).tolist(),
                "size": boxes.sizes[k].tolist(),
                "rotation": [np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)],
                "num_lidar_pts": int(boxes.lidar_points[k]),
            }
        )
    names = sorted(set(boxes.categories))
    tables = {
        "category": [{"token": name, "name": name} for name in names],
        "instance": [
            {"token": token, "category_token": name}
            for token, name in zip(boxes.tokens, boxes.categories, strict=True)
        ],
        "sample_annotation": rows,
    }
    for name, content in tables.items():
        (root / "v1.0-test" / f"{name}.json").write_text(json.dumps(content))
