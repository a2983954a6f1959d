import json
import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from nuscenes_fixture import write_nuscenes

from data_pipelines.augment import ColorJitter
from data_pipelines.build import build_shards
from data_pipelines.features import TokenEncoder
from data_pipelines.loader import LoaderConfig, identity, make_loader
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.token_cache import DTYPES, MANIFEST, open_token_cache
from data_pipelines.token_cache_writer import write_token_cache
from fastdrive_jax.errors import UserError

SIZE, GRID, DIM = (56, 84), (2, 3), 5
PICTURES = 18  # of each split, from two cameras
STREAM = LoaderConfig(3, SIZE, seed=5, num_epochs=2, fields=("image", "index"))


def toy_encode(images) -> jnp.ndarray:
    """Mean colours of a token and two of their squares."""
    batch = len(images)
    x = jnp.asarray(images, jnp.float32).reshape(batch, GRID[0], 28, GRID[1], 28, 3)
    x = x.mean(axis=(2, 4)).reshape(batch, -1, 3) / 255
    return jnp.concatenate([x, x[..., :2] ** 2], axis=-1)


ENCODER = TokenEncoder("toy", DIM, toy_encode)


class Stop(Exception):
    pass


def watched(calls: list, stop_at: int | None = None) -> TokenEncoder:
    def encode(images):
        if len(calls) == stop_at:
            raise Stop
        calls.append(images.shape)
        return toy_encode(images)

    return replace(ENCODER, encode=encode)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = write_nuscenes(tmp_path_factory.mktemp("nu"))
    return build_shards(read_nuscenes(root), tmp_path_factory.mktemp("s") / "set", progress=False)


def write(shards, folder, encoder=ENCODER, split="train", **kwargs) -> bool:
    options = {"image_size": SIZE, "batch_size": 3, "records_per_file": 4, "progress": False}
    return write_token_cache(shards, split, encoder, folder, **options | kwargs)


