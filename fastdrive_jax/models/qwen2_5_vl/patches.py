"""Pictures to patch rows, and the static tables of a patch grid.

Rows run merge block by merge block (2 x 2 neighbours are adjacent), blocks in raster order, as in
the published image processor. Everything about the grid is NumPy: it is known when tracing.
"""

import functools
from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig

# Mean and deviation of CLIP's training pictures, which the published processor normalises by.
IMAGE_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
IMAGE_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def patch_grid(height: int, width: int, config: VisionConfig) -> tuple[int, int]:
    """Patch rows and columns of a picture.

    Raises:
        UserError: The picture is not made of whole tokens.
    """
    edge = config.token_pixels
    if height % edge or width % edge or min(height, width) < edge:
        raise UserError(
            f"A picture of {height} x {width} pixels is not made of {edge} x {edge} tokens; resize "
            f"it to {max(height // edge, 1) * edge} x {max(width // edge, 1) * edge}."
        )
    return height // config.patch_size, width // config.patch_size


def patch_rows(
    images: Shaped[Array, "B H W 3"], size: int, merge: int
) -> Shaped[Array, "B P pixels"]:
    """Pixels of each patch, colour by colour, [B, P, 3 * size * size]; NumPy stays NumPy.

    Args:
        images: Pictures made of whole tokens.
        size: Patch edge in pixels.
        merge: Patches merged along each axis.
    """
    batch, height, width, _ = images.shape
    rows, columns = height // size, width // size
    x = images.reshape(batch, rows // merge, merge, size, columns // merge, merge, size, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # B, block row, block column, 2, 2, colour, 14, 14
    return x.reshape(batch, rows * columns, 3 * size * size)


def normalise(
    rows: Shaped[Array, "*batch P pixels"], config: VisionConfig
) -> Float[Array, "*batch P values"]:
    """What the encoder reads, from uint8 patch rows: colours normalised, frames repeated."""
    x = rows.reshape(*rows.shape[:-1], 3, 1, -1).astype(jnp.float32) / 255.0
    x = (x - IMAGE_MEAN[:, None, None]) / IMAGE_STD[:, None, None]
    return jnp.repeat(x, config.temporal_patch_size, axis=-2).reshape(*rows.shape[:-1], -1)


def patchify(images: Shaped[Array, "B H W 3"], config: VisionConfig) -> Float[Array, "B P pixels"]:
    """Normalised patch rows [B, P, 3 * temporal * 14 * 14] of uint8 pictures [B, H, W, 3]."""
    patch_grid(*images.shape[1:3], config)
    return normalise(patch_rows(images, config.patch_size, config.spatial_merge_size), config)


@functools.cache
def patch_positions(rows: int, columns: int, merge: int) -> np.ndarray:
    """Row and column of each patch in merge-block order, [P, 2]."""
    row, column = np.mgrid[:rows, :columns]
    position = np.stack([row, column], axis=-1)
    position = position.reshape(rows // merge, merge, columns // merge, merge, 2)
    return position.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


@flax.struct.dataclass
class PictureLayout:
    """Where the patches of some pictures lie; fields lead with M pictures, or 1 if all are alike.

    Attributes:
        position: Row and column of each patch, int32 [M, P, 2].
        members: Patches that share a window, int32 [M, windows, S]; windows that the border cuts
            off are filled up with P, one past the last patch.
        slots: Where each patch stands in its picture's flattened `members`, int32 [M, P].
        count: Real patches, int32 [M]; the rest fills up the batch. None if all are real.
        groups: In place of members and slots, where windows follow each other: how many windows of
            how many patches come first, and so on.
    """

    position: Int[Array, "M P 2"]
    members: Int[Array, "M W S"] | None = None
    slots: Int[Array, "M P"] | None = None
    count: Int[Array, " M"] | None = None
    groups: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False, default=())


def layout_of(
    grids: Sequence[tuple[int, int]], config: VisionConfig, patches: int | None = None
) -> PictureLayout:
    """The layout of pictures of several sizes, in NumPy.

    Args:
        grids: Patch rows and columns of each picture.
        config: Of the encoder.
        patches: P, at least the largest picture's; None takes that.

    Raises:
        UserError: There is no picture, one is not made of tokens, or one has more patches than P.
    """
    if not grids:
        raise UserError("There is no picture in the batch; give at least one.")
    merge = config.spatial_merge_size
    counts = [rows * columns for rows, columns in grids]
    patches = max(counts) if patches is None else patches
    for rows, columns in grids:
        if rows % merge or columns % merge or not 0 < rows * columns <= patches:
            raise UserError(
                f"A picture of {rows} x {columns} patches does not fit: both must be multiples of "
                f"{merge}, and their product at most {patches}."
            )
    tables = [window_table(*grid, config) for grid in grids]
    windows = max(len(members) for members, _ in tables)
    position = np.zeros((len(grids), patches, 2), np.int32)
    members = np.full((len(grids), windows, tables[0][0].shape[1]), patches, np.int32)
    slots = np.zeros((len(grids), patches), np.int32)
    for number, (grid, (own, places)) in enumerate(zip(grids, tables, strict=True)):
        count = counts[number]
        position[number, :count] = patch_positions(*grid, merge)
        members[number, : len(own)] = np.where(own == count, patches, own)
        slots[number, :count] = places
    alike = all(count == patches for count in counts)
    return PictureLayout(position, members, slots, None if alike else np.array(counts, np.int32))


@functools.cache
def window_order(
    rows: int, columns: int, config: VisionConfig
) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """An order of a picture's patches in which windows are slices, windows of one size together.

    Returns:
        order: [P], merge-block places of the patches, blocks whole.
        groups: Of `PictureLayout`.
    """
    members, _ = window_table(rows, columns, config)
    sizes = (members < rows * columns).sum(axis=1)
    order, groups = [], []
    for size in sorted(set(sizes.tolist()), reverse=True):
        alike = members[sizes == size, :size]
        order.append(alike.ravel())
        groups.append((len(alike), size))
    return np.concatenate(order), tuple(groups)


def ordered_layout(
    grid: tuple[int, int], config: VisionConfig
) -> tuple[PictureLayout, np.ndarray, np.ndarray]:
    """The layout of pictures of one size whose patches lie in `window_order`.

    Returns:
        The layout; the order of the patches [P]; where each token is found in it [N].
    """
    order, groups = window_order(*grid, config)
    merge = config.spatial_merge_size
    position = patch_positions(*grid, merge)[order].astype(np.int32)
    blocks = order[:: merge**2] // merge**2
    return PictureLayout(position[None], groups=groups), order, np.argsort(blocks)


def rotary_angles(
    position: Int[Array, "M P 2"], config: VisionConfig
) -> tuple[Float[Array, "M P d"], Float[Array, "M P d"]]:
    """Cosine and sine of the 2-D rotary embedding: half the pairs turn by the row.

    NumPy stays NumPy, for grids that are known when tracing.
    """
    numpy = np if isinstance(position, np.ndarray) else jnp
    quarter = config.hidden_size // config.num_heads // 4
    inverse = config.rope_theta ** (-np.arange(quarter, dtype=np.float32) / quarter)
    angles = (position[..., None].astype(np.float32) * inverse).reshape(*position.shape[:2], -1)
    angles = numpy.concatenate([angles, angles], axis=-1)
    return numpy.cos(angles), numpy.sin(angles)


@functools.cache
def window_table(rows: int, columns: int, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which patches share a window.

    Returns:
        Patch indices [windows, S], where windows cut off by the border are filled up with the index
        P, one past the last patch; and where each patch stands in them, laid flat [P].
    """
    merge = config.spatial_merge_size
    edge = config.window_size // config.patch_size  # patches along a window's edge
    position = patch_positions(rows, columns, merge)
    across = -(-columns // edge)
    window = position[:, 0] // edge * across + position[:, 1] // edge
    count = len(position)
    members = np.full((window.max() + 1, edge * edge), count)
    for number in range(len(members)):
        inside = np.flatnonzero(window == number)
        members[number, : len(inside)] = inside
    slots = np.empty(count, np.int64)
    flat = members.ravel()
    slots[flat[flat < count]] = np.flatnonzero(flat < count)
    return members, slots
