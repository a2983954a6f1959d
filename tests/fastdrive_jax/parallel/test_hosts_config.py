import json
import os
import random
import socket
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
AUTO = """
connect(HostsConfig(auto=True))
print(json.dumps([jax.process_index(), jax.process_count(), jax.device_count()]))
"""


def begin(program, **environment):
    command, pipe = [sys.executable, "-c", START + program], subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment
    )


def end(process):
    """Returns exit code, output and errors."""
    try:
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err
    finally:
        process.kill()


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
    code, out, err = end(begin(JOIN))
    assert code == 0, err
    report = json.loads(out)
    assert "give coordinator, count and index" in report.pop("none")
    assert "host 0 of 1 already" in report.pop("other")
    assert report == {"alone": False, "joined": True, "again": None, "hosts": 1}


def test_a_taken_port_is_a_sentence_and_a_late_call_a_fault(monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # for joined processes alone
    with socket.create_server(("", 0)) as listener:
        where = f"localhost:{listener.getsockname()[1]}"
        with pytest.raises(UserError, match="choose a free one"):
            connect(HostsConfig(where, 1, 0))
    jax.devices()  # used here, as in all tests
    with pytest.raises(RuntimeError, match="must be called before any JAX"):
        connect(HostsConfig("localhost:1", 2, 1))


def test_auto_joins_the_processes_of_a_slurm_job():
    job = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    job["SLURM_JOB_ID"] = str(random.randrange(4096))  # JAX makes the port of it
    places = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    ends = [end(process) for process in [begin(AUTO, **job, **place) for place in places]]
    assert [code for code, _, _ in ends] == [0, 0], ends
    found = [json.loads(out.splitlines()[-1]) for _, out, _ in ends]
    assert found == [[0, 2, 2], [1, 2, 2]]
