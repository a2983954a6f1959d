"""Every method at every ratio on the same drives: what it keeps, how it plans, what it costs.

    fastdrive compare-pruners --out runs/compare --quickstart.out runs/quickstart

The driving VLA that comes with the package plans unseen scenes of the synthetic world, frame after
frame, so that temporal methods have a past. What a quick start left in its folder is taken, and
made if it is not there. Writes OUT/compare.json and OUT/compare.md; plans stay in OUT/plans, and a
run that goes on does not plan again what is there.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.camera_budgets import EACH, SHARED, budget_rows
from experiments.drives import (
    UNPRUNED,
    Drives,
    Trained,
    check_methods,
    drive,
    drives_from,
    frame_of,
    is_drawn,
    label,
    method_of,
    step,
)
from experiments.efficiency_counts import added_flops
from experiments.planned import Part, Planned, Setting, read_planned, write_planned
from experiments.planning import HEADLINE, mean_errors, planning_split
from experiments.quickstart import RANDOM_DRAWS, RATIOS, QuickstartConfig, WorldRun, prepare
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.bootstrap import reach
from fastdrive_jax.evaluation.compare import DIFFERENCE, HOLM, difference_rows, holm_rows
from fastdrive_jax.evaluation.foreground import foreground_rows
from fastdrive_jax.evaluation.markdown import kept_share, markdown_table
from fastdrive_jax.evaluation.planning import (
    PlanningErrors,
    planning_errors,
    planning_metrics,
    planning_rows,
)
from fastdrive_jax.evaluation.results import Row, point, write_rows
from fastdrive_jax.files import write_text
from fastdrive_jax.inference.policy import DrivingPolicy, start_state
from fastdrive_jax.models.dinov2.weights import params_digest
from fastdrive_jax.pruning import PRUNERS, builds_on_recon
from fastdrive_jax.pruning.accounting import frame_cost
from fastdrive_jax.pruning.interface import cut_plan
from fastdrive_jax.pruning.mistakes import MethodError
from fastdrive_jax.training.run_config import claim_run_folder

OURS = "reconpruner"
BUDGETED = (OURS, "prior")  # measured with one budget for all cameras and one for each
WHAT = ("foreground", "object")
TEXT_TOKENS = 6  # around the picture: two marks before, one behind, and the prompt


@dataclass(frozen=True)
class ComparePrunersArgs:
    """Compare methods on drives of the synthetic world.

    Attributes:
        out: Folder of the results.
        quickstart: The world, and the ReconPruner trained on it.
        methods: Names, or FILE.py:FUNCTION for your own; by default all methods of the library.
        ratios: Keep ratios.
        split: "val" has unseen scenes; use "train" to choose settings.
        scenes: Scenes planned at once.
        rounds: Timing rounds, in which all methods take turns.
    """

    out: Path = Path("runs/compare")
    quickstart: QuickstartConfig = field(default_factory=QuickstartConfig)
    methods: tuple[str, ...] = tuple(PRUNERS)
    ratios: tuple[float, ...] = RATIOS
    split: Literal["val", "train"] = "val"
    scenes: int = 60
    rounds: int = 7

    def __post_init__(self):
        check_methods(self.methods, self.ratios)
        if self.scenes < 1 or self.rounds < 1:
            raise UserError(f"scenes={self.scenes} and rounds={self.rounds} must be at least 1.")


def compare_pruners(args: ComparePrunersArgs) -> Path:
    """Drives, measures and writes; returns the path of the rows."""
    config = args.quickstart
    world = prepare(config, lambda stage, text: None if config.quiet else print(text, flush=True))
    drives = drives_of(world, args.split)
    claim(args, world)
    rows, failed = measure(world, drives, args)
    for name in BUDGETED:
        given = *method_of(name, trained_of(world)), world.val, world.shards.classes, args.ratios
        rows += budget_rows(name, *given)
    meta = {
        "device": str(jax.devices()[0]),
        "split": args.split,
        "scenes": len(drives.frames),
        "frames": drives.frames.shape[1],
        "visual_tokens": world.model.config.visual_tokens,
        "layers": world.model.config.text.num_layers,
        "frames_timed_at_once": min(args.scenes, len(drives.frames)),
    }
    write_text(args.out / "compare.md", markdown(rows, args, meta["scenes"]))
    path = write_rows(args.out / "compare.json", rows, {**meta, "failed": failed})
    if failed:
        raise UserError(f"{path} lacks {len(failed)} of the settings, which failed: {failed[0]}")
    return path


def claim(args: ComparePrunersArgs, world: WorldRun) -> None:
    """Refuses a folder with plans of other weights or pictures; methods and ratios may be added."""
    own = {"vla": world.params, "pruner": world.trained["pruner"]}
    shards = {"train": world.shards.digest, "val": world.planned.digest}
    made_from = {"weights": params_digest(own), "shards": shards}
    claim_run_folder(args.out, {"split": args.split, "scenes": args.scenes, **made_from})


def drives_of(world: WorldRun, split: Literal["val", "train"]) -> Drives:
    """The planned scenes of a quick start, or those of its training."""
    shards, pictures = (
        (world.planned, world.front) if split == "val" else (world.shards, world.train)
    )
    data = planning_split(shards, split, pictures, world.model.config.image_size)
    return drives_from(data, shards.classes)


def trained_of(world: WorldRun) -> Trained:
    """What a quick start trained."""
    return Trained(world.run.recon.pruner, world.trained["pruner"], world.prior)


def measure(
    world: WorldRun, drives: Drives, args: ComparePrunersArgs
) -> tuple[list[Row], list[str]]:
    """Rows of all methods, and of the unpruned model, each compared with ReconPruner.

    Returns:
        The rows, and what is wrong with methods that failed, which have none.
    """
    jobs = [(name, ratio) for ratio in args.ratios for name in args.methods]
    # Methods of one's own come first: a mistake in one shows before minutes of others.
    jobs = [(UNPRUNED, 1.0), *sorted(jobs, key=lambda job: job[0] in PRUNERS)]
    rows: list[Row] = []
    failed: list[str] = []
    samples, programs = {}, {}
    for name, ratio in tqdm(jobs, desc="drives", unit="setting", disable=args.quickstart.quiet):
        pruner, weights = method_of(name, trained_of(world))
        policy = DrivingPolicy(world.model, pruner, ratio)
        program = policy, {"vla": world.params, "pruner": weights}
        try:
            errors, own = _driven(*program, name, drives, args)
        except MethodError as error:
            tqdm.write(f"fastdrive: {error}", file=sys.stderr)
            failed.append(str(error))
            continue
        programs[label(name), ratio] = program
        samples[label(name), ratio] = planning_metrics(errors)[HEADLINE]
        used = drives.data.scene[errors.used]
        rows += own
    for ratio in args.ratios:
        if (OURS, ratio) in samples:
            ours = OURS, samples[OURS, ratio]
            others = [(name, x) for (name, r), x in samples.items() if r == ratio and name != OURS]
            found = [
                difference_rows(HEADLINE, ratio, *ours, *other, used, unit="m") for other in others
            ]
            rows += [row for pair in found for row in pair]
            rows += holm_rows([p for _, p in found])
    return rows + timing_rows(programs, drives, args), failed


def _driven(
    policy: DrivingPolicy, params: dict, name: str, drives: Drives, args: ComparePrunersArgs
) -> tuple[PlanningErrors, list[Row]]:
    """Errors of one method at one ratio, and the rows that need no other."""
    data, ratio, drawn = drives.data, policy.keep_ratio, is_drawn(name)
    draws = range(RANDOM_DRAWS) if drawn else (None,)
    settings = [Setting(label(name), ratio, seed, name) for seed in draws]
    runs = [_planned(policy, params, setting, drives, args) for setting in settings]
    errors = mean_errors(
        [planning_errors(run.waypoints, data.future, data.future_valid) for run in runs]
    )
    trained = name != UNPRUNED and builds_on_recon(name)
    seed = 0 if drawn else args.quickstart.pruner.seed if trained else None
    return errors, [
        *planning_rows(label(name), ratio, errors, data.scene),
        *foreground_rows(label(name), ratio, drives.areas, runs[0].kept, data.scene, seed),
        *cost_rows(policy, params["pruner"], name),
    ]


def _planned(
    policy: DrivingPolicy, params: dict, setting: Setting, drives: Drives, args: ComparePrunersArgs
) -> Planned:
    """Plans of all samples; those of an earlier run if it left them."""
    names = [str(row) for row in range(len(drives.data.scene))]
    folder, whole = args.out / "plans", Part()
    found = read_planned(folder, setting, whole, names)
    if found is None:
        waypoints, kept = drive(policy, params, drives, args.scenes, setting.seed or 0)
        found = Planned(waypoints, kept, np.ones(len(names), bool))
        write_planned(whole.path(folder, setting), names, found)
    return found


def timing_rows(programs: dict, drives: Drives, args: ComparePrunersArgs) -> list[Row]:
    """Median milliseconds a frame of the whole policy, all settings in turn, beside unpruned."""
    count = min(args.scenes, len(drives.frames))
    given = jax.device_put(frame_of(drives, drives.frames[:count, 0], cached=False))
    spent: dict = {name: [] for name in programs}
    # As in the middle of a drive: a first frame may cost more.
    states = {name: start_state(policy, count) for name, (policy, _) in programs.items()}
    rng, names = np.random.default_rng(0), list(programs)
    for number in range(args.rounds + 1):
        rng.shuffle(names)  # what ran before leaves caches and threads behind
        for name in names:
            policy, params = programs[name]
            begin = time.perf_counter()
            planned = step(policy, params, *given, jax.random.key(0), states[name])
            jax.block_until_ready(planned)
            states[name] = planned.state
            if number:
                spent[name].append(1e3 * (time.perf_counter() - begin) / count)
    unpruned = np.array(spent[UNPRUNED, 1.0])
    rows = []
    for (name, ratio), values in spent.items():
        for metric, found, unit in (
            ("frame_ms", np.array(values), "ms"),
            ("frame_share", np.array(values) / unpruned, ""),
        ):
            low, high = np.percentile(found, [25, 75])
            value = float(np.median(found))
            rows.append(Row(name, ratio, metric, value, low, high, args.rounds, None, unit))
    return rows


def cost_rows(policy: DrivingPolicy, weights: Any, name: str) -> list[Row]:
    """Counts of a frame's prefill, and of the method's own work by its traced programs."""
    config, pruner, ratio = policy.model.config, policy.pruner, policy.keep_ratio
    n, text = config.visual_tokens, TEXT_TOKENS
    plan = cut_plan(pruner, n, ratio, config.text.num_layers)
    own = 0.0 if name == UNPRUNED else added_flops(policy, weights, text, jnp.float32)
    steps = config.vocabulary.plan_length
    cost = frame_cost(
        config.text,
        n,
        text,
        plan,
        decode_steps=steps,
        method_flops=own,
        reuse=pruner.reuse,
    )
    found = {
        "prefill_gflop": ((cost.prefill_flops + cost.method_flops) / 1e9, "GFLOP"),
        "equivalent_tokens": (cost.equivalent_tokens, ""),
        "kv_kib": (cost.kv_bytes / 1024, "KiB"),
    }
    return [
        point(label(name), ratio, metric, value, unit=unit)
        for metric, (value, unit) in found.items()
    ]


COLUMNS = (
    ("foreground_recall", "foreground recall, %", 100, 1),
    ("object_recall", "object recall, %", 100, 1),
    (HEADLINE, "L2, mean of six, m", 1, 3),
    (HEADLINE + DIFFERENCE, "ReconPruner minus it, m", 1, 3),
    (HEADLINE + HOLM, "p, Holm", 1, 3),
    ("equivalent_tokens", "tokens, mean over layers", 1, 1),
    ("prefill_gflop", "prefill and method, GFLOP", 1, 3),
    ("frame_share", "frame time / unpruned", 1, 2),
)


def markdown(rows: Sequence[Row], args: ComparePrunersArgs, scenes: int) -> str:
    """The tables, methods of a ratio from the smallest planning error on."""
    cells = {(row.method, row.keep_ratio, row.metric): row for row in rows}

    def line(name: str, ratio: float) -> list[str]:
        found = []
        for metric, _, scale, digits in COLUMNS:
            method = f"{OURS} - {name}" if metric.endswith((DIFFERENCE, HOLM)) else name
            row = cells.get((method, ratio, metric))
            absent = "failed" if metric == HEADLINE else ""
            found.append(absent if row is None else _cell(row, scale, digits))
        return [kept_share(ratio), name, *found]

    lines = [line(UNPRUNED, 1.0)]
    for ratio in args.ratios:
        found = {name: cells.get((name, ratio, HEADLINE)) for name in map(label, args.methods)}
        error = {name: math.inf if row is None else row.value for name, row in found.items()}
        lines += [line(name, ratio) for name in sorted(error, key=error.get)]
    budgets = []
    for ratio in args.ratios:
        for name, kind in ((name, kind) for name in BUDGETED for kind in (SHARED, EACH)):
            found = (cells[f"{name}, {kind}", ratio, f"{what}_recall"] for what in WHAT)
            recalls = (_cell(row, 100, 1) for row in found)
            budgets.append([kept_share(ratio), name, kind, *recalls])
    text = markdown_table(["kept", "method", *(column[1] for column in COLUMNS)], lines)
    heads = "kept", "method", "budget", "foreground recall, %", "object recall, %"
    said = f"{reach(scenes)} Holm's correction is over the methods at one ratio."
    return "\n".join([*text, "", said, "", *markdown_table(heads, budgets)]) + "\n"


def _cell(row: Row, scale: float, digits: int) -> str:
    text = f"{scale * row.value:.{digits}f}"
    if row.low is None or row.metric == "frame_share":
        return text
    return f"{text} [{scale * row.low:.{digits}f}, {scale * row.high:.{digits}f}]"
