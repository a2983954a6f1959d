"""From a nuScenes folder to checked shards by the commands that a person gives."""

import json
import shutil

import cv2
import numpy as np
import pytest

from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.shards import open_shards, record_source
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mask", "--out", "o"), "either --nuscenes or --images"),
        (("mask", "--images", "nowhere", "--out", "o"), "nowhere is not a folder"),
        (("build", "--out", "o"), "either --nuscenes or --images"),
        (("build", "--nuscenes", "nowhere", "--out", "o"), "no v1.0-"),
        (("build", "--nuscenes", "n", "--out", "o", "--beam-options=--x"), "need --beam"),
        (("verify", "--shards", "nowhere"), "no manifest.json"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    assert said in capsys.readouterr().err


def test_a_set_without_masks_says_which(root, tmp_path, capsys):
    assert run("build", "--nuscenes", root, "--out", tmp_path / "s") == 2
    assert "classes.json is missing" in capsys.readouterr().err


def test_planned_ways_come_from_the_poses(root, masked):
    source = read_nuscenes(root, masks=masked)
    record = source.load(source.samples["train"][0])[0]
    assert record.future_valid.tolist() == [True] * 2 + [False] * 4
    assert record.history_valid.tolist() == [False] * 6
