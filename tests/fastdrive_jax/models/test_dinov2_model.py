import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from fastdrive_jax.models.dinov2.config import Dinov2Config
from fastdrive_jax.models.dinov2.model import Dinov2
from fastdrive_jax.models.dinov2.positions import cubic_matrix, interpolate_positions
from fastdrive_jax.models.dinov2.tokens import encode_pictures, merge_patches, normalize

TINY = Dinov2Config(hidden_size=64, num_layers=2, num_heads=2, position_grid=4)


@pytest.fixture(scope="module")
def params():
    model = Dinov2(TINY)
    return model.init(jax.random.key(0), jnp.zeros((1, 56, 56, 3)))["params"]


def test_default_sizes_are_those_of_vit_s():
    shapes = jax.eval_shape(Dinov2().init, jax.random.key(0), jnp.zeros((1, 14, 14, 3)))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count + 384 == 22_056_576  # of facebook/dinov2-small, whose mask token is not ours


@pytest.mark.parametrize("size", [(56, 56), (28, 84), (14, 14)])
def test_shapes(params, size):
    tokens = Dinov2(TINY).apply({"params": params}, jnp.zeros((2, *size, 3)))
    assert tokens.shape == (2, 1 + size[0] * size[1] // 196, 64)


def test_partial_patches_are_refused(params):
    with pytest.raises(ValueError, match="14 px"):
        Dinov2(TINY).apply({"params": params}, jnp.zeros((1, 56, 50, 3)))


def test_pictures_of_a_batch_do_not_mix(params):
    pixels = jax.random.normal(jax.random.key(1), (3, 56, 28, 3))
    together = Dinov2(TINY).apply({"params": params}, pixels)
    alone = Dinov2(TINY).apply({"params": params}, pixels[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)


def test_patch_order_is_raster(params):
    """Without attention's output, a token sees its own patch only."""
    flat = traverse_util.flatten_dict(params)
    flat = {k: jnp.zeros_like(v) if k[-2:] == ("out", "kernel") else v for k, v in flat.items()}
    cut = traverse_util.unflatten_dict(flat)
    base = Dinov2(TINY).apply({"params": cut}, jnp.zeros((1, 42, 56, 3)))
    changed = jnp.zeros((1, 42, 56, 3)).at[0, 14:28, 28:42].set(1.0)
    moved = Dinov2(TINY).apply({"params": cut}, changed)
    where = np.flatnonzero(np.abs(np.asarray(moved - base)).max(axis=-1)[0] > 1e-6)
    assert where.tolist() == [1 + 1 * 4 + 2]


def test_positions_of_the_stored_grid_are_untouched():
    positions = jax.random.normal(jax.random.key(0), (1, 17, 8))
    np.testing.assert_array_equal(interpolate_positions(positions, (4, 4)), positions)


def test_cubic_weights():
    for new, old in ((3, 4), (4, 4), (9, 4), (26, 37)):
        np.testing.assert_allclose(cubic_matrix(new, old).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cubic_matrix(5, 5), np.eye(5), atol=1e-6)
    # Half way between two samples the kernel with a = -0.75 gives -3/32 and 19/32.
    row = cubic_matrix(4, 8)[1]
    np.testing.assert_allclose(row[1:5], [-0.09375, 0.59375, 0.59375, -0.09375], atol=1e-6)


def test_positions_keep_rows_and_columns_apart():
    square = np.zeros((4, 4, 2), np.float32)
    square[..., 0] = np.arange(4)[:, None]
    square[..., 1] = np.arange(4)
    positions = jnp.asarray(np.concatenate([np.zeros((1, 2)), square.reshape(16, 2)])[None])
    out = np.asarray(interpolate_positions(positions, (2, 8)))[0, 1:].reshape(2, 8, 2)
    assert np.ptp(out[..., 0], axis=1).max() < 1e-5
    assert np.ptp(out[..., 1], axis=0).max() < 1e-5
    assert (np.diff(out[0, 1:-1, 1]) > 0).all()


def test_merging_takes_two_by_two_neighbours():
    patches = jnp.arange(24.0).reshape(1, 24, 1)  # 4 rows of 6
    tokens = merge_patches(patches, (4, 6), "concat")
    assert tokens.shape == (1, 6, 4)
    assert tokens[0, 1].tolist() == [2, 3, 8, 9]
    assert tokens[0, 3].tolist() == [12, 13, 18, 19]
    np.testing.assert_allclose(merge_patches(patches, (4, 6), "mean")[..., 0], tokens.mean(-1))


@pytest.mark.parametrize(("grid", "merge"), [((3, 4), "mean"), ((4, 4), "max")])
def test_what_cannot_be_merged(grid, merge):
    with pytest.raises(ValueError, match="cannot merge"):
        merge_patches(jnp.zeros((1, grid[0] * grid[1], 2)), grid, merge)


def test_normalisation_is_imagenets():
    image = jnp.full((1, 1, 1, 3), 255, jnp.uint8)
    np.testing.assert_allclose(normalize(image)[0, 0, 0], [2.2489, 2.4286, 2.64], atol=1e-3)


def test_encoded_tokens_leave_the_class_token_out(params):
    images = np.random.default_rng(0).integers(0, 256, (2, 56, 84, 3), np.uint8)
    model = Dinov2(TINY)
    tokens = encode_pictures(model, params, images, "concat")
    assert tokens.shape == (2, 6, 256)
    raw = model.apply({"params": params}, normalize(images))[:, 1:]
    np.testing.assert_allclose(tokens[:, 0, :64], raw[:, 0], atol=1e-6)
    np.testing.assert_allclose(tokens[:, 0, 192:], raw[:, 7], atol=1e-6)