@pytest.fixture(scope="module")
def cache(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t") / "train"
    assert write(shards, folder)
    return open_token_cache(folder)


def in_order(shards, split="train", **changes) -> np.ndarray:
    config = LoaderConfig(PICTURES, SIZE, fields=("image",), shuffle=False, num_epochs=1)
    (batch,) = make_loader(shards, split, replace(config, **changes))
    return batch["image"]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("resize", ["bicubic", "area"])
def test_tokens_are_those_of_encoding_the_pictures(shards, tmp_path, dtype, resize):
    assert write(shards, tmp_path / "c", split="val", dtype=dtype, resize=resize)
    cache = open_token_cache(tmp_path / "c")
    direct = np.asarray(toy_encode(in_order(shards, "val", resize=resize))).astype(DTYPES[dtype])
    stored = [cache[record] for record in range(len(cache))]
    assert stored[0].dtype == DTYPES[dtype]
    assert np.stack(stored).tobytes() == direct.tobytes()
    assert not stored[0].flags.writeable
    assert cache.identity.grid == GRID
    with pytest.raises(IndexError):
        cache[PICTURES]


def test_files_hold_a_fixed_number_and_one_shape_is_encoded(shards, tmp_path):
    calls = []
    write(shards, tmp_path / "c", watched(calls))
    assert set(calls) == {(3, *SIZE, 3)}
    assert len(calls) == 4 * 2 + 1
    files = open_token_cache(tmp_path / "c").identity.files()
    assert list(files.values()) == [4, 4, 4, 4, 2]
    assert sorted(contents(tmp_path / "c")) == [MANIFEST, *files]


def test_a_run_that_was_cut_off_makes_only_what_is_missing(shards, cache, tmp_path):
    folder = tmp_path / "c"
    with pytest.raises(Stop):
        write(shards, folder, watched([], stop_at=5))  # in the third file
    done = sorted(contents(folder))
    assert done == [MANIFEST, *list(cache.identity.files())[:2]]
    with pytest.raises(UserError, match=r"00002-of-00005 is missing \(and 2 more"):
        open_token_cache(folder)
    left_by_kill = folder / f".{list(cache.identity.files())[2]}.0.12345.partial"
    left_by_kill.write_bytes(b"half")
    calls = []
    assert write(shards, folder, watched(calls))
    assert len(calls) == 2 * 2 + 1
    assert contents(folder) == contents(cache.path)
    assert write(shards, folder, watched(calls := []))
    assert calls == []


def test_hosts_share_the_files_and_end_when_they_like(shards, cache, tmp_path):
    folder, first, second = tmp_path / "c", [], []
    assert not write(shards, folder, watched(first), host_index=1, host_count=2)
    assert sorted(contents(folder)) == [MANIFEST, *list(cache.identity.files())[1::2]]
    with pytest.raises(UserError, match="00000-of-00005 is missing"):
        open_token_cache(folder)
    assert write(shards, folder, watched(second), host_index=0, host_count=2, batch_size=4)
    assert (len(first), len(second)) == (4, 3)
    assert contents(folder) == contents(cache.path)


def test_a_cache_can_be_pickled(cache):
    again = pickle.loads(pickle.dumps(cache))
    assert again == cache
    assert again[7].tobytes() == cache[7].tobytes()


def assert_own_tokens(batch):
    direct = np.asarray(toy_encode(batch["image"])).astype(DTYPES["bfloat16"])
    assert batch["tokens"].dtype == DTYPES["bfloat16"]
    np.testing.assert_array_equal(batch["tokens"], direct)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hosts", [1, 2])
def test_every_picture_comes_with_its_own_tokens(shards, cache, workers, hosts):
    config = replace(STREAM, num_workers=workers)
    seen = []
    for host in range(hosts):
        for batch in make_loader(shards, "train", config, host, hosts, tokens=cache):
            assert_own_tokens(batch)
            seen += batch["index"].tolist()
    assert sorted(seen) == sorted([*range(PICTURES)] * 2)
    assert seen[:PICTURES] != sorted(seen[:PICTURES])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_with_the_right_tokens(shards, cache, workers):
    batches = iter(make_loader(shards, "train", STREAM, tokens=cache))
    given = [next(batches) for _ in range(8)]
    again = iter(make_loader(shards, "train", replace(STREAM, num_workers=workers), tokens=cache))
    again.set_state({"examples": 5 * 3})  # the next one but one is of the second epoch
    for batch in given[5:]:
        other = next(again)
        for name, array in batch.items():
            np.testing.assert_array_equal(other[name], array)
        assert_own_tokens(other)
    again.close()


def test_cameras_samples_and_padding_keep_the_tokens(shards, cache):
    back = replace(STREAM, cameras=("CAM_BACK",), batch_size=4, remainder="pad")
    batches = list(make_loader(shards, "train", back, tokens=cache))
    assert [len(batch["tokens"]) for batch in batches] == [4] * 5
    for batch in batches:
        assert_own_tokens(batch)
    samples = replace(STREAM, group="sample")
    for batch in make_loader(shards, "train", samples, tokens=cache):
        assert batch["tokens"].shape == (3, 2, 6, DIM)
        flat = {
            name: array.reshape(6, *array.shape[2:])
            for name, array in batch.items()
            if name != "index"
        }
        assert_own_tokens(flat)


def test_tokens_need_no_picture_and_are_part_of_the_stream(shards, cache):
    config = replace(STREAM, fields=("mask",))
    assert set(next(iter(make_loader(shards, "train", config, tokens=cache)))) == {"mask", "tokens"}
    other = replace(cache, identity=replace(cache.identity, encoder="other"))
    plain, one, two = (identity(shards, "train", config, tokens) for tokens in (None, cache, other))
    assert plain != one != two
    json.dumps(one)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"flip": True}, "flip and jitter off"),
        ({"jitter": ColorJitter(brightness=0.1)}, "flip and jitter off"),
        ({"image_size": (28, 28)}, r"image_size=\(56, 84\)"),
        ({"resize": "area"}, "resize='bicubic'"),
    ],
)
def test_the_loader_refuses_tokens_of_other_pictures(shards, cache, change, sentence):
    with pytest.raises(UserError, match=sentence):
        make_loader(shards, "train", replace(STREAM, **change), tokens=cache)


