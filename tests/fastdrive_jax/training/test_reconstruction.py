from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig
from fastdrive_jax.training.reconstruction import (
    TOKEN,
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


def batch():
    rng = np.random.default_rng(0)
    return {
        "tokens": jnp.asarray(rng.normal(size=(2, 6, 16)), jnp.float32),
        "image": jnp.asarray(rng.integers(0, 255, (2, 56, 84, 3)), jnp.uint8),
        "mask": jnp.asarray(rng.integers(0, 2, (2, 56, 84)), jnp.uint8),
        "camera": jnp.zeros(2, jnp.int32),
    }


def test_straight_through_has_the_masks_value_and_the_scores_gradient():
    scores, mask = jnp.array([[0.3, -2.0, 5.0]]), jnp.array([[1.0, 0.0, 1.0]])
    np.testing.assert_allclose(straight_through(scores, mask), mask)
    weights = jnp.array([[2.0, 3.0, -1.0]])
    gradient = jax.grad(lambda s: (weights * straight_through(s, mask)).sum())(scores)
    np.testing.assert_allclose(gradient, weights)


def test_sign_mask_is_the_papers_and_top_k_keeps_within_its_budget():
    scores = jax.random.normal(jax.random.key(0), (3, 40))
    mask = training_mask(scores, jax.random.key(1), CONFIG)
    np.testing.assert_allclose(mask, scores > 0, atol=1e-6)
    budget = replace(CONFIG, mask_mode="top_k", keep_range=(0.2, 0.3))
    kept = training_mask(scores, jax.random.key(1), budget).sum(1)
    assert ((kept >= 8) & (kept <= 13)).all()


def test_top_k_mask_keeps_the_best_and_has_the_sigmoids_slope():
    scores = jnp.array([[0.0, 3.0, -1.0, 2.0]])
    config = replace(
        CONFIG, mask_mode="top_k", keep_range=(0.5, 0.5), surrogate="sigmoid", temperature=0.5
    )
    key, weights = jax.random.key(0), jnp.array([[1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_allclose(training_mask(scores, key, config), [[0, 1, 0, 1]], atol=1e-6)
    got = jax.grad(lambda s: (weights * training_mask(s, key, config)).sum())(scores)
    width = 0.5 * np.asarray(scores).std()  # the threshold is the best token left out, 0
    sigmoid = 1 / (1 + np.exp(-np.asarray(scores) / width))
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
    np.testing.assert_array_equal(
        unpatchify(jnp.asarray(patches, jnp.float32), (2, 3)), jnp.asarray(picture, jnp.float32)
    )


def test_the_gradient_reaches_query_scorer_layer_and_decoder():
    params = init_params(CONFIG, jax.random.key(0))
    gradient = jax.grad(lambda p: recon_loss(p, batch(), jax.random.key(1), config=CONFIG)[0])
    grads = jax.jit(gradient)(params)
    parts = dict(grads["pruner"], decoder=grads["decoder"])
    for name in ("query", "scorer", "layer", "decoder"):
        norm = float(optax.tree.norm(parts[name]))
        print(f"norm of the gradient of {name}: {norm:.3g}")
        assert np.isfinite(norm), name
        assert norm > 1e-8, name


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_the_decoder_equals_finite_differences(seed):
    """Of the decoder alone: a straight-through mask has the slope of its surrogate, not its own."""
    params, data = init_params(CONFIG, jax.random.key(0)), batch()

    @jax.jit
    def loss(decoder):
        whole = {"pruner": params["pruner"], "decoder": decoder}
        return recon_loss(whole, data, jax.random.key(1), config=CONFIG)[0]

    gradient = jax.grad(loss)(params["decoder"])
    leaves, tree = jax.tree.flatten(params["decoder"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    way = jax.tree.map(lambda x, g: x + 10 * jnp.sign(g), tree.unflatten(drawn), gradient)
    step = 1e-2 / optax.tree.norm(way)  # mostly uphill: far above rounding
    ends = (
        float(loss(jax.tree.map(lambda x, d, s=sign: x + s * step * d, params["decoder"], way)))
        for sign in (1, -1)
    )
    difference = (next(ends) - next(ends)) / (2 * float(step))
    slope = float(optax.tree.vdot(gradient, way))
    assert abs(slope) > 1e-3
    assert difference == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_gradients_stay_small_where_a_mask_keeps_all_or_nothing(kept):
    params = init_params(CONFIG, jax.random.key(0))
    data = batch()
    keep = jnp.full(data["tokens"].shape[:2], kept)
    height, width = data["image"].shape[1:3]

    def painted(params, keep):
        grid = height // TOKEN, width // TOKEN
        return sum(x.sum() for x in reconstruct(params, data["tokens"], keep, grid, CONFIG))

    grads = jax.jit(jax.grad(painted, argnums=(0, 1)))(params, keep)
    assert optax.tree.norm(grads) < 1e5  # without a start value of its own: over 1e11


def test_the_loss_is_the_weighted_sum_of_its_parts_and_falls():
    params = init_params(CONFIG, jax.random.key(0))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        value = jax.value_and_grad(recon_loss, has_aux=True)
        (loss, metrics), grads = value(params, batch(), jax.random.key(1), config=CONFIG)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss, metrics

    state, losses = optimizer.init(params), []
    for _ in range(25):
        params, state, loss, metrics = step(params, state)
        losses.append(float(loss))
    want = 0.5 * (metrics["loss_fore"] + metrics["loss_back"])
    assert losses[-1] == pytest.approx(float(want), rel=1e-5)
    half = 0.2 * (1 - metrics["ssim_fore"]) + 0.8 * metrics["mse_fore"]
    assert float(metrics["loss_fore"]) == pytest.approx(float(half), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]


def test_mask_loss_is_the_cross_entropy_with_what_each_token_should_reach():
    mask = np.zeros((1, 28, 56), np.uint8)
    mask[:, :5, :14] = 1  # 70 of the first token's 784 pixels
    scores = jnp.array([[1.5, -0.5]])

    def loss(prior=(0.0, 0.0), **fields):
        config = replace(CONFIG, mask_weight=1.0, **fields)
        return float(mask_loss(scores, jnp.asarray(mask), jnp.array([prior]), config))

    yes, no = np.log1p(np.exp(-1.5)), np.log1p(np.exp(1.5))  # of the first token
    rest = np.log1p(np.exp(-0.5))
    assert loss() == pytest.approx((yes + rest) / 2, rel=1e-5)
    assert loss(mask_share=0.2) == pytest.approx((no + rest) / 2, rel=1e-5)
    # A prior of 0.8 at surprise 0.5 asks 0.6 of foreground, and still 0 of background.
    want = (0.6 * yes + 0.4 * no + rest) / 2
    assert loss(prior=(0.8, 0.8), mask_surprise=0.5) == pytest.approx(want, rel=1e-5)


def test_without_pixels_only_the_mask_term_is_left():
    params = init_params(CONFIG, jax.random.key(0))
    config = replace(CONFIG, pixel_weight=0.0, mask_weight=2.0)

    @partial(jax.jit, static_argnums=1)
    def value(params, config):
        return recon_loss(params, batch(), jax.random.key(1), config=config)

    grads, metrics = jax.grad(value, has_aux=True)(params, config)
    loss, _ = value(params, config)
    assert set(metrics) == {"loss_mask", "kept"}
    assert float(loss) == pytest.approx(2 * float(metrics["loss_mask"]), rel=1e-6)
    assert optax.tree.norm(grads["decoder"]) == 0
    assert optax.tree.norm(grads["pruner"]) > 1e-3
    half, whole = (value(params, replace(CONFIG, pixel_weight=x))[0] for x in (0.5, 1.0))
    assert float(half) == pytest.approx(0.5 * float(whole), rel=1e-6)
    with pytest.raises(UserError, match="mask_weight"):
        replace(CONFIG, pixel_weight=0.0)


def test_the_budget_is_the_squared_distance_of_the_kept_share_with_the_scores_gradient():
    params = init_params(CONFIG, jax.random.key(0))
    base = replace(CONFIG, pixel_weight=0.0, mask_weight=1.0)
    config = replace(base, budget_weight=3.0, budget=0.2)

    @partial(jax.jit, static_argnums=1)
    def loss(params, config):
        return recon_loss(params, batch(), jax.random.key(1), config=config)

    (total, metrics), (without, _) = loss(params, config), loss(params, base)
    kept = float(metrics["kept"])
    assert 0 < kept < 1
    assert float(metrics["loss_budget"]) == pytest.approx((kept - 0.2) ** 2, rel=1e-5)
    assert float(total - without) == pytest.approx(3 * (kept - 0.2) ** 2, rel=1e-4)

    # By the scorer w, S = w^T (V* . Q*) is linear: the mean score is the gradient times w.
    def scorer_grad(config):
        return jax.grad(lambda p: loss(p, config)[0])(params)["pruner"]["scorer"]["kernel"]

    weights = params["pruner"]["scorer"]["kernel"]
    scores = ReconPruner(CONFIG.pruner).apply({"params": params["pruner"]}, batch()["tokens"])
    slope = float(((scorer_grad(config) - scorer_grad(base)) * weights).sum())
    assert slope == pytest.approx(3 * 2 * (kept - 0.2) * float(scores.mean()), rel=1e-3)


def test_unknown_settings_of_budget_and_scorer_are_refused():
    wrong = {"budget": 1.5, "budget_weight": -1.0, "pixel_weight": -1.0, "scorer_init": "one"}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=name):
            replace(CONFIG, **{name: value})


def test_the_scorer_may_start_at_zero_in_the_same_tree():
    zero = replace(CONFIG, scorer_init="zero")
    params, usual = init_params(zero, jax.random.key(0)), init_params(CONFIG, jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(usual)
    assert not params["pruner"]["scorer"]["kernel"].any()
    gradient = jax.grad(lambda p: recon_loss(p, batch(), jax.random.key(1), config=zero)[0])
    grads = jax.jit(gradient)(params)
    assert optax.tree.norm(grads["pruner"]["scorer"]) > 1e-8  # it leaves zero


def test_a_drawn_budget_is_kept_to_though_scores_are_equal():
    config = replace(CONFIG, mask_mode="top_k", keep_range=(0.5, 0.5))
    scores = jnp.array([[1.0, 3, 3, 3, 3, 0, 0, 0], [0.0] * 8, [8.0, 7, 6, 5, 4, 3, 2, 1]])
    mask = training_mask(scores, jax.random.key(0), config)
    want = [[0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(mask, want)
    rounded = jax.random.normal(jax.random.key(1), (4, 3249)).astype(jnp.bfloat16)
    kept = training_mask(rounded, jax.random.key(0), config) > 0.5  # in bfloat16 not quite 1
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
