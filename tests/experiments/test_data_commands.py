"""From a nuScenes folder to checked shards by the commands that a person gives."""

import json
import shutil

import cv2
import numpy as np
import pytest

from data_pipelines.maskers.interface import CLASSES
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.shards import open_shards, record_source
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from experiments import data_commands
from experiments.cli import main

WORLD = WorldConfig(
    train_scenes=2,
    val_scenes=1,
    keyframes_per_scene=3,
    height=112,
    width=196,
    cameras=("CAM_FRONT", "CAM_BACK"),
    workers=1,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = generate(tmp_path_factory.mktemp("data") / "world", WORLD, progress=False)
    for name in ("masks", "labels"):  # as a download, which has none
        shutil.move(root / name, root.parent / f"exact-{name}")
    (root / "classes.json").rename(root.parent / "classes.json")
    (root / "planning.json").unlink()
    return root


@pytest.fixture(scope="module")
def masked(root):
    assert run("mask", "--nuscenes", root, "--out", root.parent / "fg") == 0
    return root.parent / "fg"


def run(*words) -> int:
    return main(["data", *map(str, words)])


def test_masks_then_shards_then_the_check(root, masked, tmp_path, capsys):
    out = tmp_path / "shards"
    build = ("build", "--nuscenes", root, "--masks", masked, "--out", out)
    assert run(*build, "--records-per-shard", 4) == 0
    said = capsys.readouterr()
    assert "train: 6 samples, 12 pictures" in said.out
    assert said.err.count("CAN bus fields are absent") == 1
    assert run("verify", "--shards", out) == 0
    assert "val: 2 shards, 6 pictures are whole." in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["masker"]["name"] == "annotations"
    assert manifest["masker"]["settings"]["road_range"] == 60
    page = tmp_path / "page.html"
    assert run("view", "--shards", out, "--samples", 2, "--out", page) == 0
    assert page.read_text().count("<svg") > 2
    record = record_source(open_shards(out), "train")[0]
    assert np.isfinite(record["intrinsic"]).all()
    assert np.isnan(record["can_bus"]).all()
    assert len(record["agents"]) == len(record["agents_kind"])
    assert run(*build) == 2
    assert "already exists" in capsys.readouterr().err


def test_masks_are_made_once_and_by_parts(root, masked, tmp_path, capsys):
    assert run("mask", "--nuscenes", root, "--out", masked) == 0
    assert "0 pictures masked (0 of them again), 18 were there" in capsys.readouterr().out
    for part in (1, 0):
        assert run("mask", "--nuscenes", root, "--out", tmp_path, "--part", part, 2) == 0
        assert "9 pictures masked" in capsys.readouterr().out
    for path in (masked / "masks").rglob("*.png"):
        assert (tmp_path / path.relative_to(masked)).read_bytes() == path.read_bytes()
    assert (
        run(
            "mask",
            "--nuscenes",
            root,
            "--out",
            tmp_path,
            "masker:annotations",
            "--masker.road-range",
            30,
        )
        == 0
    )
    assert "18 pictures masked (18 of them again)" in capsys.readouterr().out


def test_label_maps_by_a_table_of_ones_own(root, tmp_path, capsys):
    known = {"4": "road", "5": "road", "6": "vehicle", "7": "person", "10": "barrier"}
    classes = {str(k): known.get(str(k), "background") for k in range(11)}
    (tmp_path / "table.json").write_text(json.dumps({"classes": classes}))
    labels = root.parent / "exact-labels"
    words = ("mask", "--images", root / "samples", "--out", tmp_path / "m", "masker:labels")
    words += ("--masker.labels", labels, "--masker.table", tmp_path / "table.json")
    code = run(*words)
    said = capsys.readouterr()
    assert (code, "18 pictures masked" in said.out) == (0, True), said.err
    exact = cv2.imread(str(next(labels.rglob("*.png"))), cv2.IMREAD_UNCHANGED)
    made = cv2.imread(
        str(tmp_path / "m" / "masks" / next(labels.rglob("*.png")).relative_to(labels)),
        cv2.IMREAD_UNCHANGED,
    )
    np.testing.assert_array_equal(made > 0, np.isin(exact, (4, 5, 6, 7, 10)))


@pytest.fixture
def coco(tmp_path):
    """The words for one picture, a person beside nothing, with COCO panoptic labels."""
    for folder in ("images", "coco"):
        (tmp_path / folder).mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.full((56, 84, 3), 90, np.uint8))
    segments = np.zeros((56, 84, 3), np.uint8)
    segments[:, :40, 2] = 7  # red is the last of OpenCV
    cv2.imwrite(str(tmp_path / "coco" / "a.png"), segments)
    content = {
        "annotations": [
            {"file_name": "a.png", "segments_info": [{"id": 7, "category_id": 1}]},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "sky"}],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    words = ("mask", "--images", tmp_path / "images", "--out", tmp_path / "m", "masker:labels")
    return (*words, "--masker.labels", tmp_path / "coco")


