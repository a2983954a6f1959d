"""A few steps of the driving VLA's training."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.synthetic.config import WorldConfig
from experiments.train_vla import TrainVLAConfig, train_vla
from fastdrive_jax.errors import UserError
from fastdrive_jax.training.driving import DrivingLossConfig
from fastdrive_jax.training.metrics_log import read_log
from fastdrive_jax.training.optimizer import OptimizerConfig

CONFIG = TrainVLAConfig(
    world=WorldConfig(
        train_scenes=2, val_scenes=1, keyframes_per_scene=4, cameras=("CAM_FRONT",), workers=1
    ),
    loss=DrivingLossConfig(keep_choices=(0.25,)),
    optimizer=OptimizerConfig(learning_rate=1e-3, total_steps=3),
    batch_size=8,  # whatever the number of devices that other tests left
)


@pytest.mark.slow  # widen-vla takes the same ways, on fewer parameters
def test_it_trains_evaluates_and_goes_on(tmp_path):
    params = train_vla(tmp_path, CONFIG, quiet=True)
    assert set(params) == {"visual", "language_model"}
    log = tmp_path / "train" / "metrics.jsonl"
    records = read_log(log)
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 3]
    assert all(np.isfinite(r["l2"]) for r in records if r["kind"] == "eval")
    before = log.read_bytes()
    again = train_vla(tmp_path, CONFIG, quiet=True)  # takes the finished training
    assert log.read_bytes() == before
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="another config"):
        train_vla(tmp_path, dataclasses.replace(CONFIG, seed=1), quiet=True)
