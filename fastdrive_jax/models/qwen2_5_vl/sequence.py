"""Text and pictures of several samples as one padded batch, made on the host in NumPy.

Samples are filled up on the right: a causal model never looks there, so prefill needs no mask, and
decoding cuts each sample's cache to its own length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.struct
import numpy as np
from jaxtyping import Array, Int, UInt8

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.config import QwenVLConfig
from fastdrive_jax.models.qwen2_5_vl.patches import PictureLayout, layout_of


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        ids: Token ids in which one `image_token_id` stands for each picture.
        rows: uint8 patch rows [P, 3 * 14 * 14] of each picture, of `process_pictures`.
        grids: Patch rows and columns of each picture.
    """

    ids: Sequence[int]
    rows: Sequence[UInt8[np.ndarray, "P pixels"]] = ()
    grids: Sequence[tuple[int, int]] = ()


@flax.struct.dataclass
class Batch:
    """Samples ready for the model.

    Attributes:
        ids: int32 [B, L], an `image_token_id` for each visual token.
        positions: M-RoPE ids, int32 [3, B, L].
        visual: Which visual token of the flattened [M * N] stands there, int32 [B, L]; -1 is text.
        lengths: Real tokens of each sample, int32 [B].
        next_position: M-RoPE id of the first token of the answer, int32 [B].
        rows: Pictures' patch rows, uint8 [M, P, 3 * 14 * 14]; None without a picture.
        layout: Of the pictures.
    """

    ids: Int[Array, "B L"]
    positions: Int[Array, "3 B L"]
    visual: Int[Array, "B L"]
    lengths: Int[Array, " B"]
    next_position: Int[Array, " B"]
    rows: UInt8[Array, "M P pixels"] | None = None
    layout: PictureLayout | None = None


def expand_images(
    ids: Sequence[int], grids: Sequence[tuple[int, int]], config: QwenVLConfig
) -> Int[np.ndarray, " L"]:
    """The ids with each picture's one `image_token_id` repeated for its visual tokens.

    Raises:
        UserError: There are more pictures than marks or the other way round.
    """
    ids = np.asarray(ids, np.int32)
    marks = np.flatnonzero(ids == config.image_token_id)
    if len(marks) != len(grids):
        raise UserError(
            f"The prompt has {len(marks)} picture marks (id {config.image_token_id}) but "
            f"{len(grids)} pictures; give one for each."
        )
    repeats = np.ones(len(ids), np.int64)
    repeats[marks] = [visual_tokens(grid, config) for grid in grids]
    return np.repeat(ids, repeats)


def visual_tokens(grid: tuple[int, int], config: QwenVLConfig) -> int:
    """Visual tokens of a picture of (rows, columns) patches."""
    return grid[0] * grid[1] // config.vision.spatial_merge_size**2


def mrope_ids(
    ids: Int[np.ndarray, " L"], grids: Sequence[tuple[int, int]], config: QwenVLConfig
) -> Int[np.ndarray, "3 L"]:
    """Temporal, row and column position of each token (Qwen2-VL, section 2.1).

    Text counts on by one in all three. A picture starts after all before it, adds its row and
    column, and what follows starts after its largest position.

    Args:
        ids: Of `expand_images`.
        grids: Patch rows and columns of each picture.
        config: Of the model.
    """
    merge = config.vision.spatial_merge_size
    is_image = ids == config.image_token_id
    out = np.zeros((3, len(ids)), np.int32)
    place, start = 0, 0  # in the sequence, and the next free position
    for grid in grids:
        first = place + int(np.argmax(is_image[place:]))
        out[:, place:first] = start + np.arange(first - place)
        start += first - place
        rows, columns = grid[0] // merge, grid[1] // merge
        row, column = np.mgrid[:rows, :columns].reshape(2, -1)
        place = first + rows * columns
        out[:, first:place] = start + np.stack([np.zeros_like(row), row, column])
        start += max(rows, columns)
    out[:, place:] = start + np.arange(len(ids) - place)
    return out


def collate(
    samples: Sequence[Sample],
    config: QwenVLConfig,
    length: int | None = None,
    patches: int | None = None,
) -> Batch:
    """One batch of samples of different lengths, pictures and picture sizes.

    Args:
        samples: At least one.
        config: Of the model.
        length: L; None takes the longest sample's. A fixed one keeps one compiled program.
        patches: P, patches of a picture; None takes the largest picture's.

    Raises:
        UserError: There is no sample, or one is empty, longer than L, or lacks pictures.
    """
    if not samples:
        raise UserError("There is no sample in the batch; give at least one.")
    expanded = [expand_images(sample.ids, sample.grids, config) for sample in samples]
    lengths = np.array([len(ids) for ids in expanded], np.int32)
    longest = int(lengths.max())
    length = longest if length is None else length
    if not 0 < lengths.min() <= longest <= length:
        raise UserError(
            f"Samples of {lengths.tolist()} tokens do not fit into length={length}; each needs at "
            "least one token and at most that many."
        )
    grids = [grid for sample in samples for grid in sample.grids]
    rows, layout, tokens = None, None, 0
    if grids:
        layout = layout_of(grids, config.vision, patches)
        own = [one for sample in samples for one in sample.rows]
        shape = (len(own), layout.position.shape[1])
        if [len(one) for one in own] != [height * width for height, width in grids]:
            raise UserError("The patch rows of the pictures do not fit their grids.")
        rows = np.zeros((*shape, own[0].shape[1]), np.uint8)
        for number, one in enumerate(own):
            rows[number, : len(one)] = one
        tokens = shape[1] // config.vision.spatial_merge_size**2

    size = (len(samples), length)
    ids = np.full(size, config.pad_token_id, np.int32)
    positions = np.zeros((3, *size), np.int32)
    visual = np.full(size, -1, np.int32)
    next_position = np.zeros(len(samples), np.int32)
    picture = 0
    for number, (sample, full) in enumerate(zip(samples, expanded, strict=True)):
        own = slice(0, len(full))
        ids[number, own] = full
        where = mrope_ids(full, sample.grids, config)
        positions[:, number, own] = where
        next_position[number] = where.max() + 1
        places = np.flatnonzero(full == config.image_token_id)
        flat = [
            (picture + i) * tokens + np.arange(visual_tokens(grid, config))
            for i, grid in enumerate(sample.grids)
        ]
        visual[number, places] = np.concatenate([*flat, np.zeros(0, np.int64)])
        picture += len(sample.grids)
    return Batch(ids, positions, visual, lengths, next_position, rows, layout)
