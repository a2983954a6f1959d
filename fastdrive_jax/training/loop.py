"""The training loop: restore, then for each step evaluate, save, next batch, step, log.

Evaluating and saving come before the next batch is drawn, so that the data position in a
checkpoint is that of its step, and a run that was killed ends bit for bit like one that was not.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from fastdrive_jax.parallel.mesh import make_mesh, replicated_sharding, shard_batch
from fastdrive_jax.training.best import Best
from fastdrive_jax.training.checkpoints import Positioned, RunCheckpoints
from fastdrive_jax.training.compilations import OneCompilation
from fastdrive_jax.training.meter import Meter
from fastdrive_jax.training.metrics_log import MetricsLog, Record, metrics_of
from fastdrive_jax.training.prefetch import DevicePrefetch
from fastdrive_jax.training.signals import SharedStop, stop_on_signals
from fastdrive_jax.training.speed import xla_flops
from fastdrive_jax.training.state import Batch, TrainState, abstract_state, materialize
from fastdrive_jax.training.watch import Images, WatchConfig, Watcher

LOG_FILE = "metrics.jsonl"


class Batches(Positioned, Iterator[Batch], Protocol):
    """Batches whose position goes into checkpoints; a loader's iterator, or Grain's own."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a run ends with.

    Attributes:
        state: after the last step.
        history: all records of the log, those of before a resume included.
        best_step: the step of the best checkpoint; None without `best` or any evaluation.
        best_state: of that step; None where that is None.
    """

    state: TrainState
    history: list[Record]
    best_step: int | None = None
    best_state: TrainState | None = None


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
    best: Best | None = None,
    log_every: int = 10,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    watch: WatchConfig | None = None,
    images: Images | None = None,
    on_log: Callable[[Record], None] | None = None,
    ignore: Collection[str] = (),
    loops: int = 1,
    name: str = "train",
    quiet: bool = False,
) -> FitResult:
    """Train up to `total_steps`, from the newest checkpoint of `workdir` if it has one.

    On one process or, called alike on all, on the processes of a job with a shared file system;
    the first of them writes.

    Args:
        workdir: run folder: `config.json`, `metrics.jsonl`, `checkpoints/`.
        config: dataclass that defines the run; a folder of another config is refused.
        init_state: makes the state at step 0; traced, so it may not depend on values.
        train_step: pure `(state, batch) -> (state, metrics)`, or with `frozen` as third argument;
            metrics are scalars. Jitted here, with the state donated.
        batches: iterator over trees of numpy arrays `[B, ...]`, endless or long enough; this
            process's part of each batch, at a position that is equal on all.
        total_steps: to reach, counted from the start of the run.
        frozen: pytree of arrays on the devices that the step reads: neither trained nor saved.
        mesh: devices that share a batch, by default one device; of several processes, all.
        state_shardings: one sharding or a tree like the state; by default replicated on `mesh`.
        batch_to_device: by default splits the leading axis over `mesh`.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        keep: how many of the newest checkpoints stay.
        best: the metric of `evaluate` by which the best checkpoint is known. A state that is better
            than those before is saved at once, and stays beside the newest.
        log_every: steps between records, which hold the metrics of that one step.
        evaluate: state to metrics, on the host; called at step 0, each `evaluate_every` steps and
            the last. It must draw its data from the beginning each time.
        evaluate_every: 0 means at step 0 and the last only.
        watch: TensorBoard, pictures, profile; nothing by default.
        images: `(state, batch) -> {name: uint8 [H, W, 3]}`, called as `watch` says.
        on_log: gets each new record.
        ignore: dotted names of config fields that may differ on resume.
        loops: in how many rounds of one loop the step computes its batch, of which XLA counts the
            FLOPs of one.
        name: shown by the progress bar.
        quiet: no progress bar.

    Returns:
        The final state and the whole log.

    Raises:
        UserError: a metric is not finite; the folder or its checkpoint is of another run, or
            damaged; the disk is full; the step is compiled again and `watch` says to raise.
        StoppedBySignal: SIGTERM or Ctrl-C came and a checkpoint was saved.
        ValueError: the data ended before `total_steps`.
    """
    if min(total_steps, checkpoint_every, log_every) < 1:
        raise ValueError("total_steps, checkpoint_every and log_every must be at least 1")
    if best and not evaluate:
        raise ValueError("the best checkpoint is known by a metric of evaluate, which is absent")
    if mesh is None and jax.process_count() > 1:
        raise ValueError("on several processes the mesh must be given")
    watch, leads = watch or WatchConfig(), jax.process_index() == 0
    mesh = make_mesh(1, devices=jax.local_devices()) if mesh is None else mesh
    batches = DevicePrefetch(batches, batch_to_device or (lambda batch: shard_batch(batch, mesh)))
    abstract = abstract_state(init_state, state_shardings or replicated_sharding(mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
    step_fn = OneCompilation(jitted, watch.on_recompile)
    more = () if frozen is None else (frozen,)

    with RunCheckpoints(workdir, config, keep=keep, best=best, ignore=ignore) as checkpoints:
        start = checkpoints.latest_step()
        if start is None:
            state = materialize(init_state, abstract)
        else:
            state = checkpoints.restore(abstract, batches)
        first = start or 0
        with (
            MetricsLog(workdir / LOG_FILE, start, writes=leads) as log,
            Watcher(watch, workdir, start, images) as watcher,
            stop_on_signals() as request,
            tqdm(total=total_steps, initial=first, desc=name, disable=quiet or not leads) as bar,
        ):
            # Nobody adds to the log while others still read what was evaluated.
            multihost_utils.sync_global_devices("the log is open")
            stop = SharedStop(request, mesh)
            listeners = [watcher.record] + ([on_log] if on_log else [])
            meter = Meter(log, log_every, total_steps, bar, listeners, watch.peak_flops)
            recorded = {
                record["step"]: record for record in log.history if record["kind"] == "eval"
            }
            for step in range(first, total_steps + 1):
                last = step == total_steps
                measured = None
                # Who asked to stop does not wait for an evaluation: it is made up for on resume.
                if evaluate and _due(step, evaluate_every, last) and not stop.signal:
                    # In the log already: but the checkpoint that it is the best of may be lost.
                    measured = metrics_of(recorded[step]) if step in recorded else None
                    if measured is None:
                        with meter.paused("evaluate_s"):
                            measured = evaluate(state)
                        meter.record(step, "eval", measured, {})
                better = best and measured is not None and checkpoints.improves(measured)
                if stop.signal or last or better or (step and step % checkpoint_every == 0):
                    # Pausing first reads the metrics: what is not finite is never saved.
                    with meter.paused("save_s"):
                        checkpoints.save(step, state, batches, measured)
                if stop.signal:
                    checkpoints.wait()
                    note = f"{stop.signal.name}: saved step {step} in {workdir}."
                    if leads:
                        bar.write(note, file=sys.stderr)
                    raise StoppedBySignal(128 + stop.signal)
                if last:
                    break
                with meter.waiting():
                    batch = _draw(batches, step, total_steps)
                items = len(jax.tree.leaves(batch)[0])
                watcher.before_step(step, state, batch, meter.paused)
                if step == first and watch.peak_flops:
                    lowered = jitted.lower(state, batch, *more)
                    meter.flops = watch.flops_per_step or loops * xla_flops(lowered)
                compiling = meter.paused("compile_s") if step == first else contextlib.nullcontext()
                with (
                    compiling,
                    jax.transfer_guard("disallow"),
                    jax.profiler.StepTraceAnnotation(name, step_num=step),
                ):
                    state, metrics = step_fn(state, batch, *more)
                stop.share()
                meter.follow(step + 1, metrics, items)
            history = list(log.history)
        if best is None or (step := checkpoints.best_step()) is None:
            return FitResult(state, history)
        if step == total_steps:
            return FitResult(state, history, step, state)
        checkpoints.wait()
        return FitResult(state, history, step, checkpoints.restore(abstract, step=step))


def _due(step: int, every: int, last: bool) -> bool:
    return step == 0 or last or bool(every and step % every == 0)


def _draw(batches: Batches, step: int, total: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(f"the data ended at step {step} of {total}: repeat it") from None
