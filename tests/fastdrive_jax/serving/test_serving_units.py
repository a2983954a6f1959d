"""The parts of the service that need no socket."""

import math
import struct
import time
import weakref
import zlib
from dataclasses import replace

import cv2
import jax
import numpy as np
import pytest
from tiny_service import CONFIG, picture, service_of, until

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.latency import Measured
from fastdrive_jax.pruning import make_pruner
from fastdrive_jax.serving import worker as worker_module
from fastdrive_jax.serving.config import Limits, ServeConfig
from fastdrive_jax.serving.drives import Drives
from fastdrive_jax.serving.jobs import Budget, Job, next_batch
from fastdrive_jax.serving.metrics import Metrics
from fastdrive_jax.serving.pictures import read_picture
from fastdrive_jax.serving.programs import Frame, Planned, compile_programs, run_batch
from fastdrive_jax.serving.refusals import Refusal
from fastdrive_jax.serving.requests import PlanRequest, check_cameras
from fastdrive_jax.serving.server import ready_lines
from fastdrive_jax.serving.sites import is_loopback
from fastdrive_jax.serving.worker import Worker


def progressive(scans: int) -> bytes:
    """A JPEG whose last scan is there that many times more."""
    _, data = cv2.imencode(".jpg", picture(0), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    data = data.tobytes()
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + scans * data[last:end] + data[end:]


def huge(side: int) -> bytes:
    """What a PNG that claims to be that large begins with."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize(
    ("data", "status", "named"),
    [
        (huge(65_000), 413, "at most 1 megapixels"),
        (huge(2_000), 413, "2000 x 2000"),
        (progressive(100), 413, "scans; at most 50"),
        (b"\xff\xd8\xff", 422, r"decoded \(its header is damaged\)\."),
    ],
    ids=("huge", "large", "scans", "no header"),
)
def test_pictures_that_are_not_decoded(data, status, named):
    with pytest.raises(Refusal, match=named) as refusal:
        read_picture(data, "CAM_FRONT", (56, 140), 1.0)
    assert refusal.value.status == status


def test_progressive_pictures_are_decoded():
    assert read_picture(progressive(0), "CAM_FRONT", (28, 70), 1.0).shape == (28, 70, 3)


@pytest.mark.parametrize(
    ("host", "only_here"), [("localhost", True), ("127.1", True), ("::1", True), ("0.0.0.0", False)]
)
def test_who_reaches_an_address(host, only_here):
    assert is_loopback(host) == only_here


SIX = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT")


def frames(count: int) -> list[Frame]:
    return [Frame(picture(seed)[None], 3.0 + seed, seed % 3) for seed in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_a_batch_plans_what_its_frames_would_alone(ready, count, ratio):
    """Padded to the next compiled size, with and without memories."""
    programs = ready.programs
    batch = frames(count)
    for _ in range(3):
        together = run_batch(programs, ratio, batch)
        alone = [run_batch(programs, ratio, [frame])[0] for frame in batch]
        assert len(together) == count
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_array_equal(one.kept, other.kept)
            np.testing.assert_array_equal(one.waypoints, other.waypoints)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.memory, other.memory
            )
        # Every other frame begins anew.
        batch = [
            replace(frame, memory=one.memory if number % 2 else None)
            for number, (frame, one) in enumerate(zip(batch, together, strict=True))
        ]
    assert [one.remembered for one in together] == [bool(n % 2) for n in range(count)]


def test_a_memory_of_another_kind_is_not_used(ready):
    planned = run_batch(ready.programs, 0.5, [replace(frames(1)[0], memory={"other": 1})])
    assert not planned[0].remembered


def test_what_needs_the_truth_is_not_served(policy):
    served, params = policy
    truth = replace(served, pruner=make_pruner("ground_truth"))
    with pytest.raises(UserError, match="true foreground"):
        compile_programs(truth, params, (0.5,), (1,))


def job(drive: str | None = None) -> Job:
    return Job(PlanRequest(1.0, 1, drive), np.zeros((1, 2, 2, 3), np.uint8), 0.0, 0.0)


@pytest.mark.parametrize(
    ("waiting", "most", "chosen"),
    [
        ([("a", 0.5), ("b", 0.5), ("c", 0.5)], 2, [0, 1]),
        ([("a", 0.5), ("b", 1.0), ("c", 0.5)], 4, [0, 2]),
        ([("a", 0.5), ("a", 0.5), ("b", 0.5)], 4, [0, 2]),  # one frame of a drive
        ([("a", 0.5), ("b", 1.0), ("b", 0.5)], 4, [0]),  # b's second waits for its first
        ([(None, 0.5), (None, 0.5), (None, 0.5)], 4, [0, 1, 2]),
    ],
)
def test_who_shares_a_batch(waiting, most, chosen):
    jobs = [job(drive) for drive, _ in waiting]
    budgets = [Budget(ratio) for _, ratio in waiting]
    assert next_batch(jobs, budgets, most) == chosen


def test_drives_are_forgotten_by_time_and_number():
    drives = Drives(most=2, seconds=10)
    for at, name in enumerate("abc"):
        assert drives.recall(name, None, at).frame == 0
        drives.remember(name, 0, f"memory of {name}", at)
    assert len(drives) == 2
    assert drives.recall("a", 1, 3).memory is None  # b and c came after it
    assert drives.recall("b", None, 3).memory == "memory of b"
    drives.remember("b", 1, "more of b", 9)
    assert drives.recall("c", 1, 12).memory == "memory of c"
    assert drives.recall("c", 1, 12.5).note is not None  # silent for more than 10 s
    assert drives.recall("b", 2, 19).memory == "more of b"
    with pytest.raises(Refusal, match="frame 1 is not after it") as refusal:
        drives.recall("b", 1, 19)
    assert refusal.value.status == 409


def test_how_long_drives_are_known_still():
    drives = Drives(most=2, seconds=10)
    assert drives.seconds_left(0) is None
    drives.remember("a", 0, None, 1)
    drives.remember("b", 0, None, 4)
    assert drives.seconds_left(5) == 6
    drives.remember("a", 1, None, 6)  # now b is silent longest
    assert drives.seconds_left(6) == 8


class Memory:
    """What a drive leaves, and can be asked whether it is still there."""


@pytest.fixture
def left(monkeypatch) -> list[weakref.ref]:
    """Memories that a model in place of the real one has left."""
    left = []

    def plans(programs, ratio, batch, number):
        memories = [Memory() for _ in batch]
        left.extend(map(weakref.ref, memories))
        return [Planned(np.zeros((6, 2)), np.arange(4), memory, False) for memory in memories]

    monkeypatch.setattr(worker_module, "run_batch", plans)
    return left


def test_drives_may_be_kept_for_ever(ready, left):
    config = replace(CONFIG, limits=replace(CONFIG.limits, drive_seconds=math.inf))
    worker = service_of(ready, config).worker
    worker.start()
    until(lambda: worker.ready is not None)
    assert [worker.submit(job("a")).result(20).frame for _ in range(3)] == [0, 1, 2]
    assert worker.stop(5)


def test_drives_are_forgotten_though_no_frame_comes(ready, left):
    config = replace(CONFIG, limits=replace(CONFIG.limits, drive_seconds=0.5))
    service = service_of(ready, config)

    def known():
        return service.metrics.registry.get_sample_value("fastdrive_drives")

    service.worker.start()
    until(lambda: service.worker.ready is not None)
    assert service.metrics.registry.get_sample_value("fastdrive_load") == ready.load
    waiting = [service.worker.submit(job(drive)) for drive in ("a", "b")]
    for answer in waiting:
        answer.result(20)
    until(lambda: known() == 2)
    del waiting, answer
    assert left[0]() is not None
    until(lambda: known() == 0, 5)
    until(lambda: all(memory() is None for memory in left), 5)  # nor does the last batch hold any
    assert service.worker.stop(5)


def test_each_camera_gets_one_picture():
    check_cameras(SIX[::-1], SIX)
    with pytest.raises(Refusal, match=r"5 cameras.*4 came.*missing: CAM_BACK_LEFT"):
        check_cameras(SIX[:4], SIX)


def test_a_service_that_is_not_warm_or_full_says_when_to_come_back(ready):
    config = replace(CONFIG, limits=replace(CONFIG.limits, queue=1))
    worker = service_of(ready, config).worker
    with pytest.raises(Refusal, match="not ready yet") as refusal:
        worker.submit(job())
    assert (refusal.value.status, refusal.value.headers["Retry-After"]) == (503, "5")
    worker.ready = ready  # warm, but its thread does not run
    waiting = worker.submit(job())
    with pytest.raises(Refusal, match="1 frames wait") as refusal:
        worker.submit(job())
    assert (refusal.value.status, refusal.value.headers["Retry-After"]) == (503, "1")
    assert worker.stop(1.0)
    with pytest.raises(Refusal, match="shutting down"):
        waiting.result(0)
    with pytest.raises(Refusal, match="shutting down"):
        worker.submit(job())


def test_a_service_that_ends_while_it_compiles_stops_there(ready):
    reached = []

    def prepare(progress):
        for step in range(1000):
            progress(f"step {step}")
            reached.append(step)
            time.sleep(0.01)
        return ready

    worker = Worker(prepare, CONFIG, Metrics())
    worker.start()
    assert worker.stop(5.0)
    assert len(reached) < 1000
    assert worker.ready is None
    assert worker.failure is None


def test_a_service_that_cannot_get_ready_ends_with_the_reason(ready):
    def prepare(progress):
        raise UserError("this cannot be compiled")

    ended = []
    worker = Worker(prepare, CONFIG, Metrics(), lambda: ended.append(True))
    worker.start()
    assert worker.stop(5.0)
    assert ended == [True]
    assert "cannot be compiled" in str(worker.failure)
    assert worker.ready is None


def test_a_worker_that_can_go_on_no_more_ends_the_service(ready, monkeypatch):
    monkeypatch.setattr(worker_module, "next_batch", lambda *given: 1 / 0)
    ended = []
    worker = Worker(lambda progress: ready, CONFIG, Metrics(), lambda: ended.append(True))
    worker.start()
    until(lambda: worker.ready is not None)
    waiting = worker.submit(job())
    until(lambda: ended)
    assert isinstance(worker.failure, ZeroDivisionError)
    assert worker.stop(5.0)
    with pytest.raises(Refusal, match="shutting down"):
        waiting.result(0)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"ratios": ()}, "ratios="),
        ({"ratios": (0.5, 0.5)}, "ratios="),
        ({"ratios": (1.5,)}, "keep_ratio=1.5"),
        ({"port": 70000}, "port="),
        ({"max_batch": 0}, "max_batch="),
        ({"max_wait_ms": -1.0}, "max_wait_ms="),
        ({"target_ms": -1.0}, "target_ms="),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed, named):
    with pytest.raises(UserError, match=named):
        ServeConfig(**changed)
    with pytest.raises(UserError, match=r"limits\.queue=0"):
        Limits(queue=0)
    with pytest.raises(UserError, match=r"limits\.megapixels=nan"):
        Limits(megapixels=float("nan"))
    with pytest.raises(UserError, match=r"limits\.bodies_mb=512 must hold"):
        Limits(body_mb=600)


@pytest.mark.parametrize(("queue", "batch"), [(64, 4), (61, 4), (60, 5)])
def test_a_queue_that_could_never_be_full_is_refused(queue, batch):
    limits = Limits(queue=queue, connections=65)
    named = rf"limits\.connections=65 .* limits\.queue={queue} .* max_batch={batch} "
    with pytest.raises(UserError, match=named):
        ServeConfig(max_batch=batch, limits=limits)
    ServeConfig(max_batch=batch, limits=replace(limits, connections=queue + batch + 1))


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 4)), (6, (1, 2, 4, 6))]
)
def test_batch_sizes_are_powers_of_two_and_the_largest(most, sizes):
    assert ServeConfig(max_batch=most).batch_sizes == sizes


def test_a_target_that_no_bucket_meets_is_said_at_the_start(ready):
    slow = tuple(replace(one, median_ms=25.0) for one in ready.times[1].buckets)
    slow = replace(ready, times={1: Measured(slow, 2.0)})
    lines = ready_lines(slow, replace(CONFIG, target_ms=20.0))
    assert "No bucket is expected to meet 20 ms: the smallest, 0.5 (5 tokens)" in lines[-1]
    lines = ready_lines(slow, replace(CONFIG, target_ms=60.0))
    assert lines[-1] == "60 ms are met by 1 and below."
