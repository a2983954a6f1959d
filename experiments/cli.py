"""The command `fastdrive`: subcommands over the experiments' frozen configs."""

import contextlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Union

import jax
import tyro

from data_pipelines.build import shards_of
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from experiments.answer import AnswerArgs, answer
from experiments.bench_data import BenchDataArgs, bench_data
from experiments.bench_efficiency import bench_efficiency
from experiments.bench_export import BenchExportArgs, bench_export
from experiments.bench_frame import BenchFrameArgs, bench_frame
from experiments.bench_model import BenchModelArgs, bench_model
from experiments.bench_pruners import BenchPrunersArgs, bench_pruners
from experiments.bench_train import BenchTrainArgs, bench_train
from experiments.compare_pruners import ComparePrunersArgs, compare_pruners
from experiments.compile_model import CompileModelArgs, compile_model
from experiments.compile_train import CompileTrainArgs, compile_train
from experiments.data_commands import BuildArgs, MaskArgs, VerifyArgs, build, mask, verify
from experiments.drive_closed_loop import DriveArgs, drive_closed_loop
from experiments.efficiency_args import BenchEfficiencyArgs
from experiments.eval_planning import EvalPlanningArgs, eval_planning
from experiments.export_model import ExportArgs, export_model
from experiments.kill_data import KillDataArgs, kill_data
from experiments.own_images import ImagesConfig, own_images
from experiments.plot_metrics import PlotMetricsArgs, plot_metrics
from experiments.quickstart import QuickstartConfig, quickstart
from experiments.robot_demos import RobotDemosArgs, robot_demos
from experiments.robot_eval import RobotEvalArgs, robot_eval
from experiments.robot_train import RobotTrainConfig, robot_train
from experiments.serve import ServeArgs, serve
from experiments.study_pruner import StudyPrunerArgs, study_pruner
from experiments.train_pruner import TrainPrunerConfig, train_on_shards
from experiments.train_vla import TrainVLAConfig, train_vla
from experiments.view_data import ViewArgs, view_data
from experiments.widen_vla import WidenVLAConfig, widen_vla
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.bundled import save_vla


@dataclass(frozen=True)
class WorldArgs:
    """Generate a synthetic driving data set in the nuScenes layout, and its shards.

    Attributes:
        out: Folder for world/ and shards/.
        world: Size and content of the data set.
    """

    out: Path
    world: WorldConfig = field(default_factory=WorldConfig)


@dataclass(frozen=True)
class TrainVLAArgs:
    """Train the tiny driving VLA from scratch; the bundled weights were made this way.

    Attributes:
        out: Run folder; a run found there is resumed.
        config: Configuration of the training.
    """

    out: Path
    config: TrainVLAConfig = field(default_factory=TrainVLAConfig)


@dataclass(frozen=True)
class DataArgs:
    """Turn nuScenes as downloaded into checked shards of nuScenes-FG.

    Attributes:
        command: What to do.
    """

    command: Annotated[
        Annotated[MaskArgs, tyro.conf.subcommand("mask", prefix_name=False)]
        | Annotated[BuildArgs, tyro.conf.subcommand("build", prefix_name=False)]
        | Annotated[VerifyArgs, tyro.conf.subcommand("verify", prefix_name=False)]
        | Annotated[ViewArgs, tyro.conf.subcommand("view", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]


@dataclass(frozen=True)
class RobotArgs:
    """Robots: record demonstrations, train, and run policies in simulation (extra `robot`).

    Attributes:
        command: What to do.
    """

    command: Annotated[
        Annotated[RobotDemosArgs, tyro.conf.subcommand("demos", prefix_name=False)]
        | Annotated[RobotTrainConfig, tyro.conf.subcommand("train", prefix_name=False)]
        | Annotated[RobotEvalArgs, tyro.conf.subcommand("eval", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]


def write_world(args: WorldArgs) -> None:
    """Pictures, then shards of them."""
    root = generate(args.out / "world", args.world)
    shards_of(read_nuscenes(root), args.out / "shards", quiet=False)


def train(args: TrainVLAArgs) -> None:
    """Trains and writes OUT/vla.safetensors."""
    params = train_vla(args.out, args.config)
    save_vla(args.out / "vla.safetensors", params, args.config.model.cameras)


def data(args: DataArgs) -> None:
    """Calls the command that was asked for."""
    run = {MaskArgs: mask, BuildArgs: build, VerifyArgs: verify, ViewArgs: view_data}
    run[type(args.command)](args.command)


def robot(args: RobotArgs) -> None:
    """Calls the command that was asked for."""
    run = {RobotDemosArgs: robot_demos, RobotTrainConfig: robot_train, RobotEvalArgs: robot_eval}
    run[type(args.command)](args.command)


COMMANDS = {  # in the order of --help
    "quickstart": (QuickstartConfig, quickstart),
    "images": (ImagesConfig, own_images),
    "world": (WorldArgs, write_world),
    "train-pruner": (TrainPrunerConfig, train_on_shards),
    "study-pruner": (StudyPrunerArgs, study_pruner),
    "export": (ExportArgs, export_model),
    "train-vla": (TrainVLAArgs, train),
    "widen-vla": (WidenVLAConfig, widen_vla),
    "answer": (AnswerArgs, answer),
    "data": (DataArgs, data),
    "robot": (RobotArgs, robot),
    "bench-data": (BenchDataArgs, bench_data),
    "kill-data": (KillDataArgs, kill_data),
    "bench-efficiency": (BenchEfficiencyArgs, bench_efficiency),
    "bench-export": (BenchExportArgs, bench_export),
    "bench-frame": (BenchFrameArgs, bench_frame),
    "bench-model": (BenchModelArgs, bench_model),
    "bench-pruners": (BenchPrunersArgs, bench_pruners),
    "compare-pruners": (ComparePrunersArgs, compare_pruners),
    "eval-planning": (EvalPlanningArgs, eval_planning),
    "drive": (DriveArgs, drive_closed_loop),
    "serve": (ServeArgs, serve),
    "compile-train": (CompileTrainArgs, compile_train),
    "bench-train": (BenchTrainArgs, bench_train),
    "plot-metrics": (PlotMetricsArgs, plot_metrics),
    "compile-model": (CompileModelArgs, compile_model),
}
Command = Union[  # noqa: UP007
    tuple(Annotated[args, tyro.conf.subcommand(name)] for name, (args, _) in COMMANDS.items())
]
RUN = dict(COMMANDS.values())  # by the type of its arguments


def main(arguments: list[str] | None = None) -> int:
    """Parses and calls; what a person did wrong is one sentence and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own = any(argument.split("=")[0] == "--images" for argument in arguments)
    if arguments[:1] == ["quickstart"] and own:
        arguments[0] = "images"  # the same quick start, on a folder of pictures
    # A small model's step runs mostly on one thread, so two devices train twice as fast on two
    # cores; data-parallel runs use all, the others the first. A process that has used jax before
    # it called this keeps the devices that it has, and so does who asks for a number of them.
    asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not asked and "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 2))
    try:
        args = tyro.cli(Command, args=arguments, prog="fastdrive", description=__doc__)
        RUN[type(args)](args)
    except UserError as error:
        print(f"fastdrive: {error}", file=sys.stderr)
        return 2
    return 0
