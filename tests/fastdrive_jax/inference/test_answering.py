import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import CONFIG, random_params

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.answering import answer_pruned
from fastdrive_jax.inference.pictures import layout_inputs, token_pixels
from fastdrive_jax.inference.sampling import SamplingConfig, answer_batch, decode_text
from fastdrive_jax.models.qwen2_5_vl.image_processor import process_pictures
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.sequence import Sample, collate
from fastdrive_jax.pruning import PRUNERS, make_pruner
from fastdrive_jax.pruning.interface import Pruner
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig
from fastdrive_jax.training.compilations import OneCompilation

MODEL, GRID, CAMERAS = QwenVL(CONFIG), (2, 4), 3
SAMPLING = SamplingConfig(max_new_tokens=5)


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def samples():
    """Two prompts of different lengths about three pictures each."""
    rng = np.random.default_rng(0)
    found = []
    for words in (5, 9):
        pictures = [rng.integers(0, 256, (56, 112, 3), np.uint8) for _ in range(CAMERAS)]
        rows, grids = process_pictures(pictures)
        marks = [CONFIG.vision_start_token_id, CONFIG.image_token_id, CONFIG.vision_end_token_id]
        found.append(Sample([*rng.integers(40, 90, 2), *marks * CAMERAS,
                             *rng.integers(40, 90, words)], rows, grids))  # fmt: skip
    return found


def test_a_method_sees_each_tokens_pixels(params):
    """The same as of a driving policy's pictures."""
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (2, CAMERAS, 56, 112, 3), np.uint8)
    marks = [CONFIG.vision_start_token_id, CONFIG.image_token_id, CONFIG.vision_end_token_id]
    samples = [Sample([*marks * CAMERAS, 60], *process_pictures(list(one))) for one in images]
    edge = 2 * CONFIG.vision.patch_size
    want = np.asarray(token_pixels(jnp.asarray(images), edge))
    seen = []

    def choose(params, inputs, key, k):
        jax.debug.callback(seen.append, inputs.pixels)
        return jnp.tile(jnp.arange(k), (2, 1))

    run(Pruner("looks", choose=choose, needs=frozenset({"pixels"})), 0.5, params, samples)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[0], want)


def run(pruner, ratio, params, samples, sampling=SAMPLING, own=None, foreground=None, length=None):
    call = jax.jit(functools.partial(answer_pruned, MODEL, pruner, ratio, GRID, sampling))
    both = {"vla": params, "pruner": own}
    return call(both, collate(samples, CONFIG, length), jax.random.key(0), foreground)


def test_all_tokens_answer_as_the_unpruned_model(params, samples):
    batch = collate(samples, CONFIG)
    program = jax.jit(answer_batch, static_argnums=(0, 4))
    whole = program(MODEL, {"params": params}, batch, jax.random.key(0), SAMPLING)
    for name in ("uniform", "fastv"):
        found = run(make_pruner(name), 1.0, params, samples)
        np.testing.assert_array_equal(found.ids, whole[0])
        np.testing.assert_array_equal(found.lengths, whole[1])
        np.testing.assert_array_equal(found.keep_indices[0], np.arange(24))


@jax.jit
def read_alone(params, batch, stays):
    """The model's own prefill of one sample's tokens at some places."""
    apply = functools.partial(MODEL.apply, {"params": params})
    tokens = apply(batch.rows, batch.layout, method="encode")
    hidden = apply(batch.ids, batch.visual, tokens, method="embed")[:, stays]
    where, length = batch.positions[:, :, stays], jnp.full(1, len(stays), jnp.int32)
    return apply(hidden, where, length, 5, method="prefill")


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_kept_tokens_answer_as_a_prompt_that_never_held_the_others(params, samples, penalty):
    """The oracle takes the tokens out of one sample by hand and uses the model's own prefill."""
    chosen = np.sort(np.random.default_rng(1).permutation(24)[:9])
    fixed = Pruner("fixed", choose=lambda params, inputs, key, k: jnp.tile(chosen, (2, 1)))
    sampling = SamplingConfig(max_new_tokens=5, repetition_penalty=penalty)
    found = run(fixed, 9.5 / 24, params, samples, sampling)
    for number, sample in enumerate(samples):
        batch = collate([sample], CONFIG)
        variables = {"params": params}
        stays = (batch.visual[0] < 0) | np.isin(batch.visual[0], chosen)
        logits, caches = read_alone(params, batch, np.flatnonzero(stays))
        seen = np.zeros((1, logits.shape[1]), bool)
        seen[0, batch.ids[0]] = True
        answer = decode_text(
            MODEL, variables, logits, caches, batch.next_position, jax.random.key(0), sampling, seen
        )
        np.testing.assert_array_equal(found.ids[number], answer.ids[0])
    np.testing.assert_array_equal(found.keep_indices, np.tile(chosen, (2, 1)))


