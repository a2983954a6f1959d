"""Counts beside XLA's, the caches and the papers."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from fastdrive_jax.models.attention import attention
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.openvla.config import OPENVLA_7B, OPENVLA_OFT_7B
from fastdrive_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B
from fastdrive_jax.pruning.accounting import (
    frame_cost,
    layer_flops,
    live_tokens,
    recon_pruner_flops,
)
from fastdrive_jax.pruning.interface import cut_plan
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig
from fastdrive_jax.pruning.vla_pruner import vla_pruner

GROUPED = DecoderConfig(
    hidden_size=256,
    intermediate_size=640,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=2000,
    mrope_section=(8, 12, 12),
)
EACH = replace(GROUPED, num_kv_heads=4)  # keys and values of its own for each head
N, TEXT, STEPS = 96, 32, 4
PLANS = {
    "unpruned": (),
    "before all layers": ((0, 24),),
    "within": ((1, 24),),
}


@pytest.fixture(autouse=True)
def all_scores_at_once(monkeypatch):
    """XLA counts the body of a loop once, so the kernel must have none."""
    monkeypatch.setattr(
        "fastdrive_jax.models.decoder.attention",
        functools.partial(attention, kernel="xla"),
    )


def prefill(config, plan, variables, x):
    """The last row's logits and the caches, with the first K visual tokens kept at each cut."""
    model, caches, bounds = Decoder(config), [], [0, *(layer for layer, _ in plan)]
    budgets = [N, *(k for _, k in plan)]
    for first, stop, k in zip(bounds, [*bounds[1:], config.num_layers], budgets, strict=True):
        x = x[:, jnp.concatenate([jnp.arange(k), jnp.arange(x.shape[1] - TEXT, x.shape[1])])]
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), (3, *x.shape[:2]))
        x, more = model.apply(
            variables, x, positions, (first, stop), None, room=STEPS, method="span"
        )
        caches += more
    return model.apply(variables, x[:, -1:], method="finish"), tuple(caches)


def decode(config, variables, ids, position, caches):
    model = Decoder(config)
    x = model.apply(variables, ids[:, None], method="embed")
    layers = 0, config.num_layers
    x, caches = model.apply(variables, x, position, layers, caches, method="span")
    return model.apply(variables, x, method="finish"), caches


