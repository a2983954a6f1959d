"""pi0 beside joint attention over prefix and actions, written out in NumPy."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference import pi0, reuse, segments
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.live import live_sequence
from fastdrive_jax.models.openvla.config import TINY_OPENVLA
from fastdrive_jax.models.pi0.config import TINY_PI0, Pi0Config
from fastdrive_jax.models.pi0.expert import ActionExpert, time_embedding
from fastdrive_jax.models.pi0.model import Pi0, action_expert
from fastdrive_jax.models.pi0.weights import abstract_params as uncached
from fastdrive_jax.pruning import PRUNERS, PrunerInputs, make_pruner
from fastdrive_jax.pruning.interface import Cuts, Seen, cut_plan

PREFIX = dataclasses.replace(
    TINY_PI0.prefix,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    vocab_size=32,
    mrope_section=(4, 0, 0),
    head_size=8,
)
VISION = dataclasses.replace(
    TINY_PI0.vision, depth=1, hidden_size=16, intermediate_size=24, num_heads=2, image_size=32
)
CONFIG = Pi0Config(
    VISION,
    PREFIX,
    dataclasses.replace(PREFIX, hidden_size=16, intermediate_size=32),
    views=2,
    action_dim=3,
    horizon=4,
)
MODEL = Pi0(CONFIG)
BATCH, WORDS, STEPS, N = 3, 6, 4, CONFIG.visual_tokens
ROOM, TINY_ROOM = action_expert(CONFIG).room, action_expert(TINY_PI0).room
abstract_params = functools.cache(uncached)
ALL = tuple(range(PREFIX.num_layers))


def inputs(batch=BATCH):
    rng = np.random.default_rng(0)
    return {
        "images": jnp.asarray(rng.integers(0, 256, (batch, 2, 32, 32, 3), np.uint8)),
        "ids": jnp.asarray(rng.integers(0, 32, (batch, WORDS))),
        "lengths": jnp.asarray([WORDS, 2, 4][:batch]),
        "state": jnp.asarray(rng.normal(size=(batch, 3)), jnp.float32),
        "noisy": jnp.asarray(rng.normal(size=(batch, 4, 3)), jnp.float32),
        "time": jnp.asarray([0.9, 0.4, 0.07][:batch], jnp.float32),
    }


START = PrunerInputs(jnp.zeros((BATCH, N, PREFIX.hidden_size)))
VIEWS = jnp.asarray([[True, True], [False, True], [True, True]])


@functools.cache
def drawn():
    """Parameters, all random, with large queries and keys, so that tokens differ; and tokens."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        names = [key.key for key in path]
        spread = {"kernel": 1 / math.sqrt(leaf.shape[0])}.get(names[-1], 0.3)
        spread *= 2 if names[-2] in ("q_proj", "k_proj") else 1
        values = rng.normal(0, spread, leaf.shape).astype(np.float32)
        return jnp.asarray(values + (names[-1] == "scale"))

    params = jax.tree_util.tree_map_with_path(draw, abstract_params(CONFIG))
    return params, jax.jit(encode)(params, inputs()["images"])


def encode(params, images):
    return MODEL.apply({"params": params}, images, method="encode")


def act(params, tokens, given, views=None, observe=(), steps=STEPS, model=MODEL, **method):
    prefilled = pi0.read_prompt(
        model, params, tokens, given["ids"], given["lengths"], views, **method
    )
    expert, numbers = action_expert(CONFIG, model.dtype), (given["state"], given["noisy"], steps)
    sampled = pi0.sample_actions(expert, params["expert"], prefilled, *numbers, observe, N)
    return sampled, prefilled


embed_time = jax.jit(time_embedding, static_argnums=1)


