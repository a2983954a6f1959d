"""Frames that wait, and which of them run together."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

from fastdrive_jax.serving.programs import Planned
from fastdrive_jax.serving.requests import PlanRequest


@dataclass(frozen=True)
class Job:
    """A frame that waits.

    Attributes:
        asked: What for.
        images: Pixels of all cameras.
        arrived: `perf_counter` when the request began.
        queued: The same when it joined the queue.
        answer: Where its `Answer` goes.
        given_up: Set once nobody waits for it any more: the drive then does not count it.
    """

    asked: PlanRequest
    images: UInt8[np.ndarray, "C H W 3"]
    arrived: float
    queued: float
    answer: Future = field(default_factory=Future)
    given_up: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Budget:
    """The bucket of a frame, and what it was chosen by.

    Attributes:
        keep_ratio: Of the bucket.
        target_ms: That decided it; None if none did.
        met: Whether the bucket was expected to meet it.
        note: A sentence if it was not.
    """

    keep_ratio: float
    target_ms: float | None = None
    met: bool | None = None
    note: str | None = None


@dataclass(frozen=True)
class Answer:
    """A planned frame.

    Attributes:
        planned: The plan.
        budget: Its bucket.
        frame: Its number in the drive; None without one.
        notes: Sentences on what was lost or missed.
        queue_ms: It waited.
        model_ms: Its batch took.
        batch: Frames in that.
    """

    planned: Planned
    budget: Budget
    frame: int | None
    notes: tuple[str, ...]
    queue_ms: float
    model_ms: float
    batch: int


def next_batch(waiting: Sequence[Job], budgets: Sequence[Budget], most: int) -> list[int]:
    """Places of the jobs that run next: the oldest, and in order what may join it.

    Args:
        waiting: Oldest first.
        budgets: Of each.
        most: Jobs in a batch.
    """
    chosen: list[int] = []
    seen: set[str] = set()
    for place, (job, budget) in enumerate(zip(waiting, budgets, strict=True)):
        drive = job.asked.drive
        shares = not chosen or budget.keep_ratio == budgets[0].keep_ratio
        if shares and (drive is None or drive not in seen):
            chosen.append(place)
        if drive is not None:
            seen.add(drive)  # its later frames must not overtake this one
        if len(chosen) == most:
            break
    return chosen
