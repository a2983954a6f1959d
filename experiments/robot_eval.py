r"""Policies move robots, with pruned tokens or without: success, and how often they can act.

    fastdrive robot eval --policies expert openvla --methods fastv vlapruner --trials 20
    fastdrive robot eval --suites libero_spatial --policies openvla --weights CHECKPOINT \
        --methods fastv vlapruner --ratios 0.5 0.25 --workers 8 --batch 4

Every setting begins at the same initial states, so settings are compared in pairs. Writes
OUT/robot.json, OUT/robot.md and films; an episode that is in OUT/episodes is run again only to be
filmed. An action takes about 8 ms of a core on the tabletop, both pictures included, and 0.4 s on
LIBERO.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
from tqdm import tqdm

from data_pipelines.robot import libero
from data_pipelines.robot.environment import TABLETOP, Suite, make_suite
from data_pipelines.robot.worker import Job
from data_pipelines.robot.workers import Episode, run_episodes
from experiments.drives import UNPRUNED, check_labels
from experiments.robot_policies import (
    CONTROLS,
    OPENVLA,
    PI0,
    check_methods,
    check_policy,
    file_name,
    robot_policy,
)
from experiments.robot_report import Outcome, Setting, film_gif, markdown, rows_of
from experiments.robot_vla import AS_PUBLISHED, CheckpointOptions
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import write_rows
from fastdrive_jax.files import write_bytes, write_text
from fastdrive_jax.pruning.select import num_keep
from fastdrive_jax.training.run_config import claim_run_folder


@dataclass(frozen=True)
class RobotEvalArgs:
    """Evaluate robot policies, pruned and unpruned, on the same initial states.

    Attributes:
        out: Folder for the results.
        suites: "tabletop"; LIBERO's "libero_spatial", "libero_object", "libero_goal", "libero_10"
            and "libero_90" (extra `libero`); or SIMPLER's "simpler_pick_coke_can",
            "simpler_move_near", "simpler_drawer", "simpler_bridge" and "simpler_bridge_sink".
        policies: "expert" (of the tabletop), "random", "openvla", "pi0" (of LIBERO), or
            FILE.py:FUNCTION for your own.
        weights: For "openvla": a policy file from `fastdrive robot train`, or the folder of a
            published OpenVLA or OFT checkpoint; None uses the packaged tabletop policy. For "pi0":
            the folder of an openpi or lerobot checkpoint.
        methods: Training-free pruning methods, or FILE.py:FUNCTION; policies are always run
            unpruned too.
        ratios: Keep ratios of the methods.
        per_view: Give each view of "openvla" or "pi0" its own budget; otherwise they share one.
        replan_steps: Actions of a chunk that "pi0" executes before its next decision; openpi uses
            5.
        asset_id: Which statistics scale a checkpoint's actions: for "openvla" a data set's key in
            its folder, for "pi0" one of openpi's asset ids; by default those of the suite, or the
            only ones.
        seeds: Seeds of policies that draw random numbers, and of the tabletop's initial states;
            LIBERO's are published with seed 7.
        simulator_seed: Seed of LIBERO's simulator; by default as published, 7 with "pi0" and 0 with
            all others.
        trials: Initial states per task.
        tasks: Task numbers; all by default.
        image_size: Height and width of the images; by default 96 x 96 for the tabletop and 256 x
            256 for LIBERO; SIMPLER's cameras have their own.
        workers: Simulation processes; 0 uses the CPU count.
        batch: Samples that a policy acts for at once, at most as many as workers; 0 means all.
        films: Episodes of each setting to film: the first trials of the first tasks.
        quiet: No progress bar.
    """

    out: Path = Path("runs/robot")
    suites: tuple[str, ...] = (TABLETOP,)
    policies: tuple[str, ...] = CONTROLS
    weights: Path | None = None
    methods: tuple[str, ...] = ()
    ratios: tuple[float, ...] = (0.5, 0.25)
    per_view: bool = False
    replan_steps: int = AS_PUBLISHED.replan_steps
    asset_id: str | None = None
    seeds: tuple[int, ...] = (0,)
    simulator_seed: int | None = None
    trials: int = 50
    tasks: tuple[int, ...] | None = None
    image_size: tuple[int, int] | None = None
    workers: int = 0
    batch: int = 0
    films: int = 2
    quiet: bool = False

    def __post_init__(self):
        for name in ("suites", "policies", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UserError(f"{name}={given} must name at least one, each once.")
        for name in ("tasks", "ratios"):
            given = getattr(self, name) or ()
            if len(set(given)) < len(given):
                raise UserError(f"{name}={given} must name none twice.")
        check_least(self, trials=1, replan_steps=1, workers=0, batch=0, films=0)
        for ratio in self.ratios:
            num_keep(1000, ratio)
        for suite in self.suites:
            for policy in self.policies:
                check_policy(policy, suite, self.weights)
        check_labels(self.policies)
        check_methods(self.methods)
        if self.asset_id is not None and not (self.weights and self.weights.is_dir()):
            raise UserError(
                f"asset_id={self.asset_id!r} chooses among the statistics of a published "
                "checkpoint: give its folder as --weights."
            )
        if {OPENVLA, PI0} <= set(self.policies):
            raise UserError("openvla and pi0 have weights of their own: run one at a time.")

    @property
    def libero_seed(self) -> int:
        """Of LIBERO's simulator."""
        if self.simulator_seed is not None:
            return self.simulator_seed
        return libero.OPENPI_SEED if PI0 in self.policies else libero.OPENVLA_SEED

    @property
    def options(self) -> CheckpointOptions:
        """What the folder of a checkpoint does not tell."""
        return CheckpointOptions(self.replan_steps, self.asset_id)


