"""Oriented boxes on the ground: where they touch."""

import numpy as np


def corners(centre: np.ndarray, yaw: np.ndarray, length, width) -> np.ndarray:
    """Corners `[..., 4, 2]` of boxes about `centre` `[..., 2]`, front left first, clockwise.

    Args:
        centre: Metres.
        yaw: Headings `[...]`.
        length: Along the heading.
        width: Across it.
    """
    c, s = np.cos(yaw), np.sin(yaw)
    along = np.stack([c, s], -1) * (np.asarray(length) / 2)[..., None]
    aside = np.stack([-s, c], -1) * (np.asarray(width) / 2)[..., None]
    signs = ((1, 1), (1, -1), (-1, -1), (-1, 1))
    return np.stack([centre + a * along + b * aside for a, b in signs], -2)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether boxes `[..., 4, 2]` overlap, by the separating axes of both.

    Two boxes that share no more than an edge or a corner do not overlap.
    """
    apart = np.zeros(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), bool)
    for box in (a, b):
        for k in (0, 1):
            axis = (box[..., k + 1, :] - box[..., k, :])[..., None, :]
            one, other = (axis * a).sum(-1), (axis * b).sum(-1)
            # Relative to the axis's own length, so that rounding does not make neighbours touch.
            slack = 1e-9 * np.maximum(np.abs(one).max(-1), np.abs(other).max(-1))
            apart |= one.max(-1) <= other.min(-1) + slack
            apart |= other.max(-1) <= one.min(-1) + slack
    return ~apart
