"""A driving VLA and a pruner small enough to compile in seconds, as fixtures."""

import pytest
from tiny_policy import PRUNER, small_config, small_params

from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig


@pytest.fixture(scope="session")
def one_camera() -> tuple[DrivingConfig, dict]:
    config = small_config()
    return config, small_params(config)


@pytest.fixture(scope="session")
def two_cameras() -> tuple[DrivingConfig, dict]:
    config = small_config(("CAM_FRONT", "CAM_BACK"))
    return config, small_params(config)


@pytest.fixture(scope="session")
def small_pruner() -> ReconPrunerConfig:
    return PRUNER


@pytest.fixture(scope="session")
def small_init():
    """Random params of a config; see `small_params`."""
    return small_params
