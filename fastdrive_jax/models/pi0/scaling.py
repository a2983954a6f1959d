"""How pi0's states and actions are scaled: every published form is one straight line a number.

pi0 scales by mean and standard deviation; checkpoints of lerobot that say so, by percentiles or by
the ends of the range. openpi adds a small number to the width in
both directions, lerobot only on the way in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

OPENPI_EPS, LEROBOT_EPS = 1e-6, 1e-8


@dataclass(frozen=True)
class Scaling:
    """Of the numbers of a state or an action, each with its own.

    Attributes:
        offset: What becomes 0.
        divisor: Of the difference to it, on the way in.
        factor: Of what the model says, on the way out.
    """

    offset: tuple[float, ...]
    divisor: tuple[float, ...]
    factor: tuple[float, ...]

    def first(self, count: int) -> "Scaling":
        """That of the first numbers alone."""
        return Scaling(self.offset[:count], self.divisor[:count], self.factor[:count])


@dataclass(frozen=True)
class RobotStatistics:
    """What a checkpoint's data were scaled by.

    Attributes:
        state: Of the robot's states.
        action: Of its actions.
    """

    state: Scaling
    action: Scaling


def scale(values: Float[np.ndarray, "... A"], scaling: Scaling) -> Float[np.ndarray, "... A"]:
    """Numbers of a robot as the model is shown them, float32."""
    # A number that hardly changes is magnified, so what it is compared with must be exact.
    exact = np.asarray(values, np.float64) - scaling.offset
    return (exact / scaling.divisor).astype(np.float32)


def unscale(values: Float[np.ndarray, "... A"], scaling: Scaling) -> Float[np.ndarray, "... A"]:
    """What the model says, in the robot's units, float32."""
    return (np.asarray(values, np.float64) * scaling.factor + scaling.offset).astype(np.float32)


def by_deviation(
    mean: Sequence[float], std: Sequence[float], eps: float, eps_out: float
) -> Scaling:
    """Mean to 0, a standard deviation to 1.

    Args:
        mean: Of the training data.
        std: Of them.
        eps: Is added to a deviation on the way in.
        eps_out: On the way out.
    """
    return Scaling(
        tuple(mean), tuple(one + eps for one in std), tuple(one + eps_out for one in std)
    )


def by_range(low: Sequence[float], high: Sequence[float], eps: float) -> Scaling:
    """An interval to [-1, 1]; what lies outside is not clipped.

    Args:
        low: Becomes -1.
        high: Becomes 1.
        eps: The width of an empty interval.
    """
    widths = [b - a for a, b in zip(low, high, strict=True)]
    halves = tuple((w or eps) / 2 for w in widths)
    return Scaling(tuple(a + h for a, h in zip(low, halves, strict=True)), halves, halves)


def unscaled(count: int) -> Scaling:
    """Of numbers that are shown as they are."""
    return Scaling((0.0,) * count, (1.0,) * count, (1.0,) * count)
