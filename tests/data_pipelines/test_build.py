"""Shards are built, killed, gone on with, and refused."""

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
from nuscenes_fixture import write_image, write_nuscenes

from data_pipelines.beam import beam_runner
from data_pipelines.build import build_shards, write_shard
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.pictures import mask_png
from data_pipelines.shards import open_shards, record_source
from fastdrive_jax.errors import UserError


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def records_of(folder: Path) -> dict[str, str]:
    """Hashes of the shards alone: the manifest has the name of the source's folder."""
    return {name: sha for name, sha in hashes(folder).items() if "array_record" in name}


def test_the_same_source_gives_the_same_bytes(source, built, tmp_path):
    build_shards(source, tmp_path / "set", progress=False, records_per_shard=8)
    assert hashes(tmp_path / "set") == hashes(built)


def test_digest_follows_the_records(source, built, tmp_path):
    changed = replace(source, samples={**source.samples, "val": source.samples["val"][1:]})
    other = build_shards(changed, tmp_path / "set", progress=False, records_per_shard=8)
    assert other.digest != open_shards(built).digest


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


def slow_build(root: Path, out: Path, token: str) -> subprocess.Popen:
    """A build in another process that waits for ever at a sample."""
    code = f"""
        import time
        from dataclasses import replace
        from pathlib import Path
        from data_pipelines.nuscenes.source import read_nuscenes
        from data_pipelines.build import build_shards
        source = read_nuscenes(Path({str(root)!r}))
        def slow(ref):
            if ref.token == {token!r}:
                print("there", flush=True)
                time.sleep(60)
            return source.load(ref)
        build_shards(replace(source, load=slow), Path({str(out)!r}), progress=False,
                     records_per_shard=8)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "there\n"
    return child


def test_a_killed_build_goes_on_from_its_finished_shards(built, tmp_path):
    root = write_nuscenes(tmp_path / "nu")
    child = slow_build(root, tmp_path / "set", "b0")
    source = read_nuscenes(root)
    with pytest.raises(UserError, match="another process"):
        build_shards(source, tmp_path / "set", progress=False, records_per_shard=8)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=10)
    for folder in (tmp_path / "set", tmp_path / "set.building"):
        with pytest.raises(UserError):
            open_shards(folder)
    finished = sorted((tmp_path / "set.building").glob("driving*"))
    assert len(finished) == 3  # all of train
    times = [path.stat().st_mtime_ns for path in finished]
    loaded = []

    def load(ref):
        loaded.append(ref.token)
        return source.load(ref)

    build_shards(replace(source, load=load), tmp_path / "set", progress=False, records_per_shard=8)
    assert loaded == [f"b{k}" for k in range(9)]
    assert [(tmp_path / "set" / p.name).stat().st_mtime_ns for p in finished] == times
    assert records_of(tmp_path / "set") == records_of(built)
    assert not (tmp_path / "set.building").exists()


def test_shards_of_changed_masks_are_made_again(source, built, tmp_path):
    root = write_nuscenes(tmp_path / "nu")
    child = slow_build(root, tmp_path / "set", "b8")
    os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=10)
    mask = root / "masks" / "CAM_FRONT" / "a0-CAM_FRONT.png"
    write_image(mask, np.zeros((56, 84), np.uint8))
    shards = build_shards(
        read_nuscenes(root), tmp_path / "set", progress=False, records_per_shard=8
    )
    assert record_source(shards, "train")[0]["mask"] == mask_png(mask.read_bytes(), mask, (56, 84))
    old, new = records_of(built), records_of(shards.path)
    assert [name for name in old if old[name] != new[name]] == [min(old)]


@pytest.mark.parametrize("how", ["processes", "beam", "beam processes"])
def test_whoever_runs_the_jobs_the_bytes_are_the_same(source, built, tmp_path, how):
    if how == "processes":
        options = {"workers": 2}
    else:
        pytest.importorskip("apache_beam", reason="needs the extra beam")
        flags = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
        options = {"run": beam_runner(flags if how == "beam processes" else [])}
    build_shards(source, tmp_path / "set", progress=False, records_per_shard=8, **options)
    assert hashes(tmp_path / "set") == hashes(built)


def test_a_runner_that_beam_does_not_have_is_one_sentence(source, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    with pytest.raises(UserError, match=r"runner: Flonk.*Correct the options of Beam"):
        build_shards(source, tmp_path / "set", progress=False, run=beam_runner(["--runner=Flonk"]))


def test_duplicates_are_dropped_and_counted_and_validation_keeps_its_own(tmp_path):
    root = write_nuscenes(tmp_path / "nu")
    for camera in ("CAM_FRONT", "CAM_BACK"):
        folder = root / "samples" / camera
        for copy, of in (("a1", "b2"), ("a5", "a4"), ("b7", "b6")):
            shutil.copy(folder / f"{of}-{camera}.jpg", folder / f"{copy}-{camera}.jpg")
    shards = build_shards(read_nuscenes(root), tmp_path / "set", progress=False)
    assert shards.samples == {"train": 7, "val": 8}
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["duplicates"] == {"train": 2, "val": 1}
    tokens = [record["sample_token"].decode() for record in record_source(shards, "train")]
    assert tokens[::2] == ["a0", "a2", "a3", "a4", "a6", "a7", "a8"]


def test_bad_samples_are_left_out_if_that_is_asked_for(tmp_path, capfd):
    root = write_nuscenes(tmp_path / "nu")
    cut = root / "samples" / "CAM_FRONT" / "a3-CAM_FRONT.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    small = root / "masks" / "CAM_BACK" / "b5-CAM_BACK.png"
    write_image(small, np.zeros((28, 28), np.uint8))
    source = read_nuscenes(root)
    for limit in (0, 1):
        with pytest.raises(UserError, match=r"a3-CAM_FRONT|28 x 28.*56 x 84|skip_bad=1"):
            build_shards(source, tmp_path / "set", progress=False, skip_bad=limit)
    shards = build_shards(source, tmp_path / "set", progress=False, skip_bad=2)
    assert shards.samples == {"train": 8, "val": 8}
    said = capfd.readouterr().err
    assert "a3-CAM_FRONT.jpg" in said
    assert "b5-CAM_BACK.png" in said
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert len(manifest["skipped"]) == 2


@pytest.mark.parametrize("kind", ["samples", "masks", "labels"])
def test_missing_files_count_as_damaged_ones(tmp_path, capfd, kind):
    root = write_nuscenes(tmp_path / "nu")
    gone = root / kind / "CAM_FRONT" / f"a3-CAM_FRONT.{'jpg' if kind == 'samples' else 'png'}"
    gone.unlink()
    cut = root / "samples" / "CAM_FRONT" / "b5-CAM_FRONT.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    source = read_nuscenes(root, skip_bad=1)
    for limit, said in ((0, rf"{kind}/CAM_FRONT/{gone.name} is missing"), (1, "skip_bad=1")):
        with pytest.raises(UserError, match=said):
            build_shards(source, tmp_path / "set", progress=False, skip_bad=limit)
    shards = build_shards(source, tmp_path / "set", progress=False, skip_bad=2)
    assert shards.samples == {"train": 8, "val": 8}
    assert str(gone) in capfd.readouterr().err
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert len(manifest["skipped"]) == 2
    assert manifest["duplicates"] == {"train": 0, "val": 0}


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


def stopped_after(count):
    """Runs that many jobs, then gives up."""

    def run(jobs, folder):
        for job in jobs[:count]:
            yield write_shard(job, folder)
        raise KeyboardInterrupt

    return run


def counted(done):
    """Runs all jobs and notes their names."""

    def run(jobs, folder):
        for job in jobs:
            done.append(job.name)
            yield write_shard(job, folder)

    return run


def test_a_build_does_not_go_on_with_masks_of_other_classes(source, tmp_path):
    """The pictures and label maps are the same files; what counts as foreground is not."""
    options, done = {"progress": False, "records_per_shard": 8}, []
    with pytest.raises(KeyboardInterrupt):
        build_shards(source, tmp_path / "set", run=stopped_after(2), **options)
    classes = replace(source.classes, foreground=(2,))
    other = replace(source, classes=classes)
    build_shards(other, tmp_path / "set", run=counted(done), **options)
    assert len(done) == 6


@pytest.mark.parametrize("content", ["", "[]", '{"name": "a", "of_another_version": 1}'])
def test_a_shard_whose_note_says_nothing_is_written_again(source, tmp_path, content):
    options, done = {"progress": False, "records_per_shard": 8}, []
    with pytest.raises(KeyboardInterrupt):
        build_shards(source, tmp_path / "set", run=stopped_after(2), **options)
    note = min((tmp_path / "set.building" / "notes").iterdir())
    note.write_text(content)
    build_shards(source, tmp_path / "set", run=counted(done), **options)
    assert done[0] == note.stem
    assert len(done) == 5


def test_a_build_goes_on_with_a_root_that_was_moved(tmp_path):
    options, done = {"progress": False, "records_per_shard": 8}, []
    root = write_nuscenes(tmp_path / "nu")
    with pytest.raises(KeyboardInterrupt):
        build_shards(read_nuscenes(root), tmp_path / "set", run=stopped_after(2), **options)
    moved = read_nuscenes(root.rename(tmp_path / "moved"))
    build_shards(moved, tmp_path / "set", run=counted(done), **options)
    assert len(done) == 4


def test_too_many_bad_samples_stay_too_many(tmp_path, capfd):
    root = write_nuscenes(tmp_path / "nu")
    pictures = sorted((root / "samples" / "CAM_FRONT").iterdir())
    for path in pictures[:3]:
        path.write_bytes(b"no picture")
    source = read_nuscenes(root)
    for _ in range(5):  # each run writes one shard more before it sees
        with pytest.raises(UserError, match="3 samples are bad, more than skip_bad=2"):
            build_shards(source, tmp_path / "s", progress=False, records_per_shard=2, skip_bad=2)
    assert str(pictures[0]) in capfd.readouterr().err


def test_links_are_followed_and_what_cannot_be_named_is_refused_first(
    source, tmp_path, monkeypatch
):
    (tmp_path / "disk" / "place").mkdir(parents=True)
    (tmp_path / "set").symlink_to(tmp_path / "disk" / "place")
    build_shards(source, tmp_path / "set", progress=False)
    assert open_shards(tmp_path / "disk" / "place").samples == {"train": 9, "val": 9}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["place"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the working folder; name a folder in it"):
        build_shards(source, Path(), progress=False)


def test_what_could_not_be_renamed_is_gone_on_with(source, tmp_path, monkeypatch):
    out, done = tmp_path / "set", []

    def rename(self, target):
        if Path(target).name == "set":
            raise OSError("no")
        return moves(self, target)

    moves = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(UserError, match="Cannot write"):
            build_shards(source, out, progress=False, run=counted(done))
    build_shards(source, out, progress=False, run=counted(done))
    assert len(done) == len(set(done)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("name", ["my val", "val.2", "train/val", "val[0]"])
def test_a_name_that_tfds_does_not_take_is_refused_first(source, tmp_path, name):
    odd = replace(source, samples={"train": source.samples["train"], name: source.samples["val"]})
    with pytest.raises(UserError, match="is no name that TFDS takes"):
        build_shards(odd, tmp_path / "set", progress=False)
    assert not (tmp_path / "set.building").exists()


SLOW = """
    import os, sys, time
    from pathlib import Path
    from data_pipelines.worker_process import run_jobs

    def slow(job, folder):
        print(os.getpid(), flush=True)
        time.sleep(60)

    if __name__ == "__main__":
        print(list(run_jobs([1, 2], slow, Path(sys.argv[1]), 2)))
"""


def test_workers_end_with_a_killed_build(tmp_path):
    """Else they would go on writing where the next run builds."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(SLOW))
    words = [sys.executable, program, tmp_path]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
