import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nuscenes_fixture import scene_arrays, write_nuscenes

from data_pipelines.augment import ColorJitter, mirrored_cameras
from data_pipelines.build import build_shards
from data_pipelines.loader import LoaderConfig, identity, make_loader
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.schema import CAMERAS, LEFT, RIGHT
from data_pipelines.shards import record_source
from fastdrive_jax.errors import UserError
from fastdrive_jax.training.checkpoints import RunCheckpoints

SIZE = (56, 84)
PLAIN = LoaderConfig(4, SIZE, shuffle=False, num_epochs=1, remainder="keep")
STREAM = LoaderConfig(12, SIZE, seed=3, num_epochs=4, fields=("index",))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_nuscenes(tmp_path_factory.mktemp("nu"))


@pytest.fixture(scope="module")
def shards(root, tmp_path_factory):
    return build_shards(read_nuscenes(root), tmp_path_factory.mktemp("s") / "set", progress=False)


def batches(shards, config, split="train", **kwargs) -> list[dict]:
    return list(make_loader(shards, split, config, **kwargs))


def column(batch_list, key) -> np.ndarray:
    return np.concatenate([batch[key] for batch in batch_list])


def together(parts: list[np.ndarray], size: int) -> np.ndarray:
    """What one host would read: batch by batch, the blocks of host after host."""
    return np.reshape(parts, (len(parts), -1, size)).swapaxes(0, 1).ravel()


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)
        assert one[key].dtype == other[key].dtype


def test_picture_batches(shards):
    got = batches(shards, PLAIN)
    assert [len(b["image"]) for b in got] == [4, 4, 4, 4, 2]
    shapes = {k: (v.shape, v.dtype.name) for k, v in got[0].items()}
    assert shapes == {
        "image": ((4, *SIZE, 3), "uint8"),
        "mask": ((4, *SIZE), "uint8"),
        "labels": ((4, *SIZE), "uint8"),
        "camera": ((4,), "int32"),
        "scene": ((4,), "int32"),
    }
    assert column(got, "camera").tolist() == [0, 1] * 9
    assert set(column(batches(shards, PLAIN, "val"), "scene")) == {1}


def test_pictures_are_rgb_and_labels_follow_their_picture(shards):
    # Record 0 is sample a0's front camera, which the fixture wrote second, from seed 1.
    image, labels = scene_arrays(1)
    first = batches(shards, PLAIN)[0]
    error = np.abs(first["image"][0].astype(int) - image[..., ::-1])
    assert error.mean() < 12  # JPEG of blurred noise
    assert np.abs(first["image"][0].astype(int) - image).mean() > 2 * error.mean()
    np.testing.assert_array_equal(first["mask"][0], np.isin(labels, (1, 2)))
    np.testing.assert_array_equal(first["labels"][0], np.where(labels == 3, 255, labels))


def test_sample_batches(shards, root):
    source = read_nuscenes(root)
    got = batches(shards, replace(PLAIN, group="sample"), "val")
    assert got[0]["image"].shape == (4, 2, *SIZE, 3)
    assert got[0]["mask"].shape == got[0]["labels"].shape == (4, 2, *SIZE)
    records = [source.load(ref)[0] for ref in source.samples["val"]]
    np.testing.assert_array_equal(column(got, "future"), [r.future for r in records])
    np.testing.assert_array_equal(column(got, "future_valid"), [r.future_valid for r in records])
    np.testing.assert_array_equal(column(got, "speed"), [r.ego_state[0] for r in records])
    np.testing.assert_array_equal(column(got, "command"), [r.command for r in records])
    kinds = {k: v.dtype.name for k, v in got[0].items()}
    assert (kinds["speed"], kinds["command"], kinds["future_valid"]) == ("float32", "int32", "bool")
    pictures = batches(shards, PLAIN, "val")
    flat = column(got, "image").reshape(18, *SIZE, 3)
    np.testing.assert_array_equal(flat, column(pictures, "image"))


def test_chosen_cameras(shards):
    back = batches(shards, replace(PLAIN, cameras=("CAM_BACK",)))
    every = batches(shards, PLAIN)
    np.testing.assert_array_equal(column(back, "image"), column(every, "image")[1::2])
    with pytest.raises(UserError, match="CAM_FRONT_LEFT"):
        make_loader(shards, "train", replace(PLAIN, cameras=("CAM_FRONT_LEFT",)))


