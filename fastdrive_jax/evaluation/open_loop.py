"""Collisions and leaving the road of open-loop plans, in the public protocols.

The distances, which the protocols share but for their average, are in `planning`.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.collisions import collisions
from fastdrive_jax.evaluation.intersections import intersections
from fastdrive_jax.evaluation.planning import HORIZONS
from fastdrive_jax.evaluation.protocols import STEPS, Protocol, averaged
from fastdrive_jax.evaluation.truth import DrivingTruth


@dataclasses.dataclass(frozen=True)
class ProtocolMetrics:
    """What a protocol finds in the M samples that count.

    Attributes:
      values: [M] shares by metric name: `collision_NAME_1s`, `_2s`, `_3s` and `collision_NAME`,
        their mean, and the same with `intersection` where the protocol has it.
      used: [S] bool, which of the given samples these are.
    """

    values: dict[str, np.ndarray]
    used: np.ndarray


def protocol_metrics(
    protocol: Protocol,
    planned: Float[np.ndarray, "S T 2"],
    truth: DrivingTruth,
    read: Bool[np.ndarray, " S"] | None = None,
    driven: Bool[np.ndarray, "S T"] | None = None,
) -> ProtocolMetrics:
    """Collisions and, where the protocol has it, intersections of plans.

    As in all these evaluators, a sample counts only if its whole future is known, and a step at
    which the car's box on the true way collides does not count as the plan's collision.

    Args:
      protocol: one of `protocols.PROTOCOLS`.
      planned: waypoints every 0.5 s, places of the ego origin in the present ego frame, metres.
      truth: of the same samples.
      read: whether the model's answer could be read; None where all could. Of one that could not,
        "impromptu" scores a plan of zeros and "omnidrive" leaves the sample out.
      driven: `collisions` of the true way, for callers that measure many plans; None finds them.

    Raises:
      ValueError: shapes differ, T is shorter than 3 s, or a plan that counts is not finite.
      UserError: no sample counts, or the truth lacks what the protocol needs.
    """
    planned = np.asarray(planned, np.float64)
    if planned.shape != truth.future.shape:
        raise ValueError(f"planned {planned.shape} and future {truth.future.shape} must be alike")
    if planned.shape[1] < STEPS[-1]:
        raise ValueError(f"{planned.shape[1]} steps are shorter than {HORIZONS[-1]} s")
    used = np.asarray(truth.future_valid, bool).all(1)
    if read is not None:
        read = np.asarray(read, bool)
        if read.shape != used.shape:
            raise ValueError(f"read {read.shape} must be [S] = {used.shape}")
        if protocol.unread == "skip":
            used = used & read
        else:
            planned = np.where(read[:, None, None], planned, 0.0)
    if not used.any():
        raise UserError(
            f"none of the {len(used)} samples counts for {protocol.name}: it needs "
            f"{planned.shape[1]} valid future steps and an answer that can be read."
        )
    if not np.isfinite(planned[used]).all():
        raise ValueError(
            "a planned waypoint is not finite; say which answers could not be read by `read`"
        )
    truth = truth if used.all() else truth.take(used)
    planned = planned[used]
    own = collisions(protocol, truth.future, truth) if driven is None else driven[used]
    hits = collisions(protocol, planned, truth) & ~own
    values = _named("collision", protocol, hits)
    if protocol.intersection is not None:
        values |= _named("intersection", protocol, intersections(protocol, planned, truth))
    return ProtocolMetrics(values, used)


def _named(kind: str, protocol: Protocol, hits: np.ndarray) -> dict[str, np.ndarray]:
    table = averaged(protocol.average, hits)
    name = f"{kind}_{protocol.name}"
    found = {f"{name}_{t}s": table[:, i] for i, t in enumerate(HORIZONS)}
    return found | {name: table.mean(1)}
