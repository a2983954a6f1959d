"""pi0's published tensors to our parameters, and its published size."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference import pi0
from fastdrive_jax.models.pi0.config import PI0, TINY_PI0, Pi0Config
from fastdrive_jax.models.pi0.model import Pi0, action_expert
from fastdrive_jax.models.pi0.weights import (
    abstract_params,
    canonical_name,
    fit_names,
    load,
    name_table,
)
from fastdrive_jax.pruning import make_pruner
from fastdrive_jax.pruning.vla_pruner import latter_half

PREFIX = dataclasses.replace(
    TINY_PI0.prefix, hidden_size=12, intermediate_size=16, num_layers=2, vocab_size=10
)
CONFIG = Pi0Config(
    dataclasses.replace(
        TINY_PI0.vision, depth=1, hidden_size=8, intermediate_size=12, num_heads=2, image_size=16
    ),
    PREFIX,
    dataclasses.replace(PREFIX, hidden_size=8, intermediate_size=20),
    action_dim=3,
)
EMBEDDING = "language_model.embed_tokens.weight"


def drawn() -> dict[str, np.ndarray]:
    """Random tensors under their canonical names."""
    rng = np.random.default_rng(0)
    table = name_table(CONFIG).items()
    return {name: rng.normal(size=shape).astype(np.float32) for name, (_, shape) in table}


def published(name: str, release: str) -> str:
    """A canonical name as one of the releases saved it, with the prefixes of its transformers."""
    prefixes = {
        "lerobot": {
            "vision_tower.": "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
            "multi_modal_projector.": (
                "paligemma_with_expert.paligemma.model.multi_modal_projector.linear."
            ),
            "language_model.": "paligemma_with_expert.paligemma.model.language_model.",
            "expert.": "paligemma_with_expert.gemma_expert.model.",
        },
        "before transformers 4.52": {
            "vision_tower.": "paligemma_with_expert.paligemma.vision_tower.vision_model.",
            "multi_modal_projector.": (
                "paligemma_with_expert.paligemma.multi_modal_projector.linear."
            ),
            "language_model.": "paligemma_with_expert.paligemma.language_model.model.",
            "expert.": "paligemma_with_expert.gemma_expert.model.",
        },
    }
    prefixes["openpi"] = prefixes["lerobot"]
    for own, theirs in prefixes[release].items():
        if name.startswith(own):
            name = theirs + name.removeprefix(own)
    return name if release == "openpi" else f"model.{name}"


def saved(folder, tensors, release="lerobot"):
    save_file({published(k, release): v for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def test_every_layout_is_ours(tmp_path):
    tensors = drawn()
    params = load(saved(tmp_path, tensors), CONFIG)
    block = params["vision_tower"]["blocks_0"]
    source = "vision_tower.encoder.layers.0.self_attn"
    parts = [tensors[f"{source}.{part}_proj.weight"].T for part in "qkv"]
    np.testing.assert_array_equal(block["attn"]["qkv"]["kernel"], np.concatenate(parts, axis=1))
    parts = [tensors[f"{source}.{part}_proj.bias"] for part in "qkv"]
    np.testing.assert_array_equal(block["attn"]["qkv"]["bias"], np.concatenate(parts))
    patches = tensors["vision_tower.embeddings.patch_embedding.weight"]
    kernel = params["vision_tower"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(kernel, patches.reshape(8, -1).T)
    # SigLIP's norms are as they are, Gemma's lack the 1.
    given = tensors["vision_tower.encoder.layers.0.layer_norm1.weight"]
    np.testing.assert_array_equal(block["norm1"]["scale"], given)
    for part, place in (("language_model", ()), ("expert", ("model",))):
        ours = params[part]
        for name in place:
            ours = ours[name]
        given = tensors[f"{part}.layers.1.input_layernorm.weight"]
        np.testing.assert_array_equal(ours["layers_1"]["input_layernorm"]["scale"], 1 + given)
        np.testing.assert_array_equal(ours["norm"]["scale"], 1 + tensors[f"{part}.norm.weight"])
    np.testing.assert_array_equal(
        params["expert"]["action_time_mlp_in"]["kernel"], tensors["action_time_mlp_in.weight"].T
    )


@pytest.mark.parametrize("release", ["openpi", "before transformers 4.52"])
def test_other_releases_give_the_same_parameters(tmp_path, release):
    tensors = drawn()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    ours = load(saved(tmp_path / "a", tensors), CONFIG)
    theirs = load(saved(tmp_path / "b", tensors, release), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_every_value_is_used_and_half_precision_is_read(tmp_path):
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in drawn().items()}
    params = load(saved(tmp_path, tensors), CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(CONFIG))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    gemma = sum(
        value.size
        for name, value in tensors.items()
        if "norm" in name and not name.startswith("vision_tower")
    )
    given = sum(value.astype(np.float64).sum() for value in tensors.values()) + gemma
    got = sum(np.asarray(leaf, np.float64).sum() for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(got, given, rtol=1e-6)


def test_a_table_may_be_saved_as_the_head_it_is_tied_to(tmp_path):
    tensors = drawn()
    table = tensors.pop(EMBEDDING)
    heads = {
        "model.paligemma_with_expert.paligemma.lm_head.weight": table,
        "model.paligemma_with_expert.gemma_expert.lm_head.weight": np.zeros((10, 8), np.float32),
    }
    named = {published(name, "lerobot"): value for name, value in tensors.items()}
    save_file(named | heads, tmp_path / "model.safetensors")
    found = load(tmp_path, CONFIG)["language_model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(found, table)


def test_all_faults_in_one_sentence():
    shapes = {name: value.shape for name, value in drawn().items()}
    shapes["paligemma.model.vision_tower.head.weight"] = (3,)
    shapes["paligemma.language_model.norm.weight"] = (12,)
    del shapes["vision_tower.encoder.layers.0.self_attn.k_proj.bias"], shapes[EMBEDDING]
    shapes["state_proj.weight"] = (8, 2)
    with pytest.raises(UserError) as caught:
        fit_names(shapes, CONFIG)
    found = re.search(r"pi0 of 1 vision blocks and 2 decoder layers: (.*)\.$", str(caught.value))[1]
    assert found.split("; ") == [
        "given twice: language_model.norm.weight",
        "unmapped: vision_tower.head.weight",
        "unfilled: language_model.embed_tokens.weight, "
        "vision_tower.encoder.layers.0.self_attn.k_proj.bias",
        "misshapen: state_proj.weight (8, 2), not (8, 3)",
    ]


def test_canonical_names_stay():
    names = name_table(CONFIG)
    assert [canonical_name(name) for name in names] == list(names)


def parameters_of(config: Pi0Config) -> int:
    """The count by the architecture's sizes alone."""
    v, p, e = config.vision, config.prefix, config.expert

    def decoder(c):
        attention = 2 * c.hidden_size * (c.num_heads + c.num_kv_heads) * c.head_dim
        mlp = 3 * c.hidden_size * c.intermediate_size
        return c.num_layers * (attention + mlp + 2 * c.hidden_size) + c.hidden_size

    def dense(into, out):
        return (into + 1) * out

    w = v.hidden_size
    block = 4 * dense(w, w) + dense(w, v.intermediate_size) + dense(v.intermediate_size, w) + 4 * w
    siglip = dense(3 * v.patch_size**2, w) + (v.grid[0] ** 2) * w + v.depth * block + 2 * w
    width, dim = e.hidden_size, config.action_dim
    heads = 2 * dense(dim, width) + dense(2 * width, width) + dense(width, width)
    embedding = p.vocab_size * p.hidden_size
    projector = dense(w, p.hidden_size)
    return siglip + projector + embedding + decoder(p) + decoder(e) + heads + dense(width, dim)


