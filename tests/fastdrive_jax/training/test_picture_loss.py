import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from small_openvla import random_params

from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.models.qwen2_5_vl.vision import VisionEncoder
from fastdrive_jax.parallel.mesh import batch_sharding, make_mesh
from fastdrive_jax.parallel.rules import tree_shardings
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.training.picture_loss import encode_pictures, picture_loss
from fastdrive_jax.training.reconstruction import ReconConfig, init_params, recon_loss
from fastdrive_jax.training.state import init_train_state, make_train_step

ENCODER = VisionConfig(
    depth=1,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    out_hidden_size=64,
    fullatt_block_indexes=(0,),
)
LAYER = DecoderConfig(
    hidden_size=64,
    intermediate_size=96,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=16,
    mrope_section=(2, 3, 3),
)
CONFIG = ReconConfig(
    pruner=ReconPrunerConfig(layer=dataclasses.replace(LAYER, num_layers=1)),
    decoder=LAYER,
    target_pixels=14,
    mask_mode="top_k",
    surrogate="sigmoid",
    mask_weight=1.0,
)
GRID = (4, 6)
OPTIMIZER = optax.adamw(1e-3)


@functools.cache
def batch(size=8):
    rng = np.random.default_rng(0)
    side = (28 * GRID[0], 28 * GRID[1])
    return {
        "image": rng.integers(0, 256, (size, *side, 3), np.uint8),
        "mask": rng.integers(0, 2, (size, *side), np.uint8),
    }


@functools.cache
def encoder_params():
    shape = jnp.zeros((1, *batch()["image"].shape[1:]), jnp.uint8)
    shapes = jax.eval_shape(VisionEncoder(ENCODER).init, jax.random.key(1), shape)
    return random_params(shapes["params"], seed=1)


@functools.cache
def params(config=CONFIG):
    init = functools.partial(init_params, config)
    return random_params(jax.eval_shape(init, jax.random.key(0)))


def loss_of(config=CONFIG, dtype=jnp.float32):
    encode = functools.partial(encode_pictures, config=ENCODER, dtype=dtype)
    return functools.partial(picture_loss, config=config, encode=encode, dtype=dtype)


@functools.cache
def step_of(config=CONFIG, dtype=jnp.float32):
    """`((loss, metrics), (gradient, the frozen encoder's))`."""
    return jax.jit(jax.value_and_grad(loss_of(config, dtype), argnums=(0, 3), has_aux=True))


@functools.cache
def usual():
    return step_of()(params(), batch(), jax.random.key(2), {"encoder": encoder_params()})


def test_it_is_the_loss_of_the_encoders_tokens():
    @jax.jit
    def by_tokens(params, encoder, batch, key):
        tokens = encode_pictures(encoder, batch["image"], ENCODER, jnp.float32)
        return recon_loss(params, {**batch, "tokens": tokens}, key, config=CONFIG)

    expected, _ = by_tokens(params(), encoder_params(), batch(), jax.random.key(2))
    (found, metrics), _ = usual()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert 0 < metrics["kept"] < 1


def test_the_encoder_gets_no_gradient():
    _, (_, grads) = usual()
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


def test_bfloat16_arithmetic_with_float32_parameters():
    small = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), encoder_params())
    given = params(), batch(), jax.random.key(2), {"encoder": small}
    (found, _), (grads, _) = step_of(dtype=jnp.bfloat16)(*given)
    (expected, _), (full, _) = usual()
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(found, expected, rtol=0.02)
    one, two = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (grads, full))
    cosine = np.vdot(one, two) / np.linalg.norm(one) / np.linalg.norm(two)
    print(f"loss {found:.5f} and {expected:.5f}, cosine of the gradients {cosine:.4f}")
    assert cosine > 0.95
    text = jax.jit(loss_of(dtype=jnp.bfloat16)).lower(*given)
    products = [line for line in text.as_text().splitlines() if "dot_general" in line]
    # All but the SSIM's windows, whose variances are small differences of large moments, and the
    # scores of the blockwise attention, which a CPU computes in float32 as quickly.
    others = [line for line in products if "HIGHEST" not in line and "bf16" not in line]
    assert len(others) <= 3 < sum("bf16" in line for line in products) / 5


