import json

import jax
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import write_bundle
from fastdrive_jax.export.driving import read_policy, write_policy
from fastdrive_jax.inference.policy import DrivingPolicy, plan
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import make_pruner


@pytest.fixture(scope="module")
def bundle(one_camera, small_pruner, tmp_path_factory):
    config, params = one_camera
    folder = tmp_path_factory.mktemp("policy") / "bundle"
    return write_policy(folder, params, config, small_pruner, 0.4)


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_a_reloaded_policy_plans_the_same_bits(bundle, one_camera, small_pruner, form):
    config, params = one_camera
    policy, reloaded = read_policy(bundle, form)
    assert policy.model.config == config
    assert policy.keep_ratio == 0.4
    jax.tree.map(np.testing.assert_array_equal, params, reloaded)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 1, *config.image_size, 3), np.uint8)
    inputs = images, np.array([2.0, 9.0], np.float32), np.array([0, 1], np.int32)
    memory = DrivingPolicy(DrivingVLA(config), make_pruner("reconpruner", config=small_pruner), 0.4)
    run = jax.jit(plan, static_argnums=0)
    want, have = run(memory, params, *inputs), run(policy, reloaded, *inputs)
    assert have.keep_indices.shape == (2, 4)
    np.testing.assert_array_equal(want.keep_indices, have.keep_indices)
    np.testing.assert_array_equal(want.waypoints, have.waypoints)


def test_only_vla_and_pruner_are_written(one_camera, small_pruner, tmp_path):
    config, params = one_camera
    folder = write_policy(
        tmp_path / "bundle",
        params | {"decoder": {"w": np.ones(3, np.float32)}},
        config,
        small_pruner,
        1.0,
    )
    tensors = json.loads((folder / "config.json").read_text())["tensors"]
    assert {name.split("/")[0] for name in tensors} == {"vla", "pruner"}


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_a_bundle_of_another_kind_is_refused(tmp_path, form):
    params = {"encoder": {"w": np.ones(2, np.float32)}}
    folder = write_bundle(tmp_path / "other", params, {"kind": "encoder"})
    with pytest.raises(UserError, match="'encoder', not a driving policy"):
        read_policy(folder, form)


@pytest.mark.parametrize("ratio", [0, 1.2, -0.5])
def test_a_ratio_out_of_range_writes_nothing(one_camera, small_pruner, tmp_path, ratio):
    config, params = one_camera
    with pytest.raises(UserError, match="keep_ratio"):
        write_policy(tmp_path / "bundle", params, config, small_pruner, ratio)
    assert not list(tmp_path.iterdir())


def test_a_missing_bundle_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_policy(tmp_path / "none")
