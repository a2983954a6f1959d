import json
import subprocess
import sys

import jax
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.parallel.hosts import HostsConfig, connect

START = """
import json, socket
import jax
from fastdrive_jax.errors import UserError
from fastdrive_jax.parallel.hosts import HostsConfig, connect

def said(config):
    try:
        return connect(config)
    except UserError as error:
        return str(error)

with socket.socket() as listener:
    listener.bind(("", 0))
    port = listener.getsockname()[1]
where = f"localhost:{port}"
"""
JOIN = """
report = {"none": said(HostsConfig(auto=True))}
connect(HostsConfig())
report["alone"] = jax.distributed.is_initialized()
connect(HostsConfig(where, 1, 0))
report["joined"] = jax.distributed.is_initialized()
report["again"] = said(HostsConfig(where, 1, 0))
report["other"] = said(HostsConfig(where, 3, 2))
report["hosts"] = jax.process_count()
print(json.dumps(report))
"""
TAKEN = """
with socket.socket() as listener:
    listener.bind(("", port))
    listener.listen()
    print(json.dumps(said(HostsConfig(where, 1, 0))))
"""
LATE = """
jax.devices()
connect(HostsConfig(where, 2, 0))
"""


def run(program):
    command = [sys.executable, "-c", START + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"coordinator": "a:1"}, "count, index must be given too"),
        ({"count": 2, "index": 0}, "coordinator must be given too"),
        ({"auto": True, "index": 0}, "index must not be given"),
        ({"coordinator": "a", "count": 2, "index": 0}, "HOST:PORT"),
        ({"coordinator": "a:b", "count": 2, "index": 0}, "HOST:PORT"),
        ({"coordinator": "a:70000", "count": 2, "index": 0}, "HOST:PORT"),
        ({"coordinator": "a:1", "count": 0, "index": 0}, "count=0"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "index=2"),
        ({"coordinator": "a:1", "count": 2, "index": -1}, "index=-1"),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds=0"),
        ({"start_seconds": 0}, "start_seconds=0"),
        ({"end_seconds": 0}, "end_seconds=0"),
    ],
)
def test_contradictions_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        HostsConfig(**given)
    assert str(caught.value).endswith(".")


def test_jax_is_told_what_was_given_and_nothing_if_nothing_was(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    connect(HostsConfig())
    assert calls == []
    connect(HostsConfig("[::1]:80", 2, 1, start_seconds=7, heartbeat_seconds=8, end_seconds=9))
    connect(HostsConfig(auto=True))
    timeouts = [
        {"initialization_timeout": a, "heartbeat_timeout_seconds": b, "shutdown_timeout_seconds": c}
        for a, b, c in ((7, 8, 9), (300, 60, 300))
    ]
    assert calls[0] == (
        ("[::1]:80", 2, 1),
        timeouts[0] | {"cluster_detection_method": "deactivate"},
    )
    assert calls[1] == ((), timeouts[1])
    assert "host 1 of 2: waiting for the others at [::1]:80, at most 7 s" in capsys.readouterr().err


def test_a_process_joins_once():
    done = run(JOIN)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "give coordinator, count and index" in report.pop("none")
    assert "host 0 of 1 already" in report.pop("other")
    assert report == {"alone": False, "joined": True, "again": None, "hosts": 1}


def test_a_taken_port_is_a_sentence_and_a_late_call_a_fault():
    taken, late = run(TAKEN), run(LATE)
    assert taken.returncode == 0, taken.stderr
    assert "choose a free one" in json.loads(taken.stdout)
    assert late.returncode == 1
    assert "RuntimeError" in late.stderr