def counted(function, *arguments):
    """Of the program before it is optimised, which differs by a thousandth and compiles nothing."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@functools.cache
def shapes_of(config, batch=1):
    x = jax.ShapeDtypeStruct((batch, N + TEXT, config.hidden_size), jnp.float32)
    positions = jax.ShapeDtypeStruct((3, batch, N + TEXT), jnp.int32)

    def everything(model, x, positions):
        return model.embed(positions[0]), model.logits(model(x, positions)[0])

    init = functools.partial(Decoder(config).init, method=everything)
    return jax.eval_shape(init, jax.random.key(0), x, positions), x


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("config", [GROUPED, EACH], ids=["grouped", "each"])
def test_xla_counts_the_same(config, plan, batch):
    cost = frame_cost(config, N, TEXT, plan, decode_steps=STEPS, batch=batch, activation_bytes=4)
    variables, x = shapes_of(config, batch)
    start = jax.jit(functools.partial(prefill, config, plan))  # traced once for both of its uses
    assert counted(start, variables, x) == pytest.approx(cost.prefill_flops, rel=0.02)
    _, caches = start.eval_shape(variables, x)
    ids = jax.ShapeDtypeStruct((batch,), jnp.int32)
    position = jax.ShapeDtypeStruct((3, batch, 1), jnp.int32)
    step = functools.partial(decode, config)
    assert counted(step, variables, ids, position, caches) == pytest.approx(
        cost.decode_flops, rel=0.02
    )
    leaves = [leaf for cache in caches for leaf in (cache.key, cache.value)]
    assert cost.kv_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_xla_counts_a_frame_that_reuses_the_same():
    plan = ((1, 24),)
    cost = frame_cost(GROUPED, N, TEXT, plan, decode_steps=STEPS, activation_bytes=4, reuse=True)
    variables, x = shapes_of(GROUPED)
    _, caches = jax.eval_shape(functools.partial(prefill, GROUPED, ()), variables, x)

    def frame(variables, x, caches):
        model, whole = Decoder(GROUPED), jnp.arange(N + TEXT)
        places = whole[-24 - TEXT :]
        spread = [jnp.broadcast_to(where, (3, 1, len(where))) for where in (whole, places)]
        x, _ = model.apply(variables, x, spread[0], (0, 1), None, STEPS, method="span")
        x, _ = model.apply(
            variables, x[:, places], spread[1], (1, 3), caches[1:], 0, places[None], method="span"
        )
        return model.apply(variables, x[:, -1:], method="finish")

    assert counted(frame, variables, x, caches) == pytest.approx(cost.prefill_flops, rel=0.02)
    leaves = [leaf for cache in caches for leaf in (cache.key, cache.value)]
    assert cost.kv_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert cost.equivalent_tokens == (N + 24 + 24) / 3


def test_a_plan_may_cut_more_than_once():
    cost = frame_cost(GROUPED, N, TEXT, ((0, 50), (1, 24), (2, 7)), decode_steps=STEPS)
    assert cost.live == (50, 24, 7)
    assert cost.equivalent_tokens == 27


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_model(tied):
    config = replace(GROUPED, tie_word_embeddings=tied)
    variables, _ = shapes_of(config)
    params = dict(variables["params"])
    if not tied:
        del params["embed_tokens"]
    cost = frame_cost(config, N, TEXT, decode_steps=STEPS, parameter_bytes=4)
    assert cost.weight_bytes == sum(4 * leaf.size for leaf in jax.tree.leaves(params))


def test_a_triangle_of_scores_is_masked():
    cost = frame_cost(replace(GROUPED, num_layers=1), 2, 1, decode_steps=0)
    assert cost.masked_flops == 4 * 3 * 256  # 3 of 9 scores: a product over D before and behind


def test_reconpruner_is_counted_as_xla_does():
    module = ReconPruner(ReconPrunerConfig(layer=GROUPED))
    tokens = jax.ShapeDtypeStruct((1, N, 256), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), tokens)
    own = recon_pruner_flops(GROUPED, N)
    assert counted(module.apply, variables, tokens) == pytest.approx(own, rel=0.02)
    cost = frame_cost(GROUPED, N, TEXT, decode_steps=STEPS, batch=3, method_flops=own)
    assert cost.method_flops == 3 * own


def test_published_counts():
    """FastV's equivalent tokens, a 3B's bytes."""
    cost = frame_cost(OPENVLA_7B.text, 576, 0, ((2, 144),), decode_steps=0)
    assert cost.live == (576,) * 2 + (144,) * 30
    assert cost.equivalent_tokens == 171
    cost = frame_cost(QWEN2_5_VL_3B.text, 3249, 0, decode_steps=0)
    assert cost.weight_bytes == pytest.approx(6.17e9, rel=1e-3)
    assert cost.kv_bytes == pytest.approx(0.120e9, rel=3e-3)
    assert cost.decode_bytes == cost.weight_bytes + cost.kv_bytes


def test_vla_pruner_on_openvla():
    """Published "FLOPs" are multiply-adds of the Llama layers at 256 + 35 tokens."""
    text, published = OPENVLA_7B.text, {1: 1.906, 0.5: 1.139, 0.25: 0.758, 0.125: 0.571}
    for keep_ratio, tera in published.items():
        plan = cut_plan(vla_pruner(), OPENVLA_7B.visual_tokens, keep_ratio, text.num_layers)
        live = live_tokens(plan, OPENVLA_7B.visual_tokens, text.num_layers)
        assert live[:3] == (256,) * 3
        assert live[3:] == (256 * keep_ratio,) * 29
        flops = sum(layer_flops(text, tokens + 35) for tokens in live)
        assert flops / 2e12 == pytest.approx(tera, rel=0.01)
        head = 2 * text.hidden_size * text.vocab_size  # of one row, which is counted beside it
        cost = frame_cost(text, OPENVLA_7B.visual_tokens, 35, plan, decode_steps=7)
        assert cost.prefill_flops == flops + head


def test_vla_pruner_on_oft():
    """Published for 589 tokens, which are 512 of two views and 77 others."""
    text = OPENVLA_OFT_7B.text
    cost = frame_cost(text, OPENVLA_OFT_7B.visual_tokens, 77, decode_steps=0)
    layers = cost.prefill_flops - 2 * text.hidden_size * text.vocab_size
    assert layers / 2e12 == pytest.approx(3.903, rel=0.01)
