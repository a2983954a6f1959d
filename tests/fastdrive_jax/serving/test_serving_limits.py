"""What a service does with too much, too late and too many, over a socket."""

import contextlib
import json
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
import requests
from tiny_service import CONFIG, ask, png, running, service_of, until

from fastdrive_jax.serving import app as app_module
from fastdrive_jax.serving import server as server_module
from fastdrive_jax.serving import worker as worker_module
from fastdrive_jax.serving.programs import run_batch

HEAD = (
    "POST /v1/plan HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
)


def connected(address: str) -> socket.socket:
    where = urlsplit(address)
    return socket.create_connection((where.hostname, where.port), timeout=10)


def test_100_megabytes_are_refused_before_they_are_sent(address):
    with connected(address) as client:
        client.sendall(f"{HEAD}Content-Length: {100 * 2**20}\r\n\r\n".encode())
        answer = client.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 413")
    assert "larger than 1 MiB" in answer


def test_100_megabytes_of_unknown_length_are_refused_on_the_way(address):
    begin = b'--x\r\nContent-Disposition: form-data; name="CAM_FRONT"; filename="a.jpg"\r\n\r\n'
    sent, answer = 0, b""
    with connected(address) as client:
        client.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        client.sendall(b"%x\r\n%s\r\n" % (len(begin), begin))
        while sent < 100 * 2**20 and not select.select([client], [], [], 0)[0]:
            client.sendall(b"%x\r\n%s\r\n" % (2**18, bytes(2**18)))
            sent += 2**18
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert sent < 30 * 2**20  # the limit, and what the kernel holds on the way
    assert ask(address).status_code == 200


def test_a_body_that_does_not_come_is_given_up(ready):
    limits = replace(CONFIG.limits, body_seconds=0.3)
    with running(service_of(ready, replace(CONFIG, limits=limits))) as address:
        with connected(address) as client:
            client.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n--x\r\n".encode())
            begin = time.monotonic()
            answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begin < 5


def test_a_plan_that_takes_too_long_is_given_up_and_a_queue_is_bounded(ready, monkeypatch):
    begun, release = threading.Event(), threading.Event()

    def slow(*given):
        begun.set()
        assert release.wait(20)
        return run_batch(*given)

    monkeypatch.setattr(worker_module, "run_batch", slow)
    limits = replace(CONFIG.limits, answer_seconds=0.2, queue=1)
    with running(service_of(ready, replace(CONFIG, limits=limits, max_batch=1))) as address:
        with ThreadPoolExecutor(1) as pool:
            running_one = pool.submit(ask, address)
            assert begun.wait(20)
            assert ask(address).status_code == 504  # it waits, in vain
            more = ask(address)
            assert more.status_code == 503
            assert more.headers["Retry-After"] == "1"
            assert running_one.result().status_code == 504
        release.set()
        until(lambda: ask(address).status_code == 200)


def refused(address: str, reason: str) -> float:
    """How many the metrics tell of."""
    text = requests.get(f"{address}/metrics", timeout=5).text
    lines = (line.rpartition(" ") for line in text.splitlines())
    name = f'fastdrive_errors_total{{reason="{reason}"}}'
    return sum(float(value) for found, _, value in lines if found == name)


FEW = replace(
    CONFIG, max_batch=1, limits=replace(CONFIG.limits, queue=1, connections=3, body_seconds=20.0)
)


def test_only_so_many_bodies_are_read_at_once(ready):
    service = service_of(ready, FEW)
    with running(service) as address, contextlib.ExitStack() as stack:
        senders = [stack.enter_context(connected(address)) for _ in range(3)]
        for sender in senders:
            sender.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n--x\r\n".encode())
        until(lambda: len(service.bodies) == 3)
        more = ask(address)
        assert (more.status_code, more.headers["Retry-After"]) == (503, "1")
        assert more.json() == {
            "error": "3 requests are open already; come back in a second.",
            "reason": "busy",
        }
        assert refused(address, "busy") == 1
        assert requests.get(f"{address}/healthz", timeout=5).text == "ok\n"
        stack.close()  # the senders leave, and so do their places
        until(lambda: ask(address).status_code == 200)
    assert not service.bodies


def test_bodies_take_only_so_much_memory(ready):
    """What a request holds is free again once its pictures are decoded."""
    limits = replace(CONFIG.limits, bodies_mb=1.0)
    service = service_of(ready, replace(CONFIG, limits=limits))
    with running(service) as address, connected(address) as first, connected(address) as second:
        head = f"{HEAD}Content-Length: 800000\r\n\r\n".encode()
        part = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
        first.sendall(head + part + bytes(600_000))
        until(lambda: sum(body.held for body in service.bodies) > 600_000)
        second.sendall(head + part + bytes(600_000))
        answer = b""
        while b"}" not in answer:
            answer += second.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"hold 1 MiB already" in answer
        assert ask(address).status_code == 200  # small ones have room
        first.close()
        until(lambda: not service.bodies)


