import cv2
import numpy as np
import pytest

from experiments import bench_data as bench
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows

pytest.importorskip("torch")

SIDES = {
    "fastdrive_thread",
    "fastdrive_area_thread",
    "pillow_thread",
    "fastdrive_processes",
    "fastdrive_threads",
    "torch",
}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "jpegs" / "deep"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(10):
        noise = cv2.GaussianBlur(rng.integers(0, 256, (90, 160, 3), np.uint8), (0, 0), 2)
        assert cv2.imwrite(str(folder / f"{number}.jpg"), noise)
    return tmp_path / "jpegs"


def arguments(tmp_path, pictures, **changes) -> bench.BenchDataArgs:
    fields = {"sizes": ((28, 56),), "workers": 1, "items": 8, "rounds": 1}
    return bench.BenchDataArgs(tmp_path / "out", pictures, **{**fields, **changes})


def test_every_side_is_measured(tmp_path, pictures):
    path = bench.bench_data(arguments(tmp_path, pictures, images_per_second=12.0))
    rows, meta = read_rows(path)
    values = {(row.method, row.metric): row.value for row in rows}
    for side in SIDES:
        assert values[side, "pictures_per_second_and_core_56x28"] > 0
    ours = values["fastdrive_thread", "pictures_per_second_and_core_56x28"]
    theirs = values["pillow_thread", "pictures_per_second_and_core_56x28"]
    assert values["fastdrive_thread", "times_pillow_thread_56x28"] == pytest.approx(ours / theirs)
    assert values["torch", "times_torch_56x28"] == 1
    assert values["h100", "pictures_per_second_taken_56x28"] == 12
    torch_rate = values["torch", "pictures_per_second_and_core_56x28"]
    assert values["torch", "cores_for_one_h100_56x28"] == pytest.approx(12 / torch_rate)
    assert meta["workers"] == 1
    assert meta["bytes_a_picture"] > 500


def test_other_pixels_are_not_timed(tmp_path, pictures, monkeypatch):
    right = bench.pillow_item

    def wrong(*args):
        item = right(*args)
        return {**item, "image": item["image"] ^ 1}

    monkeypatch.setattr(bench, "pillow_item", wrong)
    with pytest.raises(RuntimeError, match="image"):
        bench.bench_data(arguments(tmp_path, pictures))


def test_drawn_pictures_weigh_as_photographs():
    data = bench._draw_jpeg(0)
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape == (900, 1600, 3)
    assert 100_000 < len(data) < 500_000
    assert bench._draw_jpeg(1) != data


def test_refusals(tmp_path, pictures):
    next(pictures.rglob("*.jpg")).unlink()
    for path in list(pictures.rglob("*.jpg"))[:2]:
        path.unlink()
    with pytest.raises(UserError, match="7 JPEGs"):
        bench.bench_data(arguments(tmp_path, pictures))
    with pytest.raises(UserError, match="rounds=0"):
        arguments(tmp_path, pictures, rounds=0)
    with pytest.raises(UserError, match="images_per_second"):
        arguments(tmp_path, pictures, images_per_second=-1.0)
    with pytest.raises(UserError, match="divisible"):
        arguments(tmp_path, pictures, sizes=((30, 28),))
