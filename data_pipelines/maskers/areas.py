"""Cutting areas of the ground, which may be concave and have holes, along straight lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def clip_area(rings: Sequence[np.ndarray], normal: np.ndarray, offset: float) -> list[np.ndarray]:
    """The part of an area where `normal @ xy >= offset`.

    A concave area may fall into pieces. Each becomes a ring of its own, without the doubled edges
    along the cut that Sutherland and Hodgman's clipping leaves: a fill that draws its outline too
    would show them as lines.

    Args:
        rings: Closed outlines [n, 2], whose even-odd inside is the area; they may turn either way.
        normal: [2].
        offset: Metres times the length of `normal`.

    Returns:
        Rings [n, 2] of the part, whose even-odd inside it is.
    """
    whole, chains = [], []
    for ring in rings:
        side = ring @ normal - offset
        inside = side >= 0
        if inside.all():
            whole.append(ring)
        elif inside.any():
            chains += _chains(ring, side, inside)
    return whole + _closed(chains, np.array([-normal[1], normal[0]]))


def _chains(ring: np.ndarray, side: np.ndarray, inside: np.ndarray) -> list[np.ndarray]:
    """The runs of a ring inside the cut, each from where it comes in to where it goes out."""
    following = np.roll(np.arange(len(ring)), -1)
    entries = np.flatnonzero(~inside & inside[following])
    chains = []
    for entry in entries:
        points = [_crossing(ring, side, entry, following[entry])]
        k = following[entry]
        while inside[k]:
            points.append(ring[k])
            last, k = k, following[k]
        points.append(_crossing(ring, side, last, k))
        chains.append(np.array(points))
    return chains


def _crossing(ring: np.ndarray, side: np.ndarray, a: int, b: int) -> np.ndarray:
    return ring[a] + side[a] / (side[a] - side[b]) * (ring[b] - ring[a])


def _closed(chains: Sequence[np.ndarray], along: np.ndarray) -> list[np.ndarray]:
    """Joins chains along the cut, where the area lies between every other pair of crossings."""
    ends = np.array([[chain[0] @ along, chain[-1] @ along] for chain in chains]).ravel()
    order = np.argsort(ends, kind="stable")
    partner = np.empty(len(order), int)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    left, rings = set(range(len(chains))), []
    while left:
        start = end = 2 * min(left)  # end 2 k begins chain k, end 2 k + 1 finishes it
        pieces = []
        while True:
            k, backwards = divmod(end, 2)
            left.discard(k)
            pieces.append(chains[k][::-1] if backwards else chains[k])
            end = int(partner[end ^ 1])
            if end == start:
                break
        rings.append(np.concatenate(pieces))
    return rings
