from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig
from fastdrive_jax.training.reconstruction import (
    ReconConfig,
    init_params,
    mask_loss,
    masked_targets,
    recon_loss,
    reconstruct,
    straight_through,
    training_mask,
    unpatchify,
)

SMALL = DecoderConfig(16, 32, 2, 2, 1, 8, mrope_section=(1, 1, 2))
CONFIG = ReconConfig(
    pruner=ReconPrunerConfig(layer=SMALL), decoder=SMALL, target_pixels=7, ssim_window=5
)


ZERO = replace(CONFIG, scorer_init="zero")
KEY = jax.random.key(1)

loss_of = jax.jit(recon_loss, static_argnames="config")
loss_and_gradient = jax.jit(jax.value_and_grad(recon_loss, has_aux=True), static_argnames="config")
mask_of = jax.jit(training_mask, static_argnums=2)


@cache
def batch():
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.normal(size=(2, 6, 16)).astype(np.float32),
        "image": rng.integers(0, 255, (2, 56, 84, 3)).astype(np.uint8),
        "mask": rng.integers(0, 2, (2, 56, 84)).astype(np.uint8),
        "camera": np.zeros(2, np.int32),
    }


@pytest.fixture(scope="module")
def from_zero():
    """Params whose scorer starts at zero."""
    return jax.jit(partial(init_params, ZERO))(jax.random.key(0))


@pytest.fixture(scope="module")
def params(from_zero):
    """The same with a scorer that was drawn: another program for that would take seconds."""
    scorer = from_zero["pruner"]["scorer"]
    drawn = np.random.default_rng(0).normal(size=scorer["kernel"].shape) / 4
    pruner = from_zero["pruner"] | {"scorer": scorer | {"kernel": drawn.astype(np.float32)}}
    return from_zero | {"pruner": pruner}


def norm(tree):
    return np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(tree)))


def dot(one, other):
    leaves = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return sum(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in leaves)


def test_straight_through_has_the_masks_value_and_the_scores_gradient():
    scores, mask = np.float32([[0.3, -2.0, 5.0]]), np.float32([[1.0, 0.0, 1.0]])
    weights = np.float32([[2.0, 3.0, -1.0]])

    @jax.jit
    def value_and_gradient(scores):
        value, back = jax.vjp(lambda s: straight_through(s, mask), scores)
        return value, back(weights)[0]

    value, gradient = value_and_gradient(scores)
    np.testing.assert_allclose(value, mask)
    np.testing.assert_allclose(gradient, weights)


def test_sign_mask_is_the_papers_and_top_k_keeps_within_its_budget():
    scores = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    np.testing.assert_allclose(mask_of(scores, KEY, CONFIG), scores > 0, atol=1e-6)
    budget = replace(CONFIG, mask_mode="top_k", keep_range=(0.2, 0.3))
    kept = np.asarray(mask_of(scores, KEY, budget)).sum(1)
    assert ((kept >= 8) & (kept <= 13)).all()


def test_top_k_mask_keeps_the_best_and_has_the_sigmoids_slope():
    scores = np.float32([[0.0, 3.0, -1.0, 2.0]])
    config = replace(
        CONFIG, mask_mode="top_k", keep_range=(0.5, 0.5), surrogate="sigmoid", temperature=0.5
    )
    weights = np.float32([[1.0, 2.0, 3.0, 4.0]])

    @jax.jit
    def value_and_gradient(scores):
        value, back = jax.vjp(lambda s: training_mask(s, KEY, config), scores)
        return value, back(weights)[0]

    mask, got = value_and_gradient(scores)
    np.testing.assert_allclose(mask, [[0, 1, 0, 1]], atol=1e-6)
    width = 0.5 * scores.std()  # the threshold is the best token left out, 0
    sigmoid = 1 / (1 + np.exp(-scores / width))
    np.testing.assert_allclose(got, weights * sigmoid * (1 - sigmoid) / width, rtol=1e-4)


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_targets_hold_their_half_of_the_picture(fill):
    image = np.zeros((1, 28, 28, 3), np.uint8)
    image[:, :, :14] = 255
    mask = np.zeros((1, 28, 28), np.uint8)
    mask[:, :, :14] = 1
    config = replace(CONFIG, fill=fill, target_pixels=28)
    fore, back = masked_targets(jnp.asarray(image), jnp.asarray(mask), config)
    rest = 0.0 if fill == "zero" else 0.5
    np.testing.assert_allclose(fore[:, :, :14], 1.0)
    np.testing.assert_allclose(fore[:, :, 14:], rest)
    np.testing.assert_allclose(back[:, :, :14], rest)
    np.testing.assert_allclose(back[:, :, 14:], 0.0)


