import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench_pruners import (
    BenchPrunersArgs,
    bench_pruners,
    example_cut,
    example_inputs,
    interleaved,
    scaled_config,
    with_evidence,
)
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows
from fastdrive_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B
from fastdrive_jax.pruning import PRUNERS, Pruner
from fastdrive_jax.pruning.interface import Cuts, Temporal

CONFIG = scaled_config(256)


def test_every_registered_method_is_measured(tmp_path):
    args = BenchPrunersArgs(tmp_path, batch=(2,), n=48, dim=256, k=12, repeats=1)
    rows, meta = read_rows(bench_pruners(args))
    values = {(row.method, row.metric): row.value for row in rows}
    assert len(values) == 1 + 3 * len(PRUNERS)
    prefill = values["unpruned", "prefill_batch_2_ms"]
    for name in PRUNERS:
        overhead = values[name, "overhead_batch_2_ms"]
        share = values[name, "overhead_batch_2_share"]
        assert 0 < share == pytest.approx(overhead / prefill)
        assert 0 < values[name, "prefill_flops_share"] < 1
    assert {row.keep_ratio for row in rows} == {1, 0.25}
    assert meta["layers_timed"] == 1
    assert meta["decoder"]["num_layers"] == 36


def within(needs, **more):
    return Pruner(
        name="within",
        score=lambda params, inputs, key: inputs.received,
        needs=frozenset(needs),
        cuts=Cuts(lambda layers: (1, 2)),
        **more,
    )


def test_all_that_a_method_may_declare_is_filled():
    temporal = Temporal(init=lambda inputs: inputs.pixels, observe=lambda state, seen: seen.pixels)
    needs = {"text", "embeddings", "last_row", "text_rows", "received", "pixels", "state"}
    inputs = example_inputs(within(needs, temporal=temporal), CONFIG, 2, [48, 20], jnp.float32)
    assert inputs.tokens.shape == inputs.embeddings.shape == (2, 20, 256)
    assert inputs.ids.shape == (2, 20)
    assert (np.diff(inputs.ids, axis=1) > 0).all()
    assert inputs.state.shape == (2, 48, 588)  # of the tokens before all cuts
    assert inputs.cut == 1


def test_evidence_is_made_of_queries_and_keys():
    needs = {"last_row", "text_rows", "received", "vision_received", "vision_keys"}
    pruner = within(needs)
    cut = example_cut(pruner, CONFIG, 2, [48], jnp.float32)
    made = with_evidence(pruner, cut)
    for need in needs:
        given, new = getattr(cut.inputs, need), getattr(made, need)
        assert given.shape == new.shape
        assert (given != new).any()
    np.testing.assert_allclose(made.text_rows[:, :, -1], made.last_row, atol=1e-6)
    np.testing.assert_allclose(made.vision_received.sum(axis=1), 1, atol=1e-5)
    blind = example_cut(within({"tokens"}), CONFIG, 2, [48], jnp.float32)
    assert blind.model is blind.vision is None


def test_widths_scale_together():
    assert scaled_config(2048) == QWEN2_5_VL_3B.text
    assert CONFIG.head_dim == 16
    assert CONFIG.intermediate_size == 1376


def test_refusals(tmp_path):
    for wrong, match in (
        ({"methods": ("divprun",)}, "divprune"),
        ({"batch": ()}, "batch"),
        ({"repeats": 0}, "repeats=0"),
        ({"k": 3249}, "k=3249"),
        ({"dim": 100}, "dim=100"),
    ):
        with pytest.raises(UserError, match=match):
            BenchPrunersArgs(tmp_path, **wrong)


@pytest.mark.parametrize("need", ["text", "text_rows", "text_valid"])
def test_which_text_is_real_is_said_with_it(need):
    inputs = example_inputs(within({need}), CONFIG, 2, [48], jnp.float32)
    assert inputs.text_valid.shape == (2, 256)
    assert inputs.text_valid.all()


def test_all_take_turns_but_not_always_behind_the_same_one():
    ran = []
    spent = interleaved({name: lambda name=name: ran.append(name) for name in "abc"}, 5)
    rounds = [tuple(ran[k : k + 3]) for k in range(0, 18, 3)]
    assert list(spent) == ["a", "b", "c"]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 2
