"""The public open-loop protocols of nuScenes as values: what each evaluator counts, and how.

Read from the evaluators' code: Impromptu-VLA (which has SparseDrive's), OmniDrive and BEV-Planner.
Their figures are not interchangeable, so a metric's name carries its protocol.

Frames. Waypoints here are places of nuScenes' ego origin, the middle of the rear axle. OmniDrive's
plans are so too: it puts the box centre 0.5 + 0.985793 m ahead of the waypoint, and so does
BEV-Planner, whose agents stand in the ego frame; its true waypoints are displacements of the lidar
along the ego axes, which differ from ours by at most 0.94 m times the turn since now.
Impromptu-VLA's plans are places of the lidar in the lidar's frame, with the box centre 0.5 m ahead.
The lidar stands 0.943713 m ahead of the ego origin (nuScenes' calibration; 0.985793 m is what
OmniDrive and BEV-Planner say of the same distance). So the lidar's places are worked out from ours
first, by the heading of each step of at least 1 m. Taking the box centre 1.443713 m ahead of our
waypoints instead would swing it round a car that hardly moves, whose heading is noise.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from fastdrive_jax.evaluation.planning import HORIZONS, STEP_SECONDS
from fastdrive_jax.evaluation.truth import KINDS

LIDAR_AHEAD = 0.943713  # metres from the ego origin to the lidar in nuScenes
STEPS = tuple(round(seconds / STEP_SECONDS) for seconds in HORIZONS)
_VEHICLES = ("vehicle", "cycle")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How collisions and leaving the road are counted.

    Attributes:
      name: ends the metrics' names.
      overlap: "polygon" for exact rectangles, where touching counts; "raster" for cells of 0.1 m.
      center_ahead: metres from a waypoint to the middle of the car along its heading.
      origin_ahead: metres from the ego origin to the point in the car whose places the evaluator's
        waypoints are; polygons only.
      length: of the car's box, metres.
      width: likewise.
      yaw: "central" for differences over two steps and 0 for a plan whose ends lie within 0.5 m;
        "step" for the direction of the last step and 0 where it is shorter than 1 m.
      kinds: agents that count, of `truth.KINDS`.
      seen_only: leave out boxes on which no lidar point fell at that step.
      now_only: leave out agents that are not annotated at the present moment.
      cells: how corners of agents become cells, "nearest" or "below".
      average: value at t of the steps up to t: "mean" of them, "any" of them, or the "last".
      intersection: "area" for leaving the drivable area, "lines" for crossing boundary lines; None
        where the evaluator has no such metric.
      unread: what becomes of an answer that cannot be read: "zeros" scores it as standing still,
        "skip" leaves its sample out.
    """

    name: str
    overlap: Literal["polygon", "raster"]
    center_ahead: float
    yaw: Literal["central", "step"]
    kinds: tuple[str, ...]
    average: Literal["mean", "any", "last"]
    origin_ahead: float = 0.0
    length: float = 4.084
    width: float = 1.85
    seen_only: bool = False
    now_only: bool = False
    cells: Literal["nearest", "below"] = "nearest"
    intersection: Literal["area", "lines"] | None = None
    unread: Literal["zeros", "skip"] = "zeros"

    def __post_init__(self):
        strange = sorted(set(self.kinds) - set(KINDS))
        if strange:
            raise ValueError(f"{self.name} counts unknown kinds {strange}; there are {KINDS}")
        if self.overlap == "raster" and self.origin_ahead:
            raise ValueError(f"{self.name}: rasters are around the ego origin, not ahead of it")


# Impromptu-VLA, planning_eval.py: every annotated box with a lidar point.
_IMPROMPTU = Protocol(
    name="impromptu",
    overlap="polygon",
    center_ahead=0.5,
    origin_ahead=LIDAR_AHEAD,
    yaw="central",
    kinds=KINDS,
    seen_only=True,
    average="mean",
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _IMPROMPTU,
        # The same boxes in UniAD's average: the value at t is that of the step at t alone. UniAD's
        # own raster of 0.5 m is not imitated.
        dataclasses.replace(_IMPROMPTU, name="noavg", average="last"),
        # OmniDrive, eval_planning.py and planning_utils.py: agents of now, rolled forward.
        Protocol(
            name="omnidrive",
            overlap="raster",
            center_ahead=0.5 + 0.985793,
            yaw="step",
            kinds=(*_VEHICLES, "emergency"),
            now_only=True,
            average="any",
            intersection="area",
            unread="skip",
        ),
        # BEV-Planner, metric_stp3.py: annotations of each future step. It asks for a lidar or radar
        # point; radar is not read here, so a box with radar points alone does not count. Its plans
        # are numbers of a head, which always can be read.
        Protocol(
            name="bevplanner",
            overlap="raster",
            center_ahead=0.5 + 0.985793,
            yaw="step",
            kinds=_VEHICLES,
            seen_only=True,
            cells="below",
            average="any",
            intersection="lines",
        ),
    )
}


def averaged(
    average: Literal["mean", "any", "last"], hits: Bool[np.ndarray, "M T"]
) -> Float[np.ndarray, "M 3"]:
    """The value of each sample at 1, 2 and 3 s from what happened at each step."""
    reduce = {
        "mean": lambda part: part.mean(1),
        "any": lambda part: part.any(1).astype(np.float64),
        "last": lambda part: part[:, -1].astype(np.float64),
    }[average]
    return np.stack([reduce(hits[:, :steps]) for steps in STEPS], 1)
