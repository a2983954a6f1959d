"""Reads the metrics of a step when the next one is already running, checks and logs them."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from tqdm import tqdm

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.metrics_log import MetricsLog, Record
from fastdrive_jax.training.speed import device_memory, utilisation

GROUP = "grad_norm/"


class Meter:
    """Metrics and times of a run.

    Attributes:
        flops: of a step, None if not known.
    """

    def __init__(
        self,
        log: MetricsLog,
        every: int,
        total: int,
        bar: tqdm,
        listeners: Sequence[Callable[[Record], None]] = (),
        peak_flops: float | None = None,
    ):
        """Starts the clock.

        Args:
            log: gets the records.
            every: steps between records.
            total: the last step, which is always recorded.
            bar: shows progress.
            listeners: get each record after the log.
            peak_flops: of all devices.
        """
        self.flops: float | None = None
        self._log, self._every, self._total, self._bar = log, every, total, bar
        self._listeners, self._peak = listeners, peak_flops
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._restart()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside is waiting for the next batch."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def follow(self, step: int, metrics: dict[str, jax.Array], items: int) -> None:
        """Take over the metrics of a dispatched step and read those of the one before."""
        self.flush()
        self._pending = (step, metrics)
        self._items += items
        self._steps += 1

    def flush(self) -> None:
        """Read the metrics that are still out.

        Raises:
            UserError: one is not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not all(map(math.isfinite, values.values())):
            raise UserError(
                f"Training stopped at step {step} ({blame(values)}); checkpoints of earlier "
                "steps are kept: lower the learning rate or clip_norm, or look at the data."
            )
        self._bar.update()
        if step % self._every == 0 or step == self._total:
            self._bar.set_postfix(loss=f"{values['loss']:.4g}" if "loss" in values else "-")
            self.record(step, "train", values, self._times())
            self._restart()

    def record(self, step: int, kind: str, values: Mapping, times: Mapping[str, float]) -> None:
        """Write one record and hand it on."""
        record = self._log.write(step, kind, values, times)
        for listener in self._listeners:
            listener(record)

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """What is done inside counts as NAME in the next record, and not as training.

        The step before is finished first, for its time would be taken for the pause's.
        """
        self.flush()
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self._begin += seconds
            self._pauses[name] = self._pauses.get(name, 0.0) + seconds

    def _restart(self) -> None:
        self._begin = time.perf_counter()
        self._items, self._steps, self._waited = 0, 0, 0.0
        self._pauses: dict[str, float] = {}

    def _times(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        steps = max(self._steps, 1)
        return {
            "items_per_s": self._items / seconds,
            "step_s": seconds / steps,
            "data_wait_s": self._waited / steps,
            "data_wait_share": self._waited / seconds,
            **utilisation(self.flops, seconds / steps, self._peak),
            **device_memory(),
            **self._pauses,
        }


def blame(values: Mapping[str, float]) -> str:
    """Says which terms are not finite, and in which parts of the model their gradients began.

    Args:
        values: metrics of a step, at least one of which is not finite.
    """
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    groups = {name.removeprefix(GROUP) for name in values if name.startswith(GROUP)}
    sick = {name.removeprefix(GROUP) for name in bad if name.startswith(GROUP)}
    terms = [name for name in bad if not name.startswith(GROUP)]
    losses = [name for name in terms if name not in ("grad_norm", "update_norm")]
    parts = [f"{name} is {bad[name]}" for name in losses or terms]
    if not losses and "loss" in values:
        parts.append("the loss is finite")
    if sick:
        parts.append(f"gradients of {' and '.join(sorted(sick))} are not finite")
    if sick and groups - sick:
        parts.append(f"those of {' and '.join(sorted(groups - sick))} are")
    return ", ".join(parts)
