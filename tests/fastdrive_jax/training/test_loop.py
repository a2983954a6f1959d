import json

import grain
import jax
import numpy as np
import pytest
from tiny_run import TinyConfig, example, run

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.metrics_log import read_log


def assert_same_state(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def timeless(history):
    return [{key: value for key, value in record.items() if key != "time"} for record in history]


def test_resuming_equals_never_having_stopped(tmp_path):
    straight = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    resumed = run(tmp_path / "b", 4)
    assert int(resumed.state.step) == 4
    assert_same_state(straight.state, resumed.state)
    assert timeless(straight.history) == timeless(resumed.history)
    assert timeless(read_log(tmp_path / "b/metrics.jsonl")) == timeless(straight.history)


def test_loss_falls_and_the_log_has_throughput(tmp_path):
    result = run(tmp_path, 40, log_every=1)
    losses = [record["loss"] for record in result.history]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    times = {"items_per_s", "step_s", "data_wait_s", "data_wait_share"}
    assert set(result.history[0]["time"]) == times | {"compile_s"}
    assert set(result.history[1]["time"]) == times
    assert all(0 <= record["time"]["data_wait_share"] <= 1 for record in result.history)
    assert all(record["time"]["items_per_s"] > 0 for record in result.history)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [39, 40]


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    straight = run(tmp_path / "a", 8)
    run(tmp_path / "b", 3)
    with (tmp_path / "b/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "kind": "train", "loss": 1e9}) + "\n")
        file.write('{"step": 5, "kind": "tr')
    resumed = run(tmp_path / "b", 8)
    # Step 3 was the last of the first part and so has a record that the straight run has not.
    records = [record for record in timeless(resumed.history) if record["step"] != 3]
    assert records == timeless(straight.history)


def test_evaluation_sees_the_old_state_and_is_not_repeated(tmp_path):
    def evaluate(state):
        return {"updates": float(state.step)}

    run(tmp_path, 4, evaluate=evaluate, evaluate_every=2)
    result = run(tmp_path, 6, evaluate=evaluate, evaluate_every=2)
    evals = [record for record in result.history if record["kind"] == "eval"]
    assert [record["step"] for record in evals] == [0, 2, 4, 6]
    assert [record["updates"] for record in evals] == [0.0, 2.0, 4.0, 6.0]


def test_other_config_is_refused_with_both_values(tmp_path):
    run(tmp_path, 2)
    with pytest.raises(UserError, match=r"seed was 3 and is now 4") as error:
        run(tmp_path, 4, TinyConfig(seed=4, batch=4))
    assert "batch was 8 and is now 4" in str(error.value)
    run(tmp_path, 4, TinyConfig(seed=4), ignore=["seed"])


def test_a_metric_that_is_not_finite_stops_before_the_save(tmp_path):
    def exploding(params, batch, key):
        loss = params["bias"].sum() * np.inf + 1.0
        return loss, {}

    with pytest.raises(UserError, match=r"step 1 .*loss is nan"):
        run(tmp_path, 6, loss=exploding, checkpoint_every=1)
    assert not any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


def test_data_that_ends_is_said(tmp_path):
    three = iter(grain.MapDataset.range(24).seed(0).random_map(example).batch(8).to_iter_dataset())
    with pytest.raises(ValueError, match="ended at step 3 of 5"):
        run(tmp_path, 5, batches=three)


def test_frozen_params_are_read_and_not_saved(tmp_path):
    def loss_fn(params, batch, key, frozen):
        return jax.numpy.square(params["kernel"] - frozen["goal"]).sum(), {}

    frozen = {"goal": np.full((16, 3), 2.0, np.float32)}
    result = run(tmp_path, 40, loss=loss_fn, frozen=jax.device_put(frozen))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert "goal" not in str(jax.tree.structure(result.state))
