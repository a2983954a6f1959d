"""What open-loop planning is measured against: the driven way, other agents and the map.

All of it stands in the ego frame of the present moment: origin at the rear axle, x forward, y left,
metres and radians.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fastdrive_jax.errors import UserError

# The first four are the kinds of a driving record. Emergency vehicles stand apart because some
# evaluators leave them out; "other" is what is annotated beside (animals, bicycle racks).
KINDS = ("vehicle", "person", "cycle", "obstacle", "emergency", "other")


@dataclasses.dataclass(frozen=True)
class Area:
    """A part of the drivable area.

    Attributes:
      exterior: [n, 2] corners, not closed by repeating the first.
      holes: of [m, 2] each.
    """

    exterior: np.ndarray
    holes: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class Agents:
    """Annotated boxes of S samples, padded to the greatest number A.

    Attributes:
      boxes: [S, A, T + 1, 5] x, y of the centre, yaw, length, width; index 0 is now.
      valid: [S, A, T + 1] whether the agent is annotated then.
      seen: [S, A, T + 1] whether a lidar point fell on it; as `valid` where that is not known.
      kind: [S, A] index into `KINDS`.
    """

    boxes: np.ndarray
    valid: np.ndarray
    seen: np.ndarray
    kind: np.ndarray


@dataclasses.dataclass(frozen=True)
class LidarWays:
    """Where the lidar was and will be, seen from where it is now: x forward, y left, metres.

    Attributes:
      history: [S, H, 2] at the key frames before, oldest first; zeros before the drive began.
      future: [S, T, 2] at those after; zeros behind its end.
    """

    history: np.ndarray
    future: np.ndarray


@dataclasses.dataclass(frozen=True)
class DrivingTruth:
    """What was driven and what stood around, for S samples with T steps of 0.5 s.

    Attributes:
      token: [S] names of the samples, by which plans are joined.
      scene: [S] names of their drives.
      future: [S, T, 2] places at 0.5, 1.0, ... s.
      future_valid: [S, T] whether the drive lasts until then.
      agents: None where the set has no annotations.
      drivable: areas of each sample, in the map's order, cut out of the square of 100 m around the
        car; None where there is no map.
      boundaries: lines [n, 2] of each sample at which the road ends, see `nuscenes.truth`; None
        where there is no map.
      lidar: the ways of the lidar, in which some models plan; None where there is none.
    """

    token: np.ndarray
    scene: np.ndarray
    future: np.ndarray
    future_valid: np.ndarray
    agents: Agents | None = None
    drivable: tuple[tuple[Area, ...], ...] | None = None
    boundaries: tuple[tuple[np.ndarray, ...], ...] | None = None
    lidar: LidarWays | None = None

    def __post_init__(self):
        count = len(self.token)
        if self.future.ndim != 3 or self.future.shape[2] != 2:
            raise ValueError(f"future {self.future.shape} must be [S, T, 2]")
        steps = self.future.shape[1]
        wanted = {"scene": (count,), "future": (count, steps, 2), "future_valid": (count, steps)}
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} {getattr(self, name).shape} must be {shape}")
        if self.agents is not None:
            boxes = self.agents.boxes.shape
            if len(boxes) != 4 or (boxes[0], *boxes[2:]) != (count, steps + 1, 5):
                raise ValueError(f"boxes {boxes} must be [{count}, A, {steps + 1}, 5]")
            for name, shape in (("valid", boxes[:3]), ("seen", boxes[:3]), ("kind", boxes[:2])):
                if getattr(self.agents, name).shape != shape:
                    found = getattr(self.agents, name).shape
                    raise ValueError(f"agents' {name} {found} must be {shape}")
        if self.lidar is not None and self.lidar.future.shape != self.future.shape:
            found = self.lidar.future.shape
            raise ValueError(f"the lidar's future {found} must be {self.future.shape}")
        for name in ("drivable", "boundaries"):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"{name} of {len(value)} samples does not fit {count} tokens")

    def __len__(self) -> int:
        return len(self.token)

    def take(self, samples) -> DrivingTruth:
        """The samples that an index array [M] or a mask [S] chooses, in its order."""
        rows = np.arange(len(self))[samples]
        agents = self.agents and Agents(
            *(getattr(self.agents, f.name)[rows] for f in dataclasses.fields(Agents))
        )
        return DrivingTruth(
            self.token[rows],
            self.scene[rows],
            self.future[rows],
            self.future_valid[rows],
            agents,
            self.drivable and tuple(self.drivable[k] for k in rows),
            self.boundaries and tuple(self.boundaries[k] for k in rows),
            self.lidar and LidarWays(self.lidar.history[rows], self.lidar.future[rows]),
        )

    def at(self, tokens: Sequence[str]) -> DrivingTruth:
        """The samples of these tokens, in this order.

        Raises:
          UserError: a token is not among them.
        """
        place = {str(token): k for k, token in enumerate(self.token)}
        strange = [str(token) for token in tokens if str(token) not in place]
        if strange:
            raise UserError(
                f"{len(strange)} of {len(tokens)} samples are not in this truth, such as "
                f"{strange[0]}; read the split that the plans belong to."
            )
        return self.take([place[str(token)] for token in tokens])


def pad_agents(
    samples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]], steps: int
) -> Agents:
    """Agents of single samples as one padded table.

    Args:
      samples: boxes [a, T + 1, 5], valid and seen [a, T + 1] and kind [a] of each.
      steps: T.
    """
    count, most = len(samples), max((len(sample[3]) for sample in samples), default=0)
    found = Agents(
        np.zeros((count, most, steps + 1, 5), np.float32),
        np.zeros((count, most, steps + 1), bool),
        np.zeros((count, most, steps + 1), bool),
        np.zeros((count, most), np.int32),
    )
    for k, sample in enumerate(samples):
        for f, values in zip(dataclasses.fields(Agents), sample, strict=True):
            getattr(found, f.name)[k, : len(values)] = values
    return found


def join_truths(truths: Sequence[DrivingTruth]) -> DrivingTruth:
    """The samples of several drives, one after the other.

    Raises:
      UserError: some have a map, annotations or a lidar and others have none.
    """
    joined = {
        name: np.concatenate([getattr(truth, name) for truth in truths])
        for name in ("token", "scene", "future", "future_valid")
    }
    for name in ("agents", "drivable", "boundaries", "lidar"):
        lacking = [truth.scene[0] for truth in truths if getattr(truth, name) is None]
        if 0 < len(lacking) < len(truths):
            raise UserError(
                f"{len(lacking)} of {len(truths)} drives have no {name}, such as {lacking[0]}; "
                "add what is missing or leave these drives out."
            )
    if truths[0].agents is not None:
        samples = [
            tuple(getattr(truth.agents, f.name)[k] for f in dataclasses.fields(Agents))
            for truth in truths
            for k in range(len(truth))
        ]
        joined["agents"] = pad_agents(samples, joined["future"].shape[1])
    for name in ("drivable", "boundaries"):
        if getattr(truths[0], name) is not None:
            joined[name] = tuple(value for truth in truths for value in getattr(truth, name))
    if truths[0].lidar is not None:
        joined["lidar"] = LidarWays(
            *(
                np.concatenate([getattr(truth.lidar, f.name) for truth in truths])
                for f in dataclasses.fields(LidarWays)
            )
        )
    return DrivingTruth(**joined)
