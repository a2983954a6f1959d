import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import SafetensorError
from safetensors import flax as safetensors_flax

from fastdrive_jax.errors import UserError
from fastdrive_jax.export import bundle, manifest
from fastdrive_jax.export.bundle import (
    read_bundle_orbax,
    read_bundle_safetensors,
    write_bundle,
)

CONFIG = {"model": "tiny", "keep_ratio": 0.5, "pruner": {"layers": 1, "sizes": [64, 128]}}
READERS = (read_bundle_safetensors, read_bundle_orbax)


def _params(seed=0):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    return {
        "pruner": {
            "layer": {"query": {"kernel": jax.random.normal(a, (8, 16))}},
            "scorer": {"kernel": jax.random.normal(b, (16, 1), jnp.bfloat16)},
        },
        "vla": {
            "embed": jax.random.normal(c, (5, 8), jnp.float16),
            "ids": jnp.arange(6, dtype=jnp.int32),
            "flag": jnp.array([True, False]),
            "step": jnp.float32(0.1),
            "codes": np.arange(4, dtype=np.uint8),
        },
    }


def _assert_bit_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundle") / "model", _params(), CONFIG)


@pytest.fixture
def copy(whole, tmp_path):
    target = tmp_path / "model"
    subprocess.run(["cp", "-r", whole, target], check=True)
    return target


@pytest.mark.parametrize("read", READERS)
def test_both_forms_come_back_bit_equal(whole, read):
    params, config = read(whole)
    _assert_bit_equal(params, _params())
    assert config == CONFIG


def test_special_floats_keep_their_bits(tmp_path):
    bits = np.array([0x7FC1, 0xFF80, 0x8000, 0x0001], np.uint16)  # NaN payload, -inf, -0, denormal
    tree = {"m": {"x": jnp.asarray(bits.view(jnp.bfloat16.dtype))}}
    folder = write_bundle(tmp_path / "b", tree, {})
    for read in READERS:
        found = np.asarray(read(folder)[0]["m"]["x"])
        np.testing.assert_array_equal(found.view(np.uint16), bits)


def test_outputs_of_both_are_bit_equal(whole):
    def apply(params, x):
        hidden = jnp.tanh(x @ params["pruner"]["layer"]["query"]["kernel"])
        return hidden @ params["pruner"]["scorer"]["kernel"].astype(jnp.float32)

    x = jax.random.normal(jax.random.key(9), (3, 8))
    outputs = [jax.jit(apply)(tree, x) for tree in (_params(), *(r(whole)[0] for r in READERS))]
    assert len({np.asarray(out).tobytes() for out in outputs}) == 1


