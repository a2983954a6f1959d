import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import (
    QwenVLConfig,
    VisionConfig,
)
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, DrivingVLA
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.patches import layout_of, ordered_layout, patch_rows
from fastdrive_jax.models.qwen2_5_vl.vision_evidence import vision_evidence

# Three blocks, of which the second is the last to see the whole picture; the second of two windows
# is cut off, so that patches in window order are not in raster order.
VISION = VisionConfig(
    depth=3,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=32,
    fullatt_block_indexes=(0, 1),
)
TEXT = DecoderConfig(
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=256,
    mrope_section=(2, 3, 3),
)
SIZE, GRID = (56, 140), (4, 10)
CONFIG = DrivingConfig(vision=VISION, text=TEXT, image_size=SIZE, cameras=("left", "right"))


@pytest.fixture(scope="module")
def encoded():
    """Parameters, pictures, and what the driving model's encoder sows."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 2, *SIZE, 3), np.uint8)
    model = DrivingVLA(CONFIG)
    init = jax.jit(lambda key: model.init(key, images, method="encode")["params"])
    params = init(jax.random.key(1))
    # Initial weights give almost even attention, which would prove little.
    params = jax.tree.map(lambda leaf: 3 * np.asarray(leaf) if leaf.ndim == 2 else leaf, params)
    apply = partial(model.apply, method="encode", mutable=["intermediates"])
    _, kept = jax.jit(apply)({"params": params}, images)
    return params, images, kept["intermediates"]["visual"]


@jax.jit
def evidence_of_pictures(sown):
    return vision_evidence(sown, VISION, GRID)


def by_definition(query, key, position):
    """(received [N], keys [N, d]) of one picture, patch by patch."""
    columns = GRID[1] // 2
    received, keys = np.zeros(2 * columns), np.zeros((2 * columns, query.shape[-1]))
    scores = np.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    for patch, (row, column) in enumerate(position):
        token = row // 2 * columns + column // 2
        received[token] += weights[:, :, patch].mean()
        keys[token] += key[patch].mean(axis=0) / 4
    return received, keys


def test_evidence_is_that_of_an_explicit_softmax(encoded):
    _, _, sown = encoded
    got = jax.tree.map(np.asarray, evidence_of_pictures(sown))
    assert got.received.shape == (4, 10)
    assert got.keys.shape == (4, 10, 16)
    layout, _, places = ordered_layout(GRID, VISION)
    assert (places != np.arange(10)).any()
    query, key = (np.asarray(sown["blocks_1"]["attn"][name][0]) for name in ("query", "key"))
    for picture in range(4):
        received, keys = by_definition(query[picture], key[picture], layout.position[0])
        np.testing.assert_allclose(got.received[picture], received, atol=1e-6)
        np.testing.assert_allclose(got.keys[picture], keys, atol=1e-5)
        assert received.max() > 2 * received.min()
    np.testing.assert_allclose(got.received.sum(axis=1), 1, atol=1e-5)


def test_rows_in_merge_blocks_give_the_same_evidence(encoded):
    params, images, sown = encoded
    rows = patch_rows(images.reshape(4, *SIZE, 3), 14, 2)
    model = QwenVL(QwenVLConfig(vision=VISION, text=TEXT))
    layout = layout_of([GRID] * 4, VISION)

    @jax.jit
    def evidence(params, rows):
        given = {"params": params}, rows, layout
        _, kept = model.apply(*given, method="encode", mutable=["intermediates"])
        return vision_evidence(kept["intermediates"]["visual"], VISION)

    want = evidence_of_pictures(sown)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), evidence(params, rows), want
    )


def test_no_array_of_pairs_of_patches_is_held(encoded):
    model = DrivingVLA(dataclasses.replace(CONFIG, image_size=(896, 896)))

    @jax.jit
    def run(params, images):
        given = {"params": params}
        tokens, kept = model.apply(given, images, method="encode", mutable=["intermediates"])
        return tokens, vision_evidence(kept["intermediates"]["visual"], VISION, (64, 64))

    images = jax.ShapeDtypeStruct((1, 1, 896, 896, 3), jnp.uint8)
    text = run.lower(encoded[0], images).compile().as_text()
    shapes = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", text)
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) < 4096**2


def test_an_encoder_of_windows_only_has_no_evidence():
    windows = dataclasses.replace(VISION, fullatt_block_indexes=())
    with pytest.raises(ValueError, match="no block"):
        vision_evidence({}, windows, GRID)
