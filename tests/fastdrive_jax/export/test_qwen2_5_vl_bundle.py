import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import write_bundle
from fastdrive_jax.export.qwen2_5_vl import (
    bundle_of_checkpoint,
    checkpoint_of_bundle,
    read_qwen_bundle,
)
from fastdrive_jax.models.qwen2_5_vl.checkpoint import save
from fastdrive_jax.models.qwen2_5_vl.config import TINY_DECODER, TINY_VISION, QwenVLConfig
from fastdrive_jax.models.qwen2_5_vl.weights import abstract_params

CONFIG = QwenVLConfig(
    dataclasses.replace(TINY_VISION, depth=1, hidden_size=16, intermediate_size=24),
    dataclasses.replace(TINY_DECODER, num_layers=1, intermediate_size=32, vocab_size=40),
    eos_token_ids=(1, 2),
    pad_token_id=0,
)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_there_and_back_bit_for_bit(tmp_path, dtype):
    rng = np.random.default_rng(0)
    shapes = abstract_params(CONFIG.vision, CONFIG.text)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), shapes)
    first = save(tmp_path / "first", CONFIG, params)
    bundle = bundle_of_checkpoint(first, tmp_path / "bundle")
    config, read = read_qwen_bundle(bundle)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(read), params)
    second = checkpoint_of_bundle(bundle, tmp_path / "second")
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert set(before) == set(after)
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        np.testing.assert_array_equal(value, after[name])
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


def test_a_bundle_of_another_kind_is_refused(tmp_path):
    write_bundle(tmp_path / "other", {"pruner": {"w": np.ones(3, np.float32)}}, {"kind": "pruner"})
    with pytest.raises(UserError, match="kind 'pruner'"):
        read_qwen_bundle(tmp_path / "other")
