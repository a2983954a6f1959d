"""Checkpoints of a run: train state and data position together.

A thin layer over Orbax's `CheckpointManager`. A checkpoint is committed by a rename, so one whose
writing was cut off is never seen, and its remains are removed when the run is opened again.
"""

import contextlib
import errno
import fcntl
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from fastdrive_jax.errors import UserError
from fastdrive_jax.parallel.hosts import on_first, refuse_together, sees_what_first_wrote
from fastdrive_jax.training.best import Best, preservation
from fastdrive_jax.training.integrity import verify_checksums, write_checksums
from fastdrive_jax.training.run_config import CONFIG_FILE, claim_run_folder

ASIDE = "aside-"  # and the step: a checkpoint that is being written anew
_NO_ROOM = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class Positioned(Protocol):
    """An iterator of batches whose position is a JSON object, equal on all hosts."""

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        ...


def bring_back(folder: Path) -> None:
    """Puts checkpoints that were set aside back in their place, unless they are there anew.

    Args:
        folder: Of a run, whose saves are finished or cut off.
    """
    for aside in folder.glob(f"{ASIDE}*"):
        place = folder / "checkpoints" / aside.name.removeprefix(ASIDE)
        if place.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(place)


class RunCheckpoints:
    """The checkpoints of one run folder; use it as a context manager.

    `FOLDER/config.json` is the config and `FOLDER/checkpoints/STEP/` a checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        *,
        keep: int = 2,
        best: Best | None = None,
        ignore: Collection[str] = (),
        read_only: bool = False,
    ):
        """Open a run folder, new or old.

        Args:
            folder: of the run.
            config: dataclass of the run; an old folder must hold the same one.
            keep: how many of the newest checkpoints stay.
            best: by which metric the best one is known, which stays as well.
            ignore: dotted names of config fields that may differ from the stored ones.
            read_only: touch nothing; the run may be going on in another process.

        Raises:
            UserError: the folder holds a run of another config, or another process writes in it.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self._held = contextlib.ExitStack()

        def claim():
            claim_run_folder(folder, config, ignore)
            self._held.enter_context(_held(folder))
            bring_back(folder)

        if not read_only:
            on_first(claim)
            sees_what_first_wrote(folder / CONFIG_FILE)
        self.folder, self._read_only = folder, read_only
        self._root = (folder / "checkpoints").absolute()
        self._saving: int | None = None
        self._best = best
        with _reading(self._root):
            self._manager = ocp.CheckpointManager(
                self._root,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation(keep, best),
                    best_fn=best and best.value,
                    best_mode=best.mode if best else "max",
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                    create=not read_only,
                    save_interval_steps=0 if read_only else 1,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
                ),
            )
        # Kept here since Orbax would read it from a checkpoint that may still be on its way.
        self._best_value: float | None = None
        if best and (step := self._manager.best_step()) is not None:
            self._best_value = best.value(self._manager.metrics(step))
        self._log_filter = _DropRaisedErrors()
        logging.getLogger("absl").addFilter(self._log_filter)

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
            return
        # What went wrong first is the news, not that the last save could not be finished as well.
        with contextlib.suppress(Exception):
            self.close()

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, None in a new run."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the best checkpoint, None if none was measured."""
        if self._best is None:
            raise ValueError("name the metric: RunCheckpoints(..., best=Best(metric, mode))")
        return self._manager.best_step()

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether a state of such metrics would be better than every one saved so far.

        Raises:
            UserError: the best metric is not among them.
        """
        return self._best.improves(self._best.value(metrics), self._best_value)

    def save(
        self,
        step: int,
        state: Any,
        iterator: Positioned,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copy state and data position now, write them in the background.

        A step that is already saved is left as it is, unless it is now measured to be the best, or
        its equal: a signal saves a step without waiting for its metrics. `state` may be donated
        afterwards.

        Args:
            step: number of updates made.
            state: pytree of arrays.
            iterator: about to give the batch of that update; it must not have been advanced.
            metrics: what this very state was measured to be; kept with it if there is a `best`,
                whose metric must be among them. Without metrics it is never the best.

        Raises:
            UserError: this save or the one before it found no room on the disk, or the best metric
                is not among `metrics`.
        """
        if metrics is not None and self._best:
            # Neither JSON nor an order has a place for what is not finite.
            measured = math.isfinite(self._best.value(metrics))
            finite = {name: float(v) for name, v in metrics.items() if math.isfinite(v)}
            metrics = finite if measured else None
        better = bool(self._best and metrics and self.improves(metrics))
        there = step in self._manager.all_steps()
        if there and not (better or self._ties(step, metrics)):
            return
        with self._explained(step):
            self._manager.wait_until_finished()
            _check_room(self._root, state)
            self._saving = step
            if there:
                self._set_aside(step)
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(_one_copy(state)),
                data=ocp.args.JsonSave(iterator.get_state()),
            )
            self._manager.save(step, args=args, metrics=metrics, force=True)
            if better:
                self._best_value = self._best.value(metrics)

    def restore(
        self, abstract: Any, iterator: Positioned | None = None, step: int | None = None
    ) -> Any:
        """Read a checkpoint and put the iterator, if there is one, where it was.

        Args:
            abstract: tree of `jax.ShapeDtypeStruct` with shardings, like the saved state.
            iterator: of the same data; its position is set. None to read the state alone.
            step: which checkpoint, by default the newest.

        Returns:
            The state, each leaf where `abstract` says.

        Raises:
            UserError: it is damaged, or not of such a state or data.
            ValueError: there is no checkpoint.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise ValueError(f"{self.folder} has no checkpoint to restore")
        folder = self._root / str(step)
        share = jax.process_index(), jax.process_count()
        refuse_together(lambda: verify_checksums(folder, *share))
        wanted = {"state": ocp.args.StandardRestore(abstract)}
        if iterator is not None:
            wanted["data"] = ocp.args.JsonRestore()
        args = ocp.args.Composite(**wanted)
        with _reading(folder):
            _check_tree(folder, _stored_tree(folder / "state"), abstract)
            found = self._manager.restore(step, args=args)
        if iterator is not None:
            iterator.set_state(found.data)
        return found.state

    def wait(self) -> None:
        """Return when what was saved is on the disk.

        Raises:
            UserError: there was no room for it.
        """
        with self._explained(self._saving):
            self._manager.wait_until_finished()
        if jax.process_index() == 0 and not self._read_only:
            bring_back(self.folder)

    def close(self) -> None:
        """Wait, then free the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()
            logging.getLogger("absl").removeFilter(self._log_filter)
            self._held.close()

    def _ties(self, step: int, metrics: Mapping[str, float] | None) -> bool:
        """Whether a step that is the best one's equal is there without having been measured."""
        if not self._best or not metrics or self._best.value(metrics) != self._best_value:
            return False
        return self._manager.metrics(step) is None

    def _set_aside(self, step: int) -> None:
        """Makes room for a checkpoint anew, until which is whole the old one is kept."""
        if jax.process_index() == 0:
            (self._root / str(step)).rename(self.folder / f"{ASIDE}{step}")
        multihost_utils.sync_global_devices("a checkpoint is set aside")
        self._manager.reload()

    def _seal(self) -> None:
        """Add checksums to the written files; Orbax calls this just before it commits them."""
        # The name of the unfinished folder is Orbax's affair; that it begins with the step is not.
        unfinished = [path for path in self._root.glob(f"{self._saving}.*") if path.is_dir()]
        if len(unfinished) != 1:
            raise RuntimeError(f"one unfinished checkpoint expected, found {unfinished}")
        write_checksums(unfinished[0])

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if any(text in str(error) for text in _NO_ROOM):
                raise UserError(
                    f"No room on the disk for checkpoint {step} of {self.folder}: free some, "
                    "then run the same command again to go on from the checkpoint before."
                ) from error
            raise


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process; the system lets go of it when the process dies."""
    with (folder / CONFIG_FILE).open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"Another process trains in {folder}; wait for it to end, or stop it."
                ) from error
            # A network disk may have no locks at all.
        yield


def _one_copy(state: Any) -> Any:
    """Of what all devices of the only process hold, the first one's copy.

    Orbax has each device write a part, so that hosts share the work; on one host that only costs
    the compilation of a program that cuts it off, for every shape and device.
    """
    if jax.process_count() > 1:
        return state

    def one(leaf):
        whole = isinstance(leaf, jax.Array) and leaf.is_fully_replicated
        return leaf.addressable_data(0) if whole else leaf

    return jax.tree.map(one, state)


def _check_room(folder: Path, tree: Any) -> None:
    """Refuse before writing what can't fit; another writer may still take the room."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"The disk of {folder} has {free >> 20} MiB left and a checkpoint needs "
            f"{needed / 2**20:.1f}: free some, then run the same command again."
        )


