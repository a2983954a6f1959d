"""Batches that are on their way to the devices before they are asked for."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

from fastdrive_jax.training.checkpoints import Positioned


class DevicePrefetch(Iterator):
    """Batches on the devices, each put there one batch before it is given (`depth` 2) or earlier.

    Drawing and copying go on beside the step that was dispatched last.

    Its position is that of the batch that it gives next, not of those that it has drawn ahead, so a
    checkpoint loses none of them.
    """

    def __init__(self, batches: Any, put: Callable[[Any], Any], depth: int = 2):
        """Draws nothing yet.

        Args:
            batches: Iterator of host batches with `get_state` and `set_state`.
            put: Host batch to device arrays without waiting, such as `parallel.mesh.shard_batch`.
            depth: Batches that are on the devices when one is given; 1 is no prefetch.
        """
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        self._batches: Positioned = batches
        self._put, self._depth = put, depth
        self._ahead: collections.deque[tuple[dict, Any]] = collections.deque()
        self._ended = False

    def __next__(self) -> Any:
        self._fill()
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft()[1]

    def get_state(self) -> dict:
        """Position of the next batch."""
        return self._ahead[0][0] if self._ahead else self._batches.get_state()

    def set_state(self, state: dict) -> None:
        """Goes to a position; what was drawn ahead is forgotten."""
        self._ahead.clear()
        self._ended = False
        self._batches.set_state(state)

    def _fill(self) -> None:
        while not self._ended and len(self._ahead) < self._depth:
            state = self._batches.get_state()
            try:
                batch = next(self._batches)
            except StopIteration:
                self._ended = True
                return
            self._ahead.append((state, self._put(batch)))
