"""The service over a socket."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import jax
import numpy as np
import pytest
import requests
from tiny_service import CONFIG, SIZES, ask, picture, places, png, running, service_of

from fastdrive_jax.inference.latency import Measured
from fastdrive_jax.serving import worker as worker_module
from fastdrive_jax.serving.programs import run_batch

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if "backend_compile" in event else None
)


def test_a_plan_is_that_of_the_policy(address, direct):
    for ratio in (1.0, 0.5):
        answer = ask(address, 3, keep_ratio=ratio)
        assert answer.status_code == 200
        content = answer.json()
        ((waypoints, kept),) = direct.drive([3], ratio)
        np.testing.assert_allclose(content["waypoints"], waypoints, atol=1e-3)
        assert places(content) == kept
        assert content["kept_tokens"] == len(kept) == int(10 * ratio)
        assert content["times"] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
        assert content["memory"] == "none"
        assert content["frame"] is None
        stages = content["timings_ms"]
        assert 0 < stages["model"] < stages["total"]


def test_each_drive_has_a_memory_of_its_own(address, direct):
    drives = {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7)}
    wanted = {name: direct.drive(seeds, 0.5) for name, seeds in drives.items()}
    alone = [direct.drive([seed], 0.5)[0][1] for seed in drives["a"]]
    assert alone != [kept for _, kept in wanted["a"]]  # memory changes what is kept
    for frame in range(4):
        for name, seeds in drives.items():
            content = ask(address, seeds[frame], drive=name, frame=frame, keep_ratio=0.5).json()
            waypoints, kept = wanted[name][frame]
            assert places(content) == kept
            np.testing.assert_allclose(content["waypoints"], waypoints, atol=1e-3)
            assert (content["frame"], content["memory"]) == (frame, "kept" if frame else "new")
            assert content["notes"] == []


def test_a_drive_may_change_its_ratio_and_keeps_its_memory(address):
    for frame, ratio in enumerate((1.0, 0.5, 0.5, 1.0)):
        content = ask(address, frame, drive="changing", keep_ratio=ratio).json()
        assert (content["frame"], content["keep_ratio"]) == (frame, ratio)
        assert content["memory"] == ("kept" if frame else "new")


def test_frames_that_are_late_lost_or_begin_again(address):
    assert ask(address, drive="c", frame=0).json()["memory"] == "new"
    assert ask(address, drive="c", frame=1).json()["memory"] == "kept"
    late = ask(address, drive="c", frame=1)
    assert late.status_code == 409
    assert "'c' is at frame 1" in late.json()["error"]
    gap = ask(address, drive="c", frame=5).json()
    assert gap["memory"] == "new"
    assert "Frames 2 to 4" in gap["notes"][0]
    assert ask(address, drive="c").json()["frame"] == 6
    assert ask(address, drive="c", frame=0).json()["memory"] == "new"
    lost = ask(address, drive="never heard of", frame=7)
    assert lost.status_code == 422  # a space
    lost = ask(address, drive="never", frame=7).json()
    assert (lost["frame"], lost["memory"]) == (7, "new")
    assert "is not known here" in lost["notes"][0]


def test_200_requests_from_8_clients(address, direct):
    """None is lost, none gets another's answer, drives stay in order, nothing is compiled."""
    wanted = {client: direct.drive(range(client, client + 25), 0.5) for client in range(8)}

    def client(number: int) -> list:
        with requests.Session() as session:
            return [
                session.post(
                    f"{address}/v1/plan",
                    data={
                        "request": json.dumps(
                            {
                                "speed": 5.0,
                                "command": "straight",
                                "drive": f"client-{number}",
                                "frame": frame,
                                "keep_ratio": 0.5,
                            }
                        )
                    },
                    files={"CAM_FRONT": png(number + frame)},
                    timeout=30,
                )
                for frame in range(25)
            ]

    before = len(COMPILED)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client, range(8)))
    assert len(COMPILED) == before
    batches = set()
    for number, frames in enumerate(answers):
        for frame, answer in enumerate(frames):
            assert answer.status_code == 200
            content = answer.json()
            assert content["frame"] == frame
            assert places(content) == wanted[number][frame][1]
            np.testing.assert_allclose(content["waypoints"], wanted[number][frame][0], atol=1e-3)
            batches.add(content["batch"])
    assert max(batches) > 1


