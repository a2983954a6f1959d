import jax
import numpy as np
import pytest

from fastdrive_jax.models.dinov2.tokens import encode_pictures, merge_patches
from fastdrive_jax.models.vit import ViT, normalise_pictures
from fastdrive_jax.models.vit_config import ViTConfig

TINY = ViTConfig(depth=1, hidden_size=64, intermediate_size=256, num_heads=2, image_size=56)


def test_merging_takes_two_by_two_neighbours():
    patches = np.arange(24, dtype=np.float32).reshape(1, 24, 1)  # 4 rows of 6
    tokens = np.asarray(merge_patches(patches, (4, 6), "concat"))
    assert tokens.shape == (1, 6, 4)
    assert tokens[0, 1].tolist() == [2, 3, 8, 9]
    assert tokens[0, 3].tolist() == [12, 13, 18, 19]
    means = np.asarray(merge_patches(patches, (4, 6), "mean"))
    np.testing.assert_allclose(means[..., 0], tokens.mean(-1))


@pytest.mark.parametrize(("grid", "merge"), [((3, 4), "mean"), ((4, 4), "max")])
def test_what_cannot_be_merged(grid, merge):
    with pytest.raises(ValueError, match="cannot merge"):
        merge_patches(np.zeros((1, grid[0] * grid[1], 2)), grid, merge)


def test_encoded_tokens_leave_the_class_token_out():
    images = np.random.default_rng(0).integers(0, 256, (2, 56, 84, 3), np.uint8)
    model = ViT(TINY)
    pixels = np.zeros((1, 56, 56, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), pixels)["params"]
    encode = jax.jit(lambda params, images: encode_pictures(model, params, images, "concat"))
    tokens = np.asarray(encode(params, images))
    assert tokens.shape == (2, 6, 256)
    apply = jax.jit(lambda params, images: model.apply(params, normalise_pictures(images, TINY)))
    raw = np.asarray(apply({"params": params}, images))[:, 1:]
    np.testing.assert_allclose(tokens[:, 0, :64], raw[:, 0], atol=1e-6)
    np.testing.assert_allclose(tokens[:, 0, 192:], raw[:, 7], atol=1e-6)