def test_shrinking_averages_and_keeps_labels_whole(shards):
    small = batches(shards, replace(PLAIN, image_size=(28, 28), resize="area"))[0]
    big = batches(shards, PLAIN)[0]
    blocks = big["image"][0].reshape(28, 2, 28, 3, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(small["image"][0] - blocks).max() <= 1
    assert set(np.unique(small["labels"])) <= set(np.unique(big["labels"]))
    assert set(np.unique(small["mask"])) == {0, 1}
    larger = batches(shards, replace(PLAIN, image_size=(112, 168)))[0]
    np.testing.assert_array_equal(larger["labels"][:, ::2, ::2], big["labels"])
    np.testing.assert_array_equal(larger["labels"][:, 1::2, 1::2], big["labels"])


@pytest.mark.parametrize(
    ("workers", "group"),
    [
        (0, "picture"),
        (0, "sample"),
        (2, "sample"),
        pytest.param(2, "picture", marks=pytest.mark.slow),
    ],
)
def test_resume_is_exact_with_augmentation_across_epochs(shards, group, workers):
    config = LoaderConfig(
        4,
        SIZE,
        cameras=("CAM_FRONT",),
        group=group,
        flip=True,
        jitter=ColorJitter(0.3, 0.3, 0.3),
        num_workers=workers,
        seed=5,
    )
    loader = make_loader(shards, "train", config)
    running, others = iter(loader), multiprocessing.active_children()
    for _ in range(3):
        next(running)
    mine = [child for child in multiprocessing.active_children() if child not in others]
    assert len(mine) == workers
    for child in mine:  # as a terminal or a scheduler does, when a training is to save and stop
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    state = json.loads(json.dumps(running.get_state()))
    wanted = [next(running) for _ in range(5)]
    resumed = iter(make_loader(shards, "train", config))
    resumed.set_state(state)
    for want in wanted:
        assert_equal(next(resumed), want)
    running.close()
    resumed.close()


def test_seed_decides_everything(shards):
    config = LoaderConfig(4, SIZE, flip=True, jitter=ColorJitter(0.2, 0.2, 0.2), num_epochs=1)
    one, two = batches(shards, config), batches(shards, config)
    for a, b in zip(one, two, strict=True):
        assert_equal(a, b)
    other = batches(shards, replace(config, seed=1))
    assert any((a["image"] != b["image"]).any() for a, b in zip(one, other, strict=True))


def fingerprints(batch_list) -> list[int]:
    return [int(picture.astype(np.int64).sum()) for picture in column(batch_list, "image")]


def test_each_epoch_has_every_picture_once_in_another_order(shards):
    everything = sorted(fingerprints(batches(shards, PLAIN)))
    assert len(set(everything)) == 18
    config = LoaderConfig(6, SIZE, num_epochs=2)
    seen = fingerprints(batches(shards, config))
    assert sorted(seen[:18]) == sorted(seen[18:]) == everything
    assert seen[:18] != seen[18:]
    assert seen[:18] != fingerprints(batches(shards, PLAIN))


def test_threads_do_not_change_the_batches(shards):
    config = LoaderConfig(4, SIZE, jitter=ColorJitter(0.2), num_epochs=1, read_threads=1)
    for a, b in zip(
        batches(shards, config), batches(shards, replace(config, read_threads=8)), strict=True
    ):
        assert_equal(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_hosts_share_every_batch_of_the_same_stream(shards, workers):
    """Whatever the number of hosts, batch t holds the same examples, and epochs lack none."""
    whole = column(batches(shards, replace(STREAM, batch_size=12)), "index")
    assert sorted(whole[:18]) == sorted(whole[18:36]) == list(range(18))
    for hosts in (2, 3, 4):
        config = replace(STREAM, batch_size=12 // hosts, num_workers=workers if hosts == 2 else 0)
        parts = [
            column(batches(shards, config, process_index=k, process_count=hosts), "index")
            for k in range(hosts)
        ]
        np.testing.assert_array_equal(together(parts, 12 // hosts), whole)


def test_a_position_holds_for_other_hosts_and_batch_sizes(shards):
    """After 5 batches of 3 on two hosts, three hosts with batches of 2 go on at example 30."""
    whole = column(batches(shards, replace(STREAM, batch_size=1)), "index")
    states = []
    for host in range(2):
        running = iter(make_loader(shards, "train", replace(STREAM, batch_size=3), host, 2))
        for _ in range(5):
            next(running)
        states.append(running.get_state())
        running.close()
    assert states == [{"examples": 30}] * 2
    rest = []
    for host in range(3):
        resumed = iter(make_loader(shards, "train", replace(STREAM, batch_size=2), host, 3))
        resumed.set_state(states[0])
        rest.append(column(list(resumed), "index"))
    np.testing.assert_array_equal(together(rest, 2), whole[30:])


def test_the_last_batch_is_dropped_kept_or_padded(shards):
    config = LoaderConfig(4, SIZE, num_epochs=1, shuffle=False, fields=("index",))
    order = list(range(18))

    def indices(remainder, **hosts):
        made = batches(shards, replace(config, remainder=remainder), **hosts)
        return [batch["index"].tolist() for batch in made], made

    assert indices("drop")[0] == [order[k : k + 4] for k in (0, 4, 8, 12)]
    assert indices("keep")[0][-1] == [16, 17]
    found, made = indices("pad")
    assert found[-1] == [16, 17, 17, 17]
    assert [batch["valid"].sum() for batch in made] == [4, 4, 4, 4, 2]
    per_host = [indices("pad", process_index=k, process_count=3) for k in range(3)]
    assert [len(found) for found, _ in per_host] == [2, 2, 2]
    real = [
        index for _, made in per_host for batch in made for index in batch["index"][batch["valid"]]
    ]
    assert sorted(real) == order
    with pytest.raises(UserError, match="different sizes"):
        indices("keep", process_count=3)


def test_fields_are_chosen(shards):
    fields = ("foreground", "mask", "intrinsic", "camera_to_ego", "index")
    got = batches(shards, replace(PLAIN, image_size=(28, 56), fields=fields))[0]
    assert set(got) == set(fields)
    cells = got["mask"].reshape(4, 1, 28, 2, 28).mean((2, 4)).reshape(4, 2)
    np.testing.assert_allclose(got["foreground"], cells, atol=1e-6)
    # Pictures of 56 x 84 became half as high and two thirds as wide.
    np.testing.assert_allclose(
        got["intrinsic"][0], [[40, 0, 28], [0, 30, 14], [0, 0, 1]], atol=1e-5
    )
    np.testing.assert_allclose(got["camera_to_ego"][0][:3, 3], [1.5, 0, 1.4], atol=1e-6)
    with pytest.raises(UserError, match="fields"):
        replace(PLAIN, fields=("speed",))


def test_endless_by_default(shards):
    iterator = iter(make_loader(shards, "train", LoaderConfig(7, SIZE)))
    assert [len(next(iterator)["image"]) for _ in range(9)] == [7] * 9
    iterator.close()


def test_flip_mirrors_pictures_and_plan(shards):
    config = replace(PLAIN, group="sample", cameras=("CAM_FRONT",))
    plain = batches(shards, config, "val")
    turned = batches(shards, replace(config, flip=True), "val")
    commands = set()
    count = 0
    for a, b in zip(plain, turned, strict=True):
        for k in range(len(a["image"])):
            flipped = not np.array_equal(a["image"][k], b["image"][k])
            if not flipped:
                np.testing.assert_array_equal(a["future"][k], b["future"][k])
                continue
            count += 1
            for key, axis in (("image", -2), ("mask", -1), ("labels", -1)):
                np.testing.assert_array_equal(np.flip(a[key][k], axis), b[key][k])
            np.testing.assert_array_equal(a["future"][k] * [1, -1], b["future"][k])
            commands.add((int(a["command"][k]), int(b["command"][k])))
    assert 1 <= count <= 8
    assert (LEFT, RIGHT) in commands


def test_flips_need_cameras_that_change_places(shards):
    config = LoaderConfig(2, SIZE, group="sample", flip=True)
    next(iter(make_loader(shards, "train", config)))  # front and back
    with pytest.raises(UserError, match="CAM_FRONT_RIGHT"):
        mirrored_cameras(("CAM_FRONT", "CAM_FRONT_LEFT"))
    assert mirrored_cameras(CAMERAS) == (0, 5, 4, 3, 2, 1)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((360, 480), "336 x 476 or 364 x 504"),
        ((224, 390), "224 x 364 or 224 x 392"),
        ((20, 20), "28 x 28"),
        ((0, 28), "positive"),
    ],
)
def test_sizes_of_partial_tokens_are_refused(size, said):
    with pytest.raises(UserError, match=said) as caught:
        LoaderConfig(1, size)
    assert str(size[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"read_threads": 0}, "read_threads=0"),
        ({"group": "scene"}, "scene"),
        ({"cameras": ("FRONT",)}, "FRONT"),
        ({"cameras": ()}, "cameras"),
    ],
)
def test_bad_settings_are_named(change, said):
    with pytest.raises(UserError, match=said):
        LoaderConfig(**{"batch_size": 2, **change})


def test_bad_jitter_is_named():
    with pytest.raises(UserError, match="contrast=1"):
        ColorJitter(contrast=1.0)


def test_too_little_data_for_a_batch(shards):
    with pytest.raises(UserError, match="18 items"):
        make_loader(shards, "train", LoaderConfig(32, SIZE, num_epochs=1))


def test_unknown_split(shards):
    with pytest.raises(UserError, match="test"):
        make_loader(shards, "test", PLAIN)


def test_identity_tells_streams_apart(shards):
    config = LoaderConfig(4, SIZE)
    same = identity(shards, "train", config)
    assert json.loads(json.dumps(same)) == same
    for change in ({"read_threads": 9}, {"batch_size": 2}, {"num_workers": 2}):
        assert identity(shards, "train", replace(config, **change)) == same
    for change in ({"seed": 1}, {"flip": True}, {"resize": "area"}):
        assert identity(shards, "train", replace(config, **change)) != same
    assert identity(shards, "val", config) != same


def test_jpeg_bytes_decode_without_exif_rotation(tmp_path):
    """A rotated picture would no longer fit its mask."""
    from PIL import Image

    from data_pipelines.decode import decode_image

    array = np.zeros((28, 56, 3), np.uint8)
    array[:, 28:] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(array).save(tmp_path / "a.jpg", exif=exif, quality=95)
    data = (tmp_path / "a.jpg").read_bytes()
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[0, 0, 0] > 200
    assert decode_image(data, (28, 56))[0, 0, 0] < 50


def test_records_are_raw(shards):
    assert record_source(shards, "train")[0]["image"].startswith(b"\xff\xd8")


def test_a_checkpoint_of_two_hosts_goes_on_with_three(shards, tmp_path):
    """The position lies in the checkpoint as one number, which any loader of the stream takes."""
    whole = column(batches(shards, replace(STREAM, batch_size=1)), "index")
    state = {"weight": jnp.arange(3.0)}
    running = iter(make_loader(shards, "train", replace(STREAM, batch_size=3), 0, 2))
    for _ in range(2):
        next(running)
    with RunCheckpoints(tmp_path / "run", STREAM) as checkpoints:
        checkpoints.save(2, state, running)
    running.close()
    rest = []
    for host in range(3):
        resumed = iter(make_loader(shards, "train", replace(STREAM, batch_size=2), host, 3))
        with RunCheckpoints(tmp_path / "run", STREAM) as checkpoints:
            restored = checkpoints.restore(jax.eval_shape(lambda: state), resumed)
        np.testing.assert_array_equal(restored["weight"], state["weight"])
        rest.append(column(list(resumed), "index"))
    np.testing.assert_array_equal(together(rest, 2), whole[12:])


@pytest.mark.parametrize(("index", "count"), [(2, 2), (5, 2), (-1, 2), (0, 0)])
def test_a_process_that_is_none_of_them_is_refused(shards, index, count):
    with pytest.raises(UserError, match=f"process_index={index} must be from 0 to below"):
        make_loader(shards, "train", PLAIN, index, count)
