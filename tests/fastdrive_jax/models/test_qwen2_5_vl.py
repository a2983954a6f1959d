"""Qwen2.5-VL without PyTorch: golden numbers of transformers, and properties of the parts."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.generate import generate
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA, visual_positions
from fastdrive_jax.models.qwen2_5_vl.patches import (
    layout_of,
    ordered_layout,
    patch_rows,
    window_table,
)
from fastdrive_jax.models.qwen2_5_vl.vision import VisionAttention, VisionEncoder
from fastdrive_jax.models.qwen2_5_vl.weights import (
    abstract_params,
    name_table,
    params_from_tensors,
)

# Numbers of transformers' own model; tests/parity computes them anew and says how.
GOLDEN = json.loads((Path(__file__).parent / "qwen2_5_vl_golden.json").read_text())


def sizes(name: str) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in GOLDEN[name].items()}


VISION, TEXT = VisionConfig(**sizes("vision")), DecoderConfig(**sizes("text"))
HEIGHT, WIDTH = GOLDEN["size"]
jit_encode = jax.jit(VisionEncoder(VISION).apply)


def golden_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.uniform(-0.5, 0.5, shape).astype(np.float32) + ("norm" in name)
        for name, (_, shape) in sorted(name_table(VISION, TEXT).items())
    }


def golden_picture() -> np.ndarray:
    row, column, colour = np.mgrid[:HEIGHT, :WIDTH, :3]
    return ((row * 37 + column * 11 + row * column + colour * 101) % 256).astype(np.uint8)[None]


@pytest.fixture(scope="module")
def params():
    return params_from_tensors(golden_tensors(), VISION, TEXT)


@pytest.fixture(scope="module")
def tokens(params):
    return jit_encode({"params": params["visual"]}, golden_picture())


def place_ids() -> np.ndarray:
    """[3, 1, n]: two text tokens, the picture's, and what is left of GOLDEN["ids"] after it."""
    rows, columns = HEIGHT // 28, WIDTH // 28
    row, column = np.mgrid[:rows, :columns].reshape(2, -1)
    before = np.tile(np.arange(2), (3, 1))
    after = np.tile(2 + max(rows, columns) + np.arange(len(GOLDEN["ids"]) - 2), (3, 1))
    return np.concatenate([before, 2 + np.stack([0 * row, row, column]), after], axis=1)[:, None]


def decoder_logits(params, embeddings, where):
    decoder, variables = Decoder(TEXT), {"params": params["language_model"]}
    hidden, _ = decoder.apply(variables, embeddings, jnp.asarray(where))
    return decoder.apply(variables, hidden, method="logits")


def test_visual_tokens_are_the_golden_ones(tokens):
    np.testing.assert_allclose(np.asarray(tokens)[0, :, :3], GOLDEN["tokens"], atol=1e-4)


def test_logits_are_the_golden_ones(params, tokens):
    table = np.asarray(params["language_model"]["embed_tokens"]["embedding"])
    ids = np.array(GOLDEN["ids"])
    embeddings = np.concatenate([table[ids[:2]], np.asarray(tokens)[0], table[ids[2:]]])[None]
    logits = np.asarray(jax.jit(decoder_logits)(params, embeddings, place_ids()))
    np.testing.assert_allclose(logits[0, :, :3], GOLDEN["logits"], atol=1e-4)


def test_decoder_is_causal_by_its_gradients(params):
    embeddings = np.random.default_rng(0).normal(size=(1, 7, TEXT.hidden_size)).astype(np.float32)
    where = np.broadcast_to(np.arange(7), (3, 1, 7))

    def one(x):
        return decoder_logits(params, x, where)[0, 3].sum()

    slope = np.abs(jax.jit(jax.grad(one))(embeddings)[0]).max(axis=-1)
    assert (slope[:4] > 1e-3).all()
    assert (slope[4:] == 0).all()