def test_the_published_size():
    shapes = abstract_params(PI0)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == parameters_of(PI0) == 3_238_048_528
    expert = sum(leaf.size for leaf in jax.tree.leaves(shapes["expert"]))
    assert expert == 314_713_120
    places = {place for place, _ in name_table(PI0).values()}
    assert len(places) == len(jax.tree.leaves(shapes))


def test_the_published_size_lowers_with_pruning():
    """Pictures to actions in one program, its vision tokens cut and its action attention read."""
    model, half = Pi0(PI0, jnp.bfloat16), jnp.bfloat16
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, half), abstract_params(PI0))
    pruner, total = make_pruner("fastv"), PI0.visual_tokens

    def act(params, images, ids, lengths, state, noise):
        tokens = model.apply({"params": params}, images, method="encode")
        read = pi0.read_prompt(model, params, tokens, ids, lengths, pruner=pruner, keep_ratio=0.25)
        expert, observe = action_expert(PI0, half), latter_half(PI0.expert.num_layers)
        steps = PI0.flow_steps
        given = read, state, noise, steps, observe, total
        return pi0.sample_actions(expert, params["expert"], *given)

    shape = jax.ShapeDtypeStruct
    lowered = jax.jit(act).lower(
        params,
        shape((1, 3, 224, 224, 3), jnp.uint8),
        shape((1, 48), jnp.int32),
        shape((1,), jnp.int32),
        shape((1, 32), jnp.float32),
        shape((1, 50, 32), jnp.float32),
    )
    assert lowered.out_info.actions.shape == (1, 50, 32)
    assert lowered.out_info.attention.shape == (1, 768)
    # Keys of 192 kept tokens, the prompt, the state and the actions; the rows are the actions'.
    assert "tensor<1x291x1x256xbf16>" in lowered.as_text()