@pytest.fixture
def held(monkeypatch):
    """A model that begins and waits for leave to end: the two events, and whom it planned for."""
    begun, release, planned = threading.Event(), threading.Event(), []

    def waits(programs, ratio, frames, number):
        begun.set()
        assert release.wait(20)
        planned.extend(frame.speed for frame in frames)
        return run_batch(programs, ratio, frames, number)

    monkeypatch.setattr(worker_module, "run_batch", waits)
    yield begun, release, planned
    release.set()


def test_nobody_plans_for_a_client_that_left(ready, held):
    begun, release, planned = held
    service = service_of(ready, FEW)
    data = {"request": '{"speed": 7, "command": "left", "drive": "a"}'}
    with running(service) as address, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, address)
        assert begun.wait(20)
        with pytest.raises(requests.exceptions.ReadTimeout):
            requests.post(f"{address}/v1/plan", data=data, files={"CAM_FRONT": png(0)}, timeout=0.5)
        until(lambda: refused(address, "disconnected") == 1)
        release.set()
        assert first.result().status_code == 200
        assert ask(address, drive="a", frame=0).json()["memory"] == "new"
    assert planned == [5.0, 5.0]


def test_who_waits_when_the_service_ends_is_told(ready, held, monkeypatch):
    begun, _, _ = held
    monkeypatch.setattr(server_module, "FINISH_SECONDS", 0.3)
    service = service_of(ready, FEW)
    with ThreadPoolExecutor(2) as pool:
        with running(service) as address:
            waiting = [pool.submit(ask, address)]
            assert begun.wait(20)
            waiting.append(pool.submit(ask, address))
            until(lambda: service.metrics.registry.get_sample_value("fastdrive_queue_depth") == 1)
        for answer in waiting:
            assert (answer.result().status_code, answer.result().json()["reason"]) == (
                503,
                "ending",
            )


def test_decoding_counts_as_waiting(ready, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(app_module, "read_picture", lambda *given: release.wait(20))
    limits = replace(CONFIG.limits, answer_seconds=0.2)
    with running(service_of(ready, replace(CONFIG, limits=limits))) as address:
        assert ask(address).status_code == 504
        release.set()


def test_connections_that_ask_nothing_take_no_place(ready):
    with running(service_of(ready, FEW)) as address, contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(connected(address))
        assert requests.get(f"{address}/healthz", timeout=5).text == "ok\n"
        assert ask(address).status_code == 200


def test_all_of_a_crowd_are_answered_as_the_page_says(ready, monkeypatch):
    def slow(*given):
        time.sleep(0.1)
        return run_batch(*given)

    monkeypatch.setattr(worker_module, "run_batch", slow)
    with running(service_of(ready, FEW)) as address:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: ask(address), range(16)))
        back = [answer for answer in answers if answer.status_code != 200]
        assert 0 < len(back) < 16
        for answer in back:
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert answer.json()["reason"] in ("busy", "queue_full")
        assert refused(address, "busy") + refused(address, "queue_full") == len(back)


def test_a_frame_that_was_given_up_may_be_asked_for_again(ready, monkeypatch):
    """Its batch runs to its end, but the drive does not count it."""
    release = threading.Event()
    release.set()

    def slow(*given):
        planned = run_batch(*given)
        assert release.wait(20)
        return planned

    monkeypatch.setattr(worker_module, "run_batch", slow)
    limits = replace(CONFIG.limits, answer_seconds=0.5)
    with running(service_of(ready, replace(CONFIG, limits=limits))) as address:
        until(lambda: ask(address, drive="a", frame=0).status_code == 200)
        release.clear()
        assert ask(address, 1, drive="a", frame=1).status_code == 504
        release.set()
        until(lambda: ask(address).status_code == 200)
        again = ask(address, 1, drive="a", frame=1)
        assert again.status_code == 200
        assert (again.json()["frame"], again.json()["memory"]) == (1, "kept")


@pytest.mark.parametrize("as_file", [True, False])
def test_a_request_that_is_much_too_long_is_not_read(address, as_file):
    text = json.dumps({"speed": 5, "command": [0] * 200_000})
    part = ("request.json", text) if as_file else (None, text)
    files = [("request", part), ("CAM_FRONT", ("a.png", png(0)))]
    answer = requests.post(f"{address}/v1/plan", files=files, timeout=30)
    assert answer.status_code in (400, 413)
    assert len(answer.content) < 1000


def test_what_is_refused_is_not_sent_back_whole(address):
    for asked in ({"command": "x" * 50_000}, {"y" * 50_000: 1}, {"speed": "z" * 50_000}):
        answer = ask(address, **asked)
        assert answer.status_code == 422
        assert len(answer.content) < 500
