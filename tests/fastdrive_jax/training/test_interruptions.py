"""A run in a process of its own that is killed, told to stop, and started again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import TinyConfig, functions, make_batches, run

from fastdrive_jax.training.checkpoints import RunCheckpoints
from fastdrive_jax.training.metrics_log import read_log
from fastdrive_jax.training.state import abstract_state

STEPS = 40
PROGRAM = Path(__file__).with_name("tiny_run.py")


def start(folder, cache, pause=0.02):
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(cache))
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, PROGRAM, folder, str(STEPS), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return out.splitlines(), err


def wait_for_logs(process, count):
    for line in process.stdout:
        count -= line.startswith("log")
        if count == 0:
            return
    pytest.fail(f"the run ended early: {process.stderr.read()}")


def final_state(folder):
    config = TinyConfig()
    init, _ = functions(config, run.__defaults__[1])
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with RunCheckpoints(folder, config) as checkpoints:
        assert checkpoints.latest_step() == STEPS
        return checkpoints.restore(abstract_state(init, where), make_batches(config))


def timeless(folder):
    records = read_log(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbed, and a compilation cache."""
    root = tmp_path_factory.mktemp("straight")
    out, err = finish(start(root / "run", root / "cache", pause=0))
    assert out[-1] == "done", err
    return root


def test_a_run_killed_again_and_again_ends_like_one_that_was_not(tmp_path, straight):
    chance = random.Random(0)
    folder, reached = tmp_path / "run", []
    for logs in (1, 7, 4, 8):
        process = start(folder, straight / "cache")
        wait_for_logs(process, logs)
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        finish(process)
        assert process.returncode == -signal.SIGKILL
        reached.append(timeless(folder)[-1]["step"])
    assert 0 < max(reached) < STEPS  # none came to the end before it was killed
    out, err = finish(start(folder, straight / "cache", pause=0))
    assert out[-1] == "done", err
    assert out[1] != "log 1"  # it did go on from a checkpoint
    jax.tree.map(np.testing.assert_array_equal, final_state(folder), final_state(straight / "run"))
    assert timeless(folder) == timeless(straight / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_told_to_stop_saves_first(tmp_path, straight, number):
    process = start(tmp_path, straight / "cache")
    wait_for_logs(process, 1)
    process.send_signal(number)
    _, err = finish(process)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert timeless(tmp_path)[-1]["step"] == saved < STEPS
