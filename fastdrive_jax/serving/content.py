"""What a plan's answer says, as JSON."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig
from fastdrive_jax.serving.jobs import Answer

STEP_SECONDS = 0.5  # between waypoints, see `inference.policy.Plan`


def plan_content(
    model: DrivingConfig, drive: str | None, answer: Answer, times: Mapping[str, float]
) -> dict[str, Any]:
    """The JSON of a plan.

    Args:
        model: Config of the driving model.
        drive: Its name; None without one.
        answer: Of the worker.
        times: Milliseconds of stages.
    """
    planned, budget = answer.planned, answer.budget
    steps = len(planned.waypoints)
    memory = "none"
    if drive is not None and planned.memory is not None:
        memory = "kept" if planned.remembered else "new"
    return {
        "waypoints": [[round(float(v), 3) for v in point] for point in planned.waypoints],
        "times": [STEP_SECONDS * (step + 1) for step in range(steps)],
        "kept": kept_by_camera(model, planned.kept),
        "keep_ratio": budget.keep_ratio,
        "kept_tokens": len(planned.kept),
        "visual_tokens": model.visual_tokens,
        "drive": drive,
        "frame": answer.frame,
        "memory": memory,
        "target_ms": budget.target_ms,
        "target_met": budget.target_ms and times["total"] <= budget.target_ms,
        "timings_ms": {stage: round(spent, 3) for stage, spent in times.items()},
        "batch": answer.batch,
        "notes": list(answer.notes),
    }


def kept_by_camera(model: DrivingConfig, kept: np.ndarray) -> dict[str, list[list[int]]]:
    """Row and column of each kept token, by camera."""
    rows, columns = model.token_grid
    each = rows * columns
    return {
        name: [
            list(divmod(int(place) - each * number, columns))
            for place in kept
            if number == place // each
        ]
        for number, name in enumerate(model.cameras)
    }
