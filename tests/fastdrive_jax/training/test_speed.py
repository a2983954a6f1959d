import types

import jax
import jax.numpy as jnp
import pytest
from tiny_run import run

from fastdrive_jax.training.speed import device_memory, utilisation, xla_flops
from fastdrive_jax.training.watch import WatchConfig


def test_flops_of_a_matrix_product_and_a_loop_whose_body_counts_once():
    x = jnp.ones((64, 64))
    one = 2 * 64**3

    def seven(x):
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, None, length=7)[0]

    assert xla_flops(jax.jit(lambda x: x @ x).lower(x)) == one
    assert xla_flops(jax.jit(lambda x: x @ x).lower(x).compile()) == one
    assert xla_flops(jax.jit(seven).lower(x)) == pytest.approx(one, rel=1e-3)


def test_a_backend_that_does_not_tell_flops_is_said():
    silent = types.SimpleNamespace(cost_analysis=lambda: None)
    with pytest.raises(ValueError, match="set flops_per_step yourself"):
        xla_flops(silent)


def test_utilisation_needs_both_figures():
    assert utilisation(3e12, 0.5, 12e12) == {"mfu": 0.5}
    assert utilisation(None, 0.5, 12e12) == utilisation(3e12, 0.5, None) == {}


def test_memory_is_that_of_the_fullest_device_and_absent_where_it_is_not_told():
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    full, half = {"peak_bytes_in_use": 2**31}, {"peak_bytes_in_use": 2**30}
    assert device_memory([device(half), device(full)]) == {"device_memory_gib": 2.0}
    assert device_memory([device(None), device({})]) == {}


def test_a_run_tells_its_utilisation(tmp_path):
    given = WatchConfig(peak_flops=1e9, flops_per_step=1e6)
    for record in run(tmp_path / "a", 4, watch=given).history:
        assert record["time"]["mfu"] == pytest.approx(1e-3 / record["time"]["step_s"], rel=1e-2)
    counted = run(tmp_path / "b", 4, watch=WatchConfig(peak_flops=1e9)).history[-1]["time"]
    # Forward and gradient of 8 x 16 by 16 x 3, and AdamW of 51 parameters.
    assert 4 * 8 * 16 * 3 < counted["mfu"] * 1e9 * counted["step_s"] < 40 * 8 * 16 * 3
