"""Frames that reuse keys and values, beside whole sequences in which these are put in by hand."""

import math
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.inference.policy import DrivingPolicy, plan, start_state
from fastdrive_jax.inference.pruned import reset_state
from fastdrive_jax.inference.reuse import Memory, no_caches, prefill
from fastdrive_jax.inference.segments import decode_token
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.live import live_sequence
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import Pruner, PrunerInputs, make_pruner
from fastdrive_jax.pruning.interface import Cuts, Temporal, cut_plan

CONFIG = DecoderConfig(
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=64,
    rope_theta=10_000.0,
    mrope_section=(1, 1, 2),
)
DECODER = Decoder(CONFIG)
# Text in front, between two pictures and behind, never the same; all but one are padded.
LAYOUTS = ("tvvvvvvttvvvvtt", "ttvvvvvtvvvtt", "vvvvvvvttt", "tvvvvttt")
BATCH, FRAMES, STEPS, ROOM, OBSERVE = len(LAYOUTS), 3, 2, 4, (0, 2)
LENGTH = max(map(len, LAYOUTS))
VISUAL = max(layout.count("v") for layout in LAYOUTS)
TEXT = max(layout.count("t") for layout in LAYOUTS)
IS_VISUAL = np.array([[c == "v" for c in layout.ljust(LENGTH)] for layout in LAYOUTS])
LENGTHS = np.array([len(layout) for layout in LAYOUTS])
WHERE = np.sort(np.random.default_rng(1).integers(0, 40, (3, BATCH, LENGTH)), axis=2)
RATIO = 0.4  # of what the fixed budgets below ignore; anything but 1
FRESH = [(0, 1, 2, 3), (), (2,)]  # samples that begin a drive with each frame


@cache
def by_state(*layers, budgets):
    """Computes the tokens that the state, one number a token, ranks highest."""

    def score(params, inputs, key):
        if inputs.ids is None:
            return inputs.state
        return jnp.take_along_axis(inputs.state, inputs.ids, axis=1)

    return Pruner(
        name="by_state",
        score=score,
        needs=frozenset({"state"}),
        cuts=Cuts(lambda num_layers: layers, lambda n, ratio: budgets),
        temporal=Temporal(init=lambda inputs: None, observe=lambda state, seen: state),
        reuse=True,
    )


METHOD = by_state(1, 2, budgets=(6, 3))


@pytest.fixture(scope="module")
def params():
    def whole(decoder, ids):
        hidden, _ = decoder(decoder.embed(ids), jnp.zeros((3, 1, 2), jnp.int32))
        return decoder.logits(hidden)

    ids = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(partial(DECODER.init, method=whole))(jax.random.key(0), ids)["params"]


