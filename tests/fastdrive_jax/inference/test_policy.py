import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.generate import decode, generate, prefill
from fastdrive_jax.inference.pictures import driving_inputs
from fastdrive_jax.inference.policy import DrivingPolicy, plan
from fastdrive_jax.inference.pruned import keep_before
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA, positions, visual_positions
from fastdrive_jax.pruning import Pruner, PrunerInputs, keep_indices, make_pruner
from fastdrive_jax.pruning.recon_pruner import ReconPruner

N = 10  # tokens of a 56 x 140 picture
RUN = jax.jit(plan, static_argnums=0)


def inputs(batch: int, cameras: int = 1, seed: int = 0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (batch, cameras, 56, 140, 3), np.uint8)
    speed = rng.uniform(0, 15, batch).astype(np.float32)
    return images, speed, rng.integers(0, 3, batch).astype(np.int32)


def policy_of(config, pruner, keep_ratio) -> DrivingPolicy:
    return DrivingPolicy(
        DrivingVLA(config), make_pruner("reconpruner", config=pruner), float(keep_ratio)
    )


@partial(jax.jit, static_argnames=("module", "method"))
def applied(module, params, *given, method=None):
    return module.apply({"params": params}, *given, method=method)


def encode(config, params, images) -> np.ndarray:
    return np.asarray(applied(DrivingVLA(config), params["vla"], images, method="encode"))


def pruner_scores_of(params, pruner, tokens) -> np.ndarray:
    return np.asarray(applied(ReconPruner(pruner), params["pruner"], tokens))


@partial(jax.jit, static_argnames=("model", "renumber"))
def whole_sequence(model, params, tokens, where, ids, renumber=False):
    """Hidden states before the model and logits behind it, all in one pass.

    Args:
        model: The VLA.
        params: Its parameters.
        tokens: Visual tokens.
        where: Their position ids.
        ids: Text behind them.
        renumber: Whether all positions are 0, 1, 2 and so on.
    """
    apply = partial(model.apply, {"params": params})
    hidden, places = apply(tokens, where, ids, method="sequence")
    if renumber:
        places = jnp.broadcast_to(jnp.arange(hidden.shape[1]), places.shape)
    whole = apply(hidden, places, method=lambda vla, *x: vla.language_model(*x)[0])
    return hidden, apply(whole, method=lambda vla, x: vla.language_model.logits(x))


def test_the_best_tokens_are_kept_in_raster_order(one_camera, small_pruner):
    config, params = one_camera
    policy = policy_of(config, small_pruner, 0.5)
    images, speed, command = inputs(3)
    planned = RUN(policy, params, images, speed, command)
    assert planned.waypoints.shape == (3, 6, 2)
    assert np.isfinite(planned.waypoints).all()
    scores = pruner_scores_of(params, small_pruner, encode(config, params, images))
    best = np.sort(np.argsort(-np.asarray(scores), axis=1)[:, :5], axis=1)
    np.testing.assert_array_equal(planned.keep_indices, best)


@pytest.mark.parametrize("name", ["divprune", "prune2drive"])
def test_methods_that_choose_together_see_all_cameras(two_cameras, name):
    config, params = two_cameras
    pruner, key = make_pruner(name), jax.random.key(3)
    images, speed, command = inputs(2, cameras=2)
    policy = DrivingPolicy(DrivingVLA(config), pruner, 0.3)
    planned = RUN(policy, {**params, "pruner": None}, images, speed, command, key)
    tokens = jnp.asarray(encode(config, params, images))
    camera = jnp.tile(jnp.arange(2), (2, 1))
    whole = PrunerInputs(tokens=tokens, camera=camera, grid=config.token_grid)
    alone = jax.jit(lambda x: keep_indices(pruner, None, x, 0.3, key))(whole)
    np.testing.assert_array_equal(planned.keep_indices, alone)
    assert planned.keep_indices.shape == (2, 6)


