"""Chips that are not here: what their compilers are asked, and what they make of our programs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from real_chips import H100, TPUS
from tiny_policy import TEXT, VISION

from experiments import chips
from experiments.ahead_of_time import compile_for, peak_bytes
from experiments.chips import CHIPS, chip_devices, tpu_slice
from experiments.collectives import collective_bytes
from experiments.compile_train import lower_step
from experiments.configs.pruner import PRUNER_RUNS
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.attention import attention, kernels_of
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig

REAL = [*TPUS, H100]


def _place(chip):
    return SingleDeviceSharding(chip_devices(chip, 1)[0])


@pytest.mark.parametrize(
    ("count", "two", "three"),
    [
        (1, (2, 2), (2, 2, 1)),
        (4, (2, 2), (2, 2, 1)),
        (8, (2, 4), (2, 2, 2)),
        (64, (8, 8), (4, 4, 4)),
        (256, (16, 16), (4, 8, 8)),
    ],
)
def test_slices_are_as_even_as_can_be(count, two, three):
    assert (tpu_slice(count, 2), tpu_slice(count, 3)) == (two, three)


def test_no_slice_has_six_chips():
    with pytest.raises(UserError, match="devices=6 must be a power of two"):
        tpu_slice(6, 2)


@pytest.mark.parametrize(("chip", "extra"), [("v5e", "tpu"), ("h100", "cuda")])
def test_a_compiler_that_is_not_installed(monkeypatch, chip, extra):
    def absent(*_, **__):
        raise RuntimeError("support not installed\nand more")

    monkeypatch.setattr(chips.topologies, "get_topology_desc", absent)
    with pytest.raises(UserError, match=rf"\(support not installed\); .*'\.\[{extra}\]'"):
        chip_devices(chip, 1)


@pytest.mark.parametrize("chip", REAL)
def test_as_many_devices_as_asked(chip):
    for count in (1, 8, 16):
        devices = chip_devices(chip, count)
        assert len(set(devices)) == count
    assert make_mesh(2, 4, 2, devices).shape == {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize("chip", REAL)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_attention_and_its_gradient_compile(chip, causal, dtype):
    """Odd lengths, heads that share keys, sizes below a lane."""

    def loss(query, key, value, lengths):
        out = attention(query, key, value, causal=causal, lengths=lengths)
        return out.astype(jnp.float32).sum()

    place = _place(chip)
    sides = ((2, 197, 4, 80), (2, 197, 2, 80), (2, 197, 2, 80))
    given = [jax.ShapeDtypeStruct(side, dtype, sharding=place) for side in sides]
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=place)
    # Where no more is asked of a TPU than it has for bfloat16, as by default.
    precision = "default" if dtype == jnp.bfloat16 else "highest"
    with kernels_of(CHIPS[chip].platform), jax.default_matmul_precision(precision):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*given, lengths)
    compiled = compile_for(chip, lowered, "attention")
    if chip != "h100":
        assert "tpu_custom_call" in compiled.as_text()
    elif dtype == jnp.bfloat16:
        assert "__cudnn$fmhaSoftmaxBackward" in compiled.as_text()


@pytest.mark.parametrize("chip", [TPUS[0], H100])
def test_a_training_step_compiles_over_a_mesh(chip):
    layer = replace(TEXT, num_heads=4, num_kv_heads=2, hidden_size=64, intermediate_size=96)
    run = PRUNER_RUNS["fastdrivevla_3b"]
    recon = replace(run.recon, pruner=ReconPrunerConfig(layer=layer), decoder=layer)
    run = replace(run, recon=recon, loader=replace(run.loader, image_size=(112, 112)))
    vision = replace(VISION, hidden_size=64, out_hidden_size=64, num_heads=4)
    mesh = make_mesh(1, 4, 2, chip_devices(chip, 8))
    with kernels_of(CHIPS[chip].platform), jax.default_matmul_precision("default"):
        lowered, state = lower_step(run, vision, mesh, 8)
    compiled = compile_for(chip, lowered, "the step")
    moved = collective_bytes(compiled.as_text())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert moved["all-gather"] > parameters  # bytes of at least half of the numbers
    assert peak_bytes(compiled) > compiled.memory_analysis().argument_size_in_bytes > 0


@pytest.mark.parametrize("chip", REAL)
def test_what_does_not_fit_is_one_sentence(chip):
    side = 120_000  # 58 GB of numbers, and as many results
    x = jax.ShapeDtypeStruct((2, side, side), jnp.bfloat16, sharding=_place(chip))
    lowered = jax.jit(lambda x: x + 1).lower(x)
    said = rf"The sum does not fit the memory of a {chip} \(.*\d+.*\); shard"
    with pytest.raises(UserError, match=said):
        compile_for(chip, lowered, "The sum")
