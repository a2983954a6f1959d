"""Encoders whose hidden units were filled up."""

import jax
import numpy as np

from fastdrive_jax.models.qwen2_5_vl.alignment import align_hidden, aligned_config
from fastdrive_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B, VisionConfig
from fastdrive_jax.models.qwen2_5_vl.vision import VisionEncoder

CONFIG = VisionConfig(
    depth=2,
    hidden_size=32,
    intermediate_size=44,
    num_heads=2,
    out_hidden_size=24,
    fullatt_block_indexes=(1,),
)


def test_tokens_stay_the_same():
    images = np.random.default_rng(0).integers(0, 256, (2, 84, 140, 3), np.uint8)
    params = jax.jit(VisionEncoder(CONFIG).init)(jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1, params)  # biases are drawn as zeros
    want = jax.jit(VisionEncoder(CONFIG).apply)({"params": params}, images)
    wide = aligned_config(CONFIG, 16)
    assert wide.intermediate_size == 48
    got = jax.jit(VisionEncoder(wide).apply)({"params": align_hidden(params, CONFIG, 16)}, images)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want).max() > 1


def test_published_sizes():
    assert QWEN2_5_VL_3B.vision.intermediate_size == 3420
    assert aligned_config(QWEN2_5_VL_3B.vision).intermediate_size == 3456


def test_nothing_is_done_where_sizes_fit():
    params = {"mlp": {"gate_proj": {"kernel": np.ones((2, 44))}}}
    assert align_hidden(params, CONFIG, 4) is params
