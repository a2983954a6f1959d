"""Visual tokens of 28 x 28 pixels from DINOv2's patches of 14 x 14."""

from typing import Literal

from jaxtyping import Array, Float, UInt8

from fastdrive_jax.models.vit import ViT, normalise_pictures

Merge = Literal["mean", "concat"]
MERGE_SIZE = 2  # patches along a token, as in Qwen2.5-VL's merger


def merge_patches(
    patches: Float[Array, "B P D"], grid: tuple[int, int], merge: Merge
) -> Float[Array, "B N E"]:
    """Merges 2 x 2 neighbouring patches into one token; tokens come in raster order.

    Args:
        patches: [B, P, D] in raster order.
        grid: Patch rows and columns, both even.
        merge: "mean" keeps E = D; "concat" puts the four (row-major) side by side, E = 4 D.
    """
    if any(size % MERGE_SIZE for size in grid) or merge not in ("mean", "concat"):
        raise ValueError(f"cannot merge a grid {grid} by {merge!r}")
    batch, _, size = patches.shape
    rows, columns = (value // MERGE_SIZE for value in grid)
    x = patches.reshape(batch, rows, MERGE_SIZE, columns, MERGE_SIZE, size)
    if merge == "mean":
        return x.mean(axis=(2, 4)).reshape(batch, rows * columns, size)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, MERGE_SIZE**2 * size)


def encode_pictures(
    model: ViT, params: dict, images: UInt8[Array, "B H W 3"], merge: Merge = "mean"
) -> Float[Array, "B N E"]:
    """Visual tokens [B, N, E] of RGB pictures; N = H / 28 * W / 28.

    Args:
        model: The encoder.
        params: Its parameters, as `load_dinov2` gives them.
        images: uint8 [B, H, W, 3]; H and W multiples of 28.
        merge: See `merge_patches`.
    """
    patch = model.config.patch_size
    grid = (images.shape[1] // patch, images.shape[2] // patch)
    tokens = model.apply({"params": params}, normalise_pictures(images, model.config))
    return merge_patches(tokens[:, model.config.prefix :], grid, merge)
