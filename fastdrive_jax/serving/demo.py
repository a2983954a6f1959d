"""Drives that the page can play; whoever starts the service says where they are from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DemoFrame:
    """One frame.

    Attributes:
        pictures: JPEG bytes of each camera.
        speed: Metres per second.
        command: 0 left, 1 straight, 2 right.
        driven: Where the car is driven next, [T] of x forward and y left in metres.
    """

    pictures: Mapping[str, bytes]
    speed: float
    command: int
    driven: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class DemoDrive:
    """A drive, drawn when it is asked for.

    Attributes:
        name: For people.
        frames: Number of frames.
        period: Seconds between them.
        draw: A frame by its number; called by several threads.
    """

    name: str
    frames: int
    period: float
    draw: Callable[[int], DemoFrame]
