"""Which checkpoint of a run is the best, and which ones stay."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from orbax.checkpoint import checkpoint_managers

from fastdrive_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Best:
    """By which evaluation metric the best checkpoint is known.

    Attributes:
        metric: its name.
        mode: whether the least or the greatest is best; of equals that were saved, the later.
    """

    metric: str
    mode: Literal["min", "max"] = "min"

    def __post_init__(self):
        if self.mode not in ("min", "max"):
            raise UserError(f"mode of the best {self.metric} must be min or max, not {self.mode}.")

    def value(self, metrics: Mapping[str, float]) -> float:
        """The metric in a set of evaluation metrics.

        Raises:
            UserError: it is not among them.
        """
        if self.metric not in metrics:
            raise UserError(
                f"The best checkpoint was to be known by {self.metric!r}, but the evaluation gives "
                f"{', '.join(sorted(metrics)) or 'nothing'}: name one of these."
            )
        return float(metrics[self.metric])

    def improves(self, value: float, before: float | None) -> bool:
        """Whether a value is better than the best before; one that is not finite never is."""
        if before is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < before if self.mode == "min" else value > before


def preservation(keep: int, best: Best | None) -> checkpoint_managers.PreservationPolicy:
    """Which checkpoints stay: the newest to go on from, and beside them the best to use."""
    newest = checkpoint_managers.LatestN(keep)
    if best is None:
        return newest
    one = checkpoint_managers.BestN(
        get_metric_fn=best.value,
        reverse=best.mode == "min",
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    return checkpoint_managers.AnyPreservationPolicy([newest, one])