@pytest.mark.slow
def test_every_method_of_single_frames_keeps_its_budget(params, samples):
    share = jnp.asarray(np.random.default_rng(2).random((2, 24)), jnp.float32)
    within = {"fastv": {"layer": 1}}  # the model has two layers
    for name in ("ground_truth", "divprune", "cdpruner", "fastv", "vispruner", "tome"):
        pruner = make_pruner(name, **within.get(name, {}))
        found = run(pruner, 0.25, params, samples, foreground=share)
        kept = np.asarray(found.keep_indices)
        assert kept.shape == (2, 6), name
        assert (np.diff(kept, axis=1) > 0).all(), name
        assert kept.min() >= 0, name
        assert kept.max() < 24, name
        if name == "ground_truth":
            best = np.sort(np.argsort(-np.asarray(share), axis=1)[:, :6], axis=1)
            np.testing.assert_array_equal(kept, best)


def test_one_program_for_all_batches_of_a_shape(params, samples):
    pruner = make_pruner("divprune")
    program = jax.jit(functools.partial(answer_pruned, MODEL, pruner, 0.5, GRID, SAMPLING))
    call = OneCompilation(program, "raise")
    for order in (samples, samples[::-1]):
        call({"vla": params, "pruner": None}, collate(order, CONFIG), jax.random.key(0))


def test_what_cannot_be_had_is_said(params, samples):
    temporal = [name for name in PRUNERS if name in ("vlapruner", "vlacache", "specprune")]
    for name in temporal:
        with pytest.raises(UserError, match=rf"{name} needs .*driving policy"):
            run(make_pruner(name), 0.5, params, samples)
    odd = [samples[0], Sample(samples[1].ids[:2], (), ())]
    with pytest.raises(UserError, match=r"3 pictures of 8 tokens .* same cameras"):
        run(make_pruner("uniform"), 0.5, params, odd)


def test_a_pruner_with_positions_sees_those_that_it_was_trained_with(params):
    """Within the picture, whatever text stands before it."""
    config = ReconPrunerConfig(layer=CONFIG.text, rope=True)
    pruner, rng = make_pruner("reconpruner", config=config), np.random.default_rng(3)
    tokens = np.zeros((1, 8, CONFIG.text.hidden_size), np.float32)
    init = jax.jit(ReconPruner(config).init)
    own = init(jax.random.key(5), tokens, np.zeros((3, 1, 8), np.int32))
    rows, grids = process_pictures([rng.integers(0, 256, (56, 112, 3), np.uint8)] * 2)
    marks = [CONFIG.vision_start_token_id, CONFIG.image_token_id, CONFIG.vision_end_token_id]
    kept = [
        run(pruner, 0.4, params, [Sample([*[50] * before, *marks * 2, 60], rows, grids)],
            own=own["params"], length=180).keep_indices
        for before in (1, 150)
    ]  # fmt: skip
    np.testing.assert_array_equal(*kept)
    batch = collate([Sample([*marks, 60], rows[:1], grids[:1])], CONFIG)

    @jax.jit
    def score(params, own, batch):
        seen = MODEL.apply({"params": params}, batch.rows, batch.layout, method="encode")
        return pruner.score(own, layout_inputs(seen, GRID), None)

    scores = score(params, own["params"], batch)
    # Both pictures are the same, so the best of one are the best of both.
    best = np.sort(np.argsort(-np.asarray(scores[0]))[:3])
    np.testing.assert_array_equal(kept[0][0], [*best, *best + 8])
