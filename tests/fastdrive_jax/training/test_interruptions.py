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
import optax
import pytest
from tiny_run import TinyConfig, functions, make_batches, run

from fastdrive_jax.training.best import Best
from fastdrive_jax.training.checkpoints import RunCheckpoints
from fastdrive_jax.training.loop import StoppedBySignal, fit
from fastdrive_jax.training.metrics_log import read_log
from fastdrive_jax.training.state import abstract_state, init_train_state, make_train_step

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
    out, err = process.communicate(timeout=300)
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
def cache(tmp_path_factory):
    """Shared by the processes, so that only the first one compiles."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(tmp_path, cache):
    chance = random.Random(0)
    folder, reached = tmp_path / "killed", []
    for logs in (1, 7, 5):
        process = start(folder, cache)
        wait_for_logs(process, logs)
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        finish(process)
        assert process.returncode == -signal.SIGKILL
        reached.append(timeless(folder)[-1]["step"])
    assert 0 < max(reached) < STEPS  # none came to the end before it was killed
    out, err = finish(start(folder, cache, pause=0))
    assert out[-1] == "done", err
    assert out[1] != "log 1"  # it did go on from a checkpoint
    # In a process as well: this one may hold the same step, compiled otherwise by another test.
    out, err = finish(start(tmp_path / "straight", cache, pause=0))
    assert out[-1] == "done", err
    assert out[1] == "log 1"
    straight = final_state(tmp_path / "straight")
    jax.tree.map(np.testing.assert_array_equal, final_state(folder), straight)
    assert timeless(folder) == timeless(tmp_path / "straight")


def test_a_run_told_to_stop_saves_and_exits_without_a_traceback(tmp_path, cache):
    process = start(tmp_path, cache)
    wait_for_logs(process, 1)
    process.terminate()
    _, err = finish(process)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert f"SIGTERM: saved step {saved} in" in err
    assert timeless(tmp_path)[-1]["step"] == saved < STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_at_the_next_step_and_get_their_handlers_back(tmp_path, number):
    before = signal.getsignal(number)

    def interrupt(record):
        if record["step"] == 4:
            signal.raise_signal(number)

    with pytest.raises(StoppedBySignal) as stopped:
        run(tmp_path, STEPS, on_log=interrupt, checkpoint_every=100)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["5"]


def test_a_stop_while_a_large_save_is_running_is_within_thirty_seconds(tmp_path):
    """100 MB a step are written, slower than steps are made: numbers that do not compress."""

    def init():
        def drawn(key):
            return {"w": jax.random.normal(key, (5000, 5000))}

        return init_train_state(drawn, optax.sgd(1.0), 0)

    def interrupt(record):
        if not asked and any((tmp_path / "checkpoints").glob("*tmp*")):  # one is on its way
            asked.extend((record["step"], time.perf_counter()))
            signal.raise_signal(signal.SIGTERM)

    asked = []
    config, place = TinyConfig(), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step = make_train_step(lambda params, batch, key: (params["w"].mean(), {}), optax.sgd(1.0))
    with pytest.raises(StoppedBySignal):
        fit(
            tmp_path, config, init, step, make_batches(config), STEPS, log_every=1,
            checkpoint_every=1, keep=1, on_log=interrupt, quiet=True,
        )  # fmt: skip
    step, begin = asked
    assert time.perf_counter() - begin < 30
    with RunCheckpoints(tmp_path, config) as checkpoints:
        saved = checkpoints.latest_step()
        state = checkpoints.restore(abstract_state(init, place), make_batches(config))
    assert saved in (step, step + 1)
    assert int(state.step) == saved


def test_who_asks_to_stop_does_not_wait_for_an_evaluation(tmp_path):
    """It is made up for on resume, and comes once."""
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"updates": float(state.step)}

    def interrupt(record):
        if record["step"] == 4 and record["kind"] == "train" and not resumed:
            signal.raise_signal(signal.SIGTERM)

    options = {"evaluate": evaluate, "evaluate_every": 5, "log_every": 1, "on_log": interrupt}
    resumed = False
    with pytest.raises(StoppedBySignal):
        run(tmp_path, 10, **options)
    assert seen == [0]
    resumed = True
    history = run(tmp_path, 10, **options).history
    assert seen == [0, 5, 10]
    assert [record["step"] for record in history if record["kind"] == "eval"] == [0, 5, 10]


def test_the_best_step_is_the_best_though_the_stop_fell_on_it(tmp_path):
    def evaluate(state):
        return {"recall": {0: 0.1, 5: 0.9, 10: 0.5}[int(state.step)]}

    def interrupt(record):
        if record["step"] == 4 and record["kind"] == "train" and not resumed:
            signal.raise_signal(signal.SIGTERM)

    options = {
        "evaluate": evaluate, "evaluate_every": 5, "log_every": 1, "on_log": interrupt,
        "best": Best("recall", "max"), "checkpoint_every": 100,
    }  # fmt: skip
    resumed = False
    with pytest.raises(StoppedBySignal):
        run(tmp_path, 10, **options)
    resumed = True
    assert run(tmp_path, 10, **options).best_step == 5


def stopped_at(folder, step, evaluate, **options):
    """A run of 10 steps with its best that SIGTERM stops at a step which is due to be evaluated."""

    def interrupt(record):
        if record["step"] == step - 1 and record["kind"] == "train":
            signal.raise_signal(signal.SIGTERM)

    options = {
        "evaluate": evaluate, "log_every": 1, "best": Best("recall", "max"),
        "checkpoint_every": 100, **options,
    }  # fmt: skip
    with pytest.raises(StoppedBySignal):
        run(folder, 10, on_log=interrupt, **options)
    return options


def test_the_best_step_is_the_best_though_its_save_was_cut_off(tmp_path, monkeypatch):
    """Stopped before it was measured, then killed where what was measured is saved."""

    def evaluate(state):
        return {"recall": {0: 0.1, 5: 0.9, 10: 0.5}[int(state.step)]}

    def save(self, step, state, iterator, metrics=None):
        if step == 5 and metrics:
            raise RuntimeError("killed")
        saves(self, step, state, iterator, metrics)

    options = stopped_at(tmp_path, 5, evaluate, evaluate_every=5)
    saves = RunCheckpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoints, "save", save)
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path, 10, **options)
    result = run(tmp_path, 10, **options)
    assert result.best_step == 5
    assert [one["step"] for one in result.history if one["kind"] == "eval"] == [0, 5, 10]


@pytest.mark.parametrize("every", [3, 100])
def test_of_equal_steps_the_same_is_the_best_whether_it_was_stopped_or_not(tmp_path, every):
    def evaluate(state):
        return {"recall": float(0 < state.step < 10)}

    options = stopped_at(tmp_path / "a", 3, evaluate, evaluate_every=1, checkpoint_every=every)
    stopped = run(tmp_path / "a", 4, **options).best_step
    assert stopped == run(tmp_path / "b", 4, **options).best_step
