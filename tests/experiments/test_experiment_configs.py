import dataclasses
import json

import pytest

from experiments.configs.pruner import PRUNER_RUNS, PrunerRun
from fastdrive_jax.configs import from_plain, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig


@pytest.mark.parametrize("name", PRUNER_RUNS)
def test_pruner_runs_come_back_from_json(name):
    run = PRUNER_RUNS[name]
    plain = to_plain(run)
    assert plain == json.loads(json.dumps(plain))
    back = from_plain(PrunerRun, plain)
    assert back == run
    assert back.recon.keep_range == (0.05, 0.75)  # a tuple again, so that it can be hashed
    hash(back)


def test_a_driving_config_with_changed_values_comes_back():
    config = DrivingConfig(image_size=(56, 140), cameras=("CAM_FRONT", "CAM_BACK"))
    vocabulary = dataclasses.replace(config.vocabulary, steps=8, displacement_low=-3.5)
    config = dataclasses.replace(config, vocabulary=vocabulary)
    assert from_plain(DrivingConfig, to_plain(config)) == config
    hash(from_plain(DrivingConfig, to_plain(config)))


def test_none_in_an_optional_field_comes_back():
    plain = to_plain(PRUNER_RUNS["tiny"])
    assert plain["ema_decay"] is None
    plain["ema_decay"] = 0.99
    assert from_plain(PrunerRun, plain).ema_decay == 0.99


def test_unknown_and_missing_fields_are_named():
    plain = to_plain(ReconPrunerConfig())
    with pytest.raises(UserError, match=r"ReconPrunerConfig .*depth"):
        from_plain(ReconPrunerConfig, plain | {"depth": 3})
    nested = to_plain(ReconPrunerConfig())
    del nested["layer"]["num_heads"]
    with pytest.raises(UserError, match=r"DecoderConfig .*num_heads"):
        from_plain(ReconPrunerConfig, nested)
    with pytest.raises(UserError, match="DecoderConfig"):
        from_plain(ReconPrunerConfig, plain | {"layer": [1, 2]})


def test_values_that_the_class_refuses_are_refused():
    plain = to_plain(PRUNER_RUNS["tiny"])
    plain["recon"]["alpha"] = 1.5
    with pytest.raises(UserError, match=r"alpha=1\.5"):
        from_plain(PrunerRun, plain)
