"""Prompts of any robot model: instructions in, ids of one length out."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from fastdrive_jax.errors import UserError

_PAD_ID = 0

Encoded = tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]


class Prompts(Protocol):
    """What turns instructions into a model's prompts."""

    def encode(self, instructions: Sequence[str]) -> Encoded:
        """Ids [B, L], padded on the right, and the real ones of each, both int32."""
        ...


def padded(
    prompts: Sequence[Sequence[int]], length: int | None, instructions: Sequence[str]
) -> Encoded:
    """Prompts of any lengths as one array.

    Args:
        prompts: Ids of each.
        length: L; None takes the longest prompt's.
        instructions: What they were made of, for the error.

    Raises:
        UserError: There is none, or one is longer than `length`.
    """
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    if not len(lengths):
        raise UserError("There is no instruction; give at least one.")
    length = int(lengths.max()) if length is None else length
    if lengths.max() > length:
        worst = int(lengths.argmax())
        raise UserError(
            f"The prompt of {instructions[worst]!r} has {lengths[worst]} tokens, more than "
            f"length={length}."
        )
    ids = np.full((len(prompts), length), _PAD_ID, np.int32)
    for row, own in zip(ids, prompts, strict=True):
        row[: len(own)] = own
    return ids, lengths
