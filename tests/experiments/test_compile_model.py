"""Published sizes as programs, of which nothing is allocated."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from tiny_openvla import SLOTS, TOKENS
from tiny_pi0 import SIZES

from experiments import compile_model as command
from experiments.ahead_of_time import abstract_shards
from experiments.compile_model import CompileModelArgs, compile_model
from experiments.compile_openvla import openvla_stages
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.openvla.config import OPENVLA_OFT_7B
from fastdrive_jax.models.openvla.weights import abstract_params
from fastdrive_jax.models.pi0.weights import abstract_params as abstract_pi0
from fastdrive_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize("config", [TOKENS, SLOTS], ids=["tokens", "slots"])
def test_figures_of_a_model(config, tmp_path, monkeypatch):
    monkeypatch.setitem(command.OPENVLAS, "openvla_7b", config)
    path = compile_model(CompileModelArgs("openvla_7b", 1, 5, tmp_path))
    found = json.loads(path.read_text())
    figures = {row["metric"]: row["value"] for row in found["rows"]}
    shapes = jax.tree.leaves(abstract_params(config))
    assert figures["parameters"] == sum(leaf.size for leaf in shapes)
    stages = ["vision", "action_chunk"] if config.parallel else ["vision", "prefill", "decode"]
    assert {name.split("_flops")[0] for name in figures if "_flops" in name} == set(stages)
    for stage in stages:
        held = figures[f"{stage}_argument_bytes_per_device"]
        assert 0 < held < figures[f"{stage}_peak_bytes_per_device"]
    assert found["meta"]["visual_tokens"] == config.visual_tokens


def test_figures_of_a_pi0(tmp_path, monkeypatch):
    monkeypatch.setitem(command.PI0S, "pi0", SIZES)
    found = json.loads(compile_model(CompileModelArgs("pi0", 1, 5, tmp_path)).read_text())
    figures = {row["metric"]: row["value"] for row in found["rows"]}
    assert figures["parameters"] == sum(x.size for x in jax.tree.leaves(abstract_pi0(SIZES)))
    for stage in ("vision", "prefill", "action_chunk"):
        held = figures[f"{stage}_argument_bytes_per_device"]
        assert 0 < held < figures[f"{stage}_peak_bytes_per_device"]
        assert figures[f"{stage}_flops_per_device"] > 0
    assert found["meta"]["visual_tokens"] == 48


@pytest.fixture(scope="module")
def oft_7b():
    return abstract_params(OPENVLA_OFT_7B)


def test_parameters_of_the_published_model(oft_7b):
    """openvla-7b has 7,541,237,184; 43,080,480 of them lie behind the output that is read."""
    counted = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in oft_7b.items()
    }
    assert counted.pop("action_head") == 151_117_831
    assert counted.pop("proprio_projector") == 16_818_176
    unread = 12_598_272 + 15_239_504  # the last block of each encoder
    unread += 2 * (1024 + 1152) + 15_238_352  # their norms, and SigLIP's pooling
    assert sum(counted.values()) + unread == 7_541_237_184


def test_oft_7b_lowers_over_a_mesh(oft_7b):
    mesh = make_mesh(1, 1, 1)
    lowered = openvla_stages(OPENVLA_OFT_7B, abstract_shards(oft_7b, mesh), mesh, 35)
    assert lowered["vision"].out_info.shape == (1, 512, 4096)
    assert lowered["action_chunk"].out_info.shape == (1, 8, 7)
    assert lowered["action_chunk"].out_info.dtype == jnp.bfloat16


def test_no_device_and_no_prompt_are_refused(tmp_path):
    for wrong in ({"devices": 0}, {"prompt_tokens": 0}):
        with pytest.raises(UserError, match="at least 1"):
            compile_model(replace(CompileModelArgs(out=tmp_path), **wrong))


def test_more_devices_than_a_running_process_has(tmp_path):
    jax.devices()
    with pytest.raises(UserError, match="there are"):
        compile_model(CompileModelArgs("openvla_7b", 64, 5, tmp_path))
