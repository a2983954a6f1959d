"""Noise tiles, made once per process from fixed seeds, and their use on ground and walls."""

import functools

import cv2
import numpy as np

TILE = 1024


@functools.cache
def rough_tile() -> np.ndarray:
    """Wrap-around noise `[1024, 1024]` float32 of unit deviation, fine over coarse."""
    return _blend((1, 2, 8, 32), (0.55, 0.5, 0.5, 0.55), 11)


@functools.cache
def cloud_tile() -> np.ndarray:
    """Soft wrap-around noise `[1024, 1024]` float32 in 0..1."""
    tile = _blend((16, 64, 128), (0.3, 0.6, 0.9), 12)
    return np.clip(0.5 + 0.45 * tile, 0.0, 1.0)


@functools.cache
def grain_tile() -> np.ndarray:
    """White noise `[1024, 1024]` float32 of unit deviation, for the sensor."""
    return np.random.default_rng(13).standard_normal((TILE, TILE), np.float32)


def _blend(scales, weights, seed) -> np.ndarray:
    rng = np.random.default_rng(seed)
    total = np.zeros((TILE, TILE), np.float32)
    for scale, weight in zip(scales, weights, strict=True):
        coarse = rng.standard_normal((TILE // scale, TILE // scale)).astype(np.float32)
        if scale > 1:
            # Three tiles across, so that the middle one meets itself at its borders.
            size = 3 * (TILE // scale)
            around = np.pad(coarse, size // 3, mode="wrap")
            coarse = cv2.resize(around, (3 * TILE, 3 * TILE), interpolation=cv2.INTER_CUBIC)
            coarse = coarse[TILE : 2 * TILE, TILE : 2 * TILE]
        total += weight * coarse / coarse.std()
    return (total / total.std()).astype(np.float32)


def crop(tile: np.ndarray, height: int, width: int, seed: int) -> np.ndarray:
    """A window `[height, width]` of a tile at a place that `seed` decides, wrapping round."""
    y, x = seed % TILE, (seed // TILE) % TILE
    if y + height <= TILE and x + width <= TILE:
        return tile[y : y + height, x : x + width]
    rows, columns = (y + np.arange(height)) % TILE, (x + np.arange(width)) % TILE
    return tile[rows[:, None], columns[None]]


def on_ground(intrinsic, rotation, eye, slope, height: int, width: int, seed: int) -> np.ndarray:
    """Ground texture `[height, width]` in perspective, fixed to the ground below the car.

    Args:
        intrinsic: `[3, 3]`.
        rotation: `[3, 3]` camera to world.
        eye: Camera centre `[3]`, its height given above the ground plane at `eye[:2]`.
        slope: Grade `[2]` of the ground plane.
        height: Picture height.
        width: Picture width.
        seed: Shift of the texture.
    """
    grain = 18.0  # tile pixels per metre
    plane = np.array(
        [
            [1.0, 0.0, -eye[0]],
            [0.0, 1.0, -eye[1]],
            [slope[0], slope[1], -eye[2] - slope[0] * eye[0] - slope[1] * eye[1]],
        ]
    )
    to_metres = np.array(
        [[1 / grain, 0, -(seed % 997)], [0, 1 / grain, -((seed // 997) % 997)], [0, 0, 1.0]]
    )
    # Rows above the plane's horizon stay empty; 8% of a focal length allows for hills.
    normal = rotation.T @ np.array([-slope[0], -slope[1], 1.0])
    edges = np.array([0.0, width]) - intrinsic[0, 2]
    horizon = -(normal[0] * edges / intrinsic[0, 0] + normal[2]) / normal[1]
    top = int(np.clip((horizon.min() - 0.08) * intrinsic[1, 1] + intrinsic[1, 2], 0, height - 1))
    # Warped at half size, which costs a quarter and is still finer than the eye needs.
    half = np.array([[0.5, 0, 0], [0, 0.5, -0.5 * top], [0, 0, 1.0]])
    texture = np.zeros((height, width), np.float32)
    small = cv2.warpPerspective(
        rough_tile(),
        half @ intrinsic @ rotation.T @ plane @ to_metres,
        ((width + 1) // 2, (height - top + 1) // 2),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_WRAP,
    )
    texture[top:] = cv2.resize(small, (width, height - top), interpolation=cv2.INTER_LINEAR)
    return texture
