import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policy import small_config

from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.models.trajectory_tokens import DrivingVocabulary
from fastdrive_jax.pruning.select import top_k
from fastdrive_jax.training.driving import (
    DrivingLossConfig,
    draw_order,
    driving_loss,
    init_driving,
    plan_targets,
    planning_loss,
)

VOCABULARY = DrivingVocabulary()
LOSS = DrivingLossConfig(
    classes=3, class_weight=0.5, place_weight=2.0, place_layer=0, keep_choices=(1.0,)
)


def batch_of(config, batch: int = 2) -> dict:
    rng = np.random.default_rng(0)
    cameras, (height, width) = len(config.cameras), config.image_size
    future = np.cumsum(rng.uniform(0, 2, (batch, config.vocabulary.steps, 2)), axis=1)
    return {
        "image": rng.integers(0, 256, (batch, cameras, height, width, 3), np.uint8),
        "labels": rng.integers(0, 3, (batch, cameras, height, width)).astype(np.uint8),
        "speed": np.array([1.0, 6.0], np.float32),
        "command": np.array([0, 2], np.int32),
        "future": future.astype(np.float32),
    }


@pytest.mark.parametrize("blur", [0.0, 1.0, 3.0])
def test_targets_are_distributions_around_the_true_bin(blur):
    bins = np.array([[0, 64, 127]])
    ids = VOCABULARY.first_displacement + bins
    targets = np.asarray(jax.jit(plan_targets, static_argnums=(0, 2))(VOCABULARY, ids, blur))
    assert targets.shape == (1, 3, VOCABULARY.displacement_bins)
    np.testing.assert_allclose(targets.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(targets.argmax(axis=-1), bins)
    np.testing.assert_allclose(targets[0, 1, 63], targets[0, 1, 65], rtol=1e-5)
    ratio = np.exp(-0.5 / blur**2) if blur else 0.0
    np.testing.assert_allclose(targets[0, 1, 65] / targets[0, 1, 64], ratio, rtol=1e-4)


@pytest.fixture(scope="module")
def setting():
    config = small_config()
    model = DrivingVLA(config)
    params = jax.jit(partial(init_driving, model, LOSS))(jax.random.key(0))
    return model, params, batch_of(config)


def test_every_part_of_the_loss_falls_on_one_batch(setting):
    model, params, batch = setting
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            return driving_loss(model, LOSS, params, batch, jax.random.key(1))

        (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics | {"total": total}, grads

    state, seen = jax.jit(optimizer.init)(params), []
    for _ in range(30):
        params, state, metrics, grads = step(params, state)
        seen.append({name: float(value) for name, value in metrics.items()})
    parts = ("plan_loss", "place_loss", "class_loss")
    for name in (*parts, "total"):
        assert seen[-1][name] < 0.97 * seen[0][name], name
    weighted = sum(w * seen[0][name] for w, name in zip((1, 2, 0.5), parts, strict=True))
    np.testing.assert_allclose(seen[0]["total"], weighted, rtol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["class_head"]))


def test_hidden_plans_are_out_of_the_decoders_sight(setting):
    """If no logit sees the plan, swapping the ends of two plans leaves the sum of their losses."""
    model, params, batch = setting
    config = model.config
    shape = (2, config.visual_tokens, config.text.hidden_size)
    tokens = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    content = np.full((*shape[:2], LOSS.classes), 1 / LOSS.classes, np.float32)

    @jax.jit
    def plan_loss(moves, hidden_plan):
        loss = dataclasses.replace(LOSS, hidden_plan=hidden_plan)
        known = batch | {"future": jnp.cumsum(moves, axis=1)}
        parts = planning_loss(model, loss, params, tokens, content, known, jax.random.key(1))[1]
        return parts["plan_loss"]

    bins = np.random.default_rng(1).integers(-40, 70, (2, 2, VOCABULARY.steps, 2))
    one, other = 0.1 * bins
    swapped = [
        np.concatenate([first[:, :3], last[:, 3:]], axis=1)
        for first, last in ((one, other), (other, one))
    ]

    def change(share):
        before, after = (
            sum(plan_loss(x, share) for x in plans) for plans in ([one, other], swapped)
        )
        return abs(float(before - after))

    assert change(1.0) < 1e-5
    assert change(0.0) > 1e-4


def test_each_step_keeps_one_of_the_chosen_numbers_of_tokens(setting, monkeypatch):
    model, params, batch = setting
    loss = dataclasses.replace(LOSS, keep_choices=(1.0, 0.5, 0.5))
    count = model.config.visual_tokens
    shape = (2, count, model.config.text.hidden_size)
    tokens = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    content = np.full((*shape[:2], LOSS.classes), 1 / LOSS.classes, np.float32)
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)

    @jax.jit
    def reached(key):
        def total(x):
            return planning_loss(model, loss, params, x, content, batch, key)[0]

        return jnp.abs(jax.grad(total)(tokens)).max(axis=-1) > 0

    seen = [np.asarray(reached(jax.random.key(seed))) for seed in range(30)]
    assert {tuple(each.sum(axis=1)) for each in seen} == {(count, count), (count // 2,) * 2}
    halves = [each for each in seen if not each.all()]
    assert 12 <= len(halves) <= 27  # two thirds
    assert len({each.tobytes() for each in halves}) == len(halves)  # drawn anew each step
    assert not any(np.array_equal(*each) for each in halves)  # and for each sample


@pytest.mark.parametrize(("share", "learns"), [(1.0, True), (0.5, False)])
def test_the_encoder_learns_to_plan_from_whole_pictures_alone(setting, share, learns):
    model, params, batch = setting
    loss = dataclasses.replace(LOSS, keep_choices=(share,), class_weight=0.0)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: driving_loss(model, loss, p, batch, jax.random.key(1))[0])(params)

    found = gradient(params)["vla"]
    reached = {
        part: max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(found[part])) > 0
        for part in ("visual", "language_model")
    }
    assert reached == {"visual": learns, "language_model": True}


