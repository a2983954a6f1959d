"""Every method with every action head, beside the models without any method."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_openvla import random_params

from fastdrive_jax.inference import segments
from fastdrive_jax.inference.action_decoding import Moment, action_decoding
from fastdrive_jax.inference.robot import RobotVLA, act, see, start_state
from fastdrive_jax.models.openvla.actions import decode_actions
from fastdrive_jax.models.openvla.config import TINY_OPENVLA
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.pi0.config import TINY_PI0
from fastdrive_jax.models.pi0.flow import euler
from fastdrive_jax.models.pi0.model import Pi0
from fastdrive_jax.pruning import make_pruner
from fastdrive_jax.pruning.budgets import per_camera
from fastdrive_jax.pruning.interface import Cuts, Pruner, cut_plan

BATCH, VIEWS, N, LAYERS = 2, 2, 18, 5  # 3 x 3 tokens a view


def small(vit):
    return replace(vit, depth=2, hidden_size=16, intermediate_size=32, num_heads=2, image_size=24)


def sized(decoder, **sizes):
    return replace(decoder, hidden_size=32, intermediate_size=48, vocab_size=320, **sizes)


OPENVLA = replace(
    TINY_OPENVLA,
    encoders=tuple(map(small, TINY_OPENVLA.encoders)),
    text=sized(TINY_OPENVLA.text, num_heads=4, num_kv_heads=4, mrope_section=(4, 0, 0)),
    views=VIEWS,
)
PI0 = replace(
    TINY_PI0,
    vision=small(TINY_PI0.vision),
    prefix=sized(TINY_PI0.prefix, head_size=8, mrope_section=(4, 0, 0)),
    expert=replace(sized(TINY_PI0.expert, head_size=8, mrope_section=(4, 0, 0)), hidden_size=24),
    views=VIEWS,
    horizon=3,
    flow_steps=2,
)
MODELS = {
    "tokens": OpenVLA(OPENVLA),
    "regression": OpenVLA(replace(OPENVLA, head="regression", chunk=2, proprio_dim=8)),
    "flow": Pi0(PI0),
}
# Within the decoder, before it, by what gave actions, by pixels and reuse, by the encoder.
TRIED = (
    *(("tokens", name) for name in ("divprune", "vlacache", "vispruner")),
    *(("regression", name) for name in ("sparsevlm_v1", "vlacache")),
    *(("flow", name) for name in ("fastv", "vlacache")),
)


def a_moment(seed=0, batch=BATCH):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 60, (batch, 6), np.int32)
    return Moment(
        images=rng.integers(0, 256, (batch, VIEWS, 24, 24, 3), np.uint8),
        ids=ids,
        lengths=np.array([6, 4])[:batch],
        proprio=rng.uniform(-1, 1, (batch, 8)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def params():
    found = {}
    for name, model in MODELS.items():
        moment, key = a_moment(), jax.random.key(0)
        given = moment.images, moment.ids, moment.lengths
        if name == "tokens":
            given = *given, np.zeros((BATCH, 7), int)
        elif name == "regression":
            given = *given, None, moment.proprio
        else:
            given = *given, moment.proprio, jnp.zeros((BATCH, 3, 8)), jnp.zeros(BATCH)
        shapes = jax.eval_shape(model.init, key, *given)["params"]
        found[name] = random_params(shapes)
    return found


def run(name, params, pruner, ratio, moment, state=None, first=None):
    policy = RobotVLA(MODELS[name], pruner, ratio)
    given = {"vla": params[name], "pruner": None}
    return jax.jit(act, static_argnums=0)(policy, given, moment, jax.random.key(1), state, first)


def unpruned(name, params, moment):
    """The model's own functions, sample by sample, without padding."""
    model, variables, out = MODELS[name], {"params": params[name]}, []
    apply = jax.jit(model.apply, static_argnames="method")
    noise = jax.random.normal(jax.random.key(1), (BATCH, 3, 8))
    for sample, length in enumerate(moment.lengths):
        images, ids = moment.images[sample, None], moment.ids[sample, None, :length]
        lengths, proprio = jnp.array([length]), moment.proprio[sample, None]
        tokens = None if name == "flow" else apply(variables, images, method="encode")
        if name == "regression":
            given = tokens, ids, lengths
            out.append(apply(variables, *given, proprio=proprio, method="regress")[0])
        elif name == "flow":

            def velocity(x, time, given=(images, ids, lengths, proprio)):
                return apply(variables, *given, x, jnp.full(1, time)), None

            steps = jax.jit(lambda x, velocity=velocity: euler(velocity, x, 2)[0])
            out.append(steps(noise[sample, None])[0])
        else:
            answer = np.zeros((1, 7), int)
            for number in range(7):
                logits = apply(variables, tokens, ids, lengths, answer, method="action_logits")
                answer[:, number] = np.argmax(logits[0, number])
            out.append(decode_actions(answer, OPENVLA))
    return np.stack(out).reshape(BATCH, -1, 8 if name == "flow" else 7)


