"""Layers of the published width, and half precision, against transformers."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B
from fastdrive_jax.models.qwen2_5_vl.hf_config import config_to_hf
from fastdrive_jax.models.qwen2_5_vl.image_processor import process_pictures
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.patches import normalise
from fastdrive_jax.models.qwen2_5_vl.sequence import Sample, collate
from fastdrive_jax.models.qwen2_5_vl.weights import params_from_tensors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="torch and transformers are not installed (extra: parity)",
)
# The published 3B, one layer deep on each side and with few words.
CONFIG = dataclasses.replace(
    QWEN2_5_VL_3B,
    vision=dataclasses.replace(QWEN2_5_VL_3B.vision, depth=2, fullatt_block_indexes=(1,)),
    text=dataclasses.replace(QWEN2_5_VL_3B.text, num_layers=1, vocab_size=256),
    image_token_id=250,
    vision_start_token_id=251,
    vision_end_token_id=252,
    eos_token_ids=(253,),
    pad_token_id=0,
)


@functools.cache
def case():
    """transformers' model in float32, its inputs, and our batch."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    hf = Qwen2_5_VLConfig(**config_to_hf(CONFIG), video_token_id=254)
    model = Qwen2_5_VLForConditionalGeneration(hf).eval()
    picture = np.random.default_rng(0).integers(0, 256, (168, 252, 3), np.uint8)
    rows, grids = process_pictures([picture])
    batch = collate([Sample([5, 251, 250, 252, 7, 8, 9], rows, grids)], CONFIG)
    inputs = {
        "input_ids": torch.from_numpy(batch.ids.astype(np.int64)),
        "pixel_values": torch.from_numpy(np.array(normalise(rows[0], CONFIG.vision))),
        "image_grid_thw": torch.tensor([[1, *grids[0]]]),
        "mm_token_type_ids": torch.from_numpy((batch.ids == 250).astype(np.int64)),
    }
    return model, inputs, batch


def their_logits(dtype: str) -> np.ndarray:
    import torch

    model, inputs, _ = case()
    kind = getattr(torch, dtype)
    inputs = inputs | {"pixel_values": inputs["pixel_values"].to(kind)}
    with torch.no_grad():
        out = model.to(kind)(**inputs).logits.float().numpy()
    model.to(torch.float32)
    return out


def our_logits(dtype: jnp.dtype) -> np.ndarray:
    model, _, batch = case()
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    params = params_from_tensors(tensors, CONFIG.vision, CONFIG.text)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    logits = jax.jit(QwenVL(CONFIG, dtype).apply)({"params": params}, batch)
    assert logits.dtype == dtype
    return np.asarray(logits, np.float32)


def test_layers_of_the_published_width_and_half_precision():
    expected = their_logits("float32")
    error = np.abs(our_logits(jnp.float32) - expected).max()
    print(f"float32: max abs error {error:.2e} of values up to {np.abs(expected).max():.2f}")
    assert error <= 1e-4
    # Half precision was rounded into transformers' weights last, so it comes after.
    ours = np.abs(our_logits(jnp.bfloat16) - expected)
    theirs = np.abs(their_logits("bfloat16") - expected)
    print(f"bfloat16 against float32: ours {ours.max():.2e}, theirs {theirs.max():.2e} at most")
    print(f"and {ours.mean():.2e}, {theirs.mean():.2e} in the mean")
    assert ours.mean() <= theirs.mean() * 1.05
    assert ours.max() <= theirs.max() * 1.25