def test_unpatchify_lays_tokens_in_raster_order():
    picture = np.random.default_rng(0).random((2, 6, 9, 3))
    patches = picture.reshape(2, 2, 3, 3, 3, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 3, 3, 3)
    found = jax.jit(unpatchify, static_argnums=1)(patches.astype(np.float32), (2, 3))
    np.testing.assert_array_equal(found, picture.astype(np.float32))


def test_the_gradient_reaches_query_scorer_layer_and_decoder(params):
    _, grads = loss_and_gradient(params, batch(), KEY, config=CONFIG)
    parts = dict(grads["pruner"], decoder=grads["decoder"])
    for name in ("query", "scorer", "layer", "decoder"):
        size = norm(parts[name])
        print(f"norm of the gradient of {name}: {size:.3g}")
        assert np.isfinite(size), name
        assert size > 1e-8, name


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_the_decoder_equals_finite_differences(params, seed):
    """Of the decoder alone: a straight-through mask has the slope of its surrogate, not its own."""

    def loss(decoder):
        return float(loss_of(params | {"decoder": decoder}, batch(), KEY, config=CONFIG)[0])

    rng, here = np.random.default_rng(seed), jax.device_get(params["decoder"])
    gradient = jax.device_get(loss_and_gradient(params, batch(), KEY, config=CONFIG)[1]["decoder"])
    way = jax.tree.map(lambda g: rng.normal(size=g.shape) + 10 * np.sign(g), gradient)
    step = 1e-2 / norm(way)  # mostly uphill: far above rounding
    ends = (
        loss(jax.tree.map(lambda x, d, s=sign: np.float32(x + s * step * d), here, way))
        for sign in (1, -1)
    )
    difference = (next(ends) - next(ends)) / (2 * step)
    slope = dot(gradient, way)
    assert abs(slope) > 1e-3
    assert difference == pytest.approx(slope, rel=1e-2)


@jax.jit
def gradient_of_all_that_is_painted(params, tokens, keep):
    def painted(params, keep):
        grid = (2, 3)
        return sum(x.sum() for x in reconstruct(params, tokens, keep, grid, CONFIG))

    return jax.grad(painted, argnums=(0, 1))(params, keep)


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_gradients_stay_small_where_a_mask_keeps_all_or_nothing(params, kept):
    tokens = batch()["tokens"]
    grads = gradient_of_all_that_is_painted(params, tokens, np.full((2, 6), kept, np.float32))
    assert norm(grads) < 1e5  # without a start value of its own: over 1e11


def test_the_loss_is_the_weighted_sum_of_its_parts_and_falls(params):
    optimizer = optax.adam(3e-3)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state, losses = jax.jit(optimizer.init)(params), []
    for _ in range(25):
        (loss, metrics), grads = loss_and_gradient(params, batch(), KEY, config=CONFIG)
        params, state = update(params, state, grads)
        losses.append(float(loss))
    metrics = jax.device_get(metrics)
    want = 0.5 * (metrics["loss_fore"] + metrics["loss_back"])
    assert losses[-1] == pytest.approx(float(want), rel=1e-5)
    half = 0.2 * (1 - metrics["ssim_fore"]) + 0.8 * metrics["mse_fore"]
    assert float(metrics["loss_fore"]) == pytest.approx(float(half), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]


def test_mask_loss_is_the_cross_entropy_with_what_each_token_should_reach():
    mask = np.zeros((1, 28, 56), np.uint8)
    mask[:, :5, :14] = 1  # 70 of the first token's 784 pixels
    scores, compiled = np.float32([[1.5, -0.5]]), jax.jit(mask_loss, static_argnums=3)

    def loss(prior=(0.0, 0.0), **fields):
        config = replace(CONFIG, mask_weight=1.0, **fields)
        return float(compiled(scores, mask, np.float32([prior]), config))

    yes, no = np.log1p(np.exp(-1.5)), np.log1p(np.exp(1.5))  # of the first token
    rest = np.log1p(np.exp(-0.5))
    assert loss() == pytest.approx((yes + rest) / 2, rel=1e-5)
    assert loss(mask_share=0.2) == pytest.approx((no + rest) / 2, rel=1e-5)
    # A prior of 0.8 at surprise 0.5 asks 0.6 of foreground, and still 0 of background.
    want = (0.6 * yes + 0.4 * no + rest) / 2
    assert loss(prior=(0.8, 0.8), mask_surprise=0.5) == pytest.approx(want, rel=1e-5)


