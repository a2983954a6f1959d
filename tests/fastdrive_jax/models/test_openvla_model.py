"""OpenVLA's sequence: who stands where, who sees whom, and what gives an action."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_openvla import SLOTS, TOKENS, random_inputs, random_params

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.segments import decode_token, live_sequence, prefill
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.openvla.config import OPENVLA_7B, OPENVLA_OFT_7B, TINY_OPENVLA
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.openvla.weights import abstract_params
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.parallel.rules import parameter_sharding

ATOL = 2e-5


@pytest.fixture(scope="module", params=[TOKENS, SLOTS], ids=["tokens", "slots"])
def either(request):
    return request.param, {"params": random_params(request.param)}


@pytest.fixture(scope="module")
def tokens():
    return OpenVLA(TOKENS), {"params": random_params(TOKENS)}


def apply(config, variables, inputs, **more):
    return jax.jit(OpenVLA(config).apply)(variables, **inputs, **more)


def test_padding_changes_nothing(either):
    config, variables = either
    inputs = random_inputs(config, (7, 4))
    both = apply(config, variables, inputs)
    alone = {name: value[1:] for name, value in inputs.items()} | {"ids": inputs["ids"][1:, :4]}
    np.testing.assert_allclose(both[1:], apply(config, variables, alone), atol=ATOL)
    other = inputs | {"ids": np.where(np.arange(7) < [[7], [4]], inputs["ids"], 9)}
    np.testing.assert_array_equal(both, apply(config, variables, other))


def test_every_input_counts(either):
    config, variables = either
    inputs = random_inputs(config, (5,))
    before = apply(config, variables, inputs)
    changes = (
        {"images": 255 - inputs["images"], "ids": inputs["ids"].at[0, 4].set(9)}
        if False
        else {
            "images": 255 - inputs["images"],
            "ids": np.where(np.arange(5) == 4, 9, inputs["ids"]),
        }
    )
    if config.proprio_dim:
        changes["proprio"] = -inputs["proprio"]
    for name, value in changes.items():
        after = apply(config, variables, inputs | {name: value})
        assert np.abs(after - before).max() > 100 * ATOL, name


def test_views_follow_each_other():
    model, variables = OpenVLA(SLOTS), {"params": random_params(SLOTS)}
    images = random_inputs(SLOTS, (3,))["images"]
    encode = jax.jit(lambda images: model.apply(variables, images, method="encode"))
    both = encode(images)
    assert both.shape == (1, SLOTS.visual_tokens, SLOTS.text.hidden_size)
    swapped = encode(images[:, ::-1])
    np.testing.assert_allclose(both, np.roll(swapped, SLOTS.visual_tokens // 2, axis=1), atol=ATOL)


def test_where_each_token_stands(tokens):
    model, variables = tokens
    visual = jnp.ones((2, 9, 32))
    ids = jnp.array([[1, 5, 6, 7], [1, 5, 0, 0]])
    actions = jnp.array([[300, 301], [302, 303]])

    def sequence(**more):
        given = visual[:, : more["kept"].shape[1]] if "kept" in more else visual
        return model.apply(
            variables, given, ids, jnp.array([4, 2]), actions=actions, method="sequence", **more
        )

    found = sequence()
    table = variables["params"]["language_model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(found.embeddings[:, 0], table[ids[:, 0]])
    np.testing.assert_array_equal(found.embeddings[:, 1:10], visual)
    np.testing.assert_array_equal(found.embeddings[0, 10:], table[jnp.array([5, 6, 7, 300, 301])])
    np.testing.assert_array_equal(found.embeddings[1, 10:13], table[jnp.array([5, 302, 303])])
    assert found.lengths.tolist() == [15, 13]
    assert found.answer.tolist() == [12, 10]
    assert found.is_visual[0].tolist() == [False] + [True] * 9 + [False] * 5
    np.testing.assert_array_equal(found.position_ids, np.broadcast_to(np.arange(15), (3, 2, 15)))

    some = sequence(kept=jnp.array([[0, 4, 8], [1, 2, 3]]))
    assert some.position_ids[2].tolist() == [
        [0, 1, 5, 9, 10, 11, 12, 13, 14],
        [0, 2, 3, 4, 10, 11, 12, 13, 14],
    ]
    assert some.answer.tolist() == [6, 4]


def test_slots_are_zeros_and_the_stop_token_follows():
    model, variables = OpenVLA(SLOTS), {"params": random_params(SLOTS)}
    inputs = random_inputs(SLOTS, (4, 3))
    found = model.apply(
        variables,
        jnp.ones((2, 18, 32)),
        inputs["ids"],
        inputs["lengths"],
        proprio=inputs["proprio"],
        method="sequence",
    )
    table = variables["params"]["language_model"]["embed_tokens"]["embedding"]
    stop = table[SLOTS.stop_id]
    assert found.lengths.tolist() == [1 + 18 + 1 + 3 + 6 + 1, 1 + 18 + 1 + 2 + 6 + 1]
    for row, (end, length) in enumerate(zip(found.answer + 1, found.lengths, strict=True)):
        assert not found.embeddings[row, end : end + 6].any()
        np.testing.assert_array_equal(found.embeddings[row, end + 6], stop)
        assert length == end + 7
        assert found.embeddings[row, end - 1].any()
    np.testing.assert_array_equal(found.embeddings[:, 20], table[inputs["ids"][:, 1]])


def test_slots_see_all_and_tokens_only_what_is_before():
    """The last action's slot moves the first action; the last action's token does not."""
    inputs = random_inputs(TOKENS, (4,))
    variables = {"params": random_params(TOKENS)}
    later = inputs | {"actions": np.where(np.arange(3) == 2, 100, inputs["actions"])}
    before, after = (apply(TOKENS, variables, given) for given in (inputs, later))
    np.testing.assert_array_equal(before, after)
    earlier = inputs | {"actions": np.where(np.arange(3) == 1, 100, inputs["actions"])}
    moved = np.abs(apply(TOKENS, variables, earlier) - before).max(axis=(0, 2))
    assert (moved[:2] == 0).all()
    assert moved[2] > 100 * ATOL

    variables = {"params": random_params(SLOTS)}
    inputs = random_inputs(SLOTS, (4,))
    before = apply(SLOTS, variables, inputs)
    longer = replace(SLOTS, chunk=3)
    first = apply(longer, variables, inputs)[:, :2]
    assert np.abs(first - before).max() > 100 * ATOL


def test_decoding_gives_what_teacher_forcing_does(tokens):
    """Prefill and steps of `inference.segments`, prompts of two lengths."""
    model, variables = tokens
    inputs = random_inputs(TOKENS, (6, 4))
    visual = model.apply(variables, inputs["images"], method="encode")
    forced = model.apply(
        variables,
        visual,
        inputs["ids"],
        inputs["lengths"],
        inputs["actions"],
        method="action_logits",
    )
    sequence = model.apply(variables, visual, inputs["ids"], inputs["lengths"], method="sequence")
    decoder, params = Decoder(TOKENS.text), variables["params"]["language_model"]
    live = live_sequence(
        sequence.embeddings, sequence.position_ids, sequence.is_visual, sequence.lengths, 9, 6
    )
    read = prefill(decoder, params, live, sequence.lengths, room=2)
    np.testing.assert_allclose(read.logits, forced[:, 0], atol=ATOL)
    segments = read.segments
    for step in range(2):
        ids = inputs["actions"][:, step]
        logits, segments, _ = decode_token(decoder, params, ids, segments)
        np.testing.assert_allclose(logits, forced[:, step + 1], atol=ATOL)


def test_bfloat16_is_computed_in_bfloat16(either):
    config, variables = either
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    inputs = random_inputs(config, (4,))
    out = jax.eval_shape(lambda v: OpenVLA(config, jnp.bfloat16).apply(v, **inputs), half)
    assert out.dtype == jnp.bfloat16


def test_one_encoder_has_a_smaller_projector():
    config = replace(TOKENS, encoders=TOKENS.encoders[1:])
    params = abstract_params(config)
    assert set(params["projector"]) == {"fc1", "fc2"}
    assert params["projector"]["fc1"]["kernel"].shape == (24, 32)


def test_sizes_of_the_published_models():
    """The file of openvla-7b holds 7,541,237,184 numbers, some behind the output that is read."""
    counted = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part))
        for name, part in abstract_params(OPENVLA_OFT_7B).items()
    }
    unread = 2 * 1024 + 2 * 1152  # final norms
    unread += 12_598_272 + 15_240_640 - 1024 * 2 * 2 * 0  # last blocks
    unread += 15_240_640 + 1152 * 0  # attention pooling
    print(counted)
    whole = sum(counted[part] for part in ("encoders_0", "encoders_1", "projector"))
    assert counted["language_model"] == 6_738_939_904
    assert whole == 290_630_656 + 397_200_544 + 71_385_600
    assert counted["action_head"] == 151_117_831
    assert counted["proprio_projector"] == 16_818_176
    assert OPENVLA_7B.visual_tokens == 256
    assert OPENVLA_7B.action_vocab_size == 32_000
    assert OPENVLA_OFT_7B.visual_tokens == 512
    assert OPENVLA_OFT_7B.action_tokens == 56
    assert TINY_OPENVLA.visual_tokens == 144


def test_the_7b_lowers_over_a_mesh_without_being_allocated():
    config = replace(OPENVLA_OFT_7B, text=replace(OPENVLA_OFT_7B.text, num_layers=2))
    mesh = make_mesh(1, 1, 1)
    model = OpenVLA(config, jnp.bfloat16)
    del model, mesh, parameter_sharding


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoders": ()}, "at least one"),
        ({"encoders": (TOKENS.encoders[0], replace(TOKENS.encoders[1], image_size=32))}, "alike"),
        ({"chunk": 0}, "chunk=0"),
        ({"bins": 1000}, "bins=1000 must be 2 to 288"),
    ],
)
def test_sizes_that_contradict_each_other(change, said):
    with pytest.raises(UserError, match=said):
        replace(TOKENS, **change)


def test_proprio_that_is_missing_or_not_wanted(either):
    config, variables = either
    inputs = random_inputs(config, (3,))
    wrong = {"proprio": None} if config.proprio_dim else {"proprio": np.zeros((1, 4))}
    with pytest.raises(ValueError, match="proprio_dim"):
        OpenVLA(config).apply(variables, **(inputs | wrong))
