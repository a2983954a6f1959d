import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from grey_png import write_grey_png
from PIL import Image

from data_pipelines.build import build_shards
from data_pipelines.decode import decode_labels, decode_mask
from data_pipelines.image_folder import read_image_folder
from data_pipelines.schema import Classes
from data_pipelines.shards import record_source
from fastdrive_jax.errors import UserError

SIZE = (56, 84)


def write(path: Path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array)


def labels_of(seed: int) -> np.ndarray:
    labels = np.zeros(SIZE, np.uint8)
    labels[28:] = 1
    labels[30:40, seed : seed + 20] = 2
    return labels


def fill(folder: Path, stems, maps=("labels",), suffix=".jpg") -> None:
    for seed, stem in enumerate(stems):
        image = np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), np.uint8)
        write(folder / "images" / f"{stem}{suffix}", image)
        if "labels" in maps:
            write(folder / "labels" / f"{stem}.png", labels_of(seed))
        if "masks" in maps:
            write(folder / "masks" / f"{stem}.png", (labels_of(seed) == 2).astype(np.uint8))


STEMS = [f"drive1_{k:04d}" for k in range(6)] + [f"drive2_f{k:04d}" for k in range(4)]


@pytest.fixture
def folder(tmp_path) -> Path:
    fill(tmp_path, STEMS)
    return tmp_path


def stems(source, split):
    return [ref.picture.stem for ref in source.samples[split]]


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(np.uint8)


def test_the_last_fifth_is_validation(folder):
    source = read_image_folder(folder, foreground=(1, 2), objects=(2,))
    assert stems(source, "train") == STEMS[:8]
    assert stems(source, "val") == STEMS[8:]
    assert source.classes == Classes(foreground=(1, 2), objects=(2,))


def test_mask_is_the_foreground_of_the_labels(folder):
    source = read_image_folder(folder, foreground=(2,))
    (record,) = source.load(source.samples["train"][3])
    assert record.image == (folder / "images" / f"{STEMS[3]}.jpg").read_bytes()
    assert record.labels == (folder / "labels" / f"{STEMS[3]}.png").read_bytes()
    np.testing.assert_array_equal(decoded(record.mask), labels_of(3) == 2)
    assert (record.scene, record.sample_token) == ("drive1", f"train/{STEMS[3]}")
    assert source.load(source.samples["val"][0])[0].scene == "drive2"


def test_masks_alone(tmp_path):
    fill(tmp_path, STEMS, ("masks",), ".png")
    source = read_image_folder(tmp_path)
    (record,) = source.load(source.samples["train"][1])
    assert Image.open(io.BytesIO(record.mask)).mode == "1"
    np.testing.assert_array_equal(decoded(record.mask), labels_of(1) == 2)
    np.testing.assert_array_equal(decoded(record.labels), labels_of(1) == 2)  # to be measured by
    with pytest.raises(UserError, match="masks only"):
        read_image_folder(tmp_path, foreground=(1,))


def test_masks_win_over_labels_and_both_are_kept(tmp_path):
    fill(tmp_path, STEMS, ("masks", "labels"))
    source = read_image_folder(tmp_path, foreground=(1,))
    (record,) = source.load(source.samples["train"][1])
    np.testing.assert_array_equal(decoded(record.mask), labels_of(1) == 2)
    np.testing.assert_array_equal(decoded(record.labels), labels_of(1))


def test_train_and_val_folders(tmp_path):
    fill(tmp_path / "train", STEMS[:3])
    fill(tmp_path / "val", STEMS[7:])
    source = read_image_folder(tmp_path, foreground=(1,))
    assert stems(source, "train") == STEMS[:3]
    assert stems(source, "val") == STEMS[7:]


def test_half_of_train_and_val_is_refused(tmp_path):
    fill(tmp_path / "train", STEMS)
    with pytest.raises(UserError, match="no val/"):
        read_image_folder(tmp_path, foreground=(1,))