def test_tokens_are_left_out_scattered_in_some_samples_and_in_patches_in_others():
    rows, columns = grid = (8, 14)
    order = drawn_order(jax.random.key(0), np.zeros((400, 224, 3), np.float32), 2, grid)
    assert order.shape == (400, 2 * rows * columns)
    assert len(np.unique(order, axis=0)) == len(order)
    mask = quarter(order[:, : rows * columns]).reshape(400, rows, columns)
    beside = (mask[..., 1:] & mask[..., :-1]).sum((1, 2)) / mask[..., 1:].sum((1, 2))
    # A quarter drawn one by one would see a quarter of its left neighbours kept.
    assert np.quantile(beside, 0.05) < 0.4
    assert np.quantile(beside, 0.95) > 0.8
    assert np.abs(mask.mean(0) - 0.25).max() < 0.15  # no place is favoured


def test_every_kind_of_token_is_left_out_in_some_samples_and_kept_in_others():
    kinds = np.arange(112) % 4
    content = np.broadcast_to(np.eye(4, dtype=np.float32)[kinds], (400, 112, 4))
    mask = quarter(drawn_order(jax.random.key(0), content, 1, (8, 14)))
    kept = np.stack([mask[:, kinds == kind].mean(axis=1) for kind in range(4)], axis=1)
    assert np.abs(kept.mean(axis=0) - 0.25).max() < 0.05  # no kind is favoured
    # Of 28 tokens drawn one by one, 13 or more or 2 or fewer would come once in a hundred times.
    assert ((kept < 0.08).mean(axis=0) > 0.1).all()
    assert ((kept > 0.45).mean(axis=0) > 0.1).all()


def drawn_order(*given) -> np.ndarray:
    return np.asarray(jax.jit(draw_order, static_argnums=(2, 3))(*given))


def quarter(order: np.ndarray) -> np.ndarray:
    """The best quarter of each row."""
    kept = jax.jit(top_k, static_argnums=1)(order, order.shape[1] // 4)
    mask = np.zeros(order.shape, bool)
    np.put_along_axis(mask, kept, True, axis=1)
    return mask
