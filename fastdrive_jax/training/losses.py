"""Reconstruction losses on pictures: SSIM, mean squared error and their published mixture."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_BLOCK = 64  # rows of one banded product; 32 was alike, 128 slower


@dataclasses.dataclass(frozen=True)
class SsimConfig:
    """Structural similarity as in Wang et al. 2004, whose values are the defaults.

    The FastDriveVLA paper does not give its window, so it is a setting here.

    Attributes:
        window: side of the square Gaussian window in pixels, odd.
        sigma: standard deviation of the window in pixels.
        k1: stabiliser of the luminance term, as a fraction of `data_range`.
        k2: stabiliser of the contrast and structure term, as a fraction of `data_range`.
        data_range: the difference between the largest and smallest possible pixel value.
    """

    window: int = 11
    sigma: float = 1.5
    k1: float = 0.01
    k2: float = 0.03
    data_range: float = 1.0

    def __post_init__(self):
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"the SSIM window must be odd and positive, not {self.window}")
        if self.sigma <= 0 or self.data_range <= 0:
            raise ValueError("the SSIM sigma and data_range must be positive")


def ssim(
    prediction: Float[Array, "B H W C"],
    target: Float[Array, "B H W C"],
    config: SsimConfig = SsimConfig(),
) -> Float[Array, " B"]:
    """Structural similarity of each picture, averaged over positions and channels.

    Windows that would leave the picture are left out, and covariances are population ones: the
    same number as `skimage.metrics.structural_similarity(gaussian_weights=True,
    use_sample_covariance=False)`.

    Args:
        prediction: `[B, H, W, C]`, values in `[0, data_range]`.
        target: `[B, H, W, C]`.
        config: the window and the stabilisers.

    Returns:
        `[B]`, float32, 1 for equal pictures.

    Raises:
        ValueError: the shapes differ, or the picture is smaller than the window.
    """
    if prediction.shape != target.shape or prediction.ndim != 4:
        raise ValueError(f"ssim needs two [B, H, W, C], got {prediction.shape}, {target.shape}")
    if min(prediction.shape[1:3]) < config.window:
        raise ValueError(f"picture {prediction.shape[1:3]} smaller than window {config.window}")
    x, y = _rows(prediction), _rows(target)
    blur = functools.partial(_blur, (config.window, config.sigma, prediction.shape[-1]))
    # Four blurs are enough: only the sum of the two variances is needed.
    mean_x, mean_y = blur(x), blur(y)
    product = mean_x * mean_y
    squares = jnp.square(mean_x) + jnp.square(mean_y)
    variances = blur(jnp.square(x) + jnp.square(y)) - squares
    covariance = blur(x * y) - product
    c1 = (config.k1 * config.data_range) ** 2
    c2 = (config.k2 * config.data_range) ** 2
    similarity = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return similarity.mean(axis=(0, 2))


def reconstruction_loss(
    prediction: Float[Array, "B H W C"],
    target: Float[Array, "B H W C"],
    ssim_weight: float = 0.2,
    config: SsimConfig = SsimConfig(),
) -> dict[str, Float[Array, ""]]:
    """`w * (1 - SSIM) + (1 - w) * MSE`, averaged over the batch, and its parts.

    This is one of the two halves (foreground or background) of the FastDriveVLA loss, whose
    weight lambda is 0.2.

    Args:
        prediction: `[B, H, W, C]`, values in [0, 1].
        target: `[B, H, W, C]`.
        ssim_weight: w; at 0 the SSIM is not computed.
        config: of the SSIM.

    Returns:
        Float32 scalars: "loss", "mse" and, where it is computed, "ssim".

    Raises:
        ValueError: the shapes differ, or see `ssim`.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"the loss needs equal shapes, got {prediction.shape} and {target.shape}")
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)).mean()
    if not ssim_weight:
        return {"loss": error, "mse": error}
    similarity = ssim(prediction, target, config).mean()
    loss = ssim_weight * (1 - similarity) + (1 - ssim_weight) * error
    return {"loss": loss, "mse": error, "ssim": similarity}


def _rows(pictures: Float[Array, "B H W C"]) -> Float[Array, "H B WC"]:
    """Float32 rows of pixels, whose channels stay neighbours."""
    rows = pictures.astype(jnp.float32).reshape(*pictures.shape[:2], -1)
    return rows.swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blur(window: tuple[int, float, int], rows: Float[Array, "H B WC"]) -> Float[Array, "h B wC"]:
    """Gaussian window at each place where it fits.

    Args:
        window: Its size and sigma, and the number of channels.
        rows: Pictures.
    """
    size, sigma, channels = window
    return _blur_along(_blur_down(rows, size, sigma), size, sigma, channels)


def _blur_forward(window, rows):
    return _blur(window, rows), None


def _blur_backward(window, _, grad):
    """The window is symmetric, so this is the same blur, at each place that it touches."""
    size, _, channels = window
    down, along = size - 1, channels * (size - 1)
    return (_blur(window, jnp.pad(grad, ((down, down), (0, 0), (along, along)))),)


_blur.defvjp(_blur_forward, _blur_backward)


def _blur_down(rows: Array, size: int, sigma: float) -> Array:
    """Blur along the first axis: products with a banded matrix, in blocks of few zeros.

    Sums of shifted pictures, as in `_blur_along`, would be fused with those into sums of size^2.
    """
    valid = rows.shape[0] - size + 1
    block = math.ceil(valid / math.ceil(valid / _BLOCK))
    blurred = []
    for start in range(0, valid, block):
        count = min(block, valid - start)
        band = _band(count, size, sigma)
        inputs = jax.lax.slice_in_dim(rows, start, start + count + size - 1)
        # Variances are small differences of large moments: TF32 or bfloat16 would ruin them.
        blurred.append(jnp.einsum("ph,hbw->pbw", band, inputs, precision="highest"))
    return jnp.concatenate(blurred)


def _blur_along(rows: Array, size: int, sigma: float, channels: int) -> Array:
    """Blur along the rows, where a pixel is `channels` values from the next: a sum of slices."""
    length = rows.shape[2] - channels * (size - 1)
    weights = _band(1, size, sigma)[0]
    slices = (
        float(weight) * jax.lax.slice_in_dim(rows, channels * i, channels * i + length, axis=2)
        for i, weight in enumerate(weights)
    )
    return functools.reduce(jnp.add, slices)


@functools.lru_cache(maxsize=64)
def _band(rows: int, window: int, sigma: float) -> np.ndarray:
    """`[rows, rows + window - 1]`: row i holds the normalised window at offset i."""
    offsets = np.arange(window) - window // 2
    weights = np.exp(-0.5 * np.square(offsets / sigma))
    weights = (weights / weights.sum()).astype(np.float32)
    band = np.zeros((rows, rows + window - 1), np.float32)
    for row in range(rows):
        band[row, row : row + window] = weights
    return band
