"""Which kind of driving a sample is, told by the way that was driven."""

import numpy as np
from jaxtyping import Bool, Float, Int

SCENARIOS = ("straight", "turn", "stopped")
COMMANDS = ("left", "straight", "right")
TURN_METRES = 2.0  # to the side at the end of the plan, as in UniAD's and VAD's commands
STOPPED_METRES = 0.25  # in the last half second: below 0.5 m/s


def scenario_of(
    future: Float[np.ndarray, "S T 2"], valid: Bool[np.ndarray, "S T"]
) -> Int[np.ndarray, " S"]:
    """Index into `SCENARIOS` of each sample.

    "stopped" stands at the last known waypoint, "turn" has left its line by then, all others are
    "straight"; a sample without any future is so, too.

    Args:
      future: driven waypoints every 0.5 s in the present ego frame, metres.
      valid: which of them are known, true ones first.
    """
    valid = np.asarray(valid, bool)
    known = valid.sum(1)
    rows, last = np.arange(len(future)), np.maximum(known - 1, 0)
    end = future[rows, last]
    before = np.where((last > 0)[:, None], future[rows, np.maximum(last - 1, 0)], 0.0)
    moved = np.linalg.norm(end - before, axis=1)
    found = np.where(np.abs(end[:, 1]) > TURN_METRES, 1, 0)
    found = np.where(moved < STOPPED_METRES, 2, found)
    return np.where(known > 0, found, 0)
