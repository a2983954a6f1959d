"""Two processes that train together; one of them is told to stop, and one alone goes on."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import hosts_run
import numpy as np
import pytest

from fastdrive_jax.training.metrics_log import read_log
from fastdrive_jax.training.tensorboard import PATTERN, read_events

STEPS = 30
PROGRAM = Path(__file__).with_name("hosts_run.py")


def start(folder, *options):
    words = [sys.executable, PROGRAM, folder, str(STEPS), *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, **pipes)


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder, and what each of two processes ended with when the second got a SIGTERM."""
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    both = [start(folder, "--watch", "--host", port, number) for number in range(2)]
    try:
        for line in both[1].stdout:
            if line.startswith("log 20"):
                break
        both[1].terminate()
        outs = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    return folder, [(process.returncode, *out) for process, out in zip(both, outs, strict=True)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The records of a run that one process, this one, began and ended."""
    folder = tmp_path_factory.mktemp("alone")
    hosts_run.main(folder, STEPS, watched=True)
    return read_log(folder / "metrics.jsonl")


def losses(records):
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_both_save_the_same_step_though_one_got_the_signal(stopped):
    folder, ends = stopped
    assert [code for code, _, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    saved = max(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert 20 <= saved < STEPS
    assert f"SIGTERM: saved step {saved} in" in ends[0][2]
    assert "saved step" not in ends[1][2]  # one says it
    assert "Traceback" not in ends[0][2] + ends[1][2]


def test_two_learn_what_one_alone_learns(stopped, alone):
    together = losses(read_log(stopped[0] / "metrics.jsonl"))
    np.testing.assert_allclose(together[:20], losses(alone)[:20], rtol=0, atol=1e-5)


def test_one_process_goes_on_to_where_one_alone_would_be(stopped, alone):
    folder, _ = stopped
    result = hosts_run.main(folder, STEPS, watched=True)
    assert (int(result.state.step), result.best_step) == (STEPS, 2)
    together, alone = (
        [
            (record["step"], record["kind"], record.get("loss", record.get("l2")))
            for record in records
        ]
        for records in (read_log(folder / "metrics.jsonl"), alone)
    )
    assert [record[:2] for record in together] == [record[:2] for record in alone]
    np.testing.assert_allclose(
        [record[2] for record in together], [record[2] for record in alone], rtol=1e-4
    )
    events = [
        (event.step, value.tag)
        for path in (folder / "tensorboard").glob(PATTERN)
        for event, _ in read_events(path)
        for value in event.summary.value
    ]
    assert len(events) == len(set(events))
    assert sorted(step for step, tag in events if tag == "train/loss") == list(range(1, STEPS + 1))
