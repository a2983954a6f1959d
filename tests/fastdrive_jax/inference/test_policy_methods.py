"""Every method drives: two frames of two cameras, one compiled program, its state handed on."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.inference.policy import (
    DrivingPolicy,
    frame_policy,
    picture_inputs,
    plan,
    plan_tokens,
    start_state,
)
from fastdrive_jax.models.qwen2_5_vl.driving import VISION_END, DrivingVLA
from fastdrive_jax.pruning import PRUNERS, Pruner, builds_on_recon, make_pruner
from fastdrive_jax.pruning.cd_pruner import text_relevance
from fastdrive_jax.pruning.interface import Cuts, cut_plan

CAMERAS, N, LAYERS, BATCH = 2, 20, 5, 2


@pytest.fixture(scope="module")
def deep(two_cameras, small_init):
    """The small VLA with five layers, so that methods with four cuts fit in."""
    config, _ = two_cameras
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=LAYERS))
    return config, small_init(config)


def method(name, small_pruner, params):
    if builds_on_recon(name):
        return make_pruner(name, config=small_pruner), params["pruner"]
    weights = jnp.linspace(0, 1, N).reshape(CAMERAS, -1) if name == "prior" else None
    return make_pruner(name), weights


def frame(seed, batch=BATCH):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (batch, CAMERAS, 56, 140, 3), np.uint8)
    speed = rng.uniform(0, 15, batch).astype(np.float32)
    foreground = rng.random((batch, N)).astype(np.float32)
    return images, foreground, speed, rng.integers(0, 3, batch).astype(np.int32)


@pytest.mark.parametrize("name", PRUNERS)
def test_every_method_drives(deep, two_cameras, small_pruner, name):
    pruner, weights = method(name, small_pruner, deep[1])
    within = pruner.cuts is not None or pruner.temporal is not None
    config, params = deep if within else two_cameras  # before the model one layer is as good
    policy = DrivingPolicy(DrivingVLA(config), pruner, 0.4)
    given = {"vla": params["vla"], "pruner": weights}
    traces = []

    @jax.jit
    def step(given, images, foreground, speed, command, state):
        traces.append(1)
        variables = {"params": given["vla"]}
        inputs = picture_inputs(policy.model, variables, images, pruner.needs)
        inputs = inputs.replace(foreground=foreground, state=state)
        return plan_tokens(policy, given, inputs, speed, command, jax.random.key(0))

    state = start_state(policy, BATCH)
    assert (state is None) == (pruner.temporal is None)
    plans = []
    for seed in (0, 1, 1):
        planned = step(given, *frame(seed), state)
        assert jax.tree.structure(planned.state) == jax.tree.structure(state)
        state = planned.state
        plans.append(planned)
        k = cut_plan(pruner, N, 0.4, config.text.num_layers)[-1][1]
        kept = np.asarray(planned.keep_indices)
        assert kept.shape == (BATCH, k)
        assert (np.diff(kept, axis=1) > 0).all()
        assert kept.min() >= 0
        assert kept.max() < N
        assert np.isfinite(planned.waypoints).all()
    assert len(traces) == 1
    blind = {"random", "uniform", "prior"}  # whatever the picture shows
    changed = (plans[0].keep_indices != plans[1].keep_indices).any()
    assert changed != (name in blind)


def test_a_drive_that_begins_anew_forgets(deep):
    """Sample 0 begins a drive with the third frame: it plans as after no frame."""
    config, params = deep
    policy = DrivingPolicy(DrivingVLA(config), make_pruner("vlapruner"), 0.3)
    given = {"vla": params["vla"], "pruner": None}

    @jax.jit
    def step(images, speed, command, state, first):
        return plan(policy, given, images, speed, command, None, state, first)

    def drive(seeds, firsts):
        state = start_state(policy, BATCH)
        for seed, first in zip(seeds, firsts, strict=True):
            images, _, speed, command = frame(seed)
            planned = step(images, speed, command, state, jnp.asarray(first))
            state = planned.state
        return planned

    no = [False, False]
    went_on = drive((0, 1, 2), (no, no, no))
    restarted = drive((0, 1, 2), (no, no, [True, False]))
    fresh = drive((2,), (no,))
    np.testing.assert_array_equal(restarted.state["frames"], [1, 3])
    np.testing.assert_allclose(restarted.state["rows"][0], fresh.state["rows"][0], atol=1e-6)
    np.testing.assert_array_equal(restarted.keep_indices[0], fresh.keep_indices[0])
    np.testing.assert_allclose(restarted.state["rows"][1], went_on.state["rows"][1], atol=1e-6)
    # What was kept got attention, what was not got none.
    newest = np.asarray(went_on.state["rows"][:, 0])
    for row, kept in zip(newest, np.asarray(went_on.keep_indices), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), kept)


def test_a_method_that_warms_up_watches_without_pruning(deep):
    config, params = deep
    policy = DrivingPolicy(DrivingVLA(config), make_pruner("vlapruner", window=2), 0.3)
    given = {"vla": params["vla"], "pruner": None}
    run, state = jax.jit(plan, static_argnums=0), start_state(policy, BATCH)
    kept = []
    for number in range(3):
        images, _, speed, command = frame(number)
        now = frame_policy(policy, number)
        planned = run(now, given, images, speed, command, None, state)
        state = planned.state
        kept.append(planned.keep_indices.shape[1])
        assert (np.asarray(state["rows"][:, 0]) > 0).sum() == BATCH * kept[-1]
    assert kept == [N, N, 6]
    plain = DrivingPolicy(DrivingVLA(config), make_pruner("fastv"), 0.3)
    assert frame_policy(plain, 0) is plain


@pytest.mark.parametrize("layers", [(2,), (1, 3)])
def test_relevance_is_that_to_the_text_within_the_model_too(deep, layers):
    """By hand: the cosine of each token to the prompt behind the pictures, before the first layer.

    At a second cut it is that of the tokens that are left.
    """
    config, params = deep
    model, variables = DrivingVLA(config), {"params": params["vla"]}
    seen = []

    def score(params, inputs, key):
        jax.debug.callback(lambda *found: seen.append(found), inputs.relevance, inputs.ids)
        return inputs.relevance

    pruner = Pruner(
        name="relevant",
        score=score,
        needs=frozenset({"relevance"}),
        cuts=Cuts(lambda num_layers: layers, lambda n, ratio: (12, 8)[-len(layers) :]),
    )
    images, _, speed, command = frame(3)
    given = {"vla": params["vla"], "pruner": None}
    run = jax.jit(plan, static_argnums=0)
    planned = run(DrivingPolicy(model, pruner, 0.4), given, images, speed, command)
    jax.effects_barrier()

    @jax.jit
    def by_hand(variables, images, speed, command):
        tokens = model.apply(variables, images, method="encode")
        prompt = config.vocabulary.prompt(speed, command)
        prompt = jnp.pad(prompt, ((0, 0), (1, 0)), constant_values=VISION_END)
        text = model.apply(variables, prompt, method=lambda vla, ids: vla.language_model.embed(ids))
        return text_relevance(tokens, text)

    want = np.asarray(by_hand(variables, images, speed, command))
    assert len(seen) == len(layers)
    for relevance, ids in seen:
        np.testing.assert_allclose(relevance, np.take_along_axis(want, ids, axis=1), atol=1e-5)
    best = np.sort(np.argsort(-want, axis=1)[:, :8], axis=1)
    np.testing.assert_array_equal(planned.keep_indices, best)


def test_a_method_before_the_model_is_told_which_text_is_real(deep):
    config, params = deep

    def score(params, inputs, key):
        return inputs.tokens[..., 0] * inputs.text_valid.sum(axis=1, keepdims=True)

    pruner = Pruner("asks", score, frozenset({"tokens", "text_valid"}))
    images, _, speed, command = frame(4)
    given = {"vla": params["vla"], "pruner": None}
    policy = DrivingPolicy(DrivingVLA(config), pruner, 0.4)
    planned = jax.eval_shape(partial(plan, policy), given, images, speed, command)
    assert planned.keep_indices.shape == (BATCH, 8)
