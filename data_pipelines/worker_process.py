"""Processes that work for another: what each does first, and a pool of them over jobs."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cv2

from fastdrive_jax.errors import UserError


def start_worker() -> None:
    """One thread of OpenCV for each process, which ends with its parent.

    A terminal sends Ctrl-C to this process too, which then ends without a traceback of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()

    def leave_with_parent():
        # A pool's queue never closes by itself when the parent is killed.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def run_jobs(
    jobs: Sequence[Any], write: Callable[[Any, Path], Any], folder: Path, workers: int
) -> Iterator[Any]:
    """Calls `write(job, folder)` for each job, in spawned processes, and yields what it returns.

    Raises:
        UserError: A worker died.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield write(job, folder)
        return
    context = multiprocessing.get_context("spawn")
    try:
        count = min(workers, len(jobs))
        with ProcessPoolExecutor(count, context, initializer=start_worker) as pool:
            futures = [pool.submit(write, job, folder) for job in jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise UserError(
            f"A worker died while writing {folder}, most likely for lack of memory; run the same "
            "command again with fewer workers, it goes on where it stopped."
        ) from error
