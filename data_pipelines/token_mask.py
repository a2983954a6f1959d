"""Foreground masks of pixels to shares of visual tokens."""

import numpy as np
from jaxtyping import Float32, UInt8

from data_pipelines.schema import TOKEN_PIXELS


def mask_fractions(mask: UInt8[np.ndarray, "*B H W"]) -> Float32[np.ndarray, "*B N"]:
    """Foreground share of each 28 x 28 token, raster order.

    Equal to `evaluation.foreground.token_fractions(mask, (1,))` in float32, and many times faster:
    counts stay in 8 bits until 28 rows are one, as a trainer needs it for every batch.

    Args:
        mask: uint8 {0, 1}.

    Raises:
        ValueError: The mask holds something else, or is not made of whole tokens.
    """
    *batch, height, width = mask.shape
    if height % TOKEN_PIXELS or width % TOKEN_PIXELS:
        raise ValueError(f"mask of {height} x {width} does not split into tokens of {TOKEN_PIXELS}")
    if mask.dtype != np.uint8 or mask.max(initial=0) > 1:
        raise ValueError(f"mask must be uint8 of 0 and 1, got {mask.dtype} up to {mask.max()}")
    rows, columns = height // TOKEN_PIXELS, width // TOKEN_PIXELS
    across = mask.reshape(*batch, rows, TOKEN_PIXELS, width).sum(-2, dtype=np.uint8)
    counts = across.reshape(*batch, rows * columns, TOKEN_PIXELS).sum(-1, dtype=np.uint16)
    return counts / np.float32(TOKEN_PIXELS**2)