def test_palette_labels_are_read_as_indices(folder):
    path = folder / "labels" / f"{STEMS[0]}.png"
    picture = Image.fromarray(labels_of(0), mode="L").convert("P")
    picture.putdata(labels_of(0).ravel())
    picture.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200] + [0] * (256 - 3) * 3)
    picture.save(path)
    assert Image.open(path).mode == "P"
    source = read_image_folder(folder, foreground=(2,))
    (record,) = source.load(source.samples["train"][0])
    np.testing.assert_array_equal(decoded(record.labels), labels_of(0))
    np.testing.assert_array_equal(decoded(record.mask), labels_of(0) == 2)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_labels_of_few_bits_are_in_the_shards_as_stored(folder, tmp_path, depth):
    highest = 2**depth - 1
    labels = np.minimum(np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 16, highest)
    write_grey_png(folder / "labels" / f"{STEMS[0]}.png", labels, depth)
    shards = build_shards(
        read_image_folder(folder, foreground=(highest,)), tmp_path / "shards", progress=False
    )
    record = record_source(shards, "train")[0]
    np.testing.assert_array_equal(decode_labels(record["labels"], SIZE, shards.classes), labels)
    np.testing.assert_array_equal(decode_mask(record["mask"], SIZE), labels == highest)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_masks_of_few_bits(tmp_path, depth):
    fill(tmp_path, STEMS, ("masks",))
    write_grey_png(tmp_path / "masks" / f"{STEMS[0]}.png", (labels_of(0) == 2).astype(int), depth)
    source = read_image_folder(tmp_path)
    (record,) = source.load(source.samples["train"][0])
    np.testing.assert_array_equal(decode_mask(record.mask, SIZE), labels_of(0) == 2)


@pytest.mark.parametrize("kind", ["masks", "labels"])
def test_missing_maps_are_left_out_if_that_is_asked_for(tmp_path, kind, capfd):
    fill(tmp_path, STEMS, ("masks", "labels"))
    for stem in (STEMS[1], STEMS[9]):  # one of each split
        (tmp_path / kind / f"{stem}.png").unlink()
    with pytest.raises(UserError, match=rf"{kind}/{STEMS[1]}\.png is missing"):
        read_image_folder(tmp_path, foreground=(1,))
    with pytest.raises(UserError, match=rf"2 samples .* skip_bad=1; .*{kind}/{STEMS[9]}\.png"):
        read_image_folder(tmp_path, foreground=(1,), skip_bad=1)
    source = read_image_folder(tmp_path, foreground=(1,), skip_bad=2)
    with pytest.raises(UserError, match=rf"{kind}/{STEMS[1]}\.png is missing"):
        build_shards(source, tmp_path / "shards", progress=False)
    shards = build_shards(source, tmp_path / "shards", progress=False, skip_bad=2)
    assert shards.samples == {"train": 7, "val": 1}
    said = capfd.readouterr().err
    assert f"{kind}/{STEMS[1]}.png" in said
    assert f"{kind}/{STEMS[9]}.png" in said


def test_class_file_and_arguments(folder):
    (folder / "classes.json").write_text(
        '{"names": ["sky", "road", "car"], "foreground": [1, 2], "objects": [2]}'
    )
    assert read_image_folder(folder).classes.foreground == (1, 2)
    changed = read_image_folder(folder, foreground=(1,)).classes
    assert (changed.foreground, changed.objects) == ((1,), ())
    assert changed.names == ("sky", "road", "car")


def test_labels_need_foreground_ids(folder):
    with pytest.raises(UserError, match="foreground"):
        read_image_folder(folder)


@pytest.mark.parametrize("stem_kind", ["images", "labels"])
def test_unpaired_files_are_named(folder, stem_kind):
    (folder / stem_kind / f"{STEMS[4]}{'.jpg' if stem_kind == 'images' else '.png'}").unlink()
    with pytest.raises(UserError, match=STEMS[4]):
        read_image_folder(folder, foreground=(1,))


