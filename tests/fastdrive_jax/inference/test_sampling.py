import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.sampling import (
    SamplingConfig,
    answer_batch,
    choose,
    decode_text,
    ids_in,
    penalise,
    read_sampling,
)
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import (
    QwenVLConfig,
    VisionConfig,
)
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.sequence import Sample, collate
from fastdrive_jax.models.qwen2_5_vl.weights import abstract_params
from fastdrive_jax.parallel.mesh import make_mesh, shard_where_it_divides

CONFIG = QwenVLConfig(
    VisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=24,
        fullatt_block_indexes=(1,),
    ),
    DecoderConfig(
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        vocab_size=24,
        rope_theta=10_000.0,
        mrope_section=(2, 2, 2),
        tie_word_embeddings=False,
    ),
    image_token_id=9,
    eos_token_ids=(1, 2),
    pad_token_id=0,
)
MODEL = QwenVL(CONFIG)
GREEDY = SamplingConfig(max_new_tokens=12)
run = jax.jit(answer_batch, static_argnums=(0, 4))
apply = jax.jit(MODEL.apply, static_argnames=("method", "room"))


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(0)
    shapes = abstract_params(CONFIG.vision, CONFIG.text)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    head = params["language_model"]["lm_head"]["kernel"]
    head[:, CONFIG.image_token_id] = head[:, 5]  # an earlier id wins, so no answer is a picture
    return {"params": params}


def samples():
    rng = np.random.default_rng(1)
    grids = [[(4, 6), (8, 2)], [], [(2, 2)]]
    return [
        Sample(
            [5 + number, *[9] * len(own), 11, 12 + number],
            [rng.integers(0, 256, (rows * columns, 588), np.uint8) for rows, columns in own],
            own,
        )
        for number, own in enumerate(grids)
    ]


def answers(variables, samples, config=CONFIG):
    batch = collate(samples, config)
    return run(QwenVL(config), variables, batch, jax.random.key(0), GREEDY)


def test_decoding_equals_reading_the_whole_text(variables):
    """The answer, token by token, is the most likely one of a model that sees all before it."""
    for sample in samples():
        answer = np.asarray(answers(variables, [sample])[0])
        longer = Sample([*sample.ids, *answer[0]], sample.rows, sample.grids)
        logits = apply(variables, collate([longer], CONFIG))[0]
        most_likely = np.argmax(logits, axis=-1)[-13:-1]
        ended = np.flatnonzero(np.isin(answer[0], CONFIG.eos_token_ids))
        length = ended[0] + 1 if len(ended) else 12
        np.testing.assert_array_equal(most_likely[:length], answer[0, :length])
        assert (answer[0, length:] == 0).all()


@pytest.mark.parametrize("spare", [0, 7])
def test_company_and_padding_change_no_answer(variables, spare):
    batch = collate(samples(), CONFIG)
    batch = collate(samples(), CONFIG, batch.ids.shape[1] + spare, 24 + 4 * spare)
    together, lengths = run(MODEL, variables, batch, jax.random.key(0), GREEDY)
    for row, sample in enumerate(samples()):
        alone, length = answers(variables, [sample])
        np.testing.assert_array_equal(together[row], alone[0])
        assert lengths[row] == length[0]


def test_the_loop_ends_with_the_last_sample(variables):
    """A head that only says the ending id: one token, and no decoding step is run."""
    head = np.zeros_like(variables["params"]["language_model"]["lm_head"]["kernel"])
    stopped = jax.tree.map(lambda x: x, variables)
    stopped["params"]["language_model"] |= {"lm_head": {"kernel": head}}
    # All logits are alike, so the first id wins: make that one an ending.
    config = QwenVLConfig(**{**vars(CONFIG), "eos_token_ids": (0,), "pad_token_id": 7})
    answer, lengths = answers(stopped, samples(), config)
    assert lengths.tolist() == [1, 1, 1]
    assert answer.tolist() == [[0] + [7] * 11] * 3


def test_one_program_for_batches_of_one_shape(variables):
    count = run._cache_size()
    fixed = functools.partial(collate, config=CONFIG, length=40, patches=24)
    for batch in (fixed(samples()), fixed(samples()[::-1])):
        run(MODEL, variables, batch, jax.random.key(0), GREEDY)
    assert run._cache_size() == count + 1


LOGITS = jnp.log(jnp.array([[0.5, 0.2, 0.15, 0.1, 0.05]]))


