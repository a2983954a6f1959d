"""The pruned VLA drives: unseen routes of the synthetic world and, if there are any, recorded logs.

    fastdrive drive --out runs/drive --quickstart.out runs/quickstart --logs LOGS

What it plans is driven, and what it sees next follows from that, so errors add up as they do in a
car. Takes what a quick start left in its folder. Writes OUT/drive.json, OUT/drive.md and pictures;
a setting that is in OUT/drives already is not driven again. One setting on 100 routes of 10 s takes
1 to 1.5 minutes on 2 CPU cores.
"""

import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from data_pipelines.closed_loop.camera import FrontCameras
from data_pipelines.closed_loop.clean import clean_routes
from data_pipelines.closed_loop.events import judge
from data_pipelines.closed_loop.route import Route, log_routes
from data_pipelines.closed_loop.simulate import Drives, LoopConfig, simulate_batches
from experiments.drive_recovery import recovery_rows
from experiments.drive_report import draw_drives, markdown, rows_of
from experiments.drive_target import ratio_within
from experiments.drives import UNPRUNED, check_methods, is_drawn, label, own_file_sum
from experiments.driving_policies import CONTROLS, NO_IMAGE, driving_policy, frame_seconds
from experiments.quickstart import RATIOS, QuickstartConfig, WorldRun, prepare
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows, write_rows
from fastdrive_jax.export.manifest import file_sum
from fastdrive_jax.files import write_bytes, write_text
from fastdrive_jax.inference.latency import check_target
from fastdrive_jax.models.dinov2.weights import params_digest
from fastdrive_jax.training.run_config import claim_run_folder

RECOVERY = "drives/recovery.json"
Setting = tuple[str, float | None]  # method and keep ratio


@dataclass(frozen=True)
class DriveArgs:
    """Drive with pruned tokens in a closed loop.

    Attributes:
        out: Folder for the results.
        quickstart: The world, the VLA and the ReconPruner trained on it.
        methods: Names, or FILE.py:FUNCTION for your own; the controls are always driven.
        ratios: Keep ratios.
        routes: Number of routes in the synthetic world.
        first: Index of their first scene in the validation split; lower ones may have been planned
            in other measurements.
        seconds: Duration of a route in the synthetic world.
        logs: Folder of ScenarioNet logs scene-*.json.gz; by default the one under FASTDRIVE_SHARED,
            if it exists.
        log_seconds: Duration of a log.
        latency: Seconds from an image to its plan; not with `target_ms`, which sets it.
        latency_scale: If above 0, the latency is this factor times the measured seconds of a frame.
        target_ms: Drive each method at a single ratio, the largest of `ratios` at which a frame is
            planned within this time; plans arrive after that time.
        batch: Routes planned at once.
        seed: Seed of methods that draw random numbers, and of how the logs look.
        workers: Rendering processes; 0 uses the CPU count.
        pictures: Number of routes to plot.
    """

    out: Path = Path("runs/drive")
    quickstart: QuickstartConfig = field(default_factory=QuickstartConfig)
    methods: tuple[str, ...] = ("reconpruner", "random", "uniform", "prior", "ground_truth")
    ratios: tuple[float, ...] = RATIOS
    routes: int = 100
    first: int = 300
    seconds: float = 10.0
    logs: Path | None = None
    log_seconds: float = 16.0
    latency: float = 0.1
    latency_scale: float = 0.0
    target_ms: float | None = None
    batch: int = 50
    seed: int = 0
    workers: int = 0
    pictures: int = 4

    def __post_init__(self):
        check_methods(self.methods, self.ratios)
        check_least(self, routes=1, batch=1)
        for name in ("first", "latency_scale", "pictures", "workers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative.")
        if self.target_ms is not None:
            check_target(self.target_ms)
            if self.latency_scale or self.latency != DriveArgs.latency:
                name = "latency_scale" if self.latency_scale else "latency"
                raise UserError(f"target_ms and {name} both say how late plans are; give one.")
        for seconds in (self.seconds, self.log_seconds):
            LoopConfig(seconds=seconds, latency=self.latency)


def drive_closed_loop(args: DriveArgs) -> Path:
    """Drives, judges and writes; returns the path of the rows."""
    config = args.quickstart
    log_files(args)  # what is missing is said before minutes of work
    world = prepare(config, lambda stage, text: None if config.quiet else print(text, flush=True))
    claim(args, world)
    courses = courses_of(args)
    jobs = settings(args, world)
    found = drive_all(args, world, courses, jobs)
    verdicts = {
        setting: {
            kind: [judge(route, states) for route, states in zip(routes, part.states, strict=True)]
            for (kind, routes), part in zip(courses.items(), drives, strict=True)
        }
        for setting, (drives, _) in found.items()
    }
    latencies = {setting: latency for setting, (_, latency) in found.items()}
    timings = {setting: drives[0] for setting, (drives, _) in found.items()}
    drawn = {label(name) for name in args.methods if is_drawn(name)}
    seeds = {setting: args.seed if setting[0] in drawn else None for setting in found}
    rows = rows_of(courses, verdicts, latencies, timings, seeds)
    rows += read_rows(args.out / RECOVERY)[0]
    write_text(args.out / "drive.md", markdown(rows, courses, list(verdicts)))
    draw_drives(args.out / "pictures", args.pictures, courses, found, verdicts, image_size(world))
    meta = {
        "device": str(jax.devices()[0]),
        "routes": {kind: len(routes) for kind, routes in courses.items()},
        "seconds": {"world": args.seconds, "log": args.log_seconds},
        "latency": args.latency if args.target_ms is None else None,
        "latency_scale": args.latency_scale,
        "target_ms": args.target_ms,
        "batch": args.batch,
    }
    return write_rows(args.out / "drive.json", rows, meta)


