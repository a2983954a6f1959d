"""Answers of one program from pixels and ids are those of the host's batch."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from tiny_checkpoint import CONFIG
from tiny_qwen import ASKED, PROMPTS, pictures, pruned_params

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.answering import answer_pruned
from fastdrive_jax.inference.pruned_qwen import answer_pictures, cast_params, prompt_batch
from fastdrive_jax.inference.sampling import SamplingConfig
from fastdrive_jax.models.qwen2_5_vl.image_processor import process_pictures
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.sequence import Sample, collate
from fastdrive_jax.pruning import make_pruner
from fastdrive_jax.training.compilations import OneCompilation


def test_it_answers_as_the_checkpoint_of_eval_planning_does():
    params, images = pruned_params(), pictures(len(PROMPTS))
    asked = replace(ASKED, sampling=SamplingConfig(5, repetition_penalty=1.3))
    have = jax.jit(answer_pictures, static_argnums=0)(
        asked, params, images, *prompt_batch(asked, PROMPTS)
    )
    samples = [
        Sample(prompt, *process_pictures(list(own)))
        for prompt, own in zip(PROMPTS, images, strict=True)
    ]
    pruner = make_pruner("reconpruner", config=asked.pruner)
    run = partial(answer_pruned, QwenVL(CONFIG), pruner, 0.4, (2, 4), asked.sampling)
    want = jax.jit(run)(params, collate(samples, CONFIG), jax.random.key(0))
    np.testing.assert_array_equal(have.keep_indices, want.keep_indices)
    np.testing.assert_array_equal(have.ids, want.ids)
    np.testing.assert_array_equal(have.lengths, want.lengths)
    assert have.keep_indices.shape == (2, 6)
    assert (np.asarray(have.ids[0]) != np.asarray(have.ids[1])).any()


def test_one_program_for_all_frames():
    params, (ids, lengths) = pruned_params(), prompt_batch(ASKED, PROMPTS)
    run = OneCompilation(jax.jit(partial(answer_pictures, ASKED)), "raise")
    for seed in range(2):
        run(params, pictures(len(PROMPTS), seed), ids, lengths)


def test_parameters_are_cast():
    params = cast_params(pruned_params(), "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pictures": 0}, "pictures=0"),
        ({"prompt_ids": 2}, "prompt_ids=2"),
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"image_size": (56, 100)}, "not made of 28 x 28 tokens"),
        ({"sampling": SamplingConfig(5, temperature=0.5)}, "temperature=0.5 draws tokens"),
        (
            {
                "pruner": replace(
                    ASKED.pruner, layer=replace(CONFIG.text, hidden_size=96, num_heads=8)
                )
            },
            "tokens of 96 numbers, but the model's have 48",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        replace(ASKED, **fields)


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="13 ids does not fit into prompt_ids=12"):
        prompt_batch(ASKED, [[7] * 13])
    with pytest.raises(UserError, match=r"1 picture marks \(id 259\) instead of 2"):
        prompt_batch(ASKED, [[CONFIG.image_token_id, 7]])