def test_without_pixels_only_the_mask_term_is_left(params):
    config = replace(CONFIG, pixel_weight=0.0, mask_weight=2.0)
    (loss, metrics), grads = loss_and_gradient(params, batch(), KEY, config=config)
    assert set(metrics) == {"loss_mask", "kept"}
    assert float(loss) == pytest.approx(2 * float(metrics["loss_mask"]), rel=1e-6)
    assert norm(grads["decoder"]) == 0
    assert norm(grads["pruner"]) > 1e-3
    half, whole = (
        loss_of(params, batch(), KEY, config=replace(CONFIG, pixel_weight=x))[0] for x in (0.5, 1.0)
    )
    assert float(half) == pytest.approx(0.5 * float(whole), rel=1e-6)
    with pytest.raises(UserError, match="mask_weight"):
        replace(CONFIG, pixel_weight=0.0)


def test_the_budget_is_the_squared_distance_of_the_kept_share_with_the_scores_gradient(params):
    base = replace(CONFIG, pixel_weight=0.0, mask_weight=1.0)
    config = replace(base, budget_weight=3.0, budget=0.2)
    ((total, metrics), grads), ((without, _), others) = (
        loss_and_gradient(params, batch(), KEY, config=each) for each in (config, base)
    )
    kept = float(metrics["kept"])
    assert 0 < kept < 1
    assert float(metrics["loss_budget"]) == pytest.approx((kept - 0.2) ** 2, rel=1e-5)
    assert float(total) - float(without) == pytest.approx(3 * (kept - 0.2) ** 2, rel=1e-4)

    # By the scorer w, S = w^T (V* . Q*) is linear: the mean score is the gradient times w.
    def along(tree):
        of = (each["pruner"]["scorer"]["kernel"] for each in (tree, params))
        return dot(*of)

    scores = jax.jit(ReconPruner(CONFIG.pruner).apply)(
        {"params": params["pruner"]}, batch()["tokens"]
    )
    slope = along(grads) - along(others)
    assert slope == pytest.approx(3 * 2 * (kept - 0.2) * float(np.mean(scores)), rel=1e-3)


def test_unknown_settings_of_budget_and_scorer_are_refused():
    wrong = {"budget": 1.5, "budget_weight": -1.0, "pixel_weight": -1.0, "scorer_init": "one"}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=name):
            replace(CONFIG, **{name: value})


def test_the_scorer_may_start_at_zero_in_the_same_tree(from_zero):
    usual = jax.eval_shape(partial(init_params, CONFIG), jax.random.key(0))
    assert jax.tree.structure(from_zero) == jax.tree.structure(usual)
    assert not np.any(from_zero["pruner"]["scorer"]["kernel"])
    _, grads = loss_and_gradient(from_zero, batch(), KEY, config=CONFIG)
    assert norm(grads["pruner"]["scorer"]) > 1e-8  # it leaves zero


def test_a_drawn_budget_is_kept_to_though_scores_are_equal():
    config = replace(CONFIG, mask_mode="top_k", keep_range=(0.5, 0.5))
    scores = np.float32([[1, 3, 3, 3, 3, 0, 0, 0], [0] * 8, [8, 7, 6, 5, 4, 3, 2, 1]])
    want = [[0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(mask_of(scores, KEY, config), want)
    rounded = np.random.default_rng(1).normal(size=(4, 3249)).astype(jnp.bfloat16)
    kept = np.asarray(mask_of(rounded, KEY, config)) > 0.5  # in bfloat16 not quite 1
    np.testing.assert_array_equal(kept.sum(axis=1), 3249 - 3249 // 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_mode": "topk"},
        {"fill": "avg"},
        {"surrogate": "sigmod"},
        {"ssim_window": 10},
        {"scorer_init": "zero", "mask_mode": "top_k"},
    ],
)
def test_unknown_words_and_scores_that_have_no_order_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        replace(CONFIG, **wrong)
