"""What was built is opened, and what is wrong with it is named."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.shards import open_shards, record_source
from fastdrive_jax.errors import UserError


@pytest.fixture
def spoiled(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.array_record*"))[0]


def test_every_field_comes_back_and_samples_stay_together(source, built):
    shards = open_shards(built, verify=True)
    assert shards.samples == {"train": 9, "val": 9}
    assert shards.image_size == (56, 84)
    assert shards.scenes == ("scene-a", "scene-b")
    assert len(list(built.glob("*train*"))) == 3  # 18 records, 8 a shard
    for split, refs in source.samples.items():
        records = record_source(shards, split)
        assert len(records) == shards.records(split) == 18
        wanted = [record for ref in refs for record in source.load(ref)]
        for want, got in zip(wanted, records, strict=True):
            for name in ("image", "mask", "labels"):
                assert got[name] == getattr(want, name)
            for name in ("camera", "sample_token", "scene"):
                assert got[name].decode() == getattr(want, name)
            np.testing.assert_array_equal(got["future"], want.future)
            np.testing.assert_array_equal(got["future_valid"], want.future_valid)
            np.testing.assert_array_equal(got["ego_state"], want.ego_state)
            assert got["command"] == want.command


def test_any_tfds_reader_opens_it(built):
    import tensorflow_datasets as tfds

    data = tfds.builder_from_directory(built).as_data_source("val")
    assert data[0]["image"].shape == (56, 84, 3)
    assert set(np.unique(data[0]["mask"])) == {0, 255}


def test_a_truncated_shard_is_named(spoiled):
    path = first_shard(spoiled)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=path.name):
        open_shards(spoiled)


def test_a_missing_shard_is_named(spoiled):
    path = first_shard(spoiled)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing"):
        open_shards(spoiled)


def test_a_changed_byte_is_found_by_checksums(spoiled):
    path = first_shard(spoiled)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    open_shards(spoiled)
    with pytest.raises(UserError, match=f"{path.name} is corrupt"):
        open_shards(spoiled, verify=True)


def test_bad_samples_of_a_flipped_byte_are_left_out_if_that_is_asked_for(built, spoiled, capsys):
    path = first_shard(spoiled)
    data = bytearray(path.read_bytes())
    place = data.index(record_source(open_shards(built), "train")[2]["image"])
    data[place + 500] ^= 16
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be read.*--skip-bad"):
        list(record_source(open_shards(spoiled), "train"))
    shards = open_shards(spoiled, skip_bad=1)
    assert capsys.readouterr().err == f"left out: sample 1 of split train in {path.name}\n"
    assert shards.samples == {"train": 8, "val": 9}
    assert shards.digest != open_shards(built).digest
    found = [record["sample_token"] for record in record_source(shards, "train")]
    whole = [record["sample_token"] for record in record_source(open_shards(built), "train")]
    assert found == whole[:2] + whole[4:]


def test_a_damaged_record_is_said_with_the_shard_that_holds_it(built, spoiled):
    path = sorted(spoiled.glob("*train*"))[1]  # records 8 to 15
    data = bytearray(path.read_bytes())
    place = data.index(record_source(open_shards(built), "train")[10]["image"])
    data[place + 500] ^= 16
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"Record 2 of {path} cannot be read"):
        record_source(open_shards(spoiled), "train")[10]


@pytest.mark.parametrize("fault", ["missing", "truncated", "empty"])
def test_a_lost_shard_is_left_out_if_that_is_asked_for(built, spoiled, capsys, fault):
    path = sorted(spoiled.glob("*train*"))[1]  # samples 4 to 7
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-200] if fault == "truncated" else b"")
    with pytest.raises(UserError, match=path.name):
        open_shards(spoiled)
    with pytest.raises(UserError, match="skip_bad=3"):
        open_shards(spoiled, skip_bad=3)
    shards = open_shards(spoiled, skip_bad=4)
    assert path.name in capsys.readouterr().err
    found = [record["sample_token"] for record in record_source(shards, "train")]
    whole = [record["sample_token"] for record in record_source(open_shards(built), "train")]
    assert set(found) == set(whole[:8] + whole[16:])


def test_no_manifest_no_data_set(spoiled):
    (spoiled / "manifest.json").unlink()
    with pytest.raises(UserError, match="no whole data set"):
        open_shards(spoiled)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 0}', '{"format": 1}', "\xff"])
def test_a_damaged_manifest_is_named(spoiled, content):
    (spoiled / "manifest.json").write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_shards(spoiled)


def test_tfds_files_are_part_of_it(spoiled):
    (spoiled / "features.json").unlink()
    with pytest.raises(UserError, match=r"features\.json"):
        open_shards(spoiled)


def test_an_unknown_split_is_named(built):
    with pytest.raises(UserError, match=r"'test'.*train, val"):
        record_source(open_shards(built), "test")


def test_manifest_holds_no_machine_path(built):
    text = (built / "manifest.json").read_text()
    assert str(built.parent) not in text
    assert json.loads(text)["cameras"] == ["CAM_FRONT", "CAM_BACK"]


def test_opening_is_quick(built):
    start = time.perf_counter()
    open_shards(built)
    assert time.perf_counter() - start < 1


def test_a_split_of_lost_shards_says_so(spoiled):
    for path in spoiled.glob("*val.array_record*"):
        path.unlink()
    shards = open_shards(spoiled, skip_bad=9)
    with pytest.raises(UserError, match=r"'val' of .* has no shard that is whole"):
        record_source(shards, "val")
