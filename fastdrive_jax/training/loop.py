"""The training loop: restore, then for each step evaluate, save, next batch, step, log.

Evaluating and saving come before the next batch is drawn, so that the data position in a
checkpoint is that of its step, and a run that was killed ends bit for bit like one that was not.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from fastdrive_jax.errors import UserError
from fastdrive_jax.parallel.mesh import make_mesh, replicated_sharding, shard_batch
from fastdrive_jax.training.checkpoints import Positioned, RunCheckpoints
from fastdrive_jax.training.metrics_log import MetricsLog, Record
from fastdrive_jax.training.prefetch import DevicePrefetch
from fastdrive_jax.training.signals import stop_on_signals
from fastdrive_jax.training.state import Batch, TrainState, abstract_state, materialize

LOG_FILE = "metrics.jsonl"


class Batches(Positioned, Iterator[Batch], Protocol):
    """Batches whose position goes into checkpoints; a loader's iterator, or Grain's own."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a run ends with.

    Attributes:
        state: after the last step.
        history: all records of the log, those of before a resume included.
    """

    state: TrainState
    history: list[Record]


class StoppedBySignal(SystemExit):
    """The run saved a checkpoint and ends with the exit code of its signal."""


def fit(
    workdir: Path,
    config: Any,
    init_state: Callable[[], TrainState],
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    batches: Batches,
    total_steps: int,
    *,
    frozen: Any = None,
    mesh: Mesh | None = None,
    state_shardings: Any = None,
    batch_to_device: Callable[[Batch], Batch] | None = None,
    checkpoint_every: int = 100,
    keep: int = 2,
    log_every: int = 10,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    on_log: Callable[[Record], None] | None = None,
    ignore: Collection[str] = (),
    name: str = "train",
    quiet: bool = False,
) -> FitResult:
    """Train up to `total_steps`, from the newest checkpoint of `workdir` if it has one.

    For one process, with any number of devices.

    Args:
        workdir: run folder: `config.json`, `metrics.jsonl`, `checkpoints/`.
        config: dataclass that defines the run; a folder of another config is refused.
        init_state: makes the state at step 0; traced, so it may not depend on values.
        train_step: pure `(state, batch) -> (state, metrics)`, or with `frozen` as third argument;
            metrics are scalars. Jitted here, with the state donated.
        batches: iterator over trees of numpy arrays `[B, ...]`, endless or long enough.
        total_steps: to reach, counted from the start of the run.
        frozen: pytree of arrays on the devices that the step reads: neither trained nor saved.
        mesh: devices that share a batch, by default one device.
        state_shardings: one sharding or a tree like the state; by default replicated on `mesh`.
        batch_to_device: by default splits the leading axis over `mesh`.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        keep: how many checkpoints stay.
        log_every: steps between records, which hold the metrics of that one step.
        evaluate: state to metrics, on the host; called at step 0, each `evaluate_every` steps and
            the last. It must draw its data from the beginning each time.
        evaluate_every: 0 means at step 0 and the last only.
        on_log: gets each new record.
        ignore: dotted names of config fields that may differ on resume.
        name: shown by the progress bar.
        quiet: no progress bar.

    Returns:
        The final state and the whole log.

    Raises:
        UserError: a metric is not finite; the folder or its checkpoint is of another run, or
            damaged; the disk is full.
        StoppedBySignal: SIGTERM or Ctrl-C came and a checkpoint was saved.
        ValueError: the data ended before `total_steps`.
    """
    if min(total_steps, checkpoint_every, log_every) < 1:
        raise ValueError("total_steps, checkpoint_every and log_every must be at least 1")
    mesh = make_mesh(1, devices=jax.local_devices()) if mesh is None else mesh
    batches = DevicePrefetch(batches, batch_to_device or (lambda batch: shard_batch(batch, mesh)))
    abstract = abstract_state(init_state, state_shardings or replicated_sharding(mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step_fn = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
    more = () if frozen is None else (frozen,)

    with RunCheckpoints(workdir, config, keep=keep, ignore=ignore) as checkpoints:
        start = checkpoints.latest_step()
        if start is None:
            state = materialize(init_state, abstract)
        else:
            state = checkpoints.restore(abstract, batches)
        first = start or 0
        with (
            MetricsLog(workdir / LOG_FILE, start) as log,
            stop_on_signals() as stop,
            tqdm(total=total_steps, initial=first, desc=name, disable=quiet) as bar,
        ):
            meter = _Meter(log, log_every, total_steps, on_log, bar)
            for step in range(first, total_steps + 1):
                last = step == total_steps
                if evaluate and step != start and _due(step, evaluate_every, last):
                    meter.flush()
                    meter.record(step, "eval", evaluate(state), {})
                if stop.signal or last or (step and step % checkpoint_every == 0):
                    meter.flush()  # a state with a metric that is not finite is never saved
                    checkpoints.save(step, state, batches)
                if stop.signal:
                    checkpoints.wait()
                    note = f"{stop.signal.name}: saved step {step} in {workdir}."
                    bar.write(note, file=sys.stderr)
                    raise StoppedBySignal(128 + stop.signal)
                if last:
                    break
                batch, waited = _draw(batches, step, total_steps)
                items = len(jax.tree.leaves(batch)[0])
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch, *more)
                meter.follow(step + 1, metrics, items, waited)
            history = list(log.history)
    return FitResult(state, history)


class _Meter:
    """Reads each step's metrics when the next one is already dispatched, checks and logs them."""

    def __init__(self, log: MetricsLog, every: int, total: int, on_log, bar: tqdm):
        self._log, self._every, self._total = log, every, total
        self._on_log, self._bar = on_log, bar
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._window = (time.perf_counter(), 0, 0.0, 0)  # begin, items, seconds waited, steps

    def follow(self, step: int, metrics: dict[str, jax.Array], items: int, waited: float) -> None:
        """Take over the metrics of a dispatched step and read those of the one before."""
        self.flush()
        self._pending = (step, metrics)
        begin, seen, wait, steps = self._window
        self._window = (begin, seen + items, wait + waited, steps + 1)

    def flush(self) -> None:
        """Read the metrics that are still out."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f"Training stopped at step {step} ({', '.join(bad)}); checkpoints of earlier "
                "steps are kept: lower the learning rate or clip_norm, or look at the data."
            )
        self._bar.update()
        if step % self._every == 0 or step == self._total:
            now = time.perf_counter()
            begin, items, wait, steps = self._window
            seconds = max(now - begin, 1e-9)
            self._window = (now, 0, 0.0, 0)
            self._bar.set_postfix(loss=f"{values['loss']:.4g}" if "loss" in values else "-")
            self.record(
                step,
                "train",
                values,
                {
                    "items_per_s": items / seconds,
                    "step_s": seconds / max(steps, 1),
                    "data_wait_s": wait / max(steps, 1),
                },
            )

    def record(self, step: int, kind: str, values: Mapping, times: Mapping[str, float]) -> None:
        """Write one record and hand it on."""
        record = self._log.write(step, kind, values, times)
        if self._on_log:
            self._on_log(record)


def _due(step: int, every: int, last: bool) -> bool:
    return step == 0 or last or bool(every and step % every == 0)


def _draw(batches: Batches, step: int, total: int) -> tuple[Batch, float]:
    """The next batch and the seconds that it was waited for."""
    begin = time.perf_counter()
    try:
        batch = next(batches)
    except StopIteration:
        raise ValueError(f"the data ended at step {step} of {total}: repeat it") from None
    return batch, time.perf_counter() - begin
