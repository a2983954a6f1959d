"""Exported programs compiled without weights, and for chips that are not here."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from real_chips import H100, TPUS
from tiny_checkpoint import CONFIG
from tiny_policy import PRUNER, small_config, small_params

from experiments import compile_export as command
from experiments.compile_export import CompileExportArgs, compile_export
from experiments.export_qwen import QwenExport
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.driving import driving_program
from fastdrive_jax.export.programs import Bucket, write_programs
from fastdrive_jax.inference.policy import DrivingPolicy
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import make_pruner

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("flatbuffers", "qwix")),
    reason="flatbuffers or qwix is not installed (extra: export)",
)
CHIPS = ["virtual", TPUS[0], H100]
FORMS = ("bfloat16", "int8_weights", "int8_products", "fp8_products", "stablehlo")


def figures(path):
    rows = json.loads(path.read_text())["rows"]
    return {(row["method"], row["metric"]): row["value"] for row in rows}


@pytest.fixture(scope="module")
def program():
    config = small_config()
    policy = DrivingPolicy(DrivingVLA(config), make_pruner("reconpruner", config=PRUNER), 0.4)
    return driving_program(policy), small_params(config)


@pytest.fixture(scope="module")
def programs(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "stablehlo"
    with jax.default_matmul_precision("default"):  # as a user's process has it
        return write_programs(folder, *program, (Bucket(0.4),))


@pytest.mark.parametrize("chip", CHIPS)
def test_the_programs_of_an_export(programs, chip, tmp_path):
    """All multiply in float32, as the training code on a CPU, whatever a chip takes by default."""
    found = figures(compile_export(CompileExportArgs(programs, chip=chip, out=tmp_path)))
    (name,) = {method for method, _ in found}
    assert name.startswith("b1_k")
    assert [metric for _, metric in found if metric.startswith("products")] == ["products f32"]
    weights = sum(
        np.prod(tensor["shape"]) * 4
        for tensor in json.loads((programs / "config.json").read_text())["tensors"].values()
    )
    assert weights < found[name, "argument_bytes"] < found[name, "peak_bytes"]


@pytest.mark.parametrize("chip", CHIPS)
def test_a_published_model_in_every_form(monkeypatch, chip, tmp_path):
    monkeypatch.setitem(command.QWENS, "3b", CONFIG)
    shapes = QwenExport(image_size=(56, 112), prompt_ids=12, max_new_tokens=3)
    with jax.default_matmul_precision("default"):
        path = compile_export(CompileExportArgs(chip=chip, qwen=shapes, out=tmp_path))
    found = figures(path)
    forms = (*FORMS, "stablehlo_cudnn") if chip == "h100" else FORMS
    assert tuple(dict.fromkeys(method for method, _ in found)) == forms
    for form in forms:
        assert found[form, "argument_bytes"] < found[form, "peak_bytes"]
    assert found["int8_weights", "argument_bytes"] < found["bfloat16", "argument_bytes"]
    assert found["int8_products", "argument_bytes"] == found["int8_weights", "argument_bytes"]
    if chip != "virtual":
        assert found["int8_products", "products s8"] > 5
        assert found["fp8_products", "products f8e4m3fn"] > 5
        assert ("int8_weights", "products s8") not in found


def test_no_program_for_the_chip(program, tmp_path):
    folder = write_programs(tmp_path / "programs", *program, (Bucket(0.4),), ("tpu",))
    with pytest.raises(UserError, match=r"programs has no program for cpu; export it with --plat"):
        compile_export(CompileExportArgs(folder, chip="virtual", out=tmp_path))


def test_a_folder_that_is_no_export(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        compile_export(CompileExportArgs(tmp_path, chip="virtual", out=tmp_path))


@pytest.mark.parametrize("wrong", [{"keep_ratio": 0.0}, {"batch": 0}])
def test_what_is_asked_wrongly_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        CompileExportArgs(**wrong)