@pytest.mark.parametrize(
    ("name", "method"), [("tokens", "fastv"), ("regression", "fastv"), ("flow", "uniform")]
)
def test_with_all_tokens_it_is_the_model(name, method, params):
    moment = a_moment()
    found = run(name, params, make_pruner(method), 1.0, moment)
    np.testing.assert_allclose(found.actions, unpruned(name, params, moment), atol=2e-5)
    np.testing.assert_array_equal(found.keep_indices, np.tile(np.arange(N), (BATCH, 1)))


def test_slots_and_state_are_no_instruction(params, monkeypatch):
    """OFT: BOS, 18 visual tokens, the state, the prompt, 14 slots for actions and a stop token."""
    moment, caught = a_moment(), []
    keep = segments.keep_tokens

    def catch(pruner, weights, given, *rest):
        caught.append(given)
        return keep(pruner, weights, given, *rest)

    monkeypatch.setattr(segments, "keep_tokens", catch)
    needs = frozenset({"received", "last_row", "text_rows"})
    pruner = Pruner(
        "probe", lambda weights, given, key: given.received, needs, cuts=Cuts(lambda layers: (1,))
    )
    policy = RobotVLA(MODELS["regression"], pruner, 0.5)
    decoding = action_decoding(policy.model)

    @jax.jit
    def watch(given):
        act(policy, given, moment, jax.random.key(1))
        live = decoding.prompt(given["vla"], see(policy, given, moment.images).tokens, moment)
        weights = given["vla"]["language_model"]
        return caught.pop(), segments._run_layer(decoding.decoder, weights, live, 0, 0)[1]

    seen, (query, key) = jax.device_get(watch({"vla": params["regression"], "pruner": None}))
    for sample, length in enumerate(moment.lengths):
        prompt = 1 + N + 1 + length - 1  # places before the slots
        total = prompt + 14 + 1
        assert seen.text_valid[sample].sum() == length - 1  # all but BOS
        scores = np.einsum("qhd,khd->hqk", query[sample, :total], key[sample, :total]) / np.sqrt(8)
        weight = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        visual = slice(1, 1 + N)
        want = weight[:, :prompt, visual].mean((0, 1))
        np.testing.assert_allclose(seen.received[sample], want, atol=1e-5)
        np.testing.assert_allclose(seen.last_row[sample], weight[:, prompt - 1, visual], atol=1e-5)
        told = seen.text_rows[sample][:, seen.text_valid[sample]]
        want = weight[:, 1 + N + 1 : prompt, visual]
        np.testing.assert_allclose(told, want, atol=1e-5)


@pytest.mark.parametrize(("name", "method"), TRIED)
def test_methods_prune_every_head(name, method, params):
    pruner = make_pruner(method)
    policy, traces = RobotVLA(MODELS[name], pruner, 0.5), []
    given = {"vla": params[name], "pruner": None}

    @jax.jit
    def step(moment, state, first):
        traces.append(1)
        return act(policy, given, moment, jax.random.key(1), state, first)

    state = start_state(policy, BATCH, 6)
    for seed in (0, 1, 1):
        found = step(a_moment(seed), state, np.full(BATCH, seed == 0))
        assert jax.tree.structure(found.state) == jax.tree.structure(state)
        state = found.state
        kept = np.asarray(found.keep_indices)
        assert kept.shape == (BATCH, cut_plan(pruner, N, 0.5, LAYERS)[-1][1])
        assert (np.diff(kept, axis=1) > 0).all()
        assert 0 <= kept.min() <= kept.max() < N
        assert np.isfinite(found.actions).all()
    assert len(traces) == 1


@pytest.mark.parametrize("name", MODELS)
def test_what_gave_the_actions_is_remembered(name, params):
    pruner = make_pruner("vlapruner", window=2)
    empty = start_state(RobotVLA(MODELS[name], pruner, 0.5), BATCH, 6)
    program = partial(run, name, params, pruner, 0.5)
    first = program(a_moment(0), empty, np.ones(BATCH, bool))
    second = program(a_moment(1), first.state, np.zeros(BATCH, bool))
    for found in (first, second):
        rows = np.asarray(found.state["rows"])
        assert (rows[:, 0].sum(axis=1) < 1).all()
        for sample, kept in enumerate(np.asarray(found.keep_indices)):
            np.testing.assert_array_equal(np.flatnonzero(rows[sample, 0]), kept)
    np.testing.assert_array_equal(rows[:, 1], first.state["rows"][:, 0])
    anew = program(a_moment(1), first.state, np.array([True, False]))
    again = program(a_moment(1), empty, np.zeros(BATCH, bool))
    np.testing.assert_allclose(anew.actions[0], again.actions[0], atol=1e-6)
    np.testing.assert_allclose(anew.actions[1], second.actions[1], atol=1e-6)
    np.testing.assert_array_equal(anew.state["frames"], [1, 2])


def test_each_view_may_have_its_own_budget(params):
    pruner = per_camera(make_pruner("vlapruner", as_published="openvla-oft"), VIEWS)
    state = start_state(RobotVLA(MODELS["regression"], pruner, 0.5), BATCH, 6)
    kept = run("regression", params, pruner, 0.5, a_moment(), state, np.ones(BATCH, bool))
    in_first = (np.asarray(kept.keep_indices) < N // VIEWS).sum(axis=1)
    np.testing.assert_array_equal(in_first, [4, 4])  # round(4.5) of 9 in each view, as released
    assert kept.keep_indices.shape[1] == 2 * 4
