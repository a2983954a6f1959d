import time

import jax.numpy as jnp
import pytest
from tiny_run import TinyConfig, run
from tqdm import tqdm

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.meter import Meter, blame
from fastdrive_jax.training.metrics_log import MetricsLog

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def make_meter(tmp_path):
    with MetricsLog(tmp_path / "log.jsonl", None) as log:
        yield lambda **options: (Meter(log, 2, 100, tqdm(disable=True), **options), log)


def test_terms_and_parts_that_are_not_finite_are_named():
    values = {"loss": 1.0, "grad_norm": INF, "update_norm": NAN}
    groups = {"grad_norm/pruner": INF, "grad_norm/decoder": 2.0}
    assert blame(values | groups) == (
        "grad_norm is inf, update_norm is nan, the loss is finite, "
        "gradients of pruner are not finite, those of decoder are"
    )
    bad = dict.fromkeys(groups, NAN)
    assert blame({"ssim_fore": NAN, "loss": NAN, "mse_fore": 1.0, "grad_norm": NAN} | bad) == (
        "ssim_fore is nan, loss is nan, gradients of decoder and pruner are not finite"
    )
    assert blame({"loss": NAN}) == "loss is nan"


def test_a_run_that_explodes_says_where(tmp_path):
    def loss_fn(params, batch, key):
        # Finite, with a gradient that is not: the root at zero.
        root = jnp.sqrt(jnp.square(params["bias"]).sum())
        return root + jnp.square(params["kernel"]).mean(), {"root": root}

    words = r"step 1 \(.*the loss is finite, gradients of bias are not finite, those of kernel are"
    with pytest.raises(UserError, match=words):
        run(tmp_path, 4, TinyConfig(), loss=loss_fn)


def test_metrics_are_read_one_step_later(make_meter):
    meter, log = make_meter()
    for step in (1, 2):
        meter.follow(step, {"loss": jnp.ones(())}, 8)
    assert log.history == []
    meter.follow(3, {"loss": jnp.ones(())}, 8)
    assert [record["step"] for record in log.history] == [2]


def test_pauses_and_waiting_are_told_apart_from_training(make_meter):
    meter, log = make_meter()
    for step in (1, 2):
        with meter.waiting():
            time.sleep(0.05)
        meter.follow(step, {"loss": jnp.ones(())}, 8)
    with meter.paused("images_s"):  # reads step 2, so its pause is of the next record
        time.sleep(0.2)
    for step in (3, 4, 5):
        meter.follow(step, {"loss": jnp.ones(())}, 8)
    first, second = (record["time"] for record in log.history)
    assert "images_s" not in first
    assert 0.05 <= first["data_wait_s"] <= first["step_s"]
    assert first["data_wait_share"] > 0.5
    assert first["items_per_s"] == pytest.approx(8 / first["step_s"], rel=1e-3)
    assert second["images_s"] >= 0.2
    assert second["step_s"] < 0.1
    assert second["data_wait_share"] == 0


def test_listeners_get_what_the_log_got(make_meter):
    got = []
    meter, log = make_meter(listeners=[got.append])
    meter.record(3, "eval", {"l2": 1.0}, {})
    assert got == log.history == [{"step": 3, "kind": "eval", "l2": 1.0, "time": {}}]
