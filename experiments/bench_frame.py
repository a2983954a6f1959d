"""Time of one frame, stage by stage, at each keep ratio, in one run.

    fastdrive bench-frame --out runs/bench_frame

Stages are compiled apart, warmed up, run in turn and reported as medians; ratios between them
mean more than the milliseconds of one machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.pictures import check_picture, read_bytes
from experiments.configs.pruner import TINY
from experiments.frame_stages import (
    STAGES,
    Given,
    Setting,
    clock,
    compile_stages,
    preprocess,
    time_stages,
    trace_stages,
    unpruned,
    vision_stage,
)
from fastdrive_jax.configs import check_least
from fastdrive_jax.evaluation.results import Row, point, write_rows
from fastdrive_jax.inference.policy import DrivingPolicy, start_state
from fastdrive_jax.models.qwen2_5_vl.bundled import load_vla
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import Pruner
from fastdrive_jax.pruning.recon_pruner import recon_pruner
from fastdrive_jax.pruning.select import num_keep
from fastdrive_jax.training.reconstruction import init_params


def frame_times(
    model: DrivingVLA,
    params: dict,
    pruner: Pruner,
    pruner_params: dict | None,
    jpeg: bytes,
    ratios: Sequence[float],
    repeats: int = 30,
) -> tuple[dict[float, dict[str, float]], dict[float, float]]:
    """Median milliseconds of each stage at batch 1, and FLOPs of the compiled prefill.

    Args:
        model: The VLA, with one camera.
        params: Its parameters.
        pruner: Method to time.
        pruner_params: Its parameters.
        jpeg: One picture as it comes from the camera.
        ratios: Keep ratios; at 1 the pruner is left out.
        repeats: Timed rounds after three of warming up.

    Returns:
        {ratio: {stage: ms}} and {ratio: XLA's count of the prefill program}.
    """
    given = Given(
        model.config.vocabulary.prompt(jnp.array([5.0]), jnp.array([1])),
        jnp.zeros((1, model.config.visual_tokens)),
        jax.random.key(0),
    )
    encode = jax.jit(vision_stage, static_argnums=(0, 1))
    settings = {
        ratio: Setting(DrivingPolicy(model, pruner, ratio), pruner_params)
        if ratio < 1
        else unpruned(model)
        for ratio in ratios
    }
    spent = {ratio: {stage: [] for stage in STAGES} for ratio in ratios}
    size = model.config.image_size
    images = jnp.asarray(preprocess([jpeg], size))
    encoded = encode(model, pruner.needs, params, images)
    state = {ratio: start_state(setting.policy, 1) for ratio, setting in settings.items()}
    traced, known = {}, {}
    for ratio, setting in settings.items():
        inputs = setting, params, encoded, images, given, state[ratio]
        traced[ratio] = trace_stages(*inputs, known)
    programs = compile_stages(traced)
    flops = {ratio: float(programs[ratio]["prefill"].cost_analysis()["flops"]) for ratio in ratios}
    for round_number in range(repeats + 3):
        for ratio, setting in settings.items():
            times = {}
            images = jnp.asarray(clock(times, "preprocess", preprocess, [jpeg], size))
            encoded = clock(times, "vision", encode, model, pruner.needs, params, images)
            inputs = setting, params, encoded, images, given, state[ratio]
            more, planned = time_stages(programs[ratio], *inputs)
            state[ratio] = planned.state
            if round_number >= 3:
                for stage in STAGES:
                    spent[ratio][stage].append((times | more)[stage])
    medians = {
        ratio: {stage: float(np.median(values)) for stage, values in stages.items()}
        for ratio, stages in spent.items()
    }
    return medians, flops


def timing_rows(
    medians: dict[float, dict[str, float]], flops: dict[float, float], n: int
) -> list[Row]:
    """Milliseconds of each stage and of the frame, and GFLOP of the prefill, as rows."""
    rows = []
    for ratio, stages in medians.items():
        values = {**stages, "frame": sum(stages.values())}
        for stage, value in values.items():
            rows.append(point("reconpruner", ratio, f"{stage}_ms", value, n=n, unit="ms"))
        value = flops[ratio] / 1e9
        rows.append(point("reconpruner", ratio, "prefill_gflop", value, unit="GFLOP"))
    return rows


@dataclass(frozen=True)
class BenchFrameArgs:
    """Time the stages of a frame of the bundled VLA, with a ReconPruner of random weights.

    Attributes:
        image: A JPEG to plan from.
        out: Folder for frame.json.
        ratios: Keep ratios, compared in one run.
        repeats: Timed rounds.
    """

    image: Path
    out: Path = Path("runs/bench_frame")
    ratios: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    repeats: int = 50

    def __post_init__(self):
        for ratio in self.ratios:
            num_keep(1000, ratio)
        check_least(self, repeats=1)


def bench_frame(args: BenchFrameArgs) -> Path:
    """Times a ReconPruner of random weights: what its scores are does not change the time."""
    jpeg = read_bytes(args.image)
    check_picture(jpeg, args.image)
    model, params = load_vla()
    config = TINY.recon
    weights = init_params(config, jax.random.key(0))["pruner"]
    pruner = recon_pruner(config.pruner)
    times = frame_times(model, params, pruner, weights, jpeg, args.ratios, args.repeats)
    path = args.out / "frame.json"
    write_rows(path, timing_rows(*times, args.repeats), {"device": str(jax.devices()[0])})
    return path
