"""Bicubic resize of 8-bit pictures, bit for bit as Pillow computes it.

Pillow's `resize(..., BICUBIC)` is what the published Qwen2.5-VL processor shows its model. OpenCV
has another kernel (a = -0.75, no wider support when it shrinks), and torch's kernel for uint8 has
coefficients of 16 bits; both give other pixels. The arithmetic here is Pillow's: across first,
rounded to 8 bits, then down, with fixed point coefficients of 22 bits. Pillow 13 turned the order
round for some sizes whose height shrinks more than their width, which changes pixels; the order
here is that of all versions before it, so that pictures do not depend on the one installed.

The speed comes from the layout. Both passes are the same weighted sum of whole rows, which the
compiler turns into vector instructions; OpenCV transposes the picture for the pass across, and
that costs a fraction of gathering pixels. One call uses one core and holds no GIL.
"""

from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import UInt8
from numba import njit

_BITS = 22  # of a coefficient's fraction: 32, less 8 of the pixel and 2 for sign and overshoot
_HALF = 1 << (_BITS - 1)
_SUPPORT = 2.0  # source pixels on either side that count, when not shrinking
_STRIP = 128  # source rows transposed at a time, so that both copies of them stay in L2 cache
_CHUNK = 1024  # sums of a row at a time, so that they stay in L1 cache
_DIRECT = 4  # taps of an enlarging row, summed in registers


def resize_bicubic(
    image: UInt8[np.ndarray, "H W *C"], size: tuple[int, int]
) -> UInt8[np.ndarray, "h w *C"]:
    """The picture at `size` (height, width), equal to Pillow's antialiased bicubic resize.

    Args:
        image: uint8 [H, W] or [H, W, 3].
        size: Height and width in pixels, at least 1 each.

    Raises:
        ValueError: `image` is of another type or shape or empty, or `size` is not positive.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"picture {image.dtype} {image.shape} is not uint8 [H, W] or [H, W, 3]")
    if not image.size or min(size) < 1:
        raise ValueError(f"picture of {image.shape} cannot be resized to {size}")
    if image.shape[1] != size[1]:
        image = _resize_width(image, size[1])
    if image.shape[0] != size[0]:
        # Numba would compile once more for a read-only picture, as Pillow hands them out.
        image = _mix_rows(np.require(image, requirements="CW"), size[0])
    return image


def _resize_width(image: np.ndarray, width: int) -> np.ndarray:
    out = np.empty((image.shape[0], width, *image.shape[2:]), np.uint8)
    for start in range(0, len(image), _STRIP):
        strip = cv2.transpose(image[start : start + _STRIP])
        out[start : start + _STRIP] = cv2.transpose(_mix_rows(strip, width))
    return out


def _mix_rows(image: np.ndarray, height: int) -> np.ndarray:
    out = np.empty((height, *image.shape[1:]), np.uint8)
    rows = image.reshape(len(image), -1)
    _weighted_sums(rows, *_coefficients(len(image), height), out.reshape(height, -1))
    return out


@lru_cache(maxsize=64)
def _coefficients(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First source row, number of rows and fixed point weights [target, taps] of each target row.

    Every step is Pillow's own in double precision, since a weight that is off by one unit shows.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    reach = _SUPPORT * stretch
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + reach + 0.5).astype(np.int64), source)
    count = stop - first
    tap = np.arange(max(_DIRECT, count.max()))
    distance = (tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch)
    weight = np.where(tap < count[:, None], _bicubic(np.abs(distance)), 0.0)
    weight /= np.cumsum(weight, axis=1)[:, -1:]  # np.sum would add in another order
    fixed = np.trunc(weight * (1 << _BITS) + np.copysign(0.5, weight)).astype(np.int32)
    return first, count, fixed


def _bicubic(x: np.ndarray) -> np.ndarray:
    a = -0.5
    inner = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))


@njit(nogil=True, cache=True, error_model="numpy")
def _weighted_sums(rows, first, count, weight, out):
    """Each row of `out` as the rounded, clipped sum of `count` weighted `rows` from `first` on.

    Sums fit 32 bits by the choice of `_BITS`. Numba widens them to 64, so each is cast back, which
    doubles the lanes of a vector.
    """
    last = rows.shape[0] - 1
    sums = np.empty(_CHUNK, np.int32)
    for y in range(out.shape[0]):
        top, taps = first[y], count[y]
        for left in range(0, rows.shape[1], _CHUNK):
            right = min(left + _CHUNK, rows.shape[1])
            target = out[y, left:right]
            if taps <= _DIRECT:
                # Taps past the count weigh nothing, so any row that exists will do for them.
                r0, w0 = rows[top, left:right], weight[y, 0]
                r1, w1 = rows[min(top + 1, last), left:right], weight[y, 1]
                r2, w2 = rows[min(top + 2, last), left:right], weight[y, 2]
                r3, w3 = rows[min(top + 3, last), left:right], weight[y, 3]
                for x in range(right - left):
                    total = np.int32(
                        _HALF
                        + np.int32(r0[x]) * w0
                        + np.int32(r1[x]) * w1
                        + np.int32(r2[x]) * w2
                        + np.int32(r3[x]) * w3
                    )
                    target[x] = np.uint8(min(max(total >> _BITS, 0), 255))
                continue
            partial = sums[: right - left]
            partial[:] = _HALF
            for tap in range(taps):
                row, w = rows[top + tap, left:right], weight[y, tap]
                for x in range(right - left):
                    partial[x] += np.int32(row[x]) * w
            for x in range(right - left):
                target[x] = np.uint8(min(max(partial[x] >> _BITS, 0), 255))
