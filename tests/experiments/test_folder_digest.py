"""What tells the content of folders apart."""

import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments.folder_digest import checkpoint_folder_digest, folder_digest
from experiments.robot_policies import file_name

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "assets" / "own" / "robot").mkdir(parents=True)
    (folder / "params" / "d").mkdir(parents=True)
    files = "config.json", "tokenizer.json", "assets/own/robot/norm_stats.json", "params/d/0"
    for file in (*files, "action_head--50_checkpoint.pt"):
        (folder / file).write_text(f"{file} 1")
    write_weights(folder)
    return folder


def write_weights(folder, changed=0.0):
    values = np.arange(6.0, dtype=np.float32)
    values[3] += changed
    save_file({"one": values}, folder / "model.safetensors")


def test_a_checkpoint_is_what_it_holds_wherever_it_is(folder, tmp_path):
    before = checkpoint_folder_digest(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (1, 1))
    (copy / "training.log").write_text("step 1")
    (copy / ".cache").mkdir()
    assert checkpoint_folder_digest(copy) == before
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + b"2")
        assert checkpoint_folder_digest(folder) != before, path
        path.write_bytes(kept)
    assert checkpoint_folder_digest(folder) == before
    (folder / "dataset_statistics.json").write_text("{}")
    assert checkpoint_folder_digest(folder) != before


@pytest.mark.parametrize("policy", ["openvla", "pi0"])
def test_new_weights_in_an_old_folder_have_a_name_of_their_own(folder, policy):
    info = (folder / "model.safetensors").stat()
    before = file_name(policy, folder)
    write_weights(folder, changed=0.5)
    os.utime(folder / "model.safetensors", ns=(info.st_atime_ns, info.st_mtime_ns))
    assert (folder / "model.safetensors").stat().st_size == info.st_size
    assert file_name(policy, folder) != before
    write_weights(folder)
    assert file_name(policy, folder) == before


def test_of_large_files_a_part_is_read(folder):
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(100 * MIB + 5)  # without taking that much of the disk
    found = {checkpoint_folder_digest(folder)}
    for start, count in ((0, 1), (100 * MIB + 4, 1), (50 * MIB + 7, MIB)):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"\1" * count)
        found.add(checkpoint_folder_digest(folder))
    assert len(found) == 4


def test_pictures_in_linked_folders_count(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "labels").symlink_to(tmp_path / "disk")
    found = {folder_digest(tmp_path / "set")}
    for text in ("a", "bb"):
        (tmp_path / "disk" / "0.png").write_text(text)
        found.add(folder_digest(tmp_path / "set"))
    assert len(found) == 3
