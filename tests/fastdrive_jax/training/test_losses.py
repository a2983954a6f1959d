import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from fastdrive_jax.training.losses import SsimConfig, reconstruction_loss, ssim


def pictures(seed=0, batch=3, height=47, width=62, noise=0.2):
    rng = np.random.default_rng(seed)
    target = rng.random((batch, height, width, 3), np.float32)
    target[0] = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    target[1, :20] = 0.0  # masked pixels have no variance at all
    other = target + noise * rng.standard_normal(target.shape, np.float32)
    return np.clip(other, 0, 1), target


@pytest.mark.parametrize("config", [SsimConfig(), SsimConfig(15, 2.0), SsimConfig(7, 0.9, k2=0.05)])
def test_ssim_equals_scikit_image(config):
    prediction, target = pictures()
    ours = jax.jit(lambda a, b: ssim(a, b, config))(prediction, target)
    theirs = [
        structural_similarity(
            a.astype(np.float64),
            b.astype(np.float64),
            gaussian_weights=True,
            sigma=config.sigma,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=-1,
            K1=config.k1,
            K2=config.k2,
        )
        for a, b in zip(prediction, target, strict=True)
    ]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_ssim_of_constant_pictures_has_a_closed_form():
    a, b = 0.3, 0.8
    x, y = (np.full((1, 20, 24, 3), value, np.float32) for value in (a, b))
    c1 = 0.01**2
    expected = (2 * a * b + c1) / (a**2 + b**2 + c1)
    compiled = jax.jit(ssim)
    np.testing.assert_allclose(compiled(x, y), [expected], atol=2e-4)
    np.testing.assert_allclose(compiled(x, x), [1.0], atol=1e-6)


def test_ssim_gradient_equals_finite_differences():
    prediction, target = pictures(batch=2, height=16, width=18)
    with jax.enable_x64(True):
        # The stabilisers are made large so that the differences are well above rounding: the
        # blurred pictures stay float32.
        config = SsimConfig(k1=0.5, k2=0.5)

        @jax.jit
        def f(x):
            return ssim(x, target, config).sum()

        gradient = jax.jit(jax.grad(f))(prediction)
        rng = np.random.default_rng(1)
        for _ in range(4):
            way = rng.standard_normal(prediction.shape).astype(np.float32)
            step = 3e-3
            difference = (f(prediction + step * way) - f(prediction - step * way)) / (2 * step)
            np.testing.assert_allclose(np.vdot(gradient, way), difference, rtol=5e-3)


def test_gradient_is_finite_where_both_pictures_are_blank():
    blank = np.zeros((1, 16, 16, 3), np.float32)
    gradient = jax.jit(jax.grad(lambda x: reconstruction_loss(x, blank)["loss"]))(blank)
    assert np.isfinite(gradient).all()


def test_reconstruction_loss_is_the_published_mixture():
    prediction, target = pictures()
    similarity = np.mean(jax.jit(ssim)(prediction, target))
    error = np.square(prediction - target).mean()
    loss = jax.jit(reconstruction_loss, static_argnums=2)
    mixed = loss(prediction, target)
    np.testing.assert_allclose(mixed["loss"], 0.2 * (1 - similarity) + 0.8 * error, rtol=1e-6)
    np.testing.assert_allclose(mixed["ssim"], similarity, rtol=1e-6)
    np.testing.assert_allclose(mixed["mse"], error, rtol=1e-6)
    alone = loss(prediction, target, 0.0)
    assert alone.keys() == {"loss", "mse"}
    np.testing.assert_allclose(alone["loss"], error, rtol=1e-6)
    pure = loss(prediction, target, 1.0)
    np.testing.assert_allclose(pure["loss"], 1 - similarity, rtol=1e-6)


def test_losses_are_float32_from_bfloat16():
    given = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in pictures()]
    assert jax.eval_shape(ssim, *given).dtype == jnp.float32
    found = jax.eval_shape(reconstruction_loss, *given)
    assert {x.dtype for x in found.values()} == {np.dtype("float32")}


def test_wrong_shapes_and_windows_are_refused():
    x = jnp.zeros((1, 8, 20, 3))
    with pytest.raises(ValueError, match="smaller than window 11"):
        ssim(x, x)
    with pytest.raises(ValueError, match=r"two \[B, H, W, C\]"):
        ssim(x, x[:, :, :10])
    with pytest.raises(ValueError, match="odd"):
        SsimConfig(window=10)
    with pytest.raises(ValueError, match="equal shapes"):
        reconstruction_loss(x, x[..., :1])
