"""OpenVLA's sequence: who stands where, who sees whom, and what gives an action."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_openvla import SLOTS, TOKENS, random_inputs, random_params

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.segments import decode_token, prefill
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.live import live_sequence
from fastdrive_jax.models.openvla.config import OPENVLA_7B, OPENVLA_OFT_7B, TINY_OPENVLA
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.openvla.weights import abstract_params

ATOL = 2e-5
MOVED = 100 * ATOL


@functools.cache
def program(config):
    """Parameters, and the compiled model."""
    params = jax.tree.map(np.asarray, random_params(config))
    run = jax.jit(OpenVLA(config).apply)
    return {"params": params}, lambda *given, **inputs: np.asarray(run(*given, **inputs))


@pytest.fixture(scope="module", params=[TOKENS, SLOTS], ids=["tokens", "slots"])
def either(request):
    return request.param, *program(request.param)


def embedding_of(variables):
    return variables["params"]["language_model"]["embed_tokens"]["embedding"]


def test_padding_changes_nothing(either):
    config, variables, run = either
    inputs = random_inputs(config, (7, 4))
    both = run(variables, **inputs)
    other = inputs | {"ids": np.where(np.arange(7) < [[7], [4]], inputs["ids"], 9)}
    np.testing.assert_array_equal(both, run(variables, **other))
    alone = {name: value[1:] for name, value in inputs.items()} | {"ids": inputs["ids"][1:, :4]}
    np.testing.assert_allclose(both[1:], run(variables, **alone), atol=ATOL)


def test_every_input_counts(either):
    config, variables, run = either
    inputs = random_inputs(config, (4,))
    changes = {
        "images": 255 - inputs["images"],
        "ids": np.where(np.arange(4) == 3, 9, inputs["ids"]),
    }
    if config.proprio_dim:
        changes["proprio"] = -inputs["proprio"]
    before = run(variables, **inputs)
    for name, value in changes.items():
        moved = np.abs(run(variables, **(inputs | {name: value})) - before)
        assert moved.max() > MOVED, name


def test_tokens_see_what_is_before_them():
    variables, run = program(TOKENS)
    inputs = random_inputs(TOKENS, (4,))
    before = run(variables, **inputs)
    for step, sees in ((1, [False, False, True]), (2, [False, False, False])):
        actions = np.where(np.arange(3) == step, 100, inputs["actions"])
        moved = np.abs(run(variables, **(inputs | {"actions": actions})) - before).max(axis=(0, 2))
        assert (moved > MOVED).tolist() == sees
        assert (moved == 0).tolist() == [not seen for seen in sees]


def test_slots_see_the_very_last_token():
    variables, run = program(SLOTS)
    inputs = random_inputs(SLOTS, (4,))
    stopped = jax.tree.map(np.copy, variables)
    embedding_of(stopped)[2] *= -1
    moved = np.abs(run(stopped, **inputs) - run(variables, **inputs))
    assert (moved.max(axis=(0, 2)) > MOVED).all()


def test_views_follow_each_other():
    model, (variables, _) = OpenVLA(SLOTS), program(SLOTS)
    images = random_inputs(SLOTS, (3,))["images"]
    encode = jax.jit(lambda images: model.apply(variables, images, method="encode"))
    both, swapped = (np.asarray(encode(views)) for views in (images, images[:, ::-1]))
    assert both.shape == (1, SLOTS.visual_tokens, SLOTS.text.hidden_size)
    np.testing.assert_allclose(both, np.roll(swapped, SLOTS.visual_tokens // 2, axis=1), atol=ATOL)


def test_where_each_token_stands():
    model, (variables, _) = OpenVLA(TOKENS), program(TOKENS)
    ids, lengths = np.array([[1, 5, 6, 7], [1, 5, 0, 0]]), np.array([4, 2])
    actions = np.array([[300, 301], [302, 303]])
    run = jax.jit(functools.partial(model.apply, method="sequence"))

    def sequence(visual, kept=None):
        found = run(variables, visual, ids, lengths, actions=actions, kept=kept)
        return jax.tree.map(np.asarray, found)

    visual, table = np.ones((2, 9, 32), np.float32), embedding_of(variables)
    found = sequence(visual)
    np.testing.assert_array_equal(found.embeddings[:, 0], table[ids[:, 0]])
    np.testing.assert_array_equal(found.embeddings[:, 1:10], visual)
    np.testing.assert_array_equal(found.embeddings[0, 10:], table[[5, 6, 7, 300, 301]])
    np.testing.assert_array_equal(found.embeddings[1, 10:13], table[[5, 302, 303]])
    assert found.lengths.tolist() == [15, 13]
    assert found.answer.tolist() == [12, 10]
    assert found.is_visual[0].tolist() == [False] + [True] * 9 + [False] * 5
    np.testing.assert_array_equal(found.position_ids, np.broadcast_to(np.arange(15), (3, 2, 15)))

    some = sequence(visual[:, :3], np.array([[0, 4, 8], [1, 2, 3]]))
    assert some.position_ids[2].tolist() == [
        [0, 1, 5, 9, 10, 11, 12, 13, 14],
        [0, 2, 3, 4, 10, 11, 12, 13, 14],
    ]
    assert some.answer.tolist() == [6, 4]


def test_slots_are_zeros_and_the_stop_token_follows():
    model, (variables, _) = OpenVLA(SLOTS), program(SLOTS)
    inputs = random_inputs(SLOTS, (4, 3))
    given = (np.ones((2, 18, 32), np.float32), inputs["ids"], inputs["lengths"])
    sequence = jax.jit(functools.partial(model.apply, method="sequence"))
    found = sequence(variables, *given, proprio=inputs["proprio"])
    found = jax.tree.map(np.asarray, found)
    table = embedding_of(variables)
    assert found.lengths.tolist() == [1 + 18 + 1 + 3 + 6 + 1, 1 + 18 + 1 + 2 + 6 + 1]
    assert found.answer.tolist() == [1 + 18 + 1 + 2, 1 + 18 + 1 + 1]
    for row, end in zip(found.embeddings, found.answer + 1, strict=True):
        assert not row[end : end + 6].any()
        np.testing.assert_array_equal(row[end + 6], table[SLOTS.stop_id])
    np.testing.assert_array_equal(found.embeddings[:, 20], table[inputs["ids"][:, 1]])


def test_decoding_gives_what_teacher_forcing_does():
    """Prefill and steps of `inference.segments`, prompts of two lengths."""
    model, (variables, run) = OpenVLA(TOKENS), program(TOKENS)
    inputs = random_inputs(TOKENS, (7, 4))
    forced = run(variables, **inputs)
    decoder, params = Decoder(TOKENS.text), variables["params"]["language_model"]

    @jax.jit
    def decode(images, ids, lengths, actions):
        visual = model.apply(variables, images, method="encode")
        sequence = model.apply(variables, visual, ids, lengths, method="sequence")
        live = live_sequence(
            sequence.embeddings, sequence.position_ids, sequence.is_visual, sequence.lengths, 9, 7
        )
        read = prefill(decoder, params, live, sequence.lengths, room=2)
        found, segments = [read.logits], read.segments
        for step in range(2):
            logits, segments, _ = decode_token(decoder, params, actions[:, step], segments)
            found.append(logits)
        return jnp.stack(found, axis=1)

    np.testing.assert_allclose(decode(**inputs), forced, atol=ATOL)


def test_bfloat16_is_computed_in_bfloat16(either):
    config, variables, _ = either
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), variables)
    inputs = random_inputs(config, (4,))
    out = jax.eval_shape(lambda v: OpenVLA(config, jnp.bfloat16).apply(v, **inputs), half)
    assert out.dtype == jnp.bfloat16


def test_one_encoder_has_a_smaller_projector():
    params = abstract_params(replace(TOKENS, encoders=TOKENS.encoders[1:]))
    assert set(params["projector"]) == {"fc1", "fc2"}
    assert params["projector"]["fc1"]["kernel"].shape == (24, 32)


def test_published_numbers_of_tokens():
    assert OPENVLA_7B.visual_tokens == 256
    assert OPENVLA_7B.action_vocab_size == 32_000
    assert OPENVLA_OFT_7B.visual_tokens == 512
    assert OPENVLA_OFT_7B.action_tokens == 56
    assert TINY_OPENVLA.visual_tokens == 144


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoders": ()}, "one or two encoders"),
        (
            {"encoders": (TOKENS.encoders[0], replace(TOKENS.encoders[1], image_size=32))},
            "one patch",
        ),
        ({"chunk": 0}, "chunk=0"),
        ({"bins": 1000}, "bins=1000 must be 2 to 288"),
    ],
)
def test_sizes_that_contradict_each_other(change, said):
    with pytest.raises(UserError, match=said):
        replace(TOKENS, **change)


def test_proprio_that_is_missing_or_not_wanted(either):
    config, variables, _ = either
    inputs = random_inputs(config, (3,))
    wrong = {"proprio": None if config.proprio_dim else np.zeros((1, 4))}
    given = (np.ones((1, 9, 32)), inputs["ids"], inputs["lengths"])
    sequence = functools.partial(OpenVLA(config).apply, method="sequence")
    with pytest.raises(ValueError, match="proprio_dim"):
        jax.eval_shape(sequence, variables, *given, **wrong)


@pytest.mark.parametrize("shape", [(2, 24, 24, 3), (1, 48, 48, 3), (1, 24, 24, 1)])
def test_pictures_that_are_not_the_models(shape):
    images = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
    encode = functools.partial(OpenVLA(TOKENS).apply, method="encode")
    with pytest.raises(UserError, match="must be 1 RGB pictures of 24 x 24 pixels"):
        jax.eval_shape(encode, program(TOKENS)[0], images)
