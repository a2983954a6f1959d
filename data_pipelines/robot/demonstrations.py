"""Records the tabletop's expert as demonstrations, shard by shard, and goes on after a kill.

Every episode depends on its task, its trial and the settings only, and a shard on its episodes, so
the shards are the same byte for byte whatever the number of processes. As the shards of driving
(see `build`), the set is written into `OUT.building` and gets its name when it is whole.
"""

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from data_pipelines.disk import disk_errors, locked
from data_pipelines.robot.environment import TABLETOP
from data_pipelines.robot.episodes import (
    DATASET,
    FORMAT,
    MANIFEST,
    STATISTICS,
    VERSION,
    EpisodeNote,
    Episodes,
    StepSource,
    open_episodes,
    statistics,
    step_features,
)
from data_pipelines.robot.policies import RobotPolicy
from data_pipelines.robot.recording import DemoConfig, record_episode
from data_pipelines.robot.tabletop import VIEWS, Tabletop
from data_pipelines.robot.tasks import TASKS
from data_pipelines.shard_files import (
    NOTES,
    check_new,
    finished_notes,
    give_name,
    remove_strangers,
    take_notes_back,
    write_shard_file,
    write_tfds_metadata,
)
from data_pipelines.worker_process import run_jobs
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import write_json

# Evaluations count their trials from 0, so none of them begins as a demonstration does.
FIRST_TRIAL = {"train": 1_000_000, "val": 2_000_000}


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: episodes of a split.

    Attributes:
        name: File name.
        split: Its split.
        first: Number of its first episode in the split.
        episodes: (task, trial) of each.
        config: How they are recorded.
        make_policy: Makes the policy that moves some of them; hashable.
    """

    name: str
    split: str
    first: int
    episodes: tuple[tuple[int, int], ...]
    config: DemoConfig
    make_policy: Callable[[], RobotPolicy] | None = None

    def identity(self) -> str:
        """Digest of what the shard is made of."""
        content = [FORMAT, self.name, self.first, self.episodes, asdict(self.config)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class ShardNote:
    """What is known of a finished shard."""

    name: str
    split: str
    identity: str
    records: int
    bytes: int
    sha256: str
    episodes: tuple[EpisodeNote, ...]


def record_demonstrations(
    out_dir: Path,
    config: DemoConfig,
    workers: int = 1,
    progress: bool = True,
    make_policy: Callable[[], RobotPolicy] | None = None,
) -> Episodes:
    """Records demonstrations of all tasks into the new folder `out_dir`.

    A run that was killed leaves `out_dir.building` behind, and the same call goes on from its
    finished shards.

    Args:
        out_dir: New or empty folder.
        config: What is recorded.
        workers: Processes that simulate.
        progress: Show a progress bar.
        make_policy: Makes the policy that moves `config.policy_share` of the episodes, in each
            process once; hashable.

    Raises:
        UserError: `out_dir` exists, MuJoCo or the policy is missing, or the disk is full.
    """
    out_dir = Path(out_dir)
    place = check_new(out_dir)
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1.")
    if config.policy_share and make_policy is None:
        raise UserError(f"policy_share={config.policy_share} needs a policy that moves.")
    Tabletop(config.image_size).close()  # what is missing is said before anything is written
    building = place.with_name(place.name + ".building")
    with disk_errors(out_dir), contextlib.ExitStack() as stack:
        building.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(building))
        take_notes_back(building)
        jobs = plan_jobs(config, make_policy)
        notes = finished_notes(building, jobs, _note)
        remove_strangers(building, notes)
        bar = stack.enter_context(
            tqdm(
                total=sum(len(job.episodes) for job in jobs),
                initial=sum(len(note.episodes) for note in notes.values()),
                desc="demonstrations",
                unit="episode",
                disable=not progress,
            )
        )
        waiting = [job for job in jobs if job.name not in notes]
        for note in run_jobs(waiting, write_shard, building, workers):
            notes[note.name] = note
            bar.update(len(note.episodes))
        _finish(building, config, [notes[job.name] for job in jobs])
        give_name(building, place)
    return open_episodes(out_dir)


def plan_jobs(
    config: DemoConfig, make_policy: Callable[[], RobotPolicy] | None = None
) -> list[ShardJob]:
    """The shards, in order; tasks take turns, so that each shard has all."""
    jobs = []
    for split, count in (("train", config.episodes), ("val", config.val_episodes)):
        first = FIRST_TRIAL[split]
        trials = range(first, first + count)
        episodes = [(task, trial) for trial in trials for task in range(len(TASKS))]
        step = config.episodes_per_shard
        parts = [tuple(episodes[k : k + step]) for k in range(0, len(episodes), step)]
        for k, part in enumerate(parts):
            name = f"{DATASET}-{split}.array_record-{k:05d}-of-{len(parts):05d}"
            jobs.append(ShardJob(name, split, k * step, part, config, make_policy))
    return jobs


def write_shard(job: ShardJob, folder: Path) -> ShardNote:
    """Simulates the episodes of a shard, writes it and then its note."""
    features = step_features(VIEWS)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    ended: list[EpisodeNote] = []
    policy = _made(job.make_policy) if job.make_policy else None

    def examples(env: Tabletop) -> Iterator[bytes]:
        for number, (task, trial) in enumerate(job.episodes, job.first):
            steps, success = record_episode(env, task, trial, number, job.config, policy)
            ended.append(EpisodeNote(task, trial, len(steps), success))
            for step in steps:
                example = serializer.get_tf_example(features.encode_example(asdict(step)))
                yield example.SerializeToString(deterministic=True)

    with disk_errors(folder / job.name):
        with Tabletop(job.config.image_size, job.config.seed) as env:
            written = write_shard_file(folder / job.name, examples(env))
        note = ShardNote(
            job.name,
            job.split,
            job.identity(),
            written.records,
            written.bytes,
            written.sha256,
            tuple(ended),
        )
        write_json(folder / NOTES / f"{job.name}.json", asdict(note))
    return note


@functools.lru_cache(maxsize=1)
def _made(make_policy: Callable[[], RobotPolicy]) -> RobotPolicy:
    """The policy; a process that writes several shards compiles it once."""
    return make_policy()


def _note(content: dict[str, Any]) -> ShardNote:
    ended = tuple(EpisodeNote(**episode) for episode in content["episodes"])
    return ShardNote(**content | {"episodes": ended})


def _finish(building: Path, config: DemoConfig, notes: Sequence[ShardNote]) -> None:
    """TFDS's metadata, the statistics of what is learnt from, and the manifest."""
    splits = {split: [note for note in notes if note.split == split] for split in FIRST_TRIAL}
    description = "Steps of a scripted expert at a tabletop in MuJoCo."
    write_tfds_metadata(building, DATASET, VERSION, step_features(VIEWS), splits, description)
    episodes = {
        split: tuple(itertools.chain.from_iterable(note.episodes for note in part))
        for split, part in splits.items()
    }
    sums = "".join(note.sha256 for note in sorted(notes, key=lambda note: note.name))
    manifest = {
        "format": FORMAT,
        "dataset": DATASET,
        "suite": TABLETOP,
        "instructions": [task.instruction for task in TASKS],
        "views": VIEWS,
        "image_size": config.image_size,
        "noise": config.noise,
        "policy_share": config.policy_share,
        "policy": config.policy,
        "seed": config.seed,
        "counts": {
            split: {
                "episodes": len(part),
                "successes": sum(note.success for note in part),
                "steps": sum(note.steps for note in part),
            }
            for split, part in episodes.items()
        },
        "episodes": {
            split: [[note.task, note.trial, note.steps, note.success] for note in part]
            for split, part in episodes.items()
        },
        "shards": {
            note.name: {"records": note.records, "bytes": note.bytes, "sha256": note.sha256}
            for note in sorted(notes, key=lambda note: note.name)
        },
        "digest": hashlib.sha256(sums.encode()).hexdigest(),
    }
    write_json(building / STATISTICS, _statistics(building, episodes["train"], splits["train"]))
    write_json(building / MANIFEST, manifest)


def _statistics(
    building: Path, episodes: Sequence[EpisodeNote], notes: Sequence[ShardNote]
) -> dict[str, dict]:
    """Ranges over what is learnt from."""
    shards = {"train": {note.name: note.records for note in notes}}
    source = StepSource(Episodes(building, (), VIEWS, (0, 0), shards, {}, ""), "train")
    steps = [source[k] for k in range(len(source))]
    return statistics(
        f"{TABLETOP}_expert",
        np.stack([step["action"] for step in steps]),
        np.stack([step["proprio"] for step in steps]),
        len(episodes),
    )
