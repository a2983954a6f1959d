"""Whole frames with every method, compiled for chips that are not here."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from real_chips import H100, TPUS
from tiny_policy import PRUNER, small_config, small_params

from experiments.ahead_of_time import compile_for
from experiments.chips import CHIPS, chip_devices
from experiments.drives import step
from fastdrive_jax.inference.policy import DrivingPolicy, start_state
from fastdrive_jax.models.attention import kernels_of
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import PRUNERS, builds_on_recon, make_pruner

QUICK = ("reconpruner", "cdpruner", "vlapruner")  # sorts, loops over tokens, memory
BATCH = 2


@pytest.mark.parametrize("chip", [TPUS[0], H100])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PRUNERS],
)
def test_a_frame_compiles(name, chip):
    config = small_config()
    config = replace(config, text=replace(config.text, num_layers=5))
    tokens, on_recon = config.visual_tokens, builds_on_recon(name)
    pruner = make_pruner(name, **({"config": PRUNER} if on_recon else {}))
    policy = DrivingPolicy(DrivingVLA(config), pruner, 0.5)

    def given():
        params = small_params(config)
        weights = params["pruner"] if on_recon else None
        if name == "prior":
            weights = jnp.zeros((1, tokens))
        images = jnp.zeros((BATCH, 1, *config.image_size, 3), jnp.uint8)
        frame = images, None, jnp.zeros((BATCH, tokens)), jnp.zeros(BATCH), jnp.zeros(BATCH, int)
        params = {"vla": params["vla"], "pruner": weights}
        return params, *frame, jax.random.key(0), start_state(policy, BATCH)

    place = SingleDeviceSharding(chip_devices(chip, 1)[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(given)
    )
    with kernels_of(CHIPS[chip].platform), jax.default_matmul_precision("default"):
        lowered = step.lower(policy, *shapes)
    compiled = compile_for(chip, lowered, name)
    assert compiled.out_info.keep_indices.shape[0] == BATCH
