"""A latency target in place of a keep ratio: which of the compiled buckets a frame can afford.

Every keep ratio is a program of its own, a bucket. Their times are measured once, in turn, when all
are compiled; of each the median is kept. From then on one number, the load, says how much slower
than its median a frame is to be expected, and a frame takes the largest bucket with

    median_ms * load <= target

The load is a running estimate of the `QUANTILE` of observed / median, whichever bucket a frame
took. It begins as that of the measured rounds, all buckets together: what else a machine does hits
all alike, and the few rounds of one bucket would tell its tail badly. Each frame multiplies it by
`exp(RATE * QUANTILE)` if it took longer than expected and by `exp(-RATE * (1 - QUANTILE))`
otherwise, so it is at rest where `QUANTILE` of the frames take no longer. One outlier moves it by a
ninth, however far out it lies; a machine that becomes twice as slow is followed within 7 frames,
and trusted again after 58: missing the target costs more than a few tokens.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fastdrive_jax.errors import UserError

QUANTILE = 0.9
RATE = 0.12


@dataclass(frozen=True)
class BucketTime:
    """A compiled bucket and its time, of whole frames from pictures to plan.

    Attributes:
        keep_ratio: In (0, 1].
        tokens: K.
        median_ms: Milliseconds.
    """

    keep_ratio: float
    tokens: int
    median_ms: float


@dataclass(frozen=True)
class Measured:
    """All buckets of a policy.

    Attributes:
        buckets: Largest K first.
        load: To begin with.
    """

    buckets: tuple[BucketTime, ...]
    load: float


@dataclass(frozen=True)
class Choice:
    """What a frame gets.

    Attributes:
        bucket: One of those that were measured.
        expected_ms: That it takes at most, by `QUANTILE` of the frames.
        meets: Whether that is within the target; if no bucket is, the smallest is taken.
    """

    bucket: BucketTime
    expected_ms: float
    meets: bool


def measure_buckets(
    runs: Mapping[float, Callable[[], Any]],
    tokens: Mapping[float, int],
    rounds: int = 20,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Times every bucket, each round all in turn: what else the machine does hits all alike.

    Args:
        runs: Keep ratio to one whole frame, which is waited for.
        tokens: Keep ratio to K.
        rounds: That count, after those of warming up.
        warm_up: Rounds before them.
        clock: Seconds.
    """
    spent: dict[float, list[float]] = {ratio: [] for ratio in runs}
    for _ in range(warm_up + rounds):
        for ratio, run in runs.items():
            begin = clock()
            jax.block_until_ready(run())
            spent[ratio].append(1e3 * (clock() - begin))
    times = {ratio: np.asarray(values[warm_up:]) for ratio, values in spent.items()}
    medians = {ratio: float(np.median(of)) for ratio, of in times.items()}
    slower = np.concatenate([of / medians[ratio] for ratio, of in times.items()])
    found = [BucketTime(ratio, tokens[ratio], median) for ratio, median in medians.items()]
    return Measured(
        tuple(sorted(found, key=lambda bucket: -bucket.tokens)),
        float(np.quantile(slower, QUANTILE)),
    )


def choose_bucket(buckets: Sequence[BucketTime], target_ms: float, load: float) -> Choice:
    """The largest bucket that meets the target; the smallest if none does.

    Args:
        buckets: That were measured.
        target_ms: Milliseconds that are left for the frame; may be negative.
        load: See above.

    Raises:
        ValueError: There is no bucket.
    """
    if not buckets:
        raise ValueError("there must be a bucket to choose")
    by_size = sorted(buckets, key=lambda bucket: -bucket.tokens)
    for bucket in by_size:
        if bucket.median_ms * load <= target_ms:
            return Choice(bucket, bucket.median_ms * load, True)
    smallest = by_size[-1]
    return Choice(smallest, smallest.median_ms * load, False)


def next_load(load: float, bucket: BucketTime, observed_ms: float) -> float:
    """The load after a frame; see above.

    Args:
        load: Before it.
        bucket: That the frame took.
        observed_ms: What it took, measured as the bucket was.
    """
    slower = observed_ms > bucket.median_ms * load
    return load * math.exp(RATE * (QUANTILE - (0 if slower else 1)))


def check_target(target_ms: float) -> float:
    """Returns the target.

    Raises:
        UserError: It is no positive number.
    """
    if not (math.isfinite(target_ms) and target_ms > 0):
        raise UserError(f"target_ms={target_ms} must be a positive number of milliseconds.")
    return target_ms


def miss_sentence(choice: Choice, target_ms: float, spent_ms: float = 0.0) -> str:
    """What to say where a target can't be met.

    Args:
        choice: That does not meet it.
        target_ms: The target.
        spent_ms: That were gone when the bucket was chosen.
    """
    bucket = choice.bucket
    gone = f", and {spent_ms:.1f} ms were gone already" if spent_ms else ""
    return (
        f"No bucket is expected to meet {target_ms:g} ms: the smallest, {bucket.keep_ratio:g} "
        f"({bucket.tokens} tokens), takes up to {choice.expected_ms:.1f} ms{gone}. It is used."
    )
