"""A tiny random policy with memory, compiled once, and services around it."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import jax
import numpy as np
import requests

from fastdrive_jax.inference.policy import DrivingPolicy, plan, start_state
from fastdrive_jax.serving.app import Service
from fastdrive_jax.serving.config import Limits, ServeConfig
from fastdrive_jax.serving.metrics import Metrics
from fastdrive_jax.serving.server import http_server, listen
from fastdrive_jax.serving.worker import Ready, Worker

RATIOS, SIZES = (1.0, 0.5), (1, 4)  # few programs; two or three frames are padded
LIMITS = Limits(body_mb=1.0, megapixels=1.0, answer_seconds=20.0)
CONFIG = ServeConfig(ratios=RATIOS, max_batch=4, max_wait_ms=1.0, limits=LIMITS)


def service_of(ready: Ready, config: ServeConfig = CONFIG, demo=()) -> Service:
    metrics = Metrics()
    worker = Worker(lambda progress: ready, config, metrics)
    policy = ready.programs.policy
    return Service(config, policy.model.config, policy.pruner.name, worker, metrics, demo)


@contextlib.contextmanager
def running(service: Service, port: int = 0):
    """A service on a free port, or that one, as its address."""
    with listen("127.0.0.1", port) as listening:
        server = http_server(service)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            until(lambda: server.started and service.worker.ready is not None)
            yield address
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    begin = time.monotonic()
    while not true():
        assert time.monotonic() < begin + seconds, "nothing happened"
        time.sleep(0.01)


def picture(seed: int, size=(56, 140)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 10, 3), np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)


def png(seed: int) -> bytes:
    """Lossless, so that the service sees `picture(seed)` to the last bit."""
    return cv2.imencode(".png", picture(seed)[..., ::-1])[1].tobytes()


def ask(address: str, seed: int = 0, files=None, **asked) -> requests.Response:
    asked = {"speed": 5.0, "command": "straight", **asked}
    files = [("CAM_FRONT", ("a.png", png(seed)))] if files is None else files
    return requests.post(
        f"{address}/v1/plan", data={"request": json.dumps(asked)}, files=files, timeout=30
    )


@dataclass(frozen=True)
class Direct:
    """Plans without a service, each frame by itself, to compare with."""

    policy: DrivingPolicy
    params: dict

    def drive(self, seeds, ratio: float, speed: float = 5.0) -> list[tuple[np.ndarray, list]]:
        """Waypoints and kept tokens of the frames of a drive."""
        policy = DrivingPolicy(self.policy.model, self.policy.pruner, ratio)
        state, found = start_state(policy, 1), []
        for seed in seeds:
            given = picture(seed)[None, None], np.float32([speed]), np.int32([1])
            planned = _run(policy)(self.params, *given, None, state)
            state = planned.state
            found.append((np.asarray(planned.waypoints[0]), planned.keep_indices[0].tolist()))
        return found


_RUNS: dict = {}


def _run(policy):
    return _RUNS.setdefault(policy, jax.jit(partial(plan, policy)))


def places(content: dict, columns: int = 5) -> list[int]:
    """Kept tokens of the front camera by number."""
    return [row * columns + column for row, column in content["kept"]["CAM_FRONT"]]