def test_safetensors_has_flat_names_that_other_tools_read(whole):
    flat = safetensors_flax.load_file(whole / "model.safetensors")
    assert "pruner/layer/query/kernel" in flat
    assert flat["pruner/scorer/kernel"].dtype == jnp.bfloat16
    content = json.loads((whole / "config.json").read_text())
    assert content["config"] == CONFIG
    data = (whole / "model.safetensors").read_bytes()
    assert content["files"]["model.safetensors"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert set(content["files"]) == {
        path.relative_to(whole).as_posix()
        for path in whole.rglob("*")
        if path.is_file() and path.name != "config.json"
    }


def test_orbax_goes_where_it_is_told(whole):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params, _ = read_bundle_orbax(whole, everywhere)
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {everywhere}
    _assert_bit_equal(params, _params())


def test_a_bundle_of_one_mesh_is_read_on_another(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from fastdrive_jax.export.bundle import *
        devices = np.array(jax.devices())
        assert devices.size == 8
        wide = NamedSharding(Mesh(devices, ("x",)), P("x"))
        tree = {"m": {"w": jax.device_put(jnp.arange(64.0).reshape(16, 4), wide)}}
        folder = write_bundle(sys.argv[1], tree, {})
        square = Mesh(devices.reshape(4, 2), ("a", "b"))
        place = lambda name, shape: NamedSharding(square, P("a", "b"))
        found = read_bundle_orbax(folder, place)[0]["m"]["w"]
        assert found.sharding.shard_shape(found.shape) == (4, 2), found.sharding
        assert (np.asarray(found) == np.arange(64.0).reshape(16, 4)).all()
        narrow = read_bundle_orbax(sys.argv[2], place)[0]["m"]["w"]  # of one device
        assert narrow.sharding.shard_shape(narrow.shape) == (4, 2), narrow.sharding
        assert (np.asarray(narrow) == np.arange(64.0).reshape(16, 4)).all()
        """
    )
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    narrow = write_bundle(tmp_path / "n", {"m": {"w": jnp.arange(64.0).reshape(16, 4)}}, {})
    command = [sys.executable, "-c", script, str(tmp_path / "m"), str(narrow)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read_bundle_orbax(tmp_path / "m")[0]["m"]["w"]  # and here, on fewer devices
    np.testing.assert_array_equal(found, np.arange(64.0).reshape(16, 4))


def test_every_file_is_guarded(whole, tmp_path):
    names = json.loads((whole / "config.json").read_text())["files"]
    assert len(names) > 4
    for i, name in enumerate(names):
        target = tmp_path / str(i)
        subprocess.run(["cp", "-r", whole, target], check=True)
        read = read_bundle_orbax if name.startswith("orbax/") else read_bundle_safetensors
        data = (target / name).read_bytes()
        if data:
            (target / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            with pytest.raises(UserError, match="does not match its SHA-256"):
                read(target)
            (target / name).write_bytes(data[:-1])
            with pytest.raises(UserError, match="truncated"):
                read(target)
        (target / name).unlink()
        with pytest.raises(UserError, match="lacks") as caught:
            read(target)
        assert name in str(caught.value)


def _edit(folder, change):
    """Change config.json as someone would who knows how it is signed."""
    content = json.loads((folder / "config.json").read_text())
    content.pop("sha256")
    change(content)
    content["sha256"] = manifest._own_sum(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("read", READERS)
def test_bad_configs_are_refused(copy, read):
    path = copy / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"keep_ratio": 0.5', '"keep_ratio": 0.25'))
    with pytest.raises(UserError, match="was changed"):
        read(copy)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="not whole JSON"):
        read(copy)
    path.write_text("[]")
    with pytest.raises(UserError, match="not the config"):
        read(copy)
    path.write_text(text)
    _edit(copy, lambda content: content.update(version=2))
    with pytest.raises(UserError, match="version 2"):
        read(copy)
    path.write_text(text)
    _edit(copy, lambda content: content.pop("files"))
    with pytest.raises(UserError, match="lacks 'files'"):
        read(copy)
    path.unlink()
    with pytest.raises(UserError, match="no bundle"):
        read(copy)
    with pytest.raises(UserError, match="no such folder"):
        read(copy / "none")


@pytest.mark.parametrize("read", READERS)
def test_tensors_of_another_model_are_refused(copy, read):
    _edit(copy, lambda content: content["tensors"].pop("vla/ids"))
    with pytest.raises(UserError, match="tensors its config lists"):
        read(copy)


@pytest.mark.parametrize("read", READERS)
def test_another_shape_is_refused(copy, read):
    change = {"shape": [8, 8], "dtype": "float32"}
    _edit(copy, lambda content: content["tensors"].update({"pruner/layer/query/kernel": change}))
    with pytest.raises(UserError, match="tensors its config lists"):
        read(copy)


def test_an_earlier_bundle_is_replaced_and_nothing_else(tmp_path):
    folder = write_bundle(tmp_path / "m", _params(0), CONFIG)
    write_bundle(folder, _params(1), {"seed": 1})
    params, config = read_bundle_safetensors(folder)
    _assert_bit_equal(params, _params(1))
    assert config == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]

    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="no bundle"):
        write_bundle(other, _params(), CONFIG)
    assert (other / "a.jpg").read_bytes() == b"x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no bundle"):
        write_bundle(tmp_path / "file", _params(), CONFIG)


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "m").mkdir()
    _assert_bit_equal(read_bundle_orbax(write_bundle(tmp_path / "m", _params(), {}))[0], _params())


@pytest.mark.parametrize("step", ["safetensors", "orbax", "config", "rename"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, step, earlier):
    folder = tmp_path / "m"
    if earlier:
        write_bundle(folder, _params(0), CONFIG)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def exhausted(*_, **__):
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "a/0"')

    def unserialized(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    if step == "orbax":
        monkeypatch.setattr(ocp.StandardCheckpointer, "save", exhausted)
    elif step == "safetensors":
        monkeypatch.setattr(bundle.safetensors_flax, "save_file", unserialized)
    elif step == "config":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        rename = Path.rename

        def fail_once(self, target):
            if ".part-" in self.name:
                full()
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(UserError, match=r"cannot write bundle.*(No space|RESOURCE_EXHAUSTED)"):
        write_bundle(folder, _params(1), {"seed": 1})
    monkeypatch.undo()
    if earlier:
        _assert_bit_equal(read_bundle_safetensors(folder)[0], _params(0))
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
    else:
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["_flush", "_swap"])
def test_a_killed_write_is_never_taken_for_a_bundle(tmp_path, step):
    folder = tmp_path / "m"
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        import jax.numpy as jnp
        from fastdrive_jax.export import bundle, folder
        folder.{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        bundle.write_bundle(sys.argv[1], {{"m": {{"w": jnp.ones(4)}}}}, {{}})
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not folder.exists()
    for read in READERS:
        with pytest.raises(UserError, match="no such folder"):
            read(folder)
    write_bundle(folder, _params(), CONFIG)
    _assert_bit_equal(read_bundle_orbax(folder)[0], _params())


def test_a_part_without_its_config_is_no_bundle(copy):
    part = copy.parent / ".model.part-x"
    copy.rename(part)
    (part / "config.json").unlink()
    with pytest.raises(UserError, match="is no bundle"):
        read_bundle_safetensors(part)


def test_too_little_space_is_said_before_writing(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="MiB are free"):
        write_bundle(tmp_path / "m", _params(), CONFIG)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("params", "config", "message"),
    [
        ({"m": {"w": np.zeros(3)}}, {}, "float64"),
        ({"m": {"w": np.zeros((0, 3), np.float32)}}, {}, "cannot keep"),
        ({"m": {}}, {}, "empty"),
        ({"m": {"a/b": jnp.ones(1)}}, {}, "without '/'"),
        ({"m": {"a": 3}}, {}, "not an array"),
        ({"m": jnp.ones(1)}, {"sizes": (1, 2)}, "come back equal"),
        ({"m": jnp.ones(1)}, {"x": float("nan")}, "stored as JSON"),
        ({"m": jnp.ones(1)}, {"x": jnp.float32}, "stored as JSON"),
    ],
)
def test_what_a_bundle_cannot_hold_is_refused(tmp_path, params, config, message):
    with pytest.raises(ValueError, match=message):
        write_bundle(tmp_path / "m", params, config)
    assert not list(tmp_path.iterdir())