def test_empty_and_absent_folders(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        read_image_folder(tmp_path / "none")
    with pytest.raises(UserError, match="images is missing"):
        read_image_folder(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="no picture"):
        read_image_folder(tmp_path)
    write(tmp_path / "images" / "a.jpg", np.zeros((*SIZE, 3), np.uint8))
    with pytest.raises(UserError, match="neither masks/ nor labels/"):
        read_image_folder(tmp_path)
    write(tmp_path / "masks" / "a.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(UserError, match="one picture"):
        read_image_folder(tmp_path)


def test_two_pictures_of_one_stem_are_named(folder):
    write(folder / "images" / f"{STEMS[0]}.png", np.zeros((*SIZE, 3), np.uint8))
    with pytest.raises(UserError, match="share a stem"):
        read_image_folder(folder, foreground=(1,))


def spoil(folder: Path, kind: str) -> str:
    picture = folder / "images" / f"{STEMS[0]}.jpg"
    labels = folder / "labels" / f"{STEMS[0]}.png"
    if kind == "truncated":
        picture.write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])
    elif kind == "text":
        picture.write_text("no picture")
    elif kind == "empty":
        picture.write_bytes(b"")
    elif kind == "tiny":
        write(picture, np.zeros((20, 84, 3), np.uint8))
    elif kind == "other size":
        write(labels, np.zeros((28, 28), np.uint8))
        return str(labels)
    elif kind == "colour labels":
        write(labels, np.zeros((*SIZE, 3), np.uint8))
        return str(labels)
    elif kind == "16 bit":
        write(labels, np.zeros(SIZE, np.uint16))
        return str(labels)
    elif kind == "broken labels":
        labels.write_bytes(labels.read_bytes()[:60])
        return str(labels)
    elif kind == "unnamed class":
        array = labels_of(0)
        array[0, 0] = 77
        write(labels, array)
        names = '{"names": ["a", "b", "c"], "foreground": [1]}'
        (folder / "classes.json").write_text(names)
        return "77"
    return str(picture)


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "text",
        "empty",
        "tiny",
        "other size",
        "colour labels",
        "16 bit",
        "broken labels",
        "unnamed class",
    ],
)
def test_an_unusable_file_gives_one_sentence_that_names_it(folder, kind):
    named = spoil(folder, kind)
    source = read_image_folder(folder, foreground=(1,))
    with pytest.raises(UserError) as caught:
        source.load(source.samples["train"][0])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_reached_is_refused_in_a_sentence_or_left_out(folder, tmp_path):
    for stem in STEMS[:2]:  # of equal sizes, so that both are looked at as duplicates
        picture = folder / "images" / f"{stem}.jpg"
        picture.unlink()
        picture.mkdir()
    loop = folder / "labels" / f"{STEMS[2]}.png"
    loop.unlink()
    loop.symlink_to(loop)
    source = read_image_folder(folder, foreground=(1,))
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        build_shards(source, tmp_path / "set", progress=False)
    with pytest.raises(UserError, match=r"cannot be read \(Too many levels of symbolic links\)"):
        source.load(source.samples["train"][2])
    shards = build_shards(source, tmp_path / "set", progress=False, skip_bad=3)
    assert shards.samples == {"train": 5, "val": 2}


def test_camvid():
    shared = os.environ.get("FASTDRIVE_SHARED") or Path(__file__).parents[3] / "shared"
    root = Path(shared) / "data" / "camvid"
    if not root.is_dir():
        pytest.skip(f"no CamVid under {root} (set FASTDRIVE_SHARED)")
    source = read_image_folder(root, (3, 6, 8, 9, 10), (6, 8, 9, 10), (11,))
    assert {k: len(v) for k, v in source.samples.items()} == {"train": 367, "val": 101}
    shares = [decoded(source.load(r)[0].mask).mean() for r in source.samples["val"][::10]]
    assert 0.2 < np.mean(shares) < 0.5
