"""The planning error of a VLA whose tokens were pruned by each method, at each keep ratio."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from data_pipelines.features import SplitFeatures
from data_pipelines.loader import LoaderConfig, make_loader
from data_pipelines.shards import Shards
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.compare import difference_rows
from fastdrive_jax.evaluation.planning import (
    PlanningErrors,
    planning_errors,
    planning_metrics,
    planning_rows,
)
from fastdrive_jax.evaluation.results import Row
from fastdrive_jax.inference.generate import generate
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA, visual_positions
from fastdrive_jax.pruning.select import gather_position_ids, gather_tokens, num_keep, top_k

HEADLINE = "ade"  # mean over the six waypoints, which the intervals and comparisons are about


@dataclass(frozen=True)
class PlanningSplit:
    """Samples of a split as a VLA sees them, their visual tokens computed once.

    Attributes:
        tokens: [S, N, D] of all its cameras, perhaps as stored, float16 on the disk.
        images: uint8 [S, C, H, W, 3].
        labels: uint8 [S, C, H, W].
        speed: [S] metres per second.
        ego_state: [S, 3] speed, acceleration, yaw rate.
        command: [S].
        future: [S, T, 2] metres.
        future_valid: [S, T].
        history: [S, T, 2] metres, the oldest place first.
        history_valid: [S, T].
        scene: [S].
    """

    tokens: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    speed: np.ndarray
    ego_state: np.ndarray
    command: np.ndarray
    future: np.ndarray
    future_valid: np.ndarray
    history: np.ndarray
    history_valid: np.ndarray
    scene: np.ndarray


def planning_split(
    shards: Shards,
    split: str,
    features: SplitFeatures,
    image_size: tuple[int, int],
    cameras: tuple[str, ...] = ("CAM_FRONT",),
) -> PlanningSplit:
    """Joins the features of a VLA's pictures with the plans of their samples, in record order.

    Raises:
        UserError: The shards lack one of the cameras.
    """
    if missing := [name for name in cameras if name not in shards.cameras]:
        raise UserError(
            f"{shards.path} has no pictures of {', '.join(missing)}, through which the VLA looks; "
            "write shards with that camera."
        )
    config = LoaderConfig(
        batch_size=64,
        image_size=image_size,
        cameras=cameras,
        group="sample",
        shuffle=False,
        num_epochs=1,
        remainder="keep",
        fields=(
            *("speed", "ego_state", "command", "future", "future_valid"),
            *("history", "history_valid", "scene"),
        ),
    )
    parts: dict[str, list] = {}
    for batch in make_loader(shards, split, config):
        for name in config.fields:
            parts.setdefault(name, []).append(batch[name])
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    count, stored = len(joined["speed"]), len(shards.cameras)
    if len(features.tokens) != count * stored:
        raise ValueError(f"{len(features.tokens)} pictures but {count} samples of {stored}")
    chosen = [shards.cameras.index(name) for name in cameras]

    def pictures(array):
        array = array.reshape(count, stored, *array.shape[1:])
        # Arrays on the disk stay there where nothing is left out.
        return array if chosen == list(range(stored)) else np.asarray(array[:, chosen])

    tokens = pictures(features.tokens)
    return PlanningSplit(
        tokens=tokens.reshape(count, -1, tokens.shape[-1]),
        images=pictures(features.images),
        labels=pictures(features.labels),
        **joined,
    )


def plan_split(
    model: DrivingVLA, params: dict, data: PlanningSplit, kept: np.ndarray, batch_size: int = 60
) -> np.ndarray:
    """Waypoints [S, T, 2] from the kept tokens [S, K]; K = 0 plans without a picture."""
    count = len(data.speed)
    plans = []
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size).clip(max=count - 1)  # one compiled shape
        plans.append(
            _plan(
                model,
                params,
                np.asarray(data.tokens[rows], np.float32),
                kept[rows],
                data.speed[rows],
                data.command[rows],
            )
        )
    return np.concatenate([np.asarray(part) for part in plans])[:count]


@jax.jit(static_argnums=0)
def _plan(model, params, tokens, kept, speed, command):
    where = gather_position_ids(visual_positions(model.config, len(tokens)), kept)
    prompt = model.config.vocabulary.prompt(speed, command)
    return generate(model, {"params": params}, gather_tokens(tokens, kept), where, prompt)


def planning_table(
    model: DrivingVLA,
    params: dict,
    data: PlanningSplit,
    scores: Mapping[str, Sequence[np.ndarray]],
    ratios: Sequence[float],
    ours: str = "reconpruner",
    quiet: bool = False,
) -> tuple[list[Row], dict[tuple[str, float | None], np.ndarray]]:
    """Errors of each method at each ratio, with intervals over scenes, and paired differences.

    Args:
        model: The VLA.
        params: Its parameters, never retrained.
        data: Samples.
        scores: Method to one or more draws of token scores [S, N]; the errors of several draws
            (random) are averaged sample by sample.
        ratios: Keep ratios below 1.
        ours: Method that all others are compared with.
        quiet: No progress bar.

    Returns:
        Rows (the unpruned model is the method "unpruned" at ratio 1, the one without a picture
        "no_image" at no ratio), and one plan [S, T, 2] of each for pictures.
    """
    count, tokens = data.tokens.shape[:2]
    everything = np.broadcast_to(np.arange(tokens, dtype=np.int32), (count, tokens))
    jobs: list[tuple[str, float | None, list[np.ndarray]]] = [
        ("unpruned", 1.0, [everything]),
        ("no_image", None, [everything[:, :0]]),
    ]
    for ratio in ratios:
        k = num_keep(tokens, ratio)
        for name, draws in scores.items():
            jobs.append((name, ratio, [np.asarray(top_k(jnp.asarray(s), k)) for s in draws]))
    rows: list[Row] = []
    plans: dict[tuple[str, float | None], np.ndarray] = {}
    samples: dict[tuple[str, float | None], np.ndarray] = {}
    for name, ratio, draws in tqdm(jobs, desc="planning", unit="setting", disable=quiet):
        planned = [plan_split(model, params, data, kept) for kept in draws]
        errors = [planning_errors(p, data.future, data.future_valid) for p in planned]
        used = data.scene[errors[0].used]
        plans[name, ratio] = planned[0]
        samples[name, ratio] = np.mean([planning_metrics(e)[HEADLINE] for e in errors], axis=0)
        mean = errors[0] if len(errors) == 1 else mean_errors(errors)
        rows += planning_rows(name, ratio, mean, data.scene)
    for ratio in ratios:
        for name in scores:
            if name != ours:
                pair = (ours, samples[ours, ratio], name, samples[name, ratio])
                rows += difference_rows(HEADLINE, ratio, *pair, used, unit="m")
    return rows, plans


def mean_errors(errors: Sequence[PlanningErrors]) -> PlanningErrors:
    """The errors of several draws of one method, averaged sample by sample."""
    first = errors[0]
    names = ("temavg", "noavg", "ade", "fde")
    means = {name: np.mean([getattr(e, name) for e in errors], axis=0) for name in names}
    return type(first)(used=first.used, **means)
