"""A service in a process of its own: how it starts and how it ends."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest
import requests
from tiny_service import png, until

from fastdrive_jax.errors import UserError
from fastdrive_jax.export.driving import write_policy
from fastdrive_jax.serving.server import listen

RUN = """
import sys
from pathlib import Path
from fastdrive_jax.export.driving import read_policy
from fastdrive_jax.serving.config import ServeConfig
from fastdrive_jax.serving.server import serve
policy, params = read_policy(Path(sys.argv[1]))
serve(policy, params, ServeConfig(port=0, ratios=(0.5,), max_batch=1))
"""

# A program compiled again and again, so that the signal comes while XLA is at work in its own code.
BUSY = RUN.replace(
    "policy, params =",
    """
import jax
import jax.numpy as jnp
from fastdrive_jax.serving import server

def grown(x):
    for _ in range(300):
        x = jnp.sin(x) + x @ x.T
    return x

def compile_for_ever(*given):
    lowered = jax.jit(grown).lower(jax.ShapeDtypeStruct((50, 50), jnp.float32))
    while True:
        lowered.compile({"xla_backend_optimization_level": 0})  # with options nothing is remembered

jax.config.update("jax_enable_compilation_cache", False)
server.compile_programs = compile_for_ever
policy, params =""",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, one_camera, small_pruner):
    config, params = one_camera
    folder = tmp_path_factory.mktemp("served") / "bundle"
    return write_policy(folder, params, config, small_pruner, 0.5)


def started(bundle, run: str = RUN) -> tuple[subprocess.Popen, str]:
    """The process and its address, which it opens before it has compiled."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", run, str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    line = process.stdout.readline()
    address = re.search(r"http://\S+", line)
    assert address, line + process.stdout.read()
    return process, address.group()


def listening(address: str) -> bool:
    try:
        return requests.get(f"{address}/healthz", timeout=5).ok
    except requests.ConnectionError:
        return False


def test_a_request_in_flight_is_finished_within_5_seconds(bundle):
    process, address = started(bundle)
    try:
        with half_sent(address) as (client, rest):
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert process.poll() is None  # it waits for the rest
            assert not listening(address)  # and takes nothing new
            client.sendall(rest)
            answer = b""
            while part := client.recv(65536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"waypoints"' in answer
        assert process.wait(10) == 0
        assert time.monotonic() - begin < 5
    finally:
        process.kill()
        said = process.stdout.read()
    assert "50% kept (5 tokens)" in said
    assert "Traceback" not in said


def test_a_client_that_stalls_does_not_hold_it_up(bundle):
    process, address = started(bundle)
    try:
        with half_sent(address):
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            assert time.monotonic() - begin < 5
    finally:
        process.kill()


@contextlib.contextmanager
def half_sent(address: str):
    """A connection over which half a request came, once the service is warm; and the other half."""
    until(lambda: requests.get(f"{address}/readyz", timeout=5).ok, 120)
    boundary, body = form()
    where = urlsplit(address)
    with socket.create_connection((where.hostname, where.port), timeout=10) as client:
        head = (
            f"POST /v1/plan HTTP/1.1\r\nHost: {where.netloc}\r\n"
            f"Content-Type: multipart/form-data; boundary={boundary}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body[:100])
        time.sleep(0.3)  # it has begun to read
        yield client, body[100:]


def test_it_ends_at_once_while_it_still_compiles(bundle):
    process, address = started(bundle)
    try:
        until(lambda: listening(address), 30)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - begin < 5
    finally:
        process.kill()


def test_xla_at_work_does_not_abort_the_process(bundle):
    process, address = started(bundle, BUSY)
    try:
        until(lambda: listening(address), 30)
        time.sleep(2)  # the first program is being compiled
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()


def form() -> tuple[str, bytes]:
    """A multipart request as bytes."""
    data = {"request": '{"speed": 5, "command": "left"}'}
    files = {"CAM_FRONT": ("a.png", png(1))}
    prepared = requests.Request("POST", "http://host", data=data, files=files).prepare()
    return prepared.headers["Content-Type"].split("boundary=")[1], prepared.body


def test_a_port_that_is_taken_is_said():
    taken = r"in use\); name another --port"
    with listen("127.0.0.1", 0) as first, pytest.raises(UserError, match=taken):
        listen("127.0.0.1", first.getsockname()[1])
    for host in ("192.0.2.1", "a..b"):
        with pytest.raises(UserError, match="cannot be listened on"):
            listen(host, 0)