def image_size(world: WorldRun) -> tuple[int, int]:
    """Height and width of what the VLA sees."""
    return world.model.config.image_size


def claim(args: DriveArgs, world: WorldRun) -> None:
    """Refuses a folder of other settings or other weights; methods and ratios may be added."""
    weights = params_digest({"vla": world.params, "pruner": world.trained["pruner"]})
    names = ("routes", "first", "seconds", "log_seconds", "latency", "latency_scale", "batch")
    kept = {name: getattr(args, name) for name in names} | {"seed": args.seed}
    if args.target_ms is not None:
        kept |= {"target_ms": args.target_ms, "ratios": args.ratios}
    logs = {file.name: file_sum(file) for file in log_files(args)}
    kept |= {"logs": logs, "world_seed": args.quickstart.world.seed}
    claim_run_folder(args.out, {"drive": kept, "weights": weights})


def log_files(args: DriveArgs) -> list[Path]:
    """The logs to drive.

    Raises:
        UserError: The folder that was named holds none.
    """
    folder = args.logs
    if folder is None:
        shared = os.environ.get("FASTDRIVE_SHARED")
        folder = Path(shared) / "data" / "nuscenes_mini_logs" if shared else None
    files = [] if folder is None else sorted(Path(folder).glob("scene-*.json*"))
    if args.logs is not None and not files:
        raise UserError(f"There is no log scene-*.json.gz in {args.logs}; name another folder.")
    return files


def courses_of(args: DriveArgs) -> dict[str, list[Route]]:
    """Routes by where they are from, "world" and, if there are any, "log"."""
    world = args.quickstart.world
    courses = {"world": clean_routes(world, "val", args.first, args.routes, args.seconds)}
    files = log_files(args)
    if files:
        courses["log"] = log_routes(files[0].parent, args.log_seconds, args.seed)
    elif not args.quickstart.quiet:
        print("No logs are driven: name their folder with --logs, or set FASTDRIVE_SHARED.")
    return courses


def settings(args: DriveArgs, world: WorldRun) -> dict[Setting, float]:
    """The controls, the unpruned model, then every method at its ratios; with their latencies."""
    controls: list[Setting] = [(name, None) for name in (*CONTROLS, NO_IMAGE)]
    if args.target_ms is None:
        methods = [(name, ratio) for ratio in args.ratios for name in args.methods]
        return dict.fromkeys([*controls, (UNPRUNED, 1.0), *methods], args.latency)
    jobs = dict.fromkeys(controls, args.target_ms / 1e3)
    for name, ratios in ((UNPRUNED, (1.0,)), *((name, args.ratios) for name in args.methods)):
        ratio, latency = ratio_within(args.out, world, name, ratios, args.target_ms, args.seed)
        jobs[name, ratio] = latency
    return jobs


def drive_all(
    args: DriveArgs,
    world: WorldRun,
    courses: dict[str, list[Route]],
    jobs: Mapping[Setting, float],
) -> dict[Setting, tuple[list[Drives], float]]:
    """Drives of each setting, one for each kind of route, and the latency that they had."""
    routes = [route for part in courses.values() for route in part]
    config = args.quickstart
    found = {}
    with FrontCameras(routes, image_size(world), args.workers) as cameras:
        for (name, ratio), latency in tqdm(
            jobs.items(), desc="drives", unit="setting", disable=config.quiet
        ):
            parts = [label(name), *([] if ratio is None else [f"{ratio:g}"]), *own_file_sum(name)]
            file = args.out / "drives" / f"{'_'.join(parts)}.npz"
            if not file.exists():
                policy = driving_policy(world, name, ratio, args.seed)
                if args.latency_scale and name not in CONTROLS:
                    tokens = world.model.config.visual_tokens
                    spent = frame_seconds(policy, image_size(world), tokens, 7)
                    latency = args.latency_scale * spent
                drives, first = [], 0
                for kind, part in courses.items():
                    seconds = args.log_seconds if kind == "log" else args.seconds
                    loop = LoopConfig(seconds=seconds, latency=latency)
                    batch = min(args.batch, args.routes)
                    drives.append(simulate_batches(part, policy, loop, cameras, batch, first))
                    first += len(part)
                write_drives(file, drives, latency)
            found[label(name), ratio] = read_drives(file)
        recovery, batch = args.out / RECOVERY, min(args.batch, args.routes)
        if not recovery.exists():
            policy = driving_policy(world, UNPRUNED, 1.0, args.seed)
            given = UNPRUNED, 1.0, policy, courses["world"], cameras, batch
            write_rows(recovery, recovery_rows(*given), {})
    return found


def write_drives(file: Path, drives: Sequence[Drives], latency: float) -> None:
    """Keeps the drives of a setting, whole or not at all."""
    arrays: dict[str, np.ndarray] = {"latency": np.array(latency), "parts": np.array(len(drives))}
    for number, part in enumerate(drives):
        for name in Drives.__dataclass_fields__:
            value = getattr(part, name)
            if value is not None:
                arrays[f"{number}/{name}"] = np.asarray(value)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(file, buffer.getvalue())


def read_drives(file: Path) -> tuple[list[Drives], float]:
    """What `write_drives` kept.

    Raises:
        UserError: The file is damaged.
    """
    try:
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
        parts = []
        for number in range(int(arrays["parts"])):
            given = {n: arrays.get(f"{number}/{n}") for n in Drives.__dataclass_fields__}
            numbers = {n: float(given.pop(n)) for n in ("drawing", "planning")}
            parts.append(Drives(**given, **numbers))
        return parts, float(arrays["latency"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is damaged ({error}); delete it to drive again.") from error