def test_a_target_chooses_among_the_buckets(ready):
    # What the tiny model takes is noise: here buckets take 2 s and 1 s, whatever the batch.
    buckets = tuple(
        replace(one, median_ms=ms)
        for one, ms in zip(ready.times[1].buckets, (2000.0, 1000.0), strict=True)
    )
    faked = replace(ready, times=dict.fromkeys(ready.times, Measured(buckets, 1.0)))
    with running(service_of(faked, replace(CONFIG, target_ms=1500.0))) as address:
        assert ask(address).json()["keep_ratio"] == 0.5  # the service's own target
        loose = ask(address, target_ms=9000.0).json()
        assert (loose["keep_ratio"], loose["target_met"]) == (1.0, True)
        assert loose["notes"] == []
        missed = ask(address, target_ms=5.0).json()
        assert missed["keep_ratio"] == 0.5
        assert "No bucket is expected to meet 5 ms" in missed["notes"][0]
        assert ask(address, keep_ratio=1.0).json()["target_ms"] is None
        text = requests.get(f"{address}/metrics", timeout=5).text
        assert "fastdrive_target_missed_total 1.0" in text
        load = next(line for line in text.splitlines() if line.startswith("fastdrive_load "))
        assert float(load.split()[1]) == pytest.approx(math.exp(-0.012 * 4))  # all were faster


def test_a_target_that_was_missed_against_expectation_is_counted(ready, monkeypatch):
    def slow(*given):
        time.sleep(0.4)
        return run_batch(*given)

    monkeypatch.setattr(worker_module, "run_batch", slow)
    buckets = tuple(replace(one, median_ms=0.1) for one in ready.times[1].buckets)
    faked = replace(ready, times=dict.fromkeys(ready.times, Measured(buckets, 1.0)))
    service = service_of(faked)
    with running(service) as address:
        missed = ask(address, target_ms=300.0).json()
    assert (missed["target_met"], missed["notes"]) == (False, [])
    assert service.metrics.registry.get_sample_value("fastdrive_target_missed_total") == 1


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"speed": -1}, "speed=-1"),
        ({"speed": True}, "speed=True"),
        ({"command": "up"}, "command='up'"),
        ({"speed": 10**400}, "speed=inf must be a finite number"),
        ({"speed": -(10**400)}, "speed=-inf must be a finite number"),
        ({"keep_ratio": 10**400}, "keep_ratio=inf must be a finite number"),
        ({"target_ms": 10**400}, "target_ms=inf must be a finite number"),
        ({"drive": "a", "frame": 10**400}, "frame=inf must be a whole number"),
        ({"drive": "a", "frame": 2**31}, "frame=2147483648 must be a whole number"),
        ({"keep_ratio": 0.7}, "choose from 1, 0.5."),
        ({"keep_ratio": 0.5, "target_ms": 5}, "exclude each other"),
        ({"target_ms": 0}, "target_ms=0"),
        ({"frame": 3}, "name the drive too"),
        ({"drive": "a" * 65}, "1 to 64"),
        ({"drive": "a", "frame": 1.5}, "frame=1.5"),
        ({"colour": "red"}, "unknown colour"),
    ],
)
def test_what_is_asked_is_checked_field_by_field(address, asked, named):
    answer = ask(address, **asked)
    assert answer.status_code == 422
    assert named in answer.json()["error"]


def test_files_that_are_no_pictures_are_refused(address):
    text = ask(address, files=[("CAM_FRONT", ("a.jpg", b"no picture at all", "image/jpeg"))])
    assert text.status_code == 415
    assert "CAM_FRONT is neither JPEG nor PNG" in text.json()["error"]
    cut = ask(address, files=[("CAM_FRONT", ("a.png", png(0)[:-40]))])
    assert cut.status_code == 422
    assert "cannot be decoded" in cut.json()["error"]
    assert ask(address).status_code == 200


def test_wrong_cameras_are_refused(address):
    front, back = ("CAM_FRONT", ("a.png", png(0))), ("CAM_BACK", ("b.png", png(1)))
    for files, named in (
        ([back], "missing: CAM_FRONT; unknown: CAM_BACK"),
        ([front, back], "2 came"),
        ([front, front], "twice: CAM_FRONT"),
    ):
        answer = ask(address, files=files)
        assert answer.status_code == 422
        assert named in answer.json()["error"]
    form = {"request": '{"speed": 1, "command": "left"}', "CAM_FRONT": "text"}
    nothing = requests.post(f"{address}/v1/plan", data=form, timeout=5)
    assert nothing.status_code == 415  # no multipart


