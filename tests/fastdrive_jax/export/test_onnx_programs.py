import importlib.util
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.export.onnx_programs import (
    POLICY,
    PRUNER,
    policy_file,
    read_onnx,
    write_onnx,
)
from fastdrive_jax.export.pruner import write_pruner
from fastdrive_jax.inference.policy import DrivingPolicy, plan
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.models.trajectory_tokens import DrivingVocabulary
from fastdrive_jax.pruning import make_pruner
from fastdrive_jax.pruning.recon_pruner import ReconPruner

needs_converter = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax2onnx", "onnxruntime")),
    reason="jax2onnx and onnxruntime are not installed (docs/export.md)",
)


@pytest.fixture(scope="module")
def policy(one_camera, small_pruner):
    config, params = one_camera
    pruner = make_pruner("reconpruner", config=small_pruner)
    return DrivingPolicy(DrivingVLA(config), pruner, 0.4), params


@pytest.fixture(scope="module")
def folder(policy, small_pruner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "onnx"
    return write_onnx(folder, small_pruner, policy[1], 10, policy[0])


@needs_converter
def test_the_policy_plans_the_same(folder, policy):
    static, params = policy
    rng = np.random.default_rng(0)
    run = jax.jit(plan, static_argnums=0)
    onnx, seen = read_onnx(folder, POLICY), set()
    for number in range(5):
        images = rng.integers(0, 256, (1, 1, *static.model.config.image_size, 3), np.uint8)
        inputs = images, np.array([2.0 + number], np.float32), np.array([number % 3], np.int32)
        want, have = run(static, params, *inputs), onnx(*inputs)
        np.testing.assert_allclose(have[0], want.waypoints, atol=1e-5)
        np.testing.assert_array_equal(have[1], want.keep_indices)
        seen.add(have[1].tobytes())
    assert len(seen) > 1  # it looks at the picture


@needs_converter
def test_several_frames_a_call(policy, small_pruner, tmp_path):
    """With a plan of one waypoint: each of its tokens is converted by itself."""
    static, params = policy
    short = replace(static.model.config, vocabulary=DrivingVocabulary(steps=1))
    static = replace(static, model=DrivingVLA(short))
    write_onnx(tmp_path / "onnx", small_pruner, params, 10, static, batches=(3,))
    assert not (tmp_path / "onnx" / POLICY).exists()
    images = np.random.default_rng(1).integers(0, 256, (3, 1, *short.image_size, 3), np.uint8)
    inputs = images, np.array([2, 9, 0], np.float32), np.array([0, 2, 1], np.int32)
    have = read_onnx(tmp_path / "onnx", policy_file(3))(*inputs)
    want = jax.jit(plan, static_argnums=0)(static, params, *inputs)
    np.testing.assert_allclose(have[0], want.waypoints, atol=1e-5)
    np.testing.assert_array_equal(have[1], want.keep_indices)
    assert len(np.unique(have[0], axis=0)) > 1


@needs_converter
def test_the_pruner_scores_the_same(folder, policy, small_pruner):
    tokens = np.random.default_rng(0).normal(size=(1, 10, 32)).astype(np.float32)
    want = jax.jit(ReconPruner(small_pruner).apply)({"params": policy[1]["pruner"]}, tokens)
    (have,) = read_onnx(folder, PRUNER)(tokens)
    np.testing.assert_allclose(have, want, atol=1e-5)


@needs_converter
def test_damaged_and_other_folders_are_refused(folder, policy, small_pruner, tmp_path):
    whole = (folder / PRUNER).read_bytes()
    try:
        (folder / PRUNER).write_bytes(whole[:-1])
        with pytest.raises(UserError, match="truncated"):
            read_onnx(folder, PRUNER)
    finally:
        (folder / PRUNER).write_bytes(whole)
    other = write_pruner(tmp_path / "pruner", policy[1]["pruner"], small_pruner)
    with pytest.raises(UserError, match="'pruner', not onnx"):
        read_onnx(other, PRUNER)


def test_without_the_converter_it_says_what_to_do(policy, small_pruner, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match=r"needs jax2onnx.*docs/export\.md"):
        write_onnx(tmp_path / "o", small_pruner, policy[1], 10, policy[0])
    assert not list(tmp_path.iterdir())