def _stored_tree(folder: Path) -> Any:
    """Shapes and dtypes of a saved tree, as Orbax's metadata."""
    handler = ocp.StandardCheckpointHandler()
    try:
        return handler.metadata(folder).tree
    finally:
        handler.close()


def _check_tree(folder: Path, stored: Any, abstract: Any) -> None:
    """Compare names and shapes, for Orbax finds out in the middle of reading."""
    found, asked = _shapes(stored), _shapes(abstract)
    wrong = [
        f"{name} is {found.get(name, 'absent')} there and {asked.get(name, 'absent')} here"
        for name in sorted(found.keys() | asked.keys())
        if found.get(name) != asked.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"The checkpoint {folder} is of another model: {', '.join(wrong[:5])}{more}."
        )


def _shapes(tree: Any) -> dict[str, str]:
    """Shape and kind of numbers by name: other bits of one kind are converted, kinds are not."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): _shape(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _shape(leaf: Any) -> str:
    fractions = jax.dtypes.issubdtype(leaf.dtype, np.inexact)
    return f"{tuple(leaf.shape)}" + ("" if fractions else f" of {leaf.dtype}")


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn whatever Orbax raises on reading (bare `Exception` among them) into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"The checkpoint {folder} can't be read as asked: {reason}") from error


class _DropRaisedErrors(logging.Filter):
    """Drops the tracebacks that Orbax logs from threads whose error it also raises."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in record.getMessage()
