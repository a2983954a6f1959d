"""Data sets come out whole, equal for equal configs, and with one clear sentence on bad input."""

import errno
import filecmp
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from world_figures import class_shares, pictures_per_second, prior_recall

from data_pipelines.disk import locked
from data_pipelines.synthetic import generate as generator
from data_pipelines.synthetic.config import FOREGROUND_IDS, WorldConfig
from data_pipelines.synthetic.generate import generate, is_complete
from data_pipelines.synthetic.tables import TABLES, VERSION
from fastdrive_jax.errors import UserError

SMALL = WorldConfig(
    seed=5, train_scenes=3, val_scenes=2, keyframes_per_scene=4, height=112, width=196, workers=1
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("synthetic") / "data", SMALL, progress=False)


def _files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def _equal(a: Path, b: Path) -> bool:
    names = _files(a)
    return names == _files(b) and all(
        filecmp.cmp(a / name, b / name, shallow=False) for name in names
    )


def _rows(root: Path, table: str) -> list[dict]:
    return json.loads((root / VERSION / f"{table}.json").read_text())


def test_two_workers_write_the_same_bytes(dataset, tmp_path):
    other = generate(tmp_path / "two", replace(SMALL, workers=2), progress=False)
    assert _equal(dataset, other)
    seeded = generate(tmp_path / "seed", replace(SMALL, seed=6), progress=False)
    picture = next(p for p in _files(dataset) if p.startswith("labels/CAM_FRONT"))
    assert (dataset / picture).read_bytes() != (seeded / picture).read_bytes()


def test_scene_does_not_depend_on_the_size_of_the_set(dataset, tmp_path):
    one = generate(tmp_path / "one", replace(SMALL, train_scenes=1, val_scenes=1), progress=False)
    pictures = [p for p in _files(one) if p.endswith((".jpg", "0.png")) and "maps" not in p]
    assert pictures
    for name in pictures:
        assert filecmp.cmp(one / name, dataset / name, shallow=False)


def test_layout_is_complete_and_linked(dataset):
    assert sorted(p.stem for p in (dataset / VERSION).glob("*.json")) == sorted((*TABLES, "splits"))
    samples, data = _rows(dataset, "sample"), _rows(dataset, "sample_data")
    assert len(samples) == 5 * 4
    assert len(data) == len(samples) * 6
    for kind in ("sample", "sample_data", "sample_annotation"):
        rows = {row["token"]: row for row in _rows(dataset, kind)}
        assert all(len(token) == 32 for token in rows)
        for row in rows.values():
            assert not row["next"] or rows[row["next"]]["prev"] == row["token"]
            assert not row["prev"] or rows[row["prev"]]["next"] == row["token"]
    for row in data:
        path = dataset / row["filename"]
        image = cv2.imread(str(path))
        assert image.shape == (112, 196, 3)
        stem = path.relative_to(dataset / "samples").with_suffix(".png")
        mask = cv2.imread(str(dataset / "masks" / stem), cv2.IMREAD_UNCHANGED)
        labels = cv2.imread(str(dataset / "labels" / stem), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(mask > 0, np.isin(labels, FOREGROUND_IDS))
    times = [row["timestamp"] for row in samples[:4]]
    assert np.diff(times).tolist() == [500_000] * 3
    splits = json.loads((dataset / VERSION / "splits.json").read_text())
    names = [row["name"] for row in _rows(dataset, "scene")]
    assert splits["train"] + splits["val"] == names
    assert (len(splits["train"]), len(splits["val"])) == (3, 2)


def test_one_bit_masks(dataset):
    from PIL import Image

    path = next((dataset / "masks" / "CAM_FRONT").iterdir())
    assert Image.open(path).mode == "1"


def test_planning_agrees_with_the_ego_poses(dataset):
    planning = json.loads((dataset / "planning.json").read_text())
    poses = {row["token"]: row for row in _rows(dataset, "ego_pose")}
    front = {
        row["sample_token"]: poses[row["ego_pose_token"]]
        for row in _rows(dataset, "sample_data")
        if "CAM_FRONT/" in row["filename"]
    }
    samples = {row["token"]: row for row in _rows(dataset, "sample")}
    assert set(planning) == set(samples)
    checked = 0
    for token, row in samples.items():
        w, x, y, z = front[token]["rotation"]
        forward = [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)]
        left = [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)]
        later, step = row["next"], 0
        while later:
            offset = np.subtract(front[later]["translation"], front[token]["translation"])
            expected = [offset @ forward, offset @ left]
            assert np.allclose(planning[token]["future"][step], expected, atol=2e-4)
            later, step, checked = samples[later]["next"], step + 1, checked + 1
        assert planning[token]["future_valid"] == [True] * 6
        assert len(planning[token]["future"]) == 6
        assert planning[token]["command"] in (0, 1, 2)
    assert checked == 5 * (3 + 2 + 1)


