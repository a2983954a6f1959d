import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.checkpoint import load, save
from fastdrive_jax.models.qwen2_5_vl.config import TINY_DECODER, TINY_VISION, QwenVLConfig
from fastdrive_jax.models.qwen2_5_vl.weights import abstract_params
from fastdrive_jax.parallel.mesh import make_mesh

TINY = QwenVLConfig(
    dataclasses.replace(TINY_VISION, depth=1, hidden_size=16, intermediate_size=24),
    dataclasses.replace(TINY_DECODER, num_layers=1, intermediate_size=32, vocab_size=40),
    eos_token_ids=(1,),
    pad_token_id=0,
)


def random_params(config: QwenVLConfig, dtype=jnp.bfloat16):
    shapes = abstract_params(config.vision, config.text)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), shapes)


def assert_same(ours, params):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), params)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), ours, params)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, tied, shard_bytes, dtype):
    text = dataclasses.replace(TINY.text, tie_word_embeddings=tied)
    config = dataclasses.replace(TINY, text=text)
    params = random_params(config, dtype)
    out = save(tmp_path / "model", config, params, shard_bytes)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert (len(files) > 3) == (shard_bytes < 10**9)
    again, loaded = load(out)
    assert again == config
    assert_same(loaded, params)
    _, half = load(out, dtype=jnp.float16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype("float16")}


def test_names_on_file_are_the_published_ones(tmp_path):
    save(tmp_path / "model", TINY, random_params(TINY))
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert {"visual.merger.ln_q.weight", "model.layers.0.mlp.up_proj.weight"} <= names
    assert all(name.startswith(("visual.", "model.layers.", "model.")) for name in names)


def test_further_files_come_along_and_nothing_is_overwritten(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    also = {"tokenizer.json": tmp_path / "tokenizer.json"}
    out = save(tmp_path / "model", TINY, random_params(TINY), also=also)
    assert (out / "tokenizer.json").read_text() == "{}"
    with pytest.raises(UserError, match="exists already"):
        save(out, TINY, random_params(TINY))
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "other", TINY, random_params(TINY), also={"a": tmp_path / "absent"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokenizer.json"]


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "model", TINY, random_params(TINY), 20_000)


def test_missing_extra_and_misshapen_tensors_are_named_at_once(tmp_path):
    saved = save(tmp_path / "model", TINY, random_params(TINY))
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    del tensors["visual.merger.ln_q.weight"]
    tensors["visual.rotary"] = np.zeros(3, np.float32)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load(saved)
    for part in (
        "unmapped: visual.rotary",
        "unfilled: visual.merger.ln_q.weight",
        "misshapen: language_model.norm.weight (127,), not (128,)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("keep", [4, 100, -10])
def test_a_file_that_is_cut_off_is_named(saved, keep):
    path = sorted(saved.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{path.name} is cut off or damaged"):
        load(saved)


def test_what_is_not_there_is_named(saved, tmp_path):
    path = sorted(saved.glob("*.safetensors"))[0]
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing"):
        load(saved)
    (saved / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load(saved)
    (saved / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load(saved)


def test_a_stored_head_must_be_the_table_it_is_tied_to(tmp_path):
    out = save(tmp_path / "model", TINY, random_params(TINY))
    tensors = load_file(out / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table}, out / "model.safetensors")
    load(out)
    save_file({**tensors, "lm_head.weight": table + 1}, out / "model.safetensors")
    with pytest.raises(UserError, match=r"unlike the embedding table in lm_head\.weight"):
        load(out)


def test_tensors_go_straight_to_their_shards(saved):
    _, params = load(saved, make_mesh(1, 2, 4))
    flat = traverse_util.flatten_dict(params, sep="/")
    specs = {name: tuple(leaf.sharding.spec) for name, leaf in flat.items()}
    up = "language_model/layers_0/mlp/up_proj/kernel"
    assert specs[up] == ("fsdp", "tensor")
    assert specs[up.replace("up", "down")] == ("tensor", "fsdp")
    assert specs["language_model/embed_tokens/embedding"] == ("tensor", "fsdp")
    assert specs["language_model/norm/scale"] in ((), (None,))
    assert_same(params, random_params(TINY))


PEAK = """
import resource, sys, jax
from fastdrive_jax.models.qwen2_5_vl.checkpoint import load
jax.numpy.zeros(1).block_until_ready()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
_, params = load(sys.argv[1])
placed = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
print(peak() - before, placed, largest)
"""


def test_the_host_never_holds_two_copies(tmp_path):
    text = dataclasses.replace(
        TINY.text, vocab_size=400_000, intermediate_size=60_000, num_layers=6
    )
    config = dataclasses.replace(TINY, text=text)
    shapes = abstract_params(config.vision, config.text)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, jnp.bfloat16), shapes)
    out = save(tmp_path / "model", config, params, 200_000_000)
    printed = subprocess.run(
        [sys.executable, "-c", PEAK, out], capture_output=True, text=True, check=True
    ).stdout
    grown, placed, largest = map(int, printed.split())
    assert placed > 200e6
    assert grown < placed + 1.5 * largest + 50e6


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_qwen2_5_vl_checkpoint import TINY, UserError, random_params, save
params = random_params(TINY)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
try:
    save(Path(sys.argv[1]) / "model", TINY, params)
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    here = str(Path(__file__).parent)
    words = [sys.executable, "-c", FULL, str(tmp_path), here]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 'model'} cannot be written: ")
    assert list(tmp_path.iterdir()) == []