@pytest.mark.parametrize("named", [True, False], ids=["table coco", "own table"])
def test_coco_panoptic_label_maps(coco, tmp_path, capsys, named):
    own = tmp_path / "table.json"
    own.write_text(json.dumps({"encoding": "segments", "classes": {"1": "person"}}))
    words = ("--masker.table", "coco" if named else own)
    code = run(*coco, *words, "--masker.segments", tmp_path / "panoptic.json")
    assert code == 0, capsys.readouterr().err
    made = cv2.imread(str(tmp_path / "m" / "labels" / "a.png"), cv2.IMREAD_UNCHANGED)
    assert (made[:, :40] == CLASSES.names.index("person")).all()
    assert (made[:, 40:] == CLASSES.names.index("background")).all()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("coco", "with --masker.segments"),
        ("citiscapes", "citiscapes is no JSON file and none of camvid, cityscapes,"),
    ],
)
def test_a_table_that_is_not_there_is_one_sentence(coco, capsys, table, said):
    assert run(*coco, "--masker.table", table) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert "coco" in line


def test_build_leaves_out_what_mask_left_out(root, tmp_path, capfd):
    world = shutil.copytree(root, tmp_path / "world")
    bad = min((world / "samples" / "CAM_FRONT").glob("*.jpg"))
    bad.write_bytes(bad.read_bytes()[:200])
    mask = ("mask", "--nuscenes", world, "--out", tmp_path / "m")
    build = ("build", "--nuscenes", world, "--masks", tmp_path / "m", "--out", tmp_path / "s")
    assert run(*mask, "--skip-bad", 1) == 0
    assert "1 left out" in capfd.readouterr().out
    assert run(*build) == 2
    assert f"{bad.stem}.png is missing" in capfd.readouterr().err
    assert run(*build, "--skip-bad", 1) == 0
    said = capfd.readouterr()
    assert "train: 5 samples, 10 pictures" in said.out
    assert f"left out: {bad}" in said.err


def test_build_leaves_out_what_mask_left_out_of_a_folder(root, tmp_path, capfd):
    pictures = sorted((root / "samples" / "CAM_FRONT").glob("*.jpg"))
    (tmp_path / "own").mkdir()
    images = shutil.copytree(pictures[0].parent, tmp_path / "own" / "images")
    bad = images / pictures[0].name
    bad.write_bytes(bad.read_bytes()[:200])
    labels = root.parent / "exact-labels" / "CAM_FRONT"
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"classes": {str(k): "road" for k in range(11)}}))
    mask = ("mask", "--images", images, "--out", tmp_path / "own", "--skip-bad", 1)
    words = ("masker:labels", "--masker.labels", labels, "--masker.table", table)
    assert run(*mask, *words) == 0
    build = ("build", "--images", tmp_path / "own", "--out", tmp_path / "s")
    assert run(*build) == 2
    assert f"{bad.stem}.png is missing" in capfd.readouterr().err
    assert run(*build, "--skip-bad", 1) == 0
    assert f"left out: {bad}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mask", "--out", "o"), "either --nuscenes or --images"),
        (("mask", "--images", "nowhere", "--out", "o"), "nowhere is not a folder"),
        (("mask", "--images", "i", "--out", "o", "--part", "0", "0"), "part 0 of 0 does not exist"),
        (("mask", "--images", "i", "--out", "o", "--part", "4", "4"), "part 4 of 4 does not exist"),
        (("build", "--out", "o"), "either --nuscenes or --images"),
        (("build", "--nuscenes", "nowhere", "--out", "o"), "no v1.0-"),
        (("build", "--nuscenes", "n", "--out", "o", "--beam-options=--x"), "need --beam"),
        (("build", "--images", "i", "--out", "o", "--masks", "m"), "--masks means nothing with"),
        (("build", "--images", "i", "--out", "o", "--split", "m"), "--split means nothing with"),
        (("build", "--nuscenes", "n", "--out", "o", "--foreground", "3"), "--foreground means"),
        (("verify", "--shards", "nowhere"), "no manifest.json"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    assert said in capsys.readouterr().err


def test_ctrl_c_is_said_without_a_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(data_commands, "data", interrupt)
    assert run("verify", "--shards", tmp_path) == 130
    assert capsys.readouterr().err == "fastdrive: interrupted\n"


def test_a_set_without_masks_says_which(root, tmp_path, capsys):
    assert run("build", "--nuscenes", root, "--out", tmp_path / "s") == 2
    assert "classes.json is missing; make the masks by `fastdrive data" in capsys.readouterr().err


def test_planned_ways_come_from_the_poses(root, masked):
    source = read_nuscenes(root, masks=masked)
    record = source.load(source.samples["train"][0])[0]
    assert record.future_valid.tolist() == [True] * 2 + [False] * 4
    assert record.history_valid.tolist() == [False] * 6
