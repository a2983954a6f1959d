import collections
import os
import shutil
import subprocess
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import AHEAD

from experiments.bench_train import compilations
from fastdrive_jax.errors import UserError
from fastdrive_jax.parallel.mesh import make_mesh, replicated_sharding
from fastdrive_jax.training import checkpoints as module
from fastdrive_jax.training.checkpoints import RunCheckpoints
from fastdrive_jax.training.state import abstract_state

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def data():
    return iter(grain.MapDataset.range(1000).repeat().batch(4).to_iter_dataset(AHEAD))


def init(size=300):
    big = jax.random.normal(jax.random.key(0), (size, size))
    return {"big": big, "half": big[0].astype(jnp.bfloat16), "step": jnp.zeros((), jnp.int32)}


def filled(folder, last=3, keep=2):
    """Checkpoints at steps 1 to `last`, where step s holds `init() + s` and 2 s batches drawn."""
    batches, state = data(), init()
    with RunCheckpoints(folder, {"a": 1}, keep=keep) as checkpoints:
        for step in range(1, last + 1):
            state = jax.tree.map(lambda x: x + 1, state)
            next(batches), next(batches)
            checkpoints.save(step, state, batches)
    return state, batches


def restore(folder, abstract=None, **options):
    batches = data()
    abstract = abstract or abstract_state(init, HERE)
    with RunCheckpoints(folder, {"a": 1}) as checkpoints:
        return checkpoints.restore(abstract, batches, **options), batches


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_state_and_data_position_come_back(tmp_path):
    state, batches = filled(tmp_path)
    restored, again = restore(tmp_path)
    assert_same(state, restored)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [
        leaf.dtype for leaf in jax.tree.leaves(state)
    ]
    np.testing.assert_array_equal(next(again), next(batches))
    older, _ = restore(tmp_path, step=2)
    assert int(older["step"]) == 2


def test_what_all_devices_hold_is_written_once_and_compiles_nothing(tmp_path):
    """The devices write no parts, each cut off by a program; and the state may be donated."""
    place = replicated_sharding(make_mesh())
    kept = jax.device_get(init(16))
    state = jax.device_put(kept, place)
    with RunCheckpoints(tmp_path, {"a": 1}) as checkpoints:
        with compilations() as compiled:
            checkpoints.save(1, state, data())
        jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(state)
    assert not compiled
    restored, _ = restore(tmp_path, abstract_state(lambda: init(16), place))
    assert_same(kept, restored)
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {place}


def test_only_the_newest_are_kept(tmp_path):
    filled(tmp_path, last=5, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    """The writing goes on while donated buffers are overwritten and the iterator moves on."""
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state, batches = jax.jit(lambda: init(1500))(), data()
    expected = jax.tree.map(np.array, state)
    with RunCheckpoints(tmp_path, {"a": 1}) as checkpoints:
        checkpoints.save(1, state, batches)
        for _ in range(20):
            state = update(state)
            next(batches)
        jax.block_until_ready(state)
    restored, again = restore(tmp_path, abstract_state(lambda: init(1500), HERE))
    assert_same(expected, restored)
    assert next(again)[0] == 0


def test_remains_of_a_killed_save_are_ignored_and_removed(tmp_path):
    state, _ = filled(tmp_path)
    root = tmp_path / "checkpoints"
    for name in ("4.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-17"):
        shutil.copytree(root / "3", root / name)
        (root / name / "state/_METADATA").unlink()
    restored, _ = restore(tmp_path)
    assert_same(state, restored)
    deadline = time.monotonic() + 30  # Orbax removes them in a thread of its own
    while len(list(root.iterdir())) > 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(path.name for path in root.iterdir()) == ["2", "3"]


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, shorten, os.unlink], ids=["flip", "shorten", "unlink"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    filled(tmp_path)
    damage(largest_file(tmp_path / "checkpoints/3"))
    with pytest.raises(UserError, match=r"checkpoints/3 is damaged: state/"):
        restore(tmp_path)
    restore(tmp_path, step=2)


def test_a_checkpoint_without_checksums_is_not_whole(tmp_path):
    filled(tmp_path)
    (tmp_path / "checkpoints/3/checksums.json").unlink()
    with pytest.raises(UserError, match=r"checkpoints/3 is not a whole checkpoint"):
        restore(tmp_path)


def test_a_state_of_another_shape_or_structure_is_refused(tmp_path, capfd):
    filled(tmp_path)
    with pytest.raises(UserError, match=r"model: big is \(300, 300\) there and \(301, 301\) here"):
        restore(tmp_path, abstract_state(lambda: init(301), HERE))
    with pytest.raises(UserError, match=r"model: other is absent there and \(2,\) here\.$"):
        restore(tmp_path, abstract_state(lambda: init() | {"other": jnp.zeros(2)}, HERE))
    assert "Traceback" not in capfd.readouterr().err


def test_no_room_is_found_before_writing(tmp_path, monkeypatch, capfd):
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(100))
    with pytest.raises(UserError, match=r"has 0 MiB left and a checkpoint needs 0\.3"):
        filled(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.json"]
    assert "Traceback" not in capfd.readouterr().err


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoints import *
folder = Path(sys.argv[1])
filled(folder, last=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    filled(folder, last=2)
except UserError as error:
    print("refused:", error)
print(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
print(restore(folder)[0]["step"])
"""


def test_a_full_disk_is_said_and_the_checkpoint_before_stays(tmp_path):
    here = os.path.dirname(__file__)  # noqa: PTH120
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path, here], capture_output=True, text=True, check=True
    )
    refused, names, step = done.stdout.splitlines()
    assert refused.startswith("refused: No room on the disk for checkpoint 2 of")
    assert names == "['checkpoints', 'config.json']"
    assert step == "1"


def test_numbers_of_another_kind_are_refused(tmp_path):
    state, _ = filled(tmp_path)
    asked = abstract_state(lambda: init() | {"half": jnp.zeros(300, jnp.int32)}, HERE)
    with pytest.raises(UserError, match=r"half is \(300,\) there and \(300,\) of int32 here"):
        restore(tmp_path, asked)
    asked = abstract_state(lambda: init() | {"big": jnp.zeros((300, 300), jnp.bfloat16)}, HERE)
    other, _ = restore(tmp_path, asked)
    assert_same(other["big"], state["big"].astype(jnp.bfloat16))


def test_checksums_that_are_no_object_are_damage(tmp_path):
    filled(tmp_path)
    (tmp_path / "checkpoints/3/checksums.json").write_text("[]")
    with pytest.raises(UserError, match=r"is damaged: checksums\.json holds no object"):
        restore(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from fastdrive_jax.training.checkpoints import RunCheckpoints
with RunCheckpoints(Path(sys.argv[1]), {}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_processs_at_a_time(tmp_path):
    """The other one is killed, and the folder is free at once."""
    words = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"Another process trains in {tmp_path}"):
            RunCheckpoints(tmp_path, {})
        RunCheckpoints(tmp_path, {}, read_only=True).close()
        other.kill()
    RunCheckpoints(tmp_path, {}).close()
