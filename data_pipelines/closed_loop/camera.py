"""The front pictures of many routes at a moment, drawn by worker processes."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from data_pipelines.closed_loop.route import Route
from data_pipelines.schema import TOKEN_PIXELS
from data_pipelines.synthetic.camera import make_camera
from data_pipelines.synthetic.config import FOREGROUND_IDS
from data_pipelines.synthetic.planner import EgoState
from data_pipelines.synthetic.render import Picture, Stage, prepare, render
from data_pipelines.worker_process import start_worker
from fastdrive_jax.evaluation.foreground import token_fractions

Job = tuple[int, EgoState, float, int]  # route, state, seconds, number of the frame


class FrontCameras:
    """Draws for some routes; a context that ends its processes.

    One process for each worker; a single worker draws in this process.
    """

    def __init__(self, routes: Sequence[Route], size: tuple[int, int], workers: int = 0):
        """Starts the workers.

        Args:
            routes: All that will be asked for.
            size: Height and width of a picture.
            workers: 0 takes the CPU count.
        """
        self._studio = Studio(routes, size)
        self._workers = min(workers or os.cpu_count() or 1, len(routes))
        self._pool = None

    def __enter__(self):
        if self._workers > 1:
            self._pool = ProcessPoolExecutor(
                self._workers,
                multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self._studio,),
            )
        return self

    def __exit__(self, *error):
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, jobs: Sequence[Job]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 `[J, H, W, 3]` and foreground shares of their tokens `[J, N]`."""
        if self._pool is None:
            parts = [self._studio.draw(job) for job in jobs]
        else:
            # Twice as many parts as workers: pictures take different time.
            count = min(2 * self._workers, len(jobs))
            cuts = np.array_split(np.arange(len(jobs)), count)
            futures = [self._pool.submit(_draw, [jobs[k] for k in cut]) for cut in cuts]
            parts = [part for future in futures for part in future.result()]
        images, shares = zip(*parts, strict=True)
        return np.stack(images), np.stack(shares)


class Studio:
    """Draws in this process, and keeps what the pictures of a scene share."""

    def __init__(self, routes: Sequence[Route], size: tuple[int, int]):
        self._routes, self._size = tuple(routes), size
        self._stages: dict[tuple[int, int], Stage] = {}

    def picture(self, job: Job) -> Picture:
        """The picture of a route's front camera."""
        number, state, time, frame = job
        route = self._routes[number]
        phase, scene = route.phase(time), route.scene(time)
        if (number, phase) not in self._stages:
            self._stages[number, phase] = prepare(scene)
        camera = make_camera("CAM_FRONT", *self._size, scene.pitch["CAM_FRONT"])
        # As in the world's own pictures: the body sways, and each key frame has its noise.
        sway = scene.sway[frame % len(scene.sway)]
        return render(
            scene, self._stages[number, phase], camera, state, route.begin + time, sway, 64 * frame
        )

    def draw(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        """The picture and the foreground shares of its tokens `[N]`."""
        picture = self.picture(job)
        shares = token_fractions(picture.labels[None], FOREGROUND_IDS, TOKEN_PIXELS)[0]
        return picture.image, shares.astype(np.float32)


_worker: Studio | None = None


def _start(studio: Studio):
    global _worker
    start_worker()
    _worker = studio


def _draw(jobs: list[Job]):
    return [_worker.draw(job) for job in jobs]
