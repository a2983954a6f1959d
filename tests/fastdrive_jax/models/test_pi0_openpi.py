"""openpi's own parameters beside what its conversion to PyTorch makes of them, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from safetensors.numpy import save_file
from tiny_pi0 import SIZES, published, write_json, write_tokenizer

from experiments.robot_pi0 import pi0_parts
from experiments.robot_vla import CheckpointOptions
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.pi0 import weights
from fastdrive_jax.models.pi0.checkpoint import load
from fastdrive_jax.models.pi0.config import PI0
from fastdrive_jax.models.pi0.openpi_arrays import sources
from fastdrive_jax.models.pi0.weights import abstract_params

BLOCK = "PaliGemma/img/Transformer/encoderblock"
LLM = "PaliGemma/llm"
V, P, E = SIZES.vision, SIZES.prefix, SIZES.expert


def arrays():
    """Random ones by their names in openpi, shapes as its modules declare them."""
    heads = V.num_heads, V.hidden_size // V.num_heads
    shapes = {
        "PaliGemma/img/embedding/kernel": (8, 8, 3, 16),
        "PaliGemma/img/embedding/bias": (16,),
        "PaliGemma/img/pos_embedding": (1, 16, 16),
        "PaliGemma/img/Transformer/encoder_norm/scale": (16,),
        "PaliGemma/img/Transformer/encoder_norm/bias": (16,),
        "PaliGemma/img/head/kernel": (16, 24),
        "PaliGemma/img/head/bias": (24,),
        f"{LLM}/embedder/input_embedding": (64, 24),
        "state_proj/kernel": (12, 16),
        "action_in_proj/kernel": (12, 16),
        "action_time_mlp_in/kernel": (32, 16),
        "action_time_mlp_out/kernel": (16, 16),
        "action_out_proj/kernel": (16, 12),
    }
    named = [name for name in shapes if "proj" in name or "mlp" in name]
    shapes |= {name.replace("kernel", "bias"): shapes[name][1:] for name in named}
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        shapes |= {f"{BLOCK}/{norm}/{part}": (1, 16) for part in ("scale", "bias")}
    for number, (into, out) in enumerate(((16, 24), (24, 16))):
        name = f"{BLOCK}/MlpBlock_0/Dense_{number}"
        shapes |= {f"{name}/kernel": (1, into, out), f"{name}/bias": (1, out)}
    for part in ("query", "key", "value"):
        name = f"{BLOCK}/MultiHeadDotProductAttention_0/{part}"
        shapes |= {f"{name}/kernel": (1, 16, *heads), f"{name}/bias": (1, *heads)}
    name = f"{BLOCK}/MultiHeadDotProductAttention_0/out"
    shapes |= {f"{name}/kernel": (1, *heads, 16), f"{name}/bias": (1, 16)}
    for suffix, width, inner in (("", 24, 40), ("_1", 16, 32)):
        shapes |= {
            f"{LLM}/final_norm{suffix}/scale": (width,),
            f"{LLM}/layers/pre_attention_norm{suffix}/scale": (2, width),
            f"{LLM}/layers/pre_ffw_norm{suffix}/scale": (2, width),
            f"{LLM}/layers/attn/q_einsum{suffix}/w": (2, P.num_heads, width, 8),
            f"{LLM}/layers/attn/kv_einsum{suffix}/w": (2, 2, 1, width, 8),
            f"{LLM}/layers/attn/attn_vec_einsum{suffix}/w": (2, P.num_heads, 8, width),
            f"{LLM}/layers/mlp{suffix}/gating_einsum": (2, 2, width, inner),
            f"{LLM}/layers/mlp{suffix}/linear": (2, inner, width),
        }
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def converted(given):
    """Tensors by the names of the PyTorch port, as it would be given them."""
    out = {}

    def dense(name, kernel, bias=None):
        out[f"{name}.weight"] = kernel.T
        if bias is not None:
            out[f"{name}.bias"] = bias.reshape(-1)

    image = "PaliGemma/img"
    source = "vision_tower.embeddings"
    out[f"{source}.patch_embedding.weight"] = given[f"{image}/embedding/kernel"].transpose(
        3, 2, 0, 1
    )
    out[f"{source}.patch_embedding.bias"] = given[f"{image}/embedding/bias"]
    out[f"{source}.position_embedding.weight"] = given[f"{image}/pos_embedding"].reshape(-1, 16)
    for part, theirs in (("weight", "scale"), ("bias", "bias")):
        norm = f"{image}/Transformer/encoder_norm/{theirs}"
        out[f"vision_tower.post_layernorm.{part}"] = given[norm]
        for number in (0, 1):
            name = f"vision_tower.encoder.layers.0.layer_norm{number + 1}.{part}"
            out[name] = given[f"{BLOCK}/LayerNorm_{number}/{theirs}"][0]
    layer, attention = "vision_tower.encoder.layers.0", f"{BLOCK}/MultiHeadDotProductAttention_0"
    for number in (0, 1):
        name = f"{BLOCK}/MlpBlock_0/Dense_{number}"
        parts = given[f"{name}/kernel"][0], given[f"{name}/bias"][0]
        dense(f"{layer}.mlp.fc{number + 1}", *parts)
    for part, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
        kernel = given[f"{attention}/{name}/kernel"][0].reshape(16, 16)
        dense(f"{layer}.self_attn.{part}_proj", kernel, given[f"{attention}/{name}/bias"][0])
    dense("multi_modal_projector", given[f"{image}/head/kernel"], given[f"{image}/head/bias"])
    out["language_model.embed_tokens.weight"] = given[f"{LLM}/embedder/input_embedding"]
    for model, suffix in (("language_model", ""), ("expert", "_1")):
        out[f"{model}.norm.weight"] = given[f"{LLM}/final_norm{suffix}/scale"]
        for i in range(2):
            layer, at = f"{model}.layers.{i}", f"{LLM}/layers"
            norms = {"input": "pre_attention_norm", "post_attention": "pre_ffw_norm"}
            for ours, theirs in norms.items():
                out[f"{layer}.{ours}_layernorm.weight"] = given[f"{at}/{theirs}{suffix}/scale"][i]
            query = given[f"{at}/attn/q_einsum{suffix}/w"][i]
            heads, width, head = query.shape
            rows = query.transpose(0, 2, 1).reshape(heads * head, width)
            out[f"{layer}.self_attn.q_proj.weight"] = rows
            for part, number in (("k", 0), ("v", 1)):
                kernel = given[f"{at}/attn/kv_einsum{suffix}/w"][i, number, 0]
                dense(f"{layer}.self_attn.{part}_proj", kernel)
            columns = given[f"{at}/attn/attn_vec_einsum{suffix}/w"][i].reshape(heads * head, width)
            dense(f"{layer}.self_attn.o_proj", columns)
            gating = given[f"{at}/mlp{suffix}/gating_einsum"][i]
            dense(f"{layer}.mlp.gate_proj", gating[0])
            dense(f"{layer}.mlp.up_proj", gating[1])
            dense(f"{layer}.mlp.down_proj", given[f"{at}/mlp{suffix}/linear"][i])
    for name in ("state", "action_in", "action_out"):
        dense(f"{name}_proj", given[f"{name}_proj/kernel"], given[f"{name}_proj/bias"])
    for name in ("action_time_mlp_in", "action_time_mlp_out"):
        dense(name, given[f"{name}/kernel"], given[f"{name}/bias"])
    return {published(name): np.ascontiguousarray(value) for name, value in out.items()}


def write_params(folder, given, ending=""):
    tree = {f"params/{name}{ending}": value for name, value in given.items()}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", traverse_util.unflatten_dict(tree, sep="/"))
    return folder


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    return write_params(tmp_path_factory.mktemp("openpi"), arrays())


def test_they_are_the_converted_ones(downloaded, tmp_path):
    save_file(converted(arrays()), tmp_path / "model.safetensors")
    expected = weights.load(tmp_path, SIZES)
    found = load(downloaded, SIZES)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    half = load(downloaded, SIZES, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_training_writes_value_behind_every_name(downloaded, tmp_path):
    found = load(write_params(tmp_path, arrays(), "/value"), SIZES)
    jax.tree.map(np.testing.assert_array_equal, found, load(downloaded, SIZES))


def test_it_is_a_policy_without_a_config(downloaded):
    write_tokenizer(downloaded)
    one = {"mean": [0.0] * 8, "std": [1.0] * 8}
    actions = {"mean": [0.0] * 7, "std": [1.0] * 7}
    path = downloaded / "assets" / "libero" / "norm_stats.json"
    write_json(path, {"norm_stats": {"state": one, "actions": actions}})
    model, params, body = pi0_parts(downloaded, CheckpointOptions(), SIZES, jnp.float32)
    assert model.config.horizon == SIZES.horizon
    assert body.views == (0, 1)
    jax.tree.map(np.testing.assert_array_equal, params, load(downloaded, SIZES))


def test_what_does_not_fit_is_refused(tmp_path):
    given = arrays()
    given["state_proj/kernel"] = np.zeros((9, 16), np.float32)
    given["time_mlp_in/bias"] = given.pop("action_time_mlp_in/bias")  # as of pi0.5
    write_params(tmp_path / "other", given)
    faults = (
        r"unmapped: time_mlp_in/bias; unfilled: action_time_mlp_in/bias; "
        r"misshapen: state_proj/kernel \(9, 16\), not \(12, 16\)"
    )
    with pytest.raises(UserError, match=faults):
        load(tmp_path / "other", SIZES)
    (tmp_path / "none" / "params").mkdir(parents=True)
    with pytest.raises(UserError, match="is no checkpoint of openpi's"):
        load(tmp_path / "none", SIZES)


def test_all_parameters_of_the_published_size_have_a_source():
    found = [place for source in sources(PI0) for place in source.parts]
    wanted = traverse_util.flatten_dict(abstract_params(PI0))
    assert len(found) == len(set(found))
    assert set(found) == set(wanted)
    count = sum(np.prod(shape) for one in sources(PI0) for shape in one.shapes.values())
    assert count == sum(leaf.size for leaf in wanted.values())
