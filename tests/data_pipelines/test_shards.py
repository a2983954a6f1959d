import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nuscenes_fixture import write_nuscenes

from data_pipelines.build import build_shards
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.shards import open_shards, record_source
from fastdrive_jax.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return read_nuscenes(write_nuscenes(tmp_path_factory.mktemp("nu")))


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "set"
    build_shards(source, path, progress=False, records_per_shard=8)
    return path


@pytest.fixture
def spoiled(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


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


def test_the_same_source_gives_the_same_bytes(source, built, tmp_path):
    build_shards(source, tmp_path / "set", progress=False, records_per_shard=8)
    assert hashes(tmp_path / "set") == hashes(built)


def test_digest_follows_the_records(source, built, tmp_path):
    changed = replace(source, samples={**source.samples, "val": source.samples["val"][1:]})
    other = build_shards(changed, tmp_path / "set", progress=False, records_per_shard=8)
    assert other.digest != open_shards(built).digest


def test_any_tfds_reader_opens_it(built):
    import tensorflow_datasets as tfds

    data = tfds.builder_from_directory(built).as_data_source("val")
    assert data[0]["image"].shape == (56, 84, 3)
    assert set(np.unique(data[0]["mask"])) == {0, 255}


def test_no_leftovers(source, tmp_path):
    build_shards(source, tmp_path / "set", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_tensorflow_is_never_imported(source, tmp_path):
    root = write_nuscenes(tmp_path / "nu", frames=2)
    code = f"""
        import sys
        from pathlib import Path
        from data_pipelines.nuscenes.source import read_nuscenes
        from data_pipelines.build import build_shards
        from data_pipelines.loader import LoaderConfig, make_loader
        shards = build_shards(read_nuscenes(Path({str(root)!r})), Path({str(tmp_path / "out")!r}))
        batch = next(iter(make_loader(shards, "train", LoaderConfig(2, (28, 56)))))
        assert batch["image"].shape == (2, 28, 56, 3)
        assert "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_an_existing_folder_is_not_overwritten(source, built):
    before = hashes(built)
    with pytest.raises(UserError, match="already exists"):
        build_shards(source, built, progress=False)
    assert hashes(built) == before


def test_a_source_without_samples_is_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"no samples \(val\)"):
        build_shards(replace(source, samples={**source.samples, "val": ()}), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_bad_picture_leaves_no_data_set_and_the_next_build_is_clean(source, built, tmp_path):
    def load(ref):
        if ref.token == "b3":
            raise UserError("b3 cannot be decoded.")
        return source.load(ref)

    with pytest.raises(UserError, match="b3"):
        build_shards(replace(source, load=load), tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()
    build_shards(source, tmp_path / "set", progress=False, records_per_shard=8)
    assert hashes(tmp_path / "set") == hashes(built)


def test_a_killed_build_is_never_taken_for_whole_and_starts_again(source, built, tmp_path):
    root = write_nuscenes(tmp_path / "nu")
    code = f"""
        import sys, time
        from dataclasses import replace
        from pathlib import Path
        from data_pipelines.nuscenes.source import read_nuscenes
        from data_pipelines.build import build_shards
        source = read_nuscenes(Path({str(root)!r}))
        def slow(ref):
            if ref.token == "b0":
                print("at b0", flush=True)
                time.sleep(60)
            return source.load(ref)
        build_shards(replace(source, load=slow), Path({str(tmp_path / "set")!r}), progress=False,
                     records_per_shard=8)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "at b0\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=10)
    assert (tmp_path / "set.building").is_dir()
    with pytest.raises(UserError):
        open_shards(tmp_path / "set")
    with pytest.raises(UserError):
        open_shards(tmp_path / "set.building" / "driving_shards" / "1.0.0")
    build_shards(source, tmp_path / "set", progress=False, records_per_shard=8)
    assert hashes(tmp_path / "set") == hashes(built)
    assert not (tmp_path / "set.building").exists()


def test_too_little_space_is_seen_before_writing(source, tmp_path):
    with pytest.raises(UserError, match="disk is full"):
        build_shards(replace(source, size=10**18), tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()


def test_a_disk_that_fills_while_writing_is_a_sentence(source, tmp_path):
    def load(ref):
        if ref.token == "a5":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return source.load(ref)

    with pytest.raises(UserError, match=r"disk is full while writing .*set"):
        build_shards(replace(source, load=load), tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()


def test_a_shard_that_was_not_written_out_is_noticed(source, tmp_path, monkeypatch):
    """A device that loses bytes without an error must not give a data set."""
    from array_record.python import array_record_module

    def write(self, record):
        del self, record

    monkeypatch.setattr(array_record_module.ArrayRecordWriter, "write", write)
    with pytest.raises(UserError):
        build_shards(source, tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()


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
