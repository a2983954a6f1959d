"""The batch of `sequence.collate` made within a program, of pictures of one size.

What a program takes is then what any tokenizer and any camera give: ids with one mark for each
picture, and pixels. A whole service needs no code of this library beside its programs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

from fastdrive_jax.models.qwen2_5_vl.config import QwenVLConfig
from fastdrive_jax.models.qwen2_5_vl.patches import layout_of, patch_grid, patch_rows
from fastdrive_jax.models.qwen2_5_vl.sequence import Batch


def device_batch(
    images: UInt8[Array, "B C H W 3"],
    ids: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    config: QwenVLConfig,
) -> Batch:
    """Pictures and prompts as the model reads them.

    Args:
        images: Of each sample, all of one size that is made of whole tokens.
        ids: Prompts with one `image_token_id` for each of the C pictures, filled up on the right.
        lengths: Real ids of each prompt, marks included.
        config: Of the model.

    Raises:
        UserError: Pictures are not made of whole tokens.
    """
    samples, pictures = images.shape[:2]
    grid = patch_grid(*images.shape[2:4], config.vision)
    merge = config.vision.spatial_merge_size
    rows, columns = grid[0] // merge, grid[1] // merge
    each, longest = rows * columns, max(rows, columns)

    real = jnp.arange(ids.shape[1]) < lengths[:, None]
    mark = (ids == config.image_token_id) & real
    width = jnp.where(mark, each, 1)
    starts = jnp.cumsum(width, axis=1) - width
    place = jnp.arange(ids.shape[1] + pictures * (each - 1))
    find = jax.vmap(lambda sorted_starts: jnp.searchsorted(sorted_starts, place, side="right") - 1)
    source = find(starts)  # which id each place comes from [B, L]

    def spread(x):
        return jnp.take_along_axis(x, source, axis=1)

    within = place - spread(starts)
    before = jnp.cumsum(mark, axis=1) - mark  # pictures in front of each id
    reached = jnp.cumsum(jnp.where(mark, longest, 1), axis=1)  # first position behind each id
    is_visual = spread(mark)
    row_column = jnp.stack([jnp.zeros_like(within), within // columns, within % columns])
    step = jnp.where(is_visual, row_column, within)
    flat = jnp.arange(samples)[:, None] * pictures + spread(before)
    last = lengths[:, None] - 1
    return Batch(
        ids=spread(ids),
        positions=spread(reached - jnp.where(mark, longest, 1)) + step,
        visual=jnp.where(is_visual, flat * each + within, -1),
        lengths=jnp.where(real, width, 0).sum(axis=1),
        next_position=jnp.take_along_axis(reached, last, axis=1)[:, 0],
        rows=patch_rows(images.reshape(-1, *images.shape[2:]), config.vision.patch_size, merge),
        layout=layout_of([grid], config.vision),
    )
