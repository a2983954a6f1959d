"""Open-loop planning with pruned tokens: the paper's table, its controls, and what is certain.

    fastdrive eval-planning --out runs/eval
    fastdrive eval-planning --out runs/six --benchmark.cameras six --benchmark.vla six.safetensors

Without more said, the tiny benchmark of `planning_benchmark`: 2,004 unseen frames of the synthetic
world. For a driving VLA of your own on nuScenes see `plan_checkpoint`:

    fastdrive eval-planning --out runs/vla --qwen.checkpoint DIR --qwen.shards DIR --qwen.root NUSC

OUT gets planning.json, .csv, .md, report.html with pictures/, and the plans of each setting: run
again after an interruption it goes on, and more methods, ratios or trainings may be asked for then.
Several hosts share the work with `--parts 4 --part 0..3` and one OUT on a file system that all see;
the hosts of a TPU pod divide the samples of a checkpoint by themselves.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax

from experiments.drives import check_methods
from experiments.measure_planning import measure
from experiments.plan_checkpoint import CheckpointConfig, checkpoint_case
from experiments.planned import Case, Part, plan_part, read_planned
from experiments.planning_benchmark import BenchmarkConfig, benchmark_case, prepare_benchmark
from experiments.report_planning import write_results
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.protocols import PROTOCOLS
from fastdrive_jax.files import read_json, write_json
from fastdrive_jax.pruning import PRUNERS
from fastdrive_jax.training.run_config import check_run_folder, claim_run_folder

RATIOS = (0.75, 0.5, 0.25)
READY = "ready.json"


@dataclass(frozen=True)
class EvalPlanningArgs:
    """Evaluate planning with pruned tokens.

    Attributes:
        out: Folder for all outputs.
        methods: Names, or FILE.py:FUNCTION for your own.
        ratios: Keep ratios.
        benchmark: The tiny benchmark; not used with a checkpoint.
        qwen: A Qwen2.5-VL driving VLA instead.
        draws: Draws of methods that use random numbers.
        scenes: Benchmark scenes planned at once.
        protocols: Protocols for collisions and intersections; those for which the data has no
            ground truth are skipped and listed.
        pictures: Samples shown in the report.
        parts: Processes that share the scenes.
        part: Index of this process, from 0.
        wait_minutes: How long other parts wait for part 0 to prepare the benchmark.
        quiet: No progress bars.
    """

    out: Path = Path("runs/eval_planning")
    methods: tuple[str, ...] = tuple(PRUNERS)
    ratios: tuple[float, ...] = RATIOS
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    qwen: CheckpointConfig = field(default_factory=CheckpointConfig)
    draws: int = 5
    scenes: int = 167
    protocols: tuple[str, ...] = tuple(PROTOCOLS)
    pictures: int = 6
    parts: int = 1
    part: int = 0
    wait_minutes: float = 60
    quiet: bool = False

    def __post_init__(self):
        check_methods(self.methods, self.ratios)
        if unknown := sorted(set(self.protocols) - set(PROTOCOLS)):
            raise UserError(f"protocols {unknown} are unknown; there are {', '.join(PROTOCOLS)}.")
        if min(self.draws, self.scenes) < 1 or self.pictures < 0:
            raise UserError(
                f"draws={self.draws} and scenes={self.scenes} must be at least 1, "
                f"pictures={self.pictures} at least 0."
            )
        Part(self.part, self.parts)


def eval_planning(args: EvalPlanningArgs) -> Path | None:
    """Plans, and measures if all parts are there; returns the path of the report, or None."""
    part = Part(args.part, args.parts)
    if args.parts == 1 and jax.process_count() > 1:
        part = Part(jax.process_index(), jax.process_count())
    case = prepare(args, part)
    plans = args.out / "plans"
    plan_part(case, plans, part, args.quiet)
    found = {}
    for setting in case.settings:
        planned = read_planned(plans, setting, part, case.truth.token.tolist(), case.point)
        if planned is None:
            print(f"part {part.index} is done; the last of {part.count} parts writes the report")
            return None
        found.setdefault((setting.method, setting.ratio), []).append((setting.seed, planned))
    results = measure(case, found, args.protocols)
    return write_results(args.out, case, results, args.pictures)


def prepare(args: EvalPlanningArgs, part: Part) -> Case:
    """The case; one process makes what is not there yet, and the others wait for it."""
    if args.qwen.checkpoint is not None:
        same = ("batch_size", "fsdp", "tensor", "pruners")  # more of these may come
        check_run_folder(args.out, args.qwen, ignore=same)
        case = checkpoint_case(args.qwen, args.methods, args.ratios, args.draws, args.quiet)
        claim_run_folder(args.out, args.qwen, ignore=same)  # not before all was found
        return case
    if jax.process_count() > 1:
        raise UserError(
            f"These {jax.process_count()} processes are one job, and the benchmark is trained by "
            "one: start it on hosts by themselves, with --parts and --part."
        )
    ready = args.out / READY
    if part.index == 0:
        claim_run_folder(args.out, args.benchmark, ignore=("seeds",))
    else:
        deadline = time.monotonic() + 60 * args.wait_minutes
        while not _is_ready(ready, args.benchmark.seeds):
            if time.monotonic() > deadline:
                raise UserError(
                    f"Part 0 did not prepare {args.out} within {args.wait_minutes:g} minutes; "
                    "start it on the same folder."
                )
            time.sleep(1)
    bench = prepare_benchmark(args.out, args.benchmark, args.quiet)
    if part.index == 0:
        write_json(ready, {"frames": len(bench.truth), "seeds": args.benchmark.seeds})
    return benchmark_case(bench, args.methods, args.ratios, args.draws, args.scenes)


def _is_ready(path: Path, seeds: Sequence[int]) -> bool:
    return path.exists() and set(seeds) <= set(read_json(path).get("seeds", ()))
