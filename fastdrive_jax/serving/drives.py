"""What the service remembers of drives: their last frame, and what a temporal method keeps of it.

A temporal method's memory is of the frame just before. So a frame that comes late is refused, and
one with a gap before it, or of a drive that is not known any more, is planned with a new memory:
a car that lost its connection still gets a plan, and is told.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from fastdrive_jax.serving.refusals import Refusal


@dataclass(frozen=True)
class Recalled:
    """A drive as the next frame finds it.

    Attributes:
        frame: Its number.
        memory: Of the frame before; None if there is none.
        note: A sentence if something was lost.
    """

    frame: int
    memory: Any = None
    note: str | None = None


class Drives:
    """Memory of the drives that were heard of last; for one thread."""

    def __init__(self, most: int, seconds: float):
        """Knows no drive.

        Args:
            most: Drives that are kept.
            seconds: Of silence after which one is forgotten.
        """
        self._most, self._seconds = most, seconds
        self._known: OrderedDict[str, tuple[int, Any, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def recall(self, drive: str, frame: int | None, now: float) -> Recalled:
        """What is known for a frame.

        Args:
            drive: Its name.
            frame: Number of the frame; None is the next. 0 begins the drive, whatever was known.
            now: Seconds of a clock that does not go back.

        Raises:
            Refusal: 409, that frame or a later one was planned already.
        """
        self.forget(now)
        last, memory, _ = self._known.get(drive, (None, None, None))
        if frame == 0 or (frame is None and last is None):
            return Recalled(0)
        if last is None:
            return Recalled(
                frame,
                note=f"Drive {drive!r} is not known here (silent for {self._seconds:g} s, or begun "
                f"before the service was): frame {frame} starts a new memory.",
            )
        if frame is None or frame == last + 1:
            return Recalled(last + 1, memory)
        if frame > last + 1:
            return Recalled(
                frame,
                note=f"Frames {last + 1} to {frame - 1} of drive {drive!r} did not come: frame "
                f"{frame} starts a new memory.",
            )
        raise Refusal(
            409,
            "frame_order",
            f"Drive {drive!r} is at frame {last} and frame {frame} is not after it; send frames in "
            "order, or frame 0 to begin again.",
        )

    def remember(self, drive: str, frame: int, memory: Any, now: float) -> None:
        """Keeps what a frame left, and lets the drives go that were silent longest."""
        self._known[drive] = frame, memory, now
        self._known.move_to_end(drive)
        while len(self._known) > self._most:
            self._known.popitem(last=False)

    def seconds_left(self, now: float) -> float | None:
        """Until the drive that was silent longest is forgotten; None where none is known."""
        if not self._known:
            return None
        _, _, heard = next(iter(self._known.values()))
        return heard + self._seconds - now

    def forget(self, now: float) -> None:
        """Lets drives go that have been silent too long."""
        while self._known:
            drive, (_, _, heard) = next(iter(self._known.items()))
            if now - heard <= self._seconds:
                return
            del self._known[drive]