@pytest.mark.parametrize("remat", ["dots", "layer"])
def test_remat_changes_no_gradient_and_saves_memory(remat):
    given = params(), batch(), jax.random.key(2), {"encoder": encoder_params()}
    again = step_of(dataclasses.replace(CONFIG, remat=remat))
    (_, (expected, _)), (_, (found, _)) = usual(), again(*given)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, expected)
    text = again.lower(*given).as_text()
    assert "optimization_barrier" in text  # what jax.checkpoint leaves in the program


def test_every_gradient_is_that_of_one_device():
    """A mesh of three axes, and a decoder that is wider than the tokens, of few of them.

    There XLA's partitioner made wrong gradients of a right loss (see `ReconDecoder`).
    """
    sizes = {"hidden_size": 128, "intermediate_size": 384, "mrope_section": (4, 6, 6)}
    wide = dataclasses.replace(LAYER, **sizes)
    config = dataclasses.replace(CONFIG, decoder=wide, mask_mode="sign", surrogate="identity")
    small = {name: value[:, :56, :84] for name, value in batch().items()}  # 2 x 3 tokens

    def grads(*shape):
        mesh = make_mesh(*shape)
        trees = jax.device_get((params(config), {"encoder": encoder_params()}))
        trained, frozen = (jax.device_put(x, tree_shardings(x, mesh)) for x in trees)
        given = jax.device_put(small, batch_sharding(mesh))
        with jax.set_mesh(mesh):
            run = jax.jit(jax.grad(loss_of(config), has_aux=True))
            found, _ = run(trained, given, jax.random.key(2), frozen)
        return traverse_util.flatten_dict(jax.device_get(found), sep="/")

    expected, found = grads(1, 1, 1), grads(2, 2, 2)
    for name, value in expected.items():
        if "k_proj/bias" not in name:  # it moves no softmax: noise
            largest = np.abs(value).max()
            np.testing.assert_allclose(found[name], value, atol=1e-4 * largest, err_msg=name)


@functools.cache
def curve(data, fsdp, tensor):
    """Losses of 20 steps in float32 on a mesh, and the params in the end."""
    mesh = make_mesh(data, fsdp, tensor)
    init = functools.partial(
        init_train_state, lambda key: init_params(CONFIG, key), OPTIMIZER, seed=0
    )
    places = tree_shardings(jax.eval_shape(init), mesh)
    frozen = {"encoder": encoder_params()}
    frozen = jax.device_put(frozen, tree_shardings(frozen, mesh))
    given = jax.device_put(batch(), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=places)()
        step = jax.jit(
            make_train_step(loss_of(), OPTIMIZER), donate_argnums=0, out_shardings=(places, None)
        )
        losses = []
        for _ in range(20):
            state, metrics = step(state, given, frozen)
            losses.append(metrics["loss"])
    return np.array(losses), jax.device_get(state.params), state


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 1, 2), (2, 2, 2)])
def test_any_mesh_has_the_loss_curve_of_one_device(shape):
    losses, params, state = curve(*shape)
    expected, ones, _ = curve(1, 1, 1)
    print(f"{shape}: max abs difference of losses {np.abs(losses - expected).max():.1e}")
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    # A bias of all keys moves no softmax: its gradient is noise, which Adam makes into steps.
    for name, value in traverse_util.flatten_dict(params, sep="/").items():
        if "k_proj/bias" not in name:
            other = traverse_util.flatten_dict(ones, sep="/")[name]
            np.testing.assert_allclose(value, other, atol=2e-3, err_msg=name)
    kernel = state.params["decoder"]["layer_0"]["mlp"]["up_proj"]["kernel"]
    local = kernel.addressable_shards[0].data.shape
    assert local == (64 // shape[1], 96 // shape[2])
    moment = state.opt_state[0].mu["decoder"]["layer_0"]["mlp"]["up_proj"]["kernel"]
    assert moment.sharding == kernel.sharding