def test_kept_tokens_keep_their_own_positions(one_camera, small_pruner):
    """The plan is the one of the kept tokens at their places in the unpruned sequence."""
    config, params = one_camera
    policy = policy_of(config, small_pruner, 0.3)
    images, speed, command = inputs(2)
    planned = RUN(policy, params, images, speed, command)
    kept = np.asarray(planned.keep_indices)
    assert (kept != np.arange(kept.shape[1])).any()
    model, variables = policy.model, {"params": params["vla"]}
    tokens = encode(config, params, images)
    rows = np.arange(2)[:, None]
    prompt = config.vocabulary.prompt(jnp.asarray(speed), jnp.asarray(command))
    logits = jax.jit(lambda t, w: prefill(model, variables, t, w, prompt).logits)
    own = np.stack([positions(config).visual[:, kept[b]] for b in range(2)], axis=1)
    closed_up = np.stack([positions(config).visual[:, : kept.shape[1]]] * 2, axis=1)
    assert np.abs(logits(tokens[rows, kept], own) - logits(tokens[rows, kept], closed_up)).max() > 0
    again = jax.jit(lambda t, w: generate(model, variables, t, w, prompt))
    np.testing.assert_allclose(planned.waypoints, again(tokens[rows, kept], own), atol=1e-4)


def test_ratio_1_is_the_unpruned_model(one_camera, small_pruner):
    config, params = one_camera
    images, speed, command = inputs(2)
    planned = RUN(policy_of(config, small_pruner, 1), params, images, speed, command)
    np.testing.assert_array_equal(planned.keep_indices, np.tile(np.arange(N), (2, 1)))
    model, variables = DrivingVLA(config), {"params": params["vla"]}

    @jax.jit
    def unpruned(images, speed, command):
        tokens = model.apply(variables, images, method="encode")
        prompt = config.vocabulary.prompt(speed, command)
        return generate(model, variables, tokens, visual_positions(config, 2), prompt)

    np.testing.assert_array_equal(planned.waypoints, unpruned(images, speed, command))


def test_a_batch_of_four_is_four_batches_of_one(one_camera, small_pruner):
    config, params = one_camera
    policy = policy_of(config, small_pruner, 0.5)
    batch = inputs(4)
    together = RUN(policy, params, *batch)
    for row in range(4):
        alone = RUN(policy, params, *(part[row : row + 1] for part in batch))
        np.testing.assert_array_equal(alone.keep_indices[0], together.keep_indices[row])
        np.testing.assert_allclose(alone.waypoints[0], together.waypoints[row], atol=1e-4)


def test_repeated_calls_compile_once(one_camera, small_pruner):
    config, params = one_camera
    policy = policy_of(config, small_pruner, 0.5)
    traces = []

    @partial(jax.jit, static_argnums=0)
    def counted(policy, *rest):
        traces.append(1)
        return plan(policy, *rest)

    outs = [counted(policy, params, *inputs(2, seed=seed)) for seed in range(3)]
    assert len(traces) == 1
    assert not np.array_equal(outs[0].keep_indices, outs[1].keep_indices)
    counted(policy_of(config, small_pruner, 0.4), params, *inputs(2))
    assert len(traces) == 2