def test_a_picture_that_unpacks_to_too_much_is_refused_by_its_header(address):
    bomb = cv2.imencode(".png", np.zeros((4000, 4000), np.uint8))[1].tobytes()
    assert len(bomb) < 50_000
    answer = ask(address, files=[("CAM_FRONT", ("a.png", bomb))])
    assert answer.status_code == 413
    assert "4000 x 4000" in answer.json()["error"]


def test_a_number_of_more_digits_than_python_reads_is_named(address):
    text = '{"command": "left", "speed": %s}' % ("9" * 5000)
    files = {"CAM_FRONT": png(0)}
    answer = requests.post(f"{address}/v1/plan", data={"request": text}, files=files, timeout=30)
    assert answer.status_code == 422
    assert answer.json()["error"] == "speed=inf must be a finite number."


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://localhost:1234", "Host": "localhost:1234"}, 422),
        ({"Origin": "https://proxy.example", "Sec-Fetch-Site": "same-origin"}, 422),
        ({"Host": "[::1]:8000"}, 422),
    ],
)
def test_pages_of_other_sites_may_not_ask(address, headers, status):
    """Whoever may is told that the request is missing."""
    given = {"files": {"CAM_FRONT": png(0)}, "headers": headers, "timeout": 30}
    assert requests.post(f"{address}/v1/plan", **given).status_code == status


def test_a_fault_is_answered_and_does_not_end_the_worker(ready, monkeypatch):
    monkeypatch.setattr(worker_module, "run_batch", lambda *given: 1 / 0)
    with running(service_of(ready)) as address:
        answer = ask(address)
        assert answer.status_code == 500
        assert "failed at this frame" in answer.json()["error"]
        monkeypatch.undo()
        assert ask(address).status_code == 200


def test_the_service_tells_what_it_is_and_how(address):
    info = requests.get(f"{address}/v1/info", timeout=5).json()
    assert info["cameras"] == ["CAM_FRONT"]
    assert info["token_grid"] == [2, 5]
    assert info["remembers"] is True
    assert {(one["batch"], one["tokens"]) for one in info["buckets"]} == {
        (size, tokens) for size in SIZES for tokens in (10, 5)
    }
    assert requests.get(f"{address}/healthz", timeout=5).text == "ok\n"
    assert requests.get(f"{address}/readyz", timeout=5).text == "ready\n"
    ask(address, keep_ratio=0.5)
    text = requests.get(f"{address}/metrics", timeout=5).text
    for name in (
        'fastdrive_requests_total{code="200"}',
        "fastdrive_queue_depth",
        'fastdrive_latency_seconds_count{stage="total"}',
        "fastdrive_batch_size_count",
        "fastdrive_kept_ratio_count",
    ):
        assert name in text
    strange = requests.get(f"{address}/v1/info", headers={"Host": "evil.example"}, timeout=5)
    assert strange.status_code == 400
    assert "as localhost" in strange.json()["error"]
    for path in ("nothing", "demo/0/0", f"demo/{'9' * 5000}/0"):
        nothing = requests.get(f"{address}/v1/{path}", timeout=5)
        assert (nothing.status_code, nothing.json()["reason"]) == (404, "not_found")


def test_pictures_of_other_sizes_are_resized(address):
    large = cv2.resize(picture(3), (280, 112), interpolation=cv2.INTER_NEAREST)
    data = cv2.imencode(".png", large[..., ::-1])[1].tobytes()
    same, other = ask(address, 3), ask(address, files=[("CAM_FRONT", ("a.png", data))])
    assert same.json()["waypoints"] == other.json()["waypoints"]


def test_the_kind_of_a_body_is_read_as_http_has_it(address):
    body = b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n--B--\r\n'
    for kind, status in (("Multipart/Form-Data", 422), ("multipart/form-datax", 415)):
        headers = {"Content-Type": f"{kind}; boundary=B"}
        sent = requests.post(f"{address}/v1/plan", data=body, headers=headers, timeout=30)
        assert sent.status_code == status