def frames(seed=0):
    """Embeddings, answers and ranks of some frames that have nothing in common."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(FRAMES, BATCH, LENGTH, 32)).astype(np.float32)
    answers = rng.integers(0, 64, (FRAMES, BATCH, STEPS))
    return hidden, answers, rng.normal(size=(FRAMES, BATCH, VISUAL)).astype(np.float32)


@partial(jax.jit, static_argnames=("method", "ratio"))
def run(params, method, ratio, hidden, where, is_visual, lengths, answer, memory):
    """Logits after prompt and each answer token, and what was read."""
    live = live_sequence(hidden, where, is_visual, lengths, VISUAL, TEXT)
    given = PrunerInputs(live.hidden, count=live.count, state=memory)
    start = jnp.full(len(hidden), 50, jnp.int32)
    reused = prefill(
        DECODER, params, live, start, ROOM, method, None, ratio, given, observe=OBSERVE
    )

    def step(segments, ids):
        logits, segments, _ = decode_token(DECODER, params, ids, segments)
        return segments, logits

    _, logits = jax.lax.scan(step, reused.read.segments, answer.T)
    return jnp.concatenate([reused.read.logits[None], logits]).swapaxes(0, 1), reused


def empty(method, ratio, rows):
    plan = cut_plan(method, VISUAL, ratio, CONFIG.num_layers)
    return no_caches(CONFIG, plan, len(rows), LENGTH + ROOM, jnp.float32)


def drive(params, method, ratio, data, rows=range(BATCH)):
    """Logits [frames, B, 1 + STEPS, V] of some samples that are driven together."""
    rows = np.array(rows)
    hidden, answers, ranks = data
    caches, found = empty(method, ratio, rows), []
    for frame in range(FRAMES):
        new = np.isin(rows, np.array(FRESH[frame], int))
        caches = jax.jit(reset_state)(caches, empty(method, ratio, rows), new)
        logits, reused = run(
            params,
            method,
            ratio,
            hidden[frame, rows],
            WHERE[:, rows],
            IS_VISUAL[rows],
            LENGTHS[rows],
            answers[frame, rows],
            Memory(jnp.asarray(ranks[frame, rows]), caches),
        )
        caches = reused.caches
        found.append((np.asarray(logits), reused))
    return found


@partial(jax.jit, static_argnums=1)
def reference_layer(params, layer, x, ids, seen, computed, held):
    """A layer over the whole sequence, with held keys and values where nothing is computed.

    Returns:
        Hidden states, keys and values, and attention, mean over heads.
    """
    found = []

    def explicit(query, key, value, causal=True, lengths=None):
        keep = computed[..., None, None]
        key, value = (jnp.where(keep, *pair) for pair in zip((key, value), held, strict=True))
        keys, values = (jnp.repeat(y, 2, axis=2) for y in (key, value))
        scores = jnp.einsum("bnhd,bshd->bhns", query, keys) / math.sqrt(query.shape[-1])
        share = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        found.append(((key, value), share.mean(axis=1)))
        return jnp.einsum("bhns,bshd->bnhd", share, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdrive_jax.models.decoder.attention", explicit)
        x, _ = DECODER.apply({"params": params}, x, ids, (layer, layer + 1), method="span")
    return x, *found[0]


@jax.jit
def finish(params, x):
    return DECODER.apply({"params": params}, x, method="finish")


def reference(params, data, frame, plan=(), held=None):
    """One frame by whole sequences. Samples that begin a drive compute all.

    Args:
        plan: (layer, K) of each cut.
        held: Keys and values of each layer, of the last call.

    Returns:
        Logits, keys and values of each layer, and each layer's attention [B, n, n].
    """
    hidden, answers, ranks = (part[frame] for part in data)
    whole = LENGTH + STEPS
    embedded = np.asarray(params["embed_tokens"]["embedding"])[answers]
    x = np.concatenate([hidden, embedded], axis=1)
    after = np.broadcast_to(50 + np.arange(STEPS), (3, BATCH, STEPS))
    ids = np.concatenate([WHERE, after], axis=2)
    place = np.arange(whole)
    # The answer stands behind the padding, which nothing sees.
    visible = (place < LENGTHS[:, None]) | (place >= LENGTH)
    seen = (np.tril(np.ones((whole, whole), bool)) & visible[:, None]) | np.eye(whole, dtype=bool)
    computed = np.ones((BATCH, whole), bool)
    empty = (np.zeros((BATCH, whole, 2, 8), np.float32),) * 2
    filled, weights = [], []
    for layer in range(CONFIG.num_layers):
        if layer in dict(plan):
            for sample in set(range(BATCH)) - set(FRESH[frame]):
                places = np.flatnonzero(IS_VISUAL[sample])
                order = np.argsort(-ranks[sample, : len(places)], kind="stable")
                computed[sample, places] = False
                computed[sample, places[order[: dict(plan)[layer]]]] = True
        before = empty if held is None else held[layer]
        # A copy, for the call may read it after the next layer's tokens have left.
        x, both, share = reference_layer(params, layer, x, ids, seen, computed.copy(), before)
        filled.append(both)
        weights.append(np.asarray(share))
    logits = finish(params, x)
    rows = np.stack([[n - 1, *range(LENGTH, whole)] for n in LENGTHS])
    return np.asarray(logits)[np.arange(BATCH)[:, None], rows], filled, weights


def instruction_attention(weights, sample):
    """From the text behind the last picture to the visual tokens."""
    n, places = LENGTHS[sample], np.flatnonzero(IS_VISUAL[sample])
    return weights[sample][places[-1] + 1 : n][:, places].mean(axis=0)


@pytest.mark.parametrize(("layers", "budgets"), [((1, 2), (6, 3)), ((2,), (1,)), ((1, 2), (9, 9))])
def test_keys_of_the_last_frame_are_seen_where_they_stood(params, layers, budgets):
    method, data = by_state(*layers, budgets=budgets), frames()
    found = drive(params, method, RATIO, data)
    held = None
    for frame, (logits, reused) in enumerate(found):
        plan = zip(layers, budgets, strict=True)
        want, held, weights = reference(params, data, frame, tuple(plan), held)
        np.testing.assert_allclose(logits, want, atol=1e-5)
        assert reused.computed.shape == (BATCH, budgets[-1])
        (segment,) = reused.read.segments
        assert segment.ids.shape == (BATCH, VISUAL)
        for sample in range(BATCH):
            rows = [instruction_attention(weights[step], sample) for step in OBSERVE]
            real = LAYOUTS[sample].count("v")
            np.testing.assert_allclose(reused.text[sample, :real], np.mean(rows, axis=0), atol=1e-5)
    whole, _, _ = reference(params, data, FRAMES - 1)
    last = found[-1][0]
    np.testing.assert_allclose(last[2], whole[2], atol=1e-5)  # its drive began with this frame
    assert np.abs(last[0] - whole[0]).max() > 1e-2  # it reused what had changed


def test_an_unchanged_frame_is_the_unpruned_model(params):
    hidden, answers, ranks = frames()
    data = np.stack([hidden[0]] * FRAMES), np.stack([answers[0]] * FRAMES), ranks
    want, _, _ = reference(params, data, 0)
    for logits, _ in drive(params, METHOD, RATIO, data):
        np.testing.assert_allclose(logits, want, atol=1e-5)


def test_ratio_1_is_the_unpruned_model(params):
    data = frames()
    for frame, (logits, reused) in enumerate(drive(params, METHOD, 1.0, data)):
        want, _, _ = reference(params, data, frame)
        np.testing.assert_allclose(logits, want, atol=1e-5)
        assert reused.computed.shape == (BATCH, VISUAL)
        assert reused.caches == ()


def test_a_batch_of_four_is_four_batches_of_one(params):
    data = frames()
    together = drive(params, METHOD, RATIO, data)
    for row in range(BATCH):
        for (logits, _), (alone, _) in zip(
            together, drive(params, METHOD, RATIO, data, [row]), strict=True
        ):
            np.testing.assert_allclose(alone[0], logits[row], atol=1e-5)


def test_without_a_memory_it_is_refused(params):
    hidden, answers, _ = frames()
    with pytest.raises(ValueError, match=r"by_state.*state"):
        run(params, METHOD, RATIO, hidden[0], WHERE, IS_VISUAL, LENGTHS, answers[0], None)


def test_no_array_of_pairs_is_compiled(params):
    length, text = 4096, 8
    visual = length - text

    def read(params, hidden, where, memory):
        is_visual = jnp.arange(length)[None] < visual
        live = live_sequence(hidden, where, is_visual, jnp.array([length]), visual, text)
        given = PrunerInputs(live.hidden, state=memory)
        start = jnp.array([9])
        method = by_state(2, budgets=(visual // 2,))
        return prefill(DECODER, params, live, start, 2, method, None, 0.5, given, observe=(2,))

    caches = no_caches(CONFIG, ((2, visual // 2),), 1, length + 2, jnp.float32)
    inputs = (
        params,
        jax.ShapeDtypeStruct((1, length, 32), jnp.float32),
        jax.ShapeDtypeStruct((3, 1, length), jnp.int32),
        Memory(jnp.zeros((1, visual)), caches),
    )
    compiled = jax.jit(read).lower(*inputs).compile().as_text()
    sizes = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", compiled)
    # Not even of the tokens that are computed, nor of one head.
    assert max(math.prod(map(int, size.split(","))) for size in sizes) < visual // 2 * length


@pytest.fixture(scope="module")
def deep(one_camera):
    """The driving VLA with enough layers for two cuts."""
    small, _ = one_camera
    config = replace(small, text=replace(small.text, num_layers=3))
    images = jnp.zeros((1, 1, *config.image_size, 3), jnp.uint8)
    plan_ids = jnp.zeros((1, config.vocabulary.plan_length), jnp.int32)
    given = images, jnp.zeros((1, 3), jnp.int32), plan_ids
    params = jax.jit(DrivingVLA(config).init)(jax.random.key(0), *given)["params"]
    return DrivingVLA(config), {"vla": params, "pruner": None}


def test_the_policy_drives_with_it(deep):
    model, params = deep
    rng = np.random.default_rng(0)
    scene, other = rng.integers(0, 256, (2, 3, 1, 56, 140, 3), np.uint8)
    changed = scene.copy()
    changed[:, :, :28] = other[:, :, :28]
    speed = np.array([1.0, 5.0, 9.0], np.float32)
    command = np.array([0, 1, 2], np.int32)
    policy = DrivingPolicy(model, make_pruner("vlacache", layers=(2, 6)), 0.5)
    unpruned = DrivingPolicy(model, make_pruner("uniform"), 1.0)
    traces = []

    @partial(jax.jit, static_argnums=0)
    def counted(policy, *rest):
        traces.append(1)
        return plan(policy, params, *rest)

    full = jax.jit(plan, static_argnums=0)
    state = start_state(policy, 3)
    begins = np.array([[False] * 3, [False] * 3, [False] * 3, [False, True, False]])
    drive = (scene, scene, changed, other)
    for images, first in zip(drive, begins, strict=True):
        planned = counted(policy, images, speed, command, None, state, first)
        state = planned.state
        if images is scene:  # the first frame, and one without change
            want = full(unpruned, params, images, speed, command).waypoints
            np.testing.assert_allclose(planned.waypoints, want, atol=1e-4)
    assert len(traces) == 1
    assert planned.keep_indices.shape == (3, 5)
    want = np.asarray(full(unpruned, params, other, speed, command).waypoints)
    np.testing.assert_allclose(planned.waypoints[1], want[1], atol=1e-4)  # it began a drive
    assert np.abs(planned.waypoints - want).max() > 0.1  # the others did not
    for row in range(3):
        state = start_state(policy, 1)
        one = slice(row, row + 1)
        for images, first in zip(drive, begins[:, one], strict=True):
            alone = counted(policy, images[one], speed[one], command[one], None, state, first)
            state = alone.state
        np.testing.assert_array_equal(alone.keep_indices[0], planned.keep_indices[row])
        np.testing.assert_allclose(alone.waypoints[0], planned.waypoints[row], atol=1e-4)
    assert len(traces) == 2
