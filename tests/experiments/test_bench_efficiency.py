"""The efficiency table: by count, measured at a tiny size, and predicted at the published ones."""

import json
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import efficiency_rounds
from experiments.bench_efficiency import bench_efficiency, frame_times
from experiments.configs.models import MODELS, driving_config
from experiments.efficiency_args import BenchEfficiencyArgs
from experiments.efficiency_memory import check_free, peak_bytes
from experiments.efficiency_rounds import (
    asked_of,
    machine_of,
    processor,
    read_rounds,
    write_rounds,
)
from experiments.efficiency_table import write_plots
from experiments.program_flops import program_flops
from experiments.roofline import ACCELERATORS, Machine, roofline_ms
from experiments.torch_qwen import has_torch
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, read_rows, write_rows
from fastdrive_jax.models.attention import attention
from fastdrive_jax.pruning.accounting import layer_flops, recon_pruner_flops

TINY = {
    "config": "tiny",
    "methods": ("reconpruner", "fastv"),
    "ratios": (0.5,),
    "height": 112,
    "width": 112,
    "peer": has_torch(),
}
SETTINGS = (("unpruned", 1.0), ("reconpruner", 0.5), ("fastv", 0.5))
PEERS = (("transformers", 1.0), ("transformers", 0.5)) if has_torch() else ()
STAGES = ("preprocess", "vision", "pruner", "language_model", "prefill", "decode", "frame")
LATE = {"prefill": 900.0, "decode": 9000.0, "busy_prefill": 1800.0, "busy_decode": 18000.0}
EARLY = {"preprocess": 1.0, "pruner": 0.0, "busy_preprocess": 1.0, "busy_pruner": 0.0}
FIRST = {  # a round by hand
    "rates": {"flops": 1e9, "bandwidth": 1e9},
    **{f"{n}@{r}": EARLY | {"vision": 2.0, "busy_vision": 4.0} | LATE for n, r in SETTINGS},
    **{f"{n}@{r}": LATE for n, r in PEERS},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run that was cut off after its first round at batch 1, and went on."""
    out = tmp_path_factory.mktemp("efficiency")
    args = BenchEfficiencyArgs(out, repeats=2, batch=(1, 2), **TINY)
    write_rounds(out / "rounds.json", asked_of(args, jnp.float32), {"1": [FIRST]})
    bench_efficiency(args)
    return out


def cells(path):
    rows, meta = read_rows(path)
    return {(row.method, row.keep_ratio, row.metric): row for row in rows}, meta


def test_a_run_goes_on_after_its_last_round(folder):
    rounds = json.loads((folder / "rounds.json").read_text())["rounds"]
    assert rounds["1"][0] == FIRST
    assert [len(rounds[batch]) for batch in ("1", "2")] == [2, 2]
    assert rounds["1"][1].keys() == FIRST.keys()
    found, _ = cells(folder / "efficiency.json")
    row = found["unpruned", 1.0, "prefill_batch_1_ms"]
    assert row.value == pytest.approx((900 + rounds["1"][1]["unpruned@1.0"]["prefill"]) / 2)


def test_rounds_of_another_run_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"rounds\.json holds rounds with another height"):
        bench_efficiency(BenchEfficiencyArgs(folder, **TINY | {"height": 140}))
    (tmp_path / "rounds.json").write_text("{")
    with pytest.raises(UserError, match=r"rounds\.json is damaged"):
        bench_efficiency(BenchEfficiencyArgs(tmp_path, **TINY))


OWN = """from fastdrive_jax.pruning import make_pruner


def mine():
    return make_pruner("random")
"""


def test_rounds_of_a_method_whose_file_has_changed_are_refused(tmp_path):
    own, path = tmp_path / "own.py", tmp_path / "rounds.json"
    own.write_text(OWN)
    args = BenchEfficiencyArgs(tmp_path, **TINY | {"methods": ("fastv", f"{own}:mine")})
    write_rounds(path, asked_of(args, jnp.float32), {"1": [FIRST]})
    assert read_rounds(path, asked_of(args, jnp.float32)) == {"1": [FIRST]}
    own.write_text(OWN.replace("random", "divprune"))
    with pytest.raises(UserError, match="holds rounds with another method file: remove it"):
        read_rounds(path, asked_of(args, jnp.float32))


def other_processor(monkeypatch):
    monkeypatch.setattr(efficiency_rounds, "processor", lambda: "an odd one")


def more_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1000)


def other_device(monkeypatch):
    alike = str(jax.devices()[0])

    class Device:
        platform, device_kind = "gpu", "NVIDIA H200"

        def __str__(self):
            return alike  # as any is "cuda:0"

    device = Device()
    monkeypatch.setattr(jax, "devices", lambda: [device])


@pytest.mark.parametrize(
    ("change", "named"),
    [(other_processor, "processor"), (more_cores, "cores"), (other_device, "device")],
)
def test_rounds_of_another_machine_are_refused(tmp_path, monkeypatch, change, named):
    args, path = BenchEfficiencyArgs(tmp_path, **TINY), tmp_path / "rounds.json"
    write_rounds(path, asked_of(args, jnp.float32), {"1": [FIRST]})
    assert read_rounds(path, asked_of(args, jnp.float32)) == {"1": [FIRST]}
    change(monkeypatch)
    with pytest.raises(UserError, match=f"holds rounds with another {named}: remove it"):
        read_rounds(path, asked_of(args, jnp.float32))


def test_machines_are_told_apart_by_what_computes(tmp_path):
    kinds = [SimpleNamespace(platform="gpu", device_kind=f"NVIDIA {name}") for name in ("A", "B")]
    assert [machine_of(kind) for kind in kinds] == [{"device": "NVIDIA A"}, {"device": "NVIDIA B"}]
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nflags\t\t: fpu\n" * 2)
    assert processor(told) == "A CPU @ 2 GHz"
    assert processor(tmp_path / "none")  # whatever Python says


def test_rows_are_complete_and_sane(folder):
    found, meta = cells(folder / "efficiency.json")
    assert not meta["predicted"]
    assert meta["visual_tokens"] == 16
    for batch in (1, 2):
        for at in SETTINGS:

            def value(metric, at=at, batch=batch):
                return found[*at, metric.format(batch)].value

            for stage in STAGES:
                row = found[*at, f"{stage}_batch_{batch}_ms"]
                assert row.low <= row.value <= row.high
                assert row.n == 2
            assert value("prefill_batch_{}_ms") > 0
            assert value("vision_batch_{}_roofline_ms") > 0
            # A frame is its stages, and what XLA says of them.
            for stage in ("vision", "pruner", "prefill", "decode"):
                assert value(f"{stage}_peak_bytes_batch_{{}}") > 0
            assert value("prefill_xla_flops_batch_{}") > 0
            # Formula and traced program count the same products, but for evidence of fastv.
            ratio = value("prefill_program_flops_batch_{}") / value("prefill_flops_batch_{}")
            assert 0.99 < ratio < (1.1 if at[0] == "fastv" else 1.01)
        assert found["unpruned", 1.0, f"prefill_batch_{batch}_speedup"].value == 1
        assert found["unpruned", 1.0, f"pruner_batch_{batch}_ms"].value == 0
        assert found["unpruned", 1.0, f"bound_batch_{batch}"].value == 1
        # One cut before the third of five layers, and eight tokens in all of them.
        tokens = found["fastv", 0.5, f"equivalent_tokens_batch_{batch}"].value
        assert tokens == (2 * 16 + 3 * 8) / 5
        assert found["reconpruner", 0.5, f"equivalent_tokens_batch_{batch}"].value == 8
    text = (folder / "efficiency.md").read_text()
    assert "| 50% | reconpruner |" in text
    assert "PREDICTED" not in text


def test_counts_of_a_batch_are_those_of_its_samples(folder):
    found, _ = cells(folder / "efficiency.json")
    text = driving_config("tiny", (112, 112)).text
    for metric in ("prefill_flops", "pruner_flops", "kv_bytes", "prefill_program_flops"):
        one, two = (found["reconpruner", 0.5, f"{metric}_batch_{b}"].value for b in (1, 2))
        assert two == 2 * one
    head = 2 * text.hidden_size * text.vocab_size
    own = recon_pruner_flops(text, 16)
    assert found["reconpruner", 0.5, "pruner_flops_batch_1"].value == own
    pruned = text.num_layers * layer_flops(text, 8 + 6) + head + own
    assert found["reconpruner", 0.5, "prefill_flops_batch_1"].value == pruned
    whole = text.num_layers * layer_flops(text, 16 + 6) + head
    assert found["reconpruner", 0.5, "bound_batch_1"].value == pytest.approx(whole / pruned)


def test_a_published_size_is_predicted_without_weights(tmp_path):
    args = BenchEfficiencyArgs(
        tmp_path,
        config="3b",
        predict=True,
        methods=("reconpruner",),
        accelerators=("h100",),
        batch=(1, 64),
    )
    found, meta = cells(bench_efficiency(args))
    assert meta["visual_tokens"] == 3249
    assert meta["predicted"]
    assert not any(array.size > 1e6 for array in jax.live_arrays())
    whole, pruned = ("unpruned", 1.0), ("reconpruner", 0.25)
    assert found[*whole, "prefill_flops_batch_1"].value == pytest.approx(21.2e12, rel=0.01)
    assert found[*pruned, "bound_batch_1"].value == pytest.approx(3.98, abs=0.01)
    # 6.17 GB of weights and 0.12 GB of caches: decoding is bound by bytes, and gains little.
    decode = found[*whole, "predicted_h100_decode_batch_1_ms"].value
    assert decode == pytest.approx((6.17 + 0.12) / 3350 * 1e3, rel=0.01)
    gain = found[*pruned, "predicted_h100_decode_batch_1_speedup"].value
    assert 1 < gain < 1.02
    assert gain < found[*pruned, "predicted_h100_decode_batch_64_speedup"].value
    timed = {metric for _, _, metric in found if "_ms" in metric or "speedup" in metric}
    assert all(metric.startswith("predicted_") for metric in timed)
    assert "PREDICTED" in (tmp_path / "efficiency.md").read_text()


def test_rooflines_by_hand():
    machine = Machine("by hand", flops=1e12, bandwidth=1e9)
    assert roofline_ms(machine, 2e9, 1e6) == 2.0
    assert roofline_ms(machine, 2e9, 5e6) == 5.0
    assert ACCELERATORS["h100"].flops == 989e12
    assert roofline_ms(ACCELERATORS["v5e"], 0, 819e9) == pytest.approx(1000)


def test_frames_of_rounds():
    """Three rounds, two with the encoder, ten decode steps."""
    times = {"preprocess": [1.0, 1.0, 1.0], "vision": [10.0, 30.0], "pruner": [0.0, 1.0, 2.0]}
    times |= {"prefill": [4.0, 5.0, 6.0], "decode": [50.0, 60.0, 70.0], "busy_prefill": [9.0]}
    found = frame_times(times, 10)
    assert found["prefill"].tolist() == [4, 6, 8]
    assert found["language_model"].tolist() == [4, 5, 6]
    assert found["decode"].tolist() == [5, 6, 7]
    assert found["frame"].tolist() == [1 + 20 + 4 + 50, 1 + 20 + 6 + 60, 1 + 20 + 8 + 70]
    peer = frame_times({"busy_prefill": [9.0], "busy_decode": [20.0]}, 10, "busy_")
    assert (peer["prefill"].tolist(), peer["decode"].tolist()) == ([9], [2])
    assert "frame" not in peer


def test_programs_are_counted_with_their_loops():
    def count(function, *shapes):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return program_flops(jax.make_jaxpr(function)(*shapes))

    square = 2 * 5**3
    assert count(lambda x: jax.jit(lambda y: y @ y)(x), (5, 5)) == square
    assert count(
        lambda x: jax.lax.map(lambda y: x @ y, x[None] + jnp.zeros((7, 1, 1))), (5, 5)
    ) == (7 * square)
    cheap = (lambda x: x, lambda x: x @ x)
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, *cheap, x), (5, 5)) == 0
    heads = (1, 96, 4, 16)
    assert count(lambda q: attention(q, q, q, kernel="blockwise"), heads) == 4 * 96**2 * 64


@pytest.mark.parametrize("name", ["100m", "1b"])
def test_models_for_the_claims_are_as_deep_as_the_published(name):
    """So ReconPruner's share of the prefill is what it is at 3B: its layer is one in 36."""
    (vision, text), (tower, published) = MODELS[name], MODELS["3b"]
    assert (text.num_layers, vision.depth) == (published.num_layers, tower.depth) == (36, 32)
    assert vision.out_hidden_size == text.hidden_size
    ratio = text.intermediate_size / text.hidden_size
    assert ratio == published.intermediate_size / published.hidden_size


def test_without_torch_transformers_is_left_out_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(efficiency_rounds, "has_torch", lambda: False)
    args = BenchEfficiencyArgs(**TINY | {"peer": True})
    assert efficiency_rounds.wanted_peer(args, jnp.float32) is None
    assert "not compared: it needs pip install -e '.[parity]'" in capsys.readouterr().out


def test_where_torch_lacks_the_device_transformers_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(efficiency_rounds, "has_torch", lambda: True)
    monkeypatch.setattr(efficiency_rounds, "torch_device", lambda: None)
    args = BenchEfficiencyArgs(**TINY | {"peer": True})
    assert efficiency_rounds.wanted_peer(args, jnp.float32) is None
    assert "PyTorch has no such device" in capsys.readouterr().out


def test_transformers_reads_the_same_rows(folder):
    """The command itself refuses if its logits are not ours."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found, _ = cells(folder / "efficiency.json")
    for at in PEERS:
        assert found[*at, "logits_error_batch_2"].value < 1e-5
        assert found[*at, "prefill_batch_2_ms"].value > 0


def test_peak_memory_is_that_of_a_process(folder):
    """Here it is this one's, which has held more."""
    args = BenchEfficiencyArgs(folder, **TINY)
    assert peak_bytes(args, ("reconpruner", 0.5), 1) > 50e6


def test_memory_is_not_measured_where_no_process_gets_any():
    check_free("cpu", {})
    check_free("gpu", {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    with pytest.raises(UserError, match="PREALLOCATE=false"):
        check_free("gpu", {})
    with pytest.raises(UserError, match="one process"):
        check_free("tpu", {})


def test_speed_against_error_is_drawn(tmp_path):
    def row(method, ratio, metric, value):
        return Row(method, ratio, metric, value, None, None, 1, None)

    speeds = [row("a", 0.5, "prefill_batch_1_speedup", 2.0)]
    speeds += [row("a", 0.25, "prefill_batch_1_speedup", 3.7)]
    errors = [row("a", ratio, "l2_temavg", value) for ratio, value in ((0.5, 1.0), (0.25, 1.1))]
    write_plots(tmp_path, speeds, [*errors, row("unpruned", 1.0, "l2_temavg", 0.9)])
    assert (tmp_path / "speed_error.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (tmp_path / "speed_error.svg").read_bytes()
    with pytest.raises(UserError, match="no metric of ade, l2_temavg"):
        write_plots(tmp_path, speeds, [row("a", 0.5, "recall", 1.0)])
    with pytest.raises(UserError, match="other methods or ratios"):
        write_plots(tmp_path, speeds, [row("b", 0.5, "ade", 1.0)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ("divprun",)}, "divprune"),
        ({"methods": ()}, "Give methods"),
        ({"ratios": (1.0,)}, "below 1"),
        ({"ratios": (0.0,)}, "keep_ratio"),
        ({"batch": (65,)}, "batch="),
        ({"batch": ()}, "batch="),
        ({"repeats": 0}, "repeats=0"),
        ({"text": 5}, "text=5"),
        ({"height": 100}, "100 x 112"),
        ({"cameras": 7}, "cameras=7"),
        ({"accelerators": ("gpu",)}, "gpu"),
    ],
)
def test_what_is_asked_wrongly_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        BenchEfficiencyArgs(**TINY | change)


def test_errors_must_be_rows(tmp_path):
    path = write_rows(tmp_path / "errors.json", [], {})
    path.write_text("[]")
    with pytest.raises(UserError, match="format"):
        bench_efficiency(BenchEfficiencyArgs(tmp_path, errors=path, **TINY))
    assert np.array_equal(sorted(p.name for p in tmp_path.iterdir()), ["errors.json"])