@dataclass(frozen=True)
class RunIdentity:
    """What all episodes in a folder share."""

    image_size: tuple[int, int] | None
    per_view: bool
    libero_seed: int = libero.OPENVLA_SEED


def robot_eval(args: RobotEvalArgs) -> Path:
    """Runs, judges and writes; returns the path of the rows."""
    suites = {
        (name, seed): make_suite(name, args.image_size, seed, args.libero_seed)
        for name in args.suites
        for seed in args.seeds
    }
    for suite in suites.values():
        check_jobs(args, suite)
    # More trials, tasks, settings and other numbers of processes may come to what is there.
    claim_run_folder(
        args.out, {"robot": RunIdentity(args.image_size, args.per_view, args.libero_seed)}
    )
    outcomes: dict[Setting, dict[tuple[int, int], Outcome]] = {}
    workers = args.workers or os.cpu_count() or 1
    batch = args.batch or workers
    bar = tqdm(desc="episodes", unit="episode", disable=args.quiet)
    with bar:
        for setting in settings(args):
            suite = suites[setting.suite, setting.seed]
            bar.set_postfix_str(setting.label)
            outcomes[setting] = run_setting(args, setting, suite, workers, batch, bar)
    rows = rows_of(outcomes, {suite.name: suite for suite in suites.values()})
    write_text(args.out / "robot.md", markdown(rows, outcomes, suites))
    meta = {
        "device": str(jax.devices()[0]),
        "suites": list(args.suites),
        "trials": args.trials,
        "seeds": list(args.seeds),
        "workers": workers,
        "batch": batch,
    }
    return write_rows(args.out / "robot.json", rows, meta)


def settings(args: RobotEvalArgs) -> list[Setting]:
    """By suite and seed: the controls, and of each other policy unpruned and every method."""
    found = []
    for suite in args.suites:
        for seed in args.seeds:
            for policy in args.policies:
                if policy in CONTROLS:
                    found.append(Setting(suite, policy, None, None, seed))
                    continue
                found.append(Setting(suite, policy, UNPRUNED, 1.0, seed))
                for ratio in args.ratios:
                    found += [Setting(suite, policy, name, ratio, seed) for name in args.methods]
    return found


def check_jobs(args: RobotEvalArgs, suite: Suite) -> None:
    """Refuses tasks and trials that a suite does not have.

    Raises:
        UserError: There is no such task or trial.
    """
    unknown = [k for k in args.tasks or () if not 0 <= k < len(suite.instructions)]
    if unknown:
        raise UserError(
            f"There is no task {unknown[0]}; {suite.name} has 0 to {len(suite.instructions) - 1}."
        )
    if suite.trials is not None and args.trials > suite.trials:
        raise UserError(
            f"trials={args.trials} must be at most {suite.trials}: {suite.name} has no more "
            "initial states of a task."
        )


def run_setting(
    args: RobotEvalArgs, setting: Setting, suite: Suite, workers: int, batch: int, bar: tqdm
) -> dict[tuple[int, int], Outcome]:
    """What became of each (task, trial) of a setting; those that are kept are not run again."""
    name = "_".join(
        [
            setting.suite,
            file_name(setting.policy, args.weights, args.options),
            *([] if setting.method is None else [file_name(setting.method), f"{setting.ratio:g}"]),
            f"seed{setting.seed}",
        ]
    )
    kept = args.out / "episodes" / f"{name}.jsonl"
    found = {(one.task, one.trial): one for one in read_outcomes(kept)}
    tasks = args.tasks or range(len(suite.instructions))
    wanted = [(task, trial) for task in tasks for trial in range(args.trials)]
    filmed = [(task, 0) for task in tasks][: args.films]

    def film_of(task: int, trial: int) -> Path:
        return args.out / "films" / f"{name}_task{task}_trial{trial}.gif"

    unseen = [one for one in filmed if not film_of(*one).exists()]  # run again, if need be, to film
    jobs = [Job(*one, film=one in unseen) for one in wanted if one not in found or one in unseen]
    if jobs:
        how = setting.method, setting.ratio, setting.seed
        told = args.weights, args.per_view, args.options
        policy = robot_policy(setting.policy, suite, *how, *told)
        for episode in run_episodes(suite, jobs, policy, workers, batch):
            if episode.film is not None:
                path = film_of(episode.task, episode.trial)
                write_bytes(path, film_gif(episode.film, policy.grid, suite.hz, policy.views))
            outcome = outcome_of(episode)
            if (outcome.task, outcome.trial) not in found:
                append_outcome(kept, outcome)
                found[outcome.task, outcome.trial] = outcome
            bar.update()
    return {one: found[one] for one in wanted}


def outcome_of(episode: Episode) -> Outcome:
    """What is kept of an episode."""
    return Outcome(**{name: getattr(episode, name) for name in Outcome.__dataclass_fields__})


def append_outcome(path: Path, outcome: Outcome) -> None:
    """Adds a line, which is on the disk when this returns.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def read_outcomes(path: Path) -> Iterator[Outcome]:
    """The lines of a file; a last one that a kill cut short is taken away.

    Raises:
        UserError: Another line is damaged.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            yield Outcome(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"Line {number} of {path} is damaged ({error}); delete the file to run its "
                "episodes again."
            ) from error
