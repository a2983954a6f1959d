"""The PyTorch module of an exported pruner scores as ours does."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.export.pruner import TORCH_MODULE, write_pruner
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig
from fastdrive_jax.pruning.select import top_k

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed (extra: parity)"
)

LAYER = DecoderConfig(96, 160, 1, 6, 2, 8, mrope_section=(2, 3, 3))
QWEN = DecoderConfig(256, 1376, 1, 16, 2, 8, mrope_section=(2, 3, 3))  # 3B's, an eighth as wide
CASES = {
    "faithful": ReconPrunerConfig(layer=LAYER),
    "ours": ReconPrunerConfig(layer=LAYER, input_norm=True),
    "rope": ReconPrunerConfig(layer=LAYER, rope=True, input_norm=True),
    "gemma": ReconPrunerConfig(
        layer=replace(
            LAYER,
            activation="gelu_tanh",
            attention_bias=False,
            head_size=24,
            mrope_section=(4, 4, 4),
            rms_norm_eps=1e-3,
        )
    ),
    "qwen": ReconPrunerConfig(layer=QWEN),
}
GRID = (6, 8)


@functools.cache
def drawn(config: ReconPrunerConfig, tokens: int = GRID[0] * GRID[1], seed: int = 0):
    """Params, none of their vectors at its initial zeros or ones, tokens and ids."""
    keys = iter(jax.random.split(jax.random.key(seed), 64))
    x = jax.random.normal(next(keys), (2, tokens, config.layer.hidden_size))
    row, column = np.divmod(np.arange(tokens), GRID[1])
    ids = np.broadcast_to(np.stack([0 * row, row, column])[:, None], (3, 2, tokens))
    ids = jnp.asarray(ids, jnp.int32)
    params = jax.jit(ReconPruner(config).init)(next(keys), x, ids)["params"]

    def moved(leaf):
        return leaf + 0.1 * jax.random.normal(next(keys), leaf.shape) if leaf.ndim == 1 else leaf

    return jax.tree.map(moved, params), x, ids


def torch_scores(folder, config, x, ids):
    import torch

    from fastdrive_jax.export.torch_pruner import load_pruner

    inputs = [x, ids] if config.rope else [x]
    with torch.no_grad():
        return load_pruner(folder)(*(torch.from_numpy(np.array(value)) for value in inputs))


@pytest.mark.parametrize("name", CASES)
def test_scores_and_kept_tokens_are_the_same(name, tmp_path):
    from fastdrive_jax.export.torch_pruner import keep

    config = CASES[name]
    params, x, ids = drawn(config)
    folder = write_pruner(tmp_path / "pruner", params, config)
    want = jax.jit(ReconPruner(config).apply)({"params": params}, x, ids if config.rope else None)
    have = torch_scores(folder, config, x, ids)
    print(f"{name}: largest difference {np.abs(want - have.numpy()).max():.2g}")
    np.testing.assert_allclose(have.numpy(), want, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(keep(have, 12).numpy(), top_k(want, 12))


@pytest.mark.slow
def test_the_size_of_the_3b_model(tmp_path):
    """77,081,088 parameters."""
    config = ReconPrunerConfig()
    params, x, ids = drawn(config, tokens=203)
    folder = write_pruner(tmp_path / "pruner", params, config)
    want = np.asarray(jax.jit(ReconPruner(config).apply)({"params": params}, x))
    have = torch_scores(folder, config, x, ids).numpy()
    print(f"3B: largest difference {np.abs(want - have).max():.2g} of {np.abs(want).max():.2g}")
    np.testing.assert_allclose(have, want, atol=1e-5, rtol=0)


def test_of_equal_scores_the_first_is_kept():
    import torch

    from fastdrive_jax.export.torch_pruner import keep

    assert keep(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), 2).tolist() == [[1, 2]]


def test_the_file_alone_is_enough(tmp_path):
    config = CASES["ours"]
    params, _, _ = drawn(config)
    write_pruner(tmp_path / "pruner", params, config)
    shutil.copyfile(TORCH_MODULE, tmp_path / "torch_pruner.py")
    script = (
        "import sys, torch, torch_pruner;"
        "scores = torch_pruner.load_pruner('pruner')(torch.zeros(1, 5, 96));"
        "assert scores.shape == (1, 5) and scores.isfinite().all();"
        "assert not {'jax', 'flax', 'fastdrive_jax'} & set(sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_file_that_lacks_weights_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    from fastdrive_jax.export.torch_pruner import load_pruner

    config = CASES["faithful"]
    folder = write_pruner(tmp_path / "pruner", drawn(config)[0], config)
    tensors = load_file(folder / "model.safetensors")
    del tensors["pruner/scorer/kernel"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"scorer\.weight"):
        load_pruner(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(Exception, match=r"(?i)header|invalid"):
        load_pruner(folder)


def test_a_changed_number_or_setting_is_refused(tmp_path):
    """With either the module would score, and score wrongly."""
    from fastdrive_jax.export.torch_pruner import load_pruner

    config = CASES["faithful"]
    folder = write_pruner(tmp_path / "pruner", drawn(config)[0], config)
    weights, described = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_pruner(folder)
    weights.write_bytes(whole)
    described.write_text(described.read_text().replace('"silu"', '"gelu_tanh"'))
    with pytest.raises(ValueError, match="was changed after it was written"):
        load_pruner(folder)


def test_no_number_is_kept_last_as_in_ours():
    import torch

    from fastdrive_jax.export.torch_pruner import keep

    scores = np.array([[np.nan, 1.0, -np.nan, 3.0, 2.0]], np.float32)
    for k in range(1, 6):
        want = np.asarray(top_k(jnp.asarray(scores), k))
        np.testing.assert_array_equal(keep(torch.tensor(scores), k).numpy(), want)