def joint(params, hidden, kept, state, noisy, time):
    """One sample: the velocity [H, A], and each layer's attention from actions to the prefix.

    Args:
        params: Of pi0.
        hidden: The prefix before the first layer [n, D], without padding.
        kept: Of each layer, which tokens of the prefix are still there [n].
        state: [A].
        noisy: [H, A].
        time: A number.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expert = params["expert"]

    def dense(x, p):
        return x @ p["kernel"] + p.get("bias", 0)

    def norm(x, p):
        return p["scale"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def turn(x, where):
        angles = where[:, None] * 10_000.0 ** (-np.arange(4) / 4)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        low, high = x[..., :4], x[..., 4:]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    moment = np.asarray(embed_time(np.array([time], np.float32), 16), np.float64)
    mixed = dense(noisy, expert["action_in_proj"])
    mixed = np.concatenate([mixed, np.repeat(moment, len(mixed), 0)], -1)
    mixed = dense(mixed, expert["action_time_mlp_in"])
    mixed = dense(mixed / (1 + np.exp(-mixed)), expert["action_time_mlp_out"])
    streams = [
        np.asarray(hidden, np.float64),
        np.concatenate([dense(state, expert["state_proj"])[None], mixed]),
    ]
    n, suffix = len(streams[0]), len(streams[1])
    where = np.arange(n + suffix)
    block = np.concatenate([np.zeros(n), [1], np.full(suffix - 1, 2)])
    parts, rows = (params["language_model"], expert["model"]), []
    for number, alive in enumerate(kept):
        layers = [part[f"layers_{number}"] for part in parts]
        normed = [norm(x, p["input_layernorm"]) for x, p in zip(streams, layers, strict=True)]

        def heads(name, normed=normed, layers=layers):
            made = [dense(x, p["self_attn"][name]) for x, p in zip(normed, layers, strict=True)]
            return np.concatenate(made).reshape(n + suffix, -1, 8)

        query, key = turn(heads("q_proj"), where), turn(heads("k_proj"), where)
        mask = (block[None] <= block[:, None]) & np.concatenate([alive, np.ones(suffix, bool)])
        mask |= np.eye(n + suffix, dtype=bool)  # so that no row of what left is empty
        scores = np.einsum("nhd,sd->hns", query, key[:, 0]) / math.sqrt(8)
        weights = np.exp(np.where(mask, scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        rows.append(weights[:, n + 1 :, :n].mean((0, 1)))
        mixed = np.einsum("hns,sd->nhd", weights, heads("v_proj")[:, 0]).reshape(n + suffix, -1)
        mixed = np.split(mixed, [n])
        for i, p in enumerate(layers):
            x = streams[i] + dense(mixed[i], p["self_attn"]["o_proj"])
            y, mlp = norm(x, p["post_attention_layernorm"]), p["mlp"]
            y = gelu(dense(y, mlp["gate_proj"])) * dense(y, mlp["up_proj"])
            streams[i] = x + dense(y, mlp["down_proj"])
    out = norm(streams[1][1:], expert["model"]["norm"])
    return dense(out, expert["action_out_proj"]), rows


@jax.jit
def live_prompt(params, tokens, given, views):
    return MODEL.apply(
        {"params": params}, tokens, given["ids"], given["lengths"], views, method="prompt"
    )


def joint_velocities(params, tokens, given, noisy, time, views=None, parts=()):
    """`joint` of each sample of a batch; what was cut stays in the sequence, out of sight."""
    live = jax.device_get(live_prompt(params, tokens, given, views))
    given = jax.device_get(given)
    found, rows = [], np.zeros((len(ALL), len(tokens), N))
    for sample, length in enumerate(live.length.tolist()):
        count = int(live.count[sample])
        kept = np.ones((len(ALL), length), bool)
        for segment in parts:
            ids = np.asarray(segment.ids[sample, : int(segment.count[sample])])
            kept[slice(*segment.layers), :count] = np.isin(np.arange(count), ids)
        hidden, state = live.hidden[sample, :length], given["state"][sample]
        velocity, seen = joint(
            params, hidden, kept, state, np.asarray(noisy[sample]), float(time[sample])
        )
        found.append(velocity)
        rows[:, sample, :count] = [row[:count] for row in seen]
    return np.stack(found), rows


def test_it_is_joint_attention():
    given, (params, tokens) = inputs(), drawn()
    found = jax.jit(MODEL.apply)({"params": params}, **given)
    want, _ = joint_velocities(params, tokens, given, given["noisy"], given["time"])
    np.testing.assert_allclose(found, want, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layers", "views"),
    [("uniform", None, None), ("fastv", (1,), VIEWS), ("fastv", (1, 2), None)],
)
def test_what_was_cut_might_as_well_be_out_of_sight(name, layers, views):
    """Steps, and what the actions look at, against Euler steps of joint attention."""
    given, (params, tokens), pruner = inputs(), drawn(), make_pruner(name)
    if layers:
        budgets = (20, 7)[: len(layers)]
        pruner = dataclasses.replace(pruner, cuts=Cuts(lambda n: layers, lambda n, ratio: budgets))
    method = {"pruner": pruner, "keep_ratio": 0.4}
    run = jax.jit(lambda *given: act(*given, views, observe=(0, 2), **method))
    sampled, prefilled = run(params, tokens, given)
    for segment in prefilled.segments:
        assert segment.caches[0].key.shape[1] == segment.ids.shape[1] + WORDS + ROOM
    assert len(prefilled.segments) == 1 + len(layers or ())
    assert prefilled.segments[-1].ids.shape[1] == (budgets[-1] if layers else int(0.4 * N))
    x, rows = np.asarray(given["noisy"], np.float64), 0
    for step in range(STEPS):
        time = np.full(BATCH, 1 - step / STEPS)
        velocity, seen = joint_velocities(params, tokens, given, x, time, views, prefilled.segments)
        x, rows = x - velocity / STEPS, rows + seen[[0, 2]].mean(0) / STEPS
    np.testing.assert_allclose(sampled.actions, x, atol=1e-4)
    np.testing.assert_allclose(sampled.attention, rows, atol=1e-5)


@pytest.mark.parametrize("name", sorted(PRUNERS.keys() - {"reconpruner", "jointpruner", "prior"}))
def test_every_method_stands_in_the_prefix(name):
    """Shapes alone; those left out have parameters that were learned from data."""
    pruner, model, layers = make_pruner(name), Pi0(TINY_PI0), TINY_PI0.prefix.num_layers
    total, given = TINY_PI0.visual_tokens, inputs()
    rows = jnp.zeros((BATCH, total))
    tokens = jnp.zeros((BATCH, total, TINY_PI0.prefix.hidden_size))
    start = pi0.pruner_inputs(model, tokens).replace(
        relevance=rows,
        foreground=rows,
        vision_received=rows,
        vision_keys=jnp.zeros((BATCH, total, 8)),
        pixels=jnp.zeros((BATCH, total, 192)),
    )
    state = None if pruner.temporal is None else pruner.temporal.init(start)

    def run(params, key):
        prompt = pi0.live_prompt(model, params, tokens, given["ids"], given["lengths"])
        method = {"pruner": pruner, "pruner_params": None, "keep_ratio": 0.25, "key": key}
        if not pruner.reuse:
            return segments.prefill(*prompt, **method, inputs=start.replace(state=state))
        plan, slots = cut_plan(pruner, total, 0.25, layers), total + WORDS + TINY_ROOM
        caches = reuse.no_caches(TINY_PI0.prefix, plan, BATCH, slots, tokens.dtype)
        memory = start.replace(state=reuse.Memory(state, caches))
        return reuse.prefill(*prompt, **method, inputs=memory).read

    read = jax.eval_shape(run, abstract_params(TINY_PI0), jax.random.key(0))
    layers = [segment.layers for segment in read.segments]
    assert (layers[0][0], layers[-1][1]) == (0, 5)
    for segment in read.segments:
        (kept,) = {cache.key.shape[1] - WORDS - TINY_ROOM for cache in segment.caches}
        assert segment.ids.shape == (BATCH, kept)
    assert (kept < total) != pruner.reuse


def test_vla_pruner_remembers_what_the_actions_looked_at():
    """What the last frame's actions looked at are candidates of the next one's cut."""
    given, (params, tokens), pruner = inputs(), drawn(), make_pruner("vlapruner")

    @jax.jit
    def frame(params, tokens, given, state):
        method = {"pruner": pruner, "keep_ratio": 0.25, "inputs": START.replace(state=state)}
        layers = pruner.temporal.layers(PREFIX.num_layers)
        sampled, prefilled = act(params, tokens, given, observe=layers, **method)
        return pruner.temporal.observe(state, Seen(action=sampled.attention)), prefilled

    after, prefilled = frame(params, tokens, given, pruner.temporal.init(START))
    kept = np.asarray(prefilled.segments[-1].ids)
    np.testing.assert_array_equal(after["frames"], 1)
    for row, ids in zip(np.asarray(after["rows"])[:, 0], kept, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), ids)
    # A memory of looking at all the rest moves the choice.
    away = [~np.isin(np.arange(N), ids) for ids in kept]
    rows = after["rows"].at[:, 0].set(jnp.asarray(np.array(away, np.float32)))
    _, other = frame(params, tokens, given, after | {"rows": rows})
    assert (np.asarray(other.segments[-1].ids) != kept).any(axis=1).all()


def test_half_precision_decoders_give_float32_actions():
    given, (params, tokens) = inputs(), drawn()
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), params)
    run = jax.jit(lambda *given: act(*given, model=Pi0(CONFIG, jnp.bfloat16), steps=1))
    sampled, prefilled = run(half, np.asarray(tokens).astype(jnp.bfloat16), given)
    assert prefilled.segments[0].caches[0].key.dtype == jnp.bfloat16
    assert sampled.actions.dtype == jnp.float32
    assert sampled.attention is None
    velocity, _ = joint_velocities(params, tokens, given, given["noisy"], np.ones(BATCH))
    error = np.asarray(given["noisy"]) - velocity - sampled.actions
    assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.1


def test_the_program_does_not_grow_with_steps_and_holds_no_pairs():
    shapes = jax.eval_shape(drawn)

    def text(steps):
        run = jax.jit(lambda *given: act(*given, steps=steps, observe=ALL)[0])
        return run.lower(*shapes, inputs()).as_text()

    short, long = text(2), text(64)
    assert len(short.splitlines()) == len(long.splitlines())
    keys = N + WORDS + ROOM
    for sizes in re.findall(r"tensor<([\dx]+)xf32>", long):
        # Actions meet all keys; no row of the prefix does behind its own pass.
        assert sizes.split("x").count(str(keys)) < 2


def test_prompts_are_scaled_as_gemmas():
    params, _ = drawn()
    found = MODEL.apply({"params": params}, jnp.arange(4)[None], method="embed")
    table = params["language_model"]["embed_tokens"]["embedding"]
    np.testing.assert_allclose(found[0], table[:4] * math.sqrt(24), rtol=1e-6)


def test_it_is_a_head_for_any_decoder_without_a_causal_mask():
    """Over the prefix of an OpenVLA: as deep, the same heads, biases or not."""
    llama = TINY_OPENVLA.text
    expert = ActionExpert(
        dataclasses.replace(llama, hidden_size=64, head_size=llama.head_dim), 7, 8
    )
    decoder = Decoder(llama, causal=False)

    def run(key):
        hidden = jnp.zeros((BATCH, 20, llama.hidden_size))
        live = live_sequence(
            hidden,
            jnp.zeros((3, BATCH, 20), jnp.int32),
            jnp.broadcast_to(jnp.arange(20) < 16, (BATCH, 20)),
            jnp.full(BATCH, 20),
            16,
            4,
        )
        prefix_key, expert_key = jax.random.split(key)
        prefix = decoder.init(prefix_key, hidden, live.position_ids, method=whole_decoder)
        read = segments.prefill(
            decoder,
            prefix["params"],
            live,
            live.length,
            expert.room,
            make_pruner("fastv"),
            None,
            0.5,
        )
        state, noise = jnp.zeros((BATCH, 7)), jnp.zeros((BATCH, 8, 7))
        params = expert.init(expert_key, state, noise, read.segments, method=whole_expert)["params"]
        layers = range(llama.num_layers)
        return pi0.sample_actions(expert, params, read, state, noise, 10, layers, 16)

    def whole_decoder(decoder, hidden, where):
        decoder.embed(jnp.zeros((1, 1), jnp.int32))
        return decoder.logits(decoder(hidden, where)[0])

    def whole_expert(expert, state, noise, parts):
        return expert.velocity(noise, jnp.ones(BATCH), expert.read_state(state, parts))

    sampled = jax.eval_shape(run, jax.random.key(0))
    assert (sampled.actions.shape, sampled.attention.shape) == ((BATCH, 8, 7), (BATCH, 16))


def test_wrong_shapes_are_named():
    params, given = abstract_params(CONFIG), inputs()

    def run(**other):
        jax.eval_shape(lambda params: MODEL.apply({"params": params}, **given | other), params)

    with pytest.raises(UserError, match=r"2 RGB pictures of 32 x 32 pixels, not 1 x 32 x 32 x 3\."):
        run(images=given["images"][:, :1])
    # One more than there is room for.
    with pytest.raises(ValueError, match=r"must be \[B, 4, 3\], not \(3, 5, 3\)"):
        run(noisy=jnp.zeros((BATCH, 5, 3)))


def test_layers_and_heads_must_be_shared():
    for name, wrong in (("num_layers", 2), ("num_heads", 2), ("rope_theta", 5.0)):
        with pytest.raises(UserError, match=rf"must not differ in {name} \("):
            dataclasses.replace(CONFIG, expert=dataclasses.replace(CONFIG.expert, **{name: wrong}))
    with pytest.raises(UserError, match="horizon=0"):
        dataclasses.replace(CONFIG, horizon=0)