def test_two_cameras_share_one_budget(two_cameras, small_pruner):
    config, params = two_cameras
    policy = policy_of(config, small_pruner, 0.5)
    tokens = np.random.default_rng(1).normal(size=(4, 2 * N, 32)).astype(np.float32)
    halves = tokens[:, :N], tokens[:, N:]
    alone = [pruner_scores_of(params, small_pruner, half) for half in halves]

    @jax.jit
    def before(params, tokens):
        return keep_before(policy.pruner, params, driving_inputs(config, tokens), 0.5).indices

    kept = np.asarray(before(params["pruner"], tokens))
    assert kept.shape == (4, N)
    best = np.argsort(-np.concatenate(alone, axis=1), axis=1)[:, :N]
    np.testing.assert_array_equal(kept, np.sort(best, axis=1))
    front = (kept < N).sum(axis=1)
    assert (front != N // 2).any(), "the budget was split evenly over the cameras"
    planned = RUN(policy, params, *inputs(2, cameras=2))
    assert planned.keep_indices.shape == (2, N)
    assert planned.waypoints.shape == (2, 6, 2)


def test_a_method_that_draws_follows_its_key(one_camera):
    config, params = one_camera
    policy = DrivingPolicy(DrivingVLA(config), make_pruner("random"), 0.5)
    given = {"vla": params["vla"], "pruner": None}
    kept = [
        np.asarray(RUN(policy, given, *inputs(2), jax.random.key(seed)).keep_indices)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[0], kept[2])
    with pytest.raises(ValueError, match="key"):
        RUN(policy, given, *inputs(2))


@pytest.mark.parametrize("ratio", [0, 1.2])
def test_a_ratio_out_of_range_is_refused(one_camera, small_pruner, ratio):
    config, params = one_camera
    with pytest.raises(UserError, match="keep_ratio"):
        RUN(policy_of(config, small_pruner, ratio), params, *inputs(1))


def test_without_a_picture_it_plans_from_the_prompt(one_camera):
    config, params = one_camera
    model, variables = DrivingVLA(config), {"params": params["vla"]}
    prompt = config.vocabulary.prompt(jnp.array([1.0, 9.0]), jnp.array([0, 2]))
    tokens, where = np.zeros((2, 0, 32), np.float32), np.zeros((3, 2, 0), np.int32)
    prefilled = jax.jit(lambda t, w: prefill(model, variables, t, w, prompt))(tokens, where)
    hidden, logits = whole_sequence(model, params["vla"], tokens, where, prompt)
    assert hidden.shape == (2, 6, 32)
    np.testing.assert_allclose(prefilled.logits, logits[:, -1], atol=1e-5)


def test_positions_are_given_out_anew_to_what_such_a_method_leaves(one_camera):
    config, params = one_camera
    model = DrivingVLA(config)
    method = dataclasses.replace(make_pruner("divprune"), renumber=True)
    images, speed, command = inputs(2)
    given = {"vla": params["vla"], "pruner": None}
    planned = RUN(DrivingPolicy(model, method, 0.5), given, images, speed, command)
    own = RUN(DrivingPolicy(model, make_pruner("divprune"), 0.5), given, images, speed, command)
    np.testing.assert_array_equal(planned.keep_indices, own.keep_indices)
    # Teacher forcing on positions 0, 1, 2 and so on gives the same trajectory.
    kept = np.asarray(planned.keep_indices)
    tokens = encode(config, params, images)[np.arange(2)[:, None], kept]
    vocabulary = config.vocabulary
    plan_ids = vocabulary.encode(planned.waypoints)
    ids = jnp.concatenate([vocabulary.prompt(speed, command), plan_ids[:, :-1]], axis=1)
    none = np.zeros((3, 2, 5), np.int32)
    _, logits = whole_sequence(model, params["vla"], tokens, none, ids, renumber=True)
    logits = np.asarray(logits)[:, -12:]
    first = vocabulary.first_displacement
    want = first + np.argmax(logits[..., first : first + vocabulary.displacement_bins], axis=-1)
    np.testing.assert_array_equal(plan_ids, want)


def test_decoding_gives_displacement_ids_only(one_camera):
    config, params = one_camera
    model, variables = DrivingVLA(config), {"params": params["vla"]}
    vocabulary = config.vocabulary
    tokens = jax.random.normal(jax.random.key(0), (2, N, 32))
    prompt = vocabulary.prompt(jnp.array([1.0, 9.0]), jnp.array([0, 2]))

    @jax.jit
    def tempted(tokens):
        prefilled = prefill(model, variables, tokens, visual_positions(config, 2), prompt)
        tempting = prefilled.replace(logits=prefilled.logits.at[:, 0].set(1e6))
        return decode(model, variables, tempting).ids

    ids = np.asarray(tempted(tokens))
    first = vocabulary.first_displacement
    assert ids.shape == (2, 12)
    assert ((ids >= first) & (ids < first + vocabulary.displacement_bins)).all()


def test_a_method_before_the_model_may_ask_for_the_prompt(one_camera):
    """Whatever the page on methods lists is given."""
    config, params = one_camera
    seen = {}

    def score(_, inputs, key):
        del key
        seen.update(text=inputs.text, valid=inputs.text_valid, embeddings=inputs.embeddings)
        return inputs.tokens.mean(axis=-1)

    needs = frozenset({"tokens", "text", "embeddings"})
    policy = DrivingPolicy(DrivingVLA(config), Pruner("words", score=score, needs=needs), 0.5)
    jax.eval_shape(partial(plan, policy), params, *inputs(2))
    assert seen["text"].shape == (2, 3, seen["embeddings"].shape[-1])
    assert seen["valid"].shape == (2, 3)
