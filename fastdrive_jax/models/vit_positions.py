"""Position embeddings for a picture of any size."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_CUBIC = -0.75  # the kernel's free parameter in PyTorch; jax.image.resize has -0.5


def cubic_matrix(new: int, old: int) -> np.ndarray:
    """Weights [new, old] of cubic interpolation along one axis, without antialiasing.

    Equal to `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`: pixel centres
    map to (i + 0.5) * old / new - 0.5 and samples beyond the border repeat it.
    """
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    base = np.floor(centres).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        weights = _kernel(np.abs(centres - (base + tap)))
        np.add.at(matrix, (np.arange(new), np.clip(base + tap, 0, old - 1)), weights)
    return matrix.astype(np.float32)


def _kernel(x: np.ndarray) -> np.ndarray:
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = ((_CUBIC * x - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def interpolate_positions(
    positions: Float[Array, "1 S D"], stored: tuple[int, int], grid: tuple[int, int]
) -> Float[Array, "1 P D"]:
    """Positions [1, h * w, D] for a grid (h, w) of patches.

    Args:
        positions: Of the grid that the encoder was trained on, in raster order.
        stored: Its rows and columns.
        grid: Patch rows and columns of the picture.
    """
    if grid == stored:
        return positions
    square = positions[0].reshape(*stored, -1)
    rows, columns = (jnp.asarray(cubic_matrix(*sizes)) for sizes in zip(grid, stored, strict=True))
    # Exact products: a faster matmul mode would shift every token of the encoder.
    patches = jnp.einsum(
        "ya,xb,abd->yxd", rows, columns, square, precision=jax.lax.Precision.HIGHEST
    )
    return patches.reshape(1, grid[0] * grid[1], -1)