def test_the_loader_refuses_tokens_of_other_data(shards, cache):
    with pytest.raises(UserError, match="split='train'"):
        make_loader(shards, "val", STREAM, tokens=cache)
    with pytest.raises(UserError, match="data="):
        make_loader(replace(shards, digest="other"), "train", STREAM, tokens=cache)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"encoder": replace(ENCODER, digest="new")}, r"encoder \(toy there, new asked for\)"),
        ({"split": "val"}, "split"),
        ({"image_size": (56, 28)}, r"image_size .*, grid .*; choose another"),
        ({"resize": "area"}, "resize"),
        ({"dtype": "float16"}, "dtype"),
        ({"records_per_file": 5}, "records_per_file"),
    ],
)
def test_a_folder_of_other_content_is_refused(shards, cache, given, sentence):
    before = contents(cache.path)
    with pytest.raises(UserError, match=sentence):
        write(shards, cache.path, **given)
    assert contents(cache.path) == before


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"image_size": (30, 56)}, "28 x 28"),
        ({"resize": "nearest"}, "resize"),
        ({"split": "test"}, "no split 'test'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"records_per_file": 0}, "records_per_file=0"),
        ({"host_index": 2, "host_count": 2}, "host_index=2"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(shards, tmp_path, given, sentence):
    with pytest.raises(UserError, match=sentence):
        write(shards, tmp_path / "c", **given)
    assert not (tmp_path / "c").exists()


def test_a_folder_of_something_else_is_left_alone(shards, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt but no token cache"):
        write(shards, tmp_path)
    with pytest.raises(UserError, match=MANIFEST):
        open_token_cache(tmp_path)


def test_tokens_that_the_number_type_cannot_hold_are_refused(shards, tmp_path):
    loud = replace(ENCODER, encode=lambda images: toy_encode(images) + 1e5)
    with pytest.raises(UserError, match=r"Record 0 .* not finite as float16"):
        write(shards, tmp_path / "c", loud, dtype="float16")
    assert sorted(contents(tmp_path / "c")) == [MANIFEST]
    assert write(shards, tmp_path / "d", loud, dtype="bfloat16")


def test_damage_is_a_sentence_and_is_made_good(shards, cache, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(cache.path, folder)
    cut, gone, short, turned = list(cache.identity.files())[:4]
    (folder / cut).write_bytes((folder / cut).read_bytes()[:-100])
    (folder / gone).unlink()
    shutil.copy(folder / list(cache.identity.files())[4], folder / short)
    with pytest.raises(
        UserError, match=r"00000-of-00005 .*\(and 2 more are\); write the cache"
    ) as caught:
        open_token_cache(folder)
    calls = []
    assert write(shards, folder, watched(calls))
    assert len(calls) == 3 * 2
    assert contents(folder) == contents(cache.path)
    data = bytearray((folder / turned).read_bytes())
    data[data.index(cache[13].tobytes()) + 3] ^= 1
    (folder / turned).write_bytes(data)
    damaged = open_token_cache(folder)
    assert damaged[12].tobytes() == cache[12].tobytes()
    with pytest.raises(UserError, match=r"Record 13 .*00003-of-00005.*delete that file") as caught:
        damaged[13]
    assert "\n" not in str(caught.value)


def test_a_damaged_manifest_is_a_sentence(cache, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(cache.path, folder)
    whole = json.loads((folder / MANIFEST).read_text())
    for content in ("{", "[]", json.dumps(whole | {"format": 0}), json.dumps(whole | {"dim": "x"})):
        (folder / MANIFEST).write_text(content)
        with pytest.raises(UserError, match=MANIFEST):
            open_token_cache(folder)
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in whole.items() if k != "split"}))
    with pytest.raises(UserError, match="split"):
        open_token_cache(folder)


def test_a_full_disk_is_a_sentence(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="disk is full"):
        write(shards, tmp_path / "c")
