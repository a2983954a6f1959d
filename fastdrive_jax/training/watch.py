"""Watching a run beside its log: TensorBoard, pictures and a profile of some steps."""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from PIL import Image

from fastdrive_jax.errors import UserError
from fastdrive_jax.files import write_bytes
from fastdrive_jax.training.metrics_log import Record
from fastdrive_jax.training.state import Batch, TrainState
from fastdrive_jax.training.tensorboard import EventLog

Images = Callable[[TrainState, Batch], Mapping[str, np.ndarray]]
Paused = Callable[[str], contextlib.AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What is watched; none of it changes what is trained.

    Attributes:
        tensorboard: also writes RUN/tensorboard, which needs the extra "watch".
        images_every: steps between pictures in RUN/images (and TensorBoard); 0 for none.
        profile: (start, stop): steps start to stop - 1 are traced into RUN/profile, to be opened
            with XProf or Perfetto; a few are enough.
        peak_flops: FLOP/s of all devices of the run together, by their data sheet; gives `mfu`, the
            share of it that the step uses.
        flops_per_step: FLOPs of a step over the whole batch; None counts those of XLA's program
            (`speed.xla_flops` says what that leaves out). Needs `peak_flops`.
        on_recompile: what a step that is compiled a second time does.
    """

    tensorboard: bool = False
    images_every: int = 0
    profile: tuple[int, int] | None = None
    peak_flops: float | None = None
    flops_per_step: float | None = None
    on_recompile: Literal["warn", "raise"] = "warn"

    def __post_init__(self):
        if self.images_every < 0:
            raise UserError(f"images_every must not be negative, but is {self.images_every}.")
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1]:
            raise UserError(
                f"profile must be two steps (start, stop) with 0 <= start < stop, not "
                f"{self.profile}."
            )
        for name in ("peak_flops", "flops_per_step"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} must be positive, not {value}.")
        if self.flops_per_step is not None and self.peak_flops is None:
            raise UserError("flops_per_step tells nothing without peak_flops: give both or none.")
        if self.on_recompile not in ("warn", "raise"):
            raise UserError(f"on_recompile must be warn or raise, not {self.on_recompile!r}.")


class Watcher:
    """Does what a `WatchConfig` says, the writing on the first process; a context manager."""

    def __init__(
        self, config: WatchConfig, folder: Path, resume_step: int | None, images: Images | None
    ):
        """Opens the files.

        Args:
            config: what to watch.
            folder: of the run.
            resume_step: restored step, None in a new run.
            images: gives the pictures, uint8 [H, W, 3] by name, from the state before a step and
                the batch of that step; on several processes, pictures that each has whole.
        """
        if config.images_every and images is None:
            raise ValueError("images_every needs fit(..., images=...), which draws them")
        self._images = images if config.images_every else None
        self._every, self._folder = config.images_every, folder
        self._writes = jax.process_index() == 0
        self._profile = _ProfileWindow(config.profile if self._writes else None, folder / "profile")
        self._events = None
        if config.tensorboard and self._writes:
            self._events = EventLog(folder / "tensorboard", resume_step)

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.ExitStack() as stack:
            if self._events:
                stack.push(self._events)
            stack.callback(self._profile.stop)

    def record(self, record: Record) -> None:
        """Hand a record of the log on."""
        if self._events:
            self._events.write(record)

    def before_step(self, step: int, state: TrainState, batch: Batch, paused: Paused) -> None:
        """Draw pictures and begin or end the profile, where it is time.

        Args:
            step: number of updates made.
            state: before the step.
            batch: of the step.
            paused: `(name) -> context`, in which the devices have finished and time is not counted
                as training.
        """
        if self._images and step % self._every == 0:
            with paused("images_s"):
                found = self._images(state, batch)  # by all processes, which share the arrays
                for name, image in found.items() if self._writes else ():
                    self._draw(step, name, np.asarray(image))
        if self._profile.due(step):
            with paused("profile_s"):
                self._profile.turn()

    def _draw(self, step: int, name: str, image: np.ndarray) -> None:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"picture {name!r} must be uint8 [H, W, 3], not {image.dtype} {image.shape}"
            )
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        path = self._folder / "images" / name / f"{step:08d}.png"
        write_bytes(path, buffer.getvalue())
        if self._events:
            self._events.image(step, name, buffer.getvalue(), *image.shape[:2])


class _ProfileWindow:
    """Traces the steps of a window; a run that is resumed within it traces the rest."""

    def __init__(self, window: tuple[int, int] | None, folder: Path):
        self._window, self._folder, self._running = window, folder, False

    def due(self, step: int) -> bool:
        """Whether the trace begins or ends before this step."""
        inside = self._window is not None and self._window[0] <= step < self._window[1]
        return inside != self._running

    def turn(self) -> None:
        """Begin or end."""
        if self._running:
            self.stop()
            return
        jax.profiler.start_trace(self._folder)
        self._running = True

    def stop(self) -> None:
        """End the trace if there is one; it is written now."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
