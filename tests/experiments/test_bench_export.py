import importlib.util
import sys

import pytest
from tiny_policy import PRUNER, small_config, small_params

from experiments import export_forms
from experiments.bench_export import BenchExportArgs, bench_export
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows, select
from fastdrive_jax.export.driving import write_policy
from fastdrive_jax.export.eight_bits import EightBits
from fastdrive_jax.export.pruner import write_pruner

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("flatbuffers", "qwix")),
    reason="flatbuffers and qwix are not installed (extra: export)",
)


def test_errors_sizes_and_times_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(export_forms, "EIGHT_BITS", {"int8_weights": EightBits("int8")})
    monkeypatch.setitem(sys.modules, "jax2onnx", None)  # as if it were not installed
    config = small_config()
    bundle = write_policy(tmp_path / "bundle", small_params(config), config, PRUNER, 0.4)
    args = BenchExportArgs(bundle, tmp_path / "out", keep_ratio=0.4, frames=6, repeats=3)
    rows, meta = read_rows(bench_export(args))
    assert meta["batch"] == 1

    def value(method, metric):
        return select(rows, method=method, metric=metric)[0].value

    assert {row.method for row in rows} == {"float32", "int8_weights", "stablehlo"}
    assert {row.keep_ratio for row in rows} == {0.4}
    for same in ("float32", "stablehlo"):
        assert value(same, "waypoint_distance_max") < 1e-5
        assert value(same, "kept_tokens_same") == 1
    assert value("int8_weights", "weights") < 0.7 * value("float32", "weights")
    assert 0.8 < value("int8_weights", "score_rank_correlation_mean") <= 1
    assert value("float32", "times_as_fast") == 1
    for method in ("float32", "int8_weights", "stablehlo"):
        time = select(rows, method=method, metric="frame_ms")[0]
        assert 0 < time.low <= time.value <= time.high


def test_what_cannot_be_timed_is_refused(tmp_path):
    with pytest.raises(UserError, match="repeats=0"):
        BenchExportArgs(tmp_path, repeats=0)
    pruner = write_pruner(tmp_path / "p", small_params(small_config())["pruner"], PRUNER)
    with pytest.raises(UserError, match="cannot be timed as a policy: The pruner is one for"):
        bench_export(BenchExportArgs(pruner))
