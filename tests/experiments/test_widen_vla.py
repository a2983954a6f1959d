"""A short training of the packaged VLA for two cameras."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.synthetic.config import WorldConfig
from experiments.widen_vla import WidenVLAConfig, widen_vla
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.bundled import load_vla
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig
from fastdrive_jax.training.driving import DrivingLossConfig
from fastdrive_jax.training.metrics_log import read_log
from fastdrive_jax.training.optimizer import OptimizerConfig

CAMERAS = ("CAM_FRONT", "CAM_BACK")


def test_the_decoder_learns_and_the_encoder_stays(tmp_path):
    config = WidenVLAConfig(
        out=tmp_path,
        world=WorldConfig(
            train_scenes=2, val_scenes=1, keyframes_per_scene=2, cameras=CAMERAS, workers=1
        ),
        cameras=CAMERAS,
        loss=DrivingLossConfig(keep_choices=(0.25,)),
        optimizer=OptimizerConfig(learning_rate=1e-3, total_steps=3),
        batch_size=8,  # whatever the number of devices that other tests left
        quiet=True,
    )
    path = widen_vla(config)
    _, packaged = load_vla()
    _, found = load_vla(path, DrivingConfig(cameras=CAMERAS))
    for name in packaged:
        same = jax.tree.map(np.array_equal, packaged[name], found[name])
        assert all(jax.tree.leaves(same)) == (name == "visual")
    log = read_log(tmp_path / "train" / "metrics.jsonl")
    errors = [record["l2"] for record in log if record["kind"] == "eval"]
    assert len(errors) == 2
    assert np.isfinite(errors).all()

    path.unlink()
    before = (tmp_path / "train" / "metrics.jsonl").read_bytes()
    widen_vla(config)  # takes the finished training
    assert (tmp_path / "train" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="another config"):
        widen_vla(dataclasses.replace(config, batch_size=16))
