"""Cuts within the language model, beside the whole sequence with what was cut masked out."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_openvla import random_params

from fastdrive_jax.inference.segments import decode_token, prefill
from fastdrive_jax.models.decoder import Decoder, DecoderLayer, mrope_angles
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.live import live_sequence
from fastdrive_jax.pruning import Pruner, PrunerInputs
from fastdrive_jax.pruning.interface import Cuts
from fastdrive_jax.pruning.mistakes import MethodError

CONFIG = DecoderConfig(
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=64,
    rope_theta=10_000.0,
    mrope_section=(1, 1, 2),
)
DECODER = Decoder(CONFIG)
BATCH, STEPS, ROOM = 4, 2, 4
# Text in front, between two pictures and behind, never the same; the last two are padded.
LAYOUTS = ("tvvvvvvttvvvvtt", "ttvvvvvtvvvvvtt", "vvvvvvvttt", "tvvvvttt")
LENGTH = max(map(len, LAYOUTS))
VISUAL = max(layout.count("v") for layout in LAYOUTS)
TEXT = max(layout.count("t") for layout in LAYOUTS)


def shapes(decoder):
    def whole(decoder, ids):
        hidden, _ = decoder(decoder.embed(ids), jnp.zeros((3, 1, 2), jnp.int32))
        return decoder.logits(hidden)

    init = partial(decoder.init, method=whole)
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.fixture(scope="module")
def params():
    # Larger queries and keys: attention that differs from token to token.
    return jax.tree.map(
        lambda leaf: 1.5 * leaf if leaf.ndim == 2 and leaf.shape[0] == 32 else leaf,
        jax.tree.map(np.asarray, random_params(shapes(DECODER))),
    )


def sequences(layouts=LAYOUTS):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(BATCH, LENGTH, 32)).astype(np.float32)
    where = np.sort(rng.integers(0, 40, (3, BATCH, LENGTH)), axis=2)
    answer = rng.integers(0, 64, (BATCH, STEPS))
    rows = [LAYOUTS.index(layout) for layout in layouts]
    is_visual = np.array([[c == "v" for c in layout.ljust(LENGTH)] for layout in layouts])
    lengths = np.array([len(layout) for layout in layouts])
    return hidden[rows], where[:, rows], is_visual, lengths, answer[rows]


@jax.jit
def all_seen_but(params, hidden, where, answer, visible):
    """Logits after each token and each layer's attention [layer, B, H, N, N], with all tokens.

    Args:
        params: Of the decoder.
        hidden: The prompt [B, LENGTH, D].
        where: Its position ids.
        answer: Tokens behind it.
        visible: Which keys are in sight in each layer [layer, B, LENGTH + STEPS].
    """
    x = jnp.concatenate([hidden, DECODER.apply({"params": params}, answer, method="embed")], 1)
    batch, whole = x.shape[:2]
    after = jnp.broadcast_to(50 + jnp.arange(STEPS), (3, batch, STEPS))
    ids = jnp.concatenate([where, after], axis=2)
    weights = []

    def explicit(query, key, value, causal=True, lengths=None):
        mask = np.tril(np.ones((whole, whole), bool)) & visible[len(weights), :, None]
        mask |= np.eye(whole, dtype=bool)  # so that no row is empty
        key, value = (jnp.repeat(y, query.shape[2] // key.shape[2], axis=2) for y in (key, value))
        scores = jnp.einsum("bnhd,bshd->bhns", query, key) / math.sqrt(query.shape[-1])
        weights.append(jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1))
        return jnp.einsum("bhns,bshd->bnhd", weights[-1], value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdrive_jax.models.decoder.attention", explicit)
        x, _ = DECODER.apply({"params": params}, x, ids)
    return DECODER.apply({"params": params}, x, method="logits"), jnp.stack(weights)


def masked(params, sequence, keeps, observe=()):
    """Logits after each token, and observed attention, with all tokens in all layers.

    What was cut stays in the sequence; from its layer on no key of it is in sight.

    Args:
        keeps: {layer: kept places of each sample}.
    """
    hidden, where, is_visual, lengths, answer = sequence
    batch, whole = len(hidden), LENGTH + STEPS
    place = np.arange(whole)
    # The answer stands behind the padding, which nothing sees.
    visible = (place < lengths[:, None]) | (place >= LENGTH)
    is_visual = np.pad(is_visual, ((0, 0), (0, STEPS)))
    in_sight = []
    for layer in range(CONFIG.num_layers):
        if layer in keeps:
            kept = np.zeros((batch, whole), bool)
            for sample, places in enumerate(keeps[layer]):
                kept[sample, places] = True
            visible = visible & (kept | ~is_visual)
        in_sight.append(visible)
    found = all_seen_but(params, hidden, where, answer, np.stack(in_sight))
    logits, weights = map(np.asarray, found)
    rows = np.stack([[n - 1, *range(LENGTH, whole)] for n in lengths])
    observed = np.zeros((batch, VISUAL))
    for layer in observe:
        for sample in range(batch):
            gave = weights[layer, sample][:, rows[sample]].mean(axis=(0, 1))
            seen = np.where(in_sight[layer][sample], gave, 0)[is_visual[sample]]
            observed[sample, : len(seen)] += seen / len(observe)
    return logits[np.arange(batch)[:, None], rows], observed


@partial(jax.jit, static_argnames=("pruner", "ratio", "observe", "steps"))
def _run(params, hidden, where, is_visual, lengths, answer, pruner, ratio, observe, steps):
    live = live_sequence(hidden, where, is_visual, lengths, VISUAL, TEXT)
    given = PrunerInputs(live.hidden, count=live.count)
    start = jnp.full(len(hidden), 50, jnp.int32)
    read = prefill(DECODER, params, live, start, ROOM, pruner, None, ratio, given, None, observe)
    if not steps:
        return read.logits[:, None], read, read.action

    def step(segments, ids):
        logits, segments, row = decode_token(DECODER, params, ids, segments, observe, VISUAL)
        return segments, (logits, row)

    _, (logits, rows) = jax.lax.scan(step, read.segments, answer[:, :steps].T)
    logits = jnp.concatenate([read.logits[None], logits]).swapaxes(0, 1)
    action = None if rows is None else (read.action + rows.sum(axis=0)) / (steps + 1)
    return logits, read, action


def run(params, sequence, pruner=None, ratio=1.0, observe=(), steps=STEPS):
    return _run(params, *sequence, pruner=pruner, ratio=ratio, observe=observe, steps=steps)


def kept_places(segment, is_visual):
    out = []
    for sample, row in enumerate(is_visual):
        places = np.flatnonzero(row)
        out.append(places[np.asarray(segment.ids[sample, : int(segment.count[sample])])])
    return out


def by(need, *layers, own_rows=False, budgets=None):
    """Keeps what gets most of one kind of attention."""

    def score(params, inputs, key):
        value = getattr(inputs, need)
        return value.mean(axis=tuple(range(1, value.ndim - 1))) if value.ndim > 2 else value

    cuts = Cuts(lambda num_layers: layers, budgets, own_rows)
    return Pruner(name=need, score=score, needs=frozenset({need}), cuts=cuts)


@jax.jit
def of_the_model(params, hidden, where):
    """Logits, and what each layer sowed."""
    apply = partial(DECODER.apply, {"params": params})
    (x, _), sown = apply(hidden, where, mutable=["intermediates"])
    return apply(x, method="logits"), sown["intermediates"]


def test_without_a_method_it_is_the_model(params):
    sequence = sequences()
    logits, read, _ = run(params, sequence)
    np.testing.assert_allclose(logits, masked(params, sequence, {})[0], atol=1e-5)
    assert len(read.segments) == 1
    hidden, where, _, lengths, _ = sequence
    last, _ = of_the_model(params, hidden, where)
    np.testing.assert_allclose(logits[:, 0], last[np.arange(BATCH), lengths - 1], atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "budgets"), [((1,), (5,)), ((2,), (1,)), ((1, 3), (7, 3)), ((1, 2, 3), (8, 8, 2))]
)
def test_what_was_cut_might_as_well_be_masked_out(params, layers, budgets):
    sequence = sequences()
    method = by("last_row", *layers, budgets=lambda n, ratio: budgets)
    logits, read, action = run(params, sequence, method, 0.5, observe=(0, 2, 3))
    spans = [segment.layers for segment in read.segments]
    assert spans == list(zip((0, *layers), (*layers, 4), strict=True))
    keeps = {}
    for layer, segment, budget in zip(layers, read.segments[1:], budgets, strict=True):
        keeps[layer] = kept_places(segment, sequence[2])
        assert segment.ids.shape == (BATCH, budget)
        text = sum(layout.count("t") for layout in LAYOUTS[:1])
        assert segment.caches[0].key.shape[1] == budget + TEXT + ROOM
        assert text <= TEXT
    want, observed = masked(params, sequence, keeps, observe=(0, 2, 3))
    np.testing.assert_allclose(logits, want, atol=1e-5)
    np.testing.assert_allclose(action, observed, atol=1e-5)


def test_tokens_cut_before_the_model_might_as_well_be_masked_out(params):
    def score(params, inputs, key):
        return inputs.tokens[..., 0]

    sequence = sequences()
    logits, read, _ = run(params, sequence, Pruner(name="input", score=score), 0.4)
    assert [segment.layers for segment in read.segments] == [(0, 4)]
    keeps = {0: kept_places(read.segments[0], sequence[2])}
    want, _ = masked(params, sequence, keeps)
    np.testing.assert_allclose(logits, want, atol=1e-5)


@pytest.mark.parametrize("own_rows", [False, True])
@pytest.mark.parametrize("need", ["last_row", "text_rows", "received"])
def test_tokens_are_kept_by_the_attention_that_was_asked_for(params, need, own_rows):
    sequence = sequences()
    hidden, where, is_visual, lengths, _ = sequence
    _, read, _ = run(params, sequence, by(need, 2, own_rows=own_rows), 0.4, steps=0)
    layer = 2 if own_rows else 1
    found = of_the_model(params, hidden, where)[1][f"layers_{layer}"]["self_attn"]
    query, key = (np.asarray(found[name][0], np.float64) for name in ("query", "key"))
    for sample, n in enumerate(lengths):
        keys = np.repeat(key[sample, :n], 2, axis=1)
        scores = np.einsum("nhd,shd->hns", query[sample, :n], keys) / math.sqrt(8)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share = (share / share.sum(-1, keepdims=True)).mean(axis=0)
        text = np.flatnonzero(~is_visual[sample, :n])
        # The mean over padded text rows too: a row of padding is the last place's.
        rows = {"last_row": share[n - 1], "received": share.mean(0), "text_rows": None}[need]
        if rows is None:
            if n < LENGTH:
                continue
            rows = share[text].sum(0)
        places = np.flatnonzero(is_visual[sample, :n])
        k = min(int(0.4 * VISUAL), len(places))
        best = np.sort(places[np.argsort(-rows[places], kind="stable")[:k]])
        np.testing.assert_array_equal(kept_places(read.segments[-1], is_visual)[sample], best)


def test_a_batch_is_cut_as_its_samples_are(params):
    method = by("received", 1, 2, budgets=lambda n, ratio: (6, 3))
    together, read, _ = run(params, sequences(), method, 0.5)
    for row in (0, 3):
        alone, own, _ = run(params, sequences((LAYOUTS[row],)), method, 0.5)
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)
        real = int(own.segments[-1].count[0])
        np.testing.assert_array_equal(
            own.segments[-1].ids[0, :real], read.segments[-1].ids[row, :real]
        )


def test_all_tokens_kept_is_the_unpruned_model(params):
    sequence = sequences()
    plain, _, _ = run(params, sequence)
    everything = by("received", 2, budgets=lambda n, ratio: (n,))
    np.testing.assert_allclose(run(params, sequence, everything, 0.9)[0], plain, atol=1e-5)
    assert len(run(params, sequence, by("received", 2), 1.0, steps=0)[1].segments) == 1


def test_renumbered_positions_count_on_from_what_is_left(params):
    sequence = sequences()
    method = dataclasses.replace(by("last_row", 2), renumber=True)
    _, read, _ = run(params, sequence, method, 0.4, steps=0)
    np.testing.assert_array_equal(read.segments[0].next_position, 50)
    left = [len(layout) - layout.count("v") + min(4, layout.count("v")) for layout in LAYOUTS]
    np.testing.assert_array_equal(read.segments[1].next_position, left)
    np.testing.assert_array_equal(read.segments[1].caches[0].length, left)


def test_merged_tokens_take_the_place_of_their_representative(params):
    """Merging nothing, by handing the tokens back, is choosing."""

    def choose(params, inputs, key, k):
        return jnp.broadcast_to(jnp.arange(k)[::-1], (BATCH, k))

    def merge(params, inputs, key, k):
        chosen = choose(params, inputs, key, k)
        return chosen, jnp.take_along_axis(inputs.tokens, chosen[..., None], axis=1)

    def doubled(params, inputs, key, k):
        chosen, tokens = merge(params, inputs, key, k)
        return chosen, 2 * tokens

    cuts = Cuts(lambda num_layers: (2,))
    runs = [
        run(params, sequences(), Pruner(name="m", cuts=cuts, **how), 0.4, steps=0)[0]
        for how in ({"choose": choose}, {"merge": merge}, {"merge": doubled})
    ]
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-5)
    assert np.abs(runs[0] - runs[2]).max() > 1e-2


def test_cuts_that_make_no_sense_are_refused(params):
    for layers, budgets in (
        ((0,), (3,)),
        ((2, 2), (3, 3)),
        ((4,), (3,)),
        ((1, 2), (3, 4)),
        ((1,), (3, 2)),
    ):
        method = by("last_row", *layers, budgets=lambda n, ratio, budgets=budgets: budgets)
        with pytest.raises(MethodError, match=r"last_row.*cuts to"):
            run(params, sequences(), method, 0.5)


def test_no_array_of_pairs_is_compiled():
    length, shallow = 2048, Decoder(dataclasses.replace(CONFIG, num_layers=2))

    def read(params, hidden, where, need):
        is_visual = jnp.arange(length)[None] < length - 8
        live = live_sequence(hidden, where, is_visual, jnp.array([length]), length - 8, 8)
        return prefill(shallow, params, live, jnp.array([9]), 2, by(need, 1), None, 0.25).logits

    inputs = (
        shapes(shallow),
        jax.ShapeDtypeStruct((1, length, 32), jnp.float32),
        jax.ShapeDtypeStruct((3, 1, length), jnp.int32),
    )
    for need in ("last_row", "text_rows", "received"):
        text = jax.jit(read, static_argnums=3).lower(*inputs, need).compile().as_text()
        sizes = re.findall(r"\b(?:f|s|u|pred|bf)\d*\[([\d,]+)\]", text)
        # Blocks of rows of all four heads are held, never all rows.
        assert max(math.prod(map(int, size.split(","))) for size in sizes) < 4 * length**2


@jax.jit
def see_each_other(params, x, ids):
    """One layer of a whole sequence without a causal mask, and its attention [H, N, N]."""
    layer = DecoderLayer(CONFIG, causal=False)
    (x, _), sown = layer.apply(
        {"params": params}, x, mrope_angles(CONFIG, ids), mutable=["intermediates"]
    )
    found = sown["intermediates"]["self_attn"]
    query, key = (found[name][0][0] for name in ("query", "key"))
    scores = jnp.einsum("nhd,shd->hns", query, jnp.repeat(key, 2, axis=1)) / math.sqrt(8)
    return x, jax.nn.softmax(scores, axis=-1)


def test_without_a_causal_mask_all_tokens_see_each_other(params):
    """Each sample by itself, without padding, its attention explicit, what leaves cut out."""
    both = Decoder(CONFIG, causal=False)
    hidden, where, is_visual, lengths, _ = sequences()
    acting = (1, 3)

    @jax.jit
    def read_whole(params, hidden, where, is_visual, lengths):
        live = live_sequence(hidden, where, is_visual, lengths, VISUAL, TEXT)
        given = PrunerInputs(live.hidden, count=live.count)
        return prefill(both, params, live, lengths, 1, by("received", 2), None, 0.5, given,
                       observe=(1, 3), acting=acting)  # fmt: skip

    read = jax.tree.map(np.asarray, read_whole(params, hidden, where, is_visual, lengths))
    finish = jax.jit(lambda params, x: both.apply({"params": params}, x, method="finish"))
    for sample, length in enumerate(map(int, lengths)):
        x, ids = hidden[sample, None, :length], where[:, sample, None, :length]
        visual, rows = np.flatnonzero(is_visual[sample]), np.zeros((2, VISUAL))
        seen, shares = np.arange(len(visual)), {}
        for layer in range(4):
            if layer == 2:
                received = shares[1].mean(axis=(0, 1))[visual]
                seen = np.sort(np.argsort(-received, kind="stable")[: VISUAL // 2])
                kept = np.sort([*visual[seen], *np.flatnonzero(~is_visual[sample, :length])])
                x, ids, visual = x[:, kept], ids[:, :, kept], np.searchsorted(kept, visual[seen])
            x, share = see_each_other(params[f"layers_{layer}"], x, ids)
            x, shares[layer] = np.asarray(x), np.asarray(share)
            if layer in (1, 3):
                last = shares[layer][:, [x.shape[1] - offset for offset in acting]]
                rows[layer // 2, seen] = last.mean(axis=(0, 1))[visual]
        segment = read.segments[1]
        np.testing.assert_array_equal(segment.ids[sample, : segment.count[sample]], seen)
        np.testing.assert_allclose(read.live.hidden[sample, : x.shape[1]], x[0], atol=1e-4)
        np.testing.assert_allclose(read.action[sample], rows.mean(axis=0), atol=1e-6)
        want = finish(params, x[:, -1:])[0, 0]
        np.testing.assert_allclose(read.logits[sample], want, atol=1e-5)