def shares(config, draws=4000):
    keys = jax.random.split(jax.random.key(0), draws)
    ids = jax.jit(jax.vmap(lambda key: choose(LOGITS, key, config)[0]))(keys)
    return np.bincount(np.asarray(ids), minlength=5) / draws


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SamplingConfig(temperature=1.0), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (SamplingConfig(), [1, 0, 0, 0, 0]),
        (SamplingConfig(temperature=1.0, top_k=2), [0.5 / 0.7, 0.2 / 0.7, 0, 0, 0]),
        (SamplingConfig(temperature=1.0, top_k=9), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (SamplingConfig(temperature=1.0, top_p=0.6), [0.5 / 0.7, 0.2 / 0.7, 0, 0, 0]),
        (SamplingConfig(temperature=1.0, top_p=0.01), [1, 0, 0, 0, 0]),
        (SamplingConfig(temperature=0.01), [1, 0, 0, 0, 0]),
        (SamplingConfig(temperature=0.5), np.square([50, 20, 15, 10, 5]) / 3250),
    ],
)
def test_shares_of_drawn_tokens(config, expected):
    np.testing.assert_allclose(shares(config), expected, atol=0.03)


def test_decoding_writes_into_the_caches_that_it_is_given(variables):
    batch = collate(samples(), CONFIG)
    tokens = apply(variables, batch.rows, batch.layout, method="encode")
    embeddings = apply(variables, batch.ids, batch.visual, tokens, method="embed")
    inputs = embeddings, batch.positions, batch.lengths
    logits, caches = apply(variables, *inputs, room=12, method="prefill")
    held = sum(x.nbytes for cache in caches for x in (cache.key, cache.value))
    rest = batch.next_position, jax.random.key(0), GREEDY
    lowered = decode_text.lower(MODEL, variables, logits, caches, *rest)
    assert lowered.compile().memory_analysis().alias_size_in_bytes >= held
    answer = decode_text(MODEL, variables, logits, caches, *rest)
    assert all(cache.key.is_deleted() and cache.value.is_deleted() for cache in caches)
    expected, lengths = answers(variables, samples())
    np.testing.assert_array_equal(answer.ids, expected)
    steps = int(lengths.max()) - 1  # the last token is not read again
    assert answer.caches[0].length.tolist() == (batch.lengths + steps).tolist()


@pytest.mark.parametrize(("data", "model"), [(3, 2), (1, 2), (2, 1)])
def test_a_mesh_changes_no_answer(variables, data, model):
    expected = answers(variables, samples())
    mesh = make_mesh(data, tensor=model)
    batch = shard_where_it_divides(collate(samples(), CONFIG), mesh)
    with jax.set_mesh(mesh):
        found = run(MODEL, variables, batch, jax.random.key(0), GREEDY)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (len(batch.ids.sharding.device_set), batch.ids.sharding.is_fully_replicated) == (
        data * model,
        data != 3,
    )


def test_penalty_moves_seen_tokens_down():
    logits = jnp.array([[2.0, -2.0, 1.0, -1.0]])
    seen = jnp.array([[True, True, False, False]])
    assert penalise(logits, seen, 4.0).tolist() == [[0.5, -8.0, 1.0, -1.0]]
    batch = collate([Sample([3, 5, 3]), Sample([7])], CONFIG)
    ids = [np.flatnonzero(row).tolist() for row in np.asarray(ids_in(batch, 24))]
    assert ids == [[3, 5], [7]]  # padding was not said


def test_an_endless_penalty_says_nothing_twice(variables):
    config = SamplingConfig(max_new_tokens=12, repetition_penalty=1e9)
    batch = collate(samples(), CONFIG)
    answer, lengths = run(MODEL, variables, batch, jax.random.key(0), config)
    for row, length in enumerate(np.asarray(lengths)):
        said = np.asarray(answer)[row, :length].tolist()
        assert len(set(said)) == len(said)
        assert not set(said) & set(batch.ids[row, : batch.lengths[row]].tolist())


@pytest.mark.parametrize(
    ("file", "asked", "expected"),
    [
        (None, {}, SamplingConfig()),
        ({"temperature": 0.7, "top_k": 3}, {}, SamplingConfig()),  # no sampling was asked for
        ({"do_sample": True}, {}, SamplingConfig(temperature=1.0, top_k=50)),
        (
            {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05, "top_k": 1},
            {"max_new_tokens": 9},
            SamplingConfig(9, 1e-6, 1, 1.0, 1.05),
        ),
        (
            {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.05},
            {"temperature": 0.0, "repetition_penalty": 1.0},
            SamplingConfig(top_k=50, top_p=0.8),
        ),
    ],
)
def test_settings_of_a_checkpoint(tmp_path, file, asked, expected):
    if file is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert read_sampling(tmp_path, **asked) == expected


def test_odd_settings_of_a_checkpoint_are_refused(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": "much"}))
    with pytest.raises(UserError, match=r"generation_config\.json gives repetition_penalty='much'"):
        read_sampling(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_sampling(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        SamplingConfig(**settings)
