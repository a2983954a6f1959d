import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fastdrive_jax.errors import UserError
from fastdrive_jax.export.driving import write_policy
from fastdrive_jax.export.pruner import read_pruner
from fastdrive_jax.export.quantized import (
    QuantizedPolicy,
    quantize_params,
    quantized_plan,
    quantized_scores,
    read_quantized,
    write_quantized,
)
from fastdrive_jax.export.trees import unflatten
from fastdrive_jax.inference.policy import DrivingPolicy, plan
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import make_pruner
from fastdrive_jax.pruning.recon_pruner import ReconPruner

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("qwix") is None, reason="qwix is not installed (extra: export)"
)


@pytest.fixture(scope="module")
def quantized(one_camera, small_pruner):
    pruner = make_pruner("reconpruner", config=small_pruner)
    return QuantizedPolicy(DrivingPolicy(DrivingVLA(one_camera[0]), pruner, 0.4), small_pruner)


@pytest.fixture(scope="module")
def folder(quantized, one_camera, tmp_path_factory):
    return write_quantized(tmp_path_factory.mktemp("q") / "int8", quantized, one_camera[1])


def inputs(config, batch=2):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, 1, *config.image_size, 3), np.uint8)
    return images, np.array([2.0, 9.0], np.float32), np.array([0, 1], np.int32)


def test_kernels_of_linear_layers_are_stored_in_eight_bits(quantized, one_camera):
    tensors = jax.device_get(quantize_params(quantized, one_camera[1]))
    flat = flatten_dict(one_camera[1], sep="/")
    rounded = {name.removesuffix("/qvalue") for name in tensors if name.endswith("/qvalue")}
    linear = {name for name, leaf in flat.items() if name.endswith("/kernel") and leaf.ndim == 2}
    assert rounded == linear - {"vla/visual/patch_embed/kernel"}
    assert len(rounded) > 10
    for name in rounded:
        kernel, value, scale = flat[name], tensors[f"{name}/qvalue"], tensors[f"{name}/scale"]
        assert value.dtype == jnp.int8
        assert scale.shape == (1, kernel.shape[1])
        np.testing.assert_allclose(value * scale, kernel, atol=0.51 * float(scale.max()))
    for name in flat.keys() - rounded:
        np.testing.assert_array_equal(tensors[name], flat[name])


def test_both_forms_hold_what_was_rounded(folder, one_camera, quantized):
    want = quantize_params(quantized, one_camera[1])
    for form in ("safetensors", "orbax"):
        again, have = read_quantized(folder, form)
        assert again.policy.model.config == one_camera[0]
        assert again.policy.keep_ratio == 0.4
        assert want.keys() == have.keys()
        for name, value in want.items():
            np.testing.assert_array_equal(have[name], value)
            assert have[name].dtype == value.dtype


def test_it_plans_what_the_training_code_plans_with_rounded_kernels(folder, one_camera, quantized):
    again, tensors = read_quantized(folder)
    have = jax.jit(quantized_plan(again))(tensors, *inputs(one_camera[0]))
    flat = flatten_dict(one_camera[1], sep="/")
    for name in flat:
        if f"{name}/qvalue" in tensors:
            flat[name] = tensors[f"{name}/qvalue"] * tensors[f"{name}/scale"]
    run = jax.jit(plan, static_argnums=0)
    want = run(quantized.policy, unflatten(flat), *inputs(one_camera[0]))
    np.testing.assert_array_equal(have.keep_indices, want.keep_indices)
    np.testing.assert_allclose(have.waypoints, want.waypoints, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_products_of_eight_bits_are_in_the_program(quantized, one_camera, kind):
    config, params = one_camera
    eight = QuantizedPolicy(quantized.policy, quantized.pruner, kind, kind)
    tensors = jax.eval_shape(partial(quantize_params, eight), params)
    lowered = jax.jit(quantized_plan(eight)).lower(tensors, *inputs(config)).as_text()
    name = {"int8": "i8", "float8_e4m3fn": "f8E4M3FN"}[kind]
    assert len(re.findall(rf"dot_general.*x{name}>, tensor<\S*x{name}>", lowered)) > 10


def test_scores_are_near_those_of_float32(quantized, one_camera, small_pruner):
    params = one_camera[1]
    tokens = np.random.default_rng(0).normal(size=(2, 30, 32)).astype(np.float32)
    want = jax.jit(ReconPruner(small_pruner).apply)({"params": params["pruner"]}, tokens)
    tensors = quantize_params(quantized, params)
    have = jax.jit(quantized_scores(quantized))(tensors, tokens)
    have, want = np.asarray(have), np.asarray(want)
    difference = np.abs(have - want).max()
    assert 0 < difference < 0.05 * np.abs(want).max()


def test_eight_bit_numbers_of_two_kinds_are_refused(folder):
    with pytest.raises(UserError, match="activations=float8_e4m3fn must be the type"):
        read_quantized(folder, activations="float8_e4m3fn")
    assert read_quantized(folder, activations="int8")[0].activations == "int8"


def test_fp8_weights_are_not_written_since_they_could_not_be_read(quantized, one_camera, tmp_path):
    eight = QuantizedPolicy(quantized.policy, quantized.pruner, "float8_e4m3fn")
    with pytest.raises(UserError, match="cannot be kept in a bundle"):
        write_quantized(tmp_path / "fp8", eight, one_camera[1])
    assert not list(tmp_path.iterdir())


def test_damaged_and_other_bundles_are_refused(folder, one_camera, small_pruner, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    try:
        (folder / "model.safetensors").write_bytes(whole[:-8])
        with pytest.raises(UserError, match="truncated"):
            read_quantized(folder)
    finally:
        (folder / "model.safetensors").write_bytes(whole)
    config, params = one_camera
    other = write_policy(tmp_path / "policy", params, config, small_pruner, 0.4)
    with pytest.raises(UserError, match="'driving policy', not a quantized driving policy"):
        read_quantized(other)
    with pytest.raises(UserError, match=r"'quantized driving policy', .*rounded to int8"):
        read_pruner(folder)  # whose kernels are there under other names