def test_second_call_returns_at_once_and_other_config_is_refused(dataset):
    before = (dataset / "planning.json").stat().st_mtime_ns
    assert generate(dataset, replace(SMALL, workers=2), progress=False) == dataset
    assert (dataset / "planning.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="already exists"):
        generate(dataset, replace(SMALL, seed=9), progress=False)


def test_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not an unfinished data set"):
        generate(tmp_path / "data", SMALL, progress=False)
    assert (tmp_path / "data.partial" / "thesis.tex").read_text() == "mine"


def test_full_disk_is_one_sentence_and_the_next_run_goes_on(dataset, tmp_path, monkeypatch):
    real, written = Path.write_bytes, []

    def write(self, data):
        written.append(self)
        if len(written) > 100:
            real(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, data)

    root = tmp_path / "data"
    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(UserError, match="disk is full"):
        generate(root, SMALL, progress=False)
    monkeypatch.undo()
    assert not root.exists()
    drawn = []
    real_scene = generator.write_scene
    monkeypatch.setattr(generator, "write_scene", lambda *a: drawn.append(a[2:]) or real_scene(*a))
    generate(root, SMALL, progress=False)
    assert drawn == [("train", 1), ("train", 2), ("val", 0), ("val", 1)]
    assert _equal(root, dataset)


def test_unfinished_set_of_another_config_is_started_afresh(dataset, tmp_path, monkeypatch):
    def stop(*args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(generator, "_write_tables", stop)
    with pytest.raises(UserError):
        generate(tmp_path / "data", replace(SMALL, seed=8), progress=False)
    monkeypatch.undo()
    assert _equal(generate(tmp_path / "data", SMALL, progress=False), dataset)


def test_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write the data set"):
        generate(tmp_path / "file" / "data", SMALL, progress=False)


def test_two_writers_at_once_are_refused(tmp_path):
    partial = tmp_path / "data.partial"
    partial.mkdir()
    with locked(partial), pytest.raises(UserError, match="another process"):
        generate(tmp_path / "data", SMALL, progress=False)


def _generate_in_child(root):
    generate(root, SMALL, progress=False)


def test_killed_run_is_never_taken_for_a_whole_one_and_goes_on(dataset, tmp_path):
    root = tmp_path / "data"
    partial = tmp_path / "data.partial"
    child = multiprocessing.get_context("spawn").Process(target=_generate_in_child, args=(root,))
    child.start()
    deadline = time.monotonic() + 120
    while not list(partial.glob("records/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not root.exists()
    assert not is_complete(root, SMALL)
    assert 1 <= len(list(partial.glob("records/*.json"))) < 5
    generate(root, SMALL, progress=False)
    assert is_complete(root, SMALL)
    assert not partial.exists()
    assert _equal(root, dataset)


def _generate_in_two_workers(root):
    generate(root, replace(SMALL, train_scenes=200, workers=2), progress=False)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads process ids from /proc")
def test_workers_end_with_a_killed_run(tmp_path):
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_generate_in_two_workers, args=(tmp_path / "data",))
    child.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("data.partial/records/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    assert len(workers) >= 2
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    deadline = time.monotonic() + 20
    while any(_alive(int(w)) for w in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(int(w)) for w in workers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_scenes": 0, "val_scenes": 0}, "at least one"),
        ({"keyframes_per_scene": 0}, "at least 1"),
        ({"height": 20}, "28 x 28"),
        ({"jpeg_quality": 0}, "outside 1 to 100"),
        ({"cameras": ("CAM_TOP",)}, "CAM_TOP"),
        ({"cameras": ("CAM_FRONT", "CAM_FRONT")}, "once"),
        ({"workers": -1}, "every core"),
        ({"seed": -1}, "negative"),
    ],
)
def test_bad_config_is_one_sentence(fields, message):
    with pytest.raises(UserError, match=message):
        WorldConfig(**fields)


def test_measured_speed_is_positive():
    config = WorldConfig(cameras=("CAM_FRONT",), keyframes_per_scene=2)
    assert pictures_per_second(config, scenes=1) > 2


@pytest.fixture(scope="module")
def front_only(tmp_path_factory):
    config = WorldConfig(
        train_scenes=21, val_scenes=21, keyframes_per_scene=2, cameras=("CAM_FRONT",), workers=1
    )
    return generate(tmp_path_factory.mktemp("front") / "data", config, progress=False)


def test_front_only_option(front_only):
    assert [p.name for p in (front_only / "samples").iterdir()] == ["CAM_FRONT"]
    assert len(_rows(front_only, "sample_data")) == 84


def test_background_is_plentiful_and_the_position_prior_is_weak(front_only):
    shares = class_shares(front_only, "CAM_FRONT")
    assert 0.2 < shares["foreground"] < 0.36
    assert shares["objects"] > 0.04
    assert min(shares[n] for n in ("sky", "building", "vegetation", "ground")) > 0.03
    recall = prior_recall(front_only, "CAM_FRONT")
    assert recall["prior objects"][0.5] < 0.78 < recall["oracle objects"][0.5]
    assert recall["prior objects"][0.25] < 0.42 < recall["oracle objects"][0.25]
    assert recall["oracle foreground"][0.5] > 0.93
