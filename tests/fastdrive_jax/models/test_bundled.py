import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.flax import load_file

from data_pipelines.schema import CAMERAS
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl import bundled
from fastdrive_jax.models.qwen2_5_vl.bundled import FRONT, load_vla, save_vla, saved_cameras
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig


def test_weights_come_back_as_their_bfloat16_values(one_camera, tmp_path):
    config, params = one_camera
    path = tmp_path / "vla.safetensors"
    save_vla(path, params["vla"])
    assert [p.name for p in tmp_path.iterdir()] == ["vla.safetensors"]
    assert all(value.dtype == jnp.bfloat16 for value in load_file(path).values())
    model, loaded = load_vla(path, config)
    assert model.config == config
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params["vla"])
    assert jax.tree.structure(rounded) == jax.tree.structure(loaded)
    jax.tree.map(np.testing.assert_array_equal, rounded, loaded)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded))
    save_vla(tmp_path / "again.safetensors", loaded)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_file_names_the_cameras_that_no_shape_tells(tmp_path):
    _, params = load_vla()
    path = tmp_path / "vla.safetensors"
    save_vla(path, params)
    assert saved_cameras(path) is None
    assert load_vla(path)[0].config.cameras == FRONT
    save_vla(path, params, CAMERAS)
    assert saved_cameras(path) == CAMERAS
    model, loaded = load_vla(path)
    assert model.config == DrivingConfig(cameras=CAMERAS)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    assert load_vla(path, DrivingConfig())[0].config.cameras == FRONT  # taken at its word


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text", {"num_layers": 2}),
        ("text", {"intermediate_size": 64}),
        ("vision", {"depth": 2}),
    ],
)
def test_weights_of_another_config_are_refused_by_name(one_camera, tmp_path, part, change):
    config, params = one_camera
    path = tmp_path / "vla.safetensors"
    save_vla(path, params["vla"])
    other = dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **change)}
    )
    with pytest.raises(UserError, match=r"of another config: .*(language_model|visual)/"):
        load_vla(path, other)


def test_a_missing_or_damaged_file_is_refused(one_camera, tmp_path):
    config, params = one_camera
    with pytest.raises(UserError, match=r"none\.safetensors"):
        load_vla(tmp_path / "none.safetensors", config)
    with pytest.raises(UserError, match=r"none\.safetensors"):
        load_vla(tmp_path / "none.safetensors")
    path = tmp_path / "vla.safetensors"
    save_vla(path, params["vla"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="can't be read"):
        load_vla(path, config)


def test_the_packaged_weights_have_the_default_config_and_at_most_8_mb():
    model, params = load_vla()
    assert model.config == DrivingConfig()
    leaves = jax.tree.leaves(params)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert 2 * sum(leaf.size for leaf in leaves) < 8e6


def test_a_failed_write_is_one_sentence_and_leaves_the_old_file(one_camera, tmp_path, monkeypatch):
    _, params = one_camera
    with pytest.raises(UserError, match=r"vla\.safetensors can't be written"):
        save_vla(tmp_path / "no_folder" / "vla.safetensors", params["vla"])
    path = tmp_path / "vla.safetensors"
    save_vla(path, params["vla"])
    before = path.read_bytes()

    def full_disk(tensors, place, metadata):
        place.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(bundled, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save_vla(path, params["vla"])
    assert [p.name for p in tmp_path.iterdir()] == ["vla.safetensors"]
    assert path.read_bytes() == before


def test_the_weights_that_learned_from_beside_the_lane_share_the_encoder():
    _, front = load_vla()
    assets = Path(bundled.__file__).parents[2] / "assets"
    _, other = load_vla(assets / "tiny_vla_recovery.safetensors")
    jax.tree.map(np.testing.assert_array_equal, front["visual"], other["visual"])
    assert not np.array_equal(*(jax.tree.leaves(p["language_model"])[0] for p in (front, other)))


def test_the_package_looks_through_one_camera_or_all_six():
    _, front = load_vla()
    model, around = load_vla(config=DrivingConfig(cameras=CAMERAS))
    assert model.config.visual_tokens == 6 * DrivingConfig().visual_tokens
    jax.tree.map(np.testing.assert_array_equal, front["visual"], around["visual"])
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), front["language_model"], around["language_model"]
    )
    assert min(jax.tree.leaves(moved)) > 0
    with pytest.raises(UserError, match="through CAM_FRONT, CAM_BACK; train one"):
        load_vla(config=DrivingConfig(cameras=("CAM_FRONT", "CAM_BACK")))
