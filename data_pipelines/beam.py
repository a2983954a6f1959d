"""The shards' jobs on Apache Beam: here with the Direct runner, at scale on Flink, Spark, Dataflow.

The runner and its options are Beam's own, such as `--runner=FlinkRunner --flink_master=HOST:8081`.
Every worker must see the folders of the data set and of the shards under the same paths (a network
disk or a mounted bucket) and have this package installed.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from data_pipelines.build import ShardJob, ShardNote, kept_notes, write_shard
from fastdrive_jax.errors import UserError


def beam_runner(options: Sequence[str]) -> Callable[[Sequence[ShardJob], Path], Iterable]:
    """What `build_shards` takes as `run`.

    Args:
        options: Beam's command-line options; none means the Direct runner.

    Raises:
        UserError: Apache Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "Apache Beam is not installed; run `pip install -e '.[beam]'` in the clone."
        ) from error

    def run(jobs: Sequence[ShardJob], folder: Path) -> Iterable[ShardNote]:
        if not jobs:
            return []
        try:
            pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
        except ValueError as error:
            raise UserError(f"{error} Correct the options of Beam.") from error
        with pipeline:
            # Without a shuffle a runner would fuse both steps and write all shards in one worker.
            (pipeline | beam.Create(jobs) | beam.Reshuffle() | beam.Map(write_shard, folder=folder))
        notes = kept_notes(folder, jobs)
        if len(notes) < len(jobs):
            raise UserError(
                f"Beam ended but {len(jobs) - len(notes)} of {len(jobs)} shards are not in "
                f"{folder}; do its workers see that folder?"
            )
        return list(notes.values())

    return run
