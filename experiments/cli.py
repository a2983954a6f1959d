"""The command `fastdrive`: subcommands over the experiments' frozen configs."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any, Union

import jax
import tyro

from fastdrive_jax.errors import UserError

COMMANDS = {  # in the order of --help: in which file, of which arguments, which function
    "quickstart": ("quickstart", "QuickstartConfig", "quickstart"),
    "images": ("own_images", "ImagesConfig", "own_images"),
    "world": ("world", "WorldArgs", "write_world"),
    "train-pruner": ("train_pruner", "TrainPrunerConfig", "train_on_shards"),
    "study-pruner": ("study_pruner", "StudyPrunerArgs", "study_pruner"),
    "export": ("export_model", "ExportArgs", "export_model"),
    "train-vla": ("train_vla", "TrainVLAArgs", "write_vla"),
    "widen-vla": ("widen_vla", "WidenVLAConfig", "widen_vla"),
    "answer": ("answer", "AnswerArgs", "answer"),
    "data": ("data_commands", "DataArgs", "data"),
    "robot": ("robot_commands", "RobotArgs", "robot"),
    "bench-data": ("bench_data", "BenchDataArgs", "bench_data"),
    "kill-data": ("kill_data", "KillDataArgs", "kill_data"),
    "bench-efficiency": ("bench_efficiency", "BenchEfficiencyArgs", "bench_efficiency"),
    "bench-export": ("bench_export", "BenchExportArgs", "bench_export"),
    "bench-frame": ("bench_frame", "BenchFrameArgs", "bench_frame"),
    "bench-model": ("bench_model", "BenchModelArgs", "bench_model"),
    "bench-pruners": ("bench_pruners", "BenchPrunersArgs", "bench_pruners"),
    "compare-pruners": ("compare_pruners", "ComparePrunersArgs", "compare_pruners"),
    "eval-planning": ("eval_planning", "EvalPlanningArgs", "eval_planning"),
    "drive": ("drive_closed_loop", "DriveArgs", "drive_closed_loop"),
    "serve": ("serve", "ServeArgs", "serve"),
    "compile-train": ("compile_train", "CompileTrainArgs", "compile_train"),
    "bench-train": ("bench_train", "BenchTrainArgs", "bench_train"),
    "plot-metrics": ("plot_metrics", "PlotMetricsArgs", "plot_metrics"),
    "compile-export": ("compile_export", "CompileExportArgs", "compile_export"),
    "compile-model": ("compile_model", "CompileModelArgs", "compile_model"),
}


def parse(arguments: Sequence[str]) -> tuple[Any, Callable[[Any], Any]]:
    """The arguments of a subcommand, and the function that takes them.

    Only the file of that subcommand is imported: all of them take seconds.

    Raises:
        SystemExit: They are no command's, or ask for help.
    """
    arguments = list(arguments)
    own = any(argument.split("=")[0] == "--images" for argument in arguments)
    if arguments[:1] == ["quickstart"] and own:
        arguments[0] = "images"  # the same quick start, on a folder of pictures
    if arguments and arguments[0] in COMMANDS:
        name, *rest = arguments
        kind, run = _load(name)
        return tyro.cli(kind, args=rest, prog=f"fastdrive {name}"), run
    every = {name: _load(name) for name in COMMANDS}
    kinds = (Annotated[kind, tyro.conf.subcommand(name)] for name, (kind, _) in every.items())
    command = Union[tuple(kinds)]  # noqa: UP007
    args = tyro.cli(command, args=arguments, prog="fastdrive", description=__doc__)
    return args, dict(every.values())[type(args)]


def _load(name: str) -> tuple[type, Callable[[Any], Any]]:
    module, kind, run = COMMANDS[name]
    found = import_module(f"experiments.{module}")
    return getattr(found, kind), getattr(found, run)


def main(arguments: list[str] | None = None) -> int:
    """Parses and calls; what a person did wrong is one sentence and exit code 2, Ctrl-C is 130."""
    # A small model's step runs mostly on one thread, so two devices train twice as fast on two
    # cores; data-parallel runs use all, the others the first. A process that has used jax before
    # it called this keeps the devices that it has, and so does who asks for a number of them.
    asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not asked and "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 2))
    try:
        args, run = parse(sys.argv[1:] if arguments is None else arguments)
        run(args)
    except UserError as error:
        print(f"fastdrive: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastdrive: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