@pytest.mark.parametrize("grid", [(10, 12), (8, 8)])
def test_windows_average_over_their_own_patches_only(grid):
    """With keys of zero, attention is a mean; what fills up a cut window would draw it to zero."""
    config = VisionConfig(hidden_size=8, num_heads=1)
    eye, zero = np.eye(8), np.zeros((8, 8))
    variables = {
        "qkv": {"kernel": np.concatenate([zero, zero, eye], axis=1), "bias": np.zeros(24)},
        "proj": {"kernel": eye, "bias": np.zeros(8)},
    }
    x = np.random.default_rng(0).normal(size=(2, grid[0] * grid[1], 8)) + 5
    layout = layout_of([grid], config)
    attend = jax.jit(lambda params, x: VisionAttention(config, full=False).apply(params, x, layout))
    out = np.asarray(attend({"params": variables}, x))
    for window in window_table(*grid, config)[0]:
        window = window[window < x.shape[1]]
        mean = np.broadcast_to(x[:, window].mean(axis=1, keepdims=True), x[:, window].shape)
        np.testing.assert_allclose(out[:, window], mean, atol=1e-5)


def test_windows_as_slices_give_what_gathered_windows_give():
    """Windows of 64, 16 and 4 patches and one that both borders cut off."""
    images = np.random.default_rng(0).integers(0, 256, (2, 9 * 28, 5 * 28, 3), np.uint8)
    config = replace(VISION, depth=3, fullatt_block_indexes=(1,))
    encoder = VisionEncoder(config)
    params = jax.jit(encoder.init)(jax.random.key(0), images)
    grid = (18, 10)
    assert {size for _, size in ordered_layout(grid, config)[0].groups} == {64, 16, 4}
    want = jax.jit(functools.partial(encoder.apply, method="encode_rows"))(
        params, patch_rows(images, 14, 2), layout_of([grid], config)
    )
    np.testing.assert_allclose(jax.jit(encoder.apply)(params, images), want, atol=1e-5)


@pytest.mark.parametrize("block", [(0, 0), (1, 2), (2, 0), (4, 1)])
def test_tokens_are_in_raster_order(params, tokens, block):
    """Without attention's output, a token sees its own 28 x 28 px only."""

    def cut(path, leaf):
        return 0 * leaf if any(key.key == "proj" for key in path) else leaf

    visual = {"params": jax.tree_util.tree_map_with_path(cut, params["visual"])}
    picture = golden_picture()
    changed = picture.copy()
    row, column = block
    changed[:, row * 28 : row * 28 + 28, column * 28 : column * 28 + 28] ^= 255
    before, after = (np.asarray(jit_encode(visual, given)) for given in (picture, changed))
    moved = np.abs(before - after).max(axis=-1)[0]
    assert np.flatnonzero(moved > 1e-5).tolist() == [row * (WIDTH // 28) + column]


def test_encoder_refuses_a_picture_that_is_not_made_of_tokens(params):
    with pytest.raises(UserError, match=r"60 x 84 pixels.*56 x 84"):
        jit_encode({"params": params["visual"]}, np.zeros((1, 60, 84, 3), np.float32))


def test_sizes_of_the_3b_model_are_the_published_ones():
    shapes = abstract_params(VisionConfig(), DecoderConfig())

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert count(shapes["visual"]) == 668_684_288
    assert count(shapes["language_model"]) == 3_085_938_688
    for number in range(36):
        assert count(shapes["language_model"][f"layers_{number}"]) == 77_076_992


def test_one_program_for_each_number_of_kept_tokens(one_camera):
    config, params = one_camera
    model = DrivingVLA(config)
    run = jax.jit(lambda *inputs: generate(model, {"params": params["vla"]}, *inputs))
    where = np.asarray(visual_positions(config, 2))
    for kept, programs in ((10, 1), (5, 2)):
        for seed in range(3):
            rng = np.random.default_rng(seed)
            tokens = rng.normal(size=(2, kept, config.text.hidden_size)).astype(np.float32)
            speed = np.full(2, seed, np.float32)
            prompt = config.vocabulary.prompt(speed, np.array([seed, 0]))
            chosen = np.sort(rng.permutation(10)[:kept])
            out = run(tokens, where[:, :, chosen], prompt)
            assert out.shape == (2, config.vocabulary.steps, 2)
        assert run._cache_size() == programs
