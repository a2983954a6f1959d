import dataclasses
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.config import TINY_DECODER, TINY_VISION
from fastdrive_jax.models.qwen2_5_vl.weights import name_table, params_from_tensors

VISION = dataclasses.replace(TINY_VISION, depth=1, hidden_size=8, intermediate_size=12)
TIED = dataclasses.replace(TINY_DECODER, num_layers=1, intermediate_size=16, vocab_size=10)
UNTIED = dataclasses.replace(TIED, tie_word_embeddings=False)
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


def tensors_of(text) -> dict[str, np.ndarray]:
    """Random tensors under the names of transformers' state dict."""
    rng = np.random.default_rng(0)
    out = {}
    for name, (_, shape) in name_table(VISION, text).items():
        name = name if name == "lm_head.weight" else f"model.{name}"
        out[name] = rng.normal(size=shape).astype(np.float32)
    return out


def as_published(tensors):
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for name, value in tensors.items()
    }


def test_kernels_are_transposed_and_the_rest_stays():
    tensors = tensors_of(UNTIED)
    params = params_from_tensors(tensors, VISION, UNTIED)
    decoder, visual = params["language_model"], params["visual"]
    attention = decoder["layers_0"]["self_attn"]
    np.testing.assert_array_equal(attention["q_proj"]["kernel"], tensors[Q_PROJ].T)
    np.testing.assert_array_equal(decoder["embed_tokens"]["embedding"], tensors[EMBEDDING])
    np.testing.assert_array_equal(decoder["lm_head"]["kernel"], tensors["lm_head.weight"].T)
    patches = tensors["model.visual.patch_embed.proj.weight"]
    np.testing.assert_array_equal(visual["patch_embed"]["kernel"], patches.reshape(8, -1).T)
    assert set(attention["o_proj"]) == {"kernel"}


def test_every_value_is_used_once():
    tensors = tensors_of(UNTIED)
    params = params_from_tensors(tensors, VISION, UNTIED)
    given = np.sort(np.concatenate([value.ravel() for value in tensors.values()]))
    got = np.sort(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)]))
    np.testing.assert_array_equal(given, got)


@pytest.mark.parametrize("text", [TIED, UNTIED])
def test_names_of_the_published_files(text):
    tensors = tensors_of(text)
    published = as_published(tensors)
    assert {"visual.merger.ln_q.weight", "model.norm.weight"} <= set(published)
    jax.tree.map(
        np.testing.assert_array_equal,
        params_from_tensors(tensors, VISION, text),
        params_from_tensors(published, VISION, text),
    )


def test_half_precision_becomes_float32():
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors_of(TIED).items()}
    params = params_from_tensors(tensors, VISION, TIED)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    kernel = params["language_model"]["layers_0"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors[Q_PROJ].astype(np.float32).T)


def test_a_tied_head_may_be_stored_if_it_is_the_table():
    tensors = tensors_of(TIED)
    params = params_from_tensors(tensors | {"lm_head.weight": tensors[EMBEDDING]}, VISION, TIED)
    assert "lm_head" not in params["language_model"]
    other = tensors | {"lm_head.weight": tensors[EMBEDDING] + 1}
    with pytest.raises(UserError, match=r"unlike the embedding table.*lm_head\.weight"):
        params_from_tensors(other, VISION, TIED)


def test_an_untied_head_must_be_there():
    with pytest.raises(UserError, match=r"unfilled: lm_head\.weight\.$"):
        params_from_tensors(tensors_of(TIED), VISION, UNTIED)


def test_all_faults_in_one_sentence():
    tensors = tensors_of(TIED)
    tensors["model.visual.rotary"] = np.zeros(3)
    tensors["model.norm.weight"] = tensors["model.language_model.norm.weight"]
    del tensors["model.visual.merger.ln_q.weight"], tensors[EMBEDDING]
    tensors[Q_PROJ] = tensors[Q_PROJ][:, :-1]
    with pytest.raises(UserError) as caught:
        params_from_tensors(tensors, VISION, TIED)
    found = re.search(r"layers: (.*)\.$", str(caught.value))[1]
    assert found.split("; ") == [
        "given twice: language_model.norm.weight",
        "unmapped: visual.rotary",
        "unfilled: language_model.embed_tokens.weight, visual.merger.ln_q.weight",
        "misshapen: language_model.layers.0.self_attn.q_proj.weight (128, 127), not (128, 128)",
    ]
