import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_train as bench
from experiments.train_cases import CASES, TrainCase, abstract_inputs, make_step
from experiments.training_cost import peak_flops, step_flops
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.pruning.accounting import encoder_flops, layer_flops
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.training.reconstruction import ReconConfig

LAYER = DecoderConfig(32, 48, 1, 4, 2, 8, mrope_section=(1, 1, 2))
SMALL = TrainCase(
    replace(
        CASES["tiny"].recon,
        pruner=ReconPrunerConfig(layer=LAYER, input_norm=True),
        decoder=replace(LAYER, hidden_size=16, mrope_section=(1, 1, 0)),
    ),
    CASES["tiny"].optimizer,
    batch_size=2,
    size=(56, 84),
    spread=True,
)
SIDES = ("fastdrive", "torch")


class Device:
    def __init__(self, kind: str):
        self.device_kind = kind


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    world = replace(bench.PICTURES, keyframes_per_scene=1, height=56, width=98)
    monkeypatch.setattr(bench, "PICTURES", world)
    monkeypatch.setattr(bench, "SIDE", 64)
    monkeypatch.setitem(CASES, "tiny", SMALL)
    return bench.BenchTrainArgs(tmp_path / "out", config=("tiny",), rounds=2, seconds=0.01)


def test_both_sides_are_measured(arguments, capsys):
    pytest.importorskip("torch")
    rows, meta = read_rows(bench.bench_train(arguments))
    values = {(row.method, row.metric): row.value for row in rows}
    flops = step_flops(SMALL.recon, SMALL.size)
    for side in SIDES:
        rate = values[side, "images_per_second_tiny"]
        assert rate > 0
        assert values[side, "mfu_tiny"] > 0
    assert values["machine", "flops_per_second_tiny"] > 0
    assert values["fastdrive", "times_torch_tiny"] > 0
    assert values["fastdrive", "compilations_after_first_step_tiny"] == 0
    assert 0 <= values["fastdrive", "dispatched_after_tiny"] <= 1
    assert 0 <= values["fastdrive", "input_wait_tiny"] <= 1
    assert meta["peak_flops"] is None
    printed = capsys.readouterr().out
    assert f"{flops / 1e9:.1f} GFLOP a picture" in printed
    assert "layer(n) = 2 n (2 D^2" in printed


def test_rows_hold_medians_of_rounds():
    speeds = {"machine": [10.0, 20.0, 10.0], "fastdrive": [2.0, 3.0, 4.0], "torch": [1.0, 3.0, 1.0]}
    rows = bench._report("x", speeds, 5.0, bench.BenchTrainArgs(rounds=3))
    values = {(row.method, row.metric): row.value for row in rows}
    assert values["fastdrive", "images_per_second_x"] == 3
    assert values["fastdrive", "mfu_x"] == 1.0  # of 2 * 5 / 10, 3 * 5 / 20 and 4 * 5 / 10
    assert values["fastdrive", "times_torch_x"] == 2


def test_other_losses_are_not_timed(arguments, monkeypatch):
    class Ours:
        parameters, metrics, run = 1, {"loss": 2.0}, None

    monkeypatch.setattr(bench, "OurSide", lambda case: Ours)
    monkeypatch.setattr(bench, "_torch_side", lambda case, ours: (None, 2.0001))
    with pytest.raises(RuntimeError, match="first losses"):
        bench._bench("tiny", SMALL, None, None, arguments)


def test_a_compilation_and_a_transfer_within_the_steps_are_noticed():
    ours = bench.OurSide(SMALL)
    ours.run(2)
    assert ours.compiled == 0
    step = ours.step
    ours.step = lambda *inputs: (jax.jit(lambda: 0)(), step(*inputs))[1]
    ours.run(1)
    assert ours.compiled == 1
    ours.step = lambda *inputs: (jnp.sin(np.ones(3)), step(*inputs))[1]
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        ours.run(1)


def test_flops_by_hand():
    recon = SMALL.recon
    layer = 2 * 6 * (2 * 32**2 + 2 * 32 * 16 + 3 * 32 * 48) + 4 * 6**2 * 32
    assert layer_flops(LAYER, 6) == layer
    pruner = layer_flops(LAYER, 7) + 2 * 6 * 32
    decoder = 2 * 6 * (2 * 16**2 + 2 * 16 * 8 + 3 * 16 * 48) + 4 * 6**2 * 16
    once = decoder + 2 * 6 * 32 * 16 + 2 * 6 * 16 * 3 * 14**2
    assert step_flops(recon, (56, 84)) == 3 * (pruner + 2 * once)


def test_flops_of_the_encoder_by_hand():
    """4 patches are 1 token, within one window."""
    embedding = 2 * 4 * 1176 * 1280
    blocks = 2 * 4 * 32 * (4 * 1280**2 + 3 * 1280 * 3420) + 32 * 4 * 4 * 4 * 1280
    merger = 2 * 5120 * (5120 + 2048)
    assert encoder_flops(VisionConfig(), (28, 28)) == embedding + blocks + merger
    case = CASES["3b"]
    assert 43e12 < step_flops(case.recon, case.size, case.encoder) < 44e12


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
    ],
)
def test_known_peaks(kind, rate):
    assert peak_flops(Device(kind)) == rate


def test_an_unknown_device_needs_its_peak():
    with pytest.raises(UserError, match=r"'NVIDIA L40'.*--peak-flops"):
        peak_flops(Device("NVIDIA L40"))
    assert peak_flops(Device("NVIDIA L40"), 181e12) == 181e12


def test_the_middle_config_has_about_100_million_parameters():
    state, _, _ = abstract_inputs(CASES["100m"])
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    assert 100e6 < count < 110e6


def test_the_3b_step_traces_in_bfloat16():
    """Shapes only: two of its layers of each kind, all widths and the whole picture."""
    case = CASES["3b"]
    recon = ReconConfig(pruner=case.recon.pruner, decoder=replace(case.recon.decoder, num_layers=2))
    encoder = replace(case.encoder, depth=2, fullatt_block_indexes=(1,))
    case = replace(case, recon=recon, encoder=encoder)
    inputs = abstract_inputs(case)
    traced = make_step(case).trace(*inputs)
    state, metrics = traced.out_info
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (state.params, inputs[0].params)]
    assert shapes[0] == shapes[1]
    assert all(leaf.shape == () for leaf in jax.tree.leaves(metrics))
    products = [line for line in traced.lower().as_text().splitlines() if "dot_general" in line]
    wide = [line for line in products if "11008x" in line or "x11008" in line]
    assert wide
    assert all("bf16" in line for line in wide)


def test_refusals(arguments):
    with pytest.raises(UserError, match="accelerator"):
        bench.bench_train(replace(arguments, config=("3b",)))
    with pytest.raises(UserError, match="config='7b'"):
        replace(arguments, config=("7b",))
    with pytest.raises(UserError, match="rounds=0"):
        replace(arguments, rounds=0)
    with pytest.raises(UserError, match="seconds"):
        replace(arguments, seconds=0.0)
    with pytest.raises(UserError, match="peak_flops"):
        replace(arguments, peak_flops=-1.0)
