"""The one thread that runs the model: it compiles, measures, and then plans batch after batch.

Requests wait in one queue. The oldest decides the bucket; those that share it join, in order, up to
the largest compiled batch, and the batch starts when it is full or the oldest has waited long
enough. Of a drive no more than one frame is in a batch, and none overtakes another.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from fastdrive_jax.inference.latency import Measured, choose_bucket, miss_sentence, next_load
from fastdrive_jax.serving.config import ServeConfig
from fastdrive_jax.serving.drives import Drives, Recalled
from fastdrive_jax.serving.jobs import Answer, Budget, Job, next_batch
from fastdrive_jax.serving.metrics import Metrics
from fastdrive_jax.serving.programs import Frame, Programs, run_batch
from fastdrive_jax.serving.refusals import Refusal
from fastdrive_jax.serving.requests import PlanRequest

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The service ends while the worker was still getting ready."""


@dataclass(frozen=True)
class Ready:
    """What the worker has once it is warm.

    Attributes:
        programs: All compiled.
        times: Batch size to the buckets' times.
    """

    programs: Programs
    times: dict[int, Measured]

    @property
    def load(self) -> float:
        """To begin with, whatever the batch size."""
        return float(np.median([measured.load for measured in self.times.values()]))


class Worker:
    """A thread with a queue before it.

    Attributes:
        ready: What it runs; None until it is warm.
        progress: How far it is until then.
        failure: Why it will never be, or is no more.
    """

    def __init__(
        self,
        prepare: Callable[[Callable[[str], None]], Ready],
        config: ServeConfig,
        metrics: Metrics,
        on_failure: Callable[[], None] = lambda: None,
    ):
        """Does nothing before `start`.

        Args:
            prepare: Compiles and measures; says now and then how far it is to what it is given,
                which raises when the service ends.
            config: Of the service.
            metrics: Are kept up to date.
            on_failure: Called if the thread ends by an error, which is `failure`.
        """
        self._prepare, self._config, self._metrics = prepare, config, metrics
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._stopping = False
        self._drives = Drives(config.limits.drives, config.limits.drive_seconds)
        self._load = 1.0
        self._batches = 0
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.ready: Ready | None = None
        self.progress = "starting"
        self.failure: Exception | None = None

    def start(self) -> None:
        """Begins to compile."""
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Plans what is being planned, refuses what waits; whether the thread ended in time."""
        with self._changed:
            self._stopping = True
            left, self._waiting = self._waiting, []
            self._changed.notify_all()
        for job in left:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(ending())
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def check_open(self) -> None:
        """Refuses what `submit` would refuse, before its pictures are read.

        Raises:
            Refusal: 503, the service is not warm, ends, or too many wait.
        """
        if self._stopping:
            raise ending()
        if self.ready is None:
            raise Refusal(
                503,
                "not_ready",
                f"The service is not ready yet ({self.progress}); ask /readyz and come back.",
                {"Retry-After": "5"},
            )
        if len(self._waiting) >= self._config.limits.queue:
            raise Refusal(
                503,
                "queue_full",
                f"{len(self._waiting)} frames wait already; come back in a second.",
                {"Retry-After": "1"},
            )

    def submit(self, job: Job) -> Future:
        """Puts a job at the queue's end.

        Raises:
            Refusal: See `check_open`.
        """
        with self._changed:
            self.check_open()
            self._waiting.append(job)
            self._metrics.queue.set(len(self._waiting))
            self._changed.notify_all()
        return job.answer

    def _run(self) -> None:
        try:
            ready = self._prepare(self._report)
            self._load, self.progress = ready.load, "ready"
            self._metrics.load.set(self._load)
            self.ready = ready
            while self._turn(ready):
                pass
        except Stopped:
            return
        except Exception as error:  # without this thread no request would ever be answered
            self.failure = error
            self._on_failure()

    def _turn(self, ready: Ready) -> bool:
        """Plans a batch; whether the service goes on.

        Apart from the loop, so that no name of it holds a batch's memories until the next.
        """
        taken = self._take()
        try:
            self._plan(ready, taken)
        except Exception as error:
            log.exception("a batch of %d frames failed", len(taken))
            for job, _ in taken:
                if not job.answer.done():
                    job.answer.set_exception(error)
        return bool(taken)

    def _report(self, progress: str) -> None:
        self.progress = progress
        if self._stopping:
            raise Stopped

    def _take(self) -> list[tuple[Job, Budget]]:
        """Waits for a batch and takes it out of the queue; empty when the service ends.

        Drives that fall silent are forgotten meanwhile.
        """
        config = self._config
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                self._drives.forget(now)
                self._metrics.drives.set(len(self._drives))
                if not self._waiting:
                    left = self._drives.seconds_left(now)
                    # It takes no longer timeout, and drives may be kept for ever.
                    self._changed.wait(left and min(left, threading.TIMEOUT_MAX))
                    continue
                # Decided once: time goes on, and a job that named its ratio must get it.
                budgets = [self._budget(job) for job in self._waiting]
                batch = next_batch(self._waiting, budgets, config.max_batch)
                left = self._waiting[0].queued + config.max_wait_ms / 1e3 - time.perf_counter()
                if len(batch) < config.max_batch and left > 0:
                    self._changed.wait(left)
                    continue
                taken = [(self._waiting[place], budgets[place]) for place in batch]
                for place in reversed(batch):
                    del self._waiting[place]
                self._metrics.queue.set(len(self._waiting))
                return taken
        return []

    def _budget(self, job: Job) -> Budget:
        """The bucket of a job, by what is left of its target and how many share its batch."""
        asked, ready = job.asked, self.ready
        if asked.keep_ratio is not None:
            return Budget(asked.keep_ratio)
        target = asked.target_ms or self._config.target_ms
        if target is None:
            return Budget(ready.programs.ratios[0])
        spent = 1e3 * (time.perf_counter() - job.arrived)
        measured = ready.times[ready.programs.size_for(len(self._waiting))]
        choice = choose_bucket(measured.buckets, target - spent, self._load)
        note = None if choice.meets else miss_sentence(choice, target, spent)
        return Budget(choice.bucket.keep_ratio, target, choice.meets, note)

    def _plan(self, ready: Ready, taken: list[tuple[Job, Budget]]) -> None:
        live: list[tuple[Job, Budget, Recalled | None]] = []
        for job, budget in taken:
            if not job.answer.set_running_or_notify_cancel():
                continue  # its client has given up
            try:
                live.append((job, budget, self._recall(job.asked)))
            except Refusal as refusal:
                job.answer.set_exception(refusal)
        if not live:
            return
        ratio = live[0][1].keep_ratio
        frames = [
            Frame(job.images, job.asked.speed, job.asked.command, known and known.memory)
            for job, _, known in live
        ]
        begun = time.perf_counter()
        planned = run_batch(ready.programs, ratio, frames, self._batches)
        spent = 1e3 * (time.perf_counter() - begun)
        self._batches = (self._batches + 1) % 2**32
        self._learn(ready, ratio, len(live), spent)
        for (job, budget, known), plan in zip(live, planned, strict=True):
            if known is not None and not job.given_up.is_set():
                self._drives.remember(job.asked.drive, known.frame, plan.memory, time.monotonic())
            self._metrics.kept.observe(len(plan.kept) / ready.programs.total)
            job.answer.set_result(
                Answer(
                    planned=plan,
                    budget=budget,
                    frame=known and known.frame,
                    notes=tuple(filter(None, (known and known.note, budget.note))),
                    queue_ms=1e3 * (begun - job.queued),
                    model_ms=spent,
                    batch=len(live),
                )
            )

    def _recall(self, asked: PlanRequest) -> Recalled | None:
        if asked.drive is None:
            return None
        return self._drives.recall(asked.drive, asked.frame, time.monotonic())

    def _learn(self, ready: Ready, ratio: float, count: int, spent: float) -> None:
        buckets = ready.times[ready.programs.size_for(count)].buckets
        bucket = next(one for one in buckets if one.keep_ratio == ratio)
        self._load = next_load(self._load, bucket, spent)
        self._metrics.load.set(self._load)
        self._metrics.batch.observe(count)


def ending() -> Refusal:
    """Of a request that a service at its end does not serve any more."""
    return Refusal(503, "ending", "The service is shutting down.", {"Retry-After": "5"})
